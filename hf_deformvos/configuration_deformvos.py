"""Configuration of DeformVOS: teacher and student are two configurations of one model class."""

import copy
import os
import shutil
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

BACKBONES = ("mobilenet_v2", "dinov2")
SHORT_TERM_FORMS = ("query", "grid")
# What config.json may hold, or transformers pass, besides what the class knows.
_EXTRAS = {"attn_implementation", "auto_map", "experts_implementation", "name_or_path", "torch_dtype"}


class InstalledPipelines(dict):
    """
    A checkpoint's `custom_pipelines` where their code is installed: it lists their tasks, from which `pipeline` infers
    the one to run, and contains none of them, so that `pipeline` takes its class from the registry and asks nobody to
    trust the copy beside the weights.
    """

    def __contains__(self, task) -> bool:
        return False


def copy_code_with(holder, save_directory: str | os.PathLike):
    """
    Put this code beside a configuration that names it, where transformers does not: for a checkpoint that came with
    its code and was loaded with the installed package.

    Args:
        holder: the configuration or processor that is saved.
        save_directory (`str` or `os.PathLike`): the folder.
    """
    if not getattr(holder, "auto_map", None) or holder._auto_class is not None:
        return
    os.makedirs(save_directory, exist_ok=True)
    for source in Path(__file__).parent.glob("*_deformvos.py"):
        target = Path(save_directory) / source.name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)


@strict
class DeformVosConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DeformVosModel`]. The defaults are the student's: MobileNetV2, one propagation layer.

    Lengths called *tokens* are units of the stride-16 feature map (16 pixels of the network's input).

    Args:
        backbone (`str`, defaults to `"mobilenet_v2"`):
            Image encoder: `"mobilenet_v2"`, or `"dinov2"` (a ViT, with MobileNetV2 as its detail stem).
        backbone_config (`dict`, *optional*):
            Arguments of `transformers.Dinov2Config` when `backbone="dinov2"`; `out_indices` names the blocks whose
            outputs are read.
        backbone_tail (`bool`, defaults to `True`):
            Whether MobileNetV2's stride-32 blocks are run, upsampled and added to the tokens.
        hidden_size (`int`, defaults to 128):
            Channels of the visual branch I and of the identification branch M.
        key_size (`int`, defaults to 64):
            Channels of the shared query/key projection.
        value_size (`int`, defaults to 128):
            Channels of the values of each branch.
        num_hidden_layers (`int`, defaults to 1):
            Gated deformable propagation layers.
        long_term_stride (`int`, defaults to 2):
            Spacing, in tokens, of the reference points at which long-term memory is sampled.
        self_stride (`int`, defaults to 2):
            The same for self-propagation.
        short_term_form (`str`, defaults to `"query"`):
            `"query"`: every query samples its own points of the previous frame. `"grid"`: all queries share a grid.
        short_term_stride (`int`, defaults to 1):
            Spacing of the reference points when `short_term_form="grid"`.
        short_term_window (`int`, defaults to 7):
            Side of the square of points around each query when `short_term_form="query"`; odd.
        correlation_radius (`int`, defaults to 3):
            Half side, in tokens, of the correlation window from which the per-query offsets are predicted.
        offset_hidden_size (`int`, defaults to 64):
            Channels of the offset networks.
        max_offset (`float`, defaults to 2.0):
            Bound, in tokens, of each sampled point's own offset.
        max_displacement (`float`, defaults to 6.0):
            Bound, in tokens, of the displacement shared by the points of one query (`short_term_form="query"`).
        use_offsets (`bool`, defaults to `True`):
            `False` samples at the reference points: plain attention on those points, for measuring what offsets bring.
        object_independent (`bool`, defaults to `True`):
            Whether the visual branch takes nothing from the identification branch, so that every attention map is
            the same for all objects and groups of objects share it.
        max_objects (`int`, defaults to 10):
            Objects that one pass holds. Further ones form further groups.
        decoder_sizes (`list[int]`, defaults to `[96, 56, 48]`):
            Decoder channels at strides 16, 8 and 4.
        long_term_slots (`int`, defaults to 3):
            Frames that the long-term memory bank holds at most, reference frames included.
        memory_interval (`int`, defaults to 8):
            Every that many frames the frame just segmented enters the long-term bank.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the normalisations.

    Example:

    ```python
    >>> from hf_deformvos import DeformVosConfig, DeformVosModel

    >>> model = DeformVosModel(DeformVosConfig())
    >>> model.config.max_objects
    10
    ```
    """

    model_type = "deformvos"
    # Set by the installed package, which registers the pipeline; not so where this file came with the weights.
    has_installed_pipeline: ClassVar[bool] = False

    backbone: str = "mobilenet_v2"
    backbone_config: dict | None = None
    backbone_tail: bool = True
    hidden_size: int = 128
    key_size: int = 64
    value_size: int = 128
    num_hidden_layers: int = 1
    long_term_stride: int = 2
    self_stride: int = 2
    short_term_form: str = "query"
    short_term_stride: int = 1
    short_term_window: int = 7
    correlation_radius: int = 3
    offset_hidden_size: int = 64
    max_offset: float | int = 2.0
    max_displacement: float | int = 6.0
    use_offsets: bool = True
    object_independent: bool = True
    max_objects: int = 10
    decoder_sizes: list[int] | tuple[int, ...] = (96, 56, 48)
    long_term_slots: int = 3
    memory_interval: int = 8
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        unknown = [
            name for name in kwargs if not (name in _EXTRAS or name.startswith("_") or hasattr(type(self), name))
        ]
        if unknown:
            logger.warning(
                f"A DeformVOS configuration has no {', '.join(unknown)}: a misspelt field keeps its default."
            )
        super().__post_init__(**kwargs)

    @property
    def custom_pipelines(self) -> dict:
        """
        Pipelines whose code lies beside the weights, by task, as config.json has them.

        A copy: `transformers.pipeline` writes classes into what it gets here, which no config.json can hold.
        """
        entries = copy.deepcopy(self.__dict__.get("custom_pipelines", {}))
        return InstalledPipelines(entries) if self.has_installed_pipeline else entries

    @custom_pipelines.setter
    def custom_pipelines(self, entries: dict):
        self.__dict__["custom_pipelines"] = dict(entries)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; values that replace those of the file are checked as these are."""
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).validate()
        return loaded

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers; where the file names code, that is beside it."""
        copy_code_with(self, save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def validate_architecture(self):
        """Check the rules that bind fields to each other, and the ranges of single ones."""
        _require_choice("backbone", self.backbone, BACKBONES)
        _require_choice("short_term_form", self.short_term_form, SHORT_TERM_FORMS)
        positive = (
            "hidden_size key_size value_size num_hidden_layers long_term_stride self_stride short_term_stride "
            "offset_hidden_size max_objects long_term_slots memory_interval"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("max_offset", "max_displacement", "layer_norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.short_term_window < 1 or self.short_term_window % 2 == 0:
            raise ValueError(f"`short_term_window` must be odd and at least 1, got {self.short_term_window}.")
        if self.correlation_radius < 0:
            raise ValueError(f"`correlation_radius` must not be negative, got {self.correlation_radius}.")
        sizes = self.decoder_sizes
        if len(sizes) != 3 or min(sizes) < 8 or any(size % 8 for size in sizes):
            raise ValueError(f"`decoder_sizes` must be three multiples of 8, one a stride, got {sizes}.")
        if self.backbone != "dinov2" and self.backbone_config is not None:
            raise ValueError(f'`backbone_config` belongs to `backbone="dinov2"`, got backbone "{self.backbone}".')


def _require_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


__all__ = ["DeformVosConfig"]
