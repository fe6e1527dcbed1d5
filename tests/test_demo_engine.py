"""The demo's engine without its page: videos come in, marks are followed and corrected, results go out."""

import gc
import json
import os
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image


sys.path.insert(0, str(ROOT / "demo"))

import exports
import following
import marking
import workspace as ws
from exports import write_json, write_masks_zip, write_overlay
from following import Models, Progress, available_models, follow
from marking import box_to_mask, id_map_to_layer, layers_to_id_map, mask_file_to_id_map
from workspace import PALETTE, DemoError, Limits, Workspace, Workspaces

from hf_deformvos.adaptation import Adaptation, AdaptationConfig
from hf_deformvos.video import VideoReader, read_palette_png


LIMITS = Limits(min_free_disk=1)
CLIP = ROOT / "examples" / "bunny.mp4"


@pytest.fixture(autouse=True)
def few_threads(one_thread, monkeypatch):
    monkeypatch.setenv("DEFORMVOS_DTYPE", "float32")
    following.native_dtype.cache_clear()
    yield
    following.native_dtype.cache_clear()


@pytest.fixture
def models(tiny_model, tiny_processor):
    """What `Models` is to `follow`, with a model of the tests."""

    class Tiny:
        def get(self, name):
            assert name == "Tiny"
            return tiny_model, tiny_processor

        def checkpoint(self, name):
            assert name == "Tiny"
            return tiny_model

    return Tiny()


@pytest.fixture
def space(tmp_path):
    workspace = Workspace(tmp_path / "spaces", LIMITS)
    yield workspace
    workspace.close(wait=0.1)


def write_video(path, frames, fps=24, codec="libx264", pix_fmt="yuv420p", times=None, sound=False, **kind):
    """Frames (n, h, w, 3 or 4) as a file; `times` in seconds make it variable-rate."""
    with av.open(str(path), "w", **kind) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            voice = container.add_stream("aac", rate=8000)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba" if picture.shape[2] == 4 else "rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound:
            container.mux(voice.encode(_silence()))
            container.mux(voice.encode(None))
    return path


def _silence():
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    return frame


def long_clip(count, size=(48, 80)):
    """A square that goes to and fro over noise: frames and ids."""
    height, width = size
    noise = np.random.default_rng(1).integers(60, 120, (height, width, 3), dtype=np.uint8)
    frames, ids = np.repeat(noise[None], count, axis=0), np.zeros((count, height, width), np.uint8)
    for t in range(count):
        left = abs((2 * t) % (2 * (width - 24)) - (width - 24))
        frames[t, 10:30, left : left + 20] = (250, 30, 30)
        ids[t, 10:30, left : left + 20] = 1
    return frames, ids


def imported(workspace, path):
    steps = list(workspace.import_video(path))
    assert steps[-1][0] == workspace.facts.num_frames == len(workspace.frames)
    return workspace


@pytest.fixture
def clip_file(tmp_path, tiny_clip):
    return write_video(tmp_path / "clip.mp4", tiny_clip[0])


@pytest.fixture
def loaded(space, clip_file):
    return imported(space, clip_file)


@pytest.fixture
def followed(loaded, tiny_clip, models):
    loaded.set_marks(0, tiny_clip[1][0])
    list(follow(loaded, models, "Tiny", "Standard", 0))
    return loaded


def results(workspace):
    return {i: workspace.mask(i) for i in workspace.done.tolist()}


def leftovers(workspace):
    """Frames of imports that failed."""
    kept = None if workspace._video is None else workspace._video.folder
    return [path for path in workspace.folder.iterdir() if path != kept]


# Videos come in


def test_import_keeps_frames_times_and_facts(loaded, tiny_clip):
    facts = loaded.facts
    assert (facts.name, facts.width, facts.height, facts.num_frames) == ("clip.mp4", 160, 96, 6)
    assert facts.fps == pytest.approx(24)
    assert facts.seconds == pytest.approx(6 / 24, abs=1e-3)
    assert facts.notes == []
    decoded = [frame.image for frame in VideoReader(loaded.folder.parents[1] / "clip.mp4")]
    for index in (5, 0, -1, np.int64(3)):  # any order
        frame = loaded.frames[index]
        assert frame.shape == (96, 160, 3)
        assert frame.dtype == np.uint8
        assert np.abs(frame.astype(int) - decoded[index]).mean() < 4
    assert [round(loaded.timestamp(i) * 24) for i in range(6)] == list(range(6))
    with pytest.raises(IndexError, match="no frame 6 in a video of 6"):
        loaded.frames[6]


def test_an_iteration_over_the_frames_ends(loaded):
    assert sum(1 for _ in loaded.frames) == 6


@pytest.mark.parametrize("size", [(77, 101), (17, 33), (2, 2)])
def test_odd_sizes(space, tmp_path, size, models):
    frames = np.random.default_rng(0).integers(0, 255, (3, *size, 3), dtype=np.uint8)
    imported(space, write_video(tmp_path / "odd.mp4", frames, codec="libx264rgb", pix_fmt="rgb24"))
    assert (space.facts.height, space.facts.width) == size
    ids = np.zeros(size, np.uint8)
    ids[: size[0] // 2, : size[1] // 2] = 1
    space.set_marks(0, ids)
    list(follow(space, models, "Tiny", "Standard", 0))
    assert space.num_done == 3
    list(write_overlay(space, tmp_path / "out.mp4"))
    write_masks_zip(space, tmp_path / "out.zip")
    assert space.mask(2).shape == size


def test_variable_rate_keeps_its_times(space, tmp_path, tiny_clip, models):
    times = [0, 0.04, 0.5, 0.54, 2.0, 2.04]
    imported(space, write_video(tmp_path / "vfr.mp4", tiny_clip[0], times=times, fps=25))
    assert [space.timestamp(i) for i in range(6)] == pytest.approx(times, abs=2e-3)
    assert space.facts.fps == pytest.approx(5 / 2.04, rel=0.05)
    space.set_marks(0, tiny_clip[1][0])
    list(follow(space, models, "Tiny", "Standard", 0))
    list(write_overlay(space, tmp_path / "out.mp4"))
    written = [frame.timestamp for frame in VideoReader(tmp_path / "out.mp4")]
    assert written == pytest.approx(times, abs=2e-3)


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_turned_videos_are_upright(space, tmp_path, tiny_clip, matrix, turns):
    path = write_video(tmp_path / "turned.mp4", tiny_clip[0])
    # The track header's display matrix, as phones write it.
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    imported(space, path)
    expected = np.rot90(tiny_clip[0][0], turns)
    assert (space.facts.height, space.facts.width) == expected.shape[:2]
    assert np.abs(space.frames[0].astype(int) - expected).mean() < 20


def test_alpha_is_laid_over_black(space, tmp_path):
    frames = np.full((3, 48, 64, 4), 200, np.uint8)
    frames[:, :, 32:, 3] = 0
    imported(space, write_video(tmp_path / "alpha.mov", frames, codec="qtrle", pix_fmt="argb"))
    assert space.frames[1][:, 40:].max() < 20
    assert space.frames[1][:, :24].min() > 100


def test_large_pictures_are_scaled_down_and_the_visitor_is_told(tmp_path, tiny_clip):
    space = Workspace(tmp_path, Limits(working_short_side=60, min_free_disk=1))
    imported(space, write_video(tmp_path / "large.mp4", tiny_clip[0]))
    assert (space.facts.width, space.facts.height) == (100, 60)
    assert space.frames[0].shape == (60, 100, 3)
    assert "scaled down from 160×96 to 100×60" in space.facts.notes[0]


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "playable"),
    [
        ("a.mp4", "libx264", "yuv420p", True),
        ("a.mp4", "mpeg4", "yuv420p", False),
        ("a.mp4", "libx264", "yuv444p", False),
        ("a.avi", "libx264", "yuv420p", False),
        ("a.webm", "libvpx-vp9", "yuv420p", True),
    ],
)
def test_what_browsers_play(space, tmp_path, tiny_clip, name, codec, pixels, playable):
    imported(space, write_video(tmp_path / name, tiny_clip[0][:2], codec=codec, pix_fmt=pixels))
    assert space.is_playable == playable


