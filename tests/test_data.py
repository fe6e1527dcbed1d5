"""Readers, the cache of decoded frames, clip samplers and the prefetcher, on data sets made here."""

import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from synthetic import draw_scene, save_palette, write_davis, write_gray_png, write_static_set

from hf_deformvos.data import (
    HELD_OUT_SEQUENCES,
    ClipSampler,
    ClipSpec,
    FrameEntry,
    FrameStore,
    Prefetcher,
    davis_sequences,
    list_davis,
    list_static_set,
    load_davis,
    load_static_sets,
    read_annotation,
)
from hf_deformvos.data.clips import choose_window, cut_window
from hf_deformvos.data.store import find_objects
from hf_deformvos.video import read_image


SPEC = ClipSpec(size=(97, 161), frames=3, batch=4, video_share=0.5, max_gap=2)


def ids_of(store) -> set[int]:
    return {item.object_id for frame in store.objects for item in frame}


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_masks_of_0_and_1_are_not_thresholded_away(tmp_path, options):
    write_static_set(tmp_path / "sets" / "ones", values=(1,))
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert ids_of(store) == {1}
    assert store.objects[0][0].area == 40 * 50
    assert store.objects[0][0].box == (8, 20, 48, 70)


def test_masks_of_0_and_255_are_one_object(tmp_path, options):
    write_static_set(tmp_path / "sets" / "binary", values=(255,))
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert ids_of(store) == {1}
    assert int((store.mask(0) == 255).sum()) == 0


def test_ids_are_kept_and_255_beside_ids_is_void(tmp_path, options):
    write_static_set(tmp_path / "sets" / "instances", values=(3, 255))
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert ids_of(store) == {3}
    assert int((store.mask(0) == 255).sum()) == 40 * 50


def test_merged_sets_have_one_object(tmp_path, options, monkeypatch):
    write_static_set(tmp_path / "sets" / "parts", values=(4, 9))
    (merged,) = load_static_sets(tmp_path / "sets", merged_sets=("parts",), **options)
    (split,) = load_static_sets(tmp_path / "sets", merged_sets=(), **options)
    monkeypatch.chdir(tmp_path / "sets" / "parts")
    (here,) = load_static_sets(".", merged_sets=("parts",), **options)
    assert (here.name, here.folder) == ("parts", merged.folder)
    assert ids_of(merged) == {1}
    assert ids_of(split) == {4, 9}


@pytest.mark.parametrize("mode", ["P", "L", "1", "RGB", "RGBA"])
def test_read_mask_takes_every_mode(tmp_path, mode):
    _, ids = draw_scene(20, 30, {1: (5, 5, 15, 15)})
    if mode == "P":
        save_palette(tmp_path / "mask.png", ids)
    else:
        image = Image.fromarray(ids * 255).convert("1") if mode == "1" else Image.fromarray(ids).convert(mode)
        image.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as image:
        assert image.mode == mode
    for merge in (False, True):
        mask = read_annotation(tmp_path / "mask.png", merge)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, ids)


def test_coloured_masks_are_refused_unless_merged(tmp_path):
    image, ids = draw_scene(20, 30, {1: (5, 5, 15, 15)})
    Image.fromarray(image * ids[..., None]).save(tmp_path / "mask.png")
    assert np.array_equal(read_annotation(tmp_path / "mask.png", merge=True), ids)
    with pytest.raises(ValueError, match=r"mask\.png must hold ids as palette entries or grays"):
        read_annotation(tmp_path / "mask.png", merge=False)


def test_ids_above_255_are_refused_unless_merged(tmp_path):
    ids = np.array([[0, 1, 2], [300, 65535, 0]], np.uint16)
    Image.fromarray(ids).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask\.png must hold ids from 0 to 255, got 65535"):
        read_annotation(tmp_path / "mask.png", merge=False)
    assert np.array_equal(read_annotation(tmp_path / "mask.png", merge=True), ids > 0)
    Image.fromarray(np.where(ids > 255, 255, ids)).save(tmp_path / "mask.png")
    assert read_annotation(tmp_path / "mask.png", merge=False).tolist() == [[0, 1, 2], [255, 255, 0]]


