"""Adaptation: a model learns the objects that it is given, from those very frames, before it follows them."""

from .adapt import AdaptationConfig, adapt
from .clips import GivenFrames, fill_objects


__all__ = ["AdaptationConfig", "GivenFrames", "adapt", "fill_objects"]
