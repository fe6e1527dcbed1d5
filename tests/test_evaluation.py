"""Layouts, runner, scoring and their two commands, on tiny data sets and models that are only pretended."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from hf_deformvos.cli import as_typed, common, main
from hf_deformvos.cli import evaluate as evaluate_command
from hf_deformvos.cli import score as score_command
from hf_deformvos.evaluation import guess_dataset, load_dataset_layout, score_predictions, summarize
from hf_deformvos.evaluation.layouts import (
    YOUTUBE_VOS_SEEN_CATEGORIES,
    EvaluationSequence,
    TrackedObject,
    limit_short_side,
    read_ids,
)
from hf_deformvos.evaluation.runner import RunnerConfig, device_of, evaluate, load_pretrained, peak_memory
from hf_deformvos.video.writer import write_palette_png


SIZE = (48, 64)
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


# --- Data sets -------------------------------------------------------------------------------------------------------


def write_mask(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_palette_png(path, ids)


def write_frame(path, seed, size=SIZE):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size[::-1]).save(path)


def moving_squares(time, object_ids, size=SIZE):
    """Squares that move right, one for each id, one below the other."""
    ids = np.zeros(size, np.uint8)
    for place, object_id in enumerate(object_ids):
        ids[4 + 14 * place : 14 + 14 * place, 4 + 3 * time : 16 + 3 * time] = object_id
    return ids


def make_davis(root, year, sequences, num_frames=7, object_ids=(1, 2), split="val", annotated=None):
    """A DAVIS tree; `annotated` restricts which frames have masks."""
    for number, name in enumerate(sequences):
        for time in range(num_frames):
            write_frame(root / "JPEGImages" / "480p" / name / f"{time:05d}.jpg", 100 * number + time)
            if annotated is None or time in annotated:
                ids = moving_squares(time + number, object_ids)
                write_mask(root / "Annotations" / "480p" / name / f"{time:05d}.png", ids)
    path = root / "ImageSets" / str(year) / f"{split}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sequences) + "\n")
    return root


VIDEOS = {
    # Object 2 appears at 00010; frames are every fifth.
    "aaa": {"1": ("dog", range(0, 30, 5)), "2": ("axolotl", range(10, 30, 5))},
    # Object 7 ends early, object 3 is the only one in the first frame.
    "bbb": {"3": ("person", range(0, 25, 5)), "7": ("zebra", range(5, 15, 5))},
}


def make_youtube_vos(root, complete, all_frames=False, size=SIZE):
    """A YouTube-VOS tree; without `complete` only first frames are annotated, each with the new object alone."""
    meta = {"videos": {}}
    for video, objects in VIDEOS.items():
        times = sorted({time for _, frames in objects.values() for time in frames})
        for time in times:
            write_frame(root / "valid" / "JPEGImages" / video / f"{time:05d}.jpg", time, size)
            present = [int(key) for key, (_, frames) in objects.items() if time in frames]
            ids = np.where(
                np.isin(full := moving_squares(time // 5, sorted(map(int, objects)), size), present), full, 0
            )
            new = [int(key) for key, (_, frames) in objects.items() if time == frames[0]]
            path = root / "valid" / "Annotations" / video / f"{time:05d}.png"
            if complete:
                write_mask(path, ids)
            elif new:
                write_mask(path, np.where(np.isin(ids, new), ids, 0).astype(np.uint8))
        if all_frames:
            for time in range(times[-1] + 4):
                write_frame(root / "valid_all_frames" / "JPEGImages" / video / f"{time:05d}.jpg", time, size)
        meta["videos"][video] = {
            "objects": {
                key: {"category": category, "frames": [f"{time:05d}" for time in frames]}
                for key, (category, frames) in objects.items()
            }
        }
    (root / "valid" / "meta.json").write_text(json.dumps(meta))
    return root


# --- A model that follows nothing: it repeats the masks it was given -------------------------------------------------


class FakeProcessor:
    """The processor's interface; frames go to the model as they are."""

    image_processor = SimpleNamespace(size={"shortest_edge": 480, "longest_edge": None})

    def init_video_session(self, video=None, device=None, dtype=None):
        assert video is None
        return SimpleNamespace(masks={}, frame_idx=0, dtype=dtype, calls=[])

    def __call__(self, images, return_tensors, size=None):
        assert return_tensors == "pt"
        assert isinstance(images, Image.Image)
        pixels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None] / 255
        if size is not None:
            pixels = torch.nn.functional.interpolate(pixels, size=(size["shortest_edge"], size["shortest_edge"]))
        return SimpleNamespace(pixel_values=pixels)

    def add_inputs_to_inference_session(self, session, frame_idx, obj_ids, input_masks, original_size):
        assert frame_idx == session.frame_idx, "objects are added before their frame is run"
        assert input_masks.shape == (len(obj_ids), *original_size)
        assert not set(obj_ids) & set(session.masks)
        session.calls.append((frame_idx, list(obj_ids)))
        session.masks.update(zip(obj_ids, input_masks, strict=True))

    def post_process_id_map(self, output, original_size):
        ids = np.zeros(original_size, np.int32)
        for object_id, mask in output.masks.items():
            ids[mask] = object_id
        return ids