def test_sound_is_left_out_and_the_visitor_is_told(space, tmp_path, tiny_clip):
    imported(space, write_video(tmp_path / "loud.mp4", tiny_clip[0], sound=True))
    assert space.facts.notes == ["The sound is left out."]


def test_a_damaged_file_gives_what_decodes(space, tmp_path):
    frames, _ = long_clip(60)
    whole = write_video(tmp_path / "whole.mkv", frames)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    imported(space, cut)
    assert 0 < space.facts.num_frames < 60
    assert "damaged or cut short" in space.facts.notes[0]


def bad_files(tmp_path, clip):
    """Name of the file, its maker, limits, and what the message says."""

    def text(path):
        path.write_text("not a video at all\n" * 20)

    def sound(path):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            container.mux(stream.encode(_silence()))
            container.mux(stream.encode(None))

    def cut(path):  # mp4 has its index at the end
        data = write_video(path, clip).read_bytes()
        path.write_bytes(data[: len(data) // 2])

    def playlist(path):
        write_video(path.with_name("part.ts"), clip, codec="mpeg2video")
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1.0,\npart.ts\n#EXT-X-ENDLIST\n")

    def whole(path):
        write_video(path, clip)

    def two_sizes(path):
        parts = clip, clip[:, :48, :64]
        path.write_bytes(b"".join(write_video(path, part, format="h264").read_bytes() for part in parts))

    return {
        "empty": ("a.mp4", lambda path: path.write_bytes(b""), {}, r"a.mp4 is empty \(0 bytes\)"),
        "text": ("a.mp4", text, {}, "a.mp4 is not a video that can be read here"),
        "picture": ("a.png", lambda path: Image.fromarray(clip[0]).save(path), {}, "a.png is not a video"),
        "playlist": ("a.mp4", playlist, {}, "a.mp4 is not a video"),
        "zeros": ("a.mp4", lambda path: path.write_bytes(bytes(5000)), {}, "a.mp4 is not a video"),
        "sound": ("a.m4a", sound, {}, "a.m4a holds sound only"),
        "cut": ("a.mp4", cut, {}, "a.mp4 is not a video"),
        "missing": ("a.mp4", lambda path: None, {}, "a.mp4 is not a file"),
        "folder": ("a.mp4", lambda path: path.mkdir(), {}, "a.mp4 is not a file"),
        "two sizes": ("a.h264", two_sizes, {}, "a.h264 changes its picture size"),
        "bytes": ("a.mp4", whole, {"max_bytes": 1500}, r"a.mp4 has 0.0 MB; up to 0.0 MB can be taken"),
        "seconds": ("a.mp4", whole, {"max_seconds": 0.2}, "a.mp4 is longer than 0.2 seconds"),
        "frames": ("a.mp4", whole, {"max_frames": 5}, "a.mp4 has more than 5 frames"),
        "frames without index": ("a.ts", lambda p: write_video(p, clip, codec="mpeg2video"), {"max_frames": 5}, "5 f"),
        "side": ("a.mp4", whole, {"max_side": 128}, "a.mp4 has 160×96 pixels; up to 128 a side"),
        "disk": ("a.mp4", whole, {"min_free_disk": 10**18}, "The disk of this machine is full"),
    }


@pytest.mark.parametrize("kind", bad_files(None, None))
def test_what_cannot_be_taken_gives_a_message_and_leaves_the_earlier_video(tmp_path, tiny_clip, kind, clip_file):
    name, make, limits, message = bad_files(tmp_path, tiny_clip[0])[kind]
    path = tmp_path / "uploads" / name
    path.parent.mkdir()
    make(path)
    space = imported(Workspace(tmp_path / "space", LIMITS), clip_file)
    space.limits = Limits(**{"min_free_disk": 1, **limits})
    space.set_marks(2, tiny_clip[1][2])
    with pytest.raises(DemoError, match=message) as caught:
        list(space.import_video(path))
    assert str(tmp_path) not in str(caught.value)
    assert space.facts.name == "clip.mp4"
    assert list(space.marks) == [2]
    assert space.frames[5].shape == (96, 160, 3)
    assert not leftovers(space)
    assert not space.is_busy


def test_a_new_video_replaces_the_earlier_one_with_all_that_belonged_to_it(followed, tmp_path):
    frames, _ = long_clip(4)
    followed.names[1] = "Fox"
    imported(followed, write_video(tmp_path / "next.mp4", frames))
    assert followed.facts.name == "next.mp4"
    assert (followed.num_done, dict(followed.marks), followed.names, followed.areas()) == (0, {}, {}, [])
    assert not leftovers(followed)


def test_an_import_that_is_stopped_or_abandoned_leaves_nothing(loaded, tmp_path):
    path = write_video(tmp_path / "long.mp4", long_clip(40)[0])
    steps = loaded.import_video(path)
    next(steps)
    next(steps)
    loaded.stop.set()
    with pytest.raises(DemoError, match="stopped"):
        list(steps)
    steps = loaded.import_video(path)
    next(steps)
    steps.close()
    assert loaded.facts.name == "clip.mp4"
    assert not loaded.is_busy
    assert not leftovers(loaded)


def test_a_full_disk_while_frames_are_written(loaded, clip_file, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ws.Path, "write_bytes", full)
    with pytest.raises(DemoError, match="disk of this machine is full"):
        list(loaded.import_video(clip_file))
    assert not leftovers(loaded)


def test_limits_come_from_the_environment_and_are_stated():
    limits = Limits.from_environment({"DEFORMVOS_MAX_SECONDS": "90", "DEFORMVOS_MAX_BYTES": "5000000"})
    assert (limits.max_seconds, limits.max_bytes, limits.max_frames) == (90.0, 5_000_000, 18_000)
    assert limits.sentence().startswith("Up to 90 seconds, 18,000 frames, 5.0 MB and 4096 pixels a side.")
    assert Limits().sentence().startswith("Up to 10 minutes, 18,000 frames, 200 MB and 4096 pixels a side.")
    for bad in ("many", "-1", "0", "inf", "nan"):
        with pytest.raises(ValueError, match="DEFORMVOS_MAX_SECONDS must be a positive number"):
            Limits.from_environment({"DEFORMVOS_MAX_SECONDS": bad})


# Marks


def test_marks_round_trip_and_may_be_cleared(loaded, tiny_clip):
    ids = tiny_clip[1]
    loaded.set_marks(3, ids[3])
    loaded.set_marks(0, ids[0].astype(np.int64))
    assert list(loaded.marks) == [0, 3]
    assert np.array_equal(loaded.marks[3], ids[3])
    assert loaded.marks.get(1) is None
    assert loaded.names == {1: "Object 1", 2: "Object 2"}
    loaded.set_marks(3, np.zeros((96, 160), np.uint8))
    assert list(loaded.marks) == [0]
    loaded.clear_marks()
    assert len(loaded.marks) == 0
    assert not list(loaded._video.marks_folder.iterdir())


@pytest.mark.parametrize(
    ("frame_idx", "id_map", "message"),
    [
        (6, np.zeros((96, 160), np.uint8), "frames 0 to 5, got 6"),
        (-1, np.zeros((96, 160), np.uint8), "frames 0 to 5, got -1"),
        (0, np.zeros((96, 161), np.uint8), "video's size"),
        (0, np.full((96, 160), np.nan), "whole numbers"),
        (0, np.full((96, 160), 8), "Up to 7 objects"),
        (0, np.full((96, 160), -1), "Up to 7 objects"),
    ],
)
def test_marks_that_do_not_fit(loaded, frame_idx, id_map, message):
    with pytest.raises(DemoError, match=message):
        loaded.set_marks(frame_idx, id_map)
    assert len(loaded.marks) == 0


def test_nothing_can_be_done_without_a_video(space, models, tmp_path):
    for action in (
        lambda: space.frames,
        lambda: space.set_marks(0, np.ones((4, 4), np.uint8)),
        lambda: space.mask(0),
        lambda: space.overlay(0),
        lambda: list(follow(space, models, "Tiny", "Standard", 0)),
    ):
        with pytest.raises(DemoError, match="no video yet"):
            action()
    for export in (
        lambda: list(write_overlay(space, tmp_path / "a.mp4")),
        lambda: write_masks_zip(space, tmp_path / "a.zip"),
        lambda: write_json(space, tmp_path / "a.json", {}),
    ):
        with pytest.raises(DemoError, match="nothing to save yet"):
            export()
    assert space.areas() == []
    assert (space.facts, space.num_done, dict(space.marks)) == (None, 0, {})
    space.clear_marks()


def test_layers_round_trip(tiny_clip):
    ids = tiny_clip[1][2]
    for alpha in (255, 180, 128):
        layer = id_map_to_layer(ids, PALETTE, alpha)
        assert layer.dtype == np.uint8
        assert np.array_equal(layers_to_id_map({"layers": [layer]}, PALETTE, ids.shape), ids)
    every = np.arange(8, dtype=np.uint8).repeat(9).reshape(8, 9)
    assert np.array_equal(layers_to_id_map({"layers": [id_map_to_layer(every, PALETTE)]}, PALETTE, (8, 9)), every)
    with pytest.raises(ValueError, match="alpha"):
        id_map_to_layer(ids, PALETTE, 100)


def test_layers_cover_each_other_and_may_be_missing():
    first, second = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    first[5:15, 5:15], second[5:15, 10:20] = 1, 2
    value = {"layers": [id_map_to_layer(first, PALETTE), None, id_map_to_layer(second, PALETTE)]}
    ids = layers_to_id_map(value, PALETTE, (20, 30))
    assert np.array_equal(ids, np.where(second > 0, second, first))
    for nothing in (None, {}, {"layers": None}, {"layers": []}, {"layers": [np.zeros((20, 30, 4), np.uint8)]}):
        assert not layers_to_id_map(nothing, PALETTE, (20, 30)).any()
    with pytest.raises(ValueError, match="must be RGBA"):
        layers_to_id_map({"layers": [np.zeros((20, 30, 3), np.uint8)]}, PALETTE, (20, 30))


def test_rims_that_mix_two_colours_make_no_third_object():
    ids = np.zeros((40, 60), np.uint8)
    for first in range(1, 8):
        for second in range(1, 8):
            ids[:, :29], ids[:, 31:] = first, second
            layer = id_map_to_layer(ids, PALETTE)
            layer[:, 29:31, 3] = 255
            mixed = (PALETTE[first].astype(int) + PALETTE[second]) // 2
            layer[:, 29:31, :3] = mixed
            seen = layers_to_id_map({"layers": [layer]}, PALETTE, ids.shape)
            assert set(np.unique(seen)) == {first, second}
            ids[:, 29:31] = 0


def test_soft_rims_and_other_sizes():
    layer = np.zeros((40, 60, 4), np.uint8)
    layer[10:30, 20:40] = (*PALETTE[3], 255)
    layer[9, 20:40] = (*PALETTE[3], 90)  # less than half covered
    layer[30, 20:40] = (*(PALETTE[3] + 3), 140)  # what rounding leaves of a colour
    ids = layers_to_id_map({"layers": [layer]}, PALETTE, (40, 60))
    assert not ids[9].any()
    assert (ids[30, 20:40] == 3).all()
    doubled = layers_to_id_map({"layers": [layer]}, PALETTE, (80, 120))
    assert doubled.shape == (80, 120)
    assert np.array_equal(doubled[::2, ::2], ids)


def test_a_box_finds_the_object_in_it(tiny_clip):
    frames, ids = tiny_clip
    truth = ids[0] == 1
    result = box_to_mask(frames[0], (6, 6, 38, 38))
    assert result.refined
    assert (result.mask & truth).sum() / (result.mask | truth).sum() > 0.9
    same = box_to_mask(frames[0], (38, 38, 6, 6))  # any two corners
    assert np.array_equal(same.mask, result.mask)


def test_a_box_where_nothing_is_found_is_the_whole_box():
    flat = np.full((60, 80, 3), 90, np.uint8)
    for box in ((10, 10, 40, 40), (0, 0, 80, 60), (-20, -20, 500, 500), (0, 0, 4, 4)):
        mask, refined = box_to_mask(flat, box)
        assert mask.shape == (60, 80)
        if not refined:
            left, top, right, bottom = np.clip(box, 0, (80, 60, 80, 60))
            assert mask.sum() == (right - left) * (bottom - top)
        assert mask.any()
    whole = box_to_mask(flat, (0, 0, 80, 60))
    assert not whole.refined
    assert whole.mask.all()


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((10, 10, 12, 40), "2×30 pixels; it needs 4"),
        ((10, 10, 10, 10), "0×0 pixels"),
        ((100, 10, 200, 40), "outside of the picture"),
        ((-30, -30, -2, -2), "outside of the picture"),
        ((10, 10, float("nan"), 40), "two corners"),
        ((10, 10), "two corners"),
        ((78, 10, 200, 40), "2×30 pixels"),
    ],
)
def test_boxes_that_hold_nothing(box, message):
    with pytest.raises(DemoError, match=message):
        box_to_mask(np.zeros((60, 80, 3), np.uint8), box)


