"""Measure the figures that the texts state, record where each comes from, and keep the texts true to the record.

    python scripts/update_numbers.py measure --data DIR    evaluate, write docs/numbers/*.json, then render
    python scripts/update_numbers.py remeasure --data DIR  every such record again, as it was, or those named
    python scripts/update_numbers.py recount               count the recorded models' parameters anew, then render
    python scripts/update_numbers.py render                write the figures of the JSON files into the texts
    python scripts/update_numbers.py check                 exit 1 and say where texts, JSON files and weights disagree

A text (README.md, docs/**/*.md, hub_cards/*/README.md) takes a figure between two comments,
`<!-- numbers:NAME:begin -->` and `<!-- numbers:NAME:end -->`. NAME is a record, that is a file of docs/numbers without
`.json`, which gives a table of its means; `RECORD.sequences`, a table of its sequences; or `RECORD.FIELD`, one value
inside a sentence. A record that scripts/measure_budget.py wrote gives a table of its cases. The records of evidence
(docs/EVIDENCE.md) give `ablation.GROUP`, `ablation.pairs`, `objects`, `memory`, `gradients`, `features`, and
`figures.NAME`, a picture. Records of `deformvos benchmark --json docs/numbers/benchmark-NAME.json` give
`benchmark-NAME`, `benchmark-NAME.stages`, `benchmark-NAME.memory`, `benchmark-NAME.peers` and `benchmark-NAME.start`;
`benchmark` in place of the name is all of them in one table.

The file is not called numbers.py: beside it, NumPy would import it in place of the standard library's module.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from hf_deformvos.publishing import cards, measurements
from hf_deformvos.publishing.measurements import (
    BENCHMARK_VIEWS,
    fields_of,
    is_benchmark,
    render_means,
    render_sequences,
    sha256_of,
    table,
)


ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?P<begin><!-- numbers:(?P<name>[\w.-]+):begin -->)(?P<body>.*?)(?P<end><!-- numbers:(?P=name):end -->)",
    re.DOTALL,
)
MARKER = re.compile(r"<!-- numbers:[^>]*-->")
NOT_MEASURED = "Not measured yet: `make numbers DATA=...` fills this in."
# What makes the records of evidence, which do not have `make numbers` to thank.
COMMANDS = {
    "ablation": "python scripts/ablate.py",
    "objects": "python scripts/measure_objects.py",
    "memory": "python scripts/measure_memory.py",
    "gradients": "python scripts/measure_gradients.py",
    "features": "python scripts/measure_features.py",
    "figures": "python scripts/make_figures.py",
    "benchmark": "deformvos benchmark --json docs/numbers/benchmark-NAME.json",
}
NUM_SEQUENCES = 20  # of DAVIS-2016 val: figures of a part of it must not pass for its


class NumbersError(Exception):
    """A text or record that cannot be used; the message says which, and what to do."""


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
    try:
        records = {path.stem: cards.read_json(path) for path in sorted((root / "docs" / "numbers").glob("*.json"))}
    except ValueError as error:
        raise NumbersError(str(error)) from error
    if unfinished := [name for name, record in records.items() if not record.get("complete", True)]:
        raise NumbersError(f"docs/numbers/{unfinished[0]}.json is of a measurement that did not end: make it again.")
    return records


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


def mean_with_spread(scores: dict | None) -> str:
    """Mean J&F and, of several seeds, their standard deviation, in points."""
    if scores is None:
        return "-"
    spread = "" if scores["deviation"] is None else f" ± {100 * scores['deviation']:.1f}"
    return f"{100 * scores['mean']:.1f}{spread}"


def render_ablation(record: dict, view: str) -> str:
    """Markdown of a group of rows, or of the comparisons between rows."""
    if view == "pairs":
        return render_pairs(record)
    chosen = [row for row in record["rows"] if view in ("", row["group"])]
    if not chosen:
        return f"No row of the group *{view}* has been run yet: `{COMMANDS['ablation']}` does."
    rows = [
        [
            row["title"],
            str(len(row["runs"])),
            *(mean_with_spread(row["scores"].get(name)) for name in ("held-out", "val")),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['train_seconds'] / 60:.1f} min",
        ]
        for row in chosen
    ]
    run = record["runs"][next(iter(chosen[0]["runs"].values()))]
    hardware, scores = run["hardware"], next(iter(run["scores"].values()))
    start = "fresh weights" if run["start"]["name"] == "fresh" else f"the weights of {run['start']['name']}"
    origin = (
        f"`{record['command']}`: {run['steps']} steps and {run['clips']} clips each, from {start}; J&F on "
        f"{len(scores['sequences'])} sequences that no run trains on, ± the standard deviation over seeds; trained in "
        f"{hardware['dtype']} on {hardware['device_name']}."
    )
    missing = record.get("missing")
    note = f"\n\nNot run yet: {'; '.join(missing)}." if missing else ""
    titles = ["row", "seeds", "J&F, held-out", "J&F, DAVIS-2016 val", "parameters", "training"]
    return f"{table(titles, rows)}\n\n{origin}{note}"


def render_pairs(record: dict) -> str:
    """A Markdown table of what one row has above another."""
    titles = {row["name"]: row["title"] for row in record["rows"]}
    rows = [
        [
            f"{titles[pair['one']]}, above {titles[pair['other']]}",
            "DAVIS-2016 val" if pair["set"] == "val" else pair["set"],
            str(len(pair["seeds"])),
            f"{100 * pair['difference']:+.1f}",
            f"{100 * pair['interval'][0]:+.1f} to {100 * pair['interval'][1]:+.1f}",
            f"{pair['better']} of {pair['compared']}",
        ]
        for pair in record["pairs"]
    ]
    if not rows:
        return "No two rows that are compared have been run yet."
    origin = (
        "Points of J&F, paired by seed and sequence. The interval is a 95 % bootstrap over sequences of their means "
        "over seeds: it knows of few seeds, and of no others."
    )
    return f"{table(['comparison', 'on', 'seeds', 'points', 'interval', 'better'], rows)}\n\n{origin}"


def render_objects(record: dict) -> str:
    """A Markdown table of J&F by number of objects, a model a pair of columns."""
    models, settings = record["models"], record["settings"]
    counts = [row["num_objects"] for row in next(iter(models.values())).get("summary", [])]
    rows = [[str(count)] for count in counts]
    for entry in models.values():
        by_count = {row["num_objects"]: row for row in entry.get("summary", [])}
        for row, count in zip(rows, counts, strict=True):
            found = by_count.get(count)
            row += [f"{100 * found['mean']:.1f}", f"{100 * found['first_mean']:.1f}"] if found else ["-", "-"]
    titles = ["objects", *(f"{name}, {what}" for name in models for what in ("all", "the clip's own"))]
    real = {video: result for entry in models.values() for video, result in entry.get("videos", {}).items()}
    for video, result in real.items():
        found = [entry.get("videos", {}).get(video) for entry in models.values()]
        cells = [(f"{100 * scores['JF']:.1f}" if scores else "-", "") for scores in found]
        rows.append([f"{result['num_objects']} ({video}, real)", *(cell for pair in cells for cell in pair)])
    weights = ", ".join(f"{name} `{entry['sha256'][:12]}…`" for name, entry in models.items())
    origin = (
        f"`{record['command']}`: synthetic composites of held-out sequences, {settings['max_frames']} frames each; "
        f"J&F of all objects, and of the clip's own, which is in every composite. Weights: {weights}."
    )
    return f"{table(titles, rows)}\n\n{origin}"


def render_gradients(record: dict) -> str:
    """A Markdown table of distillation losses, two columns for each student."""
    students = record["students"]
    rows = [
        [
            titled["title"],
            *(
                f"{value:.2f}"
                for student in students.values()
                for value in (student["terms"][term]["length"], student["terms"][term]["cosine"])
            ),
        ]
        for term, titled in next(iter(students.values()))["terms"].items()
    ]
    titles = ["loss", *(f"{label}: {what}" for label in students for what in ("length", "cosine"))]
    height, width = record["clips"]["size"]
    origin = (
        f"`{record['command']}`: medians over {record['batches']} batches of {record['clips']['batch']} clips of "
        f"{width}x{height}, teacher {record['teacher']['name']} `{record['teacher']['sha256'][:12]}…`."
    )
    return f"{table(titles, rows)}\n\n{origin}"


def render_features(record: dict) -> str:
    """A Markdown table of models, with J by what is compared."""
    rows = [
        [label, *(f"{100 * entry[part]['J']:.1f}" for part in ("backbone", "tokens")), f"`{entry['sha256'][:12]}…`"]
        for label, entry in record["models"].items()
    ]
    sequences = ", ".join(next(iter(record["models"].values()))["tokens"]["sequences"])
    origin = f"`{record['command']}`: mean J over {sequences}."
    return f"{table(['model', 'backbone', 'tokens', 'weights'], rows)}\n\n{origin}"


def render_memory(record: dict) -> str:
    """A Markdown table of cases, a model after the other."""
    rows, frames = [], 0
    for name, entry in record["models"].items():
        for case in entry["cases"].values():
            frames = case["num_frames"]
            known = case["peak_bytes"] is not None and case["loaded_bytes"] is not None
            above = f"{(case['peak_bytes'] - case['loaded_bytes']) / 1e6:.0f} MB" if known else "-"
            device = case["peak_device_bytes"]
            rows.append(
                [
                    name,
                    *(str(case[part]) for part in ("long_term_slots", "memory_interval", "short_side")),
                    f"{100 * case['JF']:.1f}",
                    f"{case['state_bytes'] / 1e6:.1f} MB",
                    above if device is None else f"{device / 1e6:.0f} MB on the GPU",
                    f"{case['network_ms']:.0f} ms",
                ]
            )
    titles = ["model", "slots", "interval", "short side", "J&F", "state", "peak above the model", "network"]
    origin = (
        f"`{record['command']}`: the held-out sequences, {frames} frames, one object, {record['settings']['dtype']}."
    )
    return f"{table(titles, rows)}\n\n{origin}"


def render_figure(record: dict, name: str, path: Path | None, root: Path) -> str:
    """A picture with its caption, or a sentence that says that it is not drawn yet."""
    figure = record["figures"].get(name)
    if figure is None:
        return f"Not drawn yet: `{COMMANDS['figures']}` does."
    file = root / "docs" / "images" / figure["file"]
    target = file.name if path is None else os.path.relpath(file, path.parent)
    return f"![{figure['caption']}]({target})\n\n*{figure['caption']}* (`{figure['command']}`)"


def render_evidence(record: dict, view: str, path: Path | None, root: Path) -> str:
    """What a record of evidence gives."""
    kind = record["kind"]
    if kind == "figures":
        return render_figure(record, view, path, root)
    if kind == "ablation":
        return render_ablation(record, view)
    renderers = {
        "objects": render_objects,
        "memory": render_memory,
        "gradients": render_gradients,
        "features": render_features,
    }
    return renderers[kind](record)


def render_benchmarks(name: str, view: str, records: dict[str, dict]) -> str:
    """A table of one benchmark, or of all of them."""
    if view not in BENCHMARK_VIEWS:
        known = ", ".join(view or "nothing" for view in BENCHMARK_VIEWS)
        raise NumbersError(f"numbers:{name}.{view}: a benchmark has no {view!r}; it has {known}")
    chosen = [record for key, record in records.items() if is_benchmark(record) and name in ("benchmark", key)]
    if view in ("peers", "start"):
        chosen = [record for record in chosen if view in record]
    return BENCHMARK_VIEWS[view](chosen) if chosen else f"Not measured yet: `{COMMANDS['benchmark']}` does."


def render_block(name: str, records: dict[str, dict], path: Path | None = None, root: Path = ROOT) -> str:
    """What stands between the markers of NAME in the text at `path`, newlines included."""
    record_name, _, view = name.partition(".")
    if record_name.partition("-")[0] == "benchmark":
        return f"\n{render_benchmarks(record_name, view, records)}\n"
    if record_name not in records:
        if record_name in COMMANDS:
            done = "drawn" if record_name == "figures" else "measured"
            return f"\nNot {done} yet: `{COMMANDS[record_name]}` does.\n"
        return NOT_MEASURED if view not in ("", "sequences") else f"\n{NOT_MEASURED}\n"
    record = records[record_name]
    if "kind" in record:
        return f"\n{render_evidence(record, view, path, root)}\n"
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


def render_text(text: str, records: dict[str, dict], path: Path | None = None, root: Path = ROOT) -> str:
    """The text with every block between markers written anew."""
    blocks = list(BLOCK.finditer(text))
    if len(MARKER.findall(text)) != 2 * len(blocks):
        raise NumbersError("markers do not pair up: each numbers:NAME:begin needs its own numbers:NAME:end after it")
    return BLOCK.sub(
        lambda match: match["begin"] + render_block(match["name"], records, path, root) + match["end"], text
    )


def render_file(path: Path, text: str, records: dict[str, dict], root: Path) -> str:
    """The text of a file as it should be: cards that were rendered, anew from their folder, metadata included."""
    if cards.is_sealed(text):
        try:
            cards.check_replaceable(path)
            return cards.render_card(path.parent, records)
        except ValueError as error:
            raise NumbersError(str(error)) from error
    return render_text(text, records, path, root)


def render(root: Path = ROOT) -> list[Path]:
    """Write the records' figures into the texts; the files that changed."""
    records, changed = load_records(root), []
    for path in texts(root):
        before = path.read_text()
        after = render_file(path, before, records, root)
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
            if render_file(path, text, records, root) != text:
                problems.append(f"{path.relative_to(root)} states other figures than docs/numbers: run `make numbers`")
        except NumbersError as error:
            problems.append(f"{path.relative_to(root)}: {error}")
    for name, record in records.items():
        if "kind" in record:  # says itself which weights it was measured with
            problems += check_figures(record, root) if record["kind"] == "figures" else []
            continue
        if "cases" in record:  # measured with random weights: cost does not depend on them
            continue
        weights = root / record["model"] / "model.safetensors"
        if not weights.is_file():
            problems.append(f"docs/numbers/{name}.json was measured with {record['model']}, whose weights are missing")
        elif sha256_of(weights) != record["weights_sha256"]:
            problems.append(f"docs/numbers/{name}.json was measured with other weights than {record['model']} holds")
        elif "exported" not in record:
            problems += check_parameters(name, record, weights.with_name("training.json"))
    return problems


