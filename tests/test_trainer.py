"""
The training loop: schedule, exact resuming, averaged weights, checkpoints, several processes, users' mistakes.

Two processes on a CPU are `accelerate launch --multi_gpu --num_processes 2`: with `--cpu`, accelerate leaves it to MPI
to start more than one, whereas `--multi_gpu` is its name for torchrun, and does not look for a GPU.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_CONFIG
from safetensors.torch import load_file
from synthetic import write_davis, write_static_set
from torch import nn


pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState

import train_distill
from hf_deformvos import DeformVosConfig, DeformVosModel
from hf_deformvos.data import ClipSampler, RawBatch, load_static_sets
from hf_deformvos.data.transforms import AugmentConfig, ClipBatch
from hf_deformvos.publishing.release import MAX_ENLARGEMENT
from hf_deformvos.training import SegmentationTask, Trainer, TrainingConfig
from hf_deformvos.training.batches import WorkerProcesses
from hf_deformvos.training.checkpoint import STATE_FILE, find_checkpoint, list_checkpoints, write_checkpoint
from hf_deformvos.training.ema import WeightAverage
from hf_deformvos.training.optimization import learning_rate_factor, parameter_groups
from hf_deformvos.training.trainer import TrainingDiverged, _teacher_hash


STAGE = {"until": 1.0, "size": [33, 49], "frames": 2, "batch": 2}


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Accelerate's state is global; sums of floats depend on the number of threads, so there is one everywhere."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


class Toy(nn.Module):
    """The smallest student: colours of a frame, and where the object was in the first one, decide."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.offset_head = nn.Conv2d(5, 4, 1)
        self.head = nn.Conv2d(4, 1, 1)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, pixel_values, id_masks, num_objects, **kwargs):
        self.seen += 1
        features = self.backbone(pixel_values[:, 1:].flatten(0, 1))
        channels = [features.new_zeros(len(features), 1, *features.shape[-2:])]
        for number in range(1, num_objects + 1):
            first = (
                (id_masks[:, :1, None, ::4, ::4] == number).float().expand(-1, pixel_values.shape[1] - 1, -1, -1, -1)
            )
            hidden = self.offset_head(torch.cat([features, first.flatten(0, 1)], 1)).relu()
            channels.append(self.head(hidden))
        logits = torch.cat(channels, 1).unflatten(0, (len(id_masks), -1))
        return SimpleNamespace(logits=logits)


def settings(tmp_path, **changes) -> TrainingConfig:
    values = {
        "output_dir": str(tmp_path / "run"),
        "stages": [STAGE],
        "max_train_steps": 6,
        "mixed_precision": "no",
        "data_workers": 0,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.01,
    }
    return TrainingConfig(**{**values, **changes})


def sampler_of(tmp_path) -> ClipSampler:
    if not (tmp_path / "sets").exists():
        write_static_set(tmp_path / "sets" / "some", values=(1, 2))
    return ClipSampler(statics=load_static_sets(tmp_path / "sets", cache_dir=tmp_path / "c", show_progress_bar=False))


def make_trainer(tmp_path, sampler=None, teacher=None, evaluate=None, **changes) -> Trainer:
    torch.manual_seed(1)
    task = SegmentationTask(Toy(), teacher)
    return Trainer(settings(tmp_path, **changes), task, sampler or sampler_of(tmp_path), evaluate=evaluate)


class Interrupted:
    """A sampler that fails at batch number `at`, as a machine does."""

    def __init__(self, sampler, at: int):
        self.sampler, self.at = sampler, at

    def __call__(self, index, spec):
        if index == self.at:
            raise KeyboardInterrupt
        return self.sampler(index, spec)


class ToldToEnd(Interrupted):
    """A sampler during whose batch number `at` the process is asked to end."""

    asking = signal.SIGTERM

    def __call__(self, index, spec):
        if index == self.at:
            signal.raise_signal(self.asking)
        return self.sampler(index, spec)


