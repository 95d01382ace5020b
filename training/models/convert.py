"""Checkpoints of other code bases as models and processors of ours, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor, BaseImageProcessor, ConvNextConfig, ConvNextModel, PreTrainedModel
from transformers.image_utils import PILImageResampling

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MlTrConfig, MlTrForImageClassification
from modeling_hsvlt.label_prompts import VOC_LABEL_TEXT, encode_labels, load_text_encoder
from modeling_hsvlt.load_pretrained import load_pretrained
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor

from ..checkpoint.atomic import whole_file
from ..data.label_name_files import read_label_names
from .cat import cat_to_mltr
from .convnext import convert_convnext_state_dict, convnext_config
from .official_hsvlt import hsvlt_to_official, official_to_hsvlt
from .resolution import resize_model
from .state_dicts import read_state_dict


def hsvlt_from_official(
    source: Path,
    *,
    labels: Path | None = None,
    label_embeddings: Path | None = None,
    text_encoder: str | None = None,
    text_encoder_revision: str | None = None,
    voc_label_text: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """From a state dict of the released HSVLT; arguments: as the options of `training.convert`.

    Raises:
        ValueError: no embeddings of the labels, or another number of names than labels.
    """
    state_dict, config = official_to_hsvlt(read_state_dict(source))
    config = _with_names(config, labels, source)
    provenance = {}
    if label_embeddings is not None:
        embeddings = torch.from_numpy(np.load(label_embeddings, allow_pickle=False)).float()
    elif text_encoder is not None and labels is not None:
        encoder, tokenizer = load_text_encoder(text_encoder, text_encoder_revision)
        label_text = VOC_LABEL_TEXT if voc_label_text else None
        names = list(config["id2label"].values())
        embeddings = encode_labels(names, encoder, tokenizer, pooling="official", label_text=label_text)
        # Of a folder only the name: checkpoints are published, paths of one's own disk are not.
        name = Path(text_encoder).name if Path(text_encoder).is_dir() else text_encoder
        provenance = {"encoder": name, "pooling": "official"}
    else:
        raise ValueError(
            f"'{source}' needs its label embeddings, which released checkpoints do not hold: give --label_embeddings "
            "bert.npy, or compute them with --labels labels.txt and --text_encoder FOLDER of bert-base-uncased."
        )
    model = HSVLTForImageClassification(HSVLTConfig(**config))
    model.set_label_embeddings(embeddings, **provenance)
    model.load_state_dict(state_dict | {"hsvlt.label_embeddings.weight": model.hsvlt.label_embeddings.weight})
    # The released code squashes an image to a square, bilinearly, and feeds pixels in [0, 1].
    side = model.config.image_size
    return model, MultiLabelImageProcessor(
        size={"height": side, "width": side},
        resample=PILImageResampling.BILINEAR,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )


def write_official(source: Path, target: Path, *, overwrite: bool = False) -> list[str]:
    """Writes the released layout of one of our checkpoints, and its label embeddings beside it.

    Args:
        target: A .pth or .safetensors file, or a folder for best_model.safetensors.

    Returns:
        What to know of the released code.

    Raises:
        FileExistsError: there are label embeddings, and they are not to be replaced.
    """
    model = load_pretrained(HSVLTForImageClassification, source)
    state_dict = hsvlt_to_official(model.state_dict())
    processor = load_pretrained(AutoImageProcessor, source)
    weights = target if target.suffix in (".pth", ".safetensors") else target / "best_model.safetensors"
    embeddings = weights.with_suffix(".npy")
    if embeddings.exists() and not overwrite:
        raise FileExistsError(f"'{embeddings}' exists: choose another TARGET, or replace both with --overwrite.")
    weights.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(weights) as written:
        (torch.save if weights.suffix == ".pth" else save_file)(state_dict, written)
    with whole_file(embeddings) as written, written.open("xb") as file:
        np.save(file, model.hsvlt.label_embeddings.weight.float().numpy())
    notes = [f"Label embeddings are in {embeddings}; the released code reads them from its bert.npy."]
    if model.config.num_attention_heads != 1:
        notes.append(
            f"Set num_heads to {model.config.num_attention_heads} in the released code; its weights do not tell."
        )
    shifted = any(processor.image_mean) or set(processor.image_std) != {1.0}
    if processor.do_normalize and shifted:
        notes.append(
            "The released code feeds pixels in [0, 1]; this model expects them normalised with mean "
            f"{list(processor.image_mean)} and std {list(processor.image_std)}: turn its Normalize on."
        )
    return notes


def convnext_from_weights(source: Path) -> ConvNextModel:
    """From ConvNeXt weights of any of the three layouts."""
    state_dict = convert_convnext_state_dict(read_state_dict(source))
    model = ConvNextModel(ConvNextConfig(**convnext_config(state_dict)))
    # A feature extractor's weights lack the final norm; HSVLT's backbone does not read it.
    model.load_state_dict({**{f"layernorm.{k}": v for k, v in model.layernorm.state_dict().items()}, **state_dict})
    return model


def mltr_from(
    source: Path, *, labels: Path | None = None, image_size: int | None = None, window_size: int | None = None
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """From a state dict of CAT, or from a folder of ours; for another resolution where one is given.

    Raises:
        ValueError: another number of names than labels.
    """
    if source.is_dir():
        model = load_pretrained(MlTrForImageClassification, source)
        processor = load_pretrained(AutoImageProcessor, source)
    else:
        state_dict, config = cat_to_mltr(read_state_dict(source))
        model = MlTrForImageClassification(MlTrConfig(**_with_names(config, labels, source)))
        model.load_state_dict(state_dict)
        # What CAT was evaluated with: the shorter side to 256 / 224 of the size, bicubic, and the middle of it.
        side = model.config.image_size
        processor = MultiLabelImageProcessor(
            size={"shortest_edge": round(side * 256 / 224)},
            do_center_crop=True,
            crop_size={"height": side, "width": side},
        )
    if image_size not in (None, model.config.image_size):
        processor.size = {"height": image_size, "width": image_size}
        processor.do_center_crop = False
    return resize_model(model, image_size, window_size), processor


def _with_names(config: dict, labels: Path | None, source: Path) -> dict:
    """`config` with the names of a file in place of the number of labels."""
    if labels is None:
        return config
    names, count = read_label_names(labels), config["num_labels"]
    if len(names) != count:
        raise ValueError(f"'{labels}' has {len(names)} names, but '{source}' has {count} labels.")
    rest = {name: value for name, value in config.items() if name != "num_labels"}
    return {**rest, "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
