"""Multi-label image classification for the Hugging Face Hub: HSVLT, MlTr and HP-DVAL."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .configuration_hsvlt import HSVLTConfig
from .losses_multilabel import (
    UNKNOWN_LABEL,
    asymmetric_loss,
    binary_cross_entropy_loss,
    focal_loss,
    multilabel_loss,
)
from .modeling_hsvlt import HSVLTForImageClassification, HSVLTModel, HSVLTPreTrainedModel


__version__ = "0.1.0"

# AutoModel gives the classifier: these are one-task checkpoints.
AutoConfig.register("hsvlt", HSVLTConfig)
AutoModel.register(HSVLTConfig, HSVLTForImageClassification)
AutoModelForImageClassification.register(HSVLTConfig, HSVLTForImageClassification)

# Saving a checkpoint then copies the code that it needs, for those who do not have this package.
HSVLTConfig.register_for_auto_class()
HSVLTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
HSVLTModel.register_for_auto_class("AutoModel")

__all__ = [
    "UNKNOWN_LABEL",
    "HSVLTConfig",
    "HSVLTForImageClassification",
    "HSVLTModel",
    "HSVLTPreTrainedModel",
    "asymmetric_loss",
    "binary_cross_entropy_loss",
    "focal_loss",
    "multilabel_loss",
]
