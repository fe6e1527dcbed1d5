"""
Gated deformable propagation: DeAOT's gated propagation module (NeurIPS 2022) with deformable attention inside.

Shapes used throughout: `B` frames, `G` groups of objects, `h x w` tokens, `n = h * w`, `S` memory frames. Visual maps
are `(B, C, h, w)`. Identification maps hold one entry a group: `(B * G, C, h, w)`. A memory's values of both branches
lie side by side on the channel axis, `(B, value_size * (1 + G), h, w)`, so that one attention map reads them at once.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_deformvos import DeformVosConfig


class LayerProjection(NamedTuple):
    """
    What one layer computes of a frame before its memory is read.

    Attributes:
        key (`torch.Tensor` of shape `(B, key_size, h, w)`): queries and keys, which share one projection.
        value, gate (`torch.Tensor` of shape `(B, value_size, h, w)`): values and gate of the visual branch.
        identification (`torch.Tensor` of shape `(B * G, hidden_size, h, w)`, *optional*):
            Normalised input of the identification branch, empty in the first layer.
    """

    key: torch.Tensor
    value: torch.Tensor
    gate: torch.Tensor
    identification: torch.Tensor | None


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `(B, C, h, w)`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def to_tokens(hidden: torch.Tensor) -> torch.Tensor:
    """`(B, C, h, w)` to `(B, n, C)`."""
    return hidden.flatten(2).transpose(1, 2)


def to_map(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`(B, n, C)` to `(B, C, h, w)`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def channels_last(hidden: torch.Tensor) -> torch.Tensor:
    """
    The same map with its channels side by side in memory, and the strides that say so.

    A batch of one may have any stride on its first axis: `contiguous` leaves such a map as it is, and convolutions
    take it for one with channels first, which is several times slower.
    """
    rows = hidden.permute(0, 2, 3, 1)
    return rows.flatten(0, 2).unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2)


def reference_points(height: int, width: int, stride: int, device: torch.device) -> torch.Tensor:
    """Regular grid of points as `(rows, columns, 2)` float32 (y, x) in tokens, the first at token (0, 0)."""
    rows = torch.arange(0, height, stride, device=device, dtype=torch.float32)
    columns = torch.arange(0, width, stride, device=device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)


def last_token(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """The largest (y, x) inside the map, in dtype and on the device of another tensor."""
    # `new_tensor` would write the sizes into an exported graph as constants.
    return torch.stack([like.new_full((), height - 1), like.new_full((), width - 1)])


def sample_at(hidden: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
    """
    Bilinear samples of a map at points given in tokens.

    Args:
        hidden (`torch.Tensor` of shape `(B, C, h, w)`): the map.
        locations (`torch.Tensor` of shape `(B, P, 2)` or `(1, P, 2)`):
            (y, x) in tokens; outside points take the border's value.

    Returns:
        `torch.Tensor` of shape `(B, P, C)` in the dtype of `hidden`. Coordinates are handled in float32, or in float64
        where the locations are.
    """
    height, width = hidden.shape[-2:]
    last = last_token(height, width, locations)
    # Clamped here, which every device can do; border padding in grid_sample is the same but not on all of them.
    inside = torch.minimum(locations.clamp_min(0), last)
    grid = (2.0 * inside / last.clamp_min(1) - 1.0).flip(-1).unsqueeze(1).expand(hidden.shape[0], -1, -1, -1)
    # grid_sample refuses mixed dtypes, and half-precision coordinates would miss tokens on long sides.
    source = hidden.to(grid.dtype)
    # On a GPU this is cuDNN's sampler, which is made for channels first.
    source = source.contiguous() if source.is_cuda else source
    sampled = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    return sampled.squeeze(2).transpose(1, 2).to(hidden.dtype)


def _softmax(scores: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Softmax over the keys, returned in `dtype`; its kernels compute in float32 at least, also on half precision."""
    return torch.softmax(scores, dim=-1).to(dtype)


# A model's `_init_weights` is only asked about modules with parameters of their own: a convolution's class tells what
# it starts as.
class ZeroConvolution(nn.Conv2d):
    """A convolution whose weights start at zero."""


class IdentityConvolution(nn.Conv2d):
    """A convolution that starts as the identity."""


