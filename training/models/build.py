"""The model of a run: new, on a pretrained trunk, or from a checkpoint; and its label embeddings."""

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoTokenizer, CLIPModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

import modeling_hsvlt  # noqa: F401  (registers the model types)
from modeling_hsvlt.label_context import LabelContext
from modeling_hsvlt.label_prompts import encode_labels, load_text_encoder, transfer_classifier
from modeling_hsvlt.losses_multilabel import multilabel_loss

from ..checkpoint.loading import refuse_leads_elsewhere
from ..config import TrainingConfig
from .cat import resize_model

logger = logging.getLogger(__name__)


def build_model(config: TrainingConfig, label_names: list[str]) -> PreTrainedModel:
    """Make the model that `config` describes, for these labels.

    Where it names a Hub id with a branch or tag, the commit that this was is written back into `config`, so that
    config.yaml says what was really used.

    Arguments:
        config: reads `model_type`, `preset`, `model`, `backbone`, `label_encoder`, `init_from` and their companions.
        label_names: in class order.

    Raises:
        ValueError: an unknown model type or loss, an option that they do not have, a Hub id without a revision.
    """
    try:
        nothing = torch.zeros(1, len(label_names))
        multilabel_loss(nothing, nothing, config.loss_type, config.loss_kwargs)
    except TypeError as error:
        raise ValueError(
            f"loss_kwargs {config.loss_kwargs} do not fit loss_type {config.loss_type!r}: {error}."
        ) from None
    encoded = None
    if config.label_context is not None and config.model_type != "hsvlt":
        raise ValueError(
            f"label_context is for hsvlt, and model_type is {config.model_type!r}: hp_dval's contexts are its stage 2."
        )
    if config.label_encoder is not None and config.model_type != "hp_dval":
        check_pinned("label_encoder", config.label_encoder, config.label_encoder_revision)
        encoder, tokenizer = load_text_encoder(config.label_encoder, config.label_encoder_revision)
        config.label_encoder_revision = _commit(encoder.config) or config.label_encoder_revision
        encoded = encode_labels(
            label_names,
            encoder,
            tokenizer,
            reading=config.label_reading,
            template=config.label_template,
            label_text=config.label_text,
        )

    overrides = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        "image_size": config.image_size,
        "loss_type": config.loss_type,
        "loss_kwargs": config.loss_kwargs,
        **config.model,
    }
    if config.init_from is not None:
        model = _from_checkpoint(config, label_names, overrides)
    elif config.model_type == "hp_dval" and config.backbone is not None:
        model = _from_clip(config, overrides)
    else:
        if encoded is not None:
            overrides.setdefault("label_embedding_dim", encoded.shape[1])
        model = _new_model(config, overrides)

    if encoded is not None:
        if not hasattr(model, "set_label_embeddings"):
            raise ValueError(f"model_type {config.model_type!r} reads no label text: leave label_encoder out.")
        official = config.label_reading == "official"
        model.set_label_embeddings(
            encoded,
            encoder=config.label_encoder,
            reading=config.label_reading,
            template=None if official else config.label_template,
        )
    if config.text_classifier:
        set_text_classifier(model, encoder, tokenizer, config)
    if config.label_context is not None:
        add_label_context(model, encoder, tokenizer, config, label_names)
    if hasattr(model, "set_stage"):
        model.set_stage(model.config.stage)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def set_text_classifier(model: PreTrainedModel, encoder, tokenizer, config: TrainingConfig) -> None:
    """Start an HSVLT's residual attention from the classifier of `config.backbone`, see `transfer_classifier`.

    Of a class with several names ("tench, Tinca tinca") the first is read.

    Raises:
        ValueError: a model without residual attention, a backbone without a linear classifier of its last map, or
            without names for its classes.
    """
    if not getattr(model.config, "residual_attention", False):
        raise ValueError("text_classifier belongs to HSVLT's residual_attention: set that to true in model.")
    source, loading = AutoModelForImageClassification.from_pretrained(
        config.backbone, revision=config.backbone_revision, use_safetensors=True, output_loading_info=True
    )
    shape = (source.config.num_labels, model.residual_attention.text_weight.shape[1])
    linear = [(name, module.weight) for name, module in source.named_modules() if isinstance(module, torch.nn.Linear)]
    name, weight = linear[-1] if linear else ("", torch.empty(0))
    if weight.shape != shape or f"{name}.weight" in loading["missing_keys"]:
        raise ValueError(f"{config.backbone} has no linear classifier of its last map: leave text_classifier out.")
    names = [source.config.id2label[index].split(",")[0].strip() for index in range(shape[0])]
    if all(name.startswith("LABEL_") for name in names):
        raise ValueError(f"{config.backbone} does not name its classes (id2label): leave text_classifier out.")
    unique = list(dict.fromkeys(names))  # ImageNet has two cranes and two maillots
    embeddings = encode_labels(unique, encoder, tokenizer, template=config.label_template)
    embeddings = embeddings[[unique.index(each) for each in names]]
    model.set_text_classifier(transfer_classifier(weight, embeddings, model.hsvlt.label_embeddings.weight))


