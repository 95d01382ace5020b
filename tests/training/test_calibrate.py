"""The command folds a calibration into the checkpoint, and can be repeated."""

import json

import pytest
import torch

from modeling_hsvlt import HSVLTForImageClassification
from training.calibrate import main
from training.scoring.calibration import (
    stored_calibration,
)
from training.scoring.thresholds import store_thresholds

from .tiny_checkpoint import save_checkpoint, save_images, tiny_model


def logits_of(folder):
    model = HSVLTForImageClassification.from_pretrained(folder).eval()
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(pixel_values=pixels).logits, model.config


def test_the_command_folds_and_can_be_repeated(tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(checkpoint)
    save_images(tmp_path / "photos")
    store_thresholds(checkpoint, [0.25, 0.5, 0.75], {"objective": "f1"})
    (checkpoint / "README.md").write_text("the card")
    before, _ = logits_of(checkpoint)

    command = [str(checkpoint), str(tmp_path / "photos")]
    assert main(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = {line[0]: float(line[-1]) for line in lines if line and line[0] in ("raw", "calibrated")}
    assert losses["calibrated"] < losses["raw"]

    after, config = logits_of(checkpoint)
    stored = stored_calibration(config)
    scale, bias = (torch.from_numpy(values).float() for values in stored)
    torch.testing.assert_close(after, scale * before + bias, rtol=1e-4, atol=1e-4)
    cuts = [torch.tensor(values).logit() for values in ([0.25, 0.5, 0.75], config.thresholds)]
    torch.testing.assert_close(cuts[1], scale * cuts[0] + bias, rtol=1e-4, atol=1e-4)
    assert config.threshold_info == {"objective": "f1"} and (checkpoint / "README.md").read_text() == "the card"
    info = config.calibration_info
    assert (info["method"], info["dataset"], info["num_samples"]) == ("platt", "photos", 7)

    # From the raw scores again: the same, not a calibration of the calibrated.
    assert main(command) == 0
    again, config = logits_of(checkpoint)
    torch.testing.assert_close(again, after, rtol=1e-3, atol=1e-3)
    assert config.calibration_info["scale"] == pytest.approx(info["scale"], rel=1e-3)

    assert main([*command, "--method", "temperature", "--shared"]) == 0
    last, config = logits_of(checkpoint)
    torch.testing.assert_close(last, before * config.calibration_info["scale"][0], rtol=1e-3, atol=1e-3)


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    save_images(tmp_path / "photos")
    model = tiny_model(classifier="shared")
    save_checkpoint(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "checkpoint")
    written = (tmp_path / "checkpoint" / "model.safetensors").read_bytes()
    for command, message in (
        (["me/model", str(tmp_path / "photos")], "me/model is not the folder of a checkpoint"),
        ([str(tmp_path / "checkpoint"), str(tmp_path / "photos")], "fit one of all with --shared"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert (tmp_path / "checkpoint" / "model.safetensors").read_bytes() == written
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert not config.get("calibration_info")
