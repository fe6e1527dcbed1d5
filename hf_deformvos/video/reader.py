"""Streaming video input: files that FFmpeg reads, folders of images and cameras, one frame at a time."""

import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from ..video_source_deformvos import (
    IMAGE_SUFFIXES,
    FileSource,
    FolderSource,
    VideoError,
    VideoFrame,
    natural_key,
    open_source,
    read_image,
    warn_of_damage,
)
from .pipeline import prefetch


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

    A damaged file yields every frame that still decodes; `truncated` and `num_damaged` then say so, as far as FFmpeg
    notices: not every format tells that its end is missing, and not every decoder that it patched a frame.

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
        """How many packets or frames FFmpeg has found damaged so far; they are missing or patched."""
        return self._source.num_damaged

    def __iter__(self) -> Iterator[VideoFrame]:
        if self._frames is None:
            if not self.info.seekable:
                raise VideoError(f"{self._source.name} can be read only once; save it as a file to read it again.")
            self._frames, self._first = self._source.frames(), None
        frames, self._frames = self._frames, None
        first, self._first = self._first, None
        is_live = self._source.live
        limit = None if is_live else self._max_frames
        checked = self._checked(frames if first is None else chain([first], frames), frames, limit)
        ahead = prefetch(checked, self._num_prefetch, drop_oldest=is_live)
        return self._limited(ahead) if is_live else ahead

    def _limited(self, frames: Generator[VideoFrame, None, None]) -> Iterator[VideoFrame]:
        """Up to `max_frames` of a camera's frames: those that are dropped on the way do not count."""
        with closing(frames):
            yield from islice(frames, self._max_frames)

    def _checked(self, frames: Iterator[VideoFrame], generator, limit: int | None) -> Iterator[VideoFrame]:
        """The frames up to `limit`, all of one size; closes the decoder at the end."""
        size = (self.info.height, self.info.width)
        try:
            for frame in islice(frames, limit):
                if frame.image.shape[:2] != size:
                    raise VideoError(
                        f"{self._source.name} changes size at frame {frame.index}: {_size(frame.image)} after "
                        f"{size[1]}x{size[0]}; every frame must have one size, re-encode it (ffmpeg -vf scale)."
                    )
                yield frame
        finally:
            generator.close()
        warn_of_damage(self._source)

    def close(self) -> None:
        """Closes the video if its iteration was never begun; an iteration closes it by itself."""
        if self._frames is not None:
            self._frames.close()
            self._frames = self._first = None

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _CameraSource(FileSource):
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

    def _decode(self, container, stream, decoder) -> Iterator:
        """All frames until the camera is unplugged; a live stream is never truncated."""
        yield from super()._decode(container, stream, decoder)
        self.truncated = False


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


def _open_source(source: str, num_threads: int) -> FileSource | FolderSource:
    """Tells cameras from files and folders."""
    is_camera = source.startswith(("camera:", "/dev/video")) or (source.isdigit() and not os.path.exists(source))
    if is_camera and not os.path.isdir(source):
        return _CameraSource(source, num_threads)
    return open_source(source, num_threads, "a video file, a folder of images or a camera number")


def _size(image: np.ndarray) -> str:
    """Width by height, as people say it."""
    return f"{image.shape[1]}x{image.shape[0]}"


__all__ = ["IMAGE_SUFFIXES", "VideoError", "VideoFrame", "VideoInfo", "VideoReader", "natural_key", "read_image"]
