"""
Actors of the game 0 A.D. (Wildfire Games, https://play0ad.com; art CC BY-SA 3.0): animals, people, riders, machines,
houses and plants. Debian's package 0ad-data holds them all in one archive,
/usr/share/games/0ad/mods/public/public.zip, as the game caches them: .pmd meshes, .psa animations, .dds pictures.
"""

from __future__ import annotations

import io
import struct
import zipfile
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from .files import read_texture
from .models import NO_BONE, Actor, Mesh, bone_matrices


ACTORS, MESHES, ANIMATIONS, TEXTURES = "art/actors/", "art/meshes/", "art/animation/", "art/textures/"
TERRAINS = f"{TEXTURES}terrain/types/"
FLOAT, BYTE = np.dtype("<f4"), np.dtype("u1")
BONE_STATE = 7
DEEPEST_PROP = 4
CACHED = ".cached.dds"


class Reader:
    """Little-endian numbers and strings, one after another."""

    def __init__(self, data: bytes, magic: bytes):
        if data[:4] != magic:
            raise ValueError(f"a file of this kind begins with {magic!r}, this one with {data[:4]!r}")
        self._data = data
        self._at = 12
        (self.version,) = struct.unpack_from("<I", data, 4)

    def count(self) -> int:
        """The next number of 4 bytes."""
        return int(self.array(np.dtype("<u4"), 1)[0])

    def array(self, dtype: np.dtype, *shape: int) -> np.ndarray:
        """The next array."""
        size = int(np.prod(shape))
        values = np.frombuffer(self._data, dtype, size, self._at)
        self._at += size * dtype.itemsize
        return values.reshape(shape)

    def text(self) -> str:
        """The next string: its length, then its bytes."""
        return self.array(BYTE, self.count()).tobytes().decode()


def read_mesh(data: bytes) -> Mesh:
    """Reads a .pmd file (versions 3 and 4 of the game's source/graphics/ModelDef.cpp)."""
    reader = Reader(data, b"PSMD")
    count = reader.count()
    sets = reader.count() if reader.version >= 4 else 1
    vertex = np.dtype([("p", "<f4", 3), ("n", "<f4", 3), ("uv", "<f4", (sets, 2)), ("b", "u1", 4), ("w", "<f4", 4)])
    vertices = reader.array(vertex, count)
    faces = reader.array(np.dtype("<u2"), reader.count(), 3)
    bind = reader.array(FLOAT, reader.count(), BONE_STATE)
    points = {}
    for _ in range(reader.count()):
        name = reader.text()
        state = reader.array(FLOAT, BONE_STATE)
        points[name] = (bone_matrices(state)[0], int(reader.array(BYTE, 1)[0]))
    uvs = vertices["uv"][:, 0] * np.float32([1, -1]) + np.float32([0, 1])
    points.setdefault("root", (np.eye(4), NO_BONE))
    return Mesh(
        positions=vertices["p"],
        normals=vertices["n"],
        uvs=uvs,
        faces=faces.astype(np.int32),
        bones=vertices["b"],
        weights=vertices["w"],
        bind=bone_matrices(bind),
        points=points,
    )


def read_animation(data: bytes) -> np.ndarray:
    """Reads a .psa file: bone states `(frames, bones, 7)` in object space."""
    reader = Reader(data, b"PSSA")
    reader.text()
    reader.array(FLOAT, 1)
    bones, frames = reader.count(), reader.count()
    return reader.array(FLOAT, frames, bones, BONE_STATE)


