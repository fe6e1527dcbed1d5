#!/usr/bin/env python
"""
Trains a DeformVOS student: `accelerate launch train_distill.py [config.json | config.yaml] [--flags]`.

Without any argument, it distils the bundled teacher into a small student on the example clip, in one to two minutes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser

import hf_deformvos
from hf_deformvos.publishing.release import MAX_ENLARGEMENT
from hf_deformvos.training import Trainer, TrainingConfig
from hf_deformvos.training.config import PATH_SETTINGS
from hf_deformvos.training.models import build_student, build_task, build_teacher
from hf_deformvos.training.sources import open_data, open_evaluation, split_mask_rule
from hf_deformvos.training.trainer import TrainingDiverged, make_accelerator


ROOT = Path(__file__).resolve().parent
QUICK_START = ROOT / "recipes" / "quickstart.json"

DONE = """
Done in {minutes:.1f} minutes: {steps} steps on {clips} clips cut from the example clip, distilled from {teacher}.
  loss, mean of some steps    {first_loss:.3f} -> {last_loss:.3f}
  J against the teacher's     {first_j:.3f} -> {last_j:.3f}   (on the clip that it trained on: it learned this video)
  student                     {folder}
  pictures                    {folder}/overlays (above the student, below the teacher)

Next:
  look at it     deformvos segment {examples}/bunny.mp4 --mask {examples}/bunny_mask.png --model {folder} \\
                     --output {folder}/masks --overlay {folder}/overlay.mp4
  your videos    accelerate launch {script} {recipe} --video_dirs FOLDER --output_dir outputs/mine
                     (beside NAME.mp4, NAME_mask.png with the objects of its first frame; without it they are proposed)
  in earnest     accelerate launch {script} {recipes}/student_continue.json --cpu_threads {cores} \\
                     --davis_dirs DAVIS --static_dirs STATIC --output_dir outputs/student
                     (two hours, from the bundled student; docs/TRAINING.md has this, and runs from unlabelled videos)
"""


class _Parser(HfArgumentParser):
    """Flags whose mistakes are errors like all others rather than the end of the process."""

    def error(self, message: str):
        """Raises what argparse would print below a screen of usage."""
        raise ValueError(f"{message}; see --help")


def locate(name: str, folder: Path) -> str:
    """
    Where a path that a settings file names is: below the current folder, the file's own, or the one above that.

    What is in none of them is returned as it is: it may be a Hub repository, or the mistake that its reader reports.
    """
    path, _ = split_mask_rule(name)
    if path in ("", "none") or path.startswith("[") or Path(path).exists():
        return name
    for base in (folder, folder.parent):
        if (base / path).exists():
            return str(base / path) + name[len(path) :]
    return name


def read_settings(path: str) -> dict:
    """Settings from a JSON or YAML file, relative paths resolved."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(each.name for each in QUICK_START.parent.glob("*.json")))
        raise ValueError(
            f"The settings {path} cannot be read ({error}); {short(QUICK_START.parent)} has {there}."
        ) from error
    try:
        values = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not a valid configuration file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map settings to values, got {type(values).__name__}.")
    known = {item.name for item in fields(TrainingConfig)}
    unknown = sorted(str(name) for name in values.keys() - known)
    if unknown:
        raise ValueError(f"{path} has unknown settings {unknown}; --help lists all that there are.")
    folder = Path(path).resolve().parent
    for name in PATH_SETTINGS:
        value = values.get(name)
        if isinstance(value, str):
            values[name] = locate(value, folder)
        elif isinstance(value, list):
            values[name] = [locate(item, folder) if isinstance(item, str) else item for item in value]
    return values


def parse(arguments: list[str]) -> TrainingConfig:
    """Settings from flags, from a file, or from a file with flags that override it."""
    parser = _Parser(TrainingConfig, allow_abbrev=False)
    if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
        path, *arguments = arguments
        values = read_settings(path)
        # Checked before flags are: argparse converts defaults that are text, and would name the flag, not the file.
        TrainingConfig(**values)
        parser.set_defaults(**values)
    config, unknown = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unknown arguments {unknown}; see --help")
    return config


def build(config: TrainingConfig) -> Trainer:
    """Opens models and data and puts the trainer together."""
    if config.cpu_threads:
        torch.set_num_threads(min(config.cpu_threads, os.cpu_count() or 1))
    teacher = build_teacher(config)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(config)
    label = None if teacher is None else lambda folder: teacher.label(folder, config, accelerator.device)
    # One process decodes what others then find; on further machines, whose disks may be their own, one each.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        data = open_data(config, label)
        evaluate = open_evaluation(config, data)
    set_seed(config.seed)
    task = build_task(config, build_student(config), teacher)
    images = hf_deformvos.DeformVosImageProcessor(max_enlargement=MAX_ENLARGEMENT)
    processor = hf_deformvos.DeformVosProcessor(images)
    return Trainer(config, task, data.sampler(config.seed), processor, evaluate, accelerator)


def quick_start(trainer: Trainer, started: float) -> None:
    """Trains, and says what was done and what to do next."""
    is_main = trainer.accelerator.is_main_process
    before = trainer.evaluate(trainer.student, trainer.accelerator.device) if is_main else {}
    results = trainer.train()
    if not is_main:
        return
    losses = [line["loss"] for line in trainer.log.lines() if line.get("loss") is not None] or [float("nan")]
    config = trainer.config
    text = DONE.format(
        minutes=(time.perf_counter() - started) / 60,
        steps=results["steps"],
        clips=results["clips"],
        teacher=short(config.teacher),
        first_loss=losses[0],
        last_loss=losses[-1],
        first_j=before["eval_j"],
        last_j=results["eval_j"],
        folder=config.output_dir,
        examples=short(ROOT / "examples"),
        script=short(ROOT / "train_distill.py"),
        recipe=short(QUICK_START),
        recipes=short(QUICK_START.parent),
        cores=os.cpu_count(),
    )
    print(text, flush=True)


def short(path: str | Path) -> str:
    """A path as one would type it from here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def is_quick_start(arguments: list[str], config: TrainingConfig) -> bool:
    """Whether the example clip is learned, by the recipe for that; on other videos it is a recipe like any other."""
    if not arguments:
        return True
    return Path(arguments[0]).resolve() == QUICK_START and config.video_dirs == parse([str(QUICK_START)]).video_dirs


def main(arguments: list[str] | None = None) -> int:
    """Parses, builds, trains; users' mistakes end with one line and exit code 2."""
    started = time.perf_counter()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        config = parse(arguments or [str(QUICK_START)])
        trainer = build(config)
        if is_quick_start(arguments, config) and trainer.evaluate is not None:
            quick_start(trainer, started)
        else:
            trainer.train()
    except (ValueError, OSError, SafetensorError, StrictDataclassError, TrainingDiverged) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
