"""Per-label decision thresholds: fitted to scores, and stored in a checkpoint's config.json.

The highest F1 of a few positives lies at a cut that other images would not choose (the winner's curse of Lipton, Elkan
and Naryanaswamy, "Optimal Thresholding of Classifiers to Maximize F1 Measure", 2014), so the objective "f1" draws a
label's own cut to where calibrated scores, two numbers a label, promise the highest F1. That this is better on other
images, and the numbers below, was measured: `benchmarks/README.md`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

from ..checkpoint.atomic import write_file
from ..checkpoint.public_names import public_name
from ..metrics.ranking import (
    RankedPositives,
    check_inputs,
    iterate_blocks,
    no_positive,
    rank_pooled_positives,
    ranked_label_positives,
)
from .calibration import logits_of, lowest_log_loss
from .reliability import check_range

OBJECTIVES = ("f1", "precision", "recall", "cost")
MIN_POSITIVES = 10
CALIBRATED_POSITIVES = 100  # with so many, a label's own cut weighs as much as that of its calibrated scores
SHARED_SHRINKAGE = 1.0  # weak: scores may be on any scale
BIN_WIDTH = 1 / 16  # of logits
_BINS = np.arange(-28, 18, BIN_WIDTH) + BIN_WIDTH / 2  # their middles


def fit_thresholds(
    scores: np.ndarray,
    labels: np.ndarray,
    objective: str = "f1",
    target: float | None = None,
    *,
    min_positives: int = MIN_POSITIVES,
    label_names: Sequence[str] | None = None,
) -> np.ndarray:
    """The best threshold of each label under `score >= threshold`; every cut between two scores is tried.

    A threshold lies halfway between the lowest score that is let through, a positive's, and the next lower one. Of
    equally good cuts the one that finds more is taken. Only "cost" may let nothing through: its threshold then lies
    halfway between the highest score and 1.

    For "f1" it is instead the middle of all cuts whose F1 is at most half a standard error, sqrt(F1 (1 - F1) /
    positives), below the highest. This is averaged, at the weight positives / 100 to 1, with the score whose calibrated
    probability is half of the highest F1 to be expected of calibrated scores.

    Args:
        scores: (n, num_labels) in [0, 1]; may be memory-mapped, see `training.metrics.functional`.
        labels: (n, num_labels) array or scipy sparse matrix of 1, 0, and -100 or NaN for unknown.
        objective: "f1", a high F1 on other images; "precision", the highest recall at a precision of at least
            `target`, or the highest precision where the label cannot reach it; "recall", the highest precision at a
            recall of at least `target`; "cost", the lowest cost where a false negative costs 1 and a false positive
            `target` (for calibrated scores, near target / (1 + target)).
        target: Wanted precision or recall in (0, 1], or what a false positive costs, above 0; None for "f1".
        min_positives: A label with fewer known positives gets a mean of its own best threshold and of the shared one,
            the best for all entries of all labels together; its own has the weight positives / min_positives. A label
            without any gets the shared one. 0: labels with a positive keep their own.
        label_names: Names for error messages.

    Returns:
        (num_labels,) float32.

    Raises:
        ValueError: bad scores or labels, no known positive at all, a target that is missing or does not fit.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is none of {', '.join(OBJECTIVES)}.")
    if objective == "f1" and target is not None:
        raise ValueError(f"target={target} has no meaning with the objective 'f1'; leave it out.")
    if objective == "cost" and (target is None or not 0 < target < np.inf):
        raise ValueError(
            f"The objective 'cost' needs a target above 0, what a false positive costs where a false negative costs 1, "
            f"but target is {target}."
        )
    if objective in ("precision", "recall") and (target is None or not 0 < target <= 1):
        raise ValueError(f"The objective {objective!r} needs a target in (0, 1], but target is {target}.")
    scores, labels = check_inputs(scores, labels, label_names)
    check_range(scores)
    own, positives = np.empty(scores.shape[1]), np.zeros(scores.shape[1], dtype=np.int64)
    for part, ranked in ranked_label_positives(scores, labels, label_names):
        num_rows = part.stop - part.start
        own[part] = _best_cuts(ranked, num_rows, objective, target)
        positives[part] = np.bincount(ranked.row, minlength=num_rows)
    if not positives.any():
        raise no_positive(scores.shape, "fit to")
    if objective != "f1" and (positives >= max(min_positives, 1)).all():
        return own.astype(np.float32)
    shared = _best_cuts(rank_pooled_positives(scores, labels), 1, objective, target)[0]
    own = np.where(positives > 0, own, shared)
    if objective == "f1":
        lean = min_positives / 10
        drawn_to = (positives * _calibrated_cuts(scores, labels) + lean * shared) / np.maximum(positives + lean, 1)
        fitted = (positives * own + CALIBRATED_POSITIVES * drawn_to) / (positives + CALIBRATED_POSITIVES)
        return np.where(positives > 0, fitted, shared).astype(np.float32)
    weight = np.minimum(positives / max(min_positives, 1), 1)
    return np.where(weight == 1, own, weight * own + (1 - weight) * shared).astype(np.float32)


def threshold_info(
    labels: np.ndarray,
    objective: str = "f1",
    target: float | None = None,
    min_positives: int = MIN_POSITIVES,
    *,
    dataset: str,
    split: str,
) -> dict:
    """What a checkpoint says about its thresholds: how they were fitted, when, and to which rows."""
    return {
        "objective": objective,
        "target": target,
        "min_positives": min_positives,
        **fit_record(labels, dataset=dataset, split=split),
    }


