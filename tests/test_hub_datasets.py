"""DAVIS-layout folders as data sets: written, pushed, scored on and trained on as they are read, row by row."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_CONFIG
from PIL import Image
from synthetic import write_davis, write_gray_png
from test_evaluation import load_fake, make_davis, write_frame, write_mask

from hf_deformvos.cli import main
from hf_deformvos.data import export_davis, load_davis, load_hub_dataset, open_hub_dataset
from hf_deformvos.data.hub_dataset import DatasetFrame
from hf_deformvos.evaluation import load_dataset_layout
from hf_deformvos.evaluation.report import scores_as_dict
from hf_deformvos.evaluation.runner import RunnerConfig, evaluate
from hf_deformvos.evaluation.streamed import evaluate_hub_dataset


datasets = pytest.importorskip("datasets")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")

REPO = "org/tiny-vos"


def write_lists(root, **lists):
    folder = root / "ImageSets" / "2017"
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture
def davis(tmp_path):
    """Three sequences, of which one is for training."""
    root = write_davis(tmp_path / "DAVIS", names=("ant", "bee", "cat"), frames=5)
    return write_lists(root, train=["ant"], val=["bee", "cat"])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    return RunnerConfig(model=str(tmp_path / "model"), device="cpu")


def rows_of(folder, split="train"):
    files = sorted((folder / "data").glob(f"{split}-*.parquet"))
    return [row for file in files for row in pyarrow_parquet.read_table(file).to_pylist()]


def export(root, folder, **options):
    return export_davis(root, folder, show_progress_bar=False, **options)


def error_of(capsys, *words) -> str:
    """The one line that a command ends in; only bars may come before it."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    *bars, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and not [line for line in bars if line and "%|" not in line], error
    return error


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_files_go_in_and_come_out_byte_by_byte(tmp_path, davis):
    exported = export(davis, tmp_path / "set")
    assert {name: (counts.sequences, counts.frames) for name, counts in exported.splits.items()} == {
        "train": (1, 5),
        "val": (2, 10),
    }
    assert (exported.splits["val"].objects, exported.reencoded, exported.one_object) == (4, 0, False)
    rows = rows_of(tmp_path / "set", "val")
    assert [(row["sequence"], row["frame_index"]) for row in rows] == [
        (s, t) for s in ("bee", "cat") for t in range(5)
    ]
    for row in rows:
        name = f"{row['sequence']}/{row['frame_index']:05d}"
        assert row["frame"]["bytes"] == (davis / "JPEGImages" / "480p" / f"{name}.jpg").read_bytes()
        assert row["mask"]["bytes"] == (davis / "Annotations" / "480p" / f"{name}.png").read_bytes()
        assert row["object_ids"] == [1, 2]


