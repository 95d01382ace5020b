"""What is refused, built and checked before the first step, through the command itself."""

import json
import shutil

import pytest
import torch
from PIL import Image

from training.checkpoint.series import newest_good
from training.data.scene_labels import SCENE_LABELS
from training.places import native_precision
from training.train import main


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epoch", "3"], "did you mean 'epochs'"),
        (["--model.num_heads", "3"], "HSVLTConfig has no field 'num_heads'"),
        (["--loss_type", "bse"], "bse"),
        (["--trackers", "[nothing]"], "nothing"),
        (["--trackers", "clearml"], "pip install clearml"),
        (["--dataset", "no/such/folder"], "no/such/folder"),
        (["--scenes.num_scenes", "50"], "for train and for each other split"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(recipe, tmp_path, capsys, options, message):
    folder = tmp_path / "run"
    assert main([recipe, "--output_dir", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not folder.exists()


@pytest.fixture
def images(tmp_path):
    """An imagefolder of 12 + 6 images, coloured by label."""
    folder = tmp_path / "images"
    for split, count in (("train", 12), ("validation", 6)):
        (folder / split).mkdir(parents=True)
        rows = []
        for number in range(count):
            Image.new("RGB", (40, 30), (250 * (number % 2), 200, 30)).save(folder / split / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "labels": ["red"] * (number % 2) + ["green"]})
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_missing_split_is_refused(recipe, images, tmp_path, capsys):
    (images / "validation").rename(tmp_path / "elsewhere")
    assert main([recipe, "--output_dir", str(tmp_path / "run"), "--dataset", str(images)]) == 2
    assert "no split 'validation'" in capsys.readouterr().err


@pytest.mark.parametrize(("labels", "message"), [([0.0, 0.0], "shows a label"), ([0.3, 1.0], "between 0 and 1")])
def test_a_validation_split_that_cannot_be_measured_is_refused(recipe, images, tmp_path, capsys, labels, message):
    (images / "labels.txt").write_text("green\nred\n")
    table = images / "validation" / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("\n".join(json.dumps({**row, "labels": labels}) for row in rows))
    assert main([recipe, "--output_dir", str(tmp_path / "run"), "--dataset", str(images)]) == 2
    error = capsys.readouterr().err
    assert message in error and "validation" in error


def test_a_corrupt_image_is_named_before_the_first_step_and_can_be_skipped(recipe, images, tmp_path, capsys):
    (images / "train" / "3.png").write_bytes((images / "train" / "3.png").read_bytes()[:60])
    options = ["--output_dir", str(tmp_path / "run"), "--dataset", str(images), "--batch_size", "4"]
    assert main([recipe, *options]) == 2
    error = capsys.readouterr().err
    assert "3.png" in error and "skip" in error and not (tmp_path / "run").exists()
    assert main([recipe, *options, "--on_unreadable", "skip"]) == 0
    assert "11 images to train on, 6 to validate" in capsys.readouterr().out


def test_a_folder_of_images_trains(recipe, images, tmp_path):
    options = ["--dataset", str(images), "--cache_images", "--batch_size", "4"]
    assert main([recipe, "--output_dir", str(tmp_path / "run"), *options]) == 0
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert config["id2label"] == {"0": "green", "1": "red"} and len(config["thresholds"]) == 2


def test_resume_refuses_another_run(finished, tmp_path, capsys):
    config = str(finished / "config.yaml")
    assert main([config, "--resume", "--epochs", "5"]) == 2
    assert "total_steps 12, not 30" in capsys.readouterr().err
    assert main([config, "--resume", "--label_names", json.dumps(list(reversed(SCENE_LABELS)))]) == 2
    assert "label_names" in capsys.readouterr().err
    assert main([config, "--resume", "--output_dir", str(tmp_path / "nothing")]) == 2
    assert "start without --resume" in capsys.readouterr().err
    assert main([config, "--resume", "--batch_size", "6"]) == 2
    assert "total_steps" in capsys.readouterr().err
    assert main([config, "--resume", "--seed", "1"]) == 2
    assert "batches [1, 8, 1, 0], not [1, 8, 1, 1]" in capsys.readouterr().err
    assert main([config, "--resume", "--scenes.max_size", "18"]) == 2
    assert "dataset 'scenes (48 + 24 images, " in capsys.readouterr().err


def test_resume_takes_a_change_that_is_allowed(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    options = ["--output_dir", str(folder), "--resume", "--resume_despite", "[total_steps, batches]"]
    assert main([str(finished / "config.yaml"), *options, "--epochs", "3", "--batch_size", "12"]) == 0
    assert newest_good(folder).name == "checkpoint-12"  # 12 steps are what three epochs of 4 batches make


def test_a_used_folder_is_refused_unless_told(finished, recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("weeks of work")
    short = [recipe, "--output_dir", str(folder), "--max_steps", "1", "--warmup_epochs", "0"]
    assert main(short) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error and (folder / "notes.txt").exists()
    assert main([*short, "--overwrite"]) == 0
    assert not (folder / "notes.txt").exists() and (folder / "best").exists()


@pytest.mark.parametrize(
    ("avx512", "amx", "cuda", "expected"),
    [
        (False, False, None, "no"),
        (True, False, None, "bf16"),
        (False, True, None, "bf16"),
        (True, True, False, "fp16"),
        (False, False, True, "bf16"),
    ],
)
def test_precision_is_what_the_machine_has_instructions_for(monkeypatch, avx512, amx, cuda, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: cuda)
    assert native_precision() == expected
