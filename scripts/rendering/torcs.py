"""
Cars of the game TORCS (https://torcs.sourceforge.net; Debian's torcs-data names the licence of each: GPL-2+ or Free
Art License): AC3D files whose surfaces are triangle strips, and wheels apart from them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .files import read_texture
from .models import NO_BONE, Actor, Mesh


TRIANGLE_STRIP = 4
# 0 A.D. counts in half metres, more or less.
SCALE = 2.2
INCH = 0.0254


def read_objects(path: Path) -> Iterator[tuple[str, Mesh]]:
    """Texture and mesh of each textured object of an AC3D file."""
    lines = path.read_text(errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("OBJECT")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        found = re.search(r'^texture "?(?!empty)([^"\s]+)', "\n".join(lines[start:end]), re.MULTILINE)
        if found and (mesh := _read_object(lines[start:end])) is not None:
            yield found[1], mesh


def _read_object(lines: list[str]) -> Mesh | None:
    corners, surfaces, kind, at = np.zeros((0, 6)), [], TRIANGLE_STRIP, 0
    while at < len(lines):
        word, _, value = lines[at].partition(" ")
        at += 1
        if word == "numvert":
            rows = [line.split()[:6] for line in lines[at : at + int(value)]]
            corners = np.array([[float(number) for number in row + ["0", "1", "0"][len(row) - 3 :]] for row in rows])
            at += int(value)
        elif word == "SURF":
            kind = int(value, 16) & 15
        elif word == "refs":
            surfaces.append((kind, [line.split()[:3] for line in lines[at : at + int(value)]]))
            at += int(value)
    if not surfaces:
        return None
    refs = np.array([ref for _, refs in surfaces for ref in refs], np.float32)
    faces, first = [], 0
    for kind, members in surfaces:
        steps = np.arange(len(members) - 2)[:, None]
        triangles = np.hstack([steps if kind == TRIANGLE_STRIP else 0 * steps, steps + 1, steps + 2])
        faces.append(first + triangles)
        first += len(members)
    vertices = corners[refs[:, 0].astype(int)].astype(np.float32)
    uvs = refs[:, 1:] * np.float32([1, -1]) + np.float32([0, 1])
    return Mesh.rigid(vertices[:, :3], vertices[:, 3:], uvs, np.concatenate(faces).astype(np.int32))


class Torcs:
    """
    Cars, each with wheels of some kind.

    Args:
        path (`Path`): The folder with cars/, wheels/ and data/, /usr/share/games/torcs on Debian.

    Raises:
        ValueError: If there are no cars in it.
    """

    def __init__(self, path: Path):
        self._root = Path(path)
        folders = sorted((self._root / "cars").glob("*/"))
        self._cars = {folder.name: folder for folder in folders if (folder / f"{folder.name}.acc").is_file()}
        self._wheels = sorted((self._root / "wheels").glob("*/wheel0.acc"))
        self._model, self.texture = lru_cache(64)(self._read_model), lru_cache(64)(self._read_texture)
        if not self._cars or not self._wheels:
            raise ValueError(f"{path} must be the folder of TORCS (Debian: torcs-data, /usr/share/games/torcs).")

    def names(self, kind: str = "cars") -> list[str]:
        """Names of the cars."""
        return [f"cars/{name}" for name in self._cars]

    def _read_texture(self, name: str) -> Image.Image:
        """A picture by its path below the folder."""
        return read_texture(self._root / name)

    def actor(self, name: str, rng: np.random.Generator) -> Actor:
        """A car that looks along z, on wheels, its textures named `cars:<path>`."""
        folder = self._cars[name.removeprefix("cars/")]
        wheel = self._model(self._wheels[rng.integers(len(self._wheels))])
        values = (folder / f"{folder.name}.xml").read_text(errors="replace")
        turn = np.diag([0, SCALE, 0, 1.0])
        turn[0, 2], turn[2, 0] = -SCALE, SCALE
        points, props = {"body": (turn, NO_BONE)}, {"body": self._model(folder / f"{folder.name}.acc")}
        for axle, x in (("Front", 1.3), ("Rear", -1.3)):
            for side, sign in (("Right", -1), ("Left", 1)):
                points[axle + side] = (turn @ _wheel_matrix(values, axle, x, sign), NO_BONE)
                props[axle + side] = wheel
        # What is measured to place it: as long and as high as the cars are.
        box = np.float32([[-2, 0, -4.5], [2, 2.6, 4.5]])
        mesh = Mesh.rigid(box, box, box[:, :2], np.zeros((0, 3), np.int32), **points)
        return Actor(mesh=mesh, props=props)

    def _read_model(self, path: Path) -> list[Actor]:
        """Parts whose picture is there."""
        parts = []
        for texture, mesh in read_objects(path):
            places = (path.parent / texture, self._root / "data/textures" / texture)
            found = next((place for place in places if place.is_file()), None)
            if found is not None:
                material = "cut" if "wheel" in texture else "plain"
                parts.append(Actor(mesh, f"cars:{found.relative_to(self._root)}", material))
        return parts


def _wheel_matrix(values: str, axle: str, x: float, sign: int) -> np.ndarray:
    """Where a wheel, which its file shows one unit high, is on a car, which its file shows looking along x."""

    def value(section: str, key: str, default: float) -> float:
        found = re.search(rf'name="{section}">.*?name="{key}"[^>]*?val="([-\d.]+)"', values, re.DOTALL | re.IGNORECASE)
        return float(found[1]) if found else default

    wheel = f"{axle} Right Wheel"
    tire = value(wheel, "tire width", 200) * value(wheel, "tire height-width ratio", 0.6) / 1000
    radius = value(wheel, "rim diameter", 15) * INCH / 2 + tire
    matrix = np.diag([2 * radius, 2 * radius, 0.5 * sign, 1.0])
    matrix[:3, 3] = value(f"{axle} Axle", "xpos", x), radius, sign * abs(value(wheel, "ypos", 0.75))
    return matrix
