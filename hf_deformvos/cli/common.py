"""What several commands have in common: types of numbers, the data set that they name, tables, advice on errors."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


DEFAULT_HUB_MODEL = "deformvos/deformvos-student"
BUNDLED_MODEL = Path("hub_cards", "deformvos-student")
# The names are repeated here: every command builds its parser, and few need the modules that define them.
_DATASETS = ("davis2016", "davis2017", "youtubevos2018", "youtubevos2019", "folder")


def at_least(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str], int]:
    """A type for argparse: an integer not below `minimum`, and not beyond what libraries take."""

    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {value}")
        return value

    # argparse names the type when `int` refuses the text.
    parse.__name__ = "int"
    return parse


# More than machines have cores; of tens of thousands OpenMP cannot start the threads.
thread_count = at_least(1, 1024)


class Table:
    """
    Prints rows as they come, and the header before the first: what fails at once shows its error alone.

    Args:
        header (`str`): The first line.
        is_all (`bool`, *optional*, defaults to `True`):
            Whether there is no other output. Where files are written as well, work goes on when nobody reads any more.
    """

    def __init__(self, header: str, is_all: bool = True):
        self._header: str | None = header
        self._is_all = is_all

    def add(self, row: str) -> None:
        """Prints one row."""
        if self._header is not None:
            print_line(self._header, self._is_all)
            self._header = None
        print_line(row, self._is_all)


def print_line(line: str, is_all: bool = True) -> None:
    """Prints a line at once; where there is other output, work goes on when nobody reads any more."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        if is_all:
            raise
        silence_output()


def silence_output() -> None:
    """Turns standard output to nowhere, once its reader is gone: the interpreter must not flush to it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interrupt(*_) -> None:
    """Ends a run that a service manager or a batch system ends, as Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def on_signals(handler, *signals: signal.Signals) -> Iterator[None]:
    """Handles signals otherwise for a while; only the main thread may, so elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def add_dataset_arguments(parser: argparse.ArgumentParser, required: bool = True, guessed: bool = False) -> None:
    """Adds the arguments that name a data set and a part of it; `guessed`: where its layout may go unsaid."""
    default = " (default: what the folder looks like; DAVIS of both years is davis2017)" if guessed else ""
    parser.add_argument(
        "--dataset", choices=_DATASETS, required=required and not guessed, help=f"layout and protocol{default}"
    )
    parser.add_argument("--root", metavar="DIR", required=required, help="folder of the data set")
    parser.add_argument("--split", help="which part of it (default val; of the layout folder all of it)")
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these, separated by spaces or commas")
    parser.add_argument(
        "--max-frames",
        type=at_least(1),
        metavar="N",
        help="only the first N frames of each sequence, as if it ended there",
    )


def load_dataset(arguments: argparse.Namespace, all_frames: bool = False):
    """The data set that the arguments name."""
    from ..evaluation import guess_dataset, load_dataset_layout

    name = arguments.dataset or guess_dataset(arguments.root)
    sequences = chosen_sequences(arguments)
    return load_dataset_layout(name, arguments.root, arguments.split, sequences, arguments.max_frames, all_frames)


def chosen_sequences(arguments: argparse.Namespace) -> list[str] | None:
    """The names after --sequences; `None` without it."""
    if arguments.sequences is None:
        return None
    return [name for text in arguments.sequences for name in text.split(",") if name]


def default_model() -> str:
    """The student bundled with a checkout, else the one on the Hub."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / BUNDLED_MODEL / "config.json").is_file():
            return str(root / BUNDLED_MODEL)
    return DEFAULT_HUB_MODEL


def explain(error: Exception) -> Exception:
    """Turns out-of-memory of a device into advice; other errors pass."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        reason = str(error).partition("\n")[0]
        return ValueError(
            f"the device ran out of memory ({reason}); lower --short-side, choose --dtype bfloat16, or take --device "
            "cpu."
        )
    return error


__all__ = [
    "BUNDLED_MODEL",
    "DEFAULT_HUB_MODEL",
    "Table",
    "add_dataset_arguments",
    "at_least",
    "chosen_sequences",
    "default_model",
    "explain",
    "load_dataset",
    "silence_output",
    "thread_count",
]
