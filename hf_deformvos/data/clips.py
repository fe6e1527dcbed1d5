"""Samplers: batches of raw clips, cut from decoded frames, that depend on nothing but a seed and a batch number."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .store import VOID, ArrayStore, FrameStore, ObjectBox, report_missing


MARGIN = 1.25
_MINIMUM_OBJECT_AREA = 200
_NO_OBJECT = "show no object (255 is void unless masks are merged)"


@dataclass(frozen=True)
class ClipSpec:
    """
    What a batch looks like.

    Args:
        size (`tuple[int, int]`): Height and width after augmentation, of the form 16k+1.
        frames (`int`): Frames a clip.
        batch (`int`): Clips a batch.
        video_share (`float`): Probability that a clip is cut from a video rather than made from a still image.
        max_gap (`int`): Largest distance of neighbouring frames in a video clip.
        max_objects (`int`): Most labelled objects taken from one source.
        kin (`float`): Probability that all still images of a batch come from one set, so that what augmentation pastes
            from one clip into another often looks alike.
    """

    size: tuple[int, int]
    frames: int
    batch: int
    video_share: float = 0.5
    max_gap: int = 10
    max_objects: int = 3
    kin: float = 0.0

    @property
    def canvas(self) -> tuple[int, int]:
        """Size of the raw clips: the output and a margin that warps may reach into."""
        return round(self.size[0] * MARGIN), round(self.size[1] * MARGIN)


@dataclass
class RawBatch:
    """
    Raw clips on the CPU.

    Args:
        frames (`torch.Tensor` of shape `(batch, frames, height, width, 3)`): uint8 RGB.
        masks (`torch.Tensor` of shape `(batch, frames, height, width)`): uint8 ids, 255 = void.
        is_static (`torch.Tensor` of shape `(batch,)`): bool, true where one image is repeated and needs motion.
        size (`tuple[int, int]`): Size that augmentation shall produce.
    """

    frames: torch.Tensor
    masks: torch.Tensor
    is_static: torch.Tensor
    size: tuple[int, int]


class ClipSampler:
    """
    Draws batches of raw clips. `sampler(index, spec)` gives the same batch for the same seed, index and spec, in any
    process, so a sampler has no state to save. What it can never draw, it reports by name.

    Args:
        videos (sequence of [`FrameStore`]): Stores with sequences of several frames.
        statics (sequence of [`FrameStore`] or [`ArrayStore`]): Stores of still images.
        seed (`int`): Seed of all draws.

    Raises:
        ValueError: If nothing labelled is there to sample.
    """

    def __init__(self, videos: Sequence[FrameStore] = (), statics: Sequence[FrameStore] = (), seed: int = 0):
        self.seed = seed
        self._videos = [(store, span) for store in videos for span in _usable_sequences(store)]
        sets = [[(store, index) for index in _usable_images(store)] for store in statics]
        self._static_sets = [images for images in sets if images]
        self._statics = [image for images in self._static_sets for image in images]
        if not self._videos and not self._statics:
            raise ValueError("Nothing to sample: give at least one video or image set with a labelled object.")

    def __call__(self, index: int, spec: ClipSpec) -> RawBatch:
        """
        Draws batch number `index`.

        Args:
            index (`int`): Number of the batch, counted over all processes and accumulation steps.
            spec ([`ClipSpec`]): Sizes and shares.
        """
        height, width = spec.canvas
        frames = np.empty((spec.batch, spec.frames, height, width, 3), np.uint8)
        masks = np.empty((spec.batch, spec.frames, height, width), np.uint8)
        is_static = np.zeros(spec.batch, bool)
        statics = self._batch_statics(index, spec)
        for position in range(spec.batch):
            rng = np.random.default_rng([self.seed, index, position])
            share = 1.0 if not self._statics else spec.video_share if self._videos else 0.0
            is_static[position] = rng.random() >= share
            if is_static[position]:
                self._draw_static(rng, statics, spec, frames[position], masks[position])
            else:
                self._draw_video(rng, spec, frames[position], masks[position])
        return RawBatch(torch.from_numpy(frames), torch.from_numpy(masks), torch.from_numpy(is_static), spec.size)

    def _batch_statics(self, index: int, spec: ClipSpec) -> list[tuple[FrameStore | ArrayStore, int]]:
        """The still images that a batch draws from: all, or those of one set, larger sets being likelier."""
        # `batch` is no clip's position. Without a third number the draws would be those of the first clip.
        rng = np.random.default_rng([self.seed, index, spec.batch])
        if not self._static_sets or rng.random() >= spec.kin:
            return self._statics
        shares = np.array([len(images) for images in self._static_sets]) / len(self._statics)
        return self._static_sets[rng.choice(len(shares), p=shares)]

    @staticmethod
    def _draw_static(
        rng: np.random.Generator,
        statics: list[tuple[FrameStore | ArrayStore, int]],
        spec: ClipSpec,
        frames: np.ndarray,
        masks: np.ndarray,
    ) -> None:
        """Fills a clip with one image, repeated."""
        for _ in range(20):
            store, index = statics[rng.integers(len(statics))]
            objects = [item for item in store.objects[index] if item.area >= _MINIMUM_OBJECT_AREA]
            if objects:
                break
        else:
            objects = store.objects[index]
        table, focus = _choose_objects(rng, objects, spec.max_objects)
        window = choose_window(rng, store.sizes[index], focus.box, spec.canvas, may_exceed=1.6)
        cut_window(store.image(index), table[store.mask(index)], window, frames[0], masks[0])
        frames[1:], masks[1:] = frames[0], masks[0]

    def _draw_video(self, rng: np.random.Generator, spec: ClipSpec, frames: np.ndarray, masks: np.ndarray) -> None:
        """Fills a clip with frames of one sequence, forwards or backwards, with random gaps."""
        for _ in range(20):
            store, span = self._videos[rng.integers(len(self._videos))]
            gaps = rng.integers(1, max(2, spec.max_gap + 1), size=spec.frames - 1)
            while gaps.size and gaps.sum() > len(span) - 1 and gaps.max() > 1:
                gaps = np.maximum(1, gaps // 2)
            steps = np.concatenate([[0], np.cumsum(gaps)])
            start = rng.integers(max(1, len(span) - int(steps[-1])))
            # Sequences shorter than a clip show their last frame again.
            picked = [span[min(len(span) - 1, int(start + step))] for step in steps]
            if rng.random() < 0.5:
                picked.reverse()
            objects = [item for item in store.objects[picked[0]] if item.area >= _MINIMUM_OBJECT_AREA]
            if objects:
                break
        else:
            picked = [next(index for index in span if store.objects[index])] * spec.frames
            objects = store.objects[picked[0]]
        table, focus = _choose_objects(rng, objects, spec.max_objects)
        size = store.sizes[picked[0]]
        window = choose_window(rng, size, focus.box, spec.canvas)
        for position, index in enumerate(picked):
            same = _scale_window(window, size, store.sizes[index])
            cut_window(store.image(index), table[store.mask(index)], same, frames[position], masks[position])


def _usable_sequences(store: FrameStore) -> list[range]:
    """The sequences that have several frames and an object; the others are reported."""
    spans, of_all = store.sequences, f"of {len(store.sequences)} sequences"
    single = [name for name, span in spans.items() if len(span) < 2]
    empty = [name for name, span in spans.items() if not any(store.objects[index] for index in span)]
    report_missing(store.name, single, "skip", f"{of_all} have one frame alone")
    report_missing(store.name, empty, "skip", f"{of_all} {_NO_OBJECT}")
    return [span for name, span in spans.items() if name not in {*single, *empty}]


def _usable_images(store: FrameStore | ArrayStore) -> list[int]:
    """The images that show an object; the others are reported, but for those in memory, which have no names."""
    if isinstance(store, FrameStore):
        empty = [name for name, shown in zip(store.frame_names, store.objects, strict=True) if not shown]
        report_missing(store.name, empty, "skip", f"of {len(store)} images {_NO_OBJECT}")
    return [index for index in range(len(store)) if store.objects[index]]


def _choose_objects(
    rng: np.random.Generator, objects: list[ObjectBox], max_objects: int
) -> tuple[np.ndarray, ObjectBox]:
    """Picks 1..`max_objects` objects; returns the table old id -> new id (others become background) and the focus."""
    count = int(rng.integers(1, min(max_objects, len(objects)) + 1))
    # Larger instances first in expectation: a crowd of specks teaches little.
    weights = np.sqrt([item.area for item in objects])
    chosen = rng.choice(len(objects), size=count, replace=False, p=weights / weights.sum())
    table = np.zeros(256, np.uint8)
    table[VOID] = VOID
    for new_id, position in enumerate(chosen, start=1):
        table[objects[position].object_id] = new_id
    return table, objects[chosen[0]]


def choose_window(
    rng: np.random.Generator,
    frame_size: tuple[int, int],
    box: tuple[int, int, int, int],
    canvas: tuple[int, int],
    may_exceed: float = 1.0,
) -> tuple[float, float, float, float]:
    """
    Draws a crop window that shows most of an object.

    Args:
        rng (`np.random.Generator`): Source of randomness.
        frame_size (`tuple[int, int]`): Height and width of the frame.
        box (`tuple[int, int, int, int]`): The object's (x0, y0, x1, y1).
        canvas (`tuple[int, int]`): Height and width of what the window is resized to.
        may_exceed (`float`): How much larger than the largest window inside the frame the window may be to show the
            object whole; 1 keeps it inside.

    Returns:
        `tuple` (x0, y0, x1, y1) in pixels of the frame, floats; may reach outside the frame if `may_exceed` > 1.
    """
    frame_height, frame_width = frame_size
    aspect = canvas[1] / canvas[0] * math.exp(rng.uniform(-0.15, 0.15))
    x0, y0, x1, y1 = box
    need = 1.2 * max(y1 - y0, (x1 - x0) / aspect)
    inside = min(frame_height, frame_width / aspect)
    largest = min(max(frame_height, frame_width / aspect), inside * may_exceed, max(inside, need))
    # At most 1.6-fold enlargement, and the object mostly visible.
    smallest = min(largest, max(0.45 * inside, 0.75 * need, canvas[0] / 1.6))
    height = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    width = height * aspect

    def place(low: int, high: int, extent: float, limit: int) -> float:
        start = (low + high) / 2 + rng.uniform(-0.3, 0.3) * extent - extent / 2
        return min(max(start, min(0.0, limit - extent)), max(0.0, limit - extent))

    left, top = place(x0, x1, width, frame_width), place(y0, y1, height, frame_height)
    return left, top, left + width, top + height


def _scale_window(
    window: tuple[float, float, float, float], size: tuple[int, int], other_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A window (x0, y0, x1, y1) of a frame of one (height, width) as it lies in one of another."""
    down, across = other_size[0] / size[0], other_size[1] / size[1]
    return window[0] * across, window[1] * down, window[2] * across, window[3] * down


