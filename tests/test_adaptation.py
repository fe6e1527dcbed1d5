"""Adapting a model to given frames: the clips it learns from, what it learns, what stays as it is, the commands."""

import argparse
import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIG
from PIL import Image
from synthetic import COLOURS, draw_scene, write_davis

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor
from hf_deformvos.adaptation import (
    Adaptation,
    AdaptationConfig,
    GivenFrames,
    adapt,
    at_followed_size,
    fill_objects,
)
from hf_deformvos.adaptation.adapt import _clip_size, _prepare
from hf_deformvos.cli import main
from hf_deformvos.cli.speed import (
    adaptation_config,
    add_adaptation_arguments,
    add_speed_arguments,
    resolve_speed,
)
from hf_deformvos.data import ClipSpec
from hf_deformvos.data.transforms import IMAGENET_MEAN, IMAGENET_STD, recompose
from hf_deformvos.inference import size_option
from hf_deformvos.training.task import SegmentationTask, StepPlan, step_generator


# Enough for the tiny model, which has not been trained before, to begin to tell colours apart.
LEARNS = AdaptationConfig(steps=40, learning_rate=5e-3, short_side=97, num_frames=3, batch_size=2)
SHORT = AdaptationConfig(steps=2, short_side=65, num_frames=3, batch_size=2)
SPEC = ClipSpec((97, 161), frames=4, batch=4)


def scene(boxes=None):
    """A red object on gray noise."""
    return draw_scene(96, 160, boxes or {1: (30, 20, 80, 70)})


def draw(frames: GivenFrames, index: int):
    """Batch `index`, colours as they are in a picture."""
    batch = frames(index, step_generator(0, index))
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return batch, batch.pixel_values * deviation + mean


def weights_of(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- Clips -----------------------------------------------------------------------------------------------------------


def test_filling_continues_the_surroundings():
    image = np.full((60, 90, 3), (40, 90, 200), np.uint8)
    image[20:40, 30:60] = (255, 0, 0)
    mask = np.zeros((60, 90), np.uint8)
    mask[20:40, 30:60] = 3
    assert np.abs(fill_objects(image, mask).astype(int) - (40, 90, 200)).max() <= 1


def test_filling_blends_different_sides():
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 60:] = 200
    mask = np.zeros((40, 120), np.uint8)
    mask[:, 30:90] = 1
    filled = fill_objects(image, mask)[20, :, 0].astype(int)
    assert filled[:20].max() == 0 and filled[100:].min() == 200
    assert np.diff(filled[20:100]).min() >= -12 and 40 < filled[60] < 160  # a ramp, not a step


def test_filling_keeps_what_is_not_covered_and_survives_a_full_mask():
    image, ids = scene()
    filled = fill_objects(image, ids)
    assert (filled[:, 100:] == image[:, 100:]).all()
    assert (fill_objects(image, np.ones_like(ids)) == 128).all()


def test_clips_depend_on_nothing_but_seed_and_number():
    image, ids = scene()
    frames = [GivenFrames([image], [ids], SPEC, 0.5, 0.2, seed) for seed in (0, 0, 1)]
    same, again, other = (draw(item, 3)[0].pixel_values for item in frames)
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert not torch.equal(same, draw(frames[0], 4)[0].pixel_values)


def test_recomposed_clips_show_the_object_only_where_the_mask_is():
    image, ids = scene()
    frames, inside, outside = GivenFrames([image], [ids], SPEC, recomposed=1.0, leave=0.0), [], []
    for index in range(6):
        batch, pictures = draw(frames, index)
        # Of the colours, which are turned and shifted, the distance to gray is left.
        chroma = pictures.amax(2) - pictures.amin(2)
        inside.append(chroma[batch.id_masks == 1])
        outside.append(chroma[batch.id_masks == 0])
    assert torch.cat(inside).median() > 0.3
    assert torch.cat(outside).quantile(0.99) < 0.1


def test_objects_move_apart_only_where_clips_are_recomposed():
    image, ids = scene({1: (20, 20, 60, 60), 2: (100, 40, 140, 80)})

    def apart(share):
        """How much the distance of both objects varies from clip to clip, to that in the picture."""
        frames, ratios = GivenFrames([image], [ids], SPEC, share, leave=0.0), []
        for index in range(8):
            for mask in draw(frames, index)[0].id_masks[:, 0]:
                places = [torch.nonzero(mask == number).float().mean(0) for number in (1, 2)]
                sizes = [(mask == number).sum().sqrt() for number in (1, 2)]
                ratios.append((places[0] - places[1]).norm() / sum(sizes))
        ratios = torch.stack(ratios)
        return ratios[ratios.isfinite()].std()

    assert apart(1.0) > 2 * apart(0.0)


