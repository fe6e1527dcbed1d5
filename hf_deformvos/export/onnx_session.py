"""
Video object segmentation with an exported DeformVOS: sessions on NumPy, Pillow and onnxruntime, nothing else.

The API is the PyTorch package's. This file needs nothing of that package: `deformvos export` puts a copy of it beside
the graphs, as `deformvos_onnx.py`.

Example:

```python
from deformvos_onnx import OnnxDeformVos

model = OnnxDeformVos.from_pretrained("exported")
processor = model.processor
session = processor.init_video_session(video=frames)
processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=id_map)
for output in model.propagate_in_video_iterator(session):
    ids = processor.post_process_id_map(output, original_size=(480, 854))
```
"""

import copy
import json
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral

import numpy as np
from PIL import Image


logger = logging.getLogger(__name__)

SETTINGS_FILE = "deformvos_export.json"
SETTINGS = ("format", "dtype", "config", "processor", "num_parameters", "outputs", "sha256")
GRAPHS = ("encode", "start", "read", "write")
STRIDE = 16
CHANNELS = (1, 3, 4)
# Resampling overshoots: floats a little beyond 0..1 are in that range still.
OVERSHOOT = 0.25
FRAME = (
    "a PIL image, or an array or tensor of numbers, (height, width), (height, width, channels) or (channels, height, "
    "width), with 1, 3 or 4 channels and at least one pixel"
)
# Logit of a mask that the user gave: e^-10 is below what half precision tells from certainty.
GIVEN_LOGIT = 10.0


@dataclass
class OnnxDeformVosOutput:
    """
    One frame of a session.

    Attributes:
        frame_idx (`int`): position of the frame in the video.
        object_ids (`list[int]`): the caller's ids, in the order of `pred_masks`.
        pred_masks (`np.ndarray` of shape `(num_objects, 1, height, width)`, float32):
            Logit of each object minus logit of the background, at the network's input resolution.
    """

    frame_idx: int
    object_ids: list[int]
    pred_masks: np.ndarray


@dataclass
class Inputs:
    """
    Prepared frames.

    Attributes:
        pixel_values (`np.ndarray` of shape `(num_frames, 3, 16k+1, 16m+1)`, float32): a list of `(3, height, width)`
            where the frames differ in size.
        original_sizes (`list[tuple[int, int]]`): (height, width) of each.
    """

    pixel_values: np.ndarray | list[np.ndarray]
    original_sizes: list[tuple[int, int]]


def read_settings(folder: str | os.PathLike) -> dict:
    """
    What `deformvos export` wrote about the graphs of a folder.

    Raises:
        ValueError: if the folder holds no exported model, or the file is damaged.
    """
    path = os.path.join(folder, SETTINGS_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{os.fspath(folder)} holds no {SETTINGS_FILE}: `deformvos export MODEL OUT` writes such a folder."
        )
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
        missing = [name for name in SETTINGS if name not in settings]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
    except ValueError as error:
        raise ValueError(
            f"{SETTINGS_FILE} of the exported model {os.fspath(folder)} cannot be read ({error}); export it again."
        ) from error
    return settings


class OnnxGraphs:
    """
    The graphs of a folder in onnxruntime.

    Args:
        folder (`str` or `os.PathLike`): what `deformvos export --format onnx` wrote.
        num_threads (`int`, *optional*): threads of an operator; onnxruntime's choice by default.
        providers (`list`, *optional*): onnxruntime's execution providers, the CPU's by default.

    Raises:
        ValueError: if onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike, num_threads: int | None = None, providers: list | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"{os.fspath(folder)} needs onnxruntime: `pip install onnxruntime`.") from error

        self._arguments = os.path.abspath(folder), num_threads, providers
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        providers = providers or ["CPUExecutionProvider"]
        self._sessions = {
            name: onnxruntime.InferenceSession(os.path.join(folder, f"{name}.onnx"), options, providers=providers)
            for name in GRAPHS
        }
        self._outputs = {
            name: [output.name for output in session.get_outputs()] for name, session in self._sessions.items()
        }

    def __reduce__(self) -> tuple:
        # onnxruntime's sessions cannot be pickled.
        return type(self), self._arguments

    def __call__(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a graph by name."""
        return dict(zip(self._outputs[name], self._sessions[name].run(None, inputs), strict=True))


