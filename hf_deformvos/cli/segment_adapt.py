"""What `deformvos segment --adapt` does ahead of following: reads the frames that have masks, and adapts to them."""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict


def check_readable_twice(info) -> None:
    """An error for a video whose frames are gone once read; of a URL it is not known."""
    if info.kind == "camera":
        raise ValueError("--adapt takes time before anything is followed; a camera does not wait. Leave it out.")
    if not info.seekable and os.path.exists(info.source):
        raise ValueError(
            f"VIDEO must be a file or a folder for --adapt, which reads it twice, got {info.source}; save it as "
            "a file, or leave --adapt out."
        )


def load_adapted(arguments: argparse.Namespace, name: str, config, masks: dict) -> tuple:
    """
    A model that has learned the objects of all masks from their frames, which are read beforehand; its processor; and
    what results.json says of the adaptation.
    """
    from tqdm import tqdm
    from transformers import AutoProcessor

    from ..adaptation import adapt_to_video, at_followed_size
    from ..inference import load_checkpoint, prepare_for_inference, size_option

    found = _read_frames(arguments, sorted(masks), config.check_frames)
    frames = _FramesAhead(found)
    base, processor = load_checkpoint(name, arguments.device), AutoProcessor.from_pretrained(name)
    given = {index - frames.first: mask for index, mask in masks.items() if index in found}
    size = size_option(processor, arguments.short_side)
    config = at_followed_size(config, processor, size)
    started = time.perf_counter()
    with tqdm(total=config.draws * config.steps, desc="adapting", unit="step", disable=arguments.quiet) as bar:

        def report(done: int, total: int):
            bar.update()
            if done == total and config.check_frames:
                bar.set_description("following there and back")

        model, share = adapt_to_video(base, processor, frames, given, config, size, report)
    if config.check_frames and not arguments.quiet:
        print(f"Followed there and back: {share:.0%} of what was learned is kept.", file=sys.stderr)
    model = prepare_for_inference(model, arguments.dtype)
    adaptation = {**asdict(config), "share": share, "seconds": round(time.perf_counter() - started, 3)}
    return model, processor, adaptation


class _FramesAhead(Sequence):
    """Some frames of a video, by their position after the first of them; as long as there is no gap."""

    def __init__(self, frames: dict):
        self._frames, self.first = frames, min(frames)

    def __len__(self) -> int:
        return next(length for length in itertools.count(1) if self.first + length not in self._frames)

    def __getitem__(self, position: int):
        return self._frames[self.first + position]


def _read_frames(arguments: argparse.Namespace, indices: list[int], ahead: int) -> dict:
    """
    Frames of a video by their numbers, `ahead` of them from the first on, without keeping the others. Of a damaged
    video those before the damage, so that following it keeps what it can.
    """
    from hf_deformvos.video import VideoError, VideoReader

    found, damage = {}, None
    wanted = {*indices, *range(indices[0], min(indices[0] + ahead, arguments.max_frames or sys.maxsize))}
    with VideoReader(arguments.video, max_frames=max(wanted) + 1) as reader:
        try:
            with closing(iter(reader)) as frames:
                for frame in frames:
                    if frame.index in wanted:
                        found[frame.index] = frame.image
        except VideoError as error:
            damage = error
    missing = [index for index in indices if index not in found]
    is_damaged = damage is not None or reader.truncated or reader.num_damaged > 0
    if missing and (missing[0] == indices[0] or not is_damaged):
        raise damage or ValueError(
            f"the video ends before frame {missing[0]}, which a mask is given for; frames count from 0."
        )
    return found


__all__ = ["check_readable_twice", "load_adapted"]
