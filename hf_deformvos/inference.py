"""Loading for inference, as the commands do it: checked, folded, on the device and in the precision asked for."""

import ctypes
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import count
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import cached_file, logging

from .modeling_deformvos import DeformVosModel
from .processing_deformvos import size_option


logger = logging.get_logger(__name__)

# In a folder that `deformvos export` wrote.
SETTINGS_FILE = "deformvos_export.json"

# glibc's mallopt: when freed memory goes back to the system, and from which size on buffers are mapped singly.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Frames between two returns of freed memory to the system: it takes some milliseconds, and as much again to get back.
_FRAMES_BETWEEN_TRIMS = 250
# With these instructions an x86 processor computes bfloat16 natively, about twice as fast as float32.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")
# Elsewhere bfloat16 must be so much faster than float32 to be worth its rounding.
_WORTHWHILE = 0.75


@dataclass(frozen=True)
class Preset:
    """
    A trade of accuracy for speed.

    Attributes:
        dtype (`str`, *optional*): precision of the network; [`fastest_dtype`] by default.
        short_side (`int`, *optional*): the frame's short side at the network, in pixels; the model's by default.
    """

    dtype: str | None = None
    short_side: int | None = None

    def resolve_dtype(self, device: torch.device | str) -> str:
        """The precision on a device, by name."""
        return self.dtype or fastest_dtype(torch.device(device).type)


PRESETS = {
    "accurate": Preset(dtype="float32"),
    "standard": Preset(),
    "fast": Preset(short_side=320),
}


@cache
def fastest_dtype(device_type: str) -> str:
    """
    The precision in which a kind of device is fastest: `"bfloat16"` where it computes that natively, else `"float32"`.

    An x86 processor's instructions tell, where PyTorch is recent enough to list them. Of other CPUs a short
    measurement does, once a process: emulated bfloat16 is many times slower than float32. It can go wrong where other
    programs run.
    """
    if device_type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device_type != "cpu":
        return "float32"
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if known.get("architecture") == "x86_64":
        return "bfloat16" if any(known.get(name) for name in _BFLOAT16_INSTRUCTIONS) else "float32"
    seconds = {name: _convolution_seconds(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return "bfloat16" if seconds["bfloat16"] < _WORTHWHILE * seconds["float32"] else "float32"


@torch.inference_mode()
def _convolution_seconds(dtype: torch.dtype) -> float:
    """Seconds of one convolution of the network's kind; the least of some, since other programs run as well."""
    pixels, kernel = torch.ones(1, 256, 31, 55, dtype=dtype), torch.ones(256, 256, 3, 3, dtype=dtype)
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        torch.nn.functional.conv2d(pixels, kernel)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


@cache
def keep_freed_memory() -> Callable[[], None]:
    """
    Let this process keep the memory that it frees, where glibc manages it (Linux): a frame's feature maps take the
    places of the last frame's. By default each goes back to the system and is mapped, and cleared, anew.

    Returns:
        A function that gives back, once, all that is free. Aligned blocks leave gaps that the next ones do not fit:
        without it, what is kept grows by some kilobytes a frame.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return lambda: None
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    return lambda: malloc_trim(0)


def _reuse_memory(model: DeformVosModel):
    """See [`keep_freed_memory`]; all that is free goes back to the system every so many frames."""
    give_back, frames = keep_freed_memory(), count(1)

    def tidy(*_):
        if next(frames) % _FRAMES_BETWEEN_TRIMS == 0:
            give_back()

    model.register_forward_hook(tidy)


def describe_device(device: torch.device) -> str:
    """What computes, as records name it: a GPU by its name where PyTorch knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else device.type.upper()


def synchronize(device: torch.device | str) -> None:
    """Waits for a device that computes on its own, so that a clock shows its time."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def resolve_device(device: str | None) -> torch.device:
    """
    The device of that name, by default CUDA, then MPS, then the CPU.

    Raises:
        ValueError: if there is no such device here, or it does not compute.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"`device` must be one that PyTorch can use here (cpu, cuda, cuda:1, mps ...), got {device!r} "
            f"({str(error).splitlines()[0]}); leave it out to take the fastest one."
        ) from error
    return torch.device(device)


def load_for_inference(
    name: str, device: str | None = None, dtype: str = "float32", overrides: dict | None = None
) -> tuple[DeformVosModel, object]:
    """
    Load a model, as [`prepare_for_inference`] makes it, and its processor; or an exported model and its processor,
    which sessions take alike.

    Args:
        name (`str`): a folder, that of `deformvos export` among them, or a Hub repository.
        device (`str`, *optional*): see [`resolve_device`].
        dtype (`str`, defaults to `"float32"`): precision of the weights; folding is done before the cast.
        overrides (`dict`, *optional*): values for fields of the model's configuration.

    Raises:
        ValueError: see [`load_checkpoint`]; for an exported model also if it is asked for another device than the CPU
            or another precision than it has.
        OSError: if there is no such model.
    """
    _check_name(name)
    if is_exported(name):
        from .export.runtime import load_exported

        return load_exported(name, device, dtype, overrides)
    model = prepare_for_inference(load_checkpoint(name, device, overrides), dtype)
    return model, AutoProcessor.from_pretrained(name)


def load_checkpoint(name: str, device: str | None = None, overrides: dict | None = None) -> DeformVosModel:
    """
    Load a model as it is trained and adapted: in float32, in evaluation mode, its batch norms not folded.

    Args:
        name (`str`): a folder or a Hub repository.
        device (`str`, *optional*): see [`resolve_device`].
        overrides (`dict`, *optional*): values for fields of the model's configuration.

    Raises:
        ValueError: if the checkpoint is no DeformVOS model, is damaged, lacks weights or is an exported one, or an
            override names no field, or the precision.
        OSError: if there is no such model.
    """
    _check_name(name)
    if is_exported(name):
        raise ValueError(f"{name} holds an exported model, which is for inference alone; name the checkpoint itself.")
    target = resolve_device(device)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"The folder {name} holds no config.json: it is no model.")
    if overrides:
        if "dtype" in overrides:
            raise ValueError(f"`dtype` cannot be overridden, got {overrides['dtype']!r}: --dtype sets the precision.")
        unknown = sorted(set(overrides) - set(type(AutoConfig.from_pretrained(name))().to_dict()))
        if unknown:
            raise ValueError(f"The configuration of {name} has no field {', '.join(unknown)}; see DeformVosConfig.")
    # Weights of another shape are named below, with those that are missing.
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = AutoModel.from_pretrained(name, **options, **(overrides or {}))
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {name} does not take {overrides or 'its values'}: {error}") from error
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {name} are damaged, or no safetensors file ({error}): copy or download them again; a "
            "clone of a Git repository may need `git lfs pull`."
        ) from error
    if not isinstance(model, DeformVosModel):
        raise ValueError(f"{name} holds a {type(model).__name__}; a DeformVosModel is needed.")
    missing = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
    if missing:
        raise ValueError(
            f"The checkpoint {name} does not fit its configuration: {len(missing)} weights are missing or of another "
            f"shape, among them {', '.join(missing[:3])}."
        )
    return model.eval().to(target)


