"""One visitor's video, marks and masks: on disk, so that memory does not grow with the length of the video."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from operator import index as as_index
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from hf_deformvos.masks_deformvos import overrule
from hf_deformvos.video import (
    VideoError,
    VideoReader,
    colorblind_palette,
    draw_overlay,
    mask_file_name,
    read_palette_png,
    write_palette_png,
)


logger = logging.getLogger(__name__)

PALETTE = colorblind_palette()

# Demuxers of files that hold their own pictures. Others (playlists, lists of images) make FFmpeg open further files,
# which a visitor must not choose.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,gif,apng,asf,m4v,h264,hevc,ivf,obu,mxf,"
    "nut,mjpeg,yuv4mpegpipe,dv,rm"
)
_JPEG_QUALITY = 95
# Seconds after which a workspace that nobody uses makes room for somebody else.
_IDLE_WHEN_FULL = 300.0
# Seconds after a page was closed in which what it had asked for may still arrive, and is no sign of life.
_STRAGGLING = 10.0
# Seconds for which a run that waits for its turn keeps its workspace: it may have been lost on the way.
_LONGEST_WAIT = 6 * 3600.0
# Free space is looked at once in so many frames.
_DISK_INTERVAL = 50
_FALLBACK_FPS = 25.0
# OpenCV has the colours in another order; by number of channels.
_TO_BGR = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
# Pictures of each kind that are kept for the browser: those before have been fetched, or will not be any more.
_KEPT_PICTURES = 8
# What browsers play, by and large: codecs by the name of the file, and how their pixels may be stored.
_PLAYABLE = {
    **dict.fromkeys((".mp4", ".m4v", ".mov"), ("h264", "vp9", "av1")),
    ".webm": ("vp8", "vp9", "av1"),
}
_PLAYABLE_PIXELS = ("yuv420p", "yuvj420p", "yuva420p")


class DemoError(ValueError):
    """What the visitor can mend; the message is shown on the page as it is."""


@dataclass(frozen=True)
class Limits:
    """
    What one visitor may use of the machine. The environment overrides every field: `DEFORMVOS_MAX_SECONDS=60`.

    Attributes:
        max_bytes (`int`): of the uploaded file.
        max_seconds (`float`), max_frames (`int`): of the video; longer ones are refused.
        max_side (`int`): pixels of the longer side; larger videos are refused.
        working_short_side (`int`): pixels of the shorter side; larger frames are scaled down to it.
        max_objects (`int`): ids are 1 to this; as many as the palette has colours that stay apart.
        idle_seconds (`float`): a workspace that nobody has used for so long is removed.
        left_seconds (`float`): the same once the page was closed; a page whose connection broke comes back by then.
        max_workspaces (`int`): visitors at once.
        min_free_disk (`int`): bytes that stay free on the disk.
    """

    max_bytes: int = 200_000_000
    max_seconds: float = 600.0
    max_frames: int = 18_000
    max_side: int = 4096
    working_short_side: int = 720
    max_objects: int = 7
    idle_seconds: float = 3600.0
    left_seconds: float = 180.0
    max_workspaces: int = 32
    min_free_disk: int = 1_000_000_000

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Limits:
        """
        The limits, with those that the environment overrides.

        Raises:
            ValueError: if a variable is no positive number.
        """
        values = {}
        for limit in fields(cls):
            name = f"DEFORMVOS_{limit.name.upper()}"
            text = environment.get(name, "").strip()
            if not text:
                continue
            try:
                values[limit.name] = type(limit.default)(text)
            except ValueError:
                values[limit.name] = 0
            if not 0 < values[limit.name] < float("inf"):
                raise ValueError(f"The environment variable {name} must be a positive number, got {text!r}.")
        return cls(**values)

    def sentence(self) -> str:
        """The limits in words, for the page."""
        return (
            f"Up to {duration_in_words(self.max_seconds)}, {self.max_frames:,} frames, {_megabytes(self.max_bytes)} "
            f"and {self.max_side} pixels a side. "
            f"Pictures with a short side of more than {self.working_short_side} pixels are scaled down to that."
        )


LIMITS = Limits.from_environment()


def whole_number(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """
    A setting from the environment.

    Raises:
        ValueError: if it is no whole number of at least 1.
    """
    text = environment.get(name, "").strip() or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"The environment variable {name} must be a whole number of at least 1, got {text!r}.")
    return int(text)


@dataclass(frozen=True)
class VideoFacts:
    """
    What is known of an imported video.

    Attributes:
        name (`str`): of the file.
        width, height (`int`): of the frames as they are kept, in pixels.
        fps (`float`): frames a second, on average where the rate varies.
        num_frames (`int`): how many were decoded.
        seconds (`float`): from the first frame's start to the last one's end.
        notes (`list[str]`): sentences on what the visitor should know: scaled down, damaged, sound left out.
    """

    name: str
    width: int
    height: int
    fps: float
    num_frames: int
    seconds: float
    notes: list[str] = field(default_factory=list)


class _Mark(NamedTuple):
    """Of a marked frame: whether the map says all about it or only about the objects in it, and which those are."""

    whole: bool
    ids: frozenset[int]


class FrameFolder(Sequence):
    """Frames as JPEG files, read one at a time in any order: what a session takes as its video."""

    def __init__(self, folder: Path, num_frames: int):
        self._folder = folder
        self._num_frames = num_frames

    def __len__(self) -> int:
        return self._num_frames

    def __getitem__(self, frame_idx: int) -> np.ndarray:
        """Frame as uint8 RGB `(height, width, 3)`; `IndexError` where there is none."""
        frame_idx = as_index(frame_idx)
        if frame_idx < 0:
            frame_idx += self._num_frames
        if not 0 <= frame_idx < self._num_frames:
            raise IndexError(f"There is no frame {frame_idx} in a video of {self._num_frames} frames.")
        with on_disk():
            encoded = np.fromfile(self._folder / _frame_name(frame_idx), dtype=np.uint8)
        picture = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
        return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


class _Marks(Mapping):
    """The visitor's id maps by frame, read from their files when they are asked for."""

    def __init__(self, video: _Video):
        self._video = video

    def __getitem__(self, frame_idx: int) -> np.ndarray:
        if frame_idx not in self._video.marked:
            raise KeyError(frame_idx)
        try:
            return read_palette_png(self._video.marks_folder / mask_file_name(frame_idx))
        except FileNotFoundError as error:  # cleared since it was asked for
            raise KeyError(frame_idx) from error

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._video.marked))

    def __len__(self) -> int:
        return len(self._video.marked)

    def __contains__(self, frame_idx: object) -> bool:
        return frame_idx in self._video.marked


