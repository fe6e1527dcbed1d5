"""Draws triangles through OpenGL, on a CPU where there is no GPU (Mesa's llvmpipe)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import moderngl
import numpy as np
from PIL import Image


VERTEX_SHADER = """
#version 330
uniform mat4 view; uniform mat4 model; uniform vec3 sun; uniform bool is_shadow;
in vec3 position; in vec3 normal; in vec2 uv;
out vec3 world; out vec3 direction; out vec2 place;
void main() {
    vec4 point = model * vec4(position, 1.0);
    // A shadow lies on the plane y = 0, along the light.
    if (is_shadow) point.xyz -= sun * ((point.y - 0.03) / sun.y);
    world = point.xyz; direction = mat3(model) * normal; place = uv; gl_Position = view * point;
}
"""
FRAGMENT_SHADER = """
#version 330
uniform sampler2D picture; uniform bool is_cut; uniform bool is_lit; uniform bool is_shadow;
uniform vec3 sun; uniform vec3 light; uniform vec3 ambient; uniform vec3 eye; uniform vec4 fog;
uniform vec4 team; uniform float tint; uniform float number;
in vec3 world; in vec3 direction; in vec2 place;
layout(location = 0) out vec4 color; layout(location = 1) out vec4 label;
void main() {
    vec4 texel = texture(picture, place);
    if (is_cut && texel.a < 0.5) discard;
    if (is_shadow) { color = vec4(0.0, 0.0, 0.0, 0.35); label = vec4(0.0); return; }
    vec3 paint = texel.rgb;
    if (team.a > 0.5) paint = mix(team.rgb * (0.4 + 0.6 * dot(paint, vec3(0.33))), paint, texel.a);
    paint *= mix(vec3(1.0), team.rgb * 1.6, tint);
    if (is_lit) {
        paint *= ambient + light * max(dot(normalize(direction), sun), 0.0);
        paint = mix(paint, fog.rgb, 1.0 - exp(-length(world - eye) * fog.a));
    }
    color = vec4(paint, 1.0);
    label = vec4(number / 255.0, 0.0, 0.0, 1.0);
}
"""
SUPERSAMPLING = 2
MOST_TEXTURES = 400


@dataclass(frozen=True)
class Light:
    """Where the light comes from, its colour, that of the shade, and fog: colour, and how much of it a unit holds."""

    sun: np.ndarray
    light: np.ndarray
    ambient: np.ndarray
    fog: np.ndarray


class Painter:
    """
    A picture and a map of numbers that triangles are drawn into, `SUPERSAMPLING` times as large as what comes out.

    Args:
        size (`tuple[int, int]`): Width and height in pixels.
        load (`Callable[[str], Image.Image | None]`): The picture of a texture's name.

    Raises:
        ValueError: If there is no OpenGL.
    """

    def __init__(self, size: tuple[int, int], load: Callable[[str], Image.Image | None]):
        try:
            self._context = moderngl.create_context(standalone=True, backend="egl", require=330)
        except Exception as error:  # moderngl raises whatever its loader does
            raise ValueError(
                f"OpenGL 3.3 is missing ({error}); on Debian: apt-get install libegl1 libgl1-mesa-dri"
            ) from None
        self.size, self._load = size, load
        self._large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
        self._color, self._label = self._context.texture(self._large, 4), self._context.texture(self._large, 4)
        self._target = self._context.framebuffer(
            [self._color, self._label], self._context.depth_renderbuffer(self._large)
        )
        self._program = self._context.program(VERTEX_SHADER, FRAGMENT_SHADER)
        self._textures: dict[str, moderngl.Texture] = {}

    def begin(self, view: np.ndarray, eye: np.ndarray, light: Light) -> None:
        """Clears both, and sets what is the same for all triangles: the camera's matrix `(4, 4)` and place."""
        self._target.use()
        self._target.clear()
        self._context.enable(moderngl.DEPTH_TEST)
        self._view = view
        self._set(view=view, eye=eye, sun=light.sun, light=light.light, ambient=light.ambient, fog=light.fog)

    def has_texture(self, name: str) -> bool:
        """Whether there is a picture of that name."""
        return self._load(name) is not None

    def draw(
        self,
        vertices: np.ndarray,
        faces: np.ndarray,
        texture: str | Image.Image,
        matrix: np.ndarray,
        *,
        number: int = 0,
        is_cut: bool = False,
        is_lit: bool = True,
        is_shadow: bool = False,
        team: np.ndarray | None = None,
        tint: float = 0.0,
    ) -> None:
        """
        Draws a mesh.

        Args:
            vertices (`np.ndarray` of shape `(vertices, 8)`): Position, normal, texture coordinates.
            faces (`np.ndarray` of shape `(faces, 3)`): Vertices of the triangles.
            texture (`str` or `Image.Image`): Name of a picture, or a picture, which is used once.
            matrix (`np.ndarray` of shape `(4, 4)`): Where it is in the world.
            number (`int`): What the map of numbers says of it; 0 is background.
            is_cut (`bool`): Whether there are holes where the picture is transparent.
            is_lit (`bool`): Whether light and fog change its colours.
            is_shadow (`bool`): Draw its shadow on the plane y = 0 instead.
            team (`np.ndarray` of shape `(4,)`): A colour, which shows where the picture is transparent if the last
                number is 1.
            tint (`float`): How much of that colour all of it takes on.
        """
        self._set(
            model=matrix, number=float(number), is_cut=is_cut, is_lit=is_lit, is_shadow=is_shadow, tint=tint,
            team=np.zeros(4) if team is None else team,
        )  # fmt: skip
        picture = self._texture(texture)
        picture.use(0)
        data = self._context.buffer(vertices.astype("f4").tobytes())
        index = self._context.buffer(faces.astype("i4").tobytes())
        names = ("position", "normal", "uv")
        array = self._context.vertex_array(self._program, [(data, "3f 3f 2f", *names)], index)
        if is_shadow:
            self._context.enable(moderngl.BLEND)
        array.render()
        self._context.disable(moderngl.BLEND)
        for used in (array, data, index) if isinstance(texture, str) else (array, data, index, picture):
            used.release()

    def draw_behind(self, corners: np.ndarray, picture: Image.Image) -> None:
        """Draws a picture behind everything, at corners `(4, 8)` as the screen counts, -1 to 1; call it first."""
        view = self._view
        self._set(view=np.eye(4))
        self.draw(corners, np.array([[0, 1, 2], [0, 2, 3]]), picture, np.eye(4), is_lit=False)
        self._set(view=view)

    def finish(self) -> tuple[Image.Image, np.ndarray]:
        """The picture, of the mean of all samples, and the numbers `(height, width)`, of one sample each."""
        picture = Image.frombytes("RGBA", self._large, self._color.read()).convert("RGB")
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize(self.size, Image.Resampling.BOX)
        numbers = np.frombuffer(self._label.read(), np.uint8).reshape(self._large[1], self._large[0], 4)
        middle = SUPERSAMPLING // 2
        return picture, numbers[::-1, :, 0][middle::SUPERSAMPLING, middle::SUPERSAMPLING].copy()

    def _set(self, **uniforms) -> None:
        for name, value in uniforms.items():
            if isinstance(value, np.ndarray):
                # OpenGL counts matrices by columns.
                self._program[name].write(value.T.astype("f4").tobytes())
            else:
                self._program[name].value = value

    def _texture(self, texture: str | Image.Image) -> moderngl.Texture:
        if isinstance(texture, str):
            if len(self._textures) > MOST_TEXTURES:
                for old in self._textures.values():
                    old.release()
                self._textures.clear()
            if texture not in self._textures:
                self._textures[texture] = self._upload(self._load(texture))
            return self._textures[texture]
        return self._upload(texture)

    def _upload(self, picture: Image.Image) -> moderngl.Texture:
        uploaded = self._context.texture(picture.size, 4, picture.convert("RGBA").tobytes())
        uploaded.build_mipmaps()
        # Trilinear and anisotropic filtering cost six times as much here.
        uploaded.filter = (moderngl.LINEAR_MIPMAP_NEAREST, moderngl.LINEAR)
        return uploaded


def look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The matrix of a camera at `eye` that looks at `target`, y upwards."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, (0.0, 1.0, 0.0))
    right /= np.linalg.norm(right)
    matrix = np.eye(4)
    matrix[0, :3], matrix[1, :3], matrix[2, :3] = right, np.cross(right, forward), -forward
    matrix[:3, 3] = -matrix[:3, :3] @ eye
    return matrix


def perspective(field_of_view: float, aspect: float, near: float, far: float = 900.0) -> np.ndarray:
    """A perspective projection; the field of view in radians, from top to bottom."""
    focal = 1 / math.tan(field_of_view / 2)
    matrix = np.zeros((4, 4))
    matrix[0, 0], matrix[1, 1] = focal / aspect, focal
    matrix[2, 2], matrix[2, 3], matrix[3, 2] = (far + near) / (near - far), 2 * far * near / (near - far), -1
    return matrix


def rotation(axis: int, angle: float) -> np.ndarray:
    """A rotation `(4, 4)` about an axis, 0 to 2."""
    first, second = [index for index in range(3) if index != axis]
    matrix = np.eye(4)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    sine = math.sin(angle) * (-1 if axis == 1 else 1)
    matrix[first, second], matrix[second, first] = -sine, sine
    return matrix
