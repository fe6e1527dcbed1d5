"""Measure the figures that the texts state, record where each comes from, and keep the texts true to the record.

    python scripts/update_numbers.py measure --data DIR    evaluate, write docs/numbers/*.json, then render
    python scripts/update_numbers.py render                write the figures of the JSON files into the texts
    python scripts/update_numbers.py check                 exit 1 and say where texts, JSON files and weights disagree

A text (README.md, docs/**/*.md, hub_cards/*/README.md) takes a figure between two comments,
`<!-- numbers:NAME:begin -->` and `<!-- numbers:NAME:end -->`. NAME is a record, that is a file of docs/numbers without
`.json`, which gives a table of its means; `RECORD.sequences`, a table of its sequences; or `RECORD.FIELD`, one value
inside a sentence.

The file is not called numbers.py: beside it, NumPy would import it in place of the standard library's module.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
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
MEANS = ("J&F-Mean", "J-Mean", "J-Recall", "J-Decay", "F-Mean", "F-Recall", "F-Decay")


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


def render_means(record: dict) -> str:
    """A Markdown table of one record's means, and how it was measured."""
    results = record["results"]
    header = " | ".join(name.replace("-Mean", "").replace("-", " ") for name in MEANS)
    rows = [
        f"| {header} | parameters | frames a second |",
        "|" + "---:|" * (len(MEANS) + 2),
        f"| {' | '.join(f'{results[name]:.3f}' for name in MEANS)} | {record['parameters'] / 1e6:.2f} M "
        f"| {results['fps']:.1f} |",
    ]
    origin = (
        f"`{record['command']}`, {len(record['sequences'])} sequences, on {record['environment']['processor']} "
        f"({record['environment']['threads']} threads), PyTorch {record['environment']['torch']}; weights sha256 "
        f"`{record['weights_sha256'][:12]}…`."
    )
    return "\n".join(rows) + "\n\n" + origin


def render_sequences(record: dict) -> str:
    """A Markdown table with one row a sequence."""
    rows = ["| sequence | J&F | J | F |", "|---|---:|---:|---:|"]
    for name, scores in sorted(record["sequences"].items()):
        rows.append(f"| {name} | {scores['J&F-Mean']:.3f} | {scores['J-Mean']:.3f} | {scores['F-Mean']:.3f} |")
    return "\n".join(rows)


def render_block(name: str, records: dict[str, dict]) -> str:
    """What stands between the markers of NAME, newlines included."""
    record_name, _, view = name.partition(".")
    if record_name not in records:
        return NOT_MEASURED if view not in ("", "sequences") else f"\n{NOT_MEASURED}\n"
    record = records[record_name]
    if view == "":
        return f"\n{render_means(record)}\n"
    if view == "sequences":
        return f"\n{render_sequences(record)}\n"
    # Marker names hold no "&"; JF-Mean stands for J&F-Mean.
    fields = {key.replace("&", ""): value for key, value in record["results"].items()}
    fields["parameters"] = f"{record['parameters'] / 1e6:.2f} M"
    if view not in fields:
        raise NumbersError(f"numbers:{name}: {record_name}.json has no field {view!r}; it has {', '.join(fields)}")
    value = fields[view]
    return f"{value:.3f}" if isinstance(value, float) else str(value)


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
        weights = root / record["model"] / "model.safetensors"
        if not weights.is_file():
            problems.append(f"docs/numbers/{name}.json was measured with {record['model']}, whose weights are missing")
        elif sha256_of(weights) != record["weights_sha256"]:
            problems.append(f"docs/numbers/{name}.json was measured with other weights than {record['model']} holds")
    return problems


def processor_name() -> str:
    """The processor's model name, as the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict:
    """What the figures depend on besides the weights."""
    import numpy
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def count_parameters(model_dir: Path) -> int:
    """Parameters of the model that a folder holds."""
    from transformers import AutoModel

    import hf_deformvos  # noqa: F401  registers the Auto classes

    return sum(parameter.numel() for parameter in AutoModel.from_pretrained(model_dir).parameters())


def measure(data: Path, model: str, root: Path = ROOT) -> Path:
    """Run the evaluation on the whole of DAVIS-2016 val and write its record; the record's path."""
    weights, dataset = root / model / "model.safetensors", data / "davis2016-val"
    for path, what in ((weights, "the weights"), (dataset / "JPEGImages", "the frames of DAVIS-2016 val")):
        if not path.exists():
            raise NumbersError(f"{what} are missing: {path} does not exist")
    sha256, options = sha256_of(weights), ["--dataset", "davis2016", "--split", "val"]
    with tempfile.TemporaryDirectory() as folder:
        report_path = Path(folder) / "report.json"
        arguments = ["--model", model, *options, "--root", str(dataset), "--json", str(report_path)]
        subprocess.run([sys.executable, "-m", "hf_deformvos", "evaluate", *arguments], check=True, cwd=root)
        report = json.loads(report_path.read_text())
    record = {
        "model": model,
        "weights_sha256": sha256,
        "weights_bytes": weights.stat().st_size,
        "parameters": count_parameters(root / model),
        "command": " ".join(["deformvos evaluate --model", model, *options, "--root davis2016-val"]),
        "environment": environment(),
        "results": report["results"],
        "sequences": report["sequences"],
    }
    output = root / "docs" / "numbers" / f"{Path(model).name}-davis2016-val.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return output


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one of the three commands; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="evaluate, record and render")
    measuring.add_argument("--data", type=Path, required=True, help="folder that holds davis2016-val")
    measuring.add_argument("--model", default="hub_cards/deformvos-student", help="folder with the weights, in here")
    commands.add_parser("render", help="write the recorded figures into the texts")
    commands.add_parser("check", help="compare texts, records and weights")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            problems = check()
            print("\n".join(problems) or "The texts state what was measured, with these weights.")
            return 1 if problems else 0
        if options.command == "measure":
            written = measure(options.data.expanduser().resolve(), options.model)
            print(f"Wrote {written.relative_to(ROOT)}")
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
