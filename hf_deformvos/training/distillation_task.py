"""Learning from a teacher: its masks as labels, its attention maps and logits as what to agree with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ..data.store import VOID
from ..data.transforms import ClipBatch
from .config import DISTILLATION_WEIGHTS, PROPAGATIONS, TrainingConfig
from .distillation import (
    attention_alignment_loss,
    inter_object_relation_loss,
    intra_object_relation_loss,
    kl_divergence_loss,
    representation_loss,
)
from .losses import upsample_logits
from .task import SegmentationTask, StepPlan


@dataclass(frozen=True)
class DistillationWeights:
    """
    Weights of what the teacher is asked for besides masks; 0 leaves a term out.

    Args:
        att (`float`): Of one minus the centered kernel alignment of attention maps.
        intra, inter (`float`): Of the relations between the pixels of an object and between the objects of a pixel.
        kl (`float`): Of the Kullback-Leibler divergence of logits.
        representation (`float`): Of MobileVOS's loss on features.
        temperature (`float`): Divisor of logits in `intra`, `inter` and `kl`.
        cka_unbiased (`bool`): Whether `att` takes the unbiased estimator.
        att_maps (`tuple[str, ...]`): Propagations whose maps `att` aligns, of `long_term`, `short_term` and `self`.
    """

    att: float = 1.0
    intra: float = 1.0
    inter: float = 1.0
    kl: float = 0.0
    representation: float = 0.0
    temperature: float = 1.0
    cka_unbiased: bool = False
    att_maps: tuple[str, ...] = PROPAGATIONS

    @classmethod
    def from_config(cls, config: TrainingConfig) -> DistillationWeights:
        """The weights that a configuration states."""
        weights = {name.removesuffix("_weight"): getattr(config, name) for name in DISTILLATION_WEIGHTS}
        others = {"cka_unbiased": config.cka_unbiased, "att_maps": tuple(config.att_maps)}
        return cls(**weights, temperature=config.temperature, **others)

    @property
    def uses_logits(self) -> bool:
        """Whether any term compares logits."""
        return bool(self.intra or self.inter or self.kl)


class DistillationTask(SegmentationTask):
    """
    Segmentation of clips that learns from a teacher.

    The teacher sees the student's clips with the student's slots and memory interval. With supervision by labels or
    both, its memory is written with the labels; with pseudo-labels it is given the first frame's masks alone and goes
    on from its own.

    Args:
        student (`nn.Module`): See [`SegmentationTask`].
        teacher (`nn.Module`): A model of the same kind whose maps have the same token grid.
        supervision (`str`): Whose masks the cross-entropy and Jaccard losses follow. `"labels"`: the clips'.
            `"pseudo"`: the teacher's hard predictions, which the student's memory is forced with, too; of the labels
            only the first frame's are used. `"both"`: the mean of the losses by either.
        weights ([`DistillationWeights`]): Of the further terms.
        kwargs: See [`SegmentationTask`].

    Raises:
        ValueError: If there is no teacher, or `supervision` is none of the three.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        supervision: str = "labels",
        weights: DistillationWeights | None = None,
        **kwargs,
    ):
        if teacher is None:
            raise ValueError("Distillation needs a teacher, got None; `SegmentationTask` does without.")
        if supervision not in ("labels", "pseudo", "both"):
            raise ValueError(f"`supervision` must be labels, pseudo or both, got {supervision!r}.")
        super().__init__(student, teacher, **kwargs)
        self.supervision, self.weights = supervision, weights or DistillationWeights()
        # Slots are shared, so they are those that both have.
        self.max_objects = min(self.max_objects, getattr(getattr(teacher, "config", None), "max_objects", 10))

    def forward(self, batch: ClipBatch, plan: StepPlan, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """
        Losses of a batch.

        Args:
            batch, plan, generator: See [`SegmentationTask`].

        Returns:
            Dictionary containing scalar tensors: `loss`, the weighted sum to minimize; `loss_ce`; `loss_jaccard`; and,
            where its weight is not 0, each of `loss_att`, `loss_intra`, `loss_inter`, `loss_kl`,
            `loss_representation`.

        Raises:
            ValueError: If the teacher's token grid is not the student's.
        """
        inputs = self.draw_inputs(batch, plan, generator)
        wanted = {
            "output_attentions": self.weights.att > 0,
            "output_hidden_states": self.weights.representation > 0,
        }
        guide = self._ask_teacher(batch, inputs, wanted)
        pseudo = None if self.supervision == "labels" else self._pseudo_labels(guide.logits, batch)
        given = pseudo if self.supervision == "pseudo" else batch
        with self.stopwatch.part("student"):
            output = self.student(id_masks=given.id_masks, **inputs, **wanted)
        _check_grids(output, guide)
        losses = self.supervised_losses(output.logits, given, plan)
        if self.supervision == "both":
            others = self.supervised_losses(output.logits, pseudo, plan)
            losses = {name: (value + others[name]) / 2 for name, value in losses.items()}
        for name, value in self._distillation_losses(output, guide, batch).items():
            losses["loss"] = losses["loss"] + getattr(self.weights, name) * value
            losses[f"loss_{name}"] = value.detach()
        return losses

    @torch.no_grad()
    def _ask_teacher(self, batch: ClipBatch, inputs: dict, wanted: dict):
        """The teacher's output for a batch."""
        alone = self.supervision == "pseudo"
        # Given one frame's masks, it cannot see the others'.
        masks = batch.id_masks[:, :1] if alone else batch.id_masks
        forced = torch.full_like(inputs["teacher_forcing"], not alone)
        with self.stopwatch.part("teacher"):
            return self.teacher(id_masks=masks, **{**inputs, "teacher_forcing": forced}, **wanted)

    @staticmethod
    def _pseudo_labels(logits: torch.Tensor, batch: ClipBatch) -> ClipBatch:
        """The batch with the teacher's masks behind the first frame; what lies outside of the video stays void."""
        first, others = batch.id_masks[:, :1], batch.id_masks[:, 1:]
        predicted = upsample_logits(logits, tuple(others.shape[-2:]), batch.object_valid).argmax(2)
        predicted = predicted.masked_fill(others == VOID, VOID)
        return replace(batch, id_masks=torch.cat([first, predicted], dim=1))

    def _distillation_losses(self, student, teacher, batch: ClipBatch) -> dict[str, torch.Tensor]:
        """The terms whose weight is not 0, by their names in [`DistillationWeights`]."""
        weights, terms = self.weights, {}
        if weights.att > 0:
            terms["att"] = self._attention_loss(self.learned(student.attentions), self.learned(teacher.attentions))
        if weights.uses_logits:
            # Points of stride 4 lie on every fourth pixel.
            known = self.learned(batch.id_masks[:, 1:, ::4, ::4]) != VOID
            logits = self.learned(student.logits), self.learned(teacher.logits)
            compared = (*logits, batch.object_valid, known, weights.temperature)
            if weights.intra > 0:
                terms["intra"] = intra_object_relation_loss(*compared)
            if weights.inter > 0:
                terms["inter"] = inter_object_relation_loss(*compared)
            if weights.kl > 0:
                terms["kl"] = kl_divergence_loss(*compared)
        if weights.representation > 0:
            features = [_last_features(self.learned(output.hidden_states)) for output in (student, teacher)]
            terms["representation"] = representation_loss(*features)
        return terms

    def _attention_loss(self, student: tuple, teacher: tuple) -> torch.Tensor:
        """Mean over frames and kinds of propagation of the alignment of the last layers' maps."""
        losses = [
            attention_alignment_loss(mine[-1][name], theirs[-1][name], self.weights.cka_unbiased)
            for mine, theirs in zip(student, teacher, strict=True)
            for name in self.weights.att_maps
        ]
        return torch.stack(losses).mean()


def _last_features(hidden_states: tuple) -> torch.Tensor:
    """[I | M] of the last layer, frames beside samples: `(batch * frames, tokens, channels)`."""
    frames = [torch.cat(layers[-1], dim=1).flatten(2).transpose(1, 2) for layers in hidden_states]
    return torch.cat(frames)


def _check_grids(student, teacher) -> None:
    """Refuses a teacher whose maps lie on another grid: what is compared must show the same place."""
    grids = [tuple(output.logits.shape[-2:]) for output in (student, teacher)]
    if grids[0] == grids[1] and student.attentions and teacher.attentions:
        grids = [(output.attentions[0][-1]["self"].shape[1],) for output in (student, teacher)]
    if grids[0] != grids[1]:
        mine, theirs = ("x".join(map(str, grid)) for grid in grids)
        raise ValueError(
            f"The teacher's token grid must be the student's: for the same clip the student has maps of {mine}, the "
            f"teacher of {theirs}. Both need tokens of stride 16 and logits of stride 4."
        )
