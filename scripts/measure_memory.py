"""
J&F against memory: slots of the long-term bank, how often it is written, and the size of the network's input.

    python scripts/measure_memory.py --models hub_cards/deformvos-student --davis data/davis2016-train

One of the three is changed at a time, the others stay as the model's configuration has them. Each case is measured on
the held-out sequences in a process of its own: the bytes of the session's state at the end of a sequence (the largest
counts), the process's memory before the first frame and its peak from there on, on a GPU that of the device, J&F, and
network time. The record, docs/numbers/memory.json, grows case by case: a call that was stopped is repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from evidence import (
    NUMBERS,
    ROOT,
    Deadline,
    EvidenceError,
    OutOfTime,
    check_names,
    describe_folder,
    guarded,
    held_out_dataset,
    last_lines,
    open_model,
    read_record,
    run_command,
    update_record,
    write_record,
)

from hf_deformvos.evaluation import summarize
from hf_deformvos.evaluation.runner import (
    RunnerConfig,
    SequenceRunner,
    describe_hardware,
    load_pretrained,
    peak_memory,
)
from hf_deformvos.inference import resolve_device


RECORD = NUMBERS / "memory.json"
SERIES = {
    "long_term_slots": [1, 2, 3, 4, 5],
    "memory_interval": [2, 4, 8, 16],
    "short_side": [240, 320, 400, 480],
}


def cases_of(model: str, series: dict[str, list[int]]) -> dict[str, dict]:
    """Every case of a model by name; the one that is in all series is there once."""
    config = json.loads((Path(model) / "config.json").read_text())
    usual = {"long_term_slots": config["long_term_slots"], "memory_interval": config["memory_interval"]}
    usual["short_side"] = 480
    cases = {}
    for changed, values in series.items():
        for value in values:
            case = {**usual, changed: value}
            name = ", ".join(f"{part}={value}" for part, value in case.items())
            cases.setdefault(name, {**case, "series": []})["series"].append(changed)
    return cases


def resident_memory() -> int | None:
    """Resident memory of this process in bytes; `None` where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)


def forget_peak() -> None:
    """Makes the system count the peak from here on, where it can: loading a model takes more than running it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def measure_case(model: str, case: dict, options: argparse.Namespace) -> dict:
    """Runs one case in this process."""
    torch.set_num_threads(options.threads)
    overrides = {"long_term_slots": case["long_term_slots"], "memory_interval": case["memory_interval"]}
    config = RunnerConfig(model, options.device, options.dtype, options.threads, overrides=overrides)
    device = resolve_device(options.device)
    network, processor = load_pretrained(config)
    sessions = []
    start = processor.init_video_session

    def watched(*args, **kwargs):
        sessions[:] = [start(*args, **kwargs)]
        return sessions[0]

    processor.init_video_session = watched
    runner = SequenceRunner(network, processor, device, getattr(torch, options.dtype), case["short_side"])
    loaded = resident_memory()
    forget_peak()
    objects, timings, state = [], [], 0
    for sequence in held_out_dataset(options.davis, options.max_frames).sequences:
        result = runner.run(sequence)
        objects += result.score.objects
        timings.append(result.timing)
        state = max(state, sessions[0].num_bytes)
    summary = summarize(objects)
    return {
        **case,
        "JF": round(summary.region_and_boundary, 5),
        "J": round(summary.region.mean, 5),
        "F": round(summary.boundary.mean, 5),
        "state_bytes": state,
        "loaded_bytes": loaded,
        "peak_bytes": peak_memory(),
        "peak_device_bytes": timings[-1].peak_device_memory_bytes,
        "network_size": list(timings[-1].network_size),
        "network_ms": round(statistics.median(t.network_ms for t in timings if t.network_ms is not None), 1),
        "num_sequences": len(timings),
        "num_frames": sum(timing.num_frames for timing in timings),
        "hardware": describe_hardware(device, options.dtype, options.threads, 1),
    }


def keep(record: dict, settings: dict, model: str, name: str, result: dict) -> None:
    """Puts a result into the record."""
    record["command"] = "python scripts/measure_memory.py"
    open_model(record, settings, model).setdefault("cases", {})[name] = result


def measure_apart(model: str, case: dict, options: argparse.Namespace, deadline: Deadline) -> dict:
    """Runs one case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output, log = Path(folder) / "case.json", Path(folder) / "case.log"
        command = [sys.executable, str(Path(__file__).resolve()), "--models", str(Path(model).resolve())]
        command += ["--davis", str(options.davis.resolve()), "--dtype", options.dtype]
        command += ["--threads", str(options.threads), "--case", json.dumps(case), "--json", str(output)]
        command += [] if options.device is None else ["--device", options.device]
        command += [] if options.max_frames is None else ["--max-frames", str(options.max_frames)]
        if code := run_command(command, log, deadline):
            raise EvidenceError(f"measuring {case} ended with exit code {code}: {last_lines(log)}")
        return json.loads(output.read_text())


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="model folders")
    parser.add_argument("--davis", type=Path, required=True, help="DAVIS-layout folder with the held-out sequences")
    for name, values in SERIES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, nargs="*", default=values, help="values measured")
    parser.add_argument("--max-frames", type=int, help="of a sequence: a rehearsal")
    parser.add_argument("--device", help="default: the fastest present")
    parser.add_argument("--dtype", default="float32", help="precision of the network (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--minutes", type=float, help="stop after that time; the same call goes on")
    parser.add_argument("--json", type=Path, help=f"the record (default {RECORD.relative_to(ROOT)})")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measures and records; the exit code."""
    options = build_parser().parse_args(arguments)
    if options.case:
        write_record(options.json, measure_case(options.models[0], json.loads(options.case), options))
        return 0
    if options.max_frames and options.json is None:
        raise EvidenceError("A rehearsal with fewer frames needs --json: its figures do not go into the texts.")
    check_names(options.models)
    settings = {"max_frames": options.max_frames, "dtype": options.dtype, "data": describe_folder(options.davis)}
    path, deadline = options.json or RECORD, Deadline(options.minutes)
    series = {name: getattr(options, name) for name in SERIES}
    try:
        for model in options.models:
            done = open_model(read_record(path, "memory"), settings, model).get("cases", {})
            for name, case in cases_of(model, series).items():
                if name not in done:
                    result = measure_apart(model, case, options, deadline)
                    update_record(
                        path, "memory", partial(keep, settings=settings, model=model, name=name, result=result)
                    )
                    print(f"{Path(model).name}, {name}: J&F {result['JF']:.4f}, {result['state_bytes'] / 1e6:.1f} MB")
    except OutOfTime:
        print("The time is up; the same call goes on from here.")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
