"""Image encoders of DeformVOS: MobileNetV2 with torchvision's parameter names, alone or beside a ViT."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import Dinov2Backbone, Dinov2Config
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_deformvos import DeformVosConfig


# (expansion, channels, blocks, stride) of each stage: MobileNetV2 (CVPR 2018), table 2.
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STRIDE4_BLOCK, STRIDE8_BLOCK, STRIDE16_BLOCK, STRIDE32_BLOCK = 3, 6, 13, 17
FROZEN_BLOCKS = 4


def conv_norm(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias, padded so that 16k+1 pixels stay aligned with their tokens, and batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class FoldedConvolution(nn.Module):
    """A convolution with its batch norm folded in, and the ReLU6 behind it, if any, applied in the same kernel."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, has_activation: bool):
        super().__init__()
        self.conv = fuse_conv_bn_eval(conv, norm)
        self.activation, self.bounds = ("hardtanh", [0.0, 6.0]) if has_activation else ("none", [])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        conv = self.conv
        if self._may_fuse(hidden):
            # What torch.compile's frozen graphs call on CPUs. A separate ReLU6 costs more than some of the
            # convolutions: it is bound by memory, and slower in bfloat16 than in float32.
            geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
            return torch.ops.mkldnn._convolution_pointwise(
                hidden, conv.weight, conv.bias, *geometry, self.activation, self.bounds, ""
            )
        hidden = conv(hidden)
        return F.relu6(hidden, inplace=True) if self.bounds else hidden

    @staticmethod
    def _may_fuse(hidden: torch.Tensor) -> bool:
        # The kernel has no gradient and knows no autocast; a compiler fuses by itself.
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        device = hidden.device.type
        return not torch.is_autocast_enabled(device) and _has_fused_kernel(device, hidden.dtype)


@cache
def _has_fused_kernel(device: str, dtype: torch.dtype) -> bool:
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class InvertedResidual(GradientCheckpointingLayer):
    """MobileNetV2's block; the nesting of `conv` gives torchvision's parameter names."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        width = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(nn.Sequential(*conv_norm(in_channels, width, 1), nn.ReLU6(inplace=True)))
        layers.append(nn.Sequential(*conv_norm(width, width, 3, stride, groups=width), nn.ReLU6(inplace=True)))
        layers += conv_norm(width, out_channels, 1)
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.conv(hidden) if self.has_shortcut else self.conv(hidden)


class MobileNetV2Backbone(nn.Module):
    """
    MobileNetV2 without classifier. Features at strides 4, 8 and 16, and 32 where `config.backbone_tail` asks for it.

    Batch norm never leaves evaluation mode: clips are too few for its statistics. [`freeze_pretrained`] stops the
    gradients of its weights, too.
    """

    def __init__(self, config: DeformVosConfig):
        super().__init__()
        layers: list[nn.Module] = [nn.Sequential(*conv_norm(3, 32, 3, stride=2), nn.ReLU6(inplace=True))]
        channels = 32
        for expansion, width, blocks, stride in MOBILENET_STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(channels, width, stride if block == 0 else 1, expansion))
                channels = width
        last = STRIDE32_BLOCK if config.backbone_tail else STRIDE16_BLOCK
        self.features = nn.ModuleList(layers[: last + 1])
        self.is_folded = False
        self.channels = (24, 32, 96, 320) if config.backbone_tail else (24, 32, 96)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(batch_size, 3, 16k+1, 16m+1)` to the features at strides 4, 8, 16 (and 32)."""
        outputs = []
        hidden = pixel_values
        for index, block in enumerate(self.features):
            hidden = block(hidden)
            if index in (STRIDE4_BLOCK, STRIDE8_BLOCK, STRIDE16_BLOCK, STRIDE32_BLOCK):
                outputs.append(hidden)
        return tuple(outputs)

    def train(self, mode: bool = True):
        """As in torch, but for batch norm, which stays in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def fold_batch_norm(self):
        """
        Replace each convolution, its batch norm and its ReLU6 by one module, in place.

        Raises:
            ValueError: in training mode.
        """
        if self.training:
            raise ValueError("Batch norm is folded for inference: call `model.eval()` first.")
        for container in [module for module in self.modules() if isinstance(module, nn.Sequential)]:
            layers = list(container)
            for index, layer in enumerate(layers):
                if isinstance(layer, nn.BatchNorm2d):
                    has_activation = isinstance(layers[-1], nn.ReLU6)
                    container[index - 1] = FoldedConvolution(layers[index - 1], layer, has_activation)
                    container[index] = nn.Identity()
                    if has_activation:
                        container[index + 1] = nn.Identity()
        self.is_folded = True

    def freeze_pretrained(self):
        """Stop the gradient of batch norm everywhere and of the first blocks, whose edges need no retraining."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.features[:FROZEN_BLOCKS].requires_grad_(False)


