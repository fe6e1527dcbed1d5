"""Whether adapted weights are trusted with a video: how both ways through it are compared, and what is kept."""

import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_adaptation import SHORT, call, clip, davis, evaluate, model_dir, weights_of  # noqa: F401  fixtures among them

from hf_deformvos.adaptation import adapt, adapt_to_video, round_trip, round_trip_agreement
from hf_deformvos.cli.speed import CHECK_FRAMES
from hf_deformvos.evaluation.runner import RunnerConfig
from hf_deformvos.evaluation.streamed import evaluate_hub_dataset


WIDTH = 20


@dataclass
class Shrinking:
    """
    A model and its processor whose objects lose a column a step, on either way; an object that is gone stays so.

    Attributes:
        lost (`int`, *optional*): an object that is not found again after its first step.
    """

    lost: int | None = None
    device, dtype = torch.device("cpu"), torch.float32

    def init_video_session(self, video, device, dtype):
        return SimpleNamespace(ids=None)

    def add_inputs_to_inference_session(self, session, frame_idx, input_masks):
        found = np.zeros_like(input_masks) if session.ids is None else session.ids
        found = np.where(np.isin(found, input_masks), 0, found)
        session.ids, session.is_given = np.where(input_masks > 0, input_masks, found), True

    def __call__(self, images=None, return_tensors=None, inference_session=None, frame=None):
        if inference_session is None:
            return SimpleNamespace(pixel_values=[torch.zeros(1)], original_sizes=[images.shape[:2]])
        session = inference_session
        if not session.is_given:
            ids = session.ids
            last = np.array([ids[row].nonzero()[0].max(initial=-1) for row in range(len(ids))])
            ids = np.where(np.arange(ids.shape[1]) == last[:, None], 0, ids)
            session.ids = np.where(ids == self.lost, 0, ids) if self.lost else ids
        session.is_given = False
        return session.ids

    @staticmethod
    def post_process_id_map(output, original_size):
        return output


def bars(**widths) -> np.ndarray:
    """An id map with a row for each object, as wide as said."""
    ids = np.zeros((len(widths), WIDTH), int)
    for row, (name, width) in enumerate(widths.items()):
        ids[row, :width] = int(name[1:])
    return ids


def overlap_of_both_ways(width: int, turn: int) -> float:
    """Of a bar that loses a column a step: at frame t it has `width - t` columns there, coming back t - 2 * turn."""
    return float(np.mean([(width - 2 * turn + t) / (width - t) for t in range(turn)]))


def frames_of(count: int, ids: np.ndarray) -> list[np.ndarray]:
    return [np.zeros((*ids.shape, 3), np.uint8)] * count


def test_agreement_is_the_overlap_on_both_ways():
    ids = bars(o7=20, o300=15)
    model = Shrinking()
    expected = [overlap_of_both_ways(width, turn) for turn in (2, 4) for width in (20, 15)]
    found = round_trip_agreement(model, model, frames_of(5, ids), {0: ids})
    assert found == pytest.approx(np.mean(expected), abs=1e-9)


def test_an_object_that_is_lost_counts_nothing():
    ids = bars(o1=20, o2=15)
    found = round_trip_agreement(Shrinking(lost=2), Shrinking(lost=2), frames_of(5, ids), {0: ids})
    assert found == pytest.approx(np.mean([overlap_of_both_ways(20, turn) / 2 for turn in (2, 4)]), abs=1e-9)
    alone = bars(o2=15)
    assert round_trip_agreement(Shrinking(lost=2), Shrinking(lost=2), frames_of(5, alone), {0: alone}) == 0.0


