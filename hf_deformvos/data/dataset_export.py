"""
A DAVIS-layout folder written as a Hugging Face `datasets` data set: parquet files with a row a frame, in the columns
that `hub_dataset` reads.

Files go in as they are, byte by byte, but for frames that are to be smaller and for those that would be seen turned:
programs that heed EXIF orientation, `datasets` among them, would turn the picture and not its mask.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm
from transformers.utils import logging

from ..image_processing_deformvos import to_rgb
from .davis import davis_sequences, frame_folders, is_one_object
from .folders import check_masks_have_frames, image_files, masks_by_frame, read_split, subfolder_names
from .hub_dataset import import_datasets
from .store import READ_ERRORS, VOID, FrameEntry, mask_values, read_annotation


if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetWriter

logger = logging.get_logger(__name__)

SPLITS = ("train", "val", "all")
_JPEG_QUALITY = 95
_ROW_GROUP_BYTES = 16 * 2**20
_LARGEST_INDEX = 2**31 - 1


@dataclass(frozen=True)
class SplitCounts:
    """
    What a split consists of.

    Attributes:
        sequences, frames, masks, objects (`int`): How many; `objects` over all sequences.
        shards (`int`): Parquet files.
        size (`int`): Bytes of the images and masks.
    """

    sequences: int
    frames: int
    masks: int
    objects: int
    shards: int
    size: int


@dataclass(frozen=True)
class ExportedDataset:
    """
    What was written.

    Attributes:
        splits (`dict[str, SplitCounts]`): By name.
        one_object (`bool`): Whether all that a mask has above 0 is one object, and rows list 255 for it.
        reencoded (`int`): Frames whose bytes are not those of their files.
        short_side (`int`, *optional*): Largest short side of frames, where that was limited.
    """

    splits: dict[str, SplitCounts]
    one_object: bool
    reencoded: int
    short_side: int | None


def export_davis(
    root: str | Path,
    folder: str | Path,
    split: str = "all",
    sequences: Sequence[str] | None = None,
    short_side: int | None = None,
    shard_size: int = 500_000_000,
    show_progress_bar: bool = True,
) -> ExportedDataset:
    """
    Writes `<folder>/data/<split>-00000-of-00001.parquet` and so on, in place of such files of the same split. The same
    input gives the same bytes.

    Rows of a sequence are neighbours, in order of time, and in one file unless the sequence alone is larger than
    `shard_size`. Every frame of the folder is a row; where it has no mask, the row's is null.

    Args:
        root (`str` or `Path`): A DAVIS-layout folder.
        folder (`str` or `Path`): Where to write.
        split (`str`): `"train"` or `"val"`, a list in `ImageSets`; `"all"`: each of the two lists that there is is a
            split, and where there is none, all sequences are the split `train`.
        sequences (sequence of `str`, *optional*): Only these.
        short_side (`int`, *optional*): Frames with a larger short side are scaled down to it (in their own format,
            JPEG at quality 95) and their masks with them (nearest neighbour).
        shard_size (`int`): Most bytes of images and masks in a file; a single frame may be larger.
        show_progress_bar (`bool`): Whether a bar is shown.

    Raises:
        ValueError: If `datasets` is not installed, an argument is out of its range, the folder lacks what it must
            have, a file cannot be read or does not fit its mask, or a mask has no frame.
    """
    datasets = import_datasets()
    if short_side is not None and short_side < 1:
        raise ValueError(f"`short_side` must be at least 1, got {short_side}.")
    if shard_size < 1:
        raise ValueError(f"`shard_size` must be at least 1 byte, got {shard_size}.")
    root, folder = Path(root), Path(folder)
    chosen = _choose(root, split, sequences)
    names = [name for listed in chosen.values() for name in listed]
    files = {name: _list_sequence(root, name) for name in names}
    masks = [FrameEntry(name, item.image, item.mask) for name in names for item in files[name] if item.mask]
    one_object = is_one_object(root, masks)
    schema = _features(datasets).arrow_schema
    (folder / "data").mkdir(parents=True, exist_ok=True)
    counts, reencoded, lists_255 = {}, 0, False
    with tqdm(total=sum(map(len, files.values())), desc="writing", unit="frame", disable=not show_progress_bar) as bar:
        for name, listed in chosen.items():
            shards = _Shards(folder / "data", name, schema, shard_size)
            num_masks = num_objects = 0
            for sequence in listed:
                checked = _check_sequence(sequence, files[sequence], one_object, short_side)
                shards.start_sequence(sum(item.size for item in files[sequence]))
                for row in _rows(checked):
                    shards.add(row)
                    num_masks += row["mask"] is not None
                    bar.update()
                num_objects += len(checked.object_ids)
                reencoded += sum(checked.changed)
                lists_255 |= checked.object_ids == [VOID]
            shards.finish()
            counts[name] = SplitCounts(
                len(listed), shards.num_rows, num_masks, num_objects, shards.num_shards, shards.size
            )
    return ExportedDataset(counts, lists_255, reencoded, short_side)


def _features(datasets):
    """The columns that `hub_dataset` describes."""
    return datasets.Features(
        {
            "sequence": datasets.Value("string"),
            "frame_index": datasets.Value("int32"),
            "frame": datasets.Image(),
            "mask": datasets.Image(),
            "object_ids": datasets.List(datasets.Value("int32")),
        }
    )


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """A frame's files and its index."""

    image: Path
    mask: Path | None
    index: int

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return self.image.stat().st_size + (self.mask.stat().st_size if self.mask else 0)


