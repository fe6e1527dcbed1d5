"""Training: configuration, losses, tasks and the loop."""

from .config import Stage, TrainingConfig
from .heldout import HeldOutEvaluation
from .losses import bootstrapped_cross_entropy, soft_jaccard_loss
from .task import SegmentationTask, StepPlan
from .trainer import Trainer


__all__ = [
    "HeldOutEvaluation",
    "SegmentationTask",
    "Stage",
    "StepPlan",
    "Trainer",
    "TrainingConfig",
    "bootstrapped_cross_entropy",
    "soft_jaccard_loss",
]
