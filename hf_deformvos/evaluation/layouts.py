"""The folders that benchmarks come in (DAVIS, YouTube-VOS, plain folders), read as sequences of frames and objects."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..data.folders import (
    DATASET_SUFFIXES,
    check_masks_have_frames,
    image_files,
    masks_by_frame,
    read_split,
    resolution_folder,
    subfolder_names,
)
from ..data.store import VOID
from ..data.youtube_vos import YOUTUBE_VOS_PARTS, read_youtube_vos_meta
from ..image_processing_deformvos import to_rgb


logger = logging.get_logger(__name__)

DATASETS = ("davis2016", "davis2017", "youtubevos2018", "youtubevos2019", "folder")
YOUTUBE_VOS_SHORT_SIDE = 624
"""1.3 × 480: some videos of YouTube-VOS are larger, and methods are compared on frames of at most this short side."""
# What Pillow raises for files that are cut or broken.
_DAMAGE = (OSError, EOFError, Image.DecompressionBombError)
_YOUTUBE_VOS_FOLDERS = {"val": "valid"}


@dataclass(frozen=True)
class TrackedObject:
    """
    One object of a sequence.

    Attributes:
        object_id (`int`): Its pixel value in the annotations.
        first_frame (`str`): The frame whose annotation is given to the model.
        scored_frames (`tuple[str, ...]`): Frames that the benchmark compares; empty without ground truth.
        category (`str`, *optional*): Its class, where the data set has classes.
    """

    object_id: int
    first_frame: str
    scored_frames: tuple[str, ...] = ()
    category: str | None = None


@dataclass(frozen=True)
class EvaluationSequence:
    """
    One video of a benchmark: paths and names only, so that it is cheap to send to another process.

    Attributes:
        name (`str`): Folder name.
        images (`tuple[Path, ...]`):
            Frames in order of time; a frame is named by its file's stem. Of a streamed set these name no files.
        annotations (`dict[str, Path]`): Annotation file of each annotated frame.
        objects (`tuple[TrackedObject, ...]`): In order of their ids.
        output_frames (`tuple[str, ...]`): Frames whose masks a result consists of.
        binary (`bool`): Whether every value above 0 is the one object. Otherwise values are ids, and 255 is void.
        max_short_side (`int`, *optional*): Frames with a larger short side are scaled down to it for the model.
    """

    name: str
    images: tuple[Path, ...]
    annotations: dict[str, Path]
    objects: tuple[TrackedObject, ...]
    output_frames: tuple[str, ...]
    binary: bool = False
    max_short_side: int | None = None

    @property
    def object_ids(self) -> list[int]:
        """The ids of its objects."""
        return [item.object_id for item in self.objects]

    @property
    def scored_frames(self) -> list[str]:
        """Every frame that is scored for some object, in order of time."""
        wanted = {frame for item in self.objects for frame in item.scored_frames}
        return [path.stem for path in self.images if path.stem in wanted]

    def read_ids(self, path: str | os.PathLike) -> np.ndarray:
        """Reads a mask file of this sequence as ids, `uint8` of shape `(height, width)`; 255 is void unless binary."""
        ids = read_ids(path, merge_channels=self.binary)
        return (ids > 0).astype(np.uint8) if self.binary else ids

    def given_mask(self, frame: str) -> np.ndarray | None:
        """The ids of the objects that are given to the model in `frame`, everything else 0; `None` where none is."""
        given = [item.object_id for item in self.objects if item.first_frame == frame]
        if not given:
            return None
        ids = self.read_ids(self.annotations[frame])
        return np.where(np.isin(ids, given), ids, 0).astype(np.uint8)


@dataclass(frozen=True)
class EvaluationDataset:
    """
    A benchmark on disk.

    Attributes:
        name (`str`): One of `DATASETS`.
        root (`str`): As given by the user.
        split (`str`): As given by the user, or what stands for it; `"all"` for all of a `folder`.
        sequences (`tuple[EvaluationSequence, ...]`): What is evaluated, in the benchmark's order.
        seen_categories (`frozenset[str]`, *optional*): Classes of the training set, for YouTube-VOS.
    """

    name: str
    root: str
    split: str
    sequences: tuple[EvaluationSequence, ...]
    seen_categories: frozenset[str] | None = None

    @property
    def has_ground_truth(self) -> bool:
        """Whether there is anything to score: test splits come with first masks alone."""
        return any(sequence.scored_frames for sequence in self.sequences)


def read_ids(path: str | os.PathLike, merge_channels: bool = False) -> np.ndarray:
    """
    Reads a mask file.

    Args:
        path (`str` or `os.PathLike`): A palette, grey or 1-bit image; with `merge_channels` also a colour image.
        merge_channels (`bool`, *optional*, defaults to `False`): Whether any channel above 0 makes a pixel 1.

    Returns:
        `np.ndarray` of shape `(height, width)`, `uint8`.

    Raises:
        ValueError: If the file is no image, is a colour image, or holds ids above 255.
    """
    try:
        with Image.open(path) as image:
            return image_ids(image, str(path), merge_channels)
    except (Image.UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} must be an image file with a mask, got something else ({error}).") from error
    except _DAMAGE as error:
        raise _unreadable(path, error) from error


def image_ids(image: Image.Image, label: str, merge_channels: bool = False) -> np.ndarray:
    """The ids of an opened mask, see [`read_ids`]; `label` names it in errors."""
    # An alpha channel of 255 everywhere is not an object.
    pixels = np.array(image.convert("RGB") if image.mode in ("RGBA", "LA") else image)
    if pixels.ndim == 3:
        if not merge_channels:
            raise ValueError(f"{label} must be a palette or grey image whose values are ids, got mode {image.mode}.")
        pixels = pixels.max(axis=-1)
    if pixels.dtype != np.uint8 and pixels.max(initial=0) > 255:
        raise ValueError(f"{label} must hold ids from 0 to 255, got {pixels.max()}.")
    return pixels.astype(np.uint8)


def read_picture(path: str | os.PathLike) -> Image.Image:
    """
    Reads a frame as RGB.

    Raises:
        ValueError: If it is no image, or damaged.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (*_DAMAGE, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read ({error}); copy it again.")


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of an image file, from its header alone."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} must be an image file, got something else.") from error


