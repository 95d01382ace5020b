"""The figures of the evaluation report, drawn for the width of a phone: a browser enlarges them on a wide screen."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # not pyplot, which would choose a window system for the whole process
from matplotlib.ticker import LogLocator, NullLocator
from sklearn.metrics import precision_recall_curve

from ..check.imbalance import GROUP_COLORS, GROUP_WORDS, long_tail_groups
from ..say import counted
from ..scoring.reliability import Reliability

LINE_COLORS = ("#3b6ea5", "#c0504d", "#4f9d69", "#8064a2", "#b8741a")
WIDTH = 5.2  # inches: at 360 px its 9 pt are 9 px high
MAX_NAMED = 300  # labels for whose names a free place is looked for
BESIDE = ((5, 0, "left", "center"), (-5, 0, "right", "center"), (0, 5, "center", "bottom"), (0, -5, "center", "top"))
MAX_CURVE_POINTS = 400
MIN_COUNT = 20  # entries in a bin
_text = matplotlib.rc_context({"font.size": 9, "legend.fontsize": 8.5, "text.parse_math": False})  # or "$5 bill" is TeX


def svg_uri(figure: Figure) -> str:
    """A figure as an SVG in a data URI: it stays sharp, needs no file beside the page, and has the page's ground."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode("ascii")


def shorten(name: str, length: int = 24) -> str:
    """A label's name, cut where it would push everything else out of a figure."""
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"


