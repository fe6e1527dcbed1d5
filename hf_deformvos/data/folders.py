"""What the folders of published data sets have in common: image files in order of time, resolutions, split lists."""

from __future__ import annotations

from pathlib import Path

from ..video_source_deformvos import natural_key


DATASET_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
RESOLUTIONS = ("480p", "Full-Resolution", "1080p")


def image_files(folder: Path) -> list[Path]:
    """
    Image files of a sequence's folder in order of time; the hidden files that macOS leaves are no images.

    Raises:
        ValueError: If two of them are called alike but for the suffix, and so are the same frame.
    """
    files = [path for path in folder.iterdir() if path.suffix.lower() in DATASET_SUFFIXES and path.name[0] != "."]
    by_stem: dict[str, Path] = {}
    for path in sorted(files):
        if path.stem in by_stem:
            raise ValueError(
                f"{folder} must hold one file a frame, got {by_stem[path.stem].name} and {path.name}; take one away."
            )
        by_stem[path.stem] = path
    return sorted(files, key=lambda path: natural_key(path.stem))


def masks_by_frame(folder: Path) -> dict[str, Path]:
    """The PNGs of a folder by their frames' names."""
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".png" and path.name[0] != ".")
    return {path.stem: path for path in files if path.is_file()}


def check_masks_have_frames(folder: Path, frames: list[Path], masks: dict[str, Path]) -> None:
    """
    Looks for a frame for every mask of a sequence.

    Raises:
        ValueError: If there is none for some; the message names the first.
    """
    lost = sorted(masks.keys() - {path.stem for path in frames})
    if lost:
        raise ValueError(
            f"Sequence {folder.name!r} must have a frame for every mask: {folder} lacks {len(lost)}, the first being "
            f"{lost[0]}. Copy the data set again, or take the masks away."
        )


def subfolder_names(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def resolution_folder(folder: Path) -> Path:
    """The resolution folder in a folder, the smallest where there are several; the folder itself where none is."""
    return next((folder / name for name in RESOLUTIONS if (folder / name).is_dir()), folder)


def read_split(root: Path, year: int, split: str) -> list[str] | None:
    """Sequences that the lists of a DAVIS folder name for a split and year, `None` where there is no such list."""
    sets = root / "ImageSets"
    # The first release of DAVIS-2016 keeps its lists by resolution, copies of it in ImageSets itself.
    for folder in (str(year), "", *RESOLUTIONS):
        path = sets / folder / f"{split}.txt"
        if path.is_file():
            lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            # Its lines name files: /JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png
            return list(dict.fromkeys(line.split("/")[-2] if "/" in line else line for line in lines))
    return None
