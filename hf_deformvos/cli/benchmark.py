"""`deformvos benchmark`: speed of the steady stream by stages, memory, start and roofline, and peers beside it."""

import argparse
import shlex
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .common import at_least, default_model, print_line, thread_count
from .speed import PRESET_NAMES


# The names are repeated here: every command builds this parser, and few need the modules that define them.
_BACKENDS = ("torch", "compile", "onnx")
_DTYPES = ("float32", "bfloat16", "float16", "int8")
_PARTS = ("timing", "roofline", "memory", "start")
_DESCRIPTION = """\
Time a model on this machine. A clip of moving objects is encoded as H.264 for each size and followed with a full
memory: decode, preprocess, backbone, propagation (memory read and written), decoder, postprocess, first one after the
other, then as `deformvos segment` runs them, with decoding (and writing of masks) in threads beside the network.
Memory and start are measured in processes of their own; roofline compares each stage with the rates that this machine
reaches in matrix products and in copies. docs/BENCHMARK.md says how each figure is taken."""


def add_parser(subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "benchmark",
        help="time a model on this machine, stage by stage",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="DIR_OR_REPO", help="folder or Hub repository (default: the student)")
    parser.add_argument(
        "--preset",
        choices=PRESET_NAMES,
        help="precision and size at once, as in `segment` (default accurate)",
    )
    parser.add_argument(
        "--sizes", metavar="HxW[,HxW]", type=_sizes, default=[(480, 854)], help="frames (default 480x854)"
    )
    parser.add_argument(
        "--objects", metavar="N[,N]", type=_numbers(1, 255), default=[1], help="objects followed (default 1)"
    )
    parser.add_argument("--threads", metavar="N", type=thread_count, help="CPU threads of the network (default: all)")
    parser.add_argument("--dtype", choices=_DTYPES, help="precision of the network (default: the preset's, float32)")
    parser.add_argument("--short-side", metavar="N", type=at_least(16), help="short side at the network")
    parser.add_argument("--backend", choices=_BACKENDS, default="torch", help="what runs the network (default torch)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the fastest present)")
    parser.add_argument("--frames", metavar="N", type=at_least(1), default=50, help="frames timed (default 50)")
    parser.add_argument(
        "--memory-frames", metavar="N", type=at_least(1), default=100, help="frames of the memory's case (default 100)"
    )
    parser.add_argument(
        "--skip", metavar="PART[,PART]", type=_parts, default=[], help=f"leave out {', '.join(_PARTS)}"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write every number, as soon as it is measured; it is marked until it is whole"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw it as .png, .svg or .pdf (needs matplotlib)")
    peers = parser.add_argument_group(
        "peers", "EdgeTAM and SAM 2.1 tiny of transformers with random weights, in turn with ours"
    )
    peers.add_argument("--peers", action="store_true", help="time them, too")
    peers.add_argument(
        "--peers-python",
        metavar="FILE",
        help="interpreter of their environment (default .venv-peers/bin/python, made by scripts/make_peers_env.sh)",
    )
    peers.add_argument("--peers-dtype", choices=_DTYPES[:3], default="float32", help="precision (default float32)")
    peers.add_argument(
        "--peer-objects", metavar="N[,N]", type=_numbers(1, 255), default=[1], help="objects followed (default 1)"
    )
    peers.add_argument("--peer-frames", metavar="N", type=at_least(1), default=5, help="turns timed (default 5)")
    parser.set_defaults(run=run)


def _sizes(text: str) -> list[tuple[int, int]]:
    """A type for argparse: `480x854,720x1280` to (height, width) pairs."""
    sizes = []
    for part in text.split(","):
        sides = part.lower().split("x")
        if len(sides) != 2 or not all(side.isdigit() for side in sides) or min(int(side) for side in sides) < 16:
            raise argparse.ArgumentTypeError(
                f"must be HEIGHTxWIDTH of at least 16 pixels a side, such as 480x854, got {part!r}"
            )
        if any(int(side) % 2 for side in sides):
            raise argparse.ArgumentTypeError(
                f"must have even sides, such as 480x854, since H.264 pads odd ones, got {part!r}"
            )
        sizes.append((int(sides[0]), int(sides[1])))
    return sizes


def _numbers(minimum: int, maximum: int) -> Callable[[str], list[int]]:
    """A type for argparse: `1,5,10` to integers within bounds."""

    def parse(text: str) -> list[int]:
        parts = text.split(",")
        if not all(part.isdigit() and minimum <= int(part) <= maximum for part in parts):
            raise argparse.ArgumentTypeError(f"must be numbers from {minimum} to {maximum}, got {text!r}")
        return [int(part) for part in parts]

    return parse


