"""A model for other labels with a checkpoint's weights; what belongs to a label is carried over by its name."""

import logging
from collections.abc import Callable

import torch
from transformers import AutoModelForImageClassification, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from modeling_hsvlt.load_pretrained import load_pretrained

from ..checkpoint.loading import check_pinned, commit_of
from ..config import TrainingConfig
from .resolution import resize_model

logger = logging.getLogger(__name__)

MAX_SAID = 5  # weights that a warning names


def configured(config_class: type, fields: dict, make: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """What `make` gives: a configuration of this class with the fields of the option `model`.

    Raises:
        ValueError: it has no such field, or they do not fit.
    """
    unknown = [name for name in fields if not hasattr(config_class(), name)]
    if unknown:
        raise ValueError(f"{config_class.__name__} has no field {unknown[0]!r}: see its docstring for all fields.")
    try:
        return make()
    except ValueError:
        raise
    except Exception as error:  # transformers looks fields up by one another
        raise ValueError(f"model {fields} fits no {config_class.__name__} ({error!r}): correct it.") from error


def set_initial_bias(model: PreTrainedModel, bias: float) -> None:
    """Start each label's logit at `bias`.

    Raises:
        ValueError: a model whose classifier has no bias.
    """
    heads = [getattr(model, name, None) for name in ("classifier", "residual_attention", "candidate_scorer")]
    biases = [getattr(head, "bias", None) for head in heads if head is not None]
    if not biases or None in biases:
        raise ValueError(f"initial_bias belongs to a classifier with a bias, and {type(model).__name__} has none.")
    for each in biases:
        torch.nn.init.constant_(each, bias)


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
    checkpoint does not know start fresh. So do weights that it does not have, or has in another shape because the
    configuration differs; a warning says which, and why.

    Raises:
        ValueError: a checkpoint of another package, or none of its weights fits.
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
    width = getattr(source.config, "label_embedding_dim", None)
    if source_names == label_names and not config.model and overrides.get("label_embedding_dim", width) == width:
        for name, value in overrides.items():
            setattr(source.config, name, value)
        return source

    config_class, fields = type(source.config), {**source.config.to_dict(), **overrides}
    model_config = configured(config_class, config.model, lambda: config_class.from_dict(fields))
    model = type(source)(model_config)
    if config.initial_bias is not None:
        set_initial_bias(model, config.initial_bias)  # stays where a bias starts fresh
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
    source_tensors, missing, other_shapes, kept = source.state_dict(), [], [], 0
    for name, tensor in model.state_dict().items():
        if name not in source_tensors:
            missing.append(name)
            continue
        value, shape = source_tensors[name], list(tensor.shape)
        grows = [dim for dim in range(tensor.ndim) if wider_shapes[name][dim] != tensor.shape[dim]]
        for dim in grows:
            shape[dim] = len(source_names)
        if list(value.shape) != shape:
            other_shapes.append(f"{name} ({tuple(value.shape)} there, {tuple(tensor.shape)} here)")
        elif grows:
            known = value.index_select(grows[0], torch.tensor(source_rows, dtype=torch.long))
            tensor.index_copy_(grows[0], torch.tensor(rows, dtype=torch.long), known)
            kept += len(rows) > 0
        else:
            tensor.copy_(value)
            kept += 1
    changed = _changed_fields(source.config, model_config, {*config.model, "label_embedding_dim"})
    if not kept:
        raise ValueError(f"No weight of {config.init_from} fits this model{changed}: leave that, or init_from, out.")
    for what, names in (("are not in", missing), ("have another shape in", other_shapes)):
        if names:
            listed = ", ".join(names[:MAX_SAID]) + f" and {len(names) - MAX_SAID} more" * (len(names) > MAX_SAID)
            words = f"{len(names)} of {len(wider_shapes)} weights {what} {config.init_from} and start fresh: {listed}"
            logger.warning("%s%s.", words, changed)
    return model


def _changed_fields(there: PreTrainedConfig, here: PreTrainedConfig, names: set[str]) -> str:
    """Of these fields of a configuration those that differ, as the end of a sentence."""
    told = []
    for name in sorted(names):
        pair = [getattr(each, name, None) for each in (there, here)]
        if pair[0] != pair[1]:
            plain = all(isinstance(each, (bool, int, float, str, type(None))) for each in pair)
            told.append(f"{name} ({pair[0]} there, {pair[1]} here)" if plain else name)
    return f"; what differs in the configuration is {', '.join(told)}" if told else ""