class Fixed:
    """Clips as large as the output: augmentation without strength leaves them alone. Clip n is always the same."""

    def __call__(self, index, spec):
        clips = range(index * spec.batch, (index + 1) * spec.batch)
        frames = torch.stack([self.draw(n) for n in clips])
        masks = torch.zeros(frames.shape[:-1], dtype=torch.uint8)
        masks[:, :, 8:24, 10:30] = 1
        return RawBatch(frames, masks, torch.ones(spec.batch, dtype=torch.bool), spec.size)

    @staticmethod
    def draw(number):
        generator = torch.Generator().manual_seed(number)
        return torch.randint(0, 256, (2, 33, 49, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture
def still(monkeypatch):
    """Augmentation that leaves the clips of `Fixed` as they are."""
    nothing = dict.fromkeys(
        ("flip", "rotation", "scale", "shear", "motion", "elastic", "color", "grayscale", "blur"), 0
    )
    config = AugmentConfig(paste=0, distractor=0, occluder=0, **nothing)
    monkeypatch.setattr(TrainingConfig, "augmentation", lambda self, stage: config)


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_learning_rate_rises_and_falls():
    assert learning_rate_factor(0.0, 0, 0.1, 0.9) == pytest.approx(1e-3)
    assert learning_rate_factor(0.05, 5, 0.1, 0.9) == pytest.approx(0.5 * 0.95**0.9)
    assert learning_rate_factor(0.1, 10, 0.1, 0.9) == pytest.approx(0.9**0.9)
    assert learning_rate_factor(0.5, 50, 0.0, 1.0) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 100, 0.1, 0.9) == 0.0
    # However many steps a run has: its warm-up is as long as it says.
    assert learning_rate_factor(0.005, 500, 0.05, 0.9) == pytest.approx(0.1 * 0.995**0.9)


def test_parameter_groups_have_own_rates(tmp_path):
    toy = Toy()
    groups = parameter_groups(toy, settings(tmp_path, backbone_lr_scale=0.1, offset_lr_scale=0.3, weight_decay=0.02))
    found = {(g["lr_scale"], g["weight_decay"]): {id(p) for p in g["params"]} for g in groups}
    assert found == {
        (0.1, 0.02): {id(toy.backbone.weight)},
        (0.1, 0.0): {id(toy.backbone.bias)},
        (0.3, 0.02): {id(toy.offset_head.weight)},
        (0.3, 0.0): {id(toy.offset_head.bias)},
        (1.0, 0.02): {id(toy.head.weight)},
        (1.0, 0.0): {id(toy.head.bias)},
    }
    frozen = parameter_groups(toy, settings(tmp_path, freeze=["backbone."]))
    assert not toy.backbone.weight.requires_grad
    assert sum(len(group["params"]) for group in frozen) == 4


def test_the_average_follows_the_weights():
    toy = Toy()
    average = WeightAverage(toy, decay=0.5)
    expected = toy.head.weight.detach().double().clone()
    for count in range(1, 15):
        with torch.no_grad():
            toy.head.weight += count
            toy.seen += 1
        average.update(toy)
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * toy.head.weight.detach().double()
    assert torch.allclose(average.weights["head.weight"].double(), expected, rtol=1e-5)
    assert average.weights["seen"] == 14
    with pytest.raises(ValueError, match=r"do not fit: \['other'\] differ"):
        average.load({**average.weights, "other": torch.zeros(1)}, 1)


def test_own_masks_and_stages_follow_progress(tmp_path):
    stages = [{**STAGE, "until": 0.5}, {**STAGE, "size": [49, 65], "paste": 0.9, "video_share": 0.1, "max_gap": 3}]
    config = settings(tmp_path, stages=stages, own_masks_end=0.8, own_masks_from=0.2, own_masks_until=0.6)
    assert [config.own_mask_probability(p) for p in (0, 0.2, 0.4, 0.6, 1)] == pytest.approx([0, 0, 0.4, 0.8, 0.8])
    assert [config.stage_at(p).size for p in (0.0, 0.49, 0.5, 1.0)] == [(33, 49)] * 2 + [(49, 65)] * 2
    second = config.stage_at(0.7)
    assert (config.augmentation(second).paste, config.clip_spec(second).max_gap) == (0.9, 3)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    make_trainer(tmp_path, output_dir=str(tmp_path / "whole")).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), 3)).train()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path, resume_from_checkpoint="latest").train()
    assert resumed["steps"] == 6
    assert resumed["clips"] == 12
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")
    for part in ("student", "average"):
        ours, theirs = (
            tmp_path / run / "checkpoint-6" / "training" / f"{part}.safetensors" for run in ("run", "whole")
        )
        assert sha256(ours) == sha256(theirs)


@pytest.mark.parametrize("asking, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_end_keeps_what_it_did(tmp_path, monkeypatch, asking, code):
    monkeypatch.setattr(ToldToEnd, "asking", asking)
    make_trainer(tmp_path, output_dir=str(tmp_path / "whole")).train()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
    before = signal.getsignal(asking)
    with pytest.raises(SystemExit) as ended:
        make_trainer(tmp_path, ToldToEnd(sampler_of(tmp_path), 2)).train()
    assert ended.value.code == code and signal.getsignal(asking) is before
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-3", "the step was finished and kept"
    make_trainer(tmp_path, resume_from_checkpoint="latest", checkpointing_steps=0).train()
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-6", "and the end, to which it is resumed again"
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")


def test_batches_of_worker_processes_are_the_same(tmp_path):
    make_trainer(tmp_path, output_dir=str(tmp_path / "whole")).train()
    trainer = make_trainer(tmp_path, data_workers=2)
    trainer._on_gpu = True  # what it decides: who makes the batches
    trainer.train()
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")


def test_worker_processes_keep_order_and_hand_over_errors():
    asked = []

    def make(number):
        if number == 7:
            raise ValueError("clip seven is broken")
        clips = ClipBatch(*(torch.full((1,), number) for _ in range(3)))
        return clips, torch.Generator().manual_seed(number)

    def keys():
        for number in itertools.count(4):
            asked.append(number)
            yield (number,)

    workers = WorkerProcesses(make, keys(), 2, torch.device("cpu"))
    for number in (4, 5, 6):
        clips, generator = workers.get()()
        assert int(clips.id_masks) == number and generator.initial_seed() is not None
        expected = torch.rand((), generator=torch.Generator().manual_seed(number))
        assert torch.rand((), generator=generator) == expected
        assert max(asked) <= number + 2, "a later stage's batches are not drawn long before it"
    groups = [os.getpgid(process.pid) for process in multiprocessing.active_children()]
    assert len(groups) == 2 and os.getpgid(0) not in groups, "asked to end as a group, the run outlives the request"
    workers.close()
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="clip seven is broken"):
        WorkerProcesses(make, [(7,)], 1, torch.device("cpu")).get()


