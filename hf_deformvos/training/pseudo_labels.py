"""Self-supervision: a teacher labels a folder of plain videos, from a first-frame mask or from its own proposals."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.image_utils import SizeDict
from transformers.utils import logging

from ..data.store import FrameStore, default_cache_dir
from ..image_processing_deformvos import network_size
from ..inference import size_option
from ..modeling_deformvos import DeformVosModel
from ..processing_deformvos import DeformVosProcessor
from ..video import IMAGE_SUFFIXES, VideoReader, natural_key, read_mask
from .proposals import MAX_AREA, MAX_TOKENS, MIN_AREA, Proposal, propose_masks


logger = logging.get_logger(__name__)

# Raised when what the same videos give changes.
_FORMAT = 1
# FFmpeg takes a text file for a video of its letters.
_NOT_VIDEO_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".yaml", ".yml", ".xml", ".html", ".srt", ".vtt")
_PROPOSAL_FRAMES = 5
# A proposal shown to the teacher as the mask of its own frame comes back with the edges of the picture: on the first
# frames of DAVIS-2016's training sequences the mean IoU rises from 0.64 to 0.81 (scripts/measure_proposals.py).
_SETTLING_ROUNDS = 5
# The share of a video's frames in which an object must be seen; below it, the teacher has lost it.
_MIN_VISIBLE = 0.25
# What a broken video or mask raises; a full disk is not the video's fault.
_VIDEO_ERRORS = (ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class PlainVideo:
    """A video to label: its name, the file or folder of frames, and the mask of its first frame, if there is one."""

    name: str
    path: Path
    mask: Path | None


@dataclass(frozen=True)
class LabelSettings:
    """What decides the labels beside videos and teacher; see [`label_videos`]."""

    short_side: int = 480
    max_frames: int | None = None
    max_proposals: int = 1

    def __post_init__(self):
        for name, least in (("short_side", 16), ("max_frames", 2), ("max_proposals", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


@dataclass(frozen=True)
class LabelledFrame:
    """A frame for [`FrameStore.build`], its pseudo-mask beside it."""

    sequence: str
    index: int
    image: np.ndarray
    mask: np.ndarray

    @property
    def name(self) -> str:
        """Position in the video, five digits."""
        return f"{self.index:05d}"

    @property
    def label(self) -> str:
        """Video and position."""
        return f"video {self.sequence!r}, frame {self.index}"

    def read_image(self) -> Image.Image:
        """The picture, already at its stored size."""
        return Image.fromarray(self.image)

    def read_mask(self, merge: bool | str) -> np.ndarray:
        """The pseudo-mask; it holds ids, so there is nothing to merge."""
        return self.mask


@dataclass(frozen=True)
class FailedVideo:
    """In place of a video's frames: what [`FrameStore.build`] reports, or refuses."""

    sequence: str
    label: str
    error: str
    name: str = ""

    def read_image(self) -> Image.Image:
        """Raises the video's error."""
        raise ValueError(self.error)

    def read_mask(self, merge: bool | str) -> np.ndarray:
        """Raises the video's error."""
        raise ValueError(self.error)


