"""Textured meshes with skeletons, and the actors that are put together from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .vertex_animation import between


NO_BONE = 255


@dataclass(frozen=True)
class Mesh:
    """
    Triangles in object space, y up.

    Args:
        positions (`np.ndarray` of shape `(vertices, 3)`): In the bind pose.
        normals (`np.ndarray` of shape `(vertices, 3)`): Need not be of length one.
        uvs (`np.ndarray` of shape `(vertices, 2)`): Texture coordinates, v downwards.
        faces (`np.ndarray` of shape `(faces, 3)`): Vertices of each triangle, in any order.
        bones (`np.ndarray` of shape `(vertices, 4)`): The bones that move a vertex, `NO_BONE` for none.
        weights (`np.ndarray` of shape `(vertices, 4)`): How much each of them does.
        bind (`np.ndarray` of shape `(bones, 4, 4)`): Where the bones are in the bind pose.
        points (`dict[str, tuple[np.ndarray, int]]`): Where things are attached: a matrix, and the bone it follows.
    """

    positions: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    bones: np.ndarray
    weights: np.ndarray
    bind: np.ndarray
    points: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)

    @classmethod
    def rigid(cls, positions: np.ndarray, normals: np.ndarray, uvs: np.ndarray, faces: np.ndarray, **points) -> Mesh:
        """A mesh without bones."""
        count = len(positions)
        bones, weights = np.full((count, 4), NO_BONE, np.uint8), np.zeros((count, 4), np.float32)
        return cls(positions, normals, uvs, faces, bones, weights, np.zeros((0, 4, 4)), points)


@dataclass
class Actor:
    """
    Something to look at.

    Args:
        mesh ([`Mesh`], *optional*): Its shape; without one, only what is attached is seen.
        texture (`str`, *optional*): Name of its picture; without one the mesh itself is not drawn.
        material (`str`): "cut" where the picture's alpha channel cuts holes, "team" where it lets the colour of a team
            show, else "plain".
        animations (`dict[str, np.ndarray]`): Bone states `(frames, bones, 7)` by name, see [`bone_matrices`].
        shapes (`dict[str, np.ndarray]`): The same for a mesh without bones: positions and normals `(frames, vertices,
            6)`.
        props (`dict[str, list[Actor]]`): What is attached, by point of the mesh.
    """

    mesh: Mesh | None = None
    texture: str | None = None
    material: str = "plain"
    animations: dict[str, np.ndarray] = field(default_factory=dict)
    shapes: dict[str, np.ndarray] = field(default_factory=dict)
    props: dict[str, list[Actor]] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: list[Actor]) -> Actor:
        """What is nothing but its parts."""
        nothing = np.zeros((0, 3), np.float32)
        mesh = Mesh.rigid(nothing, nothing, nothing[:, :2], nothing.astype(np.int32), root=(np.eye(4), NO_BONE))
        return cls(mesh, props={"root": parts})

    def parts(self) -> Iterator[Actor]:
        """The actor, and all that is attached to it."""
        yield self
        for props in self.props.values():
            for prop in props:
                yield from prop.parts()

    def states(self) -> dict[str, int]:
        """How many frames each animation has: of its bones, and of the vertices of its parts."""
        shapes = {state: len(shape) for part in self.parts() for state, shape in part.shapes.items()}
        return {state: len(frames) for state, frames in self.animations.items()} | shapes

    def placed_parts(self, matrix: np.ndarray, state: str | None, time: float) -> Iterator[PlacedPart]:
        """
        Every part with a picture as it is at a moment.

        Args:
            matrix (`np.ndarray` of shape `(4, 4)`): Where the actor stands.
            state (`str`, *optional*): Name of the animation; parts that lack it idle.
            time (`float`): In frames of the animation, which repeats.
        """
        animation = self.animations.get(state or "", self.animations.get("idle"))
        matrices = pose(self.mesh, animation, time)
        if self.texture is not None:
            if self.shapes:
                idle = self.shapes.get("idle", next(iter(self.shapes.values())))
                shape = between(self.shapes.get(state or "", idle), time)
                yield PlacedPart(self, matrix, shape[:, :3], shape[:, 3:])
            else:
                yield PlacedPart(self, matrix, *skin(self.mesh, matrices))
        for point, props in self.props.items():
            if point not in self.mesh.points:
                continue
            local, bone = self.mesh.points[point]
            if bone < len(self.mesh.bind):
                local = (self.mesh.bind if matrices is None else matrices)[bone] @ local
            for prop in props:
                yield from prop.placed_parts(matrix @ local, state, time)


@dataclass(frozen=True)
class PlacedPart:
    """A part of an actor: its vertices and their normals in its own space, and where that is in the world."""

    actor: Actor
    matrix: np.ndarray
    positions: np.ndarray
    normals: np.ndarray


def bone_matrices(states: np.ndarray) -> np.ndarray:
    """Matrices `(bones, 4, 4)` of bone states `(bones, 7)`: a translation, then a quaternion x, y, z, w."""
    states = np.asarray(states, np.float64).reshape(-1, 7)
    x, y, z, w = (states[:, 3:] / np.maximum(np.linalg.norm(states[:, 3:], axis=1, keepdims=True), 1e-9)).T
    matrices = np.zeros((len(states), 4, 4))
    matrices[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], 1)
    matrices[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], 1)
    matrices[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], 1)
    matrices[:, :3, 3] = states[:, :3]
    matrices[:, 3, 3] = 1
    return matrices


def pose(mesh: Mesh, animation: np.ndarray | None, time: float) -> np.ndarray | None:
    """Matrices `(bones, 4, 4)` at a time in frames; `None` where the animation is none, or another skeleton's."""
    if animation is None or not len(mesh.bind) or animation.shape[1] != len(mesh.bind):
        return None
    first, share = int(time) % len(animation), time - int(time)
    a, b = animation[first].astype(np.float64), animation[(first + 1) % len(animation)].astype(np.float64)
    # A quaternion and its negative are the same rotation; between unlike ones the mean would be none.
    b[(a[:, 3:] * b[:, 3:]).sum(1) < 0, 3:] *= -1
    return bone_matrices(a * (1 - share) + b * share)


def skin(mesh: Mesh, matrices: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Positions and normals of a mesh whose bones are where `matrices` say (linear blend skinning)."""
    if matrices is None:
        return mesh.positions, mesh.normals
    moves = np.concatenate([matrices @ np.linalg.inv(mesh.bind), np.eye(4)[None]]).astype(np.float32)
    weights = np.where(mesh.bones == NO_BONE, 0, mesh.weights).astype(np.float32)
    index = np.minimum(mesh.bones.astype(np.int64), len(moves) - 1)
    still = weights.sum(1) < 1e-3
    weights[still, 0], index[still, 0] = 1, len(moves) - 1
    blended = np.einsum("vk,vkij->vij", weights / weights.sum(1, keepdims=True), moves[index])
    positions = np.einsum("vij,vj->vi", blended[:, :3, :3], mesh.positions) + blended[:, :3, 3]
    return positions, np.einsum("vij,vj->vi", blended[:, :3, :3], mesh.normals)
