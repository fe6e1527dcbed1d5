"""Readers of published data sets: DAVIS 2016 and 2017, YouTube-VOS, image sets, and Hugging Face `datasets`."""

import builtins
import hashlib
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from synthetic import draw_scene, save_palette, write_davis, write_gray_png, write_static_set

from hf_deformvos.data import (
    HELD_OUT_SEQUENCES,
    ClipSampler,
    ClipSpec,
    FrameStore,
    list_youtube_vos,
    load_davis,
    load_hub_dataset,
    load_static_sets,
    load_youtube_vos,
)
from hf_deformvos.data.store import _fingerprint, uses_255


def ids_of(store) -> list[int]:
    return sorted({item.object_id for frame in store.objects for item in frame})


def write_list(root, folder, split, lines):
    (root / "ImageSets" / folder).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


# ---- DAVIS ----------------------------------------------------------------------------------------------------------


def test_davis_2017_as_published(tmp_path, options):
    """The trainval archive: lists of both years, and validation sequences beside those for training."""
    root = write_davis(tmp_path / "DAVIS", names=("ant", "bee", "swing", "wasp"), frames=3)
    write_list(root, "2016", "train", ["ant"])
    write_list(root, "2017", "train", ["bee", "ant", "swing"])
    write_list(root, "2017", "val", ["wasp"])
    mask = root / "Annotations" / "480p" / "bee" / "00001.png"
    ids = np.asarray(Image.open(mask)).copy()
    ids[:10] = 255
    full = Image.fromarray(ids).convert("P")
    full.putdata(ids.ravel().tolist())
    full.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    full.save(mask)
    store = load_davis(root, **options)
    assert list(store.sequences) == ["ant", "bee"], "sorted, no validation sequence, none that is held out"
    assert "swing" in HELD_OUT_SEQUENCES
    assert ids_of(store) == [1, 2]
    assert (store.mask(store.sequences["bee"][1])[:10] == 255).all(), "255 is void"
    assert list(load_davis(root, split="val", **options).sequences) == ["wasp"]
    assert list(load_davis(root, year=2016, **options).sequences) == ["ant"]
    assert ids_of(load_davis(root, year=2016, merge=True, **options)) == [1]


def test_davis_2017_tasks_and_resolutions(tmp_path, options):
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=2)
    large = write_davis(tmp_path / "large", names=("ant",), frames=2, size=(192, 320))
    for part in ("JPEGImages", "Annotations"):
        (large / part / "480p").rename(root / part / "Full-Resolution")
    other = write_davis(tmp_path / "other", names=("ant",), frames=2, value=3)
    (other / "Annotations").rename(root / "Annotations_unsupervised")
    assert load_davis(root, **options).sizes[0] == (96, 160)
    assert load_davis(root, resolution="Full-Resolution", **options).sizes[0] == (192, 320)
    assert ids_of(load_davis(root, **options)) == [1, 2]
    assert ids_of(load_davis(root, task="unsupervised", **options)) == [3]
    with pytest.raises(ValueError, match="`task` must be one of semi-supervised, unsupervised, got 'interactive'"):
        load_davis(root, task="interactive", **options)
    with pytest.raises(ValueError, match=r"`resolution` must be a folder of .*Annotations_unsupervised, got '1080p'"):
        (root / "JPEGImages" / "1080p" / "ant").mkdir(parents=True)
        load_davis(root, task="unsupervised", resolution="1080p", **options)


def test_the_unsupervised_archive_alone_is_enough(tmp_path, options):
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=2)
    (root / "Annotations").rename(root / "Annotations_unsupervised")
    assert ids_of(load_davis(root, **options)) == [1, 2]


def test_davis_2016_as_published(tmp_path, options):
    """The first release: masks of 0 and 255, lists by resolution that name files."""
    root = write_davis(tmp_path / "DAVIS", names=("ant", "bee"), frames=2, value=255)
    pair = "/JPEGImages/480p/bee/{0}.jpg /Annotations/480p/bee/{0}.png"
    write_list(root, "480p", "train", [pair.format("00000"), pair.format("00001")])
    store = load_davis(root, **options)
    assert list(store.sequences) == ["bee"]
    assert ids_of(store) == [1]


