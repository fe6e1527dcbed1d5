"""scripts/render_videos.py: models are read as written, masks say where the things in the pictures are."""

import io
import struct
import sys
import zipfile
from pathlib import Path

import moderngl
import numpy as np
import pytest
from PIL import Image
from test_repository import ROOT, load_script

from hf_deformvos.data import HELD_OUT_SEQUENCES, load_davis


IDENTITY = [0, 0, 0, 0, 0, 0, 1]
FAUNA = """<actor version="1">
  <group><variant frequency="1"><mesh>block.dae</mesh><props><prop actor="{prop}" attachpoint="head"/></props>
    <animations><animation file="move.dae" name="Walk"/></animations></variant></group>
  <group><variant frequency="1" name="a"><textures><texture file="a.png" name="baseTex"/></textures></variant>
    <variant frequency="1" name="b"><textures><texture file="b.png" name="baseTex"/></textures></variant></group>
  <group><variant file="unused.xml"/></group>
  <material>default.xml</material>
</actor>"""
PROP = """<qualitylevels><actor quality="low"/><actor><group><variant><mesh>block.dae</mesh>
  <textures><texture file="a.png" name="baseTex"/></textures></variant></group>
  <material>basic_trans.xml</material></actor></qualitylevels>"""
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (0, 2) for z in (-2, 2)], np.float32)
QUADS = [[0, 1, 3, 2], [4, 5, 7, 6], [0, 1, 5, 4], [2, 3, 7, 6], [0, 2, 6, 4], [1, 3, 7, 5]]
SIDES = [triangle for a, b, c, d in QUADS for triangle in ([a, b, c], [a, c, d])]


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def packed(magic: bytes, version: int, body: bytes) -> bytes:
    return magic + struct.pack("<II", version, len(body)) + body


def pmd(corners: np.ndarray) -> bytes:
    """A block whose upper half follows a bone, with a point on that bone."""
    body = struct.pack("<II", len(corners), 1)
    for x, y, z in corners:
        bone = 0 if y > 0 else 255
        body += (
            struct.pack("<8f", x, y, z, x, y - 1, z, 0.25, 0.25)
            + bytes([bone] + [255] * 3)
            + struct.pack("<4f", y > 0, 0, 0, 0)
        )
    body += struct.pack("<I", len(SIDES)) + np.array(SIDES, "<u2").tobytes()
    body += struct.pack("<I7f", 1, *IDENTITY)
    return packed(b"PSMD", 4, body + struct.pack("<II4s7fB", 1, 4, b"head", 0, 2, 0, 0, 0, 0, 1, 0))


def psa(frames: int) -> bytes:
    """The bone moves one unit along x by frame."""
    states = [[frame, *IDENTITY[1:]] for frame in range(frames)]
    return packed(b"PSSA", 1, struct.pack("<I4sfII", 4, b"move", 1.0, 1, frames) + np.array(states, "<f4").tobytes())