def test_objects_that_leave_are_gone_in_the_end():
    image, ids = scene()
    frames = GivenFrames([image], [ids], SPEC, recomposed=1.0, leave=1.0)
    masks = torch.cat([draw(frames, index)[0].id_masks for index in range(4)])
    shown = (masks == 1).flatten(2).any(2)
    assert shown[:, 0].all() and shown[:, -1].float().mean() < 0.2


def test_recompose_leaves_its_inputs_alone():
    image, ids = scene()
    batch = draw(GivenFrames([image], [ids], SPEC, 0.0, 0.0), 0)[0]
    before = batch.pixel_values.clone(), batch.id_masks.clone()
    changed = recompose(batch, batch, 1.0, 0.0, step_generator(0, 0))
    assert torch.equal(batch.pixel_values, before[0]) and torch.equal(batch.id_masks, before[1])
    assert not torch.equal(changed.pixel_values, before[0])


@pytest.mark.parametrize(
    ("frame", "size"),
    [((480, 854), (257, 449)), ((854, 480), (449, 257)), ((300, 300), (257, 257)), ((100, 1000), (257, 513))],
)
def test_clips_have_the_shape_of_the_frame(frame, size):
    assert _clip_size(frame, 257) == size


# --- Learning --------------------------------------------------------------------------------------------------------


def follow(model, processor, clip, first):
    """Id maps of all frames, from the first frame's."""
    session = processor.init_video_session(video=list(clip))
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=first)
    with torch.no_grad():
        outputs = list(model.propagate_in_video_iterator(session))
    return np.stack([processor.post_process_id_map(output, original_size=first.shape) for output in outputs])


def jaccard(predicted, ids) -> float:
    """Mean over the objects and all frames but the first."""
    scores = []
    for number in np.unique(ids[ids > 0]):
        mine, theirs = predicted[1:] == number, ids[1:] == number
        scores.append((mine & theirs).sum() / (mine | theirs).sum())
    return float(np.mean(scores))


def loss_on_new_clips(model, image, ids) -> float:
    """Mean loss on clips of a frame that no adaptation here has seen."""
    clips, task = GivenFrames([image], [ids], SPEC, 0.5, 0.2, seed=9), SegmentationTask(model)
    with torch.no_grad():
        generators = [step_generator(9, index) for index in range(4)]
        losses = [task(clips(i, made), StepPlan(), step_generator(1, i))["loss"] for i, made in enumerate(generators)]
    return float(torch.stack(losses).mean())


def test_adapted_model_follows_what_it_was_given(tiny_model, tiny_processor, tiny_clip):
    frames, ids = tiny_clip
    adapted = adapt(tiny_model, [frames[0]], [ids[0]], LEARNS)
    assert loss_on_new_clips(adapted, frames[0], ids[0]) < 0.7 * loss_on_new_clips(tiny_model, frames[0], ids[0])
    before, after = (jaccard(follow(m, tiny_processor, frames, ids[0]), ids) for m in (tiny_model, adapted))
    assert after > before + 0.15


def test_the_model_stays_and_only_what_may_learn_changes(tiny_model):
    image, ids = scene()
    before = weights_of(tiny_model)
    tiny_model.decoder.classifier.bias.requires_grad_(False)
    adapted = adapt(tiny_model, [image], [ids], SHORT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("decoder.") for name in changed) and any(name.startswith("layers.") for name in changed)
    assert not any(name.startswith("backbone.") for name in changed)
    assert not adapted.training and all(parameter.grad is None for parameter in adapted.parameters())
    wanted = {name: parameter.requires_grad for name, parameter in tiny_model.named_parameters()}
    assert wanted == {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}


def test_the_mean_of_the_weights_is_what_is_given_back(tiny_model):
    image, ids = scene()
    before, made = tiny_model.state_dict(), {}
    for blend in (0.0, 0.5, 1.0):
        adaptation = Adaptation(tiny_model, [image], [ids], replace(SHORT, blend=blend))
        for _ in range(SHORT.steps):
            adaptation.step()
        made[blend] = weights_of(adaptation.result())
        again = adaptation.result().state_dict()  # asking twice changes nothing
        assert all(torch.equal(tensor, again[name]) for name, tensor in made[blend].items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in made[0.0].items())
    for name, tensor in made[0.5].items():
        assert torch.allclose(tensor.float(), (before[name] + made[1.0][name]) / 2.0, atol=1e-6), name


