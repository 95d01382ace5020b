"""CAT weights into MlTr, and MlTr weights to another resolution.

    # a checkpoint of CAT (arXiv 2106.05786; ImageNet-1K), to a folder that AutoModel loads
    python -m training.convert_mltr cat_small.pth checkpoints/cat-small
    # any MlTr folder from 224 px and windows of 7 to 384 px and windows of 12, to go on training there
    python -m training.convert_mltr checkpoints/cat-small checkpoints/cat-small-384 --image_size 384 --window_size 12

CAT is one setting of MlTr (`block_pattern`, `use_absolute_embeddings`), so its tensors are only renamed: the converted
model computes what CAT computes. Start a fine-tuning from the folder with `--init_from` of `training.train`.

Another resolution with the same window is exact but for the position embedding: every tensor stays, and there are more
windows. Another window is an approximation to start from, nothing that was published for MlTr: tables and operators
over a window's pixels are resized bicubically, see `resize_windows`.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor

from modeling_hsvlt import MlTrConfig, MlTrForImageClassification
from modeling_hsvlt.configuration_mltr import CAT_BLOCK
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

from ..checkpoint.atomic import atomic_folder
from ..checkpoint.folder import save_checkpoint
from ..convert import StateDict, bare_state_dict, check_target, read_state_dict, rename_tensors
from ..data.label_names import read_label_names

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
        `(state_dict, config_kwargs)`; the latter for `MlTrConfig`. All is read from shapes but the picture's size where
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


def resize_windows(state_dict: StateDict, source: MlTrConfig, target: MlTrConfig) -> StateDict:
    """Weights of an MlTr for the `image_size` and `window_size` of `target`, where all else is as in `source`.

    With windows of M pixels a side become M': a relative position table is resized from (2M - 1)^2 to (2M' - 1)^2
    offsets; each matrix of the cross-window attention, an operator from a window's pixels to a window's pixels, from
    (M, M, M, M) to (M', M', M', M') and times M^2 / M'^2, since it now sums over that many more pixels; queries also
    times M / M', which keeps their products with the keys, summed over more pixels and divided by M' in place of M.
    What varies little between neighbouring pixels thus keeps its effect. All bicubic.

    Args:
        state_dict: of `MlTrForImageClassification`, `MlTrModel` or `MlTrBackbone` with the configuration `source`.

    Returns:
        A new state dict with the shapes of `target`; tensors that need no change are those given.
    """
    resized = dict(state_dict)
    for name, tensor in state_dict.items():
        if name.endswith("position_embeddings"):
            size = target.grid_sizes[0]
            grid = tensor.unflatten(1, (source.grid_sizes[0],) * 2).permute(0, 3, 1, 2)
            resized[name] = _resize(grid, size).permute(0, 2, 3, 1).flatten(1, 2)
        match = re.search(r"stages\.(\d)\.layers\.\d+\.sublayers\.(\d+)\.attn\.(.+)", name)
        if match is None:
            continue
        stage, sublayer, part = int(match[1]), int(match[2]), match[3]
        old, new = source.window_sizes[stage], target.window_sizes[stage]
        if old == new:
            continue
        if part.endswith("relative_position_bias_table"):
            table = tensor.t().unflatten(1, (2 * old - 1,) * 2).unsqueeze(0)
            resized[name] = _resize(table, 2 * new - 1)[0].flatten(1).t().contiguous()
        elif source.stage_patterns[stage][sublayer] == "cross":
            layers = [_resize_operator(layer, old, new) for layer in tensor.chunk(3 if part.startswith("qkv") else 1)]
            if part.startswith("qkv"):
                layers[0] = layers[0] * (old / new)
            resized[name] = torch.cat(layers)
    return resized


def resize_model(
    model: MlTrForImageClassification, image_size: int | None = None, window_size: int | None = None
) -> MlTrForImageClassification:
    """The model for another picture size or window, by [`resize_windows`]; None keeps what it has."""
    sizes = {
        "image_size": image_size or model.config.image_size,
        "window_size": window_size or model.config.window_size,
    }
    target = MlTrForImageClassification(MlTrConfig.from_dict({**model.config.to_dict(), **sizes}))
    target.load_state_dict(resize_windows(model.state_dict(), model.config, target.config))
    return target


def _resize(maps: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, channels, M, M) to (batch, channels, size, size)."""
    if maps.shape[-1] == size:
        return maps
    return F.interpolate(maps.float(), size=(size, size), mode="bicubic", align_corners=False).to(maps.dtype)


def _resize_operator(layer: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Weight (M^2, M^2) or bias (M^2,) of a linear layer over a window's pixels, to M'^2 of them."""
    if layer.ndim == 2:  # the input's pixels first
        layer = _resize(layer.unflatten(1, (old, old)).unsqueeze(0), new)[0].flatten(1) * (old / new) ** 2
    outputs = layer.reshape(old, old, -1).permute(2, 0, 1).unsqueeze(0)  # (1, M'^2 or 1, M, M)
    return _resize(outputs, new)[0].flatten(1).t().reshape(new**2, *layer.shape[1:]).contiguous()


def convert(args: argparse.Namespace) -> None:
    """Writes the checkpoint folder."""
    if args.source.is_dir():
        model = MlTrForImageClassification.from_pretrained(args.source, use_safetensors=True)
        image_processor = AutoImageProcessor.from_pretrained(args.source)
    else:
        state_dict, config_kwargs = cat_to_mltr(read_state_dict(args.source))
        if args.labels is not None:
            names = read_label_names(args.labels)
            if len(names) != config_kwargs["num_labels"]:
                raise ValueError(
                    f"'{args.labels}' has {len(names)} names, but '{args.source}' has {config_kwargs['num_labels']} "
                    "labels."
                )
            del config_kwargs["num_labels"]
            config_kwargs["id2label"] = dict(enumerate(names))
            config_kwargs["label2id"] = {name: index for index, name in enumerate(names)}
        config = MlTrConfig(**config_kwargs)
        model = MlTrForImageClassification(config)
        model.load_state_dict(state_dict)
        # What CAT was evaluated with: the shorter side to 256 / 224 of the size, bicubic, and the middle of it.
        image_processor = MultiLabelImageProcessor(
            size={"shortest_edge": round(config.image_size * 256 / 224)},
            do_center_crop=True,
            crop_size={"height": config.image_size, "width": config.image_size},
        )
    if args.image_size not in (None, model.config.image_size):
        image_processor.size = {"height": args.image_size, "width": args.image_size}
        image_processor.do_center_crop = False
    model = resize_model(model, args.image_size, args.window_size)
    processor = MultiLabelProcessor(image_processor, id2label=model.config.id2label, thresholds=model.config.thresholds)
    with atomic_folder(args.target) as folder:
        save_checkpoint(folder, model, processor)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert_mltr",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="file of a CAT state dict (.pth, .safetensors), or a folder of ours")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--image_size", type=int, help="side of the pictures to come, in px; default: the source's")
    parser.add_argument("--window_size", type=int, help="side of the windows to come; default: the source's")
    parser.add_argument("--labels", type=Path, help="label names of a CAT file in class order, one a line")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET where it exists")
    args = parser.parse_args(argv)
    try:
        check_target(args.target, args.overwrite)
        convert(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {args.target}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
