"""What the documents say exists: options of commands, files and sections that links lead to."""

import re
from dataclasses import fields

import pytest
from conftest import ROOT

from hf_deformvos.cli import build_parser
from hf_deformvos.training import TrainingConfig


PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "demo/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "hub_cards").glob("*/README.md")),
]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
_COMMAND = re.compile(r"(?:deformvos (?P<command>[a-z-]+)|(?P<script>(?:scripts/)?\w+\.py))(?P<rest>[^\n`]*)")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def commands_of(text: str):
    """Each command of a text, as `(subcommand, script, options)`."""
    for match in _COMMAND.finditer(text.replace("\\\n", " ")):
        # Up to the next command of the line, and to what another command is handed on.
        rest = re.split(r" -- | [;|] | && ", match["rest"])[0]
        yield match["command"], match["script"], re.findall(r"(?<!\S)(--[a-z][\w-]*)", rest)


def options_taken() -> dict[str, set[str]]:
    """The options of each command, by its name or its script."""
    parsers = next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    taken = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    taken["train_distill.py"] = {f"--{item.name}" for item in fields(TrainingConfig)} | {"--help"}
    for path in SCRIPTS:
        taken[name_of(path)] = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text())) | {"--help"}
    return taken


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, ROOT / "train_distill.py"], ids=name_of)
def test_options_of_documented_commands_exist(path):
    taken = options_taken()
    wrong = [
        f"{command or script} {option}"
        for command, script, options in commands_of(path.read_text())
        if (command or script) in taken
        for option in options
        if option not in taken[command or script]
    ]
    assert not wrong


def test_commands_are_found():
    found = {command or script for path in PAGES for command, script, _ in commands_of(path.read_text())}
    assert {"segment", "evaluate", "score", "train_distill.py", "scripts/distill_backbone.py"} <= found
    example = "deformvos score --a \\\n  --b | head --c"
    assert list(commands_of(example)) == [("score", None, ["--a", "--b"])]


def anchors_of(text: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name_of(path)}: {target}"
        assert not anchor or anchor in anchors_of(page.read_text()), f"{name_of(path)}: {target}"