def test_mask_files(tmp_path, tiny_clip):
    ids = tiny_clip[1][0]
    image = Image.fromarray(ids)
    image.putpalette(PALETTE.tobytes())
    image.save(tmp_path / "palette.png")
    assert np.array_equal(mask_file_to_id_map(tmp_path / "palette.png", ids.shape), ids)
    Image.fromarray((ids == 1).astype(np.uint8) * 255).save(tmp_path / "white.png")
    assert np.array_equal(mask_file_to_id_map(tmp_path / "white.png", ids.shape), ids == 1)
    Image.fromarray(np.array([0, 38, 75], np.uint8)[ids]).save(tmp_path / "high.png")
    assert np.array_equal(mask_file_to_id_map(tmp_path / "high.png", ids.shape), ids)
    assert mask_file_to_id_map(tmp_path / "high.png", (48, 80)).shape == (48, 80)
    many = np.arange(9, dtype=np.uint8).repeat(20)[None].repeat(30, axis=0)
    Image.fromarray(many).save(tmp_path / "many.png")
    (tmp_path / "text.png").write_text("no")
    Image.fromarray(ids * 0).save(tmp_path / "empty.png")
    Image.fromarray(tiny_clip[0][0]).save(tmp_path / "photo.png")
    for name, message in (
        ("many.png", "many.png holds 8 objects; up to 7"),
        ("text.png", "Mask text.png is not an image"),
        ("empty.png", "Mask empty.png is empty"),
        ("photo.png", "one flat value"),
        ("none.png", "does not exist"),
    ):
        with pytest.raises(DemoError, match=message) as caught:
            mask_file_to_id_map(tmp_path / name, ids.shape)
        assert str(tmp_path) not in str(caught.value)