@dataclass(frozen=True)
class _Sequence:
    """A sequence whose files have been read once: its ids, and for each frame the size it gets and whether it is
    encoded anew."""

    name: str
    items: list[_Item]
    object_ids: list[int]
    sizes: list[tuple[int, int]]
    changed: list[bool]


def _choose(root: Path, split: str, sequences: Sequence[str] | None) -> dict[str, list[str]]:
    """The sequences of each split."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    if not root.is_dir():
        raise ValueError(f"`root` must be a DAVIS-layout folder, got {str(root)!r}, which does not exist.")
    images, masks = frame_folders(root)
    present = set(subfolder_names(images)) & set(subfolder_names(masks))
    if split != "all":
        listed = {split: davis_sequences(root, split)}
    else:
        listed = {name: _read_list(root, name) for name in ("train", "val")}
        # A copy of one split has both lists.
        listed = {name: kept for name, names in listed.items() if (kept := [x for x in names if x in present])}
        listed = listed or {"train": sorted(present)}
    if sequences is not None:
        unknown = sorted(set(sequences) - {name for names in listed.values() for name in names})
        if unknown:
            raise ValueError(f"`sequences` must be of {root}, split {split!r}; it has no {', '.join(unknown)}.")
        listed = {name: [item for item in names if item in set(sequences)] for name, names in listed.items()}
        listed = {name: names for name, names in listed.items() if names}
    lost = [name for names in listed.values() for name in names if name not in present]
    if lost:
        raise ValueError(f"Sequence {lost[0]!r} must have a folder in {images} and in {masks}; one is missing.")
    if not any(listed.values()):
        raise ValueError(f"{root} must hold sequences with frames and masks; there is none in split {split!r}.")
    return listed


def _read_list(root: Path, split: str) -> list[str]:
    """The sequences of a list; none where there is no such list."""
    return next((names for year in (2017, 2016) if (names := read_split(root, year, split)) is not None), [])


def _list_sequence(root: Path, name: str) -> list[_Item]:
    """A sequence's files in order of time."""
    images, masks = frame_folders(root)
    frames = image_files(images / name)
    if not frames:
        raise ValueError(f"{images / name} must hold image files; there are none.")
    numbers = [int(path.stem) if path.stem.isdecimal() else -1 for path in frames]
    if min(numbers) < 0 or max(numbers) > _LARGEST_INDEX or numbers != sorted(set(numbers)):
        logger.warning(f"{images / name}: files are not named by numbers; frames are counted from 0.")
        numbers = list(range(len(frames)))
    found = masks_by_frame(masks / name)
    items = [_Item(frame, found.get(frame.stem), number) for frame, number in zip(frames, numbers, strict=True)]
    if not any(item.mask for item in items):
        raise ValueError(f"Sequence {name!r} must have a mask named like a frame in {masks / name}; none is.")
    check_masks_have_frames(images / name, frames, found)
    return items


def _check_sequence(name: str, items: list[_Item], one_object: bool, short_side: int | None) -> _Sequence:
    """Decodes every file once: what a data set holds should be readable, and masks fit their frames."""
    found: set[int] = set()
    sizes, changed = [], []
    for item in items:
        with _open(item.image) as image:
            size = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if item.mask is not None:
            values = _distinct_ids(item.mask, one_object, size)
            found.update(values)
        scale = 1 if short_side is None else min(1, short_side / min(size))
        sizes.append((round(size[0] * scale), round(size[1] * scale)) if scale < 1 else size)
        changed.append(turned or scale < 1)
    found -= {0} if one_object else {0, VOID}
    # 255 tells readers that masks have one object, whatever their values; plain ids need no telling.
    object_ids = sorted(found) if not one_object or found <= {1} else [VOID]
    if not object_ids:
        raise ValueError(f"Sequence {name!r} must show an object in one of its masks; all are empty.")
    return _Sequence(name, items, object_ids, sizes, changed)