def load_dataset_layout(
    name: str,
    root: str | os.PathLike,
    split: str | None = None,
    sequences: Iterable[str] | None = None,
    max_frames: int | None = None,
    all_frames: bool = False,
) -> EvaluationDataset:
    """
    Finds the sequences, frames and objects of a benchmark. Nothing is decoded but the annotations that tell which
    objects there are.

    Layouts below `root`:

    - `davis2016`, `davis2017`: `JPEGImages/480p/<sequence>`, `Annotations/480p/<sequence>` and
      `ImageSets/<2016|2017>/<split>.txt` (or `ImageSets/<split>.txt`). Objects are those of the first frame; the first
      and the last frame are not scored.
    - `youtubevos2018`, `youtubevos2019`: `<valid|train|test>/JPEGImages/<video>`, `.../Annotations/<video>`,
      `.../meta.json`, and optionally `<valid|...>_all_frames/JPEGImages/<video>`; or one of those folders itself.
      Objects appear at any frame and are scored, where every annotation exists, on the frames that `meta.json` lists
      after their first.
    - `folder`: `JPEGImages/<sequence>` and `Annotations/<sequence>`. Annotated frames are scored except for the first
      and the last; ids that first occur in a later annotation are objects that appear there. A split is a list of
      sequences in `ImageSets`, as DAVIS has them.

    Args:
        name (`str`): One of `DATASETS`.
        root (`str` or `os.PathLike`): Folder of the data set.
        split (`str`, *optional*): Which part of it; by default `"val"`, of a `folder` all of it.
        sequences (iterable of `str`, *optional*): Only these.
        max_frames (`int`, *optional*): Only so many frames of each sequence, as if it ended there.
        all_frames (`bool`, *optional*, defaults to `False`):
            YouTube-VOS: stream the frames between the annotated ones as well, from the `_all_frames` folder.

    Returns:
        [`EvaluationDataset`]

    Raises:
        ValueError: If the name is unknown, files of the layout are missing, or a sequence or the split does not exist.
    """
    if name not in DATASETS:
        raise ValueError(f"`dataset` must be one of {', '.join(DATASETS)}, got {name!r}.")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"`max_frames` must be at least 1, got {max_frames}.")
    if all_frames and not name.startswith("youtubevos"):
        raise ValueError(f"`all_frames` belongs to YouTube-VOS, whose frames are sampled; got dataset {name!r}.")
    base = Path(root)
    if not base.is_dir():
        raise ValueError(f"`root` must be the folder of the data set, got {str(root)!r}, which does not exist.")
    chosen = list(dict.fromkeys(sequences)) if sequences is not None else None
    part = split if split is not None else "all" if name == "folder" else "val"
    seen = None
    if name.startswith("youtubevos"):
        folder, part = _youtube_vos_part(base, split)
        found = _youtube_vos_sequences(folder, chosen, max_frames, all_frames)
        seen = YOUTUBE_VOS_SEEN_CATEGORIES
    elif name == "folder":
        found = _folder_sequences(base, split, chosen, max_frames)
    else:
        found = _davis_sequences(base, name, part, chosen, max_frames)
    found = tuple(found)
    if not found:
        raise ValueError(f"{root} holds no sequence of split {part!r}.")
    return EvaluationDataset(name, str(root), part, found, seen)


