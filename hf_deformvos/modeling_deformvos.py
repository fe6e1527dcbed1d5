"""DeformVOS: video object segmentation by gated deformable propagation. One class is teacher and student."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple, logging

from .backbone_deformvos import VisionTransformerBackbone, build_backbone
from .configuration_deformvos import DeformVosConfig
from .memory_deformvos import LayerMemory, MemoryBank, MemoryFrame
from .propagation_deformvos import (
    ChannelNorm,
    GatedDeformablePropagationLayer,
    GridDeformableAttention,
    IdentityConvolution,
    LayerProjection,
    QueryDeformableAttention,
    ZeroConvolution,
    repeat_groups,
)


logger = logging.get_logger(__name__)

# Of a logit that must not win a softmax; representable in float16.
MASKED_LOGIT = -1e4


class ImageFeatures(NamedTuple):
    """
    What the encoder makes of a frame; the same for every object.

    Attributes:
        tokens (`torch.Tensor` of shape `(B, hidden_size, h, w)`): stride 16.
        stride8, stride4 (`torch.Tensor` of shapes `(B, C, 2h-1, 2w-1)` and `(B, C, 4h-3, 4w-3)`): for the decoder.
    """

    tokens: torch.Tensor
    stride8: torch.Tensor
    stride4: torch.Tensor


class Segmentation(NamedTuple):
    """
    One frame segmented from memory.

    Attributes:
        logits (`torch.Tensor` of shape `(B * G, 1 + max_objects, 4h-3, 4w-3)`): background and slots at stride 4.
        projections (`tuple[LayerProjection, ...]`): each layer's view of the frame, from which its memory is written.
        attentions, locations (tuples of `dict[str, torch.Tensor]`, an entry a layer): maps and points of
            `"long_term"`, `"short_term"` and `"self"` propagation.
        hidden_states (tuple of pairs of `torch.Tensor`): I and M after each layer.
    """

    logits: torch.Tensor
    projections: tuple[LayerProjection, ...]
    attentions: tuple[dict[str, torch.Tensor], ...]
    locations: tuple[dict[str, torch.Tensor], ...]
    hidden_states: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@dataclass
class DeformVosOutput(ModelOutput):
    """
    Output of [`DeformVosModel`] for a batch of clips. The first frame has its masks given; the others are predicted.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, num_frames - 1, 1 + num_objects, 4h-3, 4w-3)`):
            Scores of background and objects at stride 4, `align_corners=True`; absent objects are masked.
        attentions (`tuple`, an entry a predicted frame, *optional*, returned when `output_attentions=True`):
            An entry a layer: a dict of `"long_term"` and `"self"` maps `(batch_size, n, keys)` and the
            `"short_term"` map `(batch_size, n, n)`, rows queries.
        sampled_locations (`tuple`, *optional*, returned when `output_attentions=True`):
            The same nesting: points (y, x) in tokens, `(batch_size, points, 2)` where queries share them and
            `(batch_size, n, points, 2)` where each has its own.
        hidden_states (`tuple`, *optional*, returned when `output_hidden_states=True`):
            An entry a predicted frame: an entry a layer: the pair (I, M).
    """

    logits: torch.FloatTensor | None = None
    attentions: tuple | None = None
    sampled_locations: tuple | None = None
    hidden_states: tuple | None = None


@dataclass
class DeformVosVideoOutput(ModelOutput):
    """
    Output of [`DeformVosModel`] for one frame of an inference session.

    Args:
        frame_idx (`int`): position of the frame in the video.
        object_ids (`list[int]`): the caller's ids, in the order of `pred_masks`.
        pred_masks (`torch.FloatTensor` of shape `(num_objects, 1, height, width)`):
            Logit of each object minus logit of the background, at the network's input resolution.
        attentions, sampled_locations, hidden_states (`tuple`, *optional*):
            As in [`DeformVosOutput`], an entry a layer.
    """

    frame_idx: int | None = None
    object_ids: list[int] | None = None
    pred_masks: torch.FloatTensor | None = None
    attentions: tuple | None = None
    sampled_locations: tuple | None = None
    hidden_states: tuple | None = None


class IdentityBank(nn.Module):
    """Masks of background and objects at stride 4 to an embedding a token, `(B * G, hidden_size, h, w)` (AOT)."""

    def __init__(self, config: DeformVosConfig):
        super().__init__()
        self.embed = nn.Conv2d(1 + config.max_objects, config.hidden_size, 7, 4, 3)
        self.norm = ChannelNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embed(masks))


class DecoderBlock(GradientCheckpointingLayer):
    """Convolution, group norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, eps: float, kernel: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(8, out_channels, eps=eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(hidden)), inplace=True)


class MaskDecoder(nn.Module):
    """Feature pyramid over [I | M] from stride 16 to logits at stride 4."""

    def __init__(self, config: DeformVosConfig, stride4_channels: int, stride8_channels: int):
        super().__init__()
        coarse, middle, fine = config.decoder_sizes
        self.stride16 = DecoderBlock(2 * config.hidden_size, coarse, config.layer_norm_eps, kernel=1)
        self.lateral8 = nn.Conv2d(stride8_channels, coarse, 1)
        self.stride8 = DecoderBlock(coarse, middle, config.layer_norm_eps)
        self.lateral4 = nn.Conv2d(stride4_channels, middle, 1)
        self.stride4 = DecoderBlock(middle, fine, config.layer_norm_eps)
        self.classifier = nn.Conv2d(fine, 1 + config.max_objects, 1)

    def forward(self, visual: torch.Tensor, identification: torch.Tensor, features: ImageFeatures) -> torch.Tensor:
        """I `(B, C, h, w)` and M `(B * G, C, h, w)` to logits `(B * G, 1 + max_objects, 4h-3, 4w-3)`."""
        num_groups = identification.shape[0] // visual.shape[0]
        hidden = self.stride16(torch.cat([repeat_groups(visual, num_groups), identification], dim=1))
        hidden = self.stride8(_upsample_onto(hidden, self.lateral8(features.stride8), num_groups))
        hidden = self.stride4(_upsample_onto(hidden, self.lateral4(features.stride4), num_groups))
        return self.classifier(hidden)


def _upsample_onto(hidden: torch.Tensor, lateral: torch.Tensor, num_groups: int) -> torch.Tensor:
    lateral = repeat_groups(lateral, num_groups)
    return lateral + F.interpolate(hidden, size=lateral.shape[-2:], mode="bilinear", align_corners=True)


class TokenProjection(nn.Module):
    """Backbone features to tokens; a stride-32 map is brought exactly onto the stride-16 grid, and all are added."""

    def __init__(self, config: DeformVosConfig, channels: tuple[int, ...]):
        super().__init__()
        coarse = iter(channels)
        self.stride16 = nn.Conv2d(next(coarse), config.hidden_size, 1)
        self.stride32 = nn.Conv2d(next(coarse), config.hidden_size, 1) if config.backbone_tail else None
        # Zero at first: a teacher that takes over a student's weights starts as that student.
        self.vit = ZeroConvolution(next(coarse), config.hidden_size, 1) if config.backbone == "dinov2" else None

    def forward(self, stride16: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        coarse = iter(others)
        tokens = self.stride16(stride16)
        if self.stride32 is not None:
            tokens = tokens + self._onto_grid(self.stride32(next(coarse)), tokens.shape[-2:])
        return tokens if self.vit is None else tokens + self.vit(next(coarse))

    @staticmethod
    def _onto_grid(coarse: torch.Tensor, sides: torch.Size) -> torch.Tensor:
        # Token j of stride 16 lies at j / 2 here: 2n - 1 exact positions, and one repeated at the end of an even side.
        size = [2 * side - 1 for side in coarse.shape[-2:]]
        coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
        for axis, side in zip((-2, -1), sides, strict=True):
            if torch.compiler.is_exporting() or coarse.shape[axis] < side:
                # The same for odd and even sides, so that an exported graph takes both.
                index = torch.arange(side, device=coarse.device).clamp_max(coarse.shape[axis] - 1)
                coarse = coarse.index_select(axis, index)
        return coarse


class DeformVosPreTrainedModel(PreTrainedModel):
    """Weights' initialisation and what the library needs to know of the architecture."""

    config_class = DeformVosConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["GatedDeformablePropagationLayer", "MobileNetV2Backbone", "VisionTransformerBackbone"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, ZeroConvolution):
            init.zeros_(module.weight)
        elif isinstance(module, IdentityConvolution):
            init.dirac_(module.weight, groups=module.groups)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
            init.ones_(module.weight)
        elif isinstance(module, QueryDeformableAttention):
            init.zeros_(module.point_bias)
        elif isinstance(module, GridDeformableAttention) and module.distance_decay is not None:
            init.constant_(module.distance_decay, -2.0)
        if isinstance(module, nn.BatchNorm2d):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            init.zeros_(module.bias)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func=checkpoint, **kwargs):
        # Reentrant checkpoints do not see tensors inside of lists, as which layers take their memory.
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
            raise ValueError('Gradient checkpointing needs `{"use_reentrant": False}` here, or no arguments at all.')
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class DeformVosModel(DeformVosPreTrainedModel):
    """
    Video object segmentation: masks of some objects in one frame of a video, propagated to its other frames.

    The model has two entrances that share one memory read: a differentiable pass over a batch of clips
    (`model(pixel_values, id_masks, num_objects)`) and a streaming step of an inference session
    (`model(inference_session=session, frame=pixel_values)`).
    """

    def __init__(self, config: DeformVosConfig):
        super().__init__(config)
        self.backbone = build_backbone(config)
        stride4, stride8, *token_channels = self.backbone.channels
        self.token_projection = TokenProjection(config, tuple(token_channels))
        self.identity_bank = IdentityBank(config)
        self.layers = nn.ModuleList(
            GatedDeformablePropagationLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.visual_norm = ChannelNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.id_norm = ChannelNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = MaskDecoder(config, stride4, stride8)
        self.post_init()

    def load_backbone(self, path: str):
        """
        Initialise the backbone from pretrained weights.

        Args:
            path (`str`): for MobileNetV2 a safetensors file with torchvision's `features.N...` names (a classifier or
                blocks beyond the tail are left out); for a ViT the folder or Hub repository of a DINOv2 model, such
                as `facebook/dinov2-small` (blocks beyond `config.backbone_config` are left out).

        Raises:
            ValueError: if weights that the backbone has are missing there, naming them.
        """
        if isinstance(self.backbone, VisionTransformerBackbone):
            return self.backbone.load_vit(path)
        available = load_file(path)
        wanted = self.backbone.state_dict()
        missing = [
            name
            for name, tensor in wanted.items()
            if not name.endswith("num_batches_tracked")
            and (name not in available or available[name].shape != tensor.shape)
        ]
        if missing:
            raise ValueError(
                f"{path} does not fit a {self.config.backbone} backbone: {len(missing)} weights are missing or of "
                f"another shape, among them {', '.join(missing[:3])}."
            )
        self.backbone.load_state_dict({name: available.get(name, tensor) for name, tensor in wanted.items()})

    def fold_batch_norm(self) -> "DeformVosModel":
        """
        Fold the backbone's frozen batch norms into its convolutions, in place, for faster inference.

        The parameters no longer have the checkpoint's names: a folded model is not saved.
        """
        self.backbone.fold_batch_norm()
        return self

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; refused after [`~DeformVosModel.fold_batch_norm`]."""
        if self.backbone.is_folded:
            raise ValueError(
                "This model's batch norms are folded: save it before `fold_batch_norm`, or load it again."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def save_release(self, save_directory):
        """
        Save for distribution: weights in half precision on disk, computed in float32 wherever they are loaded.

        Args:
            save_directory (`str` or `os.PathLike`): the folder to write `config.json` and `model.safetensors` to.
        """
        released = copy.deepcopy(self).half()
        released.save_pretrained(save_directory)
        # A checkpoint is loaded in the dtype that its configuration names.
        released.config.dtype = torch.float32
        released.config.save_pretrained(save_directory)

    def encode_images(self, pixel_values: torch.Tensor) -> ImageFeatures:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, 16k+1, 16m+1)`): normalised frames.

        Raises:
            ValueError: if a side is not of the form 16k+1, or there are not three channels.
        """
        channels, *sides = pixel_values.shape[-3:]
        if pixel_values.dim() != 4 or channels != 3 or any(side % 16 != 1 for side in sides):
            raise ValueError(
                "`pixel_values` must be (batch, 3, height, width) with sides of the form 16k+1, which the processor "
                f"makes; got {tuple(pixel_values.shape)}."
            )
        stride4, stride8, *coarse = self.backbone(pixel_values.contiguous(memory_format=torch.channels_last))
        return ImageFeatures(self.token_projection(*coarse), stride8, stride4)

    def segment(self, features: ImageFeatures, memory: MemoryBank) -> Segmentation:
        """Read the memory, propagate through all layers and decode. The one path of training and of inference."""
        visual, identification = features.tokens, None
        projections, attentions, locations, hidden_states = [], [], [], []
        for index, layer in enumerate(self.layers):
            projection = layer.project(visual, identification)
            visual, identification, maps, points = layer(
                visual,
                identification,
                projection,
                [frame.layers[index].key for frame in memory.long_term],
                [frame.layers[index].values for frame in memory.long_term],
                memory.previous.layers[index].key,
                memory.previous.layers[index].values,
            )
            projections.append(projection)
            attentions.append(maps)
            locations.append(points)
            hidden_states.append((visual, identification))
        logits = self.decoder(self.visual_norm(visual), self.id_norm(identification), features)
        return Segmentation(logits, tuple(projections), tuple(attentions), tuple(locations), tuple(hidden_states))

    def remember(
        self, projections: tuple[LayerProjection, ...], masks: torch.Tensor, frame_idx: int, is_reference: bool = False
    ) -> MemoryFrame:
        """Write the memory of a segmented frame, its masks `(B * G, 1 + max_objects, 4h-3, 4w-3)` now known."""
        embedding = self.identity_bank(masks.to(projections[0].key.dtype))
        layers = tuple(
            LayerMemory(
                projection.key,
                layer.remember(projection.value, projection.identification, embedding),
                projection.identification,
            )
            for layer, projection in zip(self.layers, projections, strict=True)
        )
        return MemoryFrame(frame_idx, layers, masks, is_reference)

    def remember_reference(self, features: ImageFeatures, masks: torch.Tensor, frame_idx: int) -> MemoryFrame:
        """Write the memory of a frame that is known only by its given masks: each layer reads the frame itself."""
        embedding = self.identity_bank(masks.to(features.tokens.dtype))
        visual, identification = features.tokens, None
        written = []
        for index, layer in enumerate(self.layers):
            projection = layer.project(visual, identification)
            key, values = projection.key, layer.remember(projection.value, projection.identification, embedding)
            written.append(LayerMemory(key, values, projection.identification))
            if index + 1 < len(self.layers):
                visual, identification, _, _ = layer(visual, identification, projection, [key], [values], key, values)
        return MemoryFrame(frame_idx, tuple(written), masks, is_reference=True)

    @torch.no_grad()
    def rewrite(self, frame: MemoryFrame, masks: torch.Tensor) -> MemoryFrame:
        """
        The same remembered frame of one video with other masks, as when an object is removed or a group is added.

        Deeper layers keep the identification input that the frame was segmented with; that of an added group is zero.
        The frame keeps its dtype, which autocast may have made lower than the weights'.
        """
        dtype = frame.layers[0].values.dtype
        layers = []
        with torch.autocast(masks.device.type, enabled=False):
            embedding = self.identity_bank(masks.to(self.dtype))
            for layer, memory in zip(self.layers, frame.layers, strict=True):
                visual = memory.values[:, : self.config.value_size].to(self.dtype)
                identification = memory.identification
                if identification is not None:
                    identification = _fit_groups(identification, len(masks))
                known = None if identification is None else identification.to(self.dtype)
                values = layer.remember(visual, known, embedding)
                layers.append(LayerMemory(memory.key, values.to(dtype), identification))
        return MemoryFrame(frame.frame_idx, tuple(layers), masks, frame.is_reference)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        id_masks: torch.LongTensor | None = None,
        num_objects: int | torch.LongTensor | None = None,
        object_valid: torch.BoolTensor | None = None,
        object_slots: torch.LongTensor | None = None,
        teacher_forcing: torch.BoolTensor | float = 0.0,
        memory_interval: int | None = None,
        gradient_frames: int | None = None,
        inference_session=None,
        frame: torch.FloatTensor | None = None,
        frame_idx: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> DeformVosOutput | DeformVosVideoOutput:
        r"""
        Segment a batch of clips (training), or one frame of a session (inference, without gradients).

        There is no loss here: those of `hf_deformvos.training` take the logits, and a subclass of
        `transformers.Trainer` needs a `compute_loss` of its own.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_frames, 3, height, width)`):
                Normalised frames; sides of the form 16k+1.
            id_masks (`torch.LongTensor` of shape `(batch_size, 1 or num_frames, height, width)`):
                0 is background, 1 to `num_objects` are objects; other values are void to the loss, and background to
                the memory. Frames beyond the first are needed only where they are teacher-forced.
            num_objects (`int` or `torch.LongTensor` of shape `(batch_size,)`):
                The most objects that a clip of the batch holds, or how many each clip has.
            object_valid (`torch.BoolTensor` of shape `(batch_size, num_objects)`, *optional*):
                Which objects exist in each clip; by default all, or as many as `num_objects` says.
            object_slots (`torch.LongTensor` of shape `(batch_size, num_objects)`, *optional*):
                Slot of the identity bank that each object takes, 0 to `max_objects - 1`; in order by default.
            teacher_forcing (`float` or `torch.BoolTensor` of shape `(batch_size, num_frames)`):
                Which frames enter memory with the given masks rather than with the model's own (detached) ones; a
                number is the probability of that.
            memory_interval (`int`, *optional*): overrides `config.memory_interval`.
            gradient_frames (`int`, *optional*):
                How many predicted frames, the last ones, are computed with gradients; all by default. Those before are
                rolled without: a long clip shows how the model drifts on its own masks, and costs little more than a
                short one. The first frame, whose masks are given, keeps its gradients.
            inference_session ([`DeformVosInferenceSession`], *optional*): the session to advance by one frame.
            frame (`torch.FloatTensor` of shape `(3, height, width)`, *optional*):
                The next frame of a streaming session.
            frame_idx (`int`, *optional*): position of the frame; by default the one after the last.
            output_attentions, output_hidden_states (`bool`, *optional*):
                See [`DeformVosOutput`]; by default what the configuration says.

        Raises:
            ValueError: if shapes or values do not fit, or neither clips nor a session are given.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if inference_session is not None:
            return inference_session.step(self, frame, frame_idx, output_attentions, output_hidden_states)
        if pixel_values is None or id_masks is None or num_objects is None:
            raise ValueError(
                "`forward` needs `pixel_values`, `id_masks` and `num_objects` for a batch of clips, or "
                "`inference_session` for a video."
            )
        if isinstance(num_objects, torch.Tensor):
            counts, num_objects = num_objects.reshape(-1, 1), int(num_objects.max())
            if object_valid is None:
                object_valid = torch.arange(num_objects, device=counts.device) < counts
        self._check_clip(pixel_values, id_masks, num_objects)
        slots = self._slots(object_slots, pixel_values.shape[0], num_objects, pixel_values.device)
        valid = self._valid(object_valid, slots)
        for name, value in (("gradient_frames", gradient_frames), ("memory_interval", memory_interval)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._check_forced(teacher_forcing, id_masks, pixel_values)
        frames = self._roll(
            pixel_values,
            id_masks,
            slots,
            valid,
            teacher_forcing,
            memory_interval or self.config.memory_interval,
            gradient_frames or pixel_values.shape[1],
        )
        wanted = torch.cat([slots.new_zeros(len(slots), 1), slots + 1], dim=1)
        logits = torch.stack([_pick_channels(segmentation.logits, wanted) for segmentation in frames], dim=1)
        present = _pick_channels(valid, wanted)[:, None, :, None, None]
        return DeformVosOutput(
            logits=logits.masked_fill(~present, MASKED_LOGIT),
            attentions=tuple(s.attentions for s in frames) if output_attentions else None,
            sampled_locations=tuple(s.locations for s in frames) if output_attentions else None,
            hidden_states=tuple(s.hidden_states for s in frames) if output_hidden_states else None,
        )

    def propagate_in_video_iterator(
        self,
        inference_session,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[DeformVosVideoOutput]:
        """
        Segment a session's video frame by frame.

        Args:
            inference_session ([`DeformVosInferenceSession`]): a session that was opened with `video`.
            start_frame_idx (`int`, *optional*): by default the earliest frame with a mask; of a stream, where it
                stands.
            max_frame_num_to_track (`int`, *optional*): how many frames to go beyond the first.
            reverse (`bool`, defaults to `False`): towards the beginning; the video must be seekable.
            show_progress_bar (`bool`, defaults to `False`).

        Raises:
            ValueError: if there is no video or no mask, `reverse` is asked of a stream, or `start_frame_idx` lies
                outside the video or before the first mask.
        """
        frames = inference_session.frames_to_visit(self, start_frame_idx, max_frame_num_to_track, reverse)
        total = inference_session.count_frames(start_frame_idx, max_frame_num_to_track, reverse)
        for frame_idx in tqdm(frames, desc="segment", unit="frame", total=total, disable=not show_progress_bar):
            yield self(inference_session=inference_session, frame_idx=frame_idx)

    def _roll(
        self, pixel_values, id_masks, slots, valid, teacher_forcing, memory_interval, gradient_frames
    ) -> list[Segmentation]:
        """Segment frames 1 to T-1 of every clip, each from the memory of those before it."""
        batch_size, num_frames = pixel_values.shape[:2]
        forced = self._forced_frames(teacher_forcing, batch_size, num_frames, pixel_values.device)
        first_learned = max(1, num_frames - gradient_frames)
        per_frame = self._encode_clip(pixel_values, first_learned)
        given = [self.masks_to_slots(frame_masks, slots) for frame_masks in id_masks.unbind(1)]
        memory = MemoryBank(self.config.long_term_slots)
        memory.write(self.remember_reference(per_frame[0], given[0], 0), to_long_term=True)
        segmentations = []
        for index in range(1, num_frames):
            with nullcontext() if index >= first_learned else _without_gradients():
                segmentation = self.segment(per_frame[index], memory)
                segmentations.append(segmentation)
                if index == num_frames - 1:
                    break
                masks = self.logits_to_masks(segmentation.logits.detach(), valid)
                if index < len(given):
                    masks = torch.where(forced[:, index, None, None, None], given[index].to(masks.dtype), masks)
                frame = self.remember(segmentation.projections, masks, index)
            memory.write(frame, to_long_term=index % memory_interval == 0)
        return segmentations

    def _encode_clip(self, pixel_values: torch.Tensor, first_learned: int) -> list[ImageFeatures]:
        """Features of every frame of the clips; those of frames 1 to `first_learned - 1` without gradients."""
        batch_size, num_frames = pixel_values.shape[:2]
        rolled = range(1, first_learned)
        learned = [index for index in range(num_frames) if index not in rolled]
        per_frame = [None] * num_frames
        for indices, context in ((learned, nullcontext()), (list(rolled), _without_gradients())):
            if not indices:
                continue
            with context:
                encoded = self.encode_images(pixel_values[:, indices].flatten(0, 1))
            maps = (m.unflatten(0, (batch_size, len(indices))).unbind(1) for m in encoded)
            for index, *features in zip(indices, *maps, strict=True):
                per_frame[index] = ImageFeatures(*features)
        return per_frame

    def masks_to_slots(self, id_masks: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """
        Masks to what the identity bank takes.

        Args:
            id_masks (`torch.LongTensor` of shape `(B, height, width)`): 1 to N are objects, all else is background.
            slots (`torch.LongTensor` of shape `(B, N)`): the objects' slots.

        Returns:
            `torch.FloatTensor` of shape `(B, 1 + max_objects, 4h-3, 4w-3)`: shares of background and slots in the
            5x5 pixels around each point of stride 4.
        """
        num_objects = slots.shape[1]
        known = id_masks.masked_fill((id_masks < 0) | (id_masks > num_objects), 0)
        one_hot = torch.arange(num_objects + 1, device=id_masks.device)[None, :, None, None] == known[:, None]
        shares = pool_to_stride4(one_hot)
        masks = shares.new_zeros(shares.shape[0], 1 + self.config.max_objects, *shares.shape[-2:])
        index = torch.cat([slots.new_zeros(len(slots), 1), slots + 1], dim=1)
        return masks.scatter(1, index[:, :, None, None].expand_as(shares), shares)

    @staticmethod
    def logits_to_masks(logits: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """
        Probabilities of background and slots.

        Args:
            logits (`torch.Tensor` of shape `(B * G, 1 + max_objects, H, W)`): what the decoder returns.
            valid (`torch.BoolTensor` of shape `(B * G, 1 + max_objects)`): the channels in use.

        Returns:
            `torch.FloatTensor` of the shape of `logits`, float32.
        """
        return torch.softmax(logits.float().masked_fill(~valid[:, :, None, None], MASKED_LOGIT), dim=1)

    @staticmethod
    def _check_clip(pixel_values: torch.Tensor, id_masks: torch.Tensor, num_objects: int):
        if pixel_values.dim() != 5 or pixel_values.shape[1] < 2:
            raise ValueError(
                f"`pixel_values` must be (batch, frames >= 2, 3, height, width), got {tuple(pixel_values.shape)}."
            )
        fits = id_masks.dim() == 4 and id_masks.shape[0] == pixel_values.shape[0]
        if not fits or id_masks.shape[-2:] != pixel_values.shape[-2:] or id_masks.shape[1] > pixel_values.shape[1]:
            raise ValueError(
                f"`id_masks` must be (batch, frames, height, width) for `pixel_values` {tuple(pixel_values.shape)}, "
                f"got {tuple(id_masks.shape)}."
            )
        if num_objects < 1:
            raise ValueError(f"`num_objects` must be at least 1, got {num_objects}.")

    @staticmethod
    def _check_forced(teacher_forcing, id_masks: torch.Tensor, pixel_values: torch.Tensor):
        num_given, num_frames = id_masks.shape[1], pixel_values.shape[1]
        if isinstance(teacher_forcing, torch.Tensor):
            shape = (len(pixel_values), num_frames)
            if teacher_forcing.shape != shape:
                raise ValueError(f"`teacher_forcing` must be {shape}, got {tuple(teacher_forcing.shape)}.")
            # Only where it costs nothing: reading values back would make a GPU wait.
            if teacher_forcing.device.type == "cpu" and bool(teacher_forcing[:, num_given:].any()):
                raise ValueError(
                    f"`teacher_forcing` asks for frames that `id_masks` lacks: it holds the first {num_given} of "
                    f"{num_frames}."
                )
        elif teacher_forcing > 0 and num_given < num_frames:
            raise ValueError(
                f"`teacher_forcing` {teacher_forcing} needs the masks of all {num_frames} frames, got "
                f"`id_masks` of {num_given}; without them, leave it at 0."
            )

    def _slots(self, object_slots, batch_size: int, num_objects: int, device: torch.device) -> torch.Tensor:
        limit = self.config.max_objects
        if num_objects > limit:
            raise ValueError(
                f"A clip holds at most `config.max_objects` = {limit} objects, got {num_objects}; an inference "
                "session takes more, in groups."
            )
        if object_slots is None:
            return torch.arange(num_objects, device=device).expand(batch_size, -1)
        if object_slots.shape != (batch_size, num_objects):
            raise ValueError(f"`object_slots` must be {(batch_size, num_objects)}, got {tuple(object_slots.shape)}.")
        # Only where it costs nothing: reading values back would make a GPU wait.
        if object_slots.device.type == "cpu":
            ordered = object_slots.sort(dim=1).values
            if ordered.min() < 0 or ordered.max() >= limit or bool((ordered.diff(dim=1) == 0).any()):
                raise ValueError(
                    f"`object_slots` must be 0 to {limit - 1}, each at most once a clip, got {object_slots.tolist()}."
                )
        return object_slots.to(device)

    def _valid(self, object_valid, slots: torch.Tensor) -> torch.Tensor:
        """Background and the slots that hold an object, `(B, 1 + max_objects)` bool."""
        if object_valid is None:
            object_valid = torch.ones_like(slots, dtype=torch.bool)
        if object_valid.shape != slots.shape or object_valid.dtype != torch.bool:
            raise ValueError(
                f"`object_valid` must be {tuple(slots.shape)} of bool, got {tuple(object_valid.shape)} of "
                f"{object_valid.dtype}."
            )
        valid = torch.zeros(len(slots), 1 + self.config.max_objects, dtype=torch.bool, device=slots.device)
        valid[:, 0] = True
        return valid.scatter(1, slots + 1, object_valid.to(slots.device))

    @staticmethod
    def _forced_frames(teacher_forcing, batch_size: int, num_frames: int, device: torch.device) -> torch.Tensor:
        if isinstance(teacher_forcing, torch.Tensor):
            return teacher_forcing.to(device)
        return torch.rand(batch_size, num_frames, device=device) < teacher_forcing


def pool_to_stride4(masks: torch.Tensor) -> torch.Tensor:
    """Bool `(B, N, height, width)` to shares of the 5x5 pixels around each point, float32 `(B, N, 4h-3, 4w-3)`."""
    return F.avg_pool2d(masks.float(), 5, 4, 2, count_include_pad=False)


@contextmanager
def _without_gradients() -> Iterator[None]:
    """`no_grad` under autocast, whose cache would keep weights that were cast here, cut off from their gradients."""
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


def _fit_groups(identification: torch.Tensor, num_groups: int) -> torch.Tensor:
    """`(G, C, h, w)` to another number of groups: further ones are zero, those beyond are dropped."""
    missing = max(0, num_groups - len(identification))
    return torch.cat([identification[:num_groups], identification.new_zeros(missing, *identification.shape[1:])])


def _pick_channels(tensor: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """`(B, C, ...)` to the channels `(B, N)` of each entry, `(B, N, ...)`."""
    index = channels.reshape(*channels.shape, *[1] * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


__all__ = ["DeformVosModel", "DeformVosOutput", "DeformVosPreTrainedModel", "DeformVosVideoOutput"]
