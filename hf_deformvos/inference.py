"""Loading for inference, as the commands do it: checked, folded, on the device and in the precision asked for."""

import json
import os
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub.utils.sha import sha_fileobj
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import cached_file

from .modeling_deformvos import DeformVosModel


# In a folder that `deformvos export` wrote.
SETTINGS_FILE = "deformvos_export.json"


def resolve_device(device: str | None) -> torch.device:
    """
    The device of that name, by default CUDA, then MPS, then the CPU.

    Raises:
        ValueError: if there is no such device here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"`device` must be one that PyTorch can use here (cpu, cuda, cuda:1, mps ...), got {device!r} "
            f"({str(error).splitlines()[0]}); leave it out to take the fastest one."
        ) from error
    return torch.device(device)


def load_for_inference(
    name: str, device: str | None = None, dtype: str = "float32", overrides: dict | None = None
) -> tuple[DeformVosModel, object]:
    """
    Load a model, its batch norms folded, and its processor; or an exported model and its processor, which sessions
    take alike.

    Args:
        name (`str`): a folder, that of `deformvos export` among them, or a Hub repository.
        device (`str`, *optional*): see [`resolve_device`].
        dtype (`str`, defaults to `"float32"`): precision of the weights; folding is done before the cast.
        overrides (`dict`, *optional*): values for fields of the model's configuration.

    Raises:
        ValueError: if the checkpoint is no DeformVOS model, lacks weights, or an override names no field; for an
            exported model also if it is asked for another device than the CPU or another precision than it has.
        OSError: if there is no such model.
    """
    _check_name(name)
    if is_exported(name):
        from .export.runtime import load_exported

        return load_exported(name, device, dtype, overrides)
    target = resolve_device(device)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"The folder {name} holds no config.json: it is no model.")
    if overrides:
        unknown = sorted(set(overrides) - set(AutoConfig.from_pretrained(name).to_dict()))
        if unknown:
            raise ValueError(f"The configuration of {name} has no field {', '.join(unknown)}; see its config.json.")
    model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **(overrides or {}))
    if not isinstance(model, DeformVosModel):
        raise ValueError(f"{name} holds a {type(model).__name__}; a DeformVosModel is needed.")
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ValueError(
            f"The checkpoint {name} does not fit its configuration: {len(missing)} weights are missing or of another "
            f"shape, among them {', '.join(missing[:3])}."
        )
    model = model.eval().fold_batch_norm().to(target, getattr(torch, dtype))
    return model, AutoProcessor.from_pretrained(name)


def is_exported(name: str) -> bool:
    """Whether this is a folder that `deformvos export` wrote."""
    return os.path.isfile(os.path.join(name, SETTINGS_FILE))


def _check_name(name: str):
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.path.exists(name)
    # `folder/nme` beside an existing `folder` is a typing mistake, not a repository.
    is_path = is_path or os.path.isdir(name.split("/")[0])
    if is_path and not os.path.isdir(name):
        raise ValueError(f"A model is a folder or a Hub repository (owner/name), got {name!r}, which is neither.")


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


def size_option(processor, short_side: int | None) -> dict:
    """The processor's keyword for another bound of the short side; nothing where there is none."""
    if short_side is None:
        return {}
    bounds = {name: side for name, side in dict(processor.image_processor.size).items() if side}
    return {"size": {**bounds, "shortest_edge": short_side}}


__all__ = ["hash_weights", "is_exported", "load_for_inference", "resolve_device", "size_option"]
