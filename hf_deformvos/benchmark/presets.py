"""Presets by name, in the terms of an [`EngineConfig`]."""

import torch


_PRESETS = {
    "accurate": {"dtype": "float32", "short_side": None},
    "standard": {"dtype": "native", "short_side": None},
    "fast": {"dtype": "native", "short_side": 320},
}


def resolve_preset(name: str) -> dict:
    """
    `dtype` and `short_side` of a preset on this machine.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in _PRESETS:
        raise ValueError(f"`preset` must be one of {', '.join(_PRESETS)}, got {name!r}.")
    preset = dict(_PRESETS[name])
    if preset["dtype"] == "native":
        has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported() or torch.cuda.is_available()
        preset["dtype"] = "bfloat16" if has_bfloat16 else "float32"
    return preset


__all__ = ["resolve_preset"]
