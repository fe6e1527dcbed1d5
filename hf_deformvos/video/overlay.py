"""Drawing of id maps over frames: palettes, translucent fills, contours. Plain numpy, no drawing library."""

import numpy as np

from ..masks_deformvos import davis_palette


# Okabe and Ito's eight colours, which stay apart under every common form of colour blindness; black (their first) is
# left out because it vanishes in dark scenes.
_OKABE_ITO = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

# Width of a contour, in pixels.
_CONTOUR = 2


def colorblind_palette(num_colors: int = 256) -> np.ndarray:
    """
    Colours that stay apart for colour-blind viewers: Okabe and Ito's, then the same again darker and lighter.

    Args:
        num_colors (`int`, *optional*, defaults to 256): How many colours to return, 1 to 256.

    Returns:
        `np.ndarray` of shape `(num_colors, 3)` and dtype `uint8`: row 0 is black; beyond 21 ids the colours repeat.
    """
    if not 1 <= num_colors <= 256:
        raise ValueError(f"`num_colors` must be between 1 and 256, got {num_colors}.")
    base = np.asarray(_OKABE_ITO, dtype=np.float32)
    cycle = np.concatenate([base, base * 0.55, 255 - (255 - base) * 0.45]).astype(np.uint8)
    palette = cycle[(np.arange(num_colors) - 1) % len(cycle)]
    palette[0] = 0
    return palette


PALETTES = {"davis": davis_palette, "colorblind": colorblind_palette}


def draw_overlay(
    image: np.ndarray,
    id_map: np.ndarray,
    palette: np.ndarray | None = None,
    opacity: float = 0.5,
    contour: bool = True,
) -> np.ndarray:
    """
    Draws every object as a translucent fill with an opaque contour.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`, dtype `uint8`): The RGB frame; it is not changed.
        id_map (`np.ndarray` of shape `(height, width)`, integer): Object ids, 0 is background, at most 255.
        palette (`np.ndarray` of shape `(256, 3)`, *optional*): Colour of each id, by default the DAVIS palette.
        opacity (`float`, *optional*, defaults to 0.5): Share of the object's colour in the fill, 0 to 1.
        contour (`bool`, *optional*, defaults to `True`): Whether a two-pixel line is drawn where ids change.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`, dtype `uint8`: the new RGB frame.

    Raises:
        ValueError: If shapes or dtypes disagree, or an id or the opacity is out of range.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"`image` must be uint8 of shape (height, width, 3), got {image.dtype} {image.shape}.")
    if id_map.shape != image.shape[:2]:
        raise ValueError(f"`id_map` must have the frame's size {image.shape[:2]}, got {id_map.shape}.")
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` must be between 0 and 1, got {opacity}.")
    palette = davis_palette() if palette is None else palette
    ids = as_byte_ids(id_map)
    drawn = image.copy()
    box = _bounds(ids)
    if box is None:
        return drawn
    ids, view = ids[box], drawn[box]
    # Per channel: table look-ups and one add that cannot overflow are several times faster than blending in float.
    share = round(opacity * 256)
    faded = ((np.arange(256) * (256 - share)) >> 8).astype(np.uint8)
    tint = ((palette.astype(np.int64) * share) >> 8).astype(np.uint8)
    inside = ids != 0
    edge = _edges(ids) if contour else None
    for channel in range(3):
        plane = np.take(faded, view[..., channel])
        plane += np.take(tint[:, channel], ids)
        np.copyto(view[..., channel], plane, where=inside)
        if contour:
            np.copyto(view[..., channel], np.take(palette[:, channel], ids), where=edge)
    return drawn


def as_byte_ids(id_map: np.ndarray) -> np.ndarray:
    """The id map as `uint8`, `ValueError` for what is not an integer of 0 to 255."""
    if id_map.dtype == np.uint8:
        return id_map
    if id_map.dtype == np.bool_:
        return id_map.astype(np.uint8)
    if not np.issubdtype(id_map.dtype, np.integer):
        raise ValueError(f"`id_map` must hold integers, got dtype {id_map.dtype}.")
    if id_map.size and (id_map.min() < 0 or id_map.max() > 255):
        raise ValueError(
            f"`id_map` must hold ids from 0 to 255 (a palette has no more), got {id_map.min()} to {id_map.max()}; "
            "renumber the objects."
        )
    return id_map.astype(np.uint8)


def _bounds(ids: np.ndarray) -> tuple[slice, slice] | None:
    """The slices that enclose all objects and the background that their contours border on, `None` without object."""
    rows = np.flatnonzero(ids.any(axis=1))
    if rows.size == 0:
        return None
    columns = np.flatnonzero(ids[rows[0] : rows[-1] + 1].any(axis=0))
    return tuple(slice(max(line[0] - _CONTOUR, 0), line[-1] + 1 + _CONTOUR) for line in (rows, columns))


def _edges(ids: np.ndarray) -> np.ndarray:
    """Object pixels within a contour's width of another id, as a boolean map; the frame's border is no edge."""
    edge = np.zeros(ids.shape, dtype=bool)
    for step in range(1, _CONTOUR + 1):
        vertical = ids[step:] != ids[:-step]
        edge[step:] |= vertical
        edge[:-step] |= vertical
        horizontal = ids[:, step:] != ids[:, :-step]
        edge[:, step:] |= horizontal
        edge[:, :-step] |= horizontal
    edge &= ids != 0
    return edge


__all__ = ["PALETTES", "as_byte_ids", "colorblind_palette", "draw_overlay"]
