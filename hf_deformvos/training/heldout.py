"""A quick score on held-out sequences during training; the full protocol lives in the evaluation package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data.store import VOID, FrameStore
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ..video.overlay import draw_overlay


# Frames of a strip, spread over the piece.
_STRIP_FRAMES = 6


class HeldOutEvaluation:
    """
    Mean J over short pieces of sequences, each from its first mask, on the model's own masks.

    After a call, `strips` holds a picture of every sequence, `(2 * height, frames * width, 3)` uint8: above, what the
    model predicts; below, what it is scored against.

    Args:
        stores (sequence of [`FrameStore`]): The sequences.
        size (`tuple[int, int]`): Height and width that frames are resized to, of the form 16k+1.
        frames (`int`): Frames of a piece, the given one included.
        stride (`int`): Distance of a piece's frames in the video.
        mixed_precision (`str`): As in the training configuration.
    """

    def __init__(
        self,
        stores: Sequence[FrameStore],
        size: tuple[int, int] = (257, 449),
        frames: int = 12,
        stride: int = 3,
        mixed_precision: str = "no",
    ):
        self.stores, self.size, self.frames, self.stride = stores, size, frames, stride
        self.strips: dict[str, np.ndarray] = {}
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Scores `model`; returns `eval_j` (mean over sequences) and one `eval_j/<sequence>` each."""
        was_training = model.training
        model.eval()
        scores = {}
        self.strips = {}
        sequences = [(source, *item) for source in self.stores for item in source.sequences.items()]
        for store, name, span in sequences:
            # Two folders may have videos of one name.
            name = name if f"eval_j/{name}" not in scores else f"{store.name}-{name}"
            first = next((index for index in span if store.objects[index]), None)
            if first is None:
                continue
            indices = list(range(first, span.stop, self.stride))[: self.frames]
            if len(indices) > 1:
                scores[f"eval_j/{name}"] = self._score(model, store, name, indices, device)
        model.train(was_training)
        return {"eval_j": sum(scores.values()) / max(1, len(scores)), **scores}

    def _score(
        self, model: nn.Module, store: FrameStore, name: str, indices: list[int], device: torch.device
    ) -> float:
        """Mean J of one piece over its objects and the frames after the first; draws the piece's strip."""
        images = self._resized([store.image(i) for i in indices], device, mode="bilinear", antialias=True) / 255
        mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
        masks = [store.mask(i)[..., None] for i in indices]
        labels = self._resized(masks, device, mode="nearest-exact")[:, 0].long()
        areas = {int(n): int((labels[0] == n).sum()) for n in labels[0].unique() if n not in (0, VOID)}
        # A clip holds so many, the largest ones: a training clip has even fewer.
        numbers = sorted(sorted(areas, key=areas.get, reverse=True)[: self._most_objects(model)])
        if not numbers:
            return 0.0
        given = torch.zeros_like(labels[:1])
        for position, number in enumerate(numbers, start=1):
            given[labels[:1] == number] = position
        with torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
            output = model(
                pixel_values=((images - mean) / std).unsqueeze(0),
                id_masks=given.unsqueeze(0),
                num_objects=len(numbers),
                teacher_forcing=0.0,
            )
        logits = F.interpolate(output.logits[0].float(), size=self.size, mode="bilinear", align_corners=True)
        predicted = torch.tensor([0, *numbers], device=device)[logits.argmax(1)]
        values = []
        for number in numbers:
            mine, true = (predicted == number) & (labels[1:] != VOID), labels[1:] == number
            union = (mine | true).sum((1, 2))
            values.append(torch.where(union > 0, (mine & true).sum((1, 2)) / union.clamp_min(1), 1.0).mean())
        self.strips[name] = _strip(images, torch.cat([labels[:1], predicted]), labels)
        return float(torch.stack(values).mean())

    def _resized(self, pictures: list[np.ndarray], device: torch.device, **how) -> torch.Tensor:
        """Pictures `(height, width, channels)`, each of a size of its own, as `(T, channels, *self.size)`, float32."""
        maps = (torch.from_numpy(picture.copy()).to(device).permute(2, 0, 1)[None].float() for picture in pictures)
        return torch.cat([F.interpolate(each, size=self.size, **how) for each in maps])

    @staticmethod
    def _most_objects(model: nn.Module) -> int:
        return getattr(getattr(model, "config", None), "max_objects", 10)


def _strip(images: torch.Tensor, predicted: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Some frames `(T, 3, H, W)` in [0, 1] side by side, at half size, with the ids `(T, H, W)` of either drawn."""
    chosen = torch.linspace(0, len(images) - 1, min(_STRIP_FRAMES, len(images))).round().long().unique()
    frames = (images[chosen, :, ::2, ::2] * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = []
    for ids in (predicted, labels):
        small = ids[chosen, ::2, ::2]
        drawn = small.masked_fill(small == VOID, 0).byte().cpu().numpy()
        rows.append(np.hstack([draw_overlay(*pair) for pair in zip(frames, drawn, strict=True)]))
    return np.vstack(rows)
