"""
Video object segmentation as a Hugging Face `datasets` data set: a local parquet file or folder, what `save_to_disk`
left, or a repository of the Hub, downloaded or streamed.

Rows are frames in order of time, those of a sequence one after another:

| column        | type            |                                                                  |
|---------------|-----------------|------------------------------------------------------------------|
| `sequence`    | string          | Name of the video                                                |
| `frame_index` | integer         | Grows within a sequence; gaps are allowed                        |
| `frame`       | Image           |                                                                  |
| `mask`        | Image or null   | Palette or gray PNG of ids, 255 is void; null: not annotated     |
| `object_ids`  | list of integer | The ids that the mask may show; null: any                        |
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from transformers.utils import logging

from .store import VOID, FrameStore, mask_ids


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.get_logger(__name__)

COLUMNS = {
    "sequence": "string",
    "frame_index": "int32",
    "frame": "Image",
    "mask": "Image (ids, 255 void; null where not annotated)",
    "object_ids": "list of int32",
}
"""Columns that a row must have; others are ignored."""


def _import_datasets():
    """The optional package."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "Reading a Hugging Face data set needs the package `datasets`, which is not installed: "
            "`pip install 'hf-deformvos[train]'` or `pip install datasets`."
        ) from error
    return datasets


@dataclass(frozen=True)
class DatasetFrame:
    """One row, its images still encoded: `{"bytes": ..., "path": ...}`, `None` for a null."""

    sequence: str
    frame_index: int
    frame: dict | None
    mask: dict | None
    object_ids: tuple[int, ...] | None

    @property
    def name(self) -> str:
        """The frame index, five digits."""
        return f"{self.frame_index:05d}"

    @property
    def label(self) -> str:
        """Sequence and frame index."""
        return f"sequence {self.sequence!r}, frame {self.frame_index}"

    def read_image(self) -> Image.Image:
        """The picture, RGB, at its own size."""
        return _decode_image(self.frame, "no image").convert("RGB")

    def read_mask(self, merge: bool | str) -> np.ndarray:
        """The mask as `(height, width)` uint8 ids; a `ValueError` where it shows ids that the row does not list."""
        ids = mask_ids(_decode_image(self.mask, "no mask"), merge, "the mask")
        if not merge and self.object_ids is not None:
            # Masks that went through a lossy format, or hold 0 and 255, look like this.
            stray = sorted(set(np.unique(ids).tolist()) - {0, VOID, *self.object_ids})
            if stray:
                raise ValueError(f"the mask shows ids {stray[:5]}, `object_ids` lists {sorted(self.object_ids)}")
        return ids


def _decode_image(value: dict | None, absent: str) -> Image.Image:
    """Decodes an image as `datasets` does, which also opens paths of the Hub."""
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError(absent)
    return _import_datasets().Image().decode_example(value)


