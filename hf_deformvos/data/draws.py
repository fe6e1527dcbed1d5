"""Random draws that augmentation is made of; always on the CPU, so that a seed means the same clip on every device."""

import math

import torch


# Frames over which made-up motion keeps its direction.
STEADY_FRAMES = 5


def uniform(generator: torch.Generator, *shape: int, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    """Uniform draws of a shape."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def chance(generator: torch.Generator, probability: float) -> bool:
    """Whether something of a probability happens."""
    return float(torch.rand((), generator=generator)) < probability


def pick(candidates: list[int], generator: torch.Generator) -> int:
    """One of the candidates."""
    return candidates[int(torch.randint(len(candidates), (1,), generator=generator))]


def random_walk(generator: torch.Generator, batch: int, frames: int, channels: int) -> torch.Tensor:
    """
    Smooth walks `(batch, frames, channels)` from 0, about 1 a frame: each has a velocity, and changes of it. On long
    clips the velocity swings, so that a walk goes no further than about twice its first four frames.
    """
    velocity = uniform(generator, batch, 1, channels)
    noise = uniform(generator, batch, max(frames - 1, 1), channels) * 0.5
    if frames > STEADY_FRAMES:
        turns = uniform(generator, batch, 1, channels, low=0.5, high=1.0) * math.pi / STEADY_FRAMES
        velocity = velocity * torch.cos(turns * torch.arange(frames - 1).view(1, -1, 1))
    steps = velocity + noise[:, : frames - 1]
    return torch.cat([torch.zeros(batch, 1, channels), steps.cumsum(1)], dim=1)
