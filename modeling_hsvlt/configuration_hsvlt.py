"""HSVLT configuration."""

import re
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_efficientnet_lite import EfficientNetLiteConfig
from .configuration_mltr import MlTrConfig
from .configuration_multilabel import MultiLabelConfig, auto_map_of, preset_of

# Backbones whose blocks are public, so that an interaction can follow every block, as published.
BLOCK_BACKBONES = ("convnext", "convnextv2")
# Of which a part can be computed for some labels.
LOSSES_OF_ENTRIES = ("bce", "focal", "asl", "distribution_balanced")
# Not in transformers' own mapping where this file was downloaded with a checkpoint.
OWN_BACKBONES = {"mltr": MlTrConfig, "efficientnet_lite": EfficientNetLiteConfig}

# Depths and widths: specs of the released models. "nano" is this package's own, for tests and small data; the fields
# it turns on (normalised tokens, torch's default init, layer scale 1) are what training from random weights needs:
# ConvNeXt's own init of 0.02 leaves every block near the identity, and 0.1 is what torch would draw at these widths.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "backbone_config": {
            "model_type": "convnext",
            "hidden_sizes": [32, 64, 128, 192],
            "depths": [1, 1, 2, 1],
            "patch_size": 2,
            "layer_scale_init_value": 1.0,
            "initializer_range": 0.1,
        },
        "image_size": 64,
        "label_embedding_dim": 128,
        "normalize_visual_tokens": True,
        "normalize_label_tokens": True,
        "initializer_range": None,
    },
    "tiny": {
        "backbone_config": {"model_type": "convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]},
    },
    "small": {
        "backbone_config": {"model_type": "convnext", "hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 27, 3]},
    },
    "base": {
        "backbone_config": {"model_type": "convnext", "hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]},
    },
}


@strict
class HSVLTConfig(MultiLabelConfig):
    r"""
    Configuration of [`HSVLTModel`] and [`HSVLTForImageClassification`]: a four-stage backbone and a stream of label
    tokens that query its pixels (HSVLT, ACM MM 2023). Defaults are the released "small" model's reading, see
    [`HSVLTConfig.preset`] for the sizes.

    Args:
        > Published

        backbone_config (`dict` or `PreTrainedConfig`, *optional*):
            Configuration of the backbone. ConvNeXt and ConvNeXtV2 are walked block by block as published. Any other
            backbone of transformers is read at four places: of a pyramid (Swin, ResNet, MlTr, EfficientNet-Lite, ...)
            the last four stages, of a ViT or a vision tower (DINOv2, ViT, CLIP, SigLIP, ...) four evenly spaced layers.
            A backbone that lists four `out_features` is read there. Default: ConvNeXt.
        image_size (`int`, defaults to 448):
            Side of the square image that the checkpoint was trained on, in pixels; the backbone takes any size.
        label_embedding_dim (`int`, defaults to 768):
            Width of the label embeddings; 768 is `bert-base-uncased`, the published encoder.
        num_attention_heads (`int`, defaults to 1):
            Heads of the label-to-pixel attention; the released configuration has 1.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that starts the label stream's linear layers (gate, multi-modal
            layer and classifier keep torch's default, as released). None keeps torch's default everywhere.

        > Generalisations

        interaction_depths (`list[int]`, *optional*):
            Interactions on the output of each of the four stages. None puts one after every block of a ConvNeXt
            (published), and one on each stage of any other backbone.
        label_update (`str`, defaults to `"gate"`):
            Update of a label token after the multi-modal state was added: `"gate"` (published) or `"none"`.
        aggregation (`str`, defaults to `"concat"`):
            Cross-scale aggregation: `"concat"` (the published run) or `"topdown"` (coarse to fine, the variant that
            the released code holds without running it; here without mixing neighbouring labels).
        pyramid (`str`, defaults to `"none"`):
            On a backbone of one scale (a ViT): `"none"` reads four of its layers; `"simple"` makes maps of four scales
            from its last one, see `HSVLTSimplePyramid`.
        classifier (`str`, defaults to `"per_label"`):
            `"per_label"`: a weight vector a label (published); `"shared"`: one for all, so that labels can be swapped.

        > Speed, the same function

        absorb_projections (`bool`, defaults to `True`):
            Whether attention is computed as `(L Wq Wk^T) X^T` and `(A X) Wv Wo`, never forming keys and values of the
            pixels. Same function, same parameters, less arithmetic; False computes what the released code does.
        label_chunk_size (`int`, *optional*):
            Labels processed at a time at inference; bounds memory for thousands of labels. None: all at once.

        > Not published

        label_stream (`str`, defaults to `"published"`):
            `"tied"`: label tokens are the rows of the classifier, which score the pixels of all four stages at once,
            and attention, without projections, follows these scores; see `HSVLTTiedLabelStream`. Helps small data on a
            pretrained backbone. It reads no label texts, and what says how the published stream attends, updates and
            normalises has no part in it; its pixels are always normalised.
        normalize_visual_tokens (`bool`, defaults to `False`):
            Whether pixels are layer-normalised in front of the attention. Helps small data.
        normalize_label_tokens (`bool`, defaults to `False`):
            Whether label tokens are layer-normalised in front of attention and gate. Helps small data.
        normalize_multimodal_states (`bool`, defaults to `False`):
            Whether each stage's multi-modal states are layer-normalised in front of the aggregation: they start small
            (standard deviation 0.02 to 0.04 was seen). Helps small data.
        label_width (`int`, *optional*):
            Width of the label tokens and multi-modal states in the stages whose maps are wider; keys and values are
            projected to it. None: as wide as the map (published). On a frozen EfficientNet-Lite0, whose last map has
            1,280 channels, most of the weights and of the arithmetic go with 128.
        candidate_labels (`int`, *optional*):
            At inference, the label stream runs for only this many labels an image, proposed by a scorer that learns
            beside it without changing it, see `HSVLTCandidateScorer`. The others have `NOT_EVALUATED` in `logits`,
            whose sigmoid is 0. None: all labels.
        candidate_loss_weight (`float`, defaults to 1.0):
            Weight of the scorer's own loss in training, where `candidate_labels` is set.
        sampled_labels (`int`, *optional*):
            In training, the label stream runs for only the labels that an image of the batch has, and this many of the
            others, drawn at random, whose loss stands for all of them. None: all labels.
        residual_attention (`bool`, defaults to `False`):
            Whether class-specific residual attention on the last map shares in each label's logit; see
            `HSVLTResidualAttention`. Helps small data on a pretrained backbone.
        residual_attention_weight (`float`, defaults to 0.5):
            Its share of the logit, between 0 and 1; the rest is the label stream's.
        text_classes (`int`, *optional*):
            With `residual_attention` and `classifier="shared"`, how many classes of the backbone's own classifier the
            model keeps, from which labels that it was not trained on get their weights by name; see
            `HSVLTAdditions.start_from_classes`, which sets it. None: none are kept.

        > Bookkeeping

        label_seed (`int`, defaults to 0):
            Seed of the random label embeddings that a new model holds until they are set.
        label_text_encoder (`str`, *optional*):
            Text encoder that the label embeddings came from; None: random or unknown. Never loaded from.
        label_pooling (`str`, *optional*):
            How its states became embeddings, `"official"` or `"mean"` (see `label_prompts.encode_labels`).
        label_template (`str`, *optional*):
            Text that each name was put into, for example `"a photo of a {}"`.

        Further fields are those of [`MultiLabelConfig`].
    """

    model_type = "hsvlt"
    renamed_fields = {"label_reading": "label_pooling"}
    auto_classes = auto_map_of("hsvlt", "HSVLT")
    keys_to_ignore_at_inference = [
        "class_ids",
        "hidden_states",
        "label_hidden_states",
        "multimodal_states",
        "attentions",
    ]
    label_fields = (
        *MultiLabelConfig.label_fields,
        *("label_text_encoder", "label_pooling", "label_template"),  # of the embeddings of these labels
    )
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(
            AutoConfig, model_type="convnext", init_kwargs=PRESETS["small"]["backbone_config"]
        )
    }

    # Published
    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int = 448
    label_embedding_dim: int = 768
    num_attention_heads: int = 1
    initializer_range: float | None = 0.02
    # Generalisations
    interaction_depths: list[int] | tuple[int, ...] | None = None
    label_update: str = "gate"
    aggregation: str = "concat"
    pyramid: str = "none"
    classifier: str = "per_label"
    # Speed, the same function
    absorb_projections: bool = True
    label_chunk_size: int | None = None
    # Not published
    label_stream: str = "published"
    normalize_visual_tokens: bool = False
    normalize_label_tokens: bool = False
    normalize_multimodal_states: bool = False
    label_width: int | None = None
    candidate_labels: int | None = None
    candidate_loss_weight: float | int = 1.0
    sampled_labels: int | None = None
    residual_attention: bool = False
    residual_attention_weight: float = 0.5
    text_classes: int | None = None
    # Bookkeeping
    label_seed: int = 0
    label_text_encoder: str | None = None
    label_pooling: str | None = None
    label_template: str | None = None

    @classmethod
    def preset(cls, name: str, **overrides) -> "HSVLTConfig":
        """A published size (`"tiny"`, `"small"`, `"base"`), or `"nano"` for tests and small data.

        Args:
            name (`str`): the size.
            overrides: any field of the configuration. A `backbone_config` dict without `model_type` changes single
                fields of the preset's backbone; with `model_type`, or as a config object, it replaces the backbone.

        Raises:
            ValueError: an unknown size.
        """
        preset = preset_of(PRESETS, name)
        backbone = overrides.pop("backbone_config", {})
        if isinstance(backbone, dict) and "model_type" not in backbone:
            backbone = {**preset["backbone_config"], **backbone}
        return cls(**{**preset, **overrides, "backbone_config": backbone})

    def __post_init__(self, **kwargs):
        # A downloaded configuration must never name code or another repository to load from.
        for key in ("backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs"):
            if kwargs.pop(key, None):
                raise ValueError(
                    f"{key} is not accepted: describe the backbone in backbone_config; to start from pretrained "
                    "weights use HSVLTForImageClassification.from_backbone."
                )
        if isinstance(self.backbone_config, dict):
            self.backbone_config = dict(self.backbone_config)
            own = OWN_BACKBONES.get(self.backbone_config.get("model_type"))
            if own is not None:
                self.backbone_config = own(**self.backbone_config)
        super().__post_init__(**kwargs)
        # CLIP and SigLIP with both towers stand for the one that sees.
        if getattr(self.backbone_config, "vision_config", None) is not None:
            self.backbone_config = self.backbone_config.vision_config
        backbone = self.backbone_config
        if backbone.model_type == "timm_backbone" and not re.fullmatch(r"[\w.-]+", str(backbone.backbone)):
            raise ValueError(
                f"backbone_config.backbone is {backbone.backbone!r}, which is no name of a timm architecture, such as "
                "'resnet50'; weights are loaded by HSVLTForImageClassification.from_backbone."
            )
        # Others say what they have when they are built: towers, and what timm makes.
        stage_names = getattr(backbone, "stage_names", None)
        if backbone.model_type not in BLOCK_BACKBONES and stage_names and len(backbone.out_features or []) != 4:
            if len(stage_names) < 4:
                raise ValueError(
                    f"backbone_config of type {backbone.model_type!r} has {len(stage_names)} stages; HSVLT reads four: "
                    "choose a deeper one, or a hierarchical backbone such as convnext, swin or resnet."
                )
            backbone.set_output_features_output_indices(out_features=_four_of(backbone, stage_names), out_indices=None)

    def validate_architecture(self):
        """As transformers calls it, when made and before saving; a ValueError names the field and what it may be."""
        self._check_choices(
            label_stream=("published", "tied"),
            label_update=("gate", "none"),
            aggregation=("concat", "topdown"),
            pyramid=("none", "simple"),
            classifier=("per_label", "shared"),
        )
        if self.pyramid != "none" and self.backbone_config.model_type in BLOCK_BACKBONES:
            raise ValueError(
                f"pyramid {self.pyramid!r} is for backbones of one scale; a {self.backbone_config.model_type} has four."
            )
        if self.interaction_depths is not None and (
            len(self.interaction_depths) != 4 or any(depth < 1 for depth in self.interaction_depths)
        ):
            raise ValueError(
                f"interaction_depths must be four positive numbers, one a stage, but it is {self.interaction_depths}."
            )
        for field in ("label_chunk_size", "label_width", "candidate_labels", "sampled_labels", "text_classes"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} must be a positive number or None, but it is {value}.")
        if self.candidate_labels is not None and not self.candidate_loss_weight > 0:
            raise ValueError("candidate_loss_weight must be above 0 with candidate_labels, or the scorer never trains.")
        if not 0 < self.residual_attention_weight < 1:
            raise ValueError(
                f"residual_attention_weight must lie between 0 and 1, but it is {self.residual_attention_weight}."
            )
        if self.label_stream == "tied":
            if self.classifier != "per_label" or self.aggregation != "concat":
                raise ValueError('label_stream="tied" needs classifier="per_label" and aggregation="concat".')
            if self.residual_attention:
                raise ValueError('residual_attention is part of label_stream="tied"; set one of the two.')
        if self.text_classes is not None and not (self.residual_attention and self.classifier == "shared"):
            raise ValueError('text_classes belongs to residual_attention with classifier="shared".')
        if self.sampled_labels is not None and self.loss_type not in LOSSES_OF_ENTRIES:
            raise ValueError(
                f"sampled_labels needs a loss that is a sum over labels, but loss_type is {self.loss_type!r}: choose "
                f"one of {', '.join(LOSSES_OF_ENTRIES)}."
            )


def _four_of(backbone: PreTrainedConfig, stage_names: list[str]) -> list[str]:
    """The stages to read: of a backbone that is one stack of layers four evenly spaced, of a pyramid the last four."""
    layers = stage_names[1:]
    if len(layers) > 4 and getattr(backbone, "num_hidden_layers", None) == len(layers):
        return [layers[-(-len(layers) * quarter // 4) - 1] for quarter in (1, 2, 3, 4)]
    return stage_names[-4:]