def cut_window(
    image: np.ndarray,
    mask: np.ndarray,
    window: tuple[float, float, float, float],
    image_out: np.ndarray,
    mask_out: np.ndarray,
) -> None:
    """
    Resizes a window of a frame into given arrays; outside the frame the image is mirrored and the mask is void.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8.
        mask (`np.ndarray` of shape `(height, width)`): uint8 ids.
        window (`tuple`): (x0, y0, x1, y1) in pixels.
        image_out (`np.ndarray` of shape `(out_height, out_width, 3)`): Receives the image.
        mask_out (`np.ndarray` of shape `(out_height, out_width)`): Receives the mask, nearest neighbours.
    """
    out_height, out_width = mask_out.shape
    x0, y0, x1, y1 = window
    scale_x, scale_y = (x1 - x0) / out_width, (y1 - y0) / out_height
    # Whole output pixels that lie inside the frame; the rest is padding.
    left, top = max(0, math.ceil(-x0 / scale_x - 1e-6)), max(0, math.ceil(-y0 / scale_y - 1e-6))
    right = min(out_width, math.floor((image.shape[1] - x0) / scale_x + 1e-6))
    bottom = min(out_height, math.floor((image.shape[0] - y0) / scale_y + 1e-6))
    box = (
        max(0.0, x0 + left * scale_x),
        max(0.0, y0 + top * scale_y),
        min(float(image.shape[1]), x0 + right * scale_x),
        min(float(image.shape[0]), y0 + bottom * scale_y),
    )
    size = (right - left, bottom - top)
    # Only the touched rows and columns are handed to Pillow, which copies its input.
    column, row = int(box[0]), int(box[1])
    part = (slice(row, math.ceil(box[3])), slice(column, math.ceil(box[2])))
    box = (box[0] - column, box[1] - row, box[2] - column, box[3] - row)
    inner_image = np.asarray(Image.fromarray(image[part]).resize(size, Image.BILINEAR, box=box))
    inner_mask = np.asarray(Image.fromarray(mask[part]).resize(size, Image.NEAREST, box=box))
    if size == (out_width, out_height):
        image_out[:], mask_out[:] = inner_image, inner_mask
        return
    pad = ((top, out_height - bottom), (left, out_width - right))
    image_out[:] = np.pad(inner_image, (*pad, (0, 0)), mode="symmetric")
    mask_out[:] = np.pad(inner_mask, pad, constant_values=VOID)


class Prefetcher:
    """
    Makes coming items in background threads, in order.

    Args:
        make (`Callable[[int], T]`): Makes item number `index`; runs in a worker thread.
        first (`int`): First index.
        stride (`int`): Distance of this process's indices.
        workers (`int`): Threads; 0 makes every item when it is asked for.
    """

    def __init__(self, make: Callable, first: int = 0, stride: int = 1, workers: int = 1):
        self._make, self._next, self._stride = make, first, stride
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="clips") if workers > 0 else None
        self._pending: deque[Future] = deque()
        self._depth = workers + 1

    def get(self):
        """The next item; an error of a worker is raised here."""
        if self._pool is None:
            self._next += self._stride
            return self._make(self._next - self._stride)
        while len(self._pending) < self._depth:
            self._pending.append(self._pool.submit(self._make, self._next))
            self._next += self._stride
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stops the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
