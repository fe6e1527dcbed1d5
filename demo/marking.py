"""From what a visitor draws, boxes or uploads to a map of object ids, and back."""

from __future__ import annotations

import os
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from workspace import LIMITS, DemoError

from hf_deformvos.video import read_mask


# Half of full opacity: the rim of a stroke belongs to the stroke where it covers most of the pixel.
_OPAQUE = 127
# Distance in RGB up to which a colour is taken for a palette's own; rims that mix two strokes are further off.
_SAME_COLOUR = 30.0
_MIN_BOX = 4
# GrabCut's time grows with the pixels; outlines get no better above this size.
_GRABCUT_SIDE = 320
_GRABCUT_ROUNDS = 3
# What of a box an object fills at least; less is a failure of GrabCut.
_MIN_FILL = 0.04
# Parts smaller than this share of the largest one are specks.
_MIN_PART = 0.1


class BoxMask(NamedTuple):
    """
    What lies in a box.

    Attributes:
        mask (`np.ndarray` of shape `(height, width)`, bool): the object's pixels.
        refined (`bool`): whether an outline was found; otherwise the mask is the whole box.
    """

    mask: np.ndarray
    refined: bool


def layers_to_id_map(
    editor_value: dict | None,
    palette: np.ndarray,
    size: tuple[int, int],
) -> np.ndarray:
    """
    The strokes in an image editor as ids.

    Args:
        editor_value (`dict`, *optional*):
            What `gr.ImageEditor` gives: `layers` are RGBA arrays `(height, width, 4)`; later ones cover earlier ones.
        palette (`np.ndarray` of shape `(n, 3)`, uint8):
            Colour of each id; those of 1 to `LIMITS.max_objects` are looked for.
        size (`tuple[int, int]`): (height, width) of the video; layers of another size are resized.

    Returns:
        `np.ndarray` of shape `size`, uint8: 0 where nothing is drawn.

    Raises:
        ValueError: if a layer is no RGBA picture.
    """
    id_map = np.zeros(size, dtype=np.uint8)
    for layer in (editor_value or {}).get("layers") or ():
        if layer is None:
            continue
        layer = np.asarray(layer)
        if layer.ndim != 3 or layer.shape[2] != 4:
            raise ValueError(f"A layer must be RGBA of shape (height, width, 4), got {layer.shape}.")
        drawn = _resized(_layer_to_ids(layer, palette[1 : LIMITS.max_objects + 1]), size)
        np.copyto(id_map, drawn, where=drawn > 0)
    return id_map


