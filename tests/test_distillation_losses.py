"""The distillation losses against independent NumPy computations in float64, most of them written out in loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from hf_deformvos.training import (
    attention_alignment_loss,
    centered_kernel_alignment,
    inter_object_relation_loss,
    intra_object_relation_loss,
    kl_divergence_loss,
    representation_loss,
)


RELATIONS = [intra_object_relation_loss, inter_object_relation_loss]
LOGIT_LOSSES = [*RELATIONS, kl_divergence_loss]
EPSILON = 1e-8


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def case(rng):
    """
    Student's and teacher's logits in float64, existing objects and known pixels.

    Sample 0 has three objects, sample 1 two (the middle one is missing), and sample 2 one; sample 0 has nothing known
    in its frame 1.
    """
    student, teacher = (rng.normal(size=(3, 2, 4, 3, 4)) * 2 for _ in range(2))
    valid = np.array([[True, True, True], [True, False, True], [False, True, False]])
    for logits in (student, teacher):
        logits[:, :, 1:][np.broadcast_to(~valid[:, None, :, None, None], logits[:, :, 1:].shape)] = -1e4
    known = rng.random((3, 2, 3, 4)) > 0.25
    known[0, 1] = False
    return tuple(torch.tensor(x) for x in (student, teacher, valid, known))


def attention(rng, *shape):
    """Random attention weights in float64: rows sum to 1."""
    return torch.tensor(rng.normal(size=shape) * 2).softmax(-1)


# ---- oracles --------------------------------------------------------------------------------------------------------


def numpy_hsic(first, second) -> float:
    """tr(K H L H) by its definition."""
    n = len(first)
    centering = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(first @ first.T @ centering @ second @ second.T @ centering))


def numpy_unbiased_hsic(first, second) -> float:
    """The mean over all quadruples of distinct queries of the U-statistic's kernel."""
    k, l = first @ first.T, second @ second.T  # noqa: E741  the names of the literature
    terms = [
        k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]
        for i, j, q, r in itertools.permutations(range(len(first)), 4)
    ]
    return sum(terms) / len(terms)


def numpy_alignment(first, second, unbiased) -> list[float]:
    hsic = numpy_unbiased_hsic if unbiased else numpy_hsic
    first, second = np.asarray(first), np.asarray(second)
    return [hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b)) for a, b in zip(first, second, strict=True)]


