"""What a visitor takes home: the video with its objects coloured, the masks, and a record of it all."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from workspace import PALETTE, DemoError, Workspace

from hf_deformvos.video import H264Writer, mask_file_name


_CLOSED = "This page was closed; there is nothing left to save."


def write_overlay(workspace: Workspace, path: str | os.PathLike) -> Iterator[float]:
    """
    The video with the objects drawn over it, as H.264 in mp4 that browsers play.

    From the first frame that has a result to the last one, at the frames' own times; frames between them that have
    none are shown as they are.

    Args:
        workspace ([`Workspace`]): with results.
        path (`str` or `os.PathLike`): ends in .mp4; the file is there once it is complete.

    Yields:
        `float`: share done, 0 to 1.

    Raises:
        DemoError: if there is no result yet, other work goes on, or the page is closed meanwhile.
    """
    with workspace.busy("writing the video"):
        done = _done(workspace)
        first, last = int(done[0]), int(done[-1])
        start, total = workspace.timestamp(first), last - first + 1
        try:
            with H264Writer(path, workspace.facts.fps) as writer:
                for frame_idx in range(first, last + 1):
                    writer.write(workspace.overlay(frame_idx), workspace.timestamp(frame_idx) - start)
                    workspace.touch()
                    yield (frame_idx + 1 - first) / total
        except BaseException:
            # Closing the writer gave the piece its name; half a video is not what was asked for.
            Path(path).unlink(missing_ok=True)
            raise


def write_masks_zip(workspace: Workspace, path: str | os.PathLike) -> None:
    """
    The masks as a zip of `masks/00000.png` and so on: palette PNG as DAVIS has them, the pixel value is the object.
    Other work may go on; the zip is of one piece if `workspace.version` is the same in the end.

    Args:
        workspace ([`Workspace`]): with results; frames that have none are not in the zip.
        path (`str` or `os.PathLike`): the zip; an earlier one is replaced when the new one is complete.

    Raises:
        DemoError: if there is no result yet, or results are cleared or the page is closed meanwhile.
    """
    with _replacing(path) as part:
        # PNG is compressed already.
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for frame_idx in _done(workspace).tolist():
                try:
                    archive.write(workspace.mask_path(frame_idx), f"masks/{mask_file_name(frame_idx)}")
                except FileNotFoundError as error:
                    raise DemoError(_CLOSED) from error
                workspace.touch()


def write_json(workspace: Workspace, path: str | os.PathLike, run_facts: dict) -> None:
    """
    A record: the video, how it was followed, the objects, and area and box of each in every frame. Other work may go
    on, as with `write_masks_zip`.

    Args:
        workspace ([`Workspace`]): with results.
        path (`str` or `os.PathLike`): the file; an earlier one is replaced when the new one is complete.
        run_facts (`dict`): what is known of the run (model, quality, speed ...), of what JSON can hold.

    Raises:
        DemoError: if there is no result yet, or the page is closed meanwhile.
    """
    with _replacing(path) as part:
        done = _done(workspace).tolist()
        labels = workspace.labels()
        head = {
            "video": asdict(workspace.facts),
            "run": run_facts,
            "objects": [
                {"id": i, "name": name, "color": "#{:02x}{:02x}{:02x}".format(*PALETTE[i])}
                for i, name in labels.items()
            ],
            "mask_frames": list(workspace.marks),
            "num_frames_done": len(done),
        }
        with open(part, "w", encoding="utf-8") as file:
            file.write(json.dumps(head, indent=2, ensure_ascii=False, allow_nan=False)[: -len("\n}")])
            file.write(',\n  "frames": [')
            for number, frame_idx in enumerate(done):
                record = {
                    "index": frame_idx,
                    "timestamp": round(workspace.timestamp(frame_idx), 6),
                    "mask": f"masks/{mask_file_name(frame_idx)}",
                    "objects": {str(i): region for i, region in workspace.regions(frame_idx, list(labels)).items()},
                }
                # One line a frame: indented boxes would take a line for every number.
                file.write(("," if number else "") + "\n    " + json.dumps(record))
            file.write("\n  ]\n}\n")


def _done(workspace: Workspace):
    """The frames that have a result, `DemoError` where there are none."""
    if workspace.facts is None or not len(workspace.done):
        raise DemoError("There is nothing to save yet. Mark an object and follow it first.")
    return workspace.done


@contextmanager
def _replacing(path: str | os.PathLike):
    """A name beside the file's to write to; it takes the file's place if all goes well."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


__all__ = ["write_json", "write_masks_zip", "write_overlay"]
