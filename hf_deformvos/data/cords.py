"""Thin things in clips: cords that belong to an object, as a kite's lines do, and cords that belong to nothing."""

import math
from dataclasses import dataclass

import torch

from .draws import chance, pick, random_walk, uniform
from .store import VOID


# Share of the bundles that belong to an object; the others are wires, twigs and lines of the background.
_TIED = 0.7
# Most cords of a bundle.
_MOST_CORDS = 4
# Pictures of this height show cords of 1.5 to 6 pixels; on smaller ones they are thinner, down to 1.2 pixels.
_FULL_HEIGHT = 480


@dataclass(frozen=True)
class BundlePath:
    """
    Where a bundle goes through a clip, in pixels (x, y).

    Args:
        starts (`torch.Tensor` of shape `(frames, cords, 2)`): The ends that are tied to an object.
        stops (`torch.Tensor` of shape `(frames, cords, 2)`): The others.
        shown (`torch.Tensor` of shape `(frames,)`): bool; the frames that show them.
    """

    starts: torch.Tensor
    stops: torch.Tensor
    shown: torch.Tensor


def add_cords(
    images: torch.Tensor,
    ids: torch.Tensor,
    present: list[list[int]],
    probability: float,
    generator: torch.Generator,
) -> None:
    """
    Draws bundles of cords into some clips, in place. Those that are tied to an object move with it and have its id, so
    that nothing but the first frame's mask says which cords belong to it.

    Args:
        images (`torch.Tensor` of shape `(batch, frames, 3, height, width)`): Of any range.
        ids (`torch.Tensor` of shape `(batch, frames, height, width)`): uint8; 255 is void, and stays it.
        present (`list[list[int]]`): For every clip the ids that the first frame shows.
        probability (`float`): That of a bundle, a clip.
        generator (`torch.Generator`): A CPU generator.
    """
    for clip, labels, numbers in zip(images, ids, present, strict=True):
        if not chance(generator, probability):
            continue
        if numbers and chance(generator, _TIED):
            number = pick(numbers, generator)
            path = _tied_path(labels == number, generator)
        else:
            number, path = 0, _loose_path(clip, generator)
        _draw_bundle(clip, labels, path, number, generator)


def _tied_path(mask: torch.Tensor, generator: torch.Generator) -> BundlePath:
    """A bundle from points of an object, `(frames, height, width)` bool, to ends that stay or are carried along."""
    center, size = _follow(mask)
    height = mask.shape[1]
    cords = int(torch.randint(1, _MOST_CORDS + 1, (), generator=generator))
    pixels = torch.nonzero(mask[0]).flip(-1).float().cpu()
    chosen = pixels[torch.randint(len(pixels), (cords,), generator=generator)]
    if chance(generator, 0.5):
        # Close together, as in one hand.
        chosen = chosen[:1] + (chosen - chosen[:1]) * 0.15
    starts = center.unsqueeze(1) + (chosen - center[0]) * size.view(-1, 1, 1)
    outward = float(torch.atan2(*(chosen[0] - center[0]).flip(0))) + float(uniform(generator, 1)) * math.pi / 2
    stops = chosen + _rays(cords, outward, height, generator)
    sway = random_walk(generator, 1, len(mask), 2)[0].unsqueeze(1) * 0.03 * height
    if chance(generator, 0.5):
        stops = starts + (stops - chosen) * size.view(-1, 1, 1) + sway
    else:
        stops = stops + sway
    return BundlePath(starts, stops, mask.flatten(1).any(1).cpu())


def _loose_path(clip: torch.Tensor, generator: torch.Generator) -> BundlePath:
    """A bundle from anywhere in the picture that moves little."""
    frames, _, height, width = clip.shape
    cords = int(torch.randint(1, _MOST_CORDS + 1, (), generator=generator))
    middle = uniform(generator, 1, 2, low=0.0, high=1.0) * torch.tensor([width, height])
    starts = middle + uniform(generator, cords, 2) * 0.15 * height
    stops = starts + _rays(cords, float(uniform(generator, 1)) * math.pi, height, generator)
    walk = random_walk(generator, 1, frames, 2)[0].unsqueeze(1) * 0.03 * height
    return BundlePath(starts + walk, stops + walk, torch.ones(frames, dtype=torch.bool))


