"""Sets of still images with masks, in a folder of images and a folder of masks with the same names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .davis import ANNOTATION_FOLDERS
from .folders import DATASET_SUFFIXES
from .store import FrameEntry, FrameStore, first_masks, report_missing, uses_255


LAYOUTS = (
    ("images", "masks"),
    ("images", "ground_truth_mask"),  # ECSSD
    ("DUTS-TR-Image", "DUTS-TR-Mask"),
    ("DUTS-TE-Image", "DUTS-TE-Mask"),
    ("imgs", "gt"),  # HKU-IS
    ("DUT-OMRON-image", "pixelwiseGT-new-PNG"),
    ("Imgs", "Imgs"),  # MSRA10K: each JPEG has its PNG beside it
    ("PNGImages", "PedMasks"),  # Penn-Fudan
    ("JPEGImages", "SegmentationObject"),  # Pascal VOC
    ("images", "annotations"),  # PNG ids of COCO and ADE20K, in subfolders train2017, val2017 ...
)
"""Folders of images and of masks, as published; the first pair that a set has is taken."""

_MASK_FOLDERS = {
    *(masks for images, masks in LAYOUTS if masks != images),
    *ANNOTATION_FOLDERS.values(),
    "SegmentationClass",  # Pascal VOC, beside SegmentationObject
}
_SHARED_FOLDERS = {masks for images, masks in LAYOUTS if masks == images}


def is_mask(path: Path) -> bool:
    """Whether the folders of a picture, as far as they belong to a data set, are called like those of masks."""
    folders = set(path.parts[:-1])
    return bool(folders & _MASK_FOLDERS or (folders & _SHARED_FOLDERS and path.suffix.lower() == ".png"))


def find_layout(folder: str | Path) -> tuple[Path, Path] | None:
    """The folders of images and masks of a set, `None` if it has no known pair."""
    pairs = ((Path(folder) / images, Path(folder) / masks) for images, masks in LAYOUTS)
    return next((pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()), None)


def _files(folder: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Names relative to the folder, without suffix, and paths of the images in it and below it, sorted;
    hidden files and folders are left out."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in inside.parts):
            yield inside.with_suffix("").as_posix(), path


def list_static_set(folder: str | Path, on_error: str = "skip") -> list[FrameEntry]:
    """
    Pairs the images of one set with their masks by name.

    Args:
        folder (`str` or `Path`): Holds `images/` and `masks/`, or another pair of `LAYOUTS`. Both may have the same
            subfolders. A mask is named like its image, or ends in `_mask` (Penn-Fudan).
        on_error (`str`): `"skip"` reports and leaves out images without a mask and masks without an image, `"raise"`
            refuses them.

    Returns:
        `list[FrameEntry]`, sorted by name; every image is a sequence of its own.

    Raises:
        ValueError: If the folders are missing, or a mask or an image is and `on_error` is `"raise"`.
    """
    folder = Path(folder)
    layout = find_layout(folder)
    if layout is None:
        known = ", ".join("/ + ".join(pair) + "/" for pair in LAYOUTS[1:])
        part = next((part for part in ("images", "masks") if not (folder / part).is_dir()), "masks")
        raise ValueError(
            f"An image set needs the folders images/ and masks/; {folder / part} does not exist. The folders of these "
            f"published sets are taken too: {known}."
        )
    images, masks = layout
    # Photographs are JPEG where both are in one folder.
    beside = images == masks
    suffixes = (".jpg", ".jpeg") if beside else DATASET_SUFFIXES
    found = dict(_files(masks, (".png",) if beside else DATASET_SUFFIXES))
    entries, missing = [], []
    for name, path in _files(images, suffixes):
        mask = found.get(name, found.get(f"{name}_mask"))
        if mask is not None:
            entries.append(FrameEntry(name, path, mask))
        else:
            missing.append(path.relative_to(images).as_posix())
    report_missing(str(folder), missing, on_error)
    paired = {entry.mask for entry in entries}
    lost = [path.relative_to(masks).as_posix() for path in found.values() if path not in paired]
    report_missing(str(folder), lost, on_error, f"masks have no image ({', '.join(suffixes)})")
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
        root (`str` or `Path`): Holds one folder a set, or is itself a set; see [`list_static_set`] for their form.
        short_side (`int`): Largest short side of stored images, in pixels.
        merged_sets (sequence of `str`): Sets whose ids (garments, 0/255) are all one object.
        sets (sequence of `str`, *optional*): Which sets to open; default all.
        cache_dir, on_error, show_progress_bar: See [`FrameStore.build`].

    Raises:
        ValueError: If there is no set or a named one is missing.
    """
    root = Path(os.path.abspath(root))  # the folder "." is a set by its name, too
    folders = [root] if _is_set(root) else sorted(path for path in root.glob("*") if _is_set(path))
    if sets is not None:
        unknown = sorted(set(sets) - {folder.name for folder in folders})
        if unknown:
            raise ValueError(f"{root} has no image set {unknown}; got {sorted(folder.name for folder in folders)}.")
        folders = [folder for folder in folders if folder.name in sets]
    if not folders:
        raise ValueError(f"No image set (a folder with images/ and masks/, or as published) below {root}.")
    stores = []
    for folder in folders:
        entries = list_static_set(folder, on_error)
        stores.append(
            FrameStore.build(
                folder.name,
                entries,
                short_side,
                merge=folder.name in merged_sets or _mask_rule(entries),
                cache_dir=cache_dir,
                on_error=on_error,
                show_progress_bar=show_progress_bar,
            )
        )
    return stores


def _is_set(folder: Path) -> bool:
    """Whether a folder is a set, also one whose masks are missing, which is an error later."""
    return (folder / "images").is_dir() or find_layout(folder) is not None


def _mask_rule(entries: list[FrameEntry]) -> bool | str:
    """How to read a set's masks, going by the first: 255 is the object, by degrees, or void beside ids."""
    return "grays" if uses_255(first_masks(entry.mask for entry in entries)) else False
