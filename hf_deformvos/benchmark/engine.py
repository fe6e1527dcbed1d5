"""What is benchmarked: a model on one of the backends, stepped through a stream a frame at a time."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch._dynamo
from transformers.utils import logging

from ..evaluation.runner import count_parameters
from ..inference import load_for_inference, resolve_device, size_option
from .clock import StageClock


BACKENDS = ("torch", "compile", "onnx")
DTYPES = ("float32", "bfloat16", "float16", "int8")
_SETTINGS_FILE = "deformvos_export.json"  # of an exported folder
# In an exported model the graph that reads the memory also decodes.
_GRAPH_STAGES = {"encode": "backbone"}


@dataclass(frozen=True)
class EngineConfig:
    """
    What to load, and how to run it.

    Args:
        model (`str`): folder or Hub repository; for the backend `onnx` a folder that `deformvos export` wrote.
        backend (`str`, defaults to `"torch"`): one of `BACKENDS`.
        dtype (`str`, *optional*):
            One of `DTYPES`, float32 by default. Exported graphs have the one that they were exported in.
        device (`str`, *optional*): such as `"cpu"` or `"cuda"`; the fastest present by default.
        threads (`int`, *optional*): CPU threads of the network; what torch takes by default.
        short_side (`int`, *optional*): short side at the network, in pixels; the model's by default.

    Raises:
        ValueError: if a value is none of those allowed, or two do not go together.
    """

    model: str
    backend: str = "torch"
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    short_side: int | None = None

    def __post_init__(self):
        for name, value, allowed in (("backend", self.backend, BACKENDS), ("dtype", self.dtype, DTYPES)):
            if value not in (None, *allowed):
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
        config (`EngineConfig`): what was asked for, its dtype filled in.
        device (`torch.device`): where it computes.
        num_parameters (`int`): of the model.
    """

    def __init__(self, config: EngineConfig, model, processor):
        self.config = config
        self.model = model
        self.processor = processor
        self.device = resolve_device("cpu" if config.backend == "onnx" else config.device)
        self._size = size_option(processor, config.short_side)
        self.num_parameters = count_parameters(model)

    @property
    def num_warmup_frames(self) -> int:
        """Frames until the memory bank is full, and has been read with its newest frame as the previous one, too."""
        config = self.model.config if isinstance(self.model.config, dict) else self.model.config.to_dict()
        # A compiler takes the two for different programs.
        return (config["long_term_slots"] - 1) * config["memory_interval"] + 3

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
        with ExitStack() as stack:
            stack.enter_context(_replaced(session, "_output", lambda f: _booked(f, clock, "postprocess")))
            if self.config.backend == "onnx":
                stack.enter_context(_replaced(self.model, "graphs", lambda f: _booked_graphs(f, clock)))
            else:
                stack.enter_context(_replaced(self.model, "encode_images", lambda f: _booked(f, clock, "backbone")))
                for hook in _booking_hooks(self.model.decoder, clock, "decoder"):
                    stack.callback(hook.remove)
            yield


@contextmanager
def _replaced(owner, name: str, change: Callable[[Callable], Callable]) -> Iterator[None]:
    """An object's function changed for a while, be it its own or its class's."""
    is_own, function = name in vars(owner), getattr(owner, name)
    setattr(owner, name, change(function))
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)


def _booked(function: Callable, clock: StageClock, stage: str) -> Callable:
    """The function with its time booked."""

    def call(*arguments, **keywords):
        with clock.stage(stage):
            return function(*arguments, **keywords)

    return call


def _booked_graphs(graphs: Callable, clock: StageClock) -> Callable:
    """What runs graphs by name, each booked to its stage."""

    def call(name: str, inputs: dict):
        with clock.stage(_GRAPH_STAGES.get(name, "propagation")):
            return graphs(name, inputs)

    return call


def _booking_hooks(module: torch.nn.Module, clock: StageClock, stage: str) -> list:
    return [
        module.register_forward_pre_hook(lambda *_: clock.enter(stage)),
        module.register_forward_hook(lambda *_: clock.leave()),
    ]


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
    is_exported = os.path.isfile(os.path.join(config.model, _SETTINGS_FILE))
    if is_exported != (config.backend == "onnx"):
        found = "exported graphs" if is_exported else "no exported graphs"
        raise ValueError(
            f"The backend {config.backend!r} does not run {config.model}, which holds {found}. `deformvos export "
            "MODEL OUT --format onnx` makes a folder for the backend onnx; torch and compile take the model itself."
        )
    if is_exported:
        config = replace(config, dtype=_exported_dtype(config))
        model, processor = load_for_inference(config.model, config.device)
        return Engine(config, model, processor)
    config = replace(config, dtype=config.dtype or "float32")
    model, processor = load_for_inference(config.model, config.device, config.dtype)
    if config.backend == "compile":
        compile_parts(model)
    return Engine(config, model, processor)


def _exported_dtype(config: EngineConfig) -> str:
    """The precision of an exported folder's graphs, which must be the one asked for, if any was."""
    from ..export.onnx_session import read_settings

    settings = read_settings(config.model)
    if settings["format"] != "onnx":
        raise ValueError(f"{config.model} holds graphs in {settings['format']} format; export with `--format onnx`.")
    if config.dtype not in (None, settings["dtype"]):
        raise ValueError(
            f"{config.model} was exported in {settings['dtype']}, got `dtype` {config.dtype!r}; leave it out, or "
            "export again."
        )
    return settings["dtype"]


def compile_parts(model, compiler: str = "inductor"):
    """
    Compile the parts of a network in place. What a session does between them stays as it is.

    Args:
        model ([`DeformVosModel`]): the network, loaded for inference.
        compiler (`str`, defaults to `"inductor"`): `backend` of `torch.compile`.

    Raises:
        ValueError: if there is no C++ compiler, which PyTorch needs for a CPU.
    """
    if model.device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise ValueError('The backend "compile" needs a C++ compiler on a CPU, and none was found; install g++.')
    # A layer has half a dozen forms (1 to 3 frames remembered, the last one among them or not) for each number of
    # groups, and all layers share their code: beyond the usual 8 forms, PyTorch would run further ones uncompiled.
    settings = torch._dynamo.config
    name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"  # before PyTorch 2.7
    setattr(settings, name, 256)
    setattr(settings, f"fail_on_{name.replace('size_', '')}_hit", True)
    parts = [model.backbone, model.token_projection, *model.layers, model.identity_bank, model.decoder]
    for part in parts:
        # Not `part.compile()`: hooks, which tell the stages apart, would become part of the graph.
        part.forward = torch.compile(part.forward, backend=compiler, dynamic=False)


def forget_compiled():
    """
    Drop what was compiled for other frames or numbers of objects, before a case of its own: PyTorch 2.13 stumbles
    (IndexError) when it explains to itself why what was compiled for three remembered frames does not fit one.
    """
    torch._dynamo.reset()


__all__ = ["BACKENDS", "DTYPES", "Engine", "EngineConfig", "compile_parts", "forget_compiled", "load_engine"]
