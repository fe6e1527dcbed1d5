"""Batched augmentation: images and masks stay registered, ids stay consistent, one generator decides everything."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import COLOURS, draw_scene

from hf_deformvos.data import AugmentConfig, RawBatch, augment_clips, transforms
from hf_deformvos.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    _draw_layer,
    compact_ids,
    draw_motion,
    identity_grid,
    jitter_colors,
    motion_grid,
    warp_clips,
)


SIZE = (97, 161)
CANVAS = (121, 201)
NOTHING = AugmentConfig(
    flip=0,
    rotation=0,
    scale=0,
    shear=0,
    motion=0,
    video_motion=0,
    elastic=0,
    color=0,
    grayscale=0,
    blur=0,
    paste=0,
    distractor=0,
    occluder=0,
)
MOVING = replace(NOTHING, flip=0.5, rotation=10, scale=0.1, shear=0.06, motion=1, video_motion=0.12, elastic=1)
PASTING = replace(MOVING, paste=1.0, distractor=1.0, occluder=0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_raw(static: bool, batch: int = 4, frames: int = 2, size=SIZE, canvas=CANVAS) -> RawBatch:
    """Clips of a red and, in every other clip, a blue rectangle; in videos the rectangles move."""
    images = np.empty((batch, frames, *canvas, 3), np.uint8)
    masks = np.empty((batch, frames, *canvas), np.uint8)
    for b in range(batch):
        for t in range(frames):
            step = 0 if static else 5 * t
            boxes = {1: (40 + step, 30, 100 + step, 75)}
            if b % 2:
                boxes[2] = (110 - step, 70, 165 - step, 110)
            images[b, t], masks[b, t] = draw_scene(*canvas, boxes, seed=b)
    is_static = torch.full((batch,), static)
    return RawBatch(torch.from_numpy(images), torch.from_numpy(masks), is_static, size)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def colours(batch) -> torch.Tensor:
    """Pixels back in [0, 255]: `(batch, frames, 3, height, width)`."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (batch.pixel_values * std + mean) * 255


def seen_ids(batch) -> torch.Tensor:
    """The id that a pixel's colour says it belongs to; 0 for gray."""
    pixels = colours(batch)
    palette = torch.tensor([(120, 120, 120), *COLOURS.values()], dtype=torch.float32)
    distance = (pixels.unsqueeze(2) - palette.view(1, 1, -1, 3, 1, 1)).square().sum(3)
    return distance.argmin(2)


def away_from_borders(ids: torch.Tensor) -> torch.Tensor:
    """Pixels whose 5x5 neighbourhood has one id, void excluded."""
    flat = ids.flatten(0, 1).unsqueeze(1).float()
    low, high = (-torch.nn.functional.max_pool2d(-flat, 5, 1, 2), torch.nn.functional.max_pool2d(flat, 5, 1, 2))
    return ((low == high) & (flat != 255))[:, 0].view_as(ids)


# ---- registration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_masks_follow_the_image(static, seed):
    batch = augment_clips(make_raw(static), MOVING, generator(seed))
    seen = seen_ids(batch)
    inner = away_from_borders(batch.id_masks)
    assert inner.float().mean() > 0.5
    assert (seen == batch.id_masks)[inner].float().mean() > 0.97
    for number in (1, 2):
        shown = (batch.id_masks == number) & inner
        if shown.sum() > 200:
            assert (seen == number)[shown].float().mean() > 0.97


def test_made_up_motion_moves_stills_and_frames_differ():
    batch = augment_clips(make_raw(True), MOVING, generator(0))
    moved = (batch.id_masks[:, 0] != batch.id_masks[:, -1]).flatten(1).sum(1)
    assert (moved > 50).all()


def test_what_lies_outside_is_void():
    raw = make_raw(True, batch=2)
    grid = identity_grid(SIZE, "cpu").expand(2, 2, -1, -1, -1) * 2
    images, ids = warp_clips(raw.frames, raw.masks, grid)
    outside = (grid.abs() > 1 + 1e-3 + 1 / CANVAS[0]).any(-1)
    inside = (grid.abs() <= 1).all(-1)
    assert (ids[outside] == 255).all()
    assert (ids[inside] != 255).all()
    assert images.isfinite().all(), "images are mirrored there, not black"
    assert images.min() > 20


def test_void_of_the_source_stays_void():
    raw = make_raw(False)
    raw.masks[:, :, 30:75, 40:60] = 255
    batch = augment_clips(raw, MOVING, generator(0))
    assert (batch.id_masks == 255).flatten(1).any(1).all()


