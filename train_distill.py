#!/usr/bin/env python
"""Trains a DeformVOS student: `accelerate launch train_distill.py [--flags | config.json | config.yaml]`."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import fields
from pathlib import Path

import yaml
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModel, HfArgumentParser

import hf_deformvos
from hf_deformvos.data import (
    HELD_OUT_SEQUENCES,
    ClipSampler,
    FrameStore,
    davis_sequences,
    load_davis,
    load_static_sets,
)
from hf_deformvos.training import HeldOutEvaluation, SegmentationTask, Trainer, TrainingConfig
from hf_deformvos.training.trainer import make_accelerator


class _Parser(HfArgumentParser):
    """Flags whose mistakes are errors like all others rather than the end of the process."""

    def error(self, message: str):
        """Raises what argparse would print below a screen of usage."""
        raise ValueError(f"{message}; see --help")


def read_settings(path: str) -> dict:
    """Settings from a JSON or YAML file."""
    text = Path(path).read_text()
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


def split_mask_rule(folder: str) -> tuple[str, bool | None]:
    """Splits `DIR:merge` or `DIR:ids` into the folder and whether all mask values are one object."""
    for suffix, merge in ((":merge", True), (":ids", False)):
        if folder.endswith(suffix):
            return folder[: -len(suffix)], merge
    return folder, None


def build_sampler(config: TrainingConfig) -> ClipSampler:
    """Opens the training data."""
    shared = {"cache_dir": config.cache_dir, "on_error": config.on_data_error}
    videos = []
    for folder in config.davis_dirs:
        root, merge = split_mask_rule(folder)
        videos.append(load_davis(root, config.video_short_side, merge, **shared))
    statics: list[FrameStore] = []
    for root in config.static_dirs:
        statics += load_static_sets(root, config.static_short_side, config.merged_sets, **shared)
    if not videos and not statics:
        raise ValueError("There is nothing to train on: give `davis_dirs` or `static_dirs`.")
    return ClipSampler(videos, statics, config.seed)


def build_student(config: TrainingConfig):
    """A fresh or saved student in float32, the frozen part of its backbone frozen."""
    if config.student == "none" or config.student.endswith(".json"):
        fresh = config.student == "none"
        settings = (
            hf_deformvos.DeformVosConfig() if fresh else hf_deformvos.DeformVosConfig.from_json_file(config.student)
        )
        student = hf_deformvos.DeformVosModel(settings)
        if config.init_backbone:
            student.load_backbone(config.init_backbone)
        student.backbone.freeze_pretrained()
        return student
    if config.init_backbone:
        raise ValueError(f"`init_backbone` is for a fresh student; {config.student!r} brings its own backbone.")
    student = AutoModel.from_pretrained(config.student, dtype="float32")
    student.backbone.freeze_pretrained()
    return student


def build_evaluation(config: TrainingConfig) -> HeldOutEvaluation | None:
    """The score on held-out sequences, where it is asked for."""
    if not config.eval_steps:
        return None
    folder = config.eval_dir or next(iter(config.davis_dirs), None)
    if folder is None:
        raise ValueError(
            "`eval_steps` needs `eval_dir` or `davis_dirs`, a DAVIS-layout folder with held-out sequences."
        )
    root, merge = split_mask_rule(folder)
    names = [name for name in davis_sequences(root) if name in HELD_OUT_SEQUENCES]
    if not names:
        held_out = ", ".join(HELD_OUT_SEQUENCES)
        raise ValueError(f"{root} has none of the held-out sequences {held_out}; give `eval_dir`.")
    shared = {"cache_dir": config.cache_dir, "on_error": config.on_data_error}
    store = load_davis(root, config.video_short_side, merge, sequences=names, exclude=(), **shared)
    return HeldOutEvaluation(store, mixed_precision=config.mixed_precision)


def main(arguments: list[str] | None = None) -> int:
    """Parses, builds, trains; users' mistakes end with one line and exit code 2."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for noisy in ("httpx", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        if config.supervision != "labels" or config.teacher:
            raise ValueError(
                f"`supervision` {config.supervision!r} with teacher {config.teacher!r}: training from a teacher needs "
                "a trained teacher and a distillation task; only supervision labels without a teacher is there so far."
            )
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        accelerator = make_accelerator(config)
        with accelerator.main_process_first():
            sampler, evaluate = build_sampler(config), build_evaluation(config)
        set_seed(config.seed)
        task = SegmentationTask(
            build_student(config),
            ce_weight=config.ce_weight,
            jaccard_weight=config.jaccard_weight,
            memory_interval=config.memory_interval,
        )
        processor = hf_deformvos.DeformVosProcessor(hf_deformvos.DeformVosImageProcessor())
        Trainer(config, task, sampler, processor, evaluate, accelerator).train()
    except (ValueError, OSError, SafetensorError, StrictDataclassError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
