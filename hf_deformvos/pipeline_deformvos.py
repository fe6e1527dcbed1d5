"""The pipeline `video-object-segmentation`: a video and masks of its objects in, a stream of masks out."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline
from transformers.utils import logging

from .inference_session_deformvos import DeformVosInferenceSession, as_index, resize_nearest
from .masks_deformvos import overrule, read_mask
from .modeling_deformvos import DeformVosVideoOutput
from .processing_deformvos import masks_by_id, warn_of_other_size, winners
from .video_source_deformvos import FileSource, VideoError, open_source, read_image, warn_of_damage


logger = logging.get_logger(__name__)

TASK = "video-object-segmentation"
MASK_FORMATS = ("id_map", "binary")


class DeformVosPipeline(Pipeline):
    r"""
    Follows objects through a video, from their masks in one frame or several.

    Frames are read as the results are asked for, and none is kept: memory stays the same however long the video is.

    Args:
        model ([`DeformVosModel`]): the network.
        processor ([`DeformVosProcessor`]): its processor.
        kwargs: those of [`~transformers.Pipeline`] (`device`), and any option of a call, which then is its default.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> segmenter = pipeline(model="deformvos/deformvos-student", trust_remote_code=True)
    >>> for result in segmenter("video.mp4", masks="first_frame.png"):
    ...     print(result["frame_idx"], result["object_ids"], result["scores"], result["id_map"].shape)
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model, *args, **kwargs):
        super().__init__(model, *args, **kwargs)
        if self.processor is None:
            raise ValueError("`processor` is needed: take `AutoProcessor.from_pretrained` of the model's folder.")
        self.model.eval()

    def __call__(
        self,
        video,
        masks,
        mask_frame: int = 0,
        object_ids: int | list[int] | None = None,
        **kwargs,
    ) -> Iterator[dict]:
        r"""
        Args:
            video (`str`, `os.PathLike`, sequence or iterable of frames):
                A video file (read through PyAV), a folder of images, or frames: PIL images or `(height, width, 3)`
                arrays, as a list, an array `(num_frames, height, width, 3)`, or an iterator (a camera, a decoder).
                One video a call: a list is its frames.
            masks:
                The objects on frame `mask_frame`: the path of a PNG, an id map `(height, width)` of integers with 0
                as background, a palette image, or a boolean mask an object, `(num_objects, height, width)` or a list.
                Or a dict of frame to any of these, for corrections and for objects that come later.
            mask_frame (`int`, defaults to 0): the frame that `masks` belongs to, counted from 0.
            object_ids (`int` or `list[int]`, *optional*):
                The ids of boolean masks, 1, 2, ... by default; those to take from an id map, by default all but 0.
            short_side (`int`, *optional*): short side at the network, in pixels; the processor's by default.
            dtype (`torch.dtype` or `str`, *optional*):
                Precision to compute in, float32, bfloat16 or float16; the model's by default.
            start_frame (`int`, *optional*):
                First frame to segment, by default the earliest that has a mask. What lies before it is skipped, but
                for frames that have masks.
            max_frames (`int`, *optional*): how many frames to segment, by default all.
            reverse (`bool`, defaults to `False`):
                Towards the beginning; needs frames at hand, as a folder or a sequence has them.
            mask_format (`str`, defaults to `"id_map"`): `"id_map"` or `"binary"`.

        Returns:
            A generator of one `dict` a frame, in the order of reading: `frame_idx` (`int`); `object_ids`
            (`list[int]`), the objects followed so far; `scores` (`list[float]`), of each object the mean probability
            over its mask, 0.0 where it is not seen; and `id_map`, `(height, width)` int32 with 0 as background, or
            with `mask_format="binary"` `masks`, `(num_objects, height, width)` bool. On frames whose masks were
            given, these objects have them to the pixel.

        Raises:
            ValueError: if the video, a mask or an option cannot be used; some of it when the results are iterated.
            ImportError: if the video is a file and PyAV is not installed.
        """
        preprocess_params, forward_params, postprocess_params = (
            {**defaults, **given}
            for defaults, given in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params),
                self._sanitize_parameters(**kwargs),
                strict=True,
            )
        )
        inputs = {"video": video, "masks": masks, "mask_frame": mask_frame, "object_ids": object_ids}
        prepared = self.preprocess(inputs, **preprocess_params)
        return self._stream(prepared, forward_params, postprocess_params)

    def _sanitize_parameters(
        self,
        short_side: int | None = None,
        dtype: torch.dtype | str | None = None,
        start_frame: int | None = None,
        max_frames: int | None = None,
        reverse: bool | None = None,
        mask_format: str | None = None,
        **unknown,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise ValueError(f"The pipeline has no option {', '.join(sorted(unknown))}.")
        if reverse not in (None, False, True):
            raise ValueError(f"`reverse` must be True or False, got {reverse!r}.")
        if mask_format not in (None, *MASK_FORMATS):
            raise ValueError(f"`mask_format` must be one of {', '.join(MASK_FORMATS)}, got {mask_format!r}.")
        return tuple(
            {name: value for name, value in options.items() if value is not None}
            for options in (
                {"short_side": _whole_number(short_side, "short_side", 1), "dtype": dtype},
                {
                    "start_frame": _whole_number(start_frame, "start_frame", 0),
                    "max_frames": _whole_number(max_frames, "max_frames", 1),
                    "reverse": reverse,
                },
                {"mask_format": mask_format},
            )
        )

    def preprocess(self, input_: dict, short_side: int | None = None, dtype: torch.dtype | str | None = None) -> dict:
        """Open a session on the video and give it the masks: `{"session": ..., "given": frame to id to bool mask}`."""
        masks, object_ids = input_["masks"], input_["object_ids"]
        if not isinstance(masks, dict):
            masks = {as_index(input_["mask_frame"], "mask_frame"): masks}
        given = {as_index(frame_idx, "frame_idx"): _read_masks(mask, object_ids) for frame_idx, mask in masks.items()}
        if not given:
            raise ValueError("`masks` is empty: give the mask of at least one object on at least one frame.")
        session = self.processor.init_video_session(_frames_of(input_["video"]), dtype=dtype, short_side=short_side)
        for frame_idx in sorted(given):
            session.add_masks(frame_idx, given[frame_idx])
        return {"session": session, "given": given}

    def _forward(
        self,
        input_tensors: dict,
        start_frame: int | None = None,
        max_frames: int | None = None,
        reverse: bool = False,
    ) -> Iterator[DeformVosVideoOutput]:
        session, given = input_tensors["session"], input_tensors["given"]
        if session.num_frames is None and start_frame is not None:
            # A session looks back at masks before the start in a sequence alone; a stream is still ahead of them.
            for frame_idx in sorted(frame_idx for frame_idx in given if frame_idx < start_frame):
                self.model(inference_session=session, frame_idx=frame_idx)
        last, count = None, 0
        for output in self.model.propagate_in_video_iterator(
            session, start_frame, None if max_frames is None else max_frames - 1, reverse
        ):
            last, count = output.frame_idx, count + 1
            yield output
        # A stream tells its length only at its end; sequences were checked when they were given the masks.
        needed = max(*given, start_frame or 0)
        if session.num_frames is None and count != max_frames and (last is None or last < needed):
            what = "a mask was given for" if needed in given else "`start_frame` names"
            raise ValueError(f"The video ended before frame {needed}, which {what}; frames count from 0.")

    def postprocess(
        self,
        model_outputs: DeformVosVideoOutput,
        original_size: tuple[int, int],
        given: dict[int, torch.Tensor] | None = None,
        mask_format: str = "id_map",
    ) -> dict:
        """One frame's result; `given` are the masks that it was given, by id."""
        output = model_outputs
        id_map = self.processor.post_process_id_map(output, original_size=original_size)
        if given:
            shown = np.zeros_like(id_map)
            for obj_id, mask in given.items():
                shown[resize_nearest(mask, original_size).numpy()] = obj_id
            id_map = overrule(id_map, shown, list(given))
        result = {"frame_idx": output.frame_idx, "object_ids": list(output.object_ids), "scores": _scores(output)}
        if mask_format == "binary":
            return {**result, "masks": id_map == np.array(output.object_ids, dtype=id_map.dtype)[:, None, None]}
        return {**result, "id_map": id_map}

    def _stream(self, prepared: dict, forward_params: dict, postprocess_params: dict) -> Iterator[dict]:
        """The results, frame by frame, while nothing of a frame outlives its result."""
        session, given = prepared["session"], prepared["given"]
        for output in self._forward(prepared, **forward_params):
            original_size = _original_size(session, output.frame_idx)
            here = given.get(output.frame_idx)
            if here:
                warn_of_other_size(here, original_size)
            yield self.postprocess(output, original_size, here, **postprocess_params)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save model and processor; with the code of all three where they were loaded with it."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


def _whole_number(value, name: str, least: int) -> int | None:
    """An option that counts, or `None` where it is not given."""
    if value is None:
        return None
    number = as_index(value, name)
    if number < least:
        raise ValueError(f"`{name}` must be at least {least}, got {number}.")
    return number


def _frames_of(video):
    """A path's frames; the pictures of a list of paths; frames as they are."""
    if isinstance(video, (list, tuple)) and video and all(_is_file(frame) for frame in video):
        return _Pictures(video)
    if not isinstance(video, (str, os.PathLike)):
        return video
    source = open_source(os.fspath(video))
    return _decode(source) if isinstance(source, FileSource) else source


def _is_file(frame) -> bool:
    return isinstance(frame, (str, os.PathLike)) and os.path.exists(frame)


class _Pictures:
    """Frames in picture files, each read when it is needed, as those of a folder are."""

    def __init__(self, paths: list | tuple):
        self.paths = paths
        try:
            read_image(paths[0])
        except VideoError as error:
            raise ValueError(
                f"`video` must be one video, got a list of {len(paths)} paths, the first of which is no image "
                f"({os.fspath(paths[0])}); call the pipeline once for each video."
            ) from error

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.paths[index])


