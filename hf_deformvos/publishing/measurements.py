"""Records of evaluations as `deformvos evaluate --json` and docs/numbers hold them, and the tables that show them."""

import json
import re
from pathlib import Path

from ..inference import sha256_of


# Options of `deformvos evaluate` that measure on a part of a benchmark.
_PARTIAL = re.compile(r"--(?:sequences|max-frames)\b")
_ENDINGS = {"mean": "", "recall": "-recall", "decay": "-decay"}
MEASURES = ("JF", "J", "J-recall", "J-decay", "F", "F-recall", "F-decay")


def as_record(report: dict, model: str, weights: Path, command: str, exported: str | None = None) -> dict:
    """
    What is kept of an evaluation's report: no value a frame, no path of the machine it ran on. `exported` names the
    precision of graphs that were made of the weights and evaluated in their place.
    """
    kept = ("name", "J&F", "J", "F")
    return {
        "model": model,
        **({"exported": exported} if exported else {}),
        "weights_sha256": report["weights_sha256"],
        "weights_bytes": weights.stat().st_size,
        "command": command,
        "facts": report["model"],
        "hardware": report["hardware"] | ({"dtype": f"{exported} (ONNX)"} if exported else {}),
        "versions": report["versions"],
        "dataset": {key: value for key, value in report["dataset"].items() if key != "root"},
        "totals": report["totals"],
        "sequences": [{key: scores[key] for key in kept} for scores in report["sequences"]],
    }


def find_records(places: list[Path], weights: Path) -> dict[str, dict]:
    """
    The measurements of these very weights.

    Args:
        places (list of `Path`): records, reports of `deformvos evaluate --json`, or folders of them.
        weights (`Path`): the safetensors file; a measurement counts if it names its SHA-256.

    Returns:
        `dict[str, dict]`: evaluations and benchmarks by file name without `.json`; those of other weights, of other
        kinds, of exported graphs, of a part of a benchmark, unfinished, and without scores are left out.

    Raises:
        ValueError: if a place is no file or folder, or a named file is no JSON or of a part of a benchmark.
    """
    if not weights.is_file():
        return {}
    sha256, found = sha256_of(weights), {}
    for place in places:
        if not place.exists():
            raise ValueError(f"There are no measurements at {place}: it does not exist.")
        for path in sorted(place.glob("*.json")) if place.is_dir() else [place]:
            try:
                record = json.loads(path.read_text())
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
            if not isinstance(record, dict) or record.get("weights_sha256") != sha256 or "exported" in record:
                continue
            if is_benchmark(record) and record.get("complete", True):
                found[path.stem] = record
            if "totals" not in record:
                continue
            if partial := _PARTIAL.search(record["command"]):
                if place.is_dir():
                    continue
                raise ValueError(
                    f"{path} was measured with {partial[0]}, on a part of the benchmark: a card states scores of the "
                    "whole. Measure again without it."
                )
            if "facts" not in record:
                record = as_record(record, "", weights, record["command"])
            if record["totals"].get("J&F") is not None and record["facts"] is not None:
                found[path.stem] = record
    return found


def is_benchmark(record: dict) -> bool:
    """Whether `deformvos benchmark --json` wrote it."""
    return record.get("kind") == "benchmark"


def own_benchmarks(weights: Path, records: dict[str, dict]) -> list[dict]:
    """The benchmarks of these very weights, by name."""
    sha256 = sha256_of(weights) if weights.is_file() else None
    own = ((name, r) for name, r in sorted(records.items()) if is_benchmark(r) and sha256)
    return [record for _, record in own if record["weights_sha256"] == sha256]