def test_half_written_checkpoints_are_never_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), 5)).train()
    run = tmp_path / "run"
    (run / "checkpoint-9" / "training").mkdir(parents=True)
    (run / ".writing-checkpoint-8").mkdir()
    (run / ".writing-checkpoint-8" / "trainer_state.json").write_text("{}")
    assert find_checkpoint(run, "latest").name == "checkpoint-4"
    for name in ("checkpoint-9", ".writing-checkpoint-8", "checkpoint-77"):
        with pytest.raises(ValueError, match="must be a complete checkpoint folder or latest, got"):
            find_checkpoint(run, str(run / name))
    assert make_trainer(tmp_path, resume_from_checkpoint="latest").train()["steps"] == 6
    assert not (run / ".writing-checkpoint-8").exists(), "left over by a killed run"


def test_a_failure_while_writing_leaves_no_checkpoint(tmp_path):
    def write(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 3, write, {}, keep=2)
    assert find_checkpoint(tmp_path, "latest") is None
    write_checkpoint(tmp_path, 4, lambda folder: None, {"step": 4}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize("step, keep", [(5, 0), (6, 1)])
def test_a_checkpoint_whose_removal_is_interrupted_is_no_checkpoint(tmp_path, monkeypatch, step, keep):
    def write(folder):
        (folder / "weights").write_text("whole")

    def killed(folder, **options):
        if (folder / "weights").exists():
            (folder / "weights").unlink()
            raise KeyboardInterrupt

    write_checkpoint(tmp_path, 5, write, {}, keep)
    monkeypatch.setattr("hf_deformvos.training.checkpoint.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, step, write, {}, keep)
    assert all((path / "weights").exists() for path in list_checkpoints(tmp_path))


def test_old_checkpoints_are_removed_but_not_the_new_one(tmp_path):
    for step in (5, 10, 100, 15):
        write_checkpoint(tmp_path, step, lambda folder: None, {"step": step}, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15", "checkpoint-100"]
    write_checkpoint(tmp_path, 1, lambda folder: None, {"step": 1}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    for step in (2, 3):
        write_checkpoint(tmp_path, step, lambda folder: None, {"step": step}, keep=0)
    assert len(list_checkpoints(tmp_path)) == 3


def test_an_earlier_run_is_not_overwritten(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match="holds an earlier run's checkpoints"):
        make_trainer(tmp_path).train()
    finished = make_trainer(tmp_path, resume_from_checkpoint="latest").train()
    assert finished["steps"] == 6, "a finished run has nothing left to do"


@pytest.mark.parametrize("limit", [{"max_train_steps": 5}, {"max_train_steps": None, "max_train_minutes": 0.01}])
def test_a_repeated_command_leaves_a_finished_run_as_it_is(tmp_path, limit):
    settings = {**limit, "checkpointing_steps": 4, "resume_from_checkpoint": "latest", "eval_steps": 2}

    def files():
        return {path: sha256(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def scores(student, device):
        return {"eval_j": 0.5}

    first = make_trainer(tmp_path, evaluate=scores, **settings).train()
    before = files()
    assert make_trainer(tmp_path, evaluate=scores, **settings).train() == first
    # What a run that takes no step was given is not what made it.
    assert make_trainer(tmp_path, evaluate=scores, **settings, color=0.2, learning_rate=123.0).train() == first
    assert files() == before


def test_a_run_that_ended_while_it_wrote_its_results_writes_them_when_it_is_repeated(tmp_path):
    first = make_trainer(tmp_path, resume_from_checkpoint="latest").train()
    path = tmp_path / "run" / "all_results.json"
    path.write_text(path.read_text()[:20])
    assert make_trainer(tmp_path, resume_from_checkpoint="latest").train()["sha256"] == first["sha256"]
    assert json.loads(path.read_text())["steps"] == 6
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")  # as a power cut leaves it
    assert make_trainer(tmp_path, resume_from_checkpoint="latest").train()["sha256"] == first["sha256"]
    assert sha256(tmp_path / "run" / "model.safetensors") == first["sha256"]


def test_going_on_with_what_was_abandoned(tmp_path):
    """A checkpoint is the one of its place, not any of its step that lies in the folder."""
    run = tmp_path / "run"
    first = make_trainer(tmp_path, max_train_steps=8, checkpoints_total_limit=0).train()
    back = {"resume_from_checkpoint": str(run / "checkpoint-2"), "learning_rate": 0.001}
    second = make_trainer(tmp_path, max_train_steps=8, checkpoints_total_limit=0, **back).train()
    assert second["sha256"] != first["sha256"]
    regretted = {"resume_from_checkpoint": str(run / "abandoned-checkpoint-4"), "checkpoints_total_limit": 0}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), 5), max_train_steps=8, **regretted).train()
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    latest = {"resume_from_checkpoint": "latest", "checkpoints_total_limit": 0}
    assert make_trainer(tmp_path, max_train_steps=8, **latest).train()["sha256"] == first["sha256"]
    over = {**regretted, "resume_from_checkpoint": str(run / "abandoned-checkpoint-8-2")}
    again = make_trainer(tmp_path, max_train_steps=8, **over).train()
    assert again["sha256"] == sha256(run / "model.safetensors") == second["sha256"]


def test_the_best_model_of_an_abandoned_stretch_goes_with_it(tmp_path):
    settings = {"eval_steps": 2, "checkpoints_total_limit": 0}
    scores = iter([0.5, 0.9, 0.8])
    make_trainer(tmp_path, evaluate=lambda model, device: {"eval_j": next(scores)}, **settings).train()
    left = sha256(tmp_path / "run" / "best" / "model.safetensors")
    back = {**settings, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2"), "learning_rate": 0.001}
    make_trainer(tmp_path, evaluate=lambda model, device: {"eval_j": 0.4}, **back).train()
    assert sha256(tmp_path / "run" / "abandoned-best" / "model.safetensors") == left
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text()) == {"step": 4, "eval_j": 0.4}


def test_going_back_leaves_later_checkpoints_aside(tmp_path, warnings_of_package):
    make_trainer(tmp_path, max_train_steps=8, checkpoints_total_limit=0).train()
    early = str(tmp_path / "run" / "checkpoint-2")
    for attempt in range(2):
        other = make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), 5), resume_from_checkpoint=early)
        with pytest.raises(KeyboardInterrupt):
            other.train()
        names = [path.name for path in list_checkpoints(tmp_path / "run")]
        assert names == ["checkpoint-2", "checkpoint-4"], "`latest` is of the new attempt"
        assert (tmp_path / "run" / f"abandoned-checkpoint-4{'-2' * attempt}").is_dir()
    assert "Going back to step 2: what lies beyond it is kept as abandoned-checkpoint-4," in warnings_of_package.text


