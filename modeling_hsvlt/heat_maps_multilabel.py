"""Which pixels spoke for which label, read from one forward pass: no gradients.

| model | what the map is |
|---|---|
| HSVLT | the label's attention over the pixels, mean over heads, in the last interactions of the four stages together |
| with `residual_attention` | that and the softmax of the label's pixel scores, by their shares of the logit |
| HP-DVAL | the cosine of each patch and the label's local text embedding, the scores that its local view averages |
| MlTr | the pixel's share of the logit: the classifier is linear in the mean over pixels (a class activation map) |

HSVLT's stages count by how far from uniform each one's attention is. An attention map says where a label looked, for a
label that is absent as well, not what it made of what it saw there.

Shapes: B images, N labels, h x w cells of a map, H x W pixels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


def label_heat_maps(
    model: nn.Module,
    pixel_values: torch.Tensor,
    class_ids: torch.Tensor | None = None,
    stages: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and a heat map for each label.

    Args:
        model: `HSVLTForImageClassification`, `MlTrForImageClassification` or `HPDVALForImageClassification`.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): images.
        class_ids (`torch.LongTensor` of shape `(N,)`, *optional*): only these labels, in this order. Without them all,
            also those that HSVLT's `candidate_labels` would leave out.
        stages (sequence of `int`, *optional*): HSVLT's stages to read, 0 to 3; None: all four.

    Returns:
        Logits `(B, N)` and maps `(B, N, h, w)`, fp32, each from 0 (least) to 1 (most): only places of one map compare.

    Raises:
        ValueError: a model without such maps.
    """
    if class_ids is None and model.config.model_type == "hsvlt":
        class_ids = torch.arange(model.config.num_labels, device=pixel_values.device)
    return scored_heat_maps(model, pixel_values, class_ids, stages)[:2]