# Following


def test_follow_reports_and_writes_every_frame(loaded, tiny_clip, models):
    loaded.set_marks(0, tiny_clip[1][0])
    reports = list(follow(loaded, models, "Tiny", "Standard", 0, progress_every=0.0))
    assert reports[0] == Progress(0, 0, 6)
    assert [report.finished for report in reports] == [False] * (len(reports) - 1) + [True]
    assert [report.done for report in reports] == sorted(report.done for report in reports)
    last = reports[-1]
    assert (last.frame_idx, last.done, last.total, last.stopped, last.seconds_left) == (5, 6, 6, False, 0.0)
    assert last.fps > 0
    assert loaded.num_done == 6
    assert np.array_equal(loaded.mask(0), tiny_clip[1][0])  # to the pixel as given
    assert all(mask.shape == (96, 160) and set(np.unique(mask)) <= {0, 1, 2} for mask in results(loaded).values())


def test_follow_does_what_a_plain_session_does(loaded, tiny_clip, models, tiny_model, tiny_processor):
    ids = tiny_clip[1]
    loaded.set_marks(2, ids[2])
    list(follow(loaded, models, "Tiny", "Standard", 2))
    for reverse in (False, True):
        session = tiny_processor.init_video_session(video=loaded.frames)
        tiny_processor.add_inputs_to_inference_session(session, 2, input_masks=ids[2], original_size=(96, 160))
        for output in tiny_model.propagate_in_video_iterator(session, 2, reverse=reverse):
            expected = tiny_processor.post_process_id_map(output, (96, 160))
            assert (loaded.mask(output.frame_idx) == expected).mean() > 0.999