def test_draws_are_the_mean_of_runs_with_their_seeds(tiny_model):
    image, ids = scene()
    alone = [weights_of(adapt(tiny_model, [image], [ids], replace(SHORT, seed=seed, blend=1.0))) for seed in (5, 6, 7)]
    told = []
    config = replace(SHORT, seed=5, draws=3, blend=1.0)
    together = adapt(tiny_model, [image], [ids], config, lambda done, total: told.append((done, total)))
    assert told == [(done, 3 * SHORT.steps) for done in range(1, 3 * SHORT.steps + 1)]
    for name, value in weights_of(together).items():
        mean = torch.stack([weights[name].double() for weights in alone]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
    half = weights_of(adapt(tiny_model, [image], [ids], replace(config, blend=0.5)))
    before = weights_of(tiny_model)
    for name, _ in tiny_model.named_parameters():
        torch.testing.assert_close(half[name], (before[name] + together.state_dict()[name]) / 2, rtol=1e-5, atol=1e-6)


def test_backbone_may_learn_too(tiny_model):
    image, ids = scene()
    adapted = adapt(tiny_model, [image], [ids], replace(SHORT, train_backbone=True))
    before = tiny_model.state_dict()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("backbone.") for name in changed)


def test_same_frames_and_seed_give_the_same_weights_even_in_inference_mode(tiny_model):
    image, ids = scene()
    steps = []
    first = adapt(tiny_model, [image], [ids], SHORT, progress=lambda done, total: steps.append((done, total)))
    torch.rand(5)  # the global generator plays no part
    with torch.inference_mode():
        second = adapt(tiny_model, [Image.fromarray(image)], [ids], SHORT)
    assert steps == [(1, 2), (2, 2)]
    others = second.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in first.state_dict().items())
    assert not any(tensor.is_inference() for tensor in others.values())


def test_deep_pictures_are_what_their_eight_bits_are():
    image, ids = scene()
    grey = image[..., 0]
    (deep,), (flat,) = (
        _prepare([Image.fromarray(values)], [ids], 65)[0] for values in (grey.astype(np.uint16) * 257, grey)
    )
    assert len(np.unique(flat)) > 20 and np.array_equal(deep, flat)


def test_more_objects_than_the_model_has_slots():
    model = DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, "max_objects": 2}))
    image, ids = scene({1: (10, 10, 50, 50), 2: (60, 10, 100, 50), 3: (110, 10, 150, 50)})
    adapted = adapt(model, [image], [ids], replace(SHORT, recomposed=1.0))
    assert any(not torch.equal(*pair) for pair in zip(adapted.parameters(), model.parameters(), strict=True))


def test_any_ids_several_frames_and_sizes(tiny_model):
    image, ids = scene({1: (20, 20, 60, 60), 2: (100, 40, 140, 80)})
    other, later = draw_scene(64, 64, {3: (10, 10, 50, 50)})
    table = np.array([0, 7, 255, 1000])
    adapted = adapt(tiny_model, [image, other], [table[ids], table[later]], SHORT)
    renumbered = adapt(tiny_model, [image, other], [ids, later], SHORT)
    others = renumbered.state_dict()
    # Only the ids' order counts.
    assert all(torch.equal(tensor, others[name]) for name, tensor in adapted.state_dict().items())


def test_many_tiny_objects_are_no_error(tiny_model):
    ids = np.zeros((96, 160), np.uint8)
    for number in range(30):
        ids[4 + 30 * (number // 10) :, :][:3, 5 + 15 * (number % 10) :][:, :3] = number + 1
    image = np.where(ids[..., None] > 0, COLOURS[1], 120).astype(np.uint8)
    adapted = adapt(tiny_model, [image], [ids], SHORT)
    assert all(tensor.isfinite().all() for tensor in adapted.state_dict().values())


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"steps": 1.5}, "`steps` must be a whole number, got 1.5"),
        ({"batch_size": "3"}, "`batch_size` must be a whole number, got '3'"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
        ({"learning_rate": float("inf")}, "`learning_rate` must be above 0 and at most 0.1, got inf"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"bootstrap_share": 0.0}, "`bootstrap_share` must be above 0 and at most 1.0, got 0"),
        ({"num_frames": 1}, "`num_frames` must be at least 2, got 1"),
        ({"short_side": 16}, "`short_side` must be at least 65, got 16"),
        ({"leave": 1.5}, "`leave` must be a share between 0 and 1, got 1.5"),
    ],
)
def test_settings_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        AdaptationConfig(**values)


