"""`deformvos segment`: follows the objects of one or more masks through a video, decoding and encoding as a stream."""

import argparse
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ..writable import check_folder
from .common import (
    BUNDLED_MODEL,
    DEFAULT_HUB_MODEL,
    at_least,
    default_model,
    explain,
    interrupt,
    on_signals,
    thread_count,
)
from .segment_adapt import check_readable_twice, load_adapted
from .segment_results import Results, versions, write_results, writing
from .speed import adaptation_config, add_adaptation_arguments, add_speed_arguments, resolve_speed


# Frames that may wait before and after the model: enough to even out stalls, little enough for 4K.
_QUEUE_DEPTH = 4

_DESCRIPTION = """\
Follow objects through a video. VIDEO is a file that FFmpeg reads, a folder of images (natural
order) or a camera (0, camera:0, /dev/video0). The output folder gets masks/00000.png, 00001.png,
... (palette PNG, pixel value = object id) and results.json (ids, areas, boxes, timings, versions).
There is a mask for every frame read: frames before the first --mask-frame get an all-background
one, so that numbering is complete."""

_EPILOG = """\
masks:
  palette PNG: the index is the id. Grey: the value is the id; only 0 and 255, or black and white:
  object 1. RGB: black is background; colours of the DAVIS palette keep their ids, others are
  numbered by ascending (red, green, blue). A mask of another size than the video's is resized
  (nearest) with a warning. A later mask corrects the ids it names and adds those that are new.

exit codes:
  0 done; 2 a mistake in what was asked for; 3 done, but FFmpeg found the video damaged or cut (it
  does not notice all damage), and all that decodes was segmented; 130 interrupted (Ctrl-C or
  SIGTERM): what was done is kept and summarised; 141 nobody reads the output any more."""


