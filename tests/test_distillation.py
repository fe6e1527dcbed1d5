"""
Learning from a teacher: what the task computes, what the trainer does with it, and the command in one and in two
processes. The losses themselves are tested in test_distillation_losses.py.
"""

import copy
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CONFIG
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic import write_davis, write_static_set
from test_trainer import (
    Fixed,
    Interrupted,
    Toy,
    command_env,
    fresh_accelerate,  # noqa: F401  an autouse fixture, here, too
    launch,
    log_of,
    make_trainer,
    sampler_of,
    settings,
    sha256,
    still,  # noqa: F401  a fixture
)
from torch import nn

import train_distill
from hf_deformvos import DeformVosConfig, DeformVosModel
from hf_deformvos.data import ClipBatch, load_davis
from hf_deformvos.training import (
    DistillationTask,
    DistillationWeights,
    HeldOutEvaluation,
    SegmentationTask,
    StepPlan,
    Trainer,
)
from hf_deformvos.training.checkpoint import list_checkpoints
from hf_deformvos.training.config import PROPAGATIONS
from hf_deformvos.training.lineage import describe_origin, lineage, total_clips
from hf_deformvos.training.models import build_student, build_teacher
from hf_deformvos.training.optimization import FreezeSchedule
from hf_deformvos.training.runlog import RunLog
from hf_deformvos.training.sources import open_data, open_evaluation
from hf_deformvos.training.stopwatch import Stopwatch


EVERYTHING = DistillationWeights(att=0.7, intra=0.6, inter=0.5, kl=0.4, representation=0.3, temperature=2.0)
NOTHING = DistillationWeights(att=0, intra=0, inter=0)


def tiny(seed: int, **changes) -> DeformVosModel:
    torch.manual_seed(seed)
    return DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, **changes}))


@pytest.fixture(scope="module")
def models():
    """A student and a teacher that is wider and has one more layer."""
    return tiny(1), tiny(2, hidden_size=24, key_size=8, num_hidden_layers=2).eval()


@pytest.fixture(scope="module")
def batch():
    """Two clips of two squares; the second clip has one object, and void on the right of its later frames."""
    torch.manual_seed(3)
    masks = torch.zeros(2, 3, 49, 65, dtype=torch.long)
    masks[:, :, 8:30, 6:26] = 1
    masks[0, :, 20:44, 36:60] = 2
    masks[1, 1:, :, 57:] = 255
    return ClipBatch(torch.randn(2, 3, 3, 49, 65), masks, torch.tensor([[True, True], [True, False]]))


def run(task, batch, own_masks=0.5):
    return task(batch, StepPlan(own_masks=own_masks), torch.Generator().manual_seed(4))


# ---- the task -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_its_named_parts(models, batch):
    losses = run(DistillationTask(*models, "both", EVERYTHING, ce_weight=0.2, jaccard_weight=0.9), batch)
    weights = {"ce": 0.2, "jaccard": 0.9, "att": 0.7, "intra": 0.6, "inter": 0.5, "kl": 0.4, "representation": 0.3}
    assert set(losses) == {"loss", *(f"loss_{name}" for name in weights)}
    total = sum(weight * losses[f"loss_{name}"] for name, weight in weights.items())
    assert float(losses["loss"].detach()) == pytest.approx(float(total), rel=1e-5)
    assert losses["loss"].requires_grad
    assert all(not value.requires_grad for name, value in losses.items() if name != "loss")
    few = run(DistillationTask(*models, "labels", DistillationWeights(att=0, intra=0, inter=1.0)), batch)
    assert set(few) == {"loss", "loss_ce", "loss_jaccard", "loss_inter"}


def test_attention_is_aligned_where_it_is_asked_for(models, batch):
    alone = {
        name: float(run(DistillationTask(*models, "labels", DistillationWeights(att_maps=(name,))), batch)["loss_att"])
        for name in PROPAGATIONS
    }
    assert len(set(alone.values())) == 3
    for chosen in (PROPAGATIONS, ("long_term", "self")):
        losses = run(DistillationTask(*models, "labels", DistillationWeights(att_maps=chosen)), batch)
        assert float(losses["loss_att"]) == pytest.approx(np.mean([alone[name] for name in chosen]), rel=1e-5)


