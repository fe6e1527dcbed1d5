"""Student and teacher of a run, and the task that they make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from ..configuration_deformvos import DeformVosConfig
from ..data.store import FrameStore
from ..data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ..modeling_deformvos import DeformVosModel
from .config import TrainingConfig
from .distillation_task import DistillationTask, DistillationWeights
from .task import SegmentationTask


logger = logging.get_logger(__name__)

_BUNDLED = "hub_cards/"


def _load_model(source: str, setting: str) -> DeformVosModel:
    """A saved model in float32; a `ValueError` where it is of another kind."""
    try:
        model = AutoModel.from_pretrained(source, dtype="float32")
    except SafetensorError as error:
        raise ValueError(
            f"`{setting}` {source!r} has weights that cannot be read ({error}): copy or download them again."
        ) from error
    if not isinstance(model, DeformVosModel):
        raise ValueError(f"`{setting}` must be a DeformVOS model, got {source!r}, a {type(model).__name__}.")
    return model


def read_model_config(path: str) -> DeformVosConfig:
    """The configuration of a fresh model."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`student` {path!r} must be a model's configuration in JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`student` {path!r} must map a model's settings to values, got {type(values).__name__}.")
    return DeformVosConfig(**values)


def take_over_weights(student: DeformVosModel, source: str, excepted: Sequence[str] = ()) -> None:
    """Copies every weight of another model whose name, without `excepted` in it, and shape the student shares."""
    given = _load_model(source, "init_from").state_dict()
    own = student.state_dict()
    idle = [part for part in excepted if not any(part in name for name in given)]
    if idle:
        raise ValueError(f"`init_except` must hold parts of the names of {source}'s weights, got {', '.join(idle)}.")
    shared = {
        name: value
        for name, value in given.items()
        if name in own and own[name].shape == value.shape and not any(part in name for part in excepted)
    }
    if not shared:
        raise ValueError(f"`init_from` {source!r} shares no weight with the student's configuration.")
    student.load_state_dict(shared, strict=False)
    logger.info(f"Took over {len(shared)} of {len(own)} weights from {source}.")


def build_student(config: TrainingConfig) -> DeformVosModel:
    """A fresh or saved student in float32, the frozen part of its backbone frozen."""
    if config.student == "none" or config.student.endswith(".json"):
        fresh = config.student == "none"
        student = DeformVosModel(DeformVosConfig() if fresh else read_model_config(config.student))
        if config.init_from:
            take_over_weights(student, config.init_from, config.init_except)
        if config.init_backbone:
            kept = config.init_from and "backbone" not in config.init_except
            if kept and student.config.backbone == "mobilenet_v2":
                raise ValueError(
                    f"`init_backbone` {config.init_backbone!r} would replace the backbone that `init_from` "
                    f"{config.init_from!r} brings; give one of them, or leave that one out by `init_except` backbone."
                )
            student.load_backbone(config.init_backbone)
        student.backbone.freeze_pretrained()
        return student
    for name in ("init_backbone", "init_from"):
        if getattr(config, name):
            raise ValueError(f"`{name}` is for a fresh student; {config.student!r} brings its own weights.")
    student = _load_model(config.student, "student")
    student.backbone.freeze_pretrained()
    return student


class Teacher:
    """
    A trained model that a student learns from.

    Args:
        source (`str`): Model folder or Hub repository.

    Raises:
        ValueError: If there is no model, or its processor normalises frames otherwise than training does.
    """

    def __init__(self, source: str):
        folder = Path(source)
        if source.startswith(_BUNDLED) and not folder.is_dir():
            # Without this, it would be looked for on the Hub.
            raise ValueError(
                f"`teacher` {source!r}, which comes with the repository, is not there: get that folder, with its "
                "config.json, processor_config.json and *.safetensors, or name another teacher with --teacher."
            )
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            raise ValueError(f"`teacher` {source!r} must be a folder with a trained model; it has no *.safetensors.")
        try:
            self.model = _load_model(source, "teacher").eval()
            self.processor = AutoProcessor.from_pretrained(source)
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"`teacher` must be a folder with a trained model and its processor, or a Hub repository that can be "
                f"reached, got {source!r}: {reason}"
            ) from error
        images = self.processor.image_processor
        if (tuple(images.image_mean), tuple(images.image_std)) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(
                f"`teacher` {source!r} must take frames normalised with ImageNet's mean and standard deviation, as "
                f"training clips are, got {images.image_mean} and {images.image_std}."
            )
        # It is never saved, and batch norm is a good part of a forward pass.
        self.model.fold_batch_norm()

    def label(self, folder: str, config: TrainingConfig, device) -> FrameStore:
        """Masks for a folder of plain videos; sequences that no run trains on are left out."""
        from .pseudo_labels import label_videos

        return label_videos(
            folder,
            self.model.to(device),
            self.processor,
            config.video_short_side,
            exclude=config.excluded_sequences,
            max_proposals=config.max_proposals,
            cache_dir=config.cache_dir,
            on_error=config.on_data_error,
            device=device,
        )


def build_teacher(config: TrainingConfig) -> Teacher | None:
    """
    The teacher, if one is named.

    Raises:
        ValueError: If it is not there, or the settings need one and name none.
    """
    if config.teacher is not None:
        return Teacher(config.teacher)
    config.check_teacher(None)
    return None


def build_task(config: TrainingConfig, student: DeformVosModel, teacher: Teacher | None) -> SegmentationTask:
    """The task that the settings describe; refused where clips may hold more objects than a model has slots."""
    for name, model in (("student", student), ("teacher", teacher and teacher.model)):
        if model is not None and model.config.max_objects < config.most_objects:
            raise ValueError(
                f"Clips of up to {config.most_objects} objects (`max_objects`, and `pastes` if any are pasted) need a "
                f"{name} with as many slots, got {model.config.max_objects}; lower `max_objects` or `pastes`."
            )
    shared = {
        "ce_weight": config.ce_weight,
        "jaccard_weight": config.jaccard_weight,
        "memory_interval": config.memory_interval,
        "gradient_frames": config.gradient_frames,
    }
    weights = DistillationWeights.from_config(config)
    asked = config.supervision != "labels" or weights.att or weights.uses_logits or weights.representation
    if teacher is None or not asked:
        if teacher is not None and not config.video_dirs:
            logger.warning("The teacher is not used: supervision is by labels, and all weights of distillation are 0.")
        return SegmentationTask(student, **shared)
    return DistillationTask(student, teacher.model, config.supervision, weights, **shared)
