"""A whole benchmark: every size with every number of objects, and what is measured of each."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..inference import hash_weights
from . import report
from .clip import Clip, write_clip
from .engine import Engine, EngineConfig, forget_compiled, load_engine
from .peers import compare_with_peers
from .processes import measure_memory, measure_start
from .roofline import MachineRates, compare, count_work, measure_rates
from .stages import SteadyStream


@dataclass(frozen=True)
class Plan:
    """
    What to measure.

    Args:
        sizes (`list[tuple[int, int]]`): (height, width) of the frames.
        objects (`list[int]`): numbers of objects followed.
        num_frames (`int`): frames timed, after those that fill the memory.
        num_memory_frames (`int`): frames of the process whose memory is watched.
        skip (`frozenset[str]`): of `"timing"` (with which `"roofline"` goes), `"roofline"`, `"memory"`, `"start"`.
        peers_python (`str`, *optional*): interpreter of the peers' environment; none, no peers.
        peers_dtype (`str`): the peers' precision.
        peer_objects (`list[int]`): numbers of objects with which peers are timed: they take that many times longer.
        num_peer_frames (`int`): rounds that count.
    """

    sizes: list[tuple[int, int]] = field(default_factory=lambda: [(480, 854)])
    objects: list[int] = field(default_factory=lambda: [1])
    num_frames: int = 50
    num_memory_frames: int = 100
    skip: frozenset[str] = frozenset()
    peers_python: str | None = None
    peers_dtype: str = "float32"
    peer_objects: list[int] = field(default_factory=lambda: [1])
    num_peer_frames: int = 5


def run_benchmark(
    config: EngineConfig,
    plan: Plan,
    folder: Path,
    say: Callable[[str], None] = lambda line: None,
    preset: str | None = None,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """
    Measure, one thing at a time.

    Args:
        config ([`EngineConfig`]): what to load.
        plan ([`Plan`]): what to measure of it.
        folder (`Path`): where clips are written.
        say (`Callable[[str], None]`): gets lines for people as cases are done.
        preset (`str`, *optional*): the preset's name, for the record.
        keep (`Callable[[dict], None]`): gets the report as far as it is, whenever something was measured.

    Returns:
        `dict`: the report, as docs/BENCHMARK.md describes it.

    Raises:
        ValueError: if something cannot be loaded, or a process that measures fails.
    """
    engine = load_engine(config)
    config = engine.config
    result = report.describe(engine, preset, hash_weights(config.model))
    result["settings"] = {"frames": plan.num_frames, "warmup_frames": engine.num_warmup_frames}
    rates = None
    if not plan.skip & {"timing", "roofline"} and config.backend != "onnx":
        rates = measure_rates(engine.device, getattr(torch, config.dtype))
        result["rates"] = {name: round(value, 2) for name, value in asdict(rates).items()}
    result["cases"] = []
    clip, most_objects = None, max(plan.objects + (plan.peer_objects if plan.peers_python else []))
    for height, width in plan.sizes:
        wanted = engine.num_warmup_frames + plan.num_frames + 1
        clip = write_clip(folder / f"{height}x{width}.mp4", height, width, wanted, most_objects)
        for num_objects in plan.objects:
            forget_compiled()
            case = _measure_case(engine, clip, num_objects, plan, rates)
            result["cases"].append(case)
            for line in report.case_lines(case):
                say(line)
            keep(result)
        if plan.peers_python:
            for num_objects in plan.peer_objects:
                forget_compiled()
                result.setdefault("peers", []).append(_measure_peers(engine, clip, num_objects, plan))
                for line in report.peer_lines(result["peers"][-1]):
                    say(line)
                keep(result)
    if "start" not in plan.skip:
        result["start"] = measure_start(config, clip)
    return result


def _measure_peers(engine: Engine, clip: Clip, num_objects: int, plan: Plan) -> dict:
    return compare_with_peers(engine, clip, num_objects, plan.num_peer_frames, plan.peers_python, plan.peers_dtype)


def _measure_case(engine: Engine, clip: Clip, num_objects: int, plan: Plan, rates: MachineRates | None) -> dict:
    size = clip.first_mask.shape
    case = {"size": list(size), "network_size": list(engine.network_size(*size)), "objects": num_objects}
    if "timing" not in plan.skip:
        stream = SteadyStream(engine, clip, num_objects)
        case |= stream.time_stages(plan.num_frames)
        case["stream"] = stream.time_stream(plan.num_frames)
        case["written"] = stream.time_written_stream(plan.num_frames)
        case["gmacs"] = None
    if rates is not None:
        work = count_work(engine, clip, num_objects)
        case["gmacs"] = round(sum(stage.macs for stage in work.values()) / 1e9, 3)
        case["roofline"] = compare(case["stages"], work, rates)
    if "memory" not in plan.skip:
        case["memory"] = measure_memory(engine.config, clip, num_objects, plan.num_memory_frames)
    return case


__all__ = ["Plan", "run_benchmark"]