def test_masks_of_0_and_255_without_any_list_are_one_object(tmp_path, options):
    assert ids_of(load_davis(write_davis(tmp_path / "a", frames=1, value=255), **options)) == [1]
    assert ids_of(load_davis(write_davis(tmp_path / "b", frames=1, value=7), **options)) == [7]
    assert uses_255([np.array([0, 255]), np.array([0])])
    assert not uses_255([np.array([0, 255]), np.array([0, 1])])
    assert not uses_255([np.array([0, 0])])


def test_one_object_that_appears_late_is_found(tmp_path, options):
    root = write_davis(tmp_path / "davis", frames=3, value=255)
    for path in (root / "Annotations" / "480p").rglob("00000.png"):
        Image.new("L", (160, 96)).save(path)
    assert ids_of(load_davis(root, **options)) == [1]


# ---- YouTube-VOS ----------------------------------------------------------------------------------------------------


def write_youtube_vos(folder, meta=True):
    """Two videos of two sizes with every fifth frame, as distributed; object 2 of the second appears late."""
    videos = {}
    for name, size, late in (("003234408d", (96, 160), 0), ("0043f083b5", (120, 100), 2)):
        for part in ("JPEGImages", "Annotations"):
            (folder / part / name).mkdir(parents=True)
        frames = [f"{5 * t:05d}" for t in range(4)]
        for t, frame in enumerate(frames):
            boxes = {1: (5 + 3 * t, 10, 45 + 3 * t, 40)}
            if t >= late:
                boxes[2] = (50, 50, 90, 80)
            image, ids = draw_scene(*size, boxes)
            Image.fromarray(image).save(folder / "JPEGImages" / name / f"{frame}.jpg")
            save_palette(folder / "Annotations" / name / f"{frame}.png", ids)
        videos[name] = {
            "objects": {
                "1": {"category": "ape", "frames": frames},
                "2": {"category": "owl", "frames": frames[late:]},
            }
        }
    if meta:
        (folder / "meta.json").write_text(json.dumps({"videos": videos}))
    return folder


@pytest.mark.parametrize("meta", [True, False])
def test_youtube_vos_from_above_or_within(tmp_path, options, meta):
    folder = write_youtube_vos(tmp_path / "YouTube" / "train", meta)
    store = load_youtube_vos(tmp_path / "YouTube", **options)
    assert store.name == "YouTube-train"
    assert list(store.sequences) == ["003234408d", "0043f083b5"]
    assert store.frame_names[4:] == ["00000", "00005", "00010", "00015"]
    assert store.sizes[0] == (96, 160)
    assert store.sizes[4] == (120, 100)
    shown = [[item.object_id for item in store.objects[index]] for index in store.sequences["0043f083b5"]]
    assert shown == [[1], [1], [1, 2], [1, 2]], "an object that appears late"
    assert load_youtube_vos(folder, **options).folder == store.folder
    raw = ClipSampler([store])(0, ClipSpec((97, 161), 3, 2, video_share=1.0))
    assert raw.frames.shape[0] == 2


def test_youtube_vos_videos_are_chosen_by_name(tmp_path, options):
    folder = write_youtube_vos(tmp_path / "train")
    assert list(load_youtube_vos(folder, exclude=["003234408d"], **options).sequences) == ["0043f083b5"]
    assert list(load_youtube_vos(folder, sequences=["0043f083b5"] * 2, **options).sequences) == ["0043f083b5"]
    with pytest.raises(ValueError, match=r"`sequences` must be among the 2 videos .*, got nosuch"):
        load_youtube_vos(folder, sequences=["nosuch"], **options)
    with pytest.raises(ValueError, match="needs valid/JPEGImages and valid/Annotations"):
        load_youtube_vos(tmp_path, split="valid", **options)
    folder.rename(tmp_path / "valid")
    with pytest.raises(ValueError, match="YouTube-VOS's 'valid', and no 'train'"):
        load_youtube_vos(tmp_path / "valid", **options)


