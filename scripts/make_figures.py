"""
Draws the figures of the texts.

    python scripts/make_figures.py plots                                           curves, ablation, objects, memory
    python scripts/make_figures.py attention --models teacher=DIR KL=DIR CKA=DIR --davis DIR --sequence bmx-bumps
    python scripts/make_figures.py strips --models teacher=DIR student=DIR --davis DIR --sequences swing bmx-bumps
    python scripts/make_figures.py clips                                           what a model is adapted with

Plots are made from the records in docs/numbers alone; `attention` and `strips` run the models. Figures go to
docs/images, and docs/numbers/figures.json records what each was made from, so that one that is out of date is found
out (`make numbers-check`). --output FOLDER draws elsewhere and records nothing. Needs `pip install -e ".[docs]"`.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from evidence import NUMBERS, ROOT, EvidenceError, describe_model, guarded, read_pairs, sha256_of, update_record
from PIL import Image

from hf_deformvos.adaptation import AdaptationConfig, GivenFrames
from hf_deformvos.data import ClipSpec
from hf_deformvos.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from hf_deformvos.evaluation import EvaluationSequence, load_dataset_layout, region_similarity
from hf_deformvos.inference import load_for_inference
from hf_deformvos.propagation_deformvos import bilinear_corners
from hf_deformvos.training.distillation import centered_kernel_alignment
from hf_deformvos.training.task import step_generator
from hf_deformvos.video import VideoReader, colorblind_palette, draw_overlay, read_palette_png


IMAGES = ROOT / "docs" / "images"
# Okabe and Ito's colours, the dark ones first; yellow vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", ":", "-.")
WIDTH = 8.8  # inches; at 200 dots an inch twice the width of a README's column
LOSSES = {
    "loss_ce": "cross-entropy",
    "loss_jaccard": "soft Jaccard",
    "loss_att": "L_att = 1 − CKA",
    "loss_intra": "L_intra",
    "loss_inter": "L_inter",
    "loss_kl": "KL",
    "loss_representation": "representation",
}
PROPAGATIONS = {"short_term": "short-term: previous frame", "long_term": "long-term: first frame", "self": "self"}
_ZOOM = 9  # tokens shown to each side of the query in short-term attention


def pyplot():
    """matplotlib's pyplot in this project's style."""
    try:
        import matplotlib
    except ImportError as error:
        raise EvidenceError('Figures need matplotlib: pip install -c constraints.txt -e ".[docs]".') from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "legend.frameon": False,
            "savefig.dpi": 200,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
        }
    )
    return plt


# ---- plots of records -----------------------------------------------------------------------------------------------


def curves_by_row(record: dict, group: str) -> dict[str, tuple[str, list[dict]]]:
    """Of each row of a group that was trained, its title and the curves of its seeds."""
    found = {}
    for row in record["rows"]:
        curves = [record["runs"][key]["curve"] for key in row["runs"].values()]
        if row["group"] == group and all(curves):
            found[row["name"]] = (row["title"], curves)
    return found


def mean_curve(curves: list[dict], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and mean over seeds of a logged value, as far as all of them go."""
    series = [curve[name] for curve in curves if name in curve]
    if not series:
        return None
    length = min(len(item["step"]) for item in series)
    values = np.mean([item["value"][:length] for item in series], axis=0)
    return np.array(series[0]["step"][:length]), values


