"""Tiny data sets for tests of readers, augmentation and training: coloured rectangles over gray noise."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


# What object 1, 2 ... looks like; the background is gray, so that colour tells ids.
COLOURS = {1: (230, 30, 30), 2: (30, 30, 230), 3: (30, 220, 30)}


def draw_scene(height: int, width: int, boxes: dict, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image `(height, width, 3)` and ids `(height, width)`; `boxes` maps ids to (x0, y0, x1, y1)."""
    noise = np.random.default_rng(seed).integers(100, 140, (height, width, 1), dtype=np.uint8)
    image = np.repeat(noise, 3, axis=2)
    ids = np.zeros((height, width), np.uint8)
    for number, (x0, y0, x1, y1) in boxes.items():
        image[y0:y1, x0:x1] = COLOURS[number]
        ids[y0:y1, x0:x1] = number
    return image, ids


def save_palette(path: Path, ids: np.ndarray) -> None:
    """Writes ids as a palette PNG."""
    image = Image.fromarray(ids).convert("P")
    image.putdata(ids.ravel().tolist())
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    image.save(path)


def write_static_set(folder: Path, values: tuple[int, ...] = (1,), count: int = 3, size=(96, 120)) -> Path:
    """An image set whose objects have the mask values `values`, in order."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        boxes = {n: (8 + 48 * (n - 1) + index, 20, 48 + 48 * (n - 1) + index, 70) for n in range(1, len(values) + 1)}
        image, ids = draw_scene(*size, boxes, seed=index)
        table = np.zeros(256, np.uint8)
        table[1 : len(values) + 1] = values
        Image.fromarray(image).save(folder / "images" / f"{index:05d}.png")
        Image.fromarray(table[ids]).save(folder / "masks" / f"{index:05d}.png")
    return folder


def write_davis(root: Path, names=("ant", "bee"), frames: int = 6, size=(96, 160), value: int | None = None) -> Path:
    """A DAVIS-layout folder of two moving rectangles, palette ids 1 and 2, or all of one `value`."""
    for number, name in enumerate(names):
        images, masks = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for t in range(frames):
            boxes = {1: (10 + 4 * t, 15, 50 + 4 * t, 55), 2: (100 - 4 * t, 50, 140 - 4 * t, 85)}
            image, ids = draw_scene(*size, boxes, seed=number)
            Image.fromarray(image).save(images / f"{t:05d}.jpg", quality=95)
            if value is None:
                save_palette(masks / f"{t:05d}.png", ids)
            else:
                Image.fromarray(((ids > 0) * value).astype(np.uint8)).save(masks / f"{t:05d}.png")
    return root


def write_gray_png(path, values, bits):
    """A gray PNG of so many bits a pixel, which Pillow reads and does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    digits = (values[..., None] >> np.arange(bits - 1, -1, -1) & 1).reshape(len(values), -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(digits, axis=1))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
