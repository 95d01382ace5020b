"""Backbones of timm, which is not needed for anything else: transformers' own `timm_backbone`, at four places."""

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.timm_backbone import TimmBackboneConfig
from transformers.models.timm_backbone.modeling_timm_backbone import TimmBackbone
from transformers.utils import is_timm_available

from .load_pretrained import WEIGHTS, check_finite, file_of, load_pretrained


def require_timm(name: str) -> None:
    """
    Raises:
        ImportError: timm is not installed.
    """
    if not is_timm_available():
        raise ImportError(f"the backbone {name!r} is one of timm, which is not installed: pip install timm.")


def build_timm(config: TimmBackboneConfig, **weights) -> TimmBackbone:
    """The backbone that `config` describes, at the places that it lists if these are four; else at the four coarsest of
    its resolutions, or at four evenly spaced blocks of a model of one resolution, which are noted in it.

    Args:
        weights: of `timm.create_model`; without them weights are random.
    """
    require_timm(str(config.backbone))
    options = dict(weights)
    try:  # a vision transformer reads other sizes than its own only if told so
        whole = _without_weights(config, dynamic_img_size=True)
        options["dynamic_img_size"] = True
    except TypeError:
        whole = _without_weights(config)
    if len(config.out_indices or ()) != 4:
        strides = [stage["reduction"] for stage in whole._backbone.feature_info.info]
        last = {stride: index for index, stride in enumerate(strides)}
        count = len(strides)
        if len(last) == 1 and count >= 4:
            config.out_indices = [-(-count * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        elif len(last) >= 4:
            config.out_indices = sorted(last.values())[-4:]
        else:
            raise ValueError(f"timm's {config.backbone} has {count} places to read, of {len(last)} resolutions")
    return TimmBackbone._from_config(config, **options)


def _without_weights(config: TimmBackboneConfig, **options) -> TimmBackbone:
    with torch.device("meta"):
        return TimmBackbone(TimmBackboneConfig(backbone=config.backbone, num_channels=config.num_channels), **options)


def gives_channels_last(model: torch.nn.Module) -> bool:
    """Whether this is a model of timm whose maps are (B, H, W, C), as those of its Swins are."""
    output_format = getattr(getattr(model, "_backbone", None), "output_fmt", None)
    return getattr(output_format, "value", output_format) == "NHWC"


def load_timm(config: TimmBackboneConfig, source: str, revision: str | None = None) -> TimmBackbone:
    """The backbone with the weights of `source`, a folder or Hub id in timm's format: safetensors alone.

    Raises:
        OSError: there is no such file.
        ValueError: its tensors are of another architecture, or hold numbers that are not finite.
    """
    path = file_of(source, WEIGHTS, {} if revision is None else {"revision": revision})
    if path is None:
        raise OSError(f"{source} holds no {WEIGHTS}, and other formats of weights are not read.")
    weights = load_file(path)
    check_finite(weights, source)
    fields = {name: getattr(config, name) for name in ("backbone", "num_channels", "out_indices")}
    try:
        overlay = {"state_dict": weights, "source": ""}
        return build_timm(TimmBackboneConfig(**fields), pretrained=True, pretrained_cfg_overlay=overlay)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights of {source} do not fit timm's {config.backbone}: {reason}") from error


def backbone_config_of(source: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of the backbone at `source`, a folder or Hub id in transformers' format or in timm's.

    Raises:
        ImportError: timm's, and timm is not installed.
        ValueError: timm's, with arguments for its code.
    """
    hub = {} if revision is None else {"revision": revision}
    try:
        fields = PreTrainedConfig.get_config_dict(source, **hub)[0]
    except Exception:
        fields = {}  # which load_pretrained tells in a sentence
    if fields.get("model_type") != "timm_wrapper":
        return load_pretrained(AutoConfig, source, revision=revision)
    require_timm(str(fields.get("architecture")))
    if fields.get("model_args"):
        raise ValueError(f"{source} changes timm's {fields['architecture']} (model_args), which is not supported.")
    config = TimmBackboneConfig(backbone=fields.get("architecture"))
    config._commit_hash = fields.get("_commit_hash")
    return config