def _layer_to_ids(layer: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """
    Ids of one layer. Where strokes of two colours meet, the editor mixes them, and the mixture may look like a third
    colour: such pixels take the id of the nearest one that is sure.
    """
    ids = np.zeros(layer.shape[:2], dtype=np.uint8)
    drawn = layer[..., 3] > _OPAQUE
    if not drawn.any():
        return ids
    # Few different colours: strokes are flat.
    codes, place = np.unique(layer[drawn][:, :3] @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    seen = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
    distances = np.linalg.norm(seen[:, None].astype(np.float32) - colours[None].astype(np.float32), axis=2)
    nearest = (distances.argmin(axis=1) + 1).astype(np.uint8)[place]
    sure = (distances.min(axis=1) <= _SAME_COLOUR)[place]
    ids[drawn] = nearest
    if sure.all() or not sure.any():
        return ids
    unsure = np.zeros(drawn.shape, dtype=np.uint8)
    unsure[drawn] = ~sure
    # The distance transform looks for zeros: sure pixels; each is a label of its own.
    away = np.ones(drawn.shape, dtype=np.uint8)
    away[drawn & (unsure == 0)] = 0
    _, labels = cv2.distanceTransformWithLabels(away, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    id_of_label = np.zeros(labels.max() + 1, dtype=np.uint8)
    id_of_label[labels[away == 0]] = ids[away == 0]
    return np.where(unsure > 0, id_of_label[labels], ids)


def id_map_to_layer(id_map: np.ndarray, palette: np.ndarray, alpha: int = 255) -> np.ndarray:
    """
    Ids as a layer that the image editor can change, for corrections; `layers_to_id_map` gives the same ids back.

    Args:
        id_map (`np.ndarray` of shape `(height, width)`, integer).
        palette (`np.ndarray` of shape `(n, 3)`, uint8).
        alpha (`int`, *optional*, defaults to 255): opacity of objects, above 127.

    Returns:
        `np.ndarray` of shape `(height, width, 4)`, uint8: transparent where there is background.
    """
    if not _OPAQUE < alpha <= 255:
        raise ValueError(f"`alpha` must be 128 to 255, or objects are taken for background; got {alpha}.")
    colours = np.zeros((len(palette), 4), dtype=np.uint8)
    colours[1:, :3] = palette[1:]
    colours[1:, 3] = alpha
    return colours[id_map]


def box_to_mask(image: np.ndarray, box: tuple[float, float, float, float]) -> BoxMask:
    """
    The object in a box, found by OpenCV's GrabCut from what is in the box and what is around it.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`, uint8): RGB.
        box: two opposite corners, x0, y0, x1, y1 in pixels; what lies beyond the picture is cut off.

    Returns:
        [`BoxMask`]: never empty. Where GrabCut finds nothing, the whole box.

    Raises:
        DemoError: if the box is outside of the picture or smaller than four pixels a side.
    """
    left, top, right, bottom = _clipped(box, image.shape[1], image.shape[0])
    filled = np.zeros(image.shape[:2], dtype=bool)
    filled[top:bottom, left:right] = True
    # The surroundings tell what is background; the rest of a large picture only costs time.
    margin = max(right - left, bottom - top) // 2 + 2
    x0, y0 = max(left - margin, 0), max(top - margin, 0)
    view = image[y0 : bottom + margin, x0 : right + margin]
    found = _grab_cut(view, (left - x0, top - y0, right - x0, bottom - y0))
    if found is None:
        return BoxMask(filled, False)
    mask = np.zeros_like(filled)
    mask[y0 : y0 + view.shape[0], x0 : x0 + view.shape[1]] = found
    mask &= filled
    if mask.sum() < max(_MIN_FILL * filled.sum(), 1):
        return BoxMask(filled, False)
    return BoxMask(mask, True)


def _clipped(box, width: int, height: int) -> tuple[int, int, int, int]:
    """The box in whole pixels, corners in order, within the picture."""
    values = np.asarray(box, dtype=np.float64)
    if values.shape != (4,) or not np.isfinite(values).all():
        raise DemoError("A box needs two corners: left, top, right and bottom as numbers.")
    x0, x1 = sorted(values[[0, 2]])
    y0, y1 = sorted(values[[1, 3]])
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise DemoError(f"The box lies outside of the picture, which has {width}×{height} pixels. Draw it inside.")
    left, top = max(round(x0), 0), max(round(y0), 0)
    right, bottom = min(round(x1), width), min(round(y1), height)
    if right - left < _MIN_BOX or bottom - top < _MIN_BOX:
        raise DemoError(
            f"The box is {max(right - left, 0)}×{max(bottom - top, 0)} pixels; it needs {_MIN_BOX} a side at least. "
            "Set the second corner further away."
        )
    return left, top, right, bottom


def _grab_cut(view: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray | None:
    """GrabCut on a view scaled down, its outline at the view's size; `None` where it finds nothing."""
    height, width = view.shape[:2]
    scale = min(_GRABCUT_SIDE / max(height, width), 1.0)
    small = view
    if scale < 1:
        sides = max(round(width * scale), 1), max(round(height * scale), 1)
        small = cv2.resize(view, sides, interpolation=cv2.INTER_AREA)
    across, down = small.shape[1] / width, small.shape[0] / height
    left, right = round(box[0] * across), round(box[2] * across)
    top, bottom = round(box[1] * down), round(box[3] * down)
    labels = np.full(small.shape[:2], cv2.GC_BGD, dtype=np.uint8)
    labels[top:bottom, left:right] = cv2.GC_PR_FGD
    if (labels == cv2.GC_PR_FGD).sum() < _MIN_BOX**2 or (labels == cv2.GC_BGD).sum() < _MIN_BOX**2:
        return None
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)  # its clusters start from random points; the same box is to give the same outline
    try:
        cv2.grabCut(np.ascontiguousarray(small), labels, None, *models, _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    except cv2.error:  # a view of one colour has no clusters
        return None
    found = _without_specks(((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)).astype(np.uint8))
    if not found.any():
        return None
    smooth = cv2.resize(found.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return smooth > 0.5


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """The largest connected part and those that are not much smaller, their small holes closed."""
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), dtype=np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0
    return (areas >= max(_MIN_PART * areas.max(), 1))[labels].astype(np.uint8)


def mask_file_to_id_map(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """
    A mask that another tool wrote: palette, grey, black-and-white or coloured PNG.

    Args:
        path (`str` or `os.PathLike`): the file.
        size (`tuple[int, int]`): (height, width) of the video; a mask of another size is resized.

    Returns:
        `np.ndarray` of shape `size`, uint8: the file's ids; if one is above `LIMITS.max_objects`, the ids in
        ascending order become 1, 2 and so on.

    Raises:
        DemoError: if the file is no mask, is empty, or has too many objects.
    """
    name = os.path.basename(path)
    try:
        ids = read_mask(path, size)
    except (ValueError, Image.DecompressionBombError) as error:
        text = str(error).replace(os.fspath(path), name)
        raise DemoError(text[:1].upper() + text[1:]) from error
    present = np.unique(ids[ids > 0])
    if len(present) > LIMITS.max_objects:
        raise DemoError(
            f"{name} holds {len(present)} objects; up to {LIMITS.max_objects} can be followed at once. Take some away."
        )
    if present.max() > LIMITS.max_objects:
        ids = np.where(ids > 0, np.searchsorted(present, ids) + 1, 0)
    return ids.astype(np.uint8)


def _resized(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Ids at another size, nearest neighbour."""
    if ids.shape == tuple(size):
        return ids
    return cv2.resize(ids, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)


__all__ = ["BoxMask", "box_to_mask", "id_map_to_layer", "layers_to_id_map", "mask_file_to_id_map"]
