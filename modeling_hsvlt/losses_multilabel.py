"""Losses for multi-label classification, all with one signature.

Every loss takes `logits` (batch, num_labels) and `labels` of the same shape under the package's label contract:
1 present, 0 absent, in between a soft label, -100 (`UNKNOWN_LABEL`) unknown. Unknown entries give no loss and no
gradient. Arithmetic is fp32 whatever the dtype of the logits: the asymmetric loss overflows in fp16.

`reduction="mean"` is the mean over the known entries of the batch, `"sum"` their sum. The asymmetric loss was published
with the sum; going from one to the other changes which learning rate works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


UNKNOWN_LABEL = -100


def validate_labels(labels: torch.Tensor, num_labels: int) -> None:
    """Checks `labels` against the label contract; reads values, so it synchronises the device.

    Args:
        labels (`torch.Tensor` of shape `(batch, num_labels)`): any dtype.
        num_labels (`int`): labels of the model.

    Raises:
        ValueError: a shape other than `(batch, num_labels)`, or a value that is neither in [0, 1] nor -100; the
            message names the first such row and label index.
    """
    if labels.ndim != 2 or labels.shape[1] != num_labels:
        raise ValueError(
            f"labels must be multi-hot with shape (batch, {num_labels}), but their shape is {tuple(labels.shape)}; "
            "give one column per label of the model, 1 present, 0 absent, -100 unknown."
        )
    # Written so that NaN fails as well: it is not within [0, 1].
    valid = ((labels >= 0) & (labels <= 1)) | (labels == UNKNOWN_LABEL)
    if not bool(valid.all()):
        row, column = (~valid).nonzero()[0].tolist()
        raise ValueError(
            f"labels[{row}, {column}] is {labels[row, column].item()}, which is neither in [0, 1] nor -100; "
            "use 1 for present, 0 for absent and -100 for unknown."
        )


def _known_entries(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 logits, fp32 labels with unknown entries set to 0, and the boolean mask of known entries.

    Logits of unknown entries are replaced by 0 before any arithmetic: multiplying by a mask afterwards would let a
    NaN or an infinity of an unknown entry through, in the loss or in its gradient.
    """
    known = labels != UNKNOWN_LABEL
    zero = torch.zeros((), dtype=torch.float32, device=logits.device)
    return torch.where(known, logits.float(), zero), torch.where(known, labels.to(torch.float32), zero), known


def _reduce(loss: torch.Tensor, known: torch.Tensor, reduction: str) -> torch.Tensor:
    loss = loss * known
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / known.sum().clamp(min=1)
    raise ValueError(f"reduction must be 'mean' or 'sum', but it is {reduction!r}.")


def binary_cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    pos_weight: float | list[float] | torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Binary cross-entropy of each label, `-(w y log p + (1 - y) log(1 - p))` with `p = sigmoid(logit)`.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_labels)`): raw scores.
        labels (`torch.Tensor` of shape `(batch, num_labels)`): see the module's label contract.
        pos_weight (`float`, list or tensor of shape `(num_labels,)`, *optional*): weight `w` of the positive term.
        reduction (`str`, defaults to `"mean"`): `"mean"` over known entries, or `"sum"`.

    Returns:
        `torch.Tensor`: a scalar, fp32.
    """
    logits, labels, known = _known_entries(logits, labels)
    if pos_weight is not None:
        pos_weight = torch.as_tensor(pos_weight, dtype=torch.float32, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=pos_weight, reduction="none")
    return _reduce(loss, known, reduction)


def focal_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Focal loss on sigmoids (Lin et al., ICCV 2017, eq. 5): `-alpha_t (1 - p_t)^gamma log p_t`.

    With a soft label `y`, the positive and the negative term are weighted by `y` and `1 - y`, so that a hard label
    gives the paper's formula.

    Args:
        gamma (`float`, defaults to 2.0): focusing exponent; 0 gives (weighted) binary cross-entropy.
        alpha (`float`, *optional*): weight of positives, `1 - alpha` that of negatives; None weights both 1.

    Others as in [`binary_cross_entropy_loss`].
    """
    logits, labels, known = _known_entries(logits, labels)
    positive, negative = F.logsigmoid(logits), F.logsigmoid(-logits)
    probability = torch.sigmoid(logits)
    positive = labels * (1 - probability) ** gamma * positive
    negative = (1 - labels) * probability**gamma * negative
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    return _reduce(-(positive + negative), known, reduction)


def asymmetric_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    clip: float = 0.05,
    reduction: str = "mean",
) -> torch.Tensor:
    """Asymmetric loss (Ridnik et al., ICCV 2021, eq. 7) with probability shifting.

    `-[y (1 - p)^gamma_pos log p + (1 - y) p_m^gamma_neg log(1 - p_m)]`, `p_m = max(p - clip, 0)`. The focusing
    weights are constants for the gradient, as in the published code, and logarithms are clamped at 1e-8.
    The authors sum over batch and labels; ask for that with `reduction="sum"`.

    Args:
        gamma_neg (`float`, defaults to 4.0): focusing exponent of negatives.
        gamma_pos (`float`, defaults to 0.0): focusing exponent of positives.
        clip (`float`, defaults to 0.05): probability margin under which a negative gives no loss.

    Others as in [`binary_cross_entropy_loss`].
    """
    logits, labels, known = _known_entries(logits, labels)
    probability = torch.sigmoid(logits)
    negative_probability = (1 - probability + clip).clamp(max=1)  # 1 - p_m
    loss = labels * probability.clamp(min=1e-8).log() + (1 - labels) * negative_probability.clamp(min=1e-8).log()
    if gamma_neg > 0 or gamma_pos > 0:
        with torch.no_grad():
            p_t = probability * labels + negative_probability * (1 - labels)
            weight = (1 - p_t).clamp(min=0) ** (gamma_pos * labels + gamma_neg * (1 - labels))
        loss = loss * weight
    return _reduce(-loss, known, reduction)


MULTILABEL_LOSSES = {
    "bce": binary_cross_entropy_loss,
    "focal": focal_loss,
    "asl": asymmetric_loss,
}


def multilabel_loss(
    logits: torch.Tensor, labels: torch.Tensor, loss_type: str = "bce", loss_kwargs: dict | None = None
) -> torch.Tensor:
    """The loss that a model config names, `config.loss_type` with `config.loss_kwargs`.

    Args:
        logits, labels (`torch.Tensor` of shape `(batch, num_labels)`): see [`binary_cross_entropy_loss`].
        loss_type (`str`, defaults to `"bce"`): a key of `MULTILABEL_LOSSES`.
        loss_kwargs (`dict`, *optional*): keyword arguments of that loss.

    Raises:
        ValueError: an unknown `loss_type`.
    """
    if loss_type not in MULTILABEL_LOSSES:
        raise ValueError(f"loss_type {loss_type!r} is unknown; choose one of {sorted(MULTILABEL_LOSSES)}.")
    return MULTILABEL_LOSSES[loss_type](logits, labels, **(loss_kwargs or {}))


__all__ = [
    "MULTILABEL_LOSSES",
    "UNKNOWN_LABEL",
    "asymmetric_loss",
    "binary_cross_entropy_loss",
    "focal_loss",
    "multilabel_loss",
    "validate_labels",
]
