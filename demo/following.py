"""Following of marked objects through a visitor's video, one frame at a time, in memory that does not grow."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import metadata_load
from workspace import DemoError, Workspace

from hf_deformvos.adaptation import Adaptation, AdaptationConfig, at_followed_size
from hf_deformvos.inference import (
    PRESETS,
    fastest_dtype,
    load_checkpoint,
    load_for_inference,
    prepare_for_inference,
    resolve_device,
    size_option,
)
from hf_deformvos.masks_deformvos import overrule
from hf_deformvos.video import BackgroundWorker, prefetch


logger = logging.getLogger(__name__)

DIRECTIONS = ("forwards", "backwards", "both")


@dataclass(frozen=True)
class Quality:
    """
    A trade of accuracy for time.

    Attributes:
        short_side (`int`, *optional*): of frames at the network; by default that which the model was made for.
        adapts (`bool`): whether the model first learns the objects from the frames that they are marked on.
    """

    short_side: int | None = None
    adapts: bool = False


QUALITIES = {
    **{name.capitalize(): Quality(PRESETS[name].short_side) for name in ("fast", "standard")},
    "Adapted": Quality(PRESETS["standard"].short_side, adapts=True),
}

_DTYPES = ("float32", "bfloat16", "float16")
_HERE = Path(__file__).resolve().parent
# Frames that may wait before and after the network: enough to even out stalls.
_QUEUE_DEPTH = 3
# Seconds over which the speed is measured.
_SPEED_WINDOW = 5.0


@dataclass(frozen=True)
class Progress:
    """
    How far a run is.

    Attributes:
        frame_idx (`int`): the frame whose result was written last; the first one's before that.
        done, total (`int`): frames of this run.
        fps (`float`): frames a second, over the last seconds; 0 before it can be told.
        seconds_left (`float`, *optional*): at that speed; `None` before it can be told.
        finished (`bool`): whether this is the last report.
        stopped (`bool`): whether the run was ended before all frames were done.
        learned (`float`, *optional*): while the model learns the objects, the share of it that is done.
    """

    frame_idx: int
    done: int
    total: int
    fps: float = 0.0
    seconds_left: float | None = None
    finished: bool = False
    stopped: bool = False
    learned: float | None = None


def available_models() -> dict[str, str]:
    """
    The models to choose from: label to folder or Hub repository.

    Those of the environment variable `DEFORMVOS_MODELS` (`label=path,label=path`), else those in `hub_cards` of the
    checkout, else those that the Space's README.md names.

    Raises:
        ValueError: if the environment variable is not of that form.
    """
    named = os.environ.get("DEFORMVOS_MODELS", "").strip()
    if named:
        pairs = [entry.partition("=") for entry in named.split(",") if entry.strip()]
        if not all(label.strip() and path.strip() for label, _, path in pairs):
            raise ValueError(
                f"The environment variable DEFORMVOS_MODELS must be label=path,label=path; got {named!r}."
            )
        return {label.strip(): path.strip() for label, _, path in pairs}
    cards = sorted((_HERE.parent / "hub_cards").glob("*/config.json"))
    folders = [str(card.parent) for card in cards if (card.parent / "model.safetensors").is_file()]
    readme = _HERE / "README.md"
    if not folders and readme.is_file():
        folders = (metadata_load(readme) or {}).get("models") or []
    return {_label(folder): folder for folder in folders}


def _label(name: str) -> str:
    """`deformvos/deformvos-student` as people say it: `Student`."""
    return name.replace(os.sep, "/").rsplit("/", 1)[-1].removeprefix("deformvos-").replace("-", " ").capitalize()


@cache
def native_dtype() -> str:
    """
    The precision to compute in: the one in which this machine is fastest, or what the environment variable
    `DEFORMVOS_DTYPE` says.
    """
    chosen = os.environ.get("DEFORMVOS_DTYPE", "").strip()
    if chosen and chosen not in _DTYPES:
        raise ValueError(f"The environment variable DEFORMVOS_DTYPE must be one of {_DTYPES}, got {chosen!r}.")
    if chosen:
        return chosen
    return fastest_dtype(resolve_device(None).type)


class Models:
    """The models of `available_models`, each loaded when it is first asked for and kept."""

    def __init__(self):
        self._loaded: dict[str, tuple] = {}
        self._checkpoints: dict[str, object] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> tuple:
        """
        Model and processor by label.

        Raises:
            DemoError: if there is no such model, or it cannot be loaded.
        """
        return self._get(self._loaded, name, lambda source: load_for_inference(source, dtype=native_dtype()))

    def checkpoint(self, name: str):
        """The model by label, as [`Adaptation`] takes it; errors as of `get`."""
        return self._get(self._checkpoints, name, load_checkpoint)

    def _get(self, kept: dict, name: str, load: Callable):
        """What is kept under a label, loaded if it is not there yet."""
        with self._lock:
            if name not in kept:
                known = available_models()
                if name not in known:
                    raise DemoError(f"There is no model {name!r}; choose one of {', '.join(known) or 'none'}.")
                try:
                    kept[name] = load(known[name])
                except Exception as error:  # of many libraries: network, safetensors, JSON, transformers
                    logger.exception(f"The model {known[name]} cannot be loaded.")
                    raise DemoError(
                        f"The model {name} cannot be loaded just now. Choose another one, or try again in a while."
                    ) from error
            return kept[name]


@dataclass(frozen=True)
class _Pass:
    """
    One way through a video. Positions count from the end of the video that it comes from, so that both directions
    are the same to the session: frames with smaller positions have passed.
    """

    num_frames: int
    start: int
    is_reversed: bool
    skips_start: bool = False

    def position(self, frame_idx: int) -> int:
        """Where the pass meets a frame."""
        return self.num_frames - 1 - frame_idx if self.is_reversed else frame_idx

    def references(self, marked) -> list[int]:
        """Marked frames that lie before the start, in the order of the pass."""
        passed = [frame_idx for frame_idx in marked if self.position(frame_idx) < self.position(self.start)]
        passed += [self.start] if self.skips_start else []
        return sorted(passed, key=self.position)

    def visits(self) -> range:
        """The frames that get a result, in order."""
        step = -1 if self.is_reversed else 1
        return range(self.start + step * self.skips_start, -1 if self.is_reversed else self.num_frames, step)


def follow(
    workspace: Workspace,
    models: Models,
    model_name: str,
    quality: str,
    start: int,
    direction: str = "both",
    progress_every: float = 0.2,
) -> Iterator[Progress]:
    """
    Follow what is marked, from a marked frame on; results are in the workspace as soon as they are reported.

    Marks of other frames count as well: those on the far side of the start tell what objects look like, those ahead
    correct the result when they are reached. On a marked frame the result is what was given, to the pixel. Results of
    frames that are not visited stay, so that a correction changes one side of the video only; so do those of objects
    that are marked further on only, until they are reached.

    `workspace.stop` ends the run, and what is done stays; so does closing the generator.

    Args:
        workspace ([`Workspace`]): with a video and marks.
        models ([`Models`]), model_name (`str`): a label of `available_models`.
        quality (`str`): a key of `QUALITIES`; the model may first learn what is marked, on all marked frames.
        start (`int`): the frame to start from.
        direction (`str`, *optional*, defaults to `"both"`): one of `DIRECTIONS`; of both, forwards comes first.
        progress_every (`float`, *optional*, defaults to 0.2): seconds between reports.

    Yields:
        [`Progress`]: the first at once, the last with `finished`.

    Raises:
        DemoError: if nothing is marked at the start, other work goes on, or the model, memory or disk fail.
    """
    with workspace.busy("following the objects"):
        passes = _plan(workspace, start, direction)
        if quality not in QUALITIES:
            raise DemoError(f"There is no quality {quality!r}; choose one of {', '.join(QUALITIES)}.")
        run = _Run(workspace, sum(len(each.visits()) for each in passes), start)
        shape = workspace.facts.height, workspace.facts.width
        yield run.report()
        try:
            model, processor = models.get(model_name)
            if QUALITIES[quality].adapts:
                model = yield from _adapt(workspace, models.checkpoint(model_name), processor, run)
            follower = _Follower(workspace, shape, model, processor, QUALITIES[quality].short_side)
            with _worker(run.write) as worker, closing(_through(passes, follower)) as results:
                reported = time.perf_counter()
                for frame_idx, id_map in results:
                    worker.submit(frame_idx, id_map)
                    workspace.touch()
                    if time.perf_counter() - reported >= progress_every:
                        reported = time.perf_counter()
                        yield run.report()
        except (DemoError, OSError, torch.OutOfMemoryError) as error:
            # When the visitor has left, the files go while they are being read and written.
            if not workspace.is_closed:
                raise _explain(error) from error
        yield replace(run.report(), finished=True, stopped=run.done < run.total)


def _plan(workspace: Workspace, start: int, direction: str) -> list[_Pass]:
    """The ways through the video, or why there is nothing to follow."""
    if workspace.facts is None:
        raise DemoError("There is no video yet. Upload one first.")
    count, marks = workspace.facts.num_frames, workspace.marks
    if direction not in DIRECTIONS:
        raise DemoError(f"There is no direction {direction!r}; choose one of {', '.join(DIRECTIONS)}.")
    if not 0 <= start < count:
        raise DemoError(f"The video has the frames 0 to {count - 1}, got {start}.")
    if start not in marks:
        elsewhere = ", ".join(str(frame_idx) for frame_idx in list(marks)[:5])
        hint = f" Marks are on frame {elsewhere}: start there." if elsewhere else ""
        raise DemoError(f"Nothing is marked on frame {start}. Mark an object first.{hint}")
    passes = []
    if direction != "backwards":
        passes.append(_Pass(count, start, is_reversed=False))
    if direction == "backwards" or (direction == "both" and start > 0):
        passes.append(_Pass(count, start, is_reversed=True, skips_start=direction == "both"))
    if not any(len(_marked(workspace, frame_idx)) for frame_idx in (start, *passes[0].references(marks))):
        raise DemoError(f"Nothing is marked on frame {start} that could be followed this way. Mark an object first.")
    return passes


def _marked(workspace: Workspace, frame_idx: int) -> np.ndarray:
    """The ids of all pixels that are marked on a frame; none where the marks were cleared meanwhile."""
    ids = workspace.marks.get(frame_idx)
    return np.empty(0, dtype=np.uint8) if ids is None else ids[ids > 0]


def _adapt(workspace: Workspace, checkpoint, processor, run: _Run) -> Generator[Progress, None, object]:
    """Reports while a copy of a model learns what is marked, and returns it; a stop ends that early."""
    marked = [frame_idx for frame_idx in workspace.marks if len(_marked(workspace, frame_idx))]
    images = [workspace.frames[frame_idx] for frame_idx in marked]
    masks = [workspace.marks[frame_idx] for frame_idx in marked]
    try:
        adaptation = Adaptation(checkpoint, images, masks, at_followed_size(AdaptationConfig(), processor))
        while adaptation.done < adaptation.total:
            yield replace(run.report(), learned=adaptation.done / adaptation.total)
            if workspace.should_stop:
                break
            adaptation.step()
            workspace.touch()
    except ValueError as error:
        raise DemoError(
            "What is marked cannot be learned: it is too small, or learning failed. Choose the quality Standard."
        ) from error
    return prepare_for_inference(adaptation.result(), native_dtype())


@contextmanager
def _worker(function) -> Iterator[BackgroundWorker]:
    """A thread that writes; what it has been given is written out, and its own failure never hides another one."""
    worker = BackgroundWorker(function, _QUEUE_DEPTH)
    try:
        yield worker
    except BaseException:
        with suppress(Exception):
            worker.close()
        raise
    worker.close()


def _through(passes: list[_Pass], follower: _Follower) -> Iterator[tuple[int, np.ndarray]]:
    """Results of all passes, one after the other, until the visitor stops it."""
    for each in passes:
        yield from follower.results(each)


class _Run:
    """Counts what is written, and tells how fast; written to by the worker's thread."""

    def __init__(self, workspace: Workspace, total: int, start: int):
        self.workspace, self.total = workspace, total
        self.done = 0
        self._last = start
        self._times: deque[float] = deque()

    def write(self, frame_idx: int, id_map: np.ndarray):
        """In the worker's thread: keeps one result."""
        self.workspace.write_mask(frame_idx, id_map, is_found=True)
        now = time.perf_counter()
        self._times.append(now)
        while len(self._times) > 2 and now - self._times[0] > _SPEED_WINDOW:
            self._times.popleft()
        self._last, self.done = frame_idx, self.done + 1

    def report(self) -> Progress:
        """How far the run is."""
        times, done = list(self._times), self.done
        fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else 0.0
        return Progress(self._last, done, self.total, fps, (self.total - done) / fps if fps else None)