def test_youtube_vos_names_what_is_missing(tmp_path, options, warnings_of_package):
    folder = write_youtube_vos(tmp_path / "train")
    first, second = "003234408d", "0043f083b5"
    (folder / "Annotations" / first / "00005.png").unlink()
    (folder / "JPEGImages" / first / "00015.jpg").unlink()
    (folder / "JPEGImages" / second / "00000.jpg").unlink()
    (folder / "Annotations" / second / "00000.png").unlink()
    store = load_youtube_vos(folder, **options)
    assert store.frame_names == ["00000", "00010", "00005", "00010", "00015"]
    for problem in (f"{first}/00005 (no mask)", f"{first}/00015 (no image)", f"{second}/00000 (no image and no mask)"):
        assert problem in warnings_of_package.text
    with pytest.raises(ValueError, match=r"3 frames are incomplete: 003234408d/00005 \(no mask\)"):
        list_youtube_vos(folder, on_error="raise")
    # Without meta.json nobody can know of frames that lack both; a video in meta.json may lack its folders.
    meta = json.loads((folder / "meta.json").read_text())
    meta["videos"]["00ffff"] = meta["videos"][second]
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="00ffff/00000"):
        list_youtube_vos(folder, sequences=["00ffff"], on_error="raise")


def test_youtube_vos_broken_files(tmp_path, options, warnings_of_package):
    folder = write_youtube_vos(tmp_path / "train")
    (folder / "Annotations" / "0043f083b5" / "00010.png").write_bytes(b"no image")
    assert len(load_youtube_vos(folder, **options)) == 7
    assert os.path.join("0043f083b5", "00010.png") in warnings_of_package.text
    with pytest.raises(ValueError, match=r"cannot read .*00010\.png"):
        load_youtube_vos(folder, on_error="raise", **options)
    (folder / "meta.json").write_text('{"videos": []}')
    with pytest.raises(ValueError, match=r"meta\.json must be JSON of the form"):
        load_youtube_vos(folder, **options)


# ---- image sets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        ("images", "ground_truth_mask"),
        ("DUTS-TR-Image", "DUTS-TR-Mask"),
        ("JPEGImages", "SegmentationObject"),
        ("images/train2017", "annotations/train2017"),
    ],
)
def test_image_sets_in_their_published_folders(tmp_path, options, images, masks):
    folder = write_static_set(tmp_path / "sets" / "some", values=(4, 9), count=2)
    for old, new in (("images", images), ("masks", masks)):
        files = list((folder / old).iterdir())
        (folder / new).mkdir(parents=True, exist_ok=True)
        for path in files:
            path.rename(folder / new / path.name)
    (folder / "masks").rmdir()
    for root in (folder, tmp_path / "sets"):
        (store,) = load_static_sets(root, **options)
        assert ids_of(store) == [4, 9]
        assert store.frame_names == ["00000", "00001"]
    assert next(iter(store.sequences)) == ("train2017/00000" if "/" in images else "00000")


def test_images_with_masks_beside_them_or_named_after_them(tmp_path, options):
    msra = write_static_set(tmp_path / "sets" / "msra", values=(255,), count=2)
    (msra / "Imgs").mkdir()
    for path in (msra / "images").iterdir():
        Image.open(path).save(msra / "Imgs" / f"{path.stem}.jpg")
        (msra / "masks" / path.name).rename(msra / "Imgs" / path.name)
        path.unlink()
    (msra / "images").rmdir()
    (msra / "masks").rmdir()
    penn = write_static_set(tmp_path / "sets" / "penn", values=(1, 2), count=2)
    (penn / "images").rename(penn / "PNGImages")
    (penn / "masks").rename(penn / "PedMasks")
    for path in list((penn / "PedMasks").iterdir()):
        path.rename(path.with_stem(f"{path.stem}_mask"))
    first, second = load_static_sets(tmp_path / "sets", **options)
    assert (first.name, ids_of(first), len(first)) == ("msra", [1], 2)
    assert (second.name, ids_of(second), len(second)) == ("penn", [1, 2], 2)


def test_gray_masks_are_cut_at_half(tmp_path, options):
    """DUTS: 255 is the object and the pixels of its rim are gray."""
    folder = write_static_set(tmp_path / "sets" / "soft", count=1)
    ramp = np.clip(np.arange(120) * 3 - 30, 0, 255).astype(np.uint8)
    Image.fromarray(np.tile(ramp, (96, 1))).save(folder / "masks" / "00000.png")
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert ids_of(store) == [1]
    assert store.objects[0][0].box == (int(np.argmax(ramp > 127)), 0, 120, 96)


