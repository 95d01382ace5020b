"""Weights of other code bases into ours and back.

    # a checkpoint of the released HSVLT, to a folder that AutoModel loads
    python -m training.convert best_model.pth checkpoints/hsvlt-coco --labels coco.txt --label_embeddings bert.npy
    python -m training.convert best_model.pth checkpoints/hsvlt-coco --labels coco.txt --text_encoder bert-base-uncased/
    # back, to what the released code loads
    python -m training.convert checkpoints/hsvlt-coco best_model.pth --to official
    # ImageNet weights from timm or from the original ConvNeXt release, to a folder for `training.train --backbone`
    python -m training.convert convnext_small_22k_1k_384.pth checkpoints/convnext-small --to convnext
    # a checkpoint of CAT (arXiv 2106.05786; ImageNet-1K), to a folder that AutoModel loads
    python -m training.convert cat_small.pth checkpoints/cat-small --to mltr
    # any MlTr folder from 224 px and windows of 7 to 384 px and windows of 12, to go on training there
    python -m training.convert checkpoints/cat-small checkpoints/cat-small-384 --to mltr --image_size 384 \
        --window_size 12

Files are read without running code that they may hold (safetensors, or pickles with `weights_only=True`).

Tensors are only renamed, and 1x1 convolutions become the linear layers that they are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import option, read_options


@dataclass(kw_only=True)
class ConvertOptions:
    source: Path = option(
        reason="file of a state dict; with --to official or mltr, a checkpoint folder of ours",
        positional=True,
        metavar="SOURCE",
    )
    target: Path = option(
        reason="folder to write; with --to official also a .pth or .safetensors file", positional=True, metavar="TARGET"
    )
    to: Literal["hsvlt", "official", "convnext", "mltr"] = option("hsvlt", "what to write")
    labels: Path | None = option(None, "label names in class order, one a line")
    label_embeddings: Path | None = option(None, ".npy file of shape (num_labels, 768)")
    text_encoder: str | None = option(
        None, "folder or Hub id of the BERT that embeds --labels, in the official pooling"
    )
    text_encoder_revision: str | None = option(None, "commit of a Hub id")
    voc_label_text: bool = option(False, "embed diningtable, pottedplant and tvmonitor as two words each")
    image_size: int | None = option(None, "of an MlTr: side of the images to come, in px")
    window_size: int | None = option(None, "of an MlTr: side of the windows to come")
    overwrite: bool = option(False, "replace TARGET where it exists")


def convert_to_hsvlt(args: ConvertOptions) -> None:
    """Writes a checkpoint folder of ours from a state dict of the released HSVLT."""
    import numpy as np
    import torch
    from transformers.image_utils import PILImageResampling

    from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
    from modeling_hsvlt.label_prompts import VOC_LABEL_TEXT, encode_labels, load_text_encoder
    from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

    from .checkpoint.atomic import atomic_folder
    from .checkpoint.folder import save_checkpoint
    from .data.label_names import read_label_names
    from .models.official_hsvlt import official_to_hsvlt
    from .models.state_dicts import read_state_dict

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
        embeddings = encode_labels(names, text_encoder, tokenizer, pooling="official", label_text=label_text)
        encoder = Path(args.text_encoder)
        # Of a folder only the name: checkpoints are published, paths of one's own disk are not.
        provenance = {"encoder": encoder.name if encoder.is_dir() else args.text_encoder, "pooling": "official"}
    else:
        raise ValueError(
            f"'{args.source}' needs its label embeddings, which released checkpoints do not hold: give "
            "--label_embeddings bert.npy, or compute them with --labels labels.txt and --text_encoder FOLDER of "
            "bert-base-uncased."
        )
    model = HSVLTForImageClassification(HSVLTConfig(**config_kwargs))
    model.set_label_embeddings(embeddings, **provenance)
    model.load_state_dict(state_dict | {"hsvlt.label_embeddings.weight": model.hsvlt.label_embeddings.weight})
    # The released code squashes an image to a square, bilinearly, and feeds pixels in [0, 1].
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


def convert_to_official(args: ConvertOptions) -> None:
    """Writes the released layout of one of our checkpoints, and its label embeddings beside it."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import AutoImageProcessor

    from modeling_hsvlt import HSVLTForImageClassification

    from .checkpoint.atomic import whole_file
    from .models.official_hsvlt import hsvlt_to_official

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
    with whole_file(weights) as written:
        (torch.save if weights.suffix == ".pth" else save_file)(state_dict, written)
    with whole_file(embeddings) as written, written.open("xb") as file:
        np.save(file, model.hsvlt.label_embeddings.weight.float().numpy())
    print(f"Label embeddings are in {embeddings}; the released code reads them from its bert.npy.")
    if model.config.num_attention_heads != 1:
        print(f"Set num_heads to {model.config.num_attention_heads} in the released code; its weights do not tell.")
    shifted = any(image_processor.image_mean) or set(image_processor.image_std) != {1.0}
    if image_processor.do_normalize and shifted:
        print(
            f"The released code feeds pixels in [0, 1]; this model expects them normalised with mean "
            f"{list(image_processor.image_mean)} and std {list(image_processor.image_std)}: turn its Normalize on."
        )


def convert_to_convnext(args: ConvertOptions) -> None:
    """Writes a `ConvNextModel` folder from ConvNeXt weights of any of the three layouts."""
    from transformers import ConvNextConfig, ConvNextModel

    from .checkpoint.atomic import atomic_folder
    from .models.convnext import convert_convnext_state_dict, convnext_config
    from .models.state_dicts import read_state_dict

    state_dict = convert_convnext_state_dict(read_state_dict(args.source))
    model = ConvNextModel(ConvNextConfig(**convnext_config(state_dict)))
    # A feature extractor's weights lack the final norm; HSVLT's backbone does not read it.
    state_dict = {**{f"layernorm.{k}": v for k, v in model.layernorm.state_dict().items()}, **state_dict}
    model.load_state_dict(state_dict)
    with atomic_folder(args.target) as folder:
        model.save_pretrained(folder)


def convert_to_mltr(args: ConvertOptions) -> None:
    """Writes a checkpoint folder of MlTr: from a state dict of CAT, or from one of ours for another resolution."""
    from transformers import AutoImageProcessor

    from modeling_hsvlt import MlTrConfig, MlTrForImageClassification
    from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

    from .checkpoint.atomic import atomic_folder
    from .checkpoint.folder import save_checkpoint
    from .data.label_names import read_label_names
    from .models.cat import cat_to_mltr
    from .models.resolution import resize_model
    from .models.state_dicts import read_state_dict

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
    """The command line: 0 when all is done, 2 when something was refused."""
    args = read_options(ConvertOptions, "convert", __doc__, argv)
    convert = {
        "hsvlt": convert_to_hsvlt,
        "official": convert_to_official,
        "convnext": convert_to_convnext,
        "mltr": convert_to_mltr,
    }[args.to]
    try:
        check_target(args.target, args.overwrite, is_checkpoint=args.to != "official")
        convert(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {args.target}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
