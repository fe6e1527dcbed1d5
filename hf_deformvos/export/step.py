"""One step of the stream with explicit state, for torch.export and ONNX."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..memory_deformvos import LayerMemory, MemoryBank, MemoryFrame
from ..modeling_deformvos import DeformVosModel


class StepMemory(NamedTuple):
    """
    The memory that a step reads, for `L` layers, `S` long-term frames, `G` groups of objects and `h x w` tokens.

    Attributes:
        long_term_keys (`torch.Tensor` of shape `(L, S, key_size, h, w)`)
        long_term_values (`torch.Tensor` of shape `(L, S, value_size * (1 + G), h, w)`)
        short_term_keys (`torch.Tensor` of shape `(L, key_size, h, w)`)
        short_term_values (`torch.Tensor` of shape `(L, value_size * (1 + G), h, w)`)
    """

    long_term_keys: torch.Tensor
    long_term_values: torch.Tensor
    short_term_keys: torch.Tensor
    short_term_values: torch.Tensor

    @classmethod
    def from_bank(cls, bank: MemoryBank) -> "StepMemory":
        """The memory of a session (of one video) as tensors."""
        long_term = list(zip(*(frame.layers for frame in bank.long_term), strict=True))
        return cls(
            torch.stack([torch.cat([memory.key for memory in layer]) for layer in long_term]),
            torch.stack([torch.cat([memory.values for memory in layer]) for layer in long_term]),
            torch.cat([memory.key for memory in bank.previous.layers]),
            torch.cat([memory.values for memory in bank.previous.layers]),
        )

    def to_bank(self) -> MemoryBank:
        """A bank that reads like the one the tensors came from; it cannot be rewritten."""
        slots = self.long_term_keys.shape[1]
        bank = MemoryBank(slots)
        for slot in range(slots):
            layers = zip(self.long_term_keys[:, slot], self.long_term_values[:, slot], strict=True)
            bank.long_term.append(_frame(layers))
        bank.previous = _frame(zip(self.short_term_keys, self.short_term_values, strict=True))
        return bank


def _frame(layers) -> MemoryFrame:
    memories = tuple(LayerMemory(key.unsqueeze(0), values.unsqueeze(0)) for key, values in layers)
    return MemoryFrame(0, memories, memories[0].key.new_zeros(()))


class ExportableStep(nn.Module):
    """
    Segments a frame from its memory and writes the frame's own memory, tensors in and tensors out.

    It calls what a session calls, so its masks are the session's. The caller keeps the bank: the returned keys and
    values become the next step's short-term memory, and a long-term entry every `memory_interval` frames.
    """

    def __init__(self, model: DeformVosModel):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(
        self,
        pixel_values: torch.Tensor,
        long_term_keys: torch.Tensor,
        long_term_values: torch.Tensor,
        short_term_keys: torch.Tensor,
        short_term_values: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(1, 3, 16k+1, 16m+1)`): the frame.
            long_term_keys, long_term_values, short_term_keys, short_term_values: see [`StepMemory`].
            valid (`torch.BoolTensor` of shape `(G, 1 + max_objects)`): background and the slots in use.

        Returns:
            Probabilities `(G, 1 + max_objects, 4h-3, 4w-3)`, and the frame's keys `(L, key_size, h, w)` and values
            `(L, value_size * (1 + G), h, w)`.
        """
        memory = StepMemory(long_term_keys, long_term_values, short_term_keys, short_term_values).to_bank()
        segmentation = self.model.segment(self.model.encode_images(pixel_values), memory)
        masks = self.model.logits_to_masks(segmentation.logits, valid)
        frame = self.model.remember(segmentation.projections, masks, frame_idx=0)
        return masks, torch.cat([m.key for m in frame.layers]), torch.cat([m.values for m in frame.layers])


INPUT_NAMES = ["pixel_values", *StepMemory._fields, "valid"]
OUTPUT_NAMES = ["probabilities", "keys", "values"]


def export_step_to_onnx(
    model: DeformVosModel, path: str | Path, pixel_values: torch.Tensor, memory: StepMemory, valid: torch.Tensor
):
    """
    Write the step as an ONNX file (opset 18) for frames, banks and groups of the sizes of the examples given.

    Args:
        model ([`DeformVosModel`]): in evaluation mode, in float32, not folded.
        path (`str` or `Path`): the file to write.
        pixel_values, memory, valid: examples of the inputs of [`ExportableStep`].

    Raises:
        ValueError: if the model is folded, or not in evaluation mode.
    """
    if model.training or getattr(model.backbone, "is_folded", False):
        raise ValueError("Export a model in evaluation mode whose batch norms are not folded; load it again.")
    torch.onnx.export(
        ExportableStep(model),
        (pixel_values, *memory, valid),
        str(path),
        input_names=INPUT_NAMES,
        output_names=OUTPUT_NAMES,
        opset_version=18,
        dynamo=True,
        verbose=False,
    )


__all__ = ["INPUT_NAMES", "OUTPUT_NAMES", "ExportableStep", "StepMemory", "export_step_to_onnx"]