def test_another_runs_checkpoint_does_not_replace_a_run(tmp_path):
    make_trainer(tmp_path, output_dir=str(tmp_path / "other"), max_train_steps=2).train()
    weights = sha256(tmp_path / "other" / "model.safetensors")
    make_trainer(tmp_path, seed=5).train()
    mine = sha256(tmp_path / "run" / "model.safetensors")
    foreign = str(tmp_path / "other" / "checkpoint-2")
    with pytest.raises(ValueError, match="holds an earlier run's checkpoints"):
        make_trainer(tmp_path, resume_from_checkpoint=foreign).train()
    assert sha256(tmp_path / "run" / "model.safetensors") == mine
    fresh = make_trainer(tmp_path, resume_from_checkpoint=foreign, output_dir=str(tmp_path / "fresh")).train()
    assert fresh["steps"] == 6
    assert sha256(tmp_path / "other" / "model.safetensors") == weights


def test_processes_that_do_not_see_the_same_checkpoint_are_told(tmp_path, monkeypatch):
    """As on machines without a disk in common."""
    monkeypatch.setattr("hf_deformvos.training.trainer.gather", lambda step: torch.cat([step, step + 4]))
    with pytest.raises(ValueError, match=r"must begin at the same step, got \[0, 4\]: `output_dir` must be on a disk"):
        make_trainer(tmp_path).train()


def test_rates_and_decays_are_those_of_the_settings_after_resuming(tmp_path):
    make_trainer(tmp_path, max_train_steps=2).train()
    trainer = make_trainer(
        tmp_path, resume_from_checkpoint="latest", weight_decay=0.5, backbone_lr_scale=0.9, offset_lr_scale=0.7
    )
    trainer.train()
    groups = {(group["lr_scale"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert groups == {(scale, decay) for scale in (0.9, 0.7, 1.0) for decay in (0.5, 0.0)}
    shutil.rmtree(tmp_path / "run")
    make_trainer(tmp_path, max_train_steps=2).train()
    with pytest.raises(ValueError, match=r"other groups of parameters .*`backbone_lr_scale`"):
        make_trainer(tmp_path, resume_from_checkpoint="latest", backbone_lr_scale=1.0).train()


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "training/student.safetensors", "training/average.safetensors", "training/optimizer.pt"],
)
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    make_trainer(tmp_path, max_train_steps=2).train()
    path = tmp_path / "run" / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"The checkpoint .*checkpoint-2 cannot be read .*: take it away, and resume"):
        make_trainer(tmp_path, resume_from_checkpoint="latest").train()


@pytest.mark.parametrize("state", [{}, [], None, {"step": 2}])
def test_a_checkpoint_whose_state_says_too_little_is_named(tmp_path, state):
    make_trainer(tmp_path, max_train_steps=2).train()
    (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"The checkpoint .*checkpoint-2 cannot be read .*: take it away, and resume"):
        make_trainer(tmp_path, resume_from_checkpoint="latest").train()


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "hf_deformvos.training.trainer.write_checkpoint",
        lambda output_dir, step, *others: written.append(step) or write_checkpoint(output_dir, step, *others),
    )
    make_trainer(tmp_path, checkpointing_steps=3).train()
    assert written == [3, 6]
    make_trainer(tmp_path, checkpointing_steps=3, resume_from_checkpoint="latest").train()
    assert written == [3, 6]


