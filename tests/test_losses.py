"""The segmentation losses against independent NumPy computations in float64."""

import math

import numpy as np
import pytest
import torch

from hf_deformvos.training import bootstrapped_cross_entropy, soft_jaccard_loss
from hf_deformvos.training.losses import bootstrap_share, upsample_logits


BATCH, FRAMES, OBJECTS, HEIGHT, WIDTH = 2, 3, 2, 6, 7


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def case():
    """Logits in float64 and labels with void; sample 1 has one object, and sample 0 lacks object 2 in frame 1."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(BATCH, FRAMES, OBJECTS + 1, HEIGHT, WIDTH)) * 2
    labels = rng.integers(0, OBJECTS + 1, (BATCH, FRAMES, HEIGHT, WIDTH))
    labels[1][labels[1] == 2] = 0
    labels[0, 1][labels[0, 1] == 2] = 1
    labels[rng.random(labels.shape) < 0.2] = 255
    valid = np.array([[True, True], [True, False]])
    return torch.tensor(logits), torch.tensor(labels), torch.tensor(valid)


def numpy_softmax(logits, axis):
    e = np.exp(logits - logits.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def numpy_cross_entropy(logits, labels, keep) -> float:
    """Mean over frames of the mean of the `keep` hardest labelled pixels."""
    frames = []
    for clip, clip_labels in zip(np.asarray(logits), np.asarray(labels), strict=True):
        for frame, frame_labels in zip(clip, clip_labels, strict=True):
            probabilities = numpy_softmax(frame, 0)
            losses = sorted(
                (
                    -math.log(probabilities[frame_labels[y, x], y, x])
                    for y, x in np.ndindex(*frame_labels.shape)
                    if frame_labels[y, x] != 255
                ),
                reverse=True,
            )
            if losses:
                count = max(1, math.ceil(len(losses) * keep - 1e-6))
                frames.append(sum(losses[:count]) / count)
    return sum(frames) / len(frames) if frames else 0.0


def numpy_jaccard(logits, labels, valid, epsilon=1.0) -> float:
    """Mean over shown, valid objects of one minus the soft Jaccard index of labelled pixels."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    values = []
    for b, t in np.ndindex(*labels.shape[:2]):
        probabilities = numpy_softmax(logits[b, t], 0)
        known = labels[b, t] != 255
        for number in range(1, logits.shape[2]):
            target = labels[b, t] == number
            if target.any() and valid[b][number - 1]:
                p = probabilities[number][known]
                y = target[known].astype(float)
                shared = (p * y).sum()
                values.append(1 - (shared + epsilon) / (p.sum() + y.sum() - shared + epsilon))
    return float(np.mean(values)) if values else 0.0


# ---- upsampling -----------------------------------------------------------------------------------------------------


def test_upsampling_is_bilinear_with_aligned_corners(case):
    logits, _, _ = case
    large = upsample_logits(logits, (11, 16), None)
    assert large.dtype == torch.float64
    source = logits.numpy()
    for y, x in np.ndindex(11, 16):
        v, u = y * (HEIGHT - 1) / 10, x * (WIDTH - 1) / 15
        top, left = min(int(v), HEIGHT - 2), min(int(u), WIDTH - 2)
        dy, dx = v - top, u - left
        expected = (
            source[..., top, left] * (1 - dy) * (1 - dx)
            + source[..., top, left + 1] * (1 - dy) * dx
            + source[..., top + 1, left] * dy * (1 - dx)
            + source[..., top + 1, left + 1] * dy * dx
        )
        np.testing.assert_allclose(large[..., y, x].numpy(), expected, atol=1e-12)


def test_upsampling_rules_out_invalid_objects(case):
    logits, _, valid = case
    large = upsample_logits(logits, (11, 16), valid)
    plain = upsample_logits(logits, (11, 16), None)
    assert (large[1, :, 2] == -1e4).all()
    assert torch.equal(large[0], plain[0])
    assert torch.equal(large[1, :, :2], plain[1, :, :2])
    assert large.softmax(2)[1, :, 2].max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_computed_in_float32(case, dtype):
    logits, labels, valid = case
    half = logits.to(dtype)
    large = upsample_logits(half, (HEIGHT, WIDTH), valid)
    assert large.dtype == torch.float32
    for loss, expected in (
        (bootstrapped_cross_entropy(half, labels, 0.5), numpy_cross_entropy(half.double(), labels, 0.5)),
        (soft_jaccard_loss(half, labels, valid), numpy_jaccard(half.double(), labels, valid)),
    ):
        assert loss.dtype == torch.float32
        assert float(loss) == pytest.approx(expected, rel=1e-5)


# ---- bootstrapped cross-entropy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.25, 0.1, 1e-3])
def test_cross_entropy_equals_numpy(case, keep):
    logits, labels, _ = case
    assert float(bootstrapped_cross_entropy(logits, labels, keep)) == pytest.approx(
        numpy_cross_entropy(logits, labels, keep), abs=1e-12
    )


def test_keeping_all_is_plain_cross_entropy(case):
    logits, labels, _ = case
    full = torch.where(labels == 255, 0, labels)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), full.flatten(0, 1))
    assert float(bootstrapped_cross_entropy(logits, full, 1.0)) == pytest.approx(float(plain), abs=1e-12)
    assert float(bootstrapped_cross_entropy(logits, full, 0.999999)) == pytest.approx(float(plain), abs=1e-12)


