"""Streaming video input: files that FFmpeg reads, folders of images and cameras, one frame at a time."""

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps
from transformers.utils import logging

from .pipeline import prefetch


logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Image folders carry no clock; 24 is the rate of DAVIS.
_FOLDER_FPS = 24.0
# FFmpeg's text-art demuxer takes any text file for a video; nobody who passes one means that.
_NOT_VIDEO_FORMATS = ("tty",)
# How much of a file's stated duration may be missing at its end before it counts as cut: muxers round.
_DURATION_SLACK_S = 0.5


class VideoError(ValueError):
    """A video that cannot be opened or decoded; the message names the path, what is wrong and what to do."""


@dataclass(frozen=True)
class VideoFrame:
    """
    One decoded frame.

    Attributes:
        index (`int`): Position in the video, from 0.
        image (`np.ndarray` of shape `(height, width, 3)`, dtype `uint8`): RGB, turned upright.
        timestamp (`float`): Seconds since the first frame, from the stream's own clock.
        name (`str`, *optional*): File name of the image, for folders.
        decode_seconds (`float`): Time it took to decode.
    """

    index: int
    image: np.ndarray
    timestamp: float
    name: str | None = None
    decode_seconds: float = 0.0


@dataclass(frozen=True)
class VideoInfo:
    """
    What is known before the video is read.

    Attributes:
        source (`str`): As the caller named it.
        kind (`str`): `"file"`, `"folder"` or `"camera"`.
        width, height (`int`): Of the upright frames, in pixels.
        fps (`float`, *optional*): Nominal rate; `VideoFrame.timestamp` is what counts for variable-rate video.
        num_frames (`int`, *optional*): As the container states it, `None` where it does not.
        seekable (`bool`): Whether the video can be read again from the start.
        codec (`str`, *optional*): Name of the decoder, for files and cameras.
    """

    source: str
    kind: str
    width: int
    height: int
    fps: float | None
    num_frames: int | None
    seekable: bool
    codec: str | None = None