def test_results_of_an_earlier_run_are_not_overwritten(tmp_path):
    trainer = make_trainer(tmp_path, checkpointing_steps=100, logging_steps=2)
    trainer.train()
    for checkpoint in list_checkpoints(trainer.output_dir):
        shutil.rmtree(checkpoint)
    log = trainer.log.path.read_text()
    for resume in (None, "latest"):
        with pytest.raises(ValueError, match=r"holds the all_results\.json of an earlier run"):
            make_trainer(tmp_path, checkpointing_steps=100, resume_from_checkpoint=resume).train()
    assert trainer.log.path.read_text() == log
    assert make_trainer(tmp_path, checkpointing_steps=0).train()["steps"] == 6, "a quick run may be repeated"


def test_checkpoints_of_another_student_are_refused(tmp_path):
    make_trainer(tmp_path, max_train_steps=2).train()
    trainer = make_trainer(tmp_path, resume_from_checkpoint="latest")
    trainer.student.head = nn.Conv2d(8, 1, 1)
    with pytest.raises(ValueError, match=r"was written by a run with another student: .*head\.weight"):
        trainer.train()


# ---- results --------------------------------------------------------------------------------------------------------


def test_resuming_a_run_that_is_over_changes_nothing(tmp_path):
    def results():
        found = json.loads((tmp_path / "run" / "all_results.json").read_text())
        return {**found, "config": {**found["config"], "resume_from_checkpoint": None}}

    make_trainer(tmp_path).train()
    first = results()
    assert "loss_ce" in first
    make_trainer(tmp_path, resume_from_checkpoint="latest").train()
    assert results() == first


def test_what_has_changed_since_the_checkpoint_is_named(tmp_path, warnings_of_package):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "all_results.json").write_text('{"sha256": "one"}')
    trainer = make_trainer(tmp_path, Interrupted(sampler_of(tmp_path), 3))
    trainer.config.teacher = str(teacher)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (path,) = (tmp_path / "run").glob(f"checkpoint-*/{STATE_FILE}")
    state = json.loads(path.read_text())
    assert state["processes"] == 1
    path.write_text(json.dumps({**state, "processes": 2}))
    (teacher / "all_results.json").write_text('{"sha256": "other"}')
    trainer = make_trainer(tmp_path, color=0.5, resume_from_checkpoint="latest")
    trainer.config.teacher = str(teacher)
    results = trainer.train()
    assert "color 1.0 -> 0.5, processes 2 -> 1" in warnings_of_package.text
    assert f"The teacher in {teacher} is not the one that this run began with" in warnings_of_package.text
    assert results["teacher"]["sha256"] == "one", "the lineage is that of the beginning"
    assert _teacher_hash({"teacher": {"weights_sha256": "a release's"}}) == "a release's"


def test_results_state_what_was_done(tmp_path):
    # Seven steps and a log line every four: the last three steps are logged, too.
    results = make_trainer(tmp_path, max_train_steps=7, logging_steps=4, checkpointing_steps=0).train()
    run = tmp_path / "run"
    written = json.loads((run / "all_results.json").read_text())
    assert written == results
    assert written["sha256"] == sha256(run / "model.safetensors")
    assert (written["steps"], written["clips"], written["parameters"]) == (
        7,
        14,
        sum(p.numel() for p in Toy().parameters()),
    )
    assert written["config"]["max_train_steps"] == 7
    lines = log_of(run)
    assert [line["step"] for line in lines] == [4, 7]
    assert lines[-1]["progress"] == 1.0
    assert written["loss"] == lines[-1]["loss"]
    for line in lines:
        assert line["loss"] == pytest.approx(0.5 * line["loss_ce"] + 0.5 * line["loss_jaccard"], rel=1e-5)
        assert line["clips_per_second"] > 0
    assert list_checkpoints(run) == []


def test_training_lowers_the_loss_and_releases_the_average(tmp_path, still):
    rates = {"learning_rate": 0.1, "offset_lr_scale": 1.0, "backbone_lr_scale": 1.0}
    changes = {"checkpointing_steps": 0, "ema_decay": 0.5, "bootstrap_share": 1.0, **rates}
    trainer = make_trainer(tmp_path, Fixed(), max_train_steps=40, **changes)
    trainer.train()
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    released = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(released[name], value) for name, value in trainer.average.weights.items())


def test_minutes_end_a_run(tmp_path):
    results = make_trainer(tmp_path, max_train_steps=None, max_train_minutes=0.005, checkpointing_steps=0).train()
    assert 0.005 <= results["minutes"] < 0.1
    assert results["steps"] >= 1


def test_the_best_average_is_kept_and_training_goes_on_unchanged(tmp_path):
    scores = iter([0.5, 0.2, 0.4])
    seen = []

    def evaluate(model, device):
        seen.append(model.head.weight.detach().clone())
        return {"eval_j": next(scores)}

    trainer = make_trainer(tmp_path, evaluate=evaluate, eval_steps=2, checkpointing_steps=0)
    results = trainer.train()
    make_trainer(tmp_path, output_dir=str(tmp_path / "plain"), checkpointing_steps=0).train()
    assert results["eval_j"] == 0.4
    assert len(seen) == 3
    assert torch.equal(load_file(tmp_path / "run" / "best" / "model.safetensors")["head.weight"], seen[0])
    assert torch.equal(seen[-1], trainer.average.weights["head.weight"])
    assert sha256(tmp_path / "run" / "model.safetensors") == sha256(tmp_path / "plain" / "model.safetensors")


