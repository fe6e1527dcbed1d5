"""
Units of the game MegaGlest (https://megaglest.org; Debian's megaglest-data, CC BY-SA 3.0): G3D models, which give
every vertex a place in every frame, one file for each animation of a unit.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .files import read_texture, text_at
from .models import Actor, Mesh


# A person is about two units high, and 0 A.D. counts in half metres, more or less.
SCALE = 1.7
TEAM, OPAQUE = 1, 0.99
MESH_HEAD = struct.Struct("<64s3I6f2f2I")
# What a file's name holds, and which animation that means.
STATES = {"walk": "walk", "run": "run", "charg": "run", "fly": "run", "stand": "idle", "idle": "idle"}
STATES |= {"attack": "attack", "die": "die", "dying": "die", "min": "work", "build": "work"}


def read_g3d(data: bytes) -> list[tuple[str, bool, np.ndarray, np.ndarray, np.ndarray]]:
    """
    The opaque, textured meshes of a G3D file of version 4.

    Returns:
        `list` of tuples: the picture's name, whether its alpha channel shows a team's colour, shapes `(frames,
        vertices, 6)` of positions and normals, texture coordinates with v downwards, and faces.
    """
    if data[:4] != b"G3D\x04":
        raise ValueError(f"a G3D file of version 4 begins with {b'G3D' + bytes([4])!r}, this one with {data[:4]!r}")
    (count, _), at, meshes = struct.unpack_from("<HB", data, 4), 7, []
    for _ in range(count):
        _, frames, vertices, indices, *_, opacity, flags, textures = MESH_HEAD.unpack_from(data, at)
        at += MESH_HEAD.size
        names = [text_at(data, at + 64 * number) for number in range(textures.bit_count())]
        at += 64 * len(names)
        numbers = np.frombuffer(data, "<f4", frames * vertices * 6, at).reshape(2, frames, vertices, 3)
        at += numbers.nbytes
        uvs = np.frombuffer(data, "<f4", 2 * vertices if names else 0, at).reshape(-1, 2)
        at += uvs.nbytes
        faces = np.frombuffer(data, "<u4", indices, at).reshape(-1, 3).astype(np.int32)
        at += faces.nbytes
        if textures & 1 and opacity > OPAQUE:
            shapes = np.concatenate([numbers[0] * SCALE, numbers[1]], -1).astype(np.float32)
            uvs = uvs * np.float32([1, -1]) + np.float32([0, 1])
            meshes.append((names[0], bool(flags & TEAM), shapes, uvs, faces))
    return meshes


class MegaGlest:
    """
    Units with animations.

    Args:
        path (`Path`): The folder with techs/, /usr/share/games/megaglest on Debian.

    Raises:
        ValueError: If there are no units in it.
    """

    def __init__(self, path: Path):
        self._root = Path(path)
        self._files: dict[str, dict[str, list[Path]]] = {}
        for file in sorted(self._root.glob("techs/*/factions/*/units/*/models/*.g3d")):
            state = next((known for part, known in STATES.items() if part in file.stem), None)
            if state:
                self._files.setdefault("/".join(file.parts[-5:-2]), {}).setdefault(state, []).append(file)
        # What cannot walk is a building.
        self._files = {unit: files for unit, files in self._files.items() if {"walk", "run"} & set(files)}
        if not self._files:
            raise ValueError(f"{path} must be the folder of MegaGlest (Debian: megaglest-data).")
        self._model = lru_cache(128)(lambda path: read_g3d(path.read_bytes()))
        self.texture = lru_cache(128)(self._read_texture)

    def names(self, kind: str = "warriors") -> list[str]:
        """Names of the units."""
        return [f"warriors/{unit}" for unit in self._files]

    def _read_texture(self, name: str) -> Image.Image:
        """A picture by its path below the folder."""
        return read_texture(self._root / name)

    def actor(self, name: str, rng: np.random.Generator) -> Actor:
        """A unit in one of its animations, mostly one that moves it; textures are named `warriors:<path>`."""
        files = self._files[name.partition("/")[2]]
        moving = [state for state in ("walk", "run") if state in files]
        states = moving if rng.random() < 0.75 else sorted(files)
        state = states[rng.integers(len(states))]
        file = files[state][rng.integers(len(files[state]))]
        parts = []
        for picture, is_team, shapes, uvs, faces in self._model(file):
            path = (file.parent / picture).resolve()
            if path.is_file():
                mesh = Mesh.rigid(shapes[0, :, :3], shapes[0, :, 3:], uvs, faces)
                texture = f"warriors:{path.relative_to(self._root.resolve())}"
                parts.append(Actor(mesh, texture, "team" if is_team else "cut", shapes={state: shapes}))
        return Actor.of(parts)