def fit_record(labels: np.ndarray, *, dataset: str, split: str) -> dict:
    """Which rows something was fitted to, and when.

    `split_fingerprint` is the start of the SHA-256 of the labels in row order, so that it can be told whether two fits
    saw the same rows and labels.
    """
    labels = np.ascontiguousarray(labels, dtype=np.float32)
    return {
        "dataset": public_name(dataset),
        "split": split,
        "split_fingerprint": hashlib.sha256(repr(labels.shape).encode() + labels.tobytes()).hexdigest()[:16],
        "num_samples": len(labels),
        "date": datetime.now(UTC).date().isoformat(),
    }


def store_thresholds(model_or_folder, thresholds: Sequence[float], info: dict) -> None:
    """Writes `thresholds` and `threshold_info` into a model's config, or into the config.json of a checkpoint folder.

    The file is replaced in one step: a kill leaves the old or the new one.

    Args:
        model_or_folder: A model, or the folder of its checkpoint.
        thresholds: One per label, in class order.
        info: How they were fitted; anything JSON holds.

    Raises:
        FileNotFoundError: the folder holds no config.json.
        ValueError: the checkpoint has another number of labels, or a threshold is not finite.
    """
    thresholds = [float(threshold) for threshold in thresholds]
    if not np.isfinite(thresholds).all():
        raise ValueError(f"The thresholds {thresholds} hold one that is not finite.")
    values = {"thresholds": thresholds, "threshold_info": dict(info)}
    if hasattr(model_or_folder, "config"):
        _check_count(thresholds, model_or_folder.config.num_labels, type(model_or_folder).__name__)
        for name, value in values.items():
            setattr(model_or_folder.config, name, value)
        return
    path = Path(model_or_folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a checkpoint.")
    config = json.loads(path.read_text(encoding="utf-8"))
    # transformers writes no id2label where it is the default, which has two labels.
    _check_count(thresholds, len(config.get("id2label", range(2))), path)
    write_file(path, json.dumps(config | values, indent=2, sort_keys=True) + "\n")  # as transformers writes it


def _check_count(thresholds: list[float], num_labels: int, where: object) -> None:
    if len(thresholds) != num_labels:
        raise ValueError(f"There are {len(thresholds)} thresholds, but {where} has {num_labels} labels.")


def _best_cuts(ranked: RankedPositives, num_rows: int, objective: str, target: float | None) -> np.ndarray:
    """(num_rows,) best threshold of each row; NaN for a row without positives."""
    bounds = np.searchsorted(ranked.row, np.arange(num_rows + 1))
    totals = np.diff(bounds)[ranked.row]
    precision, recall = ranked.hits / ranked.predicted, ranked.hits / totals
    if objective == "f1":
        gain = 2 * ranked.hits / (ranked.predicted + totals)
    elif objective == "precision":
        gain = np.where(precision >= target, 1 + recall, precision)
    elif objective == "recall":
        gain = np.where(recall >= target, 1 + precision, recall)
    else:  # what is saved against finding nothing, which misses every positive
        gain = ranked.hits - target * (ranked.predicted - ranked.hits)
    # Halfway between neighbouring float32 numbers is rounded to one of them, perhaps to the lower one.
    halfway = ((ranked.value + np.maximum(ranked.below, 0)) / 2).astype(np.float32)
    halfway = np.where(halfway > ranked.below, halfway, ranked.value)
    if objective == "cost":
        highest = ranked.highest.astype(np.float32)
        above = np.maximum((highest + 1) / 2, np.nextafter(highest, np.float32(2)))  # over 1 where a score is 1
    cuts = np.full(num_rows, np.nan)
    for row in np.flatnonzero(np.diff(bounds)):
        of_row = gain[bounds[row] : bounds[row + 1]]
        last_best = bounds[row + 1] - 1 - np.argmax(of_row[::-1])
        if objective == "f1":
            best = gain[last_best]
            near = bounds[row] + np.flatnonzero(of_row >= best - np.sqrt(best * (1 - best) / len(of_row)) / 2)
            cuts[row] = (ranked.value[near[0]] + max(ranked.below[near[-1]], 0)) / 2
            continue
        nothing_is_better = objective == "cost" and gain[last_best] < 0
        cuts[row] = above[last_best] if nothing_is_better else halfway[last_best]
    return cuts


def _calibrated_cuts(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(num_labels,) scores at which each label's calibrated probability is half of the highest F1 to be expected.

    Half of it is the best threshold of calibrated probabilities (Lipton et al.). The calibration is that of
    `fit_calibration`, from counts in bins of logits, which take the same memory for any number of images.
    """
    known_in, positive_in = np.zeros((2, scores.shape[1], len(_BINS)), dtype=np.int32)
    for part, block, positive, known in iterate_blocks(scores, labels, "label"):
        bins = ((logits_of(block) + 28) / BIN_WIDTH).astype(np.int64) + len(_BINS) * np.arange(len(block))[:, None]
        for counts, entries in ((known_in, known), (positive_in, positive)):
            counts[part] = np.bincount(bins[entries], minlength=len(block) * len(_BINS)).reshape(len(block), -1)
    shared = lowest_log_loss(_BINS, positive_in.sum(0), np.zeros(2), SHARED_SHRINKAGE, count=known_in.sum(0))
    cuts = np.empty(len(known_in))
    for label, (known, positive) in enumerate(zip(known_in, positive_in, strict=True)):
        log_scale, bias = lowest_log_loss(_BINS, positive, shared, count=known)
        scale = np.exp(log_scale)
        found = (known * expit(scale * _BINS + bias))[::-1].cumsum()
        f1 = 2 * found / np.maximum(known[::-1].cumsum() + found[-1], 1e-12)
        cuts[label] = expit((logit(np.clip(f1.max() / 2, 1e-12, 0.5)) - bias) / scale)
    return cuts
