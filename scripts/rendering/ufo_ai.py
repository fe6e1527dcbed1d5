"""
People and vehicles of the game UFO: Alien Invasion (https://ufoai.org; Debian's ufoai-data names the licence of each:
GPL-2+ or Creative Commons): MD2 models, which give every vertex a place in every frame; files that say which frames
are which animation (.anm), and where the head is in each (.tag).
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from .files import read_texture, text_at
from .models import Actor, Mesh
from .vertex_animation import normals_of


ROOT = "models/"
PEOPLE = ("civilians", "soldiers", "aliens", "animals", "pilots")
VEHICLES = (
    "cars/4x4/4x4 cars/4x4/4x4_t", "cars/buggy/buggy", "cars/car2/car2a cars/car2/car2b", "cars/car3/car3",
    "cars/car4/car", "cars/carcrashed/car1", "cars/golf/car1 cars/golf/car1t", "cars/hummer/hummer", "cars/jeep/jeep",
    "cars/landy/landy", "cars/policecar/policecar", "cars/puma/puma", "cars/transporter/transporter",
    "cars/van/van1 cars/van/van1t", "cars/van2/van2", "cars/van3/van", "cars/trailer/boxtrailer", "trucks/truck/truck",
    "trucks/truck/cement_trailer", "trucks/truck2/truck", "trucks/truck2/fuel", "trucks/truck3/truck3",
    "trucks/watertruck/watertruck", "vehicles/bicycle/bicycle", "vehicles/forktruck/forktruck",
    "vehicles/motorbike/motorbike", "vehicles/tractor/tractor", "boat/boat", "boat/canoe",
)  # fmt: skip
# A person is 56 units high, and 1.8 metres; 0 A.D. counts in half metres, more or less.
SCALE = 3.6 / 56
# The game looks along x, z being up; here z is ahead, and y up.
TURN = np.float32([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
STATES = {"walk": "walk", "run": "run", "stand": "idle", "panic": "panic", "death": "death"}
MD2_HEAD, TAG_HEAD = struct.Struct("<4s16i"), struct.Struct("<4s7i")


def read_md2(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Positions `(frames, vertices, 3)`, texture coordinates, faces and names of skins of an MD2 file."""
    magic, _, width, height, size, skins, vertices, corners, faces, _, frames, *offsets, _ = MD2_HEAD.unpack_from(data)
    if magic != b"IDP2":
        raise ValueError(f"an MD2 file begins with IDP2, this one with {magic!r}")
    names = [text_at(data, offsets[0] + 64 * number) for number in range(skins)]
    uvs = np.frombuffer(data, "<i2", 2 * corners, offsets[1]).reshape(-1, 2) / np.float32([width, height])
    triangles = np.frombuffer(data, "<u2", 6 * faces, offsets[2]).reshape(-1, 2, 3)
    layout = np.dtype([("scale", "<f4", 3), ("move", "<f4", 3), ("name", "S16"), ("at", "u1", (vertices, 4))])
    if layout.itemsize != size:
        raise ValueError(f"a frame of {vertices} vertices takes {layout.itemsize} bytes, here it takes {size}")
    shapes = np.frombuffer(data, layout, frames, offsets[3])
    positions = shapes["at"][..., :3] * shapes["scale"][:, None] + shapes["move"][:, None]
    # A vertex of ours has one place in the texture, so there is one for each pair that a face names.
    pairs, index = np.unique(triangles.swapaxes(1, 2).reshape(-1, 2), axis=0, return_inverse=True)
    return positions[:, pairs[:, 0]], uvs[pairs[:, 1]], index.reshape(-1, 3).astype(np.int32), names


def read_animations(text: str) -> dict[str, tuple[int, int]]:
    """First and last frame of what a .anm file names, of the animations in `STATES`."""
    found = re.findall(r"^([a-z]+)\d\s+(\d+)\s+(\d+)", text, re.MULTILINE)
    return {STATES[name]: (int(first), int(last)) for name, first, last in reversed(found) if name in STATES}


def read_tag(data: bytes, name: str) -> np.ndarray:
    """Where what is attached at a point is in each frame, `(frames, 4, 3)`: three axes and the origin."""
    magic, _, tags, frames, names, matrices, *_ = TAG_HEAD.unpack_from(data)
    known = [text_at(data, names + 64 * number) for number in range(tags)]
    if magic != b"JDP2" or name not in known:
        raise ValueError(f"a .tag file begins with JDP2 and names {name}; this one with {magic!r}, and {known}")
    offset = matrices + 48 * frames * known.index(name)
    return np.frombuffer(data, "<f4", 12 * frames, offset).reshape(-1, 4, 3)


