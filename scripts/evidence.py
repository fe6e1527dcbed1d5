"""
What the commands that gather evidence have in common: records that several processes may write, time limits, commands
that are stopped whole, and the evaluation on held-out sequences. Not a command itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_deformvos.data import HELD_OUT_SEQUENCES
from hf_deformvos.data.davis import davis_sequences
from hf_deformvos.evaluation.layouts import EvaluationDataset, load_dataset_layout
from hf_deformvos.inference import sha256_of


ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ROOT / "docs" / "numbers"
_GRACE = 10.0  # seconds that a command has to end by itself


class EvidenceError(Exception):
    """What the user can mend; the message says how."""


class OutOfTime(Exception):
    """The call's minutes are used up; what is done is kept."""


class Deadline:
    """The end of a call, `None` minutes being never."""

    def __init__(self, minutes: float | None):
        self.end = None if minutes is None else time.monotonic() + 60 * minutes

    def remaining(self) -> float | None:
        """Seconds left; `OutOfTime` if there are none."""
        if self.end is None:
            return None
        left = self.end - time.monotonic()
        if left <= 0:
            raise OutOfTime
        return left


def guarded(main: Callable[[], int]) -> int:
    """Runs a command; what users can mend is one line and exit code 2, a stopped process ends its own commands."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return main()
    except (EvidenceError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# ---- records --------------------------------------------------------------------------------------------------------


def read_record(path: Path, kind: str) -> dict:
    """The record in a file, empty where there is none; `EvidenceError` if it is of another kind."""
    if not path.is_file():
        return {"kind": kind}
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise EvidenceError(f"{path} must be JSON, got something else ({error}); mend or remove it.") from error
    if record.get("kind") != kind:
        raise EvidenceError(f"{path} must be a record of kind {kind!r}, got {record.get('kind')!r}.")
    return record


def write_record(path: Path, record: dict) -> None:
    """Writes a record whole or not at all, lists of numbers on one line."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[\s+((?:[-\d.eE]+|null)(?:,\s+(?:[-\d.eE]+|null))*)\s+\]", _on_one_line, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n")
    os.replace(part, path)


def _on_one_line(match: re.Match) -> str:
    return "[" + re.sub(r"\s+", " ", match[1]) + "]"


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[int | None]:
    """Holds a lock file; yields its descriptor, or `None` if another process holds it and this one does not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def update_record(path: Path, kind: str, change: Callable[[dict], None]) -> dict:
    """Reads, changes and writes a record while no other process does; returns it."""
    # A lock that is removed after use would be no lock to a process that waits for it.
    with lock(Path(tempfile.gettempdir()) / f"deformvos-{digest(str(path.resolve()))}.lock"):
        record = read_record(path, kind)
        change(record)
        write_record(path, record)
    return record


# ---- identities -----------------------------------------------------------------------------------------------------


def digest(content) -> str:
    """Sixteen hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def describe_model(folder: str | Path) -> dict:
    """Name and SHA-256 of a model folder's weights; `EvidenceError` if there are none."""
    weights = Path(folder) / "model.safetensors"
    if not weights.is_file():
        raise EvidenceError(f"{folder} must be a folder with a trained model; {weights.name} is missing in it.")
    return {"name": Path(folder).resolve().name, "sha256": sha256_of(weights)}


def describe_folder(folder: str | Path) -> dict:
    """Name of a folder of data, and what stands for the names of its files."""
    folder = Path(folder)
    if not folder.is_dir():
        raise EvidenceError(f"The folder {folder} does not exist.")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {"name": folder.resolve().name, "num_files": len(names), "names": digest(names)}


def commit() -> str | None:
    """The commit that is checked out, where this is a checkout."""
    command = ["git", "-c", f"safe.directory={ROOT}", "rev-parse", "--short=12", "HEAD"]
    if shutil.which("git") is None:
        return None
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or None


def read_pairs(option: str, pairs: list[str]) -> dict[str, str]:
    """What an option says of every label: LABEL=DIR, a model folder each."""
    if wrong := [pair for pair in pairs if not all(pair.partition("=")[::2])]:
        raise EvidenceError(f"{option} takes LABEL=DIR, got {wrong}.")
    return dict(pair.partition("=")[::2] for pair in pairs)


def held_out_of(root: str | Path) -> list[str]:
    """The held-out sequences that a DAVIS-layout folder has."""
    names = [name for name in davis_sequences(root) if name in HELD_OUT_SEQUENCES]
    if not names:
        raise EvidenceError(f"{root} has none of the held-out sequences {', '.join(HELD_OUT_SEQUENCES)}.")
    return names


