"""What of a folder is published: an allow-list, and reasons for refusing everything else."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .cards import read_json
from .measurements import sha256_of


PICTURE_LIMIT = 512 * 1024  # bytes
_SPACE_LIMIT = 50 * 1024 * 1024  # of one file
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_RELEASE = re.compile(
    r"README\.md|LICENSE|config\.json|processor_config\.json|training\.json|model\.safetensors(\.index\.json)?"
    r"|model-\d{5}-of-\d{5}\.safetensors|[a-z0-9_]+_deformvos\.py|picture\.(png|jpg)"
)
# Files of these names on the Hub belong to a release: those that a new one has no longer are removed.
_REPLACED = re.compile(
    r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors|[a-z0-9_]+_deformvos\.py|picture\.(png|jpg)"
)
_SPACE = re.compile(
    r".*\.(py|md|txt|json|css|js|html|svg|png|jpg|jpeg|webp|gif|mp4|webm|ico|woff2|safetensors)|LICENSE"
)
_PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|dill|npy|npz|h5|msgpack)", re.IGNORECASE)
_STATES = re.compile(
    r"(optimizer|scheduler|scaler|random_states?|rng_state|trainer_state|training_args)\b.*", re.IGNORECASE
)
# What tools leave behind: not published, and no reason to refuse.
_LEFTOVERS = {".git", ".gitattributes", ".gitignore", ".cache", ".DS_Store", "__pycache__", ".ruff_cache"}
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
# Names that an error lists.
_MOST_LISTED = 8


def is_replaced(name: str) -> bool:
    """Whether a file on the Hub is a release's own, by its name."""
    return _REPLACED.fullmatch(name) is not None


def collect_release(folder: str | Path) -> list[Path]:
    """
    The files of a release folder that are published.

    Args:
        folder (`str` or `Path`): holds `config.json`, `processor_config.json`, safetensors and what else
            `_RELEASE` names, and nothing more.

    Returns:
        `list[Path]`: the files, sorted.

    Raises:
        ValueError: naming every file that is refused and why, or what is missing or does not fit together.
    """
    folder = _existing(folder)
    files, refused = [], []
    for path in _walk(folder):
        reason = _refusal(path, folder) or (None if _is_release(path, folder) else "not part of a release")
        if reason is None:
            files.append(path)
        else:
            refused.append(f"{path.relative_to(folder)} ({reason})")
    if refused:
        hint = ""
        if (folder / "all_results.json").is_file():
            hint = " This is a training run's folder: make a release of it with scripts/make_release.py."
        raise ValueError(f"{folder} holds files that are not published: {_listed(refused)}.{hint}")
    names = {path.name for path in files}
    missing = [name for name in ("config.json", "processor_config.json") if name not in names]
    if missing:
        raise ValueError(f"{folder} is no release folder: {' and '.join(missing)} is missing.")
    _check_weights(folder, names)
    _check_record(folder, names)
    return files


def collect_space(folder: str | Path) -> list[Path]:
    """
    The files of a Space's folder, sorted, sub-folders included.

    Raises:
        ValueError: naming every file that is refused and why.
    """
    folder = _existing(folder)
    files, refused = [], []
    for path in _walk(folder):
        reason = _refusal(path, folder)
        if reason is None and not _SPACE.fullmatch(path.name):
            reason = "of no kind that a Space takes"
        if reason is None and path.stat().st_size > _SPACE_LIMIT:
            reason = f"larger than {_SPACE_LIMIT >> 20} MiB"
        if reason is None:
            files.append(path)
        else:
            refused.append(f"{path.relative_to(folder)} ({reason})")
    if refused:
        raise ValueError(f"{folder} holds files that are not published: {_listed(refused)}. Move them out of it.")
    return files


def licence_text() -> str:
    """
    The licence of the code, from the checkout or the installed package.

    Raises:
        ValueError: if neither has it.
    """
    beside = Path(__file__).resolve().parents[2] / "LICENSE"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    try:
        for file in importlib.metadata.files("hf-deformvos") or ():
            if file.name == "LICENSE":
                return file.read_text(encoding="utf-8")
    except importlib.metadata.PackageNotFoundError:
        pass
    raise ValueError("The licence of the code is not found: put a LICENSE into the folder.")


def _existing(folder: str | Path) -> Path:
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder.")
    return folder.resolve()


def _walk(folder: Path):
    """Every file below a folder, links as themselves, leftovers of tools left out."""
    for path in sorted(folder.iterdir()):
        if path.name in _LEFTOVERS:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _refusal(path: Path, folder: Path) -> str | None:
    """Why a file must never be published, whatever is asked for."""
    if path.is_symlink():
        inside = path.resolve().is_relative_to(folder)
        return "a link" if inside else "a link to somewhere outside the folder"
    if not path.is_file():
        return "no file"
    if _PICKLES.fullmatch(path.name):
        return "a pickle or another format that can carry code: weights are published as safetensors"
    if _STATES.fullmatch(path.name):
        return "a state of training"
    if any(part.startswith(".") for part in path.relative_to(folder).parts):
        return "hidden, or in a hidden folder"
    if path.suffix not in (".safetensors", ".mp4") and _TOKEN.search(path.read_bytes()):
        return "it contains an access token"
    return None


def _is_release(path: Path, folder: Path) -> bool:
    is_known = path.parent == folder and _RELEASE.fullmatch(path.name) is not None
    return is_known and not (path.name.startswith("picture.") and path.stat().st_size > PICTURE_LIMIT)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more


def _check_weights(folder: Path, names: set[str]) -> None:
    """The safetensors files are whole, and one file or all shards of one index."""
    single, index = "model.safetensors" in names, "model.safetensors.index.json" in names
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if single and (index or shards):
        raise ValueError(f"{folder} holds model.safetensors and shards or an index: keep one of the two.")
    if not single and not index:
        raise ValueError(f"{folder} holds no weights: model.safetensors, or model.safetensors.index.json with shards.")
    tensors = {}
    for name in ["model.safetensors"] if single else shards:
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors[name] = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} is no safetensors file, or damaged: {error}") from error
    if index:
        try:
            wanted = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'model.safetensors.index.json'} is no index of shards: {error!r}") from error
        wrong = sorted(set(wanted.values()) ^ set(shards))
        wrong += sorted(name for name, shard in wanted.items() if name not in tensors.get(shard, ()))[:3]
        if wrong:
            raise ValueError(f"The shards in {folder} are not those of its index; differing: {_listed(wrong)}.")


def _check_record(folder: Path, names: set[str]) -> None:
    """The weights are those that `training.json` is the record of; older records, and shards, do not tell."""
    if not {"training.json", "model.safetensors"} <= names:
        return
    wanted, actual = read_json(folder / "training.json").get("weights_sha256"), sha256_of(folder / "model.safetensors")
    if wanted is not None and wanted != actual:
        raise ValueError(
            f"{folder / 'training.json'} is the record of other weights (sha256 {str(wanted)[:12]}...) than "
            f"model.safetensors (sha256 {actual[:12]}...): the file is damaged or was replaced. Fetch it again, or "
            "make the release anew with scripts/make_release.py."
        )


__all__ = ["collect_release", "collect_space", "is_replaced", "licence_text"]
