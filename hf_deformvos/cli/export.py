"""`deformvos export`: writes a model as graphs with explicit memory, for onnxruntime or for torch.export."""

import argparse
import signal

from .common import interrupt, on_signals


_DESCRIPTION = """\
Write a model as graphs whose memory goes in and comes out as arrays: for frames of any size, any number of objects and
of memory frames. The folder OUT of --format onnx also gets a module that runs the graphs on NumPy, Pillow and
onnxruntime alone, and a README that shows how. `deformvos segment` and `deformvos evaluate` take OUT as --model."""


def add_parser(subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for onnxruntime or torch.export",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub repository")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--format", choices=("onnx", "torch"), default="onnx", help="what to write (default onnx)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "int8"),
        default="float32",
        help="int8 quantises the encoder but for convolutions that it hurts; onnx alone (default float32)",
    )
    parser.add_argument(
        "--calibration",
        metavar="VIDEO",
        help="int8: video whose frames tell the ranges of values (default: the example clip of a checkout)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an export in OUT")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..export import export_model

    with on_signals(interrupt, signal.SIGTERM):  # nothing half-written is left
        out = export_model(
            arguments.model,
            arguments.out,
            format=arguments.format,
            dtype=arguments.dtype,
            calibration=arguments.calibration,
            overwrite=arguments.overwrite,
            show_progress_bar=True,
        )
    files = sorted(file for file in out.iterdir() if file.is_file())
    for file in files:
        print(f"{file} ({file.stat().st_size / 2**20:.2f} MiB)")
    return 0


__all__ = ["add_parser", "run"]