def check_parameters(name: str, record: dict, training: Path) -> list[str]:
    """A sentence where a record counts other parameters than the record of the training, which the cards state too."""
    wanted = json.loads(training.read_text())["parameters"] if training.is_file() else None
    counted = record["facts"]["num_parameters"]
    if wanted in (None, counted):
        return []
    return [f"docs/numbers/{name}.json counts {counted} parameters, {training} {wanted}: `update_numbers.py recount`"]


def recount(root: Path = ROOT) -> list[Path]:
    """
    Count the parameters of the recorded models as their checkpoints hold them; the records that changed.

    A record may be older than the rule: evaluation runs a model whose batch norms are folded, and once counted what is
    left of them. The count follows from the configuration alone, so scores and times stay as they were measured.
    """
    from hf_deformvos import DeformVosConfig, DeformVosModel
    from hf_deformvos.evaluation.runner import count_parameters

    changed = []
    for name, record in load_records(root).items():
        if "facts" not in record or "exported" in record:  # graphs have fewer: their batch norms are folded
            continue
        with torch.device("meta"):  # shapes alone, no weights
            model = DeformVosModel(DeformVosConfig.from_pretrained(root / record["model"]))
        count = count_parameters(model)
        if count != record["facts"]["num_parameters"]:
            record["facts"]["num_parameters"] = count
            changed.append(root / "docs" / "numbers" / f"{name}.json")
            changed[-1].write_text(json.dumps(record, indent=2) + "\n")
    return changed


