"""Averaged weights."""

from __future__ import annotations

import torch
from torch import nn


class WeightAverage:
    """
    Exponential moving average of a model's weights, in float32.

    Args:
        model (`nn.Module`): Whose weights to start from.
        decay (`float`): Final decay; it starts lower, `(1 + n) / (10 + n)` after n updates.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        self.decay = decay
        self.updates = 0
        self.weights = {
            name: value.detach().float().clone() if value.is_floating_point() else value.detach().clone()
            for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's present weights."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = model.state_dict()
        names = [name for name, value in current.items() if value.is_floating_point()]
        averaged = [self.weights[name] for name in names]
        torch._foreach_lerp_(averaged, [current[name].float() for name in names], weight)
        for name in current.keys() - set(names):
            self.weights[name].copy_(current[name])

    def load(self, weights: dict[str, torch.Tensor], updates: int) -> None:
        """Restores a saved average."""
        if weights.keys() != self.weights.keys():
            raise ValueError(
                f"Averaged weights do not fit: {sorted(weights.keys() ^ self.weights.keys())[:5]} differ."
            )
        for name, value in weights.items():
            self.weights[name].copy_(value)
        self.updates = updates
