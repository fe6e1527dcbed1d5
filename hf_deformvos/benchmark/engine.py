"""What is benchmarked: a model on one of the backends, stepped through a stream a frame at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers.utils import logging

from ..inference import load_for_inference, resolve_device, size_option
from .clock import StageClock


BACKENDS = ("torch", "compile", "onnx")
DTYPES = ("float32", "bfloat16", "float16", "int8")
_LONG_TERM_SLOTS, _MEMORY_INTERVAL = 3, 8


@dataclass(frozen=True)
class EngineConfig:
    """
    What to load, and how to run it.

    Args:
        model (`str`): folder or Hub repository; for the backend `onnx` a folder that `deformvos export` wrote.
        backend (`str`, defaults to `"torch"`): one of `BACKENDS`.
        dtype (`str`, defaults to `"float32"`): one of `DTYPES`; `int8` is for graphs that were exported so.
        device (`str`, *optional*): such as `"cpu"` or `"cuda"`; the fastest present by default.
        threads (`int`, *optional*): CPU threads of the network; what torch takes by default.
        short_side (`int`, *optional*): bound of the short side at the network, in pixels; the model's by default.

    Raises:
        ValueError: if a value is none of those allowed, or two do not go together.
    """

    model: str
    backend: str = "torch"
    dtype: str = "float32"
    device: str | None = None
    threads: int | None = None
    short_side: int | None = None

    def __post_init__(self):
        for name, value, allowed in (("backend", self.backend, BACKENDS), ("dtype", self.dtype, DTYPES)):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
        if self.dtype == "int8" and self.backend != "onnx":
            raise ValueError(
                f'dtype "int8" needs the backend "onnx" and a folder exported with `--dtype int8`, got the backend '
                f"{self.backend!r}."
            )
        for name in ("threads", "short_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


class Engine:
    """
    A loaded model with its processor.

    Attributes:
        config (`EngineConfig`): what was asked for.
        device (`torch.device`): where it computes.
        num_parameters (`int`, *optional*): of the model; `None` where its graphs do not tell.
    """

    def __init__(self, config: EngineConfig, model, processor):
        self.config = config
        self.model = model
        self.processor = processor
        self.device = resolve_device("cpu" if config.backend == "onnx" else config.device)
        self._size = size_option(processor, config.short_side)
        self.num_parameters = None
        if isinstance(model, torch.nn.Module):
            self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

    @property
    def num_warmup_frames(self) -> int:
        """Frames until the memory bank is full and has been read once."""
        config = getattr(self.model, "config", None)
        slots = getattr(config, "long_term_slots", _LONG_TERM_SLOTS)
        return (slots - 1) * getattr(config, "memory_interval", _MEMORY_INTERVAL) + 2

    def open_session(self):
        """A new session of this engine's device and precision."""
        if self.config.backend == "onnx":
            return self.processor.init_video_session()
        return self.processor.init_video_session(device=self.device, dtype=getattr(torch, self.config.dtype))

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the network sees frames of this size."""
        blank = np.zeros((height, width, 3), dtype=np.uint8)
        return tuple(self._preprocess(blank).shape[-2:])

    def step(
        self, session, image: np.ndarray, given: np.ndarray | None = None, clock: StageClock | None = None
    ) -> np.ndarray:
        """
        One frame, from its pixels to its mask.

        Args:
            session: what [`open_session`] made.
            image (`np.ndarray` of shape `(height, width, 3)`, dtype `uint8`): the next frame.
            given (`np.ndarray` of shape `(height, width)`, *optional*): ids of objects that start here.
            clock ([`StageClock`], *optional*): where the stages are booked.

        Returns:
            `np.ndarray` of shape `(height, width)`, integers: object ids, 0 where there is background.
        """
        clock, shape = clock or StageClock(), image.shape[:2]
        with torch.inference_mode():
            with clock.stage("preprocess"):
                frame = self._preprocess(image)
            if given is not None:
                self.processor.add_inputs_to_inference_session(
                    session, frame_idx=0, input_masks=given, original_size=shape
                )
            # What the model does beside its backbone and its decoder is to read, write and keep its memory.
            with clock.stage("propagation"):
                output = self.model(inference_session=session, frame=frame)
            with clock.stage("postprocess"):
                return self.processor.post_process_id_map(output, original_size=shape)

    def _preprocess(self, image: np.ndarray):
        return self.processor(images=image, return_tensors="pt", **self._size).pixel_values[0]

    @contextmanager
    def watched(self, session, clock: StageClock) -> Iterator[None]:
        """Books the backbone, the decoder and the upsampling of masks inside the model's step to their stages."""
        model, undo = self.model, []
        spans = [(model, "encode_images", "backbone"), (session, "_output", "postprocess")]
        for owner, name, stage in spans:
            function = getattr(owner, name, None)
            if function is not None:
                setattr(owner, name, _booked(function, clock, stage))
                undo.append((owner, name))
        hooks = []
        if isinstance(getattr(model, "decoder", None), torch.nn.Module):
            hooks.append(model.decoder.register_forward_pre_hook(lambda *_: clock.enter("decoder")))
            hooks.append(model.decoder.register_forward_hook(lambda *_: clock.leave()))
        try:
            yield
        finally:
            for owner, name in undo:
                delattr(owner, name)
            for hook in hooks:
                hook.remove()


def _booked(function, clock: StageClock, stage: str):
    """The function with its time booked."""

    def call(*arguments, **keywords):
        with clock.stage(stage):
            return function(*arguments, **keywords)

    return call


def load_engine(config: EngineConfig) -> Engine:
    """
    Load what a configuration names, and set the number of threads of this process.

    Raises:
        ValueError: if the model cannot be loaded or does not fit the backend.
        OSError: if there is no such model.
    """
    logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    model, processor = load_for_inference(config.model, config.device, config.dtype)
    return Engine(config, model, processor)


__all__ = ["BACKENDS", "DTYPES", "Engine", "EngineConfig", "load_engine"]
