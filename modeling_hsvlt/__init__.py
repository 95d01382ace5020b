"""Multi-label image classification for the Hugging Face Hub: HSVLT, MlTr and HP-DVAL."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_hp_dval import HPDVALConfig
from .configuration_hsvlt import HSVLTConfig
from .configuration_mltr import MlTrConfig
from .configuration_multilabel import MultiLabelConfig
from .losses_multilabel import (
    UNKNOWN_LABEL,
    asymmetric_loss,
    binary_cross_entropy_loss,
    distribution_balanced_loss,
    focal_loss,
    multilabel_loss,
    two_way_loss,
    zlpr_loss,
)
from .modeling_hp_dval import HPDVALForImageClassification, HPDVALModel, HPDVALPreTrainedModel
from .modeling_hsvlt import HSVLTForImageClassification, HSVLTModel, HSVLTPreTrainedModel
from .modeling_mltr import MlTrBackbone, MlTrForImageClassification, MlTrModel, MlTrPreTrainedModel
from .pipeline_multilabel import MultiLabelImageClassificationPipeline
from .processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor, load_image

__version__ = "0.1.0"

for config, model in (
    (HSVLTConfig, HSVLTForImageClassification),
    (MlTrConfig, MlTrForImageClassification),
    (HPDVALConfig, HPDVALForImageClassification),
):
    # AutoModel gives the classifier: these are one-task checkpoints.
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    AutoModelForImageClassification.register(config, model)
    AutoImageProcessor.register(config, image_processor_classes={"pil": MultiLabelImageProcessor})
    AutoProcessor.register(config, MultiLabelProcessor)
    # Saving a checkpoint then copies the code that it needs, for those who do not have this package.
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModelForImageClassification")
AutoBackbone.register(MlTrConfig, MlTrBackbone)
for base in (HSVLTModel, MlTrModel, HPDVALModel):
    base.register_for_auto_class("AutoModel")


class RegisteredPipelines(dict):
    """`custom_pipelines` of a configuration, for whoever has this package.

    `transformers.pipeline` takes the code for a task that is in there from the checkpoint, and asks for
    `trust_remote_code`, though the task is registered. So none is in there: it takes the code registered here.
    """

    def __contains__(self, task) -> bool:
        return False


MultiLabelConfig.custom_pipelines_class = RegisteredPipelines
PIPELINE_REGISTRY.register_pipeline(
    "multi-label-image-classification",
    pipeline_class=MultiLabelImageClassificationPipeline,
    pt_model=AutoModelForImageClassification,
)

__all__ = [
    "UNKNOWN_LABEL",
    "HPDVALConfig",
    "HPDVALForImageClassification",
    "HPDVALModel",
    "HPDVALPreTrainedModel",
    "HSVLTConfig",
    "HSVLTForImageClassification",
    "HSVLTModel",
    "HSVLTPreTrainedModel",
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
    "focal_loss",
    "load_image",
    "multilabel_loss",
    "two_way_loss",
    "zlpr_loss",
]
