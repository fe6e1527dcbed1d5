"""Frames and masks decoded once into flat uint8 arrays on disk, so that a training step reads plain memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from ..image_processing_deformvos import to_rgb


logger = logging.get_logger(__name__)

VOID = 255
_CACHE_FORMAT = 2
# What Pillow raises for broken files, found by cutting files short and flipping their bytes.
READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
_PROPORTION_TOLERANCE = 0.03


class Frame(Protocol):
    """
    What a store is built from: one frame with its mask, not decoded yet.

    Both `read_` methods run in worker threads, and raise one of `READ_ERRORS` where a frame is broken.

    Attributes:
        sequence (`str`): The sequence that it belongs to.
        name (`str`): Its name in the sequence.
        label (`str`): What messages call it.
    """

    sequence: str

    @property
    def name(self) -> str:
        """Its name in the sequence."""

    @property
    def label(self) -> str:
        """What messages call it."""

    def read_image(self) -> Image.Image:
        """The picture, RGB, at its own size."""

    def read_mask(self, merge: bool | str) -> np.ndarray:
        """The mask as [`read_annotation`] returns it."""


@dataclass(frozen=True)
class FrameEntry:
    """One frame on disk: which sequence it belongs to, its image and its mask."""

    sequence: str
    image: Path
    mask: Path

    @property
    def name(self) -> str:
        """The image file's name without its suffix."""
        return self.image.stem

    @property
    def label(self) -> str:
        """Both files."""
        return f"{self.image} with {self.mask}"

    def read_image(self) -> Image.Image:
        """The picture, RGB, at its own size."""
        with Image.open(self.image) as handle:
            return to_rgb(handle)

    def read_mask(self, merge: bool | str) -> np.ndarray:
        """See [`read_annotation`]."""
        return read_annotation(self.mask, merge)


@dataclass(frozen=True)
class ObjectBox:
    """Where one object lies in one stored frame; `box` is (x0, y0, x1, y1), exclusive at the end, in pixels."""

    object_id: int
    area: int
    box: tuple[int, int, int, int]


def default_cache_dir() -> Path:
    """Folder of decoded data sets: `$DEFORMVOS_CACHE`, else `~/.cache/deformvos`."""
    return Path(os.environ.get("DEFORMVOS_CACHE", Path.home() / ".cache" / "deformvos"))


def report_missing(folder: str, names: list[str], on_error: str, what: str = "images have no mask") -> None:
    """Warns of frames that lack something, or raises, naming them."""
    if not names:
        return
    listed = ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")
    message = f"{folder}: {len(names)} {what}: {listed}"
    if on_error == "raise":
        raise ValueError(f"{message}; add the files, or let such frames be skipped.")
    logger.warning(f"{message}; they are left out.")


def read_annotation(path: Path, merge: bool | str) -> np.ndarray:
    """
    Reads a mask file as ids.

    Args:
        path (`Path`): A palette, grayscale, boolean or RGB image. RGB files must hold gray values.
        merge (`bool` or `str`): Whether every value above 0 (1, 255 or an instance id) is one and the same object.
            Otherwise values are ids and 255 is void. `"grays"`: values up to 255 say how much of a pixel the one
            object covers, and half is enough.

    Returns:
        `np.ndarray` of shape `(height, width)`, uint8.

    Raises:
        ValueError: If `merge` is false and the file holds colours that are neither palette entries nor grays, grays
            of two or four bits, or ids above 255.
    """
    with Image.open(path) as image:
        return mask_ids(image, merge, str(path))


def mask_ids(image: Image.Image, merge: bool | str, label: str) -> np.ndarray:
    """The ids of an opened mask, see [`read_annotation`]; `label` names it in errors."""
    values = mask_values(image, merge, label)
    mask = _as_uint8(values)
    if not merge:
        stray = values[(values < 0) | (values > VOID)]
        if stray.size:
            raise ValueError(f"{label} must hold ids from 0 to 255, got {stray.max()}; number its objects anew.")
        return mask
    # Files hold 0/1 as often as 0/255: a threshold at 127 would turn the former into empty masks.
    threshold = 127 if merge == "grays" and mask.max() > 1 else 0
    return (mask > threshold).astype(np.uint8)