class OnnxDeformVos:
    """
    The network, with its processor as `processor`. It holds no state of a video: any number of sessions can share it.

    Args:
        graphs (`Callable[[str, dict], dict]`): runs a graph by its name, arrays by name in and out.
        settings (`dict`): what [`read_settings`] returns.
    """

    def __init__(self, graphs: Callable[[str, dict], dict], settings: dict):
        self.graphs = graphs
        self.config = settings["config"]
        self.processor = self._make_processor(settings)

    @staticmethod
    def _make_processor(settings: dict) -> "OnnxDeformVosProcessor":
        return OnnxDeformVosProcessor(**settings["processor"])

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, num_threads: int | None = None, providers: list | None = None
    ) -> "OnnxDeformVos":
        """
        Args:
            folder (`str` or `os.PathLike`): what `deformvos export --format onnx` wrote.
            num_threads (`int`, *optional*): threads of an operator; onnxruntime's choice by default.
            providers (`list`, *optional*): onnxruntime's execution providers, the CPU's by default.

        Raises:
            ValueError: if the folder holds no such model.
        """
        settings = read_settings(folder)
        if settings["format"] != "onnx":
            raise ValueError(
                f"{os.fspath(folder)} holds graphs in {settings['format']} format; export with `--format onnx`."
            )
        return cls(OnnxGraphs(folder, num_threads, providers), settings)

    def __call__(
        self, inference_session: "OnnxInferenceSession", frame: np.ndarray | None = None, frame_idx: int | None = None
    ) -> OnnxDeformVosOutput:
        """
        Segment one frame of a session and remember it.

        Args:
            inference_session ([`OnnxInferenceSession`]): the session to advance.
            frame (`np.ndarray` of shape `(3, height, width)`, *optional*):
                `processor(images=frame).pixel_values[0]`; none where the session has a video of its own.
            frame_idx (`int`, *optional*): position of the frame; by default the one after the last.

        Raises:
            ValueError: if no object is known at this frame, the frame's size differs from the frames' before it, it
                holds NaN or infinite values, or a stream is asked to go back.
        """
        return inference_session.step(self, frame, frame_idx)

    def propagate_in_video_iterator(
        self,
        inference_session: "OnnxInferenceSession",
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[OnnxDeformVosOutput]:
        """
        Segment a session's video frame by frame.

        Args:
            inference_session ([`OnnxInferenceSession`]): a session that was opened with `video`.
            start_frame_idx (`int`, *optional*): by default the earliest frame with a mask; of a stream, where it
                stands.
            max_frame_num_to_track (`int`, *optional*): how many frames to go beyond the first.
            reverse (`bool`, defaults to `False`): towards the beginning; the video must be seekable.
            show_progress_bar (`bool`, defaults to `False`): needs tqdm.

        Raises:
            ValueError: if there is no video or no mask, `reverse` is asked of a stream, or `start_frame_idx` lies
                outside the video or before the first mask.
        """
        frames = inference_session.frames_to_visit(self, start_frame_idx, max_frame_num_to_track, reverse)
        if show_progress_bar:
            from tqdm.auto import tqdm

            total = inference_session.count_frames(start_frame_idx, max_frame_num_to_track, reverse)
            frames = tqdm(frames, desc="segment", unit="frame", total=total)
        for frame_idx in frames:
            yield self(inference_session=inference_session, frame_idx=frame_idx)


# Frames and masks


def network_size(height: int, width: int, size: dict[str, int], max_enlargement: float = 1.0) -> tuple[int, int]:
    """
    Size at which the network sees a frame: the short side `size["shortest_edge"]`, or less where the frame would have
    to be enlarged more than `max_enlargement` times or the long side would exceed `size["longest_edge"]`; two tokens
    at least, each side rounded to 16k+1 pixels.
    """
    scale = min(max_enlargement, size["shortest_edge"] / min(height, width))
    if size.get("longest_edge"):
        scale = min(scale, size["longest_edge"] / max(height, width))
    return tuple(max(1, round((side * scale - 1) / STRIDE)) * STRIDE + 1 for side in (height, width))


class OnnxDeformVosProcessor:
    """
    Prepares frames, opens sessions, takes masks in and gives masks back.

    A frame is a PIL image of any mode, or an array or tensor `(height, width)`, `(height, width, channels)` or
    `(channels, height, width)` of 1, 3 or 4 channels, alpha being dropped: whole numbers in 0..255, or floating-point
    numbers in 0..255 or 0..1. Sixteen-bit PIL images are brought to eight bits: those of mode `I;16` always, those of
    mode `I` where a value exceeds 255.

    Where the first side and the last may both be channels, as in a frame of three rows or columns, an array's are the
    last and a tensor's the first.

    Args:
        size (`dict[str, int]`): upper bounds of the sides, `shortest_edge` and, optionally, `longest_edge`, in pixels.
        resample (`int`): Pillow's resampling filter.
        rescale_factor (`float`): of pixel values, before the normalisation.
        image_mean, image_std (sequences of three `float`): of the normalisation.
        max_enlargement (`float`): how many times larger a small frame is made at most.
    """

    def __init__(
        self,
        size: dict,
        resample: int,
        rescale_factor: float,
        image_mean: Sequence,
        image_std: Sequence,
        max_enlargement: float = 1.0,
    ):
        self.size = _bounds(size)
        self.max_enlargement = max_enlargement
        self.resample = resample
        mean, deviation = (np.asarray(values, dtype=np.float32)[:, None, None] for values in (image_mean, image_std))
        self._scale = (np.float32(rescale_factor) / deviation).astype(np.float32)
        self._shift = -mean / deviation

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "OnnxDeformVosProcessor":
        """The processor of an exported folder; `ValueError` where it holds none."""
        return cls(**read_settings(folder)["processor"])

    def __call__(self, images, size: dict | None = None, return_tensors: str | None = None) -> Inputs:
        """
        Prepare one frame or several.

        Args:
            images: a frame, a batch of four dimensions, or a list of them.
            size (`dict`, *optional*): instead of the processor's.
            return_tensors (`str`, *optional*): `"np"` or `None`, which is the same.

        Raises:
            ValueError: for what is no frame, NaN, values that are no colours, or a `size` that is none.
        """
        if return_tensors not in (None, "np"):
            raise ValueError(f'`return_tensors` must be "np", got {return_tensors!r}: there are arrays alone here.')
        return self.prepare(images, size)

    def prepare(self, images, size: dict | None = None) -> Inputs:
        """As [`~OnnxDeformVosProcessor.__call__`]."""
        size = self.size if size is None else _bounds(size)
        if "shortest_edge" not in size:
            raise ValueError(f'`size` needs "shortest_edge", the bound of the short side in pixels; got {size}.')
        pixel_values, original_sizes = [], []
        for index, image in enumerate(_each_frame(images)):
            frame = _to_uint8_rgb(image, index)
            original_sizes.append(frame.shape[:2])
            height, width = network_size(*frame.shape[:2], size, self.max_enlargement)
            resized = np.asarray(Image.fromarray(frame).resize((width, height), self.resample))
            # Multiplied as it is cast: no float32 copy of the picture besides the result.
            pixels = np.multiply(np.moveaxis(resized, -1, 0), self._scale, order="C", dtype=np.float32)
            pixels += self._shift
            pixel_values.append(pixels)
        if not pixel_values:
            raise ValueError(f"`images` holds no frame, got an empty {type(images).__name__}. A frame is {FRAME}.")
        if len({pixels.shape for pixels in pixel_values}) == 1:
            pixel_values = pixel_values[0][None] if len(pixel_values) == 1 else np.stack(pixel_values)
        return Inputs(pixel_values, original_sizes)

    def init_video_session(
        self,
        video: Sequence | Iterable | None = None,
        short_side: int | None = None,
        memory_interval: int | None = None,
        long_term_slots: int | None = None,
    ) -> "OnnxInferenceSession":
        """
        Open a session: the state of one video.

        Args:
            video (sequence or iterable of frames, *optional*):
                A list or an array `(num_frames, height, width, 3)` can be read in any order; an iterator (a camera, a
                decoder) forwards only. Frames are prepared as they are needed, none is kept. Without a video, hand
                frames over one at a time: `model(inference_session=session, frame=pixel_values)`.
            short_side (`int`, *optional*): overrides the processor's `size["shortest_edge"]` for `video`.
            memory_interval, long_term_slots (`int`, *optional*): override the model's configuration.

        Raises:
            ValueError: if the video is empty or an argument is out of range.
        """
        if isinstance(video, (str, bytes, os.PathLike)):
            raise ValueError(f"`video` must be frames, got the path {video!r}; decode it, as PyAV does.")
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
        size = self.size if short_side is None else {**self.size, "shortest_edge": short_side}
        return OnnxInferenceSession(video, partial(self._prepare_video_frame, size), memory_interval, long_term_slots)

    def _prepare_video_frame(self, size: dict[str, int], frame) -> tuple[np.ndarray, tuple[int, int]]:
        """A frame of a session's video: pixel values, and (height, width) as it was."""
        inputs = self.prepare(getattr(frame, "image", frame), size)
        number = len(inputs.original_sizes)
        if number > 1:
            raise ValueError(
                f"`video` must be the frames of one video, got {number} frames in place of one: open a "
                "session for each video."
            )
        return inputs.pixel_values, inputs.original_sizes[0]

    def add_inputs_to_inference_session(
        self,
        inference_session: "OnnxInferenceSession",
        frame_idx: int,
        obj_ids: int | list[int] | None = None,
        input_masks=None,
        original_size: tuple[int, int] | None = None,
    ):
        """
        Give masks of objects on a frame: new objects, or corrections of known ones, at any frame.

        Args:
            inference_session ([`OnnxInferenceSession`]): the session.
            frame_idx (`int`): the frame that the masks belong to. In a stream, call this before the frame after it is
                read or handed over: masks of the frame that was segmented last are taken up by segmenting it again,
                see [`~OnnxInferenceSession.add_masks`].
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
            expected = as_size(original_size)
            for obj_id, mask in masks.items():
                if mask.shape != expected:
                    logger.warning(
                        f"The mask of object {obj_id} is {mask.shape[0]}x{mask.shape[1]} (height x width), the frame "
                        f"{expected[0]}x{expected[1]}: it is resized by nearest neighbour."
                    )
        inference_session.add_masks(as_index(frame_idx, "frame_idx"), masks)

    def post_process_masks(
        self,
        masks: np.ndarray | list[np.ndarray],
        original_sizes: list[tuple[int, int]],
        mask_threshold: float = 0.0,
        binarize: bool = True,
    ) -> list[np.ndarray]:
        """
        Bring `pred_masks` to the frames' original size. Each pixel goes to the object with the greatest logit, or to
        the background where none exceeds `mask_threshold`, so masks never overlap.

        Args:
            masks (an array of shape `(num_objects, 1, height, width)`, or a list of them): `pred_masks` of one frame,
                or of several, which may be stacked.
            original_sizes (`list[tuple[int, int]]`): (height, width) of each frame.
            mask_threshold (`float`, defaults to 0.0): the logit that an object needs.
            binarize (`bool`, defaults to `True`): `False` returns the upsampled logits.

        Returns:
            `list[np.ndarray]`: bool masks (or logits) of shape `(num_objects, 1, height, width)`.
        """
        masks = [masks] if getattr(masks, "ndim", None) == 4 else list(masks)
        if len(masks) != len(original_sizes):
            raise ValueError(f"{len(masks)} frames of masks came with {len(original_sizes)} original sizes.")
        processed = []
        for logits, original_size in zip(masks, original_sizes, strict=True):
            size = as_size(original_size)
            if binarize:
                numbers = np.arange(1, len(logits) + 1)[:, None, None, None]
                processed.append(winners(logits, size, mask_threshold) == numbers)
            else:
                upsampled = np.empty((len(logits), 1, *size), dtype=np.float32)
                for channel, place in zip(logits, upsampled, strict=True):
                    place[0] = resize_bilinear(channel[0], size, align_corners=False)
                processed.append(upsampled)
        return processed

    def post_process_id_map(self, output: OnnxDeformVosOutput, original_size: tuple[int, int]) -> np.ndarray:
        """
        One frame's masks as `(height, width)` int32 of the caller's object ids, 0 where there is background.

        Args:
            output ([`OnnxDeformVosOutput`]): what the model returned for the frame.
            original_size (`tuple[int, int]`): the frame's (height, width).
        """
        ids = np.array([0, *output.object_ids], dtype=np.int32)
        return ids[winners(output.pred_masks, as_size(original_size))]


def _bounds(size: dict) -> dict[str, int]:
    """The sides of `size` that are given; those that are no lengths are refused."""
    bounds = {name: side for name, side in dict(size).items() if side is not None}
    for name, side in bounds.items():
        if not isinstance(side, Integral) or side < 1:
            raise ValueError(f'`size["{name}"]` must be a positive integer, a bound in pixels; got {side!r}.')
    return bounds


def _each_frame(images) -> Iterator:
    """The frames of lists, iterators and four-dimensional batches, one after the other."""
    if isinstance(images, (list, tuple, Iterator)):
        for image in images:
            yield from _each_frame(image)
    elif getattr(images, "ndim", None) == 4:
        yield from images
    else:
        yield images


def _checked(image, index: int) -> Image.Image | np.ndarray:
    """A picture as it is, anything else as an array of numbers; `ValueError` for what is no frame."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"Frame {index} must be {FRAME}; got a picture of {image.width}x{image.height}.")
        return image
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        # NumPy has no such type.
        image = image.float() if str(image.dtype) == "torch.bfloat16" else image
    if not hasattr(image, "__array__"):
        raise ValueError(f"Frame {index} must be {FRAME}; got {type(image).__name__}.")
    array = np.asarray(image)
    if array.dtype == bool:
        raise ValueError(
            f"Frame {index} must hold colours or greys, got bool of shape {array.shape}. For black and white give "
            "`frame * 255`; masks go to `add_inputs_to_inference_session`."
        )
    has_channels = array.ndim == 3 and not {array.shape[0], array.shape[-1]}.isdisjoint(CHANNELS)
    if array.dtype.kind not in "iuf" or array.size == 0 or not (array.ndim == 2 or has_channels):
        raise ValueError(f"Frame {index} must be {FRAME}; got {array.dtype} of shape {array.shape}.")
    return array


def _picture_to_array(picture: Image.Image) -> np.ndarray:
    """A picture to `(height, width, 3)` uint8, or to `(height, width)` where it has more than eight bits of grey."""
    if picture.mode == "F":
        return np.asarray(picture)
    if not picture.mode.startswith("I"):
        return np.asarray(picture.convert("RGB"))
    # Pillow would clip these instead of scaling them.
    grey = np.asarray(picture)
    if picture.mode == "I" and not (grey.min() >= 0 and 255 < grey.max() <= 65535):
        return grey
    return (grey >> 8).astype(np.uint8)


def _to_uint8_rgb(image, index: int) -> np.ndarray:
    """
    A frame of any usual kind to `(height, width, 3)` uint8; alpha is dropped.

    Raises:
        ValueError: for what is no frame, NaN, or values that are no colours.
    """
    is_tensor = hasattr(image, "detach")
    image = _checked(image, index)
    if isinstance(image, Image.Image):
        image = _picture_to_array(image)
    elif image.ndim == 3 and image.shape[0] in CHANNELS and (is_tensor or image.shape[-1] not in CHANNELS):
        image = np.moveaxis(image, 0, -1)
    if image.ndim == 2:
        image = image[..., None]
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            raise ValueError(f"Frame {index} holds NaN or infinite values.")
        if image.min() >= -OVERSHOOT and image.max() <= 1 + OVERSHOOT:
            image = image.clip(0, 1) * 255
        image = np.rint(image)
    if image.dtype != np.uint8:
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"Frame {index} has values from {image.min()} to {image.max()}; they must lie in 0..255, in 0..1 for "
                "floating-point frames, or in 0..65535 for PIL images of 16 bits."
            )
        image = image.astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image[..., :3], (*image.shape[:2], 3)))


