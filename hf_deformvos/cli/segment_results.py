"""What `deformvos segment` says in results.json, kept as the frames come, and written at the end."""

import errno
import itertools
import json
import os
import platform
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO


_STAGES = ("decode", "preprocess", "network", "postprocess", "write_mask", "write_overlay")


class _Median:
    """The median of more numbers than can be kept: they are counted by their first three digits."""

    def __init__(self):
        self._counts: Counter[float] = Counter()

    def add(self, value: float) -> None:
        """Counts one number."""
        self._counts[float(f"{value:.2e}")] += 1

    def value(self) -> float:
        """Of the numbers so far, of which there is at least one."""
        values = sorted(self._counts)
        counts = list(itertools.accumulate(self._counts[value] for value in values))
        return values[bisect_left(counts, counts[-1] / 2)]


@dataclass
class Results:
    """
    What has been written so far; filled by the encoding thread, read when that has ended. `lines` is a file that holds
    what results.json says of each frame, so that memory does not grow with the video; more than `num_frames` lines
    where writing the last one failed. `last_index` is the last frame's place in the video.
    """

    lines: TextIO
    num_frames: int = 0
    last_index: int = -1
    object_ids: set[int] = field(default_factory=set)
    medians: dict[str, _Median] = field(default_factory=lambda: defaultdict(_Median))

    def record(self, frame, id_map, mask_name: str, given) -> None:
        """Adds what results.json says of a frame; `given` is the mask that it was given, if any."""
        self.object_ids.update(set() if given is None else set(given[given > 0].tolist()))
        record = {"index": frame.index, "timestamp": round(frame.timestamp, 6), "mask": f"masks/{mask_name}"}
        if frame.name is not None:
            record["source"] = frame.name
        record["objects"] = _areas_and_boxes(id_map, sorted(self.object_ids))
        # Written through, so that only whole lines count where the disk is full.
        print(json.dumps(record), file=self.lines, flush=True)
        self.num_frames += 1
        self.last_index = frame.index

    def book(self, seconds: dict[str, float]) -> None:
        """Adds the seconds that stages of one frame took."""
        for stage, taken in seconds.items():
            self.medians[stage].add(taken)

    def frame_lines(self) -> Iterator[str]:
        """What stands between the brackets of results.json's frames."""
        self.lines.seek(0)
        for index, line in enumerate(itertools.islice(self.lines, self.num_frames)):
            yield (",\n    " if index else "\n    ") + line.rstrip("\n")
        if self.num_frames:
            yield "\n  "

    def timings(self, wall_seconds: float) -> dict:
        """Medians of each stage and the rate of the whole, which overlaps them."""
        found = self.medians
        medians = {f"{stage}_ms": round(1e3 * found[stage].value(), 3) for stage in _STAGES if stage in found}
        fps = self.num_frames / wall_seconds if wall_seconds else None
        return {"median": medians, "wall_seconds": round(wall_seconds, 3), "fps": fps and round(fps, 3)}


def write_results(output: Path, head: dict, results: Results) -> None:
    """Writes results.json, whole or not at all; one line a frame, as indented boxes would take one a number."""
    opening = json.dumps(head, indent=2).removesuffix("\n}")
    path, part = output / "results.json", output / ".results.json.part"
    with writing(path, "--output"):
        try:
            with part.open("w", encoding="utf-8") as file:
                file.write(opening + ',\n  "frames": [')
                file.writelines(results.frame_lines())
                file.write("]\n}\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _areas_and_boxes(id_map, object_ids: list[int]) -> dict[str, dict]:
    """Area in pixels and box `[x0, y0, x1, y1]` (x1 and y1 exclusive) of each object; no box where it is not seen."""
    import numpy as np

    objects = {}
    for object_id in object_ids:
        inside = id_map == object_id
        rows, area = np.flatnonzero(inside.any(axis=1)), int(np.count_nonzero(inside))
        box = None
        if area:
            columns = np.flatnonzero(inside.any(axis=0))
            box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        objects[str(object_id)] = {"area": area, "box": box}
    return objects


def versions() -> dict[str, str]:
    """What the results depend on."""
    import av
    import torch
    import transformers

    from hf_deformvos import __version__

    return {
        "hf_deformvos": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "av": av.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Errors of writing say what could not be written, and what to do."""
    try:
        yield
    except OSError as error:
        cure = "free space there, or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
        reason = error.strerror or error
        raise OSError(f"{path} cannot be written ({reason}); {cure} another {option}.") from error


__all__ = ["Results", "versions", "write_results", "writing"]
