"""Presets by name, in the terms of an [`EngineConfig`]."""

from dataclasses import dataclass

import torch

from ..inference import resolve_device


@dataclass(frozen=True)
class Preset:
    """Precision (the fastest native one by default) and short side at the network (the model's by default)."""

    dtype: str | None = None
    short_side: int | None = None

    def resolve_dtype(self, device: torch.device) -> str:
        """The precision on a device, by name."""
        if self.dtype is not None:
            return self.dtype
        if device.type == "cuda":
            return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
        return "bfloat16" if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


PRESETS = {"accurate": Preset("float32"), "standard": Preset(), "fast": Preset(short_side=352)}


def resolve_preset(name: str, device: str | None) -> dict:
    """
    `dtype` and `short_side` of a preset on a device.

    Raises:
        ValueError: if there is no such preset or device.
    """
    if name not in PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {name!r}.")
    preset = PRESETS[name]
    return {"dtype": preset.resolve_dtype(resolve_device(device)), "short_side": preset.short_side}


__all__ = ["resolve_preset"]
