"""Times of a steady stream: its stages one after the other, and its rate with decoding and writing beside them."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from ..video import BackgroundWorker, VideoReader, mask_file_name, write_palette_png
from ..video_source_deformvos import open_source
from .clip import Clip
from .clock import STAGES, StageClock, synchronizer
from .engine import Engine


# As `deformvos segment` has them.
_QUEUE_DEPTH = 4


def summarize(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile (between the nearest two, linearly) in milliseconds."""
    median, high = np.percentile(np.asarray(seconds, dtype=np.float64) * 1e3, [50, 95])
    return {"median_ms": round(float(median), 3), "p95_ms": round(float(high), 3)}


class SteadyStream:
    """
    A stream whose memory is full. Each measurement goes on where the one before it ended.

    Args:
        engine ([`Engine`]): what runs.
        clip ([`Clip`]): what is read.
        num_objects (`int`): how many of the clip's objects are followed.
    """

    def __init__(self, engine: Engine, clip: Clip, num_objects: int):
        self.engine, self.clip = engine, clip
        self.session = engine.open_session()
        given = clip.mask_of(num_objects)
        with closing(self._decoded()) as frames:
            for _ in range(engine.num_warmup_frames):
                engine.step(self.session, next(frames).image, given)
                given = None

    def _decoded(self) -> Iterator:
        """Frames without end, decoded when they are asked for: FFmpeg's own threads would run ahead."""
        while True:
            yield from open_source(str(self.clip.path), num_threads=1).frames()

    def _read_ahead(self) -> Iterator:
        """Frames without end, decoded ahead in a thread."""
        while True:
            with VideoReader(self.clip.path, num_prefetch=_QUEUE_DEPTH) as reader:
                yield from reader

    def time_stages(self, num_frames: int) -> dict:
        """
        Every stage by itself, none beside another.

        Returns:
            `dict`: `frame` (a frame's whole time and the rate that follows), and `stages` by name; `STAGES` without
            a time did not run apart.
        """
        clock = StageClock(synchronizer(str(self.engine.device)))
        with self.engine.watched(self.session, clock), closing(self._decoded()) as frames:
            next(frames)  # opens the file
            for _ in range(num_frames):
                frame = next(frames)
                clock.add("decode", frame.decode_seconds)
                self.engine.step(self.session, frame.image, clock=clock)
                clock.end_frame()
        whole = [sum(frame.values()) for frame in clock.frames]
        stages = {
            stage: summarize([frame.get(stage, 0.0) for frame in clock.frames])
            for stage in STAGES
            if any(stage in frame for frame in clock.frames)
        }
        return {"frame": {**summarize(whole), "fps": round(num_frames / sum(whole), 3)}, "stages": stages}

    @contextmanager
    def stepping(self) -> Iterator[Callable[[], float]]:
        """A function that takes a frame from the file to its mask, nothing beside it, and returns the seconds."""
        wait = synchronizer(str(self.engine.device))
        with closing(self._decoded()) as frames:
            next(frames)  # opens the file

            def step() -> float:
                started = time.perf_counter()
                self.engine.step(self.session, next(frames).image)
                wait()
                return time.perf_counter() - started

            yield step

    def time_stream(self, num_frames: int) -> dict:
        """Frames a second from file to masks in memory, the next frames being decoded meanwhile."""
        with closing(self._read_ahead()) as frames:
            next(frames)
            started = time.perf_counter()
            for _ in range(num_frames):
                self.engine.step(self.session, next(frames).image)
            seconds = time.perf_counter() - started
        return {"frames": num_frames, "fps": round(num_frames / seconds, 3)}

    def time_written_stream(self, num_frames: int) -> dict:
        """The same with each mask written as a palette PNG in a further thread, as `deformvos segment` does."""
        with tempfile.TemporaryDirectory() as folder, closing(self._read_ahead()) as frames:
            next(frames)
            worker = BackgroundWorker(write_palette_png, _QUEUE_DEPTH)
            started = time.perf_counter()
            try:
                for index in range(num_frames):
                    id_map = self.engine.step(self.session, next(frames).image)
                    worker.submit(Path(folder) / mask_file_name(index), id_map)
            finally:
                worker.close()
            seconds = time.perf_counter() - started
        return {"frames": num_frames, "fps": round(num_frames / seconds, 3)}


__all__ = ["SteadyStream", "summarize"]
