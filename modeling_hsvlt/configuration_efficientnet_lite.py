"""EfficientNet-Lite configuration."""

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .configuration_multilabel import preset_of

# What differs from Lite0. Width and depth grow as in EfficientNet, rounded to 8 channels and up to whole blocks; stem,
# last convolution and the depth of the first and the last group stay.
DEEPER = (1, 3, 3, 4, 4, 5, 1)
PRESETS: dict[str, dict] = {
    "lite0": {},
    "lite1": {"group_depths": DEEPER, "image_size": 240},
    "lite2": {"group_channels": (16, 24, 48, 88, 120, 208, 352), "group_depths": DEEPER, "image_size": 260},
}
NUM_GROUPS = 7


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`EfficientNetLiteBackbone`] and [`EfficientNetLiteForImageClassification`]; defaults are Lite0's,
    see [`EfficientNetLiteConfig.preset`] for the others.

    Args:
        stem_channels (`int`, defaults to 32): width of the stem.
        group_channels (`list[int]`): output width of the seven groups of blocks.
        group_depths (`list[int]`): blocks of each group.
        head_channels (`int`, defaults to 1280): width of the last convolution.
        image_size (`int`, defaults to 224): side in pixels that the ImageNet weights were trained on; any size will do.
        out_features (`list[str]`, *optional*): maps to return, of "stage1" (stride 4) to "stage4" (stride 32) and
            "head", the last convolution (stride 32). Default: "head".
        out_indices (`list[int]`, *optional*): the same by number.
    """

    model_type = "efficientnet_lite"

    stem_channels: int = 32
    group_channels: list[int] | tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    group_depths: list[int] | tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    head_channels: int = 1280
    image_size: int = 224
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def preset(cls, name: str, **overrides) -> "EfficientNetLiteConfig":
        """The size `"lite0"`, `"lite1"` or `"lite2"`.

        Raises:
            ValueError: an unknown size.
        """
        return cls(**{**preset_of(PRESETS, name), **overrides})

    def __post_init__(self, **kwargs):
        self.stage_names = [*(f"stage{index}" for index in range(1, 5)), "head"]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raises a ValueError for a wrong number of groups."""
        if len(self.group_channels) != NUM_GROUPS or len(self.group_depths) != NUM_GROUPS:
            raise ValueError(f"group_channels and group_depths must hold {NUM_GROUPS} numbers each.")
