"""Every known label counts once in a step, over processes, batches and accumulation."""

import json

import numpy as np
import pytest

from modeling_hsvlt import HSVLTForImageClassification
from modeling_hsvlt.label_contract import UNKNOWN_LABEL
from training.train import main

from ...forked import forked

PARTLY_KNOWN = ["--fresh_scenes", "false", "--partial_labels", "{known_fraction: 0.2}", "--warmup_epochs", "0"]
PLAIN = [*PARTLY_KNOWN, "--augmentation", "null"]


def divided(batch_size, accumulated):
    return ["--batch_size", str(batch_size), "--gradient_accumulation_steps", str(accumulated)]


def curve_of(folder):
    """(loss, gradient norm) of each step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return np.array([(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line])


def train(recipe, folder, *options):
    assert main([recipe, "--output_dir", str(folder), *options]) == 0
    return curve_of(folder)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_is_the_same_however_its_images_are_divided(recipe, tmp_path, optimizer):
    options = [*PLAIN, "--optimizer", optimizer, "--max_steps", "2"]
    curves = [
        train(recipe, tmp_path / f"{batch_size}", *options, *divided(batch_size, 16 // batch_size))
        for batch_size in (16, 4)
    ]
    assert curves[0].shape == (2, 2) and (curves[0] > 0).all()
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_the_last_step_of_an_epoch_has_what_is_left(recipe, tmp_path):
    """45 images, 32 a step: the second step has 13, as 8 and 5, or as one batch that is not full."""
    options = [*PLAIN, "--scenes.num_scenes.train", "45", "--epochs", "1"]
    curves = [train(recipe, tmp_path / f"{size}", *options, *divided(size, 32 // size)) for size in (8, 32)]
    assert len(curves[0]) == 2
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


def test_the_count_is_that_of_the_labels_the_model_gets(recipe, tmp_path, monkeypatch):
    """With mixup, what is mixed with an unknown label is unknown as well."""
    seen, plain = [], HSVLTForImageClassification.forward

    def forward(self, *arguments, num_items_in_batch=None, **options):
        if num_items_in_batch is not None:
            seen.append((int(num_items_in_batch), int((options["labels"] != UNKNOWN_LABEL).sum())))
        return plain(self, *arguments, num_items_in_batch=num_items_in_batch, **options)

    monkeypatch.setattr(HSVLTForImageClassification, "forward", forward)
    options = [*PARTLY_KNOWN, *divided(8, 4), "--epochs", "1", "--augmentation", "{mixup: 0.4}"]
    assert main([recipe, "--output_dir", str(tmp_path / "run"), *options]) == 0
    assert len(seen) == 6  # of the 48 images, 32 in the first step
    for step in (seen[:4], seen[4:]):
        counted, known = zip(*step, strict=True)
        assert len(set(counted)) == 1 and counted[0] == sum(known)
        assert sum(known) < 0.1 * 10 * 8 * len(step), "mixing two images leaves 4 % known"


@pytest.mark.slow
def test_two_processes_take_the_same_step(recipe, tmp_path):
    options = [*PLAIN, "--optimizer", "muon", "--scenes.num_scenes.train", "45", "--epochs", "1"]
    single = train(recipe, tmp_path / "one", *options, *divided(16, 1))
    result = forked(main, [recipe, "--output_dir", str(tmp_path / "two"), *options, *divided(4, 2)], processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    double = curve_of(tmp_path / "two")
    assert len(single) == 3, "of 16, 16 and 13 images"
    np.testing.assert_allclose(double[0], single[0], rtol=1e-5)
    np.testing.assert_allclose(double, single, rtol=2e-4)
