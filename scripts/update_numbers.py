"""Measure the figures that the texts state, record where each comes from, and keep the texts true to the record.

    python scripts/update_numbers.py measure --data DIR    evaluate, write docs/numbers/*.json, then render
    python scripts/update_numbers.py render                write the figures of the JSON files into the texts
    python scripts/update_numbers.py check                 exit 1 and say where texts, JSON files and weights disagree

A text (README.md, docs/**/*.md, hub_cards/*/README.md) takes a figure between two comments,
`<!-- numbers:NAME:begin -->` and `<!-- numbers:NAME:end -->`. NAME is a record, that is a file of docs/numbers without
`.json`, which gives a table of its means; `RECORD.sequences`, a table of its sequences; or `RECORD.FIELD`, one value
inside a sentence. A record that scripts/measure_budget.py wrote gives a table of its cases.

The file is not called numbers.py: beside it, NumPy would import it in place of the standard library's module.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?P<begin><!-- numbers:(?P<name>[\w.-]+):begin -->)(?P<body>.*?)(?P<end><!-- numbers:(?P=name):end -->)",
    re.DOTALL,
)
MARKER = re.compile(r"<!-- numbers:[^>]*-->")
NOT_MEASURED = "Not measured yet: `make numbers DATA=...` fills this in."
NUM_SEQUENCES = 20  # of DAVIS-2016 val: figures of a part of it must not pass for its
ENDINGS = {"mean": "", "recall": "-recall", "decay": "-decay"}
MEASURES = ("JF", "J", "J-recall", "J-decay", "F", "F-recall", "F-decay")


class NumbersError(Exception):
    """A text or record that cannot be used; the message says which, and what to do."""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def texts(root: Path) -> list[Path]:
    """The files that may state figures."""
    return [
        path
        for pattern in ("README.md", "docs/**/*.md", "hub_cards/*/README.md")
        for path in sorted(root.glob(pattern))
        if path.is_file()
    ]


def load_records(root: Path) -> dict[str, dict]:
    """Every record of docs/numbers, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((root / "docs" / "numbers").glob("*.json"))}


def measures_of(scores: dict) -> dict[str, float]:
    """The seven measures of a summary, by the names that markers use (which have no `&`)."""
    return {
        "JF": scores["J&F"],
        **{f"{key}{end}": scores[key][name] for key in "JF" for name, end in ENDINGS.items()},
    }


def fields_of(record: dict) -> dict[str, str]:
    """Every single value that a text may state, as it is written there."""
    totals = record["totals"]
    return {name: f"{value:.3f}" for name, value in measures_of(totals).items()} | {
        "parameters": f"{record['facts']['num_parameters'] / 1e6:.2f} M",
        "megabytes": f"{record['weights_bytes'] / 1e6:.1f} MB",
        "frames-per-second": f"{totals['frames_per_second']:.1f}",
        "network-ms": f"{totals['network_ms_median']:.0f} ms",
        "num-sequences": str(record["dataset"]["num_sequences"]),
        "num-frames": str(record["dataset"]["num_frames"]),
    }


def render_means(record: dict) -> str:
    """A Markdown table of one record's means, and how it was measured."""
    fields, hardware = fields_of(record), record["hardware"]
    columns = {name.replace("JF", "J&F").replace("-", " "): fields[name] for name in MEASURES}
    columns |= {"parameters": fields["parameters"], "weights": fields["megabytes"]}
    columns |= {"network, a frame": fields["network-ms"], "whole stream, frames/s": fields["frames-per-second"]}
    origin = (
        f"`{record['command']}`: {fields['num-sequences']} sequences, {fields['num-frames']} frames, in "
        f"{hardware['dtype']} on {hardware['device_name']} ({hardware['threads_per_process']} threads), PyTorch "
        f"{record['versions']['torch']}; weights sha256 `{record['weights_sha256'][:12]}…`."
    )
    rows = [" | ".join(columns), " | ".join(["---:"] * len(columns)), " | ".join(columns.values())]
    return "\n".join(f"| {row} |" for row in rows) + "\n\n" + origin


def render_cases(record: dict) -> str:
    """A Markdown table of what architectures or numbers of objects cost."""
    hardware = record["hardware"]
    rows = ["| case | time a frame | GMACs | parameters |", "|---|---:|---:|---:|"]
    for name, case in record["cases"].items():
        row = (name, f"{case['milliseconds']:.0f} ms", f"{case['gmacs']:.2f}", f"{case['parameters'] / 1e6:.2f} M")
        rows.append(f"| {' | '.join(row)} |")
    height, width = record["frame"]
    origin = (
        f"`{record['command']}`: frames of {width}x{height}, network alone, medians of cases timed in turn, on "
        f"{hardware['device_name']} ({hardware['threads_per_process']} threads)."
    )
    return "\n".join(rows) + "\n\n" + origin


def render_sequences(record: dict) -> str:
    """A Markdown table with one row a sequence."""
    rows = ["| sequence | J&F | J | F |", "|---|---:|---:|---:|"]
    for scores in sorted(record["sequences"], key=lambda scores: scores["name"]):
        measures = measures_of(scores)
        rows.append(f"| {scores['name']} | {measures['JF']:.3f} | {measures['J']:.3f} | {measures['F']:.3f} |")
    return "\n".join(rows)


def render_block(name: str, records: dict[str, dict]) -> str:
    """What stands between the markers of NAME, newlines included."""
    record_name, _, view = name.partition(".")
    if record_name not in records:
        return NOT_MEASURED if view not in ("", "sequences") else f"\n{NOT_MEASURED}\n"
    record = records[record_name]
    if "cases" in record:
        return f"\n{render_cases(record)}\n"
    if view == "":
        return f"\n{render_means(record)}\n"
    if view == "sequences":
        return f"\n{render_sequences(record)}\n"
    fields = fields_of(record)
    if view not in fields:
        raise NumbersError(f"numbers:{name}: {record_name}.json has no field {view!r}; it has {', '.join(fields)}")
    return fields[view]


