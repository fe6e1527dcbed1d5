"""Region similarity J, boundary accuracy F and their statistics, as DAVIS defines them, in plain NumPy."""

import math
from dataclasses import dataclass

import numpy as np


BOUNDARY_TOLERANCE = 0.008
RECALL_THRESHOLD = 0.5
NUM_DECAY_BINS = 4


@dataclass(frozen=True)
class Statistics:
    """
    What DAVIS reports of a series of per-frame values.

    Attributes:
        mean (`float`): Average over frames.
        recall (`float`): Share of frames above 0.5.
        decay (`float`): Average of the first quarter of the frames minus that of the last; lower is better.
    """

    mean: float
    recall: float
    decay: float


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """
    One pixel wide boundaries of a mask, half a pixel towards the origin from where they are (`seg2bmap` of DAVIS).

    Args:
        mask (`np.ndarray` of shape `(height, width)`, bool): The object.

    Returns:
        `np.ndarray` of shape `(height, width)`, bool: pixels that differ from their right, lower or lower right
        neighbour; in the last row only the right one counts, in the last column only the lower one.
    """
    boundary = np.zeros_like(mask)
    inner, right, below = boundary[:-1, :-1], mask[:-1, 1:], mask[1:, :-1]
    here = mask[:-1, :-1]
    np.logical_xor(here, right, out=inner)
    inner |= here ^ below
    inner |= here ^ mask[1:, 1:]
    boundary[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
    boundary[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
    return boundary


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """
    Dilates a mask by the disk `dx² + dy² <= radius²`.

    A disk is a stack of horizontal runs: the mask is widened a pixel at a time, and each width is shifted up and down
    to the rows where the disk has it. That needs `4 * radius` passes over the mask instead of one a pixel of the disk.

    Args:
        mask (`np.ndarray` of shape `(height, width)`, bool): What to dilate.
        radius (`int`): In pixels, at least 0.

    Returns:
        `np.ndarray` of shape `(height, width)`, bool.
    """
    height, width = mask.shape
    half_widths = [math.isqrt(radius * radius - row * row) for row in range(radius + 1)]
    widened, dilated = mask.copy(), np.zeros_like(mask)
    reached = 0
    for row in range(radius, -1, -1):
        for shift in range(reached + 1, min(half_widths[row], width - 1) + 1):
            widened[:, shift:] |= mask[:, :-shift]
            widened[:, :-shift] |= mask[:, shift:]
            reached = shift
        if row == 0:
            dilated |= widened
        elif row < height:
            dilated[row:] |= widened[:-row]
            dilated[:-row] |= widened[row:]
    return dilated


def boundary_radius(shape: tuple[int, int], tolerance: float = BOUNDARY_TOLERANCE) -> int:
    """How far apart two boundaries may be: `tolerance` of the diagonal of an image, rounded up to pixels."""
    return math.ceil(tolerance * np.linalg.norm(shape))


def region_similarity(ground_truth: np.ndarray, prediction: np.ndarray, void: np.ndarray | None = None) -> float:
    """
    Jaccard index J of two masks.

    Args:
        ground_truth (`np.ndarray` of shape `(height, width)`, bool): The object.
        prediction (`np.ndarray` of shape `(height, width)`, bool): What was predicted.
        void (`np.ndarray` of shape `(height, width)`, bool, *optional*): Pixels that do not count.

    Returns:
        `float` from 0 to 1; 1 where both masks are empty.

    Raises:
        ValueError: If the shapes differ or an array is not bool.
    """
    return frame_scores(ground_truth, prediction, void)[0]


def boundary_accuracy(
    ground_truth: np.ndarray,
    prediction: np.ndarray,
    void: np.ndarray | None = None,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> float:
    """
    F-measure of the boundaries of two masks: precision and recall of boundary pixels that have a counterpart within
    `tolerance` of the image diagonal.

    Args:
        ground_truth (`np.ndarray` of shape `(height, width)`, bool): The object.
        prediction (`np.ndarray` of shape `(height, width)`, bool): What was predicted.
        void (`np.ndarray` of shape `(height, width)`, bool, *optional*): Pixels that do not count.
        tolerance (`float`, *optional*, defaults to 0.008): Share of the diagonal; rounded up to pixels.

    Returns:
        `float` from 0 to 1; 1 where both masks are empty.

    Raises:
        ValueError: If the shapes differ or an array is not bool.
    """
    return frame_scores(ground_truth, prediction, void, tolerance)[1]


def frame_scores(
    ground_truth: np.ndarray,
    prediction: np.ndarray,
    void: np.ndarray | None = None,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> tuple[float, float]:
    """J and F of one object in one frame; see [`region_similarity`] and [`boundary_accuracy`]."""
    _check_masks(ground_truth, prediction, void)
    if void is not None and void.any():
        ground_truth, prediction = ground_truth & ~void, prediction & ~void
    union = ground_truth | prediction
    box = _bounding_box(union)
    if box is None:
        return 1.0, 1.0
    # Everything that counts lies in the box: it takes in one pixel more at each side because a boundary pixel lies up
    # and left of its edge, and because an edge ends where the image does, not where the box does.
    union_size = np.count_nonzero(union[box])
    truth, guess = ground_truth[box], prediction[box]
    similarity = np.count_nonzero(truth & guess) / union_size
    return similarity, _boundary_f(truth, guess, boundary_radius(ground_truth.shape, tolerance))


def statistics(values) -> Statistics:
    """
    Mean, recall and decay of per-frame values.

    The bins are those of the DAVIS code: quarters that share their end frames. (That code numbers frames in 8 bits, so
    its decay is off for sequences above 256 frames; DAVIS has none.)

    Args:
        values (sequence of `float`): One value a frame, in order of time.

    Returns:
        [`Statistics`]

    Raises:
        ValueError: If there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Statistics need a one-dimensional series of at least one value, got shape {values.shape}.")
    edges = np.round(np.linspace(1, len(values), NUM_DECAY_BINS + 1) + 1e-10).astype(np.intp) - 1
    first, last = values[edges[0] : edges[1] + 1], values[edges[-2] : edges[-1] + 1]
    return Statistics(
        mean=float(values.mean()),
        recall=float((values > RECALL_THRESHOLD).mean()),
        decay=float(first.mean() - last.mean()),
    )


def _check_masks(ground_truth: np.ndarray, prediction: np.ndarray, void: np.ndarray | None) -> None:
    """Raises unless all masks are bool and of one two-dimensional shape."""
    for name, mask in (("ground_truth", ground_truth), ("prediction", prediction), ("void", void)):
        if mask is None:
            continue
        if mask.dtype != np.bool_ or mask.ndim != 2:
            raise ValueError(
                f"`{name}` must be bool of shape (height, width), got {mask.dtype} {mask.shape}; compare ids first."
            )
        if mask.shape != ground_truth.shape:
            raise ValueError(
                f"`{name}` must have the shape of the ground truth {ground_truth.shape}, got {mask.shape}."
            )


def _bounding_box(mask: np.ndarray) -> tuple[slice, slice] | None:
    """Slices around the pixels of a mask, a pixel wider at each side where the image allows; `None` if it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    # A slice may end beyond the image, but must not start before it.
    return slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2)


def _boundary_f(ground_truth: np.ndarray, prediction: np.ndarray, radius: int) -> float:
    """F-measure of the boundaries of two masks for a distance in pixels."""
    truth, guess = boundary_map(ground_truth), boundary_map(prediction)
    num_truth, num_guess = np.count_nonzero(truth), np.count_nonzero(guess)
    # One side without boundary pixels makes precision or recall 0, also for a mask that fills the image.
    if num_truth == 0 or num_guess == 0:
        return float(num_truth == num_guess)
    precision = np.count_nonzero(guess & dilate(truth, radius)) / num_guess
    recall = np.count_nonzero(truth & dilate(guess, radius)) / num_truth
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


__all__ = [
    "BOUNDARY_TOLERANCE",
    "Statistics",
    "boundary_accuracy",
    "boundary_map",
    "boundary_radius",
    "dilate",
    "frame_scores",
    "region_similarity",
    "statistics",
]
