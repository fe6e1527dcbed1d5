"""Video in DAVIS layout: JPEGImages/480p/<sequence>/*.jpg, Annotations/480p/<sequence>/*.png, ImageSets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from .folders import RESOLUTIONS, image_files, masks_by_frame, read_split, resolution_folder, subfolder_names
from .store import FrameEntry, FrameStore, first_masks, report_missing, uses_255


logger = logging.get_logger(__name__)

HELD_OUT_SEQUENCES = ("bmx-bumps", "dog-agility", "flamingo", "kite-walk", "scooter-gray", "swing")
"""Training sequences that are never trained on: choices (checkpoints, settings) are made on them."""

ANNOTATION_FOLDERS = {"semi-supervised": "Annotations", "unsupervised": "Annotations_unsupervised"}
"""Where DAVIS-2017 keeps the masks of its two tasks: objects named by people, and whatever stands out."""


def _part_folder(root: Path, part: str, resolution: str | None) -> Path:
    """`root/part`, or the resolution folder in it."""
    folder = root / part
    if not folder.is_dir():
        raise ValueError(f"A DAVIS-layout folder needs {part}/; {folder} does not exist.")
    if resolution is None:
        return resolution_folder(folder)
    if not (folder / resolution).is_dir():
        raise ValueError(f"`resolution` must be a folder of {folder}, got {resolution!r}; it has {_names(folder)}.")
    return folder / resolution


def _names(folder: Path) -> str:
    """The first few folders of a folder, for messages."""
    names = subfolder_names(folder)
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") or "none"


def _annotation_part(root: Path, task: str | None) -> str:
    """The folder of masks for a task; without a task the first that there is."""
    if task is None:
        return next((part for part in ANNOTATION_FOLDERS.values() if (root / part).is_dir()), "Annotations")
    if task not in ANNOTATION_FOLDERS:
        raise ValueError(f"`task` must be one of {', '.join(ANNOTATION_FOLDERS)}, got {task!r}.")
    return ANNOTATION_FOLDERS[task]


def frame_folders(root: Path, task: str | None = None, resolution: str | None = None) -> tuple[Path, Path]:
    """The folders that hold a folder of images, and one of masks, for each sequence."""
    return (
        _part_folder(root, "JPEGImages", resolution),
        _part_folder(root, _annotation_part(root, task), resolution),
    )


def davis_sequences(
    root: str | Path, split: str | None = None, year: int | None = None, task: str | None = None
) -> list[str]:
    """
    Names of the sequences of a DAVIS-layout folder.

    Args:
        root (`str` or `Path`): Holds `JPEGImages`, `Annotations` and, for splits, `ImageSets`.
        split (`str`, *optional*): `ImageSets/<year>/<split>.txt`; default every sequence with annotations.
        year (`int`, *optional*): 2016 or 2017; default the one that has the split.
        task (`str`, *optional*): See [`load_davis`].

    Raises:
        ValueError: If the split does not exist.
    """
    root = Path(root)
    if split is None:
        return subfolder_names(_part_folder(root, _annotation_part(root, task), None))
    for candidate in [year] if year else [2017, 2016]:
        names = read_split(root, candidate, split)
        if names is not None:
            return names
    raise ValueError(f"Split {split!r} must be a file ImageSets/<year>/{split}.txt below {root}; there is none.")


def list_davis(
    root: str | Path,
    sequences: Sequence[str],
    on_error: str = "skip",
    task: str | None = None,
    resolution: str | None = None,
) -> list[FrameEntry]:
    """
    Pairs frames with masks by name.

    Args:
        root (`str` or `Path`): A DAVIS-layout folder.
        sequences (sequence of `str`): Which sequences.
        on_error (`str`): `"skip"` reports and leaves out frames without a mask and masks without a frame, `"raise"`
            refuses them.
        task, resolution (`str`, *optional*): See [`load_davis`].

    Returns:
        `list[FrameEntry]` in time order.

    Raises:
        ValueError: If a sequence does not exist, two images are the same frame, or a mask or an image is missing and
            `on_error` is `"raise"`.
    """
    root = Path(root)
    images, masks = frame_folders(root, task, resolution)
    entries = []
    for name in sequences:
        if not (images / name).is_dir() or not (masks / name).is_dir():
            raise ValueError(f"Sequence {name!r} must have a folder in {images} and in {masks}; one is missing.")
        frames, found = image_files(images / name), masks_by_frame(masks / name)
        report_missing(str(images / name), [path.name for path in frames if path.stem not in found], on_error)
        lost = sorted(found.keys() - {path.stem for path in frames})
        report_missing(str(masks / name), [found[stem].name for stem in lost], on_error, "masks have no image")
        entries += [FrameEntry(name, path, found[path.stem]) for path in frames if path.stem in found]
    return entries


def load_davis(
    root: str | Path,
    short_side: int = 480,
    merge: bool | None = None,
    split: str | None = None,
    year: int | None = None,
    sequences: Sequence[str] | None = None,
    exclude: Sequence[str] = HELD_OUT_SEQUENCES,
    cache_dir: str | Path | None = None,
    on_error: str = "skip",
    show_progress_bar: bool = True,
    task: str | None = None,
    resolution: str | None = None,
) -> FrameStore:
    """
    Opens a DAVIS-layout folder as a [`FrameStore`], decoding it at first use.

    Args:
        root (`str` or `Path`): A DAVIS-layout folder, such as DAVIS-2016 or DAVIS-2017 (any of its archives).
        short_side (`int`): Largest short side of stored frames, in pixels.
        merge (`bool`, *optional*): Whether all mask values above 0 are one object (DAVIS-2016, where 255 or 1 is the
            object). Default: yes for a folder that lists 2016 and not 2017 in `ImageSets`, and for one without lists
            whose masks hold nothing but 0 and 255, or grays along the edges of 255.
        split, year: See [`davis_sequences`]. Default the training list: published folders hold the validation
            sequences too. Every sequence where there is no such list.
        sequences (sequence of `str`, *optional*): Which sequences; default those of `split`.
        exclude (sequence of `str`): Sequences to leave out, also of those in `sequences`; what is left out is logged.
        cache_dir, on_error, show_progress_bar: See [`FrameStore.build`].
        task (`str`, *optional*): `"semi-supervised"` (`Annotations`) or `"unsupervised"`
            (`Annotations_unsupervised`); default the first that there is.
        resolution (`str`, *optional*): The folder of `JPEGImages` and `Annotations` to take; default the first there
            is of 480p, Full-Resolution and 1080p.

    Raises:
        ValueError: If the folder, split or a sequence is missing, or nothing is left.
    """
    root = Path(os.path.abspath(root))  # "." has no name
    names = list(sequences) if sequences is not None else _default_sequences(root, split, year, task)
    kept = [name for name in names if name not in set(exclude)]
    _report_excluded(root, [name for name in names if name in set(exclude)], kept, asked=sequences is not None)
    entries = list_davis(root, kept, on_error, task, resolution)
    return FrameStore.build(
        root.name,
        entries,
        short_side,
        merge=is_one_object(root, entries) if merge is None else merge,
        cache_dir=cache_dir,
        on_error=on_error,
        show_progress_bar=show_progress_bar,
    )


def _report_excluded(root: Path, excluded: list[str], kept: list[str], asked: bool) -> None:
    """Logs what `exclude` leaves out, as a warning where it was asked for by name; a `ValueError` if that is all."""
    if not excluded:
        return
    message = (
        f"{root}: {', '.join(excluded)} left out, as `exclude` says (default: the sequences that choices are made on, "
        "which are not trained on); `exclude=()` takes them"
    )
    if not kept:
        raise ValueError(f"No sequence is left of {message}.")
    (logger.warning if asked else logger.info)(f"{message}.")


def _default_sequences(root: Path, split: str | None, year: int | None, task: str | None) -> list[str]:
    """The sequences of a split, or those of the training list, or all."""
    if split is not None:
        return davis_sequences(root, split, year, task)
    present = davis_sequences(root, task=task)
    for candidate in [year] if year else [2017, 2016]:
        listed = read_split(root, candidate, "train")
        if listed is not None:
            others = sorted(set(present) - set(listed))
            if others:
                logger.info(f"{root}: {len(others)} sequences are not of the training list and are left out.")
            return [name for name in present if name in set(listed)]
    return present


def is_one_object(root: Path, entries: list[FrameEntry]) -> bool:
    """Whether every mask value above 0 is the one object of its sequence."""
    sets = root / "ImageSets"
    if (sets / "2017").is_dir():
        return False
    if any((sets / name).is_dir() for name in ("2016", *RESOLUTIONS)):
        return True
    firsts = {entry.sequence: entry.mask for entry in reversed(entries)}
    # Objects may appear after the first frame.
    masks = dict.fromkeys([*firsts.values(), *(entry.mask for entry in entries)])
    return uses_255(first_masks(masks))
