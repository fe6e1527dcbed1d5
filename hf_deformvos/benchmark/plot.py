"""A picture of a benchmark: where a frame's time goes, case by case, and the peers beside it."""

from pathlib import Path

from .clock import STAGES
from .peers import OURS
from .report import case_title


SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | Path):
    """
    Find out before anything is timed whether the picture can be drawn.

    Raises:
        ValueError: if matplotlib is missing, or the ending is none of `SUFFIXES`.
    """
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"A plot is written as {', '.join(SUFFIXES)}, got {str(path)!r}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("A plot needs matplotlib: `pip install matplotlib`, or leave --plot out.") from error


def draw(report: dict, path: str | Path):
    """
    Draw a report.

    Args:
        report (`dict`): as `deformvos benchmark --json` writes it.
        path (`str` or `Path`): the picture; its folder is made.

    Raises:
        ValueError: see [`check_plot`].
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    comparisons = report.get("peers", [])
    rows = len(report["cases"]) + sum(len(comparison["models"]) + 1 for comparison in comparisons)
    figure, axes = pyplot.subplots(
        1 + len(comparisons),
        1,
        figsize=(9, 2 + 0.5 * rows + len(comparisons)),
        squeeze=False,
        layout="constrained",
        height_ratios=[len(report["cases"]) + 1, *(len(c["models"]) + 1 for c in comparisons)],
    )
    _draw_stages(axes[0, 0], report["cases"])
    for axis, comparison in zip(axes[1:, 0], comparisons, strict=True):
        _draw_peers(axis, comparison)
    hardware = report["hardware"]
    axes[0, 0].set_title(
        f"{hardware['device_name']}, {hardware['threads_per_process']} threads, {report['backend']}, "
        f"{hardware['dtype']}",
        fontsize=10,
    )
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STAGES), fontsize=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_stages(axis, cases: list[dict]):
    """A bar a case, a segment a stage."""
    from matplotlib import colormaps

    colours = colormaps["tab10"].colors
    names = [case_title(case) for case in cases]
    starts = [0.0] * len(cases)
    for stage, colour in zip(STAGES, colours, strict=False):
        widths = [case["stages"].get(stage, {"median_ms": 0.0})["median_ms"] for case in cases]
        axis.barh(names, widths, left=starts, color=colour, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for index, (case, start) in enumerate(zip(cases, starts, strict=True)):
        axis.text(start, index, f" {case['stream']['fps']:.1f} frames/s", va="center", fontsize=8)
    axis.set_xlim(0, 1.2 * max(starts))
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds a frame, one stage after the other (frames/s: decoding ahead)", fontsize=8)


def _draw_peers(axis, comparison: dict):
    """A bar a model."""
    models = comparison["models"]
    names = [model.get("title", name) for name, model in models.items()]
    times = [model["median_ms"] for model in models.values()]
    colours = ["tab:blue" if name == OURS else "tab:grey" for name in models]
    axis.barh(names, times, color=colours)
    for index, model in enumerate(models.values()):
        ratio = f", {model['ratio']:.0f} times" if "ratio" in model else ""
        axis.text(model["median_ms"], index, f" {model['median_ms']:.0f} ms{ratio}", va="center", fontsize=8)
    axis.set_xlim(0, 1.3 * max(times))
    axis.invert_yaxis()
    axis.set_xlabel(f"milliseconds a frame, {case_title(comparison)}, all stages, in turn", fontsize=8)


__all__ = ["check_plot", "draw"]
