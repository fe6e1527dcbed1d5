"""Whether adapted weights are to be trusted with a video: what they find there, they should find on the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from ..inference import fastest_dtype, prepare_for_inference
from .adapt import AdaptationConfig, adapt, blended


# Where the way back begins, as parts of the way there.
_TURNS = (0.5, 1.0)
# The adapted weights may agree with themselves this much less than those before.
_TOLERANCE = 0.02


def adapt_to_video(
    model,
    processor,
    frames: Sequence[Image.Image | np.ndarray],
    masks: dict[int, np.ndarray],
    config: AdaptationConfig | None = None,
    size: dict | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[torch.nn.Module, float]:
    """
    A copy of a model that has learned the objects of a video's given frames, as far as that does the video good.

    [`adapt`] may do harm, most where an object was hidden and shows again. Whether it does can be seen without ground
    truth: the first `config.check_frames` frames are followed there and back with the weights as they were, with all
    of the adapted ones, and with the share `config.blend` of them. The first of the latter two that agrees with itself
    as well as the weights before ([`round_trip_agreement`]) is returned, else a copy of those before.

    Args:
        model ([`DeformVosModel`]): Not folded; it stays as it is.
        processor ([`DeformVosProcessor`]): Its processor.
        frames (sequence of `PIL.Image.Image` or `np.ndarray`): The video from the first given frame on; arrays are
            uint8 of shape `(height, width, 3)`. Only those that are needed are asked for.
        masks (`dict[int, np.ndarray]`): Id maps by their position in `frames`, 0 among them.
        config ([`AdaptationConfig`], *optional*): How; without `check_frames`, `blend` is trusted.
        size (`dict`, *optional*): The processor's keyword for another size, of
            [`~hf_deformvos.inference.size_option`].
        progress (callable, *optional*): Called with the training steps that are done, and all there are.

    Returns:
        `tuple`: the model, in float32 and not folded, and the share of the adapted weights in it.

    Raises:
        ValueError: See [`adapt`]; also if the first frame has no mask.
    """
    config = config or AdaptationConfig()
    if 0 not in masks:
        raise ValueError(f"The first frame must have a mask, got masks of the frames {sorted(masks)}.")
    given = sorted(masks)
    images, id_maps = [frames[position] for position in given], [masks[position] for position in given]
    if not config.check_frames:
        return adapt(model, images, id_maps, config, progress), config.blend
    adapted = adapt(model, images, id_maps, replace(config, blend=1.0), progress)
    shown = [frames[position] for position in range(min(len(frames), config.check_frames))]

    def agreement(candidate) -> float:
        ready = prepare_for_inference(copy.deepcopy(candidate).eval(), fastest_dtype(model.device.type))
        return round_trip_agreement(ready, processor, shown, masks, size)

    least = agreement(model) - _TOLERANCE
    for share in dict.fromkeys((1.0, config.blend)):
        candidate = blended(adapted, model, share)
        if agreement(candidate) >= least:
            return candidate, share
    return copy.deepcopy(model).float().eval(), 0.0


@torch.no_grad()
def round_trip_agreement(
    model,
    processor,
    frames: Sequence[Image.Image | np.ndarray],
    masks: dict[int, np.ndarray],
    size: dict | None = None,
) -> float:
    """
    How well the masks that a model finds on its way through a video agree with those that it finds on its way back.

    The objects of the first frame are followed to the end; then from the middle, and from the end, back to the first
    frame, with nothing given but what was found where the way back begins. That trackers can be judged so goes back to
    Kalal et al., Forward-backward error (ICPR 2010).

    Args:
        model ([`DeformVosModel`]): As it is to follow, see [`~hf_deformvos.inference.prepare_for_inference`].
        processor ([`DeformVosProcessor`]): Its processor.
        frames (sequence of `PIL.Image.Image` or `np.ndarray`): In their order, all of one size.
        masks (`dict[int, np.ndarray]`): Id maps by position in `frames`, 0 among them; those further on count as well
            on the way there.
        size (`dict`, *optional*): The processor's keyword for another size.

    Returns:
        `float`: intersection over union of both ways' masks, the mean over objects, frames and the two ways back; an
        object that is not there where the way back begins has 0. 1 where there is but one frame.
    """
    obj_ids = [int(obj_id) for obj_id in np.unique(masks[0]) if obj_id]
    there = list(_followed(model, processor, frames, masks, size))
    agreements = []
    for turn in sorted({round(part * (len(there) - 1)) for part in _TURNS} - {0}):
        found, way_back = there[turn], frames[turn::-1]
        back = list(_followed(model, processor, way_back, {0: found}, size)) if found.any() else []
        for obj_id in obj_ids:
            is_there = bool(back) and bool((found == obj_id).any())
            pairs = zip(there[turn - 1 :: -1], back[1:], strict=True) if is_there else ()
            overlaps = [_overlap(one == obj_id, other == obj_id) for one, other in pairs]
            agreements.append(float(np.mean(overlaps)) if overlaps else 0.0)
    return float(np.mean(agreements)) if agreements else 1.0


def _followed(model, processor, frames, masks: dict[int, np.ndarray], size: dict | None) -> Iterator[np.ndarray]:
    """The id map of each frame; of the first, the one that is given."""
    session = processor.init_video_session(video=None, device=model.device, dtype=model.dtype)
    for position, frame in enumerate(frames):
        given = masks.get(position)
        if given is not None and given.any():
            obj_ids = [int(obj_id) for obj_id in np.unique(given) if obj_id]
            layers = np.stack([given == obj_id for obj_id in obj_ids])
            processor.add_inputs_to_inference_session(
                session, frame_idx=position, obj_ids=obj_ids, input_masks=layers, original_size=given.shape
            )
        inputs = processor(images=frame, return_tensors="pt", **(size or {}))
        pixel_values = inputs.pixel_values[0].to(model.device, model.dtype)
        output = model(inference_session=session, frame=pixel_values)
        found = processor.post_process_id_map(output, original_size=inputs.original_sizes[0])
        yield np.asarray(given) if position == 0 else np.asarray(found)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union; 1 where both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0