class VisionTransformerBackbone(MobileNetV2Backbone):
    """
    A ViT in DINOv2 layout for the meaning of the stride-16 tokens, beside MobileNetV2 for the detail.

    A ViT has no features at strides 4 and 8. MobileNetV2 as its detail stem costs little beside it, is pretrained, and
    has a student's parameter names, so that a teacher may start from a trained student. The token grid is
    MobileNetV2's: the frame is padded by half a stride so that the centre of patch (i, j) falls on pixel (16i, 16j),
    then resized from 16 pixels a token to the ViT's patch size.

    The ViT is always in evaluation mode. [`~VisionTransformerBackbone.freeze_pretrained`] takes it out of training, as
    this package's trainer does; another training loop calls it itself.
    """

    def __init__(self, config: DeformVosConfig):
        super().__init__(config)
        vit_config = Dinov2Config(**(config.backbone_config or {}))
        self.patch_size = vit_config.patch_size
        self.vit = Dinov2Backbone(vit_config)
        # No output depends on these: where gradients are gathered from several processes, they would be waited for.
        for name, parameter in self.vit.named_parameters():
            if "mask_token" in name or (name.startswith("layernorm.") and not vit_config.apply_layernorm):
                parameter.requires_grad_(False)
        self.channels = (*self.channels, vit_config.hidden_size * len(self.vit.channels))

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(batch_size, 3, 16k+1, 16m+1)` to MobileNetV2's features and, last, the ViT's on the stride-16 grid."""
        padded = F.pad(pixel_values, (8, 7, 8, 7), mode="replicate")
        size = [side // 16 * self.patch_size for side in padded.shape[-2:]]
        # Antialiased resizing knows no half precision on CPUs.
        resized = F.interpolate(padded.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
        # Blocks differ in scale by orders of magnitude: each is brought to unit variance over its channels.
        blocks = [
            F.layer_norm(block.movedim(1, -1), block.shape[1:2]).movedim(-1, 1)
            for block in self.vit(resized.to(padded.dtype)).feature_maps
        ]
        return *super().forward(pixel_values), torch.cat(blocks, dim=1)

    def train(self, mode: bool = True):
        """As in MobileNetV2; the ViT stays in evaluation mode as well."""
        super().train(mode)
        self.vit.eval()
        return self

    def load_vit(self, source: str):
        """
        Initialise the ViT from a DINOv2 model's folder or Hub repository.

        Raises:
            ValueError: if weights are missing there or have another shape, naming them.
        """
        loaded, report = Dinov2Backbone.from_pretrained(
            source, config=self.vit.config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        misfits = sorted(report["missing_keys"]) + sorted(str(entry[0]) for entry in report["mismatched_keys"])
        if misfits:
            raise ValueError(
                f"{source} does not fit the ViT of `backbone_config`: {len(misfits)} weights are missing or of "
                f"another shape, among them {', '.join(misfits[:3])}."
            )
        self.vit.load_state_dict(loaded.state_dict())

    def freeze_pretrained(self):
        """As in MobileNetV2, and stop the gradient of the whole ViT."""
        super().freeze_pretrained()
        self.vit.requires_grad_(False)


def build_backbone(config: DeformVosConfig) -> nn.Module:
    """The encoder that `config.backbone` names."""
    return MobileNetV2Backbone(config) if config.backbone == "mobilenet_v2" else VisionTransformerBackbone(config)


__all__ = ["MobileNetV2Backbone", "VisionTransformerBackbone", "build_backbone"]
