"""Batched augmentation on the device: warps, colour, pasted objects and look-alikes, all from one generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .clips import RawBatch
from .cords import add_cords
from .draws import STEADY_FRAMES, chance, pick, random_walk, uniform
from .store import VOID


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Share of pasted objects that are copies of the clip's own.
_TWINS = 0.3
# Share of occluders that are bars; the others are blobs.
_BARS = 0.5
# Range in which objects that go their own way are enlarged.
_RECOMPOSED_SCALE = (0.7, 1.3)


@dataclass(frozen=True)
class AugmentConfig:
    """
    Strengths of the augmentation; lengths are fractions of the output's height.

    Args:
        flip (`float`): Probability of a mirrored clip.
        rotation (`float`): Largest rotation of a whole clip, in degrees.
        scale (`float`): Largest zoom of a whole clip, as log ratio.
        shear (`float`): Largest shear of a whole clip.
        motion (`float`): Strength of the made-up motion of still images, 1 = up to 8 % of the height a frame.
        video_motion (`float`): The same for videos, which move by themselves.
        elastic (`float`): Strength of the smooth non-rigid deformation of still images.
        color (`float`): Strength of brightness, contrast, saturation and hue changes.
        grayscale (`float`): Probability of a gray clip.
        blur (`float`): Probability of a blurred clip (out of focus or motion).
        paste (`float`): Probability of pasting another sample's object, or now and then a copy of the clip's own, as
            one more labelled object.
        pastes (`int`): How many times that is tried.
        leave (`float`): Probability that such an object leaves the picture on the way: nothing of it is to be found.
        distractor (`float`): Probability of pasting an unlabelled look-alike: a copy of the clip's object or another
            sample's object.
        cords (`float`): Probability of a bundle of thin cords, mostly tied to an object of the clip and part of it.
        occluder (`float`): Probability of a moving unlabelled blob, or bars, of another image in front of everything.
        min_area (`int`): Pixels an object must show in the first frame to count as given.
    """

    flip: float = 0.5
    rotation: float = 10.0
    scale: float = 0.1
    shear: float = 0.06
    motion: float = 1.0
    video_motion: float = 0.12
    elastic: float = 1.0
    color: float = 1.0
    grayscale: float = 0.05
    blur: float = 0.15
    paste: float = 0.4
    pastes: int = 1
    leave: float = 0.0
    distractor: float = 0.4
    cords: float = 0.0
    occluder: float = 0.1
    min_area: int = 60

    def __post_init__(self):
        for name in ("flip", "grayscale", "blur", "paste", "leave", "distractor", "cords", "occluder"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be a probability between 0 and 1, got {getattr(self, name)}.")


@dataclass
class ClipBatch:
    """
    Augmented clips.

    Args:
        pixel_values (`torch.Tensor` of shape `(batch, frames, 3, height, width)`): Normalized with ImageNet's mean and
            standard deviation, float32.
        id_masks (`torch.Tensor` of shape `(batch, frames, height, width)`): int64; 0 background, 1..N, 255 void.
        object_valid (`torch.Tensor` of shape `(batch, num_objects)`): bool; which objects the first frame shows.
    """

    pixel_values: torch.Tensor
    id_masks: torch.Tensor
    object_valid: torch.Tensor

    @property
    def num_objects(self) -> int:
        """N: most objects of any sample."""
        return self.object_valid.shape[1]


def augment_clips(
    raw: RawBatch, config: AugmentConfig, generator: torch.Generator, device: torch.device | str = "cpu"
) -> ClipBatch:
    """
    Turns raw clips into training clips.

    Args:
        raw ([`RawBatch`]): From [`ClipSampler`].
        config ([`AugmentConfig`]): Strengths.
        generator (`torch.Generator`): A CPU generator: the only source of randomness.
        device (`torch.device` or `str`): Where the work is done and the result lies.

    Returns:
        [`ClipBatch`]. Every sample keeps at least one valid object wherever its raw clip shows one.
    """
    size = raw.size
    frames = raw.frames.to(device, non_blocking=True)
    masks = raw.masks.to(device, non_blocking=True)
    matrix, shift = draw_motion(raw.is_static, masks.shape[1], tuple(masks.shape[2:]), size, config, generator)
    bend = _elastic(raw.is_static, masks.shape[1], size, config, generator)
    bend = None if bend is None else bend.to(device)
    grid = motion_grid(matrix.to(device), shift.to(device), size, tuple(masks.shape[2:]), bend)
    images, ids = warp_clips(frames, masks, grid)
    lost = _first_areas(ids).amax(1) < config.min_area
    if lost.any():
        # The whole canvas, unwarped: the sampler put the object near its centre.
        still = identity_grid(size, device).expand(int(lost.sum()), masks.shape[1], -1, -1, -1)
        images[lost], ids[lost] = warp_clips(frames[lost], masks[lost], still)
    images = jitter_colors(images, config, generator)
    if config.cords > 0:
        add_cords(images, ids, _present(ids, config), config.cords, generator)
    _paste_all(images, ids, config, generator)
    _blur(images, config, generator)
    return ClipBatch(images, *compact_ids(ids, config.min_area))


# --------------------------------------------------------------------------------------------------------------------
# Geometry
# --------------------------------------------------------------------------------------------------------------------


def identity_grid(size: tuple[int, int], device: torch.device | str) -> torch.Tensor:
    """Sampling grid `(height, width, 2)` of (x, y) in [-1, 1] that stretches source to output."""
    y = torch.linspace(-1, 1, size[0], device=device)
    x = torch.linspace(-1, 1, size[1], device=device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)


def _matrices(angle: torch.Tensor, log_scale: torch.Tensor, shear: torch.Tensor, stretch: torch.Tensor):
    """2x2 matrices from rotation (radians), log zoom, shear and log aspect change, all of one shape `(...)`."""
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    shearing = torch.stack([torch.stack([one, shear], -1), torch.stack([zero, one], -1)], -2)
    scaling = torch.stack([(log_scale + stretch).exp(), (log_scale - stretch).exp()], -1)
    return rotation @ shearing * scaling.unsqueeze(-2)


def draw_motion(
    is_static: torch.Tensor,
    frames: int,
    canvas: tuple[int, int],
    size: tuple[int, int],
    config: AugmentConfig,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draws the affine part of the warp: one pose a clip and a walk over its frames.

    Returns:
        `tuple(torch.Tensor)`: matrices `(batch, frames, 2, 2)` and shifts `(batch, frames, 2)`, which take output
        pixels, counted from the centre, to canvas pixels counted from the canvas centre.
    """
    batch = is_static.shape[0]
    pose = uniform(generator, batch, 6)
    flip = torch.rand(batch, generator=generator) < config.flip
    walk = random_walk(generator, batch, frames, 6)
    # Most motion in real video is small between neighbours; a few clips move fast.
    speed = torch.exp(uniform(generator, batch, low=math.log(0.15), high=math.log(1.6)))
    strength = torch.where(is_static, config.motion * speed, torch.full((batch,), config.video_motion))
    walk = walk * strength.view(batch, 1, 1)
    angle = (pose[:, :1] * config.rotation + walk[..., 0] * 5.0) * math.pi / 180
    # The canvas is larger than the output by a margin that still images, which move further, need most.
    margin = math.log(canvas[0] / size[0])
    wide = torch.where(is_static, 0.3, 0.6).unsqueeze(1) * margin
    log_scale = wide + pose[:, 1:2] * config.scale + walk[..., 1] * 0.05
    shear = pose[:, 2:3] * config.shear + walk[..., 2] * 0.03
    stretch = pose[:, 3:4] * 0.5 * config.scale + walk[..., 3] * 0.02
    matrix = _matrices(angle, log_scale, shear, stretch)
    matrix[flip, :, :, 0] *= -1
    free = torch.tensor([(canvas[1] - size[1]) / 2, (canvas[0] - size[0]) / 2]).clamp_min(0)
    shift = pose[:, None, 4:6] * free * 0.8 + walk[..., 4:6] * 0.08 * size[0]
    # Centred over time, so that a walk leaves the canvas as late as possible.
    shift = shift - (shift[:, -1:] - shift[:, :1]) / 2
    return matrix, shift