class UfoAI:
    """
    The archive's people and vehicles.

    Args:
        path (`Path`): base/0models.pk3 of the game.

    Raises:
        ValueError: If it is no archive of the game.
    """

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no archive; base/0models.pk3 of UFO: AI is in Debian's package ufoai-data.")
        self._zip = zipfile.ZipFile(path)
        self._known = {name[len(ROOT) :] for name in self._zip.namelist() if name.startswith(ROOT)}
        bodies = (name[:-4] for name in sorted(self._known) if name.startswith(PEOPLE) and name.endswith(".anm"))
        self._bodies = [name for name in bodies if f"{name}.md2" in self._known]
        self._vehicles = [
            names for names in VEHICLES if all(f"objects/{name}.md2" in self._known for name in names.split())
        ]
        if not self._bodies:
            raise ValueError(f"{path} holds no {ROOT}civilians/*/*.anm, so it is not 0models.pk3 of UFO: AI.")
        self._model = lru_cache(64)(lambda name: read_md2(self._read(f"{name}.md2")))
        self.texture = lru_cache(128)(self._read_texture)

    def _read(self, name: str) -> bytes:
        return self._zip.read(ROOT + name)

    def names(self, kind: str) -> list[str]:
        """Names of `people`, animals and aliens among them, or of `vehicles`."""
        return [f"{kind}/{name}" for name in (self._bodies if kind == "people" else self._vehicles)]

    def _read_texture(self, name: str) -> Image.Image:
        """A picture by its path."""
        return read_texture(io.BytesIO(self._read(name)))

    def actor(self, name: str, rng: np.random.Generator) -> Actor:
        """A person with a head, or a vehicle, in one of its skins; textures are named `people:<path>`."""
        kind, _, rest = name.partition("/")
        return Actor.of(self._person(rest, rng) if kind == "people" else self._vehicle(rest, rng))

    def _person(self, body: str, rng: np.random.Generator) -> list[Actor]:
        animations = read_animations(self._read(f"{body}.anm").decode(errors="replace"))
        frames = {state: range(first, last + 1) for state, (first, last) in animations.items()}
        parts = [self._part(body, rng, frames)]
        folder = str(PurePosixPath(body).parent)
        heads = sorted(name[:-4] for name in self._known if re.fullmatch(rf"{folder}/\w*head\w*\.md2", name))
        if heads and f"{body}.tag" in self._known:
            tag = read_tag(self._read(f"{body}.tag"), "tag_head")
            parts.append(self._part(heads[rng.integers(len(heads))], rng, frames, tag))
        feet = parts[0].mesh.positions[:, 1].min()
        for part in parts:
            for places in (part.mesh.positions, *part.shapes.values()):
                places[..., 1] -= feet
        return parts

    def _vehicle(self, names: str, rng: np.random.Generator) -> list[Actor]:
        parts = [self._part(f"objects/{name}", rng, {}) for name in names.split()]
        every = np.concatenate([part.mesh.positions for part in parts])
        turn = np.eye(3, dtype=np.float32)
        if np.ptp(every[:, 0]) > np.ptp(every[:, 2]):
            turn = np.float32([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
        for part in parts:
            part.mesh.positions[:] = (part.mesh.positions - [0, every[:, 1].min(), 0]) @ turn
            part.mesh.normals[:] = part.mesh.normals @ turn
        return parts

    def _part(
        self, name: str, rng: np.random.Generator, frames: dict[str, range], tag: np.ndarray | None = None
    ) -> Actor:
        """A model in one of its skins; with a tag, carried where that is in each frame."""
        positions, uvs, faces, skins = self._model(name)
        folder = PurePosixPath(name).parent
        # One model names a skin that is not there; its own name is that of a picture.
        paths = [f"{folder}/{skin[1:]}.{ending}" for skin in skins for ending in ("png", "jpg")] + [f"{name}.png"]
        found = [path for path in paths if path in self._known]

        def shape(index: list[int]) -> np.ndarray:
            places = positions[index] if tag is None else positions[:1] @ tag[index, :3] + tag[index, 3:]
            places = (places @ TURN.T * SCALE).astype(np.float32)
            return np.concatenate([places, normals_of(places, faces)], -1)

        shapes = {state: shape(list(index)) for state, index in frames.items()}
        first = next(iter(shapes.values()), shape([0]))[0]
        mesh = Mesh.rigid(first[:, :3].copy(), first[:, 3:].copy(), uvs, faces)
        texture = f"people:{found[rng.integers(len(found))]}" if found else None
        # Between the spokes of the bicycle, which is in this folder, its picture is transparent.
        return Actor(mesh, texture, "cut" if "/vehicles/" in name else "plain", shapes=shapes)
