"""Training clips made of single frames with masks: moved, bent, and taken apart into objects and background."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..data.clips import ClipSampler, ClipSpec
from ..data.store import ArrayStore
from ..data.transforms import AugmentConfig, ClipBatch, augment_clips, recompose


# Soft edges and shadows around an object are filled as well, this many pixels wide.
_RIM = 7
# More change from frame to frame than in training: what is learned must be how the object is followed, and not what it
# looks like in this one picture.
_CHANGE = {"motion": 1.7, "elastic": 1.5, "color": 1.2}
_OBJECTS = AugmentConfig(paste=0.0, distractor=0.2, occluder=0.15, **_CHANGE)
_BACKDROPS = AugmentConfig(paste=0.0, distractor=0.0, occluder=0.0, **_CHANGE)


def fill_objects(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """
    Replaces what a mask covers by a smooth continuation of its surroundings, coarse to fine (push-pull, Gortler et
    al., The Lumigraph, SIGGRAPH 1996, section 3.5).

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8.
        mask (`np.ndarray` of shape `(height, width)`): Above 0 where the image is to be replaced; a rim of a few
            pixels around it is replaced, too.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, uint8; grey where the mask leaves nothing.
    """
    hole = torch.from_numpy((mask > 0).astype(np.float32))[None, None]
    known = 1 - F.max_pool2d(hole, 2 * _RIM + 1, stride=1, padding=_RIM)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    levels = [(pixels * known, known)]
    while max(levels[-1][1].shape[-2:]) > 1:
        levels.append(tuple(F.avg_pool2d(part, 2, ceil_mode=True) for part in levels[-1]))
    filled = torch.full_like(levels[-1][0], 127.5)
    for colors, weight in reversed(levels):
        coarse = F.interpolate(filled, size=weight.shape[-2:], mode="bilinear")
        filled = torch.where(weight > 0, colors / weight.clamp_min(1e-6), coarse)
    return filled[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


class GivenFrames:
    """
    Draws batches of training clips from frames with masks.

    Some clips are a frame warped as a whole; in the others its objects go their own ways in front of the frame without
    them (Khoreva et al., Lucid data dreaming for video object segmentation, arXiv 1703.09554).

    Args:
        images (`list[np.ndarray]`): uint8 of shape `(height, width, 3)`.
        masks (`list[np.ndarray]`): uint8 ids of the same heights and widths; 0 is background.
        spec ([`ClipSpec`]): Size, frames and clips of a batch.
        recomposed (`float`): Share of the clips whose objects go their own ways.
        leave (`float`): Probability that such an object leaves the picture.
        seed (`int`): Decides which windows of the frames are shown; the rest is up to the generator of each call.
    """

    def __init__(
        self,
        images: list[np.ndarray],
        masks: list[np.ndarray],
        spec: ClipSpec,
        recomposed: float,
        leave: float,
        seed: int = 0,
    ):
        self.spec, self.recomposed, self.leave = spec, recomposed, leave
        empty = [fill_objects(image, mask) for image, mask in zip(images, masks, strict=True)]
        self._objects = ClipSampler([], [ArrayStore(images, masks)], seed)
        # Another seed: another window and another motion. The masks tell where it would be looked at.
        self._backdrops = ClipSampler([], [ArrayStore(empty, masks)], seed + 1)

    def __call__(self, index: int, generator: torch.Generator, device: torch.device | str = "cpu") -> ClipBatch:
        """
        Batch number `index`.

        Args:
            index (`int`): Number of the batch.
            generator (`torch.Generator`): A CPU generator: motions, colours and paths.
            device (`torch.device` or `str`): Where the work is done and the result lies.
        """
        clips = augment_clips(self._objects(index, self.spec), _OBJECTS, generator, device)
        backdrops = augment_clips(self._backdrops(index, self.spec), _BACKDROPS, generator, device)
        return recompose(clips, backdrops, self.recomposed, self.leave, generator)
