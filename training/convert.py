"""Weights of other code bases into ours and back.

    # a checkpoint of the released HSVLT, to a folder that AutoModel loads
    hsvlt convert best_model.pth checkpoints/hsvlt-coco --labels coco.txt --label_embeddings bert.npy
    hsvlt convert best_model.pth checkpoints/hsvlt-coco --labels coco.txt --text_encoder bert-base-uncased/
    # back, to what the released code loads
    hsvlt convert checkpoints/hsvlt-coco best_model.pth --to official
    # ImageNet weights from timm or from the original ConvNeXt release, to a folder for `hsvlt train --backbone`
    hsvlt convert convnext_small_22k_1k_384.pth checkpoints/convnext-small --to convnext
    # a checkpoint of CAT (arXiv 2106.05786; ImageNet-1K), to a folder that AutoModel loads
    hsvlt convert cat_small.pth checkpoints/cat-small --to mltr
    # any MlTr folder from 224 px and windows of 7 to 384 px and windows of 12, to go on training there
    hsvlt convert checkpoints/cat-small checkpoints/cat-small-384 --to mltr --image_size 384 \
        --window_size 12

Files are read without running code that they may hold (safetensors, or pickles with `weights_only=True`).

Tensors are only renamed, and 1x1 convolutions become the linear layers that they are.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import command, option
from .say import say_next


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


def run(args: ConvertOptions) -> None:
    """Reads, converts and writes."""
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    from modeling_hsvlt.processing_multilabel import MultiLabelProcessor

    from .checkpoint.atomic import atomic_folder
    from .checkpoint.folder import save_checkpoint
    from .models.convert import convnext_from_weights, hsvlt_from_official, mltr_from, write_official

    check_target(args.target, args.overwrite, is_checkpoint=args.to != "official")
    if args.to == "official":
        print("\n".join(write_official(args.source, args.target, overwrite=args.overwrite)))
    elif args.to == "convnext":
        model = convnext_from_weights(args.source)
        statistics = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}  # of all its releases
        with atomic_folder(args.target) as folder:
            model.save_pretrained(folder)
            ConvNextImageProcessorPil(**statistics).save_pretrained(folder)
    else:
        if args.to == "hsvlt":
            names = ("labels", "label_embeddings", "text_encoder", "text_encoder_revision", "voc_label_text")
            model, processor = hsvlt_from_official(args.source, **{name: getattr(args, name) for name in names})
        else:
            sizes = {"image_size": args.image_size, "window_size": args.window_size}
            model, processor = mltr_from(args.source, labels=args.labels, **sizes)
        config = model.config
        processor = MultiLabelProcessor(processor, id2label=config.id2label, thresholds=config.thresholds)
        with atomic_folder(args.target) as folder:
            save_checkpoint(folder, model, processor)
    print(f"Wrote {args.target}.")
    if args.to == "convnext":
        say_next("train", "photos", "FOLDER", "--backbone", args.target)
    elif args.to != "official":
        say_next("tag", args.target, "photo.jpg")


def check_target(target: Path, overwrite: bool, is_checkpoint: bool = True) -> None:
    """Refuse to write over what is there without being told to, and over a folder that holds no checkpoint.

    Raises:
        FileExistsError: saying what to do.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"'{target}' exists: choose another TARGET, or replace it with --overwrite.")
    if target.exists() and is_checkpoint and not (target / "config.json").is_file():
        raise FileExistsError(f"'{target}' is no checkpoint folder, so it is not replaced: choose another TARGET.")


main = command(run, ConvertOptions, "convert", __doc__, (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