TRAINED_BESIDE_CONTEXT = ("all", "all_but_trunk", "nothing")


def add_label_context(model: PreTrainedModel, encoder, tokenizer, config: TrainingConfig, label_names) -> None:
    """Give an HSVLT a context in front of its label names to learn, see `modeling_hsvlt.label_context`.

    `config.label_context` holds arguments of `LabelContext` (`num_tokens`, `class_specific`, `adapter`), and under
    `train` what of the model trains beside the context: "all" (where it is left out), "all_but_trunk", or "nothing".

    Raises:
        ValueError: another key or value.
    """
    options = dict(config.label_context)
    beside = options.pop("train", "all")
    if beside not in TRAINED_BESIDE_CONTEXT:
        raise ValueError(f"label_context.train is {beside!r}: choose one of {', '.join(TRAINED_BESIDE_CONTEXT)}.")
    unknown = options.keys() - {"num_tokens", "class_specific", "adapter"}
    if unknown:
        raise ValueError(f"label_context has no option {min(unknown)!r}: see training.models.build.add_label_context.")
    frozen = {"all": None, "all_but_trunk": model.hsvlt.trunk, "nothing": model}[beside]
    if frozen is not None:
        frozen.requires_grad_(False)
    model.label_context = LabelContext(
        encoder, tokenizer, label_names, template=config.label_template, label_text=config.label_text, **options
    )
    templates = model.label_context.templates
    model.config.label_template = templates[0] if len(templates) == 1 else f"{templates[0]}, and so on for each label"


def check_pinned(option: str, source: str, revision: str | None) -> None:
    """Refuse a Hub id without a revision: a branch moves, and a run must be repeatable."""
    if revision is None and not Path(source).is_dir():
        raise ValueError(
            f"{option} {source!r} is no folder, and as a Hub id it needs --{option}_revision: the commit that the "
            "repository's page shows under 'Files and versions'."
        )


def _commit(loaded_config) -> str | None:
    return getattr(loaded_config, "_commit_hash", None)  # set by transformers where it came from the Hub


def _new_model(config: TrainingConfig, overrides: dict) -> PreTrainedModel:
    ours = sorted(name for name, kind in CONFIG_MAPPING._extra_content.items() if hasattr(kind, "preset"))
    if config.model_type not in ours:
        raise ValueError(f"model_type is {config.model_type!r}: choose one of {', '.join(ours)}.")
    config_class = CONFIG_MAPPING[config.model_type]
    unknown = [name for name in config.model if not hasattr(config_class(), name)]
    if unknown:
        raise ValueError(f"{config_class.__name__} has no field {unknown[0]!r}: see its docstring for all fields.")
    if config.preset is None:
        model_config = config_class(**overrides)
    else:
        model_config = config_class.preset(config.preset, **overrides)
    model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config_class]
    if config.backbone is None:
        return model_class(model_config)
    if not hasattr(model_class, "from_backbone"):
        raise ValueError(f"model_type {config.model_type!r} stands on no other backbone: leave backbone out.")
    check_pinned("backbone", config.backbone, config.backbone_revision)
    source_config = AutoConfig.from_pretrained(config.backbone, revision=config.backbone_revision)
    config.backbone_revision = _commit(source_config) or config.backbone_revision
    return model_class.from_backbone(config.backbone, revision=config.backbone_revision, config=model_config)


