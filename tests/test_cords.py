"""Thin cords in training clips: tied ones move with their object and have its id, loose ones are nobody's."""

from dataclasses import replace

import pytest
import torch
from test_transforms import NOTHING, generator, make_raw

from hf_deformvos.data import AugmentConfig, augment_clips, cords
from hf_deformvos.data.cords import BundlePath, add_cords
from hf_deformvos.data.store import VOID
from hf_deformvos.training.config import TrainingConfig


pytestmark = pytest.mark.usefixtures("one_thread")


def make_clip(frames: int = 3, height: int = 97, width: int = 161) -> tuple[torch.Tensor, torch.Tensor]:
    """One clip of a square, id 1, that moves 7 pixels to the right and 3 down a frame, over noise."""
    images = torch.rand(1, frames, 3, height, width, generator=generator(0))
    ids = torch.zeros(1, frames, height, width, dtype=torch.uint8)
    for t in range(frames):
        ids[0, t, 30 + 3 * t : 60 + 3 * t, 40 + 7 * t : 80 + 7 * t] = 1
    return images, ids


def draw(share_tied: float, seed: int, monkeypatch, ids=None) -> tuple[torch.Tensor, ...]:
    """The clip before and after, and its ids before and after."""
    monkeypatch.setattr(cords, "_TIED", share_tied)
    images, plain_ids = make_clip()
    plain_ids = plain_ids if ids is None else ids
    drawn, drawn_ids = images.clone(), plain_ids.clone()
    add_cords(drawn, drawn_ids, [[1]], 1.0, generator(seed))
    return images[0], drawn[0], plain_ids[0], drawn_ids[0]


@pytest.mark.parametrize("seed", range(8))
def test_tied_cords_are_part_of_their_object(seed, monkeypatch):
    images, drawn, ids, drawn_ids = draw(1.0, seed, monkeypatch)
    assert (drawn_ids[ids == 1] == 1).all(), "what belonged to the object still does"
    grown = (drawn_ids == 1) & (ids == 0)
    changed = (drawn != images).any(1)
    assert changed[grown].all(), "no label without a cord in the picture"
    assert grown.flatten(1).any(1).all(), "and one in every frame, the first among them"
    assert not set(drawn_ids.unique().tolist()) - {0, 1}


def test_tied_cords_reach_away_from_the_object_and_are_thin(monkeypatch):
    reaches = []
    for seed in range(20):
        _, _, ids, drawn_ids = draw(1.0, seed, monkeypatch)
        grown = (drawn_ids[0] == 1) & (ids[0] == 0)
        rows, columns = grown.nonzero(as_tuple=True)
        reaches.append(int(max(rows.max() - rows.min(), columns.max() - columns.min())))
        # Four cords of the greatest width that a picture of this height gets, from border to border.
        assert grown.sum() < 4 * 2.5 * 190
    assert sorted(reaches)[10] > 25


def test_a_tied_cord_goes_where_its_object_goes():
    mask = make_clip()[1][0] == 1
    for seed in range(10):
        path = cords._tied_path(mask, generator(seed))
        moved = path.starts - path.starts[:1]
        expected = torch.tensor([7.0, 3.0]) * torch.arange(3).view(3, 1, 1)
        torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-3, rtol=0)
        columns, rows = path.starts[0].round().long().unbind(-1)
        assert mask[0, rows, columns].all(), "tied to the object"


def test_a_hidden_object_hides_its_cords(monkeypatch):
    _, ids = make_clip()
    ids[0, 1] = 0
    images, drawn, _, drawn_ids = draw(1.0, 3, monkeypatch, ids=ids)
    assert (drawn[1] == images[1]).all() and not drawn_ids[1].any()
    assert (drawn[2] != images[2]).any()


def test_void_stays_void(monkeypatch):
    _, ids = make_clip()
    ids[0, :, :, 85:] = VOID
    for seed in range(6):
        for tied in (0.0, 1.0):
            _, _, before, after = draw(tied, seed, monkeypatch, ids=ids)
            assert ((before == VOID) == (after == VOID)).all()


def test_loose_cords_are_nobodys_and_mostly_pass_behind(monkeypatch):
    behind, seen = 0, 0
    for seed in range(30):
        images, drawn, ids, drawn_ids = draw(0.0, seed, monkeypatch)
        assert not ((drawn_ids == 1) & (ids == 0)).any()
        changed = (drawn != images).any(1)
        seen += bool(changed.any())
        behind += bool((drawn_ids == ids).all())
        covered = (ids == 1) & (drawn_ids == 0)
        assert changed[covered].all(), "an object loses only what a cord covers"
        assert changed.float().mean() < 0.25
    assert seen >= 20 and behind >= 15


def test_distances_from_a_cord_are_those_of_a_segment():
    clip = torch.zeros(2, 3, 33, 49, dtype=torch.float64)
    starts, stops = torch.tensor([[4.0, 7.0], [10.0, 30.0]]), torch.tensor([[40.0, 25.0], [10.0, 2.0]])
    along, across = cords._coordinates(starts.double(), stops.double(), 0.0, clip)
    for t in range(2):
        ax, ay, bx, by = *starts[t].tolist(), *stops[t].tolist()
        squared = (bx - ax) ** 2 + (by - ay) ** 2
        for y, x in ((0, 0), (7, 4), (20, 31), (32, 48)):
            expected = ((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / squared
            foot = ax + expected * (bx - ax), ay + expected * (by - ay)
            assert float(along[t, y, x]) == pytest.approx(expected, abs=1e-12)
            assert float(across[t, y, x]) == pytest.approx(((x - foot[0]) ** 2 + (y - foot[1]) ** 2) ** 0.5, abs=1e-9)


def test_a_cord_sags_in_its_middle_and_nowhere_at_its_ends():
    clip = torch.zeros(1, 3, 41, 101)
    _, across = cords._coordinates(torch.tensor([[0.0, 20.0]]), torch.tensor([[100.0, 20.0]]), 0.1, clip)
    assert across[0, 20, 0] == 0 and across[0, 20, 100] == 0
    assert float(across[0, 30, 50]) == pytest.approx(0, abs=1e-4), "a tenth of its length"


def test_a_cord_without_length_draws_nothing():
    clip, labels = torch.zeros(1, 3, 17, 17), torch.zeros(1, 17, 17, dtype=torch.uint8)
    labels[:, 8, 8] = 1
    point = torch.tensor([[[8.0, 8.0]]])
    cords._draw_bundle(clip, labels, BundlePath(point, point, torch.ones(1, dtype=torch.bool)), 1, generator(0))
    assert not clip.any() and labels.sum() == 1


def test_augmentation_draws_them_when_asked_and_the_seed_decides():
    raw = make_raw(False)
    plain = augment_clips(raw, NOTHING, generator(1))
    first, again = (augment_clips(raw, replace(NOTHING, cords=1.0), generator(1)) for _ in range(2))
    assert torch.equal(first.pixel_values, again.pixel_values) and torch.equal(first.id_masks, again.id_masks)
    assert not torch.equal(first.pixel_values, plain.pixel_values)
    assert first.object_valid.any(1).all()
    with pytest.raises(ValueError, match=r"`cords` must be a probability between 0 and 1, got 1\.5"):
        AugmentConfig(cords=1.5)


def test_the_setting_reaches_augmentation():
    config = TrainingConfig(davis_dirs=["data"], cords=0.4)
    assert config.augmentation(config.stage_at(0.0)).cords == 0.4
    with pytest.raises(ValueError, match="`cords` must be between 0 and 1"):
        TrainingConfig(davis_dirs=["data"], cords=2.0)
