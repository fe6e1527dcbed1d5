"""
Signs in pictures that nobody sees: the image editor does not say which picture its strokes are on, may still have the
last one while the next is on its way, and shows a picture before the layer that belongs to it.
"""

from __future__ import annotations

import numpy as np


# How many numbers there are.
NUMBERS = 1 << 12
_BITS = 12
_CHECK = np.array([1, 0, 1, 1, 0, 0, 1, 0], dtype=np.uint8)
# A bit is one of two places in the middle of each range of sixteen blues: it stands rounding, and looks like noise.
_RANGE, _ZERO, _ONE, _MIDDLE = 16, 4, 12, 8
# Opacity of 255.
_FAINT = 12


def stamped(image: np.ndarray, number: int) -> np.ndarray:
    """
    A copy of a picture that carries a number in its first pixels; without it where the picture is too narrow.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`, uint8).
        number (`int`): 0 to `NUMBERS - 1`.
    """
    bits = np.concatenate([_CHECK, (number >> np.arange(_BITS)) & 1])
    marked = image.copy()
    if image.shape[1] >= len(bits):
        blues = marked[0, : len(bits), 2]
        marked[0, : len(bits), 2] = blues - blues % _RANGE + np.where(bits, _ONE, _ZERO)
    return marked


def read_stamp(image: np.ndarray | None) -> int | None:
    """The number in a picture `(height, width, 3 or 4)`; `None` where there is none, or something spoilt it."""
    length = len(_CHECK) + _BITS
    if image is None or image.ndim != 3 or image.shape[1] < length:
        return None
    bits = image[0, :length, 2] % _RANGE >= _MIDDLE
    if not np.array_equal(bits[: len(_CHECK)], _CHECK.astype(bool)):
        return None
    return int((bits[len(_CHECK) :] << np.arange(_BITS)).sum())


def cornered(layer: np.ndarray) -> np.ndarray:
    """A copy of a layer `(height, width, 4)` with four dots too faint to be seen, which tell that it has arrived."""
    marked = layer.copy()
    corners = marked[:: max(len(layer) - 1, 1), :: max(layer.shape[1] - 1, 1)]
    corners[..., 3] = np.maximum(corners[..., 3], _FAINT)
    return marked


def has_corners(layer: np.ndarray) -> bool:
    """Whether a layer is one of `cornered`, be it painted over."""
    return bool((layer[:: max(len(layer) - 1, 1), :: max(layer.shape[1] - 1, 1), 3] > 0).any())


__all__ = ["NUMBERS", "cornered", "has_corners", "read_stamp", "stamped"]