@pytest.mark.parametrize("bits", [2, 4])
def test_grays_of_few_bits_are_refused_unless_merged(tmp_path, options, bits):
    """Pillow reads the ids 0 to 3 of two bits as 0, 85, 170 and 255, and the last would be void."""
    folder = write_static_set(tmp_path / "sets" / "some", count=2)
    for path in (folder / "masks").iterdir():
        write_gray_png(path, np.tile(np.arange(4, dtype=np.uint8).repeat(30), (96, 1)), bits)
    assert not set(np.unique(Image.open(path))) <= {0, 1, 2, 3}
    message = rf"\.png must hold ids in eight bits or as palette entries, got grays of {bits} bits"
    with pytest.raises(ValueError, match=message):
        read_annotation(path, merge=False)
    with pytest.raises(ValueError, match=rf"no frame could be read; .*{message}"):
        load_static_sets(tmp_path / "sets", **options)
    (merged,) = load_static_sets(tmp_path / "sets", merged_sets=("some",), **options)
    assert [item.area for item in merged.objects[0]] == [96 * 90]


def test_masks_of_0_and_65535_are_one_object(tmp_path, options):
    folder = write_static_set(tmp_path / "sets" / "deep", count=1)
    _, ids = draw_scene(96, 120, {1: (8, 20, 48, 70)})
    Image.fromarray(ids * np.uint16(65535)).save(folder / "masks" / "00000.png")
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert ids_of(store) == {1}


def test_find_objects_leaves_out_background_and_void():
    mask = np.zeros((10, 12), np.uint8)
    mask[2:4, 3:7], mask[9, 11], mask[0] = 7, 2, 255
    small, large = find_objects(mask)
    assert (small.object_id, small.area, small.box) == (2, 1, (11, 9, 12, 10))
    assert (large.object_id, large.area, large.box) == (7, 8, (3, 2, 7, 4))


# ---- DAVIS layout ---------------------------------------------------------------------------------------------------


def test_davis_reads_palette_ids_in_time_order(tmp_path, options):
    store = load_davis(write_davis(tmp_path / "davis"), **options)
    assert list(store.sequences) == ["ant", "bee"]
    assert store.sequences["bee"] == range(6, 12)
    assert store.frame_names[:6] == [f"{t:05d}" for t in range(6)]
    assert ids_of(store) == {1, 2}
    assert store.image(7).shape == (96, 160, 3)
    # The red rectangle moves 4 pixels a frame, mask and image together.
    assert [store.objects[t][0].box[0] for t in range(6)] == [10, 14, 18, 22, 26, 30]
    for index in range(len(store)):
        red = (store.image(index)[..., 0] > 180) & (store.image(index)[..., 1] < 80)
        assert (red == (store.mask(index) == 1)).mean() > 0.98


@pytest.mark.parametrize("value", [1, 255])
def test_davis_2016_masks_are_one_object_whatever_their_value(tmp_path, options, value):
    root = write_davis(tmp_path / "davis", value=value)
    assert ids_of(load_davis(root, merge=True, **options)) == {1}
    (root / "ImageSets" / "2016").mkdir(parents=True)
    assert ids_of(load_davis(root, **options)) == {1}


def test_held_out_sequences_are_left_out_by_default(tmp_path, options):
    root = write_davis(tmp_path / "davis", names=("ant", *HELD_OUT_SEQUENCES), frames=2)
    assert len(HELD_OUT_SEQUENCES) == 6
    assert list(load_davis(root, **options).sequences) == ["ant"]
    chosen = load_davis(root, sequences=["swing", "ant"], exclude=(), **options)
    assert list(chosen.sequences) == ["swing", "ant"]


def test_held_out_sequences_that_are_asked_for_are_named(tmp_path, options, warnings_of_package):
    root = write_davis(tmp_path / "davis", names=("ant", "swing"), frames=2)
    assert list(load_davis(root, sequences=["ant", "swing"], **options).sequences) == ["ant"]
    assert "swing left out, as `exclude` says" in warnings_of_package.text
    assert "`exclude=()` takes them" in warnings_of_package.text
    with pytest.raises(ValueError, match=r"No sequence is left of .*swing left out.*`exclude=\(\)` takes them"):
        load_davis(root, sequences=["swing"], **options)


def test_two_images_of_one_frame_are_refused(tmp_path, options):
    root = write_davis(tmp_path / "davis", names=("ant",), frames=3)
    folder = root / "JPEGImages" / "480p" / "ant"
    Image.open(folder / "00001.jpg").save(folder / "00001.png")
    with pytest.raises(ValueError, match=r"one file a frame, got 00001\.jpg and 00001\.png"):
        load_davis(root, **options)


