"""The network in four graphs whose state goes in and comes out as tensors: what is exported, and in which shapes."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.export import Dim

from ..inference_session_deformvos import _aggregate_groups
from ..memory_deformvos import LayerMemory, MemoryBank, MemoryFrame
from ..modeling_deformvos import DeformVosModel, ImageFeatures


# Lengths that a graph is traced with: all different, and none 0 or 1, which tracing would take for fixed.
_EXAMPLE = {"h": 6, "w": 9, "groups": 2, "slots": 3}
_MINIMA = {"h": 3, "w": 3, "groups": 1, "slots": 1}
# A frame's least side in pixels, at the network; ONNX files do without that of tracing.
MIN_SIDE = 16 * _MINIMA["h"] - 15


def _with_only(model: DeformVosModel, *parts: str) -> DeformVosModel:
    """The model without its other parts, whose weights a program would carry along."""
    model = copy.copy(model)
    model._modules = {name: model._modules[name] for name in parts}
    return model


class EncodeGraph(nn.Module):
    """A frame to its features."""

    def __init__(self, model: DeformVosModel):
        super().__init__()
        self.model = _with_only(model, "backbone", "token_projection")

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(1, 3, 16k+1, 16m+1)` to tokens `(1, hidden_size, h, w)` and the maps of strides 8 and 4."""
        return tuple(self.model.encode_images(pixel_values))