def test_mistakes_are_named(tiny_model):
    image, ids = scene()
    with pytest.raises(ValueError, match="got 1 images and 2 masks"):
        adapt(tiny_model, [image], [ids, ids], SHORT)
    with pytest.raises(ValueError, match=r"Mask 0 must have the size of its image, \(96, 160\), got \(50, 160\)"):
        adapt(tiny_model, [image], [ids[:50]], SHORT)
    with pytest.raises(ValueError, match=r"Image 0 must be uint8 of shape \(height, width, 3\), got float64"):
        adapt(tiny_model, [image / 255], [ids], SHORT)
    with pytest.raises(ValueError, match=r"Mask 0 must hold integers from 0, .* got float32"):
        adapt(tiny_model, [image], [ids.astype(np.float32)], SHORT)
    with pytest.raises(ValueError, match=r"Mask 0 must hold integers from 0, .* with values from -1"):
        adapt(tiny_model, [image], [ids.astype(int) - 1], SHORT)
    with pytest.raises(ValueError, match="no mask shows an object"):
        adapt(tiny_model, [image], [ids * 0], SHORT)
    dot = np.zeros((1000, 1000), np.uint8)
    dot[3, 3] = 1
    with pytest.raises(ValueError, match="at a short side of 65 pixels nothing is left of the objects"):
        adapt(tiny_model, [np.zeros((1000, 1000, 3), np.uint8)], [dot], SHORT)
    with pytest.raises(ValueError, match="At most 254 objects can be adapted to at once, got 300"):
        adapt(tiny_model, [image], [np.arange(96 * 160).reshape(96, 160) % 301], SHORT)
    with pytest.raises(ValueError, match="before its batch norms are folded"):
        adapt(tiny_model.fold_batch_norm(), [image], [ids], SHORT)
    with pytest.raises(ValueError, match="exported model cannot be adapted"):
        adapt(object(), [image], [ids], SHORT)


@pytest.mark.parametrize(
    ("option", "size"),
    [((), 96), (("--preset", "fast"), 320), (("--short-side", "600"), 600), (("--short-side", "16"), 65)],
)
def test_clips_have_the_size_at_which_frames_are_followed(option, size, tiny_processor):
    parser = argparse.ArgumentParser()
    add_speed_arguments(parser)
    add_adaptation_arguments(parser, "masks")
    arguments = parser.parse_args([*option, "--adapt", "--device", "cpu"])
    resolve_speed(arguments, "model")
    config = at_followed_size(
        adaptation_config(arguments), tiny_processor, size_option(tiny_processor, arguments.short_side)
    )
    assert config.short_side == size and config.steps == AdaptationConfig.steps
    assert at_followed_size(AdaptationConfig(short_side=128), tiny_processor).short_side == 128
    assert adaptation_config(parser.parse_args([])) is None
    assert adaptation_config(parser.parse_args(["--adapt-steps", "7"])).steps == 7
    seeds = [adaptation_config(parser.parse_args(["--adapt-seed", str(seed)])).seed for seed in (0, 3)]
    assert seeds == [0, 3]
    assert adaptation_config(parser.parse_args(["--adapt-draws", "4"])).draws == 4


# --- Commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    DeformVosModel(DeformVosConfig(**TINY_CONFIG)).save_pretrained(path)
    DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 96})).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    return write_davis(tmp_path_factory.mktemp("davis"), frames=3)


def call(*words, monkeypatch) -> int:
    words = [str(word) for word in words]
    monkeypatch.setattr(sys, "argv", ["deformvos", *words])
    return main(words)


def evaluate(davis, model_dir, tmp_path, monkeypatch, *words):
    report = tmp_path / "report.json"
    common = ("--dataset", "davis2017", "--root", davis, "--model", model_dir, "--json", report, "--device", "cpu")
    assert call("evaluate", *common, *words, monkeypatch=monkeypatch) == 0
    return json.loads(report.read_text())


