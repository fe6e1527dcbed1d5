"""Where weights come from: the record of the run that made them, carried along by runs that start from them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from transformers.utils import cached_file, logging

from ..inference import sha256_of
from ..publishing.release import data_names
from .config import PATH_SETTINGS, TrainingConfig


logger = logging.get_logger(__name__)

_CHECKSUMS = ("sha256", "weights_sha256")
_FACTS = ("steps", "clips", "images", "minutes", "device", "processes", "blend", "supervision", *_CHECKSUMS)
# A curriculum that is a file's name says nothing elsewhere, either; one that is written out does.
_PRIVATE = {*PATH_SETTINGS, "output_dir", "cache_dir", "resume_from_checkpoint", "hub_model_id"} - {"stages"}


def read_record(source: str) -> dict | None:
    """What `training.json` (of a release) or `all_results.json` (of a run) beside a model says, if one is there."""
    for name in ("training.json", "all_results.json"):
        try:
            if Path(source).is_dir():
                path = Path(source) / name
            else:
                path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            record = json.loads(Path(path).read_text()) if path is not None and Path(path).is_file() else None
        except (OSError, json.JSONDecodeError) as error:
            # A record that cannot be had is no reason to lose a run.
            logger.warning(f"Cannot read {name} of {source}, the record of its training: {error}")
            continue
        if isinstance(record, dict):
            return record
    return None


def _names_file(value) -> bool:
    return isinstance(value, str) and value.endswith(".json")


def describe_origin(source: str) -> dict:
    """
    The lineage of a model folder or Hub repository.

    Args:
        source (`str`): Whose weights a run starts from, or distils.

    Returns:
        `dict`: `name`; and of the run that made it, where that is recorded, steps, clips, minutes, data, settings
        without paths, and its own `initialised_from`, `backbone` and `teacher`.
    """
    # A path of this machine says nothing elsewhere.
    is_path = Path(source).exists() or Path(source).is_absolute()
    origin: dict = {"name": Path(source).resolve().name if is_path else source}
    record = read_record(source)
    if record is None:
        return {**origin, "note": "there is no record of its training"}
    origin.update({name: record[name] for name in _FACTS if name in record})
    settings = record.get("settings", record.get("config")) or {}
    # Which sets it was trained on, not where they lay.
    data = record.get("data") or data_names(record.get("config") or {})
    if data:
        origin["data"] = data
    known = {item.name for item in fields(TrainingConfig)} - _PRIVATE
    origin["settings"] = {name: value for name, value in settings.items() if name in known and not _names_file(value)}
    for name, kind in (("initialised_from", dict), ("backbone", dict), ("teacher", dict), ("averaged_with", list)):
        if isinstance(record.get(name), kind):
            origin[name] = record[name]
    return origin


def lineage(config: TrainingConfig) -> dict:
    """`initialised_from`, `backbone` (what `init_backbone` named) and `teacher` of a run, as far as it has them."""
    own_weights = config.student != "none" and not config.student.endswith(".json")
    sources = {"initialised_from": config.student if own_weights else config.init_from, "teacher": config.teacher}
    origins = {name: describe_origin(source) for name, source in sources.items() if source}
    return origins | ({"backbone": describe_backbone(config.init_backbone)} if config.init_backbone else {})


def describe_backbone(source: str) -> dict:
    """
    What a backbone starts from.

    Args:
        source (`str`): A file of weights, or the folder or Hub repository of a model.

    Returns:
        `dict`: `name`, without the path; `sha256` of the weights, where they are one safetensors file.
    """
    path = Path(source)
    if path.exists():
        weights, name = path / "model.safetensors" if path.is_dir() else path, path.resolve().name
    else:
        # What is not at hand is no reason to lose a run.
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        weights, name = cached_file(source, "model.safetensors", **quiet), source
    is_file = weights is not None and Path(weights).is_file()
    return {"name": name, **({"sha256": sha256_of(Path(weights))} if is_file else {})}


def total_clips(clips: int, origin: dict | None) -> int:
    """Clips that weights have seen: in this run, and in those that it started from."""
    if not origin:
        return clips
    runs = [origin, *origin.get("averaged_with", [])]
    return total_clips(clips + sum(run.get("clips") or 0 for run in runs), origin.get("initialised_from"))
