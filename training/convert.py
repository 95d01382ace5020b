"""Weights of other code bases into ours and back.

    # a checkpoint of the released HSVLT, to a folder that AutoModel loads
    python -m training.convert best_model.pth checkpoints/hsvlt-coco --labels coco.txt --label_embeddings bert.npy
    python -m training.convert best_model.pth checkpoints/hsvlt-coco --labels coco.txt --text_encoder bert-base-uncased/
    # back, to what the released code loads
    python -m training.convert checkpoints/hsvlt-coco best_model.pth --to official
    # ImageNet weights from timm or from the original ConvNeXt release, to a folder for `training.train --backbone`
    python -m training.convert convnext_small_22k_1k_384.pth checkpoints/convnext-small --to convnext

Files are read without running code that they may hold (safetensors, or pickles with `weights_only=True`).

Tensors are only renamed, and 1x1 convolutions become the linear layers that they are.
"""

import argparse
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, ConvNextConfig, ConvNextModel
from transformers.image_utils import PILImageResampling

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from modeling_hsvlt.label_prompts import VOC_LABEL_TEXT, encode_labels, load_text_encoder
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor
from training.checkpoint.atomic import atomic_folder
from training.checkpoint.folder import save_checkpoint
from training.data.label_names import read_label_names

StateDict = dict[str, torch.Tensor]

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
# Linear layers that other code keeps as 1x1 convolutions: (out, in, 1) or (out, in, 1, 1).
POINTWISE = re.compile(r"\.(pwconv1|pwconv2|gate|multimodal)\.weight$")


def convert_convnext_state_dict(state_dict: StateDict) -> StateDict:
    """ConvNeXt (V1) weights under the names of transformers' `ConvNextModel`.

    Args:
        state_dict: of transformers (`ConvNextModel`, `ConvNextBackbone` or `ConvNextForImageClassification`), of timm
            `convnext_*`, or of the original release, with or without its `{"model": ...}` wrapper. A `module.` prefix
            is stripped, the classifier left out.

    Returns:
        Exactly the keys of a `ConvNextModel`; without the final `layernorm.*`, which HSVLT's trunk does not have, where
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
    names = _trunk_names(_depths(state_dict), layout)
    if f"{FINAL_NORM[layout]}.weight" in state_dict:
        names |= {f"{FINAL_NORM[layout]}.{kind}": f"{FINAL_NORM[0]}.{kind}" for kind in ("weight", "bias")}
    return rename_tensors(state_dict, names, CONVNEXT_LEFT_OUT, f"a ConvNeXt of the {CONVNEXT_LAYOUTS[layout]} layout")


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
    depths = _depths(state_dict)
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
        "backbone_config": _convnext_config(converted, prefix="hsvlt.trunk."),
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
        state_dict: of an [`HSVLTForImageClassification`] with a ConvNeXt trunk, an interaction after every block, and
            the published label update, aggregation and classifier.

    Raises:
        ValueError: a model with tensors that the released layout has no place for, or without some that it needs.
    """
    names = _official_names(_depths({key.removeprefix("hsvlt.trunk."): None for key in state_dict}))
    names = {ours: official for official, ours in names.items()}
    converted = rename_tensors(
        state_dict, names, re.compile(r"hsvlt\.label_embeddings\.weight$"), "an HSVLT of the published architecture"
    )
    for key in converted:
        if key.endswith(("vis_project.0.weight", "project_mm.0.weight")):
            converted[key] = converted[key].unsqueeze(-1)
    return converted


def _trunk_names(depths: list[int], layout: int) -> dict[str, str]:
    """Every tensor of a ConvNeXt without its final norm: {name in the layout: name in transformers}."""
    modules = list(STEM)
    scales = []
    for i, depth in enumerate(depths):
        rows = [(row, 0) for row in DOWNSAMPLING if i > 0] + [(row, j) for j in range(depth) for row in BLOCK]
        modules += [tuple(name.format(i=i, j=j) for name in row) for row, j in rows]
        scales += [tuple(name.format(i=i, j=j) for name in LAYER_SCALE) for j in range(depth)]
    names = {f"{row[layout]}.{kind}": f"{row[0]}.{kind}" for row in modules for kind in ("weight", "bias")}
    return names | {row[layout]: row[0] for row in scales}


