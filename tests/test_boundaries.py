"""Imports point one way, and the modelling files stand alone, as a Hub repository with remote code needs them to."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT


PACKAGE = ROOT / "hf_deformvos"
MODELLING = sorted(PACKAGE.glob("*_deformvos.py"))
# tqdm is there wherever transformers is, which requires it; its own video models import it.
THIRD_PARTY = {"torch", "numpy", "transformers", "huggingface_hub", "PIL", "safetensors", "tqdm"}
# May be missing: asked for inside a function and within `try`, where transformers does not demand it of remote code.
OPTIONAL = {"av"}
# Each part may import itself, those listed, and the modelling files (as the flat names or as the package).
PARTS = {
    "video": set(),
    "data": {"video"},
    "evaluation": {"video", "data"},
    "training": {"video", "data", "evaluation", "publishing"},
    "adaptation": {"data", "training"},
    "export": {"video"},
    "publishing": {"video"},
    "benchmark": {"video", "evaluation", "export"},
    "cli": {"video", "data", "evaluation", "publishing", "export", "benchmark", "adaptation"},
}


def imports_of(path):
    """Every import of a file, also inside functions: (level, module, line), level 0 for an absolute one."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", node.lineno
            if not node.module:  # `from .. import data` names the module behind the import
                yield from ((node.level, alias.name, node.lineno) for alias in node.names)


def guarded_imports(path):
    """The lines of a file's imports that a `try` inside a function guards."""
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    guards = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Try)]
    return {node.lineno for guard in guards for node in guard.body if isinstance(node, (ast.Import, ast.ImportFrom))}


def part_of(path, level, module):
    """The sub-package of hf_deformvos that an import reaches: None for another package, "" for its root."""
    if level == 0:
        names = module.split(".")
        if names[0] != "hf_deformvos":
            return None
    else:
        names = [*path.relative_to(ROOT).parts[:-level], *module.split(".")]
    return names[1] if len(names) > 1 and names[1] in PARTS else ""


@pytest.mark.parametrize("path", MODELLING, ids=lambda path: path.name)
def test_modelling_imports_only_what_remote_code_finds(path):
    siblings = {file.stem for file in MODELLING}
    for level, module, line in imports_of(path):
        where = f"{path.name}:{line}"
        if level == 0:
            root = module.split(".")[0]
            allowed = root in THIRD_PARTY or root in sys.stdlib_module_names
            assert allowed or (root in OPTIONAL and line in guarded_imports(path)), f"{where} imports {module}"
        else:
            assert level == 1, f"{where} imports from above the package"
            assert module in siblings, (
                f"{where}: only `from .x_deformvos import y` is copied to the Hub, got .{module}"
            )


@pytest.mark.parametrize("path", MODELLING, ids=lambda path: path.name)
def test_modelling_text_is_safe_to_save(path):
    tree = ast.parse(path.read_text())
    real = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r"\s*(from|import)\s+\.", line):
            assert number in real, f"{path.name}:{number}: transformers takes this line of text for an import"
    # The strict configuration and the docstring decorators of transformers read annotations as objects.
    futures = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert not futures, f"{path.name} imports from __future__"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parts_import_one_way(path):
    own = path.relative_to(PACKAGE).parts[0]
    assert own in PARTS, f"{own}: say in PARTS what this new part may import"
    for level, module, line in imports_of(path):
        reached = part_of(path, level, module)
        if reached:
            assert reached == own or reached in PARTS[own], f"{own} imports {reached} at {path.name}:{line}"


def test_model_layer_imports_without_the_extras():
    blocked = ["gradio", "datasets", "torchvision", "cv2", "accelerate", "tensorboard", "onnx", "onnxruntime", "scipy"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import hf_deformvos\n"
        "from transformers import AutoConfig, AutoModel\n"
        "model = AutoModel.from_config(AutoConfig.for_model('deformvos'))\n"
        "parts = [name for name in sys.modules if name.startswith('hf_deformvos.') and '_deformvos' not in name]\n"
        "assert not parts, parts\n"
        "print(type(model).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "DeformVosModel"


def test_command_line_starts_without_the_extras():
    blocked = ["gradio", "datasets", "torchvision", "cv2", "accelerate", "tensorboard", "onnx", "onnxruntime", "scipy"]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from hf_deformvos.cli import main\n"
        "sys.exit(main(['--help']))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert result.returncode == 0, result.stderr
    for command in ("segment", "evaluate", "score", "export", "publish", "publish-space", "push-dataset"):
        assert command in result.stdout
