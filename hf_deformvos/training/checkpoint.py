"""Checkpoints that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging


logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
_WRITING = ".writing-"
_PATTERN = re.compile(r"checkpoint-(\d+)")


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
