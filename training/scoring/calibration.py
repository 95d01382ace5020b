"""Calibrated scores: a scale and a bias of each label's logit, folded into the linear classifier.

Platt, "Probabilistic outputs for support vector machines" (1999). Temperature scaling and the expected calibration
error with 15 bins: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), here for each label's yes or no.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, logit
from transformers import PreTrainedModel

from ..metrics.ranking import check_inputs, iterate_blocks, no_positive
from .reliability import check_range

METHODS = ("platt", "temperature")
SHRINKAGE = 10.0
# Of float32 scores the highest below 1 is 1 - 2**-24.
_LOWEST, _HIGHEST = 1e-12, 1 - 2.0**-25


class Calibration(NamedTuple):
    """`scale * logit + bias` of each label, both (num_labels,) float64, scale > 0."""

    scale: np.ndarray
    bias: np.ndarray

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Scores (..., num_labels) in [0, 1] to calibrated ones of the same type."""
        return expit(self.scale * logits_of(scores) + self.bias).astype(scores.dtype)

    def inverse(self) -> Calibration:
        """The one that undoes this one."""
        return Calibration(1 / self.scale, -self.bias / self.scale)

    def then(self, second: Calibration) -> Calibration:
        """This one and `second` after it, as one."""
        return Calibration(second.scale * self.scale, second.scale * self.bias + second.bias)


def logits_of(scores: np.ndarray) -> np.ndarray:
    """float64 logits of scores in [0, 1], between -27.7 and 17.4."""
    return logit(np.clip(scores.astype(np.float64), _LOWEST, _HIGHEST))


