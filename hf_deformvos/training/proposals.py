"""Objects that nobody pointed at: proposed by cutting a frame's own features in two (TokenCut, MaskCut)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


STRIDE = 16
MAX_TOKENS = 800
"""Tokens above which the eigenvectors of a graph take seconds rather than a fraction of one."""
# Cosine above which tokens are joined. TokenCut's 0.2 is for a self-supervised ViT's keys; tokens that were trained to
# tell objects from each other lie closer together, and 0.5 gave the best masks of 0.0, 0.1 ... 0.7 on videos.
AFFINITY_THRESHOLD = 0.5
MIN_AREA, MAX_AREA = 0.005, 0.6
# Cuts of frames that show no object at all reach 0.2, those of objects 0.23 to 0.65.
_MIN_CONFIDENCE = 0.22
# Weight of an edge between tokens that are not alike: keeps the graph connected (TokenCut, eq. 3).
_WEAK_EDGE = 1e-5


@dataclass(frozen=True)
class Proposal:
    """
    One proposed object.

    Attributes:
        mask (`np.ndarray` of shape `(height, width)`): bool, at the size that was asked for.
        confidence (`float`): How much more alike tokens within the object and within the rest are than those across,
            as a difference of mean cosines: 0 is no boundary at all, 2 the sharpest.
        area (`float`): Share of the frame that the mask covers.
    """

    mask: np.ndarray
    confidence: float
    area: float


def token_affinity(features: torch.Tensor, threshold: float) -> torch.Tensor:
    """
    Graph of the tokens of one frame (Wang et al., TokenCut, CVPR 2022, eq. 3): an edge of weight 1 joins tokens whose
    cosine is above the threshold, a very weak one all others.

    Args:
        features (`torch.Tensor` of shape `(n, channels)`): One row a token.
        threshold (`float`): Of the cosine.

    Returns:
        `torch.Tensor` of shape `(n, n)`, float64.
    """
    rows = F.normalize(features.double(), dim=1)
    cosines = rows @ rows.T
    return torch.full_like(cosines, _WEAK_EDGE).masked_fill(cosines > threshold, 1.0)


def normalised_cut(affinity: torch.Tensor) -> torch.Tensor:
    """
    Relaxed solution of the normalised cut (Shi and Malik, PAMI 2000): the eigenvector of the second smallest
    eigenvalue of (D - W) y = λ D y, by way of the symmetric matrix I - D^-1/2 W D^-1/2.

    Args:
        affinity (`torch.Tensor` of shape `(n, n)`): W, symmetric, with positive row sums.

    Returns:
        `torch.Tensor` of shape `(n,)`: y, of unit length and unknown sign.
    """
    scale = affinity.sum(1).rsqrt()
    laplacian = torch.eye(len(affinity), dtype=affinity.dtype) - scale[:, None] * affinity * scale
    _, vectors = torch.linalg.eigh(laplacian)
    return F.normalize(vectors[:, 1] * scale, dim=0)


def connected_component(mask: np.ndarray, seed: tuple[int, int]) -> np.ndarray:
    """
    The 4-connected part of a mask that holds a seed.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool.
        seed (`tuple[int, int]`): Row and column; where the mask is false there, the part is empty.

    Returns:
        `np.ndarray` of shape `(height, width)`: bool.
    """
    reached = np.zeros_like(mask)
    reached[seed] = mask[seed]
    # Whole horizontal and vertical runs are reached in turn, not pixels: few rounds, each one vectorised.
    breaks = [np.cumsum(~mask).reshape(mask.shape), np.cumsum(~mask.T).reshape(mask.shape[::-1]).T]
    axes = [np.arange(mask.shape[0])[:, None], np.arange(mask.shape[1])[None]]
    runs = [label + position * mask.size for label, position in zip(breaks, axes, strict=True)]
    runs = [np.unique(label, return_inverse=True)[1].reshape(mask.shape) for label in runs]
    while True:
        before = reached.sum()
        for label in runs:
            reached = np.bincount(label[reached], minlength=label.max() + 1).astype(bool)[label] & mask
        if reached.sum() == before:
            return reached


def choose_foreground(cut: torch.Tensor) -> torch.Tensor:
    """
    Turns a cut so that its greater side is the object: TokenCut's rule, the side of the entry of greatest magnitude,
    unless that side holds three corners of the frame or more (MaskCut of Wang et al., CutLER, CVPR 2023).

    Args:
        cut (`torch.Tensor` of shape `(h, w)`): An eigenvector on the token grid; NaN where tokens do not take part.

    Returns:
        `torch.Tensor` of shape `(h, w)`: The cut or its negative.
    """
    seed = cut.abs().nan_to_num(-1.0).argmax()
    if cut.flatten()[seed] < cut.nanmean():
        cut = -cut
    corners = (cut > cut.nanmean())[[0, 0, -1, -1], [0, -1, 0, -1]]
    return -cut if corners.sum() >= 3 else cut


def cut_to_mask(cut: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """
    The connected part of a cut's greater side around its greatest entry, as a smooth mask: the cut itself is
    interpolated, and its threshold lies midway between the means of its two sides. (TokenCut's, the mean of all, lies
    near the larger side, where interpolation makes the mask half a token too wide.)

    Args:
        cut (`torch.Tensor` of shape `(h, w)`): Greater on the object; NaN where tokens do not take part.
        size (`tuple[int, int]`): Height and width of the frame. Tokens lie on the corners of a picture of
            16(h-1)+1 by 16(w-1)+1 pixels, which is resized to it.

    Returns:
        `np.ndarray` of shape `(height, width)`: bool.
    """
    above = cut > cut.nanmean()
    high, low = cut[above].mean(), cut[~above & ~cut.isnan()].mean()
    seed = divmod(int(cut.nan_to_num(-torch.inf).argmax()), cut.shape[1])
    network = tuple(STRIDE * (side - 1) + 1 for side in cut.shape)
    filled = torch.where(cut.isnan(), low, cut)[None, None]
    fine = F.interpolate(filled, size=network, mode="bilinear", align_corners=True)
    fine = F.interpolate(fine, size=size, mode="bilinear", align_corners=False)[0, 0]
    at = [
        min(full - 1, int((STRIDE * i + 0.5) * full / side)) for i, full, side in zip(seed, size, network, strict=True)
    ]
    return connected_component((fine > (high + low) / 2).numpy(), tuple(at))


def propose_masks(
    tokens: torch.Tensor,
    size: tuple[int, int],
    max_proposals: int = 1,
    threshold: float = AFFINITY_THRESHOLD,
) -> list[Proposal]:
    """
    Objects of one frame, by normalised cuts of its tokens; what was found is taken out of the graph, and the rest is
    cut again (MaskCut). Cuts that cover less than `MIN_AREA` of the frame are passed over, one above `MAX_AREA` is
    taken for background and ends the search.

    Args:
        tokens (`torch.Tensor` of shape `(channels, h, w)`): Features at stride 16.
        size (`tuple[int, int]`): Height and width of the masks.
        max_proposals (`int`): Most objects to return.
        threshold (`float`): See [`token_affinity`].

    Returns:
        `list[Proposal]`, in the order of the cuts, disjoint; empty where nothing plausible is found.
    """
    grid = tokens.shape[-2:]
    rows = F.normalize(tokens.flatten(1).T.double().cpu(), dim=1)
    affinity = token_affinity(rows, threshold)
    free = torch.ones(len(rows), dtype=torch.bool)
    taken = np.zeros(size, dtype=bool)
    found: list[Proposal] = []
    # A speck uses up an attempt: a frame full of them is no place to look.
    for _ in range(max_proposals + 2):
        if len(found) == max_proposals or free.sum() < 4:
            break
        cut = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        cut[free] = normalised_cut(affinity[free][:, free])
        mask = cut_to_mask(choose_foreground(cut.reshape(grid)), size) & ~taken
        inside = _covered_tokens(mask, grid) & free
        if mask.mean() > MAX_AREA or not inside.any():
            break
        proposal = Proposal(mask, _contrast(rows, inside), float(mask.mean()))
        if proposal.area >= MIN_AREA and proposal.confidence >= _MIN_CONFIDENCE:
            found.append(proposal)
        # Tokens on the border see both sides, and would be cut out next.
        around = F.max_pool2d(inside.reshape(1, *grid).float(), 3, 1, 1).flatten() > 0
        free &= ~around
        taken |= mask
    return found


def _covered_tokens(mask: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens, `(h * w,)` bool, whose own pixel a mask covers."""
    network = [STRIDE * (side - 1) + 1 for side in grid]
    rows, columns = (
        np.minimum(full - 1, ((STRIDE * np.arange(tokens) + 0.5) * full / side).astype(int))
        for tokens, full, side in zip(grid, mask.shape, network, strict=True)
    )
    return torch.from_numpy(mask[np.ix_(rows, columns)].ravel())


def _contrast(rows: torch.Tensor, inside: torch.Tensor) -> float:
    """Mean cosine within both sides, less that across; `rows` `(n, channels)` are of unit length."""
    # The mean of all pairs' products is the product of the means.
    object_mean, rest_mean = rows[inside].mean(0), rows[~inside].mean(0)
    within = (object_mean @ object_mean + rest_mean @ rest_mean) / 2
    return float(within - object_mean @ rest_mean)


__all__ = [
    "AFFINITY_THRESHOLD",
    "MAX_TOKENS",
    "Proposal",
    "choose_foreground",
    "connected_component",
    "cut_to_mask",
    "normalised_cut",
    "propose_masks",
    "token_affinity",
]
