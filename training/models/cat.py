"""CAT's weights as an MlTr.

CAT is one setting of MlTr (`block_pattern`, `use_absolute_embeddings`), so its tensors are only renamed: the converted
model computes what CAT computes. Start a fine-tuning from the folder with `--init_from` of `training.train`.
"""

import re

from modeling_hsvlt.configuration_mltr import CAT_BLOCK

from .state_dicts import StateDict, bare_state_dict, rename_tensors

# CAT's three blocks of a group, each an attention and an MLP: six sublayers of one of our blocks.
CAT_GROUP = ("pre_ipsa_blocks", "cpsa_blocks", "post_ipsa_blocks")
# Buffers that our model computes.
CAT_LEFT_OUT = re.compile(r"layers\.\d+\.(pre|post)_ipsa_blocks\.\d+\.attn\.relative_position_index$")


def cat_names(depths: list[int], qkv_bias: bool = True, absolute_embeddings: bool = True) -> dict[str, str]:
    """Every tensor of a CAT with these groups a stage: {its name there: its name in `MlTrForImageClassification`}."""
    modules = {
        "patch_embed.proj": "mltr.embeddings.patch_embeddings.projection",
        "patch_embed.norm": "mltr.embeddings.norm",
        "norm": "mltr.layernorm",
        "head": "classifier",
    }
    names = {"ape": "mltr.embeddings.position_embeddings"} if absolute_embeddings else {}
    for i, depth in enumerate(depths):
        stage = f"mltr.encoder.stages.{i}"
        if i > 0:  # CAT's stages end with their merging, ours begin with it
            modules[f"layers.{i - 1}.downsample.norm"] = f"{stage}.merging.norm"
            names[f"layers.{i - 1}.downsample.reduction.weight"] = f"{stage}.merging.reduction.weight"
        for j in range(depth):
            for k, blocks in enumerate(CAT_GROUP):
                block = f"layers.{i}.{blocks}.{j}"
                attention, mlp = (f"{stage}.layers.{j}.sublayers.{2 * k + offset}" for offset in (0, 1))
                modules[f"{block}.norm1"] = f"{attention}.norm"
                modules[f"{block}.attn.proj"] = f"{attention}.attn.proj"
                modules[f"{block}.norm2"] = f"{mlp}.norm"
                modules[f"{block}.mlp.fc1"] = f"{mlp}.mlp.fc1"
                modules[f"{block}.mlp.fc2"] = f"{mlp}.mlp.fc2"
                for kind in ("weight", "bias") if qkv_bias else ("weight",):
                    names[f"{block}.attn.qkv.{kind}"] = f"{attention}.attn.qkv.{kind}"
                if blocks != "cpsa_blocks":
                    table = "relative_position_bias_table"
                    names[f"{block}.attn.{table}"] = f"{attention}.attn.relative_position_bias.{table}"
    return names | {f"{cat}.{kind}": f"{ours}.{kind}" for cat, ours in modules.items() for kind in ("weight", "bias")}


def cat_to_mltr(state_dict: dict) -> tuple[StateDict, dict]:
    """A state dict of CAT under the names of `MlTrForImageClassification`, and what it says about the configuration.

    Args:
        state_dict: of CAT's classification model, with or without a `{"model": ...}` wrapper.

    Returns:
        `(state_dict, config_kwargs)`; the latter for `MlTrConfig`. All is read from shapes but the image's size where
        there is no position embedding, then 8 windows a side as in all released configurations, and the
        drop path rate, which stays the default.

    Raises:
        ValueError: tensors missing or unknown.
    """
    state_dict = bare_state_dict(state_dict)
    depths = [0] * 4
    for key in state_dict:
        if match := re.match(r"layers\.([0-3])\.cpsa_blocks\.(\d+)\.", key):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    qkv_bias = "layers.0.cpsa_blocks.0.attn.qkv.bias" in state_dict
    names = cat_names(depths, qkv_bias=qkv_bias, absolute_embeddings="ape" in state_dict)
    converted = rename_tensors(state_dict, names, CAT_LEFT_OUT, "a CAT classifier")

    stem = state_dict["patch_embed.proj.weight"]
    blocks = [f"layers.{i}.pre_ipsa_blocks.0" for i in range(4)]
    window_size = round(state_dict["layers.0.cpsa_blocks.0.attn.qkv.weight"].shape[1] ** 0.5)
    grid = round(state_dict["ape"].shape[1] ** 0.5) if "ape" in state_dict else 8 * window_size
    config_kwargs = {
        "image_size": grid * stem.shape[-1],
        "patch_size": stem.shape[-1],
        "num_channels": stem.shape[1],
        "embed_dim": stem.shape[0],
        "depths": depths,
        "num_heads": [state_dict[f"{block}.attn.relative_position_bias_table"].shape[1] for block in blocks],
        "window_size": window_size,
        "mlp_ratio": state_dict[f"{blocks[0]}.mlp.fc1.weight"].shape[0] / stem.shape[0],
        "qkv_bias": qkv_bias,
        "use_absolute_embeddings": "ape" in state_dict,
        "block_pattern": list(CAT_BLOCK),
        "num_labels": state_dict["head.weight"].shape[0],
    }
    return converted, config_kwargs