def test_harder_pixels_give_more(case):
    logits, labels, _ = case
    losses = [float(bootstrapped_cross_entropy(logits, labels, keep)) for keep in (1.0, 0.5, 0.2, 0.05)]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]


@pytest.mark.parametrize("keep", [1.0, 0.3])
def test_void_pixels_have_no_say(case, keep):
    logits, labels, valid = case
    changed = torch.where((labels == 255).unsqueeze(2), torch.randn_like(logits) * 50, logits)
    assert float(bootstrapped_cross_entropy(changed, labels, keep)) == pytest.approx(
        float(bootstrapped_cross_entropy(logits, labels, keep)), abs=1e-12
    )
    assert float(soft_jaccard_loss(changed, labels, valid)) == pytest.approx(
        float(soft_jaccard_loss(logits, labels, valid)), abs=1e-12
    )
    logits = logits.clone().requires_grad_()
    (bootstrapped_cross_entropy(logits, labels, keep) + soft_jaccard_loss(logits, labels, valid)).backward()
    assert (logits.grad * (labels == 255).unsqueeze(2) == 0).all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_frames_of_nothing_but_void_do_not_count(case, keep):
    logits, labels, valid = case
    labels[0, 2] = 255
    assert float(bootstrapped_cross_entropy(logits, labels, keep)) == pytest.approx(
        numpy_cross_entropy(logits, labels, keep), abs=1e-12
    )
    nothing = torch.full_like(labels, 255)
    logits = logits.clone().requires_grad_()
    loss = bootstrapped_cross_entropy(logits, nothing, keep) + soft_jaccard_loss(logits, nothing, valid)
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5])
def test_a_share_out_of_range_is_refused(case, keep):
    with pytest.raises(ValueError, match=rf"`keep` must be a share in \(0, 1\], got {keep}"):
        bootstrapped_cross_entropy(case[0], case[1], keep)


def test_the_share_falls_linearly_to_its_final_value():
    assert [bootstrap_share(p, 0.4, 0.2) for p in (0.0, 0.2, 0.4, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert bootstrap_share(0.0, 0.0, 0.2) == 0.2


# ---- soft Jaccard ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1.0, 1e-3])
def test_jaccard_equals_numpy(case, epsilon):
    logits, labels, valid = case
    expected = numpy_jaccard(logits, labels, valid.numpy(), epsilon)
    assert float(soft_jaccard_loss(logits, labels, valid, epsilon)) == pytest.approx(expected, abs=1e-12)


def test_invalid_objects_do_not_count(case):
    logits, labels, _ = case
    labels[1, :, 0, 0] = 2  # a label that `object_valid` rules out
    valid = torch.tensor([[True, True], [True, False]])
    counted = soft_jaccard_loss(logits, labels, torch.ones(2, 2, dtype=torch.bool))
    left_out = soft_jaccard_loss(logits, labels, valid)
    assert float(left_out) == pytest.approx(numpy_jaccard(logits, labels, valid.numpy()), abs=1e-12)
    assert float(counted) != pytest.approx(float(left_out), abs=1e-6)
    assert float(soft_jaccard_loss(logits, labels)) == pytest.approx(float(counted), abs=1e-12)


def test_absent_objects_do_not_count(case):
    logits, labels, valid = case
    logits[0, 1, 2] += 5  # object 2 is not in this frame
    without = torch.full_like(labels[:1, 1:2], 0)
    assert float(soft_jaccard_loss(logits[:1, 1:2], without)) == 0.0
    assert float(soft_jaccard_loss(logits, labels, valid)) == pytest.approx(
        numpy_jaccard(logits, labels, valid.numpy()), abs=1e-12
    )


def test_perfect_predictions_cost_nothing():
    labels = torch.zeros(1, 2, 8, 8, dtype=torch.long)
    labels[:, :, 2:6, 2:6] = 1
    logits = torch.stack([(labels == number) * 60.0 for number in range(3)], dim=2)
    assert float(soft_jaccard_loss(logits, labels)) == pytest.approx(0, abs=1e-6)
    assert float(bootstrapped_cross_entropy(logits, labels, 0.25)) == pytest.approx(0, abs=1e-6)
    assert float(soft_jaccard_loss(logits.roll(1, 2), labels)) > 0.9


def test_a_batch_without_object_channels_gives_zero():
    logits = torch.randn(1, 2, 1, 4, 4, requires_grad=True)
    loss = soft_jaccard_loss(logits, torch.zeros(1, 2, 4, 4, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0.0


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_equal_finite_differences(case):
    logits, labels, valid = case
    logits = logits[:, :1, :, :3, :3].clone().requires_grad_()
    labels = labels[:, :1, :5, :5]

    def total(values):
        large = upsample_logits(values, (5, 5), valid)
        return bootstrapped_cross_entropy(large, labels, 0.5) + soft_jaccard_loss(large, labels, valid)

    assert torch.autograd.gradcheck(total, (logits,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_gradients_stay_finite(case, scale):
    logits, labels, valid = case
    logits = (logits.float() * scale).requires_grad_()
    large = upsample_logits(logits, (HEIGHT, WIDTH), valid)
    (bootstrapped_cross_entropy(large, labels, 0.25) + soft_jaccard_loss(large, labels, valid)).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1, :, 2] == 0).all(), "an object that does not exist has no gradient"