class DiskClip:
    """
    Frames and masks of one video in two unnamed files, read one at a time: the sequence that a session walks through
    in either direction, in memory that does not depend on the video's length.

    Args:
        folder (`Path`): On the disk that shall hold the files; they vanish when the clip is closed, or the process
            ends.
    """

    def __init__(self, folder: Path):
        self._images = tempfile.TemporaryFile(dir=folder)
        self._masks = tempfile.TemporaryFile(dir=folder)
        self._length = 0
        self.size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Frame `index` as `(height, width, 3)` uint8."""
        return self._read(self._images, index, 3).reshape(*self.size, 3)

    def append(self, image: np.ndarray) -> None:
        """Adds a frame at the end; all have one size."""
        self.size = self.size or image.shape[:2]
        self._images.seek(0, 2)
        self._images.write(image.tobytes())
        self._length += 1

    def write_mask(self, index: int, mask: np.ndarray) -> None:
        """Keeps the `(height, width)` uint8 mask of a frame."""
        self._masks.seek(index * mask.size)
        self._masks.write(mask.tobytes())

    def read_mask(self, index: int) -> np.ndarray:
        """The mask kept for a frame."""
        return self._read(self._masks, index, 1).reshape(self.size)

    def _read(self, file, index: int, channels: int) -> np.ndarray:
        count = self.size[0] * self.size[1] * channels
        file.seek(index * count)
        return np.frombuffer(file.read(count), dtype=np.uint8)

    def close(self) -> None:
        """Gives the disk back."""
        self._images.close()
        self._masks.close()

    def __enter__(self) -> DiskClip:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def find_videos(folder: str | Path) -> tuple[list[PlainVideo], list[Path]]:
    """
    Lists the videos of a folder: every sub-folder (of frames) and every file that is no image and no text, in natural
    order, hidden ones left out. The mask of `clip.mp4`, or of the folder `clip`, is `clip.png` or `clip_mask.png`
    beside it.

    Returns:
        `tuple`: The videos, and the images that belong to none.

    Raises:
        ValueError: If the folder does not exist or holds no video, or two videos have one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"A folder of videos is needed, got {str(folder)!r}, which is none.")
    paths = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: natural_key(path.name))
    images = {path.name: path for path in paths if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES}
    others = [path for path in paths if path.name not in images and path.suffix.lower() not in _NOT_VIDEO_SUFFIXES]
    videos: dict[str, PlainVideo] = {}
    for path in others:
        name = path.name if path.is_dir() else path.stem
        if name in videos:
            raise ValueError(
                f"Videos are told apart by their names without suffix: {videos[name].path} and {path} have the same; "
                "rename one."
            )
        mask = images.pop(f"{name}_mask.png", None) or images.pop(f"{name}.png", None)
        videos[name] = PlainVideo(name, path, mask)
    if not videos:
        hint = "; the frames of a video belong into a sub-folder of their own" if images else ""
        raise ValueError(f"{folder} holds no video{hint}.")
    return list(videos.values()), list(images.values())