def _parts(text: str) -> list[str]:
    """A type for argparse: names of parts that can be left out."""
    parts = text.split(",")
    unknown = [part for part in parts if part not in _PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_PARTS)}, got {unknown[0]!r}")
    return parts


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..benchmark import plot, report
    from ..benchmark.run import Plan, run_benchmark
    from ..evaluation.runner import write_json

    _check_results(arguments)
    config = engine_config(arguments)
    plan = Plan(
        sizes=arguments.sizes,
        objects=arguments.objects,
        num_frames=arguments.frames,
        num_memory_frames=arguments.memory_frames,
        skip=frozenset(arguments.skip),
        peers_python=_peers_python(arguments),
        peers_dtype=arguments.peers_dtype,
        peer_objects=arguments.peer_objects,
        num_peer_frames=arguments.peer_frames,
    )
    command = command_of(arguments)
    say = partial(print_line, is_all=not (arguments.json or arguments.plot))

    def keep(result: dict) -> None:
        if arguments.json:
            write_json(arguments.json, {**result, "command": command, "complete": False})

    with tempfile.TemporaryDirectory() as folder:
        result = run_benchmark(config, plan, Path(folder), say=say, preset=arguments.preset, keep=keep)
    result["command"] = command
    if "rates" in result:
        say(report.rates_line(result["rates"]))
    if "start" in result:
        say(report.start_line(result["start"]))
    if arguments.json:
        write_json(arguments.json, result)
        say(f"wrote {arguments.json}")
    if arguments.plot:
        plot.draw(result, arguments.plot)
        say(f"wrote {arguments.plot}")
    return 0


def _check_results(arguments: argparse.Namespace) -> None:
    """An error, before the work, if a file that is asked for cannot be drawn or written."""
    from ..benchmark.plot import check_plot
    from ..writable import check_file

    if arguments.plot and "timing" in arguments.skip:
        raise ValueError("--plot draws times, and --skip timing leaves them out: drop one of the two.")
    if arguments.plot:
        check_plot(arguments.plot)
        check_file(arguments.plot)
    if arguments.json:
        check_file(arguments.json)


def command_of(arguments: argparse.Namespace) -> str:
    """The command that measures this again; where files of this machine lie is left out."""
    chosen = {
        "model": arguments.model,
        "preset": arguments.preset,
        "sizes": ",".join(f"{height}x{width}" for height, width in arguments.sizes),
        "objects": ",".join(map(str, arguments.objects)),
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "short-side": arguments.short_side,
        "backend": None if arguments.backend == "torch" else arguments.backend,
        "device": arguments.device,
        "frames": arguments.frames,
        "memory-frames": None if "memory" in arguments.skip else arguments.memory_frames,
        "skip": ",".join(arguments.skip) or None,
    }
    if arguments.peers:
        chosen["peers-dtype"] = arguments.peers_dtype
        chosen["peer-objects"] = ",".join(map(str, arguments.peer_objects))
        chosen["peer-frames"] = arguments.peer_frames
    words = [word for name, value in chosen.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["deformvos", "benchmark", *words, *(["--peers"] if arguments.peers else [])])


def _peers_python(arguments: argparse.Namespace) -> str | None:
    """The peers' interpreter, where they are asked for; an error if it is not there."""
    from ..benchmark.peers import DEFAULT_PYTHON

    if not arguments.peers:
        return None
    python = Path(arguments.peers_python or DEFAULT_PYTHON)
    if not python.is_file():
        raise ValueError(
            f"--peers-python must be the interpreter of an environment with torchvision and timm, got {python}, which "
            "does not exist; scripts/make_peers_env.sh makes one in .venv-peers."
        )
    return str(python.absolute())


def engine_config(arguments: argparse.Namespace):
    """What the arguments ask for."""
    from ..benchmark.engine import EngineConfig
    from ..inference import PRESETS, resolve_device

    preset = PRESETS[arguments.preset or "accurate"]
    dtype = arguments.dtype or preset.resolve_dtype(resolve_device(arguments.device))
    return EngineConfig(
        model=arguments.model or default_model(),
        backend=arguments.backend,
        # Graphs that were exported keep their precision.
        dtype=arguments.dtype if arguments.backend == "onnx" else dtype,
        device=arguments.device,
        threads=arguments.threads,
        short_side=arguments.short_side or preset.short_side,
    )


__all__ = ["add_parser", "command_of", "engine_config", "run"]