def mask_values(image: Image.Image, merge: bool | str, label: str) -> np.ndarray:
    """What an opened mask holds, `(height, width)`, in the file's own type; with `merge` also the most of colours."""
    if not merge:
        refuse_stretched(image, label)
    if image.mode in ("P", "L", "1") or image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if not image.mode.startswith("RGB"):
        return np.asarray(image.convert("L"))
    channels = np.asarray(image.convert("RGB"))
    values = channels.max(-1)
    if not merge and (channels.min(-1) != values).any():
        raise ValueError(f"{label} must hold ids as palette entries or grays, got colours.")
    return values


def refuse_stretched(image: Image.Image, label: str) -> None:
    """Refuses grays of two or four bits, unless they are decoded already: nothing tells what they were after that."""
    for tile in getattr(image, "tile", ()):
        if tile[3] in ("L;2", "L;4"):
            raise ValueError(
                f"{label} must hold ids in eight bits or as palette entries, got grays of {tile[3][-1]} bits, which "
                "are read as shades from 0 to 255; save it with eight bits, or merge its values."
            )


def _as_uint8(values: np.ndarray) -> np.ndarray:
    """Values of masks, those of 16 and more bits clipped."""
    return np.ascontiguousarray(values if values.itemsize == 1 else np.clip(values, 0, VOID), dtype=np.uint8)


def first_masks(paths: Iterable[Path]) -> list[np.ndarray]:
    """Values of the first few masks that show something, for [`uses_255`]; decoding reports the broken ones."""
    return list(islice((mask for mask in _readable_masks(paths) if mask.any()), 8))