def softmax(values) -> list[float]:
    most = max(values)
    exponentials = [math.exp(v - most) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def pearson(first, second) -> float:
    n = len(first)
    first_mean, second_mean = sum(first) / n, sum(second) / n
    covariance = sum((a - first_mean) * (b - second_mean) for a, b in zip(first, second, strict=True)) / n
    first_variance = sum((a - first_mean) ** 2 for a in first) / n + EPSILON
    second_variance = sum((b - second_mean) ** 2 for b in second) / n + EPSILON
    return covariance / math.sqrt(first_variance * second_variance)


def probabilities(student, teacher, valid, known, temperature):
    """A frame at a time: (number of objects, a row of probabilities a known pixel: student's, teacher's)."""
    student, teacher, valid, known = (np.asarray(x) for x in (student, teacher, valid, known))
    for b, t in np.ndindex(*student.shape[:2]):
        kept = [0] + [c for c in range(1, student.shape[2]) if valid[b, c - 1]]
        rows = [
            [softmax([x[b, t, c, i, j] / temperature for c in kept]) for i, j in np.argwhere(known[b, t])]
            for x in (student, teacher)
        ]
        yield len(kept) - 1, *rows


def numpy_intra(*case) -> float:
    losses = [
        1 - pearson([row[c] for row in student], [row[c] for row in teacher])
        for objects, student, teacher in probabilities(*case)
        for c in range(1, objects + 1)
        if len(student) > 1
    ]
    return sum(losses) / len(losses)


def numpy_inter(*case) -> float:
    losses = [
        1 - pearson(s, t)
        for objects, student, teacher in probabilities(*case)
        for s, t in zip(student, teacher, strict=True)
        if objects > 1
    ]
    return sum(losses) / len(losses)


def numpy_kl(*case) -> float:
    losses = [
        sum(q * math.log(q / p) for p, q in zip(s, t, strict=True))
        for _, student, teacher in probabilities(*case)
        for s, t in zip(student, teacher, strict=True)
    ]
    return case[-1] ** 2 * sum(losses) / len(losses)


ORACLES = {
    intra_object_relation_loss: numpy_intra,
    inter_object_relation_loss: numpy_inter,
    kl_divergence_loss: numpy_kl,
}


def numpy_representation(student, teacher, labels=None, omega=1.0) -> float:
    losses = []
    for b, (zs, zt) in enumerate(zip(np.asarray(student), np.asarray(teacher), strict=True)):
        kept = [i for i in range(len(zs)) if labels is None or labels[b][i] != 255]
        alone = together = 0.0
        for i, j in itertools.product(kept, kept):
            own = np.dot(zs[i], zs[j]) / np.linalg.norm(zs[i]) / np.linalg.norm(zs[j])
            target = np.dot(zt[i], zt[j]) / np.linalg.norm(zt[i]) / np.linalg.norm(zt[j])
            if labels is not None:
                target = omega * target + (1 - omega) * float(labels[b][i] == labels[b][j])
            alone += own**2
            together += (own * target) ** 2
        if kept:
            losses.append(math.log2(alone) - math.log2(together))
    return sum(losses) / len(losses) if losses else 0.0


def gradient(loss_function, student, *arguments, **keywords):
    """The loss and the student's gradient."""
    student = student.detach().clone().requires_grad_()
    loss = loss_function(student, *arguments, **keywords)
    loss.backward()
    return float(loss.detach()), student.grad


# ---- centered kernel alignment --------------------------------------------------------------------------------------

# Fewer, as many and more keys than the seven queries, on either side: every algebraic form is used.
KEYS = [(3, 5), (3, 3), (3, 7), (7, 3), (4, 11), (11, 4), (7, 7), (9, 12), (1, 1)]


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("keys", KEYS)
def test_alignment_equals_its_definition(rng, keys, unbiased):
    first, second = (torch.tensor(rng.normal(size=(2, 7, k)) + 3) for k in keys)
    expected = numpy_alignment(first, second, unbiased)
    values = centered_kernel_alignment(first, second, unbiased)
    assert values.shape == (2,)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    np.testing.assert_allclose(centered_kernel_alignment(second, first, unbiased), expected, atol=1e-9)
    loss = attention_alignment_loss(first, second, unbiased)
    assert float(loss) == pytest.approx(1 - sum(expected) / 2, abs=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_alignment_of_attention_weights_equals_its_definition(rng, unbiased):
    first, second = attention(rng, 3, 8, 8), attention(rng, 3, 8, 4)
    expected = numpy_alignment(first, second, unbiased)
    np.testing.assert_allclose(centered_kernel_alignment(first, second, unbiased), expected, atol=1e-10)


def test_a_value_computed_by_hand():
    first = torch.tensor([[[1.0], [-1.0], [0.0]]])
    second = torch.tensor([[[1.0], [0.0], [0.0]]])
    # With one column each, CKA is the squared correlation: 1² / (2 * 2/3).
    assert float(centered_kernel_alignment(first, second)) == pytest.approx(3 / 4, abs=1e-6)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("keys", [(4, 6), (20, 6), (20, 25)])
def test_alignment_does_not_change_with_orthogonal_maps_scales_and_columns(rng, keys, unbiased):
    first, second = (torch.tensor(rng.normal(size=(2, 10, k))) for k in keys)
    value = centered_kernel_alignment(first, second, unbiased)
    rotation = torch.tensor(np.linalg.qr(rng.normal(size=(keys[0], keys[0])))[0])
    permutation = torch.tensor(rng.permutation(keys[0]))
    shift = torch.tensor(rng.normal(size=keys[0]))
    both = torch.tensor(rng.permutation(10))
    for changed in (first @ rotation, first[:, :, permutation], first * 1e6, first * -1e-6, first + shift):
        torch.testing.assert_close(centered_kernel_alignment(changed, second, unbiased), value, atol=1e-9, rtol=0)
    together = centered_kernel_alignment(first[:, both], second[:, both], unbiased)
    torch.testing.assert_close(together, value, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        centered_kernel_alignment(first, first @ rotation * 3, unbiased), torch.ones(2, dtype=torch.float64)
    )


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scales_near_the_ends_of_float32(rng, scale, unbiased):
    first, second = (torch.tensor(rng.normal(size=(2, 10, k))).float() for k in (6, 12))
    value = centered_kernel_alignment(first, second, unbiased)
    torch.testing.assert_close(centered_kernel_alignment(first * scale, second * scale, unbiased), value)


@pytest.mark.parametrize("unbiased", [False, True])
def test_alignment_changes_when_queries_are_permuted(rng, unbiased):
    first = attention(rng, 2, 30, 12)
    permuted = first[:, torch.tensor(rng.permutation(30))]
    assert (centered_kernel_alignment(first, permuted, unbiased) < 0.6).all()


def test_only_the_unbiased_estimator_is_about_0_for_unrelated_maps(rng):
    first, second = (torch.tensor(rng.normal(size=(40, 12, 30))) for _ in range(2))
    assert centered_kernel_alignment(first, second).mean() > 0.5
    assert abs(centered_kernel_alignment(first, second, unbiased=True).mean()) < 0.05


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("keys", [(3, 4), (8, 3), (8, 9)])
def test_gradients_of_alignment_equal_finite_differences(rng, keys, unbiased):
    student, teacher = (attention(rng, 2, 6, k) for k in keys)
    student = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_alignment_loss(x, teacher, unbiased), (student,))


def test_alignment_lets_gradients_through_to_both_and_the_loss_to_the_student_only(rng):
    first, second = (attention(rng, 2, 6, k).requires_grad_() for k in (5, 7))
    centered_kernel_alignment(first, second).sum().backward()
    assert first.grad.abs().sum() > 0
    assert second.grad.abs().sum() > 0
    second.grad = None
    attention_alignment_loss(first, second).backward()
    assert second.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("value", [0.0, 1 / 7, 300.0])
def test_a_constant_map_has_no_alignment(rng, value, unbiased, dtype):
    row = attention(rng, 1, 1, 40).to(dtype)
    maps = attention(rng, 3, 50, 40).to(dtype)
    constant = attention(rng, 3, 50, 40).to(dtype)
    constant[0] = value
    constant[1] = row
    for first, second in ((constant, maps), (maps, constant), (constant, constant)):
        values = centered_kernel_alignment(first, second, unbiased)
        assert values[:2].tolist() == [0.0, 0.0]
        loss, slope = gradient(attention_alignment_loss, first, second, unbiased)
        assert loss == pytest.approx(1 - float(values.mean()), abs=1e-6)
        assert torch.isfinite(slope).all()
        assert (slope[:2] == 0).all()
    assert gradient(attention_alignment_loss, maps, constant, unbiased)[1][2].abs().sum() > 0


@pytest.mark.parametrize("queries", [1, 2, 3, 4])
@pytest.mark.parametrize("unbiased", [False, True])
def test_few_queries(rng, queries, unbiased):
    student, teacher = attention(rng, 2, queries, 5), attention(rng, 2, queries, 6)
    loss, slope = gradient(attention_alignment_loss, student, teacher, unbiased)
    assert torch.isfinite(slope).all()
    if queries < (4 if unbiased else 2):
        assert loss == 1.0
        assert (slope == 0).all()
    else:
        assert loss == pytest.approx(1 - np.mean(numpy_alignment(student, teacher, unbiased)), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [30, 40])
def test_queries_that_attend_to_their_own_key_only(rng, keys, dtype):
    diagonal = torch.eye(30, keys, dtype=dtype)[None]
    maps = attention(rng, 1, 30, 20).to(dtype)
    assert float(centered_kernel_alignment(diagonal, diagonal)) == pytest.approx(1, abs=1e-5)
    for first, second in ((diagonal, maps), (maps, diagonal)):
        loss, slope = gradient(attention_alignment_loss, first, second, True)
        assert loss == 1.0
        assert (slope == 0).all()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_alignment_of_low_precision_is_computed_in_float32(rng, dtype, tolerance, unbiased):
    # Diffuse attention over many keys: in half precision, centred weights of 1e-4 would lose their squares.
    student, teacher = ((attention(rng, 2, 64, k) ** 0.1).to(dtype) for k in (512, 48))
    student, teacher = (x / x.double().sum(-1, keepdim=True).to(dtype) for x in (student, teacher))
    expected = centered_kernel_alignment(student.double(), teacher.double(), unbiased)
    values = centered_kernel_alignment(student, teacher, unbiased)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=tolerance, rtol=0)
    _, slope = gradient(attention_alignment_loss, student, teacher, unbiased)
    assert slope.dtype == dtype
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0