def test_splits_are_read_in_both_notations(tmp_path):
    root = write_davis(tmp_path / "davis", frames=1)
    for year, text in (
        (2016, "/JPEGImages/480p/bee/00000.jpg /Annotations/480p/bee/00000.png\n" * 2),
        (2017, "ant\n"),
    ):
        (root / "ImageSets" / str(year)).mkdir(parents=True)
        (root / "ImageSets" / str(year) / "train.txt").write_text(text)
    assert davis_sequences(root, "train", 2016) == ["bee"]
    assert davis_sequences(root, "train") == ["ant"]
    with pytest.raises(ValueError, match=r"Split 'val' must be a file ImageSets/<year>/val\.txt"):
        davis_sequences(root, "val")


def test_folders_of_the_wrong_form_are_named(tmp_path, options):
    with pytest.raises(ValueError, match="needs Annotations/"):
        load_davis(tmp_path, **options)
    with pytest.raises(ValueError, match="No image set"):
        load_static_sets(tmp_path, **options)
    with pytest.raises(ValueError, match="Sequence 'wasp' must have a folder"):
        list_davis(write_davis(tmp_path / "davis", frames=1), ["wasp"])
    (tmp_path / "set" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="masks does not exist"):
        list_static_set(tmp_path / "set")


# ---- broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["images", "masks"])
def test_broken_files_are_reported_by_name_or_refused(tmp_path, options, warnings_of_package, part):
    folder = write_static_set(tmp_path / "sets" / "some")
    path = folder / part / "00001.png"
    path.write_bytes(path.read_bytes()[:60])
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert store.frame_names == ["00000", "00002"]
    assert "00001.png" in warnings_of_package.text
    assert len(store.skipped) == 1
    # Also from the cache, which the tolerant call has filled.
    with pytest.raises(ValueError, match=r"cannot read .*00001\.png"):
        load_static_sets(tmp_path / "sets", on_error="raise", **options)
    warnings_of_package.clear()
    load_static_sets(tmp_path / "sets", **options)
    assert "00001.png" in warnings_of_package.text


def test_broken_files_are_refused_without_a_trace_in_the_cache(tmp_path, options):
    folder = write_static_set(tmp_path / "sets" / "some")
    (folder / "images" / "00002.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read .*00002\.png"):
        load_static_sets(tmp_path / "sets", on_error="raise", **options)
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ValueError, match='must be "skip" or "raise", got \'ignore\''):
        load_static_sets(tmp_path / "sets", on_error="ignore", **options)


def test_a_set_without_any_readable_frame_is_an_error(tmp_path, options):
    folder = write_static_set(tmp_path / "sets" / "some", count=1)
    (folder / "images" / "00000.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no frame could be read; .*00000\.png"):
        load_static_sets(tmp_path / "sets", **options)


def test_missing_masks_are_reported_by_name_or_refused(tmp_path, options, warnings_of_package):
    folder = write_static_set(tmp_path / "sets" / "some")
    (folder / "masks" / "00002.png").unlink()
    root = write_davis(tmp_path / "davis", names=("ant",))
    (root / "Annotations" / "480p" / "ant" / "00004.png").unlink()
    (statics,) = load_static_sets(tmp_path / "sets", **options)
    video = load_davis(root, **options)
    assert len(statics) == 2
    assert video.frame_names == ["00000", "00001", "00002", "00003", "00005"]
    assert "00002.png" in warnings_of_package.text
    assert "00004.jpg" in warnings_of_package.text
    with pytest.raises(ValueError, match=r"have no mask: 00002\.png"):
        load_static_sets(tmp_path / "sets", on_error="raise", **options)
    with pytest.raises(ValueError, match=r"have no mask: 00004\.jpg"):
        load_davis(root, on_error="raise", **options)


def test_masks_without_an_image_are_reported_by_name_or_refused(tmp_path, options, warnings_of_package):
    root = write_davis(tmp_path / "davis", names=("ant",), frames=4)
    (root / "JPEGImages" / "480p" / "ant" / "00003.jpg").unlink()
    assert len(load_davis(root, **options)) == 3
    assert "masks have no image: 00003.png" in warnings_of_package.text
    with pytest.raises(ValueError, match=r"1 masks have no image: 00003\.png"):
        list_davis(root, ["ant"], on_error="raise")