def check_figures(record: dict, root: Path) -> list[str]:
    """A sentence for each figure that is missing, or older than the records it was drawn from."""
    problems = []
    for name, figure in record["figures"].items():
        file = root / "docs" / "images" / figure["file"]
        if not file.is_file():
            problems.append(f"docs/images/{figure['file']} is missing: {figure['command']} draws it")
        for source, sha256 in figure.get("sources", {}).items():
            path = root / "docs" / "numbers" / source
            if not path.is_file() or sha256_of(path) != sha256:
                problems.append(
                    f"The figure {name} was drawn from another {source}: {figure['command']} draws it anew"
                )
    return problems


def measure(
    data: Path, model: str, extra: list[str], name: str = "", exported: str | None = None, root: Path = ROOT
) -> Path:
    """
    Run the evaluation on the whole of DAVIS-2016 val, of the model or of its export to ONNX in the precision
    `exported`, and write its record, of that name; the record's path.
    """
    weights, dataset = root / model / "model.safetensors", data / "davis2016-val"
    for path, what in ((weights, "the weights"), (dataset / "JPEGImages", "the frames of DAVIS-2016 val")):
        if not path.exists():
            raise NumbersError(f"{what} are missing: {path} does not exist")
    options = ["--dataset", "davis2016", "--split", "val", *extra]
    with tempfile.TemporaryDirectory() as folder:
        commands, evaluated, shown, report_path = [], model, model, Path(folder) / "report.json"
        if exported:
            evaluated, shown = str(Path(folder) / "exported"), "exported"
            run_deformvos("export", model, evaluated, "--dtype", exported, root=root)
            commands.append(["deformvos", "export", model, shown, "--dtype", exported])
        arguments = ["--model", evaluated, *options, "--root", str(dataset), "--json", str(report_path)]
        run_deformvos("evaluate", *arguments, root=root)
        commands.append(["deformvos", "evaluate", "--model", shown, *options, "--root", dataset.name])
        report = json.loads(report_path.read_text())
    if report["dataset"]["num_sequences"] != NUM_SEQUENCES:
        count = report["dataset"]["num_sequences"]
        raise NumbersError(f"{dataset} must hold the {NUM_SEQUENCES} sequences of DAVIS-2016 val, got {count}")
    command = " && ".join(map(shlex.join, commands))
    record = as_record(report, model, weights, command, exported)
    output = root / "docs" / "numbers" / f"{'-'.join(filter(None, (Path(model).name, 'davis2016-val', name)))}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")
    return output


