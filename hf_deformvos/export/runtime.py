"""Exported folders under the package's own API: tensors in and out, for the commands and for comparisons."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch

from ..inference import resolve_device
from ..modeling_deformvos import DeformVosVideoOutput
from .graphs import MIN_SIDE
from .onnx_session import (
    GRAPHS,
    Inputs,
    OnnxDeformVos,
    OnnxDeformVosProcessor,
    OnnxGraphs,
    OnnxInferenceSession,
    read_settings,
)


# What a session may be given in place of the configuration's; the rest is fixed in the graphs.
_OVERRIDES = ("memory_interval", "long_term_slots")


class TorchGraphs:
    """
    The graphs of a folder as programs of `torch.export`.

    Args:
        folder (`str` or `os.PathLike`): what `deformvos export --format torch` wrote.
        outputs (`dict[str, list[str]]`): names of each graph's outputs.

    Raises:
        ValueError: if a program is missing or damaged.
    """

    def __init__(self, folder: str | os.PathLike, outputs: dict[str, list[str]]):
        self._programs = {name: _load_program(folder, f"{name}.pt2") for name in GRAPHS}
        self._outputs = outputs

    @torch.no_grad()
    def __call__(self, name: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs of a graph by name; `ValueError` for a frame that is too small for the programs."""
        if name == "encode" and min(inputs["pixel_values"].shape[-2:]) < MIN_SIDE:
            height, width = inputs["pixel_values"].shape[-2:]
            raise ValueError(
                f"A frame's sides must be at least {MIN_SIDE} pixels at the network for programs of torch.export, got "
                f"{height}x{width} (height x width); ask for a larger `short_side`, or export with `--format onnx`."
            )
        tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in inputs.items()}
        outputs = self._programs[name](**tensors)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return dict(zip(self._outputs[name], (output.numpy() for output in outputs), strict=True))


def _load_program(folder: str | os.PathLike, file: str) -> torch.nn.Module:
    path = Path(folder, file)
    with _reading(folder, file):
        # Of what is no whole archive `torch.export.load` logs a traceback.
        ZipFile(path).close()
        return torch.export.load(path).module()


@contextmanager
def _reading(folder: str | os.PathLike, *files: str) -> Iterator[None]:
    """Errors of reading files say which cannot be read, and what to do."""
    try:
        yield
    except Exception as error:  # each reader has its own
        if isinstance(error.__cause__, ImportError):  # of onnxruntime; the files may be whole
            raise
        file = next((file for file in files if file in str(error)), " or ".join(files))
        raise ValueError(
            f"{file} of the exported model {os.fspath(folder)} cannot be read ({error}); export it again."
        ) from error


class ExportedProcessor(OnnxDeformVosProcessor):
    """The processor of an exported model, which takes and returns tensors as [`DeformVosProcessor`] does."""

    @property
    def image_processor(self) -> OnnxDeformVosProcessor:
        """What holds `size`, as in [`DeformVosProcessor`]."""
        return self

    def __call__(self, images, return_tensors: str | None = "pt", size: dict | None = None) -> Inputs:
        """Prepare one frame or several; see [`DeformVosProcessor`]."""
        inputs = self.prepare(images, size)
        if return_tensors != "pt":
            return inputs
        pixels = inputs.pixel_values
        listed = isinstance(pixels, list)
        tensors = [torch.from_numpy(frame) for frame in pixels] if listed else torch.from_numpy(pixels)
        return Inputs(tensors, inputs.original_sizes)

    def init_video_session(
        self,
        video=None,
        inference_device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        short_side: int | None = None,
        memory_interval: int | None = None,
        long_term_slots: int | None = None,
        device: torch.device | str | None = None,
    ) -> OnnxInferenceSession:
        """Open a session; see [`DeformVosProcessor.init_video_session`]. On the CPU, in float32."""
        if dtype not in (None, "float32", torch.float32):
            raise ValueError(f"An exported model takes float32 frames, got {dtype}; export it with another `dtype`.")
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"An exported model computes on the CPU, got `device` {device}; leave it out.")
        return super().init_video_session(video, short_side, memory_interval, long_term_slots)

    def post_process_masks(self, masks, original_sizes: list[tuple[int, int]], *args, **kwargs) -> list:
        """See [`DeformVosProcessor.post_process_masks`]."""
        masks = [masks] if getattr(masks, "ndim", None) == 4 else masks
        arrays = [np.asarray(logits) for logits in masks]
        return [
            torch.from_numpy(array) for array in super().post_process_masks(arrays, original_sizes, *args, **kwargs)
        ]

    def post_process_id_map(self, output: DeformVosVideoOutput, original_size: tuple[int, int]) -> np.ndarray:
        """See [`DeformVosProcessor.post_process_id_map`]."""
        arrays = DeformVosVideoOutput(output.frame_idx, output.object_ids, np.asarray(output.pred_masks))
        return super().post_process_id_map(arrays, original_size)


class ExportedDeformVos(OnnxDeformVos):
    """An exported model that takes and returns tensors as [`DeformVosModel`] does in inference."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, graphs, settings: dict):
        super().__init__(graphs, settings)
        self._num_parameters = settings["num_parameters"]

    @staticmethod
    def _make_processor(settings: dict) -> ExportedProcessor:
        return ExportedProcessor(**settings["processor"])

    def __call__(
        self, inference_session: OnnxInferenceSession, frame: torch.Tensor | None = None, frame_idx: int | None = None
    ) -> DeformVosVideoOutput:
        """Segment one frame of a session; see [`DeformVosModel.forward`]."""
        if isinstance(frame, torch.Tensor):
            frame = frame.detach().float().cpu().numpy()
        output = super().__call__(inference_session, frame, frame_idx)
        return DeformVosVideoOutput(output.frame_idx, output.object_ids, torch.from_numpy(output.pred_masks))

    def num_parameters(self) -> int:
        """Of the model that was exported."""
        return self._num_parameters


def load_exported(
    folder: str | os.PathLike, device: str | None = None, dtype: str = "float32", overrides: dict | None = None
) -> tuple[ExportedDeformVos, ExportedProcessor]:
    """
    Load what `deformvos export` wrote; see [`load_for_inference`]. It runs on as many threads as PyTorch would take.

    Raises:
        ValueError: if another device or precision is asked for, an override is fixed in the graphs, a file is missing
            or damaged, or onnxruntime is needed and not there.
    """
    settings = read_settings(folder)
    if device is not None and resolve_device(device).type != "cpu":
        raise ValueError(f"The exported model {os.fspath(folder)} runs on the CPU, got `device` {device!r}.")
    if dtype != "float32":
        raise ValueError(
            f"The exported model {os.fspath(folder)} takes and returns float32 ({settings['dtype']} inside), got "
            f"`dtype` {dtype!r}; leave it out."
        )
    fixed = sorted(set(overrides or {}) - set(_OVERRIDES))
    if fixed:
        raise ValueError(
            f"An exported model takes other values of {' and '.join(_OVERRIDES)} alone, got {', '.join(fixed)}: "
            "override it in the model's config.json, and export again."
        )
    settings["config"].update(overrides or {})
    if settings["format"] == "onnx":
        with _reading(folder, *(f"{name}.onnx" for name in GRAPHS)):
            graphs = OnnxGraphs(folder, torch.get_num_threads())
    else:
        graphs = TorchGraphs(folder, settings["outputs"])
    model = ExportedDeformVos(graphs, settings)
    return model, model.processor


__all__ = ["ExportedDeformVos", "ExportedProcessor", "TorchGraphs", "load_exported"]
