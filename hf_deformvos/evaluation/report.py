"""Results as a table for people and as JSON for programs."""

import shlex
import statistics as stdlib_statistics
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from .layouts import EvaluationDataset
from .scoring import SequenceScore, Summary, summarize, summarize_by_class


if TYPE_CHECKING:
    from .runner import EvaluationRun, SequenceResult, StreamTiming

_NAME_WIDTH = 22
_NO_VALUE = "-"


def table_header() -> str:
    """Titles over the columns of [`table_row`], with a line below."""
    titles = ["J&F", "J", "recall", "decay", "F", "recall", "decay"]
    line = f"{'sequence':<{_NAME_WIDTH}}{'obj':>4}{'frames':>8}" + "".join(f"{title:>8}" for title in titles)
    line += f"{'FPS':>8}{'net ms':>8}"
    return f"{line}\n{'-' * len(line)}"


def table_row(
    name: str,
    num_objects: int,
    num_frames: int,
    summary: Summary | None,
    frames_per_second: float | None = None,
    network_ms: float | None = None,
) -> str:
    """One line of the table; what is not known is a dash."""
    values = [None] * 7
    if summary is not None:
        region, boundary = summary.region, summary.boundary
        values = [summary.region_and_boundary, region.mean, region.recall, region.decay]
        values += [boundary.mean, boundary.recall, boundary.decay]
    line = f"{name:<{_NAME_WIDTH}}{num_objects:>4}{num_frames:>8}"
    line += "".join(f"{_NO_VALUE if value is None else format(value, '.4f'):>8}" for value in values)
    for value in (frames_per_second, network_ms):
        line += f"{_NO_VALUE if value is None else format(value, '.1f'):>8}"
    return line


def score_row(score: SequenceScore, num_frames: int) -> str:
    """The line of a sequence that was only scored."""
    return table_row(score.name, len(score.objects), num_frames, summarize(score.objects))


def result_row(result: "SequenceResult", num_frames: int, num_objects: int) -> str:
    """The line of a sequence that was run."""
    timing = result.timing
    speed = (timing.frames_per_second, timing.network_ms) if timing else (None, None)
    return table_row(result.score.name, num_objects, num_frames, summarize(result.score.objects), *speed)


def total_row(
    dataset: EvaluationDataset, scores: Iterable[SequenceScore], timings: "Iterable[StreamTiming]" = ()
) -> str:
    """The last line: averages over objects, frames a second over everything, median of the sequences' medians."""
    objects = [item for score in scores for item in score.objects]
    num_frames = sum(len(sequence.images) for sequence in dataset.sequences)
    num_objects = sum(len(sequence.objects) for sequence in dataset.sequences)
    speed = summarize_speed(timings)
    line = table_row(
        f"all {len(dataset.sequences)} sequences",
        num_objects,
        num_frames,
        summarize(objects),
        speed["frames_per_second"],
        speed["network_ms_median"],
    )
    return f"{'-' * len(line)}\n{line}"


def class_lines(dataset: EvaluationDataset, scores: Iterable[SequenceScore]) -> str | None:
    """The five figures of YouTube-VOS; `None` for other data sets and without ground truth."""
    figures = _class_figures(dataset, scores)
    if figures is None:
        return None
    names = {
        "overall": "overall",
        "j_seen": "J seen",
        "j_unseen": "J unseen",
        "f_seen": "F seen",
        "f_unseen": "F unseen",
    }
    values = [
        f"{title} {_NO_VALUE if figures[key] is None else format(figures[key], '.4f')}" for key, title in names.items()
    ]
    return f"{'  '.join(values)}  ({figures['num_seen']} objects of seen classes, {figures['num_unseen']} of unseen)"


def warning_lines(scores: Iterable[SequenceScore]) -> list[str]:
    """What is odd about predictions, a line each: ids that are no object, frames that counted as empty."""
    lines = []
    for score in scores:
        if score.unknown_ids:
            listed = ", ".join(f"{key} (in {count} frames)" for key, count in sorted(score.unknown_ids.items()))
            lines.append(f"{score.name}: predicted ids that are no object there count as background: {listed}")
        if score.missing:
            lines.append(
                f"{score.name}: {len(score.missing)} missing masks count as empty: {', '.join(score.missing)}"
            )
    return lines


