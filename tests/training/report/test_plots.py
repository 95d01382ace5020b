"""Figures that can be read: no text lies on another one or on a point, however many labels there are."""

import base64

import numpy as np
import pytest
from matplotlib.text import Text

from training.report.plots import (
    plot_confusion,
    plot_long_tail,
    plot_precision_recall,
    plot_reliability,
    shorten,
    svg_uri,
)
from training.scoring.reliability import reliability

LONG = "an_extremely_long_tag_name_as_boorus_have_them_(series_title_of_the_second_season)_with_more"
COUNTS = {  # positives of the labels
    "one label": [7],
    "never seen": [0, 0],
    "within a factor of two": [510, 700, 640, 580],
    "hundreds": (3000 / (1 + np.arange(300))).astype(int),
}


def shown_texts(figure):
    figure.draw_without_rendering()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = list(zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False))
            hidden |= {text for tick, text in ticks if not low <= tick <= high}  # beyond the ends of the axis
            seen = [text for _, text in ticks if text not in hidden and text.get_text()]
            assert seen or not ticks, f"{axis.axis_name} has no number"
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in hidden]
    return [(text, box) for text in texts if (box := text.get_window_extent()).width > 1]


def assert_readable(figure):
    texts = shown_texts(figure)
    boxes = np.array([box.extents for _, box in texts])
    apart = (boxes[:, None, :2] >= boxes[None, :, 2:] - 0.01).any(-1)
    touching = np.argwhere(np.triu(~(apart | apart.T), 1))
    assert not len(touching), [[texts[place][0].get_text() for place in pair] for pair in touching]
    for text, box in texts:
        assert figure.bbox.padded(1).contains(*box.max), f"{text.get_text()} is cut off"


def names_of(num_labels):
    return [LONG, *(f"{'green sea turtle on a sunny beach'[: 3 + i % 30]} {i}" for i in range(num_labels - 1))]


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_names_in_the_long_tail_touch_nothing(counts):
    counts = np.array(counts)
    rng = np.random.default_rng(0)
    average_precision = rng.random(len(counts)).round(2)
    average_precision[1::50] = np.nan
    names = names_of(len(counts))
    figure = plot_long_tail(average_precision, counts, names, "train")
    assert_readable(figure)
    (axes,) = figure.axes
    points = axes.transData.transform(np.stack([np.maximum(counts, 0.5), average_precision], 1))
    points = points[~np.isnan(average_precision)]
    for text in axes.texts:
        box = text.get_window_extent()
        assert not any(box.contains(*point) for point in points), text.get_text()
        assert axes.get_window_extent().contains(*box.min) and axes.get_window_extent().contains(*box.max)
    named = {text.get_text() for text in axes.texts}
    assert named <= {shorten(name) for name in names}
    assert len(named) >= min(len(points), 3)


def test_curves_and_bins_leave_room_for_their_legends():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 8)) < 0.3).astype(int)
    scores = np.clip(rng.normal(0.4, 0.2, labels.shape) + 0.2 * labels, 0, 1).astype(np.float32)
    figure = plot_precision_recall(scores, labels, rng.random(8), [LONG + str(i) for i in range(8)])
    assert_readable(figure)
    bins = reliability(scores, labels)
    for stages in ({"scores": bins}, {"before calibration": bins, "calibrated": bins}):
        assert_readable(plot_reliability(stages))
    few = reliability(np.full((40, 1), 0.5, np.float32), np.ones((40, 1), int))
    assert_readable(plot_reliability({"scores": few}))


@pytest.mark.parametrize("size", [1, 3, 20])
def test_confusions_of_long_names_and_large_counts(size):
    counts = np.full((size, size), 123456)
    names = names_of(size)
    assert_readable(plot_confusion(np.full((size, size), 0.5), counts, names, names))


def test_a_figure_takes_the_ground_of_its_page():
    """Without a ground of its own it can be read on a dark page, which inverts it."""
    figure = plot_long_tail(np.array([0.5, 0.6]), np.array([3, 40]), ["a", "$5 \\frac{"], "train")
    assert svg_uri(figure).startswith("data:image/svg+xml;base64,")
    svg = base64.b64decode(svg_uri(figure).partition(",")[2]).decode()
    assert "fill: #ffffff" not in svg.replace("fill: #ffffff; opacity: 0", "") and "mathdefault" not in svg
