"""Maps of four scales from the single map of a plain ViT. An addition: the published HSVLT stands on a ConvNeXt."""

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

from .configuration_hsvlt import HSVLTConfig
from .modeling_multilabel import as_dtype_of

STRIDES = (4, 8, 16, 32)
WIDTH = 256  # of each map; less on a narrower ViT
_ChannelNorm = partial(ConvNextLayerNorm, eps=1e-5, data_format="channels_first")


class HSVLTSimplePyramid(nn.Module):
    """The simple feature pyramid of ViTDet (Li et al., ECCV 2022, arXiv 2203.16527, section 3): from the last map of a
    ViT alone, by transposed convolutions of stride 2 (each halves the channels; norm and GELU between two) or max
    pooling, then a convolution of 1 x 1 and one of 3 x 3 without bias, with a norm over channels behind each.

    Strides are 4, 8, 16 and 32 for patches of 16, as published, 8 or 32, and the nearest powers of two times the patch
    for others: 3.5, 7, 14 and 28 for 14. An odd side is rounded up by pooling, where the published code drops the rest.
    """

    def __init__(self, channels: int, stride: float, depths: list[int]):
        super().__init__()
        self.depths = depths
        width = min(WIDTH, channels)
        self.channels = [width] * len(STRIDES)
        self.scales = nn.ModuleList()
        for target in STRIDES:
            doublings = round(math.log2(stride)) - round(math.log2(target))
            layers: list[nn.Module] = []
            size = channels
            for step in range(doublings):
                if step:
                    layers += [_ChannelNorm(size), nn.GELU()]
                layers.append(nn.ConvTranspose2d(size, max(size // 2, 1), kernel_size=2, stride=2))
                size = max(size // 2, 1)
            if doublings < 0:
                layers.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
            layers += [nn.Conv2d(size, width, kernel_size=1, bias=False), _ChannelNorm(width)]
            layers += [nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False), _ChannelNorm(width)]
            self.scales.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.starts_as_in_torch = True  # as published

    def forward(self, feature_maps: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            feature_maps: one map (B, C, H, W) of the backbone; or what this gave before, which stays as it is.

        Returns:
            A map (B, C_i, H_i, W_i) for each interaction in order.
        """
        feature_maps = list(feature_maps)
        if len(feature_maps) > 1:
            return feature_maps
        feature_map = as_dtype_of(self.scales[0][-2], feature_maps[0])
        maps = [scale(feature_map) for scale in self.scales]
        return [each for each, depth in zip(maps, self.depths, strict=True) for _ in range(depth)]


def build_pyramid(config: HSVLTConfig, backbone: nn.Module) -> HSVLTSimplePyramid | None:
    """The pyramid that `config.pyramid` names for this backbone, or None.

    Raises:
        ValueError: a backbone that has more than one scale itself.
    """
    if config.pyramid == "none":
        return None
    if len(set(backbone.strides)) > 1:
        raise ValueError(
            f"pyramid {config.pyramid!r} is for backbones of one scale; a {config.backbone_config.model_type} has "
            "several: leave it at 'none'."
        )
    return HSVLTSimplePyramid(backbone.channels[-1], backbone.strides[-1], backbone.interaction_depths)