@pytest.mark.parametrize(
    ("start", "direction", "visited"),
    [
        (2, "forwards", [2, 3, 4, 5]),
        (2, "backwards", [0, 1, 2]),
        (2, "both", [0, 1, 2, 3, 4, 5]),
        (0, "both", [0, 1, 2, 3, 4, 5]),
        (5, "forwards", [5]),
        (0, "backwards", [0]),
        (5, "both", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_directions(loaded, tiny_clip, models, start, direction, visited):
    loaded.set_marks(start, tiny_clip[1][start])
    reports = list(follow(loaded, models, "Tiny", "Standard", start, direction))
    assert loaded.done.tolist() == visited
    assert reports[-1].done == reports[-1].total == len(visited)


@pytest.mark.parametrize("direction", ["forwards", "backwards"])
def test_a_correction_changes_one_side_only(followed, tiny_clip, models, direction):
    before = results(followed)
    corrected = np.roll(tiny_clip[1][3], 9, axis=0)
    followed.set_marks(3, corrected)
    assert followed.is_whole(3)
    assert np.array_equal(followed.mask(3), corrected)  # seen at once
    list(follow(followed, models, "Tiny", "Standard", 3, direction))
    after = results(followed)
    assert np.array_equal(after[3], corrected)
    kept = range(3) if direction == "forwards" else range(4, 6)
    assert all(np.array_equal(before[i], after[i]) for i in kept)
    changed = range(4, 6) if direction == "forwards" else range(1, 3)
    assert any(not np.array_equal(before[i], after[i]) for i in changed)
    assert np.array_equal(after[0], tiny_clip[1][0])


def test_a_correction_can_be_taken_back_and_a_result_cleared(followed, tiny_clip, models):
    ids, found = tiny_clip[1], followed.mask(3)
    followed.set_marks(3, np.roll(ids[3], 9, axis=0))
    followed.set_marks(3, np.roll(ids[3], 20, axis=0))
    list(follow(followed, models, "Tiny", "Standard", 3, "forwards"))
    followed.clear_frame(3)
    assert np.array_equal(followed.mask(3), found)
    assert list(followed.marks) == [0]
    followed.clear_frame(3)  # and now what was found
    assert followed.mask(3) is None
    assert followed.done.tolist() == [0, 1, 2, 4, 5]
    followed.clear_frame(0)  # its result was what was marked
    assert (followed.mask(0), len(followed.marks)) == (None, 0)
    followed.set_marks(0, ids[0])
    list(follow(followed, models, "Tiny", "Standard", 0))
    # What was found anew is what comes back.
    again = followed.mask(3)
    followed.set_marks(3, ids[3])
    followed.clear_frame(3)
    assert np.array_equal(followed.mask(3), again)


def test_an_object_that_was_cleared_everywhere_is_none(loaded, tiny_clip):
    third = np.zeros((96, 160), np.uint8)
    third[40:50, 40:50] = 3
    loaded.set_marks(0, third)
    assert loaded.object_ids == [3]
    loaded.clear_frame(0)
    loaded.set_marks(0, tiny_clip[1][0])
    assert loaded.object_ids == [1, 2]
    assert list(loaded.labels()) == [1, 2]


@pytest.mark.parametrize(("first", "second"), [(0, 3), (5, 2)])
def test_an_object_that_a_correction_leaves_out_is_gone(loaded, tiny_clip, models, first, second):
    ids = tiny_clip[1]
    direction = "forwards" if first < second else "backwards"
    loaded.set_marks(first, ids[first])
    list(follow(loaded, models, "Tiny", "Standard", first, direction))
    loaded.set_marks(second, np.where(ids[second] == 1, 1, 0))
    list(follow(loaded, models, "Tiny", "Standard", second, direction))
    assert not (loaded.mask(second) == 2).any()
    loaded.set_marks(second, ids[second] * 0)  # all of them
    assert second in loaded.marks
    list(follow(loaded, models, "Tiny", "Standard", second, direction))
    assert not loaded.mask(second).any()


def test_objects_that_are_marked_further_on_keep_their_earlier_result(loaded, tiny_clip, models):
    ids = tiny_clip[1]
    for t in range(6):
        loaded.write_mask(t, ids[t])
    loaded.set_marks(0, ids[0])
    loaded.set_marks(4, np.where(ids[4] == 1, 1, 0))  # object 2 leaves here
    list(follow(loaded, models, "Tiny", "Standard", 4, "both"))
    assert not (loaded.mask(4) == 2).any()
    for t in (1, 2, 3):
        found = loaded.mask(t)
        assert np.array_equal(found == 2, (ids[t] == 2) & (found != 1))
    assert np.array_equal(loaded.mask(0), ids[0])
    loaded.set_marks(0, np.where(ids[0] == 1, 1, 0))  # it was never there
    list(follow(loaded, models, "Tiny", "Standard", 0, "forwards"))
    assert not any((loaded.mask(t) == 2).any() for t in range(6))


def test_marks_ahead_join_and_others_go_on(loaded, tiny_clip, models):
    ids = tiny_clip[1]
    loaded.set_marks(0, np.where(ids[0] == 1, 1, 0))
    second = np.where(ids[3] == 2, 2, 0)
    loaded.set_marks(3, second)
    assert not loaded.is_whole(3)
    list(follow(loaded, models, "Tiny", "Standard", 0))
    assert not any((loaded.mask(i) == 2).any() for i in range(3))
    assert np.array_equal(loaded.mask(3) == 2, second == 2)


def test_what_cannot_be_followed(loaded, tiny_clip, models):
    def run(start=0, direction="both", quality="Standard", name="Tiny"):
        list(follow(loaded, models, name, quality, start, direction))

    with pytest.raises(DemoError, match=r"Nothing is marked on frame 0. Mark an object first.$"):
        run()
    loaded.set_marks(2, tiny_clip[1][2])
    with pytest.raises(DemoError, match="Marks are on frame 2: start there"):
        run(start=0)
    with pytest.raises(DemoError, match="frames 0 to 5, got 6"):
        run(start=6)
    with pytest.raises(DemoError, match="no direction 'up'"):
        run(start=2, direction="up")
    with pytest.raises(DemoError, match="no quality 'Best'"):
        run(start=2, quality="Best")
    loaded.set_marks(4, np.zeros((96, 160), np.uint8), whole=True)
    with pytest.raises(DemoError, match="Nothing is marked on frame 4 that could be followed this way"):
        run(start=4, direction="backwards")
    assert not loaded.is_busy
    assert loaded.num_done == 0


@pytest.fixture
def short_adaptation(monkeypatch):
    """Learns on small clips for four steps; the models that came of it."""
    made, config = [], AdaptationConfig(steps=4, short_side=65, num_frames=2, batch_size=1)

    def adaptation(model, images, masks, at_size):
        assert at_size.short_side == 96, "that of the processor"
        made.append(Adaptation(model, images, masks, config))
        return made[-1]

    monkeypatch.setattr(following, "Adaptation", adaptation)
    return made


def test_the_model_learns_all_marked_frames_before_it_follows(loaded, tiny_clip, models, short_adaptation):
    ids = tiny_clip[1]
    loaded.set_marks(0, ids[0])
    list(follow(loaded, models, "Tiny", "Standard", 0))
    plain = results(loaded)
    loaded.set_marks(3, ids[3])
    loaded.set_marks(5, ids[5] * 0, whole=True)
    reports = list(follow(loaded, models, "Tiny", "Adapted", 0, progress_every=0))
    assert [report.learned for report in reports[1:5]] == [0.0, 0.25, 0.5, 0.75]
    assert all(report.learned is None for report in reports[5:]) and reports[-1].finished
    assert not reports[-1].stopped and loaded.num_done == 6
    adapted = results(loaded)
    assert any(not np.array_equal(adapted[t], plain[t]) for t in (1, 2))
    assert len(short_adaptation[0]._clips._objects._statics) == 2  # frame 5 shows nothing to learn
    # The next visitor gets the model as it was.
    before = {name: tensor.clone() for name, tensor in models.get("Tiny")[0].state_dict().items()}
    list(follow(loaded, models, "Tiny", "Adapted", 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in models.get("Tiny")[0].state_dict().items())


def test_learning_can_be_stopped_and_keeps_earlier_results(loaded, tiny_clip, models, short_adaptation):
    loaded.set_marks(0, tiny_clip[1][0])
    list(follow(loaded, models, "Tiny", "Standard", 0))
    before = results(loaded)
    for report in follow(loaded, models, "Tiny", "Adapted", 0, progress_every=0):
        if report.learned == 0.25:
            loaded.stop.set()
    assert short_adaptation[0].done == 1 and report.finished and report.stopped and report.done == 0
    assert all(np.array_equal(mask, before[t]) for t, mask in results(loaded).items())
    assert not loaded.is_busy


def slow(tiny_model, monkeypatch, seconds=0.01):
    """Gives the other thread time to come in between."""
    forward = type(tiny_model).forward

    def slowed(self, *args, **kwargs):
        time.sleep(seconds)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny_model), "forward", slowed)


def test_stop_keeps_what_is_done_and_going_on_is_possible(space, tmp_path, models):
    frames, ids = long_clip(40)
    imported(space, write_video(tmp_path / "long.mp4", frames))
    space.set_marks(20, ids[20])
    reports = []
    for report in follow(space, models, "Tiny", "Standard", 20, progress_every=0.0):
        reports.append(report)
        if report.done == 3:
            space.stop.set()
    assert reports[-1].stopped
    assert reports[-1].finished
    done = space.done.tolist()
    assert 3 <= len(done) < 15
    assert done == list(range(20, 20 + len(done)))
    list(write_overlay(space, tmp_path / "part.mp4"))
    assert VideoReader(tmp_path / "part.mp4").info.num_frames == len(done)
    assert not list(follow(space, models, "Tiny", "Standard", 20))[-1].stopped  # stop is forgotten
    assert space.num_done == 40


def test_a_closed_generator_frees_the_workspace(loaded, tiny_clip, models):
    loaded.set_marks(0, tiny_clip[1][0])
    threads = threading.active_count()
    run = follow(loaded, models, "Tiny", "Standard", 0, progress_every=0.0)
    next(run)
    next(run)
    run.close()
    assert not loaded.is_busy
    assert threading.active_count() == threads
    assert loaded.num_done >= 1


def test_one_thing_at_a_time(loaded, tiny_clip, models, clip_file, tmp_path):
    loaded.set_marks(0, tiny_clip[1][0])
    run = follow(loaded, models, "Tiny", "Standard", 0)
    next(run)
    for second in (
        lambda: list(follow(loaded, models, "Tiny", "Standard", 0)),
        lambda: list(loaded.import_video(clip_file)),
        lambda: list(write_overlay(loaded, tmp_path / "a.mp4")),
    ):
        with pytest.raises(DemoError, match="still following the objects"):
            second()
    assert list(run)[-1].done == 6  # the first one is not disturbed


def test_a_setting_that_is_no_number_is_named():
    assert ws.whole_number("DEFORMVOS_CONCURRENCY", 1, {}) == 1
    assert ws.whole_number("DEFORMVOS_CONCURRENCY", 1, {"DEFORMVOS_CONCURRENCY": " 2 "}) == 2
    for text in ("two", "0", "-1", "1.5"):
        with pytest.raises(ValueError, match="variable DEFORMVOS_CONCURRENCY must be a whole number of at least 1"):
            ws.whole_number("DEFORMVOS_CONCURRENCY", 1, {"DEFORMVOS_CONCURRENCY": text})


def test_a_correction_of_the_very_frame_that_is_computed_is_kept(loaded, tiny_clip, models, tiny_model):
    ids = tiny_clip[1]
    correction = np.where(ids[5] == 2, 0, ids[5])
    loaded.set_marks(0, ids[0])
    list(follow(loaded, models, "Tiny", "Standard", 0))

    def correct(module, arguments, keywords, output):
        if output.frame_idx == 2 and 2 not in loaded.marks:
            loaded.set_marks(2, correction)

    hook = tiny_model.register_forward_hook(correct, with_kwargs=True)
    list(follow(loaded, models, "Tiny", "Standard", 0))
    hook.remove()
    assert loaded.is_whole(2)
    assert np.array_equal(loaded.mask(2), correction)


def test_marks_that_cannot_be_learned_are_explained(loaded, models, tiny_clip, tiny_model):
    loaded.set_marks(0, tiny_clip[1][0])
    with torch.no_grad():
        tiny_model.decoder.classifier.bias.fill_(float("nan"))
    with pytest.raises(DemoError, match=r"What is marked cannot be learned: .* Choose the quality Standard"):
        list(follow(loaded, models, "Tiny", "Adapted", 0))


def test_close_while_a_run_goes_on(space, tmp_path, models, tiny_model, monkeypatch):
    frames, ids = long_clip(60)
    imported(space, write_video(tmp_path / "long.mp4", frames))
    space.set_marks(0, ids[0])
    slow(tiny_model, monkeypatch)
    reports, started = [], threading.Event()

    def run():
        for report in follow(space, models, "Tiny", "Standard", 0, progress_every=0.0):
            reports.append(report)
            if report.done:
                started.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(20)
    space.close()
    thread.join(20)
    assert not thread.is_alive()
    assert reports[-1].stopped
    assert not space.folder.exists()
    space.close()
    with pytest.raises(DemoError, match="Load the page again"):
        list(space.import_video(CLIP))


@pytest.mark.parametrize("work", ["follow", "import", "export"])
def test_close_under_work_that_nobody_continues(followed, models, tmp_path, work):
    run = {
        "follow": lambda: follow(followed, models, "Tiny", "Standard", 0, progress_every=0.0),
        "import": lambda: followed.import_video(CLIP),
        "export": lambda: write_overlay(followed, tmp_path / "out.mp4"),
    }[work]()
    next(run)
    next(run)
    followed.close(wait=0.05)
    assert not followed.folder.exists()
    run.close()
    assert not followed.folder.exists()
    assert not followed.is_busy
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("work", ["follow", "import", "export"])
def test_work_that_goes_on_after_close_ends(followed, models, tmp_path, work):
    run = {
        "follow": lambda: follow(followed, models, "Tiny", "Standard", 0, progress_every=0.0),
        "import": lambda: followed.import_video(CLIP),
        "export": lambda: write_overlay(followed, tmp_path / "out.mp4"),
    }[work]()
    next(run)
    followed.close(wait=0.05)
    if work == "follow":
        assert list(run)[-1].stopped
    else:
        with pytest.raises(DemoError, match="Load the page again"):
            list(run)
    assert not followed.folder.exists()
    assert not (tmp_path / "out.mp4").exists()


def test_a_disk_that_fills_up_on_the_way(loaded, tiny_clip, models, monkeypatch):
    loaded.set_marks(0, tiny_clip[1][0])
    write, calls = ws.write_palette_png, []

    def fill(path, *args):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(ws, "write_palette_png", fill)
    with pytest.raises(DemoError, match="disk of this machine is full"):
        list(follow(loaded, models, "Tiny", "Standard", 0))
    assert loaded.done.tolist() == [0, 1]
    assert not loaded.is_busy


def test_errors_of_the_program_are_not_hidden(loaded, tiny_clip, models, tiny_model, monkeypatch):
    loaded.set_marks(0, tiny_clip[1][0])

    def broken(*args, **kwargs):
        raise RuntimeError("a fault")

    monkeypatch.setattr(type(tiny_model), "forward", broken)
    with pytest.raises(RuntimeError, match="a fault"):
        list(follow(loaded, models, "Tiny", "Standard", 0))
    assert not loaded.is_busy


def test_memory_does_not_grow_with_the_length(tmp_path, models):
    peaks = {}
    # The first run imports what is imported late.
    for count in (8, 20, 80):
        space = Workspace(tmp_path / str(count), LIMITS)
        frames, ids = long_clip(count)
        path = write_video(tmp_path / f"{count}.mp4", frames)
        mask = ids[0].copy()
        del frames, ids
        gc.collect()
        tracemalloc.start()
        for _ in space.import_video(path):
            pass
        space.set_marks(0, mask)
        for step, _ in enumerate(follow(space, models, "Tiny", "Standard", 0, progress_every=0.0)):
            # transformers' processors leave cycles of 2 kB a frame, which go when the collector comes by, not before.
            if step % 10 == 0:
                gc.collect()
        for _ in write_overlay(space, tmp_path / f"{count}-out.mp4"):
            pass
        write_masks_zip(space, tmp_path / f"{count}.zip")
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        space.close()
    # 60 frames of 48x80 are 0.7 MB; times, areas and boxes are 104 bytes a frame, an entry of a zip some hundred.
    assert peaks[80] - peaks[20] < 150_000, peaks


def test_two_visitors_at_once(tmp_path, models):
    spaces = Workspaces(tmp_path, LIMITS)
    clips = {"a": long_clip(20), "b": tuple(part[:, ::-1].copy() for part in long_clip(20))}
    alone = {}
    for key, (frames, ids) in clips.items():
        path = write_video(tmp_path / f"{key}.mp4", frames)
        space = imported(spaces.get(key), path)
        space.set_marks(0, ids[0])
        list(follow(space, models, "Tiny", "Standard", 0))
        alone[key] = results(space)
        imported(space, path).set_marks(0, ids[0])  # anew, without results
        assert space.num_done == 0
    failures = []

    def visit(key):
        try:
            list(follow(spaces.get(key), models, "Tiny", "Standard", 0))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=visit, args=key) for key in clips]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    for key in clips:
        together = results(spaces.get(key))
        assert all(np.array_equal(together[i], alone[key][i]) for i in range(20))
    assert not np.array_equal(alone["a"][0], alone["b"][0])
    spaces.close_all()
    assert not list(tmp_path.glob("video-*"))