def load_hub_dataset(
    name_or_path: str | Path,
    short_side: int = 480,
    split: str = "train",
    streaming: bool = False,
    merge: bool | str = False,
    exclude: Sequence[str] = (),
    max_sequences: int | None = None,
    cache_dir: str | Path | None = None,
    on_error: str = "skip",
    show_progress_bar: bool = True,
    config_name: str | None = None,
    revision: str | None = None,
) -> FrameStore:
    """
    Opens a VOS set of Hugging Face `datasets` as a [`FrameStore`], decoding it at first use.

    Training draws frames in random order, which a stream cannot give. So rows are read once, one after another, and
    decoded into the store, and the store is what training reads; it stays in the cache until the data set changes.
    With `streaming` nothing else is kept: no file of a Hub repository is downloaded as a whole, and reading stops
    after `max_sequences`, so that the first part of a large set costs little more than its own bytes. Without it,
    `datasets` downloads the split into its own cache first. Local files are always read in place.

    Args:
        name_or_path (`str` or `Path`): A parquet file, a folder of such files or one that `save_to_disk` wrote, or a
            repository of the Hub. Its columns are those of `COLUMNS`.
        short_side (`int`): Largest short side of stored frames, in pixels.
        split (`str`): Which split.
        streaming (`bool`): Whether a Hub repository is read without downloading it.
        merge (`bool` or `str`): Whether all mask values above 0 are one object, see [`read_mask`].
        exclude (sequence of `str`): Sequences to leave out.
        max_sequences (`int`, *optional*): How many sequences to read, in the order of the set; default all.
        cache_dir, show_progress_bar: See [`FrameStore.build`].
        on_error (`str`): `"skip"` reports and leaves out frames whose image is broken or whose mask is missing or
            broken, by sequence and frame index; `"raise"` refuses them.
        config_name (`str`, *optional*): Which configuration of a repository that has several.
        revision (`str`, *optional*): Branch, tag or commit of a Hub repository.

    Raises:
        ValueError: If `datasets` is not installed, the split or a column does not exist or has another type, rows are
            not in order, nothing is left, or a frame is broken or without mask and `on_error` is `"raise"`.
        OSError: If the files or the Hub cannot be reached.
    """
    datasets = _import_datasets()
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"`max_sequences` must be at least 1, got {max_sequences}.")
    source = str(name_or_path)
    path = Path(source).expanduser()
    if path.exists():
        opened, fingerprint = _open_local(datasets, path.resolve(), split, config_name)
        name = path.resolve().name.removesuffix(".parquet")
    else:
        if path.suffix == ".parquet" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source[0] == ".":
            raise ValueError(f"`name_or_path` must be a file, a folder or a Hub repository, got {source!r}.")
        opened, fingerprint = _open_hub(datasets, source, split, streaming, config_name, revision)
        name = source.replace("/", "--")
    if streaming and max_sequences is None:
        logger.info(f"Data set {name!r}: all of the split is streamed; `max_sequences` takes less.")
    rows = _rows(_checked(datasets, opened, name), name)
    excluded = set(exclude)
    return FrameStore.build(
        name,
        _frames(rows, name, excluded, max_sequences, merge),
        short_side,
        merge=merge,
        cache_dir=cache_dir,
        on_error=on_error,
        show_progress_bar=show_progress_bar,
        fingerprint=json.dumps([fingerprint, split, config_name, sorted(excluded), max_sequences]),
    )


# --------------------------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------------------------