class FakeModel(torch.nn.Module):
    """Predicts that nothing moves; one convolution gives it parameters and operations to count."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.sessions = []

    def num_parameters(self):
        return self.conv.weight.numel()

    def forward(self, inference_session, frame, frame_idx=None):
        if not inference_session.masks:
            raise ValueError("no object")
        self.conv(frame[None])
        if not any(inference_session is session for session in self.sessions):
            self.sessions.append(inference_session)
        inference_session.frame_idx += 1
        return SimpleNamespace(
            frame_idx=inference_session.frame_idx - 1,
            object_ids=list(inference_session.masks),
            masks=dict(inference_session.masks),
        )


def load_fake(config):
    return FakeModel(), FakeProcessor()


def run(dataset, config, **arguments):
    return evaluate(dataset, config, loader=load_fake, **arguments)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "model").mkdir()
    return RunnerConfig(model=str(tmp_path / "model"), device="cpu")


# --- Layouts ---------------------------------------------------------------------------------------------------------


def test_davis2017_layout(tmp_path):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat", "ant"]))
    assert [sequence.name for sequence in dataset.sequences] == ["cat", "ant"]
    sequence = dataset.sequences[0]
    assert sequence.object_ids == [1, 2]
    assert sequence.scored_frames == ["00001", "00002", "00003", "00004", "00005"]
    assert len(sequence.output_frames) == 7
    assert dataset.has_ground_truth
    np.testing.assert_array_equal(sequence.given_mask("00000"), moving_squares(0, [1, 2]))
    assert sequence.given_mask("00001") is None


def test_split_files(tmp_path):
    make_davis(tmp_path, 2016, ["cat", "ant"], num_frames=3)
    sets = tmp_path / "ImageSets"
    (sets / "2016" / "val.txt").unlink()
    (sets / "val.txt").write_text("ant\n\n")
    names = [sequence.name for sequence in load_dataset_layout("davis2016", tmp_path).sequences]
    assert names == ["ant"]
    (sets / "2016" / "val.txt").write_text("/JPEGImages/480p/cat/00000.jpg /Annotations/480p/cat/00000.png\n" * 2)
    assert [sequence.name for sequence in load_dataset_layout("davis2016", tmp_path).sequences] == ["cat"]
    with pytest.raises(ValueError, match=r"`split` must have a file .*train.txt, got 'train'; there is 2016/val.txt"):
        load_dataset_layout("davis2016", tmp_path, split="train")


def test_davis_without_split_files_takes_all(tmp_path):
    make_davis(tmp_path, 2017, ["cat", "ant"], num_frames=3)
    (tmp_path / "ImageSets" / "2017" / "val.txt").unlink()
    names = [sequence.name for sequence in load_dataset_layout("davis2017", tmp_path).sequences]
    assert names == ["ant", "cat"]


@pytest.mark.parametrize(("year", "objects"), [(2016, (255,)), (2017, (1, 2))])
def test_an_empty_first_mask_is_named(tmp_path, year, objects):
    root = make_davis(tmp_path, year, ["cat", "ant"], num_frames=4, object_ids=objects)
    write_mask(root / "Annotations" / "480p" / "ant" / "00000.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(ValueError, match=r"'ant' must show its objects in the first frame, got an empty 00000\.png"):
        load_dataset_layout(f"davis{year}", root)


def test_only_first_masks_is_no_ground_truth(tmp_path):
    dataset = load_dataset_layout(
        "davis2017", make_davis(tmp_path, 2017, ["cat"], annotated=[0], split="test-dev"), "test-dev"
    )
    assert not dataset.has_ground_truth
    assert dataset.sequences[0].scored_frames == []


def test_broken_copies_are_named(tmp_path):
    make_davis(tmp_path, 2017, ["cat"], annotated=[0, 1, 3, 4, 5, 6])
    with pytest.raises(ValueError, match=r"lacks 1 of 7, the first being 00002.png"):
        load_dataset_layout("davis2017", tmp_path)
    frame = tmp_path / "JPEGImages" / "480p" / "cat" / "00003.jpg"
    frame.rename(tmp_path / "elsewhere.jpg")
    for layout in ("davis2017", "folder"):
        with pytest.raises(ValueError, match=r"a frame for every mask: .*/cat lacks 1, the first being 00003"):
            load_dataset_layout(layout, tmp_path, max_frames=2)
    (tmp_path / "elsewhere.jpg").rename(frame)
    (tmp_path / "Annotations" / "480p" / "cat" / "00000.png").unlink()
    with pytest.raises(ValueError, match=r"'cat' must have the mask of its first frame"):
        load_dataset_layout("davis2017", tmp_path)
    with pytest.raises(ValueError, match=r"`sequences` must be of .*cat.*, got dog"):
        load_dataset_layout("davis2017", tmp_path, sequences=["cat", "dog"])
    with pytest.raises(ValueError, match=r"which does not exist"):
        load_dataset_layout("davis2017", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`dataset` must be one of davis2016, .* got 'davis'"):
        load_dataset_layout("davis", tmp_path)


@pytest.mark.parametrize("form", ["palette01", "grey255", "grey1", "bit", "rgb"])
def test_davis2016_masks_in_every_form(tmp_path, form):
    mask = moving_squares(0, [1]) > 0
    path = tmp_path / "mask.png"
    if form == "palette01":
        image = Image.fromarray(mask.astype(np.uint8)).convert("P")
        image.putpalette(PALETTE)
    elif form == "grey255":
        image = Image.fromarray(mask.astype(np.uint8) * 255)
    elif form == "grey1":
        image = Image.fromarray(mask.astype(np.uint8))
    elif form == "bit":
        image = Image.fromarray(mask)
    else:
        image = Image.fromarray(np.stack([mask * np.uint8(255)] * 3, axis=-1))
    image.save(path)
    sequence = EvaluationSequence("s", (), {}, (TrackedObject(1, "00000"),), (), binary=True)
    np.testing.assert_array_equal(sequence.read_ids(path), mask.astype(np.uint8))


def test_unreadable_masks_are_named(tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"mask.png must be a palette or grey image .* got mode RGB"):
        read_ids(path)
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"ids from 0 to 255, got 300"):
        read_ids(path)
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"mask.png must be an image file"):
        read_ids(path)


def test_a_folder_has_the_splits_that_are_listed(tmp_path):
    make_davis(tmp_path, 2017, ["cat", "ant"], num_frames=3)
    (tmp_path / "ImageSets" / "trainval.txt").write_text("cat\nant\n")
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("cat\n")
    for split, names, recorded in (
        (None, ["ant", "cat"], "all"),
        ("val", ["cat"], "val"),
        ("trainval", ["cat", "ant"], "trainval"),
    ):
        dataset = load_dataset_layout("folder", tmp_path, split)
        assert ([sequence.name for sequence in dataset.sequences], dataset.split) == (names, recorded)
    with pytest.raises(ValueError, match=r"`split` must have a file .*ImageSets/test.txt, got 'test'; leave it out"):
        load_dataset_layout("folder", tmp_path, "test")
    with pytest.raises(ValueError, match=r"`sequences` must be of .*, split 'val' \(cat\), got ant"):
        load_dataset_layout("folder", tmp_path, "val", ["ant"])
    assert load_dataset_layout("davis2017", tmp_path).split == "val"


def test_folder_with_late_object_and_sparse_masks(tmp_path):
    for time in range(9):
        write_frame(tmp_path / "JPEGImages" / "clip" / f"frame{time}.jpg", time)
        if time % 2 == 0:
            ids = moving_squares(time, [1] if time < 4 else [1, 5])
            write_mask(tmp_path / "Annotations" / "clip" / f"frame{time}.png", ids)
    sequence = load_dataset_layout("folder", tmp_path).sequences[0]
    assert not sequence.binary
    assert [(item.object_id, item.first_frame, item.scored_frames) for item in sequence.objects] == [
        (1, "frame0", ("frame2", "frame4", "frame6")),
        (5, "frame4", ("frame6",)),
    ]
    assert set(np.unique(sequence.given_mask("frame4"))) == {0, 5}


def test_folder_frames_are_in_natural_order(tmp_path):
    for time in range(11):
        write_frame(tmp_path / "JPEGImages" / "clip" / f"frame{time}.jpg", time)
    write_mask(tmp_path / "Annotations" / "clip" / "frame0.png", moving_squares(0, [1]))
    sequence = load_dataset_layout("folder", tmp_path).sequences[0]
    assert [path.stem for path in sequence.images] == [f"frame{time}" for time in range(11)]


def test_folder_255_is_object_alone_and_void_beside_ids(tmp_path):
    for name, other in (("alone", 255), ("beside", 1)):
        for time in range(4):
            write_frame(tmp_path / "JPEGImages" / name / f"{time:05d}.jpg", time)
            ids = moving_squares(time, [other])
            ids[40:, :10] = 255
            write_mask(tmp_path / "Annotations" / name / f"{time:05d}.png", ids)
    alone, beside = load_dataset_layout("folder", tmp_path).sequences
    assert (alone.binary, alone.object_ids) == (True, [1])
    assert (beside.binary, beside.object_ids) == (False, [1])
    assert set(np.unique(beside.given_mask("00000"))) == {0, 1}


def test_youtube_vos_layout(tmp_path):
    first, second = load_dataset_layout("youtubevos2019", make_youtube_vos(tmp_path, complete=True)).sequences
    assert first.output_frames == tuple(f"{time:05d}" for time in range(0, 30, 5))
    assert [(item.object_id, item.first_frame, item.category) for item in first.objects] == [
        (1, "00000", "dog"),
        (2, "00010", "axolotl"),
    ]
    assert first.objects[1].scored_frames == ("00015", "00020", "00025")
    assert second.objects[1].scored_frames == ("00010",)
    assert second.max_short_side == 624


def test_youtube_vos_validation_has_first_masks_only(tmp_path):
    dataset = load_dataset_layout("youtubevos2018", make_youtube_vos(tmp_path, complete=False))
    assert not dataset.has_ground_truth
    assert dataset.seen_categories == YOUTUBE_VOS_SEEN_CATEGORIES
    assert len(YOUTUBE_VOS_SEEN_CATEGORIES) == 65
    # The part of the data set may also be given itself.
    assert load_dataset_layout("youtubevos2018", tmp_path / "valid").sequences == dataset.sequences


def test_a_part_of_youtube_vos_is_no_other_part(tmp_path, monkeypatch):
    part = make_youtube_vos(tmp_path, complete=False, all_frames=True) / "valid"
    for split in (None, "val", "valid"):
        assert load_dataset_layout("youtubevos2018", part, split).split == "val"
    with pytest.raises(ValueError, match=r"`split` chooses a part of YouTube-VOS, got 'train', and .* is a part"):
        load_dataset_layout("youtubevos2018", part, "train")
    part.rename(tmp_path / "ytvos-2018")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "valid").symlink_to(tmp_path / "ytvos-2018")
    shutil.copytree(tmp_path / "valid_all_frames", tmp_path / "links" / "valid_all_frames")
    for split in (None, "val"):
        assert load_dataset_layout("youtubevos2018", tmp_path / "ytvos-2018", split).split == "val"
        linked = load_dataset_layout("youtubevos2018", tmp_path / "links" / "valid", split, all_frames=True)
        assert linked.split == "val"
    (tmp_path / "ytvos-2018").rename(part)
    monkeypatch.chdir(part)
    assert load_dataset_layout("youtubevos2018", ".", "val", all_frames=True).split == "val"


def test_youtube_vos_broken_copies_are_named(tmp_path):
    root = make_youtube_vos(tmp_path, complete=True)
    mask = root / "valid" / "Annotations" / "aaa" / "00015.png"
    mask.rename(tmp_path / "elsewhere.png")
    with pytest.raises(
        ValueError, match=r"'aaa' must have a mask for every frame .* lacks 1, the first being 00015.png"
    ):
        load_dataset_layout("youtubevos2019", root)
    (tmp_path / "elsewhere.png").rename(mask)
    (root / "valid" / "JPEGImages" / "aaa" / "00015.jpg").unlink()
    with pytest.raises(ValueError, match=r"'aaa' must have every frame of meta.json: .* lacks 00015"):
        load_dataset_layout("youtubevos2019", root)
    with pytest.raises(ValueError, match=r"`all_frames` needs .*valid_all_frames"):
        load_dataset_layout("youtubevos2019", root, all_frames=True)
    (root / "valid" / "meta.json").write_text('{"videos": {"aaa": {}}}')
    with pytest.raises(ValueError, match=r"must be JSON of the form"):
        load_dataset_layout("youtubevos2019", root)
    (root / "valid" / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"YouTube-VOS needs .*meta.json"):
        load_dataset_layout("youtubevos2019", root)


def test_seen_categories_are_those_of_the_benchmark_whatever_part_of_its_training_set_there_is(tmp_path):
    make_youtube_vos(tmp_path, complete=False)
    (tmp_path / "train").mkdir()
    meta = {"videos": {"x": {"objects": {"1": {"category": "axolotl", "frames": ["00000"]}}}}}
    (tmp_path / "train" / "meta.json").write_text(json.dumps(meta))
    assert load_dataset_layout("youtubevos2019", tmp_path).seen_categories == YOUTUBE_VOS_SEEN_CATEGORIES


def test_short_side_is_limited_to_1_3_times_480():
    assert limit_short_side(Image.new("RGB", (1280, 720)), 624).size == (1109, 624)
    assert limit_short_side(Image.new("RGB", (1080, 1920)), 624).size == (624, 1109)
    image = Image.new("RGB", (854, 480))
    assert limit_short_side(image, 624) is image
    assert limit_short_side(image, None) is image


# --- Runner ----------------------------------------------------------------------------------------------------------


def test_runner_scores_what_the_model_predicts(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat", "ant"]))
    result = run(dataset, config)
    for entry, sequence in zip(result.results, dataset.sequences, strict=True):
        assert entry.score.name == sequence.name
        for item in entry.score.objects:
            # A square of 12 columns that moved 3 columns a frame: 12 - 3t of 12 + 3t columns are common.
            expected = [max(12 - 3 * time, 0) / (12 + 3 * min(time, 4)) for time in range(1, 6)]
            assert item.region_per_frame == pytest.approx(expected)
        assert entry.timing.num_frames in (6, 7)
        assert entry.timing.network_size == SIZE
        assert entry.timing.frames_per_second > 0
        assert entry.timing.network_ms > 0
        assert entry.timing.peak_memory_bytes > 2**20
    assert result.facts.num_parameters == 54
    assert result.facts.macs == 54 * SIZE[0] * SIZE[1]
    assert (result.facts.macs_network_size, result.facts.macs_num_objects) == (SIZE, 2)


def test_ground_truth_scores_one(tmp_path):
    root = make_davis(tmp_path, 2017, ["cat"])
    dataset = load_dataset_layout("davis2017", root)
    scores = score_predictions(root / "Annotations" / "480p", dataset)
    summary = summarize(scores[0].objects)
    assert (summary.region_and_boundary, summary.region.decay, summary.boundary.recall) == (1.0, 0.0, 1.0)


def test_late_objects_are_given_before_their_frame(tmp_path, config):
    dataset = load_dataset_layout("youtubevos2019", make_youtube_vos(tmp_path, complete=True))
    models = []

    def loader(config):
        models.append(FakeModel())
        return models[0], FakeProcessor()

    result = evaluate(dataset, config, loader=loader)
    assert [session.calls for session in models[0].sessions] == [[(0, [1]), (2, [2])], [(0, [3]), (1, [7])]]
    assert all(
        session.frame_idx == len(seq.images)
        for session, seq in zip(models[0].sessions, dataset.sequences, strict=True)
    )
    assert [item.frames for item in result.results[0].score.objects] == [
        tuple(f"{time:05d}" for time in range(5, 30, 5)),
        ("00015", "00020", "00025"),
    ]


def test_large_youtube_vos_frames_are_scaled_down_but_their_masks_are_not(tmp_path, config):
    root = make_youtube_vos(tmp_path / "data", complete=False, size=(720, 960))
    dataset = load_dataset_layout("youtubevos2019", root, sequences=["bbb"], max_frames=3)
    result = run(dataset, RunnerConfig(config.model, device="cpu", save_masks=str(tmp_path / "out")))
    assert result.results[0].timing.network_size == (624, 832)
    assert read_ids(tmp_path / "out" / "bbb" / "00010.png").shape == (720, 960)


def test_frames_before_the_first_object_are_empty(tmp_path, config):
    for time in range(5):
        write_frame(tmp_path / "JPEGImages" / "clip" / f"{time:05d}.jpg", time)
        write_mask(
            tmp_path / "Annotations" / "clip" / f"{time:05d}.png", moving_squares(time, [4] if time > 1 else [])
        )
    dataset = load_dataset_layout("folder", tmp_path)
    config = RunnerConfig(config.model, device="cpu", save_masks=str(tmp_path / "out"))
    run(dataset, config)
    assert not read_ids(tmp_path / "out" / "clip" / "00001.png").any()
    np.testing.assert_array_equal(read_ids(tmp_path / "out" / "clip" / "00004.png"), moving_squares(2, [4]))


def test_given_masks_are_saved_to_the_pixel(tmp_path, config):
    class Generous(FakeProcessor):
        def post_process_id_map(self, output, original_size):
            return np.full(original_size, 2, np.int32)

    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat"]))
    saving = RunnerConfig(config.model, device="cpu", save_masks=str(tmp_path / "out"))
    evaluate(dataset, saving, loader=lambda config: (FakeModel(), Generous()))
    np.testing.assert_array_equal(read_ids(tmp_path / "out" / "cat" / "00000.png"), moving_squares(0, [1, 2]))
    assert (read_ids(tmp_path / "out" / "cat" / "00001.png") == 2).all()


def test_saved_masks_score_the_same(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat", "ant"]))
    result = run(dataset, RunnerConfig(config.model, device="cpu", save_masks=str(tmp_path / "out")))
    with Image.open(tmp_path / "out" / "cat" / "00000.png") as image:
        assert image.mode == "P"
        assert image.getpalette()[:12] == PALETTE
    assert score_predictions(tmp_path / "out", dataset) == [entry.score for entry in result.results]


def test_two_workers_equal_one(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat", "ant", "eel"], num_frames=5))
    seen = []
    one = run(dataset, config)
    two = run(dataset, config, num_workers=2, progress=lambda entry: seen.append(entry.score.name))
    assert [entry.score for entry in one.results] == [entry.score for entry in two.results]
    assert seen == ["cat", "ant", "eel"]
    assert two.facts == one.facts
    assert two.hardware["processes"] == 2


def test_resume_takes_up_whole_sequences_of_the_same_run(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat", "ant"]))
    out = tmp_path / "out"
    first = run(dataset, RunnerConfig(config.model, device="cpu", save_masks=str(out)))
    (out / "ant" / "00003.png").unlink()
    resumed = RunnerConfig(config.model, device="cpu", save_masks=str(out), resume=True)
    second = run(dataset, resumed)
    assert [entry.timing is None for entry in second.results] == [True, False]
    assert [entry.score for entry in second.results] == [entry.score for entry in first.results]
    assert second.facts.macs is not None
    assert all(entry.timing is None for entry in run(dataset, resumed).results)
    other = RunnerConfig(config.model, device="cpu", save_masks=str(out), resume=True, memory_interval=3)
    with pytest.raises(ValueError, match=r"was written with memory_interval None, got 3"):
        run(dataset, other)
    # Of the same names and lengths, and yet other videos.
    namesake = load_dataset_layout("davis2017", make_davis(tmp_path / "other", 2017, ["cat", "ant"], object_ids=(1,)))
    assert all(entry.timing is not None for entry in run(namesake, resumed).results)


def test_a_damaged_file_is_named(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat"]))
    for part, name in (("JPEGImages", "00002.jpg"), ("Annotations", "00003.png")):
        path = tmp_path / part / "480p" / "cat" / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=rf"{path} cannot be read \(.*\); copy it again"):
            run(dataset, config)
        path.write_bytes(data)
    assert run(dataset, config).results


def test_without_resume_old_masks_do_not_survive(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat", "ant"]))
    out = tmp_path / "out"
    saving = RunnerConfig(config.model, device="cpu", save_masks=str(out))
    run(dataset, saving)

    def fail(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(dataset, saving, loader=fail)
    assert not list(out.glob("*/*.png"))


def test_short_side_and_dtype_reach_processor_and_model(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat"], num_frames=4))
    seen = []

    class Model(FakeModel):
        def forward(self, inference_session, frame, frame_idx=None):
            seen.append((frame.dtype, tuple(frame.shape), inference_session.dtype))
            return super().forward(inference_session, frame)

    config = RunnerConfig(config.model, device="cpu", dtype="bfloat16", short_side=32)
    evaluate(dataset, config, loader=lambda config: (Model().to(torch.bfloat16), FakeProcessor()))
    assert set(seen) == {(torch.bfloat16, (3, 32, 32), torch.bfloat16)}


def test_max_frames_cuts_the_sequence(tmp_path, config):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat"]), max_frames=4)
    result = run(dataset, config)
    assert result.results[0].score.objects[0].frames == ("00001", "00002")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int8"}, "`dtype` must be one of float32, .* got 'int8'"),
        ({"short_side": 0}, "`short_side` must be at least 1, got 0"),
        ({"resume": True}, "`resume` takes up the masks in `save_masks`"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        RunnerConfig(model="m", **values)


def test_bad_device_is_named(tmp_path):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat"], num_frames=3))
    with pytest.raises(ValueError, match=r"`device` must be .* got 'toaster'"):
        run(dataset, RunnerConfig(model=str(tmp_path), device="toaster"))


def test_peak_memory_is_of_this_process():
    assert 2**20 < peak_memory() < 2**40


def test_real_model_runs_through_the_public_interface(tmp_path, tiny_model, tiny_processor):
    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    root = make_davis(tmp_path / "data", 2017, ["cat"], num_frames=5)
    dataset = load_dataset_layout("davis2017", root)
    config = RunnerConfig(str(tmp_path / "model"), device="cpu", short_side=32, memory_interval=3)
    result = evaluate(dataset, config)
    assert result.results[0].timing.network_size[0] == 33
    assert len(result.weights_sha256) == 64
    assert result.facts.macs > result.facts.num_parameters > 1000
    # The model that runs is folded; what is stated is what the checkpoint holds.
    assert result.facts.num_parameters == sum(parameter.numel() for parameter in tiny_model.parameters())
    changed = RunnerConfig(
        str(tmp_path / "model"), device="cpu", overrides={"use_offsets": False, "long_term_slots": 1}
    )
    model, _ = load_pretrained(changed)
    assert (model.config.use_offsets, model.config.long_term_slots) == (False, 1)
    for overrides, message in (
        ({"memory_interval": 0}, "`memory_interval` must be at least 1, got 0"),
        ({"short_term_window": 4}, "`short_term_window` must be odd"),
        (
            {"max_objects": 2},
            "does not fit its configuration: 3 weights are missing or of another shape, among them dec",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_pretrained(RunnerConfig(str(tmp_path / "model"), overrides=overrides))
    with pytest.raises(ValueError, match="no field use_offset;"):
        load_pretrained(RunnerConfig(str(tmp_path / "model"), overrides={"use_offset": False}))
    with pytest.raises(ValueError, match=r"(?s)does not take \{'memory_interval': 'abc'\}.*expected int, got str"):
        load_pretrained(RunnerConfig(str(tmp_path / "model"), overrides={"memory_interval": "abc"}))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", None])
def test_weights_that_did_not_arrive_are_named(tmp_path, tiny_model, content, capsys):
    tiny_model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    data = make_davis(tmp_path / "data", 2017, ["cat"], num_frames=3)
    words = ["--model", str(tmp_path / "model"), "--dataset", "davis2017", "--root", str(data), "--device", "cpu"]
    assert main(["evaluate", *words]) == 2
    assert re.search(r"error: The weights of .*model are damaged, .*`git lfs pull`", capsys.readouterr().err)


def test_an_exported_model_runs_and_is_recorded_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_deformvos.evaluation.runner.resolve_device", lambda device: torch.device("cuda"))
    (tmp_path / "deformvos_export.json").write_text("{}")
    assert device_of(RunnerConfig(str(tmp_path))) == torch.device("cpu")
    assert device_of(RunnerConfig(str(tmp_path / "model"))) == torch.device("cuda")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use_offsets=false", False),
        ("long_term_slots=2", 2),
        ("short_term_form=grid", "grid"),
        ("max_offset=1.5", 1.5),
    ],
)
def test_overrides_are_read_as_json_or_text(text, expected):
    assert evaluate_command.parse_override(text) == (text.split("=")[0], expected)
    with pytest.raises(ValueError, match="FIELD=VALUE"):
        evaluate_command.parse_override("use_offsets")


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `evaluate` or `score` as the command line would, with the pretended model."""
    monkeypatch.setattr("hf_deformvos.evaluation.runner.evaluate.__defaults__", (1, None, load_fake))
    (tmp_path / "model").mkdir()

    def call(*words):
        parser = argparse.ArgumentParser()
        subparsers = parser.add_subparsers()
        evaluate_command.add_parser(subparsers)
        score_command.add_parser(subparsers)
        words = [str(word) for word in words]
        monkeypatch.setattr("sys.argv", ["/somewhere/deformvos", *words])
        arguments = parser.parse_args(words)
        return arguments.run(arguments)

    return call