def guess_dataset(root: str | os.PathLike) -> str:
    """
    The name of the layout that a folder has. DAVIS folders that list both years count as 2017; a YouTube-VOS folder
    counts as 2019, whose rules are those of 2018.

    Raises:
        ValueError: If it has none.
    """
    base = Path(root)
    if any((base / part / "meta.json").is_file() for part in ("", "valid", "train", "test")):
        return "youtubevos2019"
    if not (base / "Annotations").is_dir():
        raise ValueError(f"`root` must be the folder of a data set, got {str(root)!r}, which has no Annotations/.")
    sets = base / "ImageSets"
    if (sets / "2017").is_dir():
        return "davis2017"
    if (sets / "2016").is_dir() or (sets / "480p").is_dir():
        return "davis2016"
    return "davis2017" if (base / "Annotations" / "480p").is_dir() else "folder"


def _davis_sequences(root: Path, name: str, split: str, chosen: list[str] | None, max_frames: int | None):
    """Sequences of a DAVIS folder: the first frame is given and names the objects."""
    images, masks = _subfolder(root, "JPEGImages"), _subfolder(root, "Annotations")
    binary = name == "davis2016"
    listed = _davis_split(root, name.removeprefix("davis"), split)
    if listed is None:
        listed = subfolder_names(masks)
        if chosen is None:
            logger.warning(f"{root} lists no sequences in ImageSets: all {len(listed)} with annotations are taken.")
    for sequence in _choose(chosen, listed, f"{root}, split {split!r}"):
        frames = _frames(images / sequence, max_frames, masks / sequence)
        annotations = _annotations(masks / sequence, frames)
        first = frames[0].stem
        if first not in annotations:
            raise ValueError(
                f"Sequence {sequence!r} must have the mask of its first frame, {masks / sequence}/{first}.png."
            )
        missing = [path.stem for path in frames if path.stem not in annotations]
        # Test splits come with first masks alone; a gap in a sequence that has more is a broken copy.
        if missing and len(annotations) > 1:
            raise ValueError(
                f"Sequence {sequence!r} must have a mask for every frame or for the first alone: {masks / sequence} "
                f"lacks {len(missing)} of {len(frames)}, the first being {missing[0]}.png."
            )
        scored = tuple(path.stem for path in frames[1:-1]) if not missing else ()
        objects = tuple(TrackedObject(object_id, first, scored) for object_id in _objects(annotations[first], binary))
        if not objects:
            raise ValueError(
                f"Sequence {sequence!r} must show its objects in the first frame, got an empty {first}.png."
            )
        output_frames = tuple(path.stem for path in frames)
        yield EvaluationSequence(sequence, frames, annotations, objects, output_frames, binary=binary)


def _folder_sequences(root: Path, split: str | None, chosen: list[str] | None, max_frames: int | None):
    """Sequences of a plain folder, all or those of a split: whatever is annotated is scored."""
    images, masks = _subfolder(root, "JPEGImages"), _subfolder(root, "Annotations")
    listed = subfolder_names(masks) if split is None else _folder_split(root, split)
    where = str(root) if split is None else f"{root}, split {split!r}"
    for sequence in _choose(chosen, listed, where):
        frames = _frames(images / sequence, max_frames, masks / sequence)
        annotations = _annotations(masks / sequence, frames)
        if not annotations:
            raise ValueError(
                f"Sequence {sequence!r} must have a mask named like a frame in {masks / sequence}; none is."
            )
        annotated = [path.stem for path in frames if path.stem in annotations]
        first_frames: dict[int, str] = {}
        binary = _is_binary(annotations[frame] for frame in annotated)
        for frame in annotated:
            for object_id in _objects(annotations[frame], binary):
                first_frames.setdefault(object_id, frame)
        if not first_frames:
            raise ValueError(f"Sequence {sequence!r} must show an object in one of its masks; all are empty.")
        objects = tuple(
            TrackedObject(object_id, first, tuple(annotated[annotated.index(first) + 1 : -1]))
            for object_id, first in sorted(first_frames.items())
        )
        output_frames = tuple(path.stem for path in frames)
        yield EvaluationSequence(sequence, frames, annotations, objects, output_frames, binary=binary)


