"""Losses for multi-label classification, all with one signature.

Every loss takes `logits` (batch, num_labels) and `labels` of the same shape, under `label_contract`. Unknown entries
give no loss and no gradient, except in `weak_assume_negative_loss`, whose purpose it is. Arithmetic is fp32 whatever
the dtype of the logits: the asymmetric loss overflows in fp16.

`reduction="mean"` is the mean over the known entries of the batch, `"sum"` their sum, `"none"` leaves them apart. The
asymmetric loss was published with the sum; going from one to the other changes which learning rate works. Where an
optimizer step sees several batches, [`multilabel_loss`] divides by the known entries of them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .label_contract import UNKNOWN_LABEL, labels_like


def _known_entries(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 logits, fp32 labels with unknown entries set to 0, and the boolean mask of known entries.

    Logits of unknown entries are replaced by 0 before any arithmetic: multiplying by a mask afterwards would let a
    NaN or an infinity of an unknown entry through, in the loss or in its gradient.
    """
    labels = labels_like(logits, labels)
    known = labels != UNKNOWN_LABEL
    zero = torch.zeros((), dtype=torch.float32, device=logits.device)
    return torch.where(known, logits.float(), zero), torch.where(known, labels, zero), known


def _reduce(loss: torch.Tensor, known: torch.Tensor, reduction: str) -> torch.Tensor:
    loss = loss * known
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / known.sum().clamp(min=1)
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', but it is {reduction!r}.")


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
        labels (`torch.Tensor` of shape `(batch, num_labels)`): see `label_contract`; an array or nested
            lists as well.
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