def fit_calibration(
    scores: np.ndarray,
    labels: np.ndarray,
    method: str = "platt",
    *,
    per_label: bool = True,
    shrinkage: float = SHRINKAGE,
    label_names: Sequence[str] | None = None,
) -> Calibration:
    """The scale and bias of each label's logit with the lowest log loss.

    Args:
        scores: (n, num_labels) in [0, 1], sigmoids of the logits.
        labels: (n, num_labels) array or scipy sparse matrix of 1, 0, and -100 or NaN for unknown, which are left out.
        method: "platt", scale and bias; "temperature", the scale alone (1 / temperature).
        per_label: False fits one for all labels.
        shrinkage: How strongly a label's own fit is drawn to the one of all labels, and that one to no change: adds
            `shrinkage / 2 * (log(scale / shared scale)^2 + (bias - shared bias)^2)` to the log loss, summed over
            entries. A positive tells about as much about a bias as 1 / shrinkage of this, so a label with that many
            positives lies about halfway; one with nothing known has the shared fit. 0: each label on its own.
        label_names: Names for error messages.

    Raises:
        ValueError: bad scores or labels, an unknown method, no known positive at all.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}.")
    if not 0 <= shrinkage < np.inf:
        raise ValueError(f"shrinkage={shrinkage} must be a number from 0 on.")
    scores, labels = check_inputs(scores, labels, label_names)
    check_range(scores)
    of_label = []
    for _, block, positive, known in iterate_blocks(scores, labels, "label", label_names):
        logits = logits_of(block)
        of_label += [(logits[row][known[row]], positive[row][known[row]]) for row in range(len(block))]
    if not any(positive.any() for _, positive in of_label):
        raise no_positive(scores.shape, "fit to")
    pooled = tuple(np.concatenate(parts) for parts in zip(*of_label, strict=True))
    shared = lowest_log_loss(*pooled, np.zeros(2), shrinkage, method)
    fitted = np.tile(shared, (len(of_label), 1))
    if per_label:
        fitted = np.stack([lowest_log_loss(*entries, shared, shrinkage, method) for entries in of_label])
    return Calibration(np.exp(fitted[:, 0]), fitted[:, 1])


def lowest_log_loss(
    logits: np.ndarray,
    positive: np.ndarray,
    center: np.ndarray,
    shrinkage: float = SHRINKAGE,
    method: str = "platt",
    count: np.ndarray | int = 1,
) -> np.ndarray:
    """(2,) log scale and bias, drawn to `center`. By its logarithm, the scale cannot turn negative.

    Args:
        positive: (entries,) which are, or, of `count` entries with one logit, how many.
    """

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = np.exp(parameters[0]), parameters[1]
        scaled = scale * logits + bias
        loss = (count * np.logaddexp(0, scaled) - positive * scaled).sum()
        residual = count * expit(scaled) - positive
        gradient = np.array([scale * (residual * logits).sum(), residual.sum()])
        offset = parameters - center
        loss, gradient = loss + shrinkage / 2 * (offset**2).sum(), gradient + shrinkage * offset
        return loss, gradient

    # Bounds for data that a label separates perfectly, where without shrinkage the loss falls without end.
    bias_range = (-20, 20) if method == "platt" else (center[1], center[1])
    return minimize(
        loss_and_gradient, center, jac=True, method="L-BFGS-B", bounds=[(-5, 5), bias_range], options={"ftol": 1e-12}
    ).x


def stored_calibration(config) -> Calibration | None:
    """What `config.calibration_info` says was folded into the classifier; None if nothing was."""
    info = getattr(config, "calibration_info", None)
    if not info:
        return None
    calibration = Calibration(*(np.array(info[name], dtype=np.float64) for name in ("scale", "bias")))
    if any(values.shape != (config.num_labels,) for values in calibration) or not (calibration.scale > 0).all():
        raise ValueError(f"calibration_info in config.json does not hold {config.num_labels} scales and biases.")
    return calibration


def check_foldable(model: PreTrainedModel, per_label: bool) -> None:
    """
    Raises:
        ValueError: in one sentence, why a calibration cannot become a part of the model.
    """
    name, num_labels = type(model).__name__, model.config.num_labels
    classifier = getattr(model, "classifier", None)
    weight, bias = getattr(classifier, "weight", None), getattr(classifier, "bias", None)
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} does not end in a linear classifier with a bias, which a calibration could be folded into; fit "
            "thresholds in its place with hsvlt thresholds."
        )
    if len(bias) != num_labels and (len(bias) != 1 or per_label):
        raise ValueError(
            f"The classifier of this {name} is one for all {num_labels} labels and cannot hold a scale and bias of "
            "each; fit one of all with --shared."
        )
    if getattr(model.config, "residual_attention", False):
        raise ValueError(
            f"This {name} has residual attention beside its classifier, and the softmax over pixel scores does not "
            "keep a scale; fit thresholds in place of a calibration, with hsvlt thresholds."
        )
    if getattr(model.config, "label_stream", None) == "tied":
        raise ValueError(
            f"The classifier of this {name} is also what its labels attend by (label_stream: tied), which does not "
            "keep a scale; fit thresholds in place of a calibration, with hsvlt thresholds."
        )
    if getattr(model.config, "candidate_labels", None) is not None:
        raise ValueError(
            f"This {name} scores only {model.config.candidate_labels} labels an image (candidate_labels), and the "
            "others have no score to calibrate; set candidate_labels to null in its config.json first."
        )


def fold_calibration(model: PreTrainedModel, calibration: Calibration) -> None:
    """Makes `scale * logit + bias` the model's logits, in place: `W' = scale W`, `b' = scale b + bias`.

    Raises:
        ValueError: see `check_foldable`.
    """
    shared = len({*zip(*calibration, strict=True)}) == 1
    check_foldable(model, per_label=not shared)
    weight, bias = model.classifier.weight, model.classifier.bias
    scale, shift = (torch.from_numpy(values).to(weight.device)[: len(bias)] for values in calibration)
    with torch.no_grad():
        weight.copy_(weight.double() * scale[:, None])
        bias.copy_(bias.double() * scale + shift)


def move_thresholds(thresholds: Sequence[float], calibration: Calibration) -> list[float]:
    """Thresholds that decide on calibrated scores as the old ones did on the scores before."""
    old = np.array(thresholds, dtype=np.float64)
    moved = calibration.apply(old)
    return np.where((old <= 0) | (old >= 1), old, moved).tolist()  # all or nothing is let through, as before


def mean_log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over known entries of -log of what the score gave to what came true."""
    total = known_entries = 0
    for _, block, positive, known in iterate_blocks(scores, labels, "label"):
        given = np.clip(block.astype(np.float64), _LOWEST, _HIGHEST)
        total -= np.log(np.where(positive, given, 1 - given))[known].sum()
        known_entries += known.sum()
    return float(total / known_entries)