def test_datasets_and_the_reader_see_the_same(tmp_path, davis, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    export(davis, tmp_path / "set")
    loaded = datasets.load_dataset(str(tmp_path / "set"))
    assert set(loaded) == {"train", "val"}
    np.testing.assert_array_equal(
        np.asarray(loaded["val"][7]["mask"]), np.asarray(Image.open(davis / "Annotations/480p/cat/00002.png"))
    )
    options = {"cache_dir": tmp_path / "cache", "show_progress_bar": False}
    store = load_hub_dataset(tmp_path / "set", 96, split="val", on_error="raise", **options)
    folder = load_davis(davis, 96, sequences=["bee", "cat"], **options)
    assert store.sequences == folder.sequences and store.frame_names == folder.frame_names
    for index in range(len(store)):
        np.testing.assert_array_equal(store.image(index), folder.image(index))
        np.testing.assert_array_equal(store.mask(index), folder.mask(index))


def test_shards_are_bounded_and_keep_sequences_whole(tmp_path, davis):
    size = export(davis, tmp_path / "one", split="val").splits["val"].size
    counts = export(davis, tmp_path / "two", split="val", shard_size=int(0.6 * size)).splits["val"]
    assert counts.shards == 2
    shards = sorted((tmp_path / "two" / "data").iterdir())
    assert [path.name for path in shards] == ["val-00000-of-00002.parquet", "val-00001-of-00002.parquet"]
    assert [set(pyarrow_parquet.read_table(path)["sequence"].to_pylist()) for path in shards] == [{"bee"}, {"cat"}]
    # A sequence that alone is too large is cut; a frame never is.
    counts = export(davis, tmp_path / "many", split="val", shard_size=int(0.25 * size)).splits["val"]
    assert counts.shards == 6
    assert max(path.stat().st_size for path in (tmp_path / "many" / "data").iterdir()) < 0.25 * size + 10_000
    assert rows_of(tmp_path / "many", "val") == rows_of(tmp_path / "one", "val")
    assert export(davis, tmp_path / "tiny", split="train", shard_size=1).splits["train"].shards == 5
    export(davis, tmp_path / "again", split="val")
    one, again = (next((tmp_path / name / "data").iterdir()).read_bytes() for name in ("one", "again"))
    assert one == again, "the same folder gives the same bytes"


def test_files_of_an_earlier_export_go(tmp_path, davis):
    export(davis, tmp_path / "set", shard_size=1)
    assert len(list((tmp_path / "set" / "data").iterdir())) == 15
    export(davis, tmp_path / "set", split="val")
    names = sorted(path.name for path in (tmp_path / "set" / "data").iterdir())
    assert names == [f"train-{number:05d}-of-00005.parquet" for number in range(5)] + ["val-00000-of-00001.parquet"]
    assert len(list(open_hub_dataset(tmp_path / "set", "val").frames())) == 10


def test_splits_and_sequences(tmp_path, davis):
    assert list(export(davis, tmp_path / "a", split="train").splits) == ["train"]
    assert export(davis, tmp_path / "b", sequences=["cat"]).splits["val"].sequences == 1
    shutil.rmtree(davis / "ImageSets")
    assert export(davis, tmp_path / "c").splits["train"].sequences == 3
    write_lists(davis, train=["wasp"], val=["ant"])
    assert list(export(davis, tmp_path / "d").splits) == ["val"], "a list whose sequences are not here is passed over"


def test_masks_of_one_object(tmp_path, config):
    """255 is the object in DAVIS-2016: rows say so, and nobody takes it for void."""
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=4, value=255)
    assert export(root, tmp_path / "set").one_object
    assert rows_of(tmp_path / "set")[0]["object_ids"] == [255]
    store = load_hub_dataset(tmp_path / "set", cache_dir=tmp_path / "cache", show_progress_bar=False)
    assert {box.object_id for boxes in store.objects for box in boxes} == {1}
    run = evaluate_hub_dataset(tmp_path / "set", config, split="train", loader=load_fake)
    assert run.dataset.name == "davis2016" and run.dataset.sequences[0].binary


def test_frames_are_encoded_anew_only_where_they_must_be(tmp_path):
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=3)
    turned = root / "JPEGImages" / "480p" / "ant" / "00001.jpg"
    picture = Image.open(turned)
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(turned, exif=exif, quality=95)
    stored = np.asarray(Image.open(turned).convert("RGB"))
    exported = export(root, tmp_path / "set")
    assert exported.reencoded == 1
    frames = list(open_hub_dataset(tmp_path / "set").frames())
    np.testing.assert_array_equal(np.asarray(frames[1].read_image()), stored)
    small = export(root, tmp_path / "small", short_side=48)
    assert (small.reencoded, small.short_side) == (3, 48)
    row = next(open_hub_dataset(tmp_path / "small").frames())
    image, mask = row.read_image(), row.open_mask()
    assert image.size == mask.size == (80, 48)
    assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    assert set(np.unique(np.asarray(mask))) == {0, 1, 2}


def test_frames_of_16_bits_are_scaled_where_they_are_encoded_anew(tmp_path):
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=2)
    frames = root / "JPEGImages" / "480p" / "ant"
    deep = np.linspace(0, 65535, 96 * 160).reshape(96, 160).astype(np.uint16)
    for path in list(frames.iterdir()):
        path.unlink()
        Image.fromarray(deep).save(path.with_suffix(".png"))
    export(root, tmp_path / "set", short_side=48)
    image = np.asarray(next(open_hub_dataset(tmp_path / "set").frames()).read_image())
    assert image.shape == (48, 80, 3) and abs(image.mean() - 127.5) < 1


def test_masks_of_few_bits_are_refused(tmp_path):
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=2)
    mask = root / "Annotations" / "480p" / "ant" / "00001.png"
    write_gray_png(mask, np.asarray(Image.open(mask)), 4)
    with pytest.raises(ValueError, match=r"00001\.png must hold ids in eight bits .*, got grays of 4 bits"):
        export(root, tmp_path / "set")