def test_masks_without_an_image_of_a_set_are_reported_by_name_or_refused(tmp_path, options, warnings_of_package):
    folder = write_static_set(tmp_path / "sets" / "some")
    for index in (1, 2):
        (folder / "images" / f"0000{index}.png").rename(folder / "images" / f"0000{index}.tif")
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert store.frame_names == ["00000"]
    assert "2 masks have no image (.jpg, .jpeg, .png, .webp, .bmp): 00001.png, 00002.png" in warnings_of_package.text
    with pytest.raises(ValueError, match=r"2 masks have no image .*: 00001\.png, 00002\.png"):
        list_static_set(folder, on_error="raise")


def test_hidden_folders_of_a_set_are_left_out(tmp_path, options):
    folder = write_static_set(tmp_path / "sets" / "some")
    for part in ("images", "masks"):
        hidden = folder / part / ".thumbnails"
        hidden.mkdir()
        shutil.copy(folder / part / "00000.png", hidden / "00007.png")
    (store,) = load_static_sets(tmp_path / "sets", on_error="raise", **options)
    assert store.frame_names == ["00000", "00001", "00002"]


def test_masks_of_another_shape_are_reported_or_refused(tmp_path, options, warnings_of_package):
    folder = write_static_set(tmp_path / "sets" / "some")
    path = folder / "masks" / "00001.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert store.frame_names == ["00000", "00002"]
    assert "the image is 120x96 and the mask 96x120" in warnings_of_package.text
    with pytest.raises(ValueError, match=r"00001\.png: the image is 120x96 .* EXIF orientation"):
        load_static_sets(tmp_path / "sets", on_error="raise", **options)
    Image.new("L", (61, 48), 1).save(path)  # rounded by whoever made them smaller
    assert len(load_static_sets(tmp_path / "sets", on_error="raise", **options)[0]) == 3


def test_a_passing_error_stops_the_build_and_is_not_kept(tmp_path, options, monkeypatch):
    root = write_davis(tmp_path / "davis", names=("ant",), frames=3)
    genuine, failed = FrameEntry.read_image, []

    def fails_once(self):
        if self.name == "00001" and not failed:
            failed.append(self.name)
            raise OSError(errno.EIO, "Input/output error")
        return genuine(self)

    monkeypatch.setattr(FrameEntry, "read_image", fails_once)
    with pytest.raises(OSError, match=r"Reading .*00001\.jpg .*Input/output error.*nothing was kept: try again"):
        load_davis(root, **options)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load_davis(root, on_error="raise", **options)) == 3


def test_numbered_errors_of_broken_files_do_not_stop_the_build(tmp_path, options, monkeypatch):
    root = write_davis(tmp_path / "davis", names=("ant",), frames=2)
    genuine = FrameEntry.read_image

    def seeks_before_the_start(self):
        if self.name == "00001":
            with open(self.image, "rb") as file:
                file.seek(-1)
        return genuine(self)

    monkeypatch.setattr(FrameEntry, "read_image", seeks_before_the_start)
    assert load_davis(root, **options).frame_names == ["00000"]


# ---- cache ----------------------------------------------------------------------------------------------------------


def test_the_cache_is_used_again_until_a_file_changes(tmp_path, options, monkeypatch):
    folder = write_static_set(tmp_path / "sets" / "some")
    (first,) = load_static_sets(tmp_path / "sets", **options)
    with monkeypatch.context() as patch:
        patch.setattr("hf_deformvos.data.store._read_entry", lambda *_: pytest.fail("decoded again"))
        (again,) = load_static_sets(tmp_path / "sets", **options)
    assert again.folder == first.folder
    assert np.array_equal(again.image(2), first.image(2))
    mask = folder / "masks" / "00000.png"
    Image.fromarray(np.full((96, 120), 5, np.uint8)).save(mask)
    os.utime(mask, ns=(1, 1))
    (changed,) = load_static_sets(tmp_path / "sets", **options)
    assert changed.folder != first.folder
    assert [item.object_id for item in changed.objects[0]] == [5]
    (smaller,) = load_static_sets(tmp_path / "sets", short_side=48, **options)
    assert smaller.sizes[0] == (48, 60)


