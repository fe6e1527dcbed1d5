"""`deformvos publish` and `deformvos publish-space`: a model, or a demo, to a Hub repository in one commit."""

import argparse
from pathlib import Path


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


def add_hub_arguments(
    parser: argparse.ArgumentParser, force: str = "overwrite a README.md that was edited on the Hub"
) -> None:
    """Adds what all commands have that publish; `force` says what --force does."""
    parser.add_argument("--dry-run", action="store_true", help="check and list, but commit nothing; needs no token")
    parser.add_argument("--force", action="store_true", help=force)
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="file with the token (default: HF_TOKEN or `hf auth login`)",
    )


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


def read_token(path: Path | None) -> str | None:
    """The token in a file; `None` without one."""
    if path is None:
        return None
    # Not the system's message of a missing file: it could show a token that was given in its place.
    if not path.is_file():
        raise ValueError("--token-file must name a file that holds the token; there is no such file.")
    token = path.read_text(encoding="utf-8").strip()
    if not token or any(character.isspace() for character in token):
        raise ValueError(f"{path} must hold a token and nothing else.")
    return token


def report(result, dry_run: bool) -> int:
    """Says what was done, or would be."""
    plan = result.plan
    rows = [("new", upload) for upload in plan.new] + [("changed", upload) for upload in plan.changed]
    rows += [("same", upload) for upload in plan.same]
    width = max(len(upload.name) for _, upload in rows)
    for what, upload in sorted(rows, key=lambda row: row[1].name):
        print(f"{what:8} {upload.name:{width}} {format_size(upload.size):>10}")
    for name in plan.removed:
        print(f"{'removed':8} {name}")
    for note in plan.notes:
        print(f"note: {note}")
    total = format_size(sum(upload.size for _, upload in rows))
    if dry_run:
        change = "nothing would change" if plan.is_empty else "one commit would be made"
        change = change if plan.is_known else "what would change is not known"
        print(f"dry run: {len(rows)} files, {total}, to {result.url}: {change}; nothing was sent")
    elif result.committed:
        print(f"published {len(rows)} files, {total}, to {result.url}: commit {result.commit[:12]}, compared")
    else:
        print(f"nothing changed: {result.url} holds these {len(rows)} files already, in commit {result.commit[:12]}")
    return 0


def format_size(size: int) -> str:
    """A number of bytes in words."""
    if size < 1000:
        return f"{size} B"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


__all__ = [
    "add_hub_arguments",
    "add_parser",
    "format_size",
    "read_token",
    "report",
    "run_publish",
    "run_publish_space",
]
