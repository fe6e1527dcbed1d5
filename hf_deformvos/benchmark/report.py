"""A benchmark as JSON, and as a table for people."""

from .clock import STAGES
from .engine import Engine


SCHEMA = 1


def describe(engine: Engine, preset: str | None, weights_sha256: str | None) -> dict:
    """The head of a report: what ran, on what."""
    import torch

    from ..evaluation.runner import describe_hardware, describe_versions

    config = engine.config
    return {
        "kind": "benchmark",
        "schema": SCHEMA,
        "model": {"name": config.model, "parameters": engine.num_parameters},
        "weights_sha256": weights_sha256,
        "backend": config.backend,
        "preset": preset,
        "short_side": config.short_side,
        "hardware": describe_hardware(engine.device, config.dtype, torch.get_num_threads(), 1),
        "versions": describe_versions(),
    }


def case_title(case: dict) -> str:
    """Size and objects in words."""
    height, width = case["size"]
    objects = case["objects"]
    return f"{width}x{height}, {objects} object{'s' * (objects > 1)}"


def case_lines(case: dict) -> list[str]:
    """A case for the terminal."""
    network = "x".join(str(side) for side in reversed(case["network_size"]))
    lines = [f"{case_title(case)} (network {network})"]
    if "frame" in case:
        lines += _timing_lines(case)
    if case.get("memory"):
        lines.append(f"  {'memory':22s} {memory_words(case['memory'])}")
    return lines


def _timing_lines(case: dict) -> list[str]:
    frame = case["frame"]
    lines = [f"  {'one after the other':22s} {_times(frame)}  {frame['fps']:6.2f} frames/s"]
    for stage in STAGES:
        if stage in case["stages"]:
            lines.append(f"    {stage:20s} {_times(case['stages'][stage])}{_work(case, stage)}")
    lines.append(f"  {'decoding ahead':22s} {'':31s}  {case['stream']['fps']:6.2f} frames/s")
    lines.append(f"  {'and writing PNGs':22s} {'':31s}  {case['written']['fps']:6.2f} frames/s")
    if case.get("gmacs") is not None:
        lines.append(f"  {'a frame':22s} {case['gmacs']:.2f} GMACs")
    return lines


def _times(times: dict) -> str:
    return f"{times['median_ms']:8.2f} ms (p95 {times['p95_ms']:8.2f} ms)"


def _work(case: dict, stage: str) -> str:
    work = case.get("roofline", {}).get(stage)
    if work is None:
        return ""
    return (
        f"  {work['gmacs']:6.3f} GMACs at {work['matmul_share']:4.0%}, {work['gbytes']:6.3f} GB at "
        f"{work['copy_share']:4.0%}, bound {work['bound_ms']:6.2f} ms ({work['bound_share']:.0%})"
    )


def peer_lines(comparison: dict) -> list[str]:
    """A comparison with peers for the terminal."""
    lines = [f"{case_title(comparison)}, in turn"]
    for name, model in comparison["models"].items():
        ratio = f"  {model['ratio']:.1f} times ours" if "ratio" in model else ""
        lines.append(f"  {model.get('title', name):22s} {_times(model)}  {model['fps']:6.2f} frames/s{ratio}")
    return lines


def memory_words(memory: dict) -> str:
    """Peak and growth in words."""
    device = memory["peak_device_bytes"]
    words = [] if device is None else [f"{device / 1e6:.0f} MB on the GPU"]
    if memory["above_imports_bytes"] is not None:
        words.append(f"{memory['above_imports_bytes'] / 1e6:.0f} MB above the libraries at the peak")
    if memory["growth_bytes"] is not None:
        words.append(f"{memory['growth_bytes'] / 1e6:+.1f} MB from frame 50 to {memory['frames']}")
    return ", ".join(words) or "the system does not tell"


def start_line(start: dict) -> str:
    """The start in words."""
    return (
        f"start: {start['total_s']:.2f} s to the first mask (import {start['import_s']:.2f}, load "
        f"{start['load_s']:.2f}, first mask {start['first_mask_s']:.2f})"
    )


def rates_line(rates: dict) -> str:
    """The machine's rates in words."""
    return f"this machine: {rates['matmul_gmacs']:.0f} GMACs/s in products, {rates['copy_gbytes']:.1f} GB/s in copies"


__all__ = ["SCHEMA", "case_lines", "case_title", "describe", "memory_words", "peer_lines", "rates_line", "start_line"]