def test_the_registry(tmp_path):
    spaces = Workspaces(tmp_path, Limits(max_workspaces=2, min_free_disk=1, idle_seconds=1000))
    first = spaces.get("a")
    assert spaces.get("a") is first
    second = spaces.get("b")
    assert second.folder != first.folder
    with pytest.raises(DemoError, match="Many people"):
        spaces.get("c")
    spaces.close("a")
    spaces.close("a")
    assert not first.folder.exists()
    assert spaces.get("c").folder.exists()
    second.last_used -= 400  # makes room when there is none
    spaces.sweep()
    assert not second.is_closed
    spaces.get("d")
    assert second.is_closed
    busy, idle = spaces.get("c"), spaces.get("d")
    busy.last_used -= 2000
    idle.last_used -= 2000
    with busy.busy():
        busy.last_used -= 2000
        spaces.sweep()
        assert (busy.is_closed, idle.is_closed, len(spaces)) == (False, True, 1)
    spaces.close_all()
    assert not any(path.exists() for path in (busy.folder, idle.folder))


def test_nobody_waits_for_ever(tmp_path):
    spaces = Workspaces(tmp_path, Limits(min_free_disk=1))

    def is_kept(since, leave=lambda key: None):
        space = spaces.get("a")
        space.waiting_since = time.monotonic() - since
        leave("a")
        space.last_used -= 10_000
        spaces.sweep()
        return not space.is_closed

    assert is_kept(5 * 3600)
    assert not is_kept(7 * 3600)  # it was lost on the way
    assert not is_kept(0, spaces.leave)
    assert not is_kept(0)  # it was still on the way
    spaces.close_all()


