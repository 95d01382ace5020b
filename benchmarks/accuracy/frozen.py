"""Heads on one backbone: how each is built, trained and scored, from cached maps (backbone frozen) or from images."""

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.peers.efficientnet_lite import EfficientNetLiteHeadConfig, EfficientNetLiteWithHead
from modeling_hsvlt import (
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    HSVLTConfig,
    HSVLTForImageClassification,
)
from training.loop.optim import build_ema, build_scheduler, parameter_groups

# Bias that every head starts from: most labels are absent, and who starts at one half first unlearns that by its
# weights. Chosen on parts of voc/train: it gives the linear head's tail 2 points.
PRIOR_BIAS = -4.0


@dataclass(frozen=True)
class Recipe:
    """How a head is trained; what has a default here is the same for all heads but for the loss."""

    learning_rate: float
    weight_decay: float
    epochs: int = 12
    batch_size: int = 64
    ema_decay: float = 0.99
    warmup: float = 0.1  # part of all steps
    backbone: tuple[float, float] = (1e-4, 0.05)  # learning rate and weight decay of a backbone that is trained
    loss_type: str = "bce"
    loss_kwargs: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)  # fields of HSVLT's configuration, arguments of a peer's head
    residual_attention: tuple[float, float] | None = None  # its own learning rate and weight decay
    bf16: bool = True  # by autocast


def build_head(
    name: str,
    recipe: Recipe,
    backbone: EfficientNetLiteBackbone,
    label_names: list[str],
    label_embeddings: torch.Tensor,
    seed: int,
    text_classifier: torch.Tensor | None = None,
) -> PreTrainedModel:
    """A model on a copy of the backbone, with a head that `seed` starts.

    HSVLT is the package's own model on four maps; the peers stand on the last one, as published.

    Args:
        text_classifier (`torch.Tensor` of shape `(num_labels, C)`, *optional*): fixed weights that HSVLT's residual
            attention or the linear head's learned ones are added to.
    """
    torch.manual_seed(seed)
    labels = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
    shared = {**labels, "loss_type": recipe.loss_type, "loss_kwargs": recipe.loss_kwargs or None}
    fields = {key: getattr(backbone.config, key) for key in ("stem_channels", "group_channels", "group_depths")}
    fields["head_channels"] = backbone.config.head_channels
    if name.startswith("hsvlt"):
        config = HSVLTConfig(
            backbone_config=EfficientNetLiteConfig(**fields, out_features=backbone.out_features),
            label_embedding_dim=label_embeddings.shape[1],
            **shared,
            **recipe.model,
        )
        model = HSVLTForImageClassification(config)
        model.set_label_embeddings(label_embeddings)
        biases = [model.classifier.bias]
        if model.residual_attention is not None:
            biases.append(model.residual_attention.bias)
        if text_classifier is not None and model.text_classifier_holder is not None:
            model.set_text_classifier(text_classifier)
        model.hsvlt.backbone.model.load_state_dict(backbone.state_dict())
    else:
        arguments = dict(recipe.model)
        if text_classifier is not None:
            arguments["text_classifier"] = True
        config = EfficientNetLiteHeadConfig(**fields, **shared, head=name, head_kwargs=arguments or None)
        model = EfficientNetLiteWithHead(config)
        if text_classifier is not None:
            model.head.text_weight.copy_(text_classifier)
        model.backbone.load_state_dict(backbone.state_dict())
        biases = [model.head.bias if name == "ml_decoder" else list(model.head.children())[-1].bias]
    for bias in biases:
        torch.nn.init.constant_(bias, PRIOR_BIAS)
    return model


def freeze_backbone(model: PreTrainedModel) -> None:
    """Leaves the backbone out of training."""
    for module in model.modules():
        if isinstance(module, EfficientNetLiteBackbone):
            module.requires_grad_(False)


def run_head(model: PreTrainedModel, maps: tuple[torch.Tensor, ...] | torch.Tensor, labels: torch.Tensor | None = None):
    """The model's output, with the loss where labels are given, from the backbone's maps or images (B, 3, H, W)."""
    if isinstance(maps, torch.Tensor):
        return model(pixel_values=maps.to(model.device), labels=labels)
    return model(feature_maps=tuple(each.to(model.device) for each in maps), labels=labels)


def train_head(model: PreTrainedModel, recipe: Recipe, cache, rows: torch.Tensor, seed: int):
    """Trains on these rows of a `FeatureCache` or `ImageCache`, half of them mirrored; returns the averaged model."""
    generator = torch.Generator().manual_seed(seed)
    groups = parameter_groups(model, learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay)
    for group in groups:
        if group["name"].startswith("backbone/"):
            group["lr"], decay = recipe.backbone
            group["weight_decay"] = decay if group["weight_decay"] else 0.0
    attention = getattr(model, "residual_attention", None)
    if attention is not None and recipe.residual_attention is not None:
        learning_rate, weight_decay = recipe.residual_attention
        own = {id(parameter) for parameter in attention.parameters()}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        groups += parameter_groups(attention, learning_rate=learning_rate, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True)
    total = recipe.epochs * math.ceil(len(rows) / recipe.batch_size)
    warmup = min(int(recipe.warmup * total), total - 1)
    scheduler = build_scheduler(optimizer, schedule="cosine", warmup_steps=warmup, total_steps=total)
    ema = build_ema(model, recipe.ema_decay)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # ImageNet's statistics serve better than those of few small batches
    for _ in range(recipe.epochs):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(recipe.batch_size):
            maps = cache.batch(batch, torch.rand(len(batch), generator=generator) < 0.5)
            with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
                loss = run_head(model, maps, cache.labels[batch].to(model.device, non_blocking=True)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            ema.update_parameters(model)
    return copy.deepcopy(ema.module).eval()


@torch.inference_mode()
def score_head(model: PreTrainedModel, cache, rows: torch.Tensor | None = None) -> np.ndarray:
    """Sigmoid scores (len(rows), num_labels) of a trained head; None: of all rows."""
    rows = torch.arange(len(cache)) if rows is None else rows
    scores = [run_head(model, cache.batch(each)).logits.float().sigmoid() for each in rows.split(128)]
    return torch.cat(scores).cpu().numpy()