class OffsetNetwork(nn.Module):
    """
    Depth-wise convolution, layer norm, GELU and a 1x1 convolution that predict offsets in tokens, which its callers
    bound.

    The last convolution starts at zero: an untrained network leaves every reference point where it is, and the
    attention is exactly the vanilla one on those points.
    """

    def __init__(self, config: DeformVosConfig, in_channels: int, out_points: int, stride: int = 1):
        super().__init__()
        width = config.offset_hidden_size
        self.reduce = nn.Conv2d(in_channels, width, 1)
        self.depthwise = nn.Conv2d(width, width, 5, stride, 2, groups=width)
        self.norm = ChannelNorm(width, eps=config.layer_norm_eps)
        self.offset = ZeroConvolution(width, 2 * out_points, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(B, C, h, w)` to unbounded offsets `(B, rows, columns, points, 2)` in float32 or float64."""
        hidden = F.gelu(self.norm(self.depthwise(self.reduce(hidden))))
        offsets = self.offset(hidden).permute(0, 2, 3, 1).unflatten(-1, (-1, 2))
        return offsets.to(torch.promote_types(offsets.dtype, torch.float32))


class GridDeformableAttention(nn.Module):
    """
    Attention of every query to a grid of reference points shared by all queries, each moved by a learned offset
    (Deformable Attention Transformer, CVPR 2022). Keys are `ceil(h/r) * ceil(w/r)` a memory frame instead of `h * w`.
    """

    def __init__(self, config: DeformVosConfig, stride: int, local: bool = False):
        super().__init__()
        self.stride = stride
        self.max_offset = config.max_offset
        self.use_offsets = config.use_offsets
        self.offset_network = OffsetNetwork(config, config.key_size, 1, stride)
        # A learned Gaussian falloff with distance in tokens: b = -softplus(decay) * |p_query - p_key|^2.
        self.distance_decay = nn.Parameter(torch.tensor(-2.0)) if local else None

    def locate(self, query: torch.Tensor) -> torch.Tensor:
        """Sampled locations `(B, P, 2)` for the queries `(B, C, h, w)`."""
        if self.use_offsets:
            offsets = self.max_offset * torch.tanh(self.offset_network(query)[..., 0, :])
            # As many points as there are offsets: an exported graph need not prove that two ways of counting agree.
            points = reference_points(*offsets.shape[1:3], 1, query.device) * self.stride + offsets
        else:
            points = reference_points(*query.shape[-2:], self.stride, query.device)
            points = points.expand(query.shape[0], -1, -1, -1)
        return points.flatten(1, 2)

    def forward(
        self, query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            query (`(B, key_size, h, w)`): the current frame's queries.
            keys, values (lists of `(B, C, h, w)`, an entry a memory frame): what the memory holds. Of a single video
                one entry may also hold several frames, `(S, C, h, w)`.

        Returns:
            The read values `(B, C, h, w)`, the attention `(B, n, S * P)` and the locations `(B, P, 2)`.
        """
        height, width = query.shape[-2:]
        locations = self.locate(query)
        sampled_keys, sampled_values = self._sample(keys, locations), self._sample(values, locations)
        scores = to_tokens(query / math.sqrt(query.shape[1])) @ sampled_keys.transpose(1, 2)
        if self.distance_decay is not None:
            num_frames = sampled_keys.shape[1] // locations.shape[1]
            scores = scores + self._bias(locations, height, width).repeat(1, 1, num_frames)
        attention = _softmax(scores, sampled_values.dtype)
        return to_map(attention @ sampled_values, height, width), attention, locations

    @staticmethod
    def _sample(maps: list[torch.Tensor], locations: torch.Tensor) -> torch.Tensor:
        """Samples of every frame's map side by side, `(B, S * P, C)`."""
        sampled = torch.cat([sample_at(each, locations) for each in maps], dim=1)
        return sampled.reshape(locations.shape[0], -1, sampled.shape[-1])

    def _bias(self, locations: torch.Tensor, height: int, width: int) -> torch.Tensor:
        queries = reference_points(height, width, 1, locations.device).flatten(0, 1).to(locations.dtype)
        return -F.softplus(self.distance_decay) * (queries[:, None] - locations[:, None]).square().sum(-1)


class QueryDeformableAttention(nn.Module):
    """
    Attention of every query to its own few points of one memory frame (Deformable DETR, ICLR 2021), with weights
    `softmax(q k / sqrt(d) + b)` of the sampled keys. It takes the place of DeAOT's 15x15 window.

    The points are a square around the query, carried along by one displacement a query and moved by an offset each.
    Both are predicted from the query and from its correlations with the memory around it: a query alone cannot tell
    where its object was a frame ago.

    Bilinear sampling commutes with the products that follow it, so nothing is resampled: the sampled scores are read
    off the dense `n x n` product, and the weights go back into a dense map that multiplies the values.
    """

    def __init__(self, config: DeformVosConfig):
        super().__init__()
        self.radius = config.short_term_window // 2
        self.correlation_radius = config.correlation_radius
        self.max_offset = config.max_offset
        self.max_displacement = config.max_displacement
        self.use_offsets = config.use_offsets
        num_points = config.short_term_window**2
        correlations = (2 * config.correlation_radius + 1) ** 2
        self.offset_network = OffsetNetwork(config, config.key_size + correlations, 1 + num_points)
        self.point_bias = nn.Parameter(torch.zeros(num_points))

    @staticmethod
    def _window(height: int, width: int, radius: int, device: torch.device) -> torch.Tensor:
        """Points of the square around every token, `(n, (2 * radius + 1)^2, 2)` float32."""
        side = reference_points(2 * radius + 1, 2 * radius + 1, 1, device).flatten(0, 1) - radius
        return reference_points(height, width, 1, device).flatten(0, 1)[:, None] + side

    def _correlations(self, scores: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Scores against the memory around each query, zero outside the frame: `(B, window, h, w)`."""
        window = self._window(height, width, self.correlation_radius, scores.device).long()
        last = last_token(height, width, window)
        inside = ((window >= 0) & (window <= last)).all(-1)
        clamped = torch.minimum(window.clamp_min(0), last)
        index = clamped[..., 0] * width + clamped[..., 1]
        correlations = scores.gather(2, index.expand(scores.shape[0], -1, -1)) * inside
        return channels_last(to_map(correlations, height, width))

    def locate(self, query: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Sampled locations `(B, n, P, 2)`, clamped to the frame."""
        height, width = query.shape[-2:]
        points = self._window(height, width, self.radius, query.device)
        if self.use_offsets:
            evidence = torch.cat([query, self._correlations(scores, height, width).to(query.dtype)], dim=1)
            predicted = self.offset_network(evidence).flatten(1, 2)
            displacement = self.max_displacement * torch.tanh(predicted[:, :, :1] / self.max_displacement)
            points = points + displacement + self.max_offset * torch.tanh(predicted[:, :, 1:] / self.max_offset)
        else:
            points = points.expand(query.shape[0], -1, -1, -1)
        return torch.minimum(points.clamp_min(0), last_token(height, width, points))

    def forward(
        self, query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As [`GridDeformableAttention`] for one memory frame; the attention is dense, `(B, n, n)`, and the locations
        are `(B, n, P, 2)`."""
        (key,), (value,) = keys, values
        height, width = query.shape[-2:]
        scores = to_tokens(query / math.sqrt(query.shape[1])) @ key.flatten(2)
        locations = self.locate(query, scores)
        index, weights = bilinear_corners(locations, height, width)
        corner_scores = scores.gather(2, index.flatten(2)).unflatten(2, index.shape[2:])
        sampled = (corner_scores * weights).sum(-2) + self.point_bias
        attention = _softmax(sampled, weights.dtype).unsqueeze(-2) * weights
        dense = torch.zeros_like(scores, dtype=weights.dtype).scatter_add_(2, index.flatten(2), attention.flatten(2))
        dense = dense.to(value.dtype)
        return to_map(dense @ to_tokens(value), height, width), dense, locations


def bilinear_corners(locations: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The four tokens around each point and their bilinear weights.

    Args:
        locations (`torch.Tensor` of shape `(..., P, 2)`): (y, x) in tokens, inside the frame.

    Returns:
        Positions in the flattened map and weights, both `(..., 4, P)`: a corner's points lie side by side.
    """
    y, x = locations.unbind(-1)
    top, left = y.detach().floor(), x.detach().floor()
    below, right = y - top, x - left
    top, left = top.long(), left.long()
    rows = top * width, (top + 1).clamp_max(height - 1) * width
    columns = left, (left + 1).clamp_max(width - 1)
    index = torch.stack([row + column for row in rows for column in columns], dim=-2)
    weights = [row * column for row in (1 - below, below) for column in (1 - right, right)]
    return index, torch.stack(weights, dim=-2)


class GatedOutput(nn.Module):
    """
    `W_O DWConv5x5(read values * gate)`, for both branches.

    With `object_independent`, W_O is block-triangular: the visual branch takes nothing from the identification branch.
    Layers after the first start as the identity, and learn what they add: W_O is zero.
    """

    def __init__(self, config: DeformVosConfig, layer_idx: int):
        super().__init__()
        size = config.value_size
        self.object_independent = config.object_independent
        # What attention reads reaches the projection unblurred from the first step on.
        self.visual_depthwise = IdentityConvolution(size, size, 5, padding=2, groups=size, bias=False)
        self.id_depthwise = IdentityConvolution(size, size, 5, padding=2, groups=size, bias=False)
        project = ZeroConvolution if layer_idx else nn.Conv2d
        self.visual_project = project(size if config.object_independent else 2 * size, config.hidden_size, 1)
        self.id_project = project(2 * size, config.hidden_size, 1)

    def forward(
        self, read: torch.Tensor, visual_gate: torch.Tensor, id_gate: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, value_size * (1 + G), h, w)` to the updates of I `(B, C, h, w)` and of M `(B * G, C, h, w)`."""
        size = visual_gate.shape[1]
        visual = self.visual_depthwise(channels_last(read[:, :size] * visual_gate))
        identification = read[:, size:].unflatten(1, (-1, size)).flatten(0, 1)
        if id_gate is not None:
            identification = identification * id_gate
        identification = self.id_depthwise(channels_last(identification))
        both = torch.cat([repeat_groups(visual, identification.shape[0] // visual.shape[0]), identification], dim=1)
        return self.visual_project(visual if self.object_independent else both), self.id_project(both)


def repeat_groups(visual: torch.Tensor, num_groups: int) -> torch.Tensor:
    """`(B, C, h, w)` to `(B * G, C, h, w)`; a view for one group."""
    # Without a branch for one group, which would fix an exported graph's number of them.
    return visual.unsqueeze(1).expand(-1, num_groups, -1, -1, -1).flatten(0, 1)


def merge_groups(identification: torch.Tensor, batch_size: int) -> torch.Tensor:
    """`(B * G, C, h, w)` to `(B, G * C, h, w)`."""
    return identification.unflatten(0, (batch_size, -1)).flatten(1, 2)


class GatedDeformablePropagationLayer(GradientCheckpointingLayer):
    """One layer: long- and short-term propagation side by side, then self-propagation (DeAOT, section 4)."""

    def __init__(self, config: DeformVosConfig, layer_idx: int):
        super().__init__()
        hidden, key, value = config.hidden_size, config.key_size, config.value_size
        self.visual_norm = ChannelNorm(hidden, eps=config.layer_norm_eps)
        self.query_key = nn.Conv2d(hidden, key, 1)
        self.visual_value = nn.Conv2d(hidden, value, 1)
        self.visual_gate = nn.Conv2d(hidden, value, 1)
        # The identification branch is empty before the first layer: no norm, no gate, and values of the id alone.
        self.id_norm = ChannelNorm(hidden, eps=config.layer_norm_eps) if layer_idx else None
        self.id_gate = nn.Conv2d(hidden, value, 1) if layer_idx else None
        self.id_value = nn.Conv2d(2 * hidden if layer_idx else hidden, value, 1)
        self.long_term = GridDeformableAttention(config, config.long_term_stride)
        if config.short_term_form == "query":
            self.short_term = QueryDeformableAttention(config)
        else:
            self.short_term = GridDeformableAttention(config, config.short_term_stride, local=True)
        self.long_term_output = GatedOutput(config, layer_idx)
        self.short_term_output = GatedOutput(config, layer_idx)

        self_inputs = hidden if config.object_independent else 2 * hidden
        self.object_independent = config.object_independent
        self.self_visual_norm = ChannelNorm(hidden, eps=config.layer_norm_eps)
        self.self_id_norm = ChannelNorm(hidden, eps=config.layer_norm_eps)
        self.self_query_key = nn.Conv2d(self_inputs, key, 1)
        self.self_visual_value = nn.Conv2d(hidden, value, 1)
        self.self_visual_gate = nn.Conv2d(hidden, value, 1)
        self.self_id_value = nn.Conv2d(hidden, value, 1)
        self.self_id_gate = nn.Conv2d(hidden, value, 1)
        self.self_attention = GridDeformableAttention(config, config.self_stride)
        self.self_output = GatedOutput(config, layer_idx)

    def project(self, visual: torch.Tensor, identification: torch.Tensor | None) -> LayerProjection:
        """Project I `(B, C, h, w)` and M `(B * G, C, h, w)` or `None`; the frame's masks need not be known."""
        normed = self.visual_norm(visual)
        if self.id_norm is not None:
            identification = self.id_norm(identification)
        return LayerProjection(
            key=self.query_key(normed),
            value=F.silu(self.visual_value(normed)),
            gate=F.silu(self.visual_gate(normed)),
            identification=identification,
        )

    def remember(
        self, value: torch.Tensor, identification: torch.Tensor | None, id_embedding: torch.Tensor
    ) -> torch.Tensor:
        """
        Values of both branches, once a frame's masks are known: `V_id = SiLU(W [M | id])`.

        Args:
            value (`(B, value_size, h, w)`): V, as [`project`] returns it.
            identification (`(B * G, C, h, w)` or `None` in the first layer): M, as [`project`] returns it.
            id_embedding (`(B * G, C, h, w)`): what the identity bank makes of the masks.

        Returns:
            `(B, value_size * (1 + G), h, w)`.
        """
        inputs = id_embedding if identification is None else torch.cat([identification, id_embedding], dim=1)
        id_values = F.silu(self.id_value(inputs))
        return torch.cat([value, merge_groups(id_values, value.shape[0])], dim=1)

    def forward(
        self,
        visual: torch.Tensor,
        identification: torch.Tensor | None,
        frame: LayerProjection,
        long_term_keys: list[torch.Tensor],
        long_term_values: list[torch.Tensor],
        short_term_key: torch.Tensor,
        short_term_value: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """
        Args:
            visual (`(B, C, h, w)`), identification (`(B * G, C, h, w)` or `None` in the first layer): I and M.
            frame (`LayerProjection`): this layer's projections of the current frame.
            long_term_keys, long_term_values, short_term_key, short_term_value: the memory, see [`remember`].

        Returns:
            I, M, and the attention maps and sampled locations by name (`long_term`, `short_term`, `self`).
        """
        long_read, long_map, long_at = self.long_term(frame.key, long_term_keys, long_term_values)
        short_read, short_map, short_at = self.short_term(frame.key, [short_term_key], [short_term_value])
        id_gate = None if self.id_gate is None else F.silu(self.id_gate(frame.identification))
        long_visual, long_id = self.long_term_output(long_read, frame.gate, id_gate)
        short_visual, short_id = self.short_term_output(short_read, frame.gate, id_gate)
        visual = visual + long_visual + short_visual
        update = long_id + short_id
        identification = update if identification is None else identification + update

        self_visual, self_id, self_map, self_at = self._propagate_self(visual, identification)
        maps = {"long_term": long_map, "short_term": short_map, "self": self_map}
        locations = {"long_term": long_at, "short_term": short_at, "self": self_at}
        return visual + self_visual, identification + self_id, maps, locations

    def _propagate_self(self, visual, identification):
        batch_size = visual.shape[0]
        visual_in, id_in = self.self_visual_norm(visual), self.self_id_norm(identification)
        query = self.self_query_key(visual_in if self.object_independent else torch.cat([visual_in, id_in], dim=1))
        id_values = F.silu(self.self_id_value(id_in))
        values = torch.cat([F.silu(self.self_visual_value(visual_in)), merge_groups(id_values, batch_size)], dim=1)
        read, attention, locations = self.self_attention(query, [query], [values])
        visual_gate, id_gate = F.silu(self.self_visual_gate(visual_in)), F.silu(self.self_id_gate(id_in))
        return *self.self_output(read, visual_gate, id_gate), attention, locations


__all__ = [
    "GatedDeformablePropagationLayer",
    "GridDeformableAttention",
    "IdentityConvolution",
    "OffsetNetwork",
    "QueryDeformableAttention",
    "ZeroConvolution",
    "repeat_groups",
    "sample_at",
]
