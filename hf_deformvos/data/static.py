"""Sets of still images with masks: DIR/<set>/{images,masks}/<name>.{jpg,png,webp}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .store import READ_ERRORS, VOID, FrameEntry, FrameStore, read_mask, report_missing


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_static_set(folder: str | Path, on_error: str = "skip") -> list[FrameEntry]:
    """
    Pairs the images of one set with their masks by name.

    Args:
        folder (`str` or `Path`): Holds `images/` and `masks/`.
        on_error (`str`): `"skip"` reports and leaves out images without a mask, `"raise"` refuses them.

    Returns:
        `list[FrameEntry]`, sorted by name; every image is a sequence of its own.

    Raises:
        ValueError: If one of the two folders is missing, or a mask is and `on_error` is `"raise"`.
    """
    folder = Path(folder)
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise ValueError(f"An image set needs the folders images/ and masks/; {folder / part} does not exist.")
    masks = {path.stem: path for path in (folder / "masks").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    entries, missing = [], []
    for path in sorted((folder / "images").iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in masks:
            entries.append(FrameEntry(path.stem, path, masks[path.stem]))
        else:
            missing.append(path.name)
    report_missing(str(folder), missing, on_error)
    return entries


def load_static_sets(
    root: str | Path,
    short_side: int = 288,
    merged_sets: Sequence[str] = ("ccp-clothing",),
    sets: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    on_error: str = "skip",
    show_progress_bar: bool = True,
) -> list[FrameStore]:
    """
    Opens every image set below a folder, decoding it at first use.

    Args:
        root (`str` or `Path`): Holds one folder a set, or is itself a set.
        short_side (`int`): Largest short side of stored images, in pixels.
        merged_sets (sequence of `str`): Sets whose ids (garments, 0/255) are all one object.
        sets (sequence of `str`, *optional*): Which sets to open; default all.
        cache_dir, on_error, show_progress_bar: See [`FrameStore.build`].

    Raises:
        ValueError: If there is no set or a named one is missing.
    """
    root = Path(root)
    folders = [root] if (root / "images").is_dir() else sorted(p for p in root.glob("*") if (p / "images").is_dir())
    if sets is not None:
        unknown = sorted(set(sets) - {folder.name for folder in folders})
        if unknown:
            raise ValueError(f"{root} has no image set {unknown}; got {sorted(folder.name for folder in folders)}.")
        folders = [folder for folder in folders if folder.name in sets]
    if not folders:
        raise ValueError(f"No image set (a folder with images/ and masks/) below {root}.")
    return [
        FrameStore.build(
            folder.name,
            list_static_set(folder, on_error),
            short_side,
            merge=folder.name in merged_sets or _is_binary_255(folder),
            cache_dir=cache_dir,
            on_error=on_error,
            show_progress_bar=show_progress_bar,
        )
        for folder in folders
    ]


def _is_binary_255(folder: Path) -> bool:
    """Whether a set's first masks use 255 for the object: nothing but 0 and 255, or anti-aliased grays up to 255."""
    ids: set[int] = set()
    for path in sorted((folder / "masks").iterdir())[:8]:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            try:
                ids.update(np.unique(read_mask(path, merge=False)).tolist())
            except READ_ERRORS:
                continue  # reported when the set is decoded
    ids.discard(0)
    return VOID in ids and (len(ids) == 1 or len(ids) > 64)
