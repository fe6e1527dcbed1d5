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
from pathlib import Path

import yaml
from huggingface_hub import constants

from . import cards
from .collect import collect_space
from .hub import CARD, Published, Target, Upload, publish_files, require_token


_SDKS = ("gradio", "streamlit")
_WHEEL = re.compile(r"hf_deformvos-[\w.+-]+\.whl")
_OWN_REQUIREMENT = re.compile(r"\s*(hf[-_.]deformvos\b|-e\s+\.|\.{1,2}/|\S*hf_deformvos-\S*\.whl)", re.IGNORECASE)
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
        ValueError: if there is none, `sdk` is not one that installs requirements.txt, or the app is missing.
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
    app = folder / str(settings.get("app_file", "app.py"))
    if not app.resolve().is_relative_to(folder.resolve()) or not app.is_file():
        raise ValueError(f"`app_file` in {readme} names {app.name}, which is not in the folder.")
    return settings


def stage_space(folder: Path, staging: Path, repo_id: str) -> list[str]:
    """
    Copy a Space's folder, with the wheel and a requirements.txt that installs it.

    Args:
        folder (`Path`): the demo; it stays as it is.
        staging (`Path`): an empty folder.
        repo_id (`str`): the Space, whose address the wheel will have.

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
    readme = staging / CARD
    readme.write_text(cards.seal(readme.read_text(encoding="utf-8")), encoding="utf-8")
    wheel = build_wheel(staging)
    requirements = staging / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    address = f"{constants.ENDPOINT}/spaces/{repo_id}/resolve/main/{wheel.name}"
    lines = [line for line in lines if not _OWN_REQUIREMENT.match(line)]
    lines += [f"hf-deformvos @ {address}#sha256={Upload.of(wheel.name, wheel).sha256}"]
    requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sorted({*names, wheel.name, requirements.name})


def publish_space(
    folder: str | Path, repo_id: str, token: str | None = None, force: bool = False, dry_run: bool = False
) -> Published:
    """
    Publish a demo as a Space, in one commit.

    Args:
        folder (`str` or `Path`): `README.md` with the Space's front matter, the app, its requirements.
        repo_id (`str`): `org/name`; made if it is missing. It must be public, since it fetches its own wheel.
        token (`str`, *optional*): by default the one that is logged in.
        force (`bool`, defaults to `False`): overwrite a README.md that was edited on the Hub.
        dry_run (`bool`, defaults to `False`): do all but commit.

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
    target = Target(repo_id, repo_type="space", space_sdk=settings["sdk"], must_be_public=True)
    if not dry_run:
        require_token(target, token)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        uploads = [Upload.of(name, staging / name) for name in stage_space(folder, staging, repo_id)]
        return publish_files(
            uploads,
            target,
            f"Publish {folder.resolve().name}",
            owns=lambda name: _WHEEL.fullmatch(name) is not None,
            token=token,
            force=force,
            dry_run=dry_run,
        )


__all__ = ["build_wheel", "publish_space", "read_settings", "stage_space"]
