"""Adaptation: a model learns the objects that it is given, from those very frames, before it follows them."""

from .adapt import Adaptation, AdaptationConfig, adapt
from .clips import GivenFrames, fill_objects


__all__ = ["Adaptation", "AdaptationConfig", "GivenFrames", "adapt", "fill_objects"]
