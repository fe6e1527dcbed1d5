"""
Evaluation on benchmarks of video object segmentation. The metrics and layouts need NumPy and Pillow alone; what runs a
model is in `hf_deformvos.evaluation.runner`.
"""

from .layouts import DATASETS, EvaluationDataset, EvaluationSequence, TrackedObject, guess_dataset, load_dataset_layout
from .metrics import Statistics, boundary_accuracy, frame_scores, region_similarity, statistics
from .scoring import (
    ObjectScore,
    SequenceScore,
    SequenceScorer,
    Summary,
    score_predictions,
    summarize,
    summarize_by_class,
)
from .youtube_vos import write_submission


__all__ = [
    "DATASETS",
    "EvaluationDataset",
    "EvaluationSequence",
    "ObjectScore",
    "SequenceScore",
    "SequenceScorer",
    "Statistics",
    "Summary",
    "TrackedObject",
    "boundary_accuracy",
    "frame_scores",
    "guess_dataset",
    "load_dataset_layout",
    "region_similarity",
    "score_predictions",
    "statistics",
    "summarize",
    "summarize_by_class",
    "write_submission",
]
