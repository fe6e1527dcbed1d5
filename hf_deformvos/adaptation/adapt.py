"""A few training steps on the frames in which objects are given."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data.clips import ClipSpec
from ..data.store import VOID
from ..image_processing_deformvos import STRIDE, to_rgb
from ..inference import fastest_dtype
from ..inference_session_deformvos import as_index
from ..training.optimization import learning_rate_factor
from ..training.task import SegmentationTask, StepPlan, step_generator
from .clips import GivenFrames


_WARM_UP = 0.1
_POWER = 0.9
_MAX_GRADIENT = 1.0
_HIGHEST_RATE = 0.1
# Of what one draw has learned.
CAUTIOUS_SHARE = 0.75
_LEAST_SHORT_SIDE = 65
# Where nobody says at which size frames will be followed: that of the released models.
_SHORT_SIDE = 480
# Of one clip: where more are given, each clip draws its own.
_MAX_OBJECTS = 3
# Of clips, as a ratio of their sides.
_MOST_ELONGATED = 2.0


@dataclass(frozen=True)
class AdaptationConfig:
    """
    How a model is adapted.

    Args:
        steps (`int`): Training steps.
        draws (`int`): How many times that is done, each time from the weights before and with other clips; the mean of
            all that was learned depends less on chance than one draw does (Wortsman et al., Model soups, arXiv
            2203.05482), and takes as many times as long.
        learning_rate (`float`): Peak rate of AdamW.
        short_side (`int`, *optional*): Short side of the clips in pixels, rounded to 16k+1. By default the size at
            which frames are followed, so that objects look as they will then, see [`at_followed_size`]; and 480 where
            no processor tells that, as in [`adapt`].
        num_frames (`int`): Frames a clip.
        batch_size (`int`): Clips a step.
        recomposed (`float`): Share of the clips whose objects go their own ways, see [`GivenFrames`].
        leave (`float`): Probability that such an object leaves the picture.
        own_masks (`float`): Probability that memory is written with the model's own masks.
        bootstrap_share (`float`): Share of hardest pixels that the cross-entropy keeps.
        blend (`float`, *optional*): Share of the trained weights in the mean with those before (WiSE-FT, Wortsman et
            al., arXiv 2109.01903), which is what follows the objects; by default three quarters of one draw, and the
            whole mean of several.
        check_frames (`int`): Frames of the video that [`adapt_to_video`] follows there and back, to see how much of
            the trained weights does it good; 0 trusts `blend`, as [`adapt`] does, which knows no video.
        train_backbone (`bool`): Whether the backbone learns, too; it is frozen by default.
        seed (`int`): Seed of the first draw, the next one has the next: the same frames, masks and seed give the same
            weights on the same machine.

    Raises:
        ValueError: If a value is out of its range.
    """

    steps: int = 50
    draws: int = 1
    learning_rate: float = 3e-4
    short_side: int | None = None
    num_frames: int = 4
    batch_size: int = 1
    recomposed: float = 0.5
    leave: float = 0.0
    own_masks: float = 0.5
    bootstrap_share: float = 0.3
    blend: float | None = None
    check_frames: int = 0
    train_backbone: bool = False
    seed: int = 0

    def __post_init__(self):
        least = {"steps": 1, "draws": 1, "num_frames": 2, "batch_size": 1, "check_frames": 0, "seed": 0}
        if self.short_side is not None:
            least["short_side"] = _LEAST_SHORT_SIDE
        for name, value in least.items():
            if as_index(getattr(self, name), name) < value:
                raise ValueError(f"`{name}` must be at least {value}, got {getattr(self, name)}.")
        for name, most in {"learning_rate": _HIGHEST_RATE, "bootstrap_share": 1.0}.items():
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"`{name}` must be above 0 and at most {most}, got {getattr(self, name)}.")
        for name in ("recomposed", "leave", "own_masks", *(() if self.blend is None else ("blend",))):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be a share between 0 and 1, got {getattr(self, name)}.")

    @property
    def share(self) -> float:
        """`blend`, or what stands for it."""
        if self.blend is not None:
            return self.blend
        return CAUTIOUS_SHARE if self.draws == 1 else 1.0

    def adapt_to_video(
        self, model, processor, frames: Sequence[Image.Image | np.ndarray], masks: dict[int, np.ndarray], size: dict
    ):
        """[`adapt_to_video`] with these settings: what evaluation, which knows nothing of training, calls."""
        from .round_trip import adapt_to_video

        return adapt_to_video(model, processor, frames, masks, self, size)


def at_followed_size(config: AdaptationConfig, processor, size: dict | None = None) -> AdaptationConfig:
    """
    The settings with the short side to which a processor brings frames, unless they name one.

    Args:
        config ([`AdaptationConfig`]): The settings.
        processor ([`DeformVosProcessor`]): What prepares the frames that will be followed.
        size (`dict`, *optional*): Its keyword for another size, of [`~hf_deformvos.inference.size_option`].
    """
    if config.short_side is not None:
        return config
    short_side = dict((size or {}).get("size", processor.image_processor.size))["shortest_edge"]
    return replace(config, short_side=max(short_side, _LEAST_SHORT_SIDE))


class Adaptation:
    """
    The training of a copy of a model, in steps that the caller paces; [`adapt`] goes through all of them.

    Args:
        model, images, masks, config: See [`adapt`].

    Attributes:
        config ([`AdaptationConfig`]): How.
        done (`int`): Steps that have been made, of all draws.
        total (`int`): All that there are.
    """

    def __init__(
        self,
        model,
        images: Sequence[Image.Image | np.ndarray],
        masks: Sequence[np.ndarray],
        config: AdaptationConfig | None = None,
    ):
        _check_trainable(model)
        self.config, self.done = config or AdaptationConfig(), 0
        config = self.config
        self.total = config.draws * config.steps
        short_side = config.short_side or _SHORT_SIDE
        images, masks = _prepare(images, masks, short_side)
        size, most = _clip_size(masks[0].shape, short_side), min(_MAX_OBJECTS, model.config.max_objects)
        spec = ClipSpec(size, config.num_frames, config.batch_size, max_objects=most)
        self._clips_of = partial(GivenFrames, images, masks, spec, config.recomposed, config.leave)
        self._plan = StepPlan(config.own_masks, config.bootstrap_share)
        self._before = model
        # Of the draws that are over.
        self._mean: dict[str, torch.Tensor] = {}
        self._begin_draw(0)

    @torch.inference_mode(False)  # commands adapt in the midst of inference
    def _begin_draw(self, draw: int) -> None:
        """A copy of the model, and clips to train it on."""
        config = self.config
        self._clips = self._clips_of(config.seed + draw)
        self._model = copy.deepcopy(self._before).float().train()
        self._model.requires_grad_(True).backbone.requires_grad_(config.train_backbone)
        if config.train_backbone:
            self._model.backbone.freeze_pretrained()
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=0.0)
        self._task = SegmentationTask(self._model)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _end_draw(self) -> None:
        """Makes the copy's weights the mean of all draws so far."""
        draws = math.ceil(self.done / self.config.steps)
        for name, parameter in self._model.named_parameters():
            if name in self._mean:
                parameter.copy_(self._mean[name].lerp(parameter, 1 / draws))
            if parameter.requires_grad:
                self._mean[name] = parameter.clone()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self) -> float:
        """Makes one step; returns its loss. `ValueError` where its gradient is not finite."""
        draw, number = divmod(self.done, self.config.steps)
        if draw and number == 0:
            self._end_draw()
            self._begin_draw(draw)
        config, device = self.config, self._model.device
        factor = learning_rate_factor(number / config.steps, number, _WARM_UP, _POWER)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        generator = step_generator(config.seed + draw, number)
        batch = self._clips(number, generator, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=fastest_dtype(device.type) == "bfloat16"):
            loss = self._task(batch, self._plan, generator)["loss"]
        self._optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, _MAX_GRADIENT)
        if not torch.isfinite(norm):
            raise ValueError(
                f"The gradient of step {self.done} is not finite: lower `learning_rate` ({config.learning_rate:g}) or "
                "follow the objects without."
            )
        self._optimizer.step()
        self.done += 1
        return loss.item()

    @torch.inference_mode(False)
    def result(self):
        """The copy, as far as it has learned, in evaluation mode; nothing is learned from then on."""
        if self._parameters:
            self._end_draw()
            self._model = blended(self._model, self._before, self.config.share)
            before = dict(self._before.named_parameters())
            for name, parameter in self._model.named_parameters():
                parameter.requires_grad_(before[name].requires_grad)
            self._parameters = []
        return self._model.eval()


