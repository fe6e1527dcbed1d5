"""`deformvos export` as a function: a model to a folder that runs without this package, or without PyTorch at all."""

import importlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.utils import logging as transformers_logging

from ..inference import hash_weights, load_for_inference, sha256_of
from ..modeling_deformvos import DeformVosModel
from ..writable import check_folder
from . import onnx_session
from .graphs import Graph, build_graphs, export_program


logger = transformers_logging.get_logger(__name__)

FORMATS = ("onnx", "torch")
DTYPES = ("float32", "int8")
# LayerNormalization is there from 17 on; 18 is the oldest that PyTorch's exporter writes without converting.
OPSET = 18
SESSION_FILE = "deformvos_onnx.py"
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
# All that an export writes, and what Python adds where the module was imported.
_OWN_FILES = {
    onnx_session.SETTINGS_FILE,
    SESSION_FILE,
    "README.md",
    "__pycache__",
    *(f"{name}{suffix}" for name in onnx_session.GRAPHS for suffix in _SUFFIXES.values()),
}
_CONFIG_FIELDS = ("max_objects", "memory_interval", "long_term_slots", "object_independent", "value_size")


def export_model(
    model: str | os.PathLike,
    out: str | os.PathLike,
    format: str = "onnx",
    dtype: str = "float32",
    calibration: str | os.PathLike | None = None,
    overwrite: bool = False,
    show_progress_bar: bool = False,
) -> Path:
    """
    Export a model as graphs with explicit memory, for frames of any size, any number of objects and of memory frames.

    Args:
        model (`str` or `os.PathLike`): a folder or a Hub repository.
        out (`str` or `os.PathLike`): the folder to write.
        format (`str`, defaults to `"onnx"`):
            `"onnx"`: ONNX files of opset 18 and a module that runs them on NumPy, Pillow and onnxruntime. `"torch"`:
            programs for `torch.export.load`.
        dtype (`str`, defaults to `"float32"`):
            `"int8"` quantises the encoder's convolutions but for those that it hurts; ONNX alone.
        calibration (`str` or `os.PathLike`, *optional*):
            A video whose frames tell `"int8"` the ranges of activations; the example clip of a checkout by default.
        overwrite (`bool`, defaults to `False`): whether to replace an export in `out`.
        show_progress_bar (`bool`, defaults to `False`): graph by graph, each of which takes seconds to minutes.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if an option is unknown or does not fit the others, `out` holds something, cannot be written or is
            the current folder, the model is an export itself, or packages of the extra `export` are missing.
        OSError: if there is no such model.
    """
    _check_options(format, dtype, calibration)
    if dtype == "int8":
        from .quantization import check_calibration, quantize

        check_calibration(calibration)
    target = Path(out).resolve()  # not a link, which cannot be replaced by a folder
    _check_target(target, overwrite)
    loaded, _ = load_for_inference(str(model), device="cpu")
    if not isinstance(loaded, DeformVosModel):
        raise ValueError(f"{model} is an exported model itself; export the model that it was made from.")
    processor = AutoProcessor.from_pretrained(str(model))
    _check_processor(processor.image_processor)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and moved there: what is under the name is whole.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder, "export")
        part.mkdir()
        graphs = build_graphs(loaded)
        for graph in tqdm(graphs, desc="export", unit="graph", disable=not show_progress_bar):
            write_graph(graph, part, format)
        settings = _settings(loaded, processor, format)
        settings["outputs"] = {graph.name: graph.outputs for graph in graphs}
        settings["source"] = {"name": str(model), "sha256": hash_weights(str(model))}
        _write_runtime(part, settings)
        if dtype == "int8":
            settings["dtype"] = "int8"
            settings["quantization"] = quantize(part, calibration)
            write_settings(part, settings)
        _finish(part)
        if target.exists():
            target.rename(Path(folder, "replaced"))  # which goes with the temporary folder
        part.rename(target)
    return Path(out)


