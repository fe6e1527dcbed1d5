"""
Teach a student's backbone what a ViT sees, before it learns to segment: its tokens shall tell the ViT's features.

A few dozen videos and some thousand images with masks teach a network of four million parameters to propagate masks,
but hardly what belongs together in things that it has never seen. A self-supervised ViT knows, and its features need
no labels:

    python scripts/distill_backbone.py runs/backbone --teacher hub_cards/deformvos-teacher \
        --backbone mobilenet-v2/model.safetensors --images data/static data/davis2016-train --minutes 30
    python train_distill.py --init_from runs/backbone ...

Backbone and token projection of a fresh student learn, through one further 1x1 convolution that is kept beside them
for `--init_from`, to predict the last block of the teacher's ViT: the loss is one minus the cosine, per token, of
centred features (as in "Theia", CoRL 2024, without its other losses). The teacher is asked once for each image; its
answers are kept in `--cache`. Frames of held-out sequences are left out.
"""

import argparse
import json
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from compose_cutouts import is_readable, list_photographs
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel
from hf_deformvos.image_processing_deformvos import to_rgb
from hf_deformvos.publishing.release import data_names
from hf_deformvos.training.config import native_precision
from hf_deformvos.training.lineage import describe_backbone, describe_origin
from hf_deformvos.training.optimization import learning_rate_factor
from hf_deformvos.writable import check_folder


HEIGHT, WIDTH = 257, 449
DECODER = "decoder.safetensors"
# The projections are fresh, the backbone is not.
PROJECTION_LR_SCALE = 6.0
COLOR_JITTER = 0.25
WARM_UP, POLY_POWER = 0.03, 0.9


def list_images(folders: list[Path], every: int) -> list[Path]:
    """Images below the folders, sorted; of the frames of a video, which lie below `JPEGImages`, one in `every`."""
    chosen = []
    for folder, images in groupby(sorted(list_photographs(folders)), key=lambda path: path.parent):
        chosen += list(images)[:: every if "JPEGImages" in folder.parts else 1]
    return chosen


