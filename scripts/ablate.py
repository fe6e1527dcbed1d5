"""
Ablation: trains every row of a table with the same steps, clips and initial weights, scores it, and keeps the record.

    python scripts/ablate.py --davis data/davis2016-train --static data/static --backbone data/mobilenet-v2.safetensors
    python scripts/ablate.py ... --rows labels full --minutes 9 --val data/davis2016-val
    python scripts/ablate.py ... --list

The table is recipes/ablation/rows.json: settings that all rows share, and by row what is different. Training goes
through `accelerate launch train_distill.py`, scoring through `deformvos evaluate` on the held-out sequences and, with
--val, once on DAVIS-2016 val. A call may be stopped at any moment, by --minutes or otherwise; the same call goes on
from the last checkpoint. What the record (docs/numbers/ablation.json) holds for the same settings, weights and data is
not done again. Several calls may share the work of one --work folder: a run that another one is busy with is passed
over.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from evidence import (
    NUMBERS,
    ROOT,
    Deadline,
    EvidenceError,
    OutOfTime,
    commit,
    describe_folder,
    describe_model,
    digest,
    guarded,
    held_out_of,
    last_lines,
    lock,
    read_record,
    rounded,
    run_command,
    score_model,
    sha256_of,
    update_record,
)

from hf_deformvos import DeformVosConfig, DeformVosModel
from hf_deformvos.evaluation.runner import describe_hardware, describe_versions
from hf_deformvos.training import TrainingConfig


TABLE = ROOT / "recipes" / "ablation" / "rows.json"
RECORD = NUMBERS / "ablation.json"
SETS = ("held-out", "val")
MACHINE_FILE = "machine.json"
# What a row may change in training. Steps, clips and starts are the same for all, or the command's to say.
_LOSSES = frozenset(
    (
        "supervision att_weight att_maps intra_weight inter_weight kl_weight representation_weight temperature "
        "cka_unbiased ce_weight jaccard_weight bootstrap_share bootstrap_warm_up"
    ).split()
)
_DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_BOOTSTRAP = 10_000


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row: what is different in training and model, or at inference in the weights of another row."""

    name: str
    title: str
    group: str = "ablation"
    train: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    of: str | None = None
    override: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """All rows, and what they share."""

    start: str
    teacher: str | None
    train: dict
    model: dict
    evaluate: dict
    rows: dict[str, Row]
    pairs: list[list[str]]


