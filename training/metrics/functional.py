"""Multi-label metrics as pure numpy functions. Every metric says which of its definitions it is.

`scores` is (n, num_labels), higher is more certain; `labels` of the same shape holds 1 present, 0 absent, -100 or NaN
unknown. Unknown entries count in no metric. A label without a known positive has no average precision: it is left out
of every mean over labels and counted. No mean is ever NaN.

Both matrices are read in blocks, so that scores on disk or computed as they are read, and sparse labels, need no dense
copy: memory grows with the block and the number of positives, time with n * num_labels * log. `scores` may be whatever
has a `shape`, a numpy `dtype` and slices: an array, a `numpy.memmap`, a matrix of h5py or zarr, or an own class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .ranking import (
    PooledRanking,
    RankedPositives,
    check_inputs,
    iterate_blocks,
    map_blocks,
    no_positive,
    rank_positives,
    ranked_label_positives,
)

AP_METHODS = ("non_interpolated", "voc07", "voc10")


def average_precision(
    scores: np.ndarray,
    labels: np.ndarray,
    method: str = "non_interpolated",
    *,
    label_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Average precision of each label.

    Args:
        scores: (n, num_labels).
        labels: (n, num_labels) array or scipy sparse matrix of 1, 0, and -100 or NaN for unknown.
        method: "non_interpolated", the mean over positives of the precision at their score; the definition of the
            multi-label papers' numbers, equal to `sklearn.metrics.average_precision_score`, ties included. "voc07", the
            mean over recall 0, 0.1, ..., 1 of the highest precision at that recall or above (PASCAL VOC until 2009).
            "voc10", the area under the monotone envelope of precision over recall (PASCAL VOC from 2010 on).
        label_names: Names for error messages.

    Returns:
        (num_labels,) float64 in [0, 1]; NaN only where a label has no known positive.

    Raises:
        ValueError: shapes that differ, a score that is not finite, a label that is not 1, 0, -100 or NaN.
    """
    if method not in AP_METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(AP_METHODS)}.")
    return _average_precisions_by_label(*check_inputs(scores, labels, label_names), label_names)[method]