def _decode(source: FileSource) -> Iterator[np.ndarray]:
    """The images of a video file."""
    frame = None
    for frame in source.frames():
        yield frame.image
    if frame is None:
        raise VideoError(f"{source.name} holds no frame that decodes; is the file complete? Copy it again.")
    warn_of_damage(source)


def _read_masks(mask, object_ids: int | list[int] | None) -> dict[int, torch.Tensor]:
    """One frame's masks of any accepted form, by object id."""
    if isinstance(mask, (str, os.PathLike)):
        mask = read_mask(mask)
    _check_form(mask)
    if object_ids is None and _is_boolean(mask):
        object_ids = list(range(1, len(mask) + 1))
    return masks_by_id(mask, object_ids)


def _check_form(mask):
    """An error for what has the shape of no masks, such as an image with its channels."""
    if isinstance(mask, Image.Image):
        return
    is_list = isinstance(mask, (list, tuple)) and len(mask) > 0
    shape = (len(mask), *np.shape(mask[0])) if is_list else tuple(np.shape(mask))
    # Nobody follows more objects through a video of three columns than it has columns.
    has_channels = len(shape) == 3 and shape[-1] in (1, 3, 4) and shape[0] > shape[-1]
    if len(shape) < 2 or 0 in shape or has_channels:
        raise ValueError(
            "`masks` must be one image's path, an id map (height, width), or one mask an object (num_objects, height, "
            f"width), got {shape if len(shape) > 1 else repr(mask)[:60]}; of an image give the path, or the channel "
            "that holds ids."
        )


def _is_boolean(mask) -> bool:
    """Whether this is one mask an object: three-dimensional, or a list of masks."""
    if isinstance(mask, (list, tuple)):
        return len(mask) > 0 and np.ndim(mask[0]) >= 2
    return getattr(mask, "ndim", 0) > 2


def _original_size(session: DeformVosInferenceSession, frame_idx: int) -> tuple[int, int]:
    """(height, width) of the frame just segmented, which the session still holds."""
    return tuple(int(side) for side in session.source.read(frame_idx)[1])


def _scores(output: DeformVosVideoOutput) -> list[float]:
    """Of each object the mean probability over the pixels that it won, at network resolution."""
    logits = output.pred_masks.float()
    numbers = torch.arange(1, len(logits) + 1, device=logits.device)
    won = winners(logits) == numbers[:, None, None]
    totals = (logits.squeeze(1).sigmoid() * won).sum((1, 2))
    return (totals / won.sum((1, 2)).clamp_min(1)).tolist()


__all__ = ["DeformVosPipeline"]
