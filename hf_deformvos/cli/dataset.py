"""`deformvos push-dataset`: a DAVIS-layout folder as a Hugging Face data set, in a folder, on the Hub, or both."""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .common import at_least, chosen_sequences
from .hub import add_hub_arguments, format_size, read_token, report


_DESCRIPTION = """\
Turn a DAVIS-layout folder into a Hugging Face data set: parquet files with a row a frame (sequence, frame_index,
frame, mask, object_ids), the images and masks in them byte by byte as they are, and a card. It goes to a folder
(--output), to the Hub (--repo, one commit or none, as with `deformvos publish`), or both. `deformvos evaluate
--dataset-name` and training (--dataset_names) read it, also as a stream."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def add_parser(subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "push-dataset",
        help="turn a DAVIS-layout folder into a data set of the Hub",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DAVIS_DIR", help="holds JPEGImages, Annotations and perhaps ImageSets")
    parser.add_argument("--repo", metavar="ORG/NAME", help="the repository, made if missing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the data set here")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier data set in --output")
    parser.add_argument(
        "--split",
        choices=("train", "val", "all"),
        default="all",
        help="which list of ImageSets; all (the default): each that there is becomes a split, and without lists every "
        "sequence is in the split train",
    )
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="only these, separated by spaces or commas")
    parser.add_argument(
        "--short-side",
        type=at_least(1),
        metavar="N",
        help="scale larger frames down to this short side, which encodes them anew (default: bytes stay as they are)",
    )
    parser.add_argument(
        "--shard-size", type=parse_size, default="500MB", metavar="SIZE", help="largest file (default 500MB)"
    )
    parser.add_argument("--title", help="what the card calls the set (default: the folder's name)")
    parser.add_argument("--license", metavar="NAME", help="the Hub's name of the licence, such as cc-by-nc-4.0")
    parser.add_argument("--license-note", metavar="TEXT", help="the terms of use in words, for the card")
    parser.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="branch, made if missing (default main)")
    add_hub_arguments(
        parser, force="overwrite a README.md that was edited, and remove splits on the Hub that this set has not"
    )
    parser.set_defaults(run=run)


def parse_size(text: str) -> int:
    """`500MB`, `1.5 GiB` or a number of bytes as an integer, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB, got {text!r}")
    return size


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from ..data import export_davis
    from ..publishing.dataset import render_dataset_card
    from ..publishing.hub import Target, require_token

    if arguments.repo is None and arguments.output is None:
        raise ValueError("--repo ORG/NAME, --output DIR or both must say where the data set goes.")
    target, token = None, read_token(arguments.token_file)
    if arguments.repo is not None:
        target = Target(arguments.repo, "dataset", arguments.revision, arguments.private)
        if not arguments.dry_run:
            require_token(target, token)
    title = arguments.title or Path(arguments.folder).resolve().name
    if arguments.output is not None:
        _check_output(arguments.output, arguments.overwrite, arguments.force)
    with _staging(None if arguments.dry_run else arguments.output) as folder:
        exported = export_davis(
            arguments.folder,
            folder,
            split=arguments.split,
            sequences=chosen_sequences(arguments),
            short_side=arguments.short_side,
            shard_size=arguments.shard_size,
            show_progress_bar=sys.stderr.isatty(),
        )
        name = arguments.repo or str(arguments.output)
        card = render_dataset_card(title, asdict(exported), name, arguments.license, arguments.license_note)
        (folder / "README.md").write_text(card, encoding="utf-8")
        lines = [_describe(split, counts) for split, counts in exported.splits.items()]
        print("\n".join(lines))
        if arguments.license is None and arguments.license_note is None:
            print("warning: the card states no terms of use; --license and --license-note do", file=sys.stderr)
        is_temporary = arguments.dry_run or arguments.output is None
        if target is not None and is_temporary:
            _publish(folder, target, lines, token, arguments)
    if arguments.output is not None:
        print(f"dry run: {arguments.output} was not written" if arguments.dry_run else f"wrote {arguments.output}")
    # Whatever the Hub says, a set that was asked for is kept.
    if target is not None and not is_temporary:
        _publish(arguments.output, target, lines, token, arguments)
    return 0


def _publish(folder: Path, target, lines: list[str], token: str | None, arguments: argparse.Namespace) -> None:
    """Publishes the data set in a folder, and says what was done."""
    from ..publishing.dataset import publish_dataset

    report(
        publish_dataset(folder, target, "\n".join(lines), token, arguments.force, arguments.dry_run),
        arguments.dry_run,
    )


def _describe(split: str, counts) -> str:
    """A split in a line."""
    return (
        f"{split}: {counts.sequences} sequence(s), {counts.frames} frames, {counts.masks} masks, "
        f"{counts.objects} object(s), {format_size(counts.size)} in {counts.shards} file(s)"
    )


@contextmanager
def _staging(output: Path | None) -> Iterator[Path]:
    """A folder to write to, which becomes `output` when all has gone well."""
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield folder
        output.mkdir(exist_ok=True)
        # Only what this command writes is taken away.
        for old in (output / "data").glob("*.parquet"):
            old.unlink()
        (output / "data").mkdir(exist_ok=True)
        for path in [*sorted((folder / "data").iterdir()), folder / "README.md"]:
            os.replace(path, output / path.relative_to(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_output(output: Path, overwrite: bool, force: bool) -> None:
    """An error where the data set would get among, or replace, other files."""
    from ..publishing.cards import is_unedited

    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got {output}, which is a file.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"{output} is not empty; choose another --output, or pass --overwrite to replace a data set.")
    card = output / "README.md"
    if not force and not (card.is_file() and is_unedited(card.read_text(encoding="utf-8", errors="replace"))):
        raise ValueError(
            f"{output} holds no data set of this command, or its README.md was edited; --force replaces it."
        )


__all__ = ["add_parser", "parse_size", "run"]
