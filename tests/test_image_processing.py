"""Frames of any kind to the network's input, against Pillow and arithmetic written out."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from hf_deformvos import DeformVosImageProcessor
from hf_deformvos.image_processing_deformvos import network_size, to_rgb
from hf_deformvos.video import read_image


MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
LIMITS = SizeDict(shortest_edge=480, longest_edge=1536)


@pytest.fixture
def frame():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 854), (481, 849)),
        ((854, 480), (849, 481)),
        ((720, 1280), (481, 849)),
        ((1080, 1920), (481, 849)),
        ((96, 160), (97, 161)),  # smaller than the bound: not enlarged
        ((300, 6000), (81, 1537)),  # the long side has a bound of its own
        ((1, 1), (17, 17)),
        ((7, 500), (17, 497)),
    ],
)
def test_network_size(size, expected):
    assert network_size(*size, LIMITS) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((240, 432), (481, 865)),  # twice as large, to the bound
        ((360, 640), (481, 849)),
        ((100, 160), (193, 321)),  # no more than twice
        ((720, 1280), (481, 849)),
        ((300, 1200), (385, 1537)),  # the long side has a bound of its own
    ],
)
def test_small_frames_are_enlarged_as_far_as_is_allowed(size, expected):
    assert network_size(*size, LIMITS, 2.0) == expected
    frame = np.zeros((*size, 3), dtype=np.uint8)
    assert DeformVosImageProcessor(max_enlargement=2.0)(frame).pixel_values.shape[-2:] == expected


@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf")])
def test_enlargements_that_are_none_are_refused(frame, factor):
    with pytest.raises(ValueError, match="`max_enlargement` must be a finite number of at least 1, got"):
        DeformVosImageProcessor(max_enlargement=factor)(frame)


def test_pixels_are_resized_and_normalised(frame):
    inputs = DeformVosImageProcessor()(frame, return_tensors="pt")
    assert inputs.original_sizes == [(50, 70)]
    resized = np.asarray(Image.fromarray(frame).resize((65, 49), Image.BILINEAR))
    expected = (resized / 255.0 - MEAN) / DEVIATION
    assert inputs.pixel_values.shape == (1, 3, 49, 65)
    assert inputs.pixel_values.dtype == torch.float32
    np.testing.assert_allclose(inputs.pixel_values[0].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["pil", "chw", "torch", "unit", "wide", "alpha", "batch of one"])
def test_every_kind_of_frame_is_the_same_frame(kind, frame):
    alpha = np.concatenate([frame, np.zeros_like(frame[..., :1])], axis=-1)
    same = {
        "pil": Image.fromarray(frame),
        "chw": np.moveaxis(frame, -1, 0),
        "torch": torch.from_numpy(frame).permute(2, 0, 1),
        "unit": (frame / 255.0).astype(np.float32),
        "wide": frame.astype(np.int64),
        "alpha": alpha,
        "batch of one": frame[None],
    }[kind]
    processor = DeformVosImageProcessor()
    torch.testing.assert_close(processor(same).pixel_values[0], processor(frame).pixel_values[0])


def test_floats_that_resampling_took_beyond_the_range_are_in_it(frame):
    beyond = (frame / 255.0).astype(np.float32)
    beyond[0, 0], beyond[1, 1] = 1.0000001, -0.13
    beyond[2, 2] = 1.11
    within = beyond.clip(0, 1)
    one, other = (DeformVosImageProcessor()(images).pixel_values for images in (beyond, within))
    assert torch.equal(one, other) and one.std() > 0.3


# Frames, (height, width, channels), whose first side could be channels too.
LOW = [(1, 120, 3), (3, 120, 3), (4, 120, 3), (3, 120, 4), (3, 120, 1), (1, 1, 3)]


@pytest.mark.parametrize("shape", LOW)
def test_low_frames_are_what_their_pictures_are(shape):
    frame = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    first = np.moveaxis(frame, -1, 0)
    processor = DeformVosImageProcessor()
    expected = processor(Image.fromarray(frame.squeeze(-1) if shape[-1] == 1 else frame))
    assert expected.original_sizes == [shape[:2]]
    for same, options in (
        (frame, {}),
        (frame[None], {}),
        (frame / 255, {}),
        (first, {"input_data_format": "channels_first"}),
        (torch.from_numpy(first), {}),
        (torch.from_numpy(frame), {"input_data_format": "channels_last"}),
    ):
        inputs = processor(same, **options)
        assert inputs.original_sizes == expected.original_sizes
        torch.testing.assert_close(inputs.pixel_values, expected.pixel_values)


GREYS = {
    "one channel": lambda grey: grey[..., None],
    "height, width": lambda grey: grey,
    "three rows": lambda grey: grey[:3],
    "tensor": torch.from_numpy,
    "unit": lambda grey: grey / 255.0,
    "L": Image.fromarray,
    "I;16": lambda grey: Image.fromarray(grey.astype("<u2") * 257),
    "I;16B": lambda grey: Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2")),
    "I of 16 bits": lambda grey: Image.fromarray(grey.astype(np.int32) * 257),
    "I of 8 bits": lambda grey: Image.fromarray(grey.astype(np.int32)),
    "F in 0..1": lambda grey: Image.fromarray(grey.astype(np.float32) / 255),
    "F in 0..255": lambda grey: Image.fromarray(grey.astype(np.float32)),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_frames_become_rgb(kind, frame):
    processor = DeformVosImageProcessor()
    grey = frame[:3, :, 0] if kind == "three rows" else frame[..., 0]
    expected = processor(Image.fromarray(grey).convert("RGB")).pixel_values[0]
    inputs = processor([GREYS[kind](frame[..., 0]), frame])
    assert len(inputs.pixel_values) == 2 and inputs.original_sizes[0] == grey.shape
    torch.testing.assert_close(inputs.pixel_values[0], expected)


PICTURES = [kind for kind in GREYS if isinstance(GREYS[kind](np.zeros((2, 2), np.uint8)), Image.Image)]


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_brought_to_rgb_as_the_processor_sees_them(kind, frame):
    picture = to_rgb(GREYS[kind](frame[..., 0]))
    assert picture.mode == "RGB" and np.array_equal(picture, np.repeat(frame[..., :1], 3, axis=2))


def test_deep_pictures_are_what_the_video_reader_makes_of_their_files(tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (50, 70), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    processor = DeformVosImageProcessor()
    with Image.open(tmp_path / "deep.png") as picture:
        same = processor(picture).pixel_values
    torch.testing.assert_close(same, processor(read_image(tmp_path / "deep.png")).pixel_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_floating_point_tensors_of_any_kind_are_taken(dtype, requires_grad, frame):
    processor = DeformVosImageProcessor()
    tensor = torch.from_numpy(frame).to(dtype).requires_grad_(requires_grad)
    pixels = processor(tensor).pixel_values
    torch.testing.assert_close(pixels, processor(frame).pixel_values)
    assert not pixels.requires_grad


@pytest.mark.parametrize(
    "nest", [lambda f: iter([f, f]), lambda f: [[f], [f]], lambda f: [f[None], f], lambda f: (f, f)]
)
def test_frames_may_be_nested(nest, frame):
    assert DeformVosImageProcessor()(nest(frame)).pixel_values.shape == (2, 3, 49, 65)


def test_frames_of_one_size_are_stacked_and_others_listed(frame):
    processor = DeformVosImageProcessor()
    assert processor([frame, frame], return_tensors="pt").pixel_values.shape == (2, 3, 49, 65)
    inputs = processor([frame, frame[:30]])
    assert [tuple(pixels.shape) for pixels in inputs.pixel_values] == [(3, 49, 65), (3, 33, 65)]
    assert inputs.original_sizes == [(50, 70), (30, 70)]


def test_settings_survive_saving(tmp_path, frame):
    DeformVosImageProcessor(size={"shortest_edge": 32}, max_enlargement=1.5).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, DeformVosImageProcessor)
    assert loaded(frame).pixel_values.shape[-2:] == (33, 49)
    assert loaded(frame[:20, :28]).pixel_values.shape[-2:] == (33, 49) and loaded.max_enlargement == 1.5
    assert loaded(frame, size={"shortest_edge": 17}).pixel_values.shape[-2:] == (17, 17)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda f: np.where(f > 250, np.nan, f), "NaN"),
        (lambda f: f.astype(np.int64) - 5, r"0\.\.255"),
        (lambda f: f.astype(np.uint16) * 257, r"0\.\.255"),
        (lambda f: Image.fromarray(f[..., 0].astype(np.int32) - 1), r"from -1 to 254; they must lie in 0\.\.255"),
        (lambda f: Image.fromarray(f[..., 0].astype(np.int32) * 300), r"from 0 to 76500; they must .* 0\.\.65535"),
        (lambda f: Image.fromarray(f[..., 0].astype(np.float32) * 9), r"from 0\.0 to 2295\.0; they must"),
    ],
)
def test_bad_frames_are_refused(broken, message, frame):
    with pytest.raises(ValueError, match=message):
        DeformVosImageProcessor()(broken(frame))
    if isinstance(broken(frame), Image.Image):
        with pytest.raises(ValueError, match=f"The picture has values {message}"):
            to_rgb(broken(frame))


def test_options_of_transformers_do_what_they_do_there():
    frame = np.random.default_rng(0).integers(0, 256, (97, 161, 3), dtype=np.uint8)
    processor = DeformVosImageProcessor(size={"shortest_edge": 97})
    expected = processor(frame, return_tensors="pt").pixel_values
    kept = processor(frame.astype(np.float32) / 255, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(kept, expected)
    raw = processor(frame, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values
    np.testing.assert_array_equal(raw[0].permute(1, 2, 0).numpy(), frame)
    one, three = (
        processor(frame, image_mean=mean, image_std=mean, return_tensors="pt").pixel_values
        for mean in (0.5, [0.5] * 3)
    )
    assert torch.equal(one, three)
    for name in ("do_pad", "do_center_crop"):
        with pytest.raises(ValueError, match=f"`{name}` must be left out"):
            processor(frame, **{name: True})
    with pytest.raises(ValueError, match="`image_mean` must be one number or three"):
        processor(frame, image_mean=[0.5, 0.5])


NO_FRAMES = {
    "None": (lambda f: None, "Frame 0 .* got NoneType"),
    "None in a list": (lambda f: [f, None], "Frame 1 .* got NoneType"),
    "dict": (lambda f: {"frame": f}, "Frame 0 .* got dict"),
    "lists of numbers": (lambda f: f.tolist(), "Frame 0 .* got int"),
    "five dimensions": (lambda f: f[None, None], r"Frame 0 .* got uint8 of shape \(1, 1, 50, 70, 3\)"),
    "one dimension": (lambda f: f[0, 0], r"Frame 0 .* got uint8 of shape \(3,\)"),
    "two channels": (lambda f: f[..., :2], r"Frame 0 .* got uint8 of shape \(50, 70, 2\)"),
    "complex": (lambda f: f.astype(complex), r"Frame 0 .* got complex128 of shape \(50, 70, 3\)"),
    "objects": (lambda f: np.array([f, None], dtype=object), r"Frame 0 .* got object of shape \(2,\)"),
    "bool": (lambda f: f[..., 0] > 9, r"Frame 0 .* got bool of shape \(50, 70\)\. .* `frame \* 255`"),
    "no row": (lambda f: f[:0], r"Frame 0 .* got uint8 of shape \(0, 70, 3\)"),
    "no column": (lambda f: Image.new("I", (0, 4)), "Frame 0 .* got a picture of 0x4"),
    "empty list": (lambda f: [], "`images` holds no frame, got an empty list"),
    "empty batch": (lambda f: f[None][:0], "`images` holds no frame, got an empty ndarray"),
}


@pytest.mark.parametrize("kind", NO_FRAMES)
def test_what_is_no_frame_is_named_in_a_line(kind, frame):
    make, message = NO_FRAMES[kind]
    with pytest.raises(ValueError, match=message) as caught:
        DeformVosImageProcessor()(make(frame))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("option", ["input_data_format", "do_convert_rgb"])
def test_options_that_leave_no_channels_are_named(option, frame):
    broken = {
        "input_data_format": lambda: DeformVosImageProcessor()(frame, input_data_format="channels_first"),
        "do_convert_rgb": lambda: DeformVosImageProcessor()(Image.new("LA", (8, 9)), do_convert_rgb=False),
    }[option]
    with pytest.raises(ValueError, match=f"Frame 0 must have 1, 3 or 4 channels, got .*{option}"):
        broken()


@pytest.mark.parametrize("where", ["init", "call"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"shortest_edge": -5}, r"`size\[\"shortest_edge\"\]` must be a positive integer, .* got -5"),
        ({"shortest_edge": 0}, r"`size\[\"shortest_edge\"\]` must be a positive integer, .* got 0"),
        (
            {"shortest_edge": 96, "longest_edge": -1},
            r"`size\[\"longest_edge\"\]` must be a positive integer, .* got -1",
        ),
        (-5, r"`size\[\"shortest_edge\"\]` must be a positive integer, .* got -5"),
    ],
)
def test_sizes_that_are_no_lengths_are_refused(where, size, message, frame):
    with pytest.raises(ValueError, match=message):
        DeformVosImageProcessor(size=size) if where == "init" else DeformVosImageProcessor()(frame, size=size)


def test_a_size_without_short_edge_is_refused(frame):
    with pytest.raises(ValueError, match="shortest_edge"):
        DeformVosImageProcessor()(frame, size={"height": 64, "width": 64})


def test_wide_modes_are_scaled_where_they_hold_more_than_eight_bits(tmp_path):
    ramp = np.linspace(0, 65535, 12 * 20).reshape(12, 20)
    for values, expected in (
        (ramp.astype(np.int32), ramp.astype(np.int32) >> 8),
        ((ramp / 257).astype(np.int32),) * 2,
    ):
        picture = Image.fromarray(values)
        assert picture.mode == "I"
        picture.save(tmp_path / "frame.tif")
        for read in (np.asarray(to_rgb(picture)), read_image(tmp_path / "frame.tif")):
            assert read.shape == (12, 20, 3) and np.array_equal(read, np.repeat(expected[..., None], 3, axis=2))