@torch.inference_mode(False)
@torch.no_grad()
def blended(adapted, before, share: float):
    """A copy of an adapted model with the mean of its weights, `share` of it, and those before."""
    model, old = copy.deepcopy(adapted), dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.lerp(old[name].float(), parameter, share))
    return model


def adapt(
    model,
    images: Sequence[Image.Image | np.ndarray],
    masks: Sequence[np.ndarray],
    config: AdaptationConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
):
    """
    A copy of a model that has learned the objects of given frames.

    The frames are all that it learns from: warped, and taken apart into objects and background that move on their own.
    What it costs is spent once, before the first frame is followed; sessions of the copy are as fast and as small as
    those of the model. Fine-tuning on the first frame goes back to Caelles et al., One-shot video object segmentation
    (arXiv 1611.05198); the clips to Khoreva et al. (arXiv 1703.09554).

    Args:
        model ([`DeformVosModel`]): Not folded; it stays as it is.
        images (sequence of `PIL.Image.Image` or `np.ndarray`): Frames in which objects are given; arrays are uint8 of
            shape `(height, width, 3)`.
        masks (sequence of `np.ndarray`): Their id maps, integers of shape `(height, width)`; 0 is background.
        config ([`AdaptationConfig`], *optional*): How.
        progress (callable, *optional*): Called with the steps that are done, and all there are.

    Returns:
        [`DeformVosModel`]: in float32 and evaluation mode, on the model's device.

    Raises:
        ValueError: If the model cannot be trained (folded, or exported), an image or a mask is not of that form, they
            do not fit, or no mask shows an object; if a step's gradient is not finite.

    Example:

    ```python
    from hf_deformvos.adaptation import adapt

    adapted = adapt(model, [first_frame], [id_map])
    session = processor.init_video_session(video)
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=id_map)
    for output in adapted.propagate_in_video_iterator(session):
        ...
    ```
    """
    adaptation = Adaptation(model, images, masks, config)
    while adaptation.done < adaptation.total:
        adaptation.step()
        if progress is not None:
            progress(adaptation.done, adaptation.total)
    return adaptation.result()


