"""What is said before the first step, of data as `load` gives it."""

from types import SimpleNamespace

import numpy as np
import pytest

from training.data.load import load
from training.loop.advice import advice

from ..tiny_run import SCENES


class Labels(SimpleNamespace):
    def __len__(self):
        return self.count


def data(train, validation, counts=(1000, 500)):
    def split(positives, count):
        labels = Labels(count=count, positives=lambda: np.array(positives))
        return Labels(count=count, sparse_labels=labels)

    return {"train": split(train, counts[0]), "validation": split(validation, counts[1])}


def test_ordinary_data_needs_no_advice():
    assert advice(data([10, 900], [1, 40]), ["cat", "dog"], pretrained=False) == []


@pytest.mark.parametrize(
    ("given", "names", "words"),
    [
        (data([10], [5]), ["cat"], ["There is one label, 'cat'"]),
        (data([10, 1000], [5, 5]), ["cat", "dog"], ["1 label that every image of train shows", ": dog."]),
        (data([10, 0], [0, 0]), ["cat", "dog"], ["2 labels without a positive in validation", ": cat, dog."]),
        (data([1, 2], [5, 5], (3, 500)), ["cat", "dog"], ["3 images to train on", "the recipe photos"]),
        (data([1, 2], [1, 1], (1000, 1)), ["cat", "dog"], ["1 image to validate"]),
    ],
)
def test_what_is_odd_is_said_once(given, names, words):
    (said,) = advice(given, names, pretrained=False)
    assert all(word in said for word in words), said


def test_few_images_do_on_a_pretrained_backbone():
    (said,) = advice(data([1, 2], [5, 5], (3, 500)), ["cat", "dog"], pretrained=True)
    assert said == "3 images to train on: that is few."


def test_it_reads_the_labels_of_a_dataset():
    loaded = load("scenes", scenes={**SCENES, "num_scenes": {"train": 3, "validation": 2}})
    given = {name: SimpleNamespace(sparse_labels=split.labels) for name, split in loaded.splits.items()}
    said = " ".join(advice(given, loaded.label_names, pretrained=True))
    assert "3 images to train on" in said and "2 images to validate" in said and "without a positive" in said