def remeasure(data: Path, names: list[str], root: Path = ROOT) -> Iterator[Path]:
    """Measure the records of these names, or all that [`measure`] wrote, again as their commands say; their paths."""
    measured = {name: record for name, record in load_records(root).items() if "-davis2016-val" in name}
    unknown = sorted(set(names) - set(measured))
    if unknown:
        raise NumbersError(f"{unknown[0]} is no record of an evaluation; there are {', '.join(measured)}")
    for name in names or measured:
        record = measured[name]
        options = shlex.split(record["command"].rpartition("deformvos evaluate ")[2])
        for option in ("--model", "--dataset", "--split", "--root"):
            place = options.index(option)
            del options[place : place + 2]
        suffix = name.partition("-davis2016-val")[2].lstrip("-")
        yield measure(data, record["model"], options, suffix, record.get("exported"), root)


def run_deformvos(*arguments: str, root: Path):
    """A command of this checkout."""
    subprocess.run([sys.executable, "-m", "hf_deformvos", *arguments], check=True, cwd=root)


def measure_budget():
    """Measure what the student's architecture costs, as it is and with parts of it changed."""
    for name, options in (("budget", []), ("budget-variants", ["--variants"])):
        output = ROOT / "docs" / "numbers" / f"{name}.json"
        script = ROOT / "scripts" / "measure_budget.py"
        subprocess.run([sys.executable, str(script), *options, "--json", str(output)], check=True, cwd=ROOT)