def as_index(value, name: str) -> int:
    """
    A whole number of any type.

    Raises:
        ValueError: if it is none.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.") from error


def as_size(original_size: Sequence) -> tuple[int, int]:
    """One frame's (height, width); the processor's list of one such pair is as good."""
    pair = original_size[0] if len(original_size) == 1 else original_size
    if np.ndim(pair) != 1 or len(pair) != 2:
        raise ValueError(f"`original_size` must be (height, width), got {original_size!r}.")
    height, width = pair
    return as_index(height, "original_size"), as_index(width, "original_size")


def masks_by_id(input_masks, obj_ids) -> dict[int, np.ndarray]:
    """Any accepted form of masks to bool `(height, width)` by object id."""
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
        return _split_id_map(array, obj_ids)
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
    return {i: _as_bool_mask(mask, f"The mask of object {i}") for i, mask in zip(obj_ids, listed, strict=True)}


def _check_range(obj_ids: list[int]):
    beyond = [obj_id for obj_id in obj_ids if not -(2**31) <= obj_id < 2**31]
    if beyond:
        raise ValueError(f"Object ids are 32-bit integers, got {beyond}.")


def _as_array(input_masks):
    """Arrays and images as one array; a list of masks stays a list, since sizes may differ."""
    if isinstance(input_masks, (str, bytes, os.PathLike, dict)):
        raise ValueError(
            f"`input_masks` must be an id map, or one boolean mask an object, got {input_masks!r:.60}. Open a file "
            "with `PIL.Image.open`."
        )
    if isinstance(input_masks, Image.Image) and input_masks.mode not in ("P", "L", "1", "I", "I;16"):
        raise ValueError(
            f"A mask image must hold ids (palette or grey), got mode {input_masks.mode}. Convert colours to ids first."
        )
    if isinstance(input_masks, (list, tuple)) and len(input_masks) and np.ndim(input_masks[0]) >= 2:
        return list(input_masks)
    return np.asarray(input_masks)


def _split_id_map(id_map: np.ndarray, obj_ids: list[int] | None) -> dict[int, np.ndarray]:
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
    return {obj_id: id_map == obj_id for obj_id in (present if obj_ids is None else obj_ids)}


def _as_bool_mask(mask, name: str) -> np.ndarray:
    """One object's mask as `(height, width)` bool."""
    array = np.asarray(mask)
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"{name} must be (height, width), got {tuple(array.shape)}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values.")
    marked = array[array != 0] if array.dtype.kind in "iu" else array[:0]
    if marked.size and marked.min() != marked.max():
        raise ValueError(
            f"{name} holds several values ({marked.min()} and {marked.max()}), which may be ids: give an id map with "
            "two dimensions, or a mask of 0 and 1 for each object (`ids == 1`, `gray > 127`)."
        )
    return array > 0.5 if array.dtype.kind == "f" else array != 0