def read_table(path: Path, changes: list[str]) -> Table:
    """Reads and checks a table; `changes` are NAME=VALUE for what all rows share in training."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise EvidenceError(f"{path} must be JSON, got something else ({error}).") from error
    known = {"start", "teacher", "seeds", "train", "model", "evaluate", "rows", "pairs"}
    if unknown := sorted(set(content) - known):
        raise EvidenceError(f"{path} has unknown parts {unknown}; it may have {sorted(known)}.")
    train = {**content["train"], **dict(_read_change(change) for change in changes)}
    if not train.get("max_train_steps") or train.get("max_train_minutes"):
        raise EvidenceError("Rows are compared at equal steps: `train` needs `max_train_steps`, and no minutes.")
    TrainingConfig(**train)
    if unknown := sorted(set(content.get("model", {})) - set(DeformVosConfig().to_dict())):
        raise EvidenceError(f"`model` of {path} sets {unknown}, which no model has.")
    rows = {}
    for name, values in content["rows"].items():
        values = {"seeds": content.get("seeds", [0]), **values}
        rows[name] = Row(name, **{**values, "seeds": tuple(values["seeds"])})
    for row in list(rows.values()):
        if row.of is not None:
            rows[row.name] = _scored_weights_of(row, rows)
        _check_row(row, train)
    pairs = content.get("pairs", [])
    if lost := [name for pair in pairs for name in pair if name not in rows]:
        raise EvidenceError(f"`pairs` of {path} must name rows, got {lost}.")
    return Table(
        content.get("start", "fresh"),
        content.get("teacher"),
        train,
        content.get("model", {}),
        content.get("evaluate", {}),
        rows,
        pairs,
    )


def _read_change(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise EvidenceError(f"--set takes NAME=VALUE, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _scored_weights_of(row: Row, rows: dict[str, Row]) -> Row:
    """A row that scores another's weights, with that one's training."""
    source = rows.get(row.of)
    if source is None or source.of is not None or row.train or row.model:
        raise EvidenceError(f"Row {row.name!r} is `of` a row that is trained, and trains nothing; got {row.of!r}.")
    return Row(row.name, row.title, row.group, source.train, source.model, row.of, row.override, source.seeds)


def _check_row(row: Row, train: dict) -> None:
    if wrong := sorted(set(row.train) - _LOSSES):
        allowed = ", ".join(sorted(_LOSSES))
        raise EvidenceError(f"Row {row.name!r} must not set {wrong}: rows differ in losses alone ({allowed}).")
    TrainingConfig(**{**train, **row.train, "supervision": "labels"})
    DeformVosConfig(**row.model)
    # Configurations take any name, and a misspelt one would change nothing.
    if unknown := sorted({*row.model, *row.override} - set(DeformVosConfig().to_dict())):
        raise EvidenceError(f"Row {row.name!r} sets {unknown}, which no model has.")


def needs_teacher(settings: dict) -> bool:
    """Whether a run asks a teacher for anything."""
    weights = [value for name, value in settings.items() if name.endswith("_weight") and name not in _OWN_WEIGHTS]
    return settings["supervision"] != "labels" or any(weights)


_OWN_WEIGHTS = ("ce_weight", "jaccard_weight")


# ---- one run --------------------------------------------------------------------------------------------------------


class Run:
    """A row with a seed: what stands for it, where it is trained, how it is scored."""

    def __init__(self, row: Row, seed: int, setting: Setting):
        self.row, self.seed, self.setting = row, seed, setting
        shared = {"supervision": "labels", **setting.table.train}
        self.settings = {**shared, **row.train, "seed": seed}
        self.teacher = setting.teacher if needs_teacher(self.settings) else None
        self.lacks_teacher = needs_teacher(self.settings) and setting.teacher is None

    @cached_property
    def training(self) -> dict:
        """All that the weights depend on, without a path of this machine."""
        return {
            "settings": self.settings,
            "model": {**self.setting.table.model, **self.row.model},
            "start": self.setting.start,
            "teacher": None if self.teacher is None else describe_model(self.teacher),
            "data": self.setting.data,
        }

    @property
    def folder(self) -> Path:
        """Where it is trained; rows that score the same weights share it."""
        return self.setting.work / f"{self.row.of or self.row.name}-seed{self.seed}-{digest(self.training)[:8]}"

    @property
    def is_trained(self) -> bool:
        """Whether its weights are there."""
        return (self.folder / "all_results.json").is_file()

    @cached_property
    def key(self) -> str:
        """Its name in the record."""
        evaluation = {**self.setting.table.evaluate, "max_frames": self.setting.max_frames}
        return digest({"training": self.training, "override": self.row.override, "evaluate": evaluation})

    def train(self, deadline: Deadline) -> dict:
        """Trains, or goes on training; the run's results. `OutOfTime` leaves a checkpoint."""
        results = self.folder / "all_results.json"
        if self.is_trained:
            return json.loads(results.read_text())
        self.folder.mkdir(parents=True, exist_ok=True)
        setting = self.setting
        (self.folder / "student.json").write_text(json.dumps(setting.model_config(self.row.model), indent=2))
        values = {
            **self.settings,
            "student": str(self.folder / "student.json"),
            "init_from": str(setting.start_folder(self.seed)),
            "teacher": None if self.teacher is None else str(self.teacher),
            "davis_dirs": setting.davis,
            "static_dirs": setting.static,
            "cache_dir": setting.cache,
            "output_dir": str(self.folder),
            "resume_from_checkpoint": "latest",
        }
        path = self.folder / "settings.json"
        path.write_text(json.dumps(values, indent=2) + "\n")
        command = [sys.executable, "-m", "accelerate.commands.launch", *setting.launch, "train_distill.py", str(path)]
        with lock(self.folder / ".lock", wait=False) as held:
            if held is None:
                raise Busy
            code = run_command(command, self.folder / "train.log", deadline, (held,))
        if code:
            raise EvidenceError(f"training of {self.folder.name} ended with exit code {code}: {self.reason()}")
        (self.folder / MACHINE_FILE).write_text(json.dumps(self.machine(), indent=2))
        for leftover in [*self.folder.glob("checkpoint-*"), self.folder / "best"]:
            shutil.rmtree(leftover, ignore_errors=True)
        return json.loads(results.read_text())

    def reason(self) -> str:
        """What the log says went wrong."""
        log = self.folder / "train.log"
        errors = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error:")]
        return errors[-1] if errors else last_lines(log)

    def score(self, name: str, deadline: Deadline) -> dict:
        """Scores the weights on one of `SETS`."""
        setting, evaluate = self.setting, self.setting.table.evaluate
        if name == "val":
            dataset = ["--dataset", "davis2016", "--root", str(setting.val), "--split", "val"]
        else:
            held_out = held_out_of(setting.davis[0])
            dataset = ["--dataset", "davis2016", "--root", setting.davis[0], "--split", "train"]
            dataset += ["--sequences", *held_out]
        if setting.max_frames:
            dataset += ["--max-frames", str(setting.max_frames)]
        options = [f"--{option.replace('_', '-')}={value}" for option, value in evaluate.items()]
        for part, value in self.row.override.items():
            options += ["--override", f"{part}={json.dumps(value)}"]
        options += ["--threads", str(setting.threads), "--workers", str(setting.workers)]
        folder = self.folder / f"scores-{name}-{self.key}"
        with lock(self.folder / f".lock-{name}-{self.key}", wait=False) as held:
            if held is None:
                raise Busy
            return score_model(self.folder, dataset, options, folder, deadline)

    def machine(self) -> dict:
        """What trains here, and by which code; it may be scored elsewhere, and later."""
        device = torch.device("cuda" if torch.cuda.is_available() and "--cpu" not in self.setting.launch else "cpu")
        precision = TrainingConfig(mixed_precision=self.settings.get("mixed_precision", "auto")).mixed_precision
        return {
            "hardware": describe_hardware(device, _DTYPES[precision], self.setting.threads, 1),
            "launch": shlex.join(self.setting.launch),
            "versions": describe_versions(),
            "commit": commit(),
        }

    def entry(self, results: dict) -> dict:
        """What the record keeps of it, scores aside."""
        trained_by = self.folder / MACHINE_FILE
        return {
            **self.training,
            "override": self.row.override,
            "evaluate": {**self.setting.table.evaluate, "max_frames": self.setting.max_frames},
            "weights_sha256": results["sha256"],
            "steps": results["steps"],
            "clips": results["clips"],
            "parameters": results["parameters"],
            "train_seconds": round(60 * results["minutes"], 1),
            **(json.loads(trained_by.read_text()) if trained_by.is_file() else self.machine()),
            # Another row has that of the same weights.
            "curve": None if self.row.override else read_curve(self.folder / "log.jsonl"),
            "scores": {},
        }


