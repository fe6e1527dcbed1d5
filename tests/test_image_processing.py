"""Frames of any kind to the network's input, against Pillow and arithmetic written out."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import SizeDict

from hf_deformvos import DeformVosImageProcessor
from hf_deformvos.image_processing_deformvos import network_size


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


def test_grey_frames_become_rgb(frame):
    processor = DeformVosImageProcessor()
    grey = frame[..., 0]
    expected = processor(np.repeat(grey[..., None], 3, axis=-1)).pixel_values[0]
    for same in (grey[..., None], Image.fromarray(grey)):
        torch.testing.assert_close(processor(same).pixel_values[0], expected)


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
    ],
)
def test_bad_frames_are_refused(broken, message, frame):
    with pytest.raises(ValueError, match=message):
        DeformVosImageProcessor()(broken(frame))


def test_a_size_without_short_edge_is_refused(frame):
    with pytest.raises(ValueError, match="shortest_edge"):
        DeformVosImageProcessor()(frame, size={"height": 64, "width": 64})
