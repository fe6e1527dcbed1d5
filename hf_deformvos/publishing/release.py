"""A training run's output turned into a release folder: weights in half precision, configurations, record, card."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..image_processing_deformvos import DeformVosImageProcessor
from ..modeling_deformvos import DeformVosModel
from ..processing_deformvos import DeformVosProcessor
from .cards import check_replaceable, read_json, render_card
from .measurements import sha256_of


# What of a run's settings tells how the weights came about; the others are paths and bookkeeping.
SETTINGS = (
    "supervision att_weight att_maps intra_weight inter_weight kl_weight representation_weight temperature "
    "stages cka_unbiased video_share max_gap max_objects max_proposals paste pastes leave distractor cords "
    "occluder kin color motion merged_sets video_short_side static_short_side memory_interval gradient_frames "
    "own_masks_start own_masks_end own_masks_from own_masks_until init_except freeze freeze_until ce_weight "
    "jaccard_weight bootstrap_share bootstrap_warm_up learning_rate backbone_lr_scale offset_lr_scale warm_up "
    "poly_power weight_decay max_grad_norm gradient_accumulation_steps ema_decay mixed_precision seed "
    "train_on_held_out"
).split()
# Of small videos in a release; docs/ARCHITECTURE.md, "Small videos", has what it brings.
MAX_ENLARGEMENT = 2.0
_SOURCES = ("davis_dirs", "youtube_vos_dirs", "dataset_names", "static_dirs", "video_dirs")


def release_run(
    run: str | Path,
    folder: str | Path,
    short_side: int | None = None,
    memory_interval: int | None = None,
    data: list[str] | None = None,
    origins: dict | None = None,
    blend: float | None = None,
    average: Sequence[str | Path] = (),
) -> dict:
    """
    Write a release folder's model files and `training.json`; the card is [`write_card`]'s.

    Args:
        run (`str` or `Path`): output folder of train_distill.py, with the averaged weights and `all_results.json`.
        folder (`str` or `Path`): written to; it may be what the run started from.
        short_side (`int`, *optional*): the processor's bound of the short side, in pixels, which videos of half that
            size are enlarged to; by default all is as in the run.
        memory_interval (`int`, *optional*): overrides the configuration's.
        data (list of `str`, *optional*): names of the data sets, by default those of the folders that each run read.
        origins (`dict`, *optional*): `initialised_from` and `teacher`, for runs whose results do not tell.
        blend (`float`, *optional*): this share of the weights is the run's, the rest is of those that it started from:
            what training on few data gained, with less of what it forgot (Wortsman et al., WiSE-FT, arXiv 2109.01903).
        average (sequence of `str` or `Path`, *optional*): output folders of further runs that started from the same
            weights: the run's weights are the mean of all of theirs (Wortsman et al., Model soups, arXiv 2203.05482).

    Returns:
        `dict`: what `training.json` holds.

    Raises:
        ValueError: if the folder's card was edited by hand, a run has no results, holds no DeformVOS model, did not
            start from weights to blend with, or started from others than the runs that it is averaged with.
    """
    run, folder = Path(run), Path(folder)
    check_replaceable(folder / "README.md")
    results = read_json(run / "all_results.json")
    recorded = {name: results[name] for name in ("initialised_from", "backbone", "teacher") if name in results}
    names = data if data is not None else data_names(results["config"])
    model = DeformVosModel.from_pretrained(
        run, **({} if memory_interval is None else {"memory_interval": memory_interval})
    )
    others = _average(model, results, average, data)
    if blend is not None:
        _blend(model, blend, results["config"]["student"], _start_of(results))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_release(folder)
    if short_side is None:
        DeformVosProcessor.from_pretrained(run).save_pretrained(folder)
    else:
        size = {"shortest_edge": short_side, "longest_edge": 1536}
        images = DeformVosImageProcessor(size=size, max_enlargement=MAX_ENLARGEMENT)
        DeformVosProcessor(images).save_pretrained(folder)
    facts = {
        "steps": results["steps"],
        "clips": results["clips"],
        "minutes": round(results["minutes"], 1),
        **{name: results[name] for name in ("device", "processes") if name in results},
        **({"blend": blend} if blend is not None else {}),
        "parameters": results["parameters"],
        "weights_sha256": sha256_of(folder / "model.safetensors"),
        **({"data": names} if names else {}),
        "settings": _settings_of(results),
        **({"averaged_with": others} if others else {}),
        **(recorded or origins or {}),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _settings_of(results: dict) -> dict:
    return {name: results["config"][name] for name in SETTINGS if name in results["config"]}


def _start_of(results: dict) -> str | None:
    """The checksum of the weights that a run started from, where that is recorded."""
    origin = results.get("initialised_from", {})
    return origin.get("weights_sha256", origin.get("sha256"))


def _average(model: DeformVosModel, results: dict, runs: Sequence[str | Path], data: list[str] | None) -> list[dict]:
    """Makes a model's weights the mean of its own and those of further runs; what these were."""
    facts = []
    for number, run in enumerate(map(Path, runs), start=2):
        others = read_json(run / "all_results.json")
        starts = [_start_of(each) or "weights that are not recorded" for each in (others, results)]
        if starts[0] != starts[1] or _start_of(results) is None:
            raise ValueError(
                f"`average` takes runs that started from the same weights (sha256), but those of {run} started from "
                f"{starts[0]}, the others from {starts[1]}."
            )
        state = DeformVosModel.from_pretrained(run, dtype="float32").state_dict()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(state[name], 1 / number)
        known = {name: others[name] for name in ("steps", "clips", "device", "processes", "teacher") if name in others}
        names = data if data is not None else data_names(others["config"])
        known |= {"minutes": round(others["minutes"], 1), **({"data": names} if names else {})}
        facts.append({**known, "settings": _settings_of(others)})
    return facts


