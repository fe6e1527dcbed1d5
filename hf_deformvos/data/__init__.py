"""Training data: readers, decoded stores, clip samplers and batched augmentation."""

from .clips import ClipSampler, ClipSpec, Prefetcher, RawBatch
from .davis import HELD_OUT_SEQUENCES, davis_sequences, list_davis, load_davis
from .static import list_static_set, load_static_sets
from .store import VOID, FrameEntry, FrameStore, ObjectBox, read_mask
from .transforms import AugmentConfig, ClipBatch, augment_clips


__all__ = [
    "AugmentConfig",
    "ClipBatch",
    "ClipSampler",
    "ClipSpec",
    "FrameEntry",
    "FrameStore",
    "HELD_OUT_SEQUENCES",
    "ObjectBox",
    "Prefetcher",
    "RawBatch",
    "VOID",
    "augment_clips",
    "davis_sequences",
    "list_davis",
    "list_static_set",
    "load_davis",
    "load_static_sets",
    "read_mask",
]
