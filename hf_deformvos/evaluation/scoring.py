"""Scores of masks against ground truth: frame by frame beside a runner, or whole folders that any tool wrote."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from .layouts import VOID, EvaluationDataset, EvaluationSequence, TrackedObject, image_size
from .metrics import Statistics, frame_scores, statistics


_PREDICTION_FOLDERS = ("", "Annotations", "480p", "Annotations/480p")
_NAMED_ERRORS = 10


@dataclass(frozen=True)
class ObjectScore:
    """
    J and F of one object of one sequence.

    Attributes:
        object_id (`int`): Its id.
        category (`str`, *optional*): Its class, where the data set has classes.
        frames (`tuple[str, ...]`): The frames scored.
        region_per_frame, boundary_per_frame (`tuple[float, ...]`): J and F of these frames.
    """

    object_id: int
    category: str | None
    frames: tuple[str, ...]
    region_per_frame: tuple[float, ...]
    boundary_per_frame: tuple[float, ...]

    @property
    def region(self) -> Statistics:
        """Mean, recall and decay of J."""
        return statistics(self.region_per_frame)

    @property
    def boundary(self) -> Statistics:
        """Mean, recall and decay of F."""
        return statistics(self.boundary_per_frame)


@dataclass(frozen=True)
class SequenceScore:
    """
    Scores of a sequence.

    Attributes:
        name (`str`): The sequence.
        objects (`tuple[ObjectScore, ...]`): Empty without ground truth.
        unknown_ids (`dict[int, int]`): Ids predicted that are no object of the sequence, and in how many frames.
        missing (`tuple[str, ...]`): Frames without a prediction, which counted as empty.
    """

    name: str
    objects: tuple[ObjectScore, ...] = ()
    unknown_ids: dict[int, int] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary:
    """
    Averages over objects, the way the benchmarks report them.

    Attributes:
        num_objects (`int`): How many.
        region, boundary (`Statistics`): Averages of J's and F's mean, recall and decay.
    """

    num_objects: int
    region: Statistics
    boundary: Statistics

    @property
    def region_and_boundary(self) -> float:
        """J&F: the average of the means of J and F."""
        return (self.region.mean + self.boundary.mean) / 2


class SequenceScorer:
    """
    Scores the masks of one sequence as they come; only numbers are kept.

    Args:
        sequence ([`EvaluationSequence`]): What to compare with.
    """

    def __init__(self, sequence: EvaluationSequence):
        self.sequence = sequence
        self._wanted: dict[str, list[TrackedObject]] = {}
        for item in sequence.objects:
            for frame in item.scored_frames:
                self._wanted.setdefault(frame, []).append(item)
        self._values: dict[int, dict[str, tuple[float, float]]] = {item.object_id: {} for item in sequence.objects}
        self._unknown_ids: dict[int, int] = {}
        self._missing: list[str] = []

    def update(self, frame: str, prediction: np.ndarray | None) -> None:
        """
        Scores a frame; frames that are not scored in this sequence are passed over.

        Args:
            frame (`str`): Its name.
            prediction (`np.ndarray` of shape `(height, width)`, integer, *optional*):
                The ids predicted; `None` counts as nothing found.

        Raises:
            ValueError: If the prediction has another size than the ground truth.
        """
        if frame not in self._wanted:
            return
        path = self.sequence.annotations[frame]
        ids = self.sequence.read_ids(path)
        void = None if self.sequence.binary else ids == VOID
        if prediction is None:
            self._missing.append(frame)
            prediction = np.zeros_like(ids)
        elif prediction.shape != ids.shape:
            raise ValueError(f"The mask of {path} must have its size {ids.shape}, got {prediction.shape}; resize it.")
        known = set(self.sequence.object_ids)
        for value in np.flatnonzero(np.bincount(prediction.ravel())):
            if value and value not in known:
                self._unknown_ids[int(value)] = self._unknown_ids.get(int(value), 0) + 1
        for item in self._wanted[frame]:
            scores = frame_scores(ids == item.object_id, prediction == item.object_id, void)
            self._values[item.object_id][frame] = scores

    def result(self) -> SequenceScore:
        """
        The scores of the frames so far.

        Raises:
            ValueError: If a frame that the benchmark scores was not given.
        """
        objects = []
        for item in self.sequence.objects:
            values = self._values[item.object_id]
            lost = [frame for frame in item.scored_frames if frame not in values]
            if lost:
                raise ValueError(
                    f"Sequence {self.sequence.name!r} must be scored whole; frame {lost[0]} was not given."
                )
            if item.scored_frames:
                region, boundary = zip(*(values[frame] for frame in item.scored_frames), strict=True)
                objects.append(ObjectScore(item.object_id, item.category, item.scored_frames, region, boundary))
        return SequenceScore(self.sequence.name, tuple(objects), self._unknown_ids, tuple(self._missing))


def summarize(objects: list[ObjectScore] | tuple[ObjectScore, ...]) -> Summary | None:
    """Averages over objects; `None` where there is none."""
    if not objects:
        return None
    pairs = [(item.region, item.boundary) for item in objects]

    def average(which: int) -> Statistics:
        columns = ("mean", "recall", "decay")
        return Statistics(*(float(np.mean([getattr(pair[which], name) for pair in pairs])) for name in columns))

    return Summary(len(pairs), average(0), average(1))


def summarize_by_class(
    objects: list[ObjectScore], seen_categories: frozenset[str]
) -> dict[str, float | int | None] | None:
    """
    The five figures of YouTube-VOS: J and F over objects of seen and of unseen classes, and their average.

    Args:
        objects (list of [`ObjectScore`]): Objects with their classes.
        seen_categories (`frozenset[str]`): Classes of the training set.

    Returns:
        `dict` with `j_seen`, `j_unseen`, `f_seen`, `f_unseen`, `overall`, `num_seen`, `num_unseen`; a side without
        objects is `None` and left out of the average. `None` without objects.
    """
    if not objects:
        return None
    sides = {
        "seen": summarize([item for item in objects if item.category in seen_categories]),
        "unseen": summarize([item for item in objects if item.category not in seen_categories]),
    }
    figures = {f"j_{side}": summary.region.mean if summary else None for side, summary in sides.items()}
    figures |= {f"f_{side}": summary.boundary.mean if summary else None for side, summary in sides.items()}
    overall = float(np.mean([value for value in figures.values() if value is not None]))
    counts = {f"num_{side}": summary.num_objects if summary else 0 for side, summary in sides.items()}
    return figures | {"overall": overall} | counts


def find_predictions(predictions: str | os.PathLike, dataset: EvaluationDataset) -> Path:
    """
    The folder that holds a folder of masks for each sequence: `predictions`, or `Annotations` or `480p` in it.

    Raises:
        ValueError: If no sequence of the data set has one.
    """
    root = Path(predictions)
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"`predictions` must be a folder of masks, got {str(root)!r}, which {problem}.")
    for part in _PREDICTION_FOLDERS:
        if any((root / part / sequence.name).is_dir() for sequence in dataset.sequences):
            return root / part
    names = ", ".join(sequence.name for sequence in dataset.sequences[:3])
    raise ValueError(f"{root} must hold a folder of masks named like each sequence ({names}, ...); it holds none.")


def check_predictions(folder: Path, dataset: EvaluationDataset, allow_missing: bool = False) -> None:
    """
    Looks for every mask that will be scored, and compares sizes, before any work is done.

    Raises:
        ValueError: Naming the files that are missing (unless `allow_missing`) or have a wrong size.
    """
    if not dataset.has_ground_truth:
        raise ValueError(
            f"{dataset.root} has nothing to score against in split {dataset.split!r}: first masks alone, or no frames "
            "but the first and the last, which are not scored."
        )
    missing, wrong = [], []
    for sequence in dataset.sequences:
        for frame in sequence.scored_frames:
            path = folder / sequence.name / f"{frame}.png"
            if not path.is_file():
                missing.append(str(path))
                continue
            size, expected = image_size(path), image_size(sequence.annotations[frame])
            if size != expected:
                wrong.append(f"{path} is {size[0]}x{size[1]} instead of {expected[0]}x{expected[1]}")
    if wrong:
        raise ValueError(f"Masks must have the size of the ground truth (height x width): {_first_few(wrong)}.")
    if missing and not allow_missing:
        raise ValueError(
            f"Every scored frame must have a mask, {len(missing)} have none: {_first_few(missing)}. "
            "With `allow_missing` they count as empty."
        )


def score_predictions(
    predictions: str | os.PathLike,
    dataset: EvaluationDataset,
    allow_missing: bool = False,
    num_workers: int = 1,
    progress: Callable[[SequenceScore], None] | None = None,
) -> list[SequenceScore]:
    """
    Scores masks that any tool wrote as `<predictions>/<sequence>/<frame>.png`.

    Args:
        predictions (`str` or `os.PathLike`): Their folder, see [`find_predictions`].
        dataset ([`EvaluationDataset`]): What to compare with.
        allow_missing (`bool`, *optional*, defaults to `False`): Whether a missing file counts as an empty mask.
        num_workers (`int`, *optional*, defaults to 1): Processes.
        progress (callable, *optional*): Called with each [`SequenceScore`], in the order of the data set.

    Returns:
        `list[SequenceScore]`, in the order of the data set.

    Raises:
        ValueError: If files are missing, have a wrong size, or there is no ground truth.
    """
    folder = find_predictions(predictions, dataset)
    check_predictions(folder, dataset, allow_missing)
    tasks = [(sequence, folder / sequence.name) for sequence in dataset.sequences]
    scores = []
    for score in map_in_processes(score_folder, tasks, num_workers):
        scores.append(score)
        if progress is not None:
            progress(score)
    return scores


def score_folder(sequence: EvaluationSequence, folder: Path) -> SequenceScore:
    """Scores the masks of one sequence in a folder; a missing file counts as empty."""
    scorer = SequenceScorer(sequence)
    for frame in sequence.scored_frames:
        path = folder / f"{frame}.png"
        scorer.update(frame, sequence.read_ids(path) if path.is_file() else None)
    return scorer.result()


def map_in_processes(
    function: Callable, tasks: list[tuple], num_workers: int, initializer: Callable | None = None, initargs: tuple = ()
) -> Iterator:
    """Results of `function(*task)` in the order of `tasks`, from spawned processes if there are to be several."""
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        if initializer is not None:
            initializer(*initargs)
        for task in tasks:
            yield function(*task)
        return
    # Spawned, not forked: a forked process inherits the locks of torch's thread pool.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, (initializer, initargs)) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(initializer: Callable | None, initargs: tuple) -> None:
    """What a worker process does first: it sees to it that it ends when the process that started it is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    """Waits for the parent's end; without it a worker goes on to the end of its task, for minutes on both cores."""
    parent_process().join()
    os._exit(1)


def _first_few(items: list[str]) -> str:
    more = f" and {len(items) - _NAMED_ERRORS} more" if len(items) > _NAMED_ERRORS else ""
    return ", ".join(items[:_NAMED_ERRORS]) + more


__all__ = [
    "ObjectScore",
    "SequenceScore",
    "SequenceScorer",
    "Summary",
    "check_predictions",
    "find_predictions",
    "map_in_processes",
    "score_folder",
    "score_predictions",
    "summarize",
    "summarize_by_class",
]
