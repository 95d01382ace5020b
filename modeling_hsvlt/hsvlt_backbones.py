"""The visual side of HSVLT: backbones of transformers, read map by map, and how they start from pretrained weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, AutoModel
from transformers.modeling_utils import PreTrainedModel
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextEncoder
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Embeddings, ConvNextV2Encoder

from .configuration_hsvlt import BLOCK_BACKBONES, HSVLTConfig
from .convnext_in_rows import convnext_layer_in_rows, runs_in_rows
from .load_pretrained import load_pretrained
from .modeling_efficientnet_lite import EfficientNetLiteBackbone
from .modeling_mltr import MlTrBackbone
from .modeling_multilabel import is_plain

# AutoBackbone does not know a class that was downloaded with a checkpoint.
OWN_BACKBONES: dict[str, Any] = {"mltr": MlTrBackbone, "efficientnet_lite": EfficientNetLiteBackbone}


def build_backbone(config: HSVLTConfig) -> "HSVLTBlockBackbone | HSVLTStageBackbone":
    """The backbone that `config.backbone_config` describes, with new weights."""
    by_block = config.backbone_config.model_type in BLOCK_BACKBONES
    return HSVLTBlockBackbone(config) if by_block else HSVLTStageBackbone(config)


class HSVLTBlockBackbone(nn.Module):
    """A ConvNeXt or ConvNeXtV2 of transformers, read after every block (or only at the end of each stage).

    The parts of `ConvNextModel` under their own names, without its final norm, which nothing here would use.
    """

    gradient_checkpointing = False

    def __init__(self, config: HSVLTConfig):
        super().__init__()
        backbone = config.backbone_config
        embeddings, encoder = {
            "convnext": (ConvNextEmbeddings, ConvNextEncoder),
            "convnextv2": (ConvNextV2Embeddings, ConvNextV2Encoder),
        }[backbone.model_type]
        self.embeddings = embeddings(backbone)
        self.encoder = encoder._from_config(backbone)
        self.channels = list(backbone.hidden_sizes)
        self.every_block = config.interaction_depths is None
        self.interaction_depths = list(config.interaction_depths or backbone.depths)

    @property
    def body(self) -> PreTrainedModel:
        """The part that is a model of transformers by itself."""
        return self.encoder

    def load_pretrained(self, source: str, **load) -> None:
        """Takes the weights of the model at `source`; see [`HSVLTForImageClassification.from_backbone`]."""
        state_dict = load_pretrained(AutoModel, source, **load).state_dict()
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("layernorm.")}
        result = self.load_state_dict(state_dict, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(
                f"the weights of {source} do not fit the backbone: missing {result.missing_keys[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}."
            )

    def forward(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields a (B, C_i, H_i, W_i) map, channels last in memory, for each interaction in order."""
        # In this layout the permutes inside a ConvNeXt block are views, and so are the label stream's pixel tokens.
        hidden_state = self.embeddings(pixel_values.contiguous(memory_format=torch.channels_last))
        blocks = self._blocks(hidden_state)
        for stage, depth in zip(self.encoder.stages, self.interaction_depths, strict=True):
            for _ in stage.layers:
                hidden_state = next(blocks)
                if self.every_block:
                    yield hidden_state
            if not self.every_block:
                yield from [hidden_state] * depth

    def _blocks(self, hidden_state: torch.Tensor) -> Iterator[torch.Tensor]:
        """The output of each block."""
        if not is_plain(self.encoder, *self.encoder.stages):
            yield from self._blocks_of_call(hidden_state)
            return
        for stage in self.encoder.stages:
            for layer in stage.downsampling_layer:
                hidden_state = layer(hidden_state)
            for layer in stage.layers:
                if self.gradient_checkpointing and self.training:
                    hidden_state = self._gradient_checkpointing_func(layer.__call__, hidden_state)
                elif runs_in_rows(layer, hidden_state):
                    hidden_state = convnext_layer_in_rows(layer, hidden_state)
                else:
                    hidden_state = layer(hidden_state)
                yield hidden_state

    def _blocks_of_call(self, hidden_state: torch.Tensor) -> list[torch.Tensor]:
        """The same, where something hangs on the encoder or a stage (a hook, a shard), so that it has to be called."""
        outputs = []
        handles = [
            layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
            for stage in self.encoder.stages
            for layer in stage.layers
        ]
        try:
            self.encoder(hidden_state)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


class HSVLTStageBackbone(nn.Module):
    """Any four-stage backbone of transformers, read at the output of each stage."""

    def __init__(self, config: HSVLTConfig):
        super().__init__()
        own = OWN_BACKBONES.get(config.backbone_config.model_type)
        if own is not None:
            self.model = own._from_config(config.backbone_config)
        else:
            self.model = AutoBackbone.from_config(config.backbone_config)
            if config.backbone_config.model_type in ("swin", "focalnet"):  # built there, but never used
                getattr(self.model, self.model.base_model_prefix).layernorm = nn.Identity()
        self.channels = list(self.model.channels)
        self.interaction_depths = list(config.interaction_depths or [1, 1, 1, 1])

    @property
    def body(self) -> PreTrainedModel:
        """As of [`HSVLTBlockBackbone`]."""
        return self.model

    @property
    def embeddings(self) -> nn.Module | None:
        """The backbone's embeddings, where it has a module of that name."""
        return getattr(self.model.base_model, "embeddings", None)

    def load_pretrained(self, source: str, **load) -> None:
        """As of [`HSVLTBlockBackbone`]. A checkpoint of the bare model has no norms in front of the feature maps; those
        start fresh."""
        # Not AutoBackbone: it asks the Hub whether a local folder exists.
        model = load_pretrained(type(self.model), source, may_lack="norm", out_features=self.model.out_features, **load)
        unused = [f"{model.base_model_prefix}.layernorm.{name}" for name in ("weight", "bias")]
        self.model.load_state_dict({key: value for key, value in model.state_dict().items() if key not in unused})

    def forward(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields a (B, C_i, H_i, W_i) map for each interaction in order."""
        feature_maps = self.model(pixel_values).feature_maps
        for feature_map, depth in zip(feature_maps, self.interaction_depths, strict=True):
            yield from [feature_map] * depth
