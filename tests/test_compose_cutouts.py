"""scripts/compose_cutouts.py: training reads the set that it writes, whose masks say where things are."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from test_repository import load_script

from hf_deformvos.data import HELD_OUT_SEQUENCES, load_static_sets
from hf_deformvos.data.static import LAYOUTS


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


def test_broken_backgrounds_and_masks_are_no_backgrounds(compose, pictures, tmp_path, capsys):
    cutouts, backgrounds = pictures
    compose(tmp_path / "plain", "--cutouts", cutouts, "--backgrounds", backgrounds, "--copies", 1)
    whole = (backgrounds / "sea.jpg").read_bytes()
    (backgrounds / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (backgrounds / "broken.png").write_bytes(b"no picture")
    (backgrounds / "set" / "gt").mkdir(parents=True)
    Image.new("L", (700, 300), 255).save(backgrounds / "set" / "gt" / "sea.png")
    compose(tmp_path / "set", "--cutouts", cutouts, "--backgrounds", backgrounds, "--copies", 1)
    captured = capsys.readouterr()
    assert "3 images of 3 cut-outs on 1 backgrounds" in captured.out
    for name in ("cut.jpg", "broken.png"):
        assert f"{backgrounds / name} cannot be read and is left out" in captured.err
    files = [path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.*")]
    assert all((tmp_path / "plain" / file).read_bytes() == (tmp_path / "set" / file).read_bytes() for file in files)


def test_backgrounds_of_16_bits_are_scaled(tmp_path):
    deep = np.linspace(0, 65535, 320 * 576).reshape(320, 576).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    drawn = load_script("compose_cutouts").draw_background(np.random.default_rng(0), tmp_path / "deep.png")
    assert 50 < np.asarray(drawn).mean() < 205


@pytest.mark.parametrize(("images", "masks"), LAYOUTS)
def test_masks_of_published_sets_are_no_photographs(tmp_path, images, masks):
    kept, *others = (
        tmp_path / "set" / name
        for name in (
            f"{images}/part/0.jpg",
            f"{masks}/part/0.png",
            "Annotations/480p/ant/0.png",
            "Annotations_unsupervised/480p/ant/0.png",
        )
    )
    for path in (kept, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    script = load_script("compose_cutouts")
    assert script.list_photographs([tmp_path]) == [kept]
    assert script.list_photographs([tmp_path / "set" / images]) == [kept]
    # What lies above the folder that is named does not matter.
    shutil.move(tmp_path / "set", tmp_path / "gt" / "set")
    moved = tmp_path / "gt" / "set"
    assert script.list_photographs([moved]) == [moved / kept.relative_to(tmp_path / "set")]


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