def multilabel_report(
    scores: np.ndarray,
    labels: np.ndarray,
    threshold: float | np.ndarray = 0.5,
    top_k: int | None = 3,
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    label_names: Sequence[str] | None = None,
    num_threads: int = 1,
) -> dict[str, float | int]:
    """All metrics of a prediction, as fractions (not percent).

    Args:
        scores: (n, num_labels); read twice, once by label and once by sample.
        labels: (n, num_labels) array or scipy sparse matrix of 1, 0, and -100 or NaN for unknown.
        threshold: A label is predicted where `score >= threshold`; a number, or one per label.
        top_k: Also decide as ML-GCN and its successors do: the `top_k` highest scores of an image (of equal ones the
            first), and of these only those that reach the threshold. None leaves these metrics out.
        groups: Named lists of label indices, for example head, medium and tail classes.
        label_names: Names for error messages.
        num_threads: Blocks that are read and measured at the same time; the result does not depend on it.

    Returns:
        - "mAP": mean over labels of the non-interpolated AP; "mAP_voc07", "mAP_voc10": of the other two definitions
          (what Query2Label prints as mAP is "mAP_voc10"); "mAP_weighted": mean weighted by each label's positives;
          "mAP_micro": AP of all entries in one ranking; "mAP_variance": population variance over labels (times
          10,000: the long-tail papers' percent squared).
        - "CP", "CR": mean over labels of precision (0 where nothing was predicted) and recall; "CF1": their harmonic
          mean, the papers' definition; "CF1_per_class": the mean over labels of F1, also under scikit-learn's name
          "f1_macro"; "OP", "OR", "OF1" over all entries, also "f1_micro". Those but the two aliases again with the
          suffix "_top3" (for `top_k=3`). The code of HSVLT, CSRA and HP-DVAL counts a label that is never predicted as
          one (wrong) prediction in OP and OF1, so that those are lower there: by 7e-4 to 1.6e-2 with three such labels.
        - "ranking_loss", "coverage_error", "LRAP": means over images with a known label, as scikit-learn defines
          them (an image without positives counts 0, 0 and 1).
        - "num_samples", "num_labels", "num_labels_without_positive", "num_unknown".
        - for each group "mAP_<name>" and "num_labels_<name>", the labels in that mean; a group none of whose labels
          has a positive has no mAP and only the latter, 0.

    Raises:
        ValueError: as `average_precision`; no label has a known positive; a group names a label that does not exist.
    """
    scores, labels = check_inputs(scores, labels, label_names)
    num_samples, num_labels = scores.shape
    threshold = _check_threshold(threshold, scores)
    members = {name: _check_group(name, group, num_labels) for name, group in (groups or {}).items()}
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for no top-k metrics.")

    def rank(part: slice, block: np.ndarray, positive: np.ndarray, known: np.ndarray):
        ranked = rank_positives(block, positive, known)
        return _average_precisions(ranked, len(block)), ranked.value

    def measure(part: slice, block: np.ndarray, positive: np.ndarray, known: np.ndarray):
        above = (block >= threshold) & known
        counted = _count(above, positive)
        top_counted = 0 if top_k is None else _count(above & _highest(block, top_k), positive)
        return counted, top_counted, block[known], _ranking_sums(block, positive, known)

    by_label, positive_scores = zip(
        *map_blocks(rank, scores, labels, "label", label_names, num_threads=num_threads), strict=True
    )
    precisions = {method: np.concatenate([part[method] for part in by_label]) for method in AP_METHODS}
    rated = ~np.isnan(precisions["non_interpolated"])
    if not rated.any():
        raise no_positive(scores.shape, "measure")
    counts = np.zeros((3, num_labels), dtype=np.int64)  # hits, predicted, positives
    top_counts = counts.copy()
    num_known = 0
    pooled = PooledRanking(np.concatenate(positive_scores), num_samples * num_labels)
    ranking = np.zeros(4)  # images with a known label; sums of ranking loss, coverage and LRAP over them
    for counted, top_counted, entries, sums in map_blocks(
        measure, scores, labels, "sample", label_names, num_threads=num_threads
    ):
        counts += counted
        top_counts += top_counted
        num_known += len(entries)
        pooled.add(entries)
        ranking += sums

    ap = precisions["non_interpolated"][rated]
    report = {
        "mAP": ap.mean(),
        "mAP_voc07": precisions["voc07"][rated].mean(),
        "mAP_voc10": precisions["voc10"][rated].mean(),
        "mAP_weighted": np.average(ap, weights=counts[2, rated]),
        "mAP_micro": _average_precisions(pooled.ranked(), 1)["non_interpolated"][0],
        "mAP_variance": ap.var(),
    }
    for name, group in members.items():
        group = group[rated[group]]
        if len(group):
            report[f"mAP_{name}"] = precisions["non_interpolated"][group].mean()
        report[f"num_labels_{name}"] = len(group)
    report |= _named_as_elsewhere(_decision_metrics(*counts))
    if top_k is not None:
        report |= {f"{name}_top{top_k}": value for name, value in _decision_metrics(*top_counts).items()}
    num_ranked, ranking_loss, coverage_error, lrap = ranking
    report |= {
        "ranking_loss": ranking_loss / num_ranked,
        "coverage_error": coverage_error / num_ranked,
        "LRAP": lrap / num_ranked,
        "num_samples": num_samples,
        "num_labels": num_labels,
        "num_labels_without_positive": int((~rated).sum()),
        "num_unknown": num_samples * num_labels - num_known,
    }
    return {name: value if isinstance(value, int) else float(value) for name, value in report.items()}


