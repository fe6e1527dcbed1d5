"""`deformvos publish` and `deformvos publish-space`: a model, or a demo, to a Hub repository in one commit."""

import argparse
from pathlib import Path

from .hub import add_hub_arguments, read_token, report


_MODEL = """\
Publish a release folder on the Hub: its card rendered from the record of its training and from measurements, weights,
configurations, the licence, and the code that lets it load with trust_remote_code. The release is first loaded in a
clean process and compared. It is one commit or none; nothing is committed if the repository holds all of it already;
a card that was edited on the Hub, or has scores where the new one has none, is not overwritten."""
_SPACE = """\
Publish a demo's folder as a Space: its files, a wheel of this package built from the checkout, and a requirements.txt
that installs it, with the models that --models names. One commit or none, as with `deformvos publish`."""


def add_parser(subparsers) -> None:
    """Adds both subcommands."""
    model = subparsers.add_parser(
        "publish",
        help="publish a model on the Hub",
        description=_MODEL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model.add_argument("folder", metavar="FOLDER", help="release folder, as scripts/make_release.py writes it")
    model.add_argument("--private", action="store_true", help="make a new repository private; refuse a public one")
    model.add_argument("--revision", default="main", metavar="BRANCH", help="branch, made if missing (default main)")
    model.add_argument(
        "--numbers",
        type=Path,
        action="append",
        metavar="PATH",
        help="measurements for the card: a report of `deformvos evaluate --json`, a record, or a folder of them; may "
        "be repeated. Only those of these very weights count (default: docs/numbers of the repository around FOLDER, "
        "and of the checkout that this command runs from)",
    )
    model.set_defaults(run=run_publish)
    space = subparsers.add_parser(
        "publish-space",
        help="publish a demo as a Space",
        description=_SPACE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    space.add_argument("folder", nargs="?", default="demo", metavar="DEMO_FOLDER", help="the demo (default demo)")
    space.add_argument(
        "--models",
        nargs="+",
        metavar="REPO",
        help="models that the app offers (default: those that the front matter of its README.md names, at ORG)",
    )
    space.add_argument(
        "--gpu",
        action="store_true",
        help="the Space has a GPU: leave PyTorch's index for processors out of requirements.txt",
    )
    space.set_defaults(run=run_publish_space)
    for parser in (model, space):
        parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="the repository, made if missing")
    add_hub_arguments(model, "overwrite a README.md that was edited on the Hub, or whose scores the new one has not")
    add_hub_arguments(space)


def run_publish(arguments: argparse.Namespace) -> int:
    """Runs `publish`."""
    from ..publishing.publish import publish_release

    result = publish_release(
        arguments.folder,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        records=arguments.numbers,
        token=read_token(arguments.token_file),
        force=arguments.force,
        dry_run=arguments.dry_run,
    )
    return report(result, arguments.dry_run)


def run_publish_space(arguments: argparse.Namespace) -> int:
    """Runs `publish-space`."""
    from ..publishing.space import publish_space

    result = publish_space(
        arguments.folder,
        arguments.repo,
        token=read_token(arguments.token_file),
        force=arguments.force,
        dry_run=arguments.dry_run,
        models=arguments.models,
        gpu=arguments.gpu,
    )
    return report(result, arguments.dry_run)


__all__ = ["add_parser", "run_publish", "run_publish_space"]