def _new_figure(height: float, rows: int = 1, **options) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, squeeze=False, **options)[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes


def _scale_of_counts(axes: Axes, which: str, counts: np.ndarray) -> None:
    """A log scale with plain numbers that do not touch; within one power of ten, where it had none, a linear one."""
    low, high = (counts.min(), counts.max()) if len(counts) else (1, 1)
    axis: Axis = getattr(axes, f"{which}axis")
    if high > 10 * low:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")


def _name_points(axes: Axes, place: np.ndarray, names: Sequence[str], lines: Sequence[tuple]) -> None:
    """Writes names beside points, in this order, as long as one touches no point, no line and no other name.

    Args:
        place: (n, 2) in data coordinates; the first `len(names)` are named.
        lines: (from x, to x, y) of horizontal lines.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # places the axes
    frame = axes.get_window_extent()
    points = axes.transData.transform(place)
    ends = [axes.transData.transform([(left, y), (right, y)]).ravel() for left, right, y in lines]
    taken = np.concatenate([np.hstack([points, points]), np.reshape(ends, (-1, 4))]) + np.array([-4, -4, 4, 4])
    for at, dot, name in zip(place, points, names, strict=False):
        text = axes.annotate(
            shorten(name), at, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=7.5,
            color="#444", in_layout=False,
        )  # fmt: skip
        half = np.array(text.get_window_extent().size) / 2
        for across, up, side, height in BESIDE:
            middle = dot + np.array([across, up]) * figure.dpi / 72 + np.sign([across, up]) * half
            low, high = middle - half, middle + half
            free = ((taken[:, :2] > high) | (taken[:, 2:] < low)).any(1)
            if free.all() and frame.contains(*low) and frame.contains(*high):
                text.set(position=(across, up), ha=side, va=height)
                taken = np.vstack([taken, [*low, *high]])
                break
        else:
            text.remove()


@_text
def plot_long_tail(
    average_precision: np.ndarray, positives: np.ndarray, label_names: Sequence[str], counted_in: str
) -> Figure:
    """AP of each label against its positives, with the mean of head, medium and tail; names where they fit.

    Args:
        average_precision: (num_labels,); NaN for labels that have none, which are not drawn.
        positives: (num_labels,) images that show the label, in the split `counted_in`.
    """
    figure, (axes,) = _new_figure(4.4)
    rated = np.flatnonzero(~np.isnan(average_precision))
    place = np.maximum(positives, 0.5)  # a log scale has no 0
    means = []
    for name, members in long_tail_groups(positives).items():
        members = np.intersect1d(members, rated)
        if not len(members):
            continue
        mean = average_precision[members].mean()
        color = GROUP_COLORS[name]
        axes.scatter(place[members], average_precision[members], s=18, color=color, alpha=0.7, linewidths=0)
        means.append((place[members].min() / 1.1, place[members].max() * 1.1, mean))
        axes.hlines(
            mean, *means[-1][:2], color=color, linewidth=2, alpha=0.6,
            label=f"{name} ({GROUP_WORDS[name]}): {counted(len(members), 'label')}, mAP {mean:.3f}",
        )  # fmt: skip
    _scale_of_counts(axes, "x", place[rated])
    axes.set(ylim=(-0.04, 1.04), xlabel=f"images of {shorten(counted_in)} that show the label", ylabel="AP")
    figure.legend(loc="outside upper left", frameon=False)
    weakest_first = rated[np.argsort(average_precision[rated], kind="stable")]
    points = np.stack([place, average_precision], 1)[weakest_first]
    _name_points(axes, points, [label_names[label] for label in weakest_first[:MAX_NAMED]], means)
    return figure


@_text
def plot_precision_recall(
    scores: np.ndarray, labels: np.ndarray, average_precision: np.ndarray, label_names: Sequence[str]
) -> Figure:
    """Precision over recall of all entries in one ranking, and of a few labels from the best AP to the worst."""
    figure, (axes,) = _new_figure(5)

    def draw(values: np.ndarray, truth: np.ndarray, words: str, **style) -> None:
        known = (truth == 0) | (truth == 1)
        precision, recall, _ = precision_recall_curve(truth[known] == 1, values[known])
        thinned = np.unique(np.linspace(0, len(recall) - 1, MAX_CURVE_POINTS).astype(np.int64))
        axes.plot(recall[thinned], precision[thinned], label=words, drawstyle="steps-post", **style)

    draw(scores.ravel(), labels.ravel(), "all entries (micro)", color="black", linewidth=2.2)
    order = np.argsort(-average_precision)[: np.count_nonzero(~np.isnan(average_precision))]
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), len(LINE_COLORS))).astype(np.int64))]
    for label, color in zip(shown, LINE_COLORS, strict=False):
        words = f"{shorten(label_names[label], 40)} (AP {average_precision[label]:.3f})"
        draw(scores[:, label], labels[:, label], words, color=color, linewidth=1.2)
    axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    figure.legend(loc="outside upper left", frameon=False)  # the curves fill the axes
    return figure


@_text
def plot_reliability(stages: Mapping[str, Reliability]) -> Figure:
    """What scores promised against what came true, all labels in common; and how many scores each bin holds.

    Bins with fewer than `MIN_COUNT` entries, whose share is mostly chance, are hollow and not joined by the line.
    """
    figure, (axes, counts) = _new_figure(5.6, rows=2, sharex=True, height_ratios=(2, 1))
    axes.plot([0, 1], [0, 1], color="#999", linestyle="--", linewidth=1)
    for (words, bins), color in zip(stages.items(), LINE_COLORS[len(stages) - 1 :: -1], strict=False):
        count, promised, came_true = (field.sum(0) for field in bins)
        score, share = (sums / np.maximum(count, 1) for sums in (promised, came_true))
        sure, unsure = count >= MIN_COUNT, (count > 0) & (count < MIN_COUNT)
        label = f"{words}: ECE {bins.ece():.4f}"
        axes.plot(score[sure], share[sure], marker="o", markersize=4, color=color, label=label)
        axes.plot(score[unsure], share[unsure], "o", markersize=4, color=color, fillstyle="none", alpha=0.6)
        counts.stairs(count, np.linspace(0, 1, len(count) + 1), color=color, linewidth=1.5)
    axes.set(ylim=(-0.02, 1.02), ylabel="share of entries\nthat are present")
    figure.legend(loc="outside upper left", frameon=False)
    seen = np.concatenate([bins.count.sum(0) for bins in stages.values()])
    _scale_of_counts(counts, "y", seen[seen > 0])
    counts.set(xlim=(0, 1), xlabel="mean score in the bin", ylabel="entries in the bin")
    return figure


@_text
def plot_confusion(rates: np.ndarray, counts: np.ndarray, present: Sequence[str], predicted: Sequence[str]) -> Figure:
    """Heat map of the share of images with one label (row) and without another (column) that get the other.

    Args:
        rates: (rows, columns) in [0, 1], NaN where there is no such image.
        counts: (rows, columns) images that got it, written into the cells.
    """
    figure = Figure(figsize=(3 + 0.42 * len(predicted), max(3.4, 2.6 + 0.3 * len(present))), layout="constrained")
    axes = figure.subplots()
    highest = max(np.nanmax(rates, initial=0), 1e-9)
    image = axes.imshow(rates, cmap="Oranges", vmin=0, vmax=highest, aspect="auto")
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if rates[row, column] > 0.6 * highest else "#333"
        count = int(counts[row, column])
        words = f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"
        axes.text(column, row, words, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(predicted)), [shorten(name) for name in predicted], rotation=90, fontsize=8)
    axes.set_yticks(range(len(present)), [shorten(name) for name in present], fontsize=8)
    axes.set(xlabel="predicted, but absent", ylabel="present")
    figure.colorbar(image, ax=axes, format=lambda value, _: f"{value:.0%}", label="share of these images")
    return figure