def measures_of(scores: dict) -> dict[str, float]:
    """The seven measures of a summary, by the names that markers use (which have no `&`)."""
    return {
        "JF": scores["J&F"],
        **{f"{key}{end}": scores[key][name] for key in "JF" for name, end in _ENDINGS.items()},
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


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware_of(record: dict) -> str:
    """The machine, precision and threads of a measurement."""
    hardware = record["hardware"]
    threads = hardware["threads_per_process"]
    return f"{hardware['dtype']} on {hardware['device_name']} ({threads} thread{'s' * (threads != 1)})"


def render_means(record: dict) -> str:
    """A Markdown table of one record's means, and how it was measured."""
    fields = fields_of(record)
    columns = {name.replace("JF", "J&F").replace("-", " "): fields[name] for name in MEASURES}
    columns |= {"parameters": fields["parameters"], "weights": fields["megabytes"]}
    columns |= {"network, a frame": fields["network-ms"], "whole stream, frames/s": fields["frames-per-second"]}
    adapted = record["totals"].get("adaptation_seconds_median")
    once = "" if adapted is None else f" after {adapted:.0f} seconds of adaptation to each (median)"
    origin = (
        f"`{record['command']}`: {fields['num-sequences']} sequences, {fields['num-frames']} frames, in "
        f"{hardware_of(record)}{once}, PyTorch {record['versions']['torch']}; weights sha256 "
        f"`{record['weights_sha256'][:12]}…`."
    )
    rows = [" | ".join(columns), " | ".join(["---:"] * len(columns)), " | ".join(columns.values())]
    return "\n".join(f"| {row} |" for row in rows) + "\n\n" + origin


def render_sequences(record: dict) -> str:
    """A Markdown table with one row a sequence."""
    rows = ["| sequence | J&F | J | F |", "|---|---:|---:|---:|"]
    for scores in sorted(record["sequences"], key=lambda scores: scores["name"]):
        measures = measures_of(scores)
        rows.append(f"| {scores['name']} | {measures['JF']:.3f} | {measures['J']:.3f} | {measures['F']:.3f} |")
    return "\n".join(rows)


def render_speed(record: dict) -> str:
    """One sentence: time, rate, cost and memory of one stream."""
    totals, facts, fields = record["totals"], record["facts"], fields_of(record)
    parts = [f"{fields['network-ms']} a frame in the network (median)"]
    parts.append(f"{fields['frames-per-second']} frames a second with decoding, resizing and writing masks")
    if facts.get("macs"):
        height, width = facts["macs_network_size"]
        parts.append(f"{facts['macs'] / 1e9:.2f} GMACs a frame of {width}x{height}")
    if totals.get("peak_memory_bytes"):
        parts.append(f"at most {totals['peak_memory_bytes'] / 2**20:.0f} MiB of memory, PyTorch included")
    if totals.get("peak_device_memory_bytes"):
        parts.append(f"{totals['peak_device_memory_bytes'] / 2**20:.0f} MiB of them on the device")
    return f"{hardware_of(record)}: {'; '.join(parts)}."


def _frames_of(case: dict) -> str:
    height, width = case["size"]
    return f"{width}x{height}"


def _name_of(record: dict) -> str:
    """What ran: the preset, where one was named, and the precision and backend."""
    backend = "" if record["backend"] == "torch" else f", {record['backend']}"
    return f"{record['preset'] + ', ' if record['preset'] else ''}{record['hardware']['dtype']}{backend}"


def _origins(records: list[dict]) -> str:
    """The commands and machines of benchmarks, one a line where there are several."""
    lines = (f"`{r['command']}`: {hardware_of(r)}, PyTorch {r['versions']['torch']}." for r in records)
    return "\n\n".join(dict.fromkeys(lines))


def render_benchmarks(records: list[dict]) -> str:
    """A Markdown table of the cases of benchmarks: speed and cost."""
    timed, rows = _with(records, "frame"), []
    for record in timed:
        for case in record["cases"]:
            gmacs, network = case.get("gmacs"), case["network_size"]
            rows.append(
                [
                    _name_of(record),
                    _frames_of(case),
                    f"{network[1]}x{network[0]}",
                    str(case["objects"]),
                    f"{case['frame']['median_ms']:.1f} ms",
                    f"{case['frame']['p95_ms']:.1f} ms",
                    f"{case['stream']['fps']:.1f}",
                    "-" if gmacs is None else f"{gmacs:.2f}",
                ]
            )
    titles = ["runs as", "frames", "network", "objects", "a frame", "95th percentile"]
    titles += ["frames/s, decoding ahead", "GMACs"]
    return f"{table(titles, rows)}\n\n{_origins(timed)}"


def render_memory(records: list[dict]) -> str:
    """A Markdown table of what processes that follow objects hold beside the libraries, and by how much that rises."""
    measured, rows = _with(records, "memory"), []
    for record in measured:
        for case in record["cases"]:
            memory = case["memory"]
            above, growth = memory["above_imports_bytes"], memory["growth_bytes"]
            rows.append(
                [
                    _name_of(record),
                    _frames_of(case),
                    str(case["objects"]),
                    f"{memory['frames']:,}",
                    "-" if above is None else f"{above / 1e6:.0f} MB",
                    "-" if growth is None else f"{round(growth / 1e6):+d} MB",
                ]
            )
    titles = ["runs as", "frames", "objects", "frames followed", "peak above the libraries", "rise after frame 50"]
    return f"{table(titles, rows)}\n\n{_origins(measured)}"


def _with(records: list[dict], part: str) -> list[dict]:
    """The benchmarks whose cases have a part; what is skipped is so for all of them."""
    return [record for record in records if all(part in case for case in record["cases"])]


def render_stages(records: list[dict]) -> str:
    """A Markdown table of where the time of benchmarks goes, and the share that each stage gets of the machine."""
    records, rows = _with(records, "stages"), []
    for record in records:
        for case in record["cases"]:
            for stage, times in case["stages"].items():
                work = case.get("roofline", {}).get(stage)
                rows.append(
                    [
                        f"{_name_of(record)}, {_frames_of(case)}, {case['objects']}",
                        stage,
                        f"{times['median_ms']:.1f} ms",
                        f"{times['p95_ms']:.1f} ms",
                        *(
                            ["-"] * 3
                            if work is None
                            else [f"{work[part]:.0%}" for part in ("matmul_share", "copy_share", "bound_share")]
                        ),
                    ]
                )
    titles = ["runs as, frames, objects", "stage", "median", "95th percentile"]
    titles += ["of the product rate", "of the copy rate", "of its bound"]
    rates = [
        f"When {_name_of(record)} was measured, the machine reached {record['rates']['matmul_gmacs']:.0f} thousand "
        f"million multiply-accumulates and copied {record['rates']['copy_gbytes']:.1f} GB a second, in "
        f"{hardware_of(record)}."
        for record in records
        if "rates" in record
    ]
    return "\n\n".join([table(titles, rows), *dict.fromkeys(rates), _origins(records)])


def render_peers(records: list[dict]) -> str:
    """A Markdown table of models that were timed in turn."""
    rows = []
    for record in records:
        for comparison in record.get("peers", []):
            for model in comparison["models"].values():
                ours = "ratio" not in model
                runs_as = _name_of(record) if ours else model["dtype"]
                rows.append(
                    [
                        f"{model['title']} ({runs_as})",
                        _frames_of(comparison),
                        str(comparison["objects"]),
                        "-" if model.get("parameters") is None else f"{model['parameters'] / 1e6:.2f} M",
                        f"{model['median_ms']:.0f} ms",
                        f"{model['fps']:.2f}",
                        "1" if ours else f"1/{model['ratio']:.1f}",
                    ]
                )
    titles = ["model", "frames", "objects", "parameters", "a frame", "frames/s", "speed"]
    return f"{table(titles, rows)}\n\n{_origins([record for record in records if 'peers' in record])}"


def render_start(records: list[dict]) -> str:
    """A Markdown table of how long fresh processes took to their first mask."""
    parts = ("import_s", "load_s", "first_mask_s", "total_s")
    rows = [
        [_name_of(record), *(f"{record['start'][part]:.2f} s" for part in parts)]
        for record in records
        if "start" in record
    ]
    origin = _origins([record for record in records if "start" in record])
    return f"{table(['runs as', 'import', 'load', 'first mask', 'together'], rows)}\n\n{origin}"


BENCHMARK_VIEWS = {
    "": render_benchmarks,
    "stages": render_stages,
    "memory": render_memory,
    "peers": render_peers,
    "start": render_start,
}


__all__ = [
    "BENCHMARK_VIEWS",
    "MEASURES",
    "as_record",
    "fields_of",
    "find_records",
    "is_benchmark",
    "measures_of",
    "own_benchmarks",
    "render_means",
    "render_sequences",
    "render_speed",
    "sha256_of",
    "table",
]
