"""A video made for timing: textured things that move over a textured, panning background, encoded as H.264."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..video import H264Writer


MAX_OBJECTS = 255
# A clip is read again from its start when more frames are needed: nothing that is timed depends on what it shows.
MAX_FRAMES = 400


@dataclass(frozen=True)
class Clip:
    """
    A video file with the masks of its first frame.

    Attributes:
        path (`Path`): H.264 in mp4.
        first_mask (`np.ndarray` of shape `(height, width)`, dtype `int32`): ids 1 to N of its objects, 0 elsewhere.
        num_frames (`int`): frames in the file.
    """

    path: Path
    first_mask: np.ndarray
    num_frames: int

    def mask_of(self, num_objects: int) -> np.ndarray:
        """The first frame's mask with its first `num_objects` objects alone."""
        return np.where(self.first_mask <= num_objects, self.first_mask, 0)


def write_clip(path: Path, height: int, width: int, num_frames: int, num_objects: int) -> Clip:
    """
    Encode a clip.

    Args:
        path (`Path`): the file, ending in .mp4.
        height, width (`int`): size of its frames in pixels.
        num_frames (`int`): frames wanted; at most `MAX_FRAMES` are made.
        num_objects (`int`): objects in it.

    Raises:
        ValueError: if an object would have no pixel, or there are more than `MAX_OBJECTS`.
    """
    scene = _Scene(height, width, num_objects)
    num_frames = min(num_frames, MAX_FRAMES)
    first_mask = None
    with H264Writer(path, fps=25) as writer:
        for index in range(num_frames):
            image, ids = scene.draw(index)
            first_mask = ids if first_mask is None else first_mask
            writer.write(image)
    return Clip(path, first_mask, num_frames)


class _Scene:
    """What the clip shows; every object keeps to a cell of a grid, so that none hides another."""

    def __init__(self, height: int, width: int, num_objects: int):
        if not 1 <= num_objects <= MAX_OBJECTS:
            raise ValueError(f"A clip holds 1 to {MAX_OBJECTS} objects, got {num_objects}.")
        self.height, self.width, self.num_objects = height, width, num_objects
        self.columns = min(num_objects, math.ceil(math.sqrt(num_objects * width / height)))
        self.rows = math.ceil(num_objects / self.columns)
        self.radius = 0.3 * min(height / self.rows, width / self.columns)
        if self.radius < 2:
            raise ValueError(
                f"{num_objects} objects do not fit {height}x{width} pixels: each needs several; ask for fewer."
            )
        generator = np.random.default_rng(0)
        self.background = _texture(generator, height, width)
        self.surface = _texture(generator, height, width)[:, ::-1]
        self.tints = generator.integers(0, 200, (num_objects, 3))

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Frame `(height, width, 3)` uint8 and ids `(height, width)` int32."""
        image = np.roll(self.background, (index // 2, index), axis=(0, 1))
        ids = np.zeros((self.height, self.width), dtype=np.int32)
        for number in range(self.num_objects):
            row, column = divmod(number, self.columns)
            swing = 0.4 * self.radius
            middle_y = (row + 0.5) * self.height / self.rows + swing * math.sin(0.11 * index + number)
            middle_x = (column + 0.5) * self.width / self.columns + swing * math.cos(0.07 * index + number)
            self._draw_object(image, ids, number, middle_y, middle_x)
        return image, ids

    def _draw_object(self, image: np.ndarray, ids: np.ndarray, number: int, middle_y: float, middle_x: float):
        top, left = max(0, int(middle_y - self.radius)), max(0, int(middle_x - self.radius))
        window = np.s_[top : int(middle_y + self.radius) + 1, left : int(middle_x + self.radius) + 1]
        rows, columns = np.ogrid[window]
        inside = (rows - middle_y) ** 2 + (columns - middle_x) ** 2 < self.radius**2
        inside = inside[: image[window].shape[0], : image[window].shape[1]]
        painted = (self.surface[window].astype(np.int32) + self.tints[number]) // 2
        image[window][inside] = painted[inside].astype(np.uint8)
        ids[window][inside] = number + 1


def _texture(generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colours with grain on them, `(height, width, 3)` uint8."""
    coarse = generator.integers(30, 226, (max(2, height // 40), max(2, width // 40), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = generator.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return np.clip(smooth + grain, 0, 255).astype(np.uint8)


__all__ = ["MAX_FRAMES", "MAX_OBJECTS", "Clip", "write_clip"]