def test_frames_without_masks_and_names_without_numbers(tmp_path):
    root = write_davis(tmp_path / "DAVIS", names=("ant",), frames=3)
    for path in (root / "JPEGImages" / "480p" / "ant").iterdir():
        path.rename(path.with_stem(f"frame{path.stem}"))
    for path in (root / "Annotations" / "480p" / "ant").iterdir():
        path.rename(path.with_stem(f"frame{path.stem}"))
    (root / "Annotations" / "480p" / "ant" / "frame00001.png").unlink()
    assert export(root, tmp_path / "set").splits["train"].masks == 2
    rows = rows_of(tmp_path / "set")
    assert [row["frame_index"] for row in rows] == [0, 1, 2]
    assert [row["mask"] is None for row in rows] == [False, True, False]
    assert rows[2]["frame"]["path"] == "frame00002.jpg"


# --- Scoring ---------------------------------------------------------------------------------------------------------


def flat(value, path=""):
    """Every number and text of a report, by its path."""
    if isinstance(value, dict):
        return {key: x for name, part in value.items() for key, x in flat(part, f"{path}/{name}").items()}
    if isinstance(value, list):
        return {key: x for index, part in enumerate(value) for key, x in flat(part, f"{path}/{index}").items()}
    return {path: value}


def both_reports(root, folder, config, protocol, split="val", **options):
    """What is measured on a folder, and on the data set made of it."""
    reports = []
    runs = (
        evaluate(load_dataset_layout(protocol, root, split, **options), config, loader=load_fake),
        evaluate_hub_dataset(folder, config, protocol, split, loader=load_fake, **options),
    )
    for run in runs:
        report = scores_as_dict(run.dataset, [result.score for result in run.results])
        report["facts"] = dataclasses.asdict(run.facts)
        report["frames"] = [result.timing.num_frames for result in run.results]
        report["dataset"].pop("root")
        reports.append(flat(report))
    return reports


@pytest.mark.parametrize("protocol", ["davis2016", "davis2017", "folder"])
@pytest.mark.parametrize("options", [{}, {"max_frames": 4}, {"sequences": ["cat"]}])
def test_figures_are_those_of_the_folder(tmp_path, config, protocol, options):
    year, objects = (2016, (255,)) if protocol == "davis2016" else (2017, (1, 2))
    root = make_davis(tmp_path / "DAVIS", year, ["ant", "cat"], object_ids=objects)
    if protocol == "davis2017":
        mask = root / "Annotations" / "480p" / "ant" / "00002.png"
        ids = np.array(Image.open(mask))
        ids[:8, :8] = 255
        write_mask(mask, ids)
    export(root, tmp_path / "set")
    folder, streamed = both_reports(root, tmp_path / "set", config, protocol, **options)
    assert folder.keys() == streamed.keys()
    for key, value in folder.items():
        expected = pytest.approx(value, abs=1e-12, rel=0) if isinstance(value, float) else value
        assert streamed[key] == expected, key
    assert 0 < folder["/totals/J&F"] < 1


def test_late_objects_and_sparse_masks_score_the_same(tmp_path, config):
    for time in range(8):
        write_frame(tmp_path / "vos" / "JPEGImages" / "cat" / f"{time:05d}.jpg", time)
        if time in (1, 2, 4, 5, 7):
            ids = np.zeros((48, 64), np.uint8)
            ids[4:20, 4 + 3 * time : 20 + 3 * time] = 3
            if time >= 4:
                ids[30:40, 10 + time : 30 + time] = 1
            write_mask(tmp_path / "vos" / "Annotations" / "cat" / f"{time:05d}.png", ids)
    (tmp_path / "vos" / "ImageSets").mkdir()
    (tmp_path / "vos" / "ImageSets" / "train.txt").write_text("cat\n")
    export(tmp_path / "vos", tmp_path / "set")
    folder, streamed = both_reports(tmp_path / "vos", tmp_path / "set", config, "folder", split="train")
    assert streamed == folder
    assert folder["/sequences/0/objects/0/id"] == 1 and folder["/sequences/0/objects/0/frames/0"] == "00005"
    with pytest.raises(ValueError, match="'cat' must have the mask of its first frame, 0"):
        evaluate_hub_dataset(tmp_path / "set", config, split="train", loader=load_fake)
    (tmp_path / "vos" / "JPEGImages" / "cat" / "00000.jpg").unlink()
    export(tmp_path / "vos", tmp_path / "set")
    with pytest.raises(ValueError, match=r"by the protocol `folder` it may be as it is\. Frame 3 lacks one"):
        evaluate_hub_dataset(tmp_path / "set", config, split="train", loader=load_fake)