def _rays(cords: int, angle: float, height: int, generator: torch.Generator) -> torch.Tensor:
    """Where the cords of one bundle lead from their starts, `(cords, 2)`: about one way, with one length."""
    angles = angle + uniform(generator, cords) * 0.3 * torch.rand(1, generator=generator)
    length = height * torch.exp(uniform(generator, 1, low=math.log(0.3), high=math.log(1.6)))
    return torch.stack([angles.cos(), angles.sin()], -1) * length


def _follow(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An object's middle `(frames, 2)` and size `(frames,)` relative to the first frame; kept while it is hidden."""
    areas = mask.flatten(1).sum(1).float().cpu()
    columns, rows = (mask.sum(axis).float().cpu() for axis in (1, 2))
    middle = torch.stack([(part * torch.arange(part.shape[1])).sum(1) for part in (columns, rows)], -1)
    middle = middle / areas.clamp_min(1).unsqueeze(1)
    size = (areas / areas[0]).sqrt().clamp(0.5, 2.0)
    for frame in range(1, len(mask)):
        if areas[frame] == 0:
            middle[frame], size[frame] = middle[frame - 1], size[frame - 1]
    return middle, size


def _draw_bundle(
    clip: torch.Tensor, labels: torch.Tensor, path: BundlePath, number: int, generator: torch.Generator
) -> None:
    """Draws a bundle into one clip; cords that belong to nothing pass behind objects, mostly."""
    height = clip.shape[2]
    scale = height / _FULL_HEIGHT
    width = max(1.2, scale * math.exp(float(uniform(generator, 1, low=math.log(1.5), high=math.log(6.0)))))
    sag = float(uniform(generator, 1) ** 3) * 0.15
    color, other = _colors(clip, labels[0] == number, generator)
    links = float(uniform(generator, 1, low=4.0, high=30.0)) if chance(generator, 0.4) else 0.0
    behind = number == 0 and chance(generator, 0.7)
    for cord in range(path.starts.shape[1]):
        start, stop = path.starts[:, cord], path.stops[:, cord]
        along, across = _coordinates(start, stop, sag, clip)
        shown = path.shown & ((stop - start).norm(dim=1) >= 1)
        inside = (along >= 0) & (along <= 1) & shown.to(clip.device).view(-1, 1, 1)
        if behind:
            inside &= (labels == 0) | (labels == VOID)
        alpha = (width / 2 + 0.5 - across).clamp_(0, 1) * inside
        shade = ((along * links * math.pi).sin() > 0).to(clip.dtype).unsqueeze(1)
        texture = torch.lerp(color, other, shade) if links else color
        clip.copy_(torch.lerp(clip, texture, alpha.unsqueeze(1)))
        labels.masked_fill_((alpha > 0.5) & (labels != VOID), number)


def _colors(clip: torch.Tensor, own: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two colours `(3, 1, 1)`: of the object, of the picture, or any that the picture's range holds."""
    picture = clip[0].flatten(1)
    source = picture[:, own.flatten()] if own.any() and chance(generator, 0.3) else picture
    colors = source[:, torch.randint(source.shape[1], (2,), generator=generator).to(clip.device)]
    if chance(generator, 0.5):
        low, high = picture.amin(1, keepdim=True), picture.amax(1, keepdim=True)
        colors = torch.lerp(low, high, torch.rand(3, 2, generator=generator).to(clip.device))
    return colors[:, 0, None, None], colors[:, 1, None, None]


def _coordinates(
    start: torch.Tensor, stop: torch.Tensor, sag: float, clip: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Every pixel's place along a cord from `start` to `stop`, both `(frames, 2)`, 0 to 1, and its distance from the
    cord's middle line in pixels; two tensors `(frames, height, width)`. A cord sags by a share of its length.
    """
    way = stop - start
    length = way.norm(dim=1).clamp_min(1.0)
    unit = way / length.unsqueeze(1)
    x = torch.arange(clip.shape[3], device=clip.device, dtype=clip.dtype)
    y = torch.arange(clip.shape[2], device=clip.device, dtype=clip.dtype)
    dx, dy, ax, ay, length = (
        part.to(clip).view(-1, 1, 1) for part in (unit[:, 0], unit[:, 1], start[:, 0], start[:, 1], length)
    )
    along = (x - ax) * (dx / length) + ((y - ay) * (dy / length)).transpose(1, 2)
    across = (ax - x) * dy + ((y - ay) * dx).transpose(1, 2)
    if sag:
        across = across - 4 * sag * length * along * (1 - along)
    return along, across.abs_()
