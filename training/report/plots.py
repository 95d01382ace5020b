"""The figures of the evaluation report, as SVG in data URIs: they stay sharp and need no file beside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # no window, wherever this runs
import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import precision_recall_curve

from ..check.imbalance import GROUP_COLORS, GROUP_WORDS, long_tail_groups
from ..say import counted
from ..scoring.reliability import Reliability

LINE_COLORS = ("#3b6ea5", "#c0504d", "#4f9d69", "#8064a2", "#e0a030")
MAX_NAMED = 60  # labels whose names can still be read beside their points
MAX_CURVE_POINTS = 400
MIN_COUNT = 20  # entries in a bin
_plain_text = plt.rc_context({"text.parse_math": False})  # a label may be called "$5 bill"


def _data_uri(figure: plt.Figure) -> str:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode("ascii")


def _new_figure(width: float, height: float, columns: int = 1, **options) -> tuple[plt.Figure, np.ndarray]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options)
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


@_plain_text
def plot_long_tail(
    average_precision: np.ndarray, positives: np.ndarray, label_names: Sequence[str], counted_in: str
) -> str:
    """AP of each label against its positives, with the mean of head, medium and tail.

    Args:
        average_precision: (num_labels,); NaN for labels that have none, which are not drawn.
        positives: (num_labels,) images that show the label, in the split `counted_in`.
    """
    figure, (axes,) = _new_figure(9, 4.6)
    rated = ~np.isnan(average_precision)
    place = np.maximum(positives, 0.5)  # a log scale has no 0
    for name, members in long_tail_groups(positives).items():
        members = members[rated[members]]
        if not len(members):
            continue
        mean = average_precision[members].mean()
        color = GROUP_COLORS[name]
        axes.scatter(place[members], average_precision[members], s=22, color=color)
        axes.hlines(
            mean, place[members].min() / 1.1, place[members].max() * 1.1, color=color, linewidth=2, alpha=0.6,
            label=f"{name} ({GROUP_WORDS[name]}): {counted(len(members), 'label')}, mAP {mean:.3f}",
        )  # fmt: skip
    if rated.sum() <= MAX_NAMED:
        for label in np.flatnonzero(rated):
            axes.annotate(
                label_names[label], (place[label], average_precision[label]), xytext=(4, 3),
                textcoords="offset points", fontsize=8, color="#444",
            )  # fmt: skip
    axes.set(xscale="log", ylim=(-0.02, 1.04), xlabel=f"images of {counted_in} that show the label", ylabel="AP")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="best")
    return _data_uri(figure)


@_plain_text
def plot_precision_recall(
    scores: np.ndarray, labels: np.ndarray, average_precision: np.ndarray, label_names: Sequence[str]
) -> str:
    """Precision over recall of all entries in one ranking, and of a few labels from the best AP to the worst."""
    figure, (axes,) = _new_figure(8.2, 4.6)

    def draw(values: np.ndarray, truth: np.ndarray, words: str, **style) -> None:
        known = (truth == 0) | (truth == 1)
        precision, recall, _ = precision_recall_curve(truth[known] == 1, values[known])
        thinned = np.unique(np.linspace(0, len(recall) - 1, MAX_CURVE_POINTS).astype(np.int64))
        axes.plot(recall[thinned], precision[thinned], label=words, drawstyle="steps-post", **style)

    draw(scores.ravel(), labels.ravel(), "all entries (micro)", color="black", linewidth=2.2)
    order = np.argsort(-average_precision)[: np.count_nonzero(~np.isnan(average_precision))]
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), len(LINE_COLORS))).astype(np.int64))]
    for label, color in zip(shown, LINE_COLORS, strict=False):
        words = f"{label_names[label]} (AP {average_precision[label]:.3f})"
        draw(scores[:, label], labels[:, label], words, color=color, linewidth=1.2)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)  # the curves fill the axes
    return _data_uri(figure)


@_plain_text
def plot_reliability(stages: Mapping[str, Reliability]) -> str:
    """What scores promised against what came true, all labels in common; and how many scores each bin holds.

    Bins with fewer than `MIN_COUNT` entries, whose share is mostly chance, are hollow and not joined by the line.
    """
    figure, (axes, counts) = _new_figure(9, 4.2, columns=2, width_ratios=(1.3, 1))
    axes.plot([0, 1], [0, 1], color="#999", linestyle="--", linewidth=1)
    for (words, bins), color in zip(stages.items(), LINE_COLORS[len(stages) - 1 :: -1], strict=False):
        count, promised, came_true = (field.sum(0) for field in bins)
        score, share = (sums / np.maximum(count, 1) for sums in (promised, came_true))
        sure, unsure = count >= MIN_COUNT, (count > 0) & (count < MIN_COUNT)
        label = f"{words}: ECE {bins.ece():.4f}"
        axes.plot(score[sure], share[sure], marker="o", markersize=4, color=color, label=label)
        axes.plot(score[unsure], share[unsure], "o", markersize=4, color=color, fillstyle="none", alpha=0.6)
        counts.stairs(count, np.linspace(0, 1, len(count) + 1), color=color, label=words, linewidth=1.5)
    axes.set(
        xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="mean score in the bin", ylabel="share of entries that are present"
    )
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.25)
    counts.set(yscale="log", xlim=(0, 1), xlabel="score", ylabel="entries in the bin")
    counts.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    counts.yaxis.set_minor_formatter(lambda value, _: "")
    return _data_uri(figure)


@_plain_text
def plot_confusion(rates: np.ndarray, counts: np.ndarray, present: Sequence[str], predicted: Sequence[str]) -> str:
    """Heat map of the share of images with one label (row) and without another (column) that get the other.

    Args:
        rates: (rows, columns) in [0, 1], NaN where there is no such image.
        counts: (rows, columns) images that got it, written into the cells.
    """
    figure, (axes,) = _new_figure(2.4 + 0.42 * len(predicted), 1.8 + 0.36 * len(present))
    highest = max(np.nanmax(rates, initial=0), 1e-9)
    image = axes.imshow(rates, cmap="Oranges", vmin=0, vmax=highest, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if rates[row, column] > 0.6 * highest else "#333"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(predicted)), predicted, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(present)), present, fontsize=8)
    axes.set(xlabel="predicted, but absent", ylabel="present")
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}", label="share of such images")
    return _data_uri(figure)