def test_a_cache_folder_without_its_description_is_rebuilt(tmp_path, options):
    write_static_set(tmp_path / "sets" / "some")
    (first,) = load_static_sets(tmp_path / "sets", **options)
    (first.folder / "meta.json").unlink()
    (again,) = load_static_sets(tmp_path / "sets", **options)
    assert len(again) == 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]


def test_a_shared_cache_is_open_to_whom_the_umask_lets_in(tmp_path, options):
    entries = list_davis(write_davis(tmp_path / "davis", names=("ant",), frames=1), ["ant"])
    before = os.umask(0o027)
    try:
        store = FrameStore.build("ant", entries, 96, False, **options)
    finally:
        os.umask(before)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o750


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFORMVOS_CACHE", str(tmp_path / "elsewhere"))
    write_static_set(tmp_path / "sets" / "some")
    (store,) = load_static_sets(tmp_path / "sets", show_progress_bar=False)
    assert store.folder.parent == tmp_path / "elsewhere"


def test_masks_of_another_size_are_brought_to_the_image(tmp_path, options):
    folder = write_static_set(tmp_path / "sets" / "some", count=1)
    _, ids = draw_scene(48, 60, {1: (4, 10, 24, 35)})
    Image.fromarray(ids).save(folder / "masks" / "00000.png")
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert store.mask(0).shape == (96, 120)
    assert store.objects[0][0].box == (8, 20, 48, 70)


def test_pictures_of_16_bits_are_scaled_as_the_video_reader_does(tmp_path, options):
    folder = write_static_set(tmp_path / "sets" / "deep", count=1)
    ramp = np.linspace(0, 65535, 96 * 120).reshape(96, 120).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "images" / "00000.png")
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert np.array_equal(store.image(0), read_image(folder / "images" / "00000.png"))
    assert abs(store.image(0).mean() - 127.5) < 1


# ---- samplers -------------------------------------------------------------------------------------------------------


def stores(tmp_path):
    shared = {"cache_dir": tmp_path / "cache", "show_progress_bar": False}
    if not (tmp_path / "davis").exists():
        write_davis(tmp_path / "davis", frames=12)
        write_static_set(tmp_path / "sets" / "some", values=(1, 2))
    return [load_davis(tmp_path / "davis", **shared)], load_static_sets(tmp_path / "sets", **shared)


def digest(raw) -> str:
    import hashlib

    return hashlib.sha256(raw.frames.numpy().tobytes() + raw.masks.numpy().tobytes()).hexdigest()


def test_a_batch_depends_on_seed_and_index_alone(tmp_path):
    videos, statics = stores(tmp_path)
    sampler = ClipSampler(videos, statics, seed=3)
    later = [digest(sampler(index, SPEC)) for index in (5, 0)]
    other = ClipSampler(videos, statics, seed=3)
    assert [digest(other(index, SPEC)) for index in (0, 5)] == later[::-1]
    assert later[0] != later[1]
    assert digest(ClipSampler(videos, statics, seed=4)(5, SPEC)) != later[0]
    code = (
        "import sys; from pathlib import Path; import test_data as t;"
        "from hf_deformvos.data import ClipSampler;"
        "print(t.digest(ClipSampler(*t.stores(Path(sys.argv[1])), seed=3)(5, t.SPEC)))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", code, str(tmp_path)]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == later[0]


def test_batches_have_the_promised_form(tmp_path):
    videos, statics = stores(tmp_path)
    raw = ClipSampler(videos, statics)(0, SPEC)
    assert raw.frames.shape == (4, 3, *SPEC.canvas, 3)
    assert raw.frames.dtype == raw.masks.dtype == torch.uint8
    assert raw.size == (97, 161)
    for index in range(12):
        raw = ClipSampler(videos, statics)(index, SPEC)
        for clip, masks, static in zip(raw.frames, raw.masks, raw.is_static, strict=True):
            assert (clip == clip[:1]).all() == static, "only still images are repeated"
            assert ((masks[0] > 0) & (masks[0] < 255)).sum() > 200, "the first frame shows an object"
            assert set(masks.unique().tolist()) <= {0, 1, 2, 255}


@pytest.mark.parametrize(("share", "expected"), [(0.0, {True}), (1.0, {False})])
def test_the_share_of_video_is_kept(tmp_path, share, expected):
    sampler = ClipSampler(*stores(tmp_path))
    spec = ClipSpec(size=(97, 161), frames=2, batch=4, video_share=share)
    assert {bool(flag) for index in range(3) for flag in sampler(index, spec).is_static} == expected


