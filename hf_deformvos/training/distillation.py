"""
Distillation losses as pure functions: what a student learns from a teacher's attention maps, logits and features.

All compute in float32 (float64 for inputs in float64) whatever comes in, also under autocast; gradients reach the
student only, and are finite in every degenerate case.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..data.store import VOID


# Finite, so that the probability 0 of an object that does not exist times the logarithm of it is 0 and not NaN.
_DROPPED = -1e30
# Fewest queries for which the unbiased estimator exists: its weights hold n (n - 3).
_UNBIASED_QUERIES = 4


def _common_precision(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider of their dtypes, at least float32: sums over thousands of products need it."""
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    return first.to(dtype), second.to(dtype)


# ---- attention maps -------------------------------------------------------------------------------------------------


def _center_maps(maps: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps with columns of mean 0, those that vary scaled to norm 1, and which do."""
    centered = maps - maps.mean(1, keepdim=True)
    power = centered.detach().square().sum((1, 2))
    varies = power > epsilon * maps.detach().square().sum((1, 2))
    # Unscaled, sums of fourth powers overflow or vanish. Alignment does not depend on scale: no gradient through it.
    scale = torch.where(varies, power, 1.0).rsqrt()
    return centered * scale[:, None, None], varies


def _kernel_inner_product(
    first: torch.Tensor, first_gram: torch.Tensor | None, second: torch.Tensor, second_gram: torch.Tensor | None
) -> torch.Tensor:
    """tr(K L) of K = first firstᵀ and L = second secondᵀ, `(batch,)`; a Gram matrix is used where there is one."""
    if first_gram is not None and second_gram is not None:
        return (first_gram * second_gram).sum((1, 2))
    if first_gram is not None:
        return (second * (first_gram @ second)).sum((1, 2))
    if second_gram is not None:
        return (first * (second_gram @ first)).sum((1, 2))
    return (first.mT @ second).square().sum((1, 2))


def _off_diagonal_correction(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """What n (n - 3) HSIC₁ adds to tr(K L); for centred maps a row of K without its diagonal sums to -K_ii."""
    queries = first.shape[1]
    first_diagonal, second_diagonal = first.square().sum(2), second.square().sum(2)
    traces = first_diagonal.sum(1) * second_diagonal.sum(1)
    shared = (first_diagonal * second_diagonal).sum(1)
    return traces / ((queries - 1) * (queries - 2)) - shared * queries / (queries - 2)


def centered_kernel_alignment(
    first: torch.Tensor, second: torch.Tensor, unbiased: bool = False, epsilon: float = 1e-8
) -> torch.Tensor:
    """
    Centered kernel alignment (CKA) with a linear kernel of two maps that share their queries.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = A Aᵀ and L = B Bᵀ. It does not change when the columns of a
    map are permuted, rotated or scaled together: it compares which queries attend alike, not where they attend.

    The biased estimator is tr(H K H L) with H = I - 1/n (Kornblith et al., 2019), in [0, 1]; with few queries it is
    above 0 for maps that have nothing in common. The unbiased one is HSIC₁ of Song et al. (2012), as Nguyen et al.
    (2021) use it in minibatches, with the diagonals of K and L left out; in [-1, 1].

    No matrix is larger than the maps: each enters as its n x n Gram matrix where it has at least n keys, as its
    columns where it has fewer.

    Args:
        first (`torch.Tensor` of shape `(batch, queries, keys)`): E.g. attention weights.
        second (`torch.Tensor` of shape `(batch, queries, other_keys)`): Compared query by query.
        unbiased (`bool`): Which estimator.
        epsilon (`float`): A map of which the columns' variation has at most this share of its squared norm is
            constant. In float32, rounding alone makes about 1e-14.

    Returns:
        `torch.Tensor` of shape `(batch,)`, at least float32. It is 0, with gradients of 0, where a map is constant
        over the queries (always so with one query); and with the unbiased estimator also where there are fewer than
        4 queries or a kernel has nothing beside its diagonal, as when each query attends to its own key only.

    Raises:
        ValueError: If the maps are not 3-dimensional or differ in batch or queries.
    """
    if first.ndim != 3 or second.ndim != 3 or first.shape[:2] != second.shape[:2]:
        raise ValueError(
            "Maps to align must be (batch, queries, keys) with the same batch and queries, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}: teacher and student must have the same token grid."
        )
    first, second = _common_precision(first, second)
    if unbiased and first.shape[1] < _UNBIASED_QUERIES:
        return (first.sum((1, 2)) + second.sum((1, 2))) * 0
    with torch.autocast(first.device.type, enabled=False):
        first, first_varies = _center_maps(first, epsilon)
        second, second_varies = _center_maps(second, epsilon)
        first_gram = first @ first.mT if first.shape[2] >= first.shape[1] else None
        second_gram = second @ second.mT if second.shape[2] >= second.shape[1] else None
        shared = _kernel_inner_product(first, first_gram, second, second_gram)
        own_first = _kernel_inner_product(first, first_gram, first, first_gram)
        own_second = _kernel_inner_product(second, second_gram, second, second_gram)
    if unbiased:
        # What the correction leaves of a diagonal kernel is rounding, whose share is that of the dtype.
        floor = max(epsilon, 100 * torch.finfo(first.dtype).eps)
        first_floor, second_floor = floor * own_first.detach(), floor * own_second.detach()
        shared = shared + _off_diagonal_correction(first, second)
        own_first = own_first + _off_diagonal_correction(first, first)
        own_second = own_second + _off_diagonal_correction(second, second)
        first_varies = first_varies & (own_first > first_floor)
        second_varies = second_varies & (own_second > second_floor)
    defined = first_varies & second_varies
    norm = torch.where(defined, own_first, 1.0).sqrt() * torch.where(defined, own_second, 1.0).sqrt()
    return torch.where(defined, shared, 0.0) / norm


def attention_alignment_loss(student: torch.Tensor, teacher: torch.Tensor, unbiased: bool = False) -> torch.Tensor:
    """
    One minus the centered kernel alignment of two attention maps, averaged over the batch.

    Args:
        student (`torch.Tensor` of shape `(batch, queries, keys)`): Attention weights.
        teacher (`torch.Tensor` of shape `(batch, queries, teacher_keys)`): Without gradient; it may have other keys.
        unbiased (`bool`): Which estimator, see [`centered_kernel_alignment`].

    Returns:
        `torch.Tensor` of shape `()`, in [0, 1] (unbiased: [0, 2]). A pair with a constant map counts 1 and has
        gradients of 0.

    Raises:
        ValueError: If batch or queries differ.
    """
    return (1 - centered_kernel_alignment(student, teacher.detach(), unbiased)).mean()


# ---- logits ---------------------------------------------------------------------------------------------------------


def _check_logits(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    object_valid: torch.Tensor | None,
    known: torch.Tensor | None,
    temperature: float,
) -> None:
    """Refuses what cannot be compared."""
    if student_logits.ndim != 5 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "Logits must be (batch, frames, 1 + num_objects, height, width), the same for student and teacher, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    batch, frames, channels, height, width = student_logits.shape
    if object_valid is not None and object_valid.shape != (batch, channels - 1):
        raise ValueError(
            f"`object_valid` must be (batch, num_objects) = {(batch, channels - 1)}, got {tuple(object_valid.shape)}."
        )
    if known is not None and known.shape != (batch, frames, height, width):
        raise ValueError(
            f"`known` must be (batch, frames, height, width) = {(batch, frames, height, width)}, as the logits are, "
            f"got {tuple(known.shape)}."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")


def _prepare_logits(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    object_valid: torch.Tensor | None,
    known: torch.Tensor | None,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Student's and teacher's logits over the temperature, pixels flattened, `(batch, frames, channels, pixels)`, objects
    that do not exist dropped; the existing channels `(batch, channels)`; the known pixels `(batch, frames, pixels)`.
    """
    _check_logits(student_logits, teacher_logits, object_valid, known, temperature)
    student, teacher = _common_precision(student_logits, teacher_logits.detach())
    exists = torch.ones(student.shape[0], student.shape[2], dtype=torch.bool, device=student.device)
    if object_valid is not None:
        exists[:, 1:] = object_valid
    if known is None:
        known = torch.ones_like(student[:, :, 0], dtype=torch.bool)
    dropped = ~exists[:, None, :, None]
    student, teacher = ((x.flatten(3) / temperature).masked_fill(dropped, _DROPPED) for x in (student, teacher))
    return student, teacher, exists, known.flatten(2).bool()


def _pearson(
    student: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor, dim: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pearson's correlation along `dim` of the entries that count, and where the teacher varies.

    `epsilon` is added to both variances: where the student is constant, the correlation is 0 and its gradient points
    to the teacher.
    """
    total = counts.sum(dim, keepdim=True).clamp_min(1)

    def center(values: torch.Tensor) -> torch.Tensor:
        mean = (values * counts).sum(dim, keepdim=True) / total
        return (values - mean) * counts

    student, teacher = center(student), center(teacher)
    total = total.squeeze(dim)
    student_variance, teacher_variance = (x.square().sum(dim) / total for x in (student, teacher))
    covariance = (student * teacher).sum(dim) / total
    correlation = covariance / ((student_variance + epsilon).sqrt() * (teacher_variance + epsilon).sqrt())
    return correlation, teacher_variance > epsilon


def _mean_where(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean of the values that count; 0 if none does."""
    return (values * counts).sum() / counts.sum().clamp_min(1)


def intra_object_relation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    object_valid: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    temperature: float = 1.0,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """
    One minus the correlation of student's and teacher's probability of an object over a frame's pixels.

    After the intra-class relation of DIST (Huang et al., NeurIPS 2022), the samples being the known pixels of one
    frame and the classes its objects. The softmax runs over background and existing objects. The background has no
    column of its own: it is one minus the others. Unlike DIST's code, the loss is not multiplied by the squared
    temperature.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, frames, 1 + num_objects, height, width)`): Background first.
        teacher_logits (`torch.Tensor` of the same shape): Without gradient.
        object_valid (`torch.Tensor` of shape `(batch, num_objects)`, *optional*): bool; false objects are dropped
            before the softmax, whatever their logits hold. All exist by default.
        known (`torch.Tensor` of shape `(batch, frames, height, width)`, *optional*): bool; false pixels (void) do not
            count. All do by default.
        temperature (`float`): Divides both logits.
        epsilon (`float`): Added to the variances of probabilities.

    Returns:
        `torch.Tensor` of shape `()`: mean over frames and existing objects, in [0, 2]. Objects of which the teacher's
        probability hardly varies over a frame (variance at most `epsilon`: absent for the teacher, or fewer than two
        known pixels) do not count; 0 with gradients of 0 if none does. A student constant over the frame costs 1.

    Raises:
        ValueError: If shapes do not fit or the temperature is not above 0.
    """
    student, teacher, exists, known = _prepare_logits(student_logits, teacher_logits, object_valid, known, temperature)
    columns = [x.softmax(2)[:, :, 1:] for x in (student, teacher)]
    correlation, varies = _pearson(*columns, known.unsqueeze(2), 3, epsilon)
    return _mean_where(1 - correlation, varies & exists[:, None, 1:])


def inter_object_relation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    object_valid: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    temperature: float = 1.0,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """
    One minus the correlation of student's and teacher's probabilities of a pixel over background and objects.

    After the inter-class relation of DIST (Huang et al., NeurIPS 2022), the samples being pixels. With one object a
    pixel has two probabilities, of which the correlation is 1 or -1 whatever their size: nothing to learn from, so
    samples of fewer than two existing objects are left out. Unlike DIST's code, the loss is not multiplied by the
    squared temperature.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, frames, 1 + num_objects, height, width)`): Background first.
        teacher_logits (`torch.Tensor` of the same shape): Without gradient.
        object_valid (`torch.Tensor` of shape `(batch, num_objects)`, *optional*): bool; false objects are dropped
            before the softmax, whatever their logits hold, and from the correlation. All exist by default.
        known (`torch.Tensor` of shape `(batch, frames, height, width)`, *optional*): bool; false pixels (void) do not
            count. All do by default.
        temperature (`float`): Divides both logits.
        epsilon (`float`): Added to the variances of probabilities.

    Returns:
        `torch.Tensor` of shape `()`: mean over the known pixels of samples with at least two objects, in [0, 2].
        Pixels at which the teacher does not decide (variance at most `epsilon`) do not count; 0 with gradients of 0 if
        no pixel does. A student that does not decide costs 1.

    Raises:
        ValueError: If shapes do not fit or the temperature is not above 0.
    """
    student, teacher, exists, known = _prepare_logits(student_logits, teacher_logits, object_valid, known, temperature)
    channels = exists[:, None, :, None]
    correlation, varies = _pearson(student.softmax(2), teacher.softmax(2), channels, 2, epsilon)
    several = exists[:, 1:].sum(1) >= 2
    return _mean_where(1 - correlation, varies & known & several[:, None, None])


def kl_divergence_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    object_valid: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    T² KL(teacher || student) of the pixels' probabilities at temperature T (Hinton et al., 2015), in nats.

    Args:
        student_logits (`torch.Tensor` of shape `(batch, frames, 1 + num_objects, height, width)`): Background first.
        teacher_logits (`torch.Tensor` of the same shape): Without gradient.
        object_valid (`torch.Tensor` of shape `(batch, num_objects)`, *optional*): bool; false objects are dropped
            before the softmax, whatever their logits hold. All exist by default.
        known (`torch.Tensor` of shape `(batch, frames, height, width)`, *optional*): bool; false pixels (void) do not
            count. All do by default.
        temperature (`float`): Divides both logits.

    Returns:
        `torch.Tensor` of shape `()`: mean over all known pixels of the batch; 0 with gradients of 0 if there are none
        or no object exists.

    Raises:
        ValueError: If shapes do not fit or the temperature is not above 0.
    """
    student, teacher, _, known = _prepare_logits(student_logits, teacher_logits, object_valid, known, temperature)
    student, teacher = student.log_softmax(2), teacher.log_softmax(2)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(2)
    return temperature**2 * _mean_where(divergence, known)


# ---- features -------------------------------------------------------------------------------------------------------


def _unit_length(features: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Features scaled to length 1; those of length 0 stay 0."""
    return features * (features.square().sum(2, keepdim=True) + epsilon).rsqrt()


def _check_features(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    labels: torch.Tensor | None,
    omega: float,
    max_pixels: int,
) -> None:
    """Refuses what cannot be compared."""
    shapes = student_features.shape[:2], teacher_features.shape[:2]
    if student_features.ndim != 3 or teacher_features.ndim != 3 or shapes[0] != shapes[1]:
        raise ValueError(
            "Features must be (batch, pixels, channels) with the same batch and pixels, got "
            f"{tuple(student_features.shape)} and {tuple(teacher_features.shape)}: teacher and student must have the "
            "same token grid."
        )
    if labels is not None and labels.shape != shapes[0]:
        raise ValueError(f"`labels` must be (batch, pixels) = {tuple(shapes[0])}, got {tuple(labels.shape)}.")
    if not 0.0 <= omega <= 1.0:
        raise ValueError(f"`omega` must be a share in [0, 1], got {omega}.")
    if max_pixels < 1:
        raise ValueError(f"`max_pixels` must be at least 1, got {max_pixels}.")


def representation_loss(
    student_features: torch.Tensor,
    teacher_features: torch.Tensor,
    labels: torch.Tensor | None = None,
    omega: float = 0.9,
    max_pixels: int = 1024,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """
    The representation loss of MobileVOS (Miles et al., CVPR 2023, arXiv 2303.07815), a baseline.

        L = log2 Σ C_ss² - log2 Σ (C_ss ⊙ C)²,    C = C_tt, or ω C_tt + (1 - ω) C_yy where there are labels

    over pairs of pixels, with C_ss = Z_s Z_sᵀ and C_tt = Z_t Z_tᵀ of features of unit length, and C_yy 1 for pairs of
    the same label. It is H₂(S, T) - H₂(S) with Rényi's matrix entropy of order 2, hence, up to the teacher's own
    entropy, minus the mutual information of student and teacher; ω = 1 is distillation, ω = 0 supervised contrastive
    learning.

    The paper's full text was not available to us. The formula is that of a public reimplementation, which calls itself
    unofficial (github.com/edwardguil/mobilevos, `mobilevos/losses.py`); unit length, and the derivation from mutual
    information, are those of the authors' earlier work (Information Theoretic Representation Distillation, BMVC 2022).
    Ours differs from that code as follows. It is not divided by the number of pixels: a weighted mean of C² in a
    logarithm does not grow with them. It takes pixels at even spacing, not around the objects' boundaries. Each sample
    is compared by itself.

    The least value, 0, is reached where distinct pixels are orthogonal or agree for the teacher, not where the
    student's correlations equal the teacher's: the loss separates what the teacher separates.

    Args:
        student_features (`torch.Tensor` of shape `(batch, pixels, channels)`): E.g. at stride 16.
        teacher_features (`torch.Tensor` of shape `(batch, pixels, teacher_channels)`): Without gradient.
        labels (`torch.Tensor` of shape `(batch, pixels)`, *optional*): int64 ids; pixels of 255 do not count.
        omega (`float`): The teacher's share beside the labels, in [0, 1]; without labels it has no effect.
        max_pixels (`int`): Of more pixels than these, as many are taken, evenly spaced and always the same.
        epsilon (`float`): Added to squared lengths and to the sums.

    Returns:
        `torch.Tensor` of shape `()`: mean over the samples that have known pixels, at least 0 but for rounding; 0 with
        gradients of 0 if there are none, or one pixel, or where all of the student's features are 0.

    Raises:
        ValueError: If shapes do not fit, or `omega` or `max_pixels` are out of range.
    """
    _check_features(student_features, teacher_features, labels, omega, max_pixels)
    student, teacher = _common_precision(student_features, teacher_features.detach())
    pixels = student.shape[1]
    if pixels > max_pixels:
        chosen = torch.arange(max_pixels, device=student.device) * pixels // max_pixels
        student, teacher = student[:, chosen], teacher[:, chosen]
        labels = None if labels is None else labels[:, chosen]
    student, teacher = _unit_length(student, epsilon), _unit_length(teacher, epsilon)
    with torch.autocast(student.device.type, enabled=False):
        own, target = student @ student.mT, teacher @ teacher.mT
    has_pixels = torch.ones(len(own), dtype=torch.bool, device=own.device)
    if labels is not None:
        target = omega * target + (1 - omega) * (labels[:, :, None] == labels[:, None, :])
        known = labels != VOID
        own = own * (known[:, :, None] & known[:, None, :])
        has_pixels = known.any(1)
    alone, together = own.square().sum((1, 2)), (own * target).square().sum((1, 2))
    return _mean_where(torch.log2(alone + epsilon) - torch.log2(together + epsilon), has_pixels)