def test_an_empty_first_mask_is_named_by_its_sequence(tmp_path, config):
    root = make_davis(tmp_path / "DAVIS", 2016, ["cat"], object_ids=(255,))
    write_mask(root / "Annotations" / "480p" / "cat" / "00000.png", np.zeros((48, 64), np.uint8))
    export(root, tmp_path / "set")
    with pytest.raises(ValueError, match="Sequence 'cat' must show its objects in the first frame, got an empty mask"):
        evaluate_hub_dataset(tmp_path / "set", config, "davis2016", loader=load_fake)


def test_first_masks_alone_are_no_ground_truth(tmp_path, config):
    root = make_davis(tmp_path / "DAVIS", 2017, ["cat"], annotated=[0])
    export(root, tmp_path / "set")
    run = evaluate_hub_dataset(
        tmp_path / "set", dataclasses.replace(config, save_masks=str(tmp_path / "masks")), loader=load_fake
    )
    assert not run.dataset.has_ground_truth
    assert len(list((tmp_path / "masks" / "cat").glob("*.png"))) == 7


def test_no_frame_is_kept(tmp_path, config, monkeypatch):
    """However long a sequence is, a few rows are in memory: those of a read, the one that runs, and the next."""
    root = make_davis(tmp_path / "DAVIS", 2017, ["cat"], num_frames=60)
    export(root, tmp_path / "set")
    alive, most = [], []

    def read_image(self, original=DatasetFrame.read_image):
        alive.append(weakref.ref(self))
        most.append(sum(row() is not None for row in alive))
        return original(self)

    monkeypatch.setattr(DatasetFrame, "read_image", read_image)
    evaluate_hub_dataset(tmp_path / "set", config, loader=load_fake)
    assert len(most) == 60 and max(most) <= 2


def test_broken_and_unordered_sets_are_named(tmp_path, config, davis):
    export(davis, tmp_path / "set")
    rows = rows_of(tmp_path / "set", "val")
    rows[3]["frame"]["bytes"] = rows[3]["frame"]["bytes"][:300]
    schema = pyarrow_parquet.read_schema(tmp_path / "set" / "data" / "val-00000-of-00001.parquet")
    path = tmp_path / "broken.parquet"
    pyarrow_parquet.write_table(datasets.table.pa.Table.from_pylist(rows, schema), path)
    with pytest.raises(ValueError, match="Sequence 'bee', frame 3 cannot be read: "):
        evaluate_hub_dataset(path, config, loader=load_fake)
    pyarrow_parquet.write_table(datasets.table.pa.Table.from_pylist(rows[5:] + rows[:2] + rows[4:], schema), path)
    with pytest.raises(ValueError, match="must follow the other rows of its sequence"):
        evaluate_hub_dataset(path, config, loader=load_fake)


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_model(monkeypatch, tmp_path):
    """The commands evaluate a pretended model."""
    for function in (evaluate, evaluate_hub_dataset):
        monkeypatch.setattr(function, "__defaults__", (*function.__defaults__[:-1], load_fake))
    (tmp_path / "model").mkdir(exist_ok=True)
    return tmp_path / "model"


def push(*words) -> int:
    return main(["push-dataset", *(str(word) for word in words)])


