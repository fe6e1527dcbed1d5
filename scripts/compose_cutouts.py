"""
A set of still images with masks for training, from pictures that have an alpha channel and any photographs.

Cut-outs of all kinds of things are easier to come by than photographs with masks. Each is the frontmost of `--copies`
images, together with up to two others, at random places, sizes and angles, on a random part of a photograph:

    python scripts/compose_cutouts.py data/static/stamps --cutouts /usr/share/tuxpaint/stamps/animals \
        --backgrounds /usr/share/backgrounds data/davis2016-train/JPEGImages

The result has the layout of `hf_deformvos.data.list_static_set`: images/*.jpg, and masks/*.png whose values are ids.
Frames of videos that a model is tested on must not be among the backgrounds; those in folders that are called like a
sequence of `hf_deformvos.data.HELD_OUT_SEQUENCES` are left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter
from tqdm import tqdm

from hf_deformvos.data import HELD_OUT_SEQUENCES
from hf_deformvos.data.static import is_mask
from hf_deformvos.data.store import READ_ERRORS
from hf_deformvos.image_processing_deformvos import to_rgb


SIZE = (576, 320)
SUFFIXES = {".png", ".webp", ".jpg", ".jpeg"}
# Long side of the smallest cut-out, in pixels.
SMALLEST = 64
LARGEST_ENLARGEMENT = 1.6


def list_pictures(folders: list[Path]) -> list[Path]:
    """Every picture below the folders, sorted, without frames of held-out sequences."""
    paths = (path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    return [path for path in paths if path.parent.name not in HELD_OUT_SEQUENCES]


def list_photographs(folders: list[Path]) -> list[Path]:
    """The same without masks, which the names of the folders tell."""
    return [
        path for folder in folders for path in list_pictures([folder]) if not is_mask(path.relative_to(folder.parent))
    ]


def is_readable(path: Path) -> bool:
    """Whether a picture can be decoded; one that cannot is named."""
    try:
        with Image.open(path) as image:
            image.load()
    except READ_ERRORS as error:
        tqdm.write(f"{path} cannot be read and is left out: {error}", file=sys.stderr)
        return False
    return True


def load_cutout(path: Path) -> Image.Image | None:
    """The picture cut to what is opaque; `None` where it is small or broken, or of one kind nearly all over."""
    try:
        image = Image.open(path).convert("RGBA")
    except READ_ERRORS:
        return None
    opaque = np.asarray(image)[..., 3] >= 128
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    if not 0.02 < opaque.mean() < 0.98 or max(len(rows), len(columns)) < SMALLEST:
        return None
    return image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def draw_background(rng: np.random.Generator, path: Path) -> Image.Image:
    """A random part of a photograph, at `SIZE`."""
    image = to_rgb(Image.open(path))
    scale = min(image.width / SIZE[0], image.height / SIZE[1]) * rng.uniform(0.5, 1.0)
    width, height = SIZE[0] * scale, SIZE[1] * scale
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    image = image.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def draw_pose(rng: np.random.Generator, cutout: Image.Image) -> Image.Image:
    """The cut-out mirrored, turned, of another size, lighter or darker, and as sharp as a photograph is."""
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = SIZE[1] * np.exp(rng.uniform(np.log(0.2), np.log(0.95)))
    scale = min(side / max(cutout.size), LARGEST_ENLARGEMENT)
    cutout = cutout.resize([max(1, round(length * scale)) for length in cutout.size], Image.Resampling.LANCZOS)
    cutout = cutout.rotate(rng.normal(0, 12), Image.Resampling.BICUBIC, expand=True)
    alpha = cutout.getchannel("A")
    colors = cutout.convert("RGB")
    for enhancer, spread in (
        (ImageEnhance.Brightness, 0.2),
        (ImageEnhance.Contrast, 0.15),
        (ImageEnhance.Color, 0.25),
    ):
        colors = enhancer(colors).enhance(float(np.exp(rng.normal(0, spread))))
    colors.putalpha(alpha)
    return colors.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))


def compose(rng: np.random.Generator, background: Path, cutouts: list[Image.Image]) -> tuple[Image.Image, Image.Image]:
    """The cut-outs one over the other on a background, the first at the very front; and the ids, 1 for the first."""
    image = draw_background(rng, background)
    ids = Image.new("L", SIZE)
    for object_id, cutout in reversed(list(enumerate(cutouts, start=1))):
        posed = draw_pose(rng, cutout)
        # Up to a fifth of it may lie outside.
        place = [
            round(rng.uniform(-0.2 * own, whole - 0.8 * own)) for own, whole in zip(posed.size, SIZE, strict=True)
        ]
        alpha = posed.getchannel("A")
        image.paste(posed.convert("RGB"), place, alpha)
        ids.paste(object_id, place, alpha.point(lambda value: 255 if value >= 128 else 0))
    return image, ids


def main():
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cutouts", type=Path, nargs="+", required=True, help="folders of pictures with alpha")
    parser.add_argument("--backgrounds", type=Path, nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--copies", type=int, default=2, help="images in which each cut-out is the frontmost")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; remove it, or name another folder.")
    for folder in [*arguments.cutouts, *arguments.backgrounds]:
        if not folder.is_dir():
            parser.error(f"{folder} is no folder of pictures.")
    backgrounds = [path for path in tqdm(list_photographs(arguments.backgrounds), desc="check") if is_readable(path)]
    pictures = [load_cutout(path) for path in tqdm(list_pictures(arguments.cutouts), desc="read")]
    cutouts = [picture for picture in pictures if picture is not None]
    if not cutouts or not backgrounds:
        parser.error(
            f"{len(pictures)} pictures have {len(cutouts)} cut-outs of {SMALLEST} pixels or more among them, and "
            f"there are {len(backgrounds)} backgrounds; at least one of each is needed."
        )
    for folder in ("images", "masks"):
        (arguments.output / folder).mkdir(parents=True)
    rng = np.random.default_rng(arguments.seed)
    count = arguments.copies * len(cutouts)
    for index in tqdm(range(count), desc="compose"):
        others = rng.choice(len(cutouts), size=rng.integers(0, 3))
        chosen = [cutouts[index % len(cutouts)], *(cutouts[other] for other in others)]
        image, ids = compose(rng, backgrounds[rng.integers(len(backgrounds))], chosen)
        image.save(arguments.output / "images" / f"{index:05d}.jpg", quality=92)
        ids.save(arguments.output / "masks" / f"{index:05d}.png")
    print(f"{count} images of {len(cutouts)} cut-outs on {len(backgrounds)} backgrounds.")


if __name__ == "__main__":
    main()
