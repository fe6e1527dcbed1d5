"""
A few seconds of things that move: what a video shows, drawn at random from a seed.

Most scenes are landscapes: a textured ground with plants, houses and bystanders, where one to six things with masks,
often of one kind, cross each other's way while the camera follows the first. In the others, things turn freely in
front of a photograph, as in the rendered training videos of MiVOS (Cheng et al., arXiv 2103.07941).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from hf_deformvos.image_processing_deformvos import to_rgb

from .models import Actor
from .painter import Light, Painter, look_at, perspective, rotation
from .vertex_animation import between


FREE_SHARE = 0.25
# Of scenes whose camera's shutter stays open for a part of a frame, which is drawn as the mean of so many moments.
BLURRED_SHARE, MOMENTS = 0.25, 4
MOVING, TEAM_SHARE, ALIKE_SHARE = ("walk", "run"), 0.7, 0.5
SMALLEST, LARGEST = 0.2, 40.0
# Frames that a cycle of an animation takes.
FASTEST_CYCLE, SLOWEST_CYCLE = 14, 40
HORIZON_SCALE = 1.45


class Assets(Protocol):
    """Where actors come from."""

    def names(self, kind: str) -> list[str]:
        """Actors of a kind; none if the kind is unknown."""

    def terrains(self) -> list[str]:
        """Textures of the ground."""

    def actor(self, name: str, rng: np.random.Generator) -> Actor:
        """An actor, of variants that the generator chooses."""


@dataclass
class Thing:
    """
    An actor in a scene.

    Args:
        actor ([`Actor`]): What it looks like.
        number (`int`): Its value in masks, 0 where it has none.
        team (`np.ndarray` of shape `(3,)`): Colour of its team.
        tint (`float`): How much of that colour all of it takes on.
        state (`str`, *optional*): Its animation.
        speed, phase (`float`): Frames of the animation by frame of the video, and at the first.
        matrices (`list[np.ndarray]`): Where it is, by frame of the video, or once.
    """

    actor: Actor
    number: int
    team: np.ndarray
    tint: float = 0.0
    state: str | None = None
    speed: float = 1.0
    phase: float = 0.0
    matrices: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self):
        corners = [
            np.percentile(part.positions @ part.matrix[:3, :3].T + part.matrix[:3, 3], (1, 99), axis=0)
            for part in self.actor.placed_parts(np.eye(4), self.state, 0.0)
        ]
        self.low = np.min([low for low, _ in corners], axis=0)
        self.high = np.max([high for _, high in corners], axis=0)

    @property
    def extent(self) -> float:
        """Its longest side."""
        return float((self.high - self.low).max())

    @property
    def height(self) -> float:
        """How high it is."""
        return float(self.high[1] - self.low[1])

    def matrix(self, frame: float) -> np.ndarray:
        """Where it is at a frame, or between two."""
        return between(self.matrices, min(frame, len(self.matrices) - 1))

    def draw(self, painter: Painter, frame: float, is_shadow: bool = False) -> None:
        """Draws it as it is at a frame."""
        time = frame * self.speed + self.phase
        for part in self.actor.placed_parts(self.matrix(frame), self.state, time):
            mesh, material = part.actor.mesh, part.actor.material
            painter.draw(
                np.concatenate([part.positions, part.normals, mesh.uvs], 1),
                mesh.faces,
                part.actor.texture,
                part.matrix,
                number=self.number,
                is_cut=material == "cut",
                is_shadow=is_shadow,
                team=np.append(self.team, material == "team"),
                tint=self.tint,
            )


@dataclass(frozen=True)
class Hills:
    """Heights of the ground: two waves of some height, length and phase."""

    height: float
    wave: float
    ripple: float
    phase: float

    def at(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """How high the ground is at places."""
        broad = self.height * np.sin(self.wave * x + self.phase) * np.cos(self.wave * z - self.phase)
        return broad + self.ripple * np.sin(self.wave * (3 * x - z))

    @property
    def are_flat(self) -> bool:
        """Whether the ground is so even that shadows can lie on the plane y = 0."""
        return self.height == 0 and self.ripple == 0

    def mesh(self, reach: float, tile: float, side: int = 96) -> tuple[np.ndarray, np.ndarray]:
        """Vertices `(side², 8)` and faces of the ground as far as `reach`, a picture being `tile` long."""
        line = np.linspace(-reach, reach, side)
        x, z = np.meshgrid(line, line, indexing="ij")
        step = reach * 1e-3
        slope_x, slope_z = self.at(x - step, z) - self.at(x + step, z), self.at(x, z - step) - self.at(x, z + step)
        columns = x, self.at(x, z), z, slope_x, np.full_like(x, 2 * step), slope_z, x / tile, z / tile
        corners = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1, 1)
        faces = np.concatenate([corners + np.array(half) for half in ([0, 1, side], [1, side + 1, side])])
        return np.stack(columns, -1).reshape(-1, 8), faces


class Scene:
    """
    The plan of a video; the same seed and assets mean the same plan.

    Args:
        assets ([`Assets`]): Where actors come from.
        painter ([`Painter`]): Draws it.
        photographs (`list[Path]`): Pictures of which one is seen beyond everything.
        frames (`int`): Length of the video.
        seed (`int`): Of all that is random.
    """

    def __init__(self, assets: Assets, painter: Painter, photographs: list[Path], frames: int, seed: int):
        self.assets, self.painter, self.frames = assets, painter, frames
        self.rng = np.random.default_rng(seed)
        self.is_free = self.rng.random() < FREE_SHARE
        self.light = self._draw_light()
        self.things = self._draw_things()
        # Everything is as large and as far as the first thing's size says.
        self.unit = self.things[0].extent
        self.hills = self._draw_hills()
        self.paths = [self._draw_path(index) for index in range(len(self.things))]
        self._move_things()
        self.scenery = [] if self.is_free else self._draw_scenery()
        self.ground = self.hills.mesh(14 * self.unit + 40, self.rng.uniform(1.5, 5) * self.unit)
        self.terrain = str(self.rng.choice(assets.terrains()))
        self.backdrop = self._draw_backdrop(photographs)
        self._draw_camera()
        self.shutter = self.rng.uniform(0.2, 0.8) if self.rng.random() < BLURRED_SHARE else 0.0

    def frame(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture at a frame, and its masks `(height, width)`, uint8 numbers."""
        picture, numbers = self._moment(index)
        if not self.shutter:
            return picture, numbers
        # The masks are those of the middle.
        times = index + self.shutter * (np.arange(MOMENTS) / (MOMENTS - 1) - 0.5)
        pictures = [self._moment(float(time))[0] for time in times.clip(0, self.frames - 1)]
        return Image.fromarray(np.mean([np.asarray(each) for each in pictures], 0).astype(np.uint8)), numbers

    def _moment(self, index: float) -> tuple[Image.Image, np.ndarray]:
        eye, target = between(self.cameras, index)
        self.painter.begin(self.projection @ look_at(eye, target), eye, self.light)
        self._draw_horizon(index)
        if not self.is_free:
            self.painter.draw(*self.ground, self.terrain, np.eye(4))
        # What stands where the camera is would hide everything.
        away = [thing for thing in self.scenery if np.linalg.norm(thing.matrix(0)[:3, 3] - eye) > 0.7 * thing.extent]
        seen = [*self.things, *away]
        for is_shadow in (True, False) if self.hills.are_flat and not self.is_free else (False,):
            for thing in seen:
                thing.draw(self.painter, index, is_shadow)
        return self.painter.finish()

    def _draw_light(self) -> Light:
        rng = self.rng
        azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.35, 0.95)
        across = math.sqrt(1 - height**2)
        warm = rng.uniform(-0.12, 0.12) * np.array([1.0, 0.0, -1.0])
        return Light(
            sun=np.array([across * math.cos(azimuth), height, across * math.sin(azimuth)]),
            light=rng.uniform(0.35, 0.95) * (1 + warm),
            ambient=rng.uniform(0.4, 0.75) * (1 - warm / 2),
            fog=np.append(rng.uniform(0.5, 0.9, 3), 10 ** rng.uniform(-3.6, -2.3)),
        )

    def _pick(self, kinds: dict[str, float]) -> str:
        """Name of an actor, of a kind that is as likely as its share."""
        known = {kind: share for kind, share in kinds.items() if self.assets.names(kind)}
        shares = np.array(list(known.values()))
        names = self.assets.names(str(self.rng.choice(list(known), p=shares / shares.sum())))
        return names[self.rng.integers(len(names))]

    def _make(self, name: str, number: int, team: np.ndarray) -> Thing | None:
        """A thing; `None` where it cannot be seen, or is too small or too large."""
        actor = self.assets.actor(name, self.rng)
        for part in actor.parts():
            if part.mesh is None or (part.texture is not None and not self.painter.has_texture(part.texture)):
                part.texture = None
        if actor.mesh is None or all(part.texture is None for part in actor.parts()):
            return None
        tint = self.rng.uniform(0, 0.6) if self.rng.random() < 0.25 else 0.0
        thing = Thing(actor, number, team, tint)
        return thing if SMALLEST < thing.extent < LARGEST else None

    def _draw_things(self) -> list[Thing]:
        rng = self.rng
        kinds = {"fauna": 0.25, "units": 0.2, "people": 0.2, "warriors": 0.15, "cars": 0.15, "vehicles": 0.1}
        kinds |= {"structures": 0.1, "props/special": 0.15 * self.is_free}
        count = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.3, 0.25, 0.15, 0.12, 0.1, 0.08]))
        are_alike = rng.random() < ALIKE_SHARE
        things: list[Thing] = []
        name, team = "", np.zeros(3)
        while len(things) < count:
            if not name or not (are_alike and rng.random() < 0.8):
                name, team = self._pick(kinds), rng.uniform(0, 1, 3)
            own = team if rng.random() < TEAM_SHARE else rng.uniform(0, 1, 3)
            thing = self._make(name, len(things) + 1, own)
            if thing is None:
                name = ""
                continue
            self._animate(thing)
            things.append(thing)
        return things

    def _animate(self, thing: Thing) -> None:
        """Chooses what a thing does, and how fast."""
        rng, animations = self.rng, thing.actor.states()
        moving = [state for state in MOVING if state in animations]
        choice = moving if moving and rng.random() < 0.75 else sorted(animations)
        if choice:
            thing.state = str(rng.choice(choice))
            length = animations[thing.state]
            thing.speed, thing.phase = length / rng.uniform(FASTEST_CYCLE, SLOWEST_CYCLE), rng.uniform(0, length)

    def _draw_hills(self) -> Hills:
        rng, unit = self.rng, self.unit
        wave, phase = 1 / (unit * rng.uniform(3, 8)), rng.uniform(0, 2 * math.pi)
        if rng.random() < 0.4:
            return Hills(0.0, wave, 0.0, phase)
        return Hills(unit * rng.uniform(0.1, 0.5), wave, unit * rng.uniform(0, 0.08), phase)

    def _draw_path(self, index: int) -> np.ndarray:
        """x, z and heading of a thing by frame, `(frames, 3)`."""
        rng, thing = self.rng, self.things[index]
        together = index == 0 or rng.random() < 0.6
        heading = self.heading + rng.normal(0, 0.15) if index and together else rng.uniform(0, 2 * math.pi)
        if index == 0:
            self.heading = heading
        moves = thing.state in MOVING or (thing.state is None and rng.random() < 0.85)
        pace = thing.extent * rng.uniform(0.02, 0.09) * (2 if thing.state == "run" else 1) * moves
        turn, wobble = rng.normal(0, 0.02), rng.uniform(0, 0.03)
        place = np.zeros(2) if index == 0 else rng.uniform(-1, 1, 2) * self.unit * (0.7 + 0.45 * index)
        path = np.zeros((self.frames, 3))
        for frame in range(self.frames):
            heading += turn + wobble * math.sin(0.3 * frame + index)
            path[frame] = (
                *(path[frame - 1, :2] * (frame > 0) + pace * np.array([math.sin(heading), math.cos(heading)])),
                heading,
            )
        # Where they were to meet is in the middle of the video.
        back = rng.uniform(0.3, 1.0) if index else 0.0
        path[:, :2] += place - back * path[self.frames // 2, :2]
        return path

    def _move_things(self) -> None:
        """Puts the things where their paths lead; without a ground they turn about all axes as well."""
        for thing, path in zip(self.things, self.paths, strict=True):
            spin, tilt = self.rng.normal(0, 0.1, 3), self.rng.uniform(-1, 1, 3)
            height = self.rng.uniform(-0.4, 0.4) * self.unit
            for frame, (x, z, heading) in enumerate(path):
                matrix = rotation(1, heading)
                matrix[:3, 3] = x, height if self.is_free else self.hills.at(x, z), z
                if self.is_free:
                    for axis in range(3):
                        matrix = matrix @ rotation(axis, tilt[axis] + spin[axis] * frame)
                    centre = np.eye(4)
                    centre[:3, 3] = -(thing.low + thing.high) / 2
                    matrix = matrix @ centre
                thing.matrices.append(matrix)

    def _draw_scenery(self) -> list[Thing]:
        """Plants, of a few kinds, houses and rocks, and bystanders, none of which has a mask."""
        rng, unit = self.rng, self.unit
        plants = [self._pick({"flora": 0.6, "props/flora": 0.4}) for _ in range(rng.integers(1, 5))]
        scenery = []
        for _ in range(rng.choice([0, 4, 10, 20], p=[0.1, 0.3, 0.35, 0.25])):
            scenery.append(self._place(str(rng.choice(plants)), rng.uniform(0.8, 9) * unit))
        for _ in range(rng.choice([0, 1, 3], p=[0.4, 0.35, 0.25])):
            scenery.append(self._place(self._pick({"structures": 0.9, "geology": 0.1}), rng.uniform(3, 9) * unit + 20))
        for _ in range(rng.choice([0, 2, 5], p=[0.6, 0.25, 0.15])):
            scenery.append(self._place(self._pick({"units": 0.8, "fauna": 0.2}), rng.uniform(1.5, 6) * unit))
        return [thing for thing in scenery if thing is not None]

    def _place(self, name: str, distance: float) -> Thing | None:
        """A thing that stays at some distance from the way of the first."""
        rng = self.rng
        thing = self._make(name, 0, rng.uniform(0, 1, 3))
        if thing is None:
            return None
        angle = rng.uniform(0, 2 * math.pi)
        x, z = self.paths[0][rng.integers(self.frames), :2] + distance * np.array([math.sin(angle), math.cos(angle)])
        matrix = rotation(1, rng.uniform(0, 2 * math.pi))
        matrix[:3, :3] *= rng.uniform(0.7, 1.3)
        matrix[:3, 3] = x, self.hills.at(x, z), z
        thing.phase, thing.matrices = rng.uniform(0, 50), [matrix]
        return thing

    def _draw_backdrop(self, photographs: list[Path]) -> Image.Image:
        picture = to_rgb(Image.open(photographs[self.rng.integers(len(photographs))])).resize((1024, 576))
        if self.rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return picture.filter(ImageFilter.GaussianBlur(self.rng.uniform(0, 3)))

    def _draw_camera(self) -> None:
        """A camera that follows the first thing, more or less, goes round it, comes nearer, and trembles."""
        rng, first = self.rng, self.things[0]
        field_of_view = math.radians(rng.uniform(25, 55))
        size = max(first.height, 0.45 * first.extent)
        distance = 1.05 * size / (rng.uniform(0.22, 0.75) * 2 * math.tan(field_of_view / 2))
        self.projection = perspective(field_of_view, self.painter.size[0] / self.painter.size[1], 0.02 * distance)
        azimuth, lift = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(1, 28))
        drift, zoom, follow = rng.normal(0, 0.018), rng.normal(0, 0.01), rng.uniform(0.55, 1.0)
        aside, above = rng.normal(0, 0.12, 2) * distance * (0.8, 0.5)
        shake = rng.normal(0, 0.006 * distance, (self.frames + 2, 3))
        middle = self.paths[0][self.frames // 2, :2]
        self.cameras = []
        for frame in range(self.frames):
            x, z = middle + follow * (self.paths[0][frame, :2] - middle)
            height = first.matrix(frame)[1, 3] if self.is_free else self.hills.at(x, z) + first.high[1] / 2
            angle, away = azimuth + drift * frame, distance * math.exp(zoom * frame)
            around = np.array([math.cos(lift) * math.cos(angle), math.sin(lift), math.cos(lift) * math.sin(angle)])
            target = np.array([x, height, z])
            eye = target + away * around
            if not self.is_free:
                eye[1] = max(eye[1], self.hills.at(eye[0], eye[2]) + 0.08 * size)
            side = np.array([-math.sin(angle), 0.0, math.cos(angle)])
            target = target + aside * side + (0.0, above, 0.0) + shake[frame : frame + 3].mean(0)
            self.cameras.append(np.stack([eye, target]))

    def _draw_horizon(self, index: float) -> None:
        """The photograph, which turns with the camera as what is far away does."""
        (eye, target), (first_eye, first_target) = between(self.cameras, index), self.cameras[self.frames // 2]
        way, first = (target - eye) / np.linalg.norm(target - eye), first_target - first_eye
        turn = math.atan2(way[2], way[0]) - math.atan2(first[2], first[0])
        turn = (turn + math.pi) % (2 * math.pi) - math.pi
        tilt = math.asin(way[1]) - math.asin(first[1] / np.linalg.norm(first))
        corners = HORIZON_SCALE * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        corners += np.array([-1.6 * turn, -2.0 * tilt + (0.0 if self.is_free else 0.25)])
        vertices = np.zeros((4, 8))
        vertices[:, :2], vertices[:, 2], vertices[:, 6:] = corners, 0.9999, [[0, 1], [1, 1], [1, 0], [0, 0]]
        self.painter.draw_behind(vertices, self.backdrop)