def test_a_folder_is_written_and_scored(tmp_path, davis, fake_model, capsys):
    assert push(davis, "--output", tmp_path / "set", "--license", "cc-by-4.0", "--license-note", "Ask Ann.") == 0
    captured = capsys.readouterr()
    assert "val: 2 sequence(s), 10 frames, 10 masks, 4 object(s)" in captured.out and not captured.err
    card = (tmp_path / "set" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "Ask Ann." in card and "| val | 2 | 10 | 10 | 4 |" in card
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    common = ["evaluate", "--model", str(fake_model), "--device", "cpu", "--json"]
    folder, streamed = tmp_path / "folder.json", tmp_path / "streamed.json"
    assert main([*common, str(folder), "--dataset", "davis2017", "--root", str(davis)]) == 0
    assert main([*common, str(streamed), "--dataset_name", str(tmp_path / "set"), "--dataset_split", "val"]) == 0
    output = capsys.readouterr().out
    assert "scored as davis2017" in output and output.count("all 2 sequences") == 2
    one, two = (json.loads(path.read_text()) for path in (folder, streamed))
    assert two["dataset"] == {**one["dataset"], "root": str(tmp_path / "set")}
    assert {key: two["totals"][key] for key in ("J&F", "J", "F")} == {k: one["totals"][k] for k in ("J&F", "J", "F")}
    # An edited card is not replaced unasked, nor is a folder of something else.
    assert push(davis, "--output", tmp_path / "set", "--overwrite", "--split", "val") == 0
    assert [path.name for path in (tmp_path / "set" / "data").iterdir()] == ["val-00000-of-00001.parquet"]
    assert "states no terms" in capsys.readouterr().err
    assert push(davis, "--output", tmp_path / "set", "--overwrite", "--license-note", "Ask Ann.") == 0
    assert "license: other" in (tmp_path / "set" / "README.md").read_text() and not capsys.readouterr().err
    assert "is not empty" in error_of(capsys, "push-dataset", davis, "--output", tmp_path / "set")
    (tmp_path / "set" / "README.md").write_text("mine\n")
    assert "--force" in error_of(capsys, "push-dataset", davis, "--output", tmp_path / "set", "--overwrite")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--repo ORG/NAME, --output DIR or both"),
        (["--repo", "name"], "named org/name, got 'name'"),
        (["--output", "{tmp}/o", "--sequences", "dog"], "it has no dog"),
        (["--output", "{tmp}/o", "--split", "train"], "has no folder|one is missing"),
        (["--output", "{tmp}/set.txt"], "is a file"),
        (["--output", "{tmp}/o", "--token-file", "{tmp}/none"], "--token-file must name a file"),
    ],
)
def test_mistakes_of_pushing_are_one_line(tmp_path, davis, capsys, words, message):
    (tmp_path / "set.txt").write_text("")
    shutil.rmtree(davis / "JPEGImages" / "480p" / "ant")
    assert re.search(message, error_of(capsys, "push-dataset", davis, *(word.format(tmp=tmp_path) for word in words)))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "fault",
    [
        "truncated frame",
        "no frame",
        "two frames",
        "no image",
        "size",
        "colours",
        "ids",
        "empty",
        "no masks",
        "no folder",
    ],
)
def test_broken_folders_are_one_line(tmp_path, davis, capsys, fault):
    frame, mask = davis / "JPEGImages/480p/bee/00002.jpg", davis / "Annotations/480p/bee/00002.png"
    message = str(mask)
    if fault == "truncated frame":
        frame.write_bytes(frame.read_bytes()[:400])
        message = str(frame)
    elif fault == "no frame":
        frame.unlink()
        message = "'bee' must have a frame for every mask"
    elif fault == "two frames":
        Image.open(frame).save(frame.with_suffix(".png"))
        message = "one file a frame, got 00002.jpg and 00002.png"
    elif fault == "no image":
        mask.write_text("ids")
    elif fault == "size":
        write_mask(mask, np.ones((10, 12), np.uint8))
        message = "must have its frame's size 160x96, got 12x10"
    elif fault == "colours":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 160, 3), np.uint8)).save(mask)
        message = "ids as palette entries or grays, got colours"
    elif fault == "ids":
        Image.fromarray(np.full((96, 160), 300, np.uint16)).save(mask)
        message = "must hold ids from 0 to 255, got 300"
    elif fault == "empty":
        for path in mask.parent.iterdir():
            write_mask(path, np.zeros((96, 160), np.uint8))
        message = "'bee' must show an object"
    elif fault == "no masks":
        for path in mask.parent.iterdir():
            path.unlink()
        message = "'bee' must have a mask named like a frame"
    else:
        davis, message = tmp_path / "nowhere", "which does not exist"
    assert message in error_of(capsys, "push-dataset", davis, "--output", tmp_path / "set")
    assert not (tmp_path / "set").exists() and not list(tmp_path.glob(".set*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--dataset", "davis2017"],
            "--root is missing: a benchmark is --root DIR --dataset LAYOUT, or --dataset-name",
        ),
        (["--root", "x"], "--dataset is missing"),
        (["--root", "x", "--dataset-name", "{set}"], "--root belongs to folders"),
        (["--dataset-name", "{set}", "--workers", "2"], "--workers belongs to folders"),
        (["--dataset-name", "{set}", "--dataset", "youtubevos2018"], "must be one of davis2016, davis2017, folder"),
        (["--dataset-name", "{set}", "--dataset-split", "test"], "--dataset-split must be one of train, val in"),
        (
            ["--dataset-name", "{set}", "--sequences", "ant,dog"],
            r"--sequences must be of set \(bee, cat\), got ant, dog",
        ),
        (["--dataset-name", "{set}/none"], "must be a file, a folder or a Hub repository"),
    ],
)
def test_mistakes_of_evaluating_are_one_line(tmp_path, davis, fake_model, capsys, words, message):
    export(davis, tmp_path / "set")
    words = [word.format(set=tmp_path / "set") for word in words]
    assert re.search(message, error_of(capsys, "evaluate", "--model", fake_model, "--device", "cpu", *words))