def label_videos(
    folder: str | Path,
    teacher: DeformVosModel,
    processor: DeformVosProcessor,
    short_side: int = 480,
    max_frames: int | None = None,
    max_proposals: int = 1,
    cache_dir: str | Path | None = None,
    on_error: str = "skip",
    device: torch.device | str | None = None,
    show_progress_bar: bool = True,
    exclude: Sequence[str] = (),
) -> FrameStore:
    """
    Opens a folder of plain videos as a [`FrameStore`], labelled by a teacher at first use.

    A video with a mask of its first frame is followed from there. In a video without, the teacher's own features
    propose objects (see [`propose_objects`]) in the most distinct of a few frames, and they are followed to both ends.
    The objects are followed through every frame in memory that does not depend on the video's length. Frames before
    the first and after the last in which an object is seen are left out: there the teacher knows nothing, or has lost
    it.

    The store stays in the cache until a video, a mask, the teacher or a setting changes.

    Args:
        folder (`str` or `Path`): See [`find_videos`].
        teacher ([`DeformVosModel`]): Makes the masks. Its mode and device are as before when this returns.
        processor ([`DeformVosProcessor`]): The teacher's.
        short_side (`int`): Largest short side of stored frames, in pixels; the teacher sees the stored frames.
        max_frames (`int`, *optional*): How many frames of each video are used, from its beginning; default all.
        max_proposals (`int`): Most objects proposed in a video without a mask.
        cache_dir (`str` or `Path`, *optional*): Where stores live; default [`default_cache_dir`].
        on_error (`str`): `"skip"` reports, by name, and leaves out videos that cannot be read, whose mask is broken,
            empty or of another size, in which nothing can be proposed, or the object is lost; of a damaged video it
            uses the frames that decode. `"raise"` refuses them.
        device (`torch.device` or `str`, *optional*): Where to label; by default where the teacher is.
        show_progress_bar (`bool`): Whether labelling shows a bar, a step a video.
        exclude (sequence of `str`): Names of videos to leave out, without suffix.

    Raises:
        ValueError: If the folder holds no other video, an argument is out of range, no video can be labelled, or one
            cannot and `on_error` is `"raise"`.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f'`on_error` must be "skip" or "raise", got {on_error!r}.')
    settings = LabelSettings(short_side, max_frames, max_proposals)
    found, strays = find_videos(folder)
    videos = [video for video in found if video.name not in exclude]
    if len(videos) < len(found):
        names = ", ".join(video.name for video in found if video.name in exclude)
        message = f"{folder}: {names} are left out: sequences of these names are not to be trained on"
        if not videos:
            raise ValueError(f"{message}, and there are no others; rename what is not one of them.")
        logger.warning(f"{message}; rename what is not one of them.")
    if strays:
        listed = ", ".join(path.name for path in strays[:10]) + (" ..." if len(strays) > 10 else "")
        message = f"{folder}: {len(strays)} images are the mask of no video: {listed}"
        if on_error == "raise":
            raise ValueError(f"{message}; name a mask like its video, or take them away.")
        logger.warning(f"{message}; they are not used.")
    parent = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    parent.mkdir(parents=True, exist_ok=True)
    with _evaluating(teacher, device):
        return FrameStore.build(
            Path(folder).resolve().name,
            _label_all(videos, teacher, processor, settings, parent, show_progress_bar),
            short_side,
            merge=False,
            cache_dir=parent,
            on_error=on_error,
            show_progress_bar=False,
            fingerprint=_fingerprint(videos, teacher, processor, settings),
        )


@contextmanager
def _evaluating(model: DeformVosModel, device: torch.device | str | None):
    """The model in evaluation mode on a device, and back as it was."""
    was_training, home = model.training, model.device
    model.eval().to(device or home)
    try:
        yield
    finally:
        model.train(was_training).to(home)


def _fingerprint(
    videos: list[PlainVideo], teacher: DeformVosModel, processor: DeformVosProcessor, settings: LabelSettings
) -> str:
    """Everything that decides the labels, as text."""
    files = []
    for video in videos:
        frames = sorted(video.path.iterdir()) if video.path.is_dir() else [video.path]
        for path in (*frames, *([video.mask] if video.mask else [])):
            status = path.stat()
            files.append([video.name, str(path.resolve()), status.st_size, status.st_mtime_ns])
    facts = [_FORMAT, asdict(settings), processor.image_processor.to_json_string(), hash_model(teacher), files]
    return json.dumps(facts)


def hash_model(model: torch.nn.Module) -> str:
    """The sha256 of a model's configuration and weights as they are in memory; the device does not matter."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _label_all(
    videos: list[PlainVideo],
    teacher: DeformVosModel,
    processor: DeformVosProcessor,
    settings: LabelSettings,
    scratch: Path,
    show: bool,
) -> Iterator[LabelledFrame | FailedVideo]:
    """Frames of all videos; a video that fails gives one entry that says why."""
    for video in tqdm(videos, desc="labelling", unit="video", disable=not show):
        try:
            yield from _label(video, teacher, processor, settings, scratch)
        except _VIDEO_ERRORS as error:
            yield FailedVideo(video.name, str(video.path), str(error))


def _label(
    video: PlainVideo,
    teacher: DeformVosModel,
    processor: DeformVosProcessor,
    settings: LabelSettings,
    scratch: Path,
) -> Iterator[LabelledFrame | FailedVideo]:
    """Frames of one video; nothing is handed on before the whole video is labelled."""
    with DiskClip(scratch) as clip:
        original_size, damage = _read_frames(video, settings, clip)
        if len(clip) < 2:
            raise ValueError(f"it has {len(clip)} frame; a clip needs two.")
        if video.mask is None:
            start, mask = propose_objects(clip, teacher, processor, settings.max_proposals)
        else:
            start, mask = 0, _given_mask(video.mask, original_size, clip.size)
        visible = follow_objects(clip, start, mask, teacher, processor)
        if visible.sum() < max(2, _MIN_VISIBLE * len(clip)):
            raise ValueError(
                f"its object is lost: the teacher sees it in {visible.sum()} of {len(clip)} frames, from frame "
                f"{start} on; give another mask."
            )
        if damage:
            yield FailedVideo(video.name, str(video.path), damage)
        first, last = np.flatnonzero(visible)[[0, -1]]
        if last - first + 1 < len(clip):
            logger.warning(f"{video.path}: the object is seen in frames {first} to {last}; the others are left out.")
        for index in range(first, last + 1):
            yield LabelledFrame(video.name, index, clip[index], clip.read_mask(index))


