"""
What each distillation loss asks of a student, beside the losses by labels: length and direction of its gradient.

    python scripts/measure_gradients.py --students start=runs/ablation/start-seed0-... labels=runs/ablation/query-... \
        --teacher hub_cards/deformvos-teacher --davis data/davis2016-train --static data/static

Clips, precision and supervised losses are those of the ablation (recipes/ablation/rows.json, its first stage), every
weight is 1. Of each loss: the length of its gradient in shares of that of the losses by labels, and the cosine between
the two; medians over batches. The longest gradient decides where a step goes; one at a cosine of 0 asks for something
else. The record is docs/numbers/gradients.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from ablate import TABLE, read_table
from evidence import (
    NUMBERS,
    check_head,
    describe_folder,
    describe_model,
    guarded,
    read_pairs,
    read_record,
    update_record,
)
from make_figures import LOSSES

from hf_deformvos import DeformVosModel
from hf_deformvos.data import augment_clips
from hf_deformvos.evaluation.runner import describe_hardware
from hf_deformvos.inference import fastest_dtype
from hf_deformvos.training import TrainingConfig
from hf_deformvos.training.distillation_task import DistillationTask, DistillationWeights
from hf_deformvos.training.models import Teacher, build_student
from hf_deformvos.training.sources import open_data
from hf_deformvos.training.task import StepPlan, step_generator


RECORD = NUMBERS / "gradients.json"
TERMS = ("kl", "representation", "intra", "inter", "att")


class _OnePass(DistillationTask):
    """Asks the teacher once a batch, for everything."""

    guide = None

    def _ask_teacher(self, batch, inputs, wanted):
        if self.guide is None:
            self.guide = super()._ask_teacher(batch, inputs, dict.fromkeys(wanted, True))
        return self.guide


def gradient_of(task: DistillationTask, batch, seed: int, term: str | None, plan: StepPlan) -> torch.Tensor:
    """Gradient, as one vector, of a distillation loss alone, or of the losses by labels where none is named."""
    task.weights = DistillationWeights(**{name: float(name == term) for name in TERMS})
    task.ce_weight = task.jaccard_weight = 0.5 if term is None else 0.0
    task.student.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=fastest_dtype("cpu") == "bfloat16"):
        losses = task(batch, plan, torch.Generator().manual_seed(seed))
    losses["loss"].backward()
    parameters = [p for p in task.student.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def measure(student: DeformVosModel, teacher: DeformVosModel, config: TrainingConfig, batches: int) -> dict:
    """By loss, medians over batches of relative length and cosine."""
    task, sampler = _OnePass(student, teacher), open_data(config).sampler(config.seed)
    stage, found = config.stage_at(0.0), {term: {"length": [], "cosine": []} for term in TERMS}
    plan = StepPlan(config.own_mask_probability(0.5), config.bootstrap_share)
    for index in range(batches):
        generator = step_generator(config.seed, index)
        batch = augment_clips(sampler(index, config.clip_spec(stage)), config.augmentation(stage), generator)
        task.guide = None
        labels = gradient_of(task, batch, index, None, plan)
        for term in TERMS:
            gradient = gradient_of(task, batch, index, term, plan)
            found[term]["length"].append(float(gradient.norm() / labels.norm()))
            found[term]["cosine"].append(float(torch.cosine_similarity(gradient, labels, dim=0)))
        print(f"batch {index + 1} of {batches}", file=sys.stderr)
    return {
        term: {"title": LOSSES[f"loss_{term}"]}
        | {name: round(statistics.median(values), 4) for name, values in parts.items()}
        for term, parts in found.items()
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", required=True, metavar="LABEL=DIR", help="weights to start from")
    parser.add_argument("--teacher", required=True, help="model folder")
    parser.add_argument("--davis", nargs="+", required=True, help="DAVIS-layout folders")
    parser.add_argument("--static", nargs="+", default=[], help="folders of image sets")
    parser.add_argument("--cache", help="folder of decoded data")
    parser.add_argument("--batches", type=int, default=16, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="the record (default docs/numbers/gradients.json)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measures and records; the exit code."""
    options = build_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    students = read_pairs("--students", options.students)
    settings = {**read_table(TABLE, []).train, "davis_dirs": options.davis, "static_dirs": options.static}
    config = TrainingConfig(**settings, cache_dir=options.cache)
    teacher = Teacher(options.teacher).model
    path, dtype = options.json or RECORD, fastest_dtype("cpu")
    hardware = describe_hardware(torch.device("cpu"), dtype, options.threads, 1)
    head = {
        "command": "python scripts/measure_gradients.py",
        "teacher": describe_model(options.teacher),
        "batches": options.batches,
        "clips": {"size": list(config.stage_at(0.0).size), "batch": config.stage_at(0.0).batch},
        "data": [describe_folder(folder) for folder in (*options.davis, *options.static)],
    }
    check_head(read_record(path, "gradients"), "students", head)
    for label, folder in students.items():
        student = build_student(replace(config, student=folder)).train()
        terms = measure(student, teacher, config, options.batches)
        entry = {**describe_model(folder), "hardware": hardware, "terms": terms}
        change = partial(_keep, head=head, label=label, entry=entry)
        update_record(path, "gradients", change)
    return 0


def _keep(record: dict, head: dict, label: str, entry: dict) -> None:
    """Puts a student's figures into the record."""
    check_head(record, "students", head)
    record.update(head)
    record.setdefault("students", {})[label] = entry


if __name__ == "__main__":
    sys.exit(guarded(main))
