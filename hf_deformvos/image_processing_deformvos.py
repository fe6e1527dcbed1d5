"""Frames to what the network takes, without torchvision: sides of the form 16k+1, ImageNet's mean and deviation."""

import math
from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .configuration_deformvos import copy_code_with


STRIDE = 16
CHANNELS = (1, 3, 4)
# Resampling overshoots: floats a little beyond 0..1 are in that range still.
OVERSHOOT = 0.25
FRAME = (
    "a PIL image, or an array or tensor of numbers, (height, width), (height, width, channels) or (channels, height, "
    "width), with 1, 3 or 4 channels and at least one pixel"
)


class DeformVosImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    max_enlargement (`float`, *optional*, defaults to 1.0):
        How many times larger than it is a frame may be made to reach `size["shortest_edge"]`; at least 1.
    """

    max_enlargement: float | int


def network_size(height: int, width: int, size: SizeDict, max_enlargement: float = 1.0) -> tuple[int, int]:
    """
    Size at which the network sees a frame: the short side `size.shortest_edge`, or less where the frame would have to
    be enlarged more than `max_enlargement` times or the long side would exceed `size.longest_edge`; two tokens at
    least, each side rounded to 16k+1 pixels.
    """
    scale = min(max_enlargement, size.shortest_edge / min(height, width))
    if size.longest_edge:
        scale = min(scale, size.longest_edge / max(height, width))
    return tuple(max(1, round((side * scale - 1) / STRIDE)) * STRIDE + 1 for side in (height, width))


class DeformVosImageProcessor(PilBackend):
    """
    Prepares video frames for [`DeformVosModel`].

    A frame is a PIL image of any mode, or an array or tensor `(height, width)`, `(height, width, channels)` or
    `(channels, height, width)` of 1, 3 or 4 channels, alpha being dropped: whole numbers in 0..255, or floating-point
    numbers in 0..255 or 0..1, which each frame's own values tell apart: one of 0..255 in which nothing exceeds 1 has
    to be given in whole numbers. With `do_rescale=False`, floats in 0..1 are normalised as they are, and all else in
    0..255. Sixteen-bit PIL images are brought to eight bits: those of mode `I;16` always, those of mode `I` where a
    value exceeds 255.

    Where the first side and the last may both be channels, as in a frame of three rows or columns, an array's are the
    last and a tensor's the first; `input_data_format` says otherwise.

    Args:
        size (`dict`, defaults to `{"shortest_edge": 480, "longest_edge": 1536}`):
            Upper bounds of the short and of the long side, in pixels; see [`network_size`].
        max_enlargement (`float`, defaults to 1.0):
            How many times larger a small frame is made at most. The released models follow videos of 240 pixels a side
            far better at twice their size, on the grid of tokens that they were trained for.
        resample (`int`, defaults to 2, bilinear): Pillow's resampling filter.
    """

    valid_kwargs = DeformVosImageProcessorKwargs
    model_input_names = ["pixel_values", "original_sizes"]
    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 480, "longest_edge": 1536}
    default_to_square = False
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    do_convert_rgb = True
    max_enlargement = 1.0

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; where the file names code, that is beside it."""
        copy_code_with(self, save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _standardize_kwargs(self, **kwargs) -> dict:
        """As in transformers; sides that are no lengths are refused, and what this processor does not do."""
        kwargs = super()._standardize_kwargs(**kwargs)
        for name in ("do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` must be left out: frames are resized whole, to sides of the form 16k+1.")
        for name, side in dict(kwargs["size"] or {}).items():
            if not isinstance(side, Integral) or side < 1:
                raise ValueError(f'`size["{name}"]` must be a positive integer, a bound in pixels; got {side!r}.')
        return kwargs

    def _prepare_images_structure(
        self, images, expected_ndims: int = 3
    ) -> list[Image.Image | np.ndarray | torch.Tensor]:
        """Frames, batches and lists of them as one list; what a string names is fetched."""
        frames = [self.fetch_images(frame) if isinstance(frame, str) else frame for frame in _each_frame(images)]
        if not frames:
            raise ValueError(f"`images` holds no frame, got an empty {type(images).__name__}. A frame is {FRAME}.")
        return [_checked(frame, index) for index, frame in enumerate(frames)]

    def process_image(self, image, do_convert_rgb=None, input_data_format=None, **kwargs) -> np.ndarray:
        """As in transformers; of an array, the last side is the channels wherever it may be."""
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] in CHANNELS:
            input_data_format = input_data_format or ChannelDimension.LAST
        return super().process_image(image, do_convert_rgb, input_data_format, **kwargs)

    def convert_to_rgb(self, image, input_data_format=None) -> np.ndarray:
        """Pictures of any mode to RGB or grey; arrays stay, their channels are seen to later."""
        return _picture_to_array(image) if isinstance(image, Image.Image) else image

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        return_tensors: str | None,
        max_enlargement: float = 1.0,
        **kwargs,
    ) -> BatchFeature:
        if do_resize and size.shortest_edge is None:
            raise ValueError(f'`size` needs "shortest_edge", the bound of the short side in pixels; got {size}.')
        if not 1 <= max_enlargement < math.inf:
            raise ValueError(f"`max_enlargement` must be a finite number of at least 1, got {max_enlargement}.")
        mean = _per_channel(image_mean if do_normalize else 0.0, "image_mean")
        deviation = _per_channel(image_std if do_normalize else 1.0, "image_std")
        pixel_values, original_sizes = [], []
        for index, image in enumerate(images):
            frame = _to_uint8_rgb(image, index)
            scale = (rescale_factor if do_rescale else 1 / 255 if _is_unit(image) else 1.0) / deviation
            original_sizes.append(frame.shape[:2])
            if do_resize:
                height, width = network_size(*frame.shape[:2], size, max_enlargement)
                frame = np.asarray(Image.fromarray(frame).resize((width, height), resample))
            # One pass over the pixels: uint8 * scale - mean / deviation.
            pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
            pixel_values.append(torch.addcmul(-mean / deviation, pixels, scale))
        if len(pixel_values) == 1:
            pixel_values = pixel_values[0].unsqueeze(0)
        elif len({tuple(pixels.shape) for pixels in pixel_values}) == 1:
            pixel_values = torch.stack(pixel_values)
        data = {"pixel_values": pixel_values, "original_sizes": [tuple(size) for size in original_sizes]}
        return BatchFeature(data=data, tensor_type=return_tensors, skip_tensor_conversion=["original_sizes"])


