"""What the configurations of HSVLT, MlTr and HP-DVAL share: loss, what was fitted for the labels, and what a downloaded
config.json must not ask for.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .label_names import check_label_names, in_order

logger = logging.get_logger(__name__)

CUSTOM_PIPELINES = {
    "multi-label-image-classification": {
        "impl": "pipeline_multilabel.MultiLabelImageClassificationPipeline",
        "pt": ["AutoModelForImageClassification"],
        "type": "image",
    }
}


def auto_map_of(name: str, classes: str) -> dict[str, str]:
    """`auto_map` of a model: where a checkpoint's files hold its classes. AutoModel gives the classifier."""
    model = f"modeling_{name}.{classes}ForImageClassification"
    config = f"configuration_{name}.{classes}Config"
    return {"AutoConfig": config, "AutoModel": model, "AutoModelForImageClassification": model}


def preset_of(presets: Mapping[str, dict], name: str) -> dict[str, Any]:
    """A copy of the fields of the size `name`.

    Raises:
        ValueError: an unknown size.
    """
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; choose one of {list(presets)}.")
    return copy.deepcopy(presets[name])


@strict
class MultiLabelConfig(PreTrainedConfig):
    r"""
    Base of the configurations. What belongs to a label set goes with it: as soon as `id2label` (or `num_labels`) gives
    other names, whatever way that happens, [`forget_labels`] drops the fields in `label_fields`, with a warning.

    Args:
        loss_type (`str`, defaults to `"bce"`):
            Training loss, a key of `losses_multilabel.MULTILABEL_LOSSES`.
        loss_kwargs (`dict`, *optional*):
            Arguments of that loss.
        thresholds (`list[float]`, *optional*):
            Score from which on each label counts as present; None until fitted on validation data.
        threshold_info (`dict`, *optional*):
            How they were fitted: objective, target, data set, split, its fingerprint, date. Nothing computes with it.
        calibration_info (`dict`, *optional*):
            How the classifier was calibrated: method, data as above, and the `scale` and `bias` of each label's logit
            that its weights hold since, so that it can be undone. Nothing at inference reads it.
    """

    # File and class of the model in this package, for `auto_map`; subclasses set it.
    auto_classes: ClassVar[dict[str, str]] = {}
    # What `custom_pipelines` becomes; the package, where it is imported, has a reason for another kind of dict.
    custom_pipelines_class = dict
    # What fields were called in configurations from before 0.1, and are called now. For one release.
    renamed_fields: ClassVar[dict[str, str]] = {}
    # Fields that were fitted for, or made from, these very labels.
    label_fields: ClassVar[tuple[str, ...]] = ("thresholds", "threshold_info", "calibration_info")

    loss_type: str = "bce"
    loss_kwargs: dict | None = None
    thresholds: list[float] | tuple[float, ...] | None = None
    threshold_info: dict | None = None
    calibration_info: dict | None = None
    problem_type: str | None = "multi_label_classification"

    def __post_init__(self, **kwargs):
        for before in self.renamed_fields.keys() & kwargs.keys():
            setattr(self, self.renamed_fields[before], kwargs.pop(before))
        kwargs.setdefault("auto_map", dict(self.auto_classes))
        kwargs.setdefault("custom_pipelines", dict(CUSTOM_PIPELINES))
        super().__post_init__(**kwargs)
        self._refuse_kernel_repositories()
        if self.thresholds is not None and not all(map(math.isfinite, self.thresholds)):
            raise ValueError(f"thresholds {list(self.thresholds)[:10]} hold one that is not finite; fit them again.")
        if self.thresholds is not None and len(self.thresholds) != self.num_labels:
            self.forget_labels(f"there are {len(self.thresholds)} thresholds for {self.num_labels} labels")

    def __setattr__(self, key, value):
        if key == "custom_pipelines" and isinstance(value, dict):
            value = self.custom_pipelines_class(value)
        if key == "id2label" and "id2label" in self.__dict__:
            before = self.__dict__["id2label"]
            super().__setattr__(key, value)
            # Names are first given by the constructor, and once more with whole numbers for keys.
            if before is not None and (value is None or in_order(before) != in_order(value)):
                self.forget_labels("the label names have changed")
        else:
            super().__setattr__(key, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers. Of `kwargs`, label names are applied first, so that thresholds beside them stay."""
        names = ("id2label", "label2id")
        ordered = {key: kwargs[key] for key in names if key in kwargs}
        return super().from_dict(config_dict, **ordered, **{k: v for k, v in kwargs.items() if k not in names})

    def set_label_names(self, names: Sequence[str]) -> None:
        """Sets `id2label` and `label2id` to these names, in order; what belongs to other names is dropped.

        Raises:
            ValueError: no names, one twice, or what cannot be one, see `label_names.fault_of_label_name`.
        """
        names = [str(name) for name in names]
        check_label_names(names)
        if not names:
            raise ValueError("names is empty.")
        self.id2label = dict(enumerate(names))
        self.label2id = {name: index for index, name in enumerate(names)}

    def forget_labels(self, reason: str) -> None:
        """Drops what belongs to a label set, the fields in `label_fields`, and says so if there was something.

        Args:
            reason (`str`): why, for the warning.
        """
        dropped = [field for field in self.label_fields if getattr(self, field, None) is not None]
        for field in dropped:
            setattr(self, field, None)
        if dropped:
            logger.warning(
                f"Dropped from the configuration: {', '.join(dropped)}; {reason}. Fit thresholds again on validation "
                "data; weights and label embeddings stay what they were until they are set or trained."
            )

    def _check_choices(self, **choices: Sequence[str]) -> None:
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, but it is {getattr(self, field)!r}.")

    def _refuse_kernel_repositories(self) -> None:
        """Refuses an attention implementation that is the name of a repository, here and in sub-configurations.

        transformers fetches such a kernel and runs it (`attn_implementation="org/name"`). Whoever loads a model may ask
        for that, as an argument of `from_pretrained`; the file that came with the weights may not.
        """
        for part in (self, *(getattr(self, name, None) for name in self.sub_configs)):
            asked = getattr(part, "_attn_implementation", None)
            if "/" in str(asked or ""):
                raise ValueError(
                    f"This configuration asks for the attention kernel {asked!r}, which is code in another repository: "
                    "take it out of config.json; if you trust it, give attn_implementation to from_pretrained yourself."
                )
