"""
Training: configuration, losses, tasks and the loop.

Everything but the loop runs on what the package itself needs; [`Trainer`] needs the extra `train`.
"""

from typing import TYPE_CHECKING

from .config import Stage, TrainingConfig
from .distillation import (
    attention_alignment_loss,
    centered_kernel_alignment,
    inter_object_relation_loss,
    intra_object_relation_loss,
    kl_divergence_loss,
    representation_loss,
)
from .distillation_task import DistillationTask, DistillationWeights
from .heldout import HeldOutEvaluation
from .losses import bootstrapped_cross_entropy, soft_jaccard_loss
from .task import SegmentationTask, StepPlan


if TYPE_CHECKING:
    from .trainer import Trainer


def __getattr__(name: str):
    """Imports the loop, and accelerate with it, when it is asked for."""
    if name == "Trainer":
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DistillationTask",
    "DistillationWeights",
    "HeldOutEvaluation",
    "SegmentationTask",
    "Stage",
    "StepPlan",
    "Trainer",
    "TrainingConfig",
    "attention_alignment_loss",
    "bootstrapped_cross_entropy",
    "centered_kernel_alignment",
    "inter_object_relation_loss",
    "intra_object_relation_loss",
    "kl_divergence_loss",
    "representation_loss",
    "soft_jaccard_loss",
]
