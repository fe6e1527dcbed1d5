"""Batches for a GPU, made beside the training step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch.utils.data import DataLoader, Dataset

from ..data.transforms import ClipBatch


DrawnBatch = tuple[ClipBatch, torch.Generator]
"""An augmented batch, and the generator that the rest of its step draws from."""


class _Batches(Dataset):
    """What `make` returns for a key, as tensors, which is what processes hand to each other without a copy."""

    def __init__(self, make: Callable[..., DrawnBatch]):
        self._make = make

    def __getitem__(self, key: tuple) -> dict[str, torch.Tensor]:
        clips, generator = self._make(*key)
        return {**vars(clips), "generator_state": generator.get_state()}


def _leave_group(_: int) -> None:
    """`timeout` asks a whole process group to end; a run that then writes its last checkpoint must not lose these."""
    os.setpgrp()


class WorkerProcesses:
    """
    Processes that draw and augment coming batches on the CPU, in order.

    Augmentation is thousands of small operations and decisions a batch. In threads, on the GPU, it would fight the
    training step for Python's lock and the GPU's queue; cores that do nothing else do it for nothing.

    Args:
        make (`Callable[..., DrawnBatch]`): Makes the batch of a key, on the CPU, in a process forked from this one.
        keys (iterable of `tuple`): The coming batches, asked for no earlier than a process is free.
        workers (`int`): Processes, at least 1.
        device (`torch.device`): Where batches are handed over.
    """

    def __init__(self, make: Callable[..., DrawnBatch], keys: Iterable[tuple], workers: int, device: torch.device):
        self._device = device
        self._coming = iter(
            DataLoader(
                _Batches(make),
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                prefetch_factor=1,
                # Forked, they share the decoded frames, and inherit what cannot be pickled.
                multiprocessing_context="fork",
                worker_init_fn=_leave_group,
                pin_memory=device.type == "cuda",
            )
        )

    def get(self) -> Callable[[], DrawnBatch]:
        """The next batch, once it is there; a worker's error is raised here. Calling it takes it to the device."""
        made = next(self._coming)

        def hand_over() -> DrawnBatch:
            generator = torch.Generator()
            generator.set_state(made.pop("generator_state"))
            moved = {name: tensor.to(self._device, non_blocking=True) for name, tensor in made.items()}
            return ClipBatch(**moved), generator

        return hand_over

    def close(self) -> None:
        """Ends the processes."""
        self._coming = iter(())