class VideoReader:
    """
    Reads a video as a stream: one frame at a time, with a thread that decodes at most `num_prefetch` frames ahead.

    Rotation is applied (the display matrix of mp4/mov, EXIF for images), so that frames are upright as players show
    them; a sample aspect ratio is left alone, because masks belong to stored pixels. Transparent pixels are laid over
    black; grey, 10-bit and odd-sized video becomes 8-bit RGB of the same size.

    A damaged file yields every frame that still decodes; `truncated` and `num_damaged` then say so.

    ```python
    >>> with VideoReader("clip.mp4") as reader:
    ...     for frame in reader:
    ...         print(frame.index, frame.timestamp, frame.image.shape)
    ```

    A session takes the images: `init_video_session(video=(frame.image for frame in reader))`.

    Args:
        source (`str` or `os.PathLike`):
            A file or URL that FFmpeg reads, a folder of images (in natural order: 2 before 10), or a camera: `0`,
            `camera:0`, `/dev/video0`; on Windows `camera:NAME`.
        max_frames (`int`, *optional*): Stop after so many frames.
        num_prefetch (`int`, *optional*, defaults to 4): How many decoded frames may wait.
        num_threads (`int`, *optional*, defaults to 0): Decoder threads, 0 lets FFmpeg decide.

    Raises:
        VideoError: If there is no such video, or nothing in it decodes.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        max_frames: int | None = None,
        num_prefetch: int = 4,
        num_threads: int = 0,
    ):
        if max_frames is not None and max_frames < 1:
            raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
        if num_prefetch < 1:
            raise ValueError(f"`num_prefetch` must be at least 1, got {num_prefetch}.")
        self._source = _open_source(os.fspath(source), num_threads)
        self._max_frames = max_frames
        self._num_prefetch = num_prefetch
        self._frames = self._source.frames()
        # The first frame is decoded at once: only it tells the upright size, and whether anything decodes at all.
        self._first = next(self._frames, None)
        if self._first is None:
            raise VideoError(f"{self._source.name} holds no frame that decodes; is the file complete? Copy it again.")
        height, width = self._first.image.shape[:2]
        num_frames = self._source.num_frames
        if num_frames is not None and max_frames is not None:
            num_frames = min(num_frames, max_frames)
        self.info = VideoInfo(
            source=os.fspath(source),
            kind=self._source.kind,
            width=width,
            height=height,
            fps=self._source.fps,
            num_frames=num_frames,
            seekable=self._source.seekable,
            codec=self._source.codec,
        )

    @property
    def truncated(self) -> bool:
        """Whether the file ended before its own header says it should; final once the iteration has ended."""
        return self._source.truncated

    @property
    def num_damaged(self) -> int:
        """How many packets did not decode so far; their frames are missing."""
        return self._source.num_damaged

    def __iter__(self) -> Iterator[VideoFrame]:
        if self._frames is None:
            if not self.info.seekable:
                raise VideoError(f"{self._source.name} can be read only once; save it as a file to read it again.")
            self._frames, self._first = self._source.frames(), None
        frames, self._frames = self._frames, None
        first, self._first = self._first, None
        frames = self._checked(frames if first is None else chain([first], frames), frames)
        return prefetch(frames, self._num_prefetch, drop_oldest=self._source.live)

    def _checked(self, frames: Iterator[VideoFrame], generator) -> Iterator[VideoFrame]:
        """The frames up to `max_frames`, all of one size; closes the decoder at the end."""
        size = (self.info.height, self.info.width)
        try:
            for frame in islice(frames, self._max_frames):
                if frame.image.shape[:2] != size:
                    raise VideoError(
                        f"{self._source.name} changes size at frame {frame.index}: {_size(frame.image)} after "
                        f"{size[1]}x{size[0]}; every frame must have one size, re-encode it (ffmpeg -vf scale)."
                    )
                yield frame
        finally:
            generator.close()
        if self.truncated or self.num_damaged:
            logger.warning(
                f"{self._source.name} is damaged: {self.num_damaged} packets did not decode"
                + (", and it ends before its header says it should." if self.truncated else ".")
            )

    def close(self) -> None:
        """Closes the video if its iteration was never begun; an iteration closes it by itself."""
        if self._frames is not None:
            self._frames.close()
            self._frames = self._first = None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _FileSource:
    """A file, pipe or URL, decoded by FFmpeg."""

    kind = "file"
    live = False

    def __init__(self, path: str, num_threads: int, container_format: str | None = None):
        self.path = self.name = path
        self.num_threads = num_threads
        self.container_format = container_format
        self.fps = self.num_frames = self.codec = None
        self.seekable = os.path.isfile(path)
        self.truncated = False
        self.num_damaged = 0
        if self.seekable and os.path.getsize(path) == 0:
            raise VideoError(f"{path} is empty (0 bytes); a video was expected. Copy or download it again.")

    def _open(self) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
        """Opens the container and picks its first true video stream."""
        try:
            container = av.open(self.path, format=self.container_format)
        except FFmpegError as error:
            raise VideoError(
                f"{self.name} is not a video that FFmpeg can read ({error.strerror}); is it complete? "
                "Pass a video file, a folder of images or a camera number."
            ) from error
        # An audio file's cover picture is stored as a video stream.
        streams = [
            stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams or container.format.name in _NOT_VIDEO_FORMATS:
            found = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
            container.close()
            if found == "video":
                found = "text or pictures"
            raise VideoError(f"{self.name} has no video stream (found: {found}); pass a file that holds video.")
        stream = streams[0]
        stream.thread_type = "AUTO"
        if self.num_threads:
            stream.codec_context.thread_count = self.num_threads
        return container, stream

    def frames(self) -> Iterator[VideoFrame]:
        """Decodes from the start; skips what is damaged and counts it."""
        container, stream = self._open()
        self.truncated, self.num_damaged = False, 0
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else None
        self.num_frames = stream.frames or None
        self.codec = stream.codec_context.name
        first_time, end, index = None, 0.0, 0
        try:
            started = time.perf_counter()
            for decoded in self._decode(container, stream):
                seconds = decoded.time
                if seconds is None:
                    seconds = (first_time or 0.0) + index / (self.fps or _FOLDER_FPS)
                first_time = seconds if first_time is None else first_time
                image = _to_rgb(decoded)
                yield VideoFrame(index, image, seconds - first_time, None, time.perf_counter() - started)
                index, end = index + 1, seconds
                started = time.perf_counter()
            self.truncated = self.truncated or _ends_early(stream, end)
        finally:
            container.close()

    def _decode(self, container, stream) -> Iterator[av.VideoFrame]:
        """All frames that decode, in order of display."""
        packets, num_packets = container.demux(stream), 0
        while True:
            try:
                packet = next(packets)
                num_packets += packet.size > 0
                damaged = packet.is_corrupt
            except StopIteration:
                break
            except FFmpegError:
                self.truncated = True
                break
            try:
                yield from packet.decode()
            except FFmpegError:
                damaged = True
            self.num_damaged += damaged
        # mp4 lists every packet in its header; other formats build the list while they read, and it always matches.
        self.truncated = self.truncated or num_packets < len(stream.index_entries)


class _CameraSource(_FileSource):
    """A live camera through the capture device of the operating system; frames that wait too long are dropped."""

    kind = "camera"
    live = True

    def __init__(self, source: str, num_threads: int):
        path, container_format = camera_target(source, sys.platform)
        super().__init__(path, num_threads, container_format)
        self.name = f"camera {source.removeprefix('camera:')}"
        self.seekable = False

    def _open(self):
        try:
            return super()._open()
        except (VideoError, OSError, ValueError) as error:
            reason = str(error.__cause__ or error)
            raise VideoError(
                f"{self.name} cannot be opened ({reason}); is it connected, free and permitted? "
                "Pass another number, or a video file."
            ) from error

    def _decode(self, container, stream) -> Iterator[av.VideoFrame]:
        """All frames until the camera is unplugged; a live stream is never truncated."""
        yield from super()._decode(container, stream)
        self.truncated = False


class _FolderSource:
    """A folder of images in natural order, hidden files and sub-folders left out."""

    kind = "folder"
    live = False
    seekable = True
    codec = None
    truncated = False
    num_damaged = 0
    fps = _FOLDER_FPS

    def __init__(self, path: str):
        self.path = self.name = path
        self.files = sorted(
            (
                file
                for file in Path(path).iterdir()
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() and not file.name.startswith(".")
            ),
            key=lambda file: natural_key(file.name),
        )
        self.num_frames = len(self.files)
        if not self.files:
            raise VideoError(
                f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)}); pass the folder that holds the frames."
            )

    def frames(self) -> Iterator[VideoFrame]:
        """Opens one image after the other."""
        for index, file in enumerate(self.files):
            started = time.perf_counter()
            image = read_image(file)
            yield VideoFrame(index, image, index / self.fps, file.name, time.perf_counter() - started)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """
    Reads an image as upright RGB of shape `(height, width, 3)`, dtype `uint8`.

    Raises:
        VideoError: If it is not an image or is damaged.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                # Pillow clips 16-bit grey instead of scaling it.
                return np.repeat((np.asarray(image, dtype=np.uint32) >> 8).astype(np.uint8)[..., None], 3, axis=2)
            if image.has_transparency_data:
                return _over_black(np.asarray(image.convert("RGBA")))
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"{path} is not an image that can be read ({error}); replace or remove it.") from error


