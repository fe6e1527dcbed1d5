"""Adaptation: a model learns the objects that it is given, from those very frames, before it follows them."""

from .adapt import Adaptation, AdaptationConfig, adapt, at_followed_size
from .clips import GivenFrames, fill_objects
from .round_trip import adapt_to_video, round_trip_agreement


__all__ = [
    "Adaptation",
    "AdaptationConfig",
    "GivenFrames",
    "adapt",
    "adapt_to_video",
    "at_followed_size",
    "fill_objects",
    "round_trip_agreement",
]