def _youtube_vos_part(root: Path, split: str | None) -> tuple[Path, str]:
    """Where the videos of a split are, and what it is called: a root is the whole data set, or a part of it."""
    if not (root / "meta.json").is_file():
        split = "val" if split is None else split
        return root / _YOUTUBE_VOS_FOLDERS.get(split, split), split
    names = {part: part for part in YOUTUBE_VOS_PARTS}
    names |= {folder: name for name, folder in _YOUTUBE_VOS_FOLDERS.items()}
    chosen, own = names.get(split, split), names.get(Path(os.path.abspath(root)).name)
    if None not in (chosen, own) and chosen != own:
        raise ValueError(
            f"`split` chooses a part of YouTube-VOS, got {split!r}, and {root} is a part itself (it has a meta.json); "
            "leave the split out, or give the folder above."
        )
    return root, own or chosen or "val"


def _youtube_vos_sequences(base: Path, chosen: list[str] | None, max_frames: int | None, all_frames: bool):
    """Videos of a part of YouTube-VOS: its `meta.json` tells which frames and objects there are."""
    videos = read_youtube_vos_meta(base / "meta.json")
    images = base / "JPEGImages"
    if all_frames:
        whole = Path(os.path.abspath(base))  # a folder given as "." has no name; one that is a link has its own
        images = whole.with_name(f"{whole.name}_all_frames") / "JPEGImages"
        if not images.is_dir():
            raise ValueError(
                f"`all_frames` needs {images}, which does not exist; leave the option out or add the folder."
            )
    for video in _choose(chosen, list(videos), str(base / "meta.json")):
        objects_meta = videos[video]["objects"]
        sampled = sorted({frame for item in objects_meta.values() for frame in item["frames"]})
        available = _frames(images / video)
        wanted = set(sampled)
        frames = tuple(
            path
            for path in available
            if path.stem in wanted or (all_frames and sampled[0] <= path.stem <= sampled[-1])
        )[:max_frames]
        lost = wanted - {path.stem for path in available}
        if lost:
            raise ValueError(
                f"Video {video!r} must have every frame of meta.json: {images / video} lacks {min(lost)}."
            )
        kept = {path.stem for path in frames}
        sampled = tuple(frame for frame in sampled if frame in kept)
        annotations = _annotations(base / "Annotations" / video, frames)
        objects = _youtube_vos_objects(video, objects_meta, annotations, sampled)
        yield EvaluationSequence(video, frames, annotations, objects, sampled, max_short_side=YOUTUBE_VOS_SHORT_SIDE)


def _youtube_vos_objects(
    video: str, objects_meta: dict, annotations: dict[str, Path], sampled: tuple[str, ...]
) -> tuple[TrackedObject, ...]:
    """Objects of a video, each from the first of its frames whose annotation shows it."""
    # The validation set has the annotations of first frames only, and these show the new object alone.
    missing = [frame for frame in sampled if frame not in annotations]
    firsts = {min(item["frames"]) for item in objects_meta.values() if item["frames"]}
    if missing and annotations.keys() - firsts:
        raise ValueError(
            f"Video {video!r} must have a mask for every frame of meta.json or for objects' first ones alone: it "
            f"lacks {len(missing)}, the first being {missing[0]}.png."
        )
    shown: dict[str, set[int]] = {}
    objects = []
    for key, item in sorted(objects_meta.items(), key=lambda pair: int(pair[0])):
        listed = [frame for frame in sorted(item["frames"]) if frame in set(sampled)]
        first = None
        for frame in listed:
            if frame in annotations:
                if frame not in shown:
                    shown[frame] = set(object_ids_of(read_ids(annotations[frame])))
                if int(key) in shown[frame]:
                    first = frame
                    break
        if first is None:
            if listed:
                logger.warning(f"Video {video}: no annotation shows object {key}; it is left out.")
            continue
        scored = () if missing else tuple(frame for frame in listed if frame > first)
        objects.append(TrackedObject(int(key), first, scored, item.get("category")))
    return tuple(objects)


def _subfolder(root: Path, part: str) -> Path:
    """`root/part`, or the resolution folder in it."""
    folder = root / part
    if not folder.is_dir():
        raise ValueError(f"The data set needs a folder {part}/ in {root}; check --root and --dataset.")
    return resolution_folder(folder)


