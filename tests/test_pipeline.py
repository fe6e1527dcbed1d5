"""The pipeline `video-object-segmentation`: every kind of input, its options, and the stream that comes out."""

import gc
import itertools
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_deformvos import DeformVosPipeline
from hf_deformvos.masks_deformvos import overrule
from hf_deformvos.video import H264Writer, VideoReader, write_palette_png


TASK = "video-object-segmentation"


@pytest.fixture
def segmenter(tiny_model, tiny_processor):
    return pipeline(TASK, model=tiny_model, processor=tiny_processor, device="cpu")


def by_hand(model, processor, frames, ids, **options):
    """What a session gives: id maps of all frames after the first."""
    session = processor.init_video_session(video=frames, **options)
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids)
    return [
        processor.post_process_id_map(output, original_size=ids.shape)
        for output in model.propagate_in_video_iterator(session)
    ]


def id_maps(results):
    return [result["id_map"] for result in results]


def assert_same(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_results_are_those_of_a_session(segmenter, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    results = list(segmenter(frames, masks=ids[0]))
    assert [result["frame_idx"] for result in results] == list(range(6))
    assert all(result["object_ids"] == [1, 2] for result in results)
    assert all(result["id_map"].dtype == np.int32 and result["id_map"].shape == (96, 160) for result in results)
    assert_same(id_maps(results)[1:], by_hand(tiny_model, tiny_processor, frames, ids[0])[1:])
    np.testing.assert_array_equal(results[0]["id_map"], ids[0], "the frame that was given comes back to the pixel")
    for result in results:
        assert len(result["scores"]) == 2 and all(0 <= score <= 1 for score in result["scores"])
        seen = [bool((result["id_map"] == obj_id).any()) for obj_id in result["object_ids"]]
        assert all(score > 0.5 for score, visible in zip(result["scores"], seen, strict=True) if visible)


def test_every_form_of_video(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    expected = id_maps(segmenter(frames, masks=ids[0]))
    (tmp_path / "frames").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{t}.png")
    for video in (
        list(frames),
        [Image.fromarray(frame) for frame in frames],
        iter(frames),
        (Image.fromarray(frame) for frame in frames),
        torch.from_numpy(frames),
        tmp_path / "frames",
        str(tmp_path / "frames"),
        [str(tmp_path / "frames" / f"{t}.png") for t in range(len(frames))],
        tuple(tmp_path / "frames" / f"{t}.png" for t in range(len(frames))),
    ):
        assert_same(id_maps(segmenter(video, masks=ids[0])), expected)


def test_a_list_of_pictures_is_read_as_a_folder_of_them_is(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    for t, frame in enumerate(frames):
        Image.fromarray(frame[..., 0].astype(np.uint16) * 257).save(tmp_path / f"{t}.png")
    paths = [tmp_path / f"{t}.png" for t in range(len(frames))]
    assert_same(id_maps(segmenter(paths, masks=ids[0])), id_maps(segmenter(tmp_path, masks=ids[0])))
    assert_same(id_maps(segmenter(paths, masks=ids[0], reverse=True, start_frame=0)), [ids[0].astype(int)])


def test_an_id_map_with_a_batch_axis_is_no_mask_of_one_object(segmenter, tiny_clip):
    frames, ids = tiny_clip
    for masks in (ids[:1], [ids[0]], torch.from_numpy(ids[:1])):
        with pytest.raises(
            ValueError, match=r"The mask of object 1 holds several values \(1 and 2\), which may be ids"
        ):
            segmenter(frames, masks=masks)


def test_every_form_of_masks(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    expected = id_maps(segmenter(frames, masks=ids[0]))
    write_palette_png(tmp_path / "mask.png", ids[0])
    binary = np.stack([ids[0] == 1, ids[0] == 2])
    for masks in (tmp_path / "mask.png", str(tmp_path / "mask.png"), Image.open(tmp_path / "mask.png"), binary,
                  list(binary), torch.from_numpy(binary), {0: ids[0]}):  # fmt: skip
        assert_same(id_maps(segmenter(frames, masks=masks)), expected)
    result = next(segmenter(frames, masks=binary, object_ids=[7, -3]))
    assert result["object_ids"] == [7, -3] and set(np.unique(result["id_map"])) == {-3, 0, 7}
    result = next(segmenter(frames, masks=ids[0], object_ids=2))
    assert result["object_ids"] == [2] and set(np.unique(result["id_map"])) == {0, 2}
    result = next(segmenter(frames, masks=ids[0] == 1))
    assert result["object_ids"] == [1]


def test_binary_masks(segmenter, tiny_clip):
    frames, ids = tiny_clip
    for result, expected in zip(
        segmenter(frames, masks=ids[0], mask_format="binary"), segmenter(frames, masks=ids[0]), strict=True
    ):
        assert "id_map" not in result and result["masks"].dtype == bool and result["masks"].shape == (2, 96, 160)
        for obj_id, mask in zip(result["object_ids"], result["masks"], strict=True):
            np.testing.assert_array_equal(mask, expected["id_map"] == obj_id)


def test_masks_on_several_frames(segmenter, tiny_clip):
    frames, ids = tiny_clip
    first, later = np.where(ids[1] == 1, 1, 0), np.where(ids[3] == 2, 2, 0)
    for video in (frames, iter(frames)):
        results = list(segmenter(video, masks={3: later, 1: first}))
        assert [result["frame_idx"] for result in results] == [1, 2, 3, 4, 5]
        assert [result["object_ids"] for result in results] == [[1], [1], [1, 2], [1, 2], [1, 2]]
        np.testing.assert_array_equal(results[2]["id_map"] == 2, later == 2)


def test_a_given_mask_overrules_the_prediction():
    predicted = np.array([[1, 1, 2, 3], [0, 2, 3, 3]], dtype=np.int32)
    given = np.array([[0, 2, 2, 0], [0, 0, 0, -7]], dtype=np.int64)
    for object_ids, expected in (
        (None, [[1, 2, 2, 3], [0, 0, 3, -7]]),
        ([2, -7, 3], [[1, 2, 2, 0], [0, 0, 0, -7]]),
    ):
        result = overrule(predicted, given, object_ids)
        assert result.dtype == np.int32 and result.tolist() == expected
    assert predicted.tolist() == [[1, 1, 2, 3], [0, 2, 3, 3]], "the prediction itself stays"
    assert overrule(predicted.astype(np.uint8), np.zeros((2, 4), np.uint8)).tolist() == predicted.tolist()


def test_start_limit_and_direction(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip

    def visited(video=frames, masks=ids[0], **options):
        return [result["frame_idx"] for result in segmenter(video, masks=masks, **options)]

    assert visited(max_frames=2) == [0, 1]
    assert visited(start_frame=3) == [3, 4, 5]
    assert visited(start_frame=2, max_frames=1) == [2]
    assert visited(masks=ids[4], mask_frame=4) == [4, 5]
    assert visited(video=iter(frames), masks=ids[4], mask_frame=4) == [4, 5]
    assert visited(masks=ids[3], mask_frame=3, reverse=True) == [3, 2, 1, 0]
    assert visited(masks=ids[3], mask_frame=3, reverse=True, start_frame=1) == [1, 0]
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{t}.png")
    assert visited(video=tmp_path, masks=ids[3], mask_frame=3, reverse=True) == [3, 2, 1, 0]
    with pytest.raises(ValueError, match="stream"):
        visited(video=iter(frames), reverse=True)


@pytest.mark.parametrize("options", [{"start_frame": 2}, {"start_frame": 4, "max_frames": 1}, {"start_frame": 5}])
def test_a_stream_starts_where_a_sequence_does(options, segmenter, tiny_clip):
    frames, ids = tiny_clip
    masks = {4: np.where(ids[4] == 2, 2, 0), 0: np.where(ids[0] == 1, 1, 0)}
    expected = list(segmenter(frames, masks, **options))
    results = list(segmenter(iter(frames), masks, **options))
    assert expected[0]["frame_idx"] == options["start_frame"]
    assert [result["frame_idx"] for result in results] == [result["frame_idx"] for result in expected]
    assert_same(id_maps(results), id_maps(expected))


def test_size_and_precision(segmenter, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    small = id_maps(segmenter(frames, masks=ids[0], short_side=48))
    assert_same(small[1:], by_hand(tiny_model, tiny_processor, frames, ids[0], short_side=48)[1:])
    half = id_maps(segmenter(frames, masks=ids[0], dtype="bfloat16"))
    assert_same(half[1:], by_hand(tiny_model, tiny_processor, frames, ids[0], dtype=torch.bfloat16)[1:])


def test_options_may_be_given_at_the_start(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    segmenter = DeformVosPipeline(tiny_model, processor=tiny_processor, device="cpu", max_frames=2, short_side=48)
    assert len(list(segmenter(frames, masks=ids[0]))) == 2
    assert len(list(segmenter(frames, masks=ids[0], max_frames=3))) == 3


def test_a_video_file(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    with H264Writer(tmp_path / "clip.mp4", fps=25) as writer:
        for frame in frames:
            writer.write(frame)
    decoded = [frame.image for frame in VideoReader(tmp_path / "clip.mp4")]
    expected = id_maps(segmenter(decoded, masks=ids[0]))
    assert_same(id_maps(segmenter(tmp_path / "clip.mp4", masks=ids[0])), expected)
    assert_same(
        id_maps(segmenter(tmp_path / "clip.mp4", masks=ids[0], start_frame=3)),
        id_maps(segmenter(decoded, masks=ids[0], start_frame=3)),
    )
    with pytest.raises(ValueError, match="stream"):
        list(segmenter(tmp_path / "clip.mp4", masks=ids[0], reverse=True))
    for clips in ([str(tmp_path / "clip.mp4")] * 2, [tmp_path / "clip.mp4"], (str(tmp_path),)):
        with pytest.raises(ValueError, match=rf"one video, got a list of {len(clips)} paths.*call the pipeline once"):
            segmenter(clips, masks=ids[0])


def test_a_stream_stays_one(segmenter, tiny_clip):
    """An endless video gives results at once, reads one frame a result, and does not grow."""
    frames, ids = tiny_clip
    read = itertools.count()

    def endless():
        while True:
            yield frames[next(read) % len(frames)]

    results = segmenter(endless(), masks=ids[0], short_side=33)
    next(results)
    assert next(read) <= 2
    for _ in range(10):
        next(results)
    tracemalloc.start()
    traced = []
    for _ in range(4):
        for _ in range(12):
            next(results)
        gc.collect()
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    # Twelve id maps would be 740 kB.
    assert traced[-1] - traced[0] < 2 * ids[0].size * 4, traced


def test_mistakes_are_named(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    for options, message in (
        ({"mask_frame": 6}, "below the video's 6 frames"),
        ({"mask_format": "png"}, "mask_format"),
        ({"max_frames": 0}, "max_frames"),
        ({"short_side": 0}, "short_side"),
        ({"start_frame": -1}, "`start_frame` must be at least 0, got -1"),
        ({"short_side": "480"}, "`short_side` must be a whole number, got '480'"),
        ({"max_frames": "2"}, "`max_frames` must be a whole number, got '2'"),
        ({"max_frames": 2.5}, "`max_frames` must be a whole number, got 2.5"),
        ({"start_frame": "1"}, "`start_frame` must be a whole number, got '1'"),
        ({"start_frame": 1.5}, "`start_frame` must be a whole number, got 1.5"),
        ({"mask_frame": 1.7}, "`mask_frame` must be a whole number, got 1.7"),
        ({"mask_frame": [0, 1]}, r"`mask_frame` must be a whole number, got \[0, 1\]"),
        ({"reverse": "no"}, "`reverse` must be True or False, got 'no'"),
        ({"dtype": "float64"}, "`dtype` must be float32, bfloat16 or float16, got 'float64'"),
        ({"threshold": 1}, "no option threshold"),
        ({"object_ids": [3]}, "none of"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter(frames, masks=ids[0], **options)
    for masks, message in (
        ({}, "empty"),
        (np.zeros_like(ids[0]), "empty"),
        (tmp_path / "no.png", "does not exist"),
        ({1.7: ids[1]}, "`frame_idx` must be a whole number, got 1.7"),
        ({1: ids[1], "1": ids[2]}, "`frame_idx` must be a whole number, got '1'"),
        ({None: ids[0]}, "`frame_idx` must be a whole number, got None"),
        (np.stack([ids[0]] * 3, axis=-1), r"an id map \(height, width\).* got \(96, 160, 3\); .* give the path"),
        (torch.from_numpy(ids[0][..., None] > 0), r"got \(96, 160, 1\)"),
        (np.zeros((0, 96, 160), dtype=bool), r"got \(0, 96, 160\)"),
        ([], r"`masks` must be one image's path, .* got \[\]"),
        (["m.png"], r"`masks` must be one image's path, .* got \['m.png'\]"),
        (None, "got None"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter(frames, masks=masks)
    with pytest.raises(ValueError, match="does not exist"):
        segmenter(tmp_path / "no.mp4", masks=ids[0])
    with pytest.raises(ValueError, match="ended before frame 9"):
        list(segmenter(iter(frames), masks={0: ids[0], 9: ids[1]}))
    with pytest.raises(ValueError, match="ended before frame 9"):
        list(segmenter(iter(frames), masks=ids[0], mask_frame=9))
    with pytest.raises(ValueError, match="ended before frame 9, which `start_frame` names"):
        list(segmenter(iter(frames), masks=ids[0], start_frame=9))
    assert len(list(segmenter(iter(frames), masks={0: ids[0], 9: ids[1]}, max_frames=4))) == 4


def test_a_mask_of_another_size_is_warned_about(segmenter, tiny_clip, caplog):
    import logging

    logger = logging.getLogger("hf_deformvos.processing_deformvos")
    logger.addHandler(caplog.handler)
    try:
        frames, ids = tiny_clip
        result = next(segmenter(frames, masks=ids[0][::2, ::2]))
    finally:
        logger.removeHandler(caplog.handler)
    assert "48x80" in caplog.text and result["id_map"].shape == (96, 160)


def test_registered_with_the_package(tiny_model, tiny_processor, tiny_clip, tmp_path):
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is DeformVosPipeline
    frames, ids = tiny_clip
    tiny_model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert type(loaded) is DeformVosPipeline and not loaded.model.training
    expected = id_maps(
        pipeline(TASK, model=tiny_model.train(), processor=tiny_processor, device="cpu")(frames, ids[0])
    )
    assert not tiny_model.training, "the pipeline runs in evaluation mode"
    assert_same(id_maps(loaded(frames, ids[0])), expected)
    with pytest.raises(ValueError, match="processor"):
        DeformVosPipeline(tiny_model)


def test_saved_pipeline_loads_again(segmenter, tiny_clip, tmp_path):
    frames, ids = tiny_clip
    segmenter.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "processor_config.json",
    ]
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert_same(id_maps(loaded(frames, ids[0])), id_maps(segmenter(frames, ids[0])))


def test_without_pyav_only_video_files_fail(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"0" * 100)
    program = (
        "import sys; sys.modules['av'] = None\n"
        "import numpy as np\n"
        "from hf_deformvos import *\n"
        "config = DeformVosConfig(hidden_size=16, key_size=16, value_size=16, offset_hidden_size=16,\n"
        "                         decoder_sizes=[16, 16, 16], short_term_window=3, correlation_radius=1)\n"
        "segmenter = DeformVosPipeline(DeformVosModel(config), device='cpu',\n"
        "                              processor=DeformVosProcessor(DeformVosImageProcessor()))\n"
        "frames = np.zeros((2, 48, 64, 3), np.uint8)\n"
        "mask = np.zeros((48, 64), np.uint8); mask[8:30, 8:30] = 1\n"
        "print(len(list(segmenter(frames, masks=mask))))\n"
        "try:\n"
        f"    next(segmenter({str(tmp_path / 'clip.mp4')!r}, masks=mask))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr
    count, message = result.stdout.splitlines()
    assert count == "2" and "pip install av" in message