# Resampling, as PyTorch does it


def _linear_taps(source: int, target: int, align_corners: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every target position the two source positions that it lies between, and its distance from the first."""
    positions = np.arange(target, dtype=np.float32)
    if align_corners:
        positions *= np.float32((source - 1) / (target - 1) if target > 1 else 0.0)
    else:
        positions = np.maximum((positions + np.float32(0.5)) * np.float32(source / target) - np.float32(0.5), 0)
    near = np.minimum(positions.astype(np.int64), source - 1)
    return near, np.minimum(near + 1, source - 1), positions - near.astype(np.float32)


def resize_bilinear(values: np.ndarray, size: tuple[int, int], align_corners: bool) -> np.ndarray:
    """`(height, width)` float32 to another size, without antialiasing."""
    if values.shape == tuple(size):
        return values
    for axis in (0, 1):
        near, far, distance = _linear_taps(values.shape[axis], size[axis], align_corners)
        first = values.take(near, axis)
        difference = values.take(far, axis)
        difference -= first
        difference *= distance[:, None] if axis == 0 else distance
        values = np.add(first, difference, out=first)
    return values


def resize_nearest(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`(height, width)` bool to another size, pixel centres on pixel centres."""
    if mask.shape == tuple(size):
        return mask
    rows, columns = (
        # In float32, whose rounding decides which of two pixels is nearest.
        np.minimum(((np.arange(target, dtype=np.float32) + 0.5) * np.float32(source / target)).astype(int), source - 1)
        for source, target in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]


def winners(logits: np.ndarray, size: tuple[int, int], threshold: float = 0.0) -> np.ndarray:
    """
    `(N, 1, h, w)` logits against the background to the winner of each pixel at another size, `(height, width)`: 0
    background, n the n-th object.
    """
    best = np.full(size, threshold, dtype=np.float32)
    index = np.zeros(size, dtype=np.int32)
    for number, channel in enumerate(logits, 1):
        upsampled = resize_bilinear(channel[0], size, align_corners=False)
        better = upsampled > best
        index[better] = number
        np.maximum(best, upsampled, out=best)
    return index


def _shares(mask: np.ndarray) -> np.ndarray:
    """`(H, W)` bool to its share of the 5x5 pixels around each point of stride 4, float32."""
    sums = mask.astype(np.int64)
    count = 1
    for axis in (0, 1):
        side = sums.shape[axis]
        centres = np.arange(0, side, 4)
        first, last = np.maximum(centres - 2, 0), np.minimum(centres + 3, side)
        total = np.cumsum(sums, axis)
        total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis)
        sums = total.take(last, axis) - total.take(first, axis)
        count = count * (last - first)[:, None] if axis == 0 else count * (last - first)
    return sums.astype(np.float32) / count.astype(np.float32)


# The state of a video