def test_autocast_does_not_lower_the_precision(rng):
    student, teacher = attention(rng, 2, 40, 50).float(), attention(rng, 2, 40, 30).float()
    logits = torch.tensor(rng.normal(size=(2, 1, 1, 3, 4, 5))).float()
    functions = [
        lambda: attention_alignment_loss(student, teacher),
        lambda: attention_alignment_loss(student, teacher, unbiased=True),
        lambda: representation_loss(student, teacher),
        *(lambda loss=loss: loss(logits[0], logits[1]) for loss in LOGIT_LOSSES),
    ]
    for function in functions:
        expected = function()
        with torch.autocast("cpu", torch.bfloat16):
            value = function()
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(float(expected), abs=1e-6)


def test_the_largest_matrix_is_no_larger_than_the_maps(rng, monkeypatch):
    """Narrow maps of many queries never meet as queries x queries."""
    sizes = []
    matmul = torch.Tensor.__matmul__

    def measured(first, second):
        result = matmul(first, second)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", measured)
    centered_kernel_alignment(torch.rand(1, 500, 6), torch.rand(1, 500, 9), unbiased=True)
    assert max(sizes) == 81
    sizes.clear()
    centered_kernel_alignment(torch.rand(1, 20, 600), torch.rand(1, 20, 900), unbiased=True)
    assert max(sizes) == 400
    sizes.clear()
    centered_kernel_alignment(torch.rand(1, 60, 60), torch.rand(1, 60, 6))
    assert max(sizes) == 3600