def distribution_balanced_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    class_counts: list[float] | torch.Tensor,
    num_samples: int,
    tau: float = 0.1,
    beta: float = 10.0,
    mu: float = 0.2,
    negative_scale: float = 2.0,
    kappa: float = 0.025,
    positive_weight: str | float = "none",
    focal_gamma: float = 0.0,
    focal_alpha: float = 2.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Distribution-balanced loss for long-tailed labels (DB: Wu et al., ECCV 2020), and HP-DVAL's DB* (eq. 11 to 15).

    With `n_i` the positives of label i among `n` training images, `s` a logit and `L = negative_scale`:

    - re-balanced weight `r_i = tau + sigmoid(beta (rhat_i - mu))`, `rhat_i = (1 / n_i) / sum_{j: y_j = 1} (1 / n_j)`:
      undoes the sampling that co-occurrence brings along. An image without a positive takes its limit, `1 + tau`.
      (HP-DVAL prints that sum over all labels; the original, and the code of both, sum over the image's positives.)
    - class prior `v_i = kappa log(n / n_i - 1)`: a rare label is asked for a higher score.
    - `r_i [y softplus(-w_i (s - v_i)) + (1 - y) / L softplus(L (s - v_i))]`: negatives are tolerated.

    Each element is weighted by itself; the port of DB that HP-DVAL's code inherited averages before its focal step.

    Args:
        logits (`torch.Tensor` of shape `(batch, num_labels)`): raw scores.
        labels (`torch.Tensor` of shape `(batch, num_labels)`): see `label_contract`.
        class_counts (list or tensor of shape `(num_labels,)`): `n_i`, positives of each label in the training set. A
            label that is never (or always) present counts as present (or absent) once, so that its prior is finite.
        num_samples (`int`): `n`, images of the training set.
        tau, beta, mu (`float`): constants of the re-balanced weight; `mu` is 0.2 for COCO-LT, 0.3 for VOC-LT.
        negative_scale (`float`, defaults to 2.0): `L`; 2 for COCO-LT, 5 for VOC-LT.
        kappa (`float`, defaults to 0.025): scale of the prior, published as 0.05 / L: 0.025 and 0.01.
        positive_weight (`str` or `float`, defaults to `"none"`): `w_i`. `"none"`: 1 (DB). `"class"`: `n_i / max n_j`
            (DB*, HP-DVAL eq. 14); it takes nearly all gradient from the positives of tail labels. A number: that number
            for all labels (HP-DVAL's code of phase 1: 5 for COCO-LT, 10 for VOC-LT).
        focal_gamma (`float`, defaults to 0.0): above 0, multiplies each element by `focal_alpha (1 - p_t)^focal_gamma`,
            `p_t = exp(-element before r and 1 / L)`. 2 gives DB-focal, what both papers' tables call DB.
        focal_alpha (`float`, defaults to 2.0): see `focal_gamma`.
        reduction (`str`, defaults to `"mean"`): `"mean"` over known entries, or `"sum"`.

    Returns:
        `torch.Tensor`: a scalar, fp32.

    Raises:
        ValueError: counts of another number of labels or outside [0, num_samples], or an unknown `positive_weight`.
    """
    logits, labels, known = _known_entries(logits, labels)
    counts = _class_counts(class_counts, num_samples, logits)
    if positive_weight == "class":
        positive_scale = counts / counts.max()
    elif positive_weight == "none":
        positive_scale = 1.0
    elif isinstance(positive_weight, str):
        raise ValueError(f"positive_weight must be 'none', 'class' or a number, but it is {positive_weight!r}.")
    else:
        positive_scale = float(positive_weight)

    inverse = 1 / counts
    of_positives = (labels * inverse).sum(1, keepdim=True)  # (batch, 1)
    tiny = torch.finfo(torch.float32).tiny
    weight = tau + torch.sigmoid(beta * (inverse / of_positives.clamp(min=tiny) - mu))

    shifted = logits - kappa * torch.log(num_samples / counts - 1)
    positive = labels * F.softplus(-positive_scale * shifted)
    negative = (1 - labels) * F.softplus(negative_scale * shifted)
    loss = weight * (positive + negative / negative_scale)
    if focal_gamma > 0:
        loss = focal_alpha * (-torch.expm1(-(positive + negative))) ** focal_gamma * loss
    return _reduce(loss, known, reduction)


def _class_counts(class_counts, num_samples: int, logits: torch.Tensor) -> torch.Tensor:
    """`class_counts` as a tensor like `logits`, at least 1 and at most `num_samples - 1`."""
    counts = torch.as_tensor(class_counts, dtype=torch.float32, device=logits.device)
    if counts.shape != logits.shape[1:]:
        raise ValueError(
            f"class_counts must hold one number for each of the {logits.shape[1]} labels, but its shape is "
            f"{tuple(counts.shape)}; count the positives of every label in the training set."
        )
    if not torch.compiler.is_compiling() and not bool(((counts >= 0) & (counts <= num_samples)).all()):
        raise ValueError(
            f"class_counts must be between 0 and num_samples={num_samples}, but they go from {counts.min():g} to "
            f"{counts.max():g}; both are counted over the same training set."
        )
    return counts.clamp(min=1, max=num_samples - 1)


def zlpr_loss(logits: torch.Tensor, labels: torch.Tensor, *, reduction: str = "mean") -> torch.Tensor:
    """Zero-bounded log-sum-exp and pairwise rank-based loss (ZLPR: Su et al., 2022, arXiv 2208.02955).

    `log(1 + sum_{y=1} e^-s) + log(1 + sum_{y=0} e^s)` of each image: every positive ranks above 0, every negative
    below. A soft label `y` enters the two sums with weight `y` and `1 - y`.

    Args:
        reduction (`str`, defaults to `"mean"`): `"mean"` over images with a known label, or `"sum"` over images.

    Others as in [`binary_cross_entropy_loss`].
    """
    logits, labels, known = _known_entries(logits, labels)
    zero = logits.new_zeros(len(logits), 1)
    positive = torch.cat((zero, -logits + torch.log(labels)), dim=1).logsumexp(1)
    negative = torch.cat((zero, logits + torch.log((1 - labels) * known)), dim=1).logsumexp(1)
    return _reduce(positive + negative, known.any(1), reduction)


def two_way_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, positive_temperature: float = 4.0, reduction: str = "mean"
) -> torch.Tensor:
    """Two-way multi-label loss (Kobayashi, CVPR 2023): positives against negatives, along each image (which labels)
    and along each label (which images of the batch).

    `softplus(log sum_{y=0} e^s + T log sum_{y=1} e^(-s / T))`, `T = positive_temperature`, along every row and every
    column that has a positive. A soft label `y` enters the two sums with weight `1 - y` and `y`. The column part
    compares the images of one batch, so it depends on the batch size.

    Args:
        positive_temperature (`float`, defaults to 4.0): `T`; above 1 a label's easy positives count as well.
        reduction (`str`, defaults to `"mean"`): mean over the rows with a positive plus mean over the columns with one,
            or `"sum"` of both.

    Others as in [`binary_cross_entropy_loss`].
    """
    logits, labels, known = _known_entries(logits, labels)
    loss = logits.new_zeros(())
    for dim in (1, 0):
        positive = positive_temperature * _weighted_logsumexp(-logits / positive_temperature, labels, dim)
        negative = _weighted_logsumexp(logits, (1 - labels) * known, dim)
        loss = loss + _reduce(F.softplus(positive + negative), (labels > 0).any(dim), reduction)
    return loss


def _weighted_logsumexp(values: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """`log sum weight e^values`; very negative, with zero gradient (-inf would give NaN), where every weight is 0."""
    weighted = values + torch.log(weight.clamp(min=torch.finfo(torch.float32).tiny))
    return torch.where(weight > 0, weighted, -1e30).logsumexp(dim)


def partial_binary_cross_entropy_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    alpha: float = -4.45,
    beta: float = 5.45,
    gamma: float = 1.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Partial-BCE for images of which some labels are unknown (Durand, Mehrasa and Mori, CVPR 2019).

    `g(p) / C * sum_{known} BCE`, `g(p) = alpha p^gamma + beta`, with `p` the known fraction of an image's `C` labels:
    an image counts by how many labels it has, but less than in proportion. With every label known it is
    binary cross-entropy if `alpha + beta` is 1. An image with a positive and no known negative teaches to answer yes
    to everything; for single positives take [`weak_assume_negative_loss`].

    Args:
        alpha, beta, gamma (`float`): of `g`. The defaults, usual in public code, give `g(1) = 1` and `g(0.1) = 5`;
            1, 0, -1 average over each image's known labels.
        reduction (`str`, defaults to `"mean"`): `"mean"` over images with a known label, or `"sum"` over images.

    Others as in [`binary_cross_entropy_loss`].
    """
    logits, labels, known = _known_entries(logits, labels)
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none") * known
    fraction = known.float().mean(1)
    weight = alpha * fraction.clamp(min=1 / known.shape[1]) ** gamma + beta
    return _reduce(weight * loss.mean(1), known.any(1), reduction)


def weak_assume_negative_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    unknown_weight: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Binary cross-entropy in which an unknown label is a negative of little weight (WAN: Cole et al., CVPR 2021), for
    images with a single known positive: without any negative a model would learn to answer yes to everything.

    `1 / C * (sum_{known} BCE - w sum_{unknown} log(1 - p))` of each image with `C` labels.

    Args:
        unknown_weight (`float`, *optional*): `w`; None is the paper's `1 / (C - 1)`, by which an image's unknown
            labels together weigh as much as its one positive. 1 takes unknown for absent, 0 leaves it out.
        reduction (`str`, defaults to `"mean"`): `"mean"` over all entries, known or not, or `"sum"`. An image of which
            nothing is known gives no loss.

    Others as in [`binary_cross_entropy_loss`].
    """
    labels = labels_like(logits, labels)
    known = labels != UNKNOWN_LABEL
    used = known.any(1, keepdim=True).expand_as(known)
    if unknown_weight is None:
        unknown_weight = 1 / max(labels.shape[1] - 1, 1)
    # An unknown label of an image that is used becomes 0, absent; the others keep -100.
    targets = torch.where(used & ~known, 0, labels) if unknown_weight else labels
    logits, targets, entered = _known_entries(logits, targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * entered
    return _reduce(torch.where(known, loss, unknown_weight * loss), used, reduction)


MULTILABEL_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "bce": binary_cross_entropy_loss,
    "focal": focal_loss,
    "asl": asymmetric_loss,
    "distribution_balanced": distribution_balanced_loss,
    "zlpr": zlpr_loss,
    "two_way": two_way_loss,
    "partial_bce": partial_binary_cross_entropy_loss,
    "weak_assume_negative": weak_assume_negative_loss,
}


def multilabel_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_type: str = "bce",
    loss_kwargs: dict | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss that a model config names, `config.loss_type` with `config.loss_kwargs`.

    Args:
        logits, labels (`torch.Tensor` of shape `(batch, num_labels)`): see [`binary_cross_entropy_loss`].
        loss_type (`str`, defaults to `"bce"`): a key of `MULTILABEL_LOSSES`.
        loss_kwargs (`dict`, *optional*): keyword arguments of that loss.
        num_items_in_batch (`int` or `torch.Tensor` of shape `()`, *optional*): known entries of a whole optimizer step,
            over all batches and processes, as Trainer counts them. The loss is then this batch's part of the step's, so
            that the parts add up: entry by entry each known label counts once, wherever it is. A loss of whole images
            (ZLPR, partial BCE, weak assume-negative) counts each image by its known labels; the two-way loss, which
            compares the images of a batch, each batch by its own. A configured `reduction="sum"` adds up by itself.

    Raises:
        ValueError: an unknown `loss_type`.
    """
    if loss_type not in MULTILABEL_LOSSES:
        raise ValueError(f"loss_type {loss_type!r} is unknown; choose one of {sorted(MULTILABEL_LOSSES)}.")
    function, arguments = MULTILABEL_LOSSES[loss_type], dict(loss_kwargs or {})
    if num_items_in_batch is None or arguments.get("reduction") == "sum":
        return function(logits, labels, **arguments)
    labels = labels_like(logits, labels)
    known = labels != UNKNOWN_LABEL
    if loss_type == "two_way":
        loss = function(logits, labels, **arguments) * known.sum()
    else:
        losses = function(logits, labels, **{**arguments, "reduction": "none"})
        if loss_type == "weak_assume_negative":
            losses = losses.mean(1)
        loss = (losses if losses.ndim == 2 else losses * known.sum(1)).sum()
    return loss / items_in_step(num_items_in_batch, loss)


def items_in_step(num_items_in_batch: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`num_items_in_batch` as a divisor: at least 1, on the device of `like`, without dimensions."""
    return torch.as_tensor(num_items_in_batch, device=like.device).reshape(-1)[0].clamp(min=1)
