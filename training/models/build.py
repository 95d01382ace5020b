"""The model of a run: new, on a pretrained backbone, or from a checkpoint; and its label embeddings."""

from collections.abc import Callable
from functools import partial

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

import modeling_hsvlt  # noqa: F401  (registers the model types)
from modeling_hsvlt.hsvlt_timm import backbone_config_of
from modeling_hsvlt.label_context import LabelContext
from modeling_hsvlt.label_prompts import (
    DEFAULT_TEMPLATE,
    class_shares,
    encode_labels,
    load_text_encoder,
)
from modeling_hsvlt.load_pretrained import load_pretrained
from modeling_hsvlt.losses_multilabel import multilabel_loss

from ..checkpoint.loading import check_pinned, commit_of
from ..checkpoint.public_names import public_name
from ..config import TrainingConfig
from .from_checkpoint import configured, from_checkpoint, set_initial_bias
from .named import BACKBONES, TEXT_ENCODERS, local_source

# Labels whose classes are printed.
MAX_SAID = 30


def build_model(config: TrainingConfig, label_names: list[str], say: Callable[[str], None] = print) -> PreTrainedModel:
    """Make the model that `config` describes, for these labels.

    Where it names a Hub id with a branch or tag, the commit that this was is written back into `config`, so that
    config.yaml says what was really used.

    Arguments:
        config: reads `model_type`, `preset`, `model`, `backbone`, `label_encoder`, `init_from` and their companions.
        label_names: in class order.
        say: prints a line.

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
    _check_template(config)
    encoded, template = None, config.label_template or DEFAULT_TEMPLATE
    if config.label_context is not None and config.model_type != "hsvlt":
        raise ValueError(
            f"label_context is for hsvlt, and model_type is {config.model_type!r}: hp_dval's contexts are its phase 2."
        )
    if config.label_encoder is not None and config.model_type != "hp_dval":
        source = local_source(config.label_encoder, TEXT_ENCODERS)
        check_pinned("label_encoder", source, config.label_encoder_revision, TEXT_ENCODERS)
        encoder, tokenizer = load_text_encoder(source, config.label_encoder_revision)
        config.label_encoder_revision = commit_of(encoder.config) or config.label_encoder_revision
        encoded = encode_labels(
            label_names,
            encoder,
            tokenizer,
            pooling=config.label_pooling,
            template=template,
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
    if config.model_type == "hp_dval" and config.label_template is not None:
        overrides.setdefault("label_template", config.label_template)
    if encoded is not None:
        overrides.setdefault("label_embedding_dim", encoded.shape[1])
    if config.init_from is not None:
        model = from_checkpoint(config, label_names, overrides)
    elif config.model_type == "hp_dval" and config.backbone is not None:
        model = _from_clip(config, overrides)
    else:
        model = _new_model(config, overrides)

    if encoded is not None:
        if not hasattr(model, "set_label_embeddings"):
            raise ValueError(f"model_type {config.model_type!r} reads no label text: leave label_encoder out.")
        official = config.label_pooling == "official"
        model.set_label_embeddings(
            encoded,
            encoder=public_name(config.label_encoder),
            pooling=config.label_pooling,
            template=None if official else template,
        )
    wanted = config.text_classifier
    if wanted is None:
        wanted = config.can_transfer_classifier and getattr(model, "text_classifier_holder", None) is not None
    if wanted:
        set_text_classifier(model, encoder, tokenizer, config, say)
    if config.initial_bias is not None and config.init_from is None:
        set_initial_bias(model, config.initial_bias)
    if config.label_context is not None:
        add_label_context(model, encoder, tokenizer, config, label_names)
    if hasattr(model, "set_phase"):
        model.set_phase(model.config.phase)
    if config.freeze_backbone:
        freeze_backbone(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def _check_template(config: TrainingConfig) -> None:
    """Refuses a template where nothing would read it."""
    if config.label_template is None:
        return
    for unread, why in (
        (config.model_type == "mltr", "mltr reads no label text"),
        (config.model_type == "hsvlt" and config.label_encoder is None, "label_encoder, which reads it, is not set"),
        (config.model_type == "hsvlt" and config.label_pooling == "official", "the official pooling takes none"),
        (config.model_type == "hp_dval" and config.init_from is not None, "init_from keeps that of its own prompts"),
    ):
        if unread:
            raise ValueError(f"label_template {config.label_template!r} would have no effect: {why}. Leave it out.")


def read_backbone_statistics(config: TrainingConfig) -> None:
    """Set `image_mean` and `image_std` to what the processor of `backbone` or `init_from` has.

    Raises:
        ValueError: there is none, or it has none.
    """
    option = "backbone" if config.backbone else "init_from"
    name, revision = getattr(config, option), getattr(config, f"{option}_revision")
    known = BACKBONES if config.backbone else {}
    source = local_source(name, known)
    check_pinned(option, source, revision, known)
    try:
        found = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
        if found.get("model_type") == "timm_wrapper":  # timm keeps them there, under other names
            found = {f"image_{name}": found.get("pretrained_cfg", {}).get(name) for name in ("mean", "std")}
        else:
            found = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)[0]
    except OSError as error:
        raise ValueError(
            f"The processor of {name}, for backbone_statistics, cannot be read ({str(error).splitlines()[0]}): give "
            "image_mean and image_std, with backbone_statistics false."
        ) from error
    if not found.get("image_mean") or not found.get("image_std"):
        raise ValueError(f"The processor of {name} has no statistics: give them, with backbone_statistics false.")
    config.image_mean, config.image_std = list(found["image_mean"]), list(found["image_std"])
    config.backbone_statistics = False  # config.yaml says what was used


def backbone_classifier(config: TrainingConfig, channels: int) -> tuple[torch.Tensor, list[str]]:
    """The classifier (classes, channels) that `config.backbone` was trained with, and the names of its classes.

    Of a class with several names ("tench, Tinca tinca") the first is given.

    Raises:
        ValueError: a backbone without a linear classifier of its last map, or without names for its classes.
    """
    source, loading = load_pretrained(
        AutoModelForImageClassification,
        local_source(config.backbone, BACKBONES),
        revision=config.backbone_revision,
        output_loading_info=True,
    )
    shape = (source.config.num_labels, channels)
    linear = [(name, module.weight) for name, module in source.named_modules() if isinstance(module, torch.nn.Linear)]
    name, weight = linear[-1] if linear else ("", torch.empty(0))
    if weight.shape != shape or f"{name}.weight" in loading["missing_keys"]:
        raise ValueError(f"{config.backbone} has no linear classifier of its last map: leave text_classifier out.")
    names = [source.config.id2label[index].split(",")[0].strip() for index in range(shape[0])]
    if all(name.startswith("LABEL_") for name in names):
        raise ValueError(f"{config.backbone} does not name its classes (id2label): leave text_classifier out.")
    return weight.detach(), names


def set_text_classifier(model: PreTrainedModel, encoder, tokenizer, config: TrainingConfig, say: Callable) -> None:
    """Start an HSVLT's residual attention or tied label stream from the classifier of `config.backbone`, see
    `transfer_classifier`, and say which classes each label starts from. With `text_classifier` null, a backbone without
    one is left as it is.

    Raises:
        ValueError: `text_classifier` is true, and there is nothing in the model to start from it, or no classifier.
    """
    holder = getattr(model, "text_classifier_holder", None)
    if holder is None:
        raise ValueError(
            "text_classifier belongs to HSVLT's residual_attention or its label_stream: tied; set one of them in model."
        )
    try:
        weight, names = backbone_classifier(config, holder.text_weight.shape[1])
    except ValueError as error:
        if config.text_classifier:
            raise
        say(f"Labels start without a text classifier: {str(error).partition(':')[0]}.")
        return
    unique = list(dict.fromkeys(names))  # ImageNet has two cranes and two maillots
    embeddings = encode_labels(unique, encoder, tokenizer, template=config.label_template or DEFAULT_TEMPLATE)
    embeddings, labels = embeddings[[unique.index(each) for each in names]], model.hsvlt.label_embeddings.weight
    model.start_from_classes(weight, embeddings)
    say(f"Each label starts from the classes of {config.backbone} with the most similar names:")
    shares, classes = class_shares(embeddings, labels).topk(min(3, len(names)))
    for row in range(min(len(labels), MAX_SAID)):
        started = (f"{names[k]} {share:.0%}" for share, k in zip(shares[row], classes[row].tolist(), strict=True))
        say(f"  {model.config.id2label[row]}: {', '.join(started)}")
    if len(labels) > MAX_SAID:
        say(f"  and so on for the other {len(labels) - MAX_SAID} labels")


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leave the backbone out of training.

    Raises:
        ValueError: a model that stands on none.
    """
    if not hasattr(model, "hsvlt"):
        raise ValueError(f"freeze_backbone is for hsvlt, and this is a {type(model).__name__}: leave it out.")
    model.hsvlt.backbone.requires_grad_(False)


