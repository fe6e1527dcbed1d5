"""What is learned: a task holds student and optional teacher and turns a batch into named losses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from ..data.transforms import ClipBatch
from .losses import bootstrapped_cross_entropy, soft_jaccard_loss, upsample_logits
from .stopwatch import Stopwatch


@dataclass(frozen=True)
class StepPlan:
    """
    What a step's place in the schedule decides.

    Args:
        own_masks (`float`): Probability that memory is written with the student's own masks.
        bootstrap_share (`float`): Share of hardest pixels that the cross-entropy keeps.
    """

    own_masks: float = 0.0
    bootstrap_share: float = 1.0


def step_generator(seed: int, index: int) -> torch.Generator:
    """The generator of batch number `index`: nothing random in a step depends on the steps before it."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def draw_slots(batch: int, num_objects: int, max_objects: int, generator: torch.Generator) -> torch.Tensor:
    """
    Identity slots of the objects: half of the samples permute the first slots, the others take any distinct ones.

    Returns:
        `torch.Tensor` of shape `(batch, num_objects)`, int64, on the CPU.
    """
    any_slots = torch.rand(batch, max_objects, generator=generator).argsort(1)[:, :num_objects]
    first_slots = torch.rand(batch, num_objects, generator=generator).argsort(1)
    return torch.where(torch.rand(batch, 1, generator=generator) < 0.5, first_slots, any_slots)


class SegmentationTask(nn.Module):
    """
    Supervised segmentation of clips.

    Args:
        student (`nn.Module`): Called as `student(pixel_values, id_masks, num_objects, ...)`; returns `.logits`.
        teacher (`nn.Module`, *optional*): Kept in evaluation mode, without gradients, and out of `state_dict` and
            `parameters`; this task does not use it, [`DistillationTask`] does.
        ce_weight, jaccard_weight (`float`): Weights of the two losses.
        memory_interval (`int`, *optional*): Handed to the student; by default 1, 2 or 3 at random, so that the student
            meets long-term banks of every size.
        gradient_frames (`int`, *optional*): Predicted frames of a clip, the last ones, that are learned from; those
            before are rolled forward without gradients. By default all.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        ce_weight: float = 0.5,
        jaccard_weight: float = 0.5,
        memory_interval: int | None = None,
        gradient_frames: int | None = None,
    ):
        super().__init__()
        self.student = student
        self.max_objects = getattr(getattr(student, "config", None), "max_objects", 10)
        self.ce_weight, self.jaccard_weight = ce_weight, jaccard_weight
        self.memory_interval, self.gradient_frames = memory_interval, gradient_frames
        # In a tuple, so that the teacher is no submodule: no optimizer, checkpoint or wrapper may see it.
        self._teacher = (teacher,)
        self.stopwatch = Stopwatch()
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher, if there is one."""
        return self._teacher[0]

    def train(self, mode: bool = True) -> SegmentationTask:
        """Sets the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, batch: ClipBatch, plan: StepPlan, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        Losses of a batch.

        Args:
            batch ([`ClipBatch`]): Augmented clips.
            plan ([`StepPlan`]): Where in the schedule the step is.
            generator (`torch.Generator`): A CPU generator for slots and teacher forcing.

        Returns:
            Dictionary containing scalar tensors: `loss`, the weighted sum to minimize; `loss_ce`; `loss_jaccard`.
        """
        inputs = self.draw_inputs(batch, plan, generator)
        with self.stopwatch.part("student"):
            output = self.student(id_masks=batch.id_masks, **inputs)
        return self.supervised_losses(output.logits, batch, plan)

    def draw_inputs(self, batch: ClipBatch, plan: StepPlan, generator: torch.Generator) -> dict:
        """What a model is called with, but for the masks; every task draws the same from the same generator."""
        device = batch.pixel_values.device
        slots = draw_slots(len(batch.id_masks), batch.num_objects, self.max_objects, generator)
        forced = torch.rand(batch.id_masks.shape[:2], generator=generator) >= plan.own_masks
        return {
            "pixel_values": batch.pixel_values,
            "num_objects": batch.num_objects,
            "object_valid": batch.object_valid,
            "object_slots": slots.to(device),
            "teacher_forcing": forced.to(device),
            "memory_interval": self.memory_interval or int(torch.randint(1, 4, (), generator=generator)),
            "gradient_frames": self.gradient_frames,
        }

    def learned(self, frames):
        """Of a model's predicted frames, on axis 1 of a tensor or in a tuple, those that are learned from."""
        start = 0 if self.gradient_frames is None else -self.gradient_frames
        return frames[:, start:] if isinstance(frames, torch.Tensor) else frames[start:]

    def supervised_losses(self, logits: torch.Tensor, batch: ClipBatch, plan: StepPlan) -> dict[str, torch.Tensor]:
        """Losses of the student's logits against the labels of the frames learned from; keys as in `forward`."""
        logits, labels = self.learned(logits), self.learned(batch.id_masks[:, 1:])
        logits = upsample_logits(logits, tuple(labels.shape[-2:]), batch.object_valid)
        loss_ce = bootstrapped_cross_entropy(logits, labels, plan.bootstrap_share)
        loss_jaccard = soft_jaccard_loss(logits, labels, batch.object_valid)
        loss = self.ce_weight * loss_ce + self.jaccard_weight * loss_jaccard
        return {"loss": loss, "loss_ce": loss_ce.detach(), "loss_jaccard": loss_jaccard.detach()}
