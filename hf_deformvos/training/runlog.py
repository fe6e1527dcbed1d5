"""`log.jsonl` and TensorBoard: one line a report, none twice."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image


class RunLog:
    """
    A run's log file and, where wanted, TensorBoard files. Only the main process writes.

    Args:
        folder (`Path`): The run's folder.
        accelerator (`Accelerator`): The run's processes.
        with_tracking (`bool`): Whether TensorBoard files are written.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, with_tracking: bool):
        self.folder, self.path = folder, folder / "log.jsonl"
        self._accelerator, self._with_tracking = accelerator, with_tracking

    def start(self, step: int, settings: dict) -> None:
        """
        Begins or continues the log after `step`.

        What an interrupted run has logged beyond the checkpoint that is resumed from is dropped, as is a line that it
        was writing: those steps are done, and logged, once more.
        """
        if self._accelerator.is_main_process and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
            temporary = self.path.with_suffix(".writing")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, self.path)
        if self._with_tracking:
            values = {name: str(value) for name, value in settings.items()}
            options = {"tensorboard": {"purge_step": step + 1}} if step else {}
            self._accelerator.init_trackers("deformvos", config=values, init_kwargs=options)

    def write(self, line: dict) -> None:
        """Appends a line; it has a `step`."""
        if not self._accelerator.is_main_process:
            return
        with open(self.path, "a") as handle:
            handle.write(json.dumps(line) + "\n")
        if self._with_tracking:
            figures = {name: value for name, value in line.items() if name != "step" and value is not None}
            self._accelerator.log(figures, step=line["step"])

    def draw(self, step: int, strips: dict[str, np.ndarray]) -> None:
        """Writes pictures `(height, width, 3)`, uint8, by sequence, to `overlays/step-<step>/`."""
        if not strips or not self._accelerator.is_main_process:
            return
        folder = self.folder / "overlays" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, strip in strips.items():
            Image.fromarray(strip).save(folder / f"{name.replace('/', '_')}.png")
        if self._with_tracking:
            images = {f"overlays/{name}": strip[None] for name, strip in strips.items()}
            self._accelerator.get_tracker("tensorboard").log_images(images, step=step, dataformats="NHWC")

    def lines(self) -> list[dict]:
        """What has been logged so far."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def close(self) -> None:
        """Ends the TensorBoard files."""
        if self._with_tracking:
            self._accelerator.end_training()


def without_nonfinite(line: dict) -> dict:
    """A line as JSON knows it, which has no NaN and no infinity: null stands for them."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in line.items()}


def _step_of(line: str) -> float:
    """The step of a line; a broken line belongs to none."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