class Busy(Exception):
    """Another process works on this run."""


def read_curve(path: Path) -> dict[str, dict[str, list[float]]]:
    """By name of a loss or score, the steps and values that a run logged."""
    curves: dict[str, dict[str, list[float]]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        for name, value in values.items():
            if (name.startswith("loss") or name == "eval_j") and value is not None:
                curve = curves.setdefault(name, {"step": [], "value": []})
                curve["step"].append(values["step"])
                curve["value"].append(float(f"{value:.5g}"))
    return curves


@dataclass
class Setting:
    """What a call was told: table, folders, machine."""

    table: Table
    work: Path
    davis: list[str]
    static: list[str]
    backbone: Path | None
    teacher: Path | None
    val: Path | None
    cache: str | None
    launch: list[str]
    threads: int
    workers: int
    max_frames: int | None

    @cached_property
    def data(self) -> dict:
        """What stands for the training data."""
        return {"davis": [describe_folder(f) for f in self.davis], "static": [describe_folder(f) for f in self.static]}

    @cached_property
    def start(self) -> dict:
        """What stands for the initial weights."""
        if self.table.start != "fresh":
            return describe_model(self.table.start)
        return {"name": "fresh", "backbone_sha256": None if self.backbone is None else sha256_of(self.backbone)}

    def model_config(self, changes: dict) -> dict:
        """The configuration of a row's model: the start's, the table's changes and the row's."""
        base = {}
        if self.table.start != "fresh":
            base = json.loads((Path(self.table.start) / "config.json").read_text())
        names = set(DeformVosConfig().to_dict()) - {"architectures", "dtype", "transformers_version"}
        known = {name: value for name, value in base.items() if name in names}
        return {"model_type": "deformvos", **known, **self.table.model, **changes}

    def start_folder(self, seed: int) -> Path:
        """
        The weights that every row takes over wherever names and shapes fit, so that rows start alike.

        Fresh ones are drawn once a seed, for the model that the table describes.
        """
        if self.table.start != "fresh":
            return Path(self.table.start).resolve()
        folder = self.work / f"start-seed{seed}-{digest([self.start, self.table.model])[:8]}"
        if not (folder / "config.json").is_file():
            torch.manual_seed(seed)
            model = DeformVosModel(DeformVosConfig(**self.table.model))
            if self.backbone is not None:
                model.load_backbone(str(self.backbone))
            part = folder.with_name(f".{folder.name}-{os.getpid()}")
            model.save_pretrained(part)
            try:
                part.rename(folder)
            except OSError:  # another call was quicker
                shutil.rmtree(part)
        return folder


# ---- summaries ------------------------------------------------------------------------------------------------------


def summarize(record: dict, runs: list[Run], table: Table) -> None:
    """Writes into the record, by row, means and spreads of the runs that belong to this table, and the comparisons."""
    found: dict[str, dict[int, dict]] = {}
    keys: dict[str, dict[str, str]] = {}
    for run in runs:
        if run.key in record["runs"]:
            found.setdefault(run.row.name, {})[run.seed] = record["runs"][run.key]
            keys.setdefault(run.row.name, {})[str(run.seed)] = run.key
    record["rows"] = [
        {**_summarize_row(row, found[name]), "runs": keys[name]} for name, row in table.rows.items() if name in found
    ]
    record["missing"] = [row.title for row in table.rows.values() if row.name not in found]
    record["pairs"] = [
        comparison
        for one, other in table.pairs
        for name in SETS
        if (comparison := compare(one, other, name, found)) is not None
    ]


def _summarize_row(row: Row, entries: dict[int, dict]) -> dict:
    first = next(iter(entries.values()))
    summary = {
        "name": row.name,
        "title": row.title,
        "group": row.group,
        "steps": first["steps"],
        "clips": first["clips"],
        "parameters": first["parameters"],
        "train_seconds": round(statistics.mean(entry["train_seconds"] for entry in entries.values()), 1),
        "scores": {},
    }
    for name in SETS:
        scores = {seed: entry["scores"][name]["JF"] for seed, entry in entries.items() if name in entry["scores"]}
        if scores:
            values = list(scores.values())
            summary["scores"][name] = {
                "mean": round(statistics.mean(values), 5),
                "deviation": round(statistics.stdev(values), 5) if len(values) > 1 else None,
                "seeds": list(scores),
                "values": rounded(values),
                "num_sequences": len(
                    next(e for e in entries.values() if name in e["scores"])["scores"][name]["sequences"]
                ),
            }
    return summary


def compare(one: str, other: str, name: str, found: dict[str, dict[int, dict]]) -> dict | None:
    """
    What the first row has above the second, seed by seed and sequence by sequence; `None` where no seed has both.

    The interval is a 95 % bootstrap over sequences of their means over seeds: it says how much the choice of
    sequences matters, and knows of seeds only what those that were run show.
    """
    seeds = [
        seed
        for seed in found.get(one, {})
        if seed in found.get(other, {}) and all(name in found[row][seed]["scores"] for row in (one, other))
    ]
    if not seeds:
        return None
    scores = [[found[row][seed]["scores"][name]["sequences"] for seed in seeds] for row in (one, other)]
    sequences = sorted(scores[0][0])
    table = np.array([[mine[item] - theirs[item] for item in sequences] for mine, theirs in zip(*scores, strict=True)])
    means = table.mean(0)
    drawn = np.random.default_rng(0).integers(0, len(means), (_BOOTSTRAP, len(means)))
    low, high = np.quantile(means[drawn].mean(1), [0.025, 0.975])
    return {
        "one": one,
        "other": other,
        "set": name,
        "seeds": seeds,
        "difference": round(float(means.mean()), 5),
        "by_seed": rounded(table.mean(1)),
        "by_sequence": dict(zip(sequences, rounded(means), strict=True)),
        "better": int((table > 0).sum()),
        "compared": int(table.size),
        "interval": rounded([low, high]),
    }


# ---- the command ----------------------------------------------------------------------------------------------------


def work_through(runs: list[Run], setting: Setting, path: Path, deadline: Deadline) -> list[str]:
    """Trains and scores what is missing, in order; what went wrong, a line each."""
    problems = []
    sets = SETS if setting.val else SETS[:1]
    every = all_runs(setting)
    for run in runs:
        name = f"{run.row.name}, seed {run.seed}"
        if run.lacks_teacher:
            problems.append(f"{name}: needs a teacher, and {setting.table.teacher} holds none; give --teacher")
            continue
        try:
            for missing in [s for s in sets if s not in scores_of(read_record(path, "ablation"), run)]:
                if not run.is_trained:
                    print(f"{name}: training", flush=True)
                entry = run.entry(run.train(deadline))
                print(f"{name}: scoring on {missing}", flush=True)
                entry["scores"] = {missing: run.score(missing, deadline)}
                update_record(path, "ablation", partial(keep, run=run, entry=entry, runs=every, table=setting.table))
                print(f"{name}: J&F {entry['scores'][missing]['JF']:.4f} on {missing}", flush=True)
        except Busy:
            problems.append(f"{name}: another process is busy with it")
        except EvidenceError as error:
            problems.append(f"{name}: {error}")
    return problems


def keep(record: dict, run: Run, entry: dict, runs: list[Run], table: Table) -> None:
    """Puts a run's results into the record and summarises it anew."""
    record["command"] = "python scripts/ablate.py"
    known = record.setdefault("runs", {}).get(run.key)
    if known is None or known["weights_sha256"] != entry["weights_sha256"]:
        # Trained again, with other rounding: scores of two sets of weights are not one row's.
        record["runs"][run.key] = entry
    else:
        known["scores"] |= entry["scores"]
    summarize(record, runs, table)


def scores_of(record: dict, run: Run) -> dict:
    """The scores that the record holds of a run."""
    return record.get("runs", {}).get(run.key, {}).get("scores", {})


def all_runs(setting: Setting) -> list[Run]:
    """Every row with its seeds, the first seed of all before the second of any."""
    rows = setting.table.rows.values()
    most = max(len(row.seeds) for row in rows)
    return [Run(row, row.seeds[turn], setting) for turn in range(most) for row in rows if turn < len(row.seeds)]


def chosen_runs(setting: Setting, names: list[str] | None) -> list[Run]:
    """The runs of the rows or groups that are named, all by default."""
    rows = setting.table.rows
    known = {*rows, *(row.group for row in rows.values())}
    if unknown := sorted(set(names or ()) - known):
        raise EvidenceError(f"--rows takes rows and groups of the table ({', '.join(sorted(known))}), got {unknown}.")
    return [run for run in all_runs(setting) if not names or {run.row.name, run.row.group} & set(names)]


def show(runs: list[Run], record: dict) -> None:
    """Prints what there is and what is missing."""
    print(f"{'row':<20}{'seed':>5}  {'trained':<16}{'held-out':>9}{'val':>9}")
    missing = 0
    for run in runs:
        scores = scores_of(record, run)
        missing += "held-out" not in scores
        state = "no teacher" if run.lacks_teacher else "yes" if scores else _progress(run)
        cells = "".join(f"{scores[name]['JF']:>9.4f}" if name in scores else f"{'-':>9}" for name in SETS)
        print(f"{run.row.name:<20}{run.seed:>5}  {state:<16}{cells}")
    print(f"{len(runs) - missing} of {len(runs)} scored on the held-out sequences.")
    for pair in record.get("pairs", []):
        low, high = pair["interval"]
        print(
            f"{pair['one']} - {pair['other']} on {pair['set']}: {100 * pair['difference']:+.2f} points "
            f"({100 * low:+.2f} to {100 * high:+.2f}), {pair['better']} of {pair['compared']} sequences better"
        )


def _progress(run: Run) -> str:
    if run.is_trained:
        return "yes, not scored"
    steps = [int(path.name.partition("-")[2]) for path in run.folder.glob("checkpoint-*")]
    return f"to step {max(steps)}" if steps else "no"


def read_setting(options: argparse.Namespace) -> Setting:
    """Checks what the command line says."""
    table = read_table(options.table, options.set)
    if options.start is not None or table.start != "fresh":
        table = replace(table, start=options.start or _below_root(table.start))
    teacher = Path(options.teacher or _below_root(table.teacher or "none"))
    if options.teacher and not (teacher / "model.safetensors").is_file():
        raise EvidenceError(f"--teacher must be a folder with a trained model, got {options.teacher}.")
    if table.start == "fresh" and options.backbone is None:
        raise EvidenceError(
            "A fresh start needs --backbone, the safetensors file of the pretrained backbone (or 'none')."
        )
    cpu = ["--cpu"] * (not torch.accelerator.is_available())
    launch = shlex.split(options.launch) if options.launch else [*cpu, "--num_processes", "1"]
    return Setting(
        table=table,
        work=options.work.resolve(),
        davis=[str(Path(folder).resolve()) for folder in options.davis],
        static=[str(Path(folder).resolve()) for folder in options.static],
        backbone=None if options.backbone in (None, "none") else Path(options.backbone).resolve(),
        teacher=teacher.resolve() if (teacher / "model.safetensors").is_file() else None,
        val=options.val and options.val.resolve(),
        cache=options.cache,
        launch=[*launch, "--num_cpu_threads_per_process", str(options.threads)],
        threads=options.threads,
        workers=options.workers,
        max_frames=options.max_frames,
    )


def _below_root(name: str) -> str:
    return name if Path(name).is_absolute() or Path(name).exists() else str(ROOT / name)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE, help="rows and what they share (default %(default)s)")
    parser.add_argument("--davis", nargs="+", default=[], help="DAVIS-layout folders; the first has the held-out ones")
    parser.add_argument("--static", nargs="+", default=[], help="folders of image sets")
    parser.add_argument("--backbone", help="pretrained backbone of a fresh start, or none")
    parser.add_argument("--teacher", help="folder of the teacher, instead of the table's")
    parser.add_argument("--start", help="fresh, or a model folder whose weights all rows take over")
    parser.add_argument("--val", type=Path, help="DAVIS-2016 folder; scores its validation set, once a run")
    parser.add_argument("--rows", nargs="+", help="only these rows, or groups of rows")
    parser.add_argument("--minutes", type=float, help="stop after that time; the same call goes on")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing, and do nothing")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablation", help="folder of the runs")
    parser.add_argument("--cache", help="folder of decoded data")
    parser.add_argument("--json", type=Path, help=f"the record (default {RECORD.relative_to(ROOT)})")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--workers", type=int, default=1, help="processes that score")
    parser.add_argument("--launch", help="options of `accelerate launch`, such as '--multi_gpu --num_processes 2'")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="training, for all rows")
    parser.add_argument("--max-frames", type=int, help="score only so many frames of a sequence: a rehearsal")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Does what is missing; the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if (options.set or options.max_frames) and options.json is None:
        raise EvidenceError("A rehearsal (--set, --max-frames) needs --json: its figures do not go into the texts.")
    if not options.davis:
        raise EvidenceError("Give --davis, the folder of training videos with the held-out sequences.")
    path = options.json or RECORD
    setting = read_setting(options)
    runs = chosen_runs(setting, options.rows)
    if options.list:
        show(runs, read_record(path, "ablation"))
        return 0
    stopped, problems = False, []
    try:
        problems = work_through(runs, setting, path, Deadline(options.minutes))
    except OutOfTime:
        stopped = True
    show(runs, read_record(path, "ablation"))
    for problem in problems:
        print(f"not done: {problem}", file=sys.stderr)
    if stopped:
        print("The time is up; the same call goes on from here.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(guarded(main))