def _check_options(format: str, dtype: str, calibration):
    for name, value, known in (("format", format, FORMATS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    if dtype == "int8" and format != "onnx":
        raise ValueError(f"`dtype` int8 is there for `format` onnx alone, got {format!r}.")
    if calibration is not None and dtype != "int8":
        raise ValueError(f"`calibration` is for `dtype` int8, got {dtype!r}.")
    needed = ("onnx", "onnxscript", *(["onnxruntime"] if dtype == "int8" else [])) if format == "onnx" else ()
    missing = [name for name in needed if not _is_installed(name)]
    if missing:
        raise ValueError(f"This export needs {', '.join(missing)}: `pip install {' '.join(missing)}`.")


def _check_processor(images):
    """An error for a processor that leaves out what an export's does."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(images, name, True):
            raise ValueError(
                f"An export resizes, rescales and normalises frames; the model's processor has {name}=False."
            )


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _check_target(out: Path, overwrite: bool):
    """An error unless the folder can be written, and is free or an earlier export that may go; nothing is made."""
    if out.exists():
        _check_replaceable(out, overwrite)
    check_folder(out.parent, f"The target must lie in a folder that can be written to, got {out}")


def _check_replaceable(out: Path, overwrite: bool):
    if not out.is_dir():
        raise ValueError(f"The target must be a folder, got {out}, which is a file.")
    if Path.cwd().is_relative_to(out):
        raise ValueError(
            f"The target is replaced as a whole, and {out} holds the current folder; name a folder in it."
        )
    held = {path.name for path in out.iterdir()}
    others = sorted(held if onnx_session.SETTINGS_FILE not in held else held - _OWN_FILES)
    if others:
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise ValueError(f"{out} holds files that are no export ({names}); move them, or choose another folder.")
    if held and not overwrite:
        raise ValueError(f"{out} holds an export; choose another folder, or replace it with `overwrite`.")


def write_graph(graph: Graph, folder: Path, format: str) -> Path:
    """Write a graph as `<name>.onnx`, checked, or `<name>.pt2`; returns the file."""
    path = folder / f"{graph.name}{_SUFFIXES[format]}"
    with _quiet():
        program = export_program(graph)
        if format == "torch":
            torch.export.save(program, path)
            return path
        written = torch.onnx.export(
            program,
            (),
            kwargs=graph.example(),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        written.save(path)
    import onnx

    onnx.checker.check_model(str(path), full_check=True)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on torchvision, which is not needed, and on its own deprecations."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _settings(model: DeformVosModel, processor, format: str) -> dict:
    """What a runtime has to know."""
    images = processor.image_processor
    return {
        "format": format,
        "dtype": "float32",
        "config": {name: getattr(model.config, name) for name in _CONFIG_FIELDS},
        "processor": {
            "size": {name: side for name, side in dict(images.size).items() if side},
            "resample": int(images.resample),
            "rescale_factor": float(images.rescale_factor),
            "image_mean": np.broadcast_to(images.image_mean, 3).tolist(),
            "image_std": np.broadcast_to(images.image_std, 3).tolist(),
            "max_enlargement": float(images.max_enlargement),
        },
        "num_parameters": model.num_parameters(),
    }


def _write_runtime(folder: Path, settings: dict):
    """The settings, and for ONNX the module that runs the graphs."""
    if settings["format"] == "onnx":
        shutil.copyfile(onnx_session.__file__, folder / SESSION_FILE)
    write_settings(folder, settings)


def write_settings(folder: Path, settings: dict):
    """Write what a runtime has to know beside the graphs."""
    text = json.dumps(settings, indent=2) + "\n"
    (folder / onnx_session.SETTINGS_FILE).write_text(text, encoding="utf-8")


def _finish(folder: Path):
    """Record the checksums of the graphs, and say in a README how to use them."""
    settings = json.loads((folder / onnx_session.SETTINGS_FILE).read_text(encoding="utf-8"))
    suffix = _SUFFIXES[settings["format"]]
    settings["sha256"] = {name: sha256_of(folder / f"{name}{suffix}") for name in onnx_session.GRAPHS}
    write_settings(folder, settings)
    text = _README[settings["format"]].format(**settings, source_name=settings["source"]["name"])
    (folder / "README.md").write_text(text, encoding="utf-8")


_README = {
    "onnx": """\
# DeformVOS in ONNX ({dtype})

`deformvos export` wrote this folder from `{source_name}`. It segments objects through a video from their masks
in one frame, and needs NumPy, Pillow and onnxruntime alone; PyAV, if the video is a file.

```python
import sys

import av
import numpy as np
from PIL import Image

sys.path.insert(0, "FOLDER")  # this folder, which holds deformvos_onnx.py
from deformvos_onnx import OnnxDeformVos

model = OnnxDeformVos.from_pretrained("FOLDER")
processor = model.processor

with av.open("video.mp4") as container:
    video = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
    session = processor.init_video_session(video=video)
    id_map = np.asarray(Image.open("first_mask.png"))  # palette or grey: the value is the object's id, 0 is background
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=id_map)
    for output in model.propagate_in_video_iterator(session):
        ids = processor.post_process_id_map(output, original_size=id_map.shape)
        Image.fromarray(ids.astype(np.uint8)).save(f"{{output.frame_idx:05d}}.png")
```

The graphs keep no state; the session does:

| file | in | out |
|---|---|---|
| `encode.onnx` | frame | its features |
| `start.onnx` | features' tokens, given masks | the memory of a first frame |
| `read.onnx` | features, memory, channels in use | logits, probabilities, what the frame's memory is written from |
| `write.onnx` | probabilities, what `read` gave | the values of the frame's memory |
""",
    "torch": """\
# DeformVOS as programs of torch.export ({dtype})

`deformvos export` wrote this folder from `{source_name}`. The programs keep no state: `encode`, `start`, `read`
and `write`, each `torch.export.load("encode.pt2").module()`. `deformvos segment --model FOLDER`,
`deformvos evaluate --model FOLDER` and `hf_deformvos.inference.load_for_inference` run the folder as a whole.
""",
}


__all__ = ["DTYPES", "FORMATS", "export_model", "write_graph", "write_settings"]