class ReadGraph(nn.Module):
    """A frame's masks from its features and the memory, and what its own memory is written from."""

    def __init__(self, model: DeformVosModel):
        super().__init__()
        self.model = _with_only(model, "layers", "visual_norm", "id_norm", "decoder")

    def forward(
        self,
        tokens: torch.Tensor,
        stride8: torch.Tensor,
        stride4: torch.Tensor,
        long_term_keys: torch.Tensor,
        long_term_values: torch.Tensor,
        short_term_keys: torch.Tensor,
        short_term_values: torch.Tensor,
        valid: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            tokens, stride8, stride4: what [`EncodeGraph`] returns.
            long_term_keys, long_term_values (`(L, S, key_size, h, w)` and `(L, S, value_size * (1 + G), h, w)`).
            short_term_keys, short_term_values: the same of the previous frame, without the axis of slots.
            valid (`(G, 1 + max_objects)` bool): background and the slots in use.

        Returns:
            Logits and probabilities `(G, 1 + max_objects, 4h-3, 4w-3)`, keys `(L, key_size, h, w)`, visual values
            `(L, value_size, h, w)`, and with several layers the identification inputs `(L - 1, G, hidden_size, h, w)`.
        """
        memory = MemoryBank(1)
        # The slots of a layer lie along the axis of the batch, as in one frame that holds them all.
        memory.long_term.append(_frame(long_term_keys, long_term_values))
        memory.previous = _frame(short_term_keys.unsqueeze(1), short_term_values.unsqueeze(1))
        segmentation = self.model.segment(ImageFeatures(tokens, stride8, stride4), memory)
        projections = segmentation.projections
        written = (
            segmentation.logits,
            _aggregate_groups(segmentation.logits, valid),
            torch.cat([projection.key for projection in projections]),
            torch.cat([projection.value for projection in projections]),
        )
        return written + _identification([projection.identification for projection in projections])


class WriteGraph(nn.Module):
    """A frame's memory, its masks now known; also the memory of a remembered frame with other masks."""

    def __init__(self, model: DeformVosModel):
        super().__init__()
        self.model = _with_only(model, "layers", "identity_bank")

    def forward(
        self, masks: torch.Tensor, visual_values: torch.Tensor, identification: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            masks (`(G, 1 + max_objects, 4h-3, 4w-3)`): probabilities of background and slots.
            visual_values, identification: what [`ReadGraph`] returns; a single layer has no `identification`.

        Returns:
            Values of both branches, `(L, value_size * (1 + G), h, w)`.
        """
        embedding = self.model.identity_bank(masks)
        values = []
        for index, layer in enumerate(self.model.layers):
            visual = visual_values[index : index + 1]
            known = identification[index - 1] if index else None
            values.append(layer.remember(visual, known, embedding))
        return torch.cat(values)


class StartGraph(nn.Module):
    """The memory of a frame that is known only by its given masks."""

    def __init__(self, model: DeformVosModel):
        super().__init__()
        self.model = _with_only(model, "layers", "identity_bank")

    def forward(self, tokens: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tokens and masks to keys `(L, key_size, h, w)`, values `(L, value_size * (1 + G), h, w)`, and with several
        layers the identification inputs."""
        # The finer maps are the decoder's, which has no part in this.
        frame = self.model.remember_reference(ImageFeatures(tokens, tokens, tokens), masks, 0)
        written = torch.cat([memory.key for memory in frame.layers]), torch.cat([m.values for m in frame.layers])
        return written + _identification([memory.identification for memory in frame.layers])


def _frame(keys: torch.Tensor, values: torch.Tensor) -> MemoryFrame:
    layers = tuple(LayerMemory(*pair) for pair in zip(keys.unbind(0), values.unbind(0), strict=True))
    return MemoryFrame(0, layers, keys)


def _identification(inputs: list[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """The inputs of all layers but the first, which has none, as one tensor in a tuple; empty for a single layer."""
    return (torch.stack(inputs[1:]),) if len(inputs) > 1 else ()


class Axis(NamedTuple):
    """The length of an axis that may change: `scale * symbol + offset`, as `4h-3`."""

    symbol: str
    scale: int = 1
    offset: int = 0


@dataclass(frozen=True)
class Graph:
    """
    A graph to be exported.

    Attributes:
        name (`str`): its name, and its file's.
        module (`nn.Module`): what is traced.
        inputs (`dict[str, tuple[int | Axis, ...]]`): the shape of every input, by name, in order.
        outputs (`tuple[str, ...]`): names of the outputs.
    """

    name: str
    module: nn.Module
    inputs: dict[str, tuple[int | Axis, ...]]
    outputs: tuple[str, ...]

    def example(self) -> dict[str, torch.Tensor]:
        """Random inputs to trace with."""
        generator = torch.Generator().manual_seed(0)
        example = {}
        for name, shape in self.inputs.items():
            lengths = [length if isinstance(length, int) else _example_length(length) for length in shape]
            example[name] = torch.rand(lengths, generator=generator)
        if "valid" in example:
            example["valid"] = torch.ones_like(example["valid"], dtype=torch.bool)
        return example

    def dynamic_shapes(self) -> dict[str, dict[int, object]]:
        """The axes of each input that may have other lengths, as `torch.export` takes them."""
        dims = {symbol: Dim(symbol, min=_MINIMA[symbol]) for symbol in _EXAMPLE}
        return {
            name: {
                index: length.scale * dims[length.symbol] + length.offset
                if (length.scale, length.offset) != (1, 0)
                else dims[length.symbol]
                for index, length in enumerate(shape)
                if isinstance(length, Axis)
            }
            for name, shape in self.inputs.items()
        }


def _example_length(axis: Axis) -> int:
    return axis.scale * _EXAMPLE[axis.symbol] + axis.offset


def build_graphs(model: DeformVosModel) -> list[Graph]:
    """
    The graphs of a model: `encode`, `start`, `read` and `write`. In their shapes `h` and `w` are the sides of the
    token grid, `groups` the groups of objects and `slots` the long-term frames.

    Args:
        model ([`DeformVosModel`]): in evaluation mode, on the CPU, in float32.
    """
    config = model.config
    layers, key_size, value_size = config.num_hidden_layers, config.key_size, config.value_size
    height, width, groups, slots = (Axis(symbol) for symbol in _EXAMPLE)
    tokens, stride8, stride4 = (
        tuple(Axis(side.symbol, scale, 1 - scale) if scale > 1 else side for side in (height, width))
        for scale in (1, 2, 4)
    )
    detail4, detail8 = model.backbone.channels[:2]
    both_values = Axis("groups", value_size, value_size)
    features = {
        "tokens": (1, config.hidden_size, *tokens),
        "stride8": (1, detail8, *stride8),
        "stride4": (1, detail4, *stride4),
    }
    memory = {
        "long_term_keys": (layers, slots, key_size, *tokens),
        "long_term_values": (layers, slots, both_values, *tokens),
        "short_term_keys": (layers, key_size, *tokens),
        "short_term_values": (layers, both_values, *tokens),
    }
    masks = {"masks": (groups, 1 + config.max_objects, *stride4)}
    deep = {"identification": (layers - 1, groups, config.hidden_size, *tokens)} if layers > 1 else {}
    return [
        Graph(
            "encode",
            EncodeGraph(model),
            {"pixel_values": (1, 3, Axis("h", 16, -15), Axis("w", 16, -15))},
            tuple(features),
        ),
        Graph("start", StartGraph(model), {"tokens": features["tokens"], **masks}, ("keys", "values", *deep)),
        Graph(
            "read",
            ReadGraph(model),
            {**features, **memory, "valid": (groups, 1 + config.max_objects)},
            ("logits", "masks", "keys", "visual_values", *deep),
        ),
        Graph(
            "write", WriteGraph(model), {**masks, "visual_values": (layers, value_size, *tokens), **deep}, ("values",)
        ),
    ]


def export_program(graph: Graph) -> torch.export.ExportedProgram:
    """Trace a graph with all its dynamic axes."""
    with torch.no_grad():
        program = torch.export.export(
            graph.module,
            (),
            graph.example(),
            dynamic_shapes=graph.dynamic_shapes(),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    _remove_assertions(program)
    return program


def _remove_assertions(program: torch.export.ExportedProgram):
    """
    Take the checks of sizes out of a program. Tracing holds a length of 1 for a special case, whose strides differ,
    and asserts of axes that it saw with another length that they never have it: a single group of objects would be
    refused. The operators are the same for it.
    """
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


__all__ = ["MIN_SIDE", "Axis", "Graph", "build_graphs", "export_program"]