def disc(radius: int, shape=(96, 120), scale=1) -> np.ndarray:
    """A disc of 255, drawn `scale` times as large."""
    y, x = np.mgrid[: shape[0] * scale, : shape[1] * scale]
    inside = (y - 50.3 * scale) ** 2 + (x - 60.2 * scale) ** 2 < (radius * scale) ** 2
    return (inside * 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["anti-aliased", "jpeg"])
def test_few_grays_around_255_are_its_edges(tmp_path, options, kind):
    folder = write_static_set(tmp_path / "sets" / "soft", count=1)
    (mask,) = (folder / "masks").iterdir()
    if kind == "jpeg":
        mask.unlink()
        mask = mask.with_suffix(".jpg")
        Image.fromarray(disc(30)).save(mask, quality=90)
    else:
        Image.fromarray(disc(30, scale=4)).resize((120, 96), Image.BOX).save(mask)
    assert 10 < len(np.unique(Image.open(mask))) < 64
    (store,) = load_static_sets(tmp_path / "sets", **options)
    assert [item.object_id for item in store.objects[0]] == [1]
    assert ((store.mask(0) == 1) == (disc(30) > 0)).mean() > 0.99
    root = write_davis(tmp_path / "davis", names=("ant",), frames=1, size=(96, 120))
    Image.open(mask).save(root / "Annotations" / "480p" / "ant" / "00000.png")
    assert ids_of(load_davis(root, **options)) == [1]


@pytest.mark.parametrize("ids", [[1, 2], [7, 15], [3]], ids=["instances", "classes", "one of them"])
def test_void_beside_ids_stays_void(ids):
    """Rims of Pascal VOC, and void that is larger than what is labelled."""
    for radius in (12, 90):
        mask = disc(radius, (192, 240))
        for number, value in enumerate(ids):
            mask[30:60, 40 + 14 * number : 54 + 14 * number] = value
        assert not uses_255([mask])