def test_maps_of_other_queries_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 6, 4\) and \(2, 7, 4\).*same token grid"):
        attention_alignment_loss(torch.rand(2, 6, 4), torch.rand(2, 7, 4))
    with pytest.raises(ValueError, match=r"got \(6, 4\) and \(6, 4\)"):
        centered_kernel_alignment(torch.rand(6, 4), torch.rand(6, 4))


# ---- relations and divergence of logits -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_losses_of_logits_equal_their_definitions(case, loss, temperature):
    value = loss(*case, temperature=temperature)
    assert value.shape == ()
    assert float(value) == pytest.approx(ORACLES[loss](*case, temperature), abs=1e-10)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_without_masks_all_objects_and_pixels_count(case, loss):
    student, teacher, valid, known = (x[:1] for x in case)
    everything = torch.ones_like(valid), torch.ones_like(known)
    assert float(loss(student, teacher)) == pytest.approx(ORACLES[loss](student, teacher, *everything, 1.0), abs=1e-10)


def test_values_computed_by_hand():
    teacher = torch.tensor([0.25, 0.75]).log().reshape(1, 1, 2, 1, 1)
    student = torch.zeros(1, 1, 2, 1, 1)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(kl_divergence_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    # Inter: (0.5, 0.3, 0.2) and (0.2, 0.3, 0.5) deviate from 1/3 by (5, -1, -4)/30 and (-4, -1, 5)/30.
    rows = [torch.tensor(x).log().reshape(1, 1, 3, 1, 1) for x in ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5])]
    assert float(inter_object_relation_loss(*rows)) == pytest.approx(1 + 39 / 42, rel=1e-5)
    # Intra: the object's probability falls with the student where it rises with the teacher.
    columns = [torch.tensor([[1 - p, p] for p in x]).log().T.reshape(1, 1, 2, 1, 3) for x in ([0.1, 0.2, 0.3],) * 2]
    assert float(intra_object_relation_loss(*columns)) == pytest.approx(0, abs=1e-5)
    assert float(intra_object_relation_loss(columns[0], columns[1].flip(-1))) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_equal_logits_cost_nothing(case, loss):
    student, _, valid, known = case
    value, slope = gradient(loss, student, student, valid, known)
    assert value == pytest.approx(0, abs=1e-4)  # 1e-8 beside the variances of probabilities
    assert slope.abs().max() < 1e-4


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_unused_ids_are_dropped_before_the_softmax(case, loss):
    """Whatever they hold, and wherever they stand."""
    student, teacher, valid, known = case
    value, slope = gradient(loss, student, teacher, valid, known)
    for filling in (50.0, -1e4, math.nan):
        hidden = ~valid[:, None, :, None, None]
        filled = [torch.cat([x[:, :, :1], x[:, :, 1:].masked_fill(hidden, filling)], 2) for x in (student, teacher)]
        other, other_slope = gradient(loss, *filled, valid, known)
        assert other == pytest.approx(value, abs=1e-12)
        torch.testing.assert_close(other_slope, slope)
        assert (slope[:, :, 1:][hidden.expand_as(slope[:, :, 1:])] == 0).all()
    alone = loss(student[1:2, :, [0, 1, 3]], teacher[1:2, :, [0, 1, 3]], None, known[1:2])
    assert float(loss(*(x[1:2] for x in case))) == pytest.approx(float(alone), abs=1e-12)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_void_pixels_have_no_say(case, loss):
    student, teacher, valid, known = case
    value, slope = gradient(loss, student, teacher, valid, known)
    void = ~known.unsqueeze(2)
    changed = [torch.where(void, torch.randn_like(x) * 30, x) for x in (student, teacher)]
    other, other_slope = gradient(loss, *changed, valid, known)
    assert other == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(other_slope, slope)
    assert (slope * void == 0).all()
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_nothing_but_void_costs_nothing(case, loss):
    student, teacher, valid, known = case
    value, slope = gradient(loss, student, teacher, valid, torch.zeros_like(known))
    assert value == 0.0
    assert (slope == 0).all()


