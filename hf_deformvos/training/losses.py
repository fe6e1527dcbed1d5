"""Segmentation losses as pure functions, in float32 (float64 for inputs in float64)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..data.store import VOID
from ..modeling_deformvos import MASKED_LOGIT


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32: sums over a frame's pixels need it."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def upsample_logits(logits: torch.Tensor, size: tuple[int, int], object_valid: torch.Tensor | None) -> torch.Tensor:
    """
    Brings logits to the size of the labels and rules out objects that do not exist.

    Args:
        logits (`torch.Tensor` of shape `(batch, frames, num_objects + 1, height, width)`): Channel 0 is background.
        size (`tuple[int, int]`): Height and width of the labels.
        object_valid (`torch.Tensor` of shape `(batch, num_objects)`, *optional*): bool; false objects get -1e4.

    Returns:
        `torch.Tensor` of shape `(batch, frames, num_objects + 1, *size)`, at least float32.
    """
    batch, frames = logits.shape[:2]
    flat = _full_precision(logits).flatten(0, 1)
    large = F.interpolate(flat, size=size, mode="bilinear", align_corners=True)
    large = large.unflatten(0, (batch, frames))
    if object_valid is not None and not bool(object_valid.all()):
        absent = F.pad(~object_valid, (1, 0), value=False)
        large = large.masked_fill(absent[:, None, :, None, None], MASKED_LOGIT)
    return large


def bootstrapped_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, keep: float = 1.0) -> torch.Tensor:
    """
    Mean cross-entropy of the hardest pixels of every frame.

    Args:
        logits (`torch.Tensor` of shape `(batch, frames, num_objects + 1, height, width)`): At the labels' size.
        labels (`torch.Tensor` of shape `(batch, frames, height, width)`): int64 ids, 255 = ignored.
        keep (`float`): Share of a frame's labelled pixels that counts, in (0, 1]; rounded up to whole pixels.

    Returns:
        `torch.Tensor` of shape `()`: mean over the frames that have labelled pixels; 0 if there are none.

    Raises:
        ValueError: If `keep` is out of range.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"`keep` must be a share in (0, 1], got {keep}.")
    flat = _full_precision(logits).flatten(0, 1)
    losses = F.cross_entropy(flat, labels.flatten(0, 1), ignore_index=VOID, reduction="none")
    losses = losses.flatten(1)
    counts = (labels.flatten(0, 1).flatten(1) != VOID).sum(1)
    wanted = torch.ceil(counts * keep - 1e-6).clamp_min(1)
    if keep < 1.0:
        # Ignored pixels have loss 0 and sort last, so each row's share is a prefix of its sorted losses.
        most = min(losses.shape[1], max(1, math.ceil(losses.shape[1] * keep)))
        losses = losses.topk(most, dim=1, sorted=True).values
        losses = losses * (torch.arange(most, device=losses.device) < wanted.unsqueeze(1))
    per_frame = losses.sum(1) / wanted
    return per_frame.sum() / (counts > 0).sum().clamp_min(1)


def soft_jaccard_loss(
    logits: torch.Tensor, labels: torch.Tensor, object_valid: torch.Tensor | None = None, epsilon: float = 1.0
) -> torch.Tensor:
    """
    One minus the soft Jaccard index, averaged over the objects that a frame shows.

    Objects that are valid but absent from a frame (hidden, or out of it) have no Jaccard index there and are left to
    the cross-entropy.

    Args:
        logits (`torch.Tensor` of shape `(batch, frames, num_objects + 1, height, width)`): At the labels' size.
        labels (`torch.Tensor` of shape `(batch, frames, height, width)`): int64 ids, 255 = ignored.
        object_valid (`torch.Tensor` of shape `(batch, num_objects)`, *optional*): bool; others do not count.
        epsilon (`float`): Pixels added to intersection and union.

    Returns:
        `torch.Tensor` of shape `()`; 0 if no object shows.
    """
    known = labels != VOID
    probabilities = _full_precision(logits).softmax(2)
    losses, weights = [], []
    for number in range(1, logits.shape[2]):
        target = labels == number
        predicted = probabilities[:, :, number] * known
        shared = (predicted * target).sum((2, 3))
        area = target.sum((2, 3))
        losses.append(1 - (shared + epsilon) / (predicted.sum((2, 3)) + area - shared + epsilon))
        shown = area > 0
        weights.append(shown if object_valid is None else shown & object_valid[:, number - 1 : number])
    if not losses:
        return logits.sum() * 0
    weight = torch.stack(weights).float()
    return (torch.stack(losses) * weight).sum() / weight.sum().clamp_min(1)


def bootstrap_share(progress: float, warm_up: float, final: float) -> float:
    """
    Share of pixels that the cross-entropy keeps: 1 at the start, falling linearly to `final`.

    Args:
        progress (`float`): Share of the training that is done.
        warm_up (`float`): Progress at which `final` is reached.
        final (`float`): Share from then on.
    """
    return final if progress >= warm_up else 1.0 - (1.0 - final) * progress / warm_up
