"""scripts/compose_cutouts.py: training reads the set that it writes, whose masks say where things are."""

import sys

import numpy as np
import pytest
from PIL import Image
from test_repository import load_script

from hf_deformvos.data import HELD_OUT_SEQUENCES, load_static_sets


@pytest.fixture
def compose(monkeypatch):
    """Runs the script."""

    def compose(*arguments):
        monkeypatch.setattr(sys, "argv", ["compose_cutouts.py", *map(str, arguments)])
        load_script("compose_cutouts").main()

    return compose


@pytest.fixture
def pictures(tmp_path):
    """Three red discs, what is no cut-out, a blue background, and a white one of a held-out sequence."""
    cutouts, backgrounds = tmp_path / "cutouts", tmp_path / "backgrounds"
    (backgrounds / HELD_OUT_SEQUENCES[0]).mkdir(parents=True)
    (cutouts / "round").mkdir(parents=True)
    y, x = np.mgrid[:120, :120]
    for radius in (35, 45, 55):
        disc = np.zeros((120, 120, 4), np.uint8)
        disc[(y - 60) ** 2 + (x - 60) ** 2 < radius**2] = (255, 0, 0, 255)
        Image.fromarray(disc).save(cutouts / "round" / f"{radius}.png")
    Image.new("RGB", (200, 200)).save(cutouts / "opaque.png")
    Image.new("RGBA", (200, 200)).save(cutouts / "empty.png")
    (cutouts / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (700, 300), (0, 0, 255)).save(backgrounds / "sea.jpg")
    Image.new("RGB", (700, 300), (255, 255, 255)).save(backgrounds / HELD_OUT_SEQUENCES[0] / "00000.jpg")
    return cutouts, backgrounds


def test_masks_say_where_the_cutouts_are(compose, pictures, tmp_path, capsys):
    cutouts, backgrounds = pictures
    compose(tmp_path / "set", "--cutouts", cutouts, "--backgrounds", backgrounds, "--copies", 4)
    assert "12 images of 3 cut-outs on 1 backgrounds" in capsys.readouterr().out
    (store,) = load_static_sets(tmp_path / "set", cache_dir=tmp_path / "cache", show_progress_bar=False)
    assert len(store) == 12
    assert {item.object_id for index in range(12) for item in store.objects[index]} == {1, 2, 3}
    for path in sorted((tmp_path / "set" / "images").iterdir()):
        image = np.asarray(Image.open(path)).astype(int)
        ids = np.asarray(Image.open(tmp_path / "set" / "masks" / f"{path.stem}.png"))
        assert (ids == 1).any()
        is_red = image[..., 0] > image[..., 2]
        assert (is_red == (ids > 0)).mean() > 0.99


def test_a_seed_means_the_same_set(compose, pictures, tmp_path):
    cutouts, backgrounds = pictures
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        compose(tmp_path / name, "--cutouts", cutouts, "--backgrounds", backgrounds, "--copies", 1, "--seed", seed)
    first, same, other = (
        [path.read_bytes() for path in sorted((tmp_path / name / "masks").iterdir())] for name in "abc"
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("cutouts", "output", "message"),
    [
        ("missing", "set", "missing is no folder of pictures"),
        ("backgrounds", "set", "have 0 cut-outs of 64 pixels or more among them"),
        ("cutouts", "cutouts", "exists; remove it"),
    ],
)
def test_mistakes_get_one_line(compose, pictures, tmp_path, capsys, cutouts, output, message):
    with pytest.raises(SystemExit) as ended:
        compose(tmp_path / output, "--cutouts", tmp_path / cutouts, "--backgrounds", tmp_path / "backgrounds")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