def test_evaluate_adapts_to_each_sequence(davis, model_dir, tmp_path, monkeypatch):
    plain = evaluate(davis, model_dir, tmp_path, monkeypatch)
    adapted = evaluate(davis, model_dir, tmp_path, monkeypatch, "--adapt-steps", "3")
    assert adapted["totals"]["J&F"] != plain["totals"]["J&F"]
    assert plain["config"]["adaptation"] is None and "adaptation_seconds_median" not in plain["totals"]
    assert adapted["config"]["adaptation"]["steps"] == 3
    seconds = [sequence["timing"]["adaptation_seconds"] for sequence in adapted["sequences"]]
    assert len(seconds) == 2 and min(seconds) > 0
    # What is spent once is no part of the time a frame.
    assert sum(sequence["timing"]["stream_seconds"] for sequence in adapted["sequences"]) < sum(seconds)
    assert adapted["model"] == plain["model"]


def test_sequences_do_not_learn_from_each_other(davis, model_dir, tmp_path, monkeypatch):
    words = ("--adapt-steps", "2")
    both = evaluate(davis, model_dir, tmp_path, monkeypatch, *words)
    alone = evaluate(davis, model_dir, tmp_path, monkeypatch, *words, "--sequences", "bee")
    assert alone["sequences"][0]["J&F"] == both["sequences"][1]["J&F"]


def test_masks_of_a_run_without_adaptation_are_not_taken_up(davis, model_dir, tmp_path, monkeypatch, capsys):
    masks = ("--save-masks", tmp_path / "masks")
    evaluate(davis, model_dir, tmp_path, monkeypatch, *masks)
    words = ("--dataset", "davis2017", "--root", davis, "--model", model_dir, *masks, "--resume", "--adapt-steps", "2")
    assert call("evaluate", *words, monkeypatch=monkeypatch) == 2
    assert "was written with adaptation None" in capsys.readouterr().err


@pytest.fixture
def clip(tmp_path, davis):
    """A folder of frames, and the masks of the first and the third."""
    masks = davis / "Annotations" / "480p" / "ant"
    return davis / "JPEGImages" / "480p" / "ant", masks / "00000.png", masks / "00002.png"


def test_segment_adapts_to_all_masks(clip, model_dir, tmp_path, monkeypatch, capsys):
    frames, first, third = clip
    common = ("segment", frames, "--model", model_dir, "--device", "cpu", "--adapt-steps", "3")
    masks = ("--mask", first, "--mask-frame", 0, "--mask", third, "--mask-frame", 2)
    assert call(*common, *masks, "--output", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert "adapting: 100%" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["model"]["adaptation"]["steps"] == 3 and results["model"]["adaptation"]["seconds"] > 0
    assert results["completed"] and len(list((tmp_path / "out" / "masks").glob("*.png"))) == 3


def test_segment_without_adaptation_says_so(clip, model_dir, tmp_path, monkeypatch):
    frames, first, _ = clip
    words = ("segment", frames, "--mask", first, "--model", model_dir, "--output", tmp_path / "out", "--quiet")
    assert call(*words, monkeypatch=monkeypatch) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"]["adaptation"] is None


def test_exported_model_is_refused_and_earlier_results_are_kept(clip, model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "deformvos_export.json").write_text("{}")
    common = ("segment", clip[0], "--mask", clip[1], "--output", tmp_path / "out", "--quiet")
    assert call(*common, "--model", model_dir, monkeypatch=monkeypatch) == 0
    before = (tmp_path / "out" / "results.json").read_text()
    words = ("--model", tmp_path / "exported", "--adapt", "--overwrite")
    assert call(*common, *words, monkeypatch=monkeypatch) == 2
    assert "holds an exported model, which is for inference alone" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_a_camera_does_not_wait(clip, model_dir, monkeypatch, capsys):
    monkeypatch.setattr("hf_deformvos.video_source_deformvos.FolderSource.kind", "camera")
    words = ("segment", clip[0], "--mask", clip[1], "--model", model_dir, "--adapt")
    assert call(*words, monkeypatch=monkeypatch) == 2
    assert "a camera does not wait" in capsys.readouterr().err


def test_steps_that_lead_nowhere_end_in_an_error(tiny_model, tiny_clip):
    frames, ids = tiny_clip
    broken = copy.deepcopy(tiny_model)
    with torch.no_grad():
        broken.decoder.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="gradient of step 0 is not finite: lower `learning_rate`"):
        adapt(broken, frames[:1], ids[:1], SHORT)


def test_frames_may_be_one_array(tiny_model, tiny_clip):
    frames, ids = tiny_clip
    made, same = (adapt(tiny_model, kind(frames[:2]), kind(ids[:2]), SHORT) for kind in (list, np.stack))
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), same.parameters(), strict=True))