def held_out_dataset(root: str | Path, max_frames: int | None = None) -> EvaluationDataset:
    """The held-out sequences of a DAVIS-layout folder as a benchmark, an object each."""
    return load_dataset_layout("davis2016", root, "train", held_out_of(root), max_frames)


def check_names(models: Iterable[str | Path]) -> None:
    """`EvidenceError` where folders of models share a name, by which records tell them apart."""
    names = [Path(model).resolve().name for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EvidenceError(f"--models must have different names, got {', '.join(twice)} twice: rename a folder.")


def check_head(record: dict, entries: str, head: dict) -> None:
    """`EvidenceError` where a record holds entries that were measured in another way than its head would say."""
    if record.get(entries):
        _check_same({name: record[name] for name in head if name in record}, head)


def _check_same(before: dict, now: dict) -> None:
    """`EvidenceError` where settings have changed: figures that do not compare stay apart."""
    changed = sorted(name for name, value in before.items() if now.get(name) != value)
    if changed:
        raise EvidenceError(
            f"The record was measured with other settings ({', '.join(changed)}): name another with --json, or remove "
            "it to measure everything anew."
        )


def open_model(record: dict, settings: dict, model: str | Path) -> dict:
    """
    The part of a record that belongs to a model, empty where its weights have changed since.

    Raises:
        EvidenceError: If the record was measured with other settings: figures that do not compare stay apart.
    """
    before = record.setdefault("settings", settings)
    _check_same({name: before.get(name) for name in {*before, *settings}}, settings)
    described = describe_model(model)
    models = record.setdefault("models", {})
    if models.get(described["name"], {}).get("sha256") != described["sha256"]:
        models[described["name"]] = {"sha256": described["sha256"]}
    return models[described["name"]]


def rounded(values: Iterable[float | None], digits: int = 5) -> list[float | None]:
    """Numbers for a record; no zero has a sign."""
    return [None if value is None else round(float(value), digits) + 0.0 for value in values]


# ---- commands -------------------------------------------------------------------------------------------------------


def run_command(command: list[str], log: Path, deadline: Deadline, descriptors: tuple[int, ...] = ()) -> int:
    """
    Runs a command and all that it starts, its output going to the end of `log`; its exit code.

    When the time is up, or this process is stopped, all of it is stopped. Whoever kills this process outright leaves
    the command running: it then still holds the lock whose descriptor it was given.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    timeout = deadline.remaining()
    with open(log, "a") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, pass_fds=descriptors
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise OutOfTime from error
        finally:
            if process.poll() is None:
                _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """Ends a command that leads its own group of processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def last_lines(log: Path, count: int = 3) -> str:
    """The end of a log, for messages."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return " / ".join(lines[-count:])[-600:]


def score_model(
    model: str | Path,
    dataset: list[str],
    options: list[str],
    folder: Path,
    deadline: Deadline,
) -> dict:
    """
    Runs `deformvos evaluate`; stopped, it goes on with the sequence that it had reached.

    Args:
        model: Folder of the weights.
        dataset: `--dataset`, `--root`, `--split` and the like.
        options: Further options.
        folder: For masks and report; removed once the scores are read.
        deadline: End of the call.

    Returns:
        `dict`: `JF`, `J`, `F`, `sequences` (J&F of each), `num_frames`, `seconds` of the last part, and `hardware`.
    """
    report_path, log = folder / "report.json", folder.with_name(f"{folder.name}.log")
    started = time.monotonic()
    arguments = ["evaluate", "--model", str(model), *dataset, *options]
    arguments += ["--save-masks", str(folder / "masks"), "--resume", "--json", str(report_path)]
    code = run_command([sys.executable, "-m", "hf_deformvos", *arguments], log, deadline)
    if code:
        raise EvidenceError(f"the evaluation of {model} ended with exit code {code}: {last_lines(log)}")
    report = json.loads(report_path.read_text())
    shutil.rmtree(folder)
    log.unlink()
    totals = report["totals"]
    return {
        "JF": totals["J&F"],
        "J": totals["J"]["mean"],
        "F": totals["F"]["mean"],
        "sequences": {entry["name"]: round(entry["J&F"], 5) for entry in report["sequences"]},
        "num_frames": report["dataset"]["num_frames"],
        "seconds": round(time.monotonic() - started, 1),
        "hardware": report["hardware"],
    }
