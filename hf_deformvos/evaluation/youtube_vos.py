"""What the YouTube-VOS evaluation server takes: a zip of palette PNGs."""

import os
import zipfile
from pathlib import Path

from .layouts import EvaluationDataset


# The server does not look at dates; one fixed date makes equal masks an equal file.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def write_submission(masks: str | os.PathLike, dataset: EvaluationDataset, path: str | os.PathLike) -> int:
    """
    Packs saved masks the way the server takes them: `Annotations/<video>/<frame>.png` of every sampled frame.

    Args:
        masks (`str` or `os.PathLike`): Folder of `<video>/<frame>.png`.
        dataset ([`EvaluationDataset`]): Which videos and frames.
        path (`str` or `os.PathLike`): The zip to write; it appears whole or not at all.

    Returns:
        `int`: How many masks it holds.

    Raises:
        ValueError: If a mask is missing.
    """
    path = Path(path)
    files = [
        (Path(masks) / sequence.name / f"{frame}.png", f"Annotations/{sequence.name}/{frame}.png")
        for sequence in dataset.sequences
        for frame in sequence.output_frames
    ]
    missing = [str(source) for source, _ in files if not source.is_file()]
    if missing:
        raise ValueError(
            f"A submission needs every sampled frame of every video, {len(missing)} lack: {missing[0]} ..."
        )
    part = path.with_name(f".{path.name}.part")
    try:
        # A PNG is compressed already.
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for source, name in files:
                archive.writestr(zipfile.ZipInfo(name, _ZIP_DATE), source.read_bytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return len(files)


__all__ = ["write_submission"]