def test_grids_of_affine_maps_take_pixels_to_pixels():
    matrix = torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])  # output (x, y) shows source (-y, x)
    grid = motion_grid(matrix, torch.tensor([[3.0, -2.0]]), (9, 11), (21, 31))
    half = torch.tensor([15.0, 10.0])
    assert torch.allclose(grid[0, 4, 5] * half, torch.tensor([3.0, -2.0]), atol=1e-5)
    assert torch.allclose(grid[0, 4, 7] * half, torch.tensor([3.0, 0.0]), atol=1e-5)
    assert torch.allclose(grid[0, 6, 5] * half, torch.tensor([1.0, -2.0]), atol=1e-5)


# ---- form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "canvas"), [((97, 161), (121, 201)), ((33, 49), (41, 61)), ((129, 65), (161, 81))])
def test_sizes_and_types(size, canvas):
    raw = make_raw(True, batch=2, frames=2, size=size)
    raw.frames, raw.masks = raw.frames[:, :, : canvas[0], : canvas[1]], raw.masks[:, :, : canvas[0], : canvas[1]]
    batch = augment_clips(raw, AugmentConfig(), generator(0))
    assert batch.pixel_values.shape == (2, 2, 3, *size)
    assert batch.pixel_values.dtype == torch.float32
    assert batch.id_masks.shape == (2, 2, *size)
    assert batch.id_masks.dtype == torch.int64
    assert batch.object_valid.shape == (2, batch.num_objects)
    assert batch.object_valid.dtype == torch.bool


@pytest.mark.parametrize("config", [MOVING, PASTING], ids=["moving", "pasting"])
@pytest.mark.parametrize("static", [True, False])
def test_the_first_frame_shows_every_valid_object(config, static):
    for seed in range(2):
        batch = augment_clips(make_raw(static), config, generator(seed))
        assert batch.object_valid.any(1).all(), "every sample keeps an object"
        for ids, valid in zip(batch.id_masks, batch.object_valid, strict=True):
            count = int(valid.sum())
            assert valid[:count].all(), "ids are 1..n without gaps"
            assert set(ids.unique().tolist()) <= {*range(count + 1), 255}
            for number in range(1, count + 1):
                assert (ids[0] == number).sum() >= config.min_area


def test_objects_too_small_in_the_first_frame_become_background():
    ids = torch.zeros(2, 2, 20, 20, dtype=torch.uint8)
    ids[0, :, :10, :10], ids[0, :, 15, 15], ids[0, 1, 12:, 12:] = 4, 2, 9
    ids[1, :, :8, :8], ids[1, :, 12:, 12:], ids[1, 0, 0, 0] = 1, 3, 255
    new, valid = compact_ids(ids, min_area=60)
    assert valid.tolist() == [[True, False], [True, True]]
    assert new.dtype == torch.int64
    assert torch.equal(new[0] == 1, ids[0] == 4)
    assert set(new[0].unique().tolist()) == {0, 1}
    assert torch.equal(new[1] == 2, ids[1] == 3)
    assert int((new == 255).sum()) == 1
    empty, none = compact_ids(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), 1)
    assert none.tolist() == [[False]]
    assert not empty.any()


def test_objects_beyond_ten_are_numbered_too():
    ids = torch.arange(1, 13, dtype=torch.uint8).repeat_interleave(4).view(1, 1, 1, 48) + 200
    new, valid = compact_ids(ids, min_area=4)
    assert valid.tolist() == [[True] * 12]
    assert torch.equal(new, ids.long() - 200)


def test_samples_that_a_warp_would_lose_keep_their_object():
    raw = make_raw(True, batch=2)
    raw.masks[:] = 0
    raw.masks[:, :, :14, :14] = 1
    for seed in range(3):
        assert augment_clips(raw, replace(MOVING, rotation=40), generator(seed)).object_valid.any(1).all()


# ---- randomness -----------------------------------------------------------------------------------------------------


def test_the_generator_is_the_only_source_of_randomness():
    config = AugmentConfig(paste=1.0, distractor=1.0, occluder=1.0, blur=0.5)
    torch.manual_seed(1)
    first = augment_clips(make_raw(True), config, generator(5))
    torch.manual_seed(2)
    again = augment_clips(make_raw(True), config, generator(5))
    other = augment_clips(make_raw(True), config, generator(6))
    for name in ("pixel_values", "id_masks", "object_valid"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.pixel_values, other.pixel_values)


