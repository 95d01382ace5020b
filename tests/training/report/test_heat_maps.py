import io

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.report.heat_maps import Explained, draw_explained, draw_found_labels, overlay

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


def test_a_drawing_has_a_row_a_image():
    labels = [{"label": "$5 bill", "score": 0.9, "heat_map": heat(0, 0)}]
    one, two = (draw_explained([Explained(GREY, labels)] * count) for count in (1, 2))
    sizes = [Image.open(io.BytesIO(drawn)).size for drawn in (one, two)]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] == 2 * sizes[0][1]


def test_only_labels_that_were_found_rightly_are_drawn(monkeypatch):
    stream = io.BytesIO()
    GREY.save(stream, "PNG")
    rows = Dataset.from_dict({"image": [{"bytes": stream.getvalue(), "path": None}] * 3})
    scores = np.array([[0.9, 0.1, 0.8], [0.9, 0.9, 0.2], [0.1, 0.2, 0.3]], np.float32)
    labels = np.array([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    drawn = []
    monkeypatch.setattr("training.report.heat_maps.draw_explained", lambda explained: drawn.extend(explained) or b"png")
    model, processor = tiny_model(), MultiLabelImageProcessor(size={"height": 16, "width": 16})
    assert draw_found_labels(model, processor, rows, scores, labels, np.full(3, 0.5)) == b"png"
    assert [{label["label"] for label in each.labels} for each in drawn] == [{"dog", "tv monitor"}, {"cat"}]
    assert drawn[0].labels[0]["heat_map"].shape == (20, 30)
    assert draw_found_labels(model, processor, rows, scores, labels, np.full(3, 0.95)) is None
