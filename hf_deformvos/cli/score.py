"""`deformvos score`: scores masks that any tool wrote against a benchmark's ground truth."""

import argparse
import sys
from collections.abc import Callable


# The names are repeated here: every command builds this parser, and few need the modules that define them.
_DATASETS = ("davis2016", "davis2017", "youtubevos2018", "youtubevos2019", "folder")
_DESCRIPTION = """\
Score masks that any tool wrote as DIR/SEQUENCE/FRAME.png (or below DIR/Annotations or DIR/480p) with region similarity
J and boundary accuracy F: mean, recall above 0.5, decay, by the benchmark's protocol. Averages are over objects."""


def add_parser(subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "score",
        help="score masks that any tool wrote",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--predictions", metavar="DIR", required=True, help="folder of masks, one folder a sequence")
    add_dataset_arguments(parser, guessed=True)
    parser.add_argument(
        "--allow-missing", action="store_true", help="count a missing mask as empty instead of refusing to score"
    )
    parser.add_argument("--workers", type=at_least(1), default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--json", metavar="FILE", help="write every number")
    parser.set_defaults(run=run)


def add_dataset_arguments(parser: argparse.ArgumentParser, required: bool = True, guessed: bool = False) -> None:
    """Adds the arguments that name a data set and a part of it; `guessed`: where its layout may go unsaid."""
    default = " (default: what the folder looks like; DAVIS of both years is davis2017)" if guessed else ""
    parser.add_argument(
        "--dataset", choices=_DATASETS, required=required and not guessed, help=f"layout and protocol{default}"
    )
    parser.add_argument("--root", metavar="DIR", required=required, help="folder of the data set")
    parser.add_argument("--split", default="val", help="which part of it (default val)")
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these, separated by spaces or commas")
    parser.add_argument(
        "--max-frames",
        type=at_least(1),
        metavar="N",
        help="only the first N frames of each sequence, as if it ended there",
    )


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
    """Prints rows as they come, and the header before the first: what fails at once shows its error alone."""

    def __init__(self, header: str):
        self._header: str | None = header

    def add(self, row: str) -> None:
        """Prints one row."""
        if self._header is not None:
            print(self._header)
            self._header = None
        print(row, flush=True)


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


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..evaluation import report, score_predictions
    from ..writable import check_file

    if arguments.json:
        check_file(arguments.json)
    dataset = load_dataset(arguments)
    num_frames = {sequence.name: len(sequence.images) for sequence in dataset.sequences}
    table = Table(report.table_header())
    scores = score_predictions(
        arguments.predictions,
        dataset,
        allow_missing=arguments.allow_missing,
        num_workers=arguments.workers,
        progress=lambda score: table.add(report.score_row(score, num_frames[score.name])),
    )
    print(report.total_row(dataset, scores))
    if arguments.dataset is None:
        print(f"scored as {dataset.name}; --dataset chooses another protocol")
    classes = report.class_lines(dataset, scores)
    if classes:
        print(classes)
    for line in report.warning_lines(scores):
        print(f"warning: {line}", file=sys.stderr)
    if arguments.json:
        from ..evaluation.runner import describe_versions, write_json

        content = {"predictions": arguments.predictions, "versions": describe_versions()}
        write_json(arguments.json, content | report.scores_as_dict(dataset, scores))
        print(f"wrote {arguments.json}")
    return 0


__all__ = [
    "Table",
    "add_dataset_arguments",
    "add_parser",
    "at_least",
    "chosen_sequences",
    "load_dataset",
    "run",
    "thread_count",
]
