"""State of one video being segmented: frames come in, masks go out, and nothing grows with the length of the video."""

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils import logging

from .memory_deformvos import MemoryBank
from .modeling_deformvos import (
    MASKED_LOGIT,
    DeformVosModel,
    DeformVosVideoOutput,
    ImageFeatures,
    Segmentation,
    pool_to_stride4,
)


logger = logging.get_logger(__name__)

# Logit of a mask that the user gave: e^-10 is below what half precision tells from certainty.
GIVEN_LOGIT = 10.0


class FrameSource:
    """
    Where a session's frames come from. Invariant: at most one decoded frame is held.

    A list, array, tensor or other sequence can be read in any order; an iterator only forwards, each frame once.
    """

    class End(IndexError):
        """The video has no such frame; an `IndexError` of the video's own code is no end of it."""

    def __init__(self, video: Sequence | Iterable, prepare: Callable):
        self._prepare = prepare
        self.is_seekable = hasattr(video, "__getitem__") and hasattr(video, "__len__")
        self._video = video if self.is_seekable else iter(video)
        self._next_idx = 0
        self._held: tuple[int, torch.Tensor, tuple[int, int]] | None = None

    @property
    def num_frames(self) -> int | None:
        """Number of frames, `None` where only the end of the stream will tell."""
        return len(self._video) if self.is_seekable else None

    @property
    def first_readable(self) -> int:
        """The earliest frame that can still be read."""
        if self.is_seekable:
            return 0
        return self._next_idx if self._held is None else self._held[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of the frame held."""
        return 0 if self._held is None else self._held[1].nbytes

    @property
    def original_size(self) -> tuple[int, int]:
        """(height, width) of the video's frames: of the one held, or of the next that can be read."""
        return self.read(self.first_readable if self._held is None else self._held[0])[1]

    def read(self, frame_idx: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """
        Prepared frame `(1, 3, height, width)` and its original (height, width).

        Raises:
            FrameSource.End: past the end of the video.
            ValueError: if a stream is asked for a frame that has passed, or the frame cannot be used.
        """
        if self._held is None or self._held[0] != frame_idx:
            self._held = None
            frame = self._fetch(frame_idx)
            try:
                self._held = (frame_idx, *self._prepare(frame))
            except ValueError as error:
                raise ValueError(f"Frame {frame_idx} of the video cannot be used: {error}") from error
        return self._held[1:]

    def _fetch(self, frame_idx: int):
        if self.is_seekable:
            if not 0 <= frame_idx < len(self._video):
                raise self.End(f"There is no frame {frame_idx} in a video of {len(self._video)} frames.")
            return self._video[frame_idx]
        if frame_idx < self._next_idx:
            raise ValueError(
                f"Frame {frame_idx} has passed: this video is a stream that is read forwards, and frame "
                f"{self._next_idx} is next. Give the video as a list or array of frames to go back."
            )
        for frame in self._video:
            self._next_idx += 1
            if self._next_idx > frame_idx:
                return frame
        raise self.End(f"There is no frame {frame_idx}: the stream ended after {self._next_idx} frames.")


class ObjectTable:
    """
    The caller's object ids and their places. Invariant: an id keeps its place for as long as it is tracked; a place is
    a group and a slot of the identity bank, and ids are never used as tensor indices.
    """

    def __init__(self, max_objects: int):
        self.max_objects = max_objects
        self._places: dict[int, int] = {}

    @property
    def object_ids(self) -> list[int]:
        return list(self._places)

    @property
    def num_groups(self) -> int:
        return max((place // self.max_objects + 1 for place in self._places.values()), default=0)

    def add(self, obj_id: int):
        """Give a new id the lowest free place."""
        if obj_id not in self._places:
            taken = set(self._places.values())
            self._places[obj_id] = next(place for place in range(len(taken) + 1) if place not in taken)

    def remove(self, obj_id: int) -> tuple[int, int]:
        """Free the id's place and return it."""
        return divmod(self._places.pop(obj_id), self.max_objects)

    def place(self, obj_id: int) -> tuple[int, int]:
        """(group, slot) of an id."""
        return divmod(self._places[obj_id], self.max_objects)

    def __contains__(self, obj_id: int) -> bool:
        return obj_id in self._places

    def valid(self, num_groups: int, device: torch.device, without: set[int] = frozenset()) -> torch.Tensor:
        """Which channels (background, slots) of each group are in use, `(G, 1 + max_objects)` bool."""
        valid = torch.zeros(num_groups, 1 + self.max_objects, dtype=torch.bool)
        valid[:, 0] = True
        for obj_id in self._places.keys() - without:
            group, slot = self.place(obj_id)
            valid[group, 1 + slot] = True
        return valid.to(device)


class DeformVosInferenceSession:
    r"""
    State of one video's segmentation. Made by [`DeformVosProcessor.init_video_session`]; any number of sessions can
    run on one model.

    `copy.deepcopy` of a session is a snapshot, from which it can go on another way: the model, and a video that can be
    read in any order, are shared.

    Args:
        video (sequence or iterable of frames, *optional*):
            Frames to be read as they are needed; none when frames are handed over one by one.
        prepare (`Callable`, *optional*):
            Turns a frame into (`(1, 3, height, width)` tensor, (original height, original width)).
        inference_device (`torch.device` or `str`, *optional*):
            Device to compute on, of the model's type, for the model is not moved; the model's by default.
        dtype (`torch.dtype` or `str`, *optional*):
            Precision to compute in, float32, bfloat16 or float16; the model's by default. A lower one than the
            weights' is reached by autocast.
        memory_interval (`int`, *optional*): overrides the model's `config.memory_interval`.
        long_term_slots (`int`, *optional*): overrides the model's `config.long_term_slots`.
    """

    def __init__(
        self,
        video: Sequence | Iterable | None = None,
        prepare: Callable | None = None,
        inference_device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        memory_interval: int | None = None,
        long_term_slots: int | None = None,
    ):
        for name, value in (("memory_interval", memory_interval), ("long_term_slots", long_term_slots)):
            if value is not None and as_index(value, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.source = None if video is None else FrameSource(video, prepare)
        self.inference_device = None if inference_device is None else _as_device(inference_device)
        self.dtype = _as_dtype(dtype)
        self.memory_interval = memory_interval
        self.long_term_slots = long_term_slots
        self.reset_tracking_data()

    def __deepcopy__(self, memo: dict) -> "DeformVosInferenceSession":
        memo[id(self._model)] = self._model
        if self.source is not None and self.source.is_seekable:
            memo[id(self.source._video)] = self.source._video
        snapshot = copy.copy(self)
        snapshot.__dict__.update(copy.deepcopy(vars(self), memo))
        return snapshot

    def reset_tracking_data(self):
        """Forget objects, inputs and memory; keep the video, so that other objects can be followed through it."""
        self._inputs: dict[int, dict[int, torch.Tensor]] = {}
        self._last_frame_idx: int | None = None
        self._restart()

    def reset_inference_session(self):
        """Forget everything, the video included."""
        self.source = None
        self.reset_tracking_data()

    def _restart(self):
        """Forget what was seen; the stream's position stays."""
        self._model: DeformVosModel | None = None
        self._weights_dtype: torch.dtype | None = None
        self._computed_in: torch.dtype | None = None
        self._computed_on: torch.device | None = None
        self._objects: ObjectTable | None = None
        self._memory: MemoryBank | None = None
        self._frame_size: tuple[int, int] | None = None
        self._origin: int | None = None

    @property
    def _is_seekable(self) -> bool:
        """Whether there is a video that can be read in any order: masks stay then, for the next propagation."""
        return self.source is not None and self.source.is_seekable

    @property
    def _is_stream(self) -> bool:
        """Whether there is a video that is read forwards, each frame once."""
        return self.source is not None and not self.source.is_seekable

    @property
    def num_frames(self) -> int | None:
        """Number of frames of the video, where that is known."""
        return None if self.source is None else self.source.num_frames

    @property
    def video_height(self) -> int | None:
        """Height of the video's frames in pixels, for `post_process_masks`; `None` where frames are handed over."""
        return None if self.source is None else int(self.source.original_size[0])

    @property
    def video_width(self) -> int | None:
        """Width of the video's frames in pixels; see [`video_height`]."""
        return None if self.source is None else int(self.source.original_size[1])

    @property
    def object_ids(self) -> list[int]:
        """Ids followed so far, then those whose first frame is still to come, in the order they were given."""
        ids = [] if self._objects is None else self._objects.object_ids
        for frame_idx in sorted(self._inputs):
            ids += [obj_id for obj_id in self._inputs[frame_idx] if obj_id not in ids]
        return ids

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that the session holds: inputs still needed, the memory, and the frame at hand."""
        held = sum(mask.nbytes for masks in self._inputs.values() for mask in masks.values())
        held += 0 if self.source is None else self.source.num_bytes
        return held + (0 if self._memory is None else self._memory.num_bytes)

    @property
    def _is_empty(self) -> bool:
        """Whether there is nothing to segment from."""
        return self._memory is None or self._memory.is_empty

    def add_masks(self, frame_idx: int, masks: dict[int, torch.Tensor]):
        """
        Give objects' masks on a frame: of new objects, or corrections of known ones. Where masks overlap, the one
        given last wins. While a propagation runs, masks of frames ahead of it join when they are reached; those of
        frames behind it count from the next propagation on.

        A stream still holds the frame that was segmented last. Masks given for it are taken up before the next frame
        is read: a propagation that is running does so without yielding that frame again; the next one starts there,
        as does the next call of the model without `frame_idx`.

        An empty mask says that an object is not to be seen. Of a stream, or of frames that are handed over, it must be
        followed by then, or have pixels on an earlier frame that is still to come. Of a video that can be read in any
        order it must have pixels on another frame, earlier or later, whatever was propagated before: a propagation in
        either direction that has not met the object yet passes over its empty masks.

        Args:
            frame_idx (`int`): the frame, which must not have passed if the video is a stream.
            masks (`dict[int, torch.Tensor]`): object id to `(height, width)` bool, any size, of one frame.

        Raises:
            ValueError: if an object that is not followed at that frame has an empty mask, or the video has no such
                frame, or has it no longer.
        """
        self._check_frame_idx(frame_idx)
        known = self._known_at(frame_idx)
        for obj_id, mask in masks.items():
            if obj_id not in known and not mask.any():
                raise ValueError(
                    f"The mask of object {obj_id} on frame {frame_idx} is empty. A new object needs at least one "
                    "pixel; an empty mask is only a correction of an object that is already followed, or marked on "
                    f"{'another' if self._is_seekable else 'an earlier'} frame."
                )
        given = self._inputs.setdefault(frame_idx, {})
        for obj_id, mask in masks.items():
            given.pop(obj_id, None)  # the order is that of giving
            given[obj_id] = mask

    def _known_at(self, frame_idx: int) -> set[int]:
        """Objects that an empty mask on this frame may correct, see [`add_masks`]."""
        if self._is_seekable:
            known, others = set(), [masks for at, masks in self._inputs.items() if at != frame_idx]
        else:
            known = set() if self._objects is None else set(self._objects.object_ids)
            others = [masks for at, masks in self._inputs.items() if at < frame_idx]
        return known | {obj_id for masks in others for obj_id, mask in masks.items() if mask.any()}

    def _given(self, frame_idx: int) -> dict[int, torch.Tensor]:
        """The frame's masks, without empty ones of objects that are not followed: there is nothing to correct."""
        followed = () if self._objects is None else self._objects.object_ids
        masks = self._inputs.get(frame_idx, {})
        return {obj_id: mask for obj_id, mask in masks.items() if obj_id in followed or mask.any()}

    def _marked(self) -> list[int]:
        """The frames on which any pixel was given, from which a propagation can start."""
        return sorted(at for at, masks in self._inputs.items() if any(mask.any() for mask in masks.values()))

    def _check_frame_idx(self, frame_idx: int):
        if frame_idx < 0:
            raise ValueError(f"`frame_idx` must not be negative, got {frame_idx}.")
        if self.source is None:
            if self._last_frame_idx is not None and frame_idx < self._last_frame_idx:
                raise ValueError(
                    f"Frame {frame_idx} has passed: frame {self._last_frame_idx} was handed over last. Masks are "
                    "given for that frame or a later one, and then it is handed over (again)."
                )
            return
        if self.num_frames is not None and frame_idx >= self.num_frames:
            raise ValueError(f"`frame_idx` must be below the video's {self.num_frames} frames, got {frame_idx}.")
        if frame_idx < self.source.first_readable:
            raise ValueError(
                f"Frame {frame_idx} has passed: this video is a stream, and frame {self.source.first_readable} is the "
                "earliest that masks can still be given for."
            )

    def remove_object(self, obj_id: int):
        """
        Stop following an object and take it out of the memory; its pixels become background.

        What the memory holds of it goes to the background, also where other objects would have had a share of its
        pixels without it. In models of more than one propagation layer the visual and identification inputs of further
        layers keep what they saw.

        Raises:
            ValueError: if the id is unknown.
        """
        if obj_id not in self.object_ids:
            raise ValueError(f"Object {obj_id} is unknown to this session, which follows {self.object_ids or 'none'}.")
        if self._objects is not None and obj_id in self._objects:
            with self._undone_on_error():
                group, slot = self._objects.remove(obj_id)
                groups = self._objects.num_groups
                if groups:
                    self._rewrite_memory(lambda masks: _take_out(masks, group, slot)[:groups])
                else:
                    self._restart()
        for frame_idx in list(self._inputs):
            self._inputs[frame_idx].pop(obj_id, None)
            if not self._inputs[frame_idx]:
                del self._inputs[frame_idx]

    # One frame

    @contextmanager
    def _undone_on_error(self) -> Iterator[None]:
        """All or nothing: what raises, an interrupt among it, leaves objects and memory as they were."""
        before = {**vars(self), "_objects": copy.deepcopy(self._objects)}
        if self._memory is not None:
            before["_memory"] = replace(self._memory, long_term=list(self._memory.long_term))
        try:
            yield
        except BaseException:
            vars(self).update(before)
            raise

    @torch.no_grad()
    def step(
        self,
        model: DeformVosModel,
        frame: torch.Tensor | None = None,
        frame_idx: int | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> DeformVosVideoOutput:
        """
        Segment one frame and remember it. See [`DeformVosModel.forward`].

        Raises:
            ValueError: if no object is known at this frame, the frame's size differs from the frames' before it, it
                holds NaN or infinite values, a stream is asked to go back, or the model is of another dtype, on
                another device, of other layers or under another autocast than at the frames before it.
        """
        self._check_weights(model)
        self._forget_passed()
        frame_idx = self._next_frame_idx() if frame_idx is None else as_index(frame_idx, "frame_idx")
        self._check_order(frame_idx)
        pixel_values = self._pixel_values(model, frame, frame_idx)
        frame_size = tuple(pixel_values.shape[-2:])
        given = _at_size(self._given(frame_idx), frame_size)
        if not given and self._is_empty:
            marked = self._marked()
            first = f"the first mask is on frame {marked[0]}" if marked else "no mask has been given"
            raise ValueError(
                f"No object is known at frame {frame_idx}: {first}. Call `processor.add_inputs_to_inference_session` "
                "with `frame_idx` of this frame, or an earlier one, first."
            )
        self._check_joining(given, frame_idx)
        with self._undone_on_error():
            with self._autocast(model):
                features = model.encode_images(pixel_values)
                joining = self._prepare_memory(model, frame_idx, given)
                segmentation = None if self._memory.is_empty else model.segment(features, self._memory)
                masks = self._masks(model, features, segmentation, given, joining)
                self._remember(model, features, segmentation, masks, frame_idx, bool(given))
            self._frame_size, self._last_frame_idx = frame_size, frame_idx
            output = self._output(segmentation, given, frame_idx, output_attentions, output_hidden_states)
        if not self._is_seekable:
            self._inputs.pop(frame_idx, None)
        return output

    def _check_weights(self, model: DeformVosModel):
        """Refuses weights that cannot read the memory."""
        if self._weights_dtype not in (None, model.dtype):
            raise ValueError(
                f"The model's weights must be {self._weights_dtype}, as at the frames before, got {model.dtype}; cast "
                "the model back, or start another session."
            )
        if self._is_empty:
            return
        if self._computed_on != execution_device(model):
            raise ValueError(
                f"The model must lie on {self._computed_on}, as at the frames before, got {execution_device(model)}; "
                "move it back, or start another session."
            )
        num_layers = len(self._memory.previous.layers)
        if num_layers != len(model.layers):
            raise ValueError(
                f"The model must have {num_layers} propagation layers, as at the frames before, got "
                f"{len(model.layers)}: a session follows its objects with one model."
            )
        if self._computed_in != self._precision(model):
            raise ValueError(
                f"The frames before were computed in {self._computed_in}, this one would be in "
                f"{self._precision(model)}: stay inside or outside of `torch.autocast`, or give the session a `dtype`."
            )

    def _check_order(self, frame_idx: int):
        """Refuses to go past a frame whose masks wait for it, where it cannot be gone back to."""
        if frame_idx < 0:
            raise ValueError(f"`frame_idx` must not be negative, got {frame_idx}.")
        waiting = self._waiting(frame_idx)
        if waiting:
            how = "hand that frame over" if self.source is None else "segment that frame"
            raise ValueError(
                f"The masks of frame {waiting[0]} would be lost: {how} before frame {frame_idx} "
                f"(`frame_idx={waiting[0]}`)."
            )

    def _waiting(self, before: int) -> list[int]:
        """Earlier frames whose masks are still to be taken up, where no frame can be gone back to."""
        return [] if self._is_seekable else sorted(at for at in self._inputs if at < before and self._given(at))

    def _forget_passed(self):
        """Tells of masks whose frame a stream has read and could not use, and forgets them."""
        passed = [at for at in self._inputs if at < self.source.first_readable] if self._is_stream else []
        for frame_idx in sorted(passed):
            del self._inputs[frame_idx]
            logger.warning(
                f"The masks of frame {frame_idx} are lost: the stream has passed that frame, which was not segmented. "
                f"Give them for frame {self.source.first_readable} or a later one."
            )

    def _check_joining(self, given: dict[int, torch.Tensor], frame_idx: int):
        """Refuses a new object of which nothing is left; `given` are the masks at network size."""
        followed = () if self._objects is None else self._objects.object_ids
        for obj_id, mask in given.items():
            if obj_id not in followed and not mask.any():
                raise ValueError(
                    f"Nothing is left of the mask of object {obj_id} on frame {frame_idx}: masks that were given "
                    "after it cover it. Give it last, or leave it out (`remove_object`)."
                )

    def _next_frame_idx(self) -> int:
        """The frame after the last one, or the last one again where a stream holds it and masks wait for it."""
        earliest = 0 if self.source is None else self.source.first_readable
        if self._last_frame_idx is None:
            return max(min(self._inputs, default=0), earliest)
        following = max(self._last_frame_idx + 1, earliest)
        return min(self._waiting(following), default=following) if self._is_stream else following

    def _pixel_values(self, model: DeformVosModel, frame: torch.Tensor | None, frame_idx: int) -> torch.Tensor:
        if frame is None:
            if self.source is None:
                raise ValueError("This session has no video: hand each frame over as `frame=pixel_values`.")
            try:
                frame, _ = self.source.read(frame_idx)
            except FrameSource.End as end:
                raise ValueError(str(end)) from end
        if not isinstance(frame, torch.Tensor):
            raise ValueError(
                f"`frame` must be a tensor (3, height, width), got {type(frame).__name__}: pass "
                "`processor(images=frame).pixel_values[0]`."
            )
        pixel_values = frame.unsqueeze(0) if frame.dim() == 3 else frame
        if pixel_values.dim() != 4 or pixel_values.shape[:2] != (1, 3) or not pixel_values.numel():
            raise ValueError(
                f"`frame` must be one frame (3, height, width), got {tuple(frame.shape)}: pass "
                "`processor(images=frame).pixel_values[0]`."
            )
        size = tuple(pixel_values.shape[-2:])
        if self._frame_size not in (None, size):
            raise ValueError(
                f"Frame {frame_idx} is {size[0]}x{size[1]} (height x width) at network resolution, the frames before "
                f"it {self._frame_size[0]}x{self._frame_size[1]}. A session takes frames of one size: start another."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"`frame` must be normalised numbers, got {frame.dtype}: pass "
                "`processor(images=frame).pixel_values[0]`."
            )
        # One pass and no temporary: a sum is finite only if every pixel is.
        if not pixel_values.sum(dtype=torch.float32).isfinite():
            raise ValueError(f"Frame {frame_idx} holds NaN or infinite values.")
        own = execution_device(model)
        asked = self.inference_device or own
        if asked.type != own.type or asked.index not in (None, own.index or 0):
            raise ValueError(f"The session computes on {asked}, the model lies on {own}: move one of them.")
        return pixel_values.to(own, model.dtype, memory_format=torch.channels_last)

    def _autocast(self, model: DeformVosModel):
        """Of the session's own precision; without one, the caller's autocast is left as it is."""
        if self.dtype is None:
            return nullcontext()
        if self.dtype != model.dtype and (self.dtype == torch.float32 or model.dtype.itemsize < 4):
            raise ValueError(
                f"The session asks for {self.dtype}, the model's weights are {model.dtype}: load it in {self.dtype}."
            )
        return torch.autocast(execution_device(model).type, self.dtype, enabled=self.dtype != model.dtype)

    def _precision(self, model: DeformVosModel) -> torch.dtype:
        """What [`step`] computes in."""
        kind = execution_device(model).type
        surrounding = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
        return self.dtype or surrounding

    def _prepare_memory(self, model: DeformVosModel, frame_idx: int, given: dict[int, torch.Tensor]) -> set[int]:
        """Make room for the objects that this frame brings, and return them; the first frame makes the memory."""
        followed = set() if self._objects is None else set(self._objects.object_ids)
        joining = given.keys() - followed
        limit = model.config.max_objects
        if len(followed | joining) > limit and not model.config.object_independent:
            raise ValueError(
                f"This model's attention depends on the objects (`object_independent=False`): it follows at most "
                f"{limit} of them, got {len(followed | joining)}."
            )
        interval = self.memory_interval or model.config.memory_interval
        if interval < 1:
            raise ValueError(f"`config.memory_interval` must be at least 1, got {interval}.")
        if self._memory is None:
            self._memory = MemoryBank(self.long_term_slots or model.config.long_term_slots)
            self._objects = ObjectTable(limit)
            self._origin, self._weights_dtype = frame_idx, model.dtype
            self._computed_in, self._computed_on = self._precision(model), execution_device(model)
        self._model = model
        for obj_id in given:
            self._objects.add(obj_id)
        groups = self._objects.num_groups
        self._rewrite_memory(lambda masks: _add_groups(masks, groups), only_if=lambda masks: len(masks) < groups)
        return joining

    def _rewrite_memory(self, change: Callable, only_if: Callable = lambda masks: True):
        """Give every remembered frame other masks; a frame that is held twice is rewritten once."""
        if self._is_empty:
            return
        rewritten = {
            id(frame): self._model.rewrite(frame, change(frame.masks)) if only_if(frame.masks) else frame
            for frame in self._memory.frames()
        }
        self._memory.long_term = [rewritten[id(frame)] for frame in self._memory.long_term]
        self._memory.previous = rewritten[id(self._memory.previous)]

    def _masks(
        self,
        model: DeformVosModel,
        features: ImageFeatures,
        segmentation: Segmentation | None,
        given: dict[int, torch.Tensor],
        joining: set[int],
    ) -> torch.Tensor:
        """What is remembered of the frame, `(G, 1 + max_objects, 4h-3, 4w-3)`: predictions, overruled by inputs."""
        groups, device = self._objects.num_groups, features.tokens.device
        if segmentation is not None:
            # The memory has never seen the objects that join here: nothing may be predicted for them.
            valid = self._objects.valid(groups, device, without=joining)
            aggregate = model.logits_to_masks if groups == 1 else _aggregate_groups
            masks = aggregate(segmentation.logits, valid)
        else:
            masks = torch.zeros(groups, 1 + self._objects.max_objects, *features.stride4.shape[-2:], device=device)
            masks[:, 0] = 1.0
        if not given:
            return masks
        stacked = torch.stack(list(given.values()))
        shares = pool_to_stride4(stacked[None])[0].to(device)
        masks = masks * (1.0 - shares.sum(0).clamp(max=1.0))
        for share, obj_id in zip(shares, given, strict=True):
            group, slot = self._objects.place(obj_id)
            masks[group, 1 + slot] = share
        masks[:, 0] = (1.0 - masks[:, 1:].sum(1)).clamp_min(0.0)
        return masks

    def _remember(self, model, features, segmentation, masks, frame_idx: int, is_reference: bool):
        if segmentation is None:
            frame = model.remember_reference(features, masks, frame_idx)
        else:
            frame = model.remember(segmentation.projections, masks, frame_idx, is_reference)
        interval = self.memory_interval or model.config.memory_interval
        self._memory.write(frame, to_long_term=(frame_idx - self._origin) % interval == 0)

    def _output(self, segmentation, given, frame_idx: int, output_attentions: bool, output_hidden_states: bool):
        object_ids = self._objects.object_ids
        device = self._memory.previous.masks.device
        pred_masks = torch.full((len(object_ids), 1, *self._frame_size), -GIVEN_LOGIT, device=device)
        if segmentation is not None:
            places = [self._objects.place(obj_id) for obj_id in object_ids]
            groups, slots = (torch.tensor(axis, device=device) for axis in zip(*places, strict=True))
            logits = segmentation.logits.float()
            margins = (logits[groups, 1 + slots] - logits[groups, 0]).unsqueeze(1)
            pred_masks = F.interpolate(margins, size=self._frame_size, mode="bilinear", align_corners=True)
        if given:
            self._overrule(pred_masks, object_ids, given)
        return DeformVosVideoOutput(
            frame_idx=frame_idx,
            object_ids=object_ids,
            pred_masks=pred_masks,
            attentions=segmentation.attentions if segmentation and output_attentions else None,
            sampled_locations=segmentation.locations if segmentation and output_attentions else None,
            hidden_states=segmentation.hidden_states if segmentation and output_hidden_states else None,
        )

    def _overrule(self, pred_masks: torch.Tensor, object_ids: list[int], given: dict[int, torch.Tensor]):
        """Put the given masks into the output, and everything else off the pixels that they claim."""
        claimed = torch.stack(list(given.values())).any(0).to(pred_masks.device)
        for index, obj_id in enumerate(object_ids):
            if obj_id in given:
                pred_masks[index, 0] = (given[obj_id].to(pred_masks.device).float() - 0.5) * 2 * GIVEN_LOGIT
            else:
                pred_masks[index, 0].masked_fill_(claimed, -GIVEN_LOGIT)

    # A whole video

    def frames_to_visit(
        self, model: DeformVosModel, start_frame_idx: int | None, max_frame_num_to_track: int | None, reverse: bool
    ) -> Iterator[int]:
        """
        Positions that a propagation visits, its memory made ready: inputs on frames behind the start are loaded as
        references, those ahead join when they are reached.

        Raises:
            ValueError: see [`DeformVosModel.propagate_in_video_iterator`].
        """
        self._forget_passed()
        self._check_propagation(start_frame_idx, max_frame_num_to_track, reverse)
        frame_idx, visited = self._begin(model, start_frame_idx, reverse), 0
        direction = -1 if reverse else 1
        limit = float("inf") if max_frame_num_to_track is None else max_frame_num_to_track
        end = -1 if reverse else (self.num_frames if self.num_frames is not None else float("inf"))
        while frame_idx != end and visited <= limit:
            # Whoever receives a frame may correct it, remove the last object, or give the next one further on.
            self._take_up_held(model, frame_idx)
            if self._is_empty and not self._given(frame_idx):
                if not any((given - frame_idx) * direction > 0 for given in self._inputs):
                    return
            else:
                try:
                    self.source.read(frame_idx)
                except FrameSource.End:
                    self._check_unreached(frame_idx)
                    return
                yield frame_idx
            frame_idx, visited = frame_idx + direction, visited + 1

    def _begin(self, model: DeformVosModel, start_frame_idx: int | None, reverse: bool) -> int:
        """Make the memory ready for a propagation; returns where it starts."""
        start = self._default_start() if start_frame_idx is None else start_frame_idx
        if self._is_seekable:
            self._restart()
            self._load_references(model, start, reverse)
        return start

    def _default_start(self) -> int:
        """The earliest frame on which anything was marked; of a stream, where it stands."""
        return min(self._marked(), default=0) if self._is_seekable else self._next_frame_idx()

    def _load_references(self, model: DeformVosModel, start_frame_idx: int, reverse: bool):
        """Take up the masks of frames behind the start."""
        passed = [i for i in self._inputs if (i > start_frame_idx if reverse else i < start_frame_idx)]
        for frame_idx in sorted(passed, reverse=reverse):
            if self._given(frame_idx):
                self.step(model, frame_idx=frame_idx)

    def _take_up_held(self, model: DeformVosModel, next_idx: int):
        """Segment the frame that a stream holds once more, before it reads on, if masks were given for it since."""
        if self._is_stream and self.source.first_readable < next_idx and self._given(self.source.first_readable):
            self.step(model, frame_idx=self.source.first_readable)

    def _check_unreached(self, end: int):
        """Masks that a stream ended before were in vain: an error where nothing else was followed."""
        last = max(self._inputs, default=-1)
        if last >= end:
            message = f"The video ended before frame {last}, which a mask was given for; frames count from 0."
            if self._is_empty:
                raise ValueError(message)
            logger.warning(message)

    def count_frames(
        self, start_frame_idx: int | None, max_frame_num_to_track: int | None, reverse: bool
    ) -> int | None:
        """How many frames [`frames_to_visit`] visits at most; `None` where only the end of the stream will tell."""
        if self.num_frames is None:
            return None
        start = self._default_start() if start_frame_idx is None else start_frame_idx
        ahead = start + 1 if reverse else self.num_frames - start
        return ahead if max_frame_num_to_track is None else min(ahead, max_frame_num_to_track + 1)

    def _check_propagation(self, start_frame_idx, max_frame_num_to_track, reverse):
        if self.source is None:
            raise ValueError("This session has no video to propagate through: pass `video` to `init_video_session`.")
        if not self._marked() and self._is_empty:
            raise ValueError("No mask has been given: call `processor.add_inputs_to_inference_session` first.")
        if reverse and not self.source.is_seekable:
            raise ValueError(
                "`reverse=True` needs a video that can be read backwards; this one is a stream, such as a camera. "
                "Give the frames as a list or array."
            )
        if max_frame_num_to_track is not None and max_frame_num_to_track < 0:
            raise ValueError(f"`max_frame_num_to_track` must not be negative, got {max_frame_num_to_track}.")
        if start_frame_idx is None:
            return
        if self.num_frames is not None and not 0 <= start_frame_idx < self.num_frames:
            raise ValueError(f"`start_frame_idx` must be 0 to {self.num_frames - 1}, got {start_frame_idx}.")
        if not self.source.is_seekable and min(self._inputs, default=start_frame_idx) < start_frame_idx:
            raise ValueError(
                f"The masks of the frames {sorted(self._inputs)} would be lost: this video is a stream, whose frames "
                f"before `start_frame_idx` {start_frame_idx} cannot be read again. Start at {min(self._inputs)}."
            )
        if not self.source.is_seekable and start_frame_idx not in self._inputs and self._last_frame_idx is None:
            raise ValueError(
                f"No object is known at frame {start_frame_idx} of this stream: masks are on frames "
                f"{sorted(self._inputs)}, and a stream starts at one of them."
            )
        if self.source.is_seekable:
            marked = self._marked()
            behind = marked[-1] >= start_frame_idx if reverse else marked[0] <= start_frame_idx
            if not behind:
                raise ValueError(
                    f"No object is known at frame {start_frame_idx} in this direction: masks are on frames {marked}."
                )


def _at_size(given: dict[int, torch.Tensor], size: tuple[int, int]) -> dict[int, torch.Tensor]:
    """
    The given masks at network size, without overlaps: a pixel goes to the object that was given last, or to one that
    is so small that no pixel is nearest to it.
    """
    if not given:
        return {}
    resized = {obj_id: resize_nearest(mask, size) for obj_id, mask in given.items()}
    small = {obj_id for obj_id, mask in given.items() if mask.any() and not resized[obj_id].any()}
    taken = torch.zeros(size, dtype=torch.bool)
    by_precedence = list(reversed(given))
    by_precedence.sort(key=lambda obj_id: obj_id not in small)
    for obj_id in by_precedence:
        mask = _pixels_around(given[obj_id], size) if obj_id in small else resized[obj_id]
        resized[obj_id] = mask & ~taken
        taken = taken | mask
    return resized


def _pixels_around(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The pixels at another size in which those of the mask lie."""
    around = torch.zeros(size, dtype=torch.bool)
    rows, columns = (
        (indices * target + target // 2) // source
        for indices, source, target in zip(mask.nonzero(as_tuple=True), mask.shape, size, strict=True)
    )
    around[rows, columns] = True
    return around


def resize_nearest(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(height, width)` bool to another size, pixel centres on pixel centres."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0] > 0.5


def _take_out(masks: torch.Tensor, group: int, slot: int) -> torch.Tensor:
    """The masks with one object's share given to the background of its group."""
    masks = masks.clone()
    masks[group, 0] += masks[group, 1 + slot]
    masks[group, 1 + slot] = 0.0
    return masks


def _aggregate_groups(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Probabilities of slots against all objects of all groups, and of the background of each group, which is what its
    own objects leave. With one group this is the softmax over its channels.
    """
    margins = (logits[:, 1:] - logits[:, :1]).float().masked_fill(~valid[:, 1:, None, None], MASKED_LOGIT)
    scores = torch.cat([torch.zeros_like(margins[:1, :1]), margins.flatten(0, 1).unsqueeze(0)], dim=1)
    slots = scores.softmax(dim=1)[:, 1:].unflatten(1, margins.shape[:2])[0]
    return torch.cat([1.0 - slots.sum(1, keepdim=True), slots], dim=1)


def _add_groups(masks: torch.Tensor, num_groups: int) -> torch.Tensor:
    """The masks with groups of nothing but background added, `(G', 1 + max_objects, H, W)`."""
    empty = torch.zeros_like(masks[:1])
    empty[:, 0] = 1.0
    return torch.cat([masks, empty.expand(num_groups - len(masks), -1, -1, -1)])


def as_index(value, name: str) -> int:
    """
    A whole number of any type.

    Raises:
        ValueError: if it is none.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"`{name}` must be a whole number, got {value!r}.") from error


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype to compute in, by name or as it is."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and named not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"`dtype` must be float32, bfloat16 or float16, got {dtype!r}; leave it out to compute in the model's."
        )
    return named


def _as_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"`inference_device` must be a device such as cpu or cuda:0, got {device!r}.") from error


def execution_device(model: torch.nn.Module) -> torch.device:
    """Where a model computes: its weights' device, or that of the first hook that fetches offloaded ones."""
    if model.device.type != "meta":
        return model.device
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    hooks += [inner for hook in hooks for inner in getattr(hook, "hooks", ())]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    return next((torch.device(device) for device in devices if device is not None), model.device)


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as an array; NumPy has no bfloat16."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def as_bool_mask(mask, name: str) -> torch.Tensor:
    """
    One object's mask as `(height, width)` bool.

    Raises:
        ValueError: if it is not two-dimensional, holds NaN, or ids of several objects.
    """
    array = as_numpy(mask) if isinstance(mask, torch.Tensor) else np.asarray(mask)
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2:
        raise ValueError(f"{name} must be (height, width), got {tuple(array.shape)}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values.")
    marked = array[array != 0] if array.dtype.kind in "iu" else array[:0]
    if marked.size and marked.min() != marked.max():
        raise ValueError(
            f"{name} holds several values ({marked.min()} and {marked.max()}), which may be ids: give an id map with "
            "two dimensions, or a mask of 0 and 1 for each object (`ids == 1`, `gray > 127`)."
        )
    return torch.from_numpy(array > 0.5 if array.dtype.kind == "f" else array != 0)


__all__ = ["DeformVosInferenceSession"]