def test_nothing_asked_for_is_only_a_crop():
    raw = make_raw(True)
    batch = augment_clips(raw, NOTHING, generator(0))
    assert torch.equal(batch.id_masks, batch.id_masks[:, :1].expand_as(batch.id_masks)), "no motion"
    assert torch.allclose(batch.pixel_values, batch.pixel_values[:, :1], atol=1e-6)
    seen = seen_ids(batch)
    assert (seen == batch.id_masks)[away_from_borders(batch.id_masks)].float().mean() > 0.999
    pixels = colours(batch)
    for b, t in ((0, 0), (1, 1)):
        inner = (away_from_borders(batch.id_masks) & (batch.id_masks == 1))[b, t]
        assert torch.allclose(pixels[b, t][:, inner], torch.tensor(COLOURS[1]).float().view(3, 1), atol=0.5)
        rows, columns = inner.any(1).sum(), inner.any(0).sum()
        # Between the whole canvas and 1:1, less the border that is left out.
        assert 45 * SIZE[0] / CANVAS[0] - 6 < rows <= 45
        assert 60 * SIZE[1] / CANVAS[1] - 6 < columns <= 60


def test_without_a_margin_nothing_at_all_changes():
    raw = make_raw(False, size=SIZE, canvas=SIZE)
    batch = augment_clips(raw, NOTHING, generator(0))
    assert torch.allclose(colours(batch), raw.frames.permute(0, 1, 4, 2, 3).float(), atol=0.01)
    assert torch.equal(batch.id_masks, raw.masks.long())


def test_colours_stay_in_range_and_masks_do_not_care():
    config = replace(NOTHING, color=2.0, grayscale=0.3, blur=1.0)
    plain = augment_clips(make_raw(True), NOTHING, generator(3))
    strong = augment_clips(make_raw(True), config, generator(3))
    assert torch.equal(plain.id_masks, strong.id_masks)
    assert not torch.allclose(plain.pixel_values, strong.pixel_values)
    assert colours(strong).min() > -0.1
    assert colours(strong).max() < 255.1