def _from_clip(config: TrainingConfig, overrides: dict) -> PreTrainedModel:
    """HP-DVAL on the CLIP that `backbone` names; its size is the CLIP's, whatever the preset."""
    check_pinned("backbone", config.backbone, config.backbone_revision)
    load = {"revision": config.backbone_revision}
    clip = CLIPModel.from_pretrained(config.backbone, use_safetensors=True, dtype=torch.float32, **load)
    config.backbone_revision = _commit(clip.config) or config.backbone_revision
    tokenizer = AutoTokenizer.from_pretrained(config.backbone, **load)
    fields = {name: value for name, value in overrides.items() if name not in ("id2label", "label2id")}
    model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[CONFIG_MAPPING["hp_dval"]]
    names = list(overrides["id2label"].values())
    return model_class.from_clip(clip, tokenizer, names, label_text=config.label_text, **fields)


def _set_prompts(model: PreTrainedModel, config: TrainingConfig, label_names: list[str]) -> None:
    """Other labels for an HP-DVAL: prompts of their names, by the tokenizer of the CLIP that `label_encoder` names."""
    if config.label_encoder is None:
        raise ValueError(
            f"{config.init_from} was made for other labels: name its CLIP with label_encoder, whose tokenizer writes "
            "the prompts of these."
        )
    check_pinned("label_encoder", config.label_encoder, config.label_encoder_revision)
    tokenizer = AutoTokenizer.from_pretrained(config.label_encoder, revision=config.label_encoder_revision)
    model.set_labels(label_names, tokenizer, label_text=config.label_text)


def _from_checkpoint(config: TrainingConfig, label_names: list[str], overrides: dict) -> PreTrainedModel:
    """A model for `label_names` with the checkpoint's weights.

    What belongs to a label (rows of the head, label embeddings) is carried over by the label's name; labels that the
    checkpoint does not know start fresh.
    """
    check_pinned("init_from", config.init_from, config.init_from_revision)
    refuse_leads_elsewhere(config.init_from)
    source = AutoModelForImageClassification.from_pretrained(
        config.init_from, revision=config.init_from_revision, use_safetensors=True
    )
    config.init_from_revision = _commit(source.config) or config.init_from_revision
    if not hasattr(type(source.config), "preset"):
        raise ValueError(
            f"{config.init_from} holds a {type(source).__name__}, not a model of this package: give it as backbone."
        )
    overrides = {**overrides, "thresholds": None, "threshold_info": None, "calibration_info": None}  # of other weights
    if source.config.model_type == "mltr":
        # Its weights belong to a picture size and a window.
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
        labels = {"id2label": dict(enumerate([*label_names, ""])), "label2id": None}
        wider = type(source)(type(model_config).from_dict({**model_config.to_dict(), **labels}))
    wider_shapes = {name: tensor.shape for name, tensor in wider.state_dict().items()}
    source_tensors = source.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in source_tensors or source_tensors[name].ndim != tensor.ndim:
            logger.warning("%s has no %s of this shape; it starts fresh.", config.init_from, name)
            continue
        grows = [dim for dim in range(tensor.ndim) if wider_shapes[name][dim] != tensor.shape[dim]]
        value = source_tensors[name]
        if grows:
            index = torch.tensor(rows, dtype=torch.long)
            value = tensor.index_copy(grows[0], index, value.index_select(grows[0], torch.tensor(source_rows).long()))
        if value.shape != tensor.shape:
            logger.warning("%s has no %s of this shape; it starts fresh.", config.init_from, name)
            continue
        tensor.copy_(value)
    return model