def _check_trainable(model) -> None:
    """Refuses what has no weights to train."""
    if not isinstance(model, nn.Module):
        raise ValueError("An exported model cannot be adapted: it has no weights to train. Take its checkpoint.")
    if model.backbone.is_folded:
        raise ValueError("A model is adapted before its batch norms are folded: call `adapt`, then `fold_batch_norm`.")


def _prepare(
    images: Sequence[Image.Image | np.ndarray], masks: Sequence[np.ndarray], short_side: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arrays, no larger than the clips, with ids numbered from 1; checked."""
    if len(images) != len(masks) or len(images) == 0:
        raise ValueError(f"Every image needs its mask, got {len(images)} images and {len(masks)} masks.")
    masks = [_checked_mask(number, mask) for number, mask in enumerate(masks)]
    ids = sorted({int(value) for mask in masks for value in np.unique(mask)} - {0})
    if len(ids) >= VOID:
        raise ValueError(f"At most {VOID - 1} objects can be adapted to at once, got {len(ids)}.")
    ready_images, ready_masks = [], []
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        picture = image if isinstance(image, Image.Image) else _as_picture(number, image)
        if mask.shape != (picture.height, picture.width):
            size = (picture.height, picture.width)
            raise ValueError(f"Mask {number} must have the size of its image, {size}, got {mask.shape}.")
        if not mask.any():
            continue
        scale = min(1.0, short_side / min(mask.shape))
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        numbered = Image.fromarray(np.searchsorted(ids, mask, side="right").astype(np.uint8))
        ready_images.append(np.array(to_rgb(picture).resize(size, Image.BILINEAR)))
        ready_masks.append(np.array(numbered.resize(size, Image.NEAREST)))
    if not ready_masks:
        raise ValueError("There is nothing to adapt to: no mask shows an object. Give a mask with ids above 0.")
    if not any(mask.any() for mask in ready_masks):
        raise ValueError(
            f"There is nothing to adapt to: at a short side of {short_side} pixels nothing is left of the objects. "
            "Adapt at a larger `short_side`, or follow them without."
        )
    return ready_images, ready_masks


def _as_picture(number: int, image: np.ndarray) -> Image.Image:
    """An array as a picture; checked."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"Image {number} must be uint8 of shape (height, width, 3), got {image.dtype} {image.shape}.")
    return Image.fromarray(image)


def _checked_mask(number: int, mask: np.ndarray) -> np.ndarray:
    """A mask as an array of ids; checked."""
    mask = np.asarray(mask)
    if mask.dtype.kind not in "biu" or mask.ndim != 2 or mask.min(initial=0) < 0:
        raise ValueError(
            f"Mask {number} must hold integers from 0, of shape (height, width), got {mask.dtype} {mask.shape} with "
            f"values from {mask.min(initial=0)}."
        )
    return mask


def _clip_size(frame: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Height and width of clips: the frame's shape, no more elongated than the augmentation is made for."""
    tokens = max(1, round((short_side - 1) / STRIDE))
    ratio = min(max(frame) / min(frame), _MOST_ELONGATED)
    short, long = (STRIDE * count + 1 for count in (tokens, round(tokens * ratio)))
    return (short, long) if frame[0] <= frame[1] else (long, short)
