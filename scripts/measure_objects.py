"""
J&F against the number of objects.

    python scripts/measure_objects.py --models hub_cards/deformvos-student --davis data/davis2016-train \
        --videos data/davis2017-schoolgirls

Each held-out sequence, which has one object, is filled up to ten: objects of the other held-out sequences are cut out
along their tracked masks and pasted in, scaled, moving as they do there. These composites are synthetic, and called so
wherever they are shown; they are the same in every run. The composite of n + 1 objects is that of n with one more, so
that besides J&F of all objects that of the first, which is in all of them, can be followed. Real videos with several
objects (--videos, DAVIS-2017 layout) are measured beside them.

The record, docs/numbers/objects.json, grows composite by composite: a call that was stopped is repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from evidence import (
    NUMBERS,
    ROOT,
    Deadline,
    EvidenceError,
    OutOfTime,
    check_names,
    describe_folder,
    guarded,
    held_out_dataset,
    open_model,
    read_record,
    update_record,
)
from PIL import Image, ImageOps

from hf_deformvos.evaluation import EvaluationSequence, load_dataset_layout, summarize
from hf_deformvos.evaluation.layouts import read_ids
from hf_deformvos.evaluation.runner import RunnerConfig, SequenceRunner, describe_hardware, load_pretrained
from hf_deformvos.inference import resolve_device
from hf_deformvos.video import write_palette_png


RECORD = NUMBERS / "objects.json"
MAX_FRAMES = 40
# Side of a square of a pasted object's area, in shares of that of the frame's area; they take turns.
SIZES = (0.17, 0.14, 0.2)
_PLACES = 96  # tried for an object
_LEAST_PIXELS = 64  # of an object in the first frame, at least


@dataclass(frozen=True)
class Piece:
    """A tracked object to be pasted: where from, how, and where its centre is at first, (x, y) in pixels."""

    source: EvaluationSequence
    start: int
    flip: bool
    scale: float
    centre: tuple[float, float]


def turning(position: int, length: int) -> int:
    """Index of a frame of a sequence that is played forwards and backwards in turn."""
    period = max(2 * (length - 1), 1)
    position %= period
    return min(position, period - position) if length > 1 else 0


def read_object(source: EvaluationSequence, index: int, flip: bool = False) -> tuple[Image.Image, Image.Image]:
    """A frame and the mask of its object, 0 or 255."""
    path = source.images[index]
    return _read_pair(path, source.annotations[path.stem], flip)


# Enough for the frames of all sequences at the few positions that one frame of a composite is made of.
@lru_cache(maxsize=32)
def _read_pair(image_path: Path, mask_path: Path, flip: bool) -> tuple[Image.Image, Image.Image]:
    with Image.open(image_path) as file:
        image = file.convert("RGB")
    mask = Image.fromarray((read_ids(mask_path, merge_channels=True) > 0).astype(np.uint8) * 255)
    return (ImageOps.mirror(image), ImageOps.mirror(mask)) if flip else (image, mask)


def centre_of(mask: Image.Image) -> tuple[float, float] | None:
    """Middle of the box around a mask, (x, y)."""
    box = mask.getbbox()
    return None if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


def paste_at(layer: Image.Image, piece: Piece, first: tuple[float, float], size: tuple[int, int]) -> Image.Image:
    """A scaled frame or mask on an empty canvas of `size` (width, height), its point `first` on the piece's centre."""
    canvas = Image.new(layer.mode, size)
    canvas.paste(layer, tuple(round(to - piece.scale * at) for to, at in zip(piece.centre, first, strict=True)))
    return canvas