def render_text(text: str, records: dict[str, dict]) -> str:
    """The text with every block between markers written anew."""
    blocks = list(BLOCK.finditer(text))
    if len(MARKER.findall(text)) != 2 * len(blocks):
        raise NumbersError("markers do not pair up: each numbers:NAME:begin needs its own numbers:NAME:end after it")
    return BLOCK.sub(lambda match: match["begin"] + render_block(match["name"], records) + match["end"], text)


def render(root: Path = ROOT) -> list[Path]:
    """Write the records' figures into the texts; the files that changed."""
    records, changed = load_records(root), []
    for path in texts(root):
        before = path.read_text()
        after = render_text(before, records)
        if after != before:
            path.write_text(after)
            changed.append(path)
    return changed


def check(root: Path = ROOT) -> list[str]:
    """A sentence for each text, record or weights file that disagrees with another; none when all is well."""
    records, problems = load_records(root), []
    for path in texts(root):
        text = path.read_text()
        try:
            if render_text(text, records) != text:
                problems.append(f"{path.relative_to(root)} states other figures than docs/numbers: run `make numbers`")
        except NumbersError as error:
            problems.append(f"{path.relative_to(root)}: {error}")
    for name, record in records.items():
        if "cases" in record:  # measured with random weights: cost does not depend on them
            continue
        weights = root / record["model"] / "model.safetensors"
        if not weights.is_file():
            problems.append(f"docs/numbers/{name}.json was measured with {record['model']}, whose weights are missing")
        elif sha256_of(weights) != record["weights_sha256"]:
            problems.append(f"docs/numbers/{name}.json was measured with other weights than {record['model']} holds")
    return problems


def measure(data: Path, model: str, extra: list[str], root: Path = ROOT) -> Path:
    """Run the evaluation on the whole of DAVIS-2016 val and write its record; the record's path."""
    weights, dataset = root / model / "model.safetensors", data / "davis2016-val"
    for path, what in ((weights, "the weights"), (dataset / "JPEGImages", "the frames of DAVIS-2016 val")):
        if not path.exists():
            raise NumbersError(f"{what} are missing: {path} does not exist")
    options = ["--model", model, "--dataset", "davis2016", "--split", "val", *extra]
    with tempfile.TemporaryDirectory() as folder:
        report_path = Path(folder) / "report.json"
        arguments = [*options, "--root", str(dataset), "--json", str(report_path)]
        subprocess.run([sys.executable, "-m", "hf_deformvos", "evaluate", *arguments], check=True, cwd=root)
        report = json.loads(report_path.read_text())
    if report["dataset"]["num_sequences"] != NUM_SEQUENCES:
        count = report["dataset"]["num_sequences"]
        raise NumbersError(f"{dataset} must hold the {NUM_SEQUENCES} sequences of DAVIS-2016 val, got {count}")
    record = as_record(report, model, weights, shlex.join(["deformvos", "evaluate", *options, "--root", dataset.name]))
    output = root / "docs" / "numbers" / f"{Path(model).name}-davis2016-val.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    return output


def measure_budget(root: Path = ROOT):
    """Measure what the student's architecture costs, as it is and with parts of it changed."""
    for name, options in (("budget", []), ("budget-variants", ["--variants"])):
        output = root / "docs" / "numbers" / f"{name}.json"
        script = root / "scripts" / "measure_budget.py"
        subprocess.run([sys.executable, str(script), *options, "--json", str(output)], check=True, cwd=root)


def as_record(report: dict, model: str, weights: Path, command: str) -> dict:
    """What is kept of an evaluation's report: no value a frame, no path of the machine it ran on."""
    sha256 = sha256_of(weights)
    if report["weights_sha256"] != sha256:
        raise NumbersError(f"{weights} changed while it was evaluated; nothing was recorded, run it again")
    kept = ("name", "J&F", "J", "F")
    return {
        "model": model,
        "weights_sha256": sha256,
        "weights_bytes": weights.stat().st_size,
        "command": command,
        "facts": report["model"],
        "hardware": report["hardware"],
        "versions": report["versions"],
        "dataset": {key: value for key, value in report["dataset"].items() if key != "root"},
        "totals": report["totals"],
        "sequences": [{key: scores[key] for key in kept} for scores in report["sequences"]],
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one of the three commands; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="evaluate, record and render")
    measuring.add_argument("--data", type=Path, required=True, help="folder that holds davis2016-val")
    measuring.add_argument("--model", default="hub_cards/deformvos-student", help="folder with the weights, in here")
    measuring.add_argument("--budget", action="store_true", help="measure what the architecture costs, too")
    measuring.add_argument("extra", nargs="*", help="after --, further options of `deformvos evaluate`")
    commands.add_parser("render", help="write the recorded figures into the texts")
    commands.add_parser("check", help="compare texts, records and weights")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            problems = check()
            print("\n".join(problems) or "The texts state what was measured, with these weights.")
            return 1 if problems else 0
        if options.command == "measure":
            written = measure(options.data.expanduser().resolve(), options.model, options.extra)
            print(f"Wrote {written.relative_to(ROOT)}")
            if options.budget:
                measure_budget()
        for path in render():
            print(f"Updated {path.relative_to(ROOT)}")
        return 0
    except subprocess.CalledProcessError as error:
        print(f"error: the evaluation ended with exit code {error.returncode}; nothing was recorded", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1
    except NumbersError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