def test_what_was_still_on_the_way_is_no_sign_of_life(tmp_path):
    spaces = Workspaces(tmp_path, Limits(min_free_disk=1))
    spaces.get("a")
    for key in "ab":  # the second has no workspace yet
        spaces.leave(key)
        late = spaces.get(key)
        late.last_used -= 1000
        spaces.sweep()
        assert late.is_closed and not late.folder.exists()
    spaces.close_all()


def test_a_page_that_comes_back_soon_finds_its_video(tmp_path, monkeypatch):
    monkeypatch.setattr(ws, "_STRAGGLING", 0.0)
    spaces = Workspaces(tmp_path, Limits(max_workspaces=2, min_free_disk=1))
    space = spaces.get("a")
    spaces.leave("a")
    spaces.leave("nobody")
    space.last_used -= 100
    spaces.sweep()
    assert spaces.get("a") is space
    space.last_used -= 1000
    spaces.sweep()  # it was seen again
    assert spaces.get("a") is space
    spaces.leave("a")
    with space.busy("following the objects"):
        space.last_used -= 1000
        spaces.sweep()
    assert not space.is_closed  # a run goes on, and its end counts as use
    picture = space.keep_picture("editor", np.zeros((4, 6, 3), np.uint8))
    space.last_used -= 200
    spaces.sweep()
    assert space.is_closed
    assert not space.folder.exists() and not picture.exists()
    # Somebody else's need is greater.
    gone = [spaces.get(key) for key in "ab"][1]
    spaces.leave("b")
    assert spaces.get("c").folder.exists()
    assert gone.is_closed
    spaces.close_all()


def test_what_a_visitor_sent_goes_with_the_workspace(tmp_path):
    spaces = Workspaces(tmp_path / "root", Limits(min_free_disk=1, left_seconds=0.2))
    sent = {name: tmp_path / name / "clip.mp4" for name in ("alone", "shared")}
    for path in sent.values():
        path.parent.mkdir()
        path.write_bytes(b"video")
    space, other = spaces.get("a"), spaces.get("b")
    for path in sent.values():
        space.receive(path)
    other.receive(sent["shared"])
    pictures = [space.keep_picture("editor", np.zeros((4, 6, 4), np.uint8)) for _ in range(12)]
    assert sum(path.exists() for path in pictures) == 8
    with Image.open(pictures[-1]) as picture:
        assert (picture.size, picture.mode) == ((6, 4), "RGBA")
    spaces.close("a")
    assert pictures[-1].exists()  # the page may be there still
    deadline = time.monotonic() + 10
    while pictures[-1].exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(path.exists() for path in pictures)
    assert not sent["alone"].parent.exists()
    assert sent["shared"].exists()
    # Somebody sends the same, and has not opened it yet, when the other one leaves.
    path.with_name("sent").write_bytes(b"video")
    path.with_name("sent").replace(path)
    spaces.close_all()
    assert sent["shared"].exists()


def test_what_a_page_shows_stays_young(space, tmp_path):
    space.source = tmp_path / "clip.mp4"
    download = space.folder / "downloads" / "0" / "masks.zip"
    download.parent.mkdir(parents=True)
    files = [space.source, download, space.keep_picture("editor", np.zeros((4, 6, 3), np.uint8))]
    for path in files:
        path.touch()
        os.utime(path, (0, 0))
    space.keep_files()
    assert all(time.time() - path.stat().st_mtime < 60 for path in files)
    download.unlink()
    space.keep_files()


def test_no_picture_is_shown_when_the_disk_is_full(tmp_path):
    space = Workspace(tmp_path, Limits(min_free_disk=10**18))
    with pytest.raises(DemoError, match="disk of this machine is full"):
        space.keep_picture("editor", np.zeros((4, 6, 3), np.uint8))