def test_samples_of_one_object_have_no_inter_object_relation(case):
    student, teacher, _, known = case
    value, slope = gradient(inter_object_relation_loss, *case)
    assert (slope[2] == 0).all()
    assert value == pytest.approx(float(inter_object_relation_loss(*(x[:2] for x in case))), abs=1e-12)
    for shown in (slice(2, 3), None):  # one object beside two that do not exist; one object channel
        chosen = (
            [x[2:3] for x in case] if shown else [student[2:3, :, [0, 2]], teacher[2:3, :, [0, 2]], None, known[2:]]
        )
        for factor in (1.0, 100.0, 0.0):
            value, slope = gradient(inter_object_relation_loss, chosen[0] * factor, *chosen[1:])
            assert value == 0.0
            assert (slope == 0).all()
        assert gradient(intra_object_relation_loss, *chosen)[1].abs().sum() > 0
        assert gradient(kl_divergence_loss, *chosen)[1].abs().sum() > 0


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_samples_without_any_object_cost_nothing(case, loss):
    student, teacher, valid, known = case
    for chosen in ((student, teacher, torch.zeros_like(valid)), (student[:, :, :1], teacher[:, :, :1], None)):
        value, slope = gradient(loss, *chosen, known)
        assert value == 0.0
        assert (slope == 0).all()


def test_an_object_absent_for_the_teacher_has_no_intra_object_relation(case):
    student, teacher, valid, known = (x[:1] for x in case)
    absent = teacher.clone()
    absent[:, 0, 2] = -30 + 0.1 * absent[:, 0, 2]  # exists, but hidden in this frame: probabilities of 1e-13 vary
    rows = [torch.tensor([[True, False, True]]), known[:, :1]]
    # The softmax still runs over the object, of which the student's probability is not 0.
    value, slope = gradient(intra_object_relation_loss, student[:, :1], absent[:, :1], valid, known[:, :1])
    (_, s, t), *_ = probabilities(student[:, :1], absent[:, :1], valid, known[:, :1], 1.0)
    expected = np.mean([1 - pearson([r[c] for r in s], [r[c] for r in t]) for c in (1, 3)])
    assert value == pytest.approx(expected, abs=1e-9)
    assert torch.isfinite(slope).all()
    assert value != pytest.approx(float(intra_object_relation_loss(student[:, :1], absent[:, :1], *rows)), abs=1e-4)


def test_one_known_pixel_has_no_intra_object_relation(case):
    student, teacher, valid, known = case
    known = torch.zeros_like(known)
    known[:, :, 1, 2] = True
    assert gradient(intra_object_relation_loss, student, teacher, valid, known)[0] == 0.0
    for loss in (inter_object_relation_loss, kl_divergence_loss):
        assert float(loss(student, teacher, valid, known)) == pytest.approx(
            ORACLES[loss](student, teacher, valid, known, 1.0), abs=1e-10
        )


@pytest.mark.parametrize("loss", RELATIONS)
def test_a_student_that_says_nothing_costs_1_and_learns(case, loss):
    _, teacher, valid, known = case
    value, slope = gradient(loss, torch.zeros_like(teacher), teacher, valid, known)
    assert value == pytest.approx(1.0, abs=1e-9)
    assert torch.isfinite(slope).all()
    assert slope.abs().sum() > 0
    stepped = -slope / slope.abs().max()
    assert float(loss(stepped, teacher, valid, known)) < 0.9


