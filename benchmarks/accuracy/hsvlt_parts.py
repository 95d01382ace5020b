"""Ablations of HSVLT on frozen maps: of the tied label stream; its parts, and one change each of the published one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from modeling_hsvlt import HSVLTForImageClassification


@dataclass(frozen=True)
class Ablation:
    """What differs from HSVLT's recipe."""

    head: str = "hsvlt"  # whose recipe it is
    model: dict = field(default_factory=dict)  # fields of HSVLTConfig
    recipe: dict = field(default_factory=dict)  # fields of Recipe
    embeddings: Callable[[torch.Tensor], torch.Tensor] | None = None
    tweak: Callable[[PreTrainedModel], None] | None = None
    text_classifier: bool = True  # whether the head starts from the transferred classifier


def last_scale_only(model: HSVLTForImageClassification) -> None:
    """Labels see the image on the last map alone; the others are shown as zeros, which say nothing of an image."""

    def hide(module, args):
        label_embeddings, maps, *rest = args
        *finer, last = maps
        return (label_embeddings, [*(torch.zeros_like(each) for each in finer), last], *rest)

    model.hsvlt.label_stream.register_forward_pre_hook(hide)


def uniform_attention(model: HSVLTForImageClassification) -> None:
    """Every pixel weighs the same for every label: queries are zero and stay so."""
    if model.config.label_stream == "tied":
        model.hsvlt.label_stream.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]), *args[1:]))
        return
    for stage in model.hsvlt.label_stream.stages:
        for layer in stage.layers:
            torch.nn.init.zeros_(layer.attention.query.weight)
            layer.attention.query.weight.requires_grad_(False)


def label_stream_off(model: HSVLTForImageClassification) -> None:
    """Residual attention alone: the label stream's classifier is zero and stays so."""
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    for module in (model.classifier, model.hsvlt.label_stream):
        module.requires_grad_(False)


def random_embeddings(embeddings: torch.Tensor) -> torch.Tensor:
    """Random directions, each dimension as spread as the text's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(embeddings.shape, generator=generator) * embeddings.std()


def one_hot_embeddings(embeddings: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(embeddings))


def stream_alone(*, model: dict | None = None, **changes) -> Ablation:
    """The label stream without residual attention, which would hide most of what a change does to it."""
    return Ablation(model={"residual_attention": False, **(model or {})}, text_classifier=False, **changes)


def tied(**changes) -> Ablation:
    """The tied label stream, whose classifier starts at zero and not from names."""
    return Ablation(head="hsvlt_tied", text_classifier=False, **changes)


ABLATIONS = {
    "tied": Ablation(head="hsvlt_tied"),
    "tied, text classifier off": tied(),
    "tied, text classifier off, attention uniform": tied(tweak=uniform_attention),
    "tied, text classifier off, last map only": tied(tweak=last_scale_only),
    "hsvlt": Ablation(),
    "label stream off": Ablation(tweak=label_stream_off),
    "label stream off, text classifier off": Ablation(tweak=label_stream_off, text_classifier=False),
    "text classifier off": Ablation(text_classifier=False),
    "linear with text classifier": Ablation(head="linear"),
    "linear": Ablation(head="linear", text_classifier=False),
    "linear, weight decay 0.5": Ablation(head="linear", recipe={"weight_decay": 0.5}, text_classifier=False),
    "label stream alone": stream_alone(),
    "last scale only": stream_alone(tweak=last_scale_only),
    "attention off (uniform)": stream_alone(tweak=uniform_attention),
    "as wide as the maps": stream_alone(model={"label_width": None}),
    "gate off": stream_alone(model={"label_update": "none"}),
    "aggregation top-down": stream_alone(model={"aggregation": "topdown"}),
    "random label vectors": stream_alone(embeddings=random_embeddings),
    "one-hot label vectors": stream_alone(embeddings=one_hot_embeddings),
    "multi-modal states as they are": stream_alone(model={"normalize_multimodal_states": False}),
    "1 attention head": stream_alone(model={"num_attention_heads": 1}),
    "2 attention heads": stream_alone(model={"num_attention_heads": 2}),
    "4 attention heads": stream_alone(model={"num_attention_heads": 4}),
}
