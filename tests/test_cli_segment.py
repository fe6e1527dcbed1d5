"""`deformvos segment`: names and content of what it writes, users' mistakes, interruption, damaged video."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CONFIG
from PIL import Image

from hf_deformvos.cli import main, segment, segment_results
from hf_deformvos.video import H264Writer, VideoReader, read_palette_png, write_palette_png


HEIGHT, WIDTH = 48, 80


def make_frame(t: int) -> np.ndarray:
    """A bright square that moves right over noise."""
    frame = np.random.default_rng(t).integers(60, 90, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    frame[10:26, 4 + 2 * t : 20 + 2 * t] = (230, 230, 40)
    return frame


def write_video(path, num_frames: int = 8) -> str:
    with H264Writer(path, fps=25, crf=8) as writer:
        for t in range(num_frames):
            writer.write(make_frame(t))
    return str(path)


def write_noise(path, num_frames: int) -> str:
    with H264Writer(path, fps=25) as writer:
        for t in range(num_frames):
            writer.write(np.random.default_rng(t).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return str(path)


def square_mask(t: int = 0, object_id: int = 1, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    ids = np.zeros((height, width), dtype=np.uint8)
    ids[10:26, 4 + 2 * t : 20 + 2 * t] = object_id
    return ids


class FakeProcessor:
    """Takes and returns ids as the real one does; frames pass unchanged."""

    image_processor = SimpleNamespace(size={"shortest_edge": 480, "longest_edge": 1536})

    def __init__(self):
        self.sizes = []

    def init_video_session(self, device=None, dtype=None):
        return SimpleNamespace(masks={}, steps=[], current=None)

    def __call__(self, images, return_tensors, size=None):
        self.sizes.append(size)
        return SimpleNamespace(pixel_values=[images])

    def add_inputs_to_inference_session(self, session, frame_idx, input_masks, original_size):
        assert input_masks.shape == original_size
        session.masks[frame_idx] = input_masks

    def post_process_id_map(self, output, original_size):
        return output


def fake_model(inference_session, frame, frame_idx):
    """Repeats the last mask; objects that a later mask does not name stay."""
    given = inference_session.masks.get(frame_idx)
    if given is not None:
        current = inference_session.current
        inference_session.current = given if current is None else np.where(given > 0, given, current)
    if inference_session.current is None:
        raise ValueError(f"No object is known at frame {frame_idx}.")
    inference_session.steps.append(frame_idx)
    return inference_session.current.astype(np.int32)


@pytest.fixture
def fake(monkeypatch):
    processor = FakeProcessor()
    loaded = segment.LoadedModel(fake_model, processor, "fake", "0" * 64, "cpu", "float32")
    monkeypatch.setattr(segment, "load_model", lambda arguments, masks: loaded)
    return processor


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """An untrained model on disk, as a user's folder."""
    from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    DeformVosModel(DeformVosConfig(**TINY_CONFIG)).save_pretrained(path)
    DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 48})).save_pretrained(path)
    return path


@pytest.fixture
def clip(tmp_path):
    """A video of eight frames, and the mask of its first."""
    write_palette_png(tmp_path / "mask.png", square_mask())
    return write_video(tmp_path / "clip.mp4"), str(tmp_path / "mask.png")


@pytest.fixture
def unknown_length(monkeypatch):
    """Videos whose number of frames is known only at their end, as that of some Matroska files."""
    from hf_deformvos.video_source_deformvos import FileSource

    original = FileSource.frames

    def frames(self):
        for frame in original(self):
            self.num_frames = None
            yield frame

    monkeypatch.setattr(FileSource, "frames", frames)