class _Follower:
    """Runs a model over a workspace's frames: this thread computes, another one reads and prepares frames."""

    def __init__(self, workspace: Workspace, shape: tuple[int, int], model, processor, short_side: int | None):
        self.workspace, self.shape, self.model, self.processor = workspace, shape, model, processor
        self._size = size_option(processor, short_side)

    def results(self, way: _Pass) -> Iterator[tuple[int, np.ndarray]]:
        """Frame and id map of every frame that the pass visits."""
        session = self.processor.init_video_session(dtype=self.model.dtype)
        references = way.references(self.workspace.marks)
        ahead = self._ahead(way)
        prepared = prefetch(self._prepare([*references, *way.visits()]), _QUEUE_DEPTH)
        with closing(prepared):
            for number, (frame_idx, pixel_values) in enumerate(prepared):
                if self.workspace.should_stop:
                    return
                position, given = way.position(frame_idx), self.workspace.marks.get(frame_idx)
                if given is not None:
                    self._give(session, position, given, frame_idx)
                id_map = self._segment(session, position, pixel_values)
                if number >= len(references):
                    yield frame_idx, self._settled(id_map, given, frame_idx, ahead(position) - set(session.object_ids))

    def _prepare(self, frame_indices: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """In the reading thread: frames at the network's size."""
        frames = self.workspace.frames
        for frame_idx in frame_indices:
            inputs = self.processor(images=frames[frame_idx], return_tensors="pt", **self._size)
            yield frame_idx, inputs.pixel_values[0]

    def _ahead(self, way: _Pass) -> Callable[[int], set[int]]:
        """Which objects are marked beyond a position of a pass."""
        last = {}
        for frame_idx in self.workspace.marks:
            for obj_id in np.unique(_marked(self.workspace, frame_idx)).tolist():
                last[obj_id] = max(last.get(obj_id, -1), way.position(frame_idx))
        return lambda position: {obj_id for obj_id, at in last.items() if at > position}

    def _give(self, session, position: int, given: np.ndarray, frame_idx: int):
        """Tells the session what was given on a frame."""
        ids = np.unique(given[given > 0]).tolist()
        if self.workspace.is_whole(frame_idx):
            # An object that is known but not in a map that says all is not to be seen: its mask is empty.
            ids += [obj_id for obj_id in session.object_ids if obj_id not in ids]
        if ids:
            self.processor.add_inputs_to_inference_session(
                session, position, ids, [given == obj_id for obj_id in ids], original_size=self.shape
            )

    @torch.inference_mode()
    def _segment(self, session, position: int, pixel_values: torch.Tensor) -> np.ndarray:
        """One frame through the network; background where no object is known yet."""
        if not session.object_ids:
            return np.zeros(self.shape, dtype=np.uint8)
        output = self.model(inference_session=session, frame=pixel_values, frame_idx=position)
        return self.processor.post_process_id_map(output, original_size=self.shape).astype(np.uint8)

    def _settled(self, id_map: np.ndarray, given: np.ndarray | None, frame_idx: int, waiting: set[int]) -> np.ndarray:
        """
        The network's id map with what was given, to the pixel, and with the earlier result of objects that this pass
        will only meet further on: it knows nothing of them yet.
        """
        if given is not None and self.workspace.is_whole(frame_idx):
            return given
        earlier = self.workspace.mask(frame_idx) if waiting else None
        if earlier is not None:
            id_map = np.where((id_map == 0) & np.isin(earlier, list(waiting)), earlier, id_map)
        if given is None:
            return id_map
        return overrule(id_map, given)


def _explain(error: Exception) -> Exception:
    """What the visitor can do about a failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return DemoError("The machine ran out of memory. Choose the quality Fast, or try again in some minutes.")
    if isinstance(error, OSError):
        return DemoError("The machine could not read or write its files. Try again; what was followed so far is kept.")
    return error


__all__ = ["DIRECTIONS", "QUALITIES", "Models", "Progress", "available_models", "follow", "native_dtype"]
