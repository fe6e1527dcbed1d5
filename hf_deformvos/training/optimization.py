"""What is trained when, and how fast: parameter groups, the learning rate's course, the freeze schedule."""

from __future__ import annotations

import torch
from torch import nn

from .config import TrainingConfig


# Share of the peak rate that the warm-up starts from, reached within ten steps.
_LEAST_RISE = 0.01


def parameter_groups(model: nn.Module, config: TrainingConfig) -> list[dict]:
    """
    Trainable parameters by learning rate and weight decay.

    Args:
        model (`nn.Module`): Its `backbone` and parameters with `offset` in their names get own rates.
        config ([`TrainingConfig`]): Rates, decay and frozen prefixes; parameters that stay frozen for the whole run
            stop to require gradients.

    Returns:
        `list[dict]` for an optimizer; `lr_scale` is the factor on the scheduled rate.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if config.freeze_until >= 1 and name.startswith(tuple(config.freeze)):
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        scale = config.backbone_lr_scale if name.startswith("backbone.") else 1.0
        scale = config.offset_lr_scale if "offset" in name else scale
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": config.learning_rate * scale, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def learning_rate_factor(progress: float, step: int, warm_up: float, power: float) -> float:
    """Share of the peak learning rate: a linear rise over `warm_up`, times polynomial decay to 0 at progress 1."""
    rise = 1.0 if warm_up <= 0 else min(1.0, progress / warm_up)
    # The very first steps of a run that is driven by time or has many steps would otherwise do nothing.
    rise = max(rise, min(_LEAST_RISE, (step + 1) * 1e-3))
    return rise * (1.0 - min(1.0, progress)) ** power


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """
    Takes over an optimizer's saved state, but not the factors and decays of its groups: the run's settings say those.

    Raises:
        ValueError: If the state is one of other groups of parameters.
    """
    own = [{name: group[name] for name in ("lr_scale", "weight_decay")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise ValueError(
            f"The saved optimizer is one of other groups of parameters ({error}): `freeze`, `freeze_until`, "
            "`weight_decay`, `backbone_lr_scale` and `offset_lr_scale` must part them as they did."
        ) from error
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


class FreezeSchedule:
    """
    Keeps parameters frozen up to some progress. It has no state: the progress decides, so resuming is exact.

    The parameters are in the optimizer from the start, which passes over those that have no gradient.

    Args:
        model (`nn.Module`): The model, before it is wrapped.
        prefixes (`list[str]`): What the names of the frozen parameters start with.
        until (`float`): Progress at which they are released.

    Raises:
        ValueError: If a prefix is that of no parameter.
    """

    def __init__(self, model: nn.Module, prefixes: list[str], until: float):
        names = [name for name, _ in model.named_parameters()]
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name in names):
                parts = ", ".join(dict.fromkeys(f"{name.split('.')[0]}." for name in names))
                raise ValueError(f"`freeze` must hold prefixes of parameter names ({parts} ...), got {prefix!r}.")
        self.until = until
        # Those that are frozen for other reasons, such as batch norm, are never released.
        self._parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(tuple(prefixes)) and parameter.requires_grad
        ]

    def apply(self, progress: float) -> None:
        """Freezes or releases."""
        for parameter in self._parameters:
            parameter.requires_grad_(progress >= self.until)
