"""What a run reads: training clips of every kind of source, and the sequences that it is scored on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..data.clips import ClipSampler
from ..data.davis import HELD_OUT_SEQUENCES, davis_sequences, load_davis
from ..data.static import load_static_sets
from ..data.store import FrameStore
from .config import TrainingConfig
from .heldout import HeldOutEvaluation


@dataclass
class TrainingData:
    """
    Opened data.

    Args:
        videos (`list[FrameStore]`): Labelled videos.
        statics (`list[FrameStore]`): Labelled still images.
        pseudo (`list[FrameStore]`): Plain videos with a teacher's masks.
    """

    videos: list[FrameStore] = field(default_factory=list)
    statics: list[FrameStore] = field(default_factory=list)
    pseudo: list[FrameStore] = field(default_factory=list)

    def sampler(self, seed: int) -> ClipSampler:
        """Draws clips from all of it."""
        return ClipSampler([*self.videos, *self.pseudo], self.statics, seed)


def split_mask_rule(source: str) -> tuple[str, bool | None]:
    """Splits `NAME:merge` or `NAME:ids` into the name and whether all mask values are one object."""
    for suffix, merge in ((":merge", True), (":ids", False)):
        if source.endswith(suffix):
            return source[: -len(suffix)], merge
    return source, None


def open_data(config: TrainingConfig, label: Callable[[str], FrameStore] | None = None) -> TrainingData:
    """
    Opens a run's training data, decoding them at first use. Held-out sequences are left out, but where
    `train_on_held_out` is set.

    Args:
        config ([`TrainingConfig`]): Names the sources.
        label (`Callable[[str], FrameStore]`, *optional*): Makes masks for a folder of plain videos.

    Raises:
        ValueError: If there is no source, or something is wrong with one.
    """
    shared = {"cache_dir": config.cache_dir, "on_error": config.on_data_error}
    data = TrainingData()
    for source in config.davis_dirs:
        root, merge = split_mask_rule(source)
        exclude = config.excluded_sequences
        data.videos.append(load_davis(root, config.video_short_side, merge, exclude=exclude, **shared))
    if config.youtube_vos_dirs:
        from ..data import load_youtube_vos

        data.videos += [
            load_youtube_vos(root, config.video_short_side, exclude=config.excluded_sequences, **shared)
            for root in config.youtube_vos_dirs
        ]
    if config.dataset_names:
        # Here, so that `datasets` is needed only by those who train on them.
        from ..data import load_hub_dataset

        for source in config.dataset_names:
            name, merge = split_mask_rule(source)
            options = {
                "split": config.dataset_split,
                "streaming": config.dataset_streaming,
                "merge": merge,
                "exclude": config.excluded_sequences,
                "max_sequences": config.dataset_max_sequences,
            }
            data.videos.append(load_hub_dataset(name, config.video_short_side, **options, **shared))
    for root in config.static_dirs:
        data.statics += load_static_sets(root, config.static_short_side, config.merged_sets, **shared)
    if config.video_dirs:
        if label is None:
            raise ValueError("`video_dirs` needs `teacher`: somebody has to make masks for plain videos.")
        data.pseudo = [label(folder) for folder in config.video_dirs]
    if not (data.videos or data.statics or data.pseudo):
        raise ValueError(
            "There is nothing to train on: give `davis_dirs`, `youtube_vos_dirs`, `dataset_names`, `static_dirs` or "
            "`video_dirs`."
        )
    return data


def open_evaluation(config: TrainingConfig, data: TrainingData) -> HeldOutEvaluation | None:
    """
    What a run is scored on, where that is asked for: held-out sequences, or else its plain videos.

    Raises:
        ValueError: If there is neither.
    """
    if not config.eval_steps:
        return None
    folder = config.eval_dir or next(iter(config.davis_dirs), None)
    if folder is None:
        if data.pseudo:
            return HeldOutEvaluation(data.pseudo, mixed_precision=config.mixed_precision)
        raise ValueError(
            "`eval_steps` needs `eval_dir` or `davis_dirs`, a DAVIS-layout folder with held-out sequences."
        )
    root, merge = split_mask_rule(folder)
    names = [name for name in davis_sequences(root) if name in HELD_OUT_SEQUENCES]
    if not names:
        held_out = ", ".join(HELD_OUT_SEQUENCES)
        raise ValueError(
            f"{root} has none of the held-out sequences {held_out}: name a DAVIS-layout folder that has some "
            "of them as `eval_dir`, or set `eval_steps` to 0."
        )
    shared = {"cache_dir": config.cache_dir, "on_error": config.on_data_error}
    store = load_davis(root, config.video_short_side, merge, sequences=names, exclude=(), **shared)
    return HeldOutEvaluation([store], mixed_precision=config.mixed_precision)
