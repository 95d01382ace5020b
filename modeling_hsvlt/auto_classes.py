"""Makes transformers know the models, by name and in a pipeline, where this package is imported."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_efficientnet_lite import EfficientNetLiteConfig
from .configuration_hp_dval import HPDVALConfig
from .configuration_hsvlt import HSVLTConfig
from .configuration_mltr import MlTrConfig
from .configuration_multilabel import MultiLabelConfig
from .modeling_efficientnet_lite import EfficientNetLiteBackbone, EfficientNetLiteForImageClassification
from .modeling_hp_dval import HPDVALForImageClassification, HPDVALModel
from .modeling_hsvlt import HSVLTForImageClassification, HSVLTModel
from .modeling_mltr import MlTrBackbone, MlTrForImageClassification, MlTrModel
from .pipeline_multilabel import MultiLabelImageClassificationPipeline
from .processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor


class RegisteredPipelines(dict):
    """`custom_pipelines` of a configuration, for whoever has this package.

    `transformers.pipeline` takes the code for a task that is in there from the checkpoint, and asks for
    `trust_remote_code`, though the task is registered. So none is in there: it takes the code registered here.
    """

    def __contains__(self, task) -> bool:
        return False


def register() -> None:
    """Makes transformers know the models, and checkpoints carry their code for those who do not have this package."""
    for config, model, base in (
        (HSVLTConfig, HSVLTForImageClassification, HSVLTModel),
        (MlTrConfig, MlTrForImageClassification, MlTrModel),
        (HPDVALConfig, HPDVALForImageClassification, HPDVALModel),
    ):
        # AutoModel gives the classifier: these are one-task checkpoints.
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
        AutoModelForImageClassification.register(config, model)
        AutoImageProcessor.register(config, image_processor_classes={"pil": MultiLabelImageProcessor})
        AutoProcessor.register(config, MultiLabelProcessor)
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModelForImageClassification")
        base.register_for_auto_class("AutoModel")
    AutoBackbone.register(MlTrConfig, MlTrBackbone)
    AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
    AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone)
    AutoModelForImageClassification.register(EfficientNetLiteConfig, EfficientNetLiteForImageClassification)
    MultiLabelConfig.custom_pipelines_class = RegisteredPipelines
    PIPELINE_REGISTRY.register_pipeline(
        "multi-label-image-classification",
        pipeline_class=MultiLabelImageClassificationPipeline,
        pt_model=AutoModelForImageClassification,
    )