def scored_heat_maps(
    model: nn.Module,
    pixel_values: torch.Tensor,
    class_ids: torch.Tensor | None = None,
    stages: Sequence[int] | None = None,
    maps_of: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As [`label_heat_maps`], but of those labels alone that HSVLT's `candidate_labels` chooses for each image.

    Args:
        maps_of (`torch.LongTensor` of shape `(m,)`, *optional*): only the maps of these, by their places among the
            labels that are scored; the logits are those of all.

    Returns:
        Logits `(B, N)`, maps `(B, m, h, w)`, and the labels `(B, m)` that the maps are of.
    """
    read = {"hsvlt": _attention_maps, "mltr": _activation_maps, "hp_dval": _patch_maps}.get(model.config.model_type)
    if read is None:
        raise ValueError(
            f"A model of type {model.config.model_type!r} has no heat maps; HSVLT, MlTr and HP-DVAL have some."
        )
    logits, maps, scored = read(model, pixel_values, class_ids, stages, slice(None) if maps_of is None else maps_of)
    least, most = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    if scored is None:
        scored = torch.arange(logits.shape[1], device=maps.device) if class_ids is None else class_ids
    scored = scored if maps_of is None else scored[..., maps_of]
    maps = (maps - least) / (most - least).clamp(min=torch.finfo(maps.dtype).tiny)
    return logits, maps, scored.expand(maps.shape[:2])


def _attention_maps(model, pixel_values, class_ids, stages, wanted=slice(None)):
    mixed = model.residual_attention is not None and stages is None
    output = model(
        pixel_values=pixel_values,
        class_ids=class_ids,
        output_attentions=True,
        output_hidden_states=mixed,
        return_dict=True,
    )
    stages = range(4) if stages is None else stages
    attentions = [output.attentions[stage][:, :, wanted].float().mean(1) for stage in stages]
    size = attentions[0].shape[-2:]  # of the finest
    maps = _together(attentions, size)
    if mixed:
        last = output.hidden_states[-1]
        scores = model.residual_attention.pixel_scores(last, class_ids).softmax(1)
        if output.class_ids is not None:
            scores = scores.gather(2, output.class_ids[:, None].expand(-1, scores.shape[1], -1))
        residual = _shares(scores[..., wanted].transpose(1, 2).unflatten(-1, last.shape[-2:]), size)
        maps = torch.lerp(maps, residual, model.config.residual_attention_weight)
    return output.logits, maps, output.class_ids


def _together(attentions, size):
    """Attention of several stages, (B, N, h, w) each with a sum of 1, as one map of that size with a sum of 1.

    Each stage is put from 0 to 1 by its largest value, for a coarse one has fewer cells to share its attention out
    among, and weighed by 1 less its entropy relative to uniform attention's: one that looks everywhere says nothing.
    """
    total = 0
    for each in attentions:
        cells = each.flatten(2)
        entropy = -(cells * cells.clamp(min=torch.finfo(cells.dtype).tiny).log()).sum(-1)
        certainty = 1 - entropy / math.log(cells.shape[-1]) if cells.shape[-1] > 1 else torch.zeros_like(entropy)
        certainty = certainty.clamp(min=1e-6)  # where all are uniform, each counts the same
        resized = F.interpolate(each, size, mode="bilinear", align_corners=False)
        total = total + (certainty / resized.amax((-2, -1)))[..., None, None] * resized
    return total / total.sum((-2, -1), keepdim=True)


def _shares(attention, size):
    """(B, N, h, w) resized, with a sum of 1 over the places."""
    resized = F.interpolate(attention, size, mode="bilinear", align_corners=False)
    return resized / resized.sum((-2, -1), keepdim=True)


def _activation_maps(model, pixel_values, class_ids, stages, wanted=slice(None)):
    output = model(pixel_values=pixel_values, output_hidden_states=True, return_dict=True)
    last = model.mltr.layernorm(output.reshaped_hidden_states[-1].permute(0, 2, 3, 1))  # (B, h, w, C)
    maps = model.classifier(last).permute(0, 3, 1, 2).float()
    return _select(output.logits, maps, class_ids, wanted)


def _patch_maps(model, pixel_values, class_ids, stages, wanted=slice(None)):
    if model.config.alpha == 1:
        raise ValueError("This HP-DVAL scores the whole image alone (alpha=1): it has no patch scores to show.")
    output = model(pixel_values=pixel_values, return_dict=True)
    text = model.hp_dval.text_embeds()[-1].float()  # the local view's, (N, E)
    patches = output.patch_embeds.float()  # (B, P, E)
    if model.config.score_normalization == "cosine":
        text, patches = F.normalize(text, dim=-1), F.normalize(patches, dim=-1)
    size = [side // model.config.vision_config.patch_size for side in pixel_values.shape[-2:]]
    return _select(output.logits, (text @ patches.transpose(1, 2)).unflatten(-1, size), class_ids, wanted)


def _select(logits, maps, class_ids, wanted):
    if class_ids is not None:
        logits, maps = logits[:, class_ids], maps[:, class_ids]
    return logits, maps[:, wanted], None


def image_box(image_processor, width: int, height: int) -> tuple[float, float, float, float]:
    """Where a whole image lies in what the image processor makes of it.

    Args:
        image_processor: Resizes the image as a whole, pads it evenly (`resize_mode="pad"`), or resizes it and crops
            its centre, in which case the image reaches beyond the box.
        width, height: Of the image, in px.

    Returns:
        Left, top, right and bottom as fractions of the input's width and height; `(0, 0, 1, 1)` fills it.
    """
    resizes = getattr(image_processor, "do_resize", False)
    size = (getattr(image_processor, "size", None) or {}) if resizes else {}
    resized = frame = (width, height)
    if size.get("width"):
        resized = frame = (size["width"], size["height"])
    if getattr(image_processor, "resize_mode", None) == "pad" and size:
        scale = min(frame[0] / width, frame[1] / height)
        resized = (max(round(width * scale), 1), max(round(height * scale), 1))
    elif size.get("shortest_edge"):
        scale = size["shortest_edge"] / min(width, height)
        resized = frame = (int(width * scale), int(height * scale))
    # In whole pixels, rounded as the processors do it.
    left, top = ((outer - inner) // 2 for outer, inner in zip(frame, resized, strict=True))
    if getattr(image_processor, "do_center_crop", False):
        frame = (image_processor.crop_size["width"], image_processor.crop_size["height"])
        left, top = (-((inner - outer) // 2) for outer, inner in zip(frame, resized, strict=True))
    return left / frame[0], top / frame[1], (left + resized[0]) / frame[0], (top + resized[1]) / frame[1]


def resize_to_image(
    maps: torch.Tensor, width: int, height: int, box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
) -> torch.Tensor:
    """Maps on the pixels of the image that they belong to.

    Args:
        maps (`torch.Tensor` of shape `(N, h, w)`): of the model's input.
        width, height: Of the image, in px.
        box: Where the image lies in the input, see [`image_box`].

    Returns:
        `torch.Tensor` of shape `(N, height, width)`, between the cells bilinear; 0 where the model did not look.
    """
    left, top, right, bottom = box
    across = left + (torch.arange(width, device=maps.device) + 0.5) / width * (right - left)  # of the input, 0 to 1
    down = top + (torch.arange(height, device=maps.device) + 0.5) / height * (bottom - top)
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1) * 2 - 1  # (height, width, 2)
    sampled = F.grid_sample(maps[None], grid[None].to(maps), padding_mode="border", align_corners=False)[0]
    seen = ((down >= 0) & (down <= 1))[:, None] & ((across >= 0) & (across <= 1))
    return sampled * seen
