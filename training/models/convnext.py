"""ConvNeXt under the names of transformers, of the original release and of timm."""

import re

from .state_dicts import StateDict, bare_state_dict, rename_tensors

# Modules of a ConvNeXt under their names in transformers' ConvNextModel, in the original release (whose names the
# released HSVLT keeps) and in timm. {i} counts stages, {j} blocks; each stage but the first begins with down-sampling.
CONVNEXT_LAYOUTS = ("transformers", "original", "timm")
STEM = (
    ("embeddings.patch_embeddings", "downsample_layers.0.0", "stem.0"),
    ("embeddings.layernorm", "downsample_layers.0.1", "stem.1"),
)
DOWNSAMPLING = (
    ("encoder.stages.{i}.downsampling_layer.0", "downsample_layers.{i}.0", "stages.{i}.downsample.0"),
    ("encoder.stages.{i}.downsampling_layer.1", "downsample_layers.{i}.1", "stages.{i}.downsample.1"),
)
BLOCK = (
    ("encoder.stages.{i}.layers.{j}.dwconv", "stages.{i}.{j}.dwconv", "stages.{i}.blocks.{j}.conv_dw"),
    ("encoder.stages.{i}.layers.{j}.layernorm", "stages.{i}.{j}.norm", "stages.{i}.blocks.{j}.norm"),
    ("encoder.stages.{i}.layers.{j}.pwconv1", "stages.{i}.{j}.pwconv1", "stages.{i}.blocks.{j}.mlp.fc1"),
    ("encoder.stages.{i}.layers.{j}.pwconv2", "stages.{i}.{j}.pwconv2", "stages.{i}.blocks.{j}.mlp.fc2"),
)
LAYER_SCALE = (
    "encoder.stages.{i}.layers.{j}.layer_scale_parameter",
    "stages.{i}.{j}.gamma",
    "stages.{i}.blocks.{j}.gamma",
)
FINAL_NORM = ("layernorm", "norm", "head.norm")
# What is left out: the ImageNet classifier, and the extra norms of transformers' ConvNextBackbone.
CONVNEXT_LEFT_OUT = re.compile(r"(classifier|head|head\.fc)\.(weight|bias)$|hidden_states_norms\.")


def convert_convnext_state_dict(state_dict: StateDict) -> StateDict:
    """ConvNeXt (V1) weights under the names of transformers' `ConvNextModel`.

    Args:
        state_dict: of transformers (`ConvNextModel`, `ConvNextBackbone` or `ConvNextForImageClassification`), of timm
            `convnext_*`, or of the original release, with or without its `{"model": ...}` wrapper. A `module.` prefix
            is stripped, the classifier left out.

    Returns:
        Exactly the keys of a `ConvNextModel`; without the final `layernorm.*`, which HSVLT's backbone lacks, where
        the source has none.

    Raises:
        ValueError: another architecture, or tensors missing or unknown.
    """
    state_dict = bare_state_dict(state_dict)
    state_dict = {key.removeprefix("convnext."): tensor for key, tensor in state_dict.items()}
    layout = next((k for k, name in enumerate(STEM[0]) if f"{name}.weight" in state_dict), None)
    if layout is None:
        raise ValueError(
            "this is no ConvNeXt state dict: none of "
            + ", ".join(f"{name}.weight ({CONVNEXT_LAYOUTS[k]})" for k, name in enumerate(STEM[0]))
            + " is among its keys."
        )
    names = backbone_names(stage_depths(state_dict), layout)
    if f"{FINAL_NORM[layout]}.weight" in state_dict:
        names |= {f"{FINAL_NORM[layout]}.{kind}": f"{FINAL_NORM[0]}.{kind}" for kind in ("weight", "bias")}
    return rename_tensors(state_dict, names, CONVNEXT_LEFT_OUT, f"a ConvNeXt of the {CONVNEXT_LAYOUTS[layout]} layout")


def backbone_names(depths: list[int], layout: int) -> dict[str, str]:
    """Every tensor of a ConvNeXt without its final norm: {name in the layout: name in transformers}."""
    modules = list(STEM)
    scales = []
    for i, depth in enumerate(depths):
        rows = [(row, 0) for row in DOWNSAMPLING if i > 0] + [(row, j) for j in range(depth) for row in BLOCK]
        modules += [tuple(name.format(i=i, j=j) for name in row) for row, j in rows]
        scales += [tuple(name.format(i=i, j=j) for name in LAYER_SCALE) for j in range(depth)]
    names = {f"{row[layout]}.{kind}": f"{row[0]}.{kind}" for row in modules for kind in ("weight", "bias")}
    return names | {row[layout]: row[0] for row in scales}


def stage_depths(state_dict: dict) -> list[int]:
    """Blocks of each stage, from the keys of any of the layouts."""
    blocks: dict[int, set[int]] = {}
    for key in state_dict:
        if match := re.match(r"(?:encoder\.)?stages\.(\d+)\.(?:blocks\.|layers\.)?(\d+)\.", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    return [len(blocks[i]) for i in sorted(blocks)]


def convnext_config(state_dict: StateDict, prefix: str = "") -> dict:
    """Fields of a `ConvNextConfig`, from transformers' names."""
    stem = state_dict[f"{prefix}embeddings.patch_embeddings.weight"]
    depths = stage_depths({key.removeprefix(prefix): None for key in state_dict})
    scales = [state_dict[f"{prefix}encoder.stages.{i}.layers.0.layer_scale_parameter"] for i in range(len(depths))]
    return {
        "model_type": "convnext",
        "hidden_sizes": [scale.shape[0] for scale in scales],
        "depths": depths,
        "num_stages": len(depths),
        "num_channels": stem.shape[1],
        "patch_size": stem.shape[-1],
    }
