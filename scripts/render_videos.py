"""
Videos with masks for training, rendered from the models of free games.

What few annotated videos lack, things that turn, bend their legs, pass behind trees and behind each other, is cheap to
draw: 0 A.D. has a thousand animals, people, riders and machines with their animations, TORCS has cars, UFO: AI people
and vehicles of our days, MegaGlest more that walks.

    sudo apt-get install 0ad-data torcs-data ufoai-data megaglest-data libegl1 libgl1-mesa-dri
    pip install -e ".[render]"
    python scripts/render_videos.py data/rendered --zero-ad /usr/share/games/0ad/mods/public/public.zip \\
        --torcs /usr/share/games/torcs --ufo-ai /usr/share/games/ufoai/base/0models.pk3 \\
        --megaglest /usr/share/games/megaglest --photographs data/static/*/images --videos 360

The result has DAVIS layout: JPEGImages/480p/<scene>/*.jpg and Annotations/480p/<scene>/*.png, whose values are ids. A
call may be stopped; the same call goes on. Frames of videos that a model is tested on must not be among the
photographs; those in folders that are called like a sequence of `hf_deformvos.data.HELD_OUT_SEQUENCES` are left out.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from compose_cutouts import is_readable, list_photographs
from PIL import Image, ImageFilter
from rendering.megaglest import MegaGlest
from rendering.models import Actor
from rendering.painter import Painter
from rendering.scene import Scene
from rendering.torcs import Torcs
from rendering.ufo_ai import UfoAI
from rendering.zero_ad import ZeroAD
from tqdm import tqdm

from hf_deformvos.video import write_palette_png


SIZE = (854, 480)
# A scene is left out where no object has that many pixels at first, or one hides nearly everything at some time.
FEWEST_PIXELS = 1500
LARGEST_SHARE = 0.6


class Library:
    """
    Actors of 0 A.D. and, where they are there, of other games.

    Args:
        zero_ad (`Path`): public.zip of 0 A.D.
        torcs (`Path`, *optional*): Folder of TORCS, for the kind `cars`.
        ufo_ai (`Path`, *optional*): 0models.pk3 of UFO: AI, for `people` and `vehicles`.
        megaglest (`Path`, *optional*): Folder of MegaGlest, for `warriors`.
    """

    def __init__(self, zero_ad: Path, torcs: Path | None, ufo_ai: Path | None, megaglest: Path | None):
        self._zero_ad = ZeroAD(zero_ad)
        self._kinds = {"cars": Torcs(torcs)} if torcs else {}
        self._kinds |= dict.fromkeys(("people", "vehicles"), UfoAI(ufo_ai)) if ufo_ai else {}
        self._kinds |= {"warriors": MegaGlest(megaglest)} if megaglest else {}

    def names(self, kind: str) -> list[str]:
        """Actors of a kind, without signs on the ground and swarms."""
        if kind in self._kinds:
            return self._kinds[kind].names(kind)
        names = self._zero_ad.names(kind)
        return [name for name in names if not any(part in name for part in ("decal", "circle", "shoal"))]

    def terrains(self) -> list[str]:
        """Textures of the ground."""
        return self._zero_ad.terrains()

    def actor(self, name: str, rng: np.random.Generator) -> Actor:
        """An actor, of variants that the generator chooses."""
        return self._kinds.get(name.partition("/")[0], self._zero_ad).actor(name, rng)

    def texture(self, name: str) -> Image.Image | None:
        """The picture of a texture, whose name has its actor's kind before a colon, unless it is of 0 A.D."""
        kind, colon, path = name.partition(":")
        return self._kinds[kind].texture(path) if colon else self._zero_ad.texture(name)


def is_worth_it(masks: list[np.ndarray]) -> bool:
    """Whether there is something to follow from the first frame on, and nothing that hides all else."""
    first = np.bincount(masks[0].ravel(), minlength=2)[1:]
    largest = max(np.bincount(mask.ravel(), minlength=2)[1:].max() for mask in masks)
    return first.max() >= FEWEST_PIXELS and largest <= LARGEST_SHARE * masks[0].size


def write_video(root: Path, name: str, scene: Scene) -> bool:
    """Draws a scene and writes it, unless it is not worth it."""
    pictures, masks = zip(*(scene.frame(index) for index in range(scene.frames)), strict=True)
    if not is_worth_it(masks):
        return False
    softness, quality = scene.rng.uniform(0, 0.9), int(scene.rng.integers(60, 92))
    # Masks last, and under another name until they are whole: what has its masks is done.
    folder, whole = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
    part = whole.with_name(f".{name}")
    for made in (folder, part):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
    for index, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        picture.filter(ImageFilter.GaussianBlur(softness)).save(folder / f"{index:05d}.jpg", quality=quality)
        write_palette_png(part / f"{index:05d}.png", mask)
    part.rename(whole)
    return True


def main():
    """Draw the videos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder that gets DAVIS layout")
    parser.add_argument("--zero-ad", type=Path, required=True, metavar="ZIP", help="public.zip of 0 A.D.")
    parser.add_argument("--torcs", type=Path, metavar="FOLDER", help="folder of TORCS; without it there are no cars")
    parser.add_argument("--ufo-ai", type=Path, metavar="PK3", help="0models.pk3 of UFO: AI, for people and vehicles")
    parser.add_argument("--megaglest", type=Path, metavar="FOLDER", help="folder of MegaGlest, for more people")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, help="folders of pictures to see afar")
    parser.add_argument("--videos", type=int, default=360, help="scenes to draw; some are not worth keeping")
    parser.add_argument("--first", type=int, default=0, help="number, and seed, of the first scene")
    parser.add_argument("--frames", type=int, default=20, help="frames of each")
    arguments = parser.parse_args()
    photographs = [path for path in list_photographs(arguments.photographs) if is_readable(path)]
    if not photographs:
        parser.error(f"{', '.join(map(str, arguments.photographs))} must hold pictures; there is none.")
    try:
        library = Library(arguments.zero_ad, arguments.torcs, arguments.ufo_ai, arguments.megaglest)
        painter = Painter(SIZE, library.texture)
    except ValueError as error:
        parser.error(str(error))
    kept = 0
    for seed in tqdm(range(arguments.first, arguments.first + arguments.videos), desc="render"):
        name = f"scene-{seed:05d}"
        done = (arguments.output / "Annotations" / "480p" / name).is_dir()
        kept += done or write_video(
            arguments.output, name, Scene(library, painter, photographs, arguments.frames, seed)
        )
    print(f"{kept} of {arguments.videos} scenes.")


if __name__ == "__main__":
    main()
