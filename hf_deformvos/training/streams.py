"""Batches for a GPU that are made beside the training step."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import torch

from ..data.transforms import ClipBatch


DrawnBatch = tuple[ClipBatch, torch.Generator]
"""An augmented batch, and the generator that the rest of its step draws from."""


class SideStreams:
    """
    Streams of a GPU that worker threads take turns on. Augmentation is many small kernels and questions to the device:
    on the stream of the training step, the GPU would do nothing for much of the time.

    Args:
        device (`torch.device`): A GPU.
        count (`int`): How many threads may work on it at once.
    """

    def __init__(self, device: torch.device, count: int = 2):
        self._free: SimpleQueue = SimpleQueue()
        for _ in range(count):
            self._free.put(torch.cuda.Stream(device, priority=-1))

    def ahead(self, make: Callable[[], DrawnBatch]) -> Callable[[], DrawnBatch]:
        """Makes a batch now; what is returned hands it to the stream that it is called on."""
        stream = self._free.get()
        try:
            with torch.cuda.stream(stream):
                clips, generator = make()
            stream.synchronize()
        finally:
            self._free.put(stream)

        def hand_over() -> DrawnBatch:
            # The allocator must not give the memory away while that stream still reads it.
            for tensor in (clips.pixel_values, clips.id_masks, clips.object_valid):
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            return clips, generator

        return hand_over