def decision_report(scores: np.ndarray, labels: np.ndarray, threshold: float | np.ndarray = 0.5) -> dict[str, float]:
    """Of `multilabel_report` "CP" to "OF1", "f1_macro" and "f1_micro" alone, in one reading and without a ranking.

    Raises:
        ValueError: as `multilabel_report`.
    """
    scores, labels = check_inputs(scores, labels)
    threshold = _check_threshold(threshold, scores)
    counts = np.zeros((3, scores.shape[1]), dtype=np.int64)
    for _, block, positive, known in iterate_blocks(scores, labels, "sample"):
        counts += _count((block >= threshold) & known, positive)
    if not counts[2].any():
        raise no_positive(scores.shape, "measure")
    return {name: float(value) for name, value in _named_as_elsewhere(_decision_metrics(*counts)).items()}


def per_label_report(
    scores: np.ndarray,
    labels: np.ndarray,
    threshold: float | np.ndarray = 0.5,
    *,
    label_names: Sequence[str] | None = None,
) -> dict[str, list]:
    """One list per column, with one entry per label.

    Args:
        scores, labels, threshold, label_names: See `multilabel_report`.

    Returns:
        "AP" (non-interpolated), "precision", "recall", "f1", "tp", "predicted", "positives", "known" and "threshold".
        Precision is 0 where nothing was predicted; AP, recall and F1 are NaN for a label without a known positive.

    Raises:
        ValueError: as `average_precision`.
    """
    scores, labels = check_inputs(scores, labels, label_names)
    threshold = _check_threshold(threshold, scores)
    tp, predicted, positives, known_rows = np.zeros((4, scores.shape[1]), dtype=np.int64)
    for part, block, positive, known in iterate_blocks(scores, labels, "label", label_names):
        above = ((block >= threshold[part, None]) & known).T
        tp[part], predicted[part], positives[part] = _count(above, positive.T)
        known_rows[part] = known.sum(1)
    rated = np.where(positives > 0, 1.0, np.nan)
    return {
        "AP": _average_precisions_by_label(scores, labels, label_names)["non_interpolated"].tolist(),
        "precision": (tp / np.maximum(predicted, 1)).tolist(),
        "recall": (rated * tp / np.maximum(positives, 1)).tolist(),
        "f1": (rated * 2 * tp / np.maximum(predicted + positives, 1)).tolist(),
        "tp": tp.tolist(),
        "predicted": predicted.tolist(),
        "positives": positives.tolist(),
        "known": known_rows.tolist(),
        "threshold": threshold.tolist(),
    }


def _average_precisions_by_label(scores, labels, label_names) -> dict[str, np.ndarray]:
    """(num_labels,) AP by each method."""
    parts = [
        _average_precisions(ranked, part.stop - part.start)
        for part, ranked in ranked_label_positives(scores, labels, label_names)
    ]
    return {method: np.concatenate([part[method] for part in parts]) for method in AP_METHODS}


def _average_precisions(ranked: RankedPositives, num_rows: int) -> dict[str, np.ndarray]:
    """(num_rows,) AP by each method, NaN for a row without positives."""
    precision = ranked.hits / ranked.predicted
    bounds = np.searchsorted(ranked.row, np.arange(num_rows + 1))
    result = np.full((3, num_rows), np.nan)
    for row in np.flatnonzero(np.diff(bounds)):
        of_row = slice(bounds[row], bounds[row + 1])
        positives = of_row.stop - of_row.start
        # The highest precision at this recall or any above it.
        envelope = np.maximum.accumulate(precision[of_row][::-1])[::-1]
        # In integers: as fractions, 3 of 10 positives might miss the recall level 0.3 by rounding.
        reached = np.searchsorted(10 * ranked.hits[of_row], positives * np.arange(11))
        result[:, row] = precision[of_row].mean(), envelope[reached].mean(), envelope.mean()
    return dict(zip(AP_METHODS, result, strict=True))