def test_gray_clips_have_equal_channels():
    images = torch.rand(2, 2, 3, 8, 8) * 255
    gray = jitter_colors(images, replace(NOTHING, grayscale=1.0), generator(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert (gray * std + mean).std(2).max() < 1e-5


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match="`paste` must be a probability between 0 and 1, got 2"):
        AugmentConfig(paste=2)


# ---- pasted objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
def test_pasted_objects_are_labelled_in_every_frame(static):
    config = replace(MOVING, paste=1.0)
    more = 0
    for seed in range(3):
        raw = make_raw(static)
        batch = augment_clips(raw, config, generator(seed))
        seen = seen_ids(batch)
        inner = away_from_borders(batch.id_masks)
        # Every labelled pixel has an object's colour, in every frame, and every object's colour is labelled ...
        labelled = (batch.id_masks > 0) & (batch.id_masks != 255)
        assert (seen > 0)[labelled & inner].float().mean() > 0.97
        assert labelled[(seen > 0) & inner].float().mean() > 0.97
        # ... and a label has one colour throughout the clip.
        for ids, pixels, interior, valid in zip(batch.id_masks, seen, inner, batch.object_valid, strict=True):
            for number in range(1, int(valid.sum()) + 1):
                where = (ids == number) & interior
                if where.sum() > 100:
                    counts = torch.bincount(pixels[where], minlength=4)
                    assert counts.max() > 0.95 * counts.sum()
        more += int((batch.object_valid.sum(1) > torch.tensor([1, 2, 1, 2])).sum())
    assert more > 3, "most clips have one object more"


def test_several_pastes_bring_several_objects_and_twins():
    config = replace(NOTHING, paste=1.0, pastes=3)
    counts, twins = [], 0
    for seed in range(4):
        raw = make_raw(True)
        raw.masks[raw.masks == 2] = 0
        batch = augment_clips(raw, config, generator(seed))
        counts += batch.object_valid.sum(1).tolist()
        inner, seen = away_from_borders(batch.id_masks), seen_ids(batch)
        assert (seen > 0)[(batch.id_masks > 0) & (batch.id_masks != 255) & inner].float().mean() > 0.97
        # All objects are red: each paste is a look-alike with a number of its own.
        red = (seen == 1) & inner
        twins += sum(len(ids[where].unique()) > 1 for ids, where in zip(batch.id_masks, red, strict=True))
    assert max(counts) == 4 and sum(counts) / len(counts) > 2.5
    assert twins > 12


def test_pasted_objects_leave():
    """Shown at first, gone at the end; the clip's own objects stay, where nothing else moves them."""
    config = replace(NOTHING, paste=1.0, leave=1.0)
    pasted = 0
    for seed in range(4):
        raw = make_raw(True, frames=6)
        raw.masks[raw.masks == 2] = 0
        batch = augment_clips(raw, config, generator(seed))
        for ids, valid in zip(batch.id_masks, batch.object_valid, strict=True):
            shown = [number for number in range(1, 1 + int(valid.sum())) if (ids[0] == number).any()]
            gone = [number for number in shown if not (ids[-1] == number).any()]
            assert gone == shown[1:]
            pasted += len(gone)
    assert pasted > 10


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_is_drawn_in_the_window_that_it_reaches(seed):
    """Cut to its window, a cut-out looks as it does when the whole picture is sampled."""
    raw = make_raw(False, batch=1, frames=3, canvas=SIZE)
    images, ids = raw.frames[0].permute(0, 3, 1, 2).float(), raw.masks[0]
    layer = _draw_layer(images, ids, 1, (0.5, 1.2), generator(seed), leaves=seed % 2 == 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "_reached_window", lambda *_: (slice(0, SIZE[0]), slice(0, SIZE[1])))
        whole = _draw_layer(images, ids, 1, (0.5, 1.2), generator(seed), leaves=seed % 2 == 1)
    inside = torch.zeros(3, 1, *SIZE)
    inside[(..., *layer.window)] = layer.alpha
    torch.testing.assert_close(inside, whole.alpha, atol=1e-3, rtol=0)
    shown = layer.alpha.expand(-1, 3, -1, -1) > 0.5
    torch.testing.assert_close(layer.colors[shown], whole.colors[(..., *layer.window)][shown], atol=0.5, rtol=0)
    assert layer.alpha[0, 0].numel() < SIZE[0] * SIZE[1]


def test_made_up_motion_of_long_clips_stays_in_reach():
    """A walk of sixteen frames ends hardly further away than one of five gets."""
    reach = {}
    for frames in (5, 16):
        _, shift = draw_motion(torch.ones(200, dtype=torch.bool), frames, SIZE, SIZE, MOVING, generator(0))
        reach[frames] = (shift - shift[:, :1]).abs().amax(1).median()
    assert reach[16] < 2 * reach[5]


def test_look_alikes_are_not_labelled():
    config = replace(NOTHING, distractor=1.0)
    unlabelled = 0
    for seed in range(2):
        batch = augment_clips(make_raw(True), config, generator(seed))
        inner = away_from_borders(batch.id_masks)
        coloured = (seen_ids(batch) > 0) & inner
        unlabelled += int((coloured & (batch.id_masks == 0)).sum())
        assert (batch.object_valid.sum(1) <= torch.tensor([1, 2, 1, 2])).all()
    assert unlabelled > 500


def test_occluders_hide_what_they_cover_and_nothing_else():
    hidden = []
    for seed in range(6):
        plain = augment_clips(make_raw(True), NOTHING, generator(seed))
        batch = augment_clips(make_raw(True), replace(NOTHING, occluder=1.0), generator(seed))
        changed = (batch.pixel_values - plain.pixel_values).abs().amax(2) > 0.5
        was_shown = plain.id_masks > 0
        assert (batch.id_masks[changed] == 0).float().mean() > 0.95, "but for the soft edge"
        kept = was_shown & ~changed & (batch.id_masks > 0)
        assert (batch.id_masks[kept] == plain.id_masks[kept]).float().mean() > 0.99
        hidden.append(int((changed & was_shown).sum()))
    assert min(hidden) > 0


def test_bars_reach_from_border_to_border_and_stay_thin():
    for seed in range(20):
        bars = transforms._bars(65, 113, generator(seed))
        rows, columns = bars.any(1).nonzero().flatten(), bars.any(0).nonzero().flatten()
        ends = [rows[0] == 0, rows[-1] == 64, columns[0] == 0, columns[-1] == 112]
        assert sum(bool(end) for end in ends) >= 2
        assert 0 < bars.float().mean() < 0.25


def test_no_blob_and_no_bar_is_empty(monkeypatch):
    for seed in range(50):
        assert transforms._bars(17, 33, generator(seed)).any()
    for width in (17, 65, 145):
        for seed in range(1000, 1100):
            assert transforms._bars(321, width, generator(seed)).any(), "all beside a narrow picture"
    monkeypatch.setattr(transforms.torch, "randn", lambda *shape, generator: torch.full(shape, -6.0))
    assert transforms._blob(97, 161, generator(0)).any(), "one draw in many thousands, which once ended a run"


def test_layers_leave_every_clip_an_object():
    config = replace(NOTHING, paste=1.0, distractor=1.0, occluder=1.0, min_area=60)
    raw = make_raw(True)
    raw.masks[:] = 0
    raw.masks[:, :, 55:66, 95:106] = 1  # small: three layers together could hide it
    for seed in range(5):
        assert augment_clips(raw, config, generator(seed)).object_valid.any(1).all()


def test_a_single_clip_has_no_donor_but_itself():
    batch = augment_clips(make_raw(True, batch=1), PASTING, generator(0))
    assert batch.object_valid.any()