def place(piece: Piece, time_index: int, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """The piece's picture and mask, 0 to 255 at its edge, on canvases of `size` (width, height)."""
    first = centre_of(read_object(piece.source, piece.start, piece.flip)[1])
    index = turning(piece.start + time_index, len(piece.source.images))
    layers = read_object(piece.source, index, piece.flip)
    scaled = [ImageOps.scale(layer, piece.scale, Image.Resampling.BOX) for layer in layers]
    return tuple(paste_at(layer, piece, first, size) for layer in scaled)


def choose_pieces(base: EvaluationSequence, sources: list[EvaluationSequence], count: int) -> list[Piece]:
    """`count` objects to paste into a sequence, each where it hides the least of those before it at first."""
    mask = read_object(base, 0)[1]
    taken = np.asarray(mask) > 127
    seed = int.from_bytes(hashlib.sha256(base.name.encode()).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    pieces = []
    for number in range(count):
        # A sequence that is used again starts elsewhere, mirrored.
        turn, source = number // len(sources), sources[number % len(sources)]
        flip, length = turn % 2 == 1, len(source.images)
        starts = [(turn * length // 2 + step) % length for step in range(length)]
        start = next(index for index in starts if centre_of(read_object(source, index)[1]))
        places = generator.uniform([0.08, 0.12], [0.92, 0.88], (_PLACES, 2)) * mask.size
        piece, own = _best_place(source, start, flip, SIZES[number % len(SIZES)], places, taken)
        pieces.append(piece)
        taken = taken | own
    return pieces


def _best_place(
    source: EvaluationSequence, start: int, flip: bool, share: float, places: np.ndarray, taken: np.ndarray
) -> tuple[Piece, np.ndarray]:
    """The place where a piece hides the fewest pixels of others and loses the fewest outside; and its mask there."""
    mask = read_object(source, start, flip)[1]
    scale = min(1.0, share * (taken.size / (np.asarray(mask) > 127).sum()) ** 0.5)
    small = ImageOps.scale(mask, scale, Image.Resampling.BOX)
    whole = (np.asarray(small) > 127).sum()
    best = None
    for centre in places:
        piece = Piece(source, start, flip, scale, tuple(map(float, centre)))
        own = np.asarray(paste_at(small, piece, centre_of(mask), taken.shape[::-1])) > 127
        cost = int((own & taken).sum() + whole - own.sum())
        if best is None or cost < best[0]:
            best = cost, piece, own
    return best[1:]


def compose(
    base: EvaluationSequence, pieces: list[Piece], num_frames: int
) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Frames and ids `(height, width)` uint8 of a composite: 1 is the sequence's own object, then come the pieces."""
    for time_index in range(num_frames):
        image, mask = read_object(base, turning(time_index, len(base.images)))
        image = image.copy()
        ids = (np.asarray(mask) > 127).astype(np.uint8)
        for number, piece in enumerate(pieces, start=2):
            picture, alpha = place(piece, time_index, image.size)
            image.paste(picture, (0, 0), alpha)
            ids[np.asarray(alpha) > 127] = number
        yield image, ids


def write_composite(root: Path, name: str, frames: Iterator[tuple[Image.Image, np.ndarray]]) -> None:
    """Writes a composite in DAVIS layout; its masks get their name last, so that half of one is none."""
    images, masks = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / f".{name}"
    for folder in (images, masks):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for index, (image, ids) in enumerate(frames):
        if index == 0 and (counts := np.bincount(ids.ravel()))[1:].min() < _LEAST_PIXELS:
            raise EvidenceError(
                f"Composite {name} hides an object in its first frame: pixels by id {counts.tolist()}."
            )
        image.save(images / f"{index:05d}.jpg", quality=95)
        write_palette_png(masks / f"{index:05d}.png", ids)
    masks.rename(masks.with_name(name))


def measure(runner: SequenceRunner, sequence: EvaluationSequence) -> dict:
    """Scores of one sequence: of all objects, of the first, and of each."""
    started = time.monotonic()
    score = runner.run(sequence).score
    summary = summarize(score.objects)
    values = [(item.region.mean + item.boundary.mean) / 2 for item in score.objects]
    return {
        "num_objects": len(values),
        "num_frames": len(sequence.images),
        "JF": round(summary.region_and_boundary, 5),
        "J": round(summary.region.mean, 5),
        "F": round(summary.boundary.mean, 5),
        "first_JF": round(values[0], 5),
        "objects": [round(value, 5) for value in values],
        "seconds": round(time.monotonic() - started, 1),
    }


def summarize_points(points: dict[str, dict], counts: list[int]) -> list[dict]:
    """Means by number of objects over the sequences that have been measured with every number."""
    bases = sorted({name.rpartition("/")[0] for name in points})
    whole = [base for base in bases if all(f"{base}/{count}" in points for count in counts)]
    rows = []
    for count in counts if whole else []:
        chosen = [points[f"{base}/{count}"] for base in whole]
        values = [point["JF"] for point in chosen]
        rows.append(
            {
                "num_objects": count,
                "mean": round(statistics.mean(values), 5),
                "deviation": round(statistics.stdev(values), 5) if len(values) > 1 else None,
                "first_mean": round(statistics.mean(point["first_JF"] for point in chosen), 5),
                "num_composites": len(chosen),
            }
        )
    return rows


def keep(record: dict, settings: dict, model: str, part: str, name: str, result: dict, hardware: dict) -> None:
    """Puts a result into the record and summarises its model anew."""
    record["command"] = "python scripts/measure_objects.py"
    entry = open_model(record, settings, model)
    entry.setdefault(part, {})[name] = result
    entry["hardware"] = hardware
    entry["summary"] = summarize_points(entry.get("points", {}), settings["counts"])


def measure_model(model: str, options: argparse.Namespace, settings: dict, path: Path, deadline: Deadline) -> None:
    """Measures what the record lacks of a model."""
    config = RunnerConfig(model, options.device, options.dtype, options.threads, options.short_side)
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    runner = SequenceRunner(*load_pretrained(config), device, getattr(torch, options.dtype), options.short_side)
    hardware = describe_hardware(device, options.dtype, options.threads, 1)
    done = open_model(read_record(path, "objects"), settings, model)

    def store(part: str, name: str, sequence: EvaluationSequence) -> None:
        deadline.remaining()
        result = measure(runner, sequence)
        change = partial(keep, settings=settings, model=model, part=part, name=name, result=result, hardware=hardware)
        update_record(path, "objects", change)
        print(f"{Path(model).name}, {name}: {result['num_objects']} objects, J&F {result['JF']:.4f}", flush=True)

    for root in options.videos:
        for sequence in load_dataset_layout("davis2017", root, "train", max_frames=options.video_frames).sequences:
            if sequence.name not in done.get("videos", {}):
                store("videos", sequence.name, sequence)
    sequences = list(held_out_dataset(options.davis).sequences)
    for base in sequences:
        missing = [count for count in settings["counts"] if f"{base.name}/{count}" not in done.get("points", {})]
        others = [sequence for sequence in sequences if sequence is not base]
        pieces = choose_pieces(base, others, max(missing) - 1) if missing else []
        for count in missing:
            deadline.remaining()
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder) if options.keep is None else options.keep
                name = f"{base.name}-{count}-objects-{options.max_frames}-frames"
                if not (root / "Annotations" / "480p" / name).is_dir():
                    write_composite(root, name, compose(base, pieces[: count - 1], options.max_frames))
                composite = load_dataset_layout("davis2017", root, sequences=[name]).sequences[0]
                store("points", f"{base.name}/{count}", composite)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="model folders")
    parser.add_argument("--davis", type=Path, required=True, help="DAVIS-layout folder with the held-out sequences")
    parser.add_argument("--videos", nargs="*", default=[], help="folders of real videos with several objects")
    parser.add_argument("--counts", type=int, nargs="+", default=list(range(1, 11)), help="numbers of objects")
    parser.add_argument("--max-frames", type=int, default=MAX_FRAMES, help="of a composite (default %(default)s)")
    parser.add_argument("--video-frames", type=int, help="of a real video: a rehearsal")
    parser.add_argument("--short-side", type=int, default=480, help="at the network (default %(default)s)")
    parser.add_argument("--device", help="default: the fastest present")
    parser.add_argument("--dtype", default="float32", help="precision of the network (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--minutes", type=float, help="stop after that time; the same call goes on")
    parser.add_argument("--keep", type=Path, help="folder to keep the composites in, to look at")
    parser.add_argument("--json", type=Path, help=f"the record (default {RECORD.relative_to(ROOT)})")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measures and records; the exit code."""
    options = build_parser().parse_args(arguments)
    if (options.max_frames < MAX_FRAMES or options.video_frames) and options.json is None:
        raise EvidenceError("A rehearsal with fewer frames needs --json: its figures do not go into the texts.")
    if min(options.counts) < 1:
        raise EvidenceError(f"--counts must be at least 1, got {min(options.counts)}.")
    check_names(options.models)
    settings = {
        "counts": sorted(set(options.counts)),
        "max_frames": options.max_frames,
        "video_frames": options.video_frames,
        "short_side": options.short_side,
        "dtype": options.dtype,
        "data": describe_folder(options.davis),
        "synthetic": "objects of held-out sequences pasted into held-out sequences",
    }
    path, deadline = options.json or RECORD, Deadline(options.minutes)
    try:
        for model in options.models:
            measure_model(model, options, settings, path, deadline)
    except OutOfTime:
        print("The time is up; the same call goes on from here.")
    for name, entry in read_record(path, "objects").get("models", {}).items():
        for row in entry.get("summary", []):
            print(f"{name}: {row['num_objects']} objects, J&F {row['mean']:.4f}, of the first {row['first_mean']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