def _official_names(depths: list[int]) -> dict[str, str]:
    """Every live tensor of the released HSVLT: {its name there: ours}."""
    trunk = _trunk_names(depths, CONVNEXT_LAYOUTS.index("original"))
    names = {official: f"hsvlt.trunk.{ours}" for official, ours in trunk.items()}
    for i, depth in enumerate(depths):
        stage = f"hsvlt.label_stream.stages.{i}"
        names |= {f"langs.{i}.{kind}": f"{stage}.projection.{kind}" for kind in ("weight", "bias")}
        for j in range(depth):
            is_last = i == len(depths) - 1 and j == depth - 1
            for ours, official in INTERACTION if is_last else INTERACTION + LABEL_GATE:
                names[f"stages.{i}.{j}.{official}"] = f"{stage}.layers.{j}.{ours}"
    return names | {f"text_head2.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}


def _depths(state_dict: dict) -> list[int]:
    """Blocks of each stage, from the keys of any of the layouts."""
    blocks: dict[int, set[int]] = {}
    for key in state_dict:
        if match := re.match(r"(?:encoder\.)?stages\.(\d+)\.(?:blocks\.|layers\.)?(\d+)\.", key):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    return [len(blocks[i]) for i in sorted(blocks)]


def rename_tensors(state_dict: StateDict, names: dict[str, str], left_out: re.Pattern, what: str) -> StateDict:
    """Tensors under the names that `names` maps theirs to; 1x1 convolutions as the linear layers that they are.

    Raises:
        ValueError: a tensor of `names` is missing, or there is one that is neither among them nor `left_out`.
    """
    missing = [key for key in names if key not in state_dict]
    unknown = [key for key in state_dict if key not in names and not left_out.match(key)]
    if missing or unknown:
        raise ValueError(
            f"this is not {what}: "
            + " and ".join(
                f"{len(keys)} tensors are {fault} (the first is {keys[0]})"
                for keys, fault in ((missing, "missing"), (unknown, "unknown"))
                if keys
            )
            + "."
        )
    renamed = {ours: state_dict[key] for key, ours in names.items()}
    return {key: tensor.flatten(1) if POINTWISE.search(key) else tensor for key, tensor in renamed.items()}


def bare_state_dict(state_dict: dict) -> StateDict:
    """The tensors alone: out of a wrapper such as `{"model": ...}`, without the `module.` of data-parallel training."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    return {str(key).removeprefix("module."): tensor for key, tensor in state_dict.items()}


def _convnext_config(state_dict: StateDict, prefix: str = "") -> dict:
    """Fields of a `ConvNextConfig`, from transformers' names."""
    stem = state_dict[f"{prefix}embeddings.patch_embeddings.weight"]
    depths = _depths({key.removeprefix(prefix): None for key in state_dict})
    scales = [state_dict[f"{prefix}encoder.stages.{i}.layers.0.layer_scale_parameter"] for i in range(len(depths))]
    return {
        "model_type": "convnext",
        "hidden_sizes": [scale.shape[0] for scale in scales],
        "depths": depths,
        "num_stages": len(depths),
        "num_channels": stem.shape[1],
        "patch_size": stem.shape[-1],
    }


def read_state_dict(source: Path) -> dict:
    """Tensors of a `.safetensors` file, or of a pickle as far as it holds tensors alone; on the CPU.

    Raises:
        ValueError: neither, or a pickle with anything that would have to be executed.
        FileNotFoundError: no such file.
    """
    if not source.is_file():
        raise FileNotFoundError(f"'{source}' is not a file: give the .safetensors or .pth file of the state dict.")
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        state_dict = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"'{source}' is not a file of tensors alone, and more is not loaded, for it could run code: save the bare "
            f"state dict where the file is trusted ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"'{source}' holds a {type(state_dict).__name__} and no state dict.")
    return state_dict


def convert_to_hsvlt(args: argparse.Namespace) -> None:
    """Writes a checkpoint folder of ours from a state dict of the released HSVLT."""
    state_dict, config_kwargs = official_to_hsvlt(read_state_dict(args.source))
    if args.labels is not None:
        names = read_label_names(args.labels)
        if len(names) != config_kwargs["num_labels"]:
            raise ValueError(
                f"'{args.labels}' has {len(names)} names, but '{args.source}' has {config_kwargs['num_labels']} labels."
            )
        del config_kwargs["num_labels"]
        config_kwargs["id2label"] = dict(enumerate(names))
        config_kwargs["label2id"] = {name: index for index, name in enumerate(names)}
    provenance = {}
    if args.label_embeddings is not None:
        embeddings = torch.from_numpy(np.load(args.label_embeddings, allow_pickle=False)).float()
    elif args.text_encoder is not None and args.labels is not None:
        text_encoder, tokenizer = load_text_encoder(args.text_encoder, args.text_encoder_revision)
        label_text = VOC_LABEL_TEXT if args.voc_label_text else None
        embeddings = encode_labels(names, text_encoder, tokenizer, reading="official", label_text=label_text)
        encoder = Path(args.text_encoder)
        # Of a folder only the name: checkpoints are published, paths of one's own disk are not.
        provenance = {"encoder": encoder.name if encoder.is_dir() else args.text_encoder, "reading": "official"}
    else:
        raise ValueError(
            f"'{args.source}' needs its label embeddings, which released checkpoints do not hold: give "
            "--label_embeddings bert.npy, or compute them with --labels labels.txt and --text_encoder FOLDER of "
            "bert-base-uncased."
        )
    model = HSVLTForImageClassification(HSVLTConfig(**config_kwargs))
    model.set_label_embeddings(embeddings, **provenance)
    model.load_state_dict(state_dict | {"hsvlt.label_embeddings.weight": model.hsvlt.label_embeddings.weight})
    # The released code squashes a picture to a square, bilinearly, and feeds pixels in [0, 1].
    side = model.config.image_size
    image_processor = MultiLabelImageProcessor(
        size={"height": side, "width": side},
        resample=PILImageResampling.BILINEAR,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    processor = MultiLabelProcessor(image_processor, id2label=model.config.id2label)
    with atomic_folder(args.target) as folder:
        save_checkpoint(folder, model, processor)


def convert_to_official(args: argparse.Namespace) -> None:
    """Writes the released layout of one of our checkpoints, and its label embeddings beside it."""
    model = HSVLTForImageClassification.from_pretrained(args.source, use_safetensors=True)
    state_dict = hsvlt_to_official(model.state_dict())
    image_processor = AutoImageProcessor.from_pretrained(args.source)
    weights = args.target
    if weights.suffix not in (".pth", ".safetensors"):
        weights = weights / "best_model.safetensors"
    embeddings = weights.with_suffix(".npy")
    if embeddings.exists() and not args.overwrite:
        raise FileExistsError(f"'{embeddings}' exists: choose another TARGET, or replace both with --overwrite.")
    weights.parent.mkdir(parents=True, exist_ok=True)
    if weights.suffix == ".pth":
        torch.save(state_dict, weights)
    else:
        save_file(state_dict, weights)
    np.save(embeddings, model.hsvlt.label_embeddings.weight.float().numpy())
    print(f"Label embeddings are in {embeddings}; the released code reads them from its bert.npy.")
    if model.config.num_attention_heads != 1:
        print(f"Set num_heads to {model.config.num_attention_heads} in the released code; its weights do not tell.")
    shifted = any(image_processor.image_mean) or set(image_processor.image_std) != {1.0}
    if image_processor.do_normalize and shifted:
        print(
            f"The released code feeds pixels in [0, 1]; this model expects them normalised with mean "
            f"{list(image_processor.image_mean)} and std {list(image_processor.image_std)}: turn its Normalize on."
        )


def convert_to_convnext(args: argparse.Namespace) -> None:
    """Writes a `ConvNextModel` folder from ConvNeXt weights of any of the three layouts."""
    state_dict = convert_convnext_state_dict(read_state_dict(args.source))
    model = ConvNextModel(ConvNextConfig(**_convnext_config(state_dict)))
    # A feature extractor's weights lack the final norm; HSVLT's trunk does not read it.
    state_dict = {**{f"layernorm.{k}": v for k, v in model.layernorm.state_dict().items()}, **state_dict}
    model.load_state_dict(state_dict)
    with atomic_folder(args.target) as folder:
        model.save_pretrained(folder)


def check_target(target: Path, overwrite: bool, is_checkpoint: bool = True) -> None:
    """Refuse to write over what is there without being told to, and over a folder that holds no checkpoint.

    Raises:
        FileExistsError: saying what to do.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"'{target}' exists: choose another TARGET, or replace it with --overwrite.")
    if target.exists() and is_checkpoint and not (target / "config.json").is_file():
        raise FileExistsError(f"'{target}' is no checkpoint folder, so it is not replaced: choose another TARGET.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="file of a state dict; with --to official, a checkpoint folder of ours"
    )
    parser.add_argument(
        "target", type=Path, help="folder to write; with --to official also a .pth or .safetensors file"
    )
    parser.add_argument("--to", choices=("hsvlt", "official", "convnext"), default="hsvlt", help="what to write")
    parser.add_argument("--labels", type=Path, help="label names in class order, one a line")
    parser.add_argument("--label_embeddings", type=Path, help=".npy file of shape (num_labels, 768)")
    parser.add_argument(
        "--text_encoder", help="folder or Hub id of the BERT that embeds --labels, in the official reading"
    )
    parser.add_argument("--text_encoder_revision", help="commit of a Hub id")
    parser.add_argument(
        "--voc_label_text", action="store_true", help="embed diningtable, pottedplant and tvmonitor as two words each"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET where it exists")
    args = parser.parse_args(argv)
    convert = {"hsvlt": convert_to_hsvlt, "official": convert_to_official, "convnext": convert_to_convnext}[args.to]
    try:
        check_target(args.target, args.overwrite, is_checkpoint=args.to != "official")
        convert(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {args.target}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