def motion_grid(
    matrix: torch.Tensor,
    shift: torch.Tensor,
    size: tuple[int, int],
    source: tuple[int, int],
    bend: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sampling grid of affine maps given in pixels.

    Args:
        matrix (`torch.Tensor` of shape `(..., 2, 2)`): Output pixels (x, y) from the centre -> source pixels.
        shift (`torch.Tensor` of shape `(..., 2)`): Source pixels (x, y) that the output's centre shows, from the
            source's centre.
        size (`tuple[int, int]`): Output height and width.
        source (`tuple[int, int]`): Source height and width.
        bend (`torch.Tensor` of shape `(..., 2, coarse_height, coarse_width)`, *optional*): Added, in grid units.

    Returns:
        `torch.Tensor` of shape `(..., height, width, 2)`, for `grid_sample(align_corners=True)`.
    """
    lead = matrix.shape[:-2]
    half_in = matrix.new_tensor([max(source[1] - 1, 1) / 2, max(source[0] - 1, 1) / 2])
    matrix = (matrix / half_in.unsqueeze(-1)).reshape(-1, 2, 2, 1, 1)
    shift = (shift / half_in).reshape(-1, 2, 1, 1)
    x = torch.arange(size[1], device=matrix.device) - (size[1] - 1) / 2
    y = torch.arange(size[0], device=matrix.device) - (size[0] - 1) / 2
    # Coordinates are planes, each the sum of a row and a column: far cheaper than a product for every pixel.
    planes = matrix[:, :, 0] * x + (matrix[:, :, 1] * y.unsqueeze(-1) + shift)
    if bend is not None:
        planes += F.interpolate(bend.flatten(0, -4), size=size, mode="bilinear", align_corners=True)
    return planes.permute(0, 2, 3, 1).unflatten(0, lead)


def _coarse_size(size: tuple[int, int]) -> tuple[int, int]:
    """An eighth of a size, corners included."""
    return max(2, (size[0] - 1) // 8 + 1), max(2, (size[1] - 1) // 8 + 1)


def _elastic(
    is_static: torch.Tensor, frames: int, size: tuple[int, int], config: AugmentConfig, generator: torch.Generator
) -> torch.Tensor | None:
    """
    Smooth displacements `(batch, frames, 2, coarse_height, coarse_width)`, in grid units, growing over frames: a
    random field of 4x6 points, which bends as thin-plate splines do and needs no system of equations a clip.
    """
    batch = is_static.shape[0]
    velocity = torch.randn(batch, frames, 2, 4, 6, generator=generator)
    amount = torch.exp(uniform(generator, batch, low=math.log(0.1), high=0.0)) * config.elastic * is_static
    if not is_static.any() or config.elastic == 0:
        return None
    velocity = velocity[:, :1] * 0.7 + velocity * 0.3
    velocity[:, 0] = 0
    # No further on a long clip than on a short one.
    speed = 0.035 * min(1.0, STEADY_FRAMES / frames)
    walk = velocity.cumsum(1) * speed * amount.view(batch, 1, 1, 1, 1)
    walk[:, :, 0] *= size[0] / size[1]
    smooth = F.interpolate(walk.flatten(0, 1), size=_coarse_size(size), mode="bicubic", align_corners=True)
    return smooth.unflatten(0, (batch, frames))


def warp_clips(frames: torch.Tensor, masks: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Samples clips at a grid: images bilinearly and mirrored outside, masks at the nearest pixel and void outside.

    Args:
        frames (`torch.Tensor` of shape `(batch, frames, height, width, 3)`): uint8.
        masks (`torch.Tensor` of shape `(batch, frames, height, width)`): uint8 ids.
        grid (`torch.Tensor` of shape `(batch, frames, out_height, out_width, 2)`): (x, y) in [-1, 1].

    Returns:
        `tuple(torch.Tensor)`: images `(batch, frames, 3, out_height, out_width)` float32 in [0, 255], and ids
        `(batch, frames, out_height, out_width)` uint8.
    """
    batch, count = masks.shape[:2]
    flat = grid.flatten(0, 1)
    source = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
    images = F.grid_sample(source, flat, mode="bilinear", padding_mode="reflection", align_corners=True)
    # Ids are shifted by one so that the zeros of the padding mean "outside".
    shifted = F.grid_sample(
        masks.flatten(0, 1).unsqueeze(1).float() + 1, flat, mode="nearest", padding_mode="zeros", align_corners=True
    )
    ids = torch.where(shifted == 0, float(VOID), shifted - 1).to(torch.uint8)
    return images.unflatten(0, (batch, count)), ids[:, 0].unflatten(0, (batch, count))


# --------------------------------------------------------------------------------------------------------------------
# Colour
# --------------------------------------------------------------------------------------------------------------------


def jitter_colors(images: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """
    Changes brightness, contrast, saturation and hue, a clip at a time with small changes between its frames, and
    normalizes with ImageNet's mean and standard deviation.

    Args:
        images (`torch.Tensor` of shape `(batch, frames, 3, height, width)`): In [0, 255].
        config ([`AugmentConfig`]): `color` and `grayscale` are used.
        generator (`torch.Generator`): A CPU generator.
    """
    batch, count = images.shape[:2]
    draw = uniform(generator, batch, 1, 5) + 0.08 * uniform(generator, batch, count, 5)
    draw = draw * config.color
    gray = torch.rand(batch, generator=generator) < config.grayscale
    brightness, contrast = 0.12 * draw[..., 0], torch.exp(0.3 * draw[..., 1])
    saturation = torch.exp(0.4 * draw[..., 2])
    saturation[gray] = 0.0
    turn = (_hue_rotation(0.25 * draw[..., 3]) @ _saturation(saturation)).to(images.device)
    contrast, brightness = (factor.to(images.device)[..., None, None] for factor in (contrast, brightness))
    # Contrast turns about the clip's mean colour, hue and saturation about gray.
    mean = images[..., ::4, ::4].mean(dim=(1, 3, 4)).view(batch, 1, 3, 1) / 255
    matrix, bias = contrast * turn, (1 - contrast) * (turn @ mean) + brightness
    center, spread = (torch.tensor(v, device=images.device).view(3, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    matrix, bias = matrix / (255 * spread), (bias - center) / spread
    out = torch.baddbmm(bias.flatten(0, 1), matrix.flatten(0, 1), images.flatten(0, 1).flatten(2))
    for channel in range(3):
        black = -IMAGENET_MEAN[channel] / IMAGENET_STD[channel]
        white = black + 1 / IMAGENET_STD[channel]
        out[:, channel].clamp_(black, white)
    return out.view_as(images)


def _saturation(factor: torch.Tensor) -> torch.Tensor:
    """Colour matrices `(..., 3, 3)` that scale the distance to gray."""
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    factor = factor[..., None, None]
    return factor * torch.eye(3) + (1 - factor) * luma


def _hue_rotation(angle: torch.Tensor) -> torch.Tensor:
    """Colour matrices `(..., 3, 3)` that turn colours about the gray axis by `angle` radians."""
    cos, sin = angle.cos()[..., None, None], angle.sin()[..., None, None]
    third = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return cos * torch.eye(3) + (1 - cos) * third + sin * cross


def _blur(images: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> None:
    """Blurs some clips in place, with a line (motion) or a disc-like kernel."""
    batch, planes = images.shape[0], images.shape[1] * images.shape[2]
    chosen = torch.rand(batch, generator=generator) < config.blur
    angle = uniform(generator, batch, low=0.0, high=math.pi)
    length = uniform(generator, batch, low=0.7, high=2.5)
    round_ = torch.rand(batch, generator=generator) < 0.5
    y, x = torch.meshgrid(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0), indexing="ij")
    for index in torch.nonzero(chosen).flatten().tolist():
        along = x * angle[index].cos() + y * angle[index].sin()
        across = y * angle[index].cos() - x * angle[index].sin()
        narrow = 0.5 * length[index] if round_[index] else torch.tensor(0.35)
        wide = 0.5 * length[index] if round_[index] else length[index]
        kernel = torch.exp(-0.5 * ((along / wide) ** 2 + (across / narrow) ** 2))
        kernel = (kernel / kernel.sum()).to(images.device).expand(planes, 1, 7, 7)
        padded = F.pad(images[index].flatten(0, 1), (3, 3, 3, 3), mode="reflect").unsqueeze(0)
        images[index] = F.conv2d(padded, kernel, groups=planes).view_as(images[index])


# --------------------------------------------------------------------------------------------------------------------
# Pasted objects
# --------------------------------------------------------------------------------------------------------------------


def _first_areas(ids: torch.Tensor) -> torch.Tensor:
    """Pixels `(batch, 254)` that ids 1..254 cover in the first frame."""
    offset = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int32).view(-1, 1, 1) * 256
    counts = torch.bincount((ids[:, 0].int() + offset).flatten(), minlength=256 * ids.shape[0])
    return counts.view(-1, 256)[:, 1:VOID]


@dataclass
class _Layer:
    """A moving cut-out: colours `(frames, 3, h, w)` and opacity `(frames, 1, h, w)` of a window of the picture."""

    colors: torch.Tensor
    alpha: torch.Tensor
    window: tuple[slice, slice]


def _draw_layer(
    images: torch.Tensor,
    ids: torch.Tensor,
    number: int,
    scale: tuple[float, float],
    generator: torch.Generator,
    leaves: bool = False,
) -> _Layer:
    """
    Cuts object `number` out of a clip and moves it along a path of its own.

    Args:
        images (`torch.Tensor` of shape `(frames, 3, height, width)`): The donor clip.
        ids (`torch.Tensor` of shape `(frames, height, width)`): Its ids.
        number (`int`): Which object; it must show in the first frame.
        scale (`tuple[float, float]`): Range of its enlargement.
        generator (`torch.Generator`): A CPU generator.
        leaves (`bool`): Whether its path leads out of the picture.
    """
    count, _, height, width = images.shape
    draw = uniform(generator, 6)
    mirrored, reverse = torch.rand(2, generator=generator).lt(0.5).tolist()
    walk = random_walk(generator, 1, count, 5)[0] * uniform(generator, 1, low=0.1, high=1.0)
    if reverse and (ids[-1] == number).any():
        images, ids = images.flip(0), ids.flip(0)
    alpha = (ids == number).float().unsqueeze(1)
    columns, rows = (alpha[0, 0].sum(axis).cpu() for axis in (0, 1))
    center = torch.stack([(part * torch.arange(len(part))).sum() / part.sum() for part in (columns, rows)])
    center -= torch.tensor([(width - 1) / 2, (height - 1) / 2])
    # Out of sight beyond the border of its own frame, so a cut-off object is not enlarged further.
    zoom = math.log(scale[0]) + (draw[0] + 1) / 2 * (math.log(scale[1]) - math.log(scale[0]))
    matrix = _matrices(
        draw[1] * 0.15 + walk[:, 0] * 0.06,
        -(zoom + walk[:, 1] * 0.04),
        draw[2] * 0.1 + walk[:, 2] * 0.02,
        draw[3] * 0.1,
    )
    if mirrored:
        matrix[:, :, 0] *= -1
    target = torch.stack([draw[4] * 0.42 * width, draw[5] * 0.38 * height]) + walk[:, 3:5] * 0.06 * height
    if leaves:
        reach = math.exp(zoom) * math.hypot(int((rows > 0).sum()), int((columns > 0).sum()))
        target[:, 0] += _way_out(float(draw[4]), reach + width / 2, count, generator)
    shift = center - (matrix @ target.unsqueeze(-1)).squeeze(-1)
    window = _reached_window(alpha.amax((0, 1)) > 0, matrix, shift)
    rows, columns = ((part.stop - part.start) for part in window)
    middle = torch.tensor([(part.start + part.stop - 1) / 2 for part in reversed(window)])
    middle -= torch.tensor([(width - 1) / 2, (height - 1) / 2])
    shift = shift + matrix @ middle
    grid = motion_grid(matrix.to(images.device), shift.to(images.device), (rows, columns), (height, width))
    source = torch.cat([images, alpha], dim=1)
    moved = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    # A soft edge one pixel wide, drawn inwards so that the donor's background does not show.
    return _Layer(moved[:, :3], ((moved[:, 3:] - 0.4) / 0.5).clamp_(0, 1), window)


def _way_out(place: float, distance: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Shifts to the nearer side, in pixels `(count,)`, that reach `distance` in the second half of a clip."""
    speed = distance / (max(count - 1, 1) * float(uniform(generator, 1, low=0.5, high=0.9)))
    return math.copysign(speed, place) * torch.arange(count)


def _reached_window(shape: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor) -> tuple[slice, slice]:
    """Rows and columns that a cut-out `(height, width)` bool may reach on its way, at least one of each."""
    size = torch.tensor([shape.shape[1], shape.shape[0]])
    spans = [torch.nonzero(shape.any(axis)).flatten()[[0, -1]].cpu() for axis in (0, 1)]
    corners = torch.cartesian_prod(*spans) - (size - 1) / 2
    reached = (torch.linalg.inv(matrix) @ (corners - shift.unsqueeze(1)).mT).mT.flatten(0, 1) + (size - 1) / 2
    first = torch.minimum((reached.amin(0).floor() - 1).clamp_min(0), size - 1).int().tolist()
    last = torch.maximum(torch.minimum(reached.amax(0).ceil() + 2, size), torch.tensor(first) + 1).int().tolist()
    columns, rows = (slice(low, high) for low, high in zip(first, last, strict=True))
    return rows, columns


def _composite(
    images: torch.Tensor, ids: torch.Tensor, layer: _Layer, number: int, in_front: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a layer onto a copy of one clip; `number` is the id it gets, 0 = unlabelled."""
    images, ids = images.clone(), ids.clone()
    shown, shown_ids = images[(..., *layer.window)], ids[(..., *layer.window)]
    alpha = layer.alpha
    in_front = in_front and _first_hidden(ids[0], shown_ids[0], alpha[0, 0] > 0.5) <= 0.4
    if not in_front:
        objects = (shown_ids > 0) & (shown_ids != VOID)
        alpha = alpha * ~objects.unsqueeze(1)
    shown.copy_(torch.lerp(shown, layer.colors, alpha))
    shown_ids.masked_fill_(alpha[:, 0] > 0.5, number)
    return images, ids


def _first_hidden(ids: torch.Tensor, shown: torch.Tensor, cover: torch.Tensor) -> float:
    """Largest share of any object of the first frame, `ids`, that `cover` hides in the window `shown` of it."""
    areas = torch.bincount(ids.flatten().int(), minlength=256).float()
    hidden = torch.bincount(shown[cover].flatten().int(), minlength=256).float()
    share = (hidden / areas.clamp_min(1))[1:VOID]
    return float(share.max())


def _blob(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """A smooth random shape near the middle, bool `(height, width)`."""
    coarse = torch.randn(1, 1, 5, 7, generator=generator)
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0, 0].clamp_min(-3.5)
    grid = identity_grid((height, width), "cpu") * torch.tensor([width / height, 1.0])
    radius = uniform(generator, 1, low=0.12, high=0.4)
    return (field * 0.25 + 1 - grid.square().sum(-1) / radius**2) > 0


def _bars(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """One to three parallel bars from border to border, mostly upright, bool `(height, width)`."""
    count = int(torch.randint(1, 4, (), generator=generator))
    tilt = 0.5 * uniform(generator, 1) ** 3 * math.pi
    grid = identity_grid((height, width), "cpu") * torch.tensor([width / height, 1.0])
    across = (grid * torch.cat([tilt.cos(), tilt.sin()])).sum(-1, keepdim=True)
    middles = uniform(generator, 1) * 0.5 + (torch.arange(count) - (count - 1) / 2) * uniform(
        generator, 1, low=0.3, high=1.0
    )
    # One of them is at most 0.5 from the middle, which all pictures reach but the narrowest.
    middles *= min(1.0, 2 * width / height)
    # Never so thin that no pixel's centre is inside.
    widths = uniform(generator, count, low=0.012, high=0.07).clamp_min(1.5 / height)
    return ((across - middles).abs() < widths).any(-1)


def _occluder_layer(images: torch.Tensor, generator: torch.Generator) -> _Layer:
    """A blob or bars, such as poles and railings, that cross the picture: a donor's texture, faded to its mean."""
    count, _, height, width = images.shape
    upright, fade = torch.rand(2, generator=generator).tolist()
    shape = (_bars if upright < _BARS else _blob)(height, width, generator).to(images.device)
    mean = images[..., shape].mean(-1)[..., None, None]
    ids = shape.to(torch.uint8).expand(count, -1, -1)
    return _draw_layer(torch.lerp(images, mean, fade), ids, 1, (0.6, 1.5), generator)


def _present(ids: torch.Tensor, config: AugmentConfig) -> list[list[int]]:
    """The ids of every clip that the first frame shows well."""
    areas = _first_areas(ids).tolist()
    return [[n for n, area in enumerate(row, start=1) if area >= 3 * config.min_area] for row in areas]


def _paste_all(images: torch.Tensor, ids: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> None:
    """Adds labelled objects, look-alikes and occluders in place; the clips of the batch are the donors."""
    batch = images.shape[0]
    draws = torch.rand(batch, 4, generator=generator).tolist()
    donors = torch.randint(1, max(batch, 2), (batch, 2), generator=generator).tolist()
    pastes = torch.rand(batch, config.pastes, 3, generator=generator).tolist()
    paste_donors = torch.randint(1, max(batch, 2), (batch, config.pastes), generator=generator).tolist()
    donated = _Donors(images, ids, _present(ids, config), config, generator)
    changed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for index in range(batch):
        distractor, occluder, copy, front = draws[index]
        beside, before = ((index + step) % batch for step in donors[index])
        clip, labels = original = images[index], ids[index]
        if distractor < config.distractor:
            clip, labels = donated.add_look_alike(clip, labels, index, beside, copy, front)
        for number, (draw, step) in enumerate(zip(pastes[index], paste_donors[index], strict=True), start=1):
            clip, labels = donated.add_object(clip, labels, index, (index + step) % batch, number, *draw)
        if occluder < config.occluder:
            layer = _occluder_layer(images[before], generator)
            clip, labels = _composite(clip, labels, layer, 0, in_front=True)
        # Several layers together may hide what each of them alone would not.
        if clip is not original[0] and int(_first_areas(labels[None]).max()) >= config.min_area:
            changed[index] = (clip, labels)
    # Only now: until here every clip may still be a donor.
    for index, (clip, labels) in changed.items():
        images[index], ids[index] = clip, labels


@dataclass
class _Donors:
    """The clips of a batch, from which objects are pasted; `present` are the ids that each shows well at first."""

    images: torch.Tensor
    ids: torch.Tensor
    present: list[list[int]]
    config: AugmentConfig
    generator: torch.Generator

    def add_look_alike(
        self, clip: torch.Tensor, labels: torch.Tensor, index: int, donor: int, copy: float, front: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An unlabelled copy of one of clip `index`'s own objects, or of the donor's."""
        source = index if copy < 0.6 or not self.present[donor] else donor
        if not self.present[source]:
            return clip, labels
        layer = self._draw(source, (0.7, 1.2))
        return _composite(clip, labels, layer, 0, in_front=front < 0.4)

    def add_object(
        self,
        clip: torch.Tensor,
        labels: torch.Tensor,
        index: int,
        donor: int,
        number: int,
        paste: float,
        twin: float,
        front: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Paste number `number` of clip `index`: one more labelled object, of the donor's or a copy of its own."""
        config = self.config
        several = config.pastes > 1
        source = index if several and twin < _TWINS else donor
        if paste >= config.paste or not self.present[source] or (source == index and not several):
            return clip, labels
        layer = self._draw(source, (0.5, 1.2), config.leave)
        highest = int(torch.where(self.ids[index] == VOID, 0, self.ids[index]).max())
        return _composite(clip, labels, layer, highest + number, in_front=front > 0.3)

    def _draw(self, source: int, scale: tuple[float, float], leave: float = 0.0) -> _Layer:
        """One of a clip's objects on a path of its own, which may lead out of the picture."""
        number = pick(self.present[source], self.generator)
        leaves = leave > 0 and chance(self.generator, leave)
        return _draw_layer(self.images[source], self.ids[source], number, scale, self.generator, leaves)


def recompose(
    clips: ClipBatch,
    backdrops: ClipBatch,
    share: float,
    leave: float,
    generator: torch.Generator,
    min_area: int = AugmentConfig.min_area,
) -> ClipBatch:
    """
    Lets the objects of some clips go their own ways in front of other backgrounds (Khoreva et al., Lucid data dreaming
    for video object segmentation, arXiv 1703.09554).

    Args:
        clips ([`ClipBatch`]): Where the objects come from; not changed.
        backdrops ([`ClipBatch`]): As many clips of the same size, which show none of the objects. Only their void
            counts of their masks.
        share (`float`): Probability that a clip is recomposed; the others stay as they are.
        leave (`float`): Probability that an object's path leads out of the picture.
        generator (`torch.Generator`): A CPU generator.
        min_area (`int`): Pixels an object must show in the first frame to count as given.

    Returns:
        [`ClipBatch`]
    """
    images, ids = clips.pixel_values.clone(), clips.id_masks.clone()
    chosen = torch.rand(len(ids), generator=generator) < share
    for index in torch.nonzero(chosen).flatten().tolist():
        areas = _first_areas(clips.id_masks[index : index + 1])[0].tolist()
        present = [number for number, area in enumerate(areas, start=1) if area >= 3 * min_area]
        void = backdrops.id_masks[index] == VOID
        clip, labels = backdrops.pixel_values[index], torch.where(void, VOID, 0)
        for position in torch.randperm(len(present), generator=generator).tolist():
            leaves = chance(generator, leave)
            source = clips.pixel_values[index], clips.id_masks[index]
            layer = _draw_layer(*source, present[position], _RECOMPOSED_SCALE, generator, leaves)
            clip, labels = _composite(clip, labels, layer, present[position], in_front=True)
        if int(_first_areas(labels[None]).max()) >= min_area:
            images[index], ids[index] = clip, labels
    return ClipBatch(images, *compact_ids(ids.to(torch.uint8), min_area))


def compact_ids(ids: torch.Tensor, min_area: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Renumbers the objects that the first frame shows to 1..n; the others become background, as nobody asked for them.

    Args:
        ids (`torch.Tensor` of shape `(batch, frames, height, width)`): uint8.
        min_area (`int`): Pixels an object must show in the first frame.

    Returns:
        `tuple(torch.Tensor)`: new ids (int64), and validity `(batch, num_objects)` with num_objects >= 1.
    """
    keep = _first_areas(ids) >= min_area
    numbers = keep.cumsum(1) * keep
    table = torch.zeros(ids.shape[0], 256, dtype=torch.long, device=ids.device)
    table[:, 1 : 1 + keep.shape[1]] = numbers
    table[:, VOID] = VOID
    renumbered = table.gather(1, ids.flatten(1).long()).view_as(ids)
    counts = keep.sum(1)
    slots = torch.arange(max(1, int(counts.max())), device=ids.device)
    return renumbered, slots < counts.unsqueeze(1)
