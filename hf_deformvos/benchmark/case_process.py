"""
One case in a process of its own: what it holds, or how long it takes to its first mask. Started by path, with a
request in JSON, so that the clock and the memory see every import: `python case_process.py '{"task": "memory", ...}'`.

The last line of the output is the answer, in JSON.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path


# Enough for allocators and thread pools to have grown to what they stay at.
SETTLED_FRAME = 50


def status_bytes(field: str) -> int | None:
    """`VmRSS` (resident memory) or `VmHWM` (its peak) of this process; `None` where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def forget_peak() -> bool:
    """Makes the system count the peak from here on, where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class TorchCase:
    """The package on PyTorch."""

    def __init__(self, request: dict):
        import av  # noqa: F401  part of what is imported, wherever it is needed first
        import transformers  # noqa: F401

        from hf_deformvos.benchmark import engine
        from hf_deformvos.video import VideoReader

        self.request, self._engine_module, self._reader = request, engine, VideoReader

    def load(self):
        """Loads the model and opens a session."""
        config = self._engine_module.EngineConfig(**self.request["engine"])
        self.engine = self._engine_module.load_engine(config)
        self.session = self.engine.open_session()

    def frames(self) -> Iterator:
        """Pictures without end."""
        while True:
            with self._reader(self.request["clip"]) as reader:
                for frame in reader:
                    yield frame.image

    def step(self, image, given):
        """One frame to its mask."""
        return self.engine.step(self.session, image, given)

    def device_bytes(self) -> int | None:
        """The peak of memory allocated on a CUDA device."""
        if self.engine.device.type != "cuda":
            return None
        import torch

        return torch.cuda.max_memory_allocated(self.engine.device)


def measure_memory(case, request: dict) -> dict:
    """Resident bytes after the imports and their peak from there on, loading included."""
    imported = status_bytes("VmRSS")
    is_reset = forget_peak()
    case.load()
    given, settled = read_mask(request), None
    frames = case.frames()
    for index in range(request["frames"]):
        case.step(next(frames), given)
        given = None
        if index + 1 == SETTLED_FRAME:
            settled = status_bytes("VmHWM")
    frames.close()
    return {
        "frames": request["frames"],
        "imported_bytes": imported,
        "peak_bytes": status_bytes("VmHWM"),
        f"peak_bytes_at_frame_{SETTLED_FRAME}": settled,
        "peak_is_after_imports": is_reset,
        "peak_device_bytes": case.device_bytes(),
    }


def measure_start(case, request: dict) -> dict:
    """Seconds from the start of the process to the first mask that the model made, split in three."""
    imported = time.time()
    case.load()
    loaded = time.time()
    frames = case.frames()
    case.step(next(frames), read_mask(request))
    case.step(next(frames), None)
    done = time.time()
    frames.close()
    times = {"import_s": imported - request["began"], "load_s": loaded - imported, "first_mask_s": done - loaded}
    return {**times, "total_s": done - request["began"]}


def read_mask(request: dict):
    """The first frame's ids `(height, width)`."""
    import numpy as np

    return np.load(request["mask"])


def main():
    """Answers the request of the command line."""
    # Beside this file lie modules whose names must not be found before those of packages.
    sys.path.pop(0)
    request = json.loads(sys.argv[1])
    case = TorchCase(request)
    measure = {"memory": measure_memory, "start": measure_start}[request["task"]]
    print(json.dumps(measure(case, request)))


if __name__ == "__main__":
    main()