@pytest.mark.parametrize("loss", RELATIONS)
def test_a_teacher_that_says_nothing_costs_nothing(case, loss):
    student, teacher, valid, known = case
    value, slope = gradient(loss, student, torch.zeros_like(teacher), valid, known)
    assert value == 0.0
    assert (slope == 0).all()


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_logits_are_compared_in_float32(case, loss, dtype):
    student, teacher, valid, known = case
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = ORACLES[loss](student.double(), teacher.double(), valid, known, 2.0)
    value = loss(student, teacher, valid, known, 2.0)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(expected, rel=1e-4)
    _, slope = gradient(loss, student, teacher, valid, known, 2.0)
    assert slope.dtype == dtype
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("scales", list(itertools.product([1e-6, 1.0, 1e3], repeat=2)))
def test_gradients_stay_finite(case, loss, scales):
    student, teacher, valid, known = case
    value, slope = gradient(loss, student.float() * scales[0], teacher.float() * scales[1], valid, known)
    assert math.isfinite(value)
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_gradients_of_logits_equal_finite_differences(case, loss, temperature):
    student, teacher, valid, known = (x[:, :1, ..., :2] if x.ndim > 2 else x for x in case)
    student = student.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, valid, known, temperature), (student,))


def test_the_gradient_of_the_divergence_hardly_depends_on_high_temperatures(case):
    """What T² is for: the gradient tends to that of half the squared difference of centred logits."""
    student, teacher = (x[:1] * 0.1 for x in case[:2])
    slopes = [gradient(kl_divergence_loss, student, teacher, temperature=t)[1] for t in (50.0, 100.0)]
    torch.testing.assert_close(*slopes, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("loss", [*LOGIT_LOSSES, representation_loss])
def test_the_teacher_gets_no_gradient(case, loss):
    student, teacher = ((x[:1, 0, :, 0] if loss is representation_loss else x[:1]).clone() for x in case[:2])
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
def test_logits_that_do_not_fit_are_refused(case, loss):
    student, teacher, valid, known = case
    with pytest.raises(ValueError, match=r"got \(3, 2, 4, 3, 4\) and \(3, 2, 4, 3, 3\)"):
        loss(student, teacher[..., :3], valid, known)
    with pytest.raises(ValueError, match=r"`object_valid` must be .* = \(3, 3\), got \(3, 4\)"):
        loss(student, teacher, torch.ones(3, 4, dtype=torch.bool), known)
    with pytest.raises(ValueError, match=r"`known` must be .* = \(3, 2, 3, 4\).* got \(3, 2, 9, 13\)"):
        loss(student, teacher, valid, torch.ones(3, 2, 9, 13, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`temperature` must be above 0, got 0"):
        loss(student, teacher, valid, known, 0.0)


# ---- representations ------------------------------------------------------------------------------------------------


@pytest.fixture
def features(rng):
    """Student's and teacher's features in float64 of two samples of nine pixels, and labels with void."""
    labels = rng.integers(0, 3, (2, 9))
    labels[1, 3:5] = 255
    return *(torch.tensor(rng.normal(size=(2, 9, c)) + 0.5) for c in (5, 8)), torch.tensor(labels)


def test_representation_equals_its_definition(features):
    student, teacher, labels = features
    assert float(representation_loss(student, teacher)) == pytest.approx(
        numpy_representation(student, teacher), abs=1e-7
    )
    for omega in (0.0, 0.3, 0.9, 1.0):
        value = representation_loss(student, teacher, labels, omega)
        assert float(value) == pytest.approx(numpy_representation(student, teacher, labels, omega), abs=1e-7)


def test_a_representation_computed_by_hand():
    # Correlations of 0.6 (student) and 0 (teacher): log2(2 + 2 * 0.36) - log2(2).
    student, teacher = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]), torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    assert float(representation_loss(student, teacher)) == pytest.approx(math.log2(1.36), abs=1e-6)
    # The same label for both brings the target to 1 - ω, and at ω = 0 nothing is left to separate.
    together = representation_loss(student, teacher, torch.zeros(1, 2, dtype=torch.long), 0.5)
    assert float(together) == pytest.approx(math.log2(2.72) - math.log2(2 + 0.72 * 0.25), abs=1e-6)
    assert float(representation_loss(student, teacher, torch.zeros(1, 2, dtype=torch.long), 0.0)) == pytest.approx(
        0, abs=1e-6
    )


def test_representation_does_not_change_with_lengths_and_rotations(features, rng):
    student, teacher, labels = features
    value = float(representation_loss(student, teacher, labels))
    lengths = torch.tensor(rng.uniform(0.5, 2, (2, 9, 1)))
    rotation = torch.tensor(np.linalg.qr(rng.normal(size=(5, 5)))[0])
    for changed in (student * lengths, student * 100, student @ rotation):
        assert float(representation_loss(changed, teacher, labels)) == pytest.approx(value, abs=1e-6)
    assert float(representation_loss(student, teacher * lengths, labels)) == pytest.approx(value, abs=1e-6)
    assert float(representation_loss(student.flip(1), teacher, labels)) != pytest.approx(value, abs=1e-3)


def test_pixels_are_chosen_evenly_and_always_the_same(features):
    student, teacher, labels = features
    for most, chosen in ((3, [0, 3, 6]), (4, [0, 2, 4, 6]), (9, list(range(9))), (50, list(range(9)))):
        value = float(representation_loss(student, teacher, labels, max_pixels=most))
        subset = student[:, chosen], teacher[:, chosen], labels[:, chosen]
        assert value == pytest.approx(numpy_representation(*subset, 0.9), abs=1e-7)
        assert value == float(representation_loss(student, teacher, labels, max_pixels=most))


def test_void_pixels_have_no_representation(features):
    student, teacher, labels = features
    changed = torch.where((labels == 255).unsqueeze(2), torch.randn_like(student) * 10, student)
    value, slope = gradient(representation_loss, student, teacher, labels)
    assert float(representation_loss(changed, teacher, labels)) == pytest.approx(value, abs=1e-12)
    assert (slope[labels == 255] == 0).all()
    labels = labels.clone()
    labels[0] = 255
    assert float(representation_loss(student, teacher, labels)) == pytest.approx(
        numpy_representation(student, teacher, labels, 0.9), abs=1e-7
    )
    value, slope = gradient(representation_loss, student, teacher, torch.full_like(labels, 255))
    assert value == 0.0
    assert (slope == 0).all()


def test_degenerate_representations_are_finite(features):
    student, teacher, labels = (x.float() if x.is_floating_point() else x for x in features)
    value, slope = gradient(representation_loss, student[:, :1], teacher[:, :1])
    assert value == pytest.approx(0, abs=1e-6)
    assert slope.abs().max() < 1e-6
    value, slope = gradient(representation_loss, torch.zeros_like(student), teacher)
    assert value == 0.0
    assert (slope == 0).all()
    partly = student.clone()
    partly[:, 2:4] = 0
    for first, second in (
        (partly, teacher),
        (student, torch.zeros_like(teacher)),
        (torch.ones_like(student), teacher),
        (student, torch.ones_like(teacher)),
    ):
        value, slope = gradient(representation_loss, first, second, labels)
        assert math.isfinite(value)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_features_are_compared_in_float32(features, dtype):
    student, teacher, labels = features
    student, teacher = student.to(dtype), teacher.to(dtype)
    value = representation_loss(student, teacher, labels)
    assert value.dtype == torch.float32
    expected = numpy_representation(student.double(), teacher.double(), labels, 0.9)
    assert float(value) == pytest.approx(expected, rel=1e-4)
    _, slope = gradient(representation_loss, student, teacher, labels)
    assert slope.dtype == dtype
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("with_labels", [False, True])
def test_gradients_of_representation_equal_finite_differences(features, with_labels):
    student, teacher, labels = features
    student = student.clone().requires_grad_()
    chosen = labels if with_labels else None
    assert torch.autograd.gradcheck(lambda x: representation_loss(x, teacher, chosen), (student,))


def test_features_that_do_not_fit_are_refused(features):
    student, teacher, labels = features
    with pytest.raises(ValueError, match=r"got \(2, 9, 5\) and \(2, 8, 8\).*same token grid"):
        representation_loss(student, teacher[:, :8])
    with pytest.raises(ValueError, match=r"`labels` must be \(batch, pixels\) = \(2, 9\), got \(2, 8\)"):
        representation_loss(student, teacher, labels[:, :8])
    with pytest.raises(ValueError, match=r"`omega` must be a share in \[0, 1\], got 1.5"):
        representation_loss(student, teacher, labels, omega=1.5)
    with pytest.raises(ValueError, match=r"`max_pixels` must be at least 1, got 0"):
        representation_loss(student, teacher, max_pixels=0)