def _davis_split(root: Path, year: str, split: str) -> list[str] | None:
    """Sequence names of a split file, `None` where the data set has no such file."""
    sets = root / "ImageSets"
    listed = read_split(root, int(year), split)
    if listed is not None:
        return listed
    if any(sets.glob("**/*.txt")):
        known = ", ".join(sorted(str(path.relative_to(sets)) for path in sets.glob("**/*.txt")))
        raise ValueError(f"`split` must have a file {sets / year / split}.txt, got {split!r}; there is {known}.")
    return None


def _folder_split(root: Path, split: str) -> list[str]:
    """Sequence names of a split file, which a plain folder may have as DAVIS has, for whichever year."""
    for year in (2017, 2016):
        listed = read_split(root, year, split)
        if listed is not None:
            return listed
    raise ValueError(
        f"`split` must have a file {root / 'ImageSets' / split}.txt, got {split!r}; leave it out to take every "
        "sequence."
    )


def _choose(chosen: list[str] | None, known: list[str], where: str) -> list[str]:
    """The sequences to take, in the order of the data set."""
    if chosen is None:
        return known
    unknown = [name for name in chosen if name not in set(known)]
    if unknown:
        some = ", ".join(known[:8]) + (" ..." if len(known) > 8 else "")
        raise ValueError(f"`sequences` must be of {where} ({some}), got {', '.join(unknown)}.")
    return [name for name in known if name in set(chosen)]


def _frames(folder: Path, max_frames: int | None = None, masks: Path | None = None) -> tuple[Path, ...]:
    """Image files of a sequence in order of time; `masks` is a folder each of whose masks must belong to one."""
    if not folder.is_dir():
        raise ValueError(f"The data set needs the frames of {folder.name!r} in {folder}, which does not exist.")
    frames = image_files(folder)
    if not frames:
        raise ValueError(f"{folder} must hold image files ({', '.join(DATASET_SUFFIXES)}); there are none.")
    if masks:
        check_masks_have_frames(folder, frames, _masks_of(masks))
    return tuple(frames[:max_frames])


def _annotations(folder: Path, frames: Iterable[Path]) -> dict[str, Path]:
    """The PNG of each frame that has one."""
    existing = _masks_of(folder)
    return {frame.stem: existing[frame.stem] for frame in frames if frame.stem in existing}


def _masks_of(folder: Path) -> dict[str, Path]:
    """The masks of a sequence's folder by their frames' names."""
    if not folder.is_dir():
        raise ValueError(f"The data set needs the masks of {folder.name!r} in {folder}, which does not exist.")
    return masks_by_frame(folder)


def object_ids_of(ids: np.ndarray) -> list[int]:
    """Ids in a mask without background and void."""
    counts = np.bincount(ids.ravel(), minlength=VOID + 1)
    return [int(value) for value in np.flatnonzero(counts) if value not in (0, VOID)]


def _objects(path: Path, binary: bool) -> list[int]:
    """The objects in a mask file; in a binary one every value above 0 is the one object."""
    ids = read_ids(path, merge_channels=binary)
    return [1] if binary and ids.any() else object_ids_of(ids)


def _is_binary(paths: Iterable[Path]) -> bool:
    """Whether 255 is the object of a sequence: it is the only value beside 0 in the first mask that is not empty."""
    for path in paths:
        ids = read_ids(path, merge_channels=True)
        if ids.any():
            return not object_ids_of(ids)
    return False


YOUTUBE_VOS_SEEN_CATEGORIES = frozenset(
    """
    airplane ape bear bike bird boat bucket bus camel cat cow crocodile deer dog dolphin duck eagle earless_seal
    elephant fish fox frisbee frog giant_panda giraffe hand hat hedgehog horse knife leopard lion lizard monkey
    motorbike mouse others owl paddle parachute parrot penguin person plant rabbit raccoon sedan shark sheep sign
    skateboard snail snake snowboard squirrel surfboard tennis_racket tiger toilet train truck turtle umbrella whale
    zebra
    """.split()
)
"""The 65 classes of the training set; every other class of the validation set counts as unseen."""


def limit_short_side(image: Image.Image, short_side: int | None) -> Image.Image:
    """Scales an image down, keeping its proportions, until its short side is at most `short_side` pixels."""
    if short_side is None or min(image.size) <= short_side:
        return image
    scale = short_side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


__all__ = [
    "DATASETS",
    "VOID",
    "YOUTUBE_VOS_SEEN_CATEGORIES",
    "YOUTUBE_VOS_SHORT_SIDE",
    "EvaluationDataset",
    "EvaluationSequence",
    "TrackedObject",
    "guess_dataset",
    "image_ids",
    "image_size",
    "limit_short_side",
    "load_dataset_layout",
    "object_ids_of",
    "read_ids",
]