def test_stills_of_a_kin_batch_come_from_one_set(tmp_path):
    shared = {"cache_dir": tmp_path / "cache", "show_progress_bar": False}
    for name, values in (("one", (1,)), ("two", (1, 2))):
        write_static_set(tmp_path / "sets" / name, values=values)
    sampler = ClipSampler(statics=load_static_sets(tmp_path / "sets", **shared))
    sets = set()
    for index in range(12):
        spec = ClipSpec((33, 33), 2, 4, kin=1.0)
        drawn = {id(store) for store, _ in sampler._batch_statics(index, spec)}
        assert len(drawn) == 1
        sets |= drawn
        mixed = ClipSpec((33, 33), 2, 4)
        assert len({id(store) for store, _ in sampler._batch_statics(index, mixed)}) == 2
        sampler(index, spec)
    assert len(sets) == 2


@pytest.mark.parametrize("kin", [0.0, 0.4])
def test_every_place_of_a_batch_is_as_likely_a_still(tmp_path, monkeypatch, kin):
    sampler = ClipSampler(*stores(tmp_path))
    monkeypatch.setattr(sampler, "_draw_static", lambda *arguments: None)
    monkeypatch.setattr(sampler, "_draw_video", lambda *arguments: None)
    spec = ClipSpec((33, 33), 2, 4, video_share=0.5, kin=kin)
    drawn = np.stack([sampler(index, spec).is_static for index in range(400)])
    is_kin = np.array([sampler._batch_statics(index, spec) is not sampler._statics for index in range(400)])
    assert is_kin.mean() == pytest.approx(kin, abs=0.1)
    for batches in (drawn[is_kin], drawn[~is_kin]):
        if len(batches):
            # 0.5, give or take four standard deviations of the mean of some 160 draws.
            assert np.abs(batches.mean(0) - 0.5).max() < 0.16