def test_fingerprints_of_files_stay_what_they_were(tmp_path):
    """Decoded sets are large: what is in users' caches must be found by later versions."""
    folder = write_static_set(tmp_path / "some", count=1)
    entry = SimpleNamespace(sequence="a", image=folder / "images" / "00000.png", mask=folder / "masks" / "00000.png")
    digest = hashlib.sha256(b"[2, 288, false, false]")
    for path in (entry.image, entry.mask):
        status = path.stat()
        digest.update(f"a|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    assert _fingerprint([entry], 288, False, None) == digest.hexdigest()[:16]


# ---- datasets -------------------------------------------------------------------------------------------------------

datasets = pytest.importorskip("datasets")
fsspec = pytest.importorskip("fsspec")

from fsspec.spec import AbstractBufferedFile, AbstractFileSystem  # noqa: E402


def png(array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def make_rows(names=("ant", "bee", "cat"), frames=4):
    rows = []
    for number, name in enumerate(names):
        for t in range(frames):
            image, ids = draw_scene(96, 160, {1: (10 + 4 * t, 15, 50 + 4 * t, 55), 2: (100, 50, 140, 85)}, number)
            rows.append(
                {
                    "sequence": name,
                    "frame_index": 2 * t,
                    "frame": {"bytes": png(image), "path": None},
                    "mask": {"bytes": png(ids), "path": None},
                    "object_ids": [1, 2],
                }
            )
    return rows


FEATURES = datasets.Features(
    {
        "sequence": datasets.Value("string"),
        "frame_index": datasets.Value("int32"),
        "frame": datasets.Image(),
        "mask": datasets.Image(),
        "object_ids": datasets.List(datasets.Value("int32")),
    }
)


def write_parquet(path, rows, features=FEATURES):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path), batch_size=2)
    return path


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """The cache folder of `datasets`, which reading local files must leave empty."""
    folder = tmp_path / "datasets-cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def is_empty(folder) -> bool:
    return not [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize("form", ["file", "folder", "saved", "saved splits"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_data_sets(tmp_path, options, no_cache, form, streaming):
    rows = make_rows()
    if form == "file":
        path = write_parquet(tmp_path / "vos.parquet", rows)
    elif form == "folder":
        path = tmp_path / "vos"
        write_parquet(path / "data" / "train-00000-of-00002.parquet", rows[:6])
        write_parquet(path / "data" / "train-00001-of-00002.parquet", rows[6:])
        write_parquet(path / "data" / "validation-00000-of-00001.parquet", make_rows(["dog"]))
    else:
        path = tmp_path / "vos"
        saved = datasets.Dataset.from_list(rows, features=FEATURES)
        (datasets.DatasetDict({"train": saved}) if form == "saved splits" else saved).save_to_disk(str(path))
    store = load_hub_dataset(path, streaming=streaming, **options)
    assert store.name == "vos"
    assert list(store.sequences) == ["ant", "bee", "cat"]
    assert store.sequences["bee"] == range(4, 8)
    assert store.frame_names[:4] == ["00000", "00002", "00004", "00006"]
    assert ids_of(store) == [1, 2]
    image, ids = draw_scene(96, 160, {1: (14, 15, 54, 55), 2: (100, 50, 140, 85)}, 1)
    assert np.array_equal(store.image(5), image)
    assert np.array_equal(store.mask(5), ids)
    assert is_empty(no_cache)
    raw = ClipSampler([store])(0, ClipSpec((97, 161), 3, 2, video_share=1.0))
    assert raw.frames.shape[0] == 2


def test_splits_of_local_data_sets(tmp_path, options, no_cache):
    write_parquet(tmp_path / "vos" / "train.parquet", make_rows())
    write_parquet(tmp_path / "vos" / "validation.parquet", make_rows(["dog"]))
    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list(make_rows(), features=FEATURES)})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert list(load_hub_dataset(tmp_path / "vos", split="validation", **options).sequences) == ["dog"]
    with pytest.raises(ValueError, match=r"`split` must be one of train, validation in .*vos, got 'test'"):
        load_hub_dataset(tmp_path / "vos", split="test", **options)
    with pytest.raises(ValueError, match=r"`split` must be one of test in .*saved, got 'train'"):
        load_hub_dataset(tmp_path / "saved", **options)


def test_only_the_wanted_sequences_are_read(tmp_path, options, no_cache):
    folder = tmp_path / "vos"
    write_parquet(folder / "train-00000-of-00002.parquet", make_rows(["ant", "bee", "cat"]))
    # Whoever opens this file fails.
    (folder / "train-00001-of-00002.parquet").write_bytes(b"no parquet")
    store = load_hub_dataset(folder, streaming=True, max_sequences=1, exclude=["ant"], **options)
    assert list(store.sequences) == ["bee"]
    assert store.folder != load_hub_dataset(folder, streaming=True, max_sequences=2, **options).folder
    with pytest.raises(OSError, match="reading stopped at row 12: ArrowInvalid"):
        load_hub_dataset(folder, streaming=True, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 2, "a broken stream leaves nothing behind"
    with pytest.raises(ValueError, match="`max_sequences` must be at least 1, got 0"):
        load_hub_dataset(folder, max_sequences=0, **options)


def test_the_store_is_used_again_until_the_files_change(tmp_path, options, no_cache, monkeypatch):
    path = write_parquet(tmp_path / "vos.parquet", make_rows())
    first = load_hub_dataset(path, **options)
    with monkeypatch.context() as patch:
        patch.setattr("hf_deformvos.data.store._read_entry", lambda *_: pytest.fail("decoded again"))
        assert load_hub_dataset(path, **options).folder == first.folder
    write_parquet(path, make_rows(["dog"]))
    assert list(load_hub_dataset(path, **options).sequences) == ["dog"]


def test_frames_are_consumed_as_they_are_decoded(tmp_path):
    """A store built from a stream holds a few frames in memory, not the set."""
    drawn = [0]
    most_ahead = [0]
    written = [0]

    class Frame:
        sequence, name, label = "one", "0", "one"

        def read_image(self):
            written[0] += 1
            return Image.new("RGB", (16, 16))

        def read_mask(self, merge):
            return np.ones((16, 16), np.uint8)

    def frames():
        for _ in range(200):
            drawn[0] += 1
            most_ahead[0] = max(most_ahead[0], drawn[0] - written[0])
            yield Frame()

    store = FrameStore.build("one", frames(), 16, False, tmp_path, show_progress_bar=False, fingerprint="a")
    assert len(store) == 200
    assert most_ahead[0] <= 20
    again = FrameStore.build("one", frames(), 16, False, tmp_path, show_progress_bar=False, fingerprint="a")
    assert again.folder == store.folder
    assert drawn[0] == 200
    with pytest.raises(ValueError, match="no frame could be read; there is none with a mask"):
        FrameStore.build("one", iter(()), 16, False, tmp_path, show_progress_bar=False, fingerprint="b")


def test_rows_whose_mask_has_another_shape_or_large_ids_are_named(tmp_path, options, no_cache, warnings_of_package):
    rows = make_rows(["ant"])
    rows[1]["mask"] = {"bytes": png(np.ones((160, 96), np.uint8)), "path": None}
    rows[2]["mask"] = {"bytes": png(np.full((96, 160), 300, np.uint16)), "path": None}
    path = write_parquet(tmp_path / "vos.parquet", rows)
    assert load_hub_dataset(path, **options).frame_names == ["00000", "00006"]
    assert "frame 2: the image is 160x96 and the mask 96x160" in warnings_of_package.text
    assert "frame 4: the mask must hold ids from 0 to 255, got 300" in warnings_of_package.text


def test_broken_rows_are_named_and_skipped_or_refused(tmp_path, options, no_cache, warnings_of_package):
    rows = make_rows()
    rows[1]["frame"] = {"bytes": rows[1]["frame"]["bytes"][:100], "path": None}
    rows[4]["mask"] = None
    rows[5]["frame"] = None
    rows[6]["mask"] = {"bytes": b"no image", "path": None}
    rows[9]["object_ids"] = [2]
    path = write_parquet(tmp_path / "vos.parquet", rows)
    problems = [
        "sequence 'ant', frame 2: ",
        "sequence 'bee', frame 0: no mask",
        "sequence 'bee', frame 2: no image",
        "sequence 'bee', frame 4: cannot identify image",
        "sequence 'cat', frame 2: the mask shows ids [1], `object_ids` lists [2]",
    ]
    for _ in range(2):  # decoded, then from the cache
        warnings_of_package.clear()
        store = load_hub_dataset(path, **options)
        assert len(store) == 7
        assert len(store.skipped) == 5
        for problem in problems:
            assert problem in warnings_of_package.text
    with pytest.raises(ValueError, match="cannot read sequence 'ant', frame 2: "):
        load_hub_dataset(path, on_error="raise", **options)
    assert len(load_hub_dataset(path, merge=True, **options)) == 8, "merged masks are not compared with `object_ids`"


def test_pictures_of_16_bits_are_scaled(tmp_path, options, no_cache):
    rows = make_rows(["ant"])
    deep = np.linspace(0, 65535, 96 * 160).reshape(96, 160).astype(np.uint16)
    rows[0]["frame"] = {"bytes": png(deep), "path": None}
    store = load_hub_dataset(write_parquet(tmp_path / "vos.parquet", rows), **options)
    assert np.array_equal(store.image(0), np.repeat((deep >> 8)[..., None], 3, axis=2))


def test_grays_of_few_bits_are_named(tmp_path, options, no_cache, warnings_of_package):
    rows = [{**row, "object_ids": None} for row in make_rows(["ant"])]
    write_gray_png(tmp_path / "few.png", np.tile(np.arange(4, dtype=np.uint8).repeat(40), (96, 1)), 2)
    rows[1]["mask"] = {"bytes": (tmp_path / "few.png").read_bytes(), "path": None}
    path = write_parquet(tmp_path / "vos.parquet", rows)
    assert len(load_hub_dataset(path, **options)) == 3
    assert "frame 2: the mask must hold ids in eight bits" in warnings_of_package.text
    assert len(load_hub_dataset(path, merge=True, **options)) == 4


def test_masks_of_255_whose_rows_list_nothing_are_named(tmp_path, options, no_cache, warnings_of_package):
    rows = [{**row, "object_ids": None} for row in make_rows(["ant", "bee"])]
    for row in rows[4:]:
        mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        row["mask"] = {"bytes": png((mask > 0) * np.uint8(255)), "path": None}
    ClipSampler([load_hub_dataset(write_parquet(tmp_path / "vos.parquet", rows), **options)])
    assert (
        "vos: 1 of 2 sequences show no object (255 is void unless masks are merged): bee" in warnings_of_package.text
    )


def test_void_is_no_object(tmp_path, options, no_cache):
    rows = make_rows(["ant"])
    for row in rows:
        mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        row["mask"], row["object_ids"] = {"bytes": png((mask == 1) * np.uint8(255)), "path": None}, [255]
    path = write_parquet(tmp_path / "vos.parquet", rows)
    with pytest.raises(ValueError, match=r"row 0 \(sequence 'ant', frame 0\) lists object 255, which is void"):
        load_hub_dataset(path, merge=False, **options)
    assert ids_of(load_hub_dataset(path, **options)) == [1]
    assert ids_of(load_hub_dataset(path, merge=True, **options)) == [1]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 1, 4, 5, 2, 3], r"row 4 \(sequence 'ant', frame 4\) must follow the other rows of its sequence"),
        ([0, 2, 1, 3], r"row 2 \(sequence 'ant', frame 2\) must have a greater frame index .* which has 4"),
        ([0, 1, 1], r"row 2 \(sequence 'ant', frame 2\) must have a greater frame index"),
    ],
)
def test_rows_out_of_order_are_named(tmp_path, options, no_cache, order, message):
    rows = make_rows()
    path = write_parquet(tmp_path / "vos.parquet", [rows[index] for index in order])
    with pytest.raises(ValueError, match=message):
        load_hub_dataset(path, **options)
    assert not list((tmp_path / "cache").iterdir())


