import io
import itertools

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.report.heat_maps import SCALE_WORDS, Explained, draw_explained, explain_found_labels, overlay

from ..tiny_checkpoint import tiny_model

GREY = Image.new("RGB", (30, 20), (128, 128, 128))


def heat(row, column):
    heat_map = np.zeros((20, 30), np.float32)
    heat_map[row, column] = 1
    return heat_map


def test_the_warm_place_is_where_the_map_is_high():
    drawn = np.asarray(overlay(GREY, heat(5, 25))).astype(int).sum(-1)
    assert drawn.shape == (20, 30) and np.unravel_index(drawn.argmax(), drawn.shape) == (5, 25)
    assert np.array_equal(np.asarray(overlay(GREY, heat(5, 25), strength=0)), np.asarray(GREY))
    with pytest.raises(ValueError, match="The heat map is 30 x 20, the image 20 x 20; give the map of this"):
        overlay(GREY.resize((20, 20)), heat(5, 25))


def test_a_drawing_has_even_gaps_and_a_scale(monkeypatch):
    """Whatever the shapes of the images: no image touches another or a text, and the gaps are the same."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **options: drawn.append(figure))
    rows = []
    for width, height in ((30, 20), (20, 30), (10, 90), (90, 10)):
        maps = [np.zeros((height, width), np.float32)] * (3 if width == 30 else 1)
        labels = [{"label": "$5 bill of a very long name", "score": 0.9, "heat_map": each} for each in maps]
        rows.append(Explained(GREY.resize((width, height)), labels))
    draw_explained(rows)
    (figure,) = drawn
    *boxes, scale = [axes.get_position().transformed(figure.transSubfigure) for axes in figure.axes]
    first = boxes[:4]
    across = [right.x0 - left.x1 for left, right in itertools.pairwise(first)]
    images = [boxes[0], *boxes[4::2]]  # the first of each row
    down = [upper.y0 - lower.y1 for upper, lower in itertools.pairwise([*images, scale])]
    assert np.ptp(across) < 0.5 and np.ptp(down[:-1]) < 0.5 and min(across + down) > 5
    assert figure.texts[-1].get_text() == SCALE_WORDS
    texts = [text.get_window_extent() for text in figure.texts]
    for place, box in enumerate(texts):
        assert not any(box.overlaps(other) for other in [*boxes, scale, *texts[place + 1 :]])
        assert figure.bbox.containsx(box.x1)


def test_only_labels_that_were_found_rightly_are_explained():
    stream = io.BytesIO()
    GREY.save(stream, "PNG")
    rows = Dataset.from_dict({"image": [{"bytes": stream.getvalue(), "path": None}] * 3})
    scores = np.array([[0.9, 0.1, 0.8], [0.9, 0.9, 0.2], [0.1, 0.2, 0.3]], np.float32)
    labels = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    model, processor = tiny_model(), MultiLabelImageProcessor(size={"height": 16, "width": 16})
    drawn = explain_found_labels(model, processor, rows, scores, labels, np.full(3, 0.5))
    assert [{label["label"] for label in each.labels} for each in drawn] == [{"dog", "tv monitor"}, {"cat"}]
    assert drawn[0].labels[0]["heat_map"].shape == (20, 30)
    assert explain_found_labels(model, processor, rows, scores, labels, np.full(3, 0.95)) == []
