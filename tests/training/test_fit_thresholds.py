"""The command fits thresholds and stores them in the checkpoint."""

import json

from modeling_hsvlt.processing_multilabel import MultiLabelProcessor
from training.fit_thresholds import main

from .tiny_checkpoint import save_checkpoint, save_images


def test_the_command_fits_and_stores(tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint")
    save_images(tmp_path / "photos")
    command = [str(tmp_path / "checkpoint"), str(tmp_path / "photos")]
    assert main([*command, "--min_positives", "0"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [row[0] for row in rows] == ["0.5", "fitted", "held"]

    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert len(config["thresholds"]) == 3
    info = config["threshold_info"]
    assert (info["objective"], info["split"], info["dataset"]) == ("f1", "validation", "photos")
    assert info["num_samples"] == 7
    processor = MultiLabelProcessor.from_pretrained(tmp_path / "checkpoint")
    assert processor.thresholds == config["thresholds"]

    assert main([*command, "--objective", "recall", "--target", "1", "--min_positives", "0"]) == 0
    again = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert again["threshold_info"]["objective"] == "recall" and again["thresholds"] != config["thresholds"]
    assert again["threshold_info"]["split_fingerprint"] == info["split_fingerprint"]
    before, fitted = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert before == ["as", "it", "was", *rows[1][1:]]
    assert float(fitted[-5]) == 1  # CR


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint")
    save_images(tmp_path / "photos")
    for command, message in (
        (["me/model", str(tmp_path / "photos")], "me/model is not the folder of a checkpoint"),
        ([str(tmp_path / "checkpoint"), str(tmp_path / "photos"), "--objective", "recall"], "needs a target"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