def prepare_for_inference(model: DeformVosModel, dtype: str = "float32") -> DeformVosModel:
    """
    Fold a model's batch norms and cast it, in place; on a CPU with [`keep_freed_memory`].

    Args:
        model ([`DeformVosModel`]): in evaluation mode.
        dtype (`str`, defaults to `"float32"`): precision of the weights.
    """
    model = model.fold_batch_norm().to(dtype=getattr(torch, dtype), memory_format=torch.channels_last)
    if dtype == "bfloat16" and fastest_dtype(model.device.type) == "float32":
        logger.warning_once("bfloat16 is no faster than float32 on this device, and where it is emulated far slower.")
    if model.device.type == "cpu":
        _reuse_memory(model)
    return model


def is_exported(name: str) -> bool:
    """Whether this is a folder that `deformvos export` wrote."""
    return os.path.isfile(os.path.join(name, SETTINGS_FILE))


def _check_name(name: str):
    if os.path.isdir(name):
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ValueError(f"A model is a folder or a Hub repository (owner/name), got {name!r}, which is neither.")
    folder, _, rest = name.partition("/")
    if not rest:
        raise ValueError(f"There is no folder {name!r} here, and a Hub repository is named owner/name.")
    # `folder/nme` beside an existing `folder` is more often a typing mistake than a repository.
    if os.path.isdir(folder):
        raise ValueError(
            f"The local folder {folder!r} holds no {rest!r}, and hides what the Hub has by that name. Correct the "
            f"path; or, for the Hub's {name!r}, work in another folder, or rename {os.path.abspath(folder)}."
        )


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def hash_weights(name: str) -> str | None:
    """
    The sha256 of a model's `model.safetensors`, or of all graphs of an exported model; `None` where there are none.

    Raises:
        ValueError: if `name` is a path that is no folder.
    """
    _check_name(name)
    if is_exported(name):
        digests = json.loads(Path(name, SETTINGS_FILE).read_text(encoding="utf-8"))["sha256"]
        return sha256("".join(digests[graph] for graph in sorted(digests)).encode()).hexdigest()
    path = cached_file(
        name,
        "model.safetensors",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else sha256_of(path)


__all__ = [
    "PRESETS",
    "Preset",
    "describe_device",
    "fastest_dtype",
    "hash_weights",
    "is_exported",
    "keep_freed_memory",
    "load_checkpoint",
    "load_for_inference",
    "prepare_for_inference",
    "resolve_device",
    "sha256_of",
    "size_option",
    "synchronize",
]