def read_image(path: Path) -> np.ndarray:
    """The middle of an image as `(HEIGHT, WIDTH, 3)` bytes."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.fit(to_rgb(image), (WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Bytes `(B, H, W, 3)` to what the network takes, `(B, 3, H, W)`."""
    mean, deviation = (torch.tensor(getattr(DeformVosImageProcessor, name)) for name in ("image_mean", "image_std"))
    return (
        ((images.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    )


@torch.inference_mode()
def fill_cache(
    cache: Path, paths: list[Path], teacher: DeformVosModel, accelerator: Accelerator
) -> tuple[np.ndarray, np.ndarray]:
    """
    Images `(N, HEIGHT, WIDTH, 3)` in bytes and the teacher's features `(N, channels, h, w)` in half precision.

    Raises:
        ValueError: if the cache was filled from other images, or by another teacher.
    """
    files, origin = [cache / "images.npy", cache / "features.npy"], cache / "origin.txt"
    weights = sum(float(parameter.double().sum()) for parameter in teacher.parameters())
    asked = f"teacher {weights!r}\n" + "".join(f"{path.resolve()}\n" for path in paths)
    if not all(file.exists() for file in (*files, origin)):
        cache.mkdir(parents=True, exist_ok=True)
        channels = teacher.backbone.vit.config.hidden_size
        shapes = (len(paths), HEIGHT, WIDTH, 3), (len(paths), channels, HEIGHT // 16 + 1, WIDTH // 16 + 1)
        partial = [file.with_suffix(".partial") for file in files]
        images, features = (
            np.lib.format.open_memmap(file, "w+", dtype, shape)
            for file, dtype, shape in zip(partial, ("uint8", "float16"), shapes, strict=True)
        )
        for index, path in enumerate(tqdm(paths, desc="ask the teacher")):
            images[index] = read_image(path)
            with accelerator.autocast():
                pixels = normalize(torch.from_numpy(images[index : index + 1])).to(accelerator.device)
                answer = teacher.backbone(pixels)
            features[index] = answer[-1][0, -channels:].float().cpu().numpy()
        for old, new in zip(partial, files, strict=True):
            old.rename(new)
        origin.write_text(asked)
    if origin.read_text() != asked:
        raise ValueError(f"{cache} was filled from other images, or by another teacher; remove it, or name another.")
    images, features = (np.load(file, mmap_mode="r") for file in files)
    return images, features


class FeatureDistillation(nn.Module):
    """Backbone and token projection of a student, and the convolution from its tokens to the teacher's features."""

    def __init__(self, student: DeformVosModel, channels: int):
        super().__init__()
        self.backbone, self.token_projection = student.backbone, student.token_projection
        self.decoder = nn.Conv2d(student.config.hidden_size, channels, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, 16h+1, 16w+1)` to what the teacher's features, centred, should be."""
        return self.decoder(self.token_projection(*self.backbone(pixel_values)[2:]))

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """For AdamW; `lr_scale` is the factor on the scheduled rate."""
        backbone = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        projection = [*self.token_projection.parameters(), *self.decoder.parameters()]
        return [
            {"params": parameters, "lr": learning_rate * scale, "lr_scale": scale}
            for parameters, scale in ((backbone, 1.0), (projection, PROJECTION_LR_SCALE))
        ]


def draw_batch(rng: np.random.Generator, chosen, images, features, center) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, some mirrored and all of other colours, and the centred features that they shall give."""
    chosen = np.sort(chosen)
    pixels = normalize(torch.from_numpy(images[chosen]))
    wanted = torch.from_numpy(features[chosen]).float() - center
    if rng.random() < 0.5:
        pixels, wanted = pixels.flip(3), wanted.flip(3)
    gain, shift = (torch.from_numpy(rng.normal(0, COLOR_JITTER, (len(chosen), 3, 1, 1))).float() for _ in range(2))
    return pixels * gain.exp() + shift, wanted


def train(
    model: FeatureDistillation,
    images: np.ndarray,
    features: np.ndarray,
    arguments: argparse.Namespace,
    accelerator: Accelerator,
) -> int:
    """For `--minutes` or `--steps`, the rate falling to zero over them; the number of steps."""
    center = torch.from_numpy(features[::10].astype(np.float32).mean((0, 2, 3)))[:, None, None]
    model.train()
    optimizer = torch.optim.AdamW(model.parameter_groups(arguments.learning_rate), weight_decay=0.02)
    model, optimizer = accelerator.prepare(model, optimizer)
    rng, started, order, losses = np.random.default_rng(arguments.seed), time.monotonic(), np.empty(0, int), []
    while True:
        minutes = (time.monotonic() - started) / 60
        progress = len(losses) / arguments.steps if arguments.steps else minutes / arguments.minutes
        if progress >= 1:
            return len(losses)
        factor = learning_rate_factor(progress, len(losses), WARM_UP, POLY_POWER)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * group["lr_scale"] * factor
        if len(order) < arguments.batch_size:
            order = np.concatenate([order, rng.permutation(len(images))])
        chosen, order = np.split(order, [arguments.batch_size])
        pixels, wanted = draw_batch(rng, chosen, images, features, center)
        # accelerate returns float32, whatever it computes in.
        predicted = model(pixels.to(accelerator.device))
        loss = (1 - F.cosine_similarity(predicted, wanted.to(accelerator.device), dim=1)).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            print(f"{progress:4.0%}, step {len(losses)}, loss {np.mean(losses[-50:]):.4f}", flush=True)


def describe_run(arguments: argparse.Namespace, steps: int, minutes: float) -> dict:
    """What the cards of models that start from here tell of it, in the form of a training run's record."""
    stage = {"until": 1.0, "size": [HEIGHT, WIDTH], "frames": 1, "batch": arguments.batch_size}
    origin = {"initialised_from": describe_origin(str(arguments.init_from))} if arguments.init_from else {}
    if arguments.backbone:
        origin["backbone"] = describe_backbone(str(arguments.backbone))
    return {
        "steps": steps,
        "clips": 0,
        "images": steps * arguments.batch_size,
        "minutes": round(minutes, 1),
        "data": data_names({"static_dirs": [str(folder) for folder in arguments.images]}),
        "settings": {
            "supervision": "features",
            "stages": [stage],
            "learning_rate": arguments.learning_rate,
            "mixed_precision": native_precision(),
            "seed": arguments.seed,
        },
        **origin,
        "teacher": describe_origin(arguments.teacher),
    }


def build(arguments: argparse.Namespace, channels: int) -> tuple[DeformVosModel, FeatureDistillation]:
    """A fresh student with ImageNet's backbone, or what an earlier run left."""
    if arguments.init_from:
        student = DeformVosModel.from_pretrained(arguments.init_from, dtype=torch.float32)
    else:
        student = DeformVosModel(DeformVosConfig())
        student.load_backbone(str(arguments.backbone))
    student.backbone.freeze_pretrained()
    model = FeatureDistillation(student, channels)
    if arguments.init_from:
        model.decoder.load_state_dict(load_file(arguments.init_from / DECODER))
    return student, model


def main():
    """Ask the teacher, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", required=True, help="a DeformVOS model with a ViT")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--backbone", type=Path, help="safetensors file with ImageNet's MobileNetV2")
    start.add_argument("--init_from", type=Path, help="output of an earlier run")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders, with those below them")
    parser.add_argument("--every", type=int, default=4, help="of frames of videos, one in so many")
    parser.add_argument("--cache", type=Path, default=Path("runs/backbone-cache"))
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, after the teacher was asked")
    parser.add_argument("--steps", type=int, help="of training, instead of minutes")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, least in (("every", 1), ("steps", 1), ("batch_size", 1), ("minutes", 1e-3), ("learning_rate", 1e-9)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            parser.error(f"--{name} must be at least {least}, got {value}.")
    paths = [path for path in list_images(arguments.images, arguments.every) if is_readable(path)]
    if not paths:
        parser.error(f"no images below {', '.join(map(str, arguments.images))}.")
    torch.manual_seed(arguments.seed)
    accelerator = Accelerator(mixed_precision=native_precision())
    try:
        check_folder(arguments.output, f"output must be a folder that can be written to, got {arguments.output}")
        teacher = DeformVosModel.from_pretrained(arguments.teacher, dtype=torch.float32).eval()
        if teacher.config.backbone != "dinov2":
            raise ValueError(f"{arguments.teacher} has no ViT (its backbone is {teacher.config.backbone}).")
        student, model = build(arguments, teacher.backbone.vit.config.hidden_size)
        images, features = fill_cache(arguments.cache, paths, teacher.to(accelerator.device), accelerator)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    started = time.monotonic()
    steps = train(model, images, features, arguments, accelerator)
    student.cpu().eval().save_pretrained(arguments.output)
    save_file(model.cpu().decoder.state_dict(), arguments.output / DECODER)
    record = describe_run(arguments, steps, (time.monotonic() - started) / 60)
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"Saved to {arguments.output}; go on with `train_distill.py --init_from {arguments.output}`.")


if __name__ == "__main__":
    main()
