"""Processor of DeformVOS: frames and masks in the caller's terms on one side, the network's tensors on the other."""

import os
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import ImageInput
from transformers.utils import logging

from .configuration_deformvos import copy_code_with
from .inference_session_deformvos import DeformVosInferenceSession, as_bool_mask, as_index, as_numpy
from .modeling_deformvos import DeformVosVideoOutput


logger = logging.get_logger(__name__)


class DeformVosProcessor(ProcessorMixin):
    r"""
    Prepares frames, opens inference sessions, takes masks in and gives masks back.

    Args:
        image_processor ([`DeformVosImageProcessor`]): prepares single frames.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor

    >>> model, processor = DeformVosModel(DeformVosConfig()).eval(), DeformVosProcessor(DeformVosImageProcessor())
    >>> frames = np.zeros((3, 96, 160, 3), dtype=np.uint8)
    >>> mask = np.zeros((96, 160), dtype=np.uint8)
    >>> mask[20:60, 40:90] = 1

    >>> session = processor.init_video_session(video=frames)
    >>> processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=mask)
    >>> [output.object_ids for output in model.propagate_in_video_iterator(session)]
    [[1], [1], [1]]
    ```
    """

    def __init__(self, image_processor=None, **kwargs):
        super().__init__(image_processor, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; where it was loaded with its code, all of that is saved, the pipeline's too."""
        if self._auto_class is not None:
            # config.json names the pipeline, whose file no other would bring along.
            from .pipeline_deformvos import DeformVosPipeline

            os.makedirs(save_directory, exist_ok=True)
            custom_object_save(DeformVosPipeline, save_directory)
        if self._auto_class is None and getattr(self.image_processor, "auto_map", None):
            # transformers forgets this part of what was loaded.
            self.auto_map = {"AutoProcessor": "processing_deformvos.DeformVosProcessor"}
        copy_code_with(self, save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __call__(self, images: ImageInput, return_tensors: str | None = "pt", **kwargs):
        """
        Prepare one frame or several.

        Args:
            images: a frame as [`DeformVosImageProcessor`] describes it (a PIL image, or an array or tensor of one,
                three or four channels), a batch, or a list of them.

        Returns:
            `BatchFeature` with `pixel_values` `(batch_size, 3, 16k+1, 16m+1)` and `original_sizes`, a list of
            (height, width).
        """
        return self.image_processor(images, return_tensors=return_tensors, **kwargs)

    def init_video_session(
        self,
        video: Sequence | Iterable | None = None,
        inference_device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        short_side: int | None = None,
        memory_interval: int | None = None,
        long_term_slots: int | None = None,
        device: torch.device | str | None = None,
    ) -> DeformVosInferenceSession:
        """
        Open a session: the state of one video.

        Args:
            video (sequence or iterable of frames, *optional*):
                A list, array `(num_frames, height, width, 3)` or tensor can be read in any order; an iterator (a
                camera, a decoder) forwards only. Frames are prepared as they are needed, none is kept. Without a
                video, hand frames over one at a time: `model(inference_session=session, frame=pixel_values)`.
            inference_device, device (`torch.device` or `str`, *optional*):
                The model's device by default. The model is not moved: the type, such as `cuda`, must be its own.
            dtype (`torch.dtype` or `str`, *optional*):
                Precision to compute in, float32, bfloat16 or float16, no higher than the weights'; the model's by
                default.
            short_side (`int`, *optional*): overrides the processor's `size["shortest_edge"]` for `video`.
            memory_interval, long_term_slots (`int`, *optional*): override the model's configuration.

        Raises:
            ValueError: if the video is empty or an argument is out of range.
        """
        if isinstance(video, (str, bytes, os.PathLike)):
            raise ValueError(
                f"`video` must be frames, got the path {video!r}. `hf_deformvos.video.VideoReader` decodes a file: "
                "`(frame.image for frame in VideoReader(path))`. The pipeline `video-object-segmentation` takes paths."
            )
        if getattr(video, "ndim", 4) != 4:
            raise ValueError(
                f"`video` as an array must be (num_frames, height, width, 3), got {tuple(video.shape)}; a single "
                "frame is `frame[None]`."
            )
        readable = hasattr(video, "__iter__") or hasattr(video, "__getitem__")
        if video is not None and (not readable or isinstance(video, dict)):
            raise ValueError(f"`video` must be frames, as a list or an iterator has them, got {type(video).__name__}.")
        if video is not None and hasattr(video, "__len__") and len(video) == 0:
            raise ValueError("`video` holds no frame.")
        if short_side is not None and as_index(short_side, "short_side") < 1:
            raise ValueError(f"`short_side` must be at least 1, got {short_side}.")

        prepare = partial(self._prepare_video_frame, size_option(self, short_side))
        return DeformVosInferenceSession(
            video, prepare, inference_device or device, dtype, memory_interval, long_term_slots
        )

    def _prepare_video_frame(self, size: dict, frame) -> tuple[torch.Tensor, tuple[int, int]]:
        """A frame of a session's video: pixel values, and (height, width) as it was; `size` of [`size_option`]."""
        frame = getattr(frame, "image", frame)  # of a decoder, as `hf_deformvos.video.VideoReader` is one
        inputs = self.image_processor(frame, return_tensors="pt", **size)
        number = len(inputs["original_sizes"])
        if number > 1:
            raise ValueError(
                f"`video` must be the frames of one video, got {number} frames in place of one: open a "
                "session for each video."
            )
        return inputs["pixel_values"], inputs["original_sizes"][0]

    def add_inputs_to_inference_session(
        self,
        inference_session: DeformVosInferenceSession,
        frame_idx: int,
        obj_ids: int | list[int] | None = None,
        input_masks=None,
        original_size: tuple[int, int] | None = None,
    ):
        """
        Give masks of objects on a frame: new objects, or corrections of known ones, at any frame.

        Args:
            inference_session ([`DeformVosInferenceSession`]): the session.
            frame_idx (`int`): the frame that the masks belong to. In a stream, call this before the frame after it is
                read or handed over: masks of the frame that was segmented last are taken up by segmenting it again,
                see [`~DeformVosInferenceSession.add_masks`].
            obj_ids (`int` or `list[int]`, *optional*):
                The caller's ids, any integers. For an id map: those to take from it; by default all but 0.
            input_masks: an id map `(height, width)` of integers with 0 as background; a palette image; or
                one boolean mask `(num_objects, height, width)` an object, also as a list. Of any size: masks are
                brought to the frame's size by nearest neighbour. Where masks overlap, the later object wins.
            original_size (`tuple[int, int]`, *optional*):
                The frame's (height, width); a mask of another shape of picture is warned about.

        Raises:
            ValueError: if there is no mask or no id, a new object's mask is empty, ids and masks differ in number, or
                a mask holds NaN.
        """
        masks = masks_by_id(input_masks, obj_ids)
        if original_size is not None:
            warn_of_other_size(masks, as_size(original_size))
        inference_session.add_masks(as_index(frame_idx, "frame_idx"), masks)

    def post_process_masks(
        self,
        masks: torch.Tensor | list[torch.Tensor],
        original_sizes: list[tuple[int, int]],
        mask_threshold: float = 0.0,
        binarize: bool = True,
    ) -> list[torch.Tensor]:
        """
        Bring `pred_masks` to the frames' original size. Each pixel goes to the object with the greatest logit, or to
        the background where none exceeds `mask_threshold`, so masks never overlap.

        Args:
            masks (a `torch.Tensor` of shape `(num_objects, 1, height, width)`, or a list of them): `pred_masks` of one
                frame, or of several, which may be stacked.
            original_sizes (`list[tuple[int, int]]`): (height, width) of each frame.
            mask_threshold (`float`, defaults to 0.0): the logit that an object needs.
            binarize (`bool`, defaults to `True`): `False` returns the upsampled logits.

        Returns:
            `list[torch.Tensor]`: bool masks (or logits) of shape `(num_objects, 1, height, width)`.
        """
        masks = [masks] if getattr(masks, "ndim", None) == 4 else list(masks)
        if len(masks) != len(original_sizes):
            raise ValueError(f"{len(masks)} frames of masks came with {len(original_sizes)} original sizes.")
        processed = []
        for logits, original_size in zip(masks, original_sizes, strict=True):
            logits = _upsample(torch.as_tensor(logits), original_size)
            if binarize:
                winner = winners(logits, mask_threshold)
                numbers = torch.arange(1, len(logits) + 1, device=logits.device)
                logits = (winner == numbers[:, None, None]).unsqueeze(1)
            processed.append(logits)
        return processed

    def post_process_id_map(self, output: DeformVosVideoOutput, original_size: tuple[int, int]) -> np.ndarray:
        """
        One frame's masks as `(height, width)` int32 of the caller's object ids, 0 where there is background.

        Args:
            output ([`DeformVosVideoOutput`]): what the model returned for the frame.
            original_size (`tuple[int, int]`): the frame's (height, width).
        """
        ids = np.array([0, *output.object_ids], dtype=np.int32)
        return ids[winners(_upsample(output.pred_masks, original_size)).cpu().numpy()]


def size_option(processor, short_side: int | None) -> dict:
    """The processor's keyword for another bound of the short side; nothing where there is none."""
    if short_side is None:
        return {}
    bounds = {name: side for name, side in dict(processor.image_processor.size).items() if side}
    return {"size": {**bounds, "shortest_edge": short_side}}


def as_size(original_size: Sequence) -> tuple[int, int]:
    """One frame's (height, width); the processor's list of one such pair is as good."""
    pair = original_size[0] if len(original_size) == 1 else original_size
    if np.ndim(pair) != 1 or len(pair) != 2:
        raise ValueError(f"`original_size` must be (height, width), got {original_size!r}.")
    height, width = pair
    return as_index(height, "original_size"), as_index(width, "original_size")


def _upsample(logits: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
    size = as_size(original_size)
    if not len(logits):
        return logits.new_zeros(0, 1, *size, dtype=torch.float32)
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def winners(logits: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """`(N, 1, H, W)` logits against the background to the winner a pixel `(H, W)`: 0 background, n the n-th object."""
    if len(logits) == 0:
        return logits.new_zeros(logits.shape[-2:], dtype=torch.long)
    if len(logits) == 1:
        return (logits[0, 0] > threshold).long()
    best, index = logits.squeeze(1).max(dim=0)
    return (index + 1).masked_fill_(best <= threshold, 0)


def masks_by_id(input_masks, obj_ids) -> dict[int, torch.Tensor]:
    """Any accepted form of masks to bool `(height, width)` by object id; overlaps go to the later object."""
    if input_masks is None:
        raise ValueError("`input_masks` is needed: an id map, or one boolean mask an object.")
    if obj_ids is not None:
        is_one = not isinstance(obj_ids, Iterable) or getattr(obj_ids, "ndim", 1) == 0
        obj_ids = [as_index(obj_id, "obj_ids") for obj_id in ([obj_ids] if is_one else obj_ids)]
        if not obj_ids:
            raise ValueError("`obj_ids` is empty: name an object at least, or leave it out to take all of an id map.")
        if len(set(obj_ids)) != len(obj_ids):
            raise ValueError(f"`obj_ids` must differ from each other, got {obj_ids}.")
        _check_range(obj_ids)
        if 0 in obj_ids:
            raise ValueError(f"0 is the background and no object id; got `obj_ids` {obj_ids}.")
    array = _as_array(input_masks)
    if isinstance(array, np.ndarray) and array.ndim == 2 and (array.dtype != bool or obj_ids is None):
        masks = _split_id_map(array, obj_ids)
    else:
        listed = [array] if isinstance(array, np.ndarray) and array.ndim == 2 else list(array)
        if obj_ids is None and isinstance(array, np.ndarray) and array.ndim == 3 and array.shape[-1] in (3, 4):
            raise ValueError(
                f"`input_masks` is a colour image, {array.shape}: an id map is (height, width), and boolean masks are "
                "(num_objects, height, width)."
            )
        if obj_ids is None or len(obj_ids) != len(listed):
            raise ValueError(
                f"{len(listed)} masks came with `obj_ids` {obj_ids}: boolean masks need one id each. (An id map is "
                "two-dimensional and of integers.)"
            )
        masks = {i: as_bool_mask(mask, f"The mask of object {i}") for i, mask in zip(obj_ids, listed, strict=True)}
    return masks


def _check_range(obj_ids: list[int]):
    beyond = [obj_id for obj_id in obj_ids if not -(2**31) <= obj_id < 2**31]
    if beyond:
        raise ValueError(f"Object ids are 32-bit integers, got {beyond}.")


def _as_array(input_masks):
    """Arrays, tensors and images as one array; a list of masks stays a list, since sizes may differ."""
    if isinstance(input_masks, (str, bytes, os.PathLike, dict)):
        raise ValueError(
            f"`input_masks` must be an id map, or one boolean mask an object, got {input_masks!r:.60}. Open a file "
            "with `PIL.Image.open`."
        )
    if isinstance(input_masks, Image.Image):
        if input_masks.mode not in ("P", "L", "1", "I", "I;16"):
            raise ValueError(
                f"A mask image must hold ids (palette or grey), got mode {input_masks.mode}. Convert colours to ids "
                "first."
            )
        return np.asarray(input_masks)
    if isinstance(input_masks, torch.Tensor):
        return as_numpy(input_masks)
    if isinstance(input_masks, (list, tuple)) and len(input_masks) and np.ndim(input_masks[0]) >= 2:
        return list(input_masks)
    return np.asarray(input_masks)


def _split_id_map(id_map: np.ndarray, obj_ids: list[int] | None) -> dict[int, torch.Tensor]:
    if id_map.dtype.kind == "f":
        if not np.isfinite(id_map).all() or not np.array_equal(id_map, np.rint(id_map)):
            raise ValueError("An id map must hold whole numbers; this one has fractions, NaN or infinite values.")
        id_map = id_map.astype(np.int64)
    present = [int(obj_id) for obj_id in np.unique(id_map) if obj_id != 0]
    _check_range(present)
    if obj_ids is None and not present:
        raise ValueError("The mask is empty: every pixel is 0, the background. Mark at least one object.")
    missing = [obj_id for obj_id in obj_ids or () if obj_id not in present]
    if missing:
        raise ValueError(
            f"The id map holds the ids {present}, and none of {missing}. To give the mask of one object, pass "
            "booleans."
        )
    return {obj_id: torch.from_numpy(id_map == obj_id) for obj_id in (present if obj_ids is None else obj_ids)}


def warn_of_other_size(masks: dict[int, torch.Tensor], original_size: tuple[int, int]):
    for obj_id, mask in masks.items():
        if tuple(mask.shape) != original_size:
            logger.warning(
                f"The mask of object {obj_id} is {mask.shape[0]}x{mask.shape[1]} (height x width), the frame "
                f"{original_size[0]}x{original_size[1]}: it is resized by nearest neighbour."
            )


__all__ = ["DeformVosProcessor"]
