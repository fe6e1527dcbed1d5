"""scripts/distill_backbone.py: a student's tokens learn a ViT's features, and training goes on from them."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CONFIG
from PIL import Image
from safetensors.torch import save_file
from synthetic import write_davis
from test_repository import load_script

from hf_deformvos import DeformVosConfig, DeformVosModel


pytest.importorskip("accelerate")
TINY_VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "out_indices": [1, 2],
    "patch_size": 14,
}


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher, weights of a backbone, two stills, and videos of which one is held out."""
    root = tmp_path_factory.mktemp("distill")
    torch.manual_seed(1)
    teacher = DeformVosConfig(**TINY_CONFIG, backbone="dinov2", backbone_config=TINY_VIT)
    DeformVosModel(teacher).save_pretrained(root / "teacher")
    save_file(DeformVosModel(DeformVosConfig()).backbone.state_dict(), root / "imagenet.safetensors")
    for name in ("images", "masks"):
        (root / "static" / "set" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(2):
        noise = Image.fromarray(rng.integers(0, 255, (6, 10, 3), np.uint8)).resize((480, 320))
        noise.save(root / "static" / "set" / "images" / f"{index}.webp")
        noise.convert("L").save(root / "static" / "set" / "masks" / f"{index}.png")
    write_davis(root / "davis", names=("ant", "flamingo"), frames=6)
    return root


@pytest.fixture
def distill(folders, tmp_path, monkeypatch):
    """Runs the script with a cache of its own."""

    def distill(output, *arguments, images=("static", "davis"), cache="cache"):
        command = [
            str(output),
            "--images",
            *(str(folders / name) for name in images),
            "--cache",
            str(tmp_path / cache),
        ]
        command += [
            "--teacher",
            str(folders / "teacher"),
            "--steps",
            "12",
            "--batch_size",
            "2",
            *map(str, arguments),
        ]
        monkeypatch.setattr(sys, "argv", ["distill_backbone.py", *command])
        load_script("distill_backbone").main()

    return distill


def test_images_are_those_that_may_be_trained_on(folders):
    listed = load_script("distill_backbone").list_images([folders / "static", folders / "davis"], every=4)
    davis = folders / "davis" / "JPEGImages" / "480p" / "ant"
    stills = [folders / "static" / "set" / "images" / f"{index}.webp" for index in range(2)]
    assert set(listed) == {davis / "00000.jpg", davis / "00004.jpg", *stills}


def test_masks_of_published_sets_are_no_images(tmp_path):
    kept = tmp_path / "HKU" / "imgs" / "0.png"
    for path in (kept, tmp_path / "HKU" / "gt" / "0.png", tmp_path / "coco" / "annotations" / "train2017" / "0.png"):
        path.parent.mkdir(parents=True)
        Image.new("L", (8, 8)).save(path)
    assert load_script("distill_backbone").list_images([tmp_path], every=1) == [kept]


def test_images_of_16_bits_are_scaled(tmp_path):
    deep = np.linspace(0, 65535, 257 * 449).reshape(257, 449).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    image = load_script("distill_backbone").read_image(tmp_path / "deep.png")
    assert np.array_equal(image, np.repeat((deep >> 8)[..., None], 3, axis=2))


def test_tokens_learn_the_features_and_a_student_starts_from_them(distill, folders, tmp_path):
    from hf_deformvos.training import TrainingConfig
    from hf_deformvos.training.models import build_student

    script, backbone = load_script("distill_backbone"), folders / "imagenet.safetensors"
    distill(tmp_path / "one", "--backbone", backbone)
    images, features = (np.load(tmp_path / "cache" / f"{name}.npy") for name in ("images", "features"))
    teacher = DeformVosModel.from_pretrained(folders / "teacher").eval()
    with torch.inference_mode():
        pixels = script.normalize(torch.from_numpy(images[:1]))
        wanted = teacher.backbone(pixels)[-1][0, -TINY_VIT["hidden_size"] :].numpy()
    assert np.corrcoef(features[0].ravel(), wanted.ravel())[0, 1] > 0.999

    def loss(folder):
        _, model = script.build(script.argparse.Namespace(init_from=folder), TINY_VIT["hidden_size"])
        center = torch.from_numpy(features.astype(np.float32).mean((0, 2, 3)))[:, None, None]
        with torch.inference_mode():
            predicted = model.eval()(script.normalize(torch.from_numpy(images)))
        return 1 - torch.cosine_similarity(predicted, torch.from_numpy(features).float() - center).mean()

    distill(tmp_path / "two", "--init_from", tmp_path / "one")
    assert loss(tmp_path / "two") < loss(tmp_path / "one") - 0.02
    student = build_student(TrainingConfig(output_dir=str(tmp_path), init_from=str(tmp_path / "two")))
    learned = DeformVosModel.from_pretrained(tmp_path / "two").state_dict()
    for name, value in student.state_dict().items():
        if name.startswith(("backbone.", "token_projection.")):
            assert torch.equal(value, learned[name]), name


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["--backbone", "imagenet.safetensors"], {"images": ["teacher"]}, "no images below"),
        (["--backbone", "teacher/model.safetensors"], {}, "weights are missing"),
        (["--init_from", "teacher"], {}, "decoder.safetensors"),
        (["--backbone", "imagenet.safetensors", "--teacher", str(ROOT / "hub_cards" / "none")], {}, "none"),
    ],
)
def test_mistakes_are_named(distill, folders, tmp_path, capsys, arguments, options, message):
    arguments = [folders / word if (folders / word).exists() else word for word in arguments]
    with pytest.raises(SystemExit):
        distill(tmp_path / "out", *arguments, **options)
    assert message in capsys.readouterr().err


def test_a_cache_of_other_images_is_refused(distill, folders, tmp_path, capsys):
    backbone = folders / "imagenet.safetensors"
    distill(tmp_path / "one", "--backbone", backbone, images=["static"])
    with pytest.raises(SystemExit):
        distill(tmp_path / "two", "--backbone", backbone)
    assert "was filled from other images, or by another teacher" in capsys.readouterr().err


def test_the_run_is_on_record(distill, folders, tmp_path):
    from hf_deformvos.training.lineage import describe_origin

    distill(tmp_path / "one", "--backbone", folders / "imagenet.safetensors", "--steps", "1")
    distill(tmp_path / "two", "--init_from", tmp_path / "one", "--steps", "2")
    origin = describe_origin(str(tmp_path / "two"))
    assert (origin["steps"], origin["images"], origin["data"]) == (2, 4, ["davis", "set"])
    assert origin["settings"]["supervision"] == "features" and origin["teacher"]["name"] == "teacher"
    assert origin["initialised_from"]["images"] == 2