def test_other_schemas_are_refused(tmp_path, options, no_cache):
    rows = make_rows(["ant"])
    renamed = datasets.Dataset.from_list(rows, features=FEATURES).rename_column("frame", "image")
    renamed.cast_column("frame_index", datasets.Value("string")).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="columns frame_index, frame are missing or of another type") as error:
        load_hub_dataset(tmp_path / "a.parquet", **options)
    assert "found sequence: Value('string'), frame_index: Value('string'), image: Image(" in str(error.value)
    assert "wanted sequence: string, frame_index: int32, frame: Image, mask: Image" in str(error.value)


def test_parquet_of_other_programs(tmp_path, options, no_cache):
    """No metadata of `datasets`: images are bare bytes, numbers 64 bits wide, and there is a column more."""
    import pyarrow
    import pyarrow.parquet

    rows = make_rows(["ant"])
    plain = [{**row, "frame": row["frame"]["bytes"], "mask": row["mask"]["bytes"], "fps": 6.0} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "plain.parquet")
    assert ids_of(load_hub_dataset(tmp_path / "plain.parquet", **options)) == [1, 2]
    bare = [{**row, "mask": {"bytes": row["mask"]["bytes"]}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bare), tmp_path / "bare.parquet")
    assert ids_of(load_hub_dataset(tmp_path / "bare.parquet", **options)) == [1, 2]