def test_tracking_writes_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make_trainer(tmp_path, max_train_steps=2, with_tracking=True)
    trainer.train()
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    trainer.log.write({"step": 3, "loss": None, "lr": 0.1})  # a loss that was not finite
    assert trainer.log.lines()[-1] == {"step": 3, "loss": None, "lr": 0.1}


def test_tracking_needs_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_deformvos.training.trainer.is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match="`with_tracking` needs the package tensorboard"):
        make_trainer(tmp_path, with_tracking=True)


@pytest.mark.parametrize("mixed_precision", ["no", "fp16"])
def test_a_run_whose_gradients_are_never_finite_ends(tmp_path, mixed_precision):
    trainer = make_trainer(tmp_path)
    trainer.config = replace(trainer.config, mixed_precision=mixed_precision)
    with pytest.raises(TrainingDiverged, match=r"20 steps in a row .* Lower `learning_rate`"):
        for _ in range(50):
            trainer._apply(torch.tensor(float("inf")))
    fine = make_trainer(tmp_path)
    for _ in range(3):
        for _ in range(19):
            fine._apply(torch.tensor(float("nan")))
        fine._apply(torch.tensor(1.0))


def test_steps_without_a_finite_gradient_are_skipped(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.student.head.bias.fill_(float("nan"))
    before = trainer.student.backbone.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.student.backbone.weight, before)
    assert trainer.average.updates == 0
    assert {line["loss"] for line in trainer.log.lines()} == {None}, "JSON knows no NaN"
    endless = make_trainer(tmp_path, output_dir=str(tmp_path / "endless"), max_train_steps=50)
    with torch.no_grad():
        endless.student.head.bias.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"20 steps in a row .* Lower `learning_rate`"):
        endless.train()