def _blend(model: DeformVosModel, share: float, start: str, sha256: str | None) -> None:
    """Moves a model's weights back towards those of the folder `start`, whose file has that checksum, where known."""
    if not 0 < share < 1:
        raise ValueError(f"`blend` must be between 0 and 1, the share of the run's own weights, got {share}.")
    if not (Path(start) / "model.safetensors").is_file():
        raise ValueError(f"`blend` needs a run that started from a model's folder that is still there, got {start!r}.")
    found = sha256_of(Path(start) / "model.safetensors")
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"`blend` needs the weights that the run started from (sha256 {sha256[:12]}...), but {start!r} "
            f"holds others by now ({found[:12]}...): put those back."
        )
    before = DeformVosModel.from_pretrained(start, dtype="float32").state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(before[name], 1 - share)


def data_names(config: dict) -> list[str]:
    """The names of the data sets that a run read, without the paths of the machine that it ran on."""
    names = set()
    for source in _SOURCES:
        for place in config.get(source) or []:
            path = Path(os.path.abspath(place.removesuffix(":merge").removesuffix(":ids")))
            # A folder of several image sets is no set; its sub-folders are.
            is_set = (path / "images").is_dir() or not path.is_dir()
            inside = [part.name for part in path.iterdir() if (part / "images").is_dir()] if not is_set else []
            hub_name = source == "dataset_names" and not path.exists()
            names.update(inside if source == "static_dirs" and inside else [place if hub_name else path.name])
    return sorted(names)


def write_card(folder: str | Path, records: dict[str, dict]) -> Path:
    """Render a release folder's README.md, see [`cards.render_card`], unless it was edited by hand; its path."""
    path = Path(folder) / "README.md"
    check_replaceable(path)
    path.write_text(render_card(folder, records), encoding="utf-8")
    return path


__all__ = ["SETTINGS", "data_names", "release_run", "write_card"]
