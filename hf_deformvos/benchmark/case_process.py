"""
One case in a process of its own: what it holds, or how long it takes to its first mask. Started by path, with a
request in JSON, so that the clock and the memory see every import: `python case_process.py '{"task": "memory", ...}'`.

The last line of the output is the answer, in JSON.
"""

import importlib.util
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


class OnnxCase:
    """
    An exported folder, run by the module that lies in it, with onnxruntime, NumPy, Pillow and PyAV: neither PyTorch
    nor this package is imported.
    """

    def __init__(self, request: dict):
        import av
        import onnxruntime  # noqa: F401

        folder = Path(request["engine"]["model"])
        spec = importlib.util.spec_from_file_location("deformvos_onnx", folder / "deformvos_onnx.py")
        self.request, self._av = request, av
        self._module = sys.modules["deformvos_onnx"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)

    def load(self):
        """Loads the graphs and opens a session."""
        engine = self.request["engine"]
        self.model = self._module.OnnxDeformVos.from_pretrained(engine["model"], num_threads=engine["threads"])
        self.processor = self.model.processor
        self.session = self.processor.init_video_session()
        self.size = {}
        if engine["short_side"]:
            self.size = {"size": {**self.processor.size, "shortest_edge": engine["short_side"]}}

    def frames(self) -> Iterator:
        """Pictures without end."""
        while True:
            with self._av.open(self.request["clip"]) as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")

    def step(self, image, given):
        """One frame to its mask."""
        shape = image.shape[:2]
        if given is not None:
            self.processor.add_inputs_to_inference_session(
                self.session, frame_idx=0, input_masks=given, original_size=shape
            )
        frame = self.processor(images=image, **self.size).pixel_values[0]
        return self.processor.post_process_id_map(self.model(inference_session=self.session, frame=frame), shape)

    def device_bytes(self) -> None:
        """Nothing runs on another device."""
        return None


CASES = {"torch": TorchCase, "compile": TorchCase, "onnx": OnnxCase}


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
    # Linux counts pages a thread in batches: a peak may be read some pages below an earlier reading of it.
    readings = [each for each in (settled, status_bytes("VmHWM")) if each is not None]
    return {
        "frames": request["frames"],
        "imported_bytes": imported,
        "peak_bytes": max(readings, default=None),
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
    case = CASES[request["engine"]["backend"]](request)
    measure = {"memory": measure_memory, "start": measure_start}[request["task"]]
    print(json.dumps(measure(case, request)))


if __name__ == "__main__":
    main()