# --- The Hub ---------------------------------------------------------------------------------------------------------


def test_missing_terms_are_told_before_the_commit(davis, hub, capsys, monkeypatch):
    from hf_deformvos.publishing import dataset

    told = []
    genuine = dataset.publish_dataset
    monkeypatch.setattr(
        dataset, "publish_dataset", lambda *words: told.append(capsys.readouterr().err) or genuine(*words)
    )
    assert push(davis, "--repo", REPO) == 0
    assert "states no terms" in told[0] and "states no terms" not in capsys.readouterr().err


def test_push_once_and_again(tmp_path, davis, hub, capsys):
    assert push(davis, "--repo", REPO, "--dry-run") == 0
    assert "one commit would be made; nothing was sent" in capsys.readouterr().out and not hub.repos
    assert push(davis, "--repo", REPO, "--private", "--license", "cc-by-4.0", "--output", tmp_path / "set") == 0
    repo = hub.repos[f"datasets/{REPO}"]
    before = list(repo.commits)
    files = repo.at("main").files
    names = ["README.md", "data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"]
    assert repo.private and [name for name in files if name != ".gitattributes"] == names
    for name in names:
        stored = files[name].data or hub.objects[files[name].sha256]
        assert stored == (tmp_path / "set" / name).read_bytes()
    assert push(davis, "--repo", REPO, "--license", "cc-by-4.0") == 0
    assert "nothing changed" in capsys.readouterr().out and list(repo.commits) == before
    # Other shards replace those that are there; a split is not lost unasked.
    assert push(davis, "--repo", REPO, "--shard-size", "20kB") == 0
    assert "data/val-00000-of-00001.parquet" not in repo.at("main").files and len(repo.commits) == len(before) + 1
    words = ("push-dataset", davis, "--repo", REPO, "--license", "cc-by-4.0", "--split", "val")
    assert "has the split 'train'" in error_of(capsys, *words)
    assert "has the split" in error_of(capsys, *words, "--dry-run")
    assert push(davis, "--repo", REPO, "--split", "val", "--force") == 0
    assert not [name for name in repo.at("main").files if name.startswith("data/train")]


@pytest.mark.parametrize(
    ("fault", "match", "options"),
    [
        ("status", r"^POST /api/.*/commit/", {"status": 503}),
        ("cut_upload", r"^PUT /uploads/", {"after": 1000}),
        ("corrupt", r"^PUT /uploads/", {}),
    ],
)
def test_passing_faults_do_not_show(davis, hub, monkeypatch, fault, match, options):
    monkeypatch.setattr("hf_deformvos.publishing.hub.time.sleep", lambda seconds: None)
    hub.inject(fault, match, **options)
    assert push(davis, "--repo", REPO) == 0
    files = hub.repos[f"datasets/{REPO}"].at("main").files
    assert all(file.sha256 is None or len(hub.objects[file.sha256]) == file.size for file in files.values())


def test_a_set_that_was_asked_for_is_kept_whatever_the_hub_says(tmp_path, davis, hub, capsys):
    hub.inject("status", r"^POST /api/.*/commit/", status=403)
    words = ("--repo", REPO, "--output", tmp_path / "kept", "--split", "val", "--license", "cc-by-4.0")
    assert "(403)" in error_of(capsys, "push-dataset", davis, *words)
    assert len(list((tmp_path / "kept" / "data").iterdir())) == 1
    assert "is not empty" in error_of(capsys, "push-dataset", davis, *words, "--dry-run")