def natural_key(name: str) -> list:
    """Sort key under which `frame2` comes before `frame10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part.lower()) for part in parts]


def camera_target(source: str, platform: str) -> tuple[str, str]:
    """
    What FFmpeg must open for a camera.

    Args:
        source (`str`): `0`, `camera:0`, `/dev/video0`, or `camera:NAME`.
        platform (`str`): As `sys.platform`.

    Returns:
        `tuple[str, str]`: File name and container format.
    """
    camera = source.removeprefix("camera:")
    if platform.startswith("linux"):
        return (f"/dev/video{camera}" if camera.isdigit() else camera), "v4l2"
    if platform == "darwin":
        return f"{camera}:none", "avfoundation"
    if platform == "win32":
        if camera.isdigit():
            raise VideoError(
                f"camera {camera} has no number on Windows; name it as the device manager does, for example "
                "'camera:Integrated Camera'."
            )
        return f"video={camera}", "dshow"
    raise VideoError(f"cameras are read on Linux, macOS and Windows, got platform {platform!r}; pass a video file.")


def _open_source(source: str, num_threads: int) -> _FileSource | _FolderSource:
    """Tells folders, cameras and files apart."""
    if os.path.isdir(source):
        return _FolderSource(source)
    if source.startswith(("camera:", "/dev/video")) or (source.isdigit() and not os.path.exists(source)):
        return _CameraSource(source, num_threads)
    if "://" not in source and not os.path.exists(source):
        raise VideoError(f"{source} does not exist; pass a video file, a folder of images or a camera number.")
    return _FileSource(source, num_threads)


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    """The decoded picture as upright RGB, `uint8`."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = _over_black(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        image = _turn_upright(image, np.frombuffer(bytes(matrix), dtype=np.int32)[:9].reshape(3, 3))
    return image


def _turn_upright(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """
    Applies a display matrix, to the nearest quarter turn, mirrored or not: it takes the pixel `(x, y)` to
    `(a x + c y, b x + d y)` with `a, b` and `c, d` in its first two rows.
    """
    (a, b), (c, d) = matrix[0, :2].tolist(), matrix[1, :2].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        flip_x, flip_y = a < 0, d < 0
    else:
        image = image.swapaxes(0, 1)
        flip_x, flip_y = c < 0, b < 0
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _over_black(rgba: np.ndarray) -> np.ndarray:
    """Lays RGBA over black: the colour of a fully transparent pixel is arbitrary."""
    return (rgba[..., :3].astype(np.uint16) * rgba[..., 3:] // 255).astype(np.uint8)


def _ends_early(stream, end: float) -> bool:
    """Whether the stream's own stated duration (Matroska writes it as a tag) lies well past the last frame."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if match is None:
        return False
    hours, minutes, seconds = match.groups()
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - end > _DURATION_SLACK_S


def _size(image: np.ndarray) -> str:
    """Width by height, as people say it."""
    return f"{image.shape[1]}x{image.shape[0]}"


__all__ = ["IMAGE_SUFFIXES", "VideoError", "VideoFrame", "VideoInfo", "VideoReader", "natural_key", "read_image"]
