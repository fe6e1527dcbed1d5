"""Memory and time to the first mask, each measured in a process of its own."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .case_process import SETTLED_FRAME
from .clip import Clip
from .engine import EngineConfig


_CHILD = Path(__file__).with_name("case_process.py")
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def measure_memory(config: EngineConfig, clip: Clip, num_objects: int, num_frames: int) -> dict:
    """
    Resident memory of a process that follows objects through so many frames.

    Returns:
        `dict`: `imported_bytes` with every library imported and nothing loaded; `peak_bytes`, the most from there on;
        `above_imports_bytes`, their difference; `growth_bytes`, by how much the peak rose after frame 50 (`None`
        for fewer frames); `peak_device_bytes` on a CUDA device. Values that the system does not tell are `None`.

    Raises:
        ValueError: if the process fails, with its last words.
    """
    answer = _ask(config, clip, num_objects, {"task": "memory", "frames": num_frames})
    peak, settled = answer["peak_bytes"], answer.pop(f"peak_bytes_at_frame_{SETTLED_FRAME}")
    known = peak is not None and answer["imported_bytes"] is not None
    return {
        **answer,
        "above_imports_bytes": peak - answer["imported_bytes"] if known else None,
        "growth_bytes": None if settled is None else peak - settled,
    }


def measure_start(config: EngineConfig, clip: Clip, num_runs: int = 3) -> dict:
    """
    Seconds that a process takes from its start to the first mask that the model made: the second frame's, the first
    frame's being given.

    Returns:
        `dict`: medians of `import_s`, `load_s`, `first_mask_s` and `total_s`, and `runs`.
    """
    answers = [_ask(config, clip, 1, {"task": "start"}) for _ in range(num_runs)]
    return {**{key: round(statistics.median(a[key] for a in answers), 3) for key in answers[0]}, "runs": num_runs}


def _ask(config: EngineConfig, clip: Clip, num_objects: int, request: dict) -> dict:
    """The answer of a fresh process."""
    paths = [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    with tempfile.TemporaryDirectory() as folder:
        mask = Path(folder) / "mask.npy"
        np.save(mask, clip.mask_of(num_objects))
        request |= {"engine": asdict(config), "clip": str(clip.path), "mask": str(mask), "began": time.time()}
        command = [sys.executable, str(_CHILD), json.dumps(request)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ValueError(
            f"A process that measures {request['task']} ended with exit code {done.returncode}: "
            f"{last_error(done.stderr)}"
        )
    return json.loads(lines[-1])


def last_error(text: str) -> str:
    """The line of a traceback that names the error; the last line of other texts."""
    lines = text.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["it said nothing"])[-1]


__all__ = ["last_error", "measure_memory", "measure_start"]
