"""A clock that books time to stages: each moment to the innermost stage that is open."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ..inference import resolve_device, synchronize


STAGES = ("decode", "preprocess", "backbone", "propagation", "decoder", "postprocess")


def synchronizer(device: str) -> Callable[[], None]:
    """A function that waits until the device has done what was asked of it; on a CPU it has always."""
    return partial(synchronize, resolve_device(device))


class StageClock:
    """
    Times the stages of one frame after the other. Stages may nest: the inner one's time is not the outer one's.

    ```python
    with clock.stage("propagation"):
        with clock.stage("decoder"):
            ...
    clock.end_frame()
    clock.frames[-1]["decoder"]     # seconds
    ```

    Args:
        synchronize (`Callable`): waits for the device, called wherever a stage begins or ends.
        now (`Callable`): seconds, from any origin.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None, now: Callable[[], float] = time.perf_counter):
        self.frames: list[dict[str, float]] = []
        self._synchronize = synchronize
        self._now = now
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Books what runs inside to a stage."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str):
        """Opens a stage; [`leave`] closes it."""
        self._book()
        self._open.append(name)

    def leave(self):
        """Closes the stage that was opened last."""
        self._book()
        self._open.pop()

    def add(self, name: str, seconds: float):
        """Books a time that was taken elsewhere."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def end_frame(self):
        """Closes the frame's account."""
        self.frames.append(self._seconds)
        self._seconds = {}

    def _book(self):
        self._synchronize()
        now = self._now()
        if self._open:
            self.add(self._open[-1], now - self._since)
        self._since = now


__all__ = ["STAGES", "StageClock", "synchronizer"]
