"""
Masks that people draw or other tools write: palette, grey, black-and-white or coloured images read as ids, and kept to
the pixel on the frames that they are given for.
"""

import os

import numpy as np
from PIL import Image
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Anti-aliased and JPEG-compressed masks have a value for every shade; nobody draws this many objects.
_MAX_DISTINCT_VALUES = 100
_VOID = 255
# Pillow stretches grays of few bits to 0..255, by these factors.
_STRETCHED = {"L;2": 85, "L;4": 17}


def davis_palette(num_colors: int = 256) -> np.ndarray:
    """
    The colour map that DAVIS and Pascal VOC masks carry: the bits of an id are dealt out to red, green and blue.

    Args:
        num_colors (`int`, *optional*, defaults to 256): How many colours to return, 1 to 256.

    Returns:
        `np.ndarray` of shape `(num_colors, 3)` and dtype `uint8`: row `k` is the colour of id `k`, row 0 is black.
    """
    if not 1 <= num_colors <= 256:
        raise ValueError(f"`num_colors` must be between 1 and 256, got {num_colors}.")
    ids = np.arange(num_colors)
    palette = np.zeros((num_colors, 3), dtype=np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def read_mask(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """
    Reads an image of object ids. What a pixel means depends on how the image is stored:

    * palette PNG (as DAVIS and YouTube-VOS store masks): the palette index is the id, whatever its colour;
    * grey, of 2 to 16 bits: the value is the id, and where only one value other than 0 occurs and it is 255 (or
      65535), or the image is black-and-white, that is object 1; RGB whose channels are equal counts as grey;
    * RGB colours: black is background; if every colour occurs in the DAVIS palette, its place there is the id, else
      the colours are numbered 1, 2, ... in ascending order of (red, green, blue);
    * alpha, beside gray or colours: fully transparent pixels are background.

    The value 255 beside other ids is void, as in DAVIS 2017, and becomes background.

    Args:
        path (`str` or `os.PathLike`): The image.
        size (`tuple[int, int]`, *optional*):
            `(height, width)` of the video. A mask of another size is resized to it, nearest neighbour, with a warning.

    Returns:
        `np.ndarray` of shape `(height, width)` and dtype `int32`: ids 1 to 254, 0 is background.

    Raises:
        ValueError: If the file is no image, holds no object, or holds shades or ids that are none.
    """
    try:
        with Image.open(path) as image:
            factor = _STRETCHED.get(image.tile[0][3], 1) if image.tile else 1
            image.load()
    except FileNotFoundError as error:
        raise ValueError(f"mask {path} does not exist; pass an image whose pixel values are object ids.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"mask {path} is not an image that can be read ({error}); save it as PNG.") from error
    ids = _to_ids(image, path, factor)
    if not ids.any():
        raise ValueError(
            f"mask {path} is empty: every pixel is background (0); paint each object with its own id, 1 or above."
        )
    if ids.max() > _VOID:
        raise ValueError(f"mask {path} must hold ids from 1 to 255, got {ids.max()}; renumber the objects.")
    if (ids == ids.flat[0]).all():
        logger.warning(f"mask {path} is object {ids.flat[0]} everywhere: were object and background exchanged?")
    if size is not None and ids.shape != tuple(size):
        ids = _resize(ids, tuple(size), path)
    return ids


def _to_ids(image: Image.Image, path, factor: int) -> np.ndarray:
    """Pixel values, stretched by a factor where it is not 1, to ids, by the rules of `read_mask`."""
    if image.mode == "P":
        return _without_void(np.array(image, dtype=np.int32), path)
    if image.mode == "1":
        return np.array(image, dtype=np.int32)
    transparent = np.asarray(image.getchannel("A")) == 0 if "A" in image.getbands() else None
    if image.mode.startswith("I") or image.mode in ("L", "LA", "F"):
        values = np.array(image.getchannel(0) if image.mode == "LA" else image).astype(np.int32)
    else:
        rgb = np.array(image.convert("RGB"))
        grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 1] == rgb[..., 2]).all()
        values = rgb[..., 0].astype(np.int32) if grey else _ids_of_colors(rgb, transparent, path)
    if transparent is not None:
        values = np.where(transparent, 0, values)
    _check_distinct(np.unique(values).size, path)
    return values // factor if factor > 1 and set(np.unique(values)) != {0, _VOID} else _without_void(values, path)


def _without_void(values: np.ndarray, path) -> np.ndarray:
    """Maps an only value of 255 (or 65535) to object 1, and 255 beside other ids to background."""
    present = np.unique(values[values != 0])
    if present.tolist() in ([_VOID], [65535]):
        return (values != 0).astype(np.int32)
    if _VOID in present:
        logger.warning(f"mask {path}: the value 255 beside other ids is void, it is taken for background.")
        values = np.where(values == _VOID, 0, values)
    return values


def _ids_of_colors(rgb: np.ndarray, transparent: np.ndarray | None, path) -> np.ndarray:
    """Numbers the colours of an RGB mask."""
    codes = rgb.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    if transparent is not None:
        codes = np.where(transparent, 0, codes)
    colors = np.unique(codes[codes != 0])
    _check_distinct(colors.size, path)
    davis = davis_palette().astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    if np.isin(colors, davis).all():
        ids = [int(np.flatnonzero(davis == color)[0]) for color in colors]
    else:
        ids = list(range(1, colors.size + 1))
    result = np.zeros(codes.shape, dtype=np.int32)
    for color, object_id in zip(colors, ids, strict=True):
        result[codes == color] = object_id
    return result


def _check_distinct(num_values: int, path) -> None:
    """Refuses photographs, soft masks and JPEG artefacts."""
    if num_values > _MAX_DISTINCT_VALUES:
        raise ValueError(
            f"mask {path} must hold one flat value for each object, got {num_values} different ones; "
            "save it as PNG without anti-aliasing (not JPEG), or threshold it."
        )


def _resize(ids: np.ndarray, size: tuple[int, int], path) -> np.ndarray:
    """Nearest-neighbour resize with a warning; an object that vanishes by it is an error."""
    height, width = size
    message = f"mask {path} is {ids.shape[1]}x{ids.shape[0]}, the video {width}x{height}: resized to it (nearest)."
    if abs(np.log(ids.shape[1] / ids.shape[0] * height / width)) > 0.03:
        message += " The shapes differ as well: was it drawn on this video, turned the same way?"
    logger.warning(message)
    resized = np.asarray(Image.fromarray(ids.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST))
    lost = sorted(set(np.unique(ids).tolist()) - set(np.unique(resized).tolist()) - {0})
    if lost:
        raise ValueError(
            f"mask {path}: object {lost[0]} vanishes when resized to {width}x{height}; draw the mask at that size."
        )
    return resized.astype(np.int32)


def overrule(id_map: np.ndarray, given: np.ndarray, object_ids: list[int] | None = None) -> np.ndarray:
    """
    A given mask overrules the prediction of its frame: its objects are where it shows them, and nowhere else. Other
    objects stay as predicted beside them.

    Args:
        id_map (`np.ndarray` of shape `(height, width)`): The prediction, 0 is background.
        given (`np.ndarray` of shape `(height, width)`): What was given, 0 where nothing was.
        object_ids (`list[int]`, *optional*):
            The objects that it speaks of, by default those that it shows: of another one it says that it is not seen.

    Returns:
        `np.ndarray` of shape `(height, width)` and the dtype of `id_map`.
    """
    shown = given != 0
    named = np.unique(given[shown]) if object_ids is None else object_ids
    return np.where(shown, given, np.where(np.isin(id_map, named), 0, id_map)).astype(id_map.dtype, copy=False)


__all__ = ["davis_palette", "overrule", "read_mask"]
