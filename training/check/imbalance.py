"""How unevenly labels occur: the groups of the long-tail literature, and a plot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..checkpoint.atomic import whole_file
from ..say import counted

# Positives in train, as COCO-LT and VOC-LT are divided (Wu et al., "Distribution-Balanced Loss", ECCV 2020).
HEAD, MEDIUM = 100, 20
GROUP_WORDS = {"head": f"{HEAD} or more", "medium": f"{MEDIUM} to {HEAD - 1}", "tail": f"fewer than {MEDIUM}"}
GROUP_COLORS = {"head": "#3b6ea5", "medium": "#b8741a", "tail": "#c0504d"}
_MAX_NAMED = 120  # labels whose names can still be read under a bar


def long_tail_groups(positives: np.ndarray) -> dict[str, np.ndarray]:
    """Label indices with at least 100 positives (head), 20 to 99 (medium), fewer (tail)."""
    return {
        "head": np.flatnonzero(positives >= HEAD),
        "medium": np.flatnonzero((positives >= MEDIUM) & (positives < HEAD)),
        "tail": np.flatnonzero(positives < MEDIUM),
    }


def plot_imbalance(positives: dict[str, np.ndarray], label_names: list[str], path: Path) -> None:
    """Draws the positives of every label, most frequent first, on a log scale: bars for train (or the first split),
    marks for the others.

    Args:
        positives: (num_labels,) counts of each split.
        path: A .png file.
    """
    main = "train" if "train" in positives else next(iter(positives))
    counts = positives[main]
    order = np.argsort(-counts, kind="stable")
    place = np.argsort(order)
    named = len(counts) <= _MAX_NAMED
    # Not pyplot, which would choose a window system for the whole process.
    figure = Figure(figsize=(min(max(0.16 * len(counts), 7), 18), 5), layout="constrained")
    axes = figure.subplots()
    floor = 0.5  # a log scale has no 0: what is absent stands below 1
    groups = {group: labels for group, labels in long_tail_groups(counts).items() if len(labels)}
    for group, labels in groups.items():
        heights = np.maximum(counts[labels], floor) - floor
        label = f"{main}, {group}: {counted(len(labels), 'label')} ({GROUP_WORDS[group]})"
        width = 0.8 if named else 1.0
        axes.bar(place[labels], heights, width, bottom=floor, color=GROUP_COLORS[group], label=label)
    for (name, others), marker, color in zip(
        ((name, others) for name, others in positives.items() if name != main), "ovs^Dx" * 9, "kgmcyb" * 9, strict=False
    ):
        axes.plot(place, np.maximum(others, 0.6), marker, markersize=3 if named else 1, color=color, label=name)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor)
    ticks = [tick for tick in axes.get_yticks() if 1 <= tick <= 2 * max(counts.max(), 1)]
    axes.set_yticks([0.6, *ticks], ["0", *(f"{tick:,.0f}" for tick in ticks)])
    axes.minorticks_off()
    axes.set_ylabel("images that show the label")
    axes.set_xlim(-0.8, len(counts) - 0.2)
    if named:
        axes.set_xticks(range(len(counts)), [label_names[label][:40] for label in order], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("labels, most frequent first")
    ratio = counts.max() / max(counts[counts > 0].min(), 1) if counts.any() else 1
    axes.set_title(
        f"{counted(len(counts), 'label')}, {(counts == 0).sum():,} absent from {main}; imbalance ratio {ratio:,.0f}"
    )
    # Below, not upon the bars.
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8, markerscale=1 if named else 4)
    with whole_file(path) as written:
        figure.savefig(written, dpi=130, format="png")
