"""Settings of a training run: one dataclass that is also the command line and the content of configuration files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import torch

from ..data.clips import ClipSpec
from ..data.davis import HELD_OUT_SEQUENCES
from ..data.transforms import AugmentConfig
from ..inference import fastest_dtype


@dataclass(frozen=True)
class Stage:
    """
    One part of the curriculum.

    Args:
        until (`float`): Progress in (0, 1] at which the stage ends.
        size (`tuple[int, int]`): Height and width of the clips, of the form 16k+1.
        frames (`int`): Frames a clip, at least 2.
        batch (`int`): Clips a process and forward pass.
        video_share, max_gap, paste, distractor (*optional*): Override the run's value during this stage.
    """

    until: float
    size: tuple[int, int]
    frames: int
    batch: int
    video_share: float | None = None
    max_gap: int | None = None
    paste: float | None = None
    distractor: float | None = None

    @classmethod
    def from_dict(cls, values: dict) -> Stage:
        """Builds a stage from a mapping, naming what is wrong with it."""
        if not isinstance(values, dict):
            raise ValueError(f"A stage must be an object with until, size, frames and batch, got {values!r}.")
        unknown = set(values) - {item.name for item in fields(cls)}
        missing = {"until", "size", "frames", "batch"} - set(values)
        if unknown or missing:
            raise ValueError(
                "A stage has until, size, frames, batch and, at will, video_share, max_gap, paste, distractor: "
                f"missing {sorted(missing)}, unknown {sorted(unknown)}, got {values}."
            )
        size = values["size"]
        return cls(**{**values, "size": tuple(size) if isinstance(size, list | tuple) else (size,)})

    def __post_init__(self):
        if not _is_number(self.until) or not 0 < self.until <= 1:
            raise ValueError(f"A stage's `until` must be in (0, 1], got {self.until!r}.")
        if len(self.size) != 2 or any(not _is_whole(side) or side < 17 or side % 16 != 1 for side in self.size):
            raise ValueError(f"A stage's `size` must be two numbers of the form 16k+1, got {self.size}.")
        if not _is_whole(self.frames) or not _is_whole(self.batch) or self.frames < 2 or self.batch < 1:
            raise ValueError(
                f"A stage needs whole frames >= 2 and batch >= 1, got {self.frames!r} and {self.batch!r}."
            )
        for name in ("video_share", "paste", "distractor"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"A stage's `{name}` must be between 0 and 1, got {value!r}.")
        if self.max_gap is not None and not (_is_whole(self.max_gap) and self.max_gap >= 1):
            raise ValueError(f"A stage's `max_gap` must be a whole number of at least 1, got {self.max_gap!r}.")


def _is_whole(value) -> bool:
    """Whether a value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    """Whether a value is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _typed(name: str, value, hint):
    """A setting's value as its annotation wants it: files are not typed as the command line is."""
    kinds = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value is None and NoneType in kinds:
        return value
    kind = kinds[0]
    if get_origin(kind) is list:
        fits, rule = isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of texts"
    elif kind is float:
        if isinstance(value, str):
            # YAML reads 1e-3, which has no point, as text.
            try:
                value = float(value)
            except ValueError:
                pass
        fits, rule = _is_number(value), "a number"
    elif kind is int:
        fits, rule = _is_whole(value), "a whole number"
    else:
        fits, rule = isinstance(value, kind), "true or false" if kind is bool else "text"
    if not fits:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
    return value


def native_precision() -> str:
    """The precision that trains fastest here: bfloat16 that is emulated takes many times as long as float32."""
    # What `accelerate launch --cpu` sets.
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") or not torch.accelerator.is_available()
    kind = "cpu" if on_cpu else torch.accelerator.current_accelerator().type
    return "bf16" if fastest_dtype(kind) == "bfloat16" else "no"


DEFAULT_STAGES = (
    {"until": 0.4, "size": [193, 321], "frames": 3, "batch": 8},
    {"until": 0.8, "size": [257, 449], "frames": 3, "batch": 4},
    {"until": 1.0, "size": [321, 577], "frames": 4, "batch": 2},
)


