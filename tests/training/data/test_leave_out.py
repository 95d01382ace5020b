"""Lists of rows to leave out are obeyed exactly, said aloud, and refused when they are about other data."""

import logging
import os

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from training.config import TrainingConfig
from training.data.leave_out import find_unreadable, leave_out_unreadable, read_exclusions, write_exclusions
from training.data.load import load
from training.loop.setup import load_splits

from .test_dataset import MULTI_HOT, dense, encoded


def split_of(paths):
    images = [{"path": path, "bytes": b""} for path in paths]
    features = Features({"image": Image(decode=False), "labels": List(Value("int64"))})
    return Dataset.from_dict({"image": images, "labels": [[row] for row in range(len(paths))]}, features=features)


def data():
    return DatasetDict(
        train=split_of(["a/train/0.png", "a/train/1.png", "a/train/2.png"]), test=split_of([None, "x.png"])
    )


def test_named_rows_are_left_out_counted_and_told_as_values(tmp_path, caplog):
    path = tmp_path / "exclude.txt"
    entries = [("train", 1, "train/1.png", "cannot\nbe\tread"), ("test", 0, "", "copy"), ("validation", 7, "a.png", "")]
    write_exclusions(path, entries)
    with caplog.at_level(logging.WARNING):
        loaded = load(data(), label_names=["a", "b", "c"], label_format="ids", exclude=path)
    left = {name: split.labels.ids.tolist() for name, split in loaded.splits.items()}
    assert left == {"train": [0, 2], "test": [1]}
    assert "Left out 1 of 3 images of train" in caplog.text and "1 of 2 images of test" in caplog.text
    assert loaded.left_out == [
        ("excluded", "train", "split 'train', row 1 (a/train/1.png)", "cannot be read"),
        ("excluded", "test", "split 'test', row 0", "copy"),
    ]
    path.write_text(path.read_text().replace("train\t1", "# train\t1"))
    loaded = load(data(), label_names=["a", "b", "c"], label_format="ids", exclude=path)
    assert loaded.splits["train"].labels.ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train 1 a.png", "line 2: 'train 1 a.png' is not split, row, file"),
        ("train\t-1\ttrain/1.png\t", "is not split, row, file"),
        ("train\t1\ttrain/2.png\tcopy", "line 2: row 1 of train is not 'train/2.png'"),
        ("train\t3\ttrain/3.png\tcopy", "row 3 of train is not"),
    ],
)
def test_lists_about_other_data_are_refused_with_their_line(tmp_path, line, words):
    path = tmp_path / "exclude.txt"
    path.write_text(f"# a comment\n{line}\n")
    splits = load(data(), label_names=["a", "b", "c"], label_format="ids").splits
    with pytest.raises(ValueError, match=words):
        read_exclusions(path, splits)
    with pytest.raises(FileNotFoundError, match="hsvlt check"):
        read_exclusions(tmp_path / "none.txt", splits)


def test_training_obeys_the_list(image_folder, tmp_path):
    path = tmp_path / "exclude.txt"
    write_exclusions(path, [("train", 0, "train/0.png", "copy"), ("train", 4, "train/4.png", "copy")])
    config = TrainingConfig(dataset=str(image_folder), exclude=str(path))
    loaded = load_splits(config, Accelerator()).splits
    assert [image["path"][-5:] for image in loaded["train"].images["image"]] == ["1.png", "2.png", "3.png"]
    assert len(loaded["validation"]) == 3


@pytest.mark.parametrize("num_workers", [0, 3])
def test_unreadable_images_are_found_before_the_first_step(damaged, num_workers):
    loaded = damaged
    found = find_unreadable(loaded.splits["train"].images, num_workers)
    assert [(row, os.path.basename(name)) for row, name, _ in found] == [(1, "1.png"), (2, "2.png"), (4, "4.png")]
    assert all(reason for *_, reason in found)
    with pytest.raises(ValueError, match=r"3 of 5 images cannot be read \(.*1.png.*2.png.*4.png") as refusal:
        leave_out_unreadable(loaded, "train", found)
    assert "on_unreadable='skip'" in str(refusal.value)


def test_unreadable_rows_are_numbered_in_the_whole_split():
    images = [encoded(0)] * 300
    images[270], images[290] = {"bytes": b"not an image", "path": None}, None
    split = Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    found = find_unreadable(split, num_workers=2)
    assert [(row, name) for row, name, _ in found] == [(270, "row 270"), (290, "row 290")]
    assert all(reason for *_, reason in found)


def test_unreadable_images_can_be_skipped_and_are_told(damaged, caplog):
    found = find_unreadable(damaged.splits["train"].images)
    with caplog.at_level(logging.WARNING):
        leave_out_unreadable(damaged, "train", found, on_unreadable="skip")
    assert all(name in caplog.text for name in ("1.png", "2.png", "4.png"))
    kept = damaged.splits["train"]
    assert np.array_equal(dense(kept), MULTI_HOT[[0, 3]]) and find_unreadable(kept.images) == []
    assert kept.row_name(1).endswith("metadata.jsonl, line 4 (3.png)"), "rows keep their names"
    assert [each[:2] for each in damaged.left_out] == [("unreadable", "train")] * 3
    assert "line 3 (2.png)" in damaged.left_out[1].row and damaged.left_out[1].message == found[1][2]
    leave_out_unreadable(damaged, "train", [])
    assert damaged.splits["train"] is kept
    with pytest.raises(ValueError, match="on_unreadable='ignore'"):
        leave_out_unreadable(damaged, "train", [], on_unreadable="ignore")