def _readable_masks(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        try:
            with Image.open(path) as image:
                mask = _as_uint8(mask_values(image, False, str(path)))
        except READ_ERRORS as error:
            _refuse_passing(error, str(path))
        else:
            yield mask


def _refuse_passing(error: Exception, label: str) -> None:
    """Raises what may be over at the next try, such as an error of a network drive: that is no broken file."""
    # Pillow's own errors have no number, but it may seek to places that a broken file names and no file has; and a
    # file that is not there is missing, not out of reach.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT):
        raise OSError(
            f"Reading {label} failed: {error}. The system reports this, so the file need not be broken, and nothing "
            "was kept: try again, and if it fails again, look at the drive and the file's permissions."
        ) from error


def uses_255(masks: Iterable[np.ndarray]) -> bool:
    """Whether 255 is the object of some masks: nothing but 0 and 255, or grays up to 255 along its edges."""
    areas = sum((np.bincount(mask.ravel(), minlength=256) for mask in masks), np.zeros(256, int))
    others = np.flatnonzero(areas[1:VOID]) + 1
    # Edges have shades from dark to light and are thinner than what they surround. Ids hardly get as far as the light
    # ones, and void that is a rim or unlabelled is less than they are.
    is_edged = others.size > 0 and others[-1] > 127 and areas[VOID] > areas[others].sum()
    return bool(areas[VOID] and (is_edged or not 1 <= others.size < 64))


def _read_entry(entry: Frame, short_side: int, merge: bool | str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes and resizes one frame and its mask."""
    image, mask = entry.read_image(), entry.read_mask(merge)
    _check_proportions(image.size, mask.shape[::-1])
    scale = short_side / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
    if mask.shape[::-1] != image.size:
        mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.NEAREST))
    return np.asarray(image), mask


def _check_proportions(image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Refuses a mask that would have to be stretched onto its image; both are width and height."""
    across, down = image[0] * mask[1], image[1] * mask[0]
    if abs(across - down) > _PROPORTION_TOLERANCE * max(across, down):
        raise ValueError(
            f"the image is {image[0]}x{image[1]} and the mask {mask[0]}x{mask[1]}, whose proportions must agree to "
            f"{_PROPORTION_TOLERANCE:.0%}; a usual cause is EXIF orientation: save the photo upright, without that tag"
        )


def find_objects(mask: np.ndarray) -> list[ObjectBox]:
    """Area and bounding box of every id of a `(height, width)` mask, void and background left out."""
    objects = []
    for object_id in np.flatnonzero(np.bincount(mask.ravel(), minlength=256)):
        if object_id in (0, VOID):
            continue
        where = mask == object_id
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(ObjectBox(int(object_id), int(where.sum()), box))
    return objects


class ArrayStore:
    """
    Still images in memory, for whoever has arrays and no files; what [`ClipSampler`] reads of a [`FrameStore`].

    Args:
        images (`list[np.ndarray]`): uint8 of shape `(height, width, 3)`.
        masks (`list[np.ndarray]`): uint8 ids of shape `(height, width)`, 255 = void.
    """

    def __init__(self, images: list[np.ndarray], masks: list[np.ndarray]):
        self._images, self._masks = images, masks
        self.sizes = [mask.shape for mask in masks]
        self.objects = [find_objects(mask) for mask in masks]

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, index: int) -> np.ndarray:
        """Image `index`."""
        return self._images[index]

    def mask(self, index: int) -> np.ndarray:
        """Mask `index`."""
        return self._masks[index]


class FrameStore:
    """
    Decoded frames of one data set, of any sizes, in two flat memory-mapped files.

    Frames of a sequence are neighbours; a set of still images is a store whose sequences have one frame each. Use
    [`FrameStore.build`] to make one (or to open it from the cache).

    Args:
        folder (`Path`): A folder that [`FrameStore.build`] wrote.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        meta = json.loads((self.folder / "meta.json").read_text())
        self.name: str = meta["name"]
        self.skipped: list[str] = meta.get("skipped", [])
        self.frame_names: list[str] = meta["frames"]
        self.sizes: list[tuple[int, int]] = [tuple(size) for size in meta["sizes"]]
        self.sequences: dict[str, range] = {name: range(*span) for name, span in meta["sequences"].items()}
        self.objects: list[list[ObjectBox]] = [
            [ObjectBox(item[0], item[1], tuple(item[2:])) for item in frame] for frame in meta["objects"]
        ]
        self._offsets = np.concatenate([[0], np.cumsum([h * w for h, w in self.sizes])])
        self._images, self._masks = self._open("images.bin", channels=3), self._open("masks.bin", channels=1)

    def _open(self, name: str, channels: int) -> np.memmap:
        """One of the flat arrays, which holds the pixels of every frame."""
        path, wanted = self.folder / name, channels * int(self._offsets[-1])
        found = path.stat().st_size if path.is_file() else 0
        if found != wanted:
            raise ValueError(
                f"{path} must have {wanted} bytes, got {found}: it was copied or written in part. Remove "
                f"{self.folder}, and the data are decoded again."
            )
        return np.memmap(path, dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self.sizes)

    def image(self, index: int) -> np.ndarray:
        """Frame `index` as a `(height, width, 3)` uint8 view."""
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._images[3 * start : 3 * stop].reshape(*self.sizes[index], 3)

    def mask(self, index: int) -> np.ndarray:
        """Mask of frame `index` as a `(height, width)` uint8 view of ids, 255 = void."""
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._masks[start:stop].reshape(self.sizes[index])

    @classmethod
    def build(
        cls,
        name: str,
        entries: Iterable[Frame],
        short_side: int,
        merge: bool | str,
        cache_dir: str | Path | None = None,
        on_error: str = "skip",
        show_progress_bar: bool = True,
        fingerprint: str | None = None,
    ) -> FrameStore:
        """
        Decodes frames into a new store, or opens the one that an earlier call left in the cache.

        Args:
            name (`str`): Name of the data set, used in messages and in the cache folder's name.
            entries (iterable of [`Frame`]): Frames; those of a sequence follow one another in time order. Without
                `fingerprint` they are [`FrameEntry`], whose files tell whether a store of them is in the cache.
            short_side (`int`): Short side of stored frames in pixels; smaller frames stay as they are.
            merge (`bool` or `str`): Whether all mask values above 0 are one object, see [`read_annotation`].
            cache_dir (`str` or `Path`, *optional*): Where stores live; default [`default_cache_dir`].
            on_error (`str`): `"skip"` reports and leaves out files that cannot be read, `"raise"` refuses them.
            show_progress_bar (`bool`): Whether decoding shows a bar.
            fingerprint (`str`, *optional*): Text that changes whenever the frames do. `entries` may then be a
                generator: it is run only if the store is not in the cache, and read no further ahead than decoding
                needs, so a set passes through memory frame by frame.

        Raises:
            ValueError: If there are no readable frames, `on_error` is unknown, or a file is broken or does not fit its
                mask and `on_error` is `"raise"`.
            OSError: If the system cannot read a file, whatever `on_error`: a later try may succeed.
        """
        if on_error not in ("skip", "raise"):
            raise ValueError(f'`on_error` must be "skip" or "raise", got {on_error!r}.')
        if fingerprint is None:
            entries = list(entries)
            if not entries:
                raise ValueError(f"Data set {name!r} has no frame with a mask; check its folder.")
        parent = Path(cache_dir) if cache_dir is not None else default_cache_dir()
        folder = parent / f"{name}-{short_side}-{_fingerprint(entries, short_side, merge, fingerprint)}"
        if (folder / "meta.json").is_file():
            store = cls(folder)
            _report_unreadable(store, on_error)
            return store
        parent.mkdir(parents=True, exist_ok=True)
        # `mkdtemp` would close the store to everybody else who shares the cache.
        temporary = parent / f".building-{uuid.uuid4().hex}"
        temporary.mkdir()
        try:
            skipped: list[str] = []
            decoded = _decode(entries, short_side, merge, on_error, name, show_progress_bar, skipped)
            _write(temporary, name, decoded, skipped)
            try:
                os.replace(temporary, folder)
            except OSError:
                # Another process was quicker, or a folder without its description is in the way.
                if not (folder / "meta.json").is_file():
                    shutil.rmtree(folder)
                    os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        store = cls(folder)
        _report_unreadable(store, on_error)
        return store


def _fingerprint(entries: Iterable[FrameEntry], short_side: int, merge: bool | str, given: str | None) -> str:
    """Hash of everything that decides a store's content."""
    # The last item is that of an option which is gone; without it every store would be decoded again.
    digest = hashlib.sha256(json.dumps([_CACHE_FORMAT, short_side, merge, False]).encode())
    if given is not None:
        digest.update(given.encode())
        return digest.hexdigest()[:16]
    for entry in entries:
        for path in (entry.image, entry.mask):
            status = path.stat()
            digest.update(f"{entry.sequence}|{path.resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _report_unreadable(store: FrameStore, on_error: str) -> None:
    """Warns of frames that a store lacks because they cannot be read, or refuses the store."""
    if not store.skipped:
        return
    listed = "; ".join(store.skipped[:10]) + (" ..." if len(store.skipped) > 10 else "")
    message = f"Data set {store.name!r}: cannot read {listed}"
    if on_error == "raise":
        raise ValueError(message)
    logger.warning(f"{message}; {len(store.skipped)} frames are left out, all listed in {store.folder}/meta.json.")


def _decode(
    entries: Iterable[Frame],
    short_side: int,
    merge: bool | str,
    on_error: str,
    name: str,
    show: bool,
    skipped: list[str],
) -> Iterator[tuple[Frame, np.ndarray, np.ndarray]]:
    """Yields decoded frames in order, read ahead by a few threads; broken ones go to `skipped`, or are refused."""
    workers = min(4, os.cpu_count() or 1)
    total = len(entries) if isinstance(entries, list) else None
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=total, desc=f"decoding {name}", disable=not show) as bar,
    ):
        pending: deque = deque()
        upcoming = iter(entries)
        while True:
            while len(pending) < 4 * workers and (entry := next(upcoming, None)) is not None:
                pending.append((entry, pool.submit(_read_entry, entry, short_side, merge)))
            if not pending:
                return
            entry, future = pending.popleft()
            try:
                image, mask = future.result()
            except READ_ERRORS as error:
                _refuse_passing(error, entry.label)
                skipped.append(f"{entry.label}: {error}")
                if on_error == "raise":
                    raise ValueError(f"Data set {name!r}: cannot read {skipped[-1]}") from error
            else:
                yield entry, image, mask
            bar.update()


def _write(
    folder: Path, name: str, decoded: Iterator[tuple[Frame, np.ndarray, np.ndarray]], skipped: list[str]
) -> None:
    """Writes the flat arrays first and the description last."""
    meta: dict = {"name": name, "frames": [], "sizes": [], "objects": [], "sequences": {}}
    with open(folder / "images.bin", "wb") as images, open(folder / "masks.bin", "wb") as masks:
        for entry, image, mask in decoded:
            images.write(image.tobytes())
            masks.write(mask.tobytes())
            index = len(meta["sizes"])
            span = meta["sequences"].setdefault(entry.sequence, [index, index])
            if span[1] != index:
                raise ValueError(f"Data set {name!r}: the frames of sequence {entry.sequence!r} must be neighbours.")
            span[1] = index + 1
            meta["frames"].append(entry.name)
            meta["sizes"].append(mask.shape)
            meta["objects"].append([[item.object_id, item.area, *item.box] for item in find_objects(mask)])
    if not meta["sizes"]:
        reason = "; ".join(skipped[:3]) or "there is none with a mask"
        raise ValueError(f"Data set {name!r}: no frame could be read; {reason}.")
    meta["skipped"] = skipped
    (folder / "meta.json").write_text(json.dumps(meta))
