"""What the commands that publish have in common: their options, the token, and what they report."""

import argparse
from pathlib import Path


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


__all__ = ["add_hub_arguments", "format_size", "read_token", "report"]