def test_frames_of_a_sequence_may_differ_in_size(tmp_path):
    root = write_davis(tmp_path / "davis", names=("ant",), frames=6)
    for number in range(3, 6):
        for path in root.rglob(f"{number:05d}.*"):
            with Image.open(path) as image:
                image.resize((image.width // 2, image.height // 2), Image.NEAREST).save(path)
    sampler = ClipSampler([load_davis(root, cache_dir=tmp_path / "c", show_progress_bar=False, exclude=())])
    for index in range(40):
        raw = sampler(index, ClipSpec((97, 161), 4, 2, max_gap=2))
        assert (raw.masks == 1).flatten(2).any(-1).float().mean() > 0.7, "the object stays in the window"


def test_a_cache_that_was_copied_in_part_is_named(tmp_path):
    videos, _ = stores(tmp_path)
    path = videos[0].folder / "images.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"images\.bin must have \d+ bytes, got 100: .* Remove"):
        FrameStore(videos[0].folder)


def test_only_one_kind_of_source_is_enough(tmp_path):
    videos, statics = stores(tmp_path)
    assert not ClipSampler(videos)(0, ClipSpec((97, 161), 2, 4, video_share=0.0)).is_static.any()
    assert ClipSampler(statics=statics)(0, ClipSpec((97, 161), 2, 4, video_share=1.0)).is_static.all()
    with pytest.raises(ValueError, match="Nothing to sample"):
        ClipSampler()


def test_what_is_never_drawn_is_named(tmp_path, options, warnings_of_package):
    davis = write_davis(tmp_path / "davis", names=("ant", "bee", "cat"), frames=3)
    for frame in ("00001", "00002"):
        (davis / "JPEGImages" / "480p" / "bee" / f"{frame}.jpg").unlink()
        (davis / "Annotations" / "480p" / "bee" / f"{frame}.png").unlink()
    for path in (davis / "Annotations" / "480p" / "cat").iterdir():
        Image.new("L", (160, 96), 255).save(path)
    folder = write_static_set(tmp_path / "sets" / "some")
    Image.new("L", (120, 96)).save(folder / "masks" / "00001.png")
    videos, statics = [load_davis(davis, merge=False, **options)], load_static_sets(tmp_path / "sets", **options)
    assert not warnings_of_package.text
    ClipSampler(videos, statics)
    no_object = r"show no object \(255 is void unless masks are merged\)"
    for message in (
        "davis: 1 of 3 sequences have one frame alone: bee",
        f"davis: 1 of 3 sequences {no_object}: cat",
        f"some: 1 of 3 images {no_object}: 00001",
    ):
        assert re.search(message, warnings_of_package.text), message


class _CountingStore:
    """A store of one sequence whose frames hold their own number."""

    name = "numbers"

    def __init__(self, frames: int):
        self.sequences = {"one": range(frames)}
        _, self.ids = draw_scene(96, 160, {1: (20, 20, 100, 80)})
        self.objects = [find_objects(self.ids)] * frames
        self.sizes = [(96, 160)] * frames

    def image(self, index):
        return np.full((96, 160, 3), index, np.uint8)

    def mask(self, index):
        return self.ids


def test_a_folder_named_twice_is_twice_as_likely():
    dark, light = _CountingStore(8), _CountingStore(8)
    light.image = lambda index: np.full((96, 160, 3), 200, np.uint8)
    sampler = ClipSampler([dark, light, light])
    batches = [sampler(index, ClipSpec((97, 161), 2, 8, 1.0, 2)) for index in range(30)]
    share = np.mean([(raw.frames[:, 0, 50, 80, 0] == 200).numpy() for raw in batches])
    assert abs(share - 2 / 3) < 0.1


@pytest.mark.parametrize(("frames", "count", "max_gap"), [(40, 4, 5), (40, 3, 1), (6, 4, 10), (3, 5, 4)])
def test_gaps_are_bounded_and_time_runs_one_way(frames, count, max_gap):
    sampler = ClipSampler([_CountingStore(frames)])
    seen = set()
    for index in range(20):
        raw = sampler(index, ClipSpec((97, 161), count, 2, 1.0, max_gap))
        for numbers in raw.frames[:, :, 50, 80, 0].int():
            gaps = numbers.diff()
            assert gaps.abs().max() <= max_gap
            assert (gaps >= 0).all() or (gaps <= 0).all()
            if frames > count:
                assert (gaps != 0).all()
            seen.update(gaps.tolist())
    assert min(seen) < 0 < max(seen), "forwards and backwards"
    if frames == 40:
        assert max(seen) == max_gap


def test_windows_show_the_object_and_cut_frames_register():
    rng = np.random.default_rng(0)
    image, ids = draw_scene(120, 200, {1: (60, 30, 120, 90)})
    out, mask = np.empty((110, 180, 3), np.uint8), np.empty((110, 180), np.uint8)
    for _ in range(30):
        window = choose_window(rng, (120, 200), (60, 30, 120, 90), (110, 180), may_exceed=1.6)
        cut_window(image, ids, window, out, mask)
        seen = (out[..., 0] > 180) & (out[..., 1] < 80)
        inside = mask != 255
        assert (seen == (mask == 1))[inside].mean() > 0.97
        shown = (mask == 1).sum() * (window[2] - window[0]) * (window[3] - window[1]) / mask.size
        assert shown > 0.5 * 60 * 60
    # A window that reaches beyond the frame: void there.
    cut_window(image, ids, (-40.0, -24.0, 240.0, 144.0), out, mask)
    outside = np.ones_like(mask, bool)
    outside[16:94, 26:154] = False
    assert (mask[outside] == 255).all()
    assert (mask == 255).sum() == outside.sum()


# ---- prefetcher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_prefetcher_keeps_the_order(workers):
    def make(index):
        time.sleep(0.002 * (index % 3))
        return index

    prefetcher = Prefetcher(make, first=4, stride=2, workers=workers)
    assert [prefetcher.get() for _ in range(8)] == list(range(4, 20, 2))
    prefetcher.close()
    assert not any(thread.name.startswith("clips") for thread in threading.enumerate())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_prefetcher_raises_where_the_item_was_due(workers):
    def make(index):
        if index == 1:
            raise OSError("item 1 is broken")
        return index

    prefetcher = Prefetcher(make, workers=workers)
    assert prefetcher.get() == 0
    with pytest.raises(OSError, match="item 1 is broken"):
        prefetcher.get()
    assert prefetcher.get() == 2
    prefetcher.close()


def test_the_prefetcher_works_ahead_but_not_without_end():
    made = []
    prefetcher = Prefetcher(lambda index: made.append(index) or index, workers=1)
    prefetcher.get()
    time.sleep(0.05)
    assert 1 <= len(made) <= 2
    prefetcher.close()
