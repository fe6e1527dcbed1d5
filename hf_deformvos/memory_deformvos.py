"""What DeformVOS remembers of a video: typed frames in a bank whose size does not depend on the video's length."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class LayerMemory:
    """
    One propagation layer's memory of one frame, for `B` videos, `G` groups of objects and `h x w` tokens.

    Attributes:
        key (`torch.Tensor` of shape `(B, key_size, h, w)`): keys, the same for every object.
        values (`torch.Tensor` of shape `(B, value_size * (1 + G), h, w)`): visual values, then each group's.
        identification (`torch.Tensor` of shape `(B * G, hidden_size, h, w)`, *optional*):
            The layer's identification input, from which the groups' values can be made again; none in layer 0.
    """

    key: torch.Tensor
    values: torch.Tensor
    identification: torch.Tensor | None = None

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held."""
        yield self.key
        yield self.values
        if self.identification is not None:
            yield self.identification


@dataclass
class MemoryFrame:
    """
    One remembered frame.

    Attributes:
        frame_idx (`int`): its position in the video.
        layers (`tuple[LayerMemory, ...]`): one entry a propagation layer.
        masks (`torch.Tensor` of shape `(B * G, 1 + max_objects, 4h-3, 4w-3)`):
            Probabilities of background and object slots at stride 4, kept so that an object can be taken out again.
        is_reference (`bool`): whether the user gave masks on this frame.
    """

    frame_idx: int
    layers: tuple[LayerMemory, ...]
    masks: torch.Tensor
    is_reference: bool = False

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor held, the layers' included."""
        yield self.masks
        for layer in self.layers:
            yield from layer.tensors()


@dataclass
class MemoryBank:
    """
    The previous frame, and at most `long_term_slots` frames of long-term memory.

    When the long-term slots are full, the oldest frame that is no reference leaves first; among references the first
    one stays and the oldest of the others leaves. A single slot keeps the newest reference.
    """

    long_term_slots: int
    long_term: list[MemoryFrame] = field(default_factory=list)
    previous: MemoryFrame | None = None

    def write(self, frame: MemoryFrame, to_long_term: bool):
        """Make `frame` the previous frame, and a long-term one where asked; evict what exceeds the bound."""
        self.previous = frame
        held = next((i for i, kept in enumerate(self.long_term) if kept.frame_idx == frame.frame_idx), None)
        if held is not None:
            # Seen again: a correction replaces what was there; a prediction is worth less than a reference.
            if frame.is_reference or not self.long_term[held].is_reference:
                self.long_term[held] = frame
            return
        if not (to_long_term or frame.is_reference):
            return
        self.long_term.append(frame)
        while len(self.long_term) > self.long_term_slots:
            self.long_term.pop(self._evicted())

    def _evicted(self) -> int:
        plain = [index for index, frame in enumerate(self.long_term[:-1]) if not frame.is_reference]
        if plain:
            return plain[0]
        if not self.long_term[-1].is_reference:
            return len(self.long_term) - 1
        return min(1, len(self.long_term) - 2)

    def frames(self) -> list[MemoryFrame]:
        """Every frame held, each once."""
        held = list(self.long_term)
        if self.previous is not None and all(self.previous is not frame for frame in held):
            held.append(self.previous)
        return held

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to segment from."""
        return self.previous is None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(tensor.nbytes for frame in self.frames() for tensor in frame.tensors())


__all__ = ["LayerMemory", "MemoryBank", "MemoryFrame"]
