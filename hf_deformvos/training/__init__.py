"""Training: configuration, losses, tasks and the loop."""

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
from .trainer import Trainer


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