def test_frames_rolled_without_gradients_do_not_count(models, batch):
    """Labels and void of a frame that is not learned from change nothing; those of the last one do."""
    task = DistillationTask(*models, "labels", EVERYTHING, gradient_frames=1)
    first = run(task, batch, own_masks=1.0)
    relabelled = {}
    for frame in (1, 2):
        other = copy.deepcopy(batch)
        other.id_masks[:, frame] = torch.where(other.id_masks[:, frame] == 1, 255, 0)
        relabelled[frame] = run(task, other, own_masks=1.0)
    supervised = ("loss_ce", "loss_jaccard")
    assert all(torch.equal(first[name], relabelled[1][name]) for name in supervised)
    assert not any(torch.equal(first[name], relabelled[2][name]) for name in supervised)
    everything = run(DistillationTask(*models, "labels", EVERYTHING), batch, own_masks=1.0)
    assert everything.keys() == first.keys()
    assert all(not torch.equal(everything[name], first[name]) for name in first)


def test_only_the_student_gets_gradients(models, batch):
    student, teacher = models
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    task = DistillationTask(student, teacher, "pseudo", EVERYTHING)
    task.train()
    run(task, batch)["loss"].backward()
    assert not teacher.training and student.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    touched = {name.split(".")[0] for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"backbone", "token_projection", "identity_bank", "layers", "decoder"} <= touched
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in task.parameters()}
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    student.zero_grad()


def test_supervision_by_labels_draws_what_a_run_without_teacher_draws(models, batch):
    alone, taught = SegmentationTask(models[0]), DistillationTask(*models, "labels", EVERYTHING)
    mine, theirs = run(alone, batch), run(taught, batch)
    for name in ("loss_ce", "loss_jaccard"):
        assert torch.equal(mine[name], theirs[name])


def test_pseudo_labels_need_the_first_mask_alone(models, batch):
    others = copy.deepcopy(batch)
    later = others.id_masks[:, 1:]
    later[later != 255] = 0
    for supervision, same in (("pseudo", True), ("labels", False), ("both", False)):
        task = DistillationTask(*models, supervision, EVERYTHING)
        first, second = run(task, batch), run(task, others)
        assert all(torch.equal(first[name], second[name]) for name in first) == same, supervision


def test_both_is_the_mean_of_labels_and_teacher(models, batch):
    student, teacher = models
    both = DistillationTask(student, teacher, "both", NOTHING)
    labels = DistillationTask(student, teacher, "labels", NOTHING)
    inputs = both.draw_inputs(batch, StepPlan(own_masks=0.5), torch.Generator().manual_seed(4))
    guide = both._ask_teacher(batch, inputs, {})
    pseudo = both._pseudo_labels(guide.logits, batch)
    assert torch.equal(pseudo.id_masks[:, :1], batch.id_masks[:, :1])
    assert torch.equal(pseudo.id_masks == 255, batch.id_masks == 255)
    assert not (pseudo.id_masks[1] == 2).any(), "the second clip has one object"
    output = student(id_masks=batch.id_masks, **inputs)
    expected = [both.supervised_losses(output.logits, given, StepPlan())["loss"] for given in (batch, pseudo)]
    assert float(run(both, batch)["loss"].detach()) == pytest.approx(float(sum(expected).detach()) / 2, rel=1e-5)
    assert float(run(labels, batch)["loss"].detach()) == pytest.approx(float(expected[0].detach()), rel=1e-5)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it(batch):
    teacher = tiny(1)
    student = copy.deepcopy(teacher).eval()
    losses = run(DistillationTask(student, teacher, "pseudo", EVERYTHING), batch, own_masks=1.0)
    for name in ("att", "intra", "inter", "kl"):
        assert float(losses[f"loss_{name}"]) == pytest.approx(0, abs=2e-4), name


def test_frames_of_one_object_have_no_relation_between_objects(models, batch):
    single = ClipBatch(batch.pixel_values, batch.id_masks.clamp(max=1), torch.ones(2, 1, dtype=torch.bool))
    losses = run(DistillationTask(*models, "labels", EVERYTHING), single)
    assert float(losses["loss_inter"]) == 0
    assert float(losses["loss_intra"]) > 0
    assert torch.isfinite(losses["loss"])


