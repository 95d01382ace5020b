"""Splits are written as a data set that loads."""

import io
import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from training.data.load import load
from training.split import main


def image(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


@pytest.fixture
def photos(tmp_path):
    """An image folder: 40 images to divide, 3 in test."""
    root = tmp_path / "photos"
    for split, numbers in (("train", range(40)), ("test", range(40, 43))):
        (root / split).mkdir(parents=True)
        rows = []
        for number in numbers:
            (root / split / f"{number}.png").write_bytes(image(number)["bytes"])
            labels = (["cat"] if number % 2 else ["dog"]) + (["rare"] if number < 3 else [])
            rows.append(json.dumps({"file_name": f"{number}.png", "labels": labels}) + "\n")
        (root / split / "metadata.jsonl").write_text("".join(rows))
    return root


def names_in(split):
    return {image["path"] for image in split.images["image"]}


def test_the_command_writes_a_dataset_that_loads(photos, tmp_path, capsys):
    target = tmp_path / "divided"
    assert main([str(photos), str(target), "--fractions", "0.8", "0.2"]) == 0
    assert "as it was" in capsys.readouterr().out
    loaded = load(target, cache_dir=str(tmp_path / "cache"))
    splits, names = loaded.splits, loaded.label_names
    assert names == ["cat", "dog", "rare"]
    assert {name: len(split) for name, split in splits.items()} == {"train": 32, "validation": 8, "test": 3}
    assert not names_in(splits["train"]) & names_in(splits["validation"])
    for split in splits.values():
        for each, labels in zip(split.images["image"], split.labels.lists(as_ids=True).to_pylist(), strict=True):
            number = int(each["path"].removesuffix(".png"))
            assert each["bytes"] == image(number)["bytes"]
            assert labels == [0 if number % 2 else 1, *([2] if number < 3 else [])]
    plain = load_dataset(str(target), split="validation", cache_dir=str(tmp_path / "cache"))
    assert plain[0]["image"].size == (8, 8) and plain.features["labels"].feature.names == names


def test_multi_hot_labels_and_unknown_survive(tmp_path):
    labels = [[1, 0, float("nan")], [0, 1, -100], [1, 1, 0], [0.0, 0, 1]] * 3
    features = Features({"image": Image(), "labels": List(Value("float32"))})
    source = Dataset.from_dict({"image": [image(number) for number in range(12)], "labels": labels}, features)
    DatasetDict(train=source).save_to_disk(tmp_path / "saved")
    argv = [str(tmp_path / "saved"), str(tmp_path / "out"), "--fractions", "0.5", "0.25", "0.25"]
    assert main([*argv, "--label_names", "a", "b", "c"]) == 0
    loaded = load(tmp_path / "out", cache_dir=str(tmp_path / "cache"))
    splits, names = loaded.splits, loaded.label_names
    assert names == ["a", "b", "c"] and sum(len(split) for split in splits.values()) == 12
    for split in splits.values():
        for row in range(len(split)):
            number = int(split[row]["image"]["path"][:-4])
            assert np.array_equal(split.labels.dense(row), np.nan_to_num(labels[number], nan=-100))


def test_copies_that_the_check_found_stay_together(photos, tmp_path, capsys):
    report = tmp_path / "report.json"
    members = [{"split": "train", "row": row, "file": f"train/{row}.png"} for row in (0, 5, 11, 17)]
    members.append({"split": "test", "row": 0, "file": "test/40.png"})
    report.write_text(json.dumps({"duplicates": [{"members": members}]}))
    for seed in range(4):
        target = tmp_path / f"divided{seed}"
        argv = [str(photos), str(target), "--fractions", "0.5", "0.5", "--duplicates", str(report), "--seed", str(seed)]
        assert main(argv) == 0
        splits = load(target, cache_dir=str(tmp_path / "cache")).splits
        copies = {"0.png", "5.png", "11.png", "17.png"}
        assert len(copies & names_in(splits["train"])) in (0, 4)
    members[1]["file"] = "other.png"
    report.write_text(json.dumps({"duplicates": [{"members": members}]}))
    argv = [str(photos), str(tmp_path / "new"), "--fractions", "0.5", "0.5", "--duplicates", str(report)]
    assert main(argv) == 2
    assert "row 5 of train is not 'other.png'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fractions", "0.8", "0.1", "0.1"], "has a split 'test' already"),
        (["--fractions", "0.8", "0.2", "--divide", "dev"], "no split 'dev' to divide, only"),
        (["--fractions", "0.8", "0.2", "--names", "a", "a"], "as many different --names"),
        (["--fractions", "0.25", "0.25", "0.25", "0.25"], "as many different --names"),
    ],
)
def test_the_command_refuses_in_one_sentence(photos, tmp_path, capsys, options, words):
    assert main([str(photos), str(tmp_path / "out"), *options]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main([str(photos), str(tmp_path / "out"), "--fractions", "0.8", "0.2"]) == 2
    assert "out exists" in capsys.readouterr().err
