"""YouTube-VOS 2018 and 2019: train/JPEGImages/<video>/*.jpg, train/Annotations/<video>/*.png, train/meta.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from .folders import image_files, subfolder_names
from .store import FrameEntry, FrameStore, report_missing


# What the folders of its splits are called.
YOUTUBE_VOS_PARTS = ("train", "valid", "val", "test")


def read_youtube_vos_meta(path: Path) -> dict:
    """
    The videos of a YouTube-VOS `meta.json`, sorted, without those that have no objects.

    Args:
        path (`Path`): The file.

    Returns:
        `dict` from a video's name to `{"objects": {"<id>": {"category": ..., "frames": ["00000", ...]}}}`.

    Raises:
        ValueError: If the file does not exist or has another form.
    """
    if not path.is_file():
        raise ValueError(f"YouTube-VOS needs {path} (it lists videos, objects and frames), which does not exist.")
    try:
        videos = json.loads(path.read_text(encoding="utf-8"))["videos"]
        for video in videos.values():
            for key, item in video["objects"].items():
                int(key), item["frames"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'{path} must be JSON of the form {{"videos": {{"<video>": {{"objects": {{"<id>": {{"category": ..., '
            f'"frames": [...]}}}}}}}}}}, got a file without that ({type(error).__name__}: {error}).'
        ) from error
    return {video: item for video, item in sorted(videos.items()) if item["objects"]}


def youtube_vos_folder(root: str | Path, split: str = "train") -> Path:
    """
    The folder of a split that holds `JPEGImages` and `Annotations`.

    Args:
        root (`str` or `Path`): The folder above, or that folder itself.
        split (`str`): Its name.

    Raises:
        ValueError: If neither has both, or that folder is called like another split.
    """
    root = Path(root)
    name = Path(os.path.abspath(root)).name
    if name != split and name in YOUTUBE_VOS_PARTS and not (root / split).is_dir():
        raise ValueError(f"{root} is YouTube-VOS's {name!r}, and no {split!r}: name that, or the folder above.")
    for folder in (root / split, root):
        if all((folder / part).is_dir() for part in ("JPEGImages", "Annotations")):
            return folder
    raise ValueError(
        f"A YouTube-VOS folder needs {split}/JPEGImages and {split}/Annotations, or to be {split} itself; {root} has "
        "neither."
    )


def list_youtube_vos(
    root: str | Path,
    split: str = "train",
    sequences: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    on_error: str = "skip",
) -> list[FrameEntry]:
    """
    Pairs frames with masks by name.

    The videos are those of `meta.json`, or without that file those that have annotations.

    Args:
        root, split: See [`youtube_vos_folder`].
        sequences (sequence of `str`, *optional*): Which videos; default all.
        exclude (sequence of `str`): Videos to leave out.
        on_error (`str`): `"skip"` reports and leaves out frames that lack their image or mask, be they listed in
            `meta.json` or there in part; `"raise"` refuses them.

    Returns:
        `list[FrameEntry]` in time order, video by video.

    Raises:
        ValueError: If a named video does not exist, `meta.json` is broken, or files are missing and `on_error` is
            `"raise"`.
    """
    folder = youtube_vos_folder(root, split)
    meta = read_youtube_vos_meta(folder / "meta.json") if (folder / "meta.json").is_file() else {}
    known = list(meta) or subfolder_names(folder / "Annotations")
    unknown = sorted(set(sequences or ()) - set(known))
    if unknown:
        raise ValueError(f"`sequences` must be among the {len(known)} videos of {folder}, got {', '.join(unknown)}.")
    entries: list[FrameEntry] = []
    incomplete: list[str] = []
    for video in known if sequences is None else dict.fromkeys(sequences):
        if video in exclude:
            continue
        images, masks = (_by_name(folder / part / video) for part in ("JPEGImages", "Annotations"))
        listed = {frame for item in meta.get(video, {"objects": {}})["objects"].values() for frame in item["frames"]}
        entries += [FrameEntry(video, path, masks[name]) for name, path in images.items() if name in masks]
        for name in sorted(listed | images.keys() | masks.keys()):
            lost = [part for part, files in (("image", images), ("mask", masks)) if name not in files]
            if lost:
                incomplete.append(f"{video}/{name} (no {' and no '.join(lost)})")
    report_missing(str(folder), incomplete, on_error, "frames are incomplete")
    return entries


def _by_name(folder: Path) -> dict[str, Path]:
    """Image files of a folder by their stems, in order of time; none where there is no such folder."""
    return {path.stem: path for path in image_files(folder)} if folder.is_dir() else {}


def load_youtube_vos(
    root: str | Path,
    short_side: int = 480,
    split: str = "train",
    sequences: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    on_error: str = "skip",
    show_progress_bar: bool = True,
) -> FrameStore:
    """
    Opens the training set of YouTube-VOS 2018 or 2019 as a [`FrameStore`], decoding it at first use.

    Objects may appear late: a frame before that shows the others alone, or none. Sizes may differ between videos. The
    store holds plain pixels, 4 bytes each: the whole set (3,471 videos, some 95,000 frames) takes about 155 GB of disk
    at a short side of 480 pixels and 55 GB at 288; `sequences` takes less.

    Args:
        root (`str` or `Path`): The folder that holds `train`, or `train` itself.
        short_side (`int`): Largest short side of stored frames, in pixels.
        split (`str`): Name of the folder below `root`.
        sequences (sequence of `str`, *optional*): Which videos; default all.
        exclude (sequence of `str`): Videos to leave out.
        cache_dir, on_error, show_progress_bar: See [`list_youtube_vos`] and [`FrameStore.build`].

    Raises:
        ValueError: If the folder or a named video is missing, nothing is left, or `on_error` is `"raise"` and a file
            is missing or broken.
    """
    folder = youtube_vos_folder(root, split).resolve()
    return FrameStore.build(
        f"{folder.parent.name}-{folder.name}",
        list_youtube_vos(root, split, sequences, exclude, on_error),
        short_side,
        merge=False,
        cache_dir=cache_dir,
        on_error=on_error,
        show_progress_bar=show_progress_bar,
    )


__all__ = ["list_youtube_vos", "load_youtube_vos", "read_youtube_vos_meta", "youtube_vos_folder"]