def test_masks_further_on_count_on_the_way_there():
    ids = bars(o1=10)
    model = Shrinking()
    # Two columns at the end either way: 10, 2 there and 3, 2 back from the end of two frames.
    found = round_trip_agreement(model, model, frames_of(2, ids), {0: ids, 1: bars(o1=2)})
    assert found == pytest.approx(1 / 10)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_shortest_videos_have_an_agreement(count, tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    found = round_trip_agreement(tiny_model, tiny_processor, frames[:count], {0: ids[0]})
    assert 0.0 <= found <= 1.0 and (count > 1 or found == 1.0)


@pytest.mark.parametrize(
    ("agreements", "share"), [((0.9, 0.881), 1.0), ((0.9, 0.87, 0.95), 0.75), ((0.9, 0.87, 0.5), 0.0)]
)
def test_as_much_is_kept_as_agrees(agreements, share, tiny_model, tiny_processor, tiny_clip, monkeypatch):
    frames, ids = tiny_clip
    asked, answers = [], iter(agreements)

    def agreement(model, processor, frames, masks, size):
        asked.append((model.backbone.is_folded, len(frames), sorted(masks)))
        return next(answers)

    monkeypatch.setattr(round_trip, "round_trip_agreement", agreement)
    before = weights_of(tiny_model)
    made, kept = adapt_to_video(
        tiny_model, tiny_processor, frames, {0: ids[0], 5: ids[5]}, replace(SHORT, check_frames=4)
    )
    assert kept == share and asked == [(True, 4, [0, 5])] * len(agreements)
    expected = adapt(tiny_model, [frames[0], frames[5]], [ids[0], ids[5]], replace(SHORT, blend=share))
    wanted = expected.state_dict()
    assert all(torch.allclose(tensor, wanted[name], atol=1e-7) for name, tensor in made.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    assert not made.training and not made.backbone.is_folded


def test_without_a_check_the_share_is_trusted(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    made, kept = adapt_to_video(tiny_model, tiny_processor, frames[:1], {0: ids[0]}, SHORT)
    wanted = adapt(tiny_model, [frames[0]], [ids[0]], SHORT).state_dict()
    assert kept == SHORT.share == 0.75 and replace(SHORT, draws=2).share == 1.0
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.state_dict().items())


def test_a_model_in_training_mode_is_adapted_too(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    config = replace(SHORT, check_frames=3, blend=1.0)
    made, share = adapt_to_video(tiny_model.train(), tiny_processor, frames, {0: ids[0]}, config)
    assert tiny_model.training and not made.training and share in (0.0, 1.0)


def test_the_first_frame_needs_a_mask(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    for given in ([2], [-1, 0], []):
        masks = dict.fromkeys(given, ids[0])
        for follow in (adapt_to_video, round_trip_agreement):
            with pytest.raises(ValueError, match=rf"one of the first frame, 0, .* {re.escape(str(given))}"):
                follow(tiny_model, tiny_processor, frames, masks)
    with pytest.raises(ValueError, match=r"`masks` must be a whole number, got 1\.5"):
        adapt_to_video(tiny_model, tiny_processor, frames, {0: ids[0], 1.5: ids[1]})
    with pytest.raises(ValueError, match=r"Every mask needs its frame; those of \[0, 6\]"):
        adapt_to_video(tiny_model, tiny_processor, frames, {0: ids[0], len(frames): ids[1]})
    with pytest.raises(ValueError, match="There must be a frame"):
        round_trip_agreement(tiny_model, tiny_processor, [], {0: ids[0]})


def test_an_agreement_keeps_frames_as_the_network_sees_them(tiny_model, tiny_processor, tiny_clip):
    """And id maps in the few bytes that they take, whatever their ids."""
    frames, ids = tiny_clip
    pixels, size = round_trip._prepared(
        tiny_model.bfloat16(), tiny_processor, np.kron(frames[0], np.ones((8, 8, 1), np.uint8)), None
    )
    assert pixels.dtype == torch.bfloat16 and pixels.nbytes < 1e6 and tuple(size) == tuple(8 * n for n in ids[0].shape)
    for values in (ids[0], ids[0].astype(np.int32) * 70_000, np.zeros((3, 5), np.int32)):
        packed = round_trip._packed(values)
        assert np.array_equal(round_trip._unpacked(packed), values) and len(packed[0]) < values.nbytes


# --- Commands --------------------------------------------------------------------------------------------------------


def test_evaluate_says_what_it_kept(davis, model_dir, tmp_path, monkeypatch):  # noqa: F811
    report = evaluate(davis, model_dir, tmp_path, monkeypatch, "--adapt-check", "--adapt-steps", "2")
    assert report["config"]["adaptation"]["check_frames"] == CHECK_FRAMES
    shares = [sequence["timing"]["adapted_share"] for sequence in report["sequences"]]
    assert len(shares) == 2 and set(shares) <= {0.0, 0.75, 1.0}


def test_evaluate_looks_at_the_frames_from_the_first_given_one_on(davis, model_dir, tmp_path, monkeypatch):  # noqa: F811
    seen = []

    def agreement(model, processor, frames, masks, size):
        seen.append(frames)
        return 1.0

    monkeypatch.setattr(round_trip, "round_trip_agreement", agreement)
    words = ("--adapt-check", "--adapt-steps", "1", "--sequences", "ant", "--short-side", "96")
    evaluate(davis, model_dir, tmp_path, monkeypatch, *words)
    files = sorted((davis / "JPEGImages" / "480p" / "ant").glob("*.jpg"))
    assert len(seen) == 2 and len(seen[0]) == len(files) == 3
    for frame, file in zip(seen[0], files, strict=True):
        assert np.array_equal(np.asarray(frame), np.asarray(Image.open(file)))


def test_a_stream_of_rows_cannot_be_checked(model_dir):  # noqa: F811
    config = RunnerConfig(str(model_dir), adaptation=replace(SHORT, check_frames=8))
    with pytest.raises(ValueError, match=r"`check_frames` \(--adapt-check\) looks ahead, and a data set"):
        evaluate_hub_dataset("nowhere", config)


@pytest.mark.parametrize("kept", [1.0, 0.0])
def test_segment_says_what_it_kept(kept, clip, model_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    frames, first, third = clip
    answers = iter([0.5, kept, kept])
    shown = []

    def agreement(model, processor, frames, masks, size):
        shown.append((len(frames), sorted(masks)))
        return next(answers)

    monkeypatch.setattr(round_trip, "round_trip_agreement", agreement)
    masks = ("--mask", first, "--mask-frame", 1, "--mask", third, "--mask-frame", 2)
    words = ("segment", frames, *masks, "--model", model_dir, "--device", "cpu", "--adapt-steps", "1", "--adapt-check")
    assert call(*words, "--output", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert f"Followed there and back: {kept:.0%} of what was learned is kept." in capsys.readouterr().err
    adaptation = json.loads((tmp_path / "out" / "results.json").read_text())["model"]["adaptation"]
    assert (adaptation["share"], adaptation["check_frames"]) == (kept, CHECK_FRAMES)
    assert all(entry == (2, [0, 1]) for entry in shown), "two frames from the first given one on"
