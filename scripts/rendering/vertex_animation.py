"""What models share whose every vertex has a place of its own in every frame."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def normals_of(positions: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Normals `(frames, vertices, 3)` of shapes `(frames, vertices, 3)`, outwards where most of a shape is convex."""
    corners = positions[:, faces]
    across = np.cross(corners[:, :, 1] - corners[:, :, 0], corners[:, :, 2] - corners[:, :, 0])
    normals = np.zeros_like(positions)
    for corner in range(3):
        np.add.at(normals, (slice(None), faces[:, corner]), across)
    outwards = ((positions - positions.mean(1, keepdims=True)) * normals).sum()
    return normals if outwards >= 0 else -normals


def between(states: Sequence[np.ndarray] | np.ndarray, time: float) -> np.ndarray:
    """The state at a time in frames, of states that repeat."""
    first, share = int(time) % len(states), time - int(time)
    if not share:
        return states[first]
    return states[first] * (1 - share) + states[(first + 1) % len(states)] * share
