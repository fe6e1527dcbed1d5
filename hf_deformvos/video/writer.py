"""Writing of results: palette PNG masks as DAVIS stores them, and H.264 video that browsers play."""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from ..masks_deformvos import davis_palette
from .overlay import as_byte_ids


# The clock of MPEG; fine enough for every frame rate in use, and small enough that hours fit the mp4 fields.
_TICKS_PER_SECOND = 90_000
_MP4_SUFFIXES = (".mp4", ".m4v", ".mov")
# How long a frame is shown: a millisecond, as players take no shorter film, to 79 minutes, as mp4 has 31 bits for how
# far ahead of its display a frame is decoded, up to five frames here.
_MIN_FRAME_TICKS, _MAX_FRAME_TICKS = _TICKS_PER_SECOND // 1000, (2**31 - 1) // 5
# ITU-T H.273 code points: BT.709 for primaries, transfer and matrix; 1 is also FFmpeg's "limited range".
_BT709 = 1
_LIMITED_RANGE = 1


def mask_file_name(index: int) -> str:
    """The name DAVIS gives the mask of frame `index`: five digits, more only where five do not suffice."""
    return f"{index:05d}.png"


def write_palette_png(path: str | os.PathLike, id_map: np.ndarray, palette: np.ndarray | None = None) -> None:
    """
    Writes an id map as a palette PNG (mode `P`): the pixel values are the ids, the palette only colours them.

    The file appears whole or not at all: it is written beside its place and renamed.

    Args:
        path (`str` or `os.PathLike`): Where to write.
        id_map (`np.ndarray` of shape `(height, width)`, integer or bool): Ids from 0 (background) to 255.
        palette (`np.ndarray` of shape `(n, 3)`, dtype `uint8`, *optional*): By default the DAVIS palette.

    Raises:
        ValueError: If `id_map` is not two-dimensional or an id does not fit a palette.
    """
    if id_map.ndim != 2:
        raise ValueError(f"`id_map` must have shape (height, width), got {id_map.shape}.")
    image = Image.fromarray(np.ascontiguousarray(as_byte_ids(id_map)))
    # Attaching a palette to a grey image makes it mode P and keeps its values.
    image.putpalette((davis_palette() if palette is None else palette).tobytes())
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        image.save(part, format="PNG", compress_level=3)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_palette_png(path: str | os.PathLike) -> np.ndarray:
    """Reads the ids of a palette or grey PNG back, as `uint8` of shape `(height, width)`."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"{path} must be a palette or grey PNG, got mode {image.mode}.")
        return np.array(image, dtype=np.uint8)


class H264Writer:
    """
    Writes RGB frames as H.264 in mp4, in the form that every browser plays: `yuv420p`, BT.709, index at the front.

    Each frame is shown from its own timestamp, so variable-rate video keeps its pace. Frames of odd width or height
    are padded by repeating the last column or row, since `yuv420p` has none. The file takes its name when `close` has
    finished it; use it as a context manager and it is playable after an interruption as well.

    Args:
        path (`str` or `os.PathLike`): Name of the file, ending in .mp4, .m4v or .mov.
        fps (`float`, *optional*):
            Nominal rate, which decides how long the last frame is shown (a millisecond to 79 minutes). Defaults to 25.
        crf (`int`, *optional*, defaults to 20): x264's quality, lower is better and larger.
        preset (`str`, *optional*, defaults to `"veryfast"`): x264's speed.
        threads (`int`, *optional*, defaults to 0): Encoder threads, 0 lets x264 decide.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float | None = None,
        crf: int = 20,
        preset: str = "veryfast",
        threads: int = 0,
    ):
        self.path = Path(path)
        if self.path.suffix.lower() not in _MP4_SUFFIXES:
            raise ValueError(
                f"A video is written as {', '.join(_MP4_SUFFIXES)}, got {str(path)!r}; rename it to .mp4."
            )
        self.num_frames = 0
        ticks = _TICKS_PER_SECOND / (fps if fps and fps > 0 else 25)
        self._frame_ticks = round(min(max(ticks, _MIN_FRAME_TICKS), _MAX_FRAME_TICKS))
        self._options = {"crf": str(crf), "preset": preset}
        self._threads = threads
        self._part = self.path.with_name(f".{self.path.stem}.part{self.path.suffix}")
        self._container = None
        self._stream = None
        self._size: tuple[int, int] | None = None
        self._last_tick = -1

    def _open(self, height: int, width: int) -> None:
        """Opens the file; only now is the size known."""
        # Not above: whoever only trains or draws does without PyAV.
        import av

        self._size = (height, width)
        self._container = av.open(str(self._part), "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(_TICKS_PER_SECOND, self._frame_ticks)
        stream = self._container.add_stream("libx264", rate=rate, options=self._options)
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, _TICKS_PER_SECOND)
        context.thread_count = self._threads
        context.color_range = _LIMITED_RANGE
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        self._stream = stream

    def write(self, image: np.ndarray, timestamp: float | None = None) -> None:
        """
        Appends a frame.

        Args:
            image (`np.ndarray` of shape `(height, width, 3)`, dtype `uint8`): RGB, of the first frame's size.
            timestamp (`float`, *optional*):
                Seconds from the start of the video. By default one frame time after the last; a time that does not
                advance is moved to just after the last, because mp4 cannot show two frames at once, and one that is
                more than 79 minutes after it to there.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"`image` must be uint8 of shape (height, width, 3), got {image.dtype} {image.shape}.")
        height, width = image.shape[:2]
        if self._container is None:
            self._open(height, width)
        if (height, width) != self._size:
            raise ValueError(f"Every frame must have the first one's size {self._size}, got {(height, width)}.")
        import av

        if height % 2 or width % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
        )
        if timestamp is None:
            tick = self._last_tick + self._frame_ticks if self.num_frames else 0
        else:
            tick = max(round(timestamp * _TICKS_PER_SECOND), self._last_tick + 1)
            tick = min(tick, self._last_tick + _MAX_FRAME_TICKS)
        frame.pts, frame.duration = tick, self._frame_ticks
        frame.time_base = Fraction(1, _TICKS_PER_SECOND)
        self._container.mux(self._stream.encode(frame))
        self._last_tick = tick
        self.num_frames += 1

    def close(self) -> None:
        """
        Flushes the encoder, moves the index to the front and gives the file its name. Without a frame, and where that
        fails: no file.
        """
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            try:
                container.mux(self._stream.encode(None))
            finally:
                container.close()
            os.replace(self._part, self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> "H264Writer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


__all__ = ["H264Writer", "mask_file_name", "read_palette_png", "write_palette_png"]