def draw_curves(record: dict, group: str = "distillation"):
    """Every loss, and J on the held-out sequences, against the step."""
    plt, rows = pyplot(), curves_by_row(record, group)
    if not rows:
        raise EvidenceError(f"The record has no trained row of group {group!r} yet.")
    present = [name for name in LOSSES if any(name in curve for _, curves in rows.values() for curve in curves)]
    panels = ["eval_j", *present]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(WIDTH, 2.1 * lines + 0.5), squeeze=False)
    for axis, name in zip(axes.flat, panels, strict=False):
        for number, (title, curves) in enumerate(rows.values()):
            found = mean_curve(curves, name)
            if found is not None:
                style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % 4]}
                marker = "o" if len(found[0]) < 12 else None
                axis.plot(*found, label=title, linewidth=1.3, marker=marker, markersize=2.5, **style)
        axis.set_title("J on held-out clips" if name == "eval_j" else LOSSES[name])
        axis.set_xlim(left=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles, labels = axes.flat[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def draw_ablation(record: dict):
    """Mean J&F of every row, and its seeds, by group and data set; dots, because bars would have to start at 0."""
    plt = pyplot()
    groups = list(dict.fromkeys(row["group"] for row in record["rows"]))
    sets = [name for name in ("held-out", "val") if any(name in row["scores"] for row in record["rows"])]
    ordered = [row for group in groups for row in record["rows"] if row["group"] == group]
    # A gap between groups.
    places = np.cumsum([0] + [1 + 0.6 * (a["group"] != b["group"]) for a, b in pairwise(ordered)])
    size = (WIDTH, 0.27 * places[-1] + 1.1)
    figure, axes = plt.subplots(1, len(sets), figsize=size, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], sets, strict=True):
        for place, row in zip(places, ordered, strict=True):
            scores = row["scores"].get(name)
            if scores is None:
                continue
            colour, values = COLOURS[groups.index(row["group"]) % len(COLOURS)], 100 * np.array(scores["values"])
            axis.plot([values.min(), values.max()], [place, place], color=colour, linewidth=5, alpha=0.25)
            axis.plot(values, [place] * len(values), ".", color=colour, markersize=5, alpha=0.6)
            axis.plot(values.mean(), place, "o", color=colour, markersize=6)
            axis.annotate(f"{values.mean():.1f}", (1.01, place), xycoords=("axes fraction", "data"), va="center")
        some = next(row["scores"][name] for row in ordered if name in row["scores"])
        where = "held-out sequences" if name == "held-out" else "sequences of DAVIS-2016 val"
        axis.set_title(f"J&F\n{some['num_sequences']} {where}")
        axis.grid(axis="y", visible=False)
    axes[0][0].set_yticks(places, [row["title"] for row in ordered])
    axes[0][0].invert_yaxis()
    return figure


def draw_objects(record: dict):
    """J&F against the number of objects: all of them, and the one that is in every composite; real videos as stars."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(WIDTH * 0.75, 3.4))
    for number, (name, entry) in enumerate(record["models"].items()):
        colour, rows = COLOURS[number % len(COLOURS)], entry.get("summary", [])
        counts = [row["num_objects"] for row in rows]
        means = 100 * np.array([row["mean"] for row in rows])
        if rows:
            axis.plot(counts, means, "o-", color=colour, markersize=4, label=f"{name}: all objects")
            first = [100 * row["first_mean"] for row in rows]
            axis.plot(counts, first, "--", color=colour, linewidth=1.2, label=f"{name}: the clip's own object")
        for video, result in entry.get("videos", {}).items():
            at = (result["num_objects"], 100 * result["JF"])
            axis.plot(*at, "*", color=colour, markersize=11, markeredgecolor="white")
            axis.annotate(f"{name}: {video} (real)", at, (6, -3), textcoords="offset points", fontsize=8, color=colour)
    axis.set_xlabel("objects")
    axis.set_ylabel("J&F")
    axis.xaxis.set_major_locator(plt.MultipleLocator(1))
    axis.set_title("Synthetic composites of held-out clips")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="best")
    return figure


def draw_memory(record: dict):
    """J&F against what is remembered, how often, and how large the frames are."""
    plt = pyplot()
    panels = {
        "long_term_slots": ("state, MB, by number of slots", lambda case: case["state_bytes"] / 1e6, "{}"),
        "memory_interval": ("frames between memories", lambda case: case["memory_interval"], None),
        "short_side": ("peak above the model, MB, by short side", _above_loaded, "{}"),
    }
    figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.9), sharey=True)
    for axis, (part, (label, position, note)) in zip(axes, panels.items(), strict=True):
        for number, (name, entry) in enumerate(record["models"].items()):
            cases = [case for case in entry.get("cases", {}).values() if part in case["series"]]
            cases = sorted((case for case in cases if position(case) is not None), key=lambda case: case[part])
            points = [(position(case), 100 * case["JF"]) for case in cases]
            colour = COLOURS[number % len(COLOURS)]
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", markersize=4, color=colour, label=name)
            for case, point in zip(cases, points, strict=True) if note else ():
                axis.annotate(
                    note.format(case[part]), point, (0, 6), textcoords="offset points", ha="center", fontsize=7
                )
        axis.set_xlabel(label)
        axis.margins(x=0.14, y=0.16)
    axes[1].set_xscale("log", base=2)
    ticks = sorted({line for axis_line in axes[1].lines for line in axis_line.get_xdata()})
    axes[1].set_xticks(ticks, [str(int(tick)) for tick in ticks])
    axes[0].set_ylabel("J&F, held-out sequences")
    if len(record["models"]) > 1:
        axes[2].legend(fontsize=8)
    return figure


def _above_loaded(case: dict) -> float | None:
    """Megabytes that running takes: on the GPU where there is one."""
    if case["peak_device_bytes"] is not None:
        return case["peak_device_bytes"] / 1e6
    if case["peak_bytes"] is None or case["loaded_bytes"] is None:
        return None
    return (case["peak_bytes"] - case["loaded_bytes"]) / 1e6


PLOTS = {
    "loss-curves": (
        "ablation",
        draw_curves,
        "Losses and held-out J over the steps of the ablation, means over seeds.",
    ),
    "ablation": ("ablation", draw_ablation, "J&F of every row of the ablation: means, and the seeds' own as dots."),
    "objects": (
        "objects",
        draw_objects,
        "J&F against the number of objects, on synthetic composites of held-out clips.",
    ),
    "memory": ("memory", draw_memory, "J&F against memory, one setting changed at a time."),
}


# ---- pictures of models ---------------------------------------------------------------------------------------------


class Followed:
    """A model run over a sequence up to some frames: its masks there, and on the last one what it attended to."""

    def __init__(self, folder: str, sequence: EvaluationSequence, frames: list[int], attentions: bool = False):
        model, processor = load_for_inference(folder)
        session = processor.init_video_session(device=model.device)
        self.ids: dict[int, np.ndarray] = {}
        self.J: dict[int, float] = {}
        for index in range(max(frames) + 1):
            path = sequence.images[index]
            image = read_image(path)
            given = sequence.given_mask(path.stem)
            if given is not None:
                processor.add_inputs_to_inference_session(session, index, input_masks=given.astype(np.int32))
            pixel_values = processor(images=image, return_tensors="pt").pixel_values[0]
            last = attentions and index == max(frames)
            output = model(inference_session=session, frame=pixel_values, output_attentions=last)
            if index in frames:
                ids = processor.post_process_id_map(output, original_size=image.shape[:2])
                true = sequence.read_ids(sequence.annotations[path.stem])
                self.ids[index] = ids
                self.J[index] = float(
                    np.mean([region_similarity(true == n, ids == n, true == 255) for n in sequence.object_ids])
                )
        self.attentions = _on_cpu(output.attentions[-1]) if last else None
        self.locations = _on_cpu(output.sampled_locations[-1]) if last else None
        self.grid = tuple((side - 1) // 16 + 1 for side in pixel_values.shape[-2:])


def _on_cpu(maps: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float().cpu() for name, tensor in maps.items()}


def read_image(path: Path) -> np.ndarray:
    """A frame as `(height, width, 3)` uint8."""
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))


def inner_token(ids: np.ndarray, grid: tuple[int, int]) -> tuple[int, int]:
    """The token (row, column) of the object that is furthest from everything else."""
    rows, columns = (
        np.linspace(0, side - 1, count).round().astype(int) for side, count in zip(ids.shape, grid, strict=True)
    )
    inside = ids[np.ix_(rows, columns)] == ids[ids > 0].min(initial=255)
    tokens, others = np.argwhere(inside), np.argwhere(~inside)
    if not len(tokens):
        raise EvidenceError("The object covers no token in that frame; choose another with --frame.")
    if not len(others):
        return tuple(len(side) // 2 for side in (rows, columns))
    distances = ((tokens[:, None] - others[None]) ** 2).sum(-1).min(1)
    return tuple(tokens[distances.argmax()])


def weights_on_grid(followed: Followed, name: str, query: int) -> tuple[np.ndarray, np.ndarray]:
    """A query's attention spread over the token grid, its largest value 1, and the points (y, x) that it reads."""
    weights, points = followed.attentions[name][0, query].float(), followed.locations[name][0].float()
    height, width = followed.grid
    points = points[query] if points.dim() == 3 else points
    last = points.new_tensor([height - 1, width - 1])
    points = torch.minimum(points.clamp_min(0), last)
    if len(weights) == height * width and followed.locations[name].dim() == 4:
        dense = weights.view(height, width)
    else:
        # Of several memories the first is that of the first frame.
        index, corners = bilinear_corners(points, height, width)
        spread = (weights[: len(points)] * corners).flatten()
        dense = torch.zeros(height * width).scatter_add(0, index.flatten(), spread).view(height, width)
    return (dense / dense.max().clamp_min(1e-9)).numpy(), points.numpy()


def draw_attention(models: dict[str, str], sequence: EvaluationSequence, frame: int):
    """By model and propagation, what one query attends to and the points that it reads."""
    plt = pyplot()
    true = sequence.read_ids(sequence.annotations[sequence.images[frame].stem])
    runs = {name: Followed(folder, sequence, [frame], attentions=True) for name, folder in models.items()}
    images = {
        name: read_image(sequence.images[i]) for name, i in zip(PROPAGATIONS, (frame - 1, 0, frame), strict=True)
    }
    first = next(iter(runs.values()))
    figure, axes = plt.subplots(len(runs), 4, figsize=(WIDTH * 1.25, 1.53 * len(runs) + 0.25), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)
    for line, (name, followed) in zip(axes, runs.items(), strict=True):
        width = followed.grid[1]
        row, column = inner_token(true, followed.grid)
        line[0].imshow(draw_overlay(images["self"], followed.ids[frame].astype(np.uint8), colorblind_palette()))
        scale = (np.array(images["self"].shape[:2]) - 1) / np.maximum(np.array(followed.grid) - 1, 1)
        line[0].plot(column * scale[1], row * scale[0], "P", color="white", markeredgecolor="black", markersize=8)
        line[0].set_ylabel(name)
        for axis, part in zip(line[1:], PROPAGATIONS, strict=True):
            dense, points = weights_on_grid(followed, part, row * width + column)
            _draw_map(axis, images[part], dense, points * scale, scale)
            axis.plot(column * scale[1], row * scale[0], "+", color="black", markersize=6, markeredgewidth=1)
            if part == "short_term":
                _zoom(axis, (row, column), scale, images[part].shape)
            if followed is not first and followed.grid == first.grid:
                maps = [item.attentions[part][:1].float() for item in (first, followed)]
                agreement = float(centered_kernel_alignment(*maps))
                note = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
                axis.text(0.02, 0.04, f"CKA {agreement:.2f}", transform=axis.transAxes, fontsize=7, bbox=note)
    for axis, title in zip(axes[0], (f"frame {frame}, and the query", *PROPAGATIONS.values()), strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def _draw_map(axis, image: np.ndarray, dense: np.ndarray, points: np.ndarray, scale: np.ndarray) -> None:
    """A faded grey frame with weights in colour and sampled points as dots."""
    grey = 120 + 135 * (image.astype(np.float32).mean(-1) / 255)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
    colours = np.zeros((*dense.shape, 4))
    colours[..., :3] = np.array([213, 94, 0]) / 255
    colours[..., 3] = dense**0.4
    height, width = dense.shape
    extent = (-scale[1] / 2, (width - 0.5) * scale[1], (height - 0.5) * scale[0], -scale[0] / 2)
    axis.imshow(colours, extent=extent, interpolation="bilinear")
    axis.scatter(points[:, 1], points[:, 0], s=2.2, color="#0072B2", linewidths=0)
    axis.set_xlim(-0.5, image.shape[1] - 0.5)
    axis.set_ylim(image.shape[0] - 0.5, -0.5)


def _zoom(axis, token: tuple[int, int], scale: np.ndarray, shape: tuple[int, ...]) -> None:
    """Shows what is around the query, in the frame's proportions."""
    half = _ZOOM * scale[0] * np.array([1, shape[1] / shape[0]])
    half = np.minimum(half, (np.array(shape[:2]) - 1) / 2)
    middle = np.clip(np.array(token) * scale, half, np.array(shape[:2]) - 1 - half)
    axis.set_xlim(middle[1] - half[1], middle[1] + half[1])
    axis.set_ylim(middle[0] + half[0], middle[0] - half[0])


def draw_strips(models: dict[str, str], sequences: list[EvaluationSequence], count: int):
    """Frames across, models down: what each makes of the same first masks, and J there."""
    plt = pyplot()
    lines = ["ground truth", *models]
    size = (WIDTH * 1.25, 0.553 * WIDTH * 1.25 / count * len(lines) * len(sequences) + 0.25)
    figure, axes = plt.subplots(len(lines) * len(sequences), count, figsize=size, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for number, sequence in enumerate(sequences):
        frames = np.linspace(0, len(sequence.images) - 1, count).round().astype(int).tolist()
        runs = [None, *(Followed(folder, sequence, frames) for folder in models.values())]
        block = axes[number * len(lines) : (number + 1) * len(lines)]
        for line, name, run in zip(block, lines, runs, strict=True):
            for axis, index in zip(line, frames, strict=True):
                path = sequence.images[index]
                ids = sequence.read_ids(sequence.annotations[path.stem]) if run is None else run.ids[index]
                ids = np.where(ids == 255, 0, ids).astype(np.uint8)
                axis.imshow(draw_overlay(read_image(path), ids, colorblind_palette()))
                note = (
                    f"{sequence.name}, frame {index}" if run is None else f"J {run.J[index]:.2f}" if index else "given"
                )
                box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.2}
                axis.text(0.02, 0.05, note, transform=axis.transAxes, fontsize=7, bbox=box)
            line[0].set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def draw_clips(image: np.ndarray, ids: np.ndarray, batches: int):
    """The clips that a model is adapted with, one a row."""
    config = AdaptationConfig()
    spec = ClipSpec((257, 449), config.num_frames, config.batch_size)
    frames = GivenFrames([image], [ids], spec, config.recomposed, config.leave)
    mean, deviation = (np.array(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
    rows = batches * spec.batch
    size = (WIDTH, 0.573 * WIDTH / spec.frames * rows)
    figure, axes = pyplot().subplots(rows, spec.frames, figsize=size, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    for index in range(batches):
        batch = frames(index, step_generator(config.seed, index))
        for clip, masks, line in zip(batch.pixel_values, batch.id_masks, axes[index * spec.batch :], strict=False):
            for pixels, mask, axis in zip(clip, masks, line, strict=True):
                picture = (pixels.permute(1, 2, 0).numpy() * deviation + mean).clip(0, 1) * 255
                shown = np.where(mask.numpy() == 255, 0, mask.numpy()).astype(np.uint8)
                axis.imshow(draw_overlay(picture.astype(np.uint8), shown, colorblind_palette()))
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
    return figure


# ---- the command ----------------------------------------------------------------------------------------------------


def save(figure, name: str, folder: Path, facts: dict, suffix: str = ".png") -> Path:
    """Writes a figure and, where it belongs to the texts, what it was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}"
    # Photographs: as JPEG, and no finer than the frames.
    options = {"dpi": 150, "pil_kwargs": {"quality": 87}} if suffix == ".jpg" else {"pil_kwargs": {"optimize": True}}
    figure.savefig(path, **options)
    pyplot().close(figure)
    if folder.resolve() == IMAGES:
        entry = {"file": path.name, "sha256": sha256_of(path), **facts}
        update_record(NUMBERS / "figures.json", "figures", partial(_keep, name=name, entry=entry))
    print(f"Wrote {path}")
    return path


def _keep(record: dict, name: str, entry: dict) -> None:
    record.setdefault("figures", {})[name] = entry


def make_plots(options: argparse.Namespace) -> None:
    """Draws every plot whose record is there."""
    for name, (source, draw, caption) in PLOTS.items():
        path = options.numbers / f"{source}.json"
        if options.only and name not in options.only:
            continue
        if not path.is_file():
            print(f"{name}: {path.name} is not there yet")
            continue
        try:
            figure = draw(json.loads(path.read_text()))
        except EvidenceError as error:
            print(f"{name}: {error}")
            continue
        facts = {"caption": caption, "sources": {path.name: sha256_of(path)}}
        facts["command"] = "python scripts/make_figures.py plots"
        save(figure, name, options.output, facts)


def find_sequences(options: argparse.Namespace, names: list[str]) -> list[EvaluationSequence]:
    """Sequences of the folder given, in the order given."""
    found = {s.name: s for s in load_dataset_layout(options.layout, options.davis, "train", names).sequences}
    return [found[name] for name in names]


def facts_of(models: dict[str, str], kind: str, caption: str) -> dict:
    """What is recorded of a picture of models."""
    described = {name: describe_model(folder)["sha256"] for name, folder in models.items()}
    return {"caption": caption, "models": described, "command": f"python scripts/make_figures.py {kind}"}


def make_attention(options: argparse.Namespace) -> None:
    """Draws attention maps and sampled locations."""
    models = read_pairs("--models", options.models)
    (sequence,) = find_sequences(options, [options.sequence])
    frame = len(sequence.images) // 2 if options.frame is None else options.frame
    if not 1 <= frame < len(sequence.images):
        raise EvidenceError(f"--frame must be 1 to {len(sequence.images) - 1}, got {frame}.")
    caption = (
        f"What one query (white cross) of {sequence.name}, frame {frame}, attends to (orange), and the points "
        "that are read (blue). Short-term attention is shown around the query. CKA compares maps with the first row's."
    )
    figure = draw_attention(models, sequence, frame)
    save(figure, options.name, options.output, facts_of(models, "attention", caption), ".jpg")


def make_strips(options: argparse.Namespace) -> None:
    """Draws frames across and models down."""
    models = read_pairs("--models", options.models)
    figure = draw_strips(models, find_sequences(options, options.sequences), options.count)
    caption = "The first mask is given; J of each frame is that of the picture it stands in."
    save(figure, options.name, options.output, facts_of(models, "strips", caption), ".jpg")


def make_clips(options: argparse.Namespace) -> None:
    """Draws clips of the example's first frame."""
    image = next(iter(VideoReader(str(ROOT / "examples" / "bunny.mp4")))).image
    figure = draw_clips(image, read_palette_png(ROOT / "examples" / "bunny_mask.png"), options.batches)
    caption = "A clip a row: the frame warped as a whole, or its objects on ways of their own; labels are coloured."
    facts = {"caption": caption, "command": "python scripts/make_figures.py clips"}
    save(figure, "adaptation_clips", options.output, facts, ".jpg")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    plots = kinds.add_parser("plots", help="everything that is drawn from records")
    plots.add_argument("--only", nargs="+", choices=list(PLOTS))
    plots.add_argument("--numbers", type=Path, default=NUMBERS, help="folder of the records")
    plots.set_defaults(run=make_plots)
    attention = kinds.add_parser("attention", help="attention maps and sampled locations of some models")
    attention.add_argument("--sequence", required=True)
    attention.add_argument("--frame", type=int, help="default the middle one")
    attention.set_defaults(run=make_attention)
    strips = kinds.add_parser("strips", help="what some models make of some sequences")
    strips.add_argument("--sequences", nargs="+", required=True)
    strips.add_argument("--count", type=int, default=5, help="frames of a sequence")
    strips.set_defaults(run=make_strips)
    for kind, name in ((attention, "attention"), (strips, "strips")):
        kind.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
        kind.add_argument("--davis", type=Path, required=True, help="DAVIS-layout folder")
        kind.add_argument("--layout", choices=("davis2016", "davis2017"), default="davis2016")
        kind.add_argument("--name", default=name, help="of the figure (default %(default)s)")
    clips = kinds.add_parser("clips", help="what a model is adapted with, from the example's first frame")
    clips.add_argument("--batches", type=int, default=6, help="how many (default %(default)s)")
    clips.set_defaults(run=make_clips)
    for kind in (plots, attention, strips, clips):
        kind.add_argument("--output", type=Path, default=IMAGES, help="folder (default docs/images)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Draws; the exit code."""
    options = build_parser().parse_args(arguments)
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
