"""A release is tried before it is published: loaded in a clean process, and compared with what the package loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from ..modeling_deformvos import DeformVosModel
from ..processing_deformvos import DeformVosProcessor
from . import clean_load
from .hub import redact


TIMEOUT = 600  # seconds; it takes a few
_TOLERANCE = 1e-3  # of a logit: sums of floats in another order, nothing more


def check_release(staged: Path, original: Path) -> float:
    """
    Load a staged release as somebody would who has not got this package, and segment a clip.

    Args:
        staged (`Path`): what is to be published, code included.
        original (`Path`): the folder that it was made from, loaded through the package for comparison.

    Returns:
        `float`: the largest difference of a logit.

    Raises:
        ValueError: if it does not load, weights are missing or left over, or it computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.npz"
        _run(staged, output, Path(folder))
        with np.load(output) as result:
            logits, maps, problems = result["logits"], result["maps"], json.loads(str(result["problems"]))
    found = [f"{name.replace('_', ' ')}: {', '.join(keys[:3])}" for name, keys in problems.items() if keys]
    if found:
        raise ValueError(f"The weights do not fit the configuration; {'; '.join(found)}.")
    model = DeformVosModel.from_pretrained(original).eval()
    expected, expected_maps = clean_load.segment(model, DeformVosProcessor.from_pretrained(original))
    if not np.isfinite(expected).all():
        raise ValueError("The model gives no finite numbers.")
    if logits.shape != expected.shape:
        raise ValueError(f"Loaded from the release, the model gives logits {logits.shape}, not {expected.shape}.")
    difference = float(np.abs(logits - expected).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(f"Loaded from the release, the model's logits differ by up to {difference:.3g}.")
    if (changed := float((maps != expected_maps).mean())) > _TOLERANCE:
        raise ValueError(f"Loaded from the release, the model's masks differ in {100 * changed:.1f} % of the pixels.")
    return difference


def _run(staged: Path, output: Path, folder: Path) -> None:
    """The clean process: no package, no network, no token, no cache of anybody's."""
    private = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHONSTARTUP")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    program = Path(clean_load.__file__).read_text(encoding="utf-8")
    arguments = [str(staged.resolve()), str(output), str(torch.get_num_threads())]
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"Loading the release in a clean process took longer than {TIMEOUT} s.") from error
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise ValueError(f"The release does not load in a clean process: {redact(lines[-1])[:500]}")


__all__ = ["check_release"]