def test_another_token_grid_is_refused(models, batch):
    class Coarse(nn.Module):
        """A teacher of stride 32."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits = output.logits[..., ::2, ::2]
            return output

    task = DistillationTask(models[0], Coarse(models[1]), "labels", EVERYTHING)
    with pytest.raises(ValueError, match=r"token grid must be the student's: .* maps of 13x17, the teacher of 7x9"):
        run(task, batch)


def test_wrong_uses_of_the_task_are_named(models):
    with pytest.raises(ValueError, match="needs a teacher, got None"):
        DistillationTask(models[0], None)
    with pytest.raises(ValueError, match="must be labels, pseudo or both, got 'masks'"):
        DistillationTask(*models, "masks")


def test_slots_are_those_that_both_models_have(models):
    assert DistillationTask(models[0], tiny(2, max_objects=4)).max_objects == 4


def test_mixed_precision_and_checkpointing_work_with_a_teacher(batch):
    student, teacher = tiny(1), tiny(2)
    task = DistillationTask(student, teacher, "pseudo", EVERYTHING)
    task.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.activation_checkpointing_enable()
        losses = run(task, batch)
        losses["loss"].backward()
        gradients.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        student.zero_grad()
    for name, value in gradients[0].items():
        assert torch.allclose(gradients[1][name], value, atol=1e-5), name
    with torch.autocast("cpu", torch.bfloat16):
        half = run(task, batch)
    half["loss"].backward()
    for name, value in half.items():
        assert float(value.detach()) == pytest.approx(float(losses[name].detach()), rel=0.1, abs=0.05), name
    assert all(parameter.dtype == torch.float32 for parameter in teacher.parameters())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


# ---- freezing -------------------------------------------------------------------------------------------------------


def test_frozen_parameters_are_released_at_their_time(tmp_path, still):  # noqa: F811
    trainer = make_trainer(tmp_path, Fixed(), freeze=["backbone."], freeze_until=0.5, checkpointing_steps=1)
    first = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    trainer.config.checkpoints_total_limit = 0
    trainer.train()
    after = {
        step: load_file(tmp_path / "run" / f"checkpoint-{step}" / "training" / "student.safetensors")
        for step in range(1, 7)
    }
    # Six steps: progress is 0.5 when the fourth begins.
    assert all(torch.equal(after[step]["backbone.weight"], first["backbone.weight"]) for step in (1, 2, 3))
    assert not torch.equal(after[4]["backbone.weight"], first["backbone.weight"])
    assert not torch.equal(after[1]["head.weight"], first["head.weight"])


def test_resuming_across_the_release_is_exact(tmp_path):
    changes = {"freeze": ["backbone.", "head."], "freeze_until": 0.6}
    make_trainer(tmp_path, output_dir=str(tmp_path / "whole"), **changes).train()
    for stop in (3, 5):
        output = str(tmp_path / f"stopped-{stop}")
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), stop), output_dir=output, **changes).train()
        make_trainer(tmp_path, output_dir=output, resume_from_checkpoint="latest", **changes).train()
        assert sha256(tmp_path / f"stopped-{stop}" / "model.safetensors") == sha256(
            tmp_path / "whole" / "model.safetensors"
        )


def test_what_is_frozen_for_other_reasons_stays_so():
    toy = Toy()
    toy.backbone.bias.requires_grad_(False)
    schedule = FreezeSchedule(toy, ["backbone."], until=0.5)
    schedule.apply(0.2)
    assert not toy.backbone.weight.requires_grad
    schedule.apply(0.5)
    assert toy.backbone.weight.requires_grad and not toy.backbone.bias.requires_grad
    with pytest.raises(ValueError, match=r"prefixes of parameter names \(backbone\., .*got 'decoder\.'"):
        FreezeSchedule(toy, ["decoder."], until=1.0)


# ---- what a run writes ----------------------------------------------------------------------------------------------


def test_log_lines_are_not_repeated_after_an_interruption(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), 5)).train()
    log = tmp_path / "run" / "log.jsonl"
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    with open(log, "a") as handle:
        handle.write('{"step": 6, "lo')
    make_trainer(tmp_path, resume_from_checkpoint="latest").train()
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_starts_afresh_starts_its_log_afresh(tmp_path):
    for _ in range(2):
        make_trainer(tmp_path, max_train_steps=2, checkpointing_steps=0).train()
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]


def test_the_time_of_teacher_and_student_is_logged(tmp_path, models):
    config = settings(
        tmp_path,
        max_train_steps=2,
        checkpointing_steps=0,
        stages=[{"until": 1, "size": [49, 65], "frames": 2, "batch": 1}],
    )
    task = DistillationTask(copy.deepcopy(models[0]), models[1], "pseudo")
    Trainer(config, task, sampler_of(tmp_path)).train()
    for line in log_of(tmp_path / "run"):
        shares = {name: line[f"{name}_share"] for name in ("data_wait", "augment", "teacher", "student", "backward")}
        assert all(0 < share < 1 for share in shares.values()) and sum(shares.values()) < 1.01
        assert {"loss_att", "loss_intra", "loss_inter"} <= set(line) and "loss_kl" not in line


def test_a_stopwatch_starts_again_when_it_is_read():
    watch = Stopwatch()
    for _ in range(2):
        with watch.part("a"):
            time.sleep(0.01)
    assert watch.read()["a"] >= 0.02
    assert watch.read() == {}


def test_the_origin_of_weights_is_carried_along(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "training.json").write_text(
        json.dumps({"steps": 10, "clips": 40, "minutes": 1.5, "settings": {"supervision": "labels", "seed": 3}})
    )
    config = settings(tmp_path, student=str(first), teacher=str(tmp_path / "unknown"))
    found = lineage(config)
    assert found["initialised_from"] == {
        "name": "first",
        "steps": 10,
        "clips": 40,
        "minutes": 1.5,
        "settings": {"supervision": "labels", "seed": 3},
    }
    assert "no record" in found["teacher"]["note"]
    record = {"steps": 5, "clips": 20, "config": config.to_dict(), **found}
    (second / "all_results.json").write_text(json.dumps(record))
    origin = describe_origin(str(second))
    assert origin["initialised_from"]["clips"] == 40
    assert origin["settings"]["max_train_steps"] == 6
    assert str(tmp_path) not in json.dumps(origin), "no path of this machine"
    assert total_clips(3, origin) == 63
    assert total_clips(3, {"clips": None, "averaged_with": [{"steps": 1}, {"clips": 2}]}) == 5, "an odd record"
    assert lineage(settings(tmp_path)) == {}
    assert lineage(settings(tmp_path, init_from=str(first)))["initialised_from"]["clips"] == 40
    (tmp_path / "backbone.safetensors").write_bytes(b"weights")
    backbone = {"name": "backbone.safetensors", "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert lineage(settings(tmp_path, init_backbone=str(tmp_path / "backbone.safetensors"))) == {"backbone": backbone}
    (first / "all_results.json").write_text(json.dumps({"steps": 1, "backbone": backbone}))
    (first / "training.json").unlink()
    assert describe_origin(str(first))["backbone"] == backbone


def test_results_state_the_lineage(tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "all_results.json").write_text('{"clips": 100}')
    results = make_trainer(tmp_path, student=str(tmp_path / "given"), checkpointing_steps=0).train()
    assert results["initialised_from"]["clips"] == 100
    assert results["clips_with_initialisation"] == 112


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    folder = tmp_path_factory.mktemp("davis")
    write_davis(folder / "davis", names=("swing", "bee"), frames=5)
    return load_davis(folder / "davis", 96, exclude=(), cache_dir=folder / "cache", show_progress_bar=False)


def test_evaluations_leave_pictures(tmp_path, davis, models):
    pytest.importorskip("tensorboard")
    evaluate = HeldOutEvaluation([davis], size=(49, 81), frames=4, stride=1)
    config = settings(
        tmp_path,
        stages=[{"until": 1, "size": [49, 65], "frames": 2, "batch": 1}],
        max_train_steps=2,
        eval_steps=1,
        checkpointing_steps=0,
        with_tracking=True,
    )
    task = DistillationTask(copy.deepcopy(models[0]), models[1], "pseudo")
    results = Trainer(config, task, sampler_of(tmp_path), evaluate=evaluate).train()
    assert {"eval_j", "eval_j/swing", "eval_j/bee"} <= set(results)
    for step in (1, 2):
        for name in ("swing", "bee"):
            picture = np.asarray(Image.open(tmp_path / "run" / "overlays" / f"step-{step}" / f"{name}.png"))
            assert picture.shape == (50, 4 * 41, 3)
    events = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("events.out.tfevents*"))
    assert b"overlays/swing" in events


def test_sequences_that_training_takes_are_scored(tmp_path, models):
    """Frames of several sizes, and more objects than a clip holds."""
    root = write_davis(tmp_path / "davis", names=("swing",), frames=3)
    images, masks = (root / part / "480p" / "swing" for part in ("JPEGImages", "Annotations"))
    many = np.zeros((96, 160), np.uint8)
    for number in range(12):
        many[8 * number : 8 * number + 2 + number // 3, 10:100] = number + 1
    for path in masks.iterdir():
        Image.fromarray(many).save(path)
    for path in (images / "00002.jpg", masks / "00002.png"):
        Image.open(path).resize((140, 90), Image.Resampling.NEAREST).save(path)
    store = load_davis(root, 96, merge=False, exclude=(), cache_dir=tmp_path / "cache", show_progress_bar=False)
    scores = HeldOutEvaluation([store], size=(97, 145), frames=3, stride=1)(models[0], torch.device("cpu"))
    assert 0 <= scores["eval_j/swing"] < 1


def test_a_perfect_prediction_is_drawn_as_its_labels(davis):
    class Copycat(nn.Module):
        """Knows the labels."""

        def forward(self, pixel_values, id_masks, num_objects, teacher_forcing):
            masks = [torch.from_numpy(davis.mask(i).copy()) for i in davis.sequences["swing"]][1:4]
            ids = nn.functional.interpolate(torch.stack(masks)[:, None].float(), size=(97, 161), mode="nearest-exact")
            return SimpleNamespace(logits=nn.functional.one_hot(ids[:, 0].long(), 3).permute(0, 3, 1, 2)[None] * 9.0)

    evaluate = HeldOutEvaluation([davis], size=(97, 161), frames=4, stride=1)
    scores = evaluate(Copycat(), torch.device("cpu"))
    assert scores["eval_j/swing"] == 1.0
    strip = evaluate.strips["swing"]
    assert np.array_equal(strip[: len(strip) // 2], strip[len(strip) // 2 :])


def test_pictures_are_named_by_sequences_that_may_have_slashes(tmp_path):
    accelerator = SimpleNamespace(is_main_process=True)
    RunLog(tmp_path, accelerator, False).draw(7, {"a/b": np.zeros((2, 3, 3), np.uint8)})
    assert (tmp_path / "overlays" / "step-7" / "a_b.png").is_file()


# ---- settings -------------------------------------------------------------------------------------------------------


def test_paths_in_a_file_are_found_from_anywhere(tmp_path, monkeypatch):
    home = tmp_path / "home"
    for folder in ("recipes/near", "data", "models/teacher"):
        (home / folder).mkdir(parents=True)
    (home / "recipes" / "run.json").write_text(
        json.dumps(
            {
                "teacher": "models/teacher",
                "student": "someone/student",
                "davis_dirs": ["data:merge", "near"],
                "output_dir": "outputs/here",
            }
        )
    )
    monkeypatch.chdir(tmp_path)
    config = train_distill.parse([str(home / "recipes" / "run.json")])
    assert config.teacher == str(home / "models" / "teacher")
    assert config.davis_dirs == [f"{home / 'data'}:merge", str(home / "recipes" / "near")]
    assert (config.student, config.output_dir) == ("someone/student", "outputs/here")
    (tmp_path / "data").mkdir()
    assert train_distill.parse([str(home / "recipes" / "run.json")]).davis_dirs[0] == "data:merge", "nearest first"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.json")), ids=lambda path: path.name)
def test_recipes_are_valid(path):
    values = json.loads(path.read_text())
    if "model_type" in values:
        assert set(values) <= set(DeformVosConfig(**values).to_dict()), "a model's settings, each of them known"
    else:
        train_distill.parse([str(path)])


def test_the_bare_call_is_the_quick_start(monkeypatch):
    seen = []
    monkeypatch.setattr(train_distill, "build", lambda config: seen.append(config) or SimpleNamespace(evaluate=1))
    monkeypatch.setattr(train_distill, "quick_start", lambda trainer, started: seen.append("quick start"))
    assert train_distill.main([]) == 0
    config, told = seen
    assert told == "quick start"
    assert config.supervision == "pseudo"
    assert config.teacher.endswith("hub_cards/deformvos-teacher")
    assert config.video_dirs == [str(ROOT / "examples")] or config.video_dirs == ["examples"]


def test_the_recipe_of_the_quick_start_on_other_videos_is_a_run_like_any_other(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_distill, "build", lambda config: SimpleNamespace(evaluate=1, train=lambda: seen.append("run"))
    )
    monkeypatch.setattr(train_distill, "quick_start", lambda trainer, started: seen.append("quick start"))
    recipe = str(ROOT / "recipes" / "quickstart.json")
    assert train_distill.main([recipe, "--max_train_steps", "9"]) == 0
    assert train_distill.main([recipe, "--video_dirs", "mine"]) == 0
    assert seen == ["quick start", "run"]


def test_a_missing_bundled_teacher_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "run.json"
    values = json.loads((ROOT / "recipes" / "quickstart.json").read_text())
    recipe.write_text(json.dumps({**values, "output_dir": str(tmp_path / "run")}))
    assert train_distill.main([str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "`teacher` 'hub_cards/deformvos-teacher', which comes with the repository, is not there" in error
    assert not (tmp_path / "run").exists()


def test_every_kind_of_source_is_opened(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    from test_data_readers import make_rows, write_parquet, write_youtube_vos

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_davis(tmp_path / "davis", names=("ant", "swing"), frames=3)
    write_youtube_vos(tmp_path / "youtube", meta=False)
    for part in ("JPEGImages", "Annotations"):
        for path, name in zip(sorted((tmp_path / "youtube" / part).iterdir()), ("bee", "swing"), strict=True):
            path.rename(path.with_name(name))
    write_parquet(tmp_path / "rows.parquet", make_rows(names=("cat", "kite-walk")))
    write_static_set(tmp_path / "sets" / "some")
    config = settings(
        tmp_path,
        davis_dirs=[str(tmp_path / "davis")],
        youtube_vos_dirs=[str(tmp_path / "youtube")],
        dataset_names=[f"{tmp_path / 'rows.parquet'}:merge"],
        dataset_streaming=True,
        static_dirs=[str(tmp_path / "sets")],
        video_dirs=["plain"],
        cache_dir=str(tmp_path / "cache"),
        eval_steps=5,
    )
    labelled = []
    data = open_data(config, lambda folder: labelled.append(folder) or load_davis(tmp_path / "davis", 96))
    assert labelled == ["plain"] and len(data.pseudo) == len(data.statics) == 1
    davis, youtube, rows = data.videos
    assert list(davis.sequences) == ["ant"] and list(rows.sequences) == ["cat"], "held-out sequences are left out"
    final = open_data(dataclasses.replace(config, train_on_held_out=True, eval_steps=0, video_dirs=[]))
    assert list(final.videos[0].sequences) == ["ant", "swing"]
    assert list(final.videos[2].sequences) == ["cat", "kite-walk"]
    assert {box.object_id for boxes in rows.objects for box in boxes} == {1}
    assert list(youtube.sequences) == ["bee"]
    spec = config.clip_spec(config.stage_at(0))
    assert data.sampler(0)(0, spec).frames.shape[:2] == (2, 2)
    assert list(open_evaluation(config, data).stores[0].sequences) == ["swing"]
    alone = settings(tmp_path, video_dirs=["plain"], eval_steps=5)
    assert open_evaluation(alone, data).stores == data.pseudo, "scored against the teacher's masks"
    assert open_evaluation(settings(tmp_path), data) is None


def test_models_of_another_kind_are_refused(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path / "vit")
    other, message = str(tmp_path / "vit"), "must be a DeformVOS model, got .*, a Dinov2Model"
    with pytest.raises(ValueError, match=f"`teacher` {message}"):
        build_teacher(settings(tmp_path, teacher=other))
    with pytest.raises(ValueError, match=f"`student` {message}"):
        build_student(settings(tmp_path, student=other))
    with pytest.raises(ValueError, match=f"`init_from` {message}"):
        build_student(settings(tmp_path, init_from=other))


def test_a_fresh_student_takes_over_what_is_not_excepted(tmp_path, warnings_of_package):
    given = tiny(5)
    given.save_pretrained(tmp_path / "given")
    (tmp_path / "student.json").write_text(json.dumps({**TINY_CONFIG, "hiden_size": 32}))
    fresh = {"student": str(tmp_path / "student.json"), "init_from": str(tmp_path / "given")}
    student = build_student(settings(tmp_path, **fresh, init_except=["decoder.classifier", "identity_bank"]))
    assert "has no hiden_size" in warnings_of_package.text
    for name, value in student.state_dict().items():
        if name.startswith(("decoder.classifier.weight", "identity_bank.embed.weight")):
            assert not torch.equal(value, given.state_dict()[name]), name
        elif not name.startswith(("decoder.classifier", "identity_bank")):
            assert torch.equal(value, given.state_dict()[name]), name
    backbone = tiny(6).backbone.state_dict()
    save_file(backbone, tmp_path / "backbone.safetensors")
    fresh_backbone = {"init_backbone": str(tmp_path / "backbone.safetensors"), "init_except": ["backbone"]}
    weights = build_student(settings(tmp_path, **fresh, **fresh_backbone)).state_dict()
    assert all(torch.equal(value, weights[f"backbone.{name}"]) for name, value in backbone.items())
    assert torch.equal(weights["decoder.classifier.weight"], given.state_dict()["decoder.classifier.weight"])
    with pytest.raises(ValueError, match=r"`init_except` must hold parts of the names of .*, got decodr"):
        build_student(settings(tmp_path, **fresh, init_except=["decodr", "identity_bank"]))


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught_run(tmp_path_factory):
    """A configuration file that distils a tiny teacher, with a part of the student frozen at first."""
    from hf_deformvos import DeformVosImageProcessor, DeformVosProcessor

    folder = tmp_path_factory.mktemp("taught")
    write_davis(folder / "davis", names=("ant", "bee"), frames=5)
    write_static_set(folder / "sets" / "some", values=(1,))
    (folder / "student.json").write_text(json.dumps(TINY_CONFIG))
    tiny(2, num_hidden_layers=2).save_pretrained(folder / "teacher")
    DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 96})).save_pretrained(folder / "teacher")
    values = {
        "student": "student.json",
        "teacher": "teacher",
        "supervision": "both",
        "kl_weight": 0.1,
        "davis_dirs": ["davis"],
        "static_dirs": ["sets"],
        "cache_dir": str(folder / "cache"),
        "stages": [{"until": 1.0, "size": [49, 65], "frames": 2, "batch": 1}],
        "freeze": ["backbone.", "token_projection."],
        "freeze_until": 0.5,
        "max_train_steps": 8,
        "mixed_precision": "no",
        "checkpointing_steps": 2,
        "logging_steps": 1,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_held_out_sequences_are_left_out_of_plain_videos(taught_run, tmp_path):
    davis = taught_run / "davis"
    for name in ("ant", "swing"):
        shutil.copytree(davis / "JPEGImages" / "480p" / "ant", tmp_path / "plain" / name)
        shutil.copy(davis / "Annotations" / "480p" / "ant" / "00000.png", tmp_path / "plain" / f"{name}.png")
    config = settings(tmp_path, teacher=str(taught_run / "teacher"), cache_dir=str(tmp_path / "cache"))
    teacher = build_teacher(config)
    assert list(teacher.label(str(tmp_path / "plain"), config, "cpu").sequences) == ["ant"]
    final = settings(tmp_path, train_on_held_out=True, cache_dir=str(tmp_path / "cache"))
    assert list(teacher.label(str(tmp_path / "plain"), final, "cpu").sequences) == ["ant", "swing"]


@pytest.mark.slow
def test_killed_at_a_random_step_and_resumed_equals_uninterrupted(taught_run):
    killed, whole = taught_run / "killed", taught_run / "whole"
    # Far enough from the end not to be over before a busy machine comes to kill it.
    stop, steps = random.SystemRandom().randint(3, 12), 30
    config = [str(taught_run / "config.json"), "--max_train_steps", str(steps)]
    threads = ["--num_cpu_threads_per_process", str(torch.get_num_threads())]
    launched = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", *threads, "train_distill.py"]
    command = [sys.executable, "-m", *launched, *config, "--output_dir", str(killed)]
    with open(taught_run / "killed.log", "w") as log:
        run = {"env": command_env(), "cwd": ROOT, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, start_new_session=True, **run)
        path = killed / "log.jsonl"
        while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < stop):
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)  # launcher and run
        process.wait()
    assert process.returncode == -signal.SIGKILL, (taught_run / "killed.log").read_text()[-3000:]
    # As if it had been killed while writing, too.
    half = killed / ".writing-checkpoint-98"
    half.mkdir(exist_ok=True)
    (half / "model.safetensors").write_bytes(b"half")
    (killed / "checkpoint-99").mkdir()
    save_file({"half": torch.zeros(1)}, killed / "checkpoint-99" / "model.safetensors")
    flags = [*config, "--resume_from_checkpoint", "latest"]
    assert train_distill.main([*flags, "--output_dir", str(killed)]) == 0, f"killed at step {stop}"
    assert train_distill.main([*config, "--output_dir", str(whole)]) == 0
    assert sha256(killed / "model.safetensors") == sha256(whole / "model.safetensors"), f"killed at step {stop}"
    assert [line["step"] for line in log_of(killed)] == list(range(1, steps + 1))
    for line, other in zip(log_of(killed), log_of(whole), strict=True):
        assert {n: v for n, v in line.items() if n.startswith("loss")} == {
            n: v for n, v in other.items() if n.startswith("loss")
        }
    teacher = load_file(taught_run / "teacher" / "model.safetensors")
    checkpoint = load_file(killed / f"checkpoint-{steps}" / "training" / "student.safetensors")
    assert len(checkpoint) < len(teacher), "the student has one layer, and no teacher beside it"


@pytest.mark.slow
def test_two_processes_through_accelerate_launch_equal_one(taught_run):
    """
    `--multi_gpu` is how accelerate says torchrun: without a GPU, the processes talk over gloo. Batch n is the same
    whoever draws it, so two processes are one that accumulates two batches a step. The parameters that are released
    on the way are told to every process.
    """
    config, both, one = str(taught_run / "config.json"), taught_run / "both", taught_run / "one"
    flags = ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    ran = launch(
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *("train_distill.py", config, *flags, "--output_dir", str(both)),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one_flags = [*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(one)]
    assert train_distill.main([config, *one_flags]) == 0
    ours, theirs = log_of(both), log_of(one)
    assert [line["step"] for line in ours] == [1, 2, 3, 4]
    # AdamW moves weights by the sign of tiny gradients, which the order of sums decides.
    for line, other, tolerance in zip(ours, theirs, [1e-5, 1e-3, 1e-3, 1e-3], strict=True):
        for name in (name for name in other if name.startswith("loss")):
            assert line[name] == pytest.approx(other[name], rel=tolerance, abs=1e-5), (line["step"], name)
    assert json.loads((both / "all_results.json").read_text())["clips"] == 8
    assert [path.name for path in list_checkpoints(both)] == ["checkpoint-2", "checkpoint-4"]
    weights, others = load_file(both / "model.safetensors"), load_file(one / "model.safetensors")
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=2e-3), name


@pytest.mark.slow
def test_the_quick_start_runs_and_says_what_to_do_next(taught_run):
    output = taught_run / "quick"
    ran = launch(
        *("accelerate.commands.launch", "train_distill.py"),
        *("recipes/quickstart.json", "--teacher", str(taught_run / "teacher"), "--init_from", ""),
        *("--student", str(taught_run / "student.json"), "--output_dir", str(output)),
        *("--max_train_steps", "2", "--cache_dir", str(taught_run / "cache"), "--video_short_side", "48"),
        *("--stages", '[{"until": 1, "size": [33, 49], "frames": 2, "batch": 1}]', "--mixed_precision", "no"),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for part in ("loss", "J against the teacher's", "deformvos segment", "accelerate launch", str(output)):
        assert part in ran.stdout, part
    assert DeformVosModel.from_pretrained(output).config.hidden_size == TINY_CONFIG["hidden_size"]
    assert os.listdir(output / "overlays")
