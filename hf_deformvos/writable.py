"""Whether results can be written where they are to go, asked before the work that makes them."""

import os
import tempfile
from pathlib import Path


def check_folder(folder: str | os.PathLike, rule: str) -> None:
    """
    Looks whether a folder can be written to, or be made where there is none; nothing is made.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        rule (`str`): What an error begins with: what was asked for, and what was given.

    Raises:
        ValueError: If it cannot.
    """
    folder = Path(folder)
    place = next((place for place in (folder, *folder.parents) if os.path.exists(place)), Path())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"{rule} ({place}: {error.strerror}); choose another.") from error


def check_file(path: str | os.PathLike) -> None:
    """
    Looks whether a file can be written, in a folder that need not be there yet; nothing is made.

    Raises:
        ValueError: If it cannot.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} cannot be written (it is a folder); name another file.")
    check_folder(path.parent, f"{path} cannot be written")
