"""Code beside the weights: with it a model loads by `trust_remote_code=True` where this package is not installed."""

import json
import shutil
from pathlib import Path

from ..configuration_deformvos import DeformVosConfig
from ..image_processing_deformvos import DeformVosImageProcessor
from ..modeling_deformvos import DeformVosModel
from ..pipeline_deformvos import TASK, DeformVosPipeline
from ..processing_deformvos import DeformVosProcessor


AUTO_CLASSES = {
    "AutoConfig": DeformVosConfig,
    "AutoModel": DeformVosModel,
    "AutoProcessor": DeformVosProcessor,
    "AutoImageProcessor": DeformVosImageProcessor,
}
# Files of these names make up the model layer; they import each other by relative imports, and nothing else of ours.
CODE_FILES = "*_deformvos.py"


def add_remote_code(folder: Path) -> list[Path]:
    """
    Put the modelling files into a model's folder, and into its configurations which class is where. What is there
    already stays as it is, so a second call changes nothing.

    Args:
        folder (`Path`): what `save_pretrained` of a model and of a processor wrote.

    Returns:
        `list[Path]`: the files that the code takes: both configurations, then the modelling files.

    Raises:
        ValueError: if a configuration is missing, is no JSON, or belongs to another kind of model.
    """
    folder = Path(folder)
    config = _read(folder / "config.json", "model.save_pretrained")
    if config.get("model_type") != DeformVosConfig.model_type:
        raise ValueError(
            f"{folder / 'config.json'} must describe a model of type {DeformVosConfig.model_type!r}, got "
            f"{config.get('model_type')!r}."
        )
    processor = _read(folder / "processor_config.json", "processor.save_pretrained")
    config["auto_map"] = {**config.get("auto_map", {}), **{name: _place(kind) for name, kind in AUTO_CLASSES.items()}}
    config["custom_pipelines"] = {
        **config.get("custom_pipelines", {}),
        TASK: {"impl": _place(DeformVosPipeline), "pt": ["AutoModel"], "type": "video"},
    }
    # Each loader looks into the part that is its own.
    _add_auto_map(processor, "AutoProcessor")
    _add_auto_map(processor.setdefault("image_processor", {}), "AutoImageProcessor")
    files = [_write(folder / "config.json", config), _write(folder / "processor_config.json", processor)]
    for source in sorted(Path(__file__).resolve().parent.parent.glob(CODE_FILES)):
        files.append(folder / source.name)
        if not files[-1].is_file() or files[-1].read_bytes() != source.read_bytes():
            shutil.copyfile(source, files[-1])
    return files


def _place(kind: type) -> str:
    """Where remote code has a class: `module.Class`."""
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def _add_auto_map(part: dict, name: str):
    part["auto_map"] = {**part.get("auto_map", {}), name: _place(AUTO_CLASSES[name])}


def _read(path: Path, writer: str) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: `{writer}` writes it.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def _write(path: Path, content: dict) -> Path:
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


__all__ = ["add_remote_code"]
