"""Files for the tests of the demo: short videos of two moving squares, their masks, and files that are no videos."""

from pathlib import Path

import av
import numpy as np
from synthetic import draw_scene

from hf_deformvos.video import H264Writer, write_palette_png


HEIGHT, WIDTH, FPS = 96, 160, 24
# How far the squares go before they turn, in frames.
_WAY = 24


def boxes(frame_idx: int) -> dict[int, tuple[int, int, int, int]]:
    """Where the two objects are in a frame: x0, y0, x1, y1."""
    way = abs((frame_idx + _WAY) % (2 * _WAY) - _WAY)
    return {1: (12 + 2 * way, 8, 52 + 2 * way, 48), 2: (112 - 2 * way, 58, 148 - 2 * way, 90)}


def true_ids(frame_idx: int) -> np.ndarray:
    """The id map of a frame, `(HEIGHT, WIDTH)`."""
    return draw_scene(HEIGHT, WIDTH, boxes(frame_idx))[1]


def write_clip(path: Path, num_frames: int, fps: float = FPS, height: int = HEIGHT) -> Path:
    """A video of the two squares; more height is background below them."""
    with H264Writer(path, fps) as writer:
        for frame_idx in range(num_frames):
            writer.write(draw_scene(height, WIDTH, boxes(frame_idx))[0])
    return path


def write_mask(path: Path, frame_idx: int = 0) -> Path:
    """The mask of a frame as palette PNG."""
    write_palette_png(path, true_ids(frame_idx))
    return path


def write_sound(path: Path) -> Path:
    """A file of sound only."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def iou(found: np.ndarray, expected: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 where both are empty."""
    union = (found | expected).sum()
    return float((found & expected).sum() / union) if union else 1.0