def _read_frames(video: PlainVideo, settings: LabelSettings, clip: DiskClip) -> tuple[tuple[int, int], str]:
    """Decodes a video into a clip at its stored size; returns the original size, and what is damaged, if anything."""
    with VideoReader(video.path, max_frames=settings.max_frames) as reader:
        height, width = reader.info.height, reader.info.width
        scale = min(1.0, settings.short_side / min(height, width))
        size = (round(width * scale), round(height * scale))
        for frame in reader:
            image = Image.fromarray(frame.image)
            clip.append(np.asarray(image if size == image.size else image.resize(size, Image.LANCZOS)))
        damage = "it is damaged; the frames that decode are used" if reader.truncated or reader.num_damaged else ""
    return (height, width), damage


def _given_mask(path: Path, original_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The mask of a video's first frame as `(height, width)` uint8 ids at the stored size."""
    ids = read_mask(path)
    if ids.shape != original_size:
        raise ValueError(
            f"mask {path} must have the video's size {original_size[1]}x{original_size[0]}, got "
            f"{ids.shape[1]}x{ids.shape[0]}."
        )
    stored = np.asarray(Image.fromarray(ids.astype(np.uint8)).resize(size[::-1], Image.NEAREST))
    lost = sorted(set(np.unique(ids).tolist()) - set(np.unique(stored).tolist()))
    if lost:
        raise ValueError(f"mask {path}: object {lost[0]} vanishes at {size[1]}x{size[0]}; raise `short_side`.")
    return stored


def follow_objects(
    clip: DiskClip, start: int, mask: np.ndarray, teacher: DeformVosModel, processor: DeformVosProcessor
) -> np.ndarray:
    """
    Writes the mask of every frame of a clip: forwards from `start` to the end, then backwards to the beginning.

    Args:
        clip ([`DiskClip`]): The frames; receives the masks.
        start (`int`): The frame whose mask is given.
        mask (`np.ndarray` of shape `(height, width)`): uint8 ids.
        teacher, processor: See [`label_videos`].

    Returns:
        `np.ndarray` of shape `(num_frames,)`: bool, where any object is seen.
    """
    visible = np.zeros(len(clip), dtype=bool)
    for reverse in (False, True) if start else (False,):
        session = processor.init_video_session(video=clip, short_side=_stored_side(clip[0].shape[:2], processor))
        processor.add_inputs_to_inference_session(session, frame_idx=start, input_masks=mask)
        for output in teacher.propagate_in_video_iterator(session, start_frame_idx=start, reverse=reverse):
            index = output.frame_idx
            # At network resolution the given mask has lost its edges.
            ids = mask if index == start else processor.post_process_id_map(output, clip.size).astype(np.uint8)
            clip.write_mask(index, ids)
            visible[index] = ids.any()
    return visible


def propose_objects(
    clip: DiskClip, teacher: DeformVosModel, processor: DeformVosProcessor, max_proposals: int = 1
) -> tuple[int, np.ndarray]:
    """
    Finds objects in a clip without any mask: some frames, evenly spread, are cut (see [`propose_masks`]), and the one
    whose first cut is the sharpest and makes an object that the teacher recognises is taken.

    Args:
        clip (sequence of `(height, width, 3)` uint8 frames): The video.
        teacher, processor: See [`label_videos`].
        max_proposals (`int`): Most objects.

    Returns:
        `tuple[int, np.ndarray]`: The frame, and its uint8 ids of shape `(height, width)`, numbered from 1.

    Raises:
        ValueError: If no frame shows anything plausible.
    """
    count = min(_PROPOSAL_FRAMES, len(clip))
    candidates = []
    for index in sorted({int((k + 0.5) * len(clip) / count) for k in range(count)}):
        proposals = propose_in_frame(clip[index], teacher, processor, max_proposals)
        if proposals:
            candidates.append((proposals[0].confidence, index, proposals))
    for _, index, proposals in sorted(candidates, key=lambda candidate: -candidate[0]):
        mask = settle_masks(clip[index], [proposal.mask for proposal in proposals], teacher, processor)
        if mask.any():
            return index, mask
    raise ValueError(
        f"it has no mask, and in none of {count} frames do the teacher's features set an object apart; give a mask of "
        "the first frame."
    )


@torch.no_grad()
def propose_in_frame(
    image: np.ndarray, teacher: DeformVosModel, processor: DeformVosProcessor, max_proposals: int = 1
) -> list[Proposal]:
    """
    Proposals of one frame from the teacher's tokens, at most `MAX_TOKENS` of them.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8.
        teacher, processor: See [`label_videos`].
        max_proposals (`int`): Most objects.

    Returns:
        `list[Proposal]`: See [`propose_masks`].
    """
    tokens = teacher.encode_images(proposal_pixels(image, teacher, processor)).tokens
    return propose_masks(tokens[0].float(), image.shape[:2], max_proposals)


def proposal_pixels(image: np.ndarray, teacher: DeformVosModel, processor: DeformVosProcessor) -> torch.Tensor:
    """A `(height, width, 3)` frame as the teacher takes it, `(1, 3, 16k+1, 16m+1)`, of at most `MAX_TOKENS` tokens."""
    size = image.shape[:2]
    short_side = min(size)
    while short_side > 32 and _num_tokens(size, processor, short_side) > MAX_TOKENS:
        short_side -= 8
    pixel_values = processor(images=image, **size_option(processor, short_side)).pixel_values
    return pixel_values.to(teacher.device, teacher.dtype)


def _stored_side(size: tuple[int, int], processor: DeformVosProcessor) -> int:
    """Short side at which the teacher sees a stored frame: its own, within the processor's bound; never enlarged."""
    return min(*size, processor.image_processor.size["shortest_edge"])


def _num_tokens(size: tuple[int, int], processor: DeformVosProcessor, short_side: int) -> int:
    """How many tokens a frame has at a bound of its short side."""
    bounds = SizeDict(**size_option(processor, short_side)["size"])
    height, width = network_size(*size, bounds, processor.image_processor.max_enlargement)
    return (height // 16 + 1) * (width // 16 + 1)


def settle_masks(
    image: np.ndarray, masks: list[np.ndarray], teacher: DeformVosModel, processor: DeformVosProcessor
) -> np.ndarray:
    """
    Draws coarse masks anew: the teacher is given them as the masks of a frame, and asked for the same frame again, a
    few times over. An object that vanishes, or leaves the bounds of a plausible area, is dropped.

    Args:
        image (`np.ndarray` of shape `(height, width, 3)`): uint8.
        masks (list of `np.ndarray` of shape `(height, width)`): bool, one an object.
        teacher, processor: See [`label_videos`].

    Returns:
        `np.ndarray` of shape `(height, width)`: uint8 ids, numbered from 1; all 0 where no object is left.
    """
    ids = np.zeros(image.shape[:2], dtype=np.uint8)
    for number, mask in enumerate(masks, start=1):
        ids[mask] = number
    option = size_option(processor, _stored_side(image.shape[:2], processor))
    frame = processor(images=image, **option).pixel_values[0]
    for _ in range(_SETTLING_ROUNDS):
        session = processor.init_video_session()
        processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids)
        for _ in range(2):
            output = teacher(inference_session=session, frame=frame)
        ids = processor.post_process_id_map(output, image.shape[:2]).astype(np.uint8)
        areas = np.bincount(ids.ravel(), minlength=len(masks) + 1) / ids.size
        plausible = (areas >= MIN_AREA) & (areas <= MAX_AREA)
        plausible[0] = False
        ids = np.where(plausible[ids], (np.cumsum(plausible) * plausible)[ids], 0).astype(np.uint8)
        if not ids.any():
            break
    return ids


__all__ = [
    "DiskClip",
    "LabelSettings",
    "PlainVideo",
    "find_videos",
    "follow_objects",
    "hash_model",
    "label_videos",
    "proposal_pixels",
    "propose_in_frame",
    "propose_objects",
    "settle_masks",
]
