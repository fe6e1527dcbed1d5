"""
A demo's folder to a Space, with a wheel of this package: the Space needs no package that is on no index.

A Space is built from its requirements.txt alone, before its other files are there, so the wheel is named by the
address that it has in the Space, with its checksum.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import constants, metadata_save

from . import cards
from .collect import collect_space
from .hub import CARD, Published, Target, Upload, publish_files, require_token


_SDKS = ("gradio", "streamlit")
_WHEEL = re.compile(r"hf_deformvos-[\w.+-]+\.whl")
_OWN_REQUIREMENT = re.compile(r"\s*(hf[-_.]deformvos\b|-e\s+\.|\.{1,2}/|\S*hf_deformvos-\S*\.whl)", re.IGNORECASE)
_CPU_INDEX = re.compile(r"\s*(--(extra-)?index-url|-i)[\s=]\S*pytorch\.org/whl/cpu/?\s*(#.*)?")
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def build_wheel(destination: Path) -> Path:
    """
    Build a wheel of this package from its checkout, without network; the same sources give the same bytes.

    Args:
        destination (`Path`): a folder.

    Returns:
        `Path`: the wheel.

    Raises:
        ValueError: if the package does not run from a checkout, or does not build.
    """
    root = Path(__file__).resolve().parents[2]
    missing = [name for name in ("pyproject.toml", "README.md", "LICENSE") if not (root / name).is_file()]
    if missing:
        raise ValueError(
            f"A wheel is built from a checkout of the repository; {root}, where this package runs from, has no "
            f"{missing[0]}."
        )
    with tempfile.TemporaryDirectory() as temporary:
        # A copy: building leaves folders behind, and what they hold of older builds gets into the wheel.
        source = Path(temporary)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copyfile(root / name, source / name)
        shutil.copytree(
            root / "hf_deformvos", source / "hf_deformvos", ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
        result = subprocess.run(
            [sys.executable, "-c", _BUILD, str(destination.resolve())],
            cwd=source,
            env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"},  # 1980, the first date that a zip file can hold
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise ValueError(f"The wheel does not build: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    return destination / result.stdout.strip().splitlines()[-1]


def read_settings(folder: Path) -> dict:
    """
    The front matter of a Space's README.md.

    Raises:
        ValueError: if there is none, `sdk` is not one that installs requirements.txt, `models` is no list of names, or
            the app is missing.
    """
    readme = folder / CARD
    if not readme.is_file():
        raise ValueError(f"{folder} has no README.md, whose first lines tell the Hub what the Space runs.")
    match = re.match(r"---\r?\n(.*?)\r?\n---\s", readme.read_text(encoding="utf-8"), re.DOTALL)
    try:
        settings = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"The front matter of {readme} is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{readme} must begin with front matter between lines of `---`: sdk, app_file, title ...")
    if settings.get("sdk") not in _SDKS:
        raise ValueError(f"`sdk` in {readme} must be {' or '.join(_SDKS)}, got {settings.get('sdk')!r}.")
    models = settings.get("models") or []
    if not isinstance(models, list) or not all(isinstance(name, str) for name in models):
        raise ValueError(f"`models` in {readme} must be a list of repositories, `- org/name` each, got {models!r}.")
    app = folder / str(settings.get("app_file", "app.py"))
    if not app.resolve().is_relative_to(folder.resolve()) or not app.is_file():
        raise ValueError(f"`app_file` in {readme} names {app.name}, which is not in the folder.")
    return settings


def choose_models(settings: dict, repo_id: str, models: Sequence[str] | None = None) -> list[str]:
    """
    The repositories that a Space's front matter shall name.

    Args:
        settings (`dict`): the front matter as it is.
        repo_id (`str`): the Space.
        models (`Sequence[str]`, *optional*): the repositories; by default those of the front matter, at the Space's
            owner.

    Raises:
        hub.PublishError: if one is not named `org/name`.
    """
    owner = repo_id.split("/")[0]
    beside = [f"{owner}/{name.rsplit('/', 1)[-1]}" for name in settings.get("models") or []]
    chosen = list(models or beside)
    for name in chosen:
        Target(name)  # checks the name
    return chosen


def stage_space(
    folder: Path, staging: Path, repo_id: str, models: Sequence[str] | None = None, gpu: bool = False
) -> list[str]:
    """
    Copy a Space's folder, with the models in its front matter, the wheel and a requirements.txt that installs it.

    Args:
        folder (`Path`): the demo; it stays as it is.
        staging (`Path`): an empty folder.
        repo_id (`str`): the Space, whose address the wheel will have.
        models (`Sequence[str]`, *optional*): see [`choose_models`].
        gpu (`bool`, defaults to `False`): leave out the index of PyTorch for processors, whose builds pip prefers.

    Returns:
        list of `str`: names of the files in `staging`, sorted.

    Raises:
        ValueError: if a file is refused, the settings are wrong, or Python does not read a program.
    """
    folder = folder.resolve()
    names = {path.relative_to(folder).as_posix(): path for path in collect_space(folder)}
    for name, path in names.items():
        if path.suffix == ".py":
            try:
                compile(path.read_bytes(), name, "exec")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"{path} is no Python program: {error}") from error
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, staging / name)
    _write_card(staging / CARD, repo_id, models)
    wheel = build_wheel(staging)
    requirements = staging / "requirements.txt"
    _write_requirements(requirements, f"{constants.ENDPOINT}/spaces/{repo_id}/resolve/main/{wheel.name}", wheel, gpu)
    return sorted({*names, wheel.name, requirements.name})


def _write_card(readme: Path, repo_id: str, models: Sequence[str] | None) -> None:
    """Names the models in the front matter of a staged README.md, and seals it."""
    settings = read_settings(readme.parent)
    chosen = choose_models(settings, repo_id, models)
    if chosen != (settings.get("models") or []):
        metadata_save(readme, {**settings, "models": chosen})
    readme.write_text(cards.seal(readme.read_text(encoding="utf-8")), encoding="utf-8")


def _write_requirements(path: Path, address: str, wheel: Path, gpu: bool) -> None:
    """Lets a staged requirements.txt install the wheel from its address, and PyTorch for what the Space has."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines = [line for line in lines if not _OWN_REQUIREMENT.match(line)]
    if gpu:
        lines = [line for line in lines if not _CPU_INDEX.fullmatch(line)]
    lines += [f"hf-deformvos @ {address}#sha256={Upload.of(wheel.name, wheel).sha256}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def publish_space(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    models: Sequence[str] | None = None,
    gpu: bool = False,
) -> Published:
    """
    Publish a demo as a Space, in one commit.

    Args:
        folder (`str` or `Path`): `README.md` with the Space's front matter, the app, its requirements.
        repo_id (`str`): `org/name`; made if it is missing. It must be public, since it fetches its own wheel.
        token (`str`, *optional*): by default the one that is logged in.
        force (`bool`, defaults to `False`): overwrite a README.md that was edited on the Hub.
        dry_run (`bool`, defaults to `False`): do all but commit.
        models (`Sequence[str]`, *optional*): repositories of the models that the app offers, for the front matter's
            `models`; by default those that it names, at the owner of `repo_id`.
        gpu (`bool`, defaults to `False`): whether the Space has a GPU: an index of PyTorch for processors in
            requirements.txt is left out.

    Returns:
        [`hub.Published`]: what was done, or would be.

    Raises:
        ValueError: if the folder is not fit to be published.
        hub.PublishError: if the Hub refuses or cannot be reached.
    """
    folder = Path(folder).expanduser()
    Target(repo_id)  # a wrong name is reported first
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    settings = read_settings(folder)
    models = choose_models(settings, repo_id, models)
    target = Target(repo_id, repo_type="space", space_sdk=settings["sdk"], must_be_public=True)
    if not dry_run:
        require_token(target, token)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        uploads = [Upload.of(name, staging / name) for name in stage_space(folder, staging, repo_id, models, gpu)]
        published = publish_files(
            uploads,
            target,
            f"Publish {folder.resolve().name}",
            owns=lambda name: _WHEEL.fullmatch(name) is not None,
            token=token,
            force=force,
            dry_run=dry_run,
        )
    if models:
        note = f"the app takes its models from {', '.join(models)}: publish those that are not there yet"
        published.plan.notes.append(note)
    return published


__all__ = ["build_wheel", "choose_models", "publish_space", "read_settings", "stage_space"]
