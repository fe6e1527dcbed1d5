"""Bounded hand-over between threads, so that decoding, the model and encoding overlap without piling up frames."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator


_PATIENCE_SECONDS = 2.0


class _Channel:
    """
    A queue of at most `depth` items between two threads. Closing it wakes both sides: `put` then returns `False`,
    `get` hands out what is left and then raises `EOFError`.
    """

    def __init__(self, depth: int, drop_oldest: bool = False):
        self._items: deque = deque()
        self._depth = depth
        self._drop_oldest = drop_oldest
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item) -> bool:
        with self._changed:
            if self._drop_oldest and len(self._items) >= self._depth:
                self._items.popleft()
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if self._closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self):
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            if not self._items:
                raise EOFError("the channel is closed")
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self, discard: bool = False) -> None:
        with self._changed:
            self._closed = True
            if discard:
                self._items.clear()
            self._changed.notify_all()


def prefetch(items: Iterable, depth: int, drop_oldest: bool = False) -> Iterator:
    """
    Iterates `items` in a thread that runs at most `depth` items ahead.

    An error of `items` is raised here, after every item that came before it. Leaving the loop early (or closing the
    generator) stops the thread.

    Args:
        items (`Iterable`): What to run ahead of; a generator is closed in its own thread.
        depth (`int`): How many items may wait, at least 1.
        drop_oldest (`bool`, *optional*, defaults to `False`):
            Whether a full queue loses its oldest item instead of halting the producer: for cameras, where a stale
            picture is worth less than a fresh one.
    """
    if depth < 1:
        raise ValueError(f"`depth` must be at least 1, got {depth}.")
    channel = _Channel(depth, drop_oldest)
    failure: list[BaseException] = []

    iterator = iter(items)

    def produce() -> None:
        try:
            for item in iterator:
                if not channel.put(item):
                    break
        except Exception as error:  # raised again in the consumer
            failure.append(error)
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
            channel.close()

    thread = threading.Thread(target=produce, name="deformvos-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = channel.get()
            except EOFError:
                break
            yield item
    finally:
        channel.close(discard=True)
        # A source that stalls (a pipe, a frozen camera) must not hold up whoever leaves; the thread ends with it.
        thread.join(_PATIENCE_SECONDS)
    if failure:
        raise failure[0]


class BackgroundWorker:
    """
    Calls `function(*args)` for each `submit(*args)`, in order, in one thread. At most `depth` calls wait. The first
    error stops the work and is raised by the next `submit` or by `close`, so that nothing is lost in silence.
    """

    def __init__(self, function: Callable[..., None], depth: int):
        if depth < 1:
            raise ValueError(f"`depth` must be at least 1, got {depth}.")
        self._function = function
        self._channel = _Channel(depth)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="deformvos-encode", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                try:
                    arguments = self._channel.get()
                except EOFError:
                    return
                self._function(*arguments)
        except Exception as error:
            self._failure = error
            self._channel.close(discard=True)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def submit(self, *arguments) -> None:
        """Queues one call; waits while `depth` calls are queued."""
        if not self._channel.put(arguments):
            self._raise_failure()
            raise RuntimeError("the worker was closed before this call")

    def close(self) -> None:
        """Finishes what was queued and ends the thread; raises the error that stopped the work, once."""
        self._channel.close()
        self._thread.join()
        self._raise_failure()


__all__ = ["BackgroundWorker", "prefetch"]
