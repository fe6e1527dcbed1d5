"""Frames to what the network takes, without torchvision: sides of the form 16k+1, ImageNet's mean and deviation."""

import math

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs


STRIDE = 16


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

    def convert_to_rgb(self, image, input_data_format=None) -> np.ndarray:
        """Pictures of any mode to RGB; arrays stay, their channels are seen to later."""
        return np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else image

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
        if do_resize and not size.shortest_edge:
            raise ValueError(f'`size` needs "shortest_edge", the bound of the short side in pixels; got {size}.')
        if not 1 <= max_enlargement < math.inf:
            raise ValueError(f"`max_enlargement` must be a finite number of at least 1, got {max_enlargement}.")
        mean = torch.tensor(image_mean if do_normalize else (0.0, 0.0, 0.0)).view(3, 1, 1)
        deviation = torch.tensor(image_std if do_normalize else (1.0, 1.0, 1.0)).view(3, 1, 1)
        scale = (rescale_factor if do_rescale else 1.0) / deviation
        pixel_values, original_sizes = [], []
        for index, image in enumerate(images):
            frame = _to_uint8_rgb(image, index)
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


def _to_uint8_rgb(image: np.ndarray, index: int) -> np.ndarray:
    """
    `(channels, height, width)` of any usual kind to `(height, width, 3)` uint8; alpha is dropped.

    Raises:
        ValueError: for NaN, other channel counts, empty frames, or integers beyond 0..255.
    """
    channels, height, width = image.shape
    if channels not in (1, 3, 4) or height == 0 or width == 0:
        raise ValueError(f"Frame {index} must have 1, 3 or 4 channels and at least one pixel, got {image.shape}.")
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            raise ValueError(f"Frame {index} holds NaN or infinite values.")
        unit = image.min() >= 0 and image.max() <= 1
        image = np.rint(image * 255 if unit else image)
    if image.dtype != np.uint8:
        if image.min() < 0 or image.max() > 255:
            raise ValueError(
                f"Frame {index} has values from {image.min()} to {image.max()}; they must lie in 0..255, or in 0..1 "
                "for floating-point frames."
            )
        image = image.astype(np.uint8)
    frame = np.moveaxis(image[:3], 0, -1)
    return np.ascontiguousarray(np.broadcast_to(frame, (height, width, 3)))


__all__ = ["DeformVosImageProcessor", "network_size"]