def _per_channel(value: float | Sequence[float], name: str) -> torch.Tensor:
    """A number, or one a channel, as `(3, 1, 1)`."""
    numbers = torch.as_tensor(value, dtype=torch.float32)
    if numbers.shape not in ((), (1,), (3,)):
        raise ValueError(f"`{name}` must be one number or three, got {value!r}.")
    return numbers.expand(3).view(3, 1, 1)


def _each_frame(images) -> Iterator:
    """The frames of lists, iterators and four-dimensional batches, one after the other."""
    if isinstance(images, (list, tuple, Iterator)):
        for image in images:
            yield from _each_frame(image)
    elif getattr(images, "ndim", None) == 4:
        yield from images
    else:
        yield images


def _checked(image, index: int) -> Image.Image | np.ndarray | torch.Tensor:
    """A picture as it is, anything else as an array or tensor of numbers; `ValueError` for what is no frame."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"Frame {index} must be {FRAME}; got a picture of {image.width}x{image.height}.")
        return image
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # NumPy has no such type.
        image = image.float() if image.dtype == torch.bfloat16 else image
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
    return image if isinstance(image, torch.Tensor) else array


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


def to_rgb(picture: Image.Image) -> Image.Image:
    """
    A picture as RGB of eight bits, of the colours that the processor sees.

    Raises:
        ValueError: for NaN, or values that are no colours.
    """
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = Image.fromarray(_to_uint8(_picture_to_array(picture), "The picture"))
    return picture.convert("RGB")


def _to_uint8_rgb(image: np.ndarray, index: int) -> np.ndarray:
    """
    `(channels, height, width)` of any usual kind to `(height, width, 3)` uint8; alpha is dropped.

    Raises:
        ValueError: for NaN, other channel counts, or values that are no colours.
    """
    if image.shape[0] not in CHANNELS:
        raise ValueError(
            f"Frame {index} must have 1, 3 or 4 channels, got {image.shape[0]} in {image.shape}; leave "
            "`input_data_format` and `do_convert_rgb` out."
        )
    frame = np.moveaxis(_to_uint8(image, f"Frame {index}")[:3], 0, -1)
    return np.ascontiguousarray(np.broadcast_to(frame, (*frame.shape[:2], 3)))


def _is_unit(image: np.ndarray) -> bool:
    """Whether these are floats in 0..1, or a little beyond."""
    return image.dtype.kind == "f" and bool(image.min() >= -OVERSHOOT and image.max() <= 1 + OVERSHOOT)


def _to_uint8(image: np.ndarray, name: str) -> np.ndarray:
    """Colours or greys of any usual kind in eight bits; `ValueError` for NaN, or values that are none."""
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            raise ValueError(f"{name} holds NaN or infinite values.")
        if _is_unit(image):
            image = image.clip(0, 1) * 255
        image = np.rint(image)
    if image.dtype != np.uint8:
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"{name} has values from {image.min()} to {image.max()}; they must lie in 0..255, in 0..1 for "
                "floating-point frames, or in 0..65535 for PIL images of 16 bits."
            )
        image = image.astype(np.uint8)
    return image


__all__ = ["DeformVosImageProcessor", "network_size", "to_rgb"]
