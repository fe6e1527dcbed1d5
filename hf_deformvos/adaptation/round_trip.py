"""Whether adapted weights are to be trusted with a video: what they find there, they should find on the way back."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from ..inference import fastest_dtype, prepare_for_inference
from ..inference_session_deformvos import as_index
from .adapt import CAUTIOUS_SHARE, AdaptationConfig, adapt, at_followed_size, blended


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
    of the adapted ones, and with the share `config.blend` of them, three quarters by default. The first of the latter
    two that agrees with itself as well as the weights before ([`round_trip_agreement`]) is returned, else a copy of
    those before.

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
        ValueError: See [`adapt`]; also if the first frame has no mask, or a mask no frame.
    """
    config = at_followed_size(config or AdaptationConfig(), processor, size)
    given = _given_positions(masks)
    try:
        images, id_maps = [frames[position] for position in given], [masks[position] for position in given]
    except LookupError as error:
        raise ValueError(f"Every mask needs its frame; those of {given} are not all there.") from error
    if not config.check_frames:
        return adapt(model, images, id_maps, config, progress), config.share
    adapted = adapt(model, images, id_maps, replace(config, blend=1.0), progress)
    shown = [frames[position] for position in range(min(len(frames), config.check_frames))]

    def agreement(candidate) -> float:
        ready = prepare_for_inference(copy.deepcopy(candidate).eval(), fastest_dtype(model.device.type))
        return round_trip_agreement(ready, processor, shown, masks, size)

    least = agreement(model) - _TOLERANCE
    for share in dict.fromkeys((1.0, CAUTIOUS_SHARE if config.blend is None else config.blend)):
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
            on the way there, and those beyond the last frame do not.
        size (`dict`, *optional*): The processor's keyword for another size.

    Returns:
        `float`: intersection over union of both ways' masks, the mean over objects, frames and the two ways back; an
        object that is not there where the way back begins has 0. 1 where there is but one frame.

    Raises:
        ValueError: If there is no frame, or the first one has no mask.
    """
    _given_positions(masks)
    if not len(frames):
        raise ValueError("There must be a frame to follow objects through, got none.")
    obj_ids = [int(obj_id) for obj_id in np.unique(masks[0]) if obj_id]
    # As the network sees them, which bounds what large frames take.
    ready = [_prepared(model, processor, frame, size) for frame in frames]
    there = [_packed(found) for found in _followed(model, processor, ready, masks)]
    agreements = []
    for turn in sorted({round(part * (len(there) - 1)) for part in _TURNS} - {0}):
        found = _unpacked(there[turn])
        overlaps = {obj_id: [] for obj_id in obj_ids}
        seen = [obj_id for obj_id in obj_ids if (found == obj_id).any()]
        if seen:
            back = _followed(model, processor, ready[turn::-1], {0: found})
            next(back)
            for packed, other in zip(there[turn - 1 :: -1], back, strict=True):
                one = _unpacked(packed)
                for obj_id in seen:
                    overlaps[obj_id].append(_overlap(one == obj_id, other == obj_id))
        agreements += [float(np.mean(each)) if each else 0.0 for each in overlaps.values()]
    return float(np.mean(agreements)) if agreements else 1.0


def _given_positions(masks: dict[int, np.ndarray]) -> list[int]:
    """Which frames have a mask, in order, the first one among them."""
    given = sorted(as_index(position, "masks") for position in masks)
    if not given or given[0] != 0:
        raise ValueError(f"`masks` must hold one of the first frame, 0, and none before it, got those of {given}.")
    return given


def _prepared(model, processor, frame, size: dict | None) -> tuple[torch.Tensor, tuple[int, int]]:
    """A frame's pixels for the network, in its precision, and the size that the frame has."""
    inputs = processor(images=frame, return_tensors="pt", **(size or {}))
    return inputs.pixel_values[0].to(model.dtype), inputs.original_sizes[0]


def _packed(id_map: np.ndarray) -> tuple:
    """An id map in the few bytes that large areas take."""
    small = id_map.astype(np.min_scalar_type(int(id_map.max(initial=0))))
    return zlib.compress(small.tobytes(), level=1), small.dtype, small.shape


def _unpacked(packed: tuple) -> np.ndarray:
    data, dtype, shape = packed
    return np.frombuffer(zlib.decompress(data), dtype).reshape(shape)


def _followed(model, processor, frames, masks: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
    """The id map of each frame, as [`_prepared`] made it; of the first, the one that is given."""
    session = processor.init_video_session(video=None, device=model.device, dtype=model.dtype)
    for position, (pixel_values, original_size) in enumerate(frames):
        given = masks.get(position)
        if given is not None and given.any():
            processor.add_inputs_to_inference_session(session, frame_idx=position, input_masks=given)
        output = model(inference_session=session, frame=pixel_values.to(model.device))
        found = processor.post_process_id_map(output, original_size=original_size)
        yield np.asarray(given) if position == 0 else np.asarray(found)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union; 1 where both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0
