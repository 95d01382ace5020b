"""Multi-label image classification for the Hugging Face Hub: HSVLT, MlTr and HP-DVAL."""

from .auto_classes import register as _register
from .configuration_efficientnet_lite import EfficientNetLiteConfig
from .configuration_hp_dval import HPDVALConfig
from .configuration_hsvlt import HSVLTConfig
from .configuration_mltr import MlTrConfig
from .heat_maps_multilabel import label_heat_maps
from .label_context import LabelContext
from .label_contract import NOT_EVALUATED, UNKNOWN_LABEL
from .label_prompts import encode_labels, load_text_encoder
from .load_image import load_image
from .losses_multilabel import (
    MULTILABEL_LOSSES,
    asymmetric_loss,
    binary_cross_entropy_loss,
    distribution_balanced_loss,
    focal_loss,
    multilabel_loss,
    two_way_loss,
    zlpr_loss,
)
from .modeling_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteForImageClassification
from .modeling_hp_dval import HPDVALForImageClassification, HPDVALModel, HPDVALPreTrainedModel
from .modeling_hsvlt import HSVLTForImageClassification, HSVLTModel, HSVLTPreTrainedModel
from .modeling_mltr import MlTrBackbone, MlTrForImageClassification, MlTrModel, MlTrPreTrainedModel
from .pipeline_multilabel import MultiLabelImageClassificationPipeline
from .processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

__version__ = "0.1.0"

_register()

__all__ = [
    "MULTILABEL_LOSSES",
    "NOT_EVALUATED",
    "UNKNOWN_LABEL",
    "EfficientNetLiteBackbone",
    "EfficientNetLiteConfig",
    "EfficientNetLiteForImageClassification",
    "HPDVALConfig",
    "HPDVALForImageClassification",
    "HPDVALModel",
    "HPDVALPreTrainedModel",
    "HSVLTConfig",
    "HSVLTForImageClassification",
    "HSVLTModel",
    "HSVLTPreTrainedModel",
    "LabelContext",
    "MlTrBackbone",
    "MlTrConfig",
    "MlTrForImageClassification",
    "MlTrModel",
    "MlTrPreTrainedModel",
    "MultiLabelImageClassificationPipeline",
    "MultiLabelImageProcessor",
    "MultiLabelProcessor",
    "asymmetric_loss",
    "binary_cross_entropy_loss",
    "distribution_balanced_loss",
    "encode_labels",
    "focal_loss",
    "label_heat_maps",
    "load_image",
    "load_text_encoder",
    "multilabel_loss",
    "two_way_loss",
    "zlpr_loss",
]
