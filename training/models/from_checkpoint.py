"""A model for other labels with a checkpoint's weights; what belongs to a label is carried over by its name."""

import logging

import torch
from transformers import AutoModelForImageClassification, AutoTokenizer, PreTrainedModel

from modeling_hsvlt.load_pretrained import load_pretrained

from ..checkpoint.loading import check_pinned, commit_of
from ..config import TrainingConfig
from .resolution import resize_model

logger = logging.getLogger(__name__)


def _set_prompts(model: PreTrainedModel, config: TrainingConfig, label_names: list[str]) -> None:
    """Other labels for an HP-DVAL: prompts of their names, by the tokenizer of the CLIP that `label_encoder` names."""
    if config.label_encoder is None:
        raise ValueError(
            f"{config.init_from} was made for other labels: name its CLIP with label_encoder, whose tokenizer writes "
            "the prompts of these."
        )
    check_pinned("label_encoder", config.label_encoder, config.label_encoder_revision)
    tokenizer = load_pretrained(AutoTokenizer, config.label_encoder, revision=config.label_encoder_revision)
    model.set_labels(label_names, tokenizer, label_text=config.label_text)


def from_checkpoint(config: TrainingConfig, label_names: list[str], overrides: dict) -> PreTrainedModel:
    """A model for `label_names` with the checkpoint's weights.

    What belongs to a label (rows of the head, label embeddings) is carried over by the label's name; labels that the
    checkpoint does not know start fresh.
    """
    check_pinned("init_from", config.init_from, config.init_from_revision)
    source = load_pretrained(AutoModelForImageClassification, config.init_from, revision=config.init_from_revision)
    config.init_from_revision = commit_of(source.config) or config.init_from_revision
    if not hasattr(type(source.config), "preset"):
        raise ValueError(
            f"{config.init_from} holds a {type(source).__name__}, not a model of this package: give it as backbone."
        )
    overrides = {**overrides, "thresholds": None, "threshold_info": None, "calibration_info": None}  # of other weights
    if source.config.model_type == "mltr":
        # Its weights belong to an image size and a window.
        source = resize_model(source, overrides["image_size"], config.model.get("window_size"))
    source_names = [source.config.id2label[index] for index in range(source.config.num_labels)]
    if hasattr(source, "set_labels") and source_names != label_names:
        _set_prompts(source, config, label_names)
        source_names = label_names
    if source_names == label_names and not config.model:
        for name, value in overrides.items():
            setattr(source.config, name, value)
        return source

    model_config = type(source.config).from_dict({**source.config.to_dict(), **overrides})
    model = type(source)(model_config)
    common = [(row, source_names.index(name)) for row, name in enumerate(label_names) if name in source_names]
    rows, source_rows = ([pair[side] for pair in common] for side in (0, 1))
    logger.warning(
        "%d of %d labels are known to %s; the others start fresh.", len(common), len(label_names), config.init_from
    )
    # A tensor belongs to labels in that dimension which grows with their number.
    with torch.device("meta"):
        labels = {"id2label": {index: f"LABEL_{index}" for index in range(len(label_names) + 1)}, "label2id": None}
        wider = type(source)(type(model_config).from_dict({**model_config.to_dict(), **labels}))
    wider_shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    source_tensors = source.state_dict()
    for name, tensor in model.state_dict().items():
        value = source_tensors.get(name)
        grows = [dim for dim in range(tensor.ndim) if wider_shapes[name][dim] != tensor.shape[dim]]
        if grows and value is not None and value.ndim == tensor.ndim:
            index = torch.tensor(rows, dtype=torch.long)
            value = tensor.index_copy(grows[0], index, value.index_select(grows[0], torch.tensor(source_rows).long()))
        if value is None or value.shape != tensor.shape:
            logger.warning("%s has no %s of this shape; it starts fresh.", config.init_from, name)
            continue
        tensor.copy_(value)
    return model