def test_evaluate_command(tmp_path, command, capsys):
    root = make_davis(tmp_path / "data", 2016, ["cat", "ant"], object_ids=(1,))
    report = tmp_path / "results" / "report.json"
    words = ["--dataset", "davis2016", "--root", root, "--device", "cpu", "--json", report, "--threads", 1]
    assert command("evaluate", "--model", tmp_path / "model", *words) == 0
    output = capsys.readouterr().out
    rows = [line.split() for line in output.splitlines()]
    assert rows[0] == [
        "sequence",
        "obj",
        "frames",
        "J&F",
        "J",
        "recall",
        "decay",
        "F",
        "recall",
        "decay",
        "FPS",
        "net",
        "ms",
    ]
    assert [row[0] for row in rows[2:4]] == ["cat", "ant"]
    assert "all 2 sequences" in output
    assert "parameters" in output and "peak memory" in output

    content = json.loads(report.read_text())
    assert content["command"].startswith("deformvos evaluate --model")
    assert content["weights_sha256"] is None
    assert content["config"]["dtype"] == "float32" and content["config"]["num_workers"] == 1
    assert content["hardware"]["threads_per_process"] == 1 and content["hardware"]["cpu"]
    assert set(content["versions"]) >= {"python", "torch", "transformers", "numpy", "hf_deformvos"}
    assert content["model"]["num_parameters"] == 54
    assert (content["dataset"]["num_frames"], content["dataset"]["split"]) == (14, "val")
    assert len(content["sequences"]) == 2
    item = content["sequences"][0]["objects"][0]
    assert item["frames"] == ["00001", "00002", "00003", "00004", "00005"]
    assert np.mean(item["J_per_frame"]) == pytest.approx(item["J"]["mean"])
    assert np.mean([entry["F"]["mean"] for entry in content["sequences"]]) == pytest.approx(
        content["totals"]["F"]["mean"]
    )
    totals = content["totals"]
    assert totals["J&F"] == pytest.approx((totals["J"]["mean"] + totals["F"]["mean"]) / 2)
    assert totals["frames_per_second"] > 0 and totals["peak_memory_bytes"] > 0
    assert content["sequences"][0]["timing"]["network_size"] == list(SIZE)


