"""A quick score on held-out sequences during training; the full protocol lives in the evaluation package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..data.store import VOID, FrameStore
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD


class HeldOutEvaluation:
    """
    Mean J over short pieces of sequences, each from its first mask, on the model's own masks.

    Args:
        store ([`FrameStore`]): The sequences.
        size (`tuple[int, int]`): Height and width that frames are resized to, of the form 16k+1.
        frames (`int`): Frames of a piece, the given one included.
        stride (`int`): Distance of a piece's frames in the video.
        mixed_precision (`str`): As in the training configuration.
    """

    def __init__(
        self,
        store: FrameStore,
        size: tuple[int, int] = (257, 449),
        frames: int = 12,
        stride: int = 3,
        mixed_precision: str = "no",
    ):
        self.store, self.size, self.frames, self.stride = store, size, frames, stride
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision)

    @torch.no_grad()
    def __call__(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Scores `model`; returns `eval_j` (mean over sequences) and one `eval_j/<sequence>` each."""
        was_training = model.training
        model.eval()
        scores = {}
        for name, span in self.store.sequences.items():
            first = next((index for index in span if self.store.objects[index]), None)
            if first is None:
                continue
            indices = list(range(first, span.stop, self.stride))[: self.frames]
            if len(indices) > 1:
                scores[f"eval_j/{name}"] = self._score(model, indices, device)
        model.train(was_training)
        return {"eval_j": sum(scores.values()) / max(1, len(scores)), **scores}

    def _score(self, model: nn.Module, indices: list[int], device: torch.device) -> float:
        """Mean J of one piece over its objects and the frames after the first."""
        frames = torch.stack([torch.from_numpy(self.store.image(i).copy()) for i in indices]).permute(0, 3, 1, 2)
        images = F.interpolate(frames.to(device).float() / 255, size=self.size, mode="bilinear", antialias=True)
        mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
        masks = torch.stack([torch.from_numpy(self.store.mask(i).copy()) for i in indices]).to(device)
        labels = F.interpolate(masks.unsqueeze(1).float(), size=self.size, mode="nearest-exact")[:, 0].long()
        numbers = [int(n) for n in labels[0].unique() if n not in (0, VOID)]
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
        predicted = logits.argmax(1)
        values = []
        for position, number in enumerate(numbers, start=1):
            mine, true = (predicted == position) & (labels[1:] != VOID), labels[1:] == number
            union = (mine | true).sum((1, 2))
            values.append(torch.where(union > 0, (mine & true).sum((1, 2)) / union.clamp_min(1), 1.0).mean())
        return float(torch.stack(values).mean())
