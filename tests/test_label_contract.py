"""What may be labels, and what is refused."""

from functools import partial
from math import nan

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MlTrConfig, MlTrForImageClassification
from modeling_hsvlt.label_contract import validate_labels
from modeling_hsvlt.losses_multilabel import MULTILABEL_LOSSES, binary_cross_entropy_loss, multilabel_loss

from .test_losses_multilabel import COUNTS, KWARGS
from .tolerance import assert_close_outputs


def test_validate_labels_accepts_the_contract():
    validate_labels(torch.tensor([[0.0, 0.3, 1.0, -100.0]]), 4)
    validate_labels(torch.tensor([[0, 1, -100]]), 3)
    validate_labels(torch.tensor([[True, False]]), 2)


HARD = [[1, 0, -100], [0, 0, 1]]
HARD_LABELS = {
    "lists": HARD,
    "tuples": tuple(map(tuple, HARD)),
    "int8": np.array(HARD, dtype=np.int8),
    "float64": np.array(HARD, dtype=float),
    "float16": np.array(HARD, dtype=np.float16),
    "list of arrays": [np.array(row) for row in HARD],
    "list of tensors": [torch.tensor(row) for row in HARD],
    "int64 tensor": torch.tensor(HARD),
    "bfloat16 tensor": torch.tensor(HARD).bfloat16(),
}
BOOLEANS = [[True, False], [False, True]]


@pytest.mark.parametrize("kind", HARD_LABELS)
def test_labels_of_every_kind_are_taken(kind):
    given, tensor = HARD_LABELS[kind], torch.tensor(HARD, dtype=torch.float)
    validated = validate_labels(given, 3)
    assert validated.dtype == torch.float and torch.equal(validated, tensor)
    logits = torch.tensor([[0.3, -2.0, 1.0], [0.0, 4.0, -1.0]])
    for name in MULTILABEL_LOSSES:
        kwargs = KWARGS.get(name, {}) | ({"class_counts": COUNTS[:3]} if name == "distribution_balanced" else {})
        for step in (None, 7):
            loss = multilabel_loss(logits, given, name, kwargs, step)
            assert_close_outputs(loss, multilabel_loss(logits, tensor, name, kwargs, step), name=name)
        loss = MULTILABEL_LOSSES[name]
        assert_close_outputs(loss(logits, given, **kwargs), loss(logits, tensor, **kwargs), name=name)


def test_booleans_are_labels():
    logits = torch.tensor([[0.3, -2.0], [0.0, 4.0]])
    expected = F.binary_cross_entropy_with_logits(logits, torch.tensor(BOOLEANS).float())
    for labels in (BOOLEANS, np.array(BOOLEANS), torch.tensor(BOOLEANS)):
        assert torch.equal(validate_labels(labels, 2), torch.eye(2))
        torch.testing.assert_close(binary_cross_entropy_loss(logits, labels), expected)


@pytest.mark.parametrize(
    "labels",
    [[[0, 2], [1]], [["cat", "dog"]], np.array(["cat"]), None, {"labels": [[1, 0]]}, iter([[1, 0]]), [[1, None]]],
)
def test_what_is_no_labels_is_told(labels):
    for take in (partial(validate_labels, num_labels=2), partial(multilabel_loss, torch.zeros(2, 2))):
        with pytest.raises(ValueError, match=r"lists of names or of label numbers have to be encoded\."):
            take(labels)


@pytest.mark.parametrize("name", MULTILABEL_LOSSES)
@pytest.mark.parametrize("shape", [(2, 1), (1, 5), (5,), (3, 5), (2, 5, 1)])
def test_labels_of_another_shape_are_not_broadcast(name, shape):
    for step in (None, 7):
        with pytest.raises(ValueError, match=r"labels have shape .*, but logits \(2, 5\): give one for each logit"):
            multilabel_loss(torch.zeros(2, 5), torch.ones(shape), name, KWARGS.get(name), step)


def test_minus_100_does_not_wrap_around():
    with pytest.raises(ValueError, match=r"labels\[0, 0\] is 156"):
        validate_labels(torch.tensor([[156, 1]], dtype=torch.uint8), 2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0.0, 1.0], [2.0, 0.0]], r"labels\[1, 0\] is 2.0"),
        ([[0.0, nan]], r"labels\[0, 1\] is nan"),
        ([[0, -1]], r"labels\[0, 1\] is -1"),
        ([0, 1], r"shape \(batch, 2\), but their shape is \(2,\)"),
        ([[0, 1, 0]], r"shape is \(1, 3\)"),
    ],
)
def test_validate_labels_names_the_entry(labels, message):
    with pytest.raises(ValueError, match=message):
        validate_labels(torch.tensor(labels), 2)


@pytest.mark.parametrize("candidates", [None, 2])
def test_models_take_labels_of_every_kind(candidates):
    backbone = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
    config = HSVLTConfig.preset("nano", backbone_config=backbone, num_labels=3, candidate_labels=candidates)
    for model in (
        HSVLTForImageClassification(config),
        MlTrForImageClassification(MlTrConfig.preset("nano", num_labels=3)),
    ):
        pixels = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            expected = model.eval()(pixel_values=pixels, labels=torch.tensor(HARD)).loss
            for labels in (HARD, np.array(HARD)):
                torch.testing.assert_close(model(pixel_values=pixels, labels=labels).loss, expected)
