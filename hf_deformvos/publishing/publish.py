"""A release folder to the Hub: stage, check, commit, compare."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from . import cards, measurements
from .check import check_release
from .collect import collect_release, is_replaced, licence_text
from .hub import Published, Target, Upload, publish_files, require_token


def default_records(folder: Path) -> list[Path]:
    """Where measurements lie if nobody says so: docs/numbers around the folder, and of the checkout that runs."""
    roots = (folder.resolve().parent.parent, Path(__file__).resolve().parents[2])
    places = [root / "docs" / "numbers" for root in dict.fromkeys(roots)]
    return [place for place in places if place.is_dir()]


def scores_note(folder: Path, places: list[Path], card: str) -> list[str]:
    """A sentence for the user where a card that is rendered has no scores."""
    if cards.has_scores(card) or not cards.is_rendered(folder):
        return []
    weights = folder / "model.safetensors"
    which = f"sha256 {measurements.sha256_of(weights)[:12]}..." if weights.is_file() else "shards have no one sha256"
    where = " or ".join(map(str, places)) or "docs/numbers, which is neither around the folder nor beside the package"
    return [
        f"no measurement of these weights ({which}) was found in {where}: the card has no scores; name one by "
        "--numbers FILE"
    ]


def stage_release(folder: Path, staging: Path, repo_id: str, records: dict[str, dict]) -> list[Path]:
    """
    Copy what is published of a folder, with its card, the licence of the code, and the code.

    Args:
        folder (`Path`): the release folder; it stays as it is.
        staging (`Path`): an empty folder.
        repo_id (`str`): the repository that the card names.
        records (`dict[str, dict]`): measurements.

    Returns:
        `list[Path]`: the files in `staging`, sorted.

    Raises:
        ValueError: if the folder holds what is not published, or the card cannot be rendered.
    """
    from .remote_code import add_remote_code

    card = cards.publishable_card(folder, records, repo_id)
    for path in collect_release(folder):
        # The code that the weights were checked with is this package's.
        if path.suffix != ".py":
            shutil.copyfile(path, staging / path.name)
    (staging / "README.md").write_text(card, encoding="utf-8")
    if not (staging / "LICENSE").exists():
        (staging / "LICENSE").write_text(licence_text(), encoding="utf-8")
    add_remote_code(staging)
    return collect_release(staging)


def publish_release(
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    revision: str = "main",
    records: list[Path] | None = None,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Published:
    """
    Publish a model: its card rendered from what was measured, the files of the allow-list, the code, in one commit.

    The token is tried first. Before anything is sent the staged copy is loaded in a process without this package and
    its logits compared. If the repository holds all of it already, nothing is committed.

    Args:
        folder (`str` or `Path`): see [`collect.collect_release`].
        repo_id (`str`): `org/name`; made if it is missing.
        private (`bool`, defaults to `False`): whether a new repository is private.
        revision (`str`, defaults to `"main"`): the branch.
        records (`list[Path]`, *optional*): measurements, see [`measurements.find_records`].
        token (`str`, *optional*): by default the one that is logged in.
        force (`bool`, defaults to `False`): overwrite a card that was edited on the Hub, or has scores where the new
            one has none.
        dry_run (`bool`, defaults to `False`): do all but commit.

    Returns:
        [`hub.Published`]: what was done, or would be.

    Raises:
        ValueError: if the folder is not fit to be published.
        hub.PublishError: if the Hub refuses or cannot be reached; see [`hub.publish_files`].
    """
    target = Target(repo_id, revision=revision, private=private)
    folder = Path(folder).expanduser()
    collect_release(folder)  # the reasons to refuse come before the work
    places = records if records is not None else default_records(folder)
    measured = measurements.find_records(places, folder / "model.safetensors")
    if not dry_run:
        require_token(target, token)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        files = stage_release(folder, staging, repo_id, measured)
        check_release(staging, folder)
        uploads = [Upload.of(path.name, path) for path in files]
        weights = ", ".join(
            f"{upload.name} sha256 {upload.sha256}" for upload in uploads if upload.name.endswith(".safetensors")
        )
        name = folder.resolve().name
        result = publish_files(
            uploads, target, f"Publish {name}", weights, is_replaced, token=token, force=force, dry_run=dry_run
        )
        result.plan.notes += scores_note(folder, places, (staging / "README.md").read_text(encoding="utf-8"))
        return result


__all__ = ["default_records", "publish_release", "scores_note", "stage_release"]