def test_lasting_faults_are_one_line_and_leave_nothing(davis, hub, monkeypatch, capsys):
    hub.inject("status", r"^POST /api/.*/commit/", status=403)
    assert "(403)" in error_of(capsys, "push-dataset", davis, "--repo", REPO, "--license", "cc-by-4.0")
    assert list(hub.repos[f"datasets/{REPO}"].at("main").files) == [".gitattributes"]
    monkeypatch.delenv("HF_TOKEN")
    seen = len(hub.requests)
    assert "needs a token" in error_of(capsys, "push-dataset", davis, "--repo", REPO)
    assert len(hub.requests) == seen, "asked for before the work"


@pytest.mark.parametrize("streaming", [False, True])
def test_scores_from_the_hub_are_those_of_the_folder(tmp_path, davis, hub_datasets, config, streaming):
    assert push(davis, "--repo", REPO, "--private") == 0
    folder = evaluate(load_dataset_layout("davis2017", davis), config, loader=load_fake)
    downloads = len(hub_datasets.seen(r"^GET /objects/"))
    run = evaluate_hub_dataset(REPO, config, streaming=streaming, loader=load_fake)
    assert [result.score for result in run.results] == [result.score for result in folder.results]
    requests = hub_datasets.seen(r"^GET /objects/")[downloads:]
    assert all("range" in request.headers for request in requests) or not streaming


@pytest.mark.parametrize(
    ("fault", "options"), [("status", {"status": 503}), ("cut_download", {"after": 100}), ("drop_response", {})]
)
def test_a_stream_survives_a_passing_fault_or_ends_in_one_line(
    tmp_path, davis, hub_datasets, fake_model, capsys, fault, options
):
    assert push(davis, "--repo", REPO) == 0
    words = ["evaluate", "--model", fake_model, "--device", "cpu", "--dataset-name", REPO, "--dataset-streaming"]
    hub_datasets.inject(fault, r"^GET /objects/", **options)
    assert main([str(word) for word in words]) == 0
    hub_datasets.inject(fault, r"^GET /objects/", times=None, **options)
    assert "val-00000-of-00001.parquet" in error_of(capsys, *words)


def test_the_card_states_what_runs(davis, hub_datasets, capsys):
    assert push(davis, "--repo", REPO) == 0
    card = hub_datasets.repos[f"datasets/{REPO}"].at("main").files["README.md"].data.decode()
    assert "did not state the terms" in card
    [block] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "bee 0 (160, 96) [1, 2]\n"
    for line in re.search(r"```bash\n(.*?)```", card, re.DOTALL)[1].splitlines():
        assert REPO in line and line.startswith(("deformvos evaluate ", "accelerate launch train_distill.py "))


@pytest.mark.slow
def test_two_processes_train_from_a_stream_that_is_read_once(tmp_path, davis, hub):
    """Two steps, by the command, on the first of two sequences; the second process finds what the first decoded."""
    write_lists(davis, train=["ant", "bee"], val=["cat"])
    assert push(davis, "--repo", REPO, "--shard-size", "30kB") == 0
    shards = [name for name in hub.repos[f"datasets/{REPO}"].at("main").files if name.startswith("data/train")]
    assert len(shards) >= 2
    (tmp_path / "student.json").write_text(json.dumps(TINY_CONFIG))
    settings = {
        "student": str(tmp_path / "student.json"),
        "dataset_names": [REPO],
        "dataset_streaming": True,
        "dataset_max_sequences": 1,
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "run"),
        "stages": [{"until": 1.0, "size": [49, 65], "frames": 2, "batch": 1}],
        "max_train_steps": 2,
        "mixed_precision": "no",
        "checkpointing_steps": 0,
        "logging_steps": 1,
        "data_workers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    hub.requests.clear()
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    ran = subprocess.run(
        [sys.executable, "-m", *launch, "train_distill.py", str(tmp_path / "config.json")],
        env=hub.env(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="0"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert (results["steps"], results["clips"]) == (2, 4), "two processes"
    [store] = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert list(json.loads((store / "meta.json").read_text())["sequences"]) == ["ant"]
    assert ran.stderr.count("decoding org--tiny-vos: 0it") == 1, "by one process"
    assert not list(Path(hub.home).rglob("*.arrow")), "nothing is kept but the decoded frames"