def _open_local(datasets, path: Path, split: str, config_name: str | None) -> tuple[Dataset | IterableDataset, str]:
    """A local data set and the identity of its files."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"`name_or_path` must be a .parquet file, a folder or a Hub repository, got {path}.")
        builder = datasets.load_dataset_builder("parquet", data_files={split: str(path)})
    elif (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise ValueError(f"`split` must be one of {', '.join(splits)} in {path}, got {split!r}.")
        return _open_saved(datasets, path / split)
    elif (path / "state.json").is_file():
        return _open_saved(datasets, path)
    else:
        builder = datasets.load_dataset_builder(str(path), config_name)
    files = (builder.config.data_files or {}).values()
    identity = _files_identity(file for part in files for file in part)
    # Streaming reads parquet files in place; otherwise `datasets` would first write them anew as Arrow files.
    return builder.as_streaming_dataset(split=_known_split(split, builder.config.data_files, path)), identity


def _open_saved(datasets, folder: Path) -> tuple[Dataset, str]:
    """What `Dataset.save_to_disk` wrote; it is mapped into memory."""
    return datasets.load_from_disk(str(folder)), _files_identity(sorted(folder.iterdir()))


def _known_split(split: str, known: Iterable[str] | None, source) -> str:
    """The split, if it exists."""
    if known is not None and split not in known:
        raise ValueError(f"`split` must be one of {', '.join(map(str, known))} in {source}, got {split!r}.")
    return split


def _files_identity(files: Iterable[str | Path]) -> str:
    """Hash of paths, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _open_hub(
    datasets, repository: str, split: str, streaming: bool, config_name: str | None, revision: str | None
) -> tuple[Dataset | IterableDataset, str]:
    """A data set of the Hub and its commit."""
    try:
        builder = datasets.load_dataset_builder(repository, config_name, revision=revision)
    except RuntimeError as error:
        # A repository with a loading script.
        raise ValueError(f"Data set {repository!r} cannot be read: {error}") from error
    # For a repository this hash is its commit, or the commit that was downloaded when there is no network.
    identity = f"{repository}@{builder.hash}"
    _known_split(split.split("[")[0], builder.config.data_files, repository)
    if streaming:
        return builder.as_streaming_dataset(split=split), identity
    builder.download_and_prepare()
    return builder.as_dataset(split=split), identity


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def _fits(datasets, column: str, feature) -> bool:
    """Whether a column's type is what its name promises."""
    if column in ("frame", "mask"):
        # Parquet files that other programs write hold images as bare bytes, alone or with a path.
        bare = isinstance(feature, dict) and {"bytes"} <= set(feature) <= {"bytes", "path"}
        return (
            bare or isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")
        )
    if column == "object_ids":
        inner = getattr(feature, "feature", None)
        return isinstance(inner, datasets.Value) and "int" in inner.dtype
    kinds = {"sequence": ("string", "large_string"), "frame_index": ("int", "uint")}[column]
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def _checked(datasets, opened: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The columns of the schema, images left encoded; refuses any other schema."""
    features = opened.features
    # A stream may not know its types before its first row.
    columns = dict.fromkeys(next(iter(opened), {})) if features is None else dict(features)
    wrong = [column for column in COLUMNS if column not in columns]
    if features is not None:
        wrong += [column for column in COLUMNS if column in columns and not _fits(datasets, column, columns[column])]
    if wrong:
        found = ", ".join(column if kind is None else f"{column}: {kind}" for column, kind in columns.items())
        wanted = ", ".join(f"{column}: {kind}" for column, kind in COLUMNS.items())
        raise ValueError(
            f"Data set {name!r}: columns {', '.join(wrong)} are missing or of another type; found {found or 'none'}; "
            f"wanted {wanted}. Rename or cast them (`rename_column`, `cast_column`)."
        )
    opened = opened.select_columns(list(COLUMNS))
    for column in ("frame", "mask"):
        opened = opened.cast_column(column, datasets.Image(decode=False))
    return opened


def _rows(opened: Iterable[dict], name: str) -> Iterator[dict]:
    """The rows; whatever stops the reading says where."""
    rows = iter(opened)
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # pyarrow, fsspec and the Hub's client each have their own
            raise OSError(
                f"Data set {name!r}: reading stopped at row {number}: {type(error).__name__}: {error}"
            ) from error
        if row is None:
            return
        yield row
        number += 1


def _frames(
    rows: Iterable[dict], name: str, excluded: set[str], max_sequences: int | None, merge: bool | str
) -> Iterator[DatasetFrame]:
    """Frames of the first sequences that are not excluded; checks that rows are in order."""
    finished: set[str] = set()
    taken = 0
    sequence, index = None, None
    for number, row in enumerate(rows):
        where = f"Data set {name!r}: row {number} (sequence {row['sequence']!r}, frame {row['frame_index']})"
        if row["sequence"] is None or row["frame_index"] is None:
            raise ValueError(f"{where} must have a sequence and a frame index.")
        if row["sequence"] != sequence:
            if row["sequence"] in finished:
                raise ValueError(
                    f"{where} must follow the other rows of its sequence, but stands after sequence {sequence!r}; "
                    "sort the set by sequence and frame index."
                )
            finished.add(row["sequence"])
            sequence, index = row["sequence"], None
            if sequence not in excluded:
                if taken == max_sequences:
                    return
                taken += 1
        if index is not None and row["frame_index"] <= index:
            raise ValueError(f"{where} must have a greater frame index than the row before it, which has {index}.")
        index = row["frame_index"]
        if sequence in excluded:
            continue
        ids = row["object_ids"]
        if not merge and ids and VOID in ids:
            raise ValueError(f"{where} lists object {VOID}, which is void; give `merge=True` if it is the object.")
        yield DatasetFrame(sequence, index, row["frame"], row["mask"], None if ids is None else tuple(ids))


__all__ = ["COLUMNS", "load_hub_dataset"]
