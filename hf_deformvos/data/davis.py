"""Video in DAVIS layout: JPEGImages/480p/<sequence>/*.jpg, Annotations/480p/<sequence>/*.png, ImageSets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .static import IMAGE_SUFFIXES
from .store import FrameEntry, FrameStore, report_missing


HELD_OUT_SEQUENCES = ("bmx-bumps", "dog-agility", "flamingo", "kite-walk", "scooter-gray", "swing")
"""Training sequences that are never trained on: choices (checkpoints, settings) are made on them."""


def _subfolder(root: Path, part: str) -> Path:
    """`root/part`, or its only resolution folder (480p, Full-Resolution) where there is one."""
    folder = root / part
    if not folder.is_dir():
        raise ValueError(f"A DAVIS-layout folder needs {part}/; {folder} does not exist.")
    for resolution in ("480p", "Full-Resolution", "1080p"):
        if (folder / resolution).is_dir():
            return folder / resolution
    return folder


def davis_sequences(root: str | Path, split: str | None = None, year: int | None = None) -> list[str]:
    """
    Names of the sequences of a DAVIS-layout folder.

    Args:
        root (`str` or `Path`): Holds `JPEGImages`, `Annotations` and, for splits, `ImageSets`.
        split (`str`, *optional*): `ImageSets/<year>/<split>.txt`; default every sequence with annotations.
        year (`int`, *optional*): 2016 or 2017; default the one that has the split.

    Raises:
        ValueError: If the split does not exist.
    """
    root = Path(root)
    if split is None:
        return sorted(path.name for path in _subfolder(root, "Annotations").iterdir() if path.is_dir())
    for candidate in [year] if year else [2017, 2016]:
        path = root / "ImageSets" / str(candidate) / f"{split}.txt"
        if path.is_file():
            lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
            # DAVIS-2016 lists also come as "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png".
            names = [Path(line[0]).parent.name if "/" in line[0] else line[0] for line in lines]
            return list(dict.fromkeys(names))
    raise ValueError(f"Split {split!r} must be a file ImageSets/<year>/{split}.txt below {root}; there is none.")


def list_davis(root: str | Path, sequences: Sequence[str], on_error: str = "skip") -> list[FrameEntry]:
    """
    Pairs frames with masks by name.

    Args:
        root (`str` or `Path`): A DAVIS-layout folder.
        sequences (sequence of `str`): Which sequences.
        on_error (`str`): `"skip"` reports and leaves out frames without a mask, `"raise"` refuses them.

    Returns:
        `list[FrameEntry]` in time order.

    Raises:
        ValueError: If a sequence does not exist, or a mask is missing and `on_error` is `"raise"`.
    """
    root = Path(root)
    images, masks = _subfolder(root, "JPEGImages"), _subfolder(root, "Annotations")
    entries = []
    for name in sequences:
        if not (images / name).is_dir() or not (masks / name).is_dir():
            raise ValueError(f"Sequence {name!r} must have a folder in {images} and in {masks}; one is missing.")
        frames = sorted(path for path in (images / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        pairs = [(path, masks / name / f"{path.stem}.png") for path in frames]
        report_missing(str(images / name), [path.name for path, mask in pairs if not mask.is_file()], on_error)
        entries += [FrameEntry(name, path, mask) for path, mask in pairs if mask.is_file()]
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
) -> FrameStore:
    """
    Opens a DAVIS-layout folder as a [`FrameStore`], decoding it at first use.

    Args:
        root (`str` or `Path`): A DAVIS-layout folder.
        short_side (`int`): Largest short side of stored frames, in pixels.
        merge (`bool`, *optional*): Whether all mask values above 0 are one object (DAVIS-2016, where 255 or 1 is the
            object). Default: yes for a folder that lists 2016 and not 2017 in `ImageSets`.
        split, year: See [`davis_sequences`].
        sequences (sequence of `str`, *optional*): Which sequences; default those of `split`.
        exclude (sequence of `str`): Sequences to leave out.
        cache_dir, on_error, show_progress_bar: See [`FrameStore.build`].

    Raises:
        ValueError: If the folder, split or a sequence is missing, or nothing is left.
    """
    root = Path(root)
    names = list(sequences) if sequences is not None else davis_sequences(root, split, year)
    names = [name for name in names if name not in set(exclude)]
    if merge is None:
        merge = (root / "ImageSets" / "2016").is_dir() and not (root / "ImageSets" / "2017").is_dir()
    return FrameStore.build(
        root.name,
        list_davis(root, names, on_error),
        short_side,
        merge=merge,
        cache_dir=cache_dir,
        on_error=on_error,
        show_progress_bar=show_progress_bar,
    )
