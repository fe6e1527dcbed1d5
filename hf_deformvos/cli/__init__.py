"""
The command line `deformvos`. Each subcommand is a module with `add_parser(subparsers)`, which ends in
`parser.set_defaults(run=function)`; the function takes the parsed arguments and returns the exit code.

Exit codes: 0 done, 2 a mistake in what was asked for, 3 done but the input was damaged, 130 interrupted, 141 nobody
reads the output any more.
"""

import argparse
import os
import re
import sys
from functools import partial

from hf_deformvos import __version__

from . import benchmark, dataset, evaluate, export, publish, score, segment
from .common import explain, silence_output


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="deformvos",
        description="Follow objects through video from one mask: segment a video, evaluate or time a model, score "
        "masks, export a model, publish a model or a data set.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"deformvos {__version__}")
    # Records and cards look for options in commands, by their whole names.
    whole = partial(argparse.ArgumentParser, allow_abbrev=False)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=whole)
    for command in (segment, evaluate, score, benchmark, export, publish, dataset):
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.set_defaults(usage=subparser.format_usage, refuse=subparser.error)
    return parser


def as_typed(message: str, usage: str, words: list[str]) -> str:
    """An error on one line, its `arguments` of functions named as the options that the user typed, or may type."""
    options = set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", usage))
    typed = options & {word.partition("=")[0] for word in words}

    def option(match: re.Match) -> str:
        name = match[1].replace("_", "-")
        for known in (typed, options):
            fitting = [each for each in known if each == f"--{name}" or each.endswith(f"-{name}")]
            if len(fitting) == 1:
                return fitting[0]
        return match[0]

    return re.sub(r"`(\w+)`", option, " ".join(message.split()))


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): Arguments without the program's name, by default those of the process.

    Returns:
        `int`: The exit code. argparse itself leaves by `SystemExit` (2 for a mistake, 0 for `--help`).
    """
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(words)
    if unknown:
        arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        silence_output()  # its reader is gone, as after `| head`
        return 141
    except (ValueError, OSError, RuntimeError) as error:
        mistake = explain(error)
        if isinstance(mistake, RuntimeError):
            raise
        print(f"error: {as_typed(str(mistake), arguments.usage(), words)}", file=sys.stderr)
        if os.environ.get("TRANSFORMERS_VERBOSITY") == "debug":
            raise
        return 2


__all__ = ["build_parser", "main"]