TRAINED_BESIDE_CONTEXT = ("all", "all_but_backbone", "nothing")


def add_label_context(model: PreTrainedModel, encoder, tokenizer, config: TrainingConfig, label_names) -> None:
    """Give an HSVLT a context in front of its label names to learn, see `modeling_hsvlt.label_context`.

    `config.label_context` holds arguments of `LabelContext` (`num_context_tokens`, `class_specific`, `adapter`), and
    under `train` what of the model trains beside the context: "all" (the default), "all_but_backbone", or "nothing".

    Raises:
        ValueError: another key or value.
    """
    options = dict(config.label_context)
    beside = options.pop("train", "all")
    if beside not in TRAINED_BESIDE_CONTEXT:
        raise ValueError(f"label_context.train is {beside!r}: choose one of {', '.join(TRAINED_BESIDE_CONTEXT)}.")
    unknown = options.keys() - {"num_context_tokens", "class_specific", "adapter"}
    if unknown:
        raise ValueError(f"label_context has no option {min(unknown)!r}: see training.models.build.add_label_context.")
    frozen = {"all": None, "all_but_backbone": model.hsvlt.backbone, "nothing": model}[beside]
    if frozen is not None:
        frozen.requires_grad_(False)
    template = config.label_template or DEFAULT_TEMPLATE
    model.label_context = LabelContext(
        encoder, tokenizer, label_names, template=template, label_text=config.label_text, **options
    )
    templates = model.label_context.templates
    model.config.label_template = templates[0] if len(templates) == 1 else f"{templates[0]}, and so on for each label"