def summarize_speed(timings: "Iterable[StreamTiming]") -> dict:
    """Speed and memory over all sequences that were run."""
    timings = list(timings)
    medians = [timing.network_ms for timing in timings if timing.network_ms is not None]
    seconds = sum(timing.stream_seconds for timing in timings)

    def peak(name: str) -> int | None:
        return max((value for timing in timings if (value := getattr(timing, name)) is not None), default=None)

    return {
        "frames_per_second": sum(timing.num_frames for timing in timings) / seconds if timings else None,
        "network_ms_median": stdlib_statistics.median(medians) if medians else None,
        **_adaptation(timings),
        "peak_memory_bytes": peak("peak_memory_bytes"),
        "peak_device_memory_bytes": peak("peak_device_memory_bytes"),
    }


def _adaptation(timings: "list[StreamTiming]") -> dict:
    """Median seconds of adapting to a sequence; nothing where there was no adaptation."""
    seconds = [timing.adaptation_seconds for timing in timings if timing.adaptation_seconds is not None]
    return {"adaptation_seconds_median": stdlib_statistics.median(seconds)} if seconds else {}


def scores_as_dict(dataset: EvaluationDataset, scores: list[SequenceScore]) -> dict:
    """Everything that was scored: totals, sequences, objects, frames."""
    objects = [item for score in scores for item in score.objects]
    totals = _summary_as_dict(summarize(objects))
    classes = _class_figures(dataset, scores)
    if classes is not None:
        totals["classes"] = classes
    return {
        "dataset": {
            "name": dataset.name,
            "root": dataset.root,
            "split": dataset.split,
            "num_sequences": len(dataset.sequences),
            "num_objects": sum(len(sequence.objects) for sequence in dataset.sequences),
            "num_frames": sum(len(sequence.images) for sequence in dataset.sequences),
        },
        "totals": totals,
        "sequences": [_score_as_dict(score) for score in scores],
    }


def run_as_dict(run: "EvaluationRun", command: list[str]) -> dict:
    """
    A whole run, for `--json`.

    Args:
        run ([`EvaluationRun`]): What was run.
        command (list of `str`): The words of the command line.

    Returns:
        `dict` of plain values: `command`, `config`, `weights_sha256`, `model`, `hardware`, `versions`, `dataset`,
        `totals` and `sequences`, each with its objects and timing.
    """
    content = scores_as_dict(run.dataset, [result.score for result in run.results])
    content["totals"] |= summarize_speed(result.timing for result in run.results if result.timing is not None)
    for entry, result in zip(content["sequences"], run.results, strict=True):
        entry["timing"] = None
        if result.timing is not None:
            entry["timing"] = asdict(result.timing) | {"frames_per_second": result.timing.frames_per_second}
    return {
        "command": shlex.join(command),
        "config": asdict(run.config) | {"num_workers": run.num_workers},
        "weights_sha256": run.weights_sha256,
        "model": asdict(run.facts) if run.facts else None,
        "hardware": run.hardware,
        "versions": run.versions,
    } | content


def _class_figures(dataset: EvaluationDataset, scores: Iterable[SequenceScore]) -> dict | None:
    if dataset.seen_categories is None:
        return None
    return summarize_by_class([item for score in scores for item in score.objects], dataset.seen_categories)


def _summary_as_dict(summary: Summary | None) -> dict:
    if summary is None:
        return {"J&F": None, "J": None, "F": None}
    return {"J&F": summary.region_and_boundary, "J": asdict(summary.region), "F": asdict(summary.boundary)}


def _score_as_dict(score: SequenceScore) -> dict:
    objects = [
        {
            "id": item.object_id,
            "category": item.category,
            "J": asdict(item.region),
            "F": asdict(item.boundary),
            "frames": list(item.frames),
            "J_per_frame": list(item.region_per_frame),
            "F_per_frame": list(item.boundary_per_frame),
        }
        for item in score.objects
    ]
    return {
        "name": score.name,
        **_summary_as_dict(summarize(score.objects)),
        "objects": objects,
        "unknown_ids": {str(key): count for key, count in score.unknown_ids.items()},
        "missing": list(score.missing),
    }


__all__ = [
    "class_lines",
    "result_row",
    "run_as_dict",
    "score_row",
    "scores_as_dict",
    "summarize_speed",
    "table_header",
    "table_row",
    "total_row",
    "warning_lines",
]
