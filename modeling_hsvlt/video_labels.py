"""The labels of a video, from those of its frames."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .label_contract import NOT_EVALUATED
from .processing_multilabel import best_labels

POOLINGS = ("max", "mean", "top_k_mean")


def label_video(
    logits: torch.Tensor,
    times: Sequence[tuple[float, float]],
    id2label: Mapping[int, str],
    cuts: Sequence[float] | float | None,
    top_k: int | None = None,
    *,
    pooling: str = "max",
    pooling_k: int = 5,
    seen_from: Sequence[float] | float | None = None,
) -> list[dict]:
    """The labels of a video.

    Args:
        logits: (frames, labels).
        times: Start and end, in seconds, of what each frame stands for.
        cuts, top_k: As `post_process_multi_label_classification` resolves them, for the pooled scores.
        pooling, pooling_k: As in [`pool_scores`].
        seen_from: From which score on a frame shows a label, a number or one a label; None: no intervals.

    Returns:
        `{"label": ..., "score": ...}` from the highest score to the lowest, with `seen_from` also `"intervals"`, the
        (start, end) in seconds within which the label was seen. Labels that no frame evaluated are left out.
    """
    logits = torch.as_tensor(logits).float().cpu()
    scores, evaluated = logits.sigmoid(), logits > NOT_EVALUATED  # and no NaN
    pooled = torch.from_numpy(pool_scores(scores.numpy(), evaluated.numpy(), pooling, pooling_k)).float()
    labels = best_labels(pooled[None], evaluated.any(dim=0)[None], id2label, cuts, top_k)[0]
    if seen_from is not None:
        present = evaluated & (scores >= torch.tensor(seen_from))
        place = {id2label[index]: index for index in range(len(id2label))}
        for label in labels:
            label["intervals"] = intervals(present[:, place[label["label"]]].tolist(), times)
    return labels


def pool_scores(scores, evaluated=None, pooling: str = "max", pooling_k: int = 5):
    """The scores of a video: of each label the highest of its frames, their mean, or the mean of the `pooling_k`
    highest.

    Args:
        scores: (frames, labels) NumPy array.
        evaluated: Which of them count, of the same shape; others count as 0.

    Returns:
        (labels,) float64.
    """
    check_pooling(pooling, pooling_k)
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores if evaluated is None else np.where(evaluated, scores, 0.0)
    if pooling == "max":
        return scores.max(axis=0)
    highest = -np.sort(-scores, axis=0)
    return (highest if pooling == "mean" else highest[:pooling_k]).mean(axis=0)


def check_pooling(pooling, pooling_k) -> None:
    """
    Raises:
        ValueError: no such pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, but it is {pooling!r}.")
    if type(pooling_k) is not int or pooling_k < 1:
        raise ValueError(f"pooling_k must be a whole number from 1 on, but it is {pooling_k!r}.")


def intervals(present: Sequence[bool], times: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """When a label was seen, as (start, end) in seconds: neighbouring frames that have it are one interval."""
    found: list[tuple[float, float]] = []
    for here, (start, end) in zip(present, times, strict=True):
        if here and found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        elif here:
            found.append((start, end))
    return found
