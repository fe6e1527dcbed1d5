"""J, F and their statistics against `vos-benchmark`, against plain re-implementations and against frozen values."""

import math

import numpy as np
import pytest

from hf_deformvos.evaluation.layouts import read_ids
from hf_deformvos.evaluation.metrics import (
    boundary_accuracy,
    boundary_map,
    boundary_radius,
    dilate,
    frame_scores,
    region_similarity,
    statistics,
)


TOLERANCE = 1e-6


def blobs(rng, height, width, num_objects, num_blobs=4):
    """An id map of random ellipses, some of them cut by the image's edge."""
    ids = np.zeros((height, width), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    for object_id in range(1, num_objects + 1):
        for _ in range(num_blobs):
            y, x = rng.uniform(0, height), rng.uniform(0, width)
            a, b = rng.uniform(2, max(height, 9) / 3, 2)
            ids[((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1] = object_id
    return ids


def wobble(rng, ids):
    """A prediction that is somewhat off: shifted, with a bite and some spots."""
    shift = tuple(rng.integers(-4, 5, 2))
    prediction = np.roll(ids, shift, (0, 1))
    y, x = rng.integers(0, ids.shape[0]), rng.integers(0, ids.shape[1])
    prediction[y : y + 9, x : x + 9] = 0
    prediction[rng.random(ids.shape) < 0.002] = rng.integers(0, ids.max() + 1)
    return prediction


def oracle_scores(frames):
    """Per-frame J and F of each object by `vos-benchmark`."""
    evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator()
    for truth, prediction in frames:
        evaluator.feed_frame(prediction, truth)
    return evaluator.object_iou, evaluator.boundary_f


@pytest.mark.parametrize("size", [(96, 160), (73, 31), (480, 854), (5, 200)])
def test_single_object_agrees_with_oracle(size):
    rng = np.random.default_rng(size[0])
    frames = [(truth := blobs(rng, *size, 1), wobble(rng, truth)) for _ in range(4)]
    region, boundary = oracle_scores(frames)
    ours = [frame_scores(truth == 1, prediction == 1) for truth, prediction in frames]
    np.testing.assert_allclose(ours, np.stack([region[1], boundary[1]], axis=1), atol=TOLERANCE, rtol=0)
    # Not all the same, or nothing was compared.
    assert len(set(ours)) > 1


def test_several_objects_agree_with_oracle():
    rng = np.random.default_rng(1)
    frames = [(truth := blobs(rng, 120, 180, 5), wobble(rng, truth)) for _ in range(6)]
    # The oracle lists an object from the frame on where it is first seen: on common ground all are seen at once.
    assert set(np.unique(frames[0][0])) == set(range(6))
    region, boundary = oracle_scores(frames)
    for object_id in range(1, 6):
        ours = [frame_scores(truth == object_id, guess == object_id) for truth, guess in frames]
        theirs = np.stack([region[object_id], boundary[object_id]], axis=1)
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["full", "edges", "line", "pixel", "corner", "prediction_empty", "truth_empty"])
def test_degenerate_masks_agree_with_oracle(case):
    truth, prediction = np.zeros((40, 60), np.uint8), np.zeros((40, 60), np.uint8)
    if case == "full":
        truth[:], prediction[:, 1:] = 1, 1
    elif case == "edges":
        truth[0], truth[-1], prediction[:, 0], prediction[:, -1] = 1, 1, 1, 1
    elif case == "line":
        truth[20], prediction[22] = 1, 1
    elif case == "pixel":
        truth[7, 7], prediction[8, 8] = 1, 1
    elif case == "corner":
        truth[-1, -1], prediction[-1, -1] = 1, 1
    elif case == "prediction_empty":
        truth[10:20, 10:20] = 1
    elif case == "truth_empty":
        prediction[10:20, 10:20] = 1
    region, boundary = oracle_scores([(truth, prediction)])
    assert frame_scores(truth == 1, prediction == 1) == pytest.approx((region[1][0], boundary[1][0]), abs=TOLERANCE)


@pytest.mark.data
def test_agrees_with_oracle_on_real_masks(data_root):
    names = ["bmx-trees", "dance-twirl", "drift-chicane"]
    folders = [data_root / "davis2016-val" / "Annotations" / "480p" / name for name in names]
    rng = np.random.default_rng(2)
    for folder in folders:
        frames = [(read_ids(path) > 0).astype(np.uint8) for path in sorted(folder.glob("*.png"))[:40:8]]
        pairs = [(truth, wobble(rng, truth)) for truth in frames]
        region, boundary = oracle_scores(pairs)
        ours = [frame_scores(truth == 1, prediction == 1) for truth, prediction in pairs]
        np.testing.assert_allclose(ours, np.stack([region[1], boundary[1]], axis=1), atol=TOLERANCE, rtol=0)


def test_absent_in_both_is_one():
    empty = np.zeros((30, 40), bool)
    assert frame_scores(empty, empty) == (1.0, 1.0)


def test_absent_in_one_is_zero():
    empty, mask = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    mask[5:15, 5:15] = True
    assert frame_scores(mask, empty) == frame_scores(empty, mask) == (0.0, 0.0)


def test_full_image_has_no_boundary():
    full, mask = np.ones((30, 40), bool), np.zeros((30, 40), bool)
    mask[5:15, 5:15] = True
    assert frame_scores(full, full) == (1.0, 1.0)
    assert boundary_accuracy(full, mask) == 0.0


def test_void_pixels_count_for_neither_side():
    rng = np.random.default_rng(3)
    truth, void = blobs(rng, 80, 120, 1) == 1, np.zeros((80, 120), bool)
    void[:, 60:] = True
    prediction = truth.copy()
    prediction[:, 70:] ^= True
    assert frame_scores(truth, prediction)[0] < 1
    assert frame_scores(truth, prediction, void) == (1.0, 1.0)
    # The union of what is left decides, and a boundary arises where an object runs into the void.
    prediction[10:20, 10:20] = True
    inside = ~void
    expected = (truth & prediction & inside).sum() / ((truth | prediction) & inside).sum()
    assert region_similarity(truth, prediction, void) == pytest.approx(expected, abs=1e-12)
    assert boundary_accuracy(truth, prediction, void) == boundary_accuracy(truth & inside, prediction & inside)
    assert frame_scores(truth, prediction, np.ones_like(void)) == (1.0, 1.0)


def test_boundary_map_is_the_definition():
    mask = blobs(np.random.default_rng(4), 20, 25, 1) == 1
    expected = np.zeros_like(mask)
    for y in range(20):
        for x in range(25):
            neighbours = []
            if x < 24:
                neighbours.append(mask[y, x + 1])
            if y < 19:
                neighbours.append(mask[y + 1, x])
            if x < 24 and y < 19:
                neighbours.append(mask[y + 1, x + 1])
            expected[y, x] = any(mask[y, x] != other for other in neighbours)
    np.testing.assert_array_equal(boundary_map(mask), expected)


@pytest.mark.parametrize("radius", [0, 1, 2, 3, 8, 30])
@pytest.mark.parametrize("size", [(24, 40), (1, 9), (9, 1), (1, 1)])
def test_dilate_is_a_disk(radius, size):
    rng = np.random.default_rng(radius)
    mask = rng.random(size) < 0.02
    mask[rng.integers(0, size[0]), rng.integers(0, size[1])] = True
    rows, columns = np.mgrid[: size[0], : size[1]]
    expected = np.zeros(size, bool)
    for y, x in np.argwhere(mask):
        expected |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    before = mask.copy()
    np.testing.assert_array_equal(dilate(mask, radius), expected)
    np.testing.assert_array_equal(mask, before)


def test_boundary_radius_is_rounded_up():
    assert boundary_radius((480, 854)) == math.ceil(0.008 * math.hypot(480, 854)) == 8
    assert boundary_radius((240, 432)) == 4
    assert boundary_radius((10, 10)) == 1


def plain_statistics(values):
    """Mean, recall and decay of DAVIS written out: 1-based quarters that share their ends, halves rounded up."""
    count = len(values)
    edges = [math.floor(1 + (count - 1) * quarter / 4 + 0.5 + 1e-9) for quarter in range(5)]
    first = values[edges[0] - 1 : edges[1]]
    last = values[edges[3] - 1 : edges[4]]
    recall = sum(1 for value in values if value > 0.5) / count
    return sum(values) / count, recall, sum(first) / len(first) - sum(last) / len(last)


@pytest.mark.parametrize("count", [*range(1, 40), 78, 102, 300, 1000])
def test_statistics_are_the_definition(count):
    values = np.random.default_rng(count).random(count).tolist()
    ours = statistics(values)
    assert (ours.mean, ours.recall, ours.decay) == pytest.approx(plain_statistics(values), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5], (0.5, 0.0, 0.0)),
        ([1.0, 0.0], (0.5, 0.5, 1.0)),
        ([0.9, 0.8, 0.7, 0.6, 0.5], (0.7, 0.8, 0.3)),
        # Bins of 1-based frames 1-3 and 8-10: means 0.9 and 0.2.
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], (0.55, 0.5, 0.7)),
        # 48 frames: bins 1-13 and 36-48.
        ([1 - frame / 48 for frame in range(48)], (49 / 96, 0.5, 35 / 48)),
        ([0.51, 0.5, 0.49], (0.5, 1 / 3, 0.015)),
    ],
)
def test_statistics_frozen(values, expected):
    ours = statistics(values)
    assert (ours.mean, ours.recall, ours.decay) == pytest.approx(expected, abs=1e-12)


def test_bad_input_is_named():
    mask = np.zeros((8, 9), bool)
    with pytest.raises(ValueError, match=r"`prediction` must have the shape .*\(8, 9\), got \(9, 8\)"):
        frame_scores(mask, mask.T)
    with pytest.raises(ValueError, match=r"`prediction` must be bool .* got uint8"):
        region_similarity(mask, mask.astype(np.uint8))
    with pytest.raises(ValueError, match=r"`void` must have the shape"):
        boundary_accuracy(mask, mask, mask[:4])
    with pytest.raises(ValueError, match=r"at least one value"):
        statistics([])
