"""
Draw the README's or a card's picture: a few frames of the example clip as a model segments it, side by side.

    python scripts/make_picture.py docs/images/bunny.png
    python scripts/make_picture.py hub_cards/deformvos-student/picture.jpg --width 360
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hf_deformvos.cli import main as deformvos
from hf_deformvos.video import VideoReader


ROOT = Path(__file__).resolve().parent.parent
FRAMES = (0, 30, 60, 90)


def main():
    """Segment the clip and join frames of the overlay, two a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="a PNG, or a JPEG, which is smaller")
    parser.add_argument("--model", type=Path, default=ROOT / "hub_cards" / "deformvos-student", help="its folder")
    parser.add_argument("--width", type=int, default=480, help="of one frame, in pixels (default 480)")
    arguments = parser.parse_args()
    output, width = arguments.output, arguments.width
    examples = ROOT / "examples"
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "overlay.mp4"
        model = ["--model", str(arguments.model)]
        mask = ["--mask", str(examples / "bunny_mask.png")]
        code = deformvos(
            ["segment", str(examples / "bunny.mp4"), *mask, *model, "--output", folder, "--overlay", str(overlay)]
        )
        if code:
            raise SystemExit(code)
        frames = [frame.image for frame in VideoReader(overlay) if frame.index in FRAMES]
    pictures = [
        np.asarray(Image.fromarray(image).resize((width, width * image.shape[0] // image.shape[1]), Image.LANCZOS))
        for image in frames
    ]
    rows = [np.concatenate(pictures[start : start + 2], axis=1) for start in range(0, len(pictures), 2)]
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(output, optimize=True, quality=80)


if __name__ == "__main__":
    main()