def _new_model(config: TrainingConfig, overrides: dict) -> PreTrainedModel:
    ours = sorted(name for name, kind in CONFIG_MAPPING._extra_content.items() if hasattr(kind, "preset"))
    if config.model_type not in ours:
        raise ValueError(f"model_type is {config.model_type!r}: choose one of {', '.join(ours)}.")
    config_class = CONFIG_MAPPING[config.model_type]
    model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[config_class]
    if config.backbone is not None:
        if not hasattr(model_class, "from_backbone"):
            raise ValueError(f"model_type {config.model_type!r} stands on no other backbone: leave backbone out.")
        source = local_source(config.backbone, BACKBONES)
        check_pinned("backbone", source, config.backbone_revision, BACKBONES)
        source_config = backbone_config_of(source, config.backbone_revision)
        config.backbone_revision = commit_of(source_config) or config.backbone_revision
        overrides = {**overrides, "backbone_config": source_config}
    make = config_class if config.preset is None else partial(config_class.preset, config.preset)
    model_config = configured(config_class, config.model, lambda: make(**overrides))
    if config.backbone is None:
        return model_class(model_config)
    return model_class.from_backbone(source, revision=config.backbone_revision, config=model_config)


def _from_clip(config: TrainingConfig, overrides: dict) -> PreTrainedModel:
    """HP-DVAL on the CLIP or SigLIP that `backbone` names; its size is that one's, whatever the preset.

    Raises:
        ValueError: it is neither.
    """
    check_pinned("backbone", config.backbone, config.backbone_revision)
    load = {"revision": config.backbone_revision}
    kind = load_pretrained(AutoConfig, config.backbone, **load).model_type
    if kind not in ("clip", "siglip", "siglip2"):
        raise ValueError(f"{config.backbone} is of type {kind!r}; HP-DVAL stands on a CLIP, a SigLIP or a SigLIP 2.")
    clip = load_pretrained(AutoModel, config.backbone, dtype=torch.float32, **load)
    config.backbone_revision = commit_of(clip.config) or config.backbone_revision
    tokenizer = load_pretrained(AutoTokenizer, config.backbone, **load)
    fields = {name: value for name, value in overrides.items() if name not in ("id2label", "label2id")}
    model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[CONFIG_MAPPING["hp_dval"]]
    names = list(overrides["id2label"].values())
    return model_class.from_clip(clip, tokenizer, names, label_text=config.label_text, **fields)