def as_record(report: dict, model: str, weights: Path, command: str, exported: str | None = None) -> dict:
    """What is kept of an evaluation's report, of weights that are still those that were evaluated."""
    if exported:  # the report has the checksum of graphs that no longer exist
        report = {**report, "weights_sha256": sha256_of(weights)}
    if report["weights_sha256"] != sha256_of(weights):
        raise NumbersError(f"{weights} changed while it was evaluated; nothing was recorded, run it again")
    return measurements.as_record(report, model, weights, command, exported)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run one of the commands; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="evaluate, record and render")
    measuring.add_argument("--data", type=Path, required=True, help="folder that holds davis2016-val")
    measuring.add_argument("--model", default="hub_cards/deformvos-student", help="folder with the weights, in here")
    measuring.add_argument("--name", default="", help="of a further record: MODEL-davis2016-val-NAME.json")
    measuring.add_argument("--exported", metavar="DTYPE", help="measure the export to ONNX: float32 or int8")
    measuring.add_argument("--budget", action="store_true", help="measure what the architecture costs, too")
    measuring.add_argument("extra", nargs="*", help="after --, further options of `deformvos evaluate`")
    again = commands.add_parser("remeasure", help="evaluate every record again, as it was")
    again.add_argument("--data", type=Path, required=True, help="folder that holds davis2016-val")
    again.add_argument("names", nargs="*", help="records, such as deformvos-teacher-davis2016-val; by default all")
    commands.add_parser("recount", help="count the parameters of the recorded models anew, and render")
    commands.add_parser("render", help="write the recorded figures into the texts")
    commands.add_parser("check", help="compare texts, records and weights")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            problems = check()
            print("\n".join(problems) or "The texts state what was measured, with these weights.")
            return 1 if problems else 0
        if options.command == "measure":
            data = options.data.expanduser().resolve()
            written = measure(data, options.model, options.extra, options.name, options.exported)
            print(f"Wrote {written.relative_to(ROOT)}")
            if options.budget:
                measure_budget()
        if options.command == "remeasure":
            for path in remeasure(options.data.expanduser().resolve(), options.names):
                print(f"Wrote {path.relative_to(ROOT)}")
        if options.command == "recount":
            for path in recount():
                print(f"Counted anew: {path.relative_to(ROOT)}")
        for path in render():
            print(f"Updated {path.relative_to(ROOT)}")
        return 0
    except subprocess.CalledProcessError as error:
        failed = shlex.join(map(str, error.cmd))
        print(f"error: {failed} ended with exit code {error.returncode}; nothing of it was recorded", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1
    except NumbersError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