class ZeroAD:
    """
    The archive's actors.

    Args:
        path (`Path`): public.zip.

    Raises:
        ValueError: If it is no archive of the game.
    """

    def __init__(self, path: Path):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no archive; public.zip of 0 A.D. is in Debian's package 0ad-data.")
        self._zip = zipfile.ZipFile(path)
        names = sorted(self._zip.namelist())
        self._known = set(names)
        self._actors = [name[len(ACTORS) :] for name in names if name.startswith(ACTORS) and name.endswith(".xml")]
        self._terrains = [name.removesuffix(CACHED) for name in names if _is_terrain(name)]
        if not self.names("fauna"):
            raise ValueError(f"{path} holds no {ACTORS}fauna/*.xml, so it is not public.zip of 0 A.D.")
        read = self._zip.read
        self._tree = lru_cache(512)(lambda path: ElementTree.fromstring(read(path)))
        self._mesh = lru_cache(256)(lambda path: read_mesh(read(path)))
        self._animation = lru_cache(256)(lambda path: read_animation(read(path)))
        self.texture = lru_cache(128)(self._read_texture)

    def names(self, kind: str) -> list[str]:
        """Actors of a kind, such as `fauna`, `units`, `structures`, `flora`, `props/flora`."""
        return [name for name in self._actors if name.startswith(f"{kind}/")]

    def terrains(self) -> list[str]:
        """Pictures of the ground."""
        return self._terrains

    def _read_texture(self, name: str) -> Image.Image | None:
        """A picture, RGBA, by its path in the archive before it was cached; `None` where there is none."""
        found = next((path for path in (name + CACHED, name) if path in self._known), None)
        if found is None:
            return None
        return read_texture(io.BytesIO(self._zip.read(found)))

    def actor(self, name: str, rng: np.random.Generator, depth: int = 0) -> Actor:
        """
        Puts an actor together, of one variant of each of its groups.

        Args:
            name (`str`): As in [`ZeroAD.names`].
            rng (`np.random.Generator`): Chooses the variants.
            depth (`int`): How many actors this one is attached to.
        """
        root = self._tree(ACTORS + name)
        groups, material = root.findall("group"), root.findtext("material")
        if root.tag == "qualitylevels":
            best, shared = root.findall("actor")[-1], root.find("inline")
            if best.get("file"):
                return self.actor(best.get("file"), rng, depth)
            shared = shared if shared is not None and best.get("inline") else ElementTree.Element("inline")
            groups = best.findall("group") + shared.findall("group")
            material = best.findtext("material") or shared.findtext("material")
        actor, props = Actor(material=_material(material or "")), {}
        for group in groups:
            for variant in _choose(group, rng):
                self._apply(variant, actor, props)
        for point, names in props.items() if depth < DEEPEST_PROP else ():
            made = [self.actor(prop, rng, depth + 1) for prop in names if ACTORS + prop in self._known]
            actor.props[point] = [prop for prop in made if prop.mesh is not None]
        return actor

    def _apply(self, variant: ElementTree.Element, actor: Actor, props: dict[str, list[str]]) -> None:
        """Changes an actor as a variant, and the file that it builds on, say."""
        base = f"art/variants/{variant.get('file')}"
        if base in self._known:
            self._apply(self._tree(base), actor, props)
        mesh = f"{MESHES}{variant.findtext('mesh')}.cached.pmd"
        if mesh in self._known:
            actor.mesh = self._mesh(mesh)
        for texture in variant.iter("texture"):
            if texture.get("name") == "baseTex":
                actor.texture = f"{TEXTURES}skins/{texture.get('file')}"
        for animation in variant.iter("animation"):
            path = f"{ANIMATIONS}{animation.get('file')}.cached.psa"
            if path in self._known:
                actor.animations.setdefault(animation.get("name", "").lower(), self._animation(path))
        changed = {prop.get("attachpoint"): [] for prop in variant.iter("prop")}
        for prop in variant.iter("prop"):
            if prop.get("actor"):
                changed[prop.get("attachpoint")].append(prop.get("actor"))
        props.update(changed)


def _is_terrain(name: str) -> bool:
    """Whether a file is a picture of the ground, rather than a map of its normals or gloss."""
    maps = ("_norm", "_spec", "norm.", "spec.")
    return name.startswith(TERRAINS) and name.endswith(CACHED) and not any(part in name for part in maps)


def _material(name: str) -> str:
    """What the alpha channel of an actor's picture means."""
    if name.startswith("basic_trans"):
        return "cut"
    return "team" if name.startswith(("player", "objectcolor")) else "plain"


def _choose(group: ElementTree.Element, rng: np.random.Generator) -> list[ElementTree.Element]:
    """One variant of a group, or none of an empty one; those without a frequency are states that the game selects."""
    variants = group.findall("variant")
    shares = np.array([float(variant.get("frequency") or 0) for variant in variants])
    if shares.sum() > 0:
        return [variants[rng.choice(len(variants), p=shares / shares.sum())]]
    looks = [variant for variant in variants if not variant.get("file")]
    return [looks[rng.integers(len(looks))]] if looks else variants[:1]
