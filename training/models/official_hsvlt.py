"""The released HSVLT's tensors under our names, and back."""

import re

from .convnext import CONVNEXT_LAYOUTS, backbone_names, convnext_config, stage_depths
from .state_dicts import StateDict, bare_state_dict, rename_tensors

# Tensors of an interaction under our names and those of the released HSVLT.
INTERACTION = (
    ("attention.query.weight", "attn.query.weight"),
    ("attention.key.weight", "attn.key.weight"),
    ("attention.value.weight", "attn.value.weight"),
    ("attention.out_proj.weight", "attn.proj.weight"),
    ("attention.out_proj.bias", "attn.proj.bias"),
    ("gate.weight", "attn.vis_project.0.weight"),
    ("gate.bias", "attn.vis_project.0.bias"),
    ("multimodal.weight", "attn.project_mm.0.weight"),
    ("multimodal.bias", "attn.project_mm.0.bias"),
)
LABEL_GATE = (("label_gate.in_proj.weight", "res_gate.0.weight"), ("label_gate.out_proj.weight", "res_gate.2.weight"))
# Built by the released code and never called; the last label gate is called, but nothing reads its result (every other
# one is live and in the table, which is asked first).
OFFICIAL_DEAD = re.compile(r"(fuse|norm|head|attn)\.|stages\.\d+\.\d+\.(mlp|norm2|res_gate)\.")


def official_to_hsvlt(state_dict: StateDict) -> tuple[StateDict, dict]:
    """A state dict of the released HSVLT under our names, and what it says about the configuration.

    The released file holds no label embeddings: `hsvlt.label_embeddings.weight` is missing, nothing else. What the
    released code builds without using is left out.

    Args:
        state_dict: as `torch.save(model.state_dict())` of the released code wrote it; a `module.` prefix is stripped.

    Returns:
        `(state_dict, config_kwargs)`; the latter for `HSVLTConfig`. Widths, depths and the number of labels are read
        from the shapes; 448 px and one attention head, which no shape tells, are the released configuration's.

    Raises:
        ValueError: tensors missing or unknown, or a head that does not read the four concatenated states.
    """
    state_dict = bare_state_dict(state_dict)
    depths = stage_depths(state_dict)
    names = _official_names(depths)
    converted = rename_tensors(state_dict, names, OFFICIAL_DEAD, "a checkpoint of the released HSVLT")
    widths = [converted[f"hsvlt.label_stream.stages.{i}.projection.weight"].shape[0] for i in range(len(depths))]
    num_labels, head_width = converted["classifier.weight"].shape
    if head_width != sum(widths):
        raise ValueError(
            f"text_head2.weight reads {head_width} features a label, but the four concatenated states have "
            f"{sum(widths)}: this is a build with another aggregation; only the released model's can be converted."
        )
    config_kwargs = {
        "backbone_config": convnext_config(converted, prefix="hsvlt.backbone."),
        "num_labels": num_labels,
        "label_embedding_dim": converted["hsvlt.label_stream.stages.0.projection.weight"].shape[1],
        "num_attention_heads": 1,
        "image_size": 448,
    }
    return converted, config_kwargs


def hsvlt_to_official(state_dict: StateDict) -> StateDict:
    """The inverse of [`official_to_hsvlt`]: the live tensors of the released layout.

    The released model builds modules that it never calls, so load the result there with `strict=False`. Label
    embeddings are left out, as in released checkpoints.

    Args:
        state_dict: of an [`HSVLTForImageClassification`] with a ConvNeXt backbone, an interaction after every block,
            and the published label update, aggregation and classifier.

    Raises:
        ValueError: a model with tensors that the released layout has no place for, or without some that it needs.
    """
    names = _official_names(stage_depths({key.removeprefix("hsvlt.backbone."): None for key in state_dict}))
    names = {ours: official for official, ours in names.items()}
    converted = rename_tensors(
        state_dict, names, re.compile(r"hsvlt\.label_embeddings\.weight$"), "an HSVLT of the published architecture"
    )
    for key in converted:
        if key.endswith(("vis_project.0.weight", "project_mm.0.weight")):
            converted[key] = converted[key].unsqueeze(-1)
    return converted


def _official_names(depths: list[int]) -> dict[str, str]:
    """Every live tensor of the released HSVLT: {its name there: ours}."""
    backbone = backbone_names(depths, CONVNEXT_LAYOUTS.index("original"))
    names = {official: f"hsvlt.backbone.{ours}" for official, ours in backbone.items()}
    for i, depth in enumerate(depths):
        stage = f"hsvlt.label_stream.stages.{i}"
        names |= {f"langs.{i}.{kind}": f"{stage}.projection.{kind}" for kind in ("weight", "bias")}
        for j in range(depth):
            is_last = i == len(depths) - 1 and j == depth - 1
            for ours, official in INTERACTION if is_last else INTERACTION + LABEL_GATE:
                names[f"stages.{i}.{j}.{official}"] = f"{stage}.layers.{j}.{ours}"
    return names | {f"text_head2.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}