def _ranking_sums(scores: np.ndarray, positive: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Over the rows of a block: how many have a known label, and the sums of ranking loss, coverage error and LRAP."""
    ranked = rank_positives(scores, positive, known)
    num_known, num_positive = known.sum(1), positive.sum(1)
    wrong_pairs = np.bincount(ranked.row, ranked.predicted - ranked.hits, minlength=len(scores))
    loss = wrong_pairs / np.maximum(num_positive * (num_known - num_positive), 1)
    coverage = np.zeros(len(scores), dtype=np.int64)
    np.maximum.at(coverage, ranked.row, ranked.predicted)
    precision = np.bincount(ranked.row, ranked.hits / ranked.predicted, minlength=len(scores))
    lrap = np.where(num_positive > 0, precision / np.maximum(num_positive, 1), num_known > 0)
    return np.array([np.count_nonzero(num_known), loss.sum(), coverage.sum(), lrap.sum()])


def _highest(scores: np.ndarray, top_k: int) -> np.ndarray:
    """Boolean mask of the `top_k` highest scores of each row, of equal ones the first.

    Unknown entries take part, as in the papers' code, where the selection comes before the mask.
    """
    if top_k >= scores.shape[1]:
        return np.ones(scores.shape, dtype=bool)
    limit = np.partition(scores, -top_k, axis=1)[:, [-top_k]]
    chosen = scores >= limit
    tied = np.flatnonzero(chosen.sum(1) > top_k)
    above, equal = scores[tied] > limit[tied], scores[tied] == limit[tied]
    chosen[tied] = above | (equal & (equal.cumsum(1) <= top_k - above.sum(1, keepdims=True)))
    return chosen


def _count(decided: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """(3, num_labels): hits, predicted and positives, of (n, num_labels) masks."""
    return np.stack([(decided & positive).sum(0), decided.sum(0), positive.sum(0)])


def _decision_metrics(tp: np.ndarray, predicted: np.ndarray, positives: np.ndarray) -> dict[str, float]:
    """CP, CR, both CF1, OP, OR, OF1 of (num_labels,) counts. Overall counts include labels without positives: what is
    predicted there is wrong."""

    def harmonic_mean(precision: float, recall: float) -> float:
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    rated = positives > 0
    cp = (tp / np.maximum(predicted, 1))[rated].mean()
    cr = (tp[rated] / positives[rated]).mean()
    op, recall = tp.sum() / max(predicted.sum(), 1), tp.sum() / positives.sum()
    return {
        "CP": cp,
        "CR": cr,
        "CF1": harmonic_mean(cp, cr),
        "CF1_per_class": (2 * tp / np.maximum(predicted + positives, 1))[rated].mean(),
        "OP": op,
        "OR": recall,
        "OF1": harmonic_mean(op, recall),
    }


def _named_as_elsewhere(decided: dict[str, float]) -> dict[str, float]:
    """Two of `_decision_metrics` under scikit-learn's names as well."""
    return decided | {"f1_macro": decided["CF1_per_class"], "f1_micro": decided["OF1"]}


def _check_threshold(threshold: float | np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(num_labels,) thresholds in the scores' own precision: a stored one then decides as it did when fitted."""
    threshold = np.asarray(threshold, dtype=scores.dtype if np.issubdtype(scores.dtype, np.floating) else np.float64)
    if threshold.shape not in ((), scores.shape[1:]) or not np.isfinite(threshold).all():
        raise ValueError(
            f"threshold must be a number or {scores.shape[1]} finite numbers, one per label, but it has shape "
            f"{threshold.shape}" + ("." if np.isfinite(threshold).all() else " and holds one that is not finite.")
        )
    return np.broadcast_to(threshold, scores.shape[1:])


def _check_group(name: str, group: Sequence[int], num_labels: int) -> np.ndarray:
    """Label indices of a group, checked."""
    indices = np.asarray(group)
    if indices.ndim != 1 or (len(indices) and not np.issubdtype(indices.dtype, np.integer)):
        raise ValueError(f"The group {name!r} must be a list of label indices.")
    indices = indices.astype(np.int64)
    outside = indices[(indices < 0) | (indices >= num_labels)]
    if len(outside):
        raise ValueError(f"The group {name!r} names label {outside[0]}, but labels are numbered 0 to {num_labels - 1}.")
    return indices