def add_parser(subparsers) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "segment",
        help="follow objects through a video from one mask",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("video", metavar="VIDEO", help="video file, folder of images or camera")
    parser.add_argument(
        "--mask",
        metavar="PNG",
        action="append",
        required=True,
        help="image of object ids; repeat it, each with its --mask-frame, for corrections and objects that come later",
    )
    parser.add_argument(
        "--mask-frame",
        metavar="N",
        action="append",
        type=at_least(0),
        help="frame the mask belongs to, from 0 (default 0); the n-th belongs to the n-th --mask; where a camera "
        "drops that frame, the next one gets it",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help=f"folder or Hub repository (default {BUNDLED_MODEL.as_posix()} in a checkout, else {DEFAULT_HUB_MODEL})",
    )
    parser.add_argument("--output", metavar="DIR", help="output folder (default deformvos-output/NAME_OF_VIDEO)")
    parser.add_argument("--overlay", metavar="MP4", help="also write the video with the objects coloured, as H.264")
    parser.add_argument(
        "--colors",
        choices=("davis", "colorblind"),
        default="davis",
        help="colours of the overlay (default davis); colorblind stays apart for colour-blind viewers",
    )
    add_speed_arguments(parser)
    add_adaptation_arguments(parser, "the frames that have a --mask")
    parser.add_argument("--max-frames", metavar="N", type=at_least(1), help="stop after so many frames")
    parser.add_argument("--threads", metavar="N", type=thread_count, help="CPU threads of the network (default: all)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    parser.set_defaults(run=run)


@dataclass
class LoadedModel:
    """A model with its processor, ready for sessions, and where it came from."""

    model: object
    processor: object
    name: str
    sha256: str | None
    device: str
    dtype: str
    adaptation: dict | None = None


def run(arguments: argparse.Namespace) -> int:
    """Runs `deformvos segment`; returns the exit code."""
    from hf_deformvos.video import H264Writer, VideoReader, read_mask

    resolve_speed(arguments, arguments.model or default_model())
    mask_files = _pair_masks(arguments.mask, arguments.mask_frame)
    with VideoReader(arguments.video, max_frames=arguments.max_frames, num_prefetch=_QUEUE_DEPTH) as reader:
        # A camera drops frames, which count as well.
        limit = reader.info.num_frames or (None if reader.info.kind == "camera" else arguments.max_frames)
        if limit is not None and max(mask_files) >= limit:
            raise ValueError(
                f"--mask-frame must be below the number of frames read, {limit}, got {max(mask_files)}; "
                "frames count from 0."
            )
        if adaptation_config(arguments) is not None:
            check_readable_twice(reader.info)
        masks = {index: read_mask(path, (reader.info.height, reader.info.width)) for index, path in mask_files.items()}
        output = Path(arguments.output or Path("deformvos-output", _folder_name(arguments.video)))
        overlay = Path(arguments.overlay) if arguments.overlay else None
        _keep_inputs([arguments.video, *mask_files.values()], output, overlay)
        writer = H264Writer(overlay, fps=reader.info.fps) if overlay else None
        _check_places(output, overlay)
        old = _earlier_results(output, overlay, arguments.overwrite)
        loaded = load_model(arguments, masks)
        _prepare_output(output, overlay, old)
        job = _Job(arguments, reader, masks, output, writer, loaded)
        job.run()
    if job.failure is not None:
        if job.results.num_frames:
            print(f"kept: {job.summary()}", file=sys.stderr)
        raise job.failure
    if job.interrupted:
        print(f"interrupted, kept: {job.summary()}", file=sys.stderr)
        return 130
    if not arguments.quiet:
        print(job.summary())
    if job.damaged:
        print(f"warning: the video is damaged or cut short; {job.results.num_frames} frames decoded", file=sys.stderr)
        return 3
    return 0


class _Job:
    """One run: the reader's thread decodes, this thread runs the network, a third one encodes."""

    def __init__(self, arguments, reader, masks: dict, output: Path, writer, loaded: LoadedModel):
        from hf_deformvos.inference import size_option
        from hf_deformvos.video import PALETTES

        self.arguments = arguments
        self.reader = reader
        self.masks = masks
        # Frames of masks that are still to come, and the masks of frames that are not written yet.
        self._waiting, self._used, self._mask_frames = sorted(masks), {}, []
        self.output = output
        self.writer = writer
        self.loaded = loaded
        self._size = size_option(loaded.processor, arguments.short_side)
        self.palette = PALETTES[arguments.colors]()
        with writing(output, "--output"):
            self.results = Results(tempfile.TemporaryFile("w+", encoding="utf-8", dir=output))
        self.failure: Exception | None = None
        self.interrupted = False
        self.wall_seconds = 0.0

    @property
    def damaged(self) -> bool:
        """Whether FFmpeg found frames of the video missing or damaged."""
        return self.reader.truncated or self.reader.num_damaged > 0

    @property
    def overlay(self) -> Path | None:
        """The overlay, once it is whole; until then, and where writing it failed, there is none."""
        return self.writer.path if self.writer is not None and self.writer.path.is_file() else None

    def run(self) -> None:
        """Segments until the end, an error or an interruption; whichever it is, what was done is written out."""
        from hf_deformvos.video import BackgroundWorker

        worker = BackgroundWorker(self._write, _QUEUE_DEPTH)
        started = time.perf_counter()
        try:
            with on_signals(interrupt, signal.SIGTERM), closing(self._segment()) as segmented:
                for frame, id_map, seconds in segmented:
                    worker.submit(frame, id_map, seconds)
        except KeyboardInterrupt:
            self.interrupted = True
        except Exception as error:
            self.failure = explain(error)
        # Impatience while files are being finished would leave an unplayable video.
        with on_signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
            for finish in (worker.close, self._close_overlay, self._check_masks_used):
                self._attempt(finish)
            self.wall_seconds = time.perf_counter() - started
            self._attempt(self._write_results)
            self._attempt(self.results.lines.close)

    def _attempt(self, finish) -> None:
        """Calls a function whose error must not keep the others from being called; the first error is the run's."""
        try:
            finish()
        except Exception as error:
            self.failure = self.failure or error

    def _close_overlay(self) -> None:
        if self.writer is not None:
            with writing(self.writer.path, "--overlay"):
                self.writer.close()

    def _check_masks_used(self) -> None:
        """An error if the video turned out to end before the frame of a mask."""
        num_frames, unused = self.results.last_index + 1, self._waiting
        if not unused or self.interrupted or self.failure is not None:
            return
        if len(unused) == len(self.masks):
            outcome = f"no mask was used, as the video has only {_count(num_frames, 'frame')}: all of the "
            outcome += "masks written are background"
        else:
            outcome = f"masks of frames before {unused[0]} were used"
        raise ValueError(
            f"--mask-frame must be below the number of frames read, {num_frames}, got "
            f"{', '.join(map(str, unused))}; {outcome}."
        )

    def _segment(self) -> Iterator[tuple]:
        """Yields each frame with its id map and the seconds each stage took."""
        import numpy as np
        import torch
        from tqdm import tqdm

        session = self.loaded.processor.init_video_session(
            device=self.loaded.device, dtype=getattr(torch, self.loaded.dtype)
        )
        info = self.reader.info
        background = np.zeros((info.height, info.width), dtype=np.int32)
        with (
            closing(iter(self.reader)) as frames,
            tqdm(total=info.num_frames, unit="frame", disable=self.arguments.quiet) as bar,
        ):
            for frame in frames:
                if frame.index < min(self.masks):
                    yield frame, background, {}
                else:
                    yield frame, *self._step(session, frame)
                bar.update()

    def _step(self, session, frame) -> tuple:
        """One frame through the network: its id map and the seconds of each stage."""
        import torch

        from ..inference import synchronize
        from ..masks_deformvos import overrule

        processor, clock = self.loaded.processor, _Clock()
        shape = frame.image.shape[:2]
        with torch.inference_mode():
            inputs = processor(images=frame.image, return_tensors="pt", **self._size)
            clock.lap("preprocess")
            given = self._due(frame.index)
            if given is not None:
                processor.add_inputs_to_inference_session(
                    session, frame_idx=frame.index, input_masks=given, original_size=shape
                )
            output = self.loaded.model(inference_session=session, frame=inputs.pixel_values[0], frame_idx=frame.index)
            synchronize(self.loaded.device)
            clock.lap("network")
            id_map = processor.post_process_id_map(output, original_size=shape)
            if given is not None:
                id_map = overrule(id_map, given)
            clock.lap("postprocess")
        return id_map, clock.seconds

    def _due(self, index: int):
        """The mask that is due on a frame; of a camera also those of frames that were dropped since the last one."""
        from ..masks_deformvos import overrule

        due = None
        while self._waiting and self._waiting[0] <= index:
            mask = self.masks[self._waiting.pop(0)]
            due = mask if due is None else overrule(due, mask)
        if due is not None:
            self._used[index] = due
            self._mask_frames.append(index)
        return due

    def _write(self, frame, id_map, seconds: dict[str, float]) -> None:
        """In the encoding thread: mask, record and overlay of one frame."""
        from hf_deformvos.video import draw_overlay, mask_file_name, write_palette_png

        clock, path = _Clock(), self.output / "masks" / mask_file_name(frame.index)
        with writing(path, "--output"):
            write_palette_png(path, id_map)
        clock.lap("write_mask")
        with writing(self.output / "results.json", "--output"):
            self.results.record(frame, id_map, path.name, self._used.pop(frame.index, None))
        self.results.book({"decode": frame.decode_seconds, **seconds, **clock.seconds})
        if self.writer is not None:
            clock = _Clock()
            with writing(self.writer.path, "--overlay"):
                self.writer.write(draw_overlay(frame.image, id_map, self.palette), frame.timestamp)
            clock.lap("write_overlay")
            self.results.book(clock.seconds)

    def _write_results(self) -> None:
        write_results(self.output, self._head(), self.results)

    def _head(self) -> dict:
        """What results.json says of the run as a whole."""
        return {
            "completed": not self.interrupted and self.failure is None,
            "interrupted": self.interrupted,
            "error": None if self.failure is None else " ".join(str(self.failure).split()),
            "video": {
                **asdict(self.reader.info),
                "num_frames_read": self.results.num_frames,
                "truncated": self.reader.truncated,
                "num_damaged_packets": self.reader.num_damaged,
            },
            "model": {
                "name": self.loaded.name,
                "sha256": self.loaded.sha256,
                "device": self.loaded.device,
                "dtype": self.loaded.dtype,
                "adaptation": self.loaded.adaptation,
            },
            "object_ids": sorted(self.results.object_ids),
            "mask_frames": sorted({*self._mask_frames, *self._waiting}),
            "overlay": str(self.overlay) if self.overlay else None,
            "timings": self.results.timings(self.wall_seconds),
            "versions": versions(),
        }

    def summary(self) -> str:
        """One line for people."""
        timings = self.results.timings(self.wall_seconds)
        network = timings["median"].get("network_ms")
        results = self.output / "results.json"
        files = [self.output / "masks", *([results] if results.is_file() else []), self.overlay]
        return (
            f"{_count(self.results.num_frames, 'frame')}, {_count(len(self.results.object_ids), 'object')}, "
            + f"{timings['fps'] or 0:.1f} frames/s"
            + (f" (network {network:.0f} ms a frame)" if network is not None else "")
            + f": {', '.join(str(file) for file in files if file is not None)}"
        )


def _count(number: int, name: str) -> str:
    """How many, in words: `1 frame`, `2 frames`."""
    return f"{number} {name}" + ("" if number == 1 else "s")


class _Clock:
    """Splits time into named laps."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Books the time since the last lap under a name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def load_model(arguments: argparse.Namespace, masks: dict) -> LoadedModel:
    """
    Loads model and processor as the arguments say, adapted to the frames of `masks` if they say so; `ValueError` or
    `OSError` for what cannot be loaded.
    """
    import torch
    from transformers.utils import logging

    from ..inference import hash_weights, load_for_inference

    if arguments.quiet:
        logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name, config, adaptation = arguments.model or default_model(), adaptation_config(arguments), None
    if config is not None:
        model, processor, adaptation = load_adapted(arguments, name, config, masks)
    else:
        model, processor = load_for_inference(name, arguments.device, arguments.dtype)
    return LoadedModel(model, processor, name, hash_weights(name), str(model.device), arguments.dtype, adaptation)


def _pair_masks(masks: list[str], frames: list[int] | None) -> dict[int, str]:
    """Frame index -> mask file."""
    if frames is None and len(masks) == 1:
        frames = [0]
    if frames is None or len(frames) != len(masks):
        raise ValueError(
            f"every --mask needs its --mask-frame when there are several, got {len(masks)} and {len(frames or [])}."
        )
    if len(set(frames)) != len(frames):
        raise ValueError(
            f"--mask-frame must differ from mask to mask, got {frames}; merge the masks of one frame into one image."
        )
    return dict(zip(frames, masks, strict=True))


def _folder_name(video: str) -> str:
    """A name for the results of a video, from its file name without what file systems refuse."""
    return re.sub(r"[^\w.-]+", "_", Path(video).stem).strip("_.") or "video"


def _keep_inputs(inputs: list[str], output: Path, overlay: Path | None):
    """An error if the run would write over, or clear away, what it reads."""
    masks = (output / "masks").resolve()
    for name in inputs:
        path = Path(name).resolve()
        if overlay is not None and path == overlay.resolve():
            raise ValueError(f"--overlay {overlay} is a file that is read; choose another.")
        if masks in (path, path.parent) and path.exists():
            raise ValueError(f"{name} lies where masks are written, in {output}/masks; choose another --output.")


def _check_places(output: Path, overlay: Path | None) -> None:
    """An error if results cannot be written where they are to go; nothing is made or removed."""
    for folder in (output, output / "masks"):
        check_folder(folder, f"--output must be a folder that can be written to, got {output}")
    if overlay is None:
        return
    if overlay.is_dir():
        raise ValueError(f"--overlay must be a file, got {overlay}, which is a folder; choose another name.")
    check_folder(overlay.parent, f"--overlay must lie in a folder that can be written to, got {overlay}")


def _earlier_results(output: Path, overlay: Path | None, overwrite: bool) -> list[Path]:
    """Files of an earlier run that this one replaces; an error if it must not."""
    old = [file for file in (output / "masks").glob("*.png") if re.fullmatch(r"\d{5,}\.png", file.name)]
    old += [file for file in (output / "results.json", overlay) if file is not None and file.exists()]
    for file in old:
        if file.is_dir():
            raise ValueError(f"{file} is a folder, where a file is to be written; choose another --output.")
    if old and not overwrite:
        raise ValueError(f"{old[0]} exists from an earlier run; choose another --output, or pass --overwrite.")
    return old


def _prepare_output(output: Path, overlay: Path | None, old: list[Path]) -> None:
    """Makes the folders, and then removes earlier results: a shorter run must not end in their masks."""
    folders = [("--output", output / "masks"), *([("--overlay", overlay.parent)] if overlay else [])]
    for option, folder in folders:
        with writing(folder, option):
            folder.mkdir(parents=True, exist_ok=True)
    for file in old:
        file.unlink()


__all__ = ["LoadedModel", "add_parser", "load_model", "run"]
