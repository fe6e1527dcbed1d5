"""What the files of several games have in common."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image


LARGEST_TEXTURE = 512
LONGEST_TEXT = 64


def read_texture(file: Path | BinaryIO) -> Image.Image:
    """A picture, RGBA, no larger than is ever seen."""
    image = Image.open(file).convert("RGBA")
    image.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE))
    return image


def text_at(data: bytes, at: int) -> str:
    """The string in the 64 bytes from a place on."""
    return data[at : at + LONGEST_TEXT].split(b"\0")[0].decode(errors="replace")
