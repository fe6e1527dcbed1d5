"""The README's examples run as they stand, with the bundled student and the example clip."""

import re

import pytest
from conftest import ROOT


TEXT = (ROOT / "README.md").read_text()


def python_blocks():
    """The code of every ```python block."""
    return re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_there_are_examples():
    assert python_blocks()


@pytest.mark.parametrize("number", range(len(python_blocks())))
def test_example_compiles(number):
    compile(python_blocks()[number], f"README.md, block {number}", "exec")


@pytest.mark.weights
def test_examples_run(tmp_path, monkeypatch):
    # One name space from top to bottom, as a reader who pastes them in order has it; outputs go to an empty folder.
    for folder in ("examples", "hub_cards"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for number, block in enumerate(python_blocks()):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    id_map = namespace["id_map"]
    assert set(id_map.ravel().tolist()) <= {0, 1, 2}, "the example clip has two objects"
    assert (id_map > 0).any(), "the student lost both objects within the example's frames"


def test_commands_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", TEXT):
        assert target in targets, f"README names `make {target}`"