def png(color: tuple[int, ...]) -> bytes:
    written = io.BytesIO()
    Image.new("RGBA", (8, 8), color).save(written, "PNG")
    return written.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A game with one animal, red or blue, on green ground."""
    path = tmp_path_factory.mktemp("game") / "public.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("art/actors/fauna/animal.xml", FAUNA.format(prop="props/hat.xml"))
        file.writestr("art/actors/props/hat.xml", PROP)
        for kind in ("units", "structures", "flora", "props/flora", "geology", "props/special"):
            file.writestr(f"art/actors/{kind}/animal.xml", FAUNA.format(prop="props/missing.xml"))
        file.writestr("art/meshes/block.dae.cached.pmd", pmd(CORNERS))
        file.writestr("art/animation/move.dae.cached.psa", psa(4))
        file.writestr("art/textures/skins/a.png", png((230, 20, 20, 255)))
        file.writestr("art/textures/skins/b.png", png((20, 20, 230, 255)))
        file.writestr("art/textures/terrain/types/grass.png.cached.dds", png((20, 200, 20, 255)))
    return path


@pytest.fixture
def painter():
    """A painter of red and of holes, where there is OpenGL."""
    from rendering.painter import Painter

    pictures = {"red": Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "holes": Image.new("RGBA", (4, 4), (255, 0, 0, 0))}
    try:
        moderngl.create_context(standalone=True, backend="egl", require=330).release()
    except Exception as error:
        pytest.skip(f"there is no OpenGL 3.3 here ({error}): make graphics")
    return Painter((96, 64), pictures.get)


def test_models_are_what_was_written(archive):
    from rendering.models import pose, skin
    from rendering.zero_ad import ZeroAD

    game = ZeroAD(archive)
    assert game.names("fauna") == ["fauna/animal.xml"]
    textures = {game.actor("fauna/animal.xml", np.random.default_rng(seed)).texture for seed in range(12)}
    assert textures == {"art/textures/skins/a.png", "art/textures/skins/b.png"}
    actor = game.actor("fauna/animal.xml", np.random.default_rng(0))
    assert [part.material for part in actor.parts()] == ["plain", "cut"]
    np.testing.assert_array_equal(actor.mesh.positions, CORNERS)
    np.testing.assert_array_equal(actor.mesh.uvs[0], [0.25, 0.75])
    moved, _ = skin(actor.mesh, pose(actor.mesh, actor.animations["walk"], 1.25))
    np.testing.assert_allclose(moved, CORNERS + np.where(CORNERS[:, 1:2] > 0, [[1.25, 0, 0]], 0), atol=1e-6)
    # The last frame leads back to the first.
    moved, _ = skin(actor.mesh, pose(actor.mesh, actor.animations["walk"], 3.5))
    np.testing.assert_allclose(moved[2], CORNERS[2] + [1.5, 0, 0], atol=1e-6)


def test_what_is_attached_follows_its_bone(archive):
    from rendering.painter import rotation
    from rendering.zero_ad import ZeroAD

    actor = ZeroAD(archive).actor("fauna/animal.xml", np.random.default_rng(0))
    stand = rotation(1, np.pi / 2)
    stand[:3, 3] = 10, 0, 0
    _, hat = actor.placed_parts(stand, "walk", 2.0)
    # Two units up on the bone, which is two along its own x, which is the world's -z.
    np.testing.assert_allclose(hat.matrix[:3, 3], [10, 2, -2], atol=1e-6)


def test_strips_and_fans_of_cars(tmp_path):
    from rendering.torcs import Torcs

    car = tmp_path / "cars" / "one"
    wheel = tmp_path / "wheels" / "any"
    car.mkdir(parents=True), wheel.mkdir(parents=True)
    vertices = "\n".join(f"{x} {y} 0.5 0 0 1" for x in (0, 2) for y in (0, 1))
    refs = "\n".join(f"{index} 0.5 0.25" for index in (0, 1, 2, 3))
    text = f'AC3Db\nOBJECT world\nkids 1\nOBJECT poly\ntexture "one.png" base\nnumvert 4\n{vertices}\nnumsurf 2\n'
    text += f"SURF 0x34\nmat 0\nrefs 4\n{refs}\nSURF 0x30\nmat 0\nrefs 4\n{refs}\nkids 0\n"
    for place in (car / "one.acc", wheel / "wheel0.acc"):
        place.write_text(text)
        Image.new("RGB", (4, 4)).save(place.parent / "one.png")
    axle = '<section name="Front Axle"><attnum name="xpos" val="1.5"/></section>'
    (car / "one.xml").write_text(f'{axle}<section name="Front Right Wheel"><attnum name="ypos" val="-0.8"/></section>')
    game = Torcs(tmp_path)
    actor = game.actor("cars/one", np.random.default_rng(0))
    (body,) = actor.props["body"]
    assert body.mesh.faces.tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6], [4, 6, 7]]
    np.testing.assert_array_equal(body.mesh.uvs[0], [0.5, 0.75])
    assert game.texture(body.texture.removeprefix("cars:")).size == (4, 4)
    front, _ = actor.mesh.points["FrontLeft"]
    np.testing.assert_allclose(front[[0, 2], 3], [-0.8 * 2.2, 1.5 * 2.2])


def md2(frames: list[np.ndarray], skin: str) -> bytes:
    """Two triangles of four vertices in a texture of 8 x 4, whole numbers of 0 to 255 as places."""
    corners = np.array([[0, 0], [8, 0], [8, 4], [0, 4], [4, 2]], "<i2")
    # The last corner is the first vertex's second place in the texture.
    faces = np.array([[[0, 1, 2], [0, 1, 2]], [[0, 2, 3], [4, 2, 3]]], "<u2")
    shapes = b""
    for places in frames:
        vertices = np.concatenate([places, np.zeros((4, 1))], 1).astype("u1")
        shapes += struct.pack("<6f16s", 0.5, 0.5, 0.5, 1, 2, 3, b"") + vertices.tobytes()
    starts = np.cumsum([68, 64, corners.nbytes, faces.nbytes, len(shapes)])
    sizes = 8, 8, 4, 40 + 16, 1, 4, 5, 2, 0, len(frames)
    head = struct.pack("<4s16i", b"IDP2", *sizes, *starts[:4].tolist(), 0, int(starts[4]))
    return head + struct.pack("<64s", skin.encode()) + corners.tobytes() + faces.tobytes() + shapes


SQUARE = np.array([[10, 0, 20], [10, 0, 40], [10, 20, 40], [10, 20, 20]])


@pytest.fixture
def people(tmp_path) -> Path:
    """One person, whose body moves ahead by frame and whose head turns, and a bicycle."""
    path = tmp_path / "0models.pk3"
    turned = [0, 1, 0, -1, 0, 0, 0, 0, 1, 7, 0, 0]
    with zipfile.ZipFile(path, "w") as file:
        folder = "models/civilians/male"
        file.writestr(
            f"{folder}/body01.md2", md2([np.add(SQUARE, [step, 0, 0]) for step in (0, 0, 0, 20, 40)], ".red")
        )
        file.writestr(f"{folder}/body01.anm", "// name start end fps\n\nstand0  0 1 1\nwalk0 2\t4 22\nwalk1 0 0 1\n")
        tags = struct.pack("<4s7i", b"JDP2", 1, 2, 5, 32, 160, 0, 0) + struct.pack("<64s64s", b"tag_hand", b"tag_head")
        identity = [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]
        file.writestr(f"{folder}/body01.tag", tags + np.array([identity] * 8 + [turned] * 2, "<f4").tobytes())
        file.writestr(f"{folder}/head01.md2", md2([SQUARE], ".missing"))
        file.writestr(f"{folder}/head01.png", png((20, 20, 230, 255)))
        file.writestr(f"{folder}/red.png", png((230, 20, 20, 255)))
        file.writestr("models/animals/fish/fish.md2", md2([SQUARE], ".red"))
        file.writestr("models/animals/fish/fish.anm", "rotate 0 16 2\n")
        file.writestr("models/animals/fish/red.png", png((230, 20, 20, 255)))
        file.writestr("models/objects/vehicles/bicycle/bicycle.md2", md2([SQUARE], ".red"))
        file.writestr("models/objects/vehicles/bicycle/red.jpg", png((230, 20, 20, 255)))
    return path


def test_people_walk_and_keep_their_heads(people):
    from rendering.ufo_ai import SCALE, UfoAI

    game = UfoAI(people)
    assert game.names("people") == ["people/animals/fish/fish", "people/civilians/male/body01"]
    actor = game.actor("people/civilians/male/body01", np.random.default_rng(0))
    assert actor.states() == {"idle": 2, "walk": 3}
    body, head = actor.placed_parts(np.eye(4), "walk", 1.5)
    assert body.actor.texture == "people:civilians/male/red.png"
    assert head.actor.texture == "people:civilians/male/head01.png"
    # Where the file says, 0.5 p + (1, 2, 3), half-way between steps of 20 and 40; x is ahead, y aside and z up, and
    # the feet are on the ground. The vertex with two places in the texture is there twice.
    expected = (0.5 * np.add(SQUARE, [30, 0, 0]) + [1, 2, 3])[:, [1, 2, 0]] - [0, 13, 0]
    assert len(body.positions) == 5
    np.testing.assert_allclose(body.positions[body.actor.mesh.faces[0]], expected[[0, 1, 2]] * SCALE, rtol=1e-6)
    np.testing.assert_allclose(body.positions[body.actor.mesh.faces[1]], expected[[0, 2, 3]] * SCALE, rtol=1e-6)
    np.testing.assert_allclose(body.actor.mesh.uvs[body.actor.mesh.faces[1]], [[0.5, 0.5], [1, 1], [0, 1]])
    # All normals of a flat square are along one axis.
    assert np.abs(body.normals[:, 2]).min() > 0 and np.abs(body.normals[:, :2]).max() < 1e-6
    # In the last frames the head's x axis is along y, its y axis along -x, and it is 7 ahead.
    head = list(actor.placed_parts(np.eye(4), "walk", 2.0))[1]
    places = 0.5 * SQUARE + [1, 2, 3]
    turned = np.stack([7 - places[:, 1], places[:, 0], places[:, 2]], 1)[:, [1, 2, 0]] - [0, 13, 0]
    np.testing.assert_allclose(head.positions[head.actor.mesh.faces[0]], turned[[0, 1, 2]] * SCALE, rtol=1e-5)


def test_what_has_no_animation_is_on_the_ground_too(people):
    from rendering.ufo_ai import UfoAI

    actor = UfoAI(people).actor("people/animals/fish/fish", np.random.default_rng(0))
    (part,) = actor.placed_parts(np.eye(4), None, 0.0)
    assert actor.states() == {} and part.positions[:, 1].min() == 0


def test_vehicles_stand_on_their_wheels_and_look_ahead(people):
    from rendering import ufo_ai

    game = ufo_ai.UfoAI(people)
    (name,) = game.names("vehicles")
    (part,) = game.actor(name, np.random.default_rng(0)).placed_parts(np.eye(4), None, 0.0)
    # Its longer side, of 10 units, is the one along y.
    np.testing.assert_allclose(np.ptp(part.positions, axis=0), np.array([0, 10, 10]) * ufo_ai.SCALE, atol=1e-6)
    assert part.positions[:, 1].min() == 0
    assert game.texture(part.actor.texture.removeprefix("people:")).size == (8, 8)


def test_units_of_one_file_by_animation(tmp_path):
    from rendering.megaglest import SCALE, MegaGlest

    models = tmp_path / "techs/pack/factions/romans/units/archer/models"
    models.mkdir(parents=True)
    Image.new("RGBA", (4, 4)).save(models / "skin.png")
    shapes = np.stack([SQUARE, SQUARE + 2]).astype("<f4")
    normals = np.ones_like(shapes)
    faces = np.array([[0, 1, 2], [0, 2, 3]], "<u4")

    def mesh(opacity: float, flags: int, textures: list[bytes]) -> bytes:
        head = struct.pack("<64s3I6f2f2I", b"", 2, 4, 6, *[1.0] * 6, 1, opacity, flags, len(textures))
        names = b"".join(struct.pack("<64s", name) for name in textures)
        uvs = np.full((4, 2), 0.25, "<f4").tobytes() if textures else b""
        return head + names + shapes.tobytes() + normals.tobytes() + uvs + faces.tobytes()

    meshes = mesh(0.4, 0, [b"skin.png"]), mesh(1, 0, []), mesh(1, 1, [b"skin.png"])
    (models / "archer_walking.g3d").write_bytes(b"G3D\x04" + struct.pack("<HB", 3, 0) + b"".join(meshes))
    house = tmp_path / "techs/pack/factions/romans/units/house/models/house_standing.g3d"
    house.parent.mkdir(parents=True)
    house.write_bytes(b"")
    game = MegaGlest(tmp_path)
    assert game.names() == ["warriors/romans/units/archer"]
    actor = game.actor("warriors/romans/units/archer", np.random.default_rng(0))
    assert actor.states() == {"walk": 2}
    # What is transparent, and what has no picture, is left out.
    (part,) = actor.placed_parts(np.eye(4), "walk", 0.5)
    np.testing.assert_allclose(part.positions, (SQUARE + 1) * SCALE, rtol=1e-6)
    assert (part.actor.material, part.actor.mesh.uvs[0].tolist()) == ("team", [0.25, 0.75])
    assert game.texture(part.actor.texture.removeprefix("warriors:")).size == (4, 4)


def test_an_open_shutter_is_the_mean_of_moments(archive, painter, tmp_path, monkeypatch):
    from rendering import scene
    from rendering.painter import Painter

    script = load_script("render_videos")
    Image.new("RGB", (64, 48), (120, 120, 120)).save(tmp_path / "sky.jpg")
    library = script.Library(archive, None, None, None)
    painter = Painter((214, 120), library.texture)

    def draw(share: float) -> scene.Scene:
        monkeypatch.setattr(scene, "BLURRED_SHARE", share)
        return scene.Scene(library, painter, [tmp_path / "sky.jpg"], 4, seed=3)

    sharp, blurred = draw(0.0), draw(1.0)
    (still, numbers), (picture, blurred_numbers) = sharp.frame(1), blurred.frame(1)
    np.testing.assert_array_equal(blurred_numbers, numbers)
    moments = [
        np.asarray(sharp._moment(1 + blurred.shutter * offset)[0], float) for offset in (-1 / 2, -1 / 6, 1 / 6, 1 / 2)
    ]
    assert 0.2 <= blurred.shutter <= 0.8
    np.testing.assert_allclose(np.asarray(picture), np.mean(moments, 0), atol=1)
    assert not np.array_equal(np.asarray(picture), np.asarray(still))


def test_numbers_are_where_the_picture_says(painter):
    from rendering.painter import Light, look_at, perspective

    light = Light(np.array([0, 0, 1.0]), np.zeros(3), np.ones(3), np.zeros(4))
    eye = np.array([0.0, 0.0, 4.0])
    view = perspective(np.pi / 2, 1.5, 0.1) @ look_at(eye, np.zeros(3))
    square = np.zeros((4, 8))
    square[:, :2], square[:, 5] = [[-2, -2], [2, -2], [2, 2], [-2, 2]], 1
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    painter.begin(view, eye, light)
    painter.draw_behind(
        np.concatenate([2 * square[:, :2] / 2, np.full((4, 1), 0.9999), square[:, 3:]], 1),
        Image.new("RGB", (8, 8), (0, 0, 255)),
    )
    painter.draw(square, faces, "red", np.eye(4), number=3)
    nearer = np.eye(4)
    nearer[:3, 3] = 0.5, 0, 0.5
    painter.draw(square, faces, "holes", nearer, number=4, is_cut=True)
    picture, numbers = painter.finish()
    colors = np.asarray(picture).astype(int)
    # 4 units away, the field of view is 8 high: the square takes half of it.
    assert (numbers == 3)[16:48, 32:64].all() and (numbers == 3).sum() == 32 * 32
    assert (colors[numbers == 3] == [255, 0, 0]).all() and (colors[numbers == 0] == [0, 0, 255]).all()


def test_training_reads_the_videos(archive, people, painter, tmp_path, monkeypatch, capsys):
    photographs = tmp_path / "photographs"
    (photographs / HELD_OUT_SEQUENCES[0]).mkdir(parents=True)
    Image.new("RGB", (64, 48), (120, 120, 120)).save(photographs / "sky.jpg")
    Image.new("RGB", (64, 48), (255, 255, 255)).save(photographs / HELD_OUT_SEQUENCES[0] / "00000.jpg")
    (photographs / "ground_truth_mask").mkdir()
    Image.new("L", (64, 48), 255).save(photographs / "ground_truth_mask" / "sky.png")

    def render(folder: str):
        arguments = [
            tmp_path / folder,
            "--zero-ad",
            archive,
            "--ufo-ai",
            people,
            "--photographs",
            photographs,
            "--videos",
            4,
            "--frames",
            3,
        ]
        monkeypatch.setattr(sys, "argv", ["render_videos.py", *map(str, arguments)])
        script = load_script("render_videos")
        monkeypatch.setattr(script, "SIZE", (214, 120))
        monkeypatch.setattr(script, "FEWEST_PIXELS", 200)
        assert script.list_photographs([photographs]) == [photographs / "sky.jpg"]
        script.main()

    render("one")
    kept = int(capsys.readouterr().out.split(" of 4 scenes")[0].split()[-1])
    store = load_davis(tmp_path / "one", 120, cache_dir=tmp_path / "cache", show_progress_bar=False)
    assert 1 <= kept == len(store.sequences) and len(store) == 3 * kept
    for span in store.sequences.values():
        assert store.objects[span[0]]
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    render("two")
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    # What is there is not drawn again.
    kept_file = tmp_path / "one" / files[0]
    kept_file.write_bytes(b"")
    render("one")
    assert kept_file.read_bytes() == b""


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--torcs", "empty", "must be the folder of TORCS"),
        ("--ufo-ai", "empty.zip", "so it is not 0models.pk3 of UFO: AI"),
        ("--ufo-ai", "sky.jpg", "is no archive; base/0models.pk3"),
        ("--megaglest", "empty", "must be the folder of MegaGlest"),
    ],
)
def test_other_games_that_are_none_get_one_line(archive, tmp_path, monkeypatch, capsys, option, name, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "sky.jpg")
    (tmp_path / "empty").mkdir()
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    arguments = [tmp_path / "set", "--zero-ad", archive, "--photographs", tmp_path, option, tmp_path / name]
    monkeypatch.setattr(sys, "argv", ["render_videos.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        load_script("render_videos").main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("zero_ad", "photographs", "message"),
    [
        ("sky.jpg", ".", "is no archive"),
        ("empty.zip", ".", "holds no art/actors/fauna"),
        (None, "none", "must hold pictures"),
    ],
)
def test_mistakes_get_one_line(archive, tmp_path, monkeypatch, capsys, zero_ad, photographs, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "sky.jpg")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    game = tmp_path / zero_ad if zero_ad else archive
    arguments = [tmp_path / "set", "--zero-ad", game, "--photographs", tmp_path / photographs]
    monkeypatch.setattr(sys, "argv", ["render_videos.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        load_script("render_videos").main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
