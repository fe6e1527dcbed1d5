"""Checkpoints that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import logging


logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
BEST_FILE = "best.json"
_STUDENT, _AVERAGE, _OPTIMIZER = "student.safetensors", "average.safetensors", "optimizer.pt"
# Of a checkpoint's state; the rest came later.
_REQUIRED = ("step", "elapsed", "clips", "best", "average_updates", "config")
_WRITING = ".writing-"
_PATTERN = re.compile(r"checkpoint-(\d+)")


class Tensors(NamedTuple):
    """
    What training goes on from, beside the plain values of its state.

    Attributes:
        student, average (`dict[str, torch.Tensor]`): Weights, and their moving average.
        optimizer (`dict`): The states of the optimizer and, where there is one, of the gradient scaler.
    """

    student: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    optimizer: dict

    def save(self, checkpoint: Path) -> None:
        """Writes them into a checkpoint's folder."""
        folder = checkpoint / "training"
        folder.mkdir()
        for name, weights in ((_STUDENT, self.student), (_AVERAGE, self.average)):
            save_file({key: value.contiguous() for key, value in weights.items()}, folder / name)
        torch.save(self.optimizer, folder / _OPTIMIZER)


def read_checkpoint(path: Path) -> tuple[dict, Tensors]:
    """
    Reads a checkpoint: its state and its tensors.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    folder = path / "training"
    damage = (OSError, ValueError, RuntimeError, EOFError, LookupError, TypeError, AttributeError, SafetensorError)
    try:
        state = json.loads((path / STATE_FILE).read_text())
        state = {name: state[name] for name in _REQUIRED} | state
        optimizer = torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer = {"optimizer": optimizer["optimizer"], **optimizer}
        return state, Tensors(load_file(folder / _STUDENT), load_file(folder / _AVERAGE), optimizer)
    except (*damage, pickle.UnpicklingError) as error:
        reason = str(error) if isinstance(error, (OSError, SafetensorError)) else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"The checkpoint {path} cannot be read ({reason}): take it away, and resume from an earlier one."
        ) from error


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = _PATTERN.fullmatch(path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def write_checkpoint(output_dir: str | Path, step: int, write: Callable[[Path], None], state: dict, keep: int) -> Path:
    """
    Writes a checkpoint atomically and removes the oldest ones.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        step (`int`): Step number; the checkpoint's name.
        write (`Callable[[Path], None]`): Writes everything but the state into the folder it is given.
        state (`dict`): Plain values; their file is written last.
        keep (`int`): Most checkpoints to keep, 0 = all.

    Returns:
        `Path` of the checkpoint.
    """
    output_dir = Path(output_dir)
    temporary, final = output_dir / f"{_WRITING}checkpoint-{step}", output_dir / f"checkpoint-{step}"
    # Also what runs that were killed while writing have left.
    for leftover in output_dir.glob(f"{_WRITING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=2))
    for path in temporary.rglob("*"):
        if path.is_file():
            _flush(path)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    if keep > 0:
        # Never the one just written: a run that was resumed from an early checkpoint has later ones beside it.
        others = [path for path in list_checkpoints(output_dir) if path != final]
        for old in others[: max(0, len(others) - keep + 1)]:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Takes a checkpoint away at once, whatever interrupts the removal of its files."""
    doomed = checkpoint.with_name(f"{_WRITING}old-{checkpoint.name}")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    """Makes sure that a file is on the disk before its folder is renamed."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def set_later_aside(output_dir: str | Path, first: int) -> list[Path]:
    """
    Renames the checkpoints from the step `first` on, which a run that goes back leaves behind: `latest` must not
    return to them. The best model goes with them where it is of such a step.

    Returns:
        `list[Path]`: their new places, `abandoned-<name>`, with a number where there is one already.
    """
    left = [path for path in list_checkpoints(output_dir) if int(path.name.rpartition("-")[2]) >= first]
    best = Path(output_dir) / "best"
    if left and _step_of_best(best) >= first:
        left.append(best)
    return [_set_aside(path) for path in left]


def _set_aside(path: Path) -> Path:
    place = path.with_name(f"abandoned-{path.name}")
    for number in count(2):
        if not place.exists():
            return path.rename(place)
        place = path.with_name(f"abandoned-{path.name}-{number}")


def _step_of_best(folder: Path) -> float:
    """The step of the best model; one that does not tell is of none."""
    try:
        return json.loads((folder / BEST_FILE).read_text())["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return -1.0


def find_checkpoint(output_dir: str | Path, which: str) -> Path | None:
    """
    Resolves `--resume_from_checkpoint`.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        which (`str`): `"latest"` or a checkpoint's path.

    Returns:
        `Path`, or `None` where the latest is asked for and there is none.

    Raises:
        ValueError: If a named checkpoint does not exist or is incomplete.
    """
    if which == "latest":
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(which)
    if path.name.startswith(_WRITING) or not (path / STATE_FILE).is_file():
        raise ValueError(f"`resume_from_checkpoint` must be a complete checkpoint folder or latest, got {which!r}.")
    return path
