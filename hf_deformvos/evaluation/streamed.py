"""
Runs a model over a Hugging Face `datasets` data set, read row by row: no frame is kept, and what is to be scored turns
up on the way. Figures are those of the folder that the set was made from.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..data.hub_dataset import DatasetFrame, HubDataset, open_hub_dataset
from ..data.store import READ_ERRORS
from ..inference import hash_weights
from ..writable import check_folder
from .layouts import VOID, EvaluationDataset, EvaluationSequence, TrackedObject, image_ids, object_ids_of
from .metrics import frame_scores
from .runner import (
    RUN_FILE,
    EvaluationRun,
    RunnerConfig,
    SequenceResult,
    SequenceRunner,
    SequenceStream,
    describe_hardware,
    describe_versions,
    device_of,
    load_pretrained,
    load_runner,
)
from .scoring import ObjectScore, SequenceScore


PROTOCOLS = ("davis2016", "davis2017", "folder")


def evaluate_hub_dataset(
    name_or_path: str | Path,
    config: RunnerConfig,
    protocol: str | None = None,
    split: str = "val",
    streaming: bool = False,
    sequences: list[str] | None = None,
    max_frames: int | None = None,
    progress: Callable[[SequenceResult, EvaluationSequence], None] | None = None,
    loader: Callable[[RunnerConfig], tuple] = load_pretrained,
) -> EvaluationRun:
    """
    Runs a model over a data set of the columns that `hf_deformvos.data.hub_dataset` describes.

    Args:
        name_or_path (`str` or `Path`): See [`load_hub_dataset`].
        config ([`RunnerConfig`]): What to run, and how.
        protocol (`str`, *optional*):
            One of `PROTOCOLS`, which [`load_dataset_layout`] describes; default `"davis2016"` where the set says that
            its masks have one object, else `"davis2017"`.
        split (`str`, *optional*, defaults to `"val"`): Which split.
        streaming (`bool`, *optional*, defaults to `False`): Whether a Hub repository is read without downloading it.
        sequences (list of `str`, *optional*): Only these; reading stops after the last of them.
        max_frames (`int`, *optional*): Only so many frames of each sequence, as if it ended there.
        progress (callable, *optional*): Called with each [`SequenceResult`] and what is known of its sequence.
        loader (callable, *optional*): Makes `(model, processor)` from `config`.

    Returns:
        [`EvaluationRun`]

    Raises:
        ValueError: If a setting is out of its range, the set has other columns or no such sequence, its rows are not
            in order, or a frame or mask is broken or missing.
        OSError: If the set or the weights cannot be read.
    """
    if protocol is not None and protocol not in PROTOCOLS:
        raise ValueError(
            f"`protocol` (--dataset) must be one of {', '.join(PROTOCOLS)} for a data set, got {protocol!r}."
        )
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
    if config.adaptation is not None and config.adaptation.check_frames:
        raise ValueError(
            "`check_frames` (--adapt-check) looks ahead, and a data set gives one frame after the other: leave it out."
        )
    if config.resume:
        raise ValueError("`resume` needs a folder of frames: a data set does not tell beforehand which there are.")
    device, weights_sha256 = device_of(config), hash_weights(config.model)
    opened = open_hub_dataset(name_or_path, split, streaming)
    _check_names(opened, sequences)
    if config.save_masks:
        folder = config.save_masks
        check_folder(folder, f"`save_masks` must be a folder that can be written to, got {folder}")
        # A later run on a folder must not take what is written here for its own.
        Path(folder, RUN_FILE).unlink(missing_ok=True)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    runner = load_runner(config, loader)
    rows = opened.frames(sequences)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"Data set {opened.name!r} holds no frame in split {split!r}.")
    protocol = protocol or ("davis2016" if first.is_one_object else "davis2017")
    rows = itertools.chain([first], rows)
    del first  # nobody holds a frame that is through
    results, found = [], []
    for name, frames in itertools.groupby(rows, key=lambda row: row.sequence):
        frames = itertools.islice(frames, max_frames)
        result, sequence = _run(runner, _Sequence(name, protocol), frames, count_macs=not results)
        results.append(result)
        found.append(sequence)
        if progress is not None:
            progress(result, sequence)
    return EvaluationRun(
        dataset=EvaluationDataset(protocol, str(name_or_path), split, tuple(found)),
        config=config,
        num_workers=1,
        results=tuple(results),
        weights_sha256=weights_sha256,
        hardware=describe_hardware(device, config.dtype, torch.get_num_threads(), 1),
        versions=describe_versions(),
    )


def _check_names(opened: HubDataset, sequences: list[str] | None) -> None:
    """Refuses sequences that the set does not have, before any work is done."""
    if sequences is None:
        return
    known = opened.sequence_names()
    unknown = [name for name in sequences if name not in set(known)]
    if unknown or not sequences:
        some = ", ".join(known[:8]) + (" ..." if len(known) > 8 else "")
        raise ValueError(f"`sequences` must be of {opened.name} ({some}), got {', '.join(unknown) or 'none'}.")


def _run(
    runner: SequenceRunner, sequence: "_Sequence", frames: Iterable[DatasetFrame], count_macs: bool
) -> tuple[SequenceResult, EvaluationSequence]:
    """Streams one sequence through the model, and scores it on the way."""
    stream = SequenceStream(runner, sequence.name)
    for row, is_last in _with_last(frames):
        frame = sequence.take(row)
        ids = stream.step(frame, count_macs=count_macs and is_last)
        sequence.score(frame, ids)
    return stream.result(sequence.scores(), len(sequence.first_frames)), sequence.describe()


def _with_last(items: Iterable) -> Iterator[tuple]:
    """Each item, and whether it is the last: reads one ahead."""
    items = iter(items)
    held = [next(items)]
    for item in items:
        yield held.pop(), False
        held.append(item)
    yield held.pop(), True


class _Frame:
    """A row on its way: its mask is decoded, its image when the clock runs."""

    def __init__(self, row: DatasetFrame, ids: np.ndarray | None, given: list[int]):
        self._row, self.ids, self._given = row, ids, given
        self.name, self.label = row.name, row.label

    def read_image(self) -> Image.Image:
        return _read(self._row, self._row.read_image)

    def read_given(self) -> tuple[list[int], np.ndarray] | None:
        if not self._given:
            return None
        return self._given, np.where(np.isin(self.ids, self._given), self.ids, 0).astype(np.uint8)


def _read(row: DatasetFrame, function: Callable):
    """What a row holds; where that is broken, an error that names it."""
    try:
        return function()
    except READ_ERRORS as error:
        raise ValueError(f"{row.label[0].upper()}{row.label[1:]} cannot be read: {error}") from error


class _Sequence:
    """
    What is known of a sequence at the frame that it has come to.

    The last annotated frame is not scored, and which one that is shows at the end: scores of a frame count only when
    another annotated frame follows.
    """

    def __init__(self, name: str, protocol: str):
        self.name = name
        self.first_frames: dict[int, str] = {}
        self._whole = protocol != "folder"
        self._binary: bool | None = True if protocol == "davis2016" else None if protocol == "folder" else False
        self._frames: list[str] = []
        self._num_annotated = 0
        self._values: dict[int, dict[str, tuple[float, float]]] = {}
        self._pending: dict[int, tuple[str, tuple[float, float]]] = {}

    def take(self, row: DatasetFrame) -> _Frame:
        """The next frame, with its objects if some start there."""
        ids = None if row.mask is None else _read(row, lambda: self._ids(row))
        self._check_annotated(row, ids is not None)
        self._frames.append(row.name)
        given = []
        if ids is not None:
            self._num_annotated += 1
            if not self._whole or len(self._frames) == 1:
                given = [item for item in object_ids_of(ids) if item not in self.first_frames]
            self.first_frames.update(dict.fromkeys(given, row.name))
        if self._whole and not self.first_frames:
            raise ValueError(f"Sequence {self.name!r} must show its objects in the first frame, got an empty mask.")
        return _Frame(row, ids, given)

    def _ids(self, row: DatasetFrame) -> np.ndarray:
        image = row.open_mask()
        if self._binary is None:
            # 255 is the object where it is the only value beside 0 in the first mask that is not empty.
            ids = image_ids(image, "the mask", merge_channels=True)
            if ids.any():
                self._binary = not object_ids_of(ids)
        ids = image_ids(image, "the mask", merge_channels=self._binary is not False)
        return (ids > 0).astype(np.uint8) if self._binary else ids

    def _check_annotated(self, row: DatasetFrame, annotated: bool) -> None:
        """By the DAVIS protocol every frame has a mask, or the first alone."""
        number = len(self._frames)
        if not self._whole:
            return
        if number == 0 and not annotated:
            raise ValueError(f"Sequence {self.name!r} must have the mask of its first frame, {row.frame_index}.")
        if number > 1 and annotated != (self._num_annotated == number):
            raise ValueError(
                f"Sequence {self.name!r} must have a mask for every frame or for the first alone; by the protocol "
                f"`folder` it may be as it is. Frame {row.frame_index} {'has' if annotated else 'lacks'} one."
            )

    def score(self, frame: _Frame, prediction: np.ndarray) -> None:
        """Compares a frame's mask, if it has one, with what was predicted."""
        if frame.ids is None:
            return
        if prediction.shape != frame.ids.shape:
            raise ValueError(
                f"The mask of {frame.label} must have its size {prediction.shape}, got {frame.ids.shape}."
            )
        for object_id, (name, values) in self._pending.items():
            self._values.setdefault(object_id, {})[name] = values
        void = None if self._binary else frame.ids == VOID
        self._pending = {
            object_id: (frame.name, frame_scores(frame.ids == object_id, prediction == object_id, void))
            for object_id, first in self.first_frames.items()
            if first != frame.name
        }

    def scores(self) -> SequenceScore:
        """The scores by the protocol."""
        if not self.first_frames:
            raise ValueError(f"Sequence {self.name!r} must show an object in one of its masks; all are empty.")
        objects = []
        for object_id, values in sorted(self._values.items()):
            region, boundary = zip(*values.values(), strict=True)
            objects.append(ObjectScore(object_id, None, tuple(values), region, boundary))
        return SequenceScore(self.name, tuple(objects))

    def describe(self) -> EvaluationSequence:
        """What is known of it in the end."""
        objects = tuple(
            TrackedObject(object_id, first, tuple(self._values.get(object_id, ())))
            for object_id, first in sorted(self.first_frames.items())
        )
        images = tuple(Path(name) for name in self._frames)
        return EvaluationSequence(self.name, images, {}, objects, tuple(self._frames), bool(self._binary))


__all__ = ["PROTOCOLS", "evaluate_hub_dataset"]