PATH_SETTINGS = (
    "student",
    "init_backbone",
    "init_from",
    "teacher",
    "davis_dirs",
    "youtube_vos_dirs",
    "dataset_names",
    "static_dirs",
    "video_dirs",
    "stages",
    "eval_dir",
)
"""Settings that may name files or folders to read."""

PROPAGATIONS = ("long_term", "short_term", "self")
DISTILLATION_WEIGHTS = ("att_weight", "intra_weight", "inter_weight", "kl_weight", "representation_weight")

_SHARES = (
    "freeze_until",
    "video_share",
    "own_masks_start",
    "own_masks_end",
    "own_masks_from",
    "own_masks_until",
    "paste",
    "distractor",
    "cords",
    "occluder",
    "kin",
    "leave",
    "bootstrap_warm_up",
    "warm_up",
)
_POSITIVE = ("bootstrap_share", "learning_rate", "max_grad_norm", "temperature")
_LOWEST = {
    0: (
        *DISTILLATION_WEIGHTS,
        "backbone_lr_scale",
        "ce_weight",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "color",
        "cpu_threads",
        "data_workers",
        "eval_steps",
        "jaccard_weight",
        "max_train_minutes",
        "motion",
        "offset_lr_scale",
        "poly_power",
        "seed",
        "weight_decay",
    ),
    1: (
        "dataset_max_sequences",
        "gradient_accumulation_steps",
        "gradient_frames",
        "logging_steps",
        "max_gap",
        "max_objects",
        "max_proposals",
        "max_train_steps",
        "memory_interval",
        "pastes",
        "static_short_side",
        "video_short_side",
    ),
}


def _help(default, text: str):
    """A dataclass field whose help is also the command line's."""
    return field(default=default, metadata={"help": text})