class CountingFiles(AbstractFileSystem):
    """Local files behind a protocol of their own, `count://`, that counts the bytes it hands out."""

    protocol = "count"
    sent = 0

    def info(self, path, **kwargs):
        path = "/" + self._strip_protocol(path).lstrip("/")
        return {"name": path, "size": os.path.getsize(path), "type": "file"}

    def ls(self, path, detail=True, **kwargs):
        return [self.info(path)]

    def _open(self, path, mode="rb", block_size=None, cache_type="readahead", **kwargs):
        return _CountingFile(self, self.info(path)["name"], mode, cache_type=cache_type, size=self.info(path)["size"])


class _CountingFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        with open(self.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        CountingFiles.sent += len(data)
        return data


def test_a_stream_transfers_what_it_needs_even_of_one_file(tmp_path, options, no_cache, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (288, 480, 3), dtype=np.uint8)
    rows = [{**row, "frame": {"bytes": png(noise), "path": None}} for row in make_rows("abcdefghijkl")]
    path = write_parquet(tmp_path / "vos.parquet", rows)
    fsspec.register_implementation("count", CountingFiles, clobber=True)
    build = datasets.load_dataset_builder
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda *args, **kwargs: build("parquet", data_files={"train": f"count://{path}"}),
    )
    CountingFiles.sent = 0
    store = load_hub_dataset("org/vos", streaming=True, max_sequences=1, **options)
    assert list(store.sequences) == ["a"]
    # A twelfth of the rows, the row after them and what is decoded ahead; a buffer of a megabyte at each column.
    assert 0 < CountingFiles.sent < path.stat().st_size / 3
    assert is_empty(no_cache)