def test_folders_of_programs_that_were_killed_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f"deformvos-{number}-0" for number in (ended.pid, os.getpid(), os.getppid())] + ["deformvos-x-0", "other"]
    for name in names:
        (tmp_path / name / "video-0").mkdir(parents=True)
    root = ws.new_root(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
    assert not root.exists()
    assert root.name.startswith(f"deformvos-{os.getpid()}-")


def test_the_registry_has_a_folder_of_its_own_that_goes():
    spaces = Workspaces(limits=LIMITS)
    root = spaces.get("a").folder.parent
    assert root.is_dir()
    spaces.close_all()
    assert not root.exists()


# Results go out


def test_masks_zip_is_the_masks(followed, tmp_path):
    write_masks_zip(followed, tmp_path / "masks.zip")
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        assert archive.namelist() == [f"masks/{i:05d}.png" for i in range(6)]
        archive.extractall(tmp_path / "out")
    for i, mask in results(followed).items():
        assert np.array_equal(read_palette_png(tmp_path / "out" / "masks" / f"{i:05d}.png"), mask)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_the_record(followed, tmp_path):
    followed.names[1] = "Füchsin"
    write_json(followed, tmp_path / "results.json", {"model": "Tiny", "quality": "Fast"})
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record["video"]["num_frames"] == record["num_frames_done"] == len(record["frames"]) == 6
    assert record["run"] == {"model": "Tiny", "quality": "Fast"}
    assert record["objects"][0] == {"id": 1, "name": "Füchsin", "color": "#e69f00"}
    assert record["mask_frames"] == [0]
    for i, mask in results(followed).items():
        entry = record["frames"][i]
        assert (entry["index"], entry["mask"]) == (i, f"masks/{i:05d}.png")
        for obj_id, region in entry["objects"].items():
            rows, columns = np.nonzero(mask == int(obj_id))
            assert region["area"] == len(rows)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else None
            assert region["box"] == box


def test_the_overlay(followed, tmp_path):
    shares = list(write_overlay(followed, tmp_path / "overlay.mp4"))
    assert shares == pytest.approx([(i + 1) / 6 for i in range(6)])
    frames = [frame.image for frame in VideoReader(tmp_path / "overlay.mp4")]
    assert len(frames) == 6
    for i, frame in enumerate(frames):
        assert np.abs(frame.astype(int) - followed.overlay(i)).mean() < 12


def test_frames_between_results_are_shown_as_they_are(loaded, tiny_clip, tmp_path):
    for i in (1, 4):
        loaded.write_mask(i, tiny_clip[1][i])
    list(write_overlay(loaded, tmp_path / "overlay.mp4"))
    times = [frame.timestamp for frame in VideoReader(tmp_path / "overlay.mp4")]
    assert times == pytest.approx([0, 1 / 24, 2 / 24, 3 / 24], abs=1e-3)
    write_masks_zip(loaded, tmp_path / "masks.zip")
    assert zipfile.ZipFile(tmp_path / "masks.zip").namelist() == ["masks/00001.png", "masks/00004.png"]


def test_exports_that_fail_leave_no_file(followed, tmp_path, monkeypatch):
    steps = write_overlay(followed, tmp_path / "a.mp4")
    next(steps)
    steps.close()
    with pytest.raises(ValueError, match="JSON"):
        write_json(followed, tmp_path / "a.json", {"speed": float("nan")})
    monkeypatch.setattr(exports.zipfile.ZipFile, "write", lambda *args: (_ for _ in ()).throw(FileNotFoundError()))
    with pytest.raises(DemoError, match="nothing left to save"):
        write_masks_zip(followed, tmp_path / "a.zip")
    assert not list(tmp_path.glob("a.*"))
    assert not list(tmp_path.glob(".*"))
    assert not followed.is_busy


def test_areas_for_plots_are_bounded_and_finite(loaded, tiny_clip):
    for i in range(6):
        loaded.write_mask(i, tiny_clip[1][i])
    loaded.names.update({1: "Cat", 2: "Cat", 5: " "})
    points = loaded.areas()
    assert len(points) == 12  # a name alone makes no object
    assert {point["object"] for point in points} == {"Cat (1)", "Cat (2)"}
    assert points[0] == {"frame": 0, "seconds": 0.0, "object": "Cat (1)", "area": 3.75}
    assert all(np.isfinite([point["seconds"], point["area"]]).all() for point in points)
    assert [point["frame"] for point in loaded.areas(max_points=2)] == [0, 3] * 2


def test_the_overlay_shows_results_then_marks_then_the_frame(loaded, tiny_clip):
    plain = loaded.frames[0]
    assert np.array_equal(loaded.overlay(0), plain)
    loaded.set_marks(0, tiny_clip[1][0])
    marked = loaded.overlay(0)
    assert not np.array_equal(marked, plain)
    loaded.write_mask(0, np.zeros((96, 160), np.uint8))
    assert np.array_equal(loaded.overlay(0), plain)


# Models


def test_models_to_choose_from(monkeypatch, tmp_path):
    monkeypatch.setenv("DEFORMVOS_MODELS", "Small=/models/a, Large = org/b")
    assert available_models() == {"Small": "/models/a", "Large": "org/b"}
    monkeypatch.setenv("DEFORMVOS_MODELS", "Small")
    with pytest.raises(ValueError, match="label=path"):
        available_models()
    monkeypatch.delenv("DEFORMVOS_MODELS")
    monkeypatch.setattr(following, "_HERE", tmp_path / "demo")
    (tmp_path / "demo").mkdir()
    assert available_models() == {}
    (tmp_path / "demo" / "README.md").write_text("---\nsdk: gradio\nmodels:\n- deformvos/deformvos-student\n---\n")
    assert available_models() == {"Student": "deformvos/deformvos-student"}
    for name in ("deformvos-teacher", "deformvos-student", "unfinished"):
        folder = tmp_path / "hub_cards" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if name != "unfinished":
            (folder / "model.safetensors").write_bytes(b"")
    assert list(available_models()) == ["Student", "Teacher"]


def test_a_model_is_loaded_once_or_the_visitor_is_told(monkeypatch, tmp_path, tiny_model, tiny_processor):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tiny_processor.save_pretrained(tmp_path / "tiny")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    paths = {"Tiny": tmp_path / "tiny", "Broken": tmp_path / "broken", "Gone": tmp_path / "gone"}
    monkeypatch.setenv("DEFORMVOS_MODELS", ",".join(f"{label}={path}" for label, path in paths.items()))
    models = Models()
    assert models.get("Tiny") is models.get("Tiny")
    for name in ("Broken", "Gone"):
        with pytest.raises(DemoError, match=f"The model {name} cannot be loaded"):
            models.get(name)
    with pytest.raises(DemoError, match="no model 'Huge'; choose one of Tiny, Broken, Gone"):
        models.get("Huge")


def test_the_precision_is_measured_or_chosen(monkeypatch):
    assert following.native_dtype() == "float32"
    monkeypatch.setenv("DEFORMVOS_DTYPE", "int8")
    following.native_dtype.cache_clear()
    with pytest.raises(ValueError, match="DEFORMVOS_DTYPE"):
        following.native_dtype()
    monkeypatch.delenv("DEFORMVOS_DTYPE")
    assert following.native_dtype() in ("float32", "bfloat16")


def iou(mask, truth):
    return (mask & truth).sum() / max((mask | truth).sum(), 1)


@pytest.mark.weights
def test_the_student_follows_the_example(space):
    imported(space, CLIP)
    space.set_marks(0, mask_file_to_id_map(ROOT / "examples" / "bunny_mask.png", (360, 640)))
    models = Models()
    for report in follow(space, models, "Student", "Fast", 0, progress_every=0.0):
        if report.done >= 8:
            space.stop.set()
    first, last = space.regions(0), space.regions(int(space.done[-1]))
    for obj_id in (1, 2):
        assert 0.5 < last[obj_id]["area"] / first[obj_id]["area"] < 2
    # Backwards from where forwards came to: what was there at first is found again.
    turn = int(space.done[-1])
    given = space.mask(0)
    space.clear_marks()
    space.set_marks(turn, space.mask(turn))
    list(follow(space, models, "Student", "Fast", turn, "backwards"))
    for obj_id in (1, 2):
        assert iou(space.mask(0) == obj_id, given == obj_id) > 0.75


def test_a_box_around_the_example_beats_the_box():
    frame = next(iter(VideoReader(CLIP))).image
    truth = read_palette_png(ROOT / "examples" / "bunny_mask.png") == 1
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    result = box_to_mask(frame, box)
    assert result.refined
    assert iou(result.mask, truth) > 0.75
    assert marking.BoxMask(result.mask, True)._fields == ("mask", "refined")
