"""A checkpoint that a run replaces while another command reads it."""

import json

import pytest
import torch

import training.checkpoint.loading as loading
from training.checkpoint.folder import revised, write_marker
from training.checkpoint.loading import load_checkpoint, of_one_moment
from training.options import CheckpointOptions
from training.scoring.thresholds import store_thresholds

from ..tiny_checkpoint import save_checkpoint, tiny_model


@pytest.fixture
def best(tmp_path):
    save_checkpoint(tmp_path / "best")
    write_marker(tmp_path / "best", step=1)
    return tmp_path / "best"


def replace(best, epoch):
    """Other weights and other thresholds, as a run writes them."""
    with revised(best) as folder:
        model = tiny_model()
        torch.nn.init.constant_(model.classifier.bias, float(epoch))
        model.save_pretrained(folder)
        store_thresholds(folder, [epoch / 10] * 3, {})


@pytest.mark.parametrize("sealed", [True, False])
def test_weights_and_configuration_are_of_one_epoch(best, monkeypatch, sealed):
    if not sealed:
        (best / "checkpoint.json").unlink()
    replace(best, 1)
    plain, epochs = loading.load_pretrained, iter([2, 3])

    def load(kind, *args, **kwargs):
        loaded = plain(kind, *args, **kwargs)
        if epoch := next(epochs, None):  # in the middle: the processor is not read yet
            replace(best, epoch)
        return loaded

    monkeypatch.setattr(loading, "load_pretrained", load)
    model, _ = load_checkpoint(CheckpointOptions(checkpoint=str(best)))
    assert model.config.thresholds == [0.3] * 3 and model.classifier.bias.unique().tolist() == [3.0]


def test_one_that_never_rests_is_refused(best):
    epochs = iter(range(1, 9))
    with pytest.raises(ValueError, match="was replaced while it was read, five times: wait for the run"):
        of_one_moment(best, lambda: replace(best, next(epochs)))
    assert json.loads((best / "config.json").read_text())["thresholds"] == [0.5] * 3


def test_what_is_wrong_with_it_is_said_where_nobody_replaced_it(best):
    calls = []
    (best / "config.json").write_text("{")
    with pytest.raises(ValueError, match="half"):
        of_one_moment(best, lambda: calls.append(1) or (_ for _ in ()).throw(ValueError("half")))
    assert len(calls) == 1