class FrameSource:
    """
    Where a session's frames come from. Invariant: at most one decoded frame is held.

    A list, array or other sequence can be read in any order; an iterator only forwards, each frame once.
    """

    class End(IndexError):
        """The video has no such frame; an `IndexError` of the video's own code is no end of it."""

    def __init__(self, video: Sequence | Iterable, prepare: Callable):
        self._prepare = prepare
        self.is_seekable = hasattr(video, "__getitem__") and hasattr(video, "__len__")
        self._video = video if self.is_seekable else iter(video)
        self._next_idx = 0
        self._held: tuple[int, np.ndarray, tuple[int, int]] | None = None

    @property
    def num_frames(self) -> int | None:
        """Number of frames, `None` where only the end of the stream will tell."""
        return len(self._video) if self.is_seekable else None

    @property
    def first_readable(self) -> int:
        """The earliest frame that can still be read."""
        if self.is_seekable:
            return 0
        return self._next_idx if self._held is None else self._held[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the frame held."""
        return 0 if self._held is None else self._held[1].nbytes

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the video's frames: of the one held, or of the next that can be read."""
        return self.read(self.first_readable if self._held is None else self._held[0])[1]

    def read(self, frame_idx: int) -> tuple[np.ndarray, tuple[int, int]]:
        """
        Prepared frame `(1, 3, height, width)` and its original (height, width).

        Raises:
            FrameSource.End: past the end of the video.
            ValueError: if a stream is asked for a frame that has passed, or the frame cannot be used.
        """
        if self._held is None or self._held[0] != frame_idx:
            self._held = None
            frame = self._fetch(frame_idx)
            try:
                self._held = (frame_idx, *self._prepare(frame))
            except ValueError as error:
                raise ValueError(f"Frame {frame_idx} of the video cannot be used: {error}") from error
        return self._held[1:]

    def _fetch(self, frame_idx: int):
        if self.is_seekable:
            if not 0 <= frame_idx < len(self._video):
                raise self.End(f"There is no frame {frame_idx} in a video of {len(self._video)} frames.")
            return self._video[frame_idx]
        if frame_idx < self._next_idx:
            raise ValueError(
                f"Frame {frame_idx} has passed: this video is a stream that is read forwards, and frame "
                f"{self._next_idx} is next. Give the video as a list or array of frames to go back."
            )
        for frame in self._video:
            self._next_idx += 1
            if self._next_idx > frame_idx:
                return frame
        raise self.End(f"There is no frame {frame_idx}: the stream ended after {self._next_idx} frames.")


class ObjectTable:
    """
    The caller's object ids and their places. Invariant: an id keeps its place for as long as it is tracked; a place is
    a group and a slot of the network's identity bank.
    """

    def __init__(self, max_objects: int):
        self.max_objects = max_objects
        self._places: dict[int, int] = {}

    @property
    def object_ids(self) -> list[int]:
        return list(self._places)

    @property
    def num_groups(self) -> int:
        return max((place // self.max_objects + 1 for place in self._places.values()), default=0)

    def add(self, obj_id: int):
        """Give a new id the lowest free place."""
        if obj_id not in self._places:
            taken = set(self._places.values())
            self._places[obj_id] = next(place for place in range(len(taken) + 1) if place not in taken)

    def remove(self, obj_id: int) -> tuple[int, int]:
        """Free the id's place and return it."""
        return divmod(self._places.pop(obj_id), self.max_objects)

    def place(self, obj_id: int) -> tuple[int, int]:
        """(group, slot) of an id."""
        return divmod(self._places[obj_id], self.max_objects)

    def valid(self, without: set[int] = frozenset()) -> np.ndarray:
        """Which channels (background, slots) of each group are in use, `(G, 1 + max_objects)` bool."""
        valid = np.zeros((self.num_groups, 1 + self.max_objects), dtype=bool)
        valid[:, 0] = True
        for obj_id in self._places.keys() - without:
            group, slot = self.place(obj_id)
            valid[group, 1 + slot] = True
        return valid


@dataclass
class MemoryFrame:
    """
    One remembered frame, for `L` layers, `G` groups of objects and `h x w` tokens.

    Attributes:
        frame_idx (`int`): its position in the video.
        keys, values (`np.ndarray` of shapes `(L, key_size, h, w)` and `(L, value_size * (1 + G), h, w)`).
        identification (`np.ndarray` of shape `(L - 1, G, hidden_size, h, w)`, *optional*): of several layers.
        masks (`np.ndarray` of shape `(G, 1 + max_objects, 4h-3, 4w-3)`): probabilities of background and slots.
        is_reference (`bool`): whether the user gave masks on this frame.
    """

    frame_idx: int
    keys: np.ndarray
    values: np.ndarray
    identification: np.ndarray | None
    masks: np.ndarray
    is_reference: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (self.keys, self.values, self.masks, self.identification)
        return sum(array.nbytes for array in arrays if array is not None)


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
    _stacked: tuple[np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict:
        # A copy's frames would no longer look into the stack.
        return {**vars(self), "_stacked": None}

    def write(self, frame: MemoryFrame, to_long_term: bool):
        """Make `frame` the previous frame, and a long-term one where asked; evict what exceeds the bound."""
        self.previous = frame
        held = next((i for i, kept in enumerate(self.long_term) if kept.frame_idx == frame.frame_idx), None)
        if held is not None:
            # Seen again: a correction replaces what was there; a prediction is worth less than a reference.
            if frame.is_reference or not self.long_term[held].is_reference:
                self.long_term[held] = frame
                self._stacked = None
            return
        if not (to_long_term or frame.is_reference):
            return
        self._stacked = None
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

    def stacked(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of the long-term frames, `(L, S, channels, h, w)`, made anew only when they change."""
        if self._stacked is None:
            keys = np.stack([frame.keys for frame in self.long_term], axis=1)
            values = np.stack([frame.values for frame in self.long_term], axis=1)
            # The frames look into the stack: nothing is held twice.
            for slot, frame in enumerate(self.long_term):
                frame.keys, frame.values = keys[:, slot], values[:, slot]
            self._stacked = keys, values
        return self._stacked

    def frames(self) -> list[MemoryFrame]:
        """Every frame held, each once."""
        held = list(self.long_term)
        if self.previous is not None and all(self.previous is not frame for frame in held):
            held.append(self.previous)
        return held

    def replace(self, change: Callable[[MemoryFrame], MemoryFrame]):
        """Put what `change` makes of a frame in its place; a frame that is held twice is changed once."""
        changed = {id(frame): change(frame) for frame in self.frames()}
        self.long_term = [changed[id(frame)] for frame in self.long_term]
        self.previous = changed[id(self.previous)]
        self._stacked = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays held."""
        return sum(frame.num_bytes for frame in self.frames())


class OnnxInferenceSession:
    """
    State of one video's segmentation. Made by [`OnnxDeformVosProcessor.init_video_session`]; any number of sessions
    can run on one model.

    `copy.deepcopy` of a session is a snapshot, from which it can go on another way: the model, and a video that can be
    read in any order, are shared.

    Args:
        video (sequence or iterable of frames, *optional*):
            Frames to be read as they are needed; none when frames are handed over one by one.
        prepare (`Callable`, *optional*):
            Turns a frame into (`(1, 3, height, width)` array, (original height, original width)).
        memory_interval, long_term_slots (`int`, *optional*): override the model's configuration.
    """

    def __init__(
        self,
        video: Sequence | Iterable | None = None,
        prepare: Callable | None = None,
        memory_interval: int | None = None,
        long_term_slots: int | None = None,
    ):
        for name, value in (("memory_interval", memory_interval), ("long_term_slots", long_term_slots)):
            if value is not None and as_index(value, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.source = None if video is None else FrameSource(video, prepare)
        self.memory_interval = memory_interval
        self.long_term_slots = long_term_slots
        self.reset_tracking_data()

    def __deepcopy__(self, memo: dict) -> "OnnxInferenceSession":
        memo[id(self._model)] = self._model
        if self.source is not None and self.source.is_seekable:
            memo[id(self.source._video)] = self.source._video
        snapshot = copy.copy(self)
        snapshot.__dict__.update(copy.deepcopy(vars(self), memo))
        return snapshot

    def reset_tracking_data(self):
        """Forget objects, inputs and memory; keep the video, so that other objects can be followed through it."""
        self._inputs: dict[int, dict[int, np.ndarray]] = {}
        self._last_frame_idx: int | None = None
        self._restart()

    def reset_inference_session(self):
        """Forget everything, the video included."""
        self.source = None
        self.reset_tracking_data()

    def _restart(self):
        """Forget what was seen; the stream's position stays."""
        self._model: OnnxDeformVos | None = None
        self._objects: ObjectTable | None = None
        self._memory: MemoryBank | None = None
        self._frame_size: tuple[int, int] | None = None
        self._origin: int | None = None

    @property
    def _is_seekable(self) -> bool:
        """Whether there is a video that can be read in any order: masks stay then, for the next propagation."""
        return self.source is not None and self.source.is_seekable

    @property
    def _is_stream(self) -> bool:
        """Whether there is a video that is read forwards, each frame once."""
        return self.source is not None and not self.source.is_seekable

    @property
    def num_frames(self) -> int | None:
        """Number of frames of the video, where that is known."""
        return None if self.source is None else self.source.num_frames

    @property
    def video_height(self) -> int | None:
        """Height of the video's frames in pixels, for `post_process_masks`; `None` where frames are handed over."""
        return None if self.source is None else int(self.source.original_size[0])

    @property
    def video_width(self) -> int | None:
        """Width of the video's frames in pixels; see [`video_height`]."""
        return None if self.source is None else int(self.source.original_size[1])

    @property
    def object_ids(self) -> list[int]:
        """Ids followed so far, then those whose first frame is still to come, in the order they were given."""
        ids = [] if self._objects is None else self._objects.object_ids
        for frame_idx in sorted(self._inputs):
            ids += [obj_id for obj_id in self._inputs[frame_idx] if obj_id not in ids]
        return ids

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays that the session holds: inputs still needed, the memory, and the frame at hand."""
        held = sum(mask.nbytes for masks in self._inputs.values() for mask in masks.values())
        held += 0 if self.source is None else self.source.num_bytes
        return held + (0 if self._memory is None else self._memory.num_bytes)

    @property
    def _is_empty(self) -> bool:
        """Whether there is nothing to segment from."""
        return self._memory is None or self._memory.previous is None

    def add_masks(self, frame_idx: int, masks: dict[int, np.ndarray]):
        """
        Give objects' masks on a frame: of new objects, or corrections of known ones. Where masks overlap, the one
        given last wins. While a propagation runs, masks of frames ahead of it join when they are reached; those of
        frames behind it count from the next propagation on.

        A stream still holds the frame that was segmented last. Masks given for it are taken up before the next frame
        is read: a propagation that is running does so without yielding that frame again; the next one starts there,
        as does the next call of the model without `frame_idx`.

        An empty mask says that an object is not to be seen. Of a stream, or of frames that are handed over, it must be
        followed by then, or have pixels on an earlier frame that is still to come. Of a video that can be read in any
        order it must have pixels on another frame, earlier or later, whatever was propagated before: a propagation in
        either direction that has not met the object yet passes over its empty masks.

        Args:
            frame_idx (`int`): the frame, which must not have passed if the video is a stream.
            masks (`dict[int, np.ndarray]`): object id to `(height, width)` bool, any size, of one frame.

        Raises:
            ValueError: if an object that is not followed at that frame has an empty mask, or the video has no such
                frame, or has it no longer.
        """
        self._check_frame_idx(frame_idx)
        known = self._known_at(frame_idx)
        for obj_id, mask in masks.items():
            if obj_id not in known and not mask.any():
                raise ValueError(
                    f"The mask of object {obj_id} on frame {frame_idx} is empty. A new object needs at least one "
                    "pixel; an empty mask is only a correction of an object that is already followed, or marked on "
                    f"{'another' if self._is_seekable else 'an earlier'} frame."
                )
        given = self._inputs.setdefault(frame_idx, {})
        for obj_id, mask in masks.items():
            given.pop(obj_id, None)  # the order is that of giving
            given[obj_id] = mask

    def _known_at(self, frame_idx: int) -> set[int]:
        """Objects that an empty mask on this frame may correct, see [`add_masks`]."""
        if self._is_seekable:
            known, others = set(), [masks for at, masks in self._inputs.items() if at != frame_idx]
        else:
            known = set() if self._objects is None else set(self._objects.object_ids)
            others = [masks for at, masks in self._inputs.items() if at < frame_idx]
        return known | {obj_id for masks in others for obj_id, mask in masks.items() if mask.any()}

    def _given(self, frame_idx: int) -> dict[int, np.ndarray]:
        """The frame's masks, without empty ones of objects that are not followed: there is nothing to correct."""
        followed = () if self._objects is None else self._objects.object_ids
        masks = self._inputs.get(frame_idx, {})
        return {obj_id: mask for obj_id, mask in masks.items() if obj_id in followed or mask.any()}

    def _marked(self) -> list[int]:
        """The frames on which any pixel was given, from which a propagation can start."""
        return sorted(at for at, masks in self._inputs.items() if any(mask.any() for mask in masks.values()))

    def _check_frame_idx(self, frame_idx: int):
        if frame_idx < 0:
            raise ValueError(f"`frame_idx` must not be negative, got {frame_idx}.")
        if self.source is None:
            if self._last_frame_idx is not None and frame_idx < self._last_frame_idx:
                raise ValueError(
                    f"Frame {frame_idx} has passed: frame {self._last_frame_idx} was handed over last. Masks are "
                    "given for that frame or a later one, and then it is handed over (again)."
                )
            return
        if self.num_frames is not None and frame_idx >= self.num_frames:
            raise ValueError(f"`frame_idx` must be below the video's {self.num_frames} frames, got {frame_idx}.")
        if frame_idx < self.source.first_readable:
            raise ValueError(
                f"Frame {frame_idx} has passed: this video is a stream, and frame {self.source.first_readable} is the "
                "earliest that masks can still be given for."
            )

    def remove_object(self, obj_id: int):
        """
        Stop following an object and take it out of the memory; its pixels become background.

        Raises:
            ValueError: if the id is unknown.
        """
        if obj_id not in self.object_ids:
            raise ValueError(f"Object {obj_id} is unknown to this session, which follows {self.object_ids or 'none'}.")
        if self._objects is not None and obj_id in self._objects.object_ids:
            with self._undone_on_error():
                self._take_out(obj_id)
        for frame_idx in list(self._inputs):
            self._inputs[frame_idx].pop(obj_id, None)
            if not self._inputs[frame_idx]:
                del self._inputs[frame_idx]

    def _take_out(self, obj_id: int):
        """Take an object that is followed out of the memory."""
        group, slot = self._objects.remove(obj_id)
        groups = self._objects.num_groups
        if not groups:
            self._restart()
            return

        def take_out(frame: MemoryFrame) -> MemoryFrame:
            masks = frame.masks.copy()
            masks[group, 0] += masks[group, 1 + slot]
            masks[group, 1 + slot] = 0.0
            return self._rewritten(frame, masks[:groups])

        if not self._is_empty:
            self._memory.replace(take_out)

    # One frame

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """All or nothing: what raises, an interrupt among it, leaves objects and memory as they were."""
        before = {**vars(self), "_objects": copy.deepcopy(self._objects)}
        if self._memory is not None:
            before["_memory"] = replace(self._memory, long_term=list(self._memory.long_term))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    def step(self, model: OnnxDeformVos, frame: np.ndarray | None, frame_idx: int | None) -> OnnxDeformVosOutput:
        """Segment one frame and remember it; see [`OnnxDeformVos.__call__`]."""
        self._forget_passed()
        frame_idx = self._next_frame_idx() if frame_idx is None else as_index(frame_idx, "frame_idx")
        self._check_order(frame_idx)
        pixel_values = self._pixel_values(frame, frame_idx)
        frame_size = pixel_values.shape[-2:]
        given = _at_size(self._given(frame_idx), frame_size)
        if not given and self._is_empty:
            marked = self._marked()
            first = f"the first mask is on frame {marked[0]}" if marked else "no mask has been given"
            raise ValueError(
                f"No object is known at frame {frame_idx}: {first}. Call `processor.add_inputs_to_inference_session` "
                "with `frame_idx` of this frame, or an earlier one, first."
            )
        self._check_joining(given, frame_idx)
        with self._undone_on_error():
            features = model.graphs("encode", {"pixel_values": pixel_values})
            joining = self._prepare_memory(model, frame_idx, given)
            # The memory has never seen the objects that join here: nothing may be predicted for them.
            read = None if self._is_empty else self._read(features, self._objects.valid(without=joining))
            masks = self._masks(features, read, given)
            self._remember(features, read, masks, frame_idx, bool(given))
            self._frame_size, self._last_frame_idx = frame_size, frame_idx
            output = self._output(read, given, frame_idx)
        if not self._is_seekable:
            self._inputs.pop(frame_idx, None)
        return output

    def _check_order(self, frame_idx: int):
        """Refuses to go past a frame whose masks wait for it, where it cannot be gone back to."""
        if frame_idx < 0:
            raise ValueError(f"`frame_idx` must not be negative, got {frame_idx}.")
        waiting = self._waiting(frame_idx)
        if waiting:
            how = "hand that frame over" if self.source is None else "segment that frame"
            raise ValueError(
                f"The masks of frame {waiting[0]} would be lost: {how} before frame {frame_idx} "
                f"(`frame_idx={waiting[0]}`)."
            )

    def _waiting(self, before: int) -> list[int]:
        """Earlier frames whose masks are still to be taken up, where no frame can be gone back to."""
        return [] if self._is_seekable else sorted(at for at in self._inputs if at < before and self._given(at))

    def _forget_passed(self):
        """Tells of masks whose frame a stream has read and could not use, and forgets them."""
        passed = [at for at in self._inputs if at < self.source.first_readable] if self._is_stream else []
        for frame_idx in sorted(passed):
            del self._inputs[frame_idx]
            logger.warning(
                f"The masks of frame {frame_idx} are lost: the stream has passed that frame, which was not segmented. "
                f"Give them for frame {self.source.first_readable} or a later one."
            )

    def _check_joining(self, given: dict[int, np.ndarray], frame_idx: int):
        """Refuses a new object of which nothing is left; `given` are the masks at network size."""
        followed = () if self._objects is None else self._objects.object_ids
        for obj_id, mask in given.items():
            if obj_id not in followed and not mask.any():
                raise ValueError(
                    f"Nothing is left of the mask of object {obj_id} on frame {frame_idx}: masks that were given "
                    "after it cover it. Give it last, or leave it out (`remove_object`)."
                )

    def _next_frame_idx(self) -> int:
        """The frame after the last one, or the last one again where a stream holds it and masks wait for it."""
        earliest = 0 if self.source is None else self.source.first_readable
        if self._last_frame_idx is None:
            return max(min(self._inputs, default=0), earliest)
        following = max(self._last_frame_idx + 1, earliest)
        return min(self._waiting(following), default=following) if self._is_stream else following

    def _pixel_values(self, frame: np.ndarray | None, frame_idx: int) -> np.ndarray:
        if frame is None:
            if self.source is None:
                raise ValueError("This session has no video: hand each frame over as `frame=pixel_values`.")
            try:
                frame, _ = self.source.read(frame_idx)
            except FrameSource.End as end:
                raise ValueError(str(end)) from end
        if not isinstance(frame, np.ndarray):
            raise ValueError(
                f"`frame` must be an array (3, height, width), got {type(frame).__name__}: pass "
                "`processor(images=frame).pixel_values[0]`."
            )
        pixel_values = frame[None] if frame.ndim == 3 else frame
        if pixel_values.ndim != 4 or pixel_values.shape[:2] != (1, 3) or not pixel_values.size:
            raise ValueError(
                f"`frame` must be one frame (3, height, width), got {tuple(frame.shape)}: pass "
                "`processor(images=frame).pixel_values[0]`."
            )
        size = pixel_values.shape[-2:]
        if self._frame_size not in (None, size):
            raise ValueError(
                f"Frame {frame_idx} is {size[0]}x{size[1]} (height x width) at network resolution, the frames before "
                f"it {self._frame_size[0]}x{self._frame_size[1]}. A session takes frames of one size: start another."
            )
        if pixel_values.dtype.kind != "f":
            raise ValueError(
                f"`frame` must be normalised numbers, got {frame.dtype}: pass "
                "`processor(images=frame).pixel_values[0]`."
            )
        # One pass and no temporary: a sum is finite only if every pixel is.
        if not np.isfinite(pixel_values.sum(dtype=np.float32)):
            raise ValueError(f"Frame {frame_idx} holds NaN or infinite values.")
        if pixel_values.shape[1:2] != (3,) or any(side % STRIDE != 1 for side in size):
            raise ValueError(
                "`pixel_values` must be (batch, 3, height, width) with sides of the form 16k+1, which the processor "
                f"makes; got {pixel_values.shape}."
            )
        return np.ascontiguousarray(pixel_values, dtype=np.float32)

    def _prepare_memory(self, model: OnnxDeformVos, frame_idx: int, given: dict[int, np.ndarray]) -> set[int]:
        """Make room for the objects that this frame brings, and return them; the first frame makes the memory."""
        followed = set() if self._objects is None else set(self._objects.object_ids)
        joining = given.keys() - followed
        limit = model.config["max_objects"]
        if len(followed | joining) > limit and not model.config["object_independent"]:
            raise ValueError(
                f"This model's attention depends on the objects (`object_independent=False`): it follows at most "
                f"{limit} of them, got {len(followed | joining)}."
            )
        if self._memory is None:
            self._memory = MemoryBank(self.long_term_slots or model.config["long_term_slots"])
            self._objects = ObjectTable(limit)
            self._origin = frame_idx
        self._model = model
        for obj_id in given:
            self._objects.add(obj_id)
        groups = self._objects.num_groups

        def add_groups(frame: MemoryFrame) -> MemoryFrame:
            missing = groups - len(frame.masks)
            if missing <= 0:
                return frame
            empty = np.zeros_like(frame.masks[:1])
            empty[:, 0] = 1.0
            return self._rewritten(frame, np.concatenate([frame.masks, *[empty] * missing]))

        if not self._is_empty and any(len(frame.masks) < groups for frame in self._memory.frames()):
            self._memory.replace(add_groups)
        return joining

    def _rewritten(self, frame: MemoryFrame, masks: np.ndarray) -> MemoryFrame:
        """
        The same remembered frame with other masks. Deeper layers keep the identification input that the frame was
        segmented with; that of an added group is zero.
        """
        identification = frame.identification
        if identification is not None:
            missing = max(0, len(masks) - identification.shape[1])
            added = np.zeros((len(identification), missing, *identification.shape[2:]), identification.dtype)
            identification = np.concatenate([identification[:, : len(masks)], added], axis=1)
        visual_values = frame.values[:, : self._model.config["value_size"]]
        values = self._write(masks, visual_values, identification)
        return MemoryFrame(frame.frame_idx, frame.keys, values, identification, masks, frame.is_reference)

    def _read(self, features: dict[str, np.ndarray], valid: np.ndarray) -> dict[str, np.ndarray]:
        """The frame as the memory tells it; see `read` of the exported graphs."""
        keys, values = self._memory.stacked()
        memory = {
            "long_term_keys": keys,
            "long_term_values": values,
            "short_term_keys": self._memory.previous.keys,
            "short_term_values": self._memory.previous.values,
        }
        return self._model.graphs("read", {**features, **memory, "valid": valid})

    def _write(self, masks: np.ndarray, visual_values: np.ndarray, identification: np.ndarray | None) -> np.ndarray:
        """Values of the memory of a frame, its masks now known."""
        inputs = {"masks": masks, "visual_values": visual_values}
        if identification is not None:
            inputs["identification"] = identification
        return self._model.graphs("write", inputs)["values"]

    def _masks(self, features: dict, read: dict | None, given: dict[int, np.ndarray]) -> np.ndarray:
        """What is remembered of the frame, `(G, 1 + max_objects, 4h-3, 4w-3)`: predictions, overruled by inputs."""
        if read is not None:
            masks = read["masks"]
        else:
            shape = (self._objects.num_groups, 1 + self._objects.max_objects, *features["stride4"].shape[-2:])
            masks = np.zeros(shape, dtype=np.float32)
            masks[:, 0] = 1.0
        if not given:
            return masks
        shares = {obj_id: _shares(mask) for obj_id, mask in given.items()}
        masks = masks * (1.0 - np.minimum(sum(shares.values()), 1.0))
        for obj_id, share in shares.items():
            group, slot = self._objects.place(obj_id)
            masks[group, 1 + slot] = share
        masks[:, 0] = np.maximum(1.0 - masks[:, 1:].sum(1), 0.0)
        return masks

    def _remember(self, features: dict, read: dict | None, masks: np.ndarray, frame_idx: int, is_reference: bool):
        if read is None:
            written = self._model.graphs("start", {"tokens": features["tokens"], "masks": masks})
            keys, values, is_reference = written["keys"], written["values"], True
            identification = written.get("identification")
        else:
            keys, identification = read["keys"], read.get("identification")
            values = self._write(masks, read["visual_values"], identification)
        frame = MemoryFrame(frame_idx, keys, values, identification, masks, is_reference)
        interval = self.memory_interval or self._model.config["memory_interval"]
        self._memory.write(frame, to_long_term=(frame_idx - self._origin) % interval == 0)

    def _output(self, read: dict | None, given: dict[int, np.ndarray], frame_idx: int) -> OnnxDeformVosOutput:
        object_ids = self._objects.object_ids
        pred_masks = np.full((len(object_ids), 1, *self._frame_size), -GIVEN_LOGIT, dtype=np.float32)
        claimed = np.logical_or.reduce(list(given.values())) if given else None
        for index, obj_id in enumerate(object_ids):
            # The given masks go into the output, and everything else off the pixels that they claim.
            if obj_id in given:
                pred_masks[index, 0][given[obj_id]] = GIVEN_LOGIT
                continue
            group, slot = self._objects.place(obj_id)
            if read is not None:
                margin = read["logits"][group, 1 + slot] - read["logits"][group, 0]
                pred_masks[index, 0] = resize_bilinear(margin, self._frame_size, align_corners=True)
            if claimed is not None:
                pred_masks[index, 0][claimed] = -GIVEN_LOGIT
        return OnnxDeformVosOutput(frame_idx, object_ids, pred_masks)

    # A whole video

    def frames_to_visit(
        self, model: OnnxDeformVos, start_frame_idx: int | None, max_frame_num_to_track: int | None, reverse: bool
    ) -> Iterator[int]:
        """
        Positions that a propagation visits, its memory made ready: inputs on frames behind the start are loaded as
        references, those ahead join when they are reached.

        Raises:
            ValueError: see [`OnnxDeformVos.propagate_in_video_iterator`].
        """
        self._forget_passed()
        self._check_propagation(start_frame_idx, max_frame_num_to_track, reverse)
        frame_idx, visited = self._begin(model, start_frame_idx, reverse), 0
        direction = -1 if reverse else 1
        limit = float("inf") if max_frame_num_to_track is None else max_frame_num_to_track
        end = -1 if reverse else (self.num_frames if self.num_frames is not None else float("inf"))
        while frame_idx != end and visited <= limit:
            # Whoever receives a frame may correct it, remove the last object, or give the next one further on.
            self._take_up_held(model, frame_idx)
            if self._is_empty and not self._given(frame_idx):
                if not any((given - frame_idx) * direction > 0 for given in self._inputs):
                    return
            else:
                try:
                    self.source.read(frame_idx)
                except FrameSource.End:
                    self._check_unreached(frame_idx)
                    return
                yield frame_idx
            frame_idx, visited = frame_idx + direction, visited + 1

    def _begin(self, model: OnnxDeformVos, start_frame_idx: int | None, reverse: bool) -> int:
        """Make the memory ready for a propagation; returns where it starts."""
        start = self._default_start() if start_frame_idx is None else start_frame_idx
        if self._is_seekable:
            self._restart()
            self._load_references(model, start, reverse)
        return start

    def _default_start(self) -> int:
        """The earliest frame on which anything was marked; of a stream, where it stands."""
        return min(self._marked(), default=0) if self._is_seekable else self._next_frame_idx()

    def _load_references(self, model: OnnxDeformVos, start_frame_idx: int, reverse: bool):
        """Take up the masks of frames behind the start."""
        passed = [i for i in self._inputs if (i > start_frame_idx if reverse else i < start_frame_idx)]
        for frame_idx in sorted(passed, reverse=reverse):
            if self._given(frame_idx):
                self.step(model, None, frame_idx)

    def _take_up_held(self, model: OnnxDeformVos, next_idx: int):
        """Segment the frame that a stream holds once more, before it reads on, if masks were given for it since."""
        if self._is_stream and self.source.first_readable < next_idx and self._given(self.source.first_readable):
            self.step(model, None, self.source.first_readable)

    def _check_unreached(self, end: int):
        """Masks that a stream ended before were in vain: an error where nothing else was followed."""
        last = max(self._inputs, default=-1)
        if last >= end:
            message = f"The video ended before frame {last}, which a mask was given for; frames count from 0."
            if self._is_empty:
                raise ValueError(message)
            logger.warning(message)

    def count_frames(
        self, start_frame_idx: int | None, max_frame_num_to_track: int | None, reverse: bool
    ) -> int | None:
        """How many frames [`frames_to_visit`] visits at most; `None` where only the end of the stream will tell."""
        if self.num_frames is None:
            return None
        start = self._default_start() if start_frame_idx is None else start_frame_idx
        ahead = start + 1 if reverse else self.num_frames - start
        return ahead if max_frame_num_to_track is None else min(ahead, max_frame_num_to_track + 1)

    def _check_propagation(self, start_frame_idx, max_frame_num_to_track, reverse):
        if self.source is None:
            raise ValueError("This session has no video to propagate through: pass `video` to `init_video_session`.")
        if not self._marked() and self._is_empty:
            raise ValueError("No mask has been given: call `processor.add_inputs_to_inference_session` first.")
        if reverse and not self.source.is_seekable:
            raise ValueError(
                "`reverse=True` needs a video that can be read backwards; this one is a stream, such as a camera. "
                "Give the frames as a list or array."
            )
        if max_frame_num_to_track is not None and max_frame_num_to_track < 0:
            raise ValueError(f"`max_frame_num_to_track` must not be negative, got {max_frame_num_to_track}.")
        if start_frame_idx is None:
            return
        if self.num_frames is not None and not 0 <= start_frame_idx < self.num_frames:
            raise ValueError(f"`start_frame_idx` must be 0 to {self.num_frames - 1}, got {start_frame_idx}.")
        if not self.source.is_seekable and min(self._inputs, default=start_frame_idx) < start_frame_idx:
            raise ValueError(
                f"The masks of the frames {sorted(self._inputs)} would be lost: this video is a stream, whose frames "
                f"before `start_frame_idx` {start_frame_idx} cannot be read again. Start at {min(self._inputs)}."
            )
        if not self.source.is_seekable and start_frame_idx not in self._inputs and self._last_frame_idx is None:
            raise ValueError(
                f"No object is known at frame {start_frame_idx} of this stream: masks are on frames "
                f"{sorted(self._inputs)}, and a stream starts at one of them."
            )
        if self.source.is_seekable:
            marked = self._marked()
            behind = marked[-1] >= start_frame_idx if reverse else marked[0] <= start_frame_idx
            if not behind:
                raise ValueError(
                    f"No object is known at frame {start_frame_idx} in this direction: masks are on frames {marked}."
                )


def _at_size(given: dict[int, np.ndarray], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """
    The given masks at network size, without overlaps: a pixel goes to the object that was given last, or to one that
    is so small that no pixel is nearest to it.
    """
    if not given:
        return {}
    resized = {obj_id: resize_nearest(mask, size) for obj_id, mask in given.items()}
    small = {obj_id for obj_id, mask in given.items() if mask.any() and not resized[obj_id].any()}
    taken = np.zeros(size, dtype=bool)
    by_precedence = list(reversed(given))
    by_precedence.sort(key=lambda obj_id: obj_id not in small)
    for obj_id in by_precedence:
        mask = _pixels_around(given[obj_id], size) if obj_id in small else resized[obj_id]
        resized[obj_id] = mask & ~taken
        taken = taken | mask
    return resized


def _pixels_around(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels at another size in which those of the mask lie."""
    around = np.zeros(size, dtype=bool)
    rows, columns = (
        (indices * target + target // 2) // source
        for indices, source, target in zip(mask.nonzero(), mask.shape, size, strict=True)
    )
    around[rows, columns] = True
    return around


__all__ = [
    "Inputs",
    "OnnxDeformVos",
    "OnnxDeformVosOutput",
    "OnnxDeformVosProcessor",
    "OnnxGraphs",
    "OnnxInferenceSession",
    "read_settings",
]
