"""Names that may mean the same are paired; names that differ on purpose are not."""

import numpy as np
import pytest

from training.data.similar_names import similar_names


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("dog", "Dog"),
        ("tv_monitor", "tv monitor"),
        ("tvmonitor", "TV-Monitor"),
        ("cup", "cups"),
        ("berry", "berries"),
        ("wine glass", "wine glasses"),
        ("café", "cafe"),
        ("pottedPlant", "potted plant"),
    ],
)
def test_one_name_in_two_forms(one, other):
    assert similar_names([one, "zebra", other]) == [(one, other, "form", 1.0)]


def test_spelling_ranks_below_form():
    found = similar_names(["aeroplane", "elephant", "airplane", "Airplanes", "hair drier", "hair dryer"])
    assert [pair[:3] for pair in found[:2]] == [
        ("airplane", "Airplanes", "form"),
        ("hair drier", "hair dryer", "spelling"),
    ]
    assert {pair[:2] for pair in found[2:]} == {("aeroplane", "airplane"), ("aeroplane", "Airplanes")}
    assert [pair[3] for pair in found] == sorted((pair[3] for pair in found), reverse=True)


@pytest.mark.parametrize(
    "names",
    [["cat", "car", "bat"], ["class 1", "class 2"], ["bus", "boss"], ["man", "woman"], ["猫", "犬"], ["?", "!!"]],
)
def test_different_labels_stay_different(names):
    assert similar_names(names) == []


def test_embeddings_pair_by_meaning_and_keep_the_better_reason():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(40, 32)) + 5  # what all have in common would make all cosines about 1
    names = [f"name{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(40)]
    embeddings[1] = embeddings[0] + 0.05 * rng.normal(size=32)
    names[:2] = "sofa", "couch"
    names[2:4], embeddings[3] = ("cup", "cups"), embeddings[2]
    by_meaning = [pair for pair in similar_names(names, embeddings.astype(np.float32)) if pair[2] == "meaning"]
    assert [pair[:2] for pair in by_meaning] == [("sofa", "couch")]
    assert ("cup", "cups", "form", 1.0) in similar_names(names, embeddings)


def test_more_names_than_a_block_are_all_compared():
    names = [f"label {number}" for number in range(2200)]
    names[3], names[2150] = "umbrella", "umbrellas"
    assert similar_names(names) == [("umbrella", "umbrellas", "form", 1.0)]