def test_a_skipped_step_is_not_in_the_means(tmp_path):
    trainer = make_trainer(tmp_path, logging_steps=3, checkpointing_steps=0)
    apply = trainer._apply

    def with_one_bad_norm(norm):
        if trainer.step == 1:
            norm.fill_(float("inf"))
        apply(norm)

    trainer._apply = with_one_bad_norm
    trainer.train()
    assert all(line["grad_norm"] > 0 for line in trainer.log.lines())
    strict = (tmp_path / "run" / "all_results.json").read_text()
    json.loads(strict, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# ---- accumulation and teachers --------------------------------------------------------------------------------------


def test_gradients_of_what_is_computed_in_float32_are_float32(tmp_path):
    seen = []

    class Watched(SegmentationTask):
        """Tells whether autocast is on when a step goes forward and backward."""

        def forward(self, batch, plan, generator):
            losses = super().forward(batch, plan, generator)
            seen.append(torch.is_autocast_enabled("cpu"))
            losses["loss"].register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
            return losses

    config = settings(tmp_path, mixed_precision="bf16", max_train_steps=1, checkpointing_steps=0)
    Trainer(config, Watched(Toy()), sampler_of(tmp_path)).train()
    assert seen == [True, False]


def test_accumulating_two_halves_equals_one_whole(tmp_path, still):
    records = []
    for name, batch, parts in (("whole", 4, 1), ("halves", 2, 2)):
        trainer = make_trainer(
            tmp_path,
            Fixed(),
            output_dir=str(tmp_path / name),
            stages=[{**STAGE, "batch": batch}],
            gradient_accumulation_steps=parts,
            max_train_steps=3,
        )
        results = trainer.train()
        assert results["clips"] == 12
        records.append((log_of(tmp_path / name), trainer.student.state_dict()))
    (whole, weights), (halves, other) = records
    for one, two in zip(whole, halves, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, value in weights.items():
        if name != "seen":
            assert torch.allclose(other[name], value, atol=1e-6)


def test_the_teacher_is_never_trained_saved_or_in_train_mode(tmp_path):
    teacher = Toy()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = make_trainer(tmp_path, teacher=teacher, max_train_steps=2)
    trainer.train()
    trainer.task.train()
    assert trainer.task.training
    assert trainer.student.training
    assert not teacher.training
    mine = {id(parameter) for parameter in teacher.parameters()}
    assert not mine & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not mine & {id(p) for p in trainer.task.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert len(trainer.task.state_dict()) == len(teacher.state_dict())
    assert "teacher" not in " ".join(trainer.task.state_dict())
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert len(load_file(tmp_path / "run" / "model.safetensors")) == len(before)


def test_supervision_from_a_teacher_needs_one(tmp_path):
    with pytest.raises(ValueError, match="needs a teacher to make pseudo-labels"):
        make_trainer(tmp_path, supervision="pseudo")
    with pytest.raises(ValueError, match="`max_train_steps` or `max_train_minutes`, got neither"):
        make_trainer(tmp_path, max_train_steps=None)
    with pytest.raises(ValueError, match=r"`kl_weight` 0.5 weighs what a teacher says: give `teacher`"):
        make_trainer(tmp_path, kl_weight=0.5)


@pytest.mark.parametrize(("fastest", "precision"), [("bfloat16", "bf16"), ("float32", "no")])
def test_precision_is_what_the_device_computes_natively(fastest, precision, monkeypatch):
    monkeypatch.setattr("hf_deformvos.training.config.fastest_dtype", lambda kind: fastest if kind == "cpu" else None)
    assert TrainingConfig().mixed_precision == precision, "and so the record says it"
    assert TrainingConfig(mixed_precision="bf16").mixed_precision == "bf16"


def test_steps_alone_may_end_a_run_whose_recipe_has_minutes(tmp_path):
    trainer = make_trainer(tmp_path, max_train_minutes=0.0, checkpointing_steps=0)
    assert trainer.progress_at(3, elapsed=1e9) == 0.5
    assert trainer.train()["steps"] == 6


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A configuration file for the real model on a tiny tree."""
    folder = tmp_path_factory.mktemp("command")
    write_davis(folder / "davis", names=("ant", "bee", "swing"), frames=5)
    write_static_set(folder / "sets" / "some", values=(1,))
    (folder / "student.json").write_text(json.dumps(TINY_CONFIG))
    values = {
        "student": str(folder / "student.json"),
        "davis_dirs": [str(folder / "davis")],
        "static_dirs": [str(folder / "sets")],
        "cache_dir": str(folder / "cache"),
        "stages": [{"until": 1.0, "size": [49, 65], "frames": 2, "batch": 1}],
        "max_train_steps": 4,
        "mixed_precision": "no",
        "checkpointing_steps": 2,
        "logging_steps": 1,
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def command_env() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}


def launch(*command, **kwargs) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-m", *command]
    return subprocess.run(
        arguments, env=command_env(), cwd=ROOT, capture_output=True, text=True, timeout=240, **kwargs
    )


@pytest.mark.slow
def test_accelerate_launch_trains_a_model_that_loads(tiny_run):
    from transformers import AutoModel, AutoProcessor

    ran = launch(
        *("accelerate.commands.launch", "--cpu", "--num_processes", "1", "train_distill.py"),
        *(str(tiny_run / "config.json"), "--output_dir", str(tiny_run / "launched")),
        *("--max_train_steps", "2", "--eval_steps", "2", "--with_tracking"),
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    results = json.loads((tiny_run / "launched" / "all_results.json").read_text())
    assert results["steps"] == 2
    assert results["sha256"] == sha256(tiny_run / "launched" / "model.safetensors")
    assert 0 <= results["eval_j/swing"] <= 1, "scored on a held-out sequence"
    model = AutoModel.from_pretrained(tiny_run / "launched")
    assert model.config.hidden_size == TINY_CONFIG["hidden_size"]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    # A run can be measured as its release will be: small videos are enlarged alike.
    assert AutoProcessor.from_pretrained(tiny_run / "launched").image_processor.max_enlargement == MAX_ENLARGEMENT


def test_settings_that_are_not_there_are_named(capsys):
    assert train_distill.main(["recipes/nothere.json"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: The settings recipes/nothere.json cannot be read (") and "student_cpu.json" in told


def test_files_are_settings_and_flags_override_them(tmp_path):
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-3\nmax_gap: 4\nstages:\n- " + json.dumps(STAGE) + "\n")
    config = train_distill.parse([str(tmp_path / "run.yaml"), "--max-gap", "7", "--no_channels_last"])
    assert (config.learning_rate, config.max_gap, config.channels_last) == (0.001, 7, False)
    assert config.stage_at(0).size == (33, 49)
    (tmp_path / "run.json").write_text(json.dumps({"max_gap": 4, "freeze": ["backbone."], "channels_last": False}))
    config = train_distill.parse([str(tmp_path / "run.json"), "--color=0.5"])
    assert (config.max_gap, config.freeze, config.channels_last, config.color) == (4, ["backbone."], False, 0.5)


MISTAKES = {
    "no data": ([], "There is nothing to train on: give `davis_dirs`"),
    "no such data": (["--static_dirs", "{tmp}/none"], "No image set"),
    "no limit": (["--static_dirs", "{tmp}/sets"], "`max_train_steps` or `max_train_minutes`, got neither"),
    "pseudo": (["--supervision", "pseudo"], "`supervision` 'pseudo' needs a teacher"),
    "unknown supervision": (["--supervision", "none"], "must be labels, pseudo or both, got 'none'"),
    "teacher": (["--teacher", "some/model"], "a Hub repository that can be reached, got 'some/model'"),
    "teacher without weights": (["--teacher", "{tmp}/davis"], "it has no *.safetensors"),
    "videos without a teacher": (["--video_dirs", "{tmp}/davis"], "`video_dirs` needs `teacher`"),
    "freeze nothing": (
        ["--static_dirs", "{tmp}/sets", "--max_train_steps", "1", "--freeze", "bakbone."],
        "`freeze` must hold prefixes of parameter names (backbone., ",
    ),
    "stages are no JSON": (["--stages", "[{"], "`stages` must be a JSON list"),
    "stages are no list": (["--stages", "{tmp}/map.json"], "`stages` must be a JSON list or a path to one"),
    "stages are numbers": (["--stages", "[5]"], "A stage must be an object"),
    "stage without size": (["--stages", '[{"until": 1, "frames": 2, "batch": 1}]'], "missing ['size']"),
    "stage of a wrong size": (
        ["--stages", '[{"until": 1, "size": [32, 49], "frames": 2, "batch": 1}]'],
        "form 16k+1, got (32, 49)",
    ),
    "stage with one size": (["--stages", '[{"until": 1, "size": 33, "frames": 2, "batch": 1}]'], "form 16k+1"),
    "stages that stop early": (
        ["--stages", '[{"until": 0.5, "size": [33, 49], "frames": 2, "batch": 1}]'],
        "must rise and end with 1.0, got [0.5]",
    ),
    "unknown flag": (["--learning_speed", "1"], "unknown arguments ['--learning_speed', '1']"),
    "wrong type of flag": (["--max_gap", "x"], "invalid int value: 'x'"),
    "no such file": (["{tmp}/none.json"], "No such file"),
    "broken file": (["{tmp}/broken.yaml"], "is not a valid configuration file"),
    "file is no map": (["{tmp}/list.json"], "must map settings to values, got list"),
    "unknown setting in a file": (["{tmp}/unknown.json"], "unknown settings ['learning_speed']"),
    "wrong type in a file": (["{tmp}/typed.json"], "`max_gap` must be a whole number, got 'x'"),
    "negative steps": (["--max_train_steps", "-1"], "`max_train_steps` must be at least 1, got -1"),
    "no evaluation": (["--eval_dir", "{tmp}/davis"], "is scored on every `eval_steps` steps"),
    "own masks backwards": (
        ["--own_masks_from", "0.9", "--own_masks_until", "0.1"],
        "`own_masks_from` must not lie behind `own_masks_until`, got 0.9 and 0.1",
    ),
    "unknown maps": (["--att_maps", "self", "cross"], "some of long_term, short_term, self, got ["),
    "freeze what": (["--freeze_until", "0.5"], "`freeze_until` 0.5 does nothing without `freeze`"),
    "stream of folders": (["--dataset_streaming"], "`dataset_streaming` True does nothing without `dataset_names`"),
    "name without a push": (["--hub_model_id", "a/b"], "`hub_model_id` 'a/b' does nothing without `push_to_hub`"),
    "student is cut": (
        ["--student", "{tmp}/cut", "--static_dirs", "{tmp}/sets", "--max_train_steps", "1"],
        "cut' has weights that cannot be read",
    ),
    "push without a name": (["--push_to_hub"], "`push_to_hub` needs `hub_model_id`"),
    "bad student": (["--student", "{tmp}/student.json", "--static_dirs", "{tmp}/sets"], "hidden_size"),
    "student is no JSON": (
        ["--student", "{tmp}/broken.json", "--static_dirs", "{tmp}/sets"],
        "broken.json' must be a",
    ),
    "student is no map": (["--student", "{tmp}/list.json", "--static_dirs", "{tmp}/sets"], "got list"),
    "more objects than slots": (
        ["--student", "{tmp}/slots.json", "--static_dirs", "{tmp}/sets", "--max_train_steps", "1"],
        "Clips of up to 4 objects",
    ),
    "two sources of a backbone": (
        ["--init_from", "{tmp}/model", "--init_backbone", "{tmp}/b.safetensors", "--static_dirs", "{tmp}/sets"],
        "would replace the backbone that `init_from`",
    ),
    "scored on what it learns": (
        ["--eval_steps", "2", "--train_on_held_out", "--davis_dirs", "{tmp}/davis"],
        "which `train_on_held_out` trains on",
    ),
    "nothing held out": (["--eval_steps", "2", "--davis_dirs", "{tmp}/davis"], "none of the held-out sequences"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path, capsys, mistake):
    write_static_set(tmp_path / "sets" / "some", count=1)
    write_davis(tmp_path / "davis", names=("ant",), frames=2)
    for name, text in {
        "map.json": "{}",
        "list.json": "[]",
        "broken.yaml": "a: [",
        "broken.json": "{",
        "unknown.json": '{"learning_speed": 1}',
        "typed.json": '{"max_gap": "x"}',
        "student.json": '{"hidden_size": "wide"}',
        "slots.json": json.dumps({**TINY_CONFIG, "max_objects": 3}),
    }.items():
        (tmp_path / name).write_text(text)
    if mistake == "two sources of a backbone":
        DeformVosModel(DeformVosConfig()).save_pretrained(tmp_path / "model")
    if mistake == "student is cut":
        DeformVosModel(DeformVosConfig(**TINY_CONFIG)).save_pretrained(tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    flags, message = MISTAKES[mistake]
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    common = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "c"), "--mixed_precision", "no"]
    assert train_distill.main([*flags, *common]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_run_that_diverges_ends_with_one_line(tmp_path, capsys, monkeypatch):
    def train():
        raise TrainingDiverged("20 steps in a row")

    monkeypatch.setattr(train_distill, "build", lambda config: SimpleNamespace(train=train))
    assert train_distill.main(["--static_dirs", "sets", "--output_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: 20 steps in a row\n"


def test_ctrl_c_before_the_first_step_ends_with_one_line(tmp_path, capsys, monkeypatch):
    def build(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_distill, "build", build)
    assert train_distill.main(["--static_dirs", "sets", "--output_dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