@contextmanager
def small_disk(size: int):
    """No file can grow beyond so many bytes, as if the disk were full."""
    resource = pytest.importorskip("resource", reason="Windows does not limit the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(*arguments) -> int:
    return main(["segment", *map(str, arguments), "--quiet"])


def results_of(output) -> dict:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def error_of(capsys) -> str:
    """The only line on stderr that is an error; no traceback anywhere."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


# What is written


def test_real_model_end_to_end(tmp_path, clip, model_dir):
    video, mask = clip
    output, overlay = tmp_path / "out", tmp_path / "new" / "overlay.mp4"
    assert run(video, "--mask", mask, "--model", model_dir, "--output", output, "--overlay", overlay) == 0
    names = sorted(file.name for file in (output / "masks").iterdir())
    assert names == [f"{t:05d}.png" for t in range(8)]
    results = results_of(output)
    assert results["completed"] and not results["interrupted"] and results["error"] is None
    assert results["model"]["name"] == str(model_dir)
    weights = (model_dir / "model.safetensors").read_bytes()
    assert results["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert results["object_ids"] == [1] and results["mask_frames"] == [0]
    assert results["video"]["num_frames_read"] == 8 and not results["video"]["truncated"]
    assert (results["video"]["width"], results["video"]["height"]) == (WIDTH, HEIGHT)
    assert set(results["timings"]["median"]) == {
        f"{stage}_ms" for stage in ("decode", "preprocess", "network", "postprocess", "write_mask", "write_overlay")
    }
    assert results["timings"]["fps"] > 0
    assert {"hf_deformvos", "torch", "transformers", "av", "python"} <= set(results["versions"])
    for t, frame in enumerate(results["frames"]):
        ids = read_palette_png(output / frame["mask"])
        assert ids.shape == (HEIGHT, WIDTH)
        assert frame["objects"]["1"]["area"] == np.count_nonzero(ids == 1)
        assert frame["timestamp"] == pytest.approx(t / 25, abs=1e-3)
    np.testing.assert_array_equal(read_palette_png(output / "masks" / "00000.png"), square_mask())
    assert results["frames"][0]["objects"]["1"]["box"] == [4, 10, 20, 26]
    reader = VideoReader(overlay)
    assert len(list(reader)) == 8 and reader.info.codec == "h264"


def test_real_model_in_half_precision_and_smaller(tmp_path, clip, model_dir):
    video, mask = clip
    arguments = ["--mask", mask, "--model", model_dir, "--max-frames", 2, "--dtype", "bfloat16", "--short-side", 32]
    assert run(video, *arguments, "--threads", 1, "--device", "cpu", "--output", tmp_path / "out") == 0
    assert results_of(tmp_path / "out")["model"]["dtype"] == "bfloat16"


def test_max_frames(tmp_path, clip, fake):
    video, mask = clip
    assert run(video, "--mask", mask, "--output", tmp_path / "out", "--max-frames", 3) == 0
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 3
    assert len(results_of(tmp_path / "out")["frames"]) == 3
    assert results_of(tmp_path / "out")["overlay"] is None


def test_short_side_keeps_the_other_bound(tmp_path, clip, fake):
    video, mask = clip
    assert run(video, "--mask", mask, "--output", tmp_path / "out", "--short-side", 240) == 0
    assert fake.sizes[0] == {"shortest_edge": 240, "longest_edge": 1536}


def test_frames_before_the_first_mask_are_background(tmp_path, clip, fake):
    video, _ = clip
    write_palette_png(tmp_path / "late.png", square_mask(3, object_id=5))
    arguments = ["--mask", tmp_path / "late.png", "--mask-frame", 3, "--output", tmp_path / "out"]
    assert run(video, *arguments, "--overlay", tmp_path / "overlay.mp4") == 0
    masks = [read_palette_png(tmp_path / "out" / "masks" / f"{t:05d}.png") for t in range(8)]
    assert not any(mask.any() for mask in masks[:3])
    np.testing.assert_array_equal(masks[3], square_mask(3, object_id=5))
    assert all((mask == 5).any() for mask in masks[3:])
    results = results_of(tmp_path / "out")
    assert [frame["objects"] for frame in results["frames"][:3]] == [{}, {}, {}]
    assert results["object_ids"] == [5] and results["mask_frames"] == [3]
    assert len(list(VideoReader(tmp_path / "overlay.mp4"))) == 8


def test_several_masks_correct_and_add(tmp_path, clip, fake):
    video, mask = clip
    later = square_mask(4, object_id=1)
    later[30:40, 50:60] = 2
    write_palette_png(tmp_path / "later.png", later)
    arguments = ["--mask", mask, "--mask-frame", 0, "--mask", tmp_path / "later.png", "--mask-frame", 4]
    assert run(video, *arguments, "--output", tmp_path / "out") == 0
    results = results_of(tmp_path / "out")
    assert results["object_ids"] == [1, 2]
    assert list(results["frames"][3]["objects"]) == ["1"]
    assert results["frames"][4]["objects"]["2"] == {"area": 100, "box": [50, 30, 60, 40]}
    np.testing.assert_array_equal(read_palette_png(tmp_path / "out" / "masks" / "00004.png"), later)


@pytest.fixture
def camera(monkeypatch):
    """Lets a reader miss frames, as that of a camera does while the network computes."""

    def drop(*indices):
        original = VideoReader.__iter__
        monkeypatch.setattr(
            VideoReader, "__iter__", lambda self: (frame for frame in original(self) if frame.index not in indices)
        )

    return drop


def test_masks_of_frames_that_a_camera_drops_are_taken_on_the_next_one(tmp_path, clip, fake, camera, capsys):
    video, mask = clip
    other = np.zeros((HEIGHT, WIDTH), np.uint8)
    other[30:40, 50:60] = 2
    write_palette_png(tmp_path / "other.png", other)
    camera(0, 1, 4)
    later = ["--mask", tmp_path / "other.png", "--mask-frame", 1, "--mask", tmp_path / "other.png", "--mask-frame", 4]
    assert run(video, "--mask", mask, "--mask-frame", 0, *later, "--output", tmp_path / "out") == 0
    results = results_of(tmp_path / "out")
    assert list(results["frames"][0]["objects"]) == ["1", "2"], "both were due"
    assert (results["object_ids"], results["mask_frames"]) == ([1, 2], [2, 5])
    camera(7)
    assert run(video, "--mask", mask, "--mask-frame", 5, "--output", tmp_path / "few") == 0
    assert run(video, "--mask", mask, "--mask-frame", 7, "--output", tmp_path / "late") == 2
    assert "must be below the number of frames read, 7, got 7; no mask was used" in error_of(capsys)


def test_folder_of_images(tmp_path, clip, fake):
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in (1, 2, 10):
        Image.fromarray(make_frame(t)).save(folder / f"shot{t}.png")
    assert run(folder, "--mask", clip[1], "--output", tmp_path / "out") == 0
    results = results_of(tmp_path / "out")
    assert [frame["source"] for frame in results["frames"]] == ["shot1.png", "shot2.png", "shot10.png"]
    assert [frame["mask"] for frame in results["frames"]] == [f"masks/{t:05d}.png" for t in range(3)]


def test_results_have_a_line_a_frame_whatever_the_names(tmp_path, clip, fake, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("FRAMES")
    folder.mkdir()
    for t in range(3):
        Image.fromarray(make_frame(t)).save(folder / f"{t}.png")
    for num_frames in (1, 3):
        arguments = ["--mask", clip[1], "--output", tmp_path / "out", "--max-frames", num_frames, "--overwrite"]
        assert run(folder, *arguments) == 0
        results = results_of(tmp_path / "out")
        assert results["video"]["source"] == "FRAMES"
        frames = ",\n    ".join(json.dumps(frame) for frame in results.pop("frames"))
        expected = f'{json.dumps(results, indent=2)[:-2]},\n  "frames": [\n    {frames}\n  ]\n}}\n'
        assert (tmp_path / "out" / "results.json").read_text(encoding="utf-8") == expected


def test_memory_does_not_grow_with_the_video(tmp_path, fake):
    video, ids = write_video(tmp_path / "long.mp4", 150), np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[:6, :10] = np.arange(1, 61).reshape(6, 10)
    write_palette_png(tmp_path / "many.png", ids)

    def peak(num_frames: int) -> int:
        arguments = ["--mask", tmp_path / "many.png", "--output", tmp_path / "out", "--overwrite"]
        tracemalloc.start()
        try:
            assert run(video, *arguments, "--max-frames", num_frames) == 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(20)  # imports what is imported once
    assert peak(150) < peak(50) + 1_000_000


def test_medians_of_timings():
    seconds = np.random.default_rng(0).lognormal(-4, 1, 20_001)
    median = segment_results._Median()
    for taken in seconds:
        median.add(taken)
    assert median.value() == pytest.approx(np.median(seconds), rel=5e-3)
    assert len(median._counts) < 5_000


def test_mask_of_another_size_warns(tmp_path, clip, fake, capsys):
    import logging

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("hf_deformvos.masks_deformvos")
    logger.addHandler(handler)
    ids = np.kron(square_mask(), np.ones((2, 2), dtype=np.uint8))
    write_palette_png(tmp_path / "large.png", ids)
    try:
        assert run(clip[0], "--mask", tmp_path / "large.png", "--output", tmp_path / "out") == 0
    finally:
        logger.removeHandler(handler)
    assert any("is 160x96, the video 80x48: resized" in message for message in messages)
    np.testing.assert_array_equal(read_palette_png(tmp_path / "out" / "masks" / "00000.png"), square_mask())


def test_earlier_results_are_not_mixed(tmp_path, clip, fake, capsys):
    video, mask = clip
    arguments = [video, "--mask", mask, "--output", tmp_path / "out", "--overlay", tmp_path / "out" / "overlay.mp4"]
    assert run(*arguments) == 0
    (tmp_path / "out" / "masks" / "notes.png").write_bytes(b"the user's own")
    assert run(*arguments, "--max-frames", 2) == 2
    assert "pass --overwrite" in error_of(capsys)
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 9
    assert run(*arguments, "--max-frames", 2, "--overwrite") == 0
    assert sorted(file.name for file in (tmp_path / "out" / "masks").iterdir()) == [
        "00000.png",
        "00001.png",
        "notes.png",
    ]


def test_summary_and_progress(tmp_path, clip, fake, capsys):
    assert main(["segment", clip[0], "--mask", clip[1], "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("8 frames, 1 object, ")
    assert "8/8" in captured.err
    assert run(clip[0], "--mask", clip[1], "--output", tmp_path / "quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "8/8" not in captured.err


# Users' mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.mp4", None, "gone.mp4 does not exist; pass a video file"),
        ("empty.mp4", b"", "empty.mp4 is empty"),
        ("noise.mp4", b"\x00\x01" * 800, "noise.mp4 is not a video"),
        ("notes.txt", b"just words\n" * 50, "notes.txt"),
    ],
)
def test_what_is_no_video(tmp_path, clip, fake, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(tmp_path / name, "--mask", clip[1], "--output", tmp_path / "out") == 2
    assert message in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_followed_but_not_adapted_to(tmp_path, clip, fake, capsys):
    whole, pipe = Path(write_noise(tmp_path / "whole.mp4", 4)), tmp_path / "pipe"
    os.mkfifo(pipe)

    def fill():
        with suppress(BrokenPipeError):
            pipe.write_bytes(whole.read_bytes())

    for options, code in ([["--adapt-steps", 1], 2], [[], 0]):
        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        assert run(pipe, "--mask", clip[1], "--output", tmp_path / "out", *options) == code
        thread.join(10)
        if code == 2:
            assert "VIDEO must be a file or a folder for --adapt, which reads it twice, got" in error_of(capsys)
            assert not (tmp_path / "out").exists()
    assert len(results_of(tmp_path / "out")["frames"]) == 4


def test_mask_mistakes(tmp_path, clip, fake, capsys):
    video, mask = clip
    write_palette_png(tmp_path / "empty.png", np.zeros((HEIGHT, WIDTH), dtype=np.uint8))
    assert run(video, "--mask", tmp_path / "empty.png") == 2
    assert "empty.png is empty" in error_of(capsys)
    assert run(video, "--mask", tmp_path / "gone.png") == 2
    assert "gone.png does not exist" in error_of(capsys)
    assert run(video, "--mask", mask, "--mask-frame", 8) == 2
    assert "--mask-frame must be below the number of frames read, 8, got 8" in error_of(capsys)
    assert run(video, "--mask", mask, "--mask-frame", 3, "--max-frames", 2) == 2
    assert "--mask-frame must be below" in error_of(capsys)
    assert run(video, "--mask", mask, "--mask", mask) == 2
    assert "every --mask needs its --mask-frame" in error_of(capsys)
    assert run(video, "--mask", mask, "--mask", mask, "--mask-frame", 1, "--mask-frame", 1) == 2
    assert "must differ" in error_of(capsys)


def test_output_mistakes(tmp_path, clip, fake, capsys):
    video, mask = clip
    (tmp_path / "file").write_text("")
    assert run(video, "--mask", mask, "--output", tmp_path / "file") == 2
    assert "--output must be a folder" in error_of(capsys)
    assert run(video, "--mask", mask, "--output", tmp_path / "out", "--overlay", tmp_path / "overlay.avi") == 2
    assert "rename it to .mp4" in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("folder.mp4", "--overlay must be a file"),
        ("file/overlay.mp4", "--overlay must lie in a folder that can be written to"),
        pytest.param(
            "/proc/overlay.mp4",
            "--overlay must lie in a folder that can be written to",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="a folder in which nobody can write"),
        ),
    ],
)
def test_overlay_mistakes_keep_earlier_results(tmp_path, clip, fake, capsys, overlay, message):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [clip[0], "--mask", clip[1], "--output", tmp_path / "out"]
    assert run(*arguments) == 0
    before = results_of(tmp_path / "out")
    assert run(*arguments, "--overwrite", "--overlay", tmp_path / overlay) == 2
    error = error_of(capsys)
    assert message in error and overlay in error and "choose another" in error
    assert results_of(tmp_path / "out") == before
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 8


@pytest.mark.parametrize("name", ["results.json", "masks/00001.png"])
def test_folder_in_the_place_of_a_result_keeps_earlier_results(tmp_path, clip, fake, capsys, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "masks").mkdir(exist_ok=True)
    earlier = tmp_path / "out" / "masks" / "00000.png"
    write_palette_png(earlier, square_mask())
    assert run(clip[0], "--mask", clip[1], "--output", tmp_path / "out", "--overwrite") == 2
    assert f"{name} is a folder" in error_of(capsys)
    assert earlier.is_file()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--preset", "fast"], "--preset fast, which is bfloat16 here"),
        (["--dtype", "float16"], "--dtype float16"),
    ],
)
def test_precision_of_an_exported_model(tmp_path, clip, capsys, monkeypatch, options, named):
    monkeypatch.setattr("hf_deformvos.inference.fastest_dtype", lambda device_type: "bfloat16")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "deformvos_export.json").write_text("{}")
    arguments = ["--model", tmp_path / "exported", "--output", tmp_path / "out", *options]
    assert run(clip[0], "--mask", clip[1], *arguments) == 2
    assert f"takes float32, got {named}; pass --dtype float32." in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_model_and_device_mistakes(tmp_path, clip, capsys):
    video, mask = clip
    arguments = [video, "--mask", mask, "--output", tmp_path / "out"]
    assert run(*arguments, "--model", tmp_path / "nowhere") == 2
    assert "nowhere', which is neither" in error_of(capsys)
    assert run(*arguments, "--model", "no-such-folder") == 2
    assert "There is no folder 'no-such-folder' here, and a Hub repository is named owner/name" in error_of(capsys)
    assert run(*arguments, "--model", tmp_path) == 2
    assert "config.json" in error_of(capsys)
    assert run(*arguments, "--model", tmp_path, "--device", "tpu9") == 2
    assert "--device must be one that PyTorch can use" in error_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--max-frames", "0"], ["--mask-frame", "-1"], ["--dtype", "int8"], []])
def test_argparse_mistakes_exit_2(clip, arguments):
    mask = ["--mask", clip[1]] if arguments else []
    with pytest.raises(SystemExit) as exit_info:
        main(["segment", clip[0], *mask, *arguments])
    assert exit_info.value.code == 2


@pytest.mark.parametrize("option", ["--max-frames", "--threads", "--short-side"])
def test_numbers_too_large_are_named(clip, capsys, option):
    with pytest.raises(SystemExit) as exit_info:
        main(["segment", clip[0], "--mask", clip[1], option, "9" * 23])
    assert exit_info.value.code == 2
    assert f"argument {option}: must be at most " in capsys.readouterr().err


def test_help_and_version(capsys):
    for arguments in (["--help"], ["segment", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "frames before the first --mask-frame get an all-background" in " ".join(out.split())
    assert "deformvos 0." in out


# Nothing is lost


def test_mask_frame_beyond_a_video_of_unknown_length(tmp_path, clip, fake, capsys, unknown_length):
    """Known only at the end, when the frames before it have been segmented: they are kept."""
    write_palette_png(tmp_path / "late.png", square_mask(3, object_id=2))
    arguments = ["--mask", clip[1], "--mask-frame", 0, "--mask", tmp_path / "late.png", "--mask-frame", 20]
    assert run(clip[0], *arguments, "--output", tmp_path / "out") == 2
    error = error_of(capsys)
    assert "number of frames read, 8, got 20; masks of frames before 20 were used" in error
    results = results_of(tmp_path / "out")
    assert len(results["frames"]) == 8
    assert not results["completed"] and f"error: {results['error']}" == error


def test_only_mask_beyond_a_video_of_unknown_length(tmp_path, clip, fake, capsys, unknown_length):
    assert run(clip[0], "--mask", clip[1], "--mask-frame", 8, "--output", tmp_path / "out") == 2
    error = error_of(capsys)
    assert "no mask was used, as the video has only 8 frames" in error and "were used" not in error
    results = results_of(tmp_path / "out")
    assert not results["completed"] and f"error: {results['error']}" == error


def test_truncated_video_keeps_its_frames(tmp_path, clip, fake, capsys):
    path = Path(write_noise(tmp_path / "cut.mp4", 20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert run(path, "--mask", clip[1], "--output", tmp_path / "out", "--overlay", tmp_path / "overlay.mp4") == 3
    results = results_of(tmp_path / "out")
    assert results["video"]["truncated"] and results["completed"]
    num_frames = results["video"]["num_frames_read"]
    assert 0 < num_frames < 20
    assert len(list((tmp_path / "out" / "masks").iterdir())) == num_frames
    assert len(list(VideoReader(tmp_path / "overlay.mp4"))) == num_frames
    assert f"damaged or cut short; {num_frames} frames decoded" in capsys.readouterr().err


def test_patched_frames_are_damage(tmp_path, clip, fake, capsys):
    path = Path(write_noise(tmp_path / "clip.mp4", 20))
    data = bytearray(path.read_bytes())
    for place in range(data.index(b"mdat") + 3_000, len(data), 900):
        data[place] ^= 0xFF
    path.write_bytes(data)
    assert run(path, "--mask", clip[1], "--output", tmp_path / "out") == 3
    results = results_of(tmp_path / "out")
    assert results["video"]["num_damaged_packets"] > 0 and results["completed"]
    assert "damaged or cut short" in capsys.readouterr().err


def test_error_on_the_way_keeps_what_is_done(tmp_path, clip, fake, capsys):
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(4):
        Image.fromarray(make_frame(t)).save(folder / f"{t}.png")
    (folder / "4.png").write_bytes(b"broken")
    assert run(folder, "--mask", clip[1], "--output", tmp_path / "out", "--overlay", tmp_path / "overlay.mp4") == 2
    assert "4.png is not an image" in error_of(capsys)
    results = results_of(tmp_path / "out")
    assert not results["completed"] and "4.png" in results["error"]
    assert len(results["frames"]) == 4
    assert len(list(VideoReader(tmp_path / "overlay.mp4"))) == 4


@pytest.mark.parametrize("later_mask", [False, True])
def test_adaptation_keeps_what_comes_before_damage(tmp_path, clip, model_dir, capsys, later_mask):
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(4):
        Image.fromarray(make_frame(t)).save(folder / f"{t}.png")
    (folder / "1.png").write_bytes(b"broken")
    arguments = ["--mask", clip[1], "--mask-frame", 0, "--model", model_dir, "--output", tmp_path / "out"]
    arguments += ["--mask", clip[1], "--mask-frame", 3] if later_mask else []
    adaptation = ["--adapt-check", "--adapt-steps", 1, "--short-side", 65]
    assert run(folder, *arguments, *adaptation, "--device", "cpu") == 2
    assert "1.png is not an image" in error_of(capsys)
    results = results_of(tmp_path / "out")
    assert results["model"]["adaptation"]["steps"] == 1 and not results["completed"]
    assert [frame["mask"] for frame in results["frames"]] == ["masks/00000.png"]


def test_adaptation_to_nothing_names_the_damage(tmp_path, clip, model_dir, capsys):
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(make_frame(0)).save(folder / "0.png")
    (folder / "1.png").write_bytes(b"broken")
    arguments = ["--mask", clip[1], "--mask-frame", 1, "--model", model_dir, "--output", tmp_path / "out"]
    assert run(folder, *arguments, "--adapt", "--device", "cpu") == 2
    assert "1.png is not an image" in error_of(capsys)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it.")


ADVICE = (
    "error: the device ran out of memory (CUDA out of memory. Tried to allocate 2 GiB.); "
    "lower --short-side, choose --dtype bfloat16, or take --device cpu."
)


def test_memory_that_ends_while_following_keeps_what_is_done(tmp_path, clip, fake, capsys, monkeypatch):
    steps = iter([fake_model] * 3)
    loaded = segment.load_model(None, None)
    monkeypatch.setattr(loaded, "model", lambda **inputs: next(steps, out_of_memory)(**inputs))
    assert run(clip[0], "--mask", clip[1], "--output", tmp_path / "out") == 2
    assert error_of(capsys) == ADVICE
    results = results_of(tmp_path / "out")
    assert f"error: {results['error']}" == ADVICE and len(results["frames"]) == 3


def test_memory_that_ends_before_following_is_one_line(tmp_path, clip, model_dir, capsys, monkeypatch):
    monkeypatch.setattr("hf_deformvos.adaptation.adapt_to_video", out_of_memory)
    arguments = ["--mask", clip[1], "--model", model_dir, "--output", tmp_path / "out", "--adapt", "--device", "cpu"]
    assert run(clip[0], *arguments) == 2
    assert error_of(capsys) == ADVICE


def test_a_runtime_error_that_is_a_bug_keeps_its_traceback(tmp_path, clip, fake, monkeypatch):
    def broken(arguments, masks):
        raise RuntimeError("sizes of tensors must match")

    monkeypatch.setattr(segment, "load_model", broken)
    with pytest.raises(RuntimeError, match="sizes of tensors must match"):
        run(clip[0], "--mask", clip[1], "--output", tmp_path / "out")


def test_full_disk_is_an_error_not_a_hang(tmp_path, clip, fake, capsys, monkeypatch):
    def full(path, id_map, palette=None):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_deformvos.video.write_palette_png", full)
    assert run(clip[0], "--mask", clip[1], "--output", tmp_path / "out") == 2
    error = error_of(capsys)
    assert "00000.png cannot be written (No space left on device); free space there, or choose another" in error
    assert results_of(tmp_path / "out")["frames"] == []


def test_overlay_that_cannot_be_finished_is_not_named(tmp_path, clip, fake, capsys):
    video, output, overlay = write_noise(tmp_path / "noise.mp4", 8), tmp_path / "out", tmp_path / "new" / "overlay.mp4"
    with small_disk(12_000):
        assert run(video, "--mask", clip[1], "--output", output, "--overlay", overlay) == 2
    kept, error = capsys.readouterr().err.splitlines()
    assert kept.startswith("kept: ") and kept.endswith(f": {output / 'masks'}, {output / 'results.json'}")
    assert error.startswith(f"error: {overlay} cannot be written (") and "choose another --overlay" in error
    assert list(overlay.parent.iterdir()) == []
    results = results_of(output)
    assert results["overlay"] is None and not results["completed"] and f"error: {results['error']}" == error
    assert len(results["frames"]) == len(list((output / "masks").iterdir())) > 0


@pytest.mark.parametrize(("num_frames", "num_masks"), [(8, 8), (12, 9)])
def test_masks_are_kept_where_results_json_cannot_be_written(tmp_path, clip, fake, capsys, num_frames, num_masks):
    """At its end, or on the way: what it says of eight frames is all that fits."""
    video, output = write_video(tmp_path / "other.mp4", num_frames), tmp_path / "out"
    with small_disk(1_000):
        assert run(video, "--mask", clip[1], "--output", output) == 2
    kept, error = capsys.readouterr().err.splitlines()
    assert kept.startswith("kept: 8 frames, ") and kept.endswith(f": {output / 'masks'}")
    assert error.startswith(f"error: {output / 'results.json'} cannot be written (")
    assert "choose another --output" in error
    assert [file.name for file in output.iterdir()] == ["masks"]
    assert len(list((output / "masks").iterdir())) == num_masks


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals for a child process")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_done(tmp_path, clip, model_dir, sent):
    folder = tmp_path / "frames"
    folder.mkdir()
    for t in range(400):
        Image.fromarray(make_frame(t % 12)).save(folder / f"{t}.png", compress_level=0)
    output, overlay = tmp_path / "out", tmp_path / "overlay.mp4"
    command = [sys.executable, "-m", "hf_deformvos", "segment", str(folder), "--mask", clip[1]]
    command += ["--model", str(model_dir), "--output", str(output), "--overlay", str(overlay), "--threads", "1"]
    # A shell's background jobs ignore Ctrl-C, and a child would inherit that.
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **listening
    )
    try:
        deadline = time.monotonic() + 120
        while not (output / "masks" / "00003.png").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted, kept: " in errors
    results = results_of(output)
    assert results["interrupted"] and not results["completed"]
    num_frames = len(results["frames"])
    assert 4 <= num_frames < 400
    assert len(list((output / "masks").glob("*.png"))) == num_frames
    assert {file.name for file in output.iterdir()} == {"masks", "results.json"}
    assert len(list(VideoReader(overlay))) == num_frames


def test_what_is_read_is_never_overwritten(tmp_path, clip, fake, capsys):
    video, mask = clip
    before = Path(video).read_bytes()
    assert run(video, "--mask", mask, "--output", tmp_path / "out", "--overlay", video, "--overwrite") == 2
    assert "is a file that is read" in error_of(capsys)
    assert Path(video).read_bytes() == before
    inside = tmp_path / "out" / "masks" / "00050.png"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(Path(mask).read_bytes())
    assert run(video, "--mask", inside, "--output", tmp_path / "out", "--overwrite") == 2
    assert "lies where masks are written" in error_of(capsys)
    assert inside.is_file()
    assert run(inside.parent, "--mask", mask, "--output", tmp_path / "out", "--overwrite") == 2
    assert inside.is_file()