@dataclass
class TrainingConfig:
    """Every setting of `train_distill.py`; each field's help text is its documentation."""

    output_dir: str = _help("outputs/student", "Folder of checkpoints, logs and the trained model.")
    student: str = _help(
        "none", "Model folder or Hub repository, a config .json for a fresh model, or none (defaults)."
    )
    init_backbone: str | None = _help(None, "Safetensors file with pretrained backbone weights for a fresh student.")
    init_from: str | None = _help(
        None, "Model folder or Hub repository whose weights a fresh student takes over wherever names and shapes fit."
    )
    init_except: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts of weights' names that init_from leaves as they are in a fresh model."},
    )
    supervision: str = _help(
        "labels",
        "Whose masks the supervised losses follow: labels, pseudo (the teacher's from the first frame on) or both.",
    )
    teacher: str | None = _help(None, "Model folder or Hub repository of the teacher.")

    davis_dirs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "DAVIS-layout folders to train on; append :merge or :ids to force the mask rule. All sequences "
            "are equally likely; those of a folder that is named twice, twice as likely."
        },
    )
    youtube_vos_dirs: list[str] = field(
        default_factory=list, metadata={"help": "YouTube-VOS folders (2018 or 2019 layout); their train split."}
    )
    dataset_names: list[str] = field(
        default_factory=list,
        metadata={"help": "Data sets with a row a frame, local or on the Hub; :merge or :ids as for davis_dirs."},
    )
    dataset_split: str = _help("train", "Split of those data sets.")
    dataset_streaming: bool = _help(False, "Read those data sets as a stream instead of downloading them first.")
    dataset_max_sequences: int | None = _help(
        None, "Sequences to take of each of those data sets, the first ones; reading a stream stops after them."
    )
    train_on_held_out: bool = _help(
        False,
        "Train on the sequences that are held out for choices as well: for a final run, whose recipe has been chosen "
        "by a run without them.",
    )
    static_dirs: list[str] = field(
        default_factory=list, metadata={"help": "Folders of image sets (each with images/ and masks/)."}
    )
    video_dirs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders of plain videos, on which the teacher makes the masks: from <name>_mask.png of the first "
            "frame where that lies beside a video, else of objects that it proposes."
        },
    )
    max_proposals: int = _help(1, "Most objects that the teacher proposes in a video without a mask.")
    merged_sets: list[str] = field(
        default_factory=lambda: ["ccp-clothing"],
        metadata={"help": "Image sets whose mask ids are all parts of one object."},
    )
    video_short_side: int = _help(480, "Short side of decoded video frames, in pixels.")
    static_short_side: int = _help(288, "Largest short side of decoded still images, in pixels.")
    cache_dir: str | None = _help(None, "Where decoded data are kept; default $DEFORMVOS_CACHE or ~/.cache/deformvos.")
    on_data_error: str = _help("skip", "What to do with unreadable files: skip (and report) or raise.")
    data_workers: int = _help(
        1,
        "Threads that cut coming clips, or processes that augment them as well where a GPU trains; 0 does it in the "
        "training loop.",
    )

    stages: str | None = _help(None, "Curriculum: a JSON list of stages, or a path to one; default three stages.")
    video_share: float = _help(0.5, "Share of clips that are cut from videos; the others are warped still images.")
    max_gap: int = _help(10, "Largest distance of neighbouring frames of a video clip.")
    max_objects: int = _help(3, "Most labelled objects taken from one source.")
    paste: float = _help(0.4, "Probability of pasting another clip's object as one more labelled object.")
    pastes: int = _help(1, "How many times such a paste is tried, each from another clip of the batch or a copy.")
    leave: float = _help(0.0, "Probability that a pasted object leaves the picture on the way.")
    distractor: float = _help(0.4, "Probability of an unlabelled look-alike that moves by itself.")
    cords: float = _help(0.0, "Probability of thin cords, mostly tied to an object and part of it.")
    occluder: float = _help(0.1, "Probability of a moving occluder.")
    kin: float = _help(0.0, "Probability that all still images of a batch come from one set, and so look alike.")
    color: float = _help(1.0, "Strength of colour changes.")
    motion: float = _help(1.0, "Strength of the motion made up for still images.")

    own_masks_start: float = _help(0.0, "Probability, at first, that memory is written with the student's own masks.")
    own_masks_end: float = _help(0.9, "The same probability at the end of its growth.")
    own_masks_from: float = _help(0.1, "Progress at which the probability of own masks starts to grow.")
    own_masks_until: float = _help(0.7, "Progress at which it is fully grown.")
    memory_interval: int | None = _help(
        None, "Every how many frames the long-term bank is written; by default 1, 2 or 3 at random."
    )
    gradient_frames: int | None = _help(
        None,
        "Predicted frames of a clip, the last ones, that are learned from; those before are rolled forward on the "
        "student's own masks without gradients. By default all.",
    )

    ce_weight: float = _help(0.5, "Weight of the bootstrapped cross-entropy.")
    jaccard_weight: float = _help(0.5, "Weight of the soft Jaccard loss.")
    bootstrap_share: float = _help(0.25, "Share of hardest pixels that the cross-entropy keeps after its warm-up.")
    bootstrap_warm_up: float = _help(0.3, "Progress over which that share falls from 1.")

    att_weight: float = _help(1.0, "Weight, where there is a teacher, of 1 - CKA of its and the student's attention.")
    att_maps: list[str] = field(
        default_factory=lambda: [*PROPAGATIONS],
        metadata={"help": "Propagations whose attention maps are aligned, of long_term, short_term and self; all."},
    )
    intra_weight: float = _help(1.0, "The same of 1 - correlation of an object's probabilities over the pixels.")
    inter_weight: float = _help(1.0, "The same of 1 - correlation of a pixel's probabilities over the objects.")
    kl_weight: float = _help(0.0, "The same of the divergence of logits, the usual distillation.")
    representation_weight: float = _help(0.0, "The same of MobileVOS's loss on features.")
    temperature: float = _help(1.0, "Divisor of logits in the losses of relations and divergence.")
    cka_unbiased: bool = _help(False, "Use the unbiased estimator of CKA.")

    max_train_steps: int | None = _help(None, "Optimizer steps of the whole run.")
    max_train_minutes: float | None = _help(
        None, "Minutes of training of the whole run, resumed parts included; 0 lets the steps alone decide."
    )
    learning_rate: float = _help(1e-3, "Peak learning rate.")
    backbone_lr_scale: float = _help(0.1, "Factor on the learning rate of the backbone.")
    offset_lr_scale: float = _help(0.3, "Factor on the learning rate of parameters with `offset` in their names.")
    warm_up: float = _help(0.05, "Progress over which the learning rate rises.")
    poly_power: float = _help(0.9, "Power of the polynomial decay.")
    weight_decay: float = _help(0.01, "Weight decay of matrices and kernels; norms and biases have none.")
    max_grad_norm: float = _help(5.0, "Largest gradient norm.")
    ema_decay: float = _help(0.999, "Decay of the averaged weights, which are what is released.")
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Prefixes of parameter names that are not trained."}
    )
    freeze_until: float = _help(1.0, "Progress at which those parameters are released; 1 keeps them frozen.")

    gradient_accumulation_steps: int = _help(1, "Forward passes a step.")
    mixed_precision: str = _help(
        "auto", "no, bf16, fp16, or auto: bf16 where the device computes it natively, else no."
    )
    gradient_checkpointing: bool = _help(
        False,
        "Keep a fraction of the activations for the backward pass, and compute the others anew: slower, smaller.",
    )
    cpu_threads: int = _help(
        0, "Threads of a process on a CPU, at most its cores; 0 takes what the launcher sets, which may be one."
    )
    channels_last: bool = _help(True, "Keep convolution weights in channels-last memory format.")
    seed: int = _help(0, "Seed of weights, clips and augmentation.")

    checkpointing_steps: int = _help(
        500, "Steps between checkpoints; 0 writes none but that of a run that is asked to end."
    )
    checkpoints_total_limit: int = _help(3, "Most checkpoints kept; 0 keeps all.")
    resume_from_checkpoint: str | None = _help(
        None, "A checkpoint folder, or latest (starts afresh if there is none)."
    )
    logging_steps: int = _help(20, "Steps between log lines.")
    with_tracking: bool = _help(False, "Write TensorBoard files below output_dir.")
    eval_steps: int = _help(0, "Steps between evaluations on held-out sequences; 0 never evaluates.")
    eval_dir: str | None = _help(
        None,
        "DAVIS-layout folder with the held-out sequences; default the first davis_dirs. A run that has neither, but "
        "plain videos, is scored on these, against the teacher's masks.",
    )
    push_to_hub: bool = _help(False, "Upload the trained model at the end.")
    hub_model_id: str | None = _help(None, "Repository to upload to.")

    def __post_init__(self):
        for name, hint in get_type_hints(type(self)).items():
            # A curriculum may also be written out in a configuration file.
            if not (name == "stages" and isinstance(self.stages, list)):
                setattr(self, name, _typed(name, getattr(self, name), hint))
        if self.mixed_precision == "auto":
            self.mixed_precision = native_precision()
        self._check_choices()
        self._check_ranges()
        self._stages = self._parse_stages()

    def _check_choices(self) -> None:
        """Settings that are one of a few words, or need another."""
        if self.supervision not in ("labels", "pseudo", "both"):
            raise ValueError(f"`supervision` must be labels, pseudo or both, got {self.supervision!r}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` must be auto, no, bf16 or fp16, got {self.mixed_precision!r}.")
        if self.on_data_error not in ("skip", "raise"):
            raise ValueError(f"`on_data_error` must be skip or raise, got {self.on_data_error!r}.")
        if self.eval_dir and not self.eval_steps:
            raise ValueError(
                f"`eval_dir` {self.eval_dir!r} is scored on every `eval_steps` steps: give these as well."
            )
        if self.own_masks_from > self.own_masks_until:
            raise ValueError(
                f"`own_masks_from` must not lie behind `own_masks_until`, got {self.own_masks_from} and "
                f"{self.own_masks_until}."
            )
        if not self.att_maps or set(self.att_maps) - set(PROPAGATIONS):
            raise ValueError(f"`att_maps` must hold some of {', '.join(PROPAGATIONS)}, got {self.att_maps}.")
        if self.train_on_held_out and self.eval_steps and self.eval_dir is None and self.davis_dirs:
            raise ValueError(
                "`eval_steps` scores a run on the held-out sequences, which `train_on_held_out` trains on: leave one "
                "of the two settings out, or give `eval_dir`."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("`push_to_hub` needs `hub_model_id`, the repository to upload to.")
        for name, needed, is_idle in (
            ("freeze_until", "freeze", self.freeze_until < 1 and not self.freeze),
            ("dataset_streaming", "dataset_names", self.dataset_streaming and not self.dataset_names),
            ("dataset_max_sequences", "dataset_names", self.dataset_max_sequences and not self.dataset_names),
            ("hub_model_id", "push_to_hub", self.hub_model_id and not self.push_to_hub),
        ):
            if is_idle:
                raise ValueError(
                    f"`{name}` {getattr(self, name)!r} does nothing without `{needed}`: give that as well, or leave "
                    "it out."
                )

    def _check_ranges(self) -> None:
        """Settings that are numbers."""
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        for lowest, names in _LOWEST.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and value < lowest:
                    raise ValueError(f"`{name}` must be at least {lowest}, got {value}.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {value}.")
        if self.bootstrap_share > 1:
            raise ValueError(f"`bootstrap_share` must be in (0, 1], got {self.bootstrap_share}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")

    def _parse_stages(self) -> list[Stage]:
        """The curriculum, in order, checked."""
        values = self.stages if self.stages is not None else list(DEFAULT_STAGES)
        if isinstance(values, str):
            text = values if values.lstrip().startswith("[") else Path(values).read_text()
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`stages` must be a JSON list or a path to one: {error}; got {text[:80]!r}."
                ) from error
        if not isinstance(values, list):
            raise ValueError(f"`stages` must be a JSON list or a path to one, got {values!r}.")
        stages = [Stage.from_dict(item) for item in values]
        ends = [stage.until for stage in stages]
        if not ends or ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError(f"The stages' `until` must rise and end with 1.0, got {ends}.")
        return stages

    @property
    def excluded_sequences(self) -> tuple[str, ...]:
        """Sequences that the run does not train on, wherever it meets their names."""
        return () if self.train_on_held_out else HELD_OUT_SEQUENCES

    @property
    def most_objects(self) -> int:
        """Most labelled objects that any clip of the run can hold, pasted ones included."""
        pastes = (self.paste if stage.paste is None else stage.paste for stage in self._stages)
        return self.max_objects + self.pastes * any(pastes)

    def check_teacher(self, teacher) -> None:
        """
        Raises:
            ValueError: If the run needs a teacher, and there is none.
        """
        if self.supervision != "labels" and teacher is None:
            raise ValueError(
                f"`supervision` {self.supervision!r} needs a teacher to make pseudo-labels; give `teacher`, or use "
                "supervision labels."
            )
        # The other weights have defaults, which are for whoever gives a teacher.
        for name in ("kl_weight", "representation_weight"):
            if getattr(self, name) and teacher is None:
                raise ValueError(
                    f"`{name}` {getattr(self, name)} weighs what a teacher says: give `teacher`, or leave it out."
                )

    def stage_at(self, progress: float) -> Stage:
        """The stage that a progress in [0, 1] falls into."""
        return next((stage for stage in self._stages if progress < stage.until), self._stages[-1])

    def clip_spec(self, stage: Stage) -> ClipSpec:
        """What the sampler shall draw in a stage."""
        return ClipSpec(
            size=stage.size,
            frames=stage.frames,
            batch=stage.batch,
            video_share=self.video_share if stage.video_share is None else stage.video_share,
            max_gap=self.max_gap if stage.max_gap is None else stage.max_gap,
            max_objects=self.max_objects,
            kin=self.kin,
        )

    def augmentation(self, stage: Stage) -> AugmentConfig:
        """How clips are augmented in a stage."""
        return AugmentConfig(
            paste=self.paste if stage.paste is None else stage.paste,
            pastes=self.pastes,
            leave=self.leave,
            distractor=self.distractor if stage.distractor is None else stage.distractor,
            cords=self.cords,
            occluder=self.occluder,
            color=self.color,
            motion=self.motion,
        )

    def own_mask_probability(self, progress: float) -> float:
        """Probability that memory is written with the student's own masks."""
        span = max(self.own_masks_until - self.own_masks_from, 1e-9)
        share = min(1.0, max(0.0, (progress - self.own_masks_from) / span))
        return self.own_masks_start + share * (self.own_masks_end - self.own_masks_start)

    def to_dict(self) -> dict:
        """Plain values, as written into logs and results."""
        return asdict(self)
