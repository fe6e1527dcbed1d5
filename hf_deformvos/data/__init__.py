"""Training data: readers, decoded stores, clip samplers and batched augmentation."""

from .clips import ClipSampler, ClipSpec, Prefetcher, RawBatch
from .dataset_export import ExportedDataset, SplitCounts, export_davis
from .davis import HELD_OUT_SEQUENCES, davis_sequences, list_davis, load_davis
from .hub_dataset import load_hub_dataset, open_hub_dataset
from .static import list_static_set, load_static_sets
from .store import VOID, ArrayStore, Frame, FrameEntry, FrameStore, ObjectBox, read_annotation
from .transforms import AugmentConfig, ClipBatch, augment_clips, recompose
from .youtube_vos import list_youtube_vos, load_youtube_vos


__all__ = [
    "ArrayStore",
    "AugmentConfig",
    "ClipBatch",
    "ClipSampler",
    "ClipSpec",
    "ExportedDataset",
    "Frame",
    "FrameEntry",
    "FrameStore",
    "HELD_OUT_SEQUENCES",
    "ObjectBox",
    "Prefetcher",
    "RawBatch",
    "SplitCounts",
    "VOID",
    "augment_clips",
    "davis_sequences",
    "export_davis",
    "list_davis",
    "list_static_set",
    "list_youtube_vos",
    "load_davis",
    "load_hub_dataset",
    "load_static_sets",
    "load_youtube_vos",
    "open_hub_dataset",
    "read_annotation",
    "recompose",
]
