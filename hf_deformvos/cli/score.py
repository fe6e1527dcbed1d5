"""`deformvos score`: scores masks that any tool wrote against a benchmark's ground truth."""

import argparse
import sys

from .common import Table, add_dataset_arguments, at_least, load_dataset


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


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..evaluation import report, score_predictions
    from ..writable import check_file

    if arguments.json:
        check_file(arguments.json)
    dataset = load_dataset(arguments)
    num_frames = {sequence.name: len(sequence.images) for sequence in dataset.sequences}
    table = Table(report.table_header(), is_all=not arguments.json)
    scores = score_predictions(
        arguments.predictions,
        dataset,
        allow_missing=arguments.allow_missing,
        num_workers=arguments.workers,
        progress=lambda score: table.add(report.score_row(score, num_frames[score.name])),
    )
    if arguments.json:
        from ..evaluation.runner import describe_versions, write_json

        content = {"predictions": arguments.predictions, "versions": describe_versions()}
        write_json(arguments.json, content | report.scores_as_dict(dataset, scores))
    print(report.total_row(dataset, scores))
    if arguments.dataset is None:
        print(f"scored as {dataset.name}; --dataset chooses another protocol")
    classes = report.class_lines(dataset, scores)
    if classes:
        print(classes)
    for line in report.warning_lines(scores):
        print(f"warning: {line}", file=sys.stderr)
    if arguments.json:
        print(f"wrote {arguments.json}")
    return 0


__all__ = ["add_parser", "run"]