def test_streams_of_other_formats(tmp_path, options, no_cache):
    saved = datasets.Dataset.from_list(make_rows(), features=FEATURES)
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "arrow").mkdir()
    (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / "arrow" / "train.arrow")
    store = load_hub_dataset(tmp_path / "arrow", streaming=True, max_sequences=2, **options)
    assert list(store.sequences) == ["ant", "bee"]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text('{"sequence": "ant", "frame": "00000.jpg"}\n')
    with pytest.raises(ValueError, match="columns frame_index, frame, mask, object_ids are missing or of another"):
        load_hub_dataset(tmp_path / "text", **options)


def test_a_downloaded_repository_is_read_without_network(tmp_path, options, no_cache, monkeypatch):
    """The tests are offline: this finds what the download has left, and the store of the same commit."""
    write_parquet(tmp_path / "tiny-vos" / "train-00000-of-00001.parquet", make_rows(["ant"]))
    build = datasets.load_dataset_builder
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset_builder", lambda *_, **__: build(str(tmp_path / "tiny-vos")))
        first = load_hub_dataset("org/tiny-vos", **options)
    (no_cache / "tiny-vos").rename(no_cache / "org___tiny-vos")
    for streaming in (False, True):
        assert load_hub_dataset("org/tiny-vos", streaming=streaming, **options).folder == first.folder


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_repositories(tmp_path, options, no_cache, monkeypatch, streaming):
    write_parquet(tmp_path / "repository" / "train-00000-of-00001.parquet", make_rows())
    build = datasets.load_dataset_builder
    asked = []

    def of_the_hub(name, config_name=None, revision=None):
        asked.append((name, config_name, revision))
        builder = build(str(tmp_path / "repository"))
        builder.hash = revision or "0123abc"
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", of_the_hub)
    store = load_hub_dataset("org/tiny-vos", streaming=streaming, max_sequences=2, **options)
    assert store.name == "org--tiny-vos"
    assert list(store.sequences) == ["ant", "bee"]
    assert is_empty(no_cache) == streaming, "only a stream leaves the set where it is"
    again = load_hub_dataset("org/tiny-vos", streaming=not streaming, max_sequences=2, **options)
    assert again.folder == store.folder
    other = load_hub_dataset("org/tiny-vos", streaming=streaming, max_sequences=2, revision="v2", **options)
    assert other.folder != store.folder
    assert asked[-1] == ("org/tiny-vos", None, "v2")
    with pytest.raises(ValueError, match="`split` must be one of train in org/tiny-vos, got 'test'"):
        load_hub_dataset("org/tiny-vos", split="test", streaming=streaming, **options)


def test_what_is_neither_file_nor_repository(tmp_path, options):
    for source in (tmp_path / "none.parquet", "./none", "a/b/c", ".hidden", "none.parquet"):
        with pytest.raises(ValueError, match="must be a file, a folder or a Hub repository"):
            load_hub_dataset(source, **options)
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"must be a \.parquet file"):
        load_hub_dataset(tmp_path / "rows.csv", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="doesn't contain any data files"):
        load_hub_dataset(tmp_path / "empty", **options)
    with pytest.raises(OSError, match="org/unknown"):  # the tests are offline
        load_hub_dataset("org/unknown", streaming=True, **options)


def test_without_the_package_the_message_says_what_to_install(tmp_path, options, monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ValueError, match=r"need the package `datasets`.*`pip install datasets`"):
        load_hub_dataset(tmp_path, **options)