class _Video:
    """Everything that belongs to one imported video; replaced as a whole. In memory: some hundred bytes a frame."""

    def __init__(self, folder: Path, facts: VideoFacts, timestamps: array, max_objects: int):
        self.folder = folder
        self.facts = facts
        self.is_playable = False
        self.timestamps = timestamps
        self.frames = FrameFolder(folder / "frames", facts.num_frames)
        self.masks_folder = folder / "masks"
        self.marks_folder = folder / "marks"
        # Results that a correction took the place of.
        self.found_folder = folder / "found"
        for each in (self.masks_folder, self.marks_folder, self.found_folder):
            each.mkdir()
        self.marked: dict[int, _Mark] = {}
        # Pixels of each object, -1 in the background's column where a frame has no result; boxes x0, y0, x1, y1.
        self.areas = np.zeros((facts.num_frames, max_objects + 1), dtype=np.int32)
        self.boxes = np.zeros((facts.num_frames, max_objects + 1, 4), dtype=np.uint16)
        self.areas[:, 0] = -1


class Workspace:
    """
    One visitor's video with its marks and masks, in a folder of its own.

    One thing is done at a time: importing, following and exporting each take the workspace with `busy`. Reading is
    always allowed.

    Args:
        root (`Path`): a folder that this workspace may make its own folder in.
        limits (`Limits`, *optional*): by default those of the environment.

    Attributes:
        has_left (`bool`): whether the page was closed, or seems so, since it was last seen.
        waiting_since (`float`, *optional*): when the run that waits for its turn was asked for.
        source (`Path`, *optional*): the file that the video was uploaded as; the page plays it.
        uploads (`dict[Path, int]`): what the visitor sent and Gradio keeps, with each file's number on disk.
        version (`int`): grows with every change of marks and results.
    """

    def __init__(self, root: Path, limits: Limits = LIMITS):
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        self.limits = limits
        self.folder = Path(tempfile.mkdtemp(prefix="video-", dir=root))
        self.names: dict[int, str] = {}
        self.stop = threading.Event()
        self.last_used = time.monotonic()
        self.has_left = False
        self.waiting_since: float | None = None
        self.source: Path | None = None
        self.uploads: dict[Path, int] = {}
        self.version = 0
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closed = False
        self._working_at = ""
        self._video: _Video | None = None
        self._num_imports = 0
        self._pictures: dict[str, list[Path]] = {}

    # Life

    @property
    def is_closed(self) -> bool:
        """Whether the visitor has left."""
        return self._closed

    @property
    def is_busy(self) -> bool:
        """Whether something is being done."""
        return self._lock.locked()

    @property
    def is_waiting(self) -> bool:
        """Whether a run waits for its turn, and somebody for the run."""
        since = self.waiting_since
        return since is not None and not self.has_left and time.monotonic() - since < _LONGEST_WAIT

    @property
    def should_stop(self) -> bool:
        """Whether what is being done should end with what it has."""
        return self._closed or self.stop.is_set()

    def touch(self):
        """Say that the visitor is there."""
        self.last_used = time.monotonic()

    @contextmanager
    def busy(self, doing: str = "working"):
        """
        Take the workspace for one piece of work; clears `stop`.

        Raises:
            DemoError: if another one goes on, or the workspace is closed.
        """
        if not self._lock.acquire(blocking=False):
            raise DemoError(f"This page is still {self._working_at or 'working'}. Wait until it is done, or stop it.")
        try:
            self._check_open()
            self._working_at = doing
            self.stop.clear()
            self.touch()
            yield
        finally:
            self.touch()
            self._working_at = ""
            self._lock.release()
            if self._closed:
                shutil.rmtree(self.folder, ignore_errors=True)

    def close(self, wait: float = 5.0):
        """
        Stop what is being done and remove the folder. May be called again, and from any thread.

        Args:
            wait (`float`): seconds that the work is given to end; the folder goes then in any case.
        """
        self._closed = True
        self.stop.set()
        held = self._lock.acquire(timeout=wait)
        self._video = None
        shutil.rmtree(self.folder, ignore_errors=True)
        if held:
            self._lock.release()

    def keep_picture(self, kind: str, image: np.ndarray, suffix: str = ".png") -> Path:
        """
        A file with a picture for the browser, which may ask for it again: it is not in the folder, which goes at once.

        Args:
            kind (`str`): what shows it; of each kind the last few are kept.
            image (`np.ndarray` of shape `(height, width, 3 or 4)`, uint8): RGB or RGBA.
            suffix (`str`, *optional*, defaults to `".png"`): the kind of file.

        Raises:
            DemoError: if the disk is full.
        """
        self._check_open()
        check_disk(self.folder, self.limits)
        folder = self.folder.with_name(self.folder.name.replace("video", "pictures"))
        encoded = cv2.imencode(suffix, cv2.cvtColor(image, _TO_BGR[image.shape[2]]))[1]
        path = folder / f"{secrets.token_hex(16)}{suffix}"
        with on_disk():
            folder.mkdir(exist_ok=True)
            path.write_bytes(encoded)
        kept = self._pictures.setdefault(kind, [])
        kept.append(path)
        while len(kept) > _KEPT_PICTURES:
            kept.pop(0).unlink(missing_ok=True)
        return path

    def receive(self, path: Path):
        """A file was uploaded."""
        with suppress(OSError):
            self.uploads[path] = path.stat().st_ino

    @property
    def loose(self) -> dict[Path, int | None]:
        """All files outside of the folder; the number on disk of those that are not this workspace's alone."""
        return {**self.uploads, **dict.fromkeys(path for kept in self._pictures.values() for path in kept)}

    def keep_files(self):
        """Makes young what the page still shows: Gradio removes what is old."""
        shown = [path for kept in list(self._pictures.values()) for path in list(kept)]
        for path in (*shown, *self.folder.glob("downloads/*/*"), *filter(None, [self.source])):
            with suppress(OSError):
                os.utime(path)

    def _check_open(self):
        if self._closed:
            raise DemoError("This page was idle for too long and its video was removed. Load the page again.")

    def _need_video(self) -> _Video:
        self._check_open()
        video = self._video
        if video is None:
            raise DemoError("There is no video yet. Upload one first.")
        return video

    def _need_frame(self, frame_idx: int) -> _Video:
        video = self._need_video()
        if not 0 <= frame_idx < video.facts.num_frames:
            raise DemoError(f"The video has the frames 0 to {video.facts.num_frames - 1}, got {frame_idx}.")
        return video

    # The video

    @property
    def facts(self) -> VideoFacts | None:
        """What is known of the video, `None` before there is one."""
        return None if self._video is None else self._video.facts

    @property
    def is_playable(self) -> bool:
        """Whether browsers play the file that the video came from."""
        return self._video is not None and self._video.is_playable

    @property
    def frames(self) -> FrameFolder:
        """The frames, in any order; `DemoError` before there is a video."""
        return self._need_video().frames

    def timestamp(self, frame_idx: int) -> float:
        """When a frame is shown, in seconds from the first one."""
        return self._need_frame(frame_idx).timestamps[frame_idx]

    def import_video(self, path: str | os.PathLike) -> Iterator[tuple[int, int | None]]:
        """
        Decode a video file to frames on disk. The earlier video, its marks and masks go when all has been decoded;
        if that fails they stay.

        Args:
            path (`str` or `os.PathLike`): the file.

        Yields:
            `tuple[int, int | None]`: frames done, and frames expected where the file says so.

        Raises:
            DemoError: if the file is no video, is damaged beyond use, exceeds a limit, the disk is full, or it was
                stopped.
        """
        name = Path(path).name[-80:]
        with self.busy("reading a video"):
            self._num_imports += 1
            folder = self.folder / str(self._num_imports)
            try:
                (folder / "frames").mkdir(parents=True)
                imported = _Import(Path(path), name, folder, self)
                yield from imported.run()
                video = _Video(folder, imported.facts(), imported.timestamps, self.limits.max_objects)
                video.is_playable = imported.is_playable
            except OSError as error:
                shutil.rmtree(folder, ignore_errors=True)
                self._check_open()
                raise _disk_error(error) from error
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            earlier, self._video = self._video, video
            self.names = {}
            if earlier is not None:
                shutil.rmtree(earlier.folder, ignore_errors=True)

    # Marks: what the visitor gives

    @property
    def marks(self) -> Mapping[int, np.ndarray]:
        """The id maps that were given, by frame in ascending order; read from disk one at a time."""
        return {} if self._video is None else _Marks(self._video)

    def set_marks(self, frame_idx: int, id_map: np.ndarray, whole: bool | None = None):
        """
        Give a frame's objects; an empty map takes the marks of an unfollowed frame away.

        Args:
            frame_idx (`int`): the frame.
            id_map (`np.ndarray` of shape `(height, width)`, integer): 0 is background.
            whole (`bool`, *optional*):
                Whether the map says all about its frame: an object that is not in it is not to be seen. By default
                so where the frame has a result, which the map then corrects and replaces; elsewhere the map says only
                what is in it, and other objects go on.

        Raises:
            DemoError: if size or ids do not fit.
        """
        video = self._need_frame(frame_idx)
        ids = self._checked(id_map)
        has_result = video.areas[frame_idx, 0] >= 0
        whole = bool(has_result) if whole is None else whole
        if not whole and not ids.any():
            self.clear_marks(frame_idx)
            return
        name = mask_file_name(frame_idx)
        with self._writing, on_disk():
            if whole and has_result and not (video.found_folder / name).exists():
                shutil.copyfile(video.masks_folder / name, video.found_folder / name)
            write_palette_png(video.marks_folder / name, ids, PALETTE)
            present = np.unique(ids[ids > 0]).tolist()
            video.marked[frame_idx] = _Mark(whole, frozenset(present))
        for obj_id in present:
            self.names.setdefault(obj_id, f"Object {obj_id}")
        if whole and has_result:
            self.write_mask(frame_idx, ids)
        self.version += 1
        self.touch()

    def is_whole(self, frame_idx: int) -> bool:
        """Whether a marked frame's map says all about it; see `set_marks`."""
        mark = self._need_video().marked.get(frame_idx)
        return mark is not None and mark.whole

    def clear_marks(self, frame_idx: int | None = None):
        """Forget the marks of one frame, or of all; results stay."""
        if self._video is None:
            return
        for marked in list(self._video.marked) if frame_idx is None else [frame_idx]:
            if self._video.marked.pop(marked, None) is not None:
                for folder in (self._video.marks_folder, self._video.found_folder):
                    (folder / mask_file_name(marked)).unlink(missing_ok=True)
        self.version += 1
        self.touch()

    def clear_frame(self, frame_idx: int):
        """
        Forget the marks of a frame. The result that they corrected comes back; where they corrected none, the frame's
        result goes with them.
        """
        video, found = self._need_frame(frame_idx), None
        with suppress(FileNotFoundError):
            found = read_palette_png(video.found_folder / mask_file_name(frame_idx))
        self.clear_marks(frame_idx)
        if found is not None:
            self.write_mask(frame_idx, found)
            return
        with self._writing:
            video.areas[frame_idx], video.areas[frame_idx, 0] = 0, -1
            self.version += 1  # by the time that a file is missed, it is another version
            (video.masks_folder / mask_file_name(frame_idx)).unlink(missing_ok=True)

    def _checked(self, id_map: np.ndarray) -> np.ndarray:
        """The id map as uint8, `DemoError` if it does not fit the video or the palette."""
        facts, ids = self._need_video().facts, np.asarray(id_map)
        if ids.shape != (facts.height, facts.width):
            raise DemoError(f"A mask must have the video's size {(facts.height, facts.width)}, got {ids.shape}.")
        if ids.dtype.kind not in "iub":
            raise DemoError(f"A mask must hold whole numbers, got {ids.dtype}.")
        if ids.size and (ids.min() < 0 or ids.max() > self.limits.max_objects):
            raise DemoError(
                f"Up to {self.limits.max_objects} objects can be followed at once; a mask holds the numbers 1 to "
                f"{self.limits.max_objects} and 0 for the background, got {ids.min()} to {ids.max()}."
            )
        return ids.astype(np.uint8)

    # Masks: what following gives

    def write_mask(self, frame_idx: int, id_map: np.ndarray, is_found: bool = False):
        """
        Keep a frame's result.

        Args:
            frame_idx (`int`): the frame.
            id_map (`np.ndarray` of shape `(height, width)`, integer): 0 is background.
            is_found (`bool`, defaults to `False`):
                Whether a model found it. What was marked on the frame meanwhile is more to be believed.

        Raises:
            DemoError: if it does not fit or the disk is full.
        """
        video = self._need_frame(frame_idx)
        ids = self._checked(id_map)
        # A correction may come while a run writes the same frame.
        with self._writing, on_disk():
            given = self.marks.get(frame_idx) if is_found else None
            if given is not None:
                ids = given if self.is_whole(frame_idx) else overrule(ids, given)
            write_palette_png(video.masks_folder / mask_file_name(frame_idx), ids)
            areas = np.bincount(ids.ravel(), minlength=video.areas.shape[1])
            for obj_id in np.flatnonzero(areas[1:]) + 1:
                rows, columns = (np.flatnonzero((ids == obj_id).any(axis=axis)) for axis in (1, 0))
                video.boxes[frame_idx, obj_id] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            video.areas[frame_idx] = areas
            self.version += 1

    def mask(self, frame_idx: int) -> np.ndarray | None:
        """A frame's result as uint8 ids, `None` where it was not followed yet."""
        video = self._need_frame(frame_idx)
        if video.areas[frame_idx, 0] < 0:
            return None
        try:
            return read_palette_png(video.masks_folder / mask_file_name(frame_idx))
        except FileNotFoundError:  # cleared, or the page was closed, since it was asked for
            return None

    def mask_path(self, frame_idx: int) -> Path:
        """Where a frame's result lies, once there is one."""
        return self._need_frame(frame_idx).masks_folder / mask_file_name(frame_idx)

    @property
    def done(self) -> np.ndarray:
        """Indices of the frames that have a result, ascending."""
        return np.empty(0, dtype=np.int64) if self._video is None else np.flatnonzero(self._video.areas[:, 0] >= 0)

    @property
    def num_done(self) -> int:
        """How many frames have a result."""
        return len(self.done)

    @property
    def object_ids(self) -> list[int]:
        """Ids that are marked somewhere or were found somewhere, ascending."""
        if self._video is None:
            return []
        found = np.flatnonzero(self._video.areas[:, 1:].max(axis=0, initial=0) > 0) + 1
        return sorted(set(found.tolist()).union(*(mark.ids for mark in list(self._video.marked.values()))))

    def labels(self) -> dict[int, str]:
        """Names by id, of all objects there are, each different: a name given twice gets its number behind it."""
        names = {obj_id: self.names.get(obj_id, "").strip() or f"Object {obj_id}" for obj_id in self.object_ids}
        taken = list(names.values())
        return {obj_id: f"{name} ({obj_id})" if taken.count(name) > 1 else name for obj_id, name in names.items()}

    def overlay(self, frame_idx: int) -> np.ndarray:
        """The frame, uint8 RGB, with its result drawn over it, else with its marks, else as it is."""
        video = self._need_frame(frame_idx)
        picture, ids = video.frames[frame_idx], self.mask(frame_idx)
        if ids is None:
            ids = self.marks.get(frame_idx)
        return picture if ids is None else draw_overlay(picture, ids, PALETTE)

    def areas(self, max_points: int = 1000) -> list[dict]:
        """
        How large each object is over time, for plots.

        Args:
            max_points (`int`): an object; of longer videos every n-th frame is taken.

        Returns:
            `list[dict]`: `frame`, `seconds`, `object` (its label) and `area` in percent of the picture.
        """
        video = self._video
        if video is None:
            return []
        done, pixels = self.done, video.facts.width * video.facts.height
        done = done[:: max(-(-len(done) // max_points), 1)].tolist()
        return [
            {
                "frame": frame_idx,
                "seconds": round(video.timestamps[frame_idx], 3),
                "object": label,
                "area": round(100 * int(video.areas[frame_idx, obj_id]) / pixels, 3),
            }
            for obj_id, label in self.labels().items()
            for frame_idx in done
        ]

    def regions(self, frame_idx: int, object_ids: Sequence[int] | None = None) -> dict[int, dict]:
        """
        Of a followed frame, by object (by default all): `area` in pixels, and `box` `[x0, y0, x1, y1]`, whose last
        two are exclusive, `None` where the object is not seen.
        """
        video = self._need_frame(frame_idx)
        areas, boxes = video.areas[frame_idx].tolist(), video.boxes[frame_idx].tolist()
        ids = self.object_ids if object_ids is None else object_ids
        return {i: {"area": areas[i], "box": boxes[i] if areas[i] else None} for i in ids}


class _Import:
    """One decoding of a file to a folder of JPEG frames, within the limits."""

    def __init__(self, path: Path, name: str, folder: Path, workspace: Workspace):
        self.path, self.name, self.folder, self.workspace = path, name, folder, workspace
        self.limits = workspace.limits
        self.timestamps = array("d")
        self.notes: list[str] = []
        self._fps: float | None = None
        self.is_playable = False
        self._size = (0, 0)
        self._has_sound = False

    def run(self) -> Iterator[tuple[int, int | None]]:
        """Decodes all; yields frames done and frames expected."""
        self._check_file()
        check_disk(self.folder, self.limits)
        self._probe()
        try:
            with VideoReader(self.path) as reader:
                yield from self._decode(reader)
        except VideoError as error:
            raise DemoError(self._explain(error)) from error
        if reader.truncated or reader.num_damaged:
            self.notes.append(
                f"The file is damaged or cut short: {len(self.timestamps)} frames could be read, others are missing."
            )
        if self._has_sound:
            self.notes.append("The sound is left out.")

    def facts(self) -> VideoFacts:
        """What was found; once `run` has ended."""
        times, count = self.timestamps, len(self.timestamps)
        height, width = self._size
        fps = (count - 1) / (times[-1] - times[0]) if count > 1 and times[-1] > times[0] else self._fps
        # The nominal rate where the times agree with it: they are rounded to the clock of the file.
        if self._fps and fps and abs(self._fps / fps - 1) < 0.02:
            fps = self._fps
        fps = fps or _FALLBACK_FPS
        return VideoFacts(self.name, width, height, fps, count, times[-1] + 1 / fps, self.notes)

    def _decode(self, reader: VideoReader) -> Iterator[tuple[int, int | None]]:
        info = reader.info
        self._fps = info.fps
        self._check_length(info.num_frames or 0, (info.num_frames or 0) / info.fps if info.fps else 0.0)
        self._check_side(info.width, info.height)
        self._size = self._working_size(info.height, info.width)
        yield 0, info.num_frames
        for frame in reader:
            if self.workspace.should_stop:
                self.workspace._check_open()
                raise DemoError("Reading the video was stopped.")
            # A clock that jumps back is damaged; mp4 cannot show frames out of order.
            earlier = self.timestamps[-1] if self.timestamps else 0.0
            self.timestamps.append(max(frame.timestamp, earlier))
            self._check_length(frame.index + 1, self.timestamps[-1])
            if frame.index % _DISK_INTERVAL == 0:
                check_disk(self.folder, self.limits)
            self._write(frame.index, frame.image)
            self.workspace.touch()
            yield frame.index + 1, info.num_frames

    def _write(self, frame_idx: int, picture: np.ndarray):
        height, width = self._size
        if picture.shape[:2] != (height, width):
            picture = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
        encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        (self.folder / "frames" / _frame_name(frame_idx)).write_bytes(encoded)

    def _working_size(self, height: int, width: int) -> tuple[int, int]:
        short = min(height, width)
        if short <= self.limits.working_short_side:
            return height, width
        scale = self.limits.working_short_side / short
        scaled = round(height * scale), round(width * scale)
        self.notes.append(f"The pictures are scaled down from {width}×{height} to {scaled[1]}×{scaled[0]} pixels.")
        return scaled

    def _check_file(self):
        if not self.path.is_file():
            raise DemoError(f"{self.name} is not a file that can be read. Upload it again.")
        size = self.path.stat().st_size
        if size == 0:
            raise DemoError(f"{self.name} is empty (0 bytes). Upload it again, or another file.")
        if size > self.limits.max_bytes:
            raise DemoError(
                f"{self.name} has {_megabytes(size)}; up to {_megabytes(self.limits.max_bytes)} can be taken. "
                "Cut it, or save it at a smaller size."
            )

    def _probe(self):
        """Refuses, before anything is decoded, what is no video file of its own."""
        try:
            container = av.open(str(self.path), options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"})
        except (av.FFmpegError, ValueError) as error:
            raise DemoError(
                f"{self.name} is not a video that can be read here: it is damaged, incomplete or of another kind. "
                "MP4, MOV, WebM, MKV and AVI work."
            ) from error
        with container:
            cover = av.stream.Disposition.attached_pic
            videos = [stream for stream in container.streams.video if not stream.disposition & cover]
            self._has_sound = bool(container.streams.audio)
            if not videos:
                found = "sound only" if self._has_sound else "no pictures"
                raise DemoError(f"{self.name} holds {found}. Upload a video.")
            self._check_side(videos[0].width or 0, videos[0].height or 0)
            context = videos[0].codec_context
            codecs = _PLAYABLE.get(self.path.suffix.lower(), ())
            self.is_playable = context.codec.canonical_name in codecs and context.pix_fmt in _PLAYABLE_PIXELS

    def _check_side(self, width: int, height: int):
        if max(width, height) > self.limits.max_side:
            raise DemoError(
                f"{self.name} has {width}×{height} pixels; up to {self.limits.max_side} a side can be taken. "
                "Save it at a smaller size."
            )

    def _check_length(self, num_frames: int, seconds: float):
        if seconds > self.limits.max_seconds:
            raise DemoError(
                f"{self.name} is longer than {duration_in_words(self.limits.max_seconds)}. Cut it, and upload the "
                "part that matters."
            )
        if num_frames > self.limits.max_frames:
            raise DemoError(
                f"{self.name} has more than {self.limits.max_frames:,} frames. Cut it, and upload the part you need."
            )

    def _explain(self, error: VideoError) -> str:
        """What the reader says, for people who know files by their names and have no command line."""
        if "changes size" in str(error):
            return f"{self.name} changes its picture size on the way. Save it at one size, and upload that."
        if self.timestamps:
            return f"{self.name} cannot be read beyond frame {len(self.timestamps)}. Save it anew, and upload that."
        return f"No picture of {self.name} can be read: it is damaged or incomplete. Upload it again, or another file."


class Workspaces:
    """
    The workspaces of all visitors, by the key of their session. Those that nobody uses are removed by a thread.

    Args:
        root (`Path`, *optional*): where their folders are; by default a new temporary folder, removed at exit.
        limits (`Limits`, *optional*): by default those of the environment.
    """

    def __init__(self, root: Path | None = None, limits: Limits = LIMITS):
        self.limits = limits
        self._root = Path(tempfile.mkdtemp(prefix="deformvos-demo-") if root is None else root)
        self._is_own_root = root is None
        self._open: dict[str, Workspace] = {}
        # When sessions left, for as long as requests of theirs may be on the way.
        self._left_at: dict[str, float] = {}
        # When workspaces were closed, and their loose files.
        self._left_over: list[tuple[float, dict[Path, int | None]]] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._sweep_forever, name="deformvos-sweep", daemon=True).start()
        atexit.register(self.close_all)

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: str) -> Workspace:
        """
        The workspace of a session, made where there is none yet.

        Raises:
            DemoError: if there are as many as the machine can take.
        """
        if key not in self._open:
            self.sweep(is_full=len(self._open) >= self.limits.max_workspaces)
        with self._lock:
            workspace = self._open.get(key)
            if workspace is None or workspace.is_closed:
                if len(self._open) >= self.limits.max_workspaces and key not in self._open:
                    raise DemoError("Many people are using this page just now. Try again in some minutes.")
                workspace = self._open[key] = Workspace(self._root, self.limits)
            workspace.has_left = key in self._left_at and time.monotonic() - self._left_at[key] < _STRAGGLING
            workspace.touch()
            return workspace

    def leave(self, key: str):
        """
        A session's page was closed, or its connection broke: nobody can tell which. Its workspace is closed after
        `left_seconds`, unless the session is seen again, later than what was still on the way, or a run goes on; one
        that waits for its turn is lost.
        """
        with self._lock:
            self._left_at[key] = time.monotonic()
            workspace = self._open.get(key)
        if workspace is not None:
            workspace.has_left, workspace.waiting_since = True, None
            workspace.touch()

    def close(self, key: str):
        """Close a session's workspace; nothing where there is none."""
        with self._lock:
            workspace = self._open.pop(key, None)
        if workspace is not None:
            self._close([workspace])

    def sweep(self, is_full: bool = False):
        """
        Close what nobody has used for so long as the limits say, or for less if somebody else needs the room; a run
        that goes on, or waits for its turn, counts as use. Of what stays, keep the files.
        """
        now, limits = time.monotonic(), self.limits
        idle = min(_IDLE_WHEN_FULL, limits.idle_seconds) if is_full else limits.idle_seconds
        left = 0.0 if is_full else min(limits.left_seconds, idle)
        with self._lock:
            gone = [
                self._open.pop(key)
                for key, space in list(self._open.items())
                if not (space.is_busy or space.is_waiting)
                and now - space.last_used > (left if space.has_left else idle)
            ]
        self._close(gone)
        with self._lock:
            kept, last = list(self._open.values()), now - limits.left_seconds
            self._left_at = {key: when for key, when in self._left_at.items() if now - when < _STRAGGLING}
            old = [files for when, files in self._left_over if when < last]
            self._left_over = [(when, files) for when, files in self._left_over if when >= last]
        for files in old:
            self.discard(files)
        for workspace in kept:
            workspace.keep_files()

    def discard(self, files: Mapping[Path, int | None]):
        """
        Remove loose files of a workspace. Gradio keeps equal uploads of two visitors as one file, of the later one; it
        stays if it belongs to an open workspace, or came after the one that is meant.
        """
        with self._lock:
            held = set().union(*(workspace.uploads for workspace in self._open.values()))
        for path, number in files.items():
            with suppress(OSError):
                if path not in held and number in (None, path.stat().st_ino):
                    path.unlink()
                    path.parent.rmdir()

    def _close(self, gone: list[Workspace], **how):
        """Close workspaces. Where the page may still be there and ask for them, loose files follow a little later."""
        for workspace in gone:
            workspace.close(**how)
            if workspace.has_left:
                self.discard(workspace.loose)
                continue
            with self._lock:
                self._left_over.append((time.monotonic(), workspace.loose))

    def close_all(self):
        """Close every workspace, as at the program's end."""
        self._ended.set()
        atexit.unregister(self.close_all)
        with self._lock:
            gone, self._open = list(self._open.values()), {}
        self._close(gone, wait=1.0)
        for _, files in self._left_over:
            self.discard(files)
        if self._is_own_root:
            shutil.rmtree(self._root, ignore_errors=True)

    def _sweep_forever(self):
        while not self._ended.wait(min(60.0, self.limits.idle_seconds, self.limits.left_seconds / 4)):
            try:
                self.sweep()
            except Exception:
                logger.exception("Idle workspaces could not be removed.")


def new_root(folder: Path) -> Path:
    """
    A folder for `Workspaces` whose name cannot be guessed; it is not made yet. Earlier ones in the same folder are
    removed if their process has ended, as one that was killed leaves them.
    """
    for earlier in folder.glob("deformvos-*-*"):
        process = earlier.name.split("-")[1]
        if process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(earlier, ignore_errors=True)
    return folder / f"deformvos-{os.getpid()}-{secrets.token_hex(16)}"


def _is_running(process: int) -> bool:
    """Whether there is such a process and it is not this one: in containers, all have the same number."""
    if os.name != "posix":  # there, signal 0 is no mere question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return process != os.getpid()


def check_disk(folder: Path, limits: Limits):
    """`DemoError` if less of the disk is free than has to stay so."""
    with on_disk():
        free = shutil.disk_usage(folder).free
    if free < limits.min_free_disk:
        raise _disk_error()


def _frame_name(frame_idx: int) -> str:
    return f"{frame_idx:05d}.jpg"


@contextmanager
def on_disk():
    """Turns what goes wrong with writing into a message."""
    try:
        yield
    except OSError as error:
        raise _disk_error(error) from error


def _disk_error(error: OSError | None = None) -> DemoError:
    """What to tell the visitor of a disk that is full, or of a folder that is gone."""
    if error is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DemoError("The disk of this machine is full just now. Try again in some minutes, or a shorter video.")
    if isinstance(error, FileNotFoundError):
        return DemoError("This video is no longer here. Upload it again.")
    return DemoError(f"The disk of this machine refused to write ({error.strerror}). Try again in some minutes.")


def duration_in_words(seconds: float) -> str:
    """Seconds in words: `10 minutes`, `90 seconds`."""
    if seconds >= 120 and seconds % 60 == 0:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:g} seconds"


def _megabytes(size: int) -> str:
    """Bytes in words: `200 MB`."""
    return f"{size / 1e6:,.0f} MB" if size >= 10e6 else f"{size / 1e6:,.1f} MB"


__all__ = [
    "LIMITS",
    "PALETTE",
    "DemoError",
    "FrameFolder",
    "Limits",
    "VideoFacts",
    "Workspace",
    "Workspaces",
    "duration_in_words",
    "new_root",
    "on_disk",
]
