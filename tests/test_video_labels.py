"""Labels of clips: pooled from the frames' own scores by hand, and the times at which they were seen."""

import numpy as np
import pytest
import torch
from PIL import Image

import modeling_hsvlt.load_video
from modeling_hsvlt.label_contract import NOT_EVALUATED
from modeling_hsvlt.video_labels import intervals, label_video, pool_scores

from .clips import clip
from .test_pipeline_multilabel import NAMES, assert_same, image_processor, model, tagger  # noqa: F401  (fixtures)
from .tolerance import assert_close_outputs

COLOURS = ["red", "red", "green", "blue", "red"]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    clip(COLOURS, path, fps=1)
    return path


@pytest.fixture(scope="module")
def scores(video, model, image_processor):  # noqa: F811
    """(frames, labels), of each frame as PyAV gives it, alone."""
    av = pytest.importorskip("av")
    rows = []
    with av.open(str(video)) as container, torch.no_grad():
        for frame in container.decode(video=0):
            pixels = image_processor(images=frame.to_image(), return_tensors="pt")
            rows.append(model(**pixels).logits[0].double().sigmoid().numpy())
    return np.stack(rows)


def listed(pooled, least=0.0):
    order = np.argsort(-pooled)
    return [{"label": NAMES[index], "score": pooled[index]} for index in order if pooled[index] >= least]


def test_scores_are_pooled_by_label(tagger, video, scores):  # noqa: F811
    assert len(scores) == 5 and np.ptp(scores, axis=0).max() > 1e-3
    assert_same(tagger(str(video)), listed(scores.max(axis=0)))
    assert_same(tagger(video, pooling="mean"), listed(scores.mean(axis=0)))
    top = np.sort(scores, axis=0)[-2:].mean(axis=0)
    assert_same(tagger(video.read_bytes(), pooling="top_k_mean", pooling_k=2, batch_size=2), listed(top))
    assert_same(tagger(video, pooling="top_k_mean", pooling_k=99), listed(scores.mean(axis=0)))
    assert_same(tagger(video, max_frames=2), listed(scores[[0, 2]].max(axis=0)))  # at 0 and at 2.5 seconds
    assert_same(tagger(video, threshold=0.5, top_k=1), listed(scores.max(axis=0), 0.5)[:1])
    (only,) = tagger(video, labels=["boat"])
    assert_close_outputs(only["score"], scores[:, 3].max())


def runs(present):
    """Neighbouring seconds, by hand."""
    found, start = [], None
    for second, here in enumerate([*present, False]):
        if here and start is None:
            start = second
        if not here and start is not None:
            found.append((start, second))
            start = None
    return found


def test_intervals_are_where_frames_reach_the_threshold(tagger, model, video, scores):  # noqa: F811
    cut = float((scores[:, 0].min() + scores[:, 0].max()) / 2)
    found = {label["label"]: label for label in tagger(video, threshold=cut, intervals=True)}
    assert found["cat"]["intervals"] == runs(scores[:, 0] >= cut) != [(0, 5)]
    for threshold, cuts in (("auto", model.config.thresholds), (None, model.config.thresholds)):
        for label in tagger(video, threshold=threshold, intervals=True):
            index = list(NAMES.values()).index(label["label"])
            assert label["intervals"] == runs(scores[:, index] >= cuts[index])
    assert "intervals" not in tagger(video)[0]


def test_images_and_videos_in_one_list_or_stream(tagger, video, scores):  # noqa: F811
    still = Image.new("RGB", (40, 40), "red")
    sources = [still, str(video), still, str(video)]
    expected = [tagger(still), tagger(video)] * 2
    for options in ({}, {"batch_size": 2}):
        for result, wanted in zip(tagger(sources, **options), expected, strict=True):
            assert_same(result, wanted)
    for result, wanted in zip(tagger(source for source in sources), expected, strict=True):
        assert_same(result, wanted)
    with pytest.raises(ValueError, match="is a video in a stream; give batch_size=1"):
        list(tagger((source for source in sources), batch_size=2))


def test_what_a_video_cannot_have_is_said(tagger, video, tmp_path, monkeypatch):  # noqa: F811
    for options, words in (
        ({"explain": True}, "heat maps are of images"),
        ({"pooling": "median"}, "pooling must be one of max, mean, top_k_mean"),
        ({"pooling_k": 0}, "pooling_k must be"),
        ({"frames_per_second": -1}, "frames_per_second must"),
        ({"max_frames": 1.5}, "max_frames must"),
        ({"max_pixels": 9}, "more than the limit of 9"),
    ):
        with pytest.raises(ValueError, match=words):
            tagger(video, **options)
    (tmp_path / "half.mp4").write_bytes(video.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"half.mp4 .*leave it out"):
        tagger(str(tmp_path / "half.mp4"))
    monkeypatch.setattr(modeling_hsvlt.load_video, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install av"):
        tagger(str(video))


def test_labels_that_no_frame_evaluated_are_left_out():
    logits = torch.tensor([[1.0, NOT_EVALUATED, NOT_EVALUATED], [-1.0, 2.0, float("nan")]])
    times, names = [(0.0, 1.0), (1.0, 2.0)], {0: "a", 1: "b", 2: "c"}
    found = label_video(logits, times, names, None, pooling="mean", seen_from=0.5)
    assert [label["label"] for label in found] == ["a", "b"]
    assert_close_outputs([label["score"] for label in found], [0.5, 0.5 / (1 + np.exp(-2.0))])
    assert [label["intervals"] for label in found] == [[(0.0, 1.0)], [(1.0, 2.0)]]


def test_pooling_is_numpy_s_by_hand():
    scores = np.random.default_rng(0).random((7, 4))
    assert np.array_equal(pool_scores(scores), scores.max(axis=0))
    np.testing.assert_allclose(pool_scores(scores, pooling="mean"), scores.mean(axis=0))
    by_hand = [np.mean(sorted(column)[-3:]) for column in scores.T]
    np.testing.assert_allclose(pool_scores(scores, pooling="top_k_mean", pooling_k=3), by_hand)


def test_intervals_of_every_pattern():
    for pattern in range(64):
        present = [bool(pattern >> bit & 1) for bit in range(6)]
        assert intervals(present, [(second, second + 1) for second in range(6)]) == runs(present)