def _open(path: Path) -> Image.Image:
    """An image file, decoded."""
    try:
        image = Image.open(path)
        image.load()
    except READ_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return image


def _distinct_ids(path: Path, one_object: bool, size: tuple[int, int]) -> list[int]:
    """The values of a mask that must have a frame's size."""
    with _open(path) as image:
        # Read anew where bits matter: what is decoded does not tell how many there were.
        mask = mask_values(image, True, str(path)) if one_object else read_annotation(path, False)
    if mask.shape[::-1] != size:
        raise ValueError(
            f"{path} must have its frame's size {size[0]}x{size[1]}, got {mask.shape[1]}x{mask.shape[0]}."
        )
    return np.unique(mask).astype(int).tolist()


def _rows(sequence: _Sequence) -> Iterator[dict]:
    """A sequence's rows."""
    for item, size, changed in zip(sequence.items, sequence.sizes, sequence.changed, strict=True):
        frame = {"bytes": item.image.read_bytes(), "path": item.image.name}
        if changed:
            frame = _encode_frame(item.image, size)
        mask = None
        if item.mask is not None:
            mask = {"bytes": _mask_bytes(item.mask, size), "path": item.mask.name}
        yield {
            "sequence": sequence.name,
            "frame_index": item.index,
            "frame": frame,
            "mask": mask,
            "object_ids": sequence.object_ids,
        }


def _encode_frame(path: Path, size: tuple[int, int]) -> dict:
    """A frame of another size, in the file's own format; one that only loses its orientation, without loss."""
    with _open(path) as image:
        if image.size == size:
            suffix, changed = ".png", image
        else:
            suffix = path.suffix.lower()
            changed = to_rgb(image).resize(size, Image.Resampling.LANCZOS)
    changed.info.pop("exif", None)  # some writers of Pillow take it over
    buffer = io.BytesIO()
    kind = Image.registered_extensions()[suffix]
    changed.save(buffer, kind, **({"quality": _JPEG_QUALITY} if kind == "JPEG" else {}))
    return {"bytes": buffer.getvalue(), "path": f"{path.stem}{suffix}"}


def _mask_bytes(path: Path, size: tuple[int, int]) -> bytes:
    """A mask's file, or a smaller one with the same palette."""
    with _open(path) as image:
        if image.size == size:
            return path.read_bytes()
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


class _Shards:
    """Writes rows into files of bounded size; a row group is a sequence, or a part of a long one."""

    def __init__(self, folder: Path, split: str, schema: Schema, limit: int):
        self._folder, self._split, self._schema, self._limit = folder, split, schema, limit
        self._writer: ParquetWriter | None = None
        self._parts: list[Path] = []
        self._pending: list[dict] = []
        self._pending_bytes = self._shard_bytes = 0
        self.num_rows = self.size = 0

    @property
    def num_shards(self) -> int:
        """Files so far."""
        return len(self._parts)

    def start_sequence(self, expected: int) -> None:
        """Ends the row group, and the file where about `expected` bytes more would not fit."""
        self._flush()
        if self._shard_bytes + expected > self._limit:
            self._close()

    def add(self, row: dict) -> None:
        """Takes one row."""
        size = sum(len(row[column]["bytes"]) for column in ("frame", "mask") if row[column])
        if self._shard_bytes + size > self._limit:
            self._flush()
            self._close()
        elif self._pending_bytes + size > _ROW_GROUP_BYTES:
            self._flush()
        self._pending.append(row)
        self._pending_bytes += size
        self._shard_bytes += size
        self.size += size
        self.num_rows += 1

    def finish(self) -> None:
        """Writes what is left, and names the files by how many there are; those of an earlier export go."""
        self._flush()
        self._close()
        for path in self._folder.glob(f"{self._split}-?????-of-?????.parquet"):
            path.unlink()
        for number, part in enumerate(self._parts):
            os.replace(part, self._folder / f"{self._split}-{number:05d}-of-{len(self._parts):05d}.parquet")

    def _flush(self) -> None:
        if not self._pending:
            return
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        if self._writer is None:
            self._parts.append(self._folder / f".{self._split}-{len(self._parts):05d}.part")
            # Images are compressed already, and their smallest and largest value is of no use to anybody.
            plain = ["sequence", "frame_index"]
            self._writer = ParquetWriter(
                self._parts[-1], self._schema, compression="NONE", use_dictionary=plain, write_statistics=plain
            )
        self._writer.write_table(pyarrow.Table.from_pylist(self._pending, self._schema))
        self._pending, self._pending_bytes = [], 0

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._shard_bytes = None, 0


__all__ = ["SPLITS", "ExportedDataset", "SplitCounts", "export_davis"]
