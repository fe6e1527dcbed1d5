"""An exported encoder in int8: ranges from frames of a video, and those convolutions left in float that it hurts."""

import copy
import logging
import os
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..video import VideoReader
from .onnx_session import OnnxDeformVosProcessor


# Frames taken from the calibration video, evenly over its first _SPAN.
_NUM_FRAMES = 12
_SPAN = 240
# A convolution that alone moves an output of the encoder by more than this share of its norm stays in float. Of
# the released student these are the first four, whose few channels differ in scale by orders of magnitude.
_MAX_ERROR = 0.05
_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "bunny.mp4"


def quantize(folder: Path, calibration: str | os.PathLike | None = None) -> dict:
    """
    Quantise `encode.onnx` of an exported folder in place: weights a channel, activations a tensor, 8 bits, as QDQ
    pairs around convolutions and the ReLU6 behind them. The other graphs stay in float: `read` in int8 would be exact
    enough, but no faster.

    Args:
        folder (`Path`): what was exported in float32.
        calibration (`str` or `os.PathLike`, *optional*): a video; the example clip of a checkout by default.

    Returns:
        `dict`: what was done: `calibration`, `num_convolutions`, `float_convolutions` and the relative `errors` of the
        encoder's outputs.

    Raises:
        ValueError: if there is no video to calibrate on.
    """
    frames = _prepare_frames(folder, _calibration_video(calibration))
    path = folder / "encode.onnx"
    with _quiet():
        quantizer = _Quantizer(path, frames)
        sensitive = [name for name in quantizer.blocks if max(quantizer.errors([name])) > _MAX_ERROR]
        chosen = [name for name in quantizer.blocks if name not in sensitive]
        errors = quantizer.errors(chosen)
        quantizer.write(chosen, path)
    return {
        "calibration": Path(calibration or _EXAMPLE).name,
        "num_convolutions": len(quantizer.blocks),
        "float_convolutions": sensitive,
        "errors": [round(error, 4) for error in errors],
    }


def check_calibration(calibration: str | os.PathLike | None = None):
    """
    Looks at a video before the export that [`quantize`] needs it for.

    Raises:
        ValueError: if there is none, or it has no frame.
    """
    with VideoReader(_calibration_video(calibration), max_frames=1):
        pass


def _calibration_video(calibration: str | os.PathLike | None) -> str:
    if calibration is not None:
        return os.fspath(calibration)
    if not _EXAMPLE.is_file():
        raise ValueError("int8 needs frames to calibrate on, and the example clip is not here: give a video of yours.")
    return str(_EXAMPLE)


def _prepare_frames(folder: Path, video: str) -> list[dict[str, np.ndarray]]:
    """Inputs of the encoder on frames of the video, which is read twice: only at its end is its length known."""
    processor = OnnxDeformVosProcessor.from_pretrained(folder)
    with VideoReader(video, max_frames=_SPAN) as reader:
        num_frames = sum(1 for _ in reader)
    picked = np.linspace(0, num_frames - 1, _NUM_FRAMES).round()
    with VideoReader(video, max_frames=_SPAN) as reader:
        images = (frame.image for index, frame in enumerate(reader) if index in picked)
        return [{"pixel_values": processor(image).pixel_values} for image in images]


class _Quantizer:
    """Quantises chosen convolutions of a graph, again and again from one calibration."""

    def __init__(self, path: Path, inputs: list[dict[str, np.ndarray]]):
        import onnx

        self._model = onnx.load(path)
        self._inputs = inputs[len(inputs) // 2]
        self._expected = _run(self._model, self._inputs)
        self._ranges = _calibrate(path, inputs)
        consumers = defaultdict(list)
        for node in self._model.graph.node:
            for name in node.input:
                consumers[name].append(node)
        # A ReLU6 goes with its convolution: apart from it, its range would be cut off, or lost.
        self.blocks = {
            node.name: [node.name, *(n.name for n in consumers[node.output[0]] if n.op_type == "Clip")]
            for node in self._model.graph.node
            if node.op_type == "Conv"
        }

    def quantized(self, chosen: list[str]):
        """The model with these convolutions in int8."""
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        quantizer = QDQQuantizer(
            copy.deepcopy(self._model),
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self._ranges,
            nodes_to_quantize=[node for name in chosen for node in self.blocks[name]],
            nodes_to_exclude=[],
            op_types_to_quantize=["Conv", "Clip"],
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return quantizer.model.model

    def errors(self, chosen: list[str]) -> list[float]:
        """Of each output the root mean square difference from float, as a share of the output's own."""
        outputs = _run(self.quantized(chosen), self._inputs)
        return [
            float(np.linalg.norm(output - expected) / np.linalg.norm(expected))
            for output, expected in zip(outputs, self._expected, strict=True)
        ]

    def write(self, chosen: list[str], path: Path):
        """Write the model with these convolutions in int8."""
        import onnx

        onnx.save(self.quantized(chosen), str(path))
        onnx.checker.check_model(str(path), full_check=True)


def _run(model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def _calibrate(path: Path, inputs: list[dict[str, np.ndarray]]):
    """Smallest and largest value of every tensor over the frames."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    class Frames(CalibrationDataReader):
        def __init__(self):
            self._left = iter(inputs)

        def get_next(self):
            return next(self._left, None)

    augmented = path.with_name("augmented.onnx")
    calibrator = create_calibrator(
        path, ["Conv", "Clip"], augmented_model_path=str(augmented), calibrate_method=CalibrationMethod.MinMax
    )
    try:
        calibrator.collect_data(Frames())
        return calibrator.compute_data()
    finally:
        augmented.unlink(missing_ok=True)


@contextmanager
def _quiet():
    """Without onnxruntime's advice on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


__all__ = ["quantize"]
