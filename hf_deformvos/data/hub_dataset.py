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
| `object_ids`  | list of integer | The ids that the mask may show; null: any; 255: see below        |

Where `object_ids` lists 255, as for DAVIS-2016, all that a mask has above 0 is one object.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..image_processing_deformvos import to_rgb
from .store import VOID, FrameStore, mask_ids, refuse_stretched


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

_READ_ROWS = 8
_READ_BYTES = 2**20


def import_datasets():
    """The optional package."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "Hugging Face data sets need the package `datasets`, which is not installed: `pip install datasets`."
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
        return to_rgb(_decode_image(self.frame, "no image"))

    @property
    def is_one_object(self) -> bool:
        """Whether all that the mask has above 0 is one object."""
        return VOID in (self.object_ids or ())

    def open_mask(self) -> Image.Image:
        """The mask as an image, at its own size."""
        return _decode_image(self.mask, "no mask")

    def read_mask(self, merge: bool | str | None) -> np.ndarray:
        """The mask as `(height, width)` uint8 ids; a `ValueError` where it shows ids that the row does not list."""
        merge = self.is_one_object if merge is None else merge
        image = self.open_mask()
        if not merge and self.mask.get("bytes"):
            # What `datasets` has decoded does not tell any more.
            refuse_stretched(Image.open(io.BytesIO(self.mask["bytes"])), "the mask")
        ids = mask_ids(image, merge, "the mask")
        if not merge and self.object_ids is not None:
            # Masks that went through a lossy format, or hold 0 and 255, look like this.
            stray = sorted(set(np.unique(ids).tolist()) - {0, VOID, *self.object_ids})
            if stray:
                raise ValueError(f"the mask shows ids {stray[:5]}, `object_ids` lists {sorted(self.object_ids)}")
        return ids


def _decode_image(value: dict | None, absent: str) -> Image.Image:
    """Decodes an image as `datasets` does, which also opens paths of the Hub."""
    value = {"bytes": None, "path": None} | (value or {})
    if value["bytes"] is None and value["path"] is None:
        raise ValueError(absent)
    return import_datasets().Image().decode_example(value)


def load_hub_dataset(
    name_or_path: str | Path,
    short_side: int = 480,
    split: str = "train",
    streaming: bool = False,
    merge: bool | str | None = None,
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
    With `streaming` nothing else is kept, and reading stops after `max_sequences`: parquet files are read a few rows
    at a time, so that the first part of a large set costs its own bytes and some megabytes more. Without it,
    `datasets` downloads the split into its own cache first. Local files are always read in place.

    Args:
        name_or_path (`str` or `Path`): A parquet file, a folder of such files or one that `save_to_disk` wrote, or a
            repository of the Hub. Its columns are those of `COLUMNS`.
        short_side (`int`): Largest short side of stored frames, in pixels.
        split (`str`): Which split.
        streaming (`bool`): Whether a Hub repository is read without downloading it.
        merge (`bool` or `str`, *optional*): Whether all mask values above 0 are one object, see [`read_annotation`];
            default where `object_ids` lists 255.
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
    if max_sequences is not None and max_sequences < 1:
        raise ValueError(f"`max_sequences` must be at least 1, got {max_sequences}.")
    opened = open_hub_dataset(name_or_path, split, streaming, config_name, revision)
    if streaming and max_sequences is None:
        logger.info(f"Data set {opened.name!r}: all of the split is streamed; `max_sequences` takes less.")
    excluded = sorted(set(exclude))
    return FrameStore.build(
        opened.name,
        opened.frames(exclude=excluded, max_sequences=max_sequences, merge=merge),
        short_side,
        merge=merge,
        cache_dir=cache_dir,
        on_error=on_error,
        show_progress_bar=show_progress_bar,
        fingerprint=json.dumps([opened.identity, split, config_name, excluded, max_sequences]),
    )


@dataclass(frozen=True)
class HubDataset:
    """
    An opened split, of which nothing has been read but the columns' names.

    Attributes:
        name (`str`): What messages call it.
        source: Its columns and rows.
    """

    name: str
    source: _Source

    @property
    def identity(self) -> str:
        """Text that changes whenever the rows do."""
        return self.source.identity

    def frames(
        self,
        sequences: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        max_sequences: int | None = None,
        merge: bool | str | None = None,
    ) -> Iterator[DatasetFrame]:
        """
        Reads the rows one after another, no more of them than are asked for; their images stay encoded.

        Args:
            sequences (sequence of `str`, *optional*): Only these; reading stops after the last of them.
            exclude (sequence of `str`): Sequences to leave out.
            max_sequences (`int`, *optional*): How many sequences to read.
            merge (`bool` or `str`, *optional*): See [`load_hub_dataset`].

        Raises:
            ValueError: If rows are not in order.
            OSError: If reading stops.
        """
        wanted = None if sequences is None else set(sequences)
        limit = max_sequences if wanted is None else min(len(wanted), max_sequences or len(wanted))
        rows = _rows(lambda: self.source.rows(list(COLUMNS)), self.name)
        return _frames(rows, self.name, wanted, set(exclude), limit, merge)

    def sequence_names(self) -> list[str]:
        """The sequences in their order, from that column alone."""
        rows = _rows(lambda: self.source.rows(["sequence"]), self.name)
        return list(dict.fromkeys(row["sequence"] for row in rows))


def open_hub_dataset(
    name_or_path: str | Path,
    split: str = "train",
    streaming: bool = False,
    config_name: str | None = None,
    revision: str | None = None,
) -> HubDataset:
    """
    Opens a VOS set of Hugging Face `datasets` to be read row by row; arguments and errors as for
    [`load_hub_dataset`].
    """
    datasets = import_datasets()
    source = str(name_or_path)
    path = Path(source).expanduser()
    if path.exists():
        opened = _open_local(datasets, path.resolve(), split, config_name)
        name = path.resolve().name.removesuffix(".parquet")
    else:
        if path.suffix == ".parquet" or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source[0] == ".":
            raise ValueError(f"`name_or_path` must be a file, a folder or a Hub repository, got {source!r}.")
        opened = _open_hub(datasets, source, split, streaming, config_name, revision)
        name = source.replace("/", "--")
    _check_schema(datasets, opened.features, name)
    return HubDataset(name, opened)


# --------------------------------------------------------------------------------------------------------------------
# Opening
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """An opened data set: its columns, what starts reading some of them, and text that changes when the rows do."""

    features: dict
    rows: Callable[[list[str]], Iterator[dict]]
    identity: str


def _open_local(datasets, path: Path, split: str, config_name: str | None) -> _Source:
    """A local data set."""
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"`name_or_path` must be a .parquet file, a folder or a Hub repository, got {path}.")
        return _read_parquet(datasets, [str(path)], _files_identity([path]))
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        path = path / _known_split(split, splits, path)
    if (path / "state.json").is_file():
        # What `save_to_disk` wrote is mapped into memory.
        return _read_dataset(datasets, datasets.load_from_disk(str(path)), _files_identity(sorted(path.iterdir())))
    builder = datasets.load_dataset_builder(str(path), config_name)
    files = builder.config.data_files[_known_split(split, builder.config.data_files, path)]
    return _stream(datasets, builder, split, _files_identity(files))


def _open_hub(
    datasets, repository: str, split: str, streaming: bool, config_name: str | None, revision: str | None
) -> _Source:
    """A data set of the Hub."""
    try:
        builder = datasets.load_dataset_builder(repository, config_name, revision=revision)
    except RuntimeError as error:
        # A repository with a loading script.
        raise ValueError(f"Data set {repository!r} cannot be read: {error}") from error
    # For a repository this hash is its commit; without a network that of what was downloaded, which has no files.
    identity = f"{repository}@{builder.hash}"
    if builder.config.data_files:
        _known_split(split, builder.config.data_files, repository)
        if streaming:
            return _stream(datasets, builder, split, identity)
    builder.download_and_prepare()
    return _read_dataset(datasets, builder.as_dataset(split=split), identity)


def _known_split(split: str, known: Iterable[str], source) -> str:
    """The split, if it exists."""
    if split not in known:
        raise ValueError(f"`split` must be one of {', '.join(map(str, known))} in {source}, got {split!r}.")
    return split


def _files_identity(files: Iterable[str | Path]) -> str:
    """Hash of paths, sizes and times of change."""
    digest = hashlib.sha256()
    for file in files:
        status = os.stat(file)
        digest.update(f"{file}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _stream(datasets, builder, split: str, identity: str) -> _Source:
    """A split in place."""
    files = list(builder.config.data_files[split])
    if all(file.endswith(".parquet") for file in files):
        return _read_parquet(datasets, files, identity)
    return _read_dataset(datasets, builder.as_streaming_dataset(split=split), identity)


def _read_dataset(datasets, opened: Dataset | IterableDataset, identity: str) -> _Source:
    """The rows of what `datasets` opened, images left encoded."""

    def rows(columns: list[str]) -> Iterator[dict]:
        chosen = opened.select_columns(columns)
        for column in {"frame", "mask"}.intersection(columns):
            chosen = chosen.cast_column(column, datasets.Image(decode=False))
        return iter(chosen)

    # A stream may not know its columns before its first row.
    features = opened.features or dict.fromkeys(next(iter(opened), {}))
    return _Source(features, rows, identity)


def _read_parquet(datasets, files: list[str], identity: str) -> _Source:
    """
    The rows of parquet files, local or `hf://`.

    `datasets` streams them too, but its scanner runs ahead of a slow reader through the rest of the file, which is the
    whole set where that is one file.
    """
    import fsspec  # with pyarrow, comes with `datasets`
    from pyarrow.parquet import ParquetFile

    def opened(file: str) -> BinaryIO:
        system, path = fsspec.url_to_fs(file)
        # Bytes come through the columns' buffers; a cache of the file would fetch them again at each change of column.
        return system.open(path, "rb", cache_type="none")

    def rows(columns: list[str]) -> Iterator[dict]:
        for file in files:
            with opened(file) as handle:
                parquet = ParquetFile(handle, buffer_size=_READ_BYTES, pre_buffer=False)
                for batch in parquet.iter_batches(_READ_ROWS, columns=columns, use_threads=False):
                    yield from batch.to_pylist()

    try:
        with opened(files[0]) as handle:
            features = datasets.Features.from_arrow_schema(ParquetFile(handle).schema_arrow)
    except Exception as error:  # pyarrow, fsspec and the Hub's client each have their own
        raise OSError(f"{files[0]} cannot be read: {type(error).__name__}: {error}") from error
    return _Source(features, rows, identity)


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def _fits(datasets, column: str, feature) -> bool:
    """Whether a column's type is what its name promises."""
    if column in ("frame", "mask"):
        # Parquet files that other programs write hold images as bare bytes, alone or with a path.
        bare = isinstance(feature, dict) and {"bytes"} <= set(feature) <= {"bytes", "path"}
        bare = bare or (isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"))
        return bare or isinstance(feature, datasets.Image)
    if column == "object_ids":
        inner = getattr(feature, "feature", None)
        return isinstance(inner, datasets.Value) and "int" in inner.dtype
    kinds = {"sequence": ("string", "large_string"), "frame_index": ("int", "uint")}[column]
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(kinds)


def _check_schema(datasets, features: dict, name: str) -> None:
    """Refuses columns that are not those of `COLUMNS`; a type that is not known yet is `None`."""
    wrong = [
        column
        for column in COLUMNS
        if column not in features or not (features[column] is None or _fits(datasets, column, features[column]))
    ]
    if wrong:
        found = ", ".join(column if kind is None else f"{column}: {kind}" for column, kind in features.items())
        wanted = ", ".join(f"{column}: {kind}" for column, kind in COLUMNS.items())
        raise ValueError(
            f"Data set {name!r}: columns {', '.join(wrong)} are missing or of another type; found {found or 'none'}; "
            f"wanted {wanted}. Rename or cast them (`rename_column`, `cast_column`)."
        )


def _rows(start: Callable[[], Iterator[dict]], name: str) -> Iterator[dict]:
    """The rows; whatever stops the reading says where."""
    rows, number = None, 0
    while True:
        try:
            rows = rows or start()
            row = next(rows, None)
        except Exception as error:  # see above
            raise OSError(
                f"Data set {name!r}: reading stopped at row {number}: {type(error).__name__}: {error}"
            ) from error
        if row is None:
            return
        yield row
        number += 1


def _frames(
    rows: Iterable[dict],
    name: str,
    wanted: set[str] | None,
    excluded: set[str],
    max_sequences: int | None,
    merge: bool | str | None,
) -> Iterator[DatasetFrame]:
    """Frames of the first sequences that are wanted and not excluded; checks that rows are in order."""
    seen: set[str] = set()
    taken, skipped = 0, False
    sequence, index = None, None
    for number, row in enumerate(rows):
        where = f"Data set {name!r}: row {number} (sequence {row['sequence']!r}, frame {row['frame_index']})"
        if row["sequence"] is None or row["frame_index"] is None:
            raise ValueError(f"{where} must have a sequence and a frame index.")
        if row["sequence"] != sequence:
            if row["sequence"] in seen:
                raise ValueError(
                    f"{where} must follow the other rows of its sequence, but stands after sequence {sequence!r}; "
                    "sort the set by sequence and frame index."
                )
            seen.add(row["sequence"])
            sequence, index = row["sequence"], None
            skipped = sequence in excluded or (wanted is not None and sequence not in wanted)
            # Of those that are named there is none left to wait for.
            if taken == max_sequences and (wanted is not None or not skipped):
                return
            taken += not skipped
        if index is not None and row["frame_index"] <= index:
            raise ValueError(f"{where} must have a greater frame index than the row before it, which has {index}.")
        index = row["frame_index"]
        if skipped:
            continue
        ids = row["object_ids"]
        if merge is False and ids and VOID in ids:
            raise ValueError(f"{where} lists object {VOID}, which is void; give `merge=True` if it is the object.")
        yield DatasetFrame(
            sequence, index, _encoded(row["frame"]), _encoded(row["mask"]), None if ids is None else tuple(ids)
        )


def _encoded(value: dict | bytes | None) -> dict | None:
    """An image as `datasets` holds it undecoded; other programs store the bytes alone."""
    return {"bytes": value, "path": None} if isinstance(value, bytes) else value


__all__ = ["COLUMNS", "DatasetFrame", "HubDataset", "load_hub_dataset", "open_hub_dataset"]
