"""Frames of video files (through PyAV) and of folders of images, decoded one at a time, upright, as 8-bit RGB."""

import gc
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.utils import logging

from .image_processing_deformvos import to_rgb


logger = logging.get_logger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# Image folders carry no clock; 24 is the rate of DAVIS.
_FOLDER_FPS = 24.0
# FFmpeg's text-art demuxer takes any text file for a video; nobody who passes one means that.
_NOT_VIDEO_FORMATS = ("tty",)
# How much of a file's stated duration may be missing at its end before it counts as cut: muxers round.
_DURATION_SLACK_S = 0.5
# Decoders that read the transparency which WebM stores beside the picture; FFmpeg's own pass over it.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
_ACCEPTED = "a video file or a folder of images"


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


def import_av():
    """
    PyAV, which decodes video files.

    Raises:
        ImportError: where it is not installed; nothing but video files needs it.
    """
    # Within `try`, because transformers demands whatever remote code imports elsewhere, if only inside functions.
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "Reading a video file needs PyAV: `pip install av`. Frames in memory (a list, an array, an iterator) and "
            "folders of images do without."
        ) from error
    return av


class FileSource:
    """A file, pipe or URL, decoded by FFmpeg."""

    kind = "file"
    live = False

    def __init__(self, path: str, num_threads: int, container_format: str | None = None, accepted: str = _ACCEPTED):
        self.path = self.name = path
        self.num_threads = num_threads
        self.container_format = container_format
        self.accepted = accepted
        self.fps = self.num_frames = self.codec = None
        self.seekable = os.path.isfile(path)
        self.truncated = False
        self.num_damaged = 0
        if self.seekable and os.path.getsize(path) == 0:
            raise VideoError(f"{path} is empty (0 bytes); a video was expected. Copy or download it again.")

    def _open(self) -> tuple:
        """Opens the container, picks its first true video stream, and a decoder for it."""
        av = import_av()
        try:
            container = av.open(self.path, format=self.container_format)
        except av.FFmpegError as error:
            raise VideoError(
                f"{self.name} is not a video that FFmpeg can read ({error.strerror}); is it complete? "
                f"Pass {self.accepted}."
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
        decoder = _decoder(streams[0])
        decoder.thread_type = "AUTO"
        if self.num_threads:
            decoder.thread_count = self.num_threads
        return container, streams[0], decoder

    def frames(self) -> Iterator[VideoFrame]:
        """Decodes from the start; counts what FFmpeg finds damaged, skipped or patched."""
        container, stream, decoder = self._open()
        self.truncated, self.num_damaged = False, 0
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else None
        self.num_frames = stream.frames or None
        self.codec = decoder.name
        first_time, end, index, matrix = None, 0.0, 0, None
        try:
            started = time.perf_counter()
            for decoded in self._decode(container, stream, decoder):
                # FFmpeg gives every frame the stream's matrix. One is asked: PyAV's frame and its side data hold each
                # other, and with them the picture, until the garbage collector comes by, which for that one is soon.
                if index == 0 and (found := decoded.side_data.get("DISPLAYMATRIX")) is not None:
                    matrix = bytes(found)
                elif index == 1:
                    gc.collect(1)
                seconds = decoded.time
                if seconds is None:
                    seconds = (first_time or 0.0) + index / (self.fps or _FOLDER_FPS)
                first_time = seconds if first_time is None else first_time
                image = _turn_upright(_to_rgb(decoded), matrix)
                yield VideoFrame(index, image, seconds - first_time, None, time.perf_counter() - started)
                # A stated duration counts to the end of the last frame, which at a slow rate is shown for long.
                index, end = index + 1, seconds + float((decoded.duration or 0) * (decoded.time_base or 0))
                started = time.perf_counter()
            self.truncated = self.truncated or _ends_early(stream, end)
        finally:
            container.close()

    def _decode(self, container, stream, decoder) -> Iterator:
        """All frames that decode, in order of display, as PyAV has them."""
        errors = import_av().FFmpegError
        packets, num_packets = container.demux(stream), 0
        while True:
            try:
                packet = next(packets)
                num_packets += packet.size > 0
                damaged = packet.is_corrupt
            except StopIteration:
                break
            except errors:
                self.truncated = True
                break
            try:
                frames = decoder.decode(packet)
            except errors:
                frames, damaged = [], True
            self.num_damaged += damaged
            for frame in frames:
                self.num_damaged += frame.is_corrupt
                yield frame
        # mp4 lists every packet in its header; other formats build the list while they read, and it always matches.
        self.truncated = self.truncated or num_packets < len(stream.index_entries)


class FolderSource:
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

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image(self.files[index])

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
            if image.has_transparency_data and not image.mode.startswith("I"):
                return _over_black(np.asarray(image.convert("RGBA")))
            return np.array(to_rgb(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"{path} is not an image that can be read ({error}); replace or remove it.") from error


def natural_key(name: str) -> list:
    """Sort key under which `frame2` comes before `frame10`."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(part), "") if part[0] in "0123456789" else (1, 0, part.lower()) for part in parts]


def _decoder(stream):
    """The stream's decoder, or one that sees its transparency where FFmpeg was built with it."""
    av = import_av()
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    if stream.metadata.get("alpha_mode") == "1" and name in av.codecs_available:
        return av.CodecContext.create(name, "r")
    return stream.codec_context


def _to_rgb(frame) -> np.ndarray:
    """PyAV's decoded picture as RGB, `uint8`."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        return _over_black(frame.to_ndarray(format="rgba"))
    return frame.to_ndarray(format="rgb24")


def _turn_upright(image: np.ndarray, display_matrix: bytes | None) -> np.ndarray:
    """
    Applies a display matrix, to the nearest quarter turn, mirrored or not: it takes the pixel `(x, y)` to
    `(a x + c y, b x + d y)` with `a, b` and `c, d` in its first two rows.
    """
    if display_matrix is None:
        return image
    (a, b, _), (c, d, _) = np.frombuffer(display_matrix, dtype=np.int32)[:6].reshape(2, 3).tolist()
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


def open_source(path: str, num_threads: int = 0, accepted: str = _ACCEPTED) -> FileSource | FolderSource:
    """
    A folder of images, or anything else that FFmpeg reads; errors name what is `accepted`.

    Raises:
        VideoError: if there is no such file or folder, or nothing in it.
    """
    if os.path.isdir(path):
        return FolderSource(path)
    if "://" not in path and not os.path.exists(path):
        raise VideoError(f"{path} does not exist; pass {accepted}.")
    return FileSource(path, num_threads, accepted=accepted)


def warn_of_damage(source: FileSource | FolderSource):
    """Say so, once it has been read, if FFmpeg found frames of a video missing or damaged."""
    if source.truncated or source.num_damaged:
        lost = f"{source.num_damaged} packets or frames did not decode as they should" if source.num_damaged else ""
        early = "it ends before its header says it should" if source.truncated else ""
        logger.warning(f"{source.name} is damaged: {', and '.join(filter(None, (lost, early)))}.")


__all__ = [
    "IMAGE_SUFFIXES",
    "FileSource",
    "FolderSource",
    "VideoError",
    "VideoFrame",
    "natural_key",
    "open_source",
    "read_image",
    "warn_of_damage",
]