@pytest.mark.parametrize("place", ["JPEGImages/480p", "Annotations/480p"])
def test_masks_never_take_the_places_of_the_data_set(tmp_path, command, place):
    root = make_davis(tmp_path / "data", 2016, ["cat"], object_ids=(1,))
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    words = ["--dataset", "davis2016", "--root", root, "--device", "cpu", "--save-masks"]
    with pytest.raises(ValueError, match="`save_masks` must not be where the data set is"):
        command("evaluate", "--model", tmp_path / "model", *words, root / place)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match=r"`save_masks` must be a folder .*: Not a directory"):
        command("evaluate", "--model", tmp_path / "model", *words, root / "ImageSets" / "2016" / "val.txt")


def test_scores_are_written_though_nobody_reads_the_table(tmp_path, command, monkeypatch):
    root = make_davis(tmp_path / "data", 2016, ["cat", "ant"], object_ids=(1,))
    words = ["--model", tmp_path / "model", "--dataset", "davis2016", "--root", root, "--device", "cpu"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(os.dup(writer), "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        assert command("evaluate", *words, "--json", tmp_path / "scores.json") == 0
    assert len(json.loads((tmp_path / "scores.json").read_text())["sequences"]) == 2
    with open(os.dup(writer), "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        masks = ["--predictions", root / "Annotations" / "480p", "--dataset", "davis2016", "--root", root]
        assert command("score", *masks, "--json", tmp_path / "of-masks.json") == 0
    assert json.loads((tmp_path / "of-masks.json").read_text())["totals"]["J&F"] == 1.0
    with open(writer, "w") as unread:
        monkeypatch.setattr("sys.stdout", unread)
        with pytest.raises(BrokenPipeError):
            command("evaluate", *words)
        common.silence_output()  # what it still holds


def test_options_are_not_abbreviated(capsys):
    """Records and cards look for them by their names."""
    with pytest.raises(SystemExit):
        main(["evaluate", "--model", "m", "--dataset", "davis2016", "--root", "r", "--seq", "bear"])
    told = capsys.readouterr().err
    assert "unrecognized arguments: --seq bear" in told and told.startswith("usage: deformvos evaluate")


def test_youtube_vos_submission_has_the_layout_of_the_server(tmp_path, command, capsys):
    root = make_youtube_vos(tmp_path / "data", complete=False, all_frames=True)
    out = tmp_path / "out"
    words = [
        "evaluate",
        "--model",
        tmp_path / "model",
        "--dataset",
        "youtubevos2019",
        "--root",
        root,
        "--device",
        "cpu",
    ]
    assert command(*words, "--save-masks", out, "--all-frames") == 0
    assert "no scores" in capsys.readouterr().out
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert sorted(archive.namelist()) == sorted(
            [f"Annotations/aaa/{time:05d}.png" for time in range(0, 30, 5)]
            + [f"Annotations/bbb/{time:05d}.png" for time in range(0, 25, 5)]
        )
        with archive.open("Annotations/aaa/00015.png") as file, Image.open(file) as image:
            assert (image.mode, image.size) == ("P", SIZE[::-1])
            assert set(np.unique(np.array(image))) == {0, 1, 2}
        with archive.open("Annotations/aaa/00005.png") as file, Image.open(file) as image:
            assert set(np.unique(np.array(image))) == {0, 1}


def test_youtube_vos_seen_and_unseen_scores(tmp_path, command, capsys):
    root = make_youtube_vos(tmp_path / "data", complete=True)
    report = tmp_path / "report.json"
    words = ["--dataset", "youtubevos2018", "--root", root, "--json", report]
    assert command("evaluate", "--model", tmp_path / "model", "--device", "cpu", *words) == 0
    content = json.loads(report.read_text())
    classes = content["totals"]["classes"]
    by_class = {False: [], True: []}
    for sequence in content["sequences"]:
        for item in sequence["objects"]:
            by_class[item["category"] == "axolotl"].append((item["J"]["mean"], item["F"]["mean"]))
    seen, unseen = np.mean(by_class[False], axis=0), np.mean(by_class[True], axis=0)
    assert (classes["num_seen"], classes["num_unseen"]) == (3, 1)
    assert [classes["j_seen"], classes["f_seen"]] == pytest.approx(seen.tolist())
    assert [classes["j_unseen"], classes["f_unseen"]] == pytest.approx(unseen.tolist())
    assert classes["overall"] == pytest.approx(np.mean([seen, unseen]))
    assert "J unseen" in capsys.readouterr().out


def test_score_command_on_ground_truth(tmp_path, command, capsys):
    root = make_davis(tmp_path / "data", 2017, ["cat", "ant"])
    report = tmp_path / "report.json"
    words = ["--dataset", "davis2017", "--root", root, "--json", report]
    # Masks below Annotations/480p are found from above.
    assert command("score", "--predictions", root / "Annotations", *words) == 0
    assert "1.0000" in capsys.readouterr().out
    assert json.loads(report.read_text())["totals"]["J&F"] == 1.0


def test_score_command_agrees_with_oracle(tmp_path, command):
    benchmark = pytest.importorskip("vos_benchmark.benchmark").benchmark
    root = make_davis(tmp_path / "data", 2017, ["cat", "ant"], num_frames=9)
    truth = root / "Annotations" / "480p"
    for path in truth.glob("*/*.png"):
        write_mask(tmp_path / "pred" / path.parent.name / path.name, np.roll(read_ids(path), (1, 2), (0, 1)))
    report = tmp_path / "report.json"
    command("score", "--predictions", tmp_path / "pred", "--dataset", "davis2017", "--root", root, "--json", report)
    content = json.loads(report.read_text())
    _, (region,), (boundary,), (objects,) = benchmark(
        [str(truth)], [str(tmp_path / "pred")], num_processes=1, verbose=False
    )
    assert 100 * content["totals"]["J"]["mean"] == pytest.approx(region, abs=1e-6)
    assert 100 * content["totals"]["F"]["mean"] == pytest.approx(boundary, abs=1e-6)
    for sequence in content["sequences"]:
        for item in sequence["objects"]:
            assert 100 * item["F"]["mean"] == pytest.approx(objects[sequence["name"]][1][item["id"]], abs=1e-6)


def test_score_command_names_missing_files(tmp_path, command, capsys):
    root = make_davis(tmp_path / "data", 2017, ["cat", "ant"])
    dataset = load_dataset_layout("davis2017", root)
    for sequence in dataset.sequences:
        for frame in sequence.output_frames:
            write_mask(
                tmp_path / "pred" / sequence.name / f"{frame}.png", sequence.read_ids(sequence.annotations[frame])
            )
    words = ["score", "--predictions", tmp_path / "pred", "--dataset", "davis2017", "--root", root]
    # The first and the last frame are not scored and need not be there.
    (tmp_path / "pred" / "cat" / "00000.png").unlink()
    assert command(*words) == 0
    (tmp_path / "pred" / "cat" / "00004.png").unlink()
    (tmp_path / "pred" / "ant" / "00002.png").unlink()
    with pytest.raises(ValueError, match=r"2 have none: \S*cat/00004.png, \S*ant/00002.png"):
        command(*words)
    capsys.readouterr()
    assert command(*words, "--allow-missing", "--json", tmp_path / "report.json") == 0
    assert "cat: 1 missing masks count as empty: 00004" in capsys.readouterr().err
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["sequences"][0]["objects"][0]["J_per_frame"] == [1, 1, 1, 0, 1]
    assert content["sequences"][0]["missing"] == ["00004"]


def test_score_command_names_wrong_sizes_and_unknown_ids(tmp_path, command, capsys):
    root = make_davis(tmp_path / "data", 2017, ["cat"])
    dataset = load_dataset_layout("davis2017", root)
    for frame in dataset.sequences[0].output_frames:
        ids = dataset.sequences[0].read_ids(dataset.sequences[0].annotations[frame])
        ids[-3:, -3:] = 9
        write_mask(tmp_path / "pred" / "cat" / f"{frame}.png", ids)
    words = ["score", "--predictions", tmp_path / "pred", "--dataset", "davis2017", "--root", root]
    assert command(*words) == 0
    assert "no object there count as background: 9 (in 5 frames)" in capsys.readouterr().err
    write_mask(tmp_path / "pred" / "cat" / "00002.png", np.zeros((48, 60), np.uint8))
    with pytest.raises(ValueError, match=r"00002.png is 48x60 instead of 48x64"):
        command(*words)
    words[2] = root / "ImageSets"
    with pytest.raises(ValueError, match=r"must hold a folder of masks named like each sequence"):
        command(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["score", "--predictions", "{data}", "--root", "{data}", "--dataset", "davis2017", "--json", "{data}"],
            "{data} cannot be written (it is a folder); name another file.",
        ),
        (
            ["score", "--predictions", "{data}/x/y", "--root", "{data}"],
            "--predictions must be a folder of masks, got '{data}/x/y', which does not exist.",
        ),
        (
            ["evaluate", "--model", "m", "--root", "{data}", "--dataset", "davis2017", "--split", "test"],
            "--split must have a file",
        ),
        (
            ["evaluate", "--model", "m", "--root", "{data}", "--dataset", "davis2017", "--resume"],
            "--resume takes up the masks in --save-masks, which is not set",
        ),
        (
            ["evaluate", "--model", "m", "--root", "{data}", "--dataset", "folder", "--split", "test"],
            "--split must have a file {data}/ImageSets/test.txt, got 'test'; leave it out to take every sequence.",
        ),
        (
            ["score", "--predictions", "{data}", "--root", "{data}", "--dataset", "folder", "--split", "test"],
            "--split must have a file {data}/ImageSets/test.txt, got 'test'; leave it out to take every sequence.",
        ),
        (
            ["evaluate", "--model", "m", "--dataset-name", "set", "--split", "train"],
            "--split belongs to folders, got 'train' with --dataset-name; give a data set's part as --dataset-split.",
        ),
        (
            ["evaluate", "--model", "m", "--root", "{data}", "--dataset", "davis2017", "--dataset-split", "train"],
            "--dataset-split belongs to --dataset-name, got 'train' with --root; give a folder's part as --split.",
        ),
        (
            ["evaluate", "--model", "m", "--root", "{data}", "--dataset", "davis2017", "--dataset-streaming"],
            "--dataset-streaming belongs to --dataset-name: the folder of --root is read as it is.",
        ),
        (
            ["evaluate", "--model", "m", "--dataset-name", "set", "--dataset", "youtubevos2019"],
            "`protocol` (--dataset) must be one of davis2016, davis2017, folder for a data set, got 'youtubevos2019'.",
        ),
    ],
)
def test_errors_name_options_as_they_are_typed(words, message, tmp_path, capsys):
    data = make_davis(tmp_path / "data", 2017, ["cat"])
    assert main([word.format(data=data) for word in words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(data=data)}")


def test_precision_of_an_exported_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_deformvos.inference.fastest_dtype", lambda device_type: "bfloat16")
    data, model = make_davis(tmp_path / "data", 2017, ["cat"], num_frames=3), tmp_path / "exported"
    model.mkdir()
    (model / "deformvos_export.json").write_text("{}")
    words = ["evaluate", "--model", str(model), "--root", str(data), "--dataset", "davis2017", "--device", "cpu"]
    for option, value, asked in (
        ("--preset", "standard", "--preset standard, which is bfloat16 here"),
        ("--dtype", "float16", "--dtype float16"),
    ):
        assert main([*words, option, value]) == 2
        told = f"error: The exported model {model} takes float32, got {asked}; pass --dtype float32.\n"
        assert capsys.readouterr().err == told


def test_memory_that_ends_is_one_line_with_advice(tmp_path, capsys, monkeypatch):
    def load(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr("hf_deformvos.evaluation.runner.evaluate.__defaults__", (1, None, load))
    data = make_davis(tmp_path / "data", 2017, ["cat"], num_frames=3)
    words = ["evaluate", "--model", str(tmp_path), "--root", str(data), "--dataset", "davis2017", "--device", "cpu"]
    assert main(words) == 2
    told = "error: the device ran out of memory (CUDA out of memory. Tried to allocate 2 GiB.); lower --short-side,"
    assert capsys.readouterr().err.startswith(told)


def test_an_ambiguous_option_is_named_only_if_it_was_typed():
    usage = "usage: deformvos evaluate [-h] --model DIR [--split SPLIT] [--dataset-split SPLIT]"
    for words, expected in (
        (["--dataset-split", "x"], "--dataset-split is x, `other` is not"),
        (["--split=x"], "--split is x, `other` is not"),
        ([], "`split` is x, `other` is not"),
    ):
        assert as_typed("`split` is x,\n`other` is not", usage, words) == expected


def test_score_without_ground_truth_is_an_error(tmp_path, command):
    root = make_youtube_vos(tmp_path, complete=False)
    with pytest.raises(ValueError, match=r"has nothing to score against"):
        command("score", "--predictions", root / "valid", "--dataset", "youtubevos2019", "--root", root)


def test_void_counts_for_nothing_in_davis2017(tmp_path, command):
    root = make_davis(tmp_path / "data", 2017, ["cat"], num_frames=5)
    dataset = load_dataset_layout("davis2017", root)
    for frame in dataset.sequences[0].output_frames:
        path = dataset.sequences[0].annotations[frame]
        ids = read_ids(path)
        ids[36:44, 4:20] = 255
        write_mask(path, ids)
        ids[36:44, 4:20] = 1
        write_mask(tmp_path / "pred" / "cat" / f"{frame}.png", ids)
    scores = score_predictions(tmp_path / "pred", load_dataset_layout("davis2017", root))
    assert summarize(scores[0].objects).region_and_boundary == 1.0
    assert [item.object_id for item in scores[0].objects] == [1, 2]


@pytest.mark.parametrize("year", [2016, 2017])
def test_score_command_guesses_the_data_set(tmp_path, command, capsys, year):
    root = make_davis(tmp_path / "data", year, ["cat"], num_frames=4)
    assert command("score", "--predictions", root / "Annotations", "--root", root) == 0
    assert f"scored as davis{year}" in capsys.readouterr().out


def test_guess_dataset(tmp_path):
    assert guess_dataset(make_youtube_vos(tmp_path / "y", complete=False)) == "youtubevos2019"
    write_mask(tmp_path / "f" / "Annotations" / "clip" / "00000.png", moving_squares(0, [1]))
    assert guess_dataset(tmp_path / "f") == "folder"
    with pytest.raises(ValueError, match=r"`root` must be the folder of a data set"):
        guess_dataset(tmp_path)


def test_model_that_is_no_folder_is_named(tmp_path):
    dataset = load_dataset_layout("davis2017", make_davis(tmp_path, 2017, ["cat"], num_frames=3))
    with pytest.raises(ValueError, match=r"model is a folder or a Hub repository .* got '/no/where'"):
        run(dataset, RunnerConfig(model="/no/where", device="cpu"))


def test_sequences_may_be_separated_by_commas(tmp_path, command, capsys):
    root = make_davis(tmp_path / "data", 2017, ["cat", "ant", "eel"], num_frames=4)
    words = ["--predictions", root / "Annotations", "--dataset", "davis2017", "--root", root]
    assert command("score", *words, "--sequences", "eel,cat") == 0
    assert "all 2 sequences" in capsys.readouterr().out


# --- Processes -------------------------------------------------------------------------------------------------------


def is_running(pid):
    """Whether a process is there and no zombie, as a killed one is until somebody asks for its code."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_for(condition, seconds=60):
    """Whether something becomes true in time."""
    deadline = monotonic() + seconds
    while not condition() and monotonic() < deadline:
        sleep(0.1)
    return condition()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_when_the_process_that_started_them_is_killed(tmp_path):
    (tmp_path / "slow_task.py").write_text(
        "import os, pathlib, time\n"
        "def work(number):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'pid-{{number}}').write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import slow_task\n"
        "from hf_deformvos.evaluation.scoring import map_in_processes\n"
        "if __name__ == '__main__':\n"
        "    list(map_in_processes(slow_task.work, [(0,), (1,)], 2))\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})
    notes = [tmp_path / f"pid-{number}" for number in range(2)]
    try:
        assert wait_for(lambda: all(note.is_file() and note.read_text() for note in notes))
        workers = [int(note.read_text()) for note in notes]
        assert all(map(is_running, workers))
    finally:
        process.kill()
        process.wait()
    ended = wait_for(lambda: not any(map(is_running, workers)), seconds=20)
    for pid in filter(is_running, workers):
        os.kill(pid, signal.SIGKILL)
    assert ended
