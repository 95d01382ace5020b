"""Shards of both kinds are found, named and read from any row on, and nothing beside them is opened."""

import json
import os

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value

from training.data.load import load
from training.data.shards import open_shards
from training.data.stream_loader import StreamDataset, StreamLoader
from training.data.stream_parts import load_streamed
from training.data.streaming import RowLabels
from training.options import DatasetOptions

from ..shards import NAMES, labels_of, number_of, png, write_parquet, write_shards, write_tar
from .test_streaming import PROCESSOR

KINDS = ["parquet", "tar"]


def options(folder, **more):
    return DatasetOptions(dataset=str(folder), streaming=True, **more)


def rows_of(shards, labels):
    """Numbers and label names of all rows, in order."""
    rows = [row for shard in range(len(shards)) for row in shards.read(shard)]
    sparse = labels([row.values for row in rows], "row {}".format)
    names = [{labels.label_names[label] for label in sparse.entries(place)[0]} for place in range(len(rows))]
    return [int(row.values["image"]["path"].split("/")[-1][:5]) for row in rows], names


def row_labels(shards, names=NAMES, **more):
    return RowLabels(
        DatasetOptions(dataset="", **more), names, shards.features, shards.label_column, shards.label_columns
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_splits_are_those_of_the_files(tmp_path, kind):
    write_shards(tmp_path, kind, [3, 1, 2])
    write_shards(tmp_path / "val", kind, [2], split="part", first=6)
    shards, names = open_shards(options(tmp_path))
    assert names == NAMES and {name: len(each) for name, each in shards.items()} == {"train": 3, "validation": 1}
    numbers, labels = rows_of(shards["train"], row_labels(shards["train"]))
    assert numbers == list(range(6)) and labels == [set(labels_of(number)) for number in numbers]
    assert shards["train"].count() == (6 if kind == "parquet" else None)
    assert shards["train"].name(1 << 40 | 5).endswith(f"train-00001.{kind}, row 5")
    whole = list(shards["train"].read(0))
    assert [list(shards["train"].read(0, row)) for row in range(5)] == [whole[row:] for row in range(5)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_is_of_the_files_wherever_they_are(tmp_path, kind):
    def mark(folder):
        return open_shards(options(folder))[0]["train"].fingerprint()

    folder = write_shards(tmp_path / "one", kind, [3, 2])
    before = mark(folder)
    folder.rename(tmp_path / "two")
    assert mark(tmp_path / "two") == before
    os.utime(tmp_path / "two" / f"train-00001.{kind}", ns=(1, 1))
    assert mark(tmp_path / "two") != before


def test_labels_as_text_numbers_and_columns_in_webdataset(tmp_path):
    write_tar(tmp_path / "train-0.tar", range(3), form="txt")
    shards, _ = open_shards(options(tmp_path))
    assert rows_of(shards["train"], row_labels(shards["train"]))[1] == [set(labels_of(number)) for number in range(3)]

    def as_ids(number):
        return [NAMES.index(name) for name in labels_of(number)]

    write_tar(tmp_path / "train-0.tar", range(3), as_ids)
    shards, _ = open_shards(options(tmp_path, label_names=NAMES))
    assert rows_of(shards["train"], row_labels(shards["train"]))[1] == [set(labels_of(number)) for number in range(3)]
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    split = load_streamed(options(tmp_path, no_label=["cat"]), ["train"], train=True).splits["train"]
    labels = rows_of(split.shards, split.row_labels)[1]
    assert labels == [set(labels_of(number)) - {"cat"} for number in range(3)], "ids are those of labels.txt"
    write_tar(tmp_path / "train-0.tar", range(3), lambda number: [None if number == 1 else 1, 0, 1])
    shards, _ = open_shards(options(tmp_path, label_names=NAMES, label_format="multi_hot"))
    labels = row_labels(shards["train"], label_format="multi_hot")
    dense = labels([row.values for row in shards["train"].read(0)], "row {}".format)
    assert [dense.dense(row).tolist() for row in range(3)] == [[1, 0, 1], [-100, 0, 1], [1, 0, 1]]


def test_columns_of_parquet_options_and_fields_of_objects(tmp_path):
    images = [{"bytes": png(number), "path": None} for number in range(3)]
    table = Dataset.from_dict({"photo": images, "cat": [1, 0, None], "dog": [-1, 1, 0], "more": [b"x" * 99] * 3})
    table.cast_column("photo", Image()).to_parquet(tmp_path / "train.parquet")
    how = {"image_column": "photo", "label_columns": ["cat", "dog"], "uncertain": "absent", "blank": "unknown"}
    shards, _ = open_shards(options(tmp_path, **how))
    labels = row_labels(shards["train"], ["cat", "dog"], **how)
    rows = [row.values for row in shards["train"].read(0)]
    assert set(rows[0]) == {"photo", "cat", "dog"}, "what is not needed is not read"
    sparse = labels(rows, "row {}".format)
    assert [sparse.dense(row).tolist() for row in range(3)] == [[1, 0], [0, 1], [-100, 0]]
    (tmp_path / "train.parquet").unlink()
    objects = {"image": Image(), "objects": {"category": List(Value("string"))}}
    rows = {
        "image": images,
        "objects": [
            {"category": ["dog", "dog"]},
            {"category": []},
            {
                "category": [
                    "No",
                ]
            },
        ],
    }
    Dataset.from_dict(rows, features=Features(objects)).to_parquet(tmp_path / "train.parquet")
    loaded = load_streamed(options(tmp_path, no_label=["No"], validation_images=1), ["train", "validation"], train=True)
    assert loaded.label_names == ["dog"] and loaded.splits["validation"].labels.dense(0).tolist() == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_names_that_nobody_gave_are_those_of_all_rows(tmp_path, kind):
    def text(path, numbers):
        rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "labels": [labels_of(n) for n in numbers]}
        features = Features({"image": Image(), "labels": List(Value("string"))})
        Dataset.from_dict(rows, features=features).to_parquet(path)

    (text if kind == "parquet" else write_tar)(tmp_path / f"train.{kind}", [1, 2])
    (text if kind == "parquet" else write_tar)(tmp_path / f"test.{kind}", [4])
    assert load(str(tmp_path), streaming=True, splits=["test"]).label_names == sorted(NAMES)
    (tmp_path / "labels.txt").write_text("dog\nsea\ncat\n")
    loaded = load(str(tmp_path), streaming=True, splits=["test"])
    assert loaded.label_names == ["dog", "sea", "cat"] and loaded.splits["test"].labels.dense(0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_its_own_split_or_the_first_rows_of_spaced_shards(tmp_path, kind):
    write_shards(tmp_path, kind, [6] * 5)
    loaded = load_streamed(options(tmp_path, validation_images=10), ["train", "validation"], train=True)
    part, shards = loaded.splits["validation"], loaded.splits["train"].shards
    numbers = [int(image["path"].split("/")[-1][:5]) for image in part.images["image"]]
    assert numbers == [first + row for first in range(0, 30, 6) for row in (0, 1)]
    assert shards.held_out == dict.fromkeys(range(5), 2)
    assert [part.labels.dense(row).tolist() for row in range(10)] == [
        [float(name in labels_of(number)) for name in NAMES] for number in numbers
    ]
    if kind == "parquet":
        assert shards.count() == 20
    with pytest.raises(ValueError, match=r"lower validation_images, or add the split"):
        load_streamed(options(tmp_path, validation_images=30), ["train", "validation"], train=True)
    write_shards(tmp_path, kind, [3, 3], split="validation", first=30)
    loaded = load_streamed(options(tmp_path), ["train", "validation"], train=True)
    assert len(loaded.splits["validation"]) == 6 and not loaded.splits["train"].shards.held_out
    again = load(str(tmp_path), streaming=True, splits=["validation"], validation_images=2).splits["validation"]
    assert ["00030.png" in again.row_name(0), "00033.png" in again.row_name(1), len(again)] == [True, True, 2]


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (
            lambda f: (write_shards(f, "tar", [1]), write_shards(f, "parquet", [1], split="test")),
            {},
            "parquet files and .tar shards",
        ),
        (lambda f: (f / "a.jpg").write_bytes(png(1)), {}, "neither .parquet nor .tar"),
        (
            lambda f: write_shards(f, "parquet", [1]),
            {"label_column": "tags"},
            r"has no column 'tags', only image, labels",
        ),
        (lambda f: (f / "train.parquet").write_bytes(b"PAR1 and no more"), {}, "train.parquet is not a whole parquet"),
        (lambda f: write_shards(f, "tar", [1]), {"splits": ["test"]}, "has no split 'test', only train"),
        (lambda f: write_shards(f, "tar", [1]), {"splits": None}, "a stream, which only hsvlt train reads"),
        (lambda f: write_tar(f / "test.tar", [1], lambda number: [7]), {}, "class 7 has no name"),
        (lambda f: (f / "test.tar").write_bytes(b"no tar"), {"label_names": NAMES}, "test.tar is not a whole tar file"),
    ],
    ids=["both", "neither", "column", "parquet", "split", "train", "names", "tar"],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path, make, more, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path), streaming=True, **{"splits": ["test" if "test" in message else "validation"], **more})


@pytest.mark.parametrize("source", ["shards/train-{000..009}.tar", "shards/*.tar", "shards.tar", "a/train.parquet"])
def test_a_pattern_or_a_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(FileNotFoundError, match=r"does not exist; give a folder of shards \(no pattern\)"):
        open_shards(options(source))


def loader_of(folder, workers=0, **more):
    split = load_streamed(options(folder, **more), ["train"], train=True).splits["train"]
    dataset = StreamDataset(split, PROCESSOR)
    return StreamLoader(dataset, batch_size=4, epoch_batches=3, seed=1, buffer=6, num_workers=workers)


def numbers_of(batches):
    return [[number_of(image.numpy()) for image in batch["pixel_values"]] for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_workers_and_what_they_hold_ready_is_not_lost(tmp_path, kind):
    write_shards(tmp_path, kind, [9, 4, 6])
    plain, working = loader_of(tmp_path), loader_of(tmp_path, workers=3)
    batches = list(plain.take(9))
    expected = numbers_of(batches)
    for batch, numbers in zip(batches, expected, strict=True):
        assert [[float(name in labels_of(number)) for name in NAMES] for number in numbers] == batch[
            "labels"
        ].to_dense().tolist()
    assert numbers_of(working.take(4)) == expected[:4]  # by now the workers have others ready
    state = json.loads(json.dumps(working.state))
    working.close()
    again = loader_of(tmp_path, workers=2)
    again.restore([state])
    assert numbers_of(again.take(5)) == expected[4:]
    again.close()


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_cannot_be_read_are_told_and_teach_nothing(tmp_path, kind):
    def content(number):
        return b"no image" if number % 3 == 1 else png(number)

    def some(path, numbers):
        (write_parquet if kind == "parquet" else write_tar)(path, numbers, content=content)

    some(tmp_path / f"train.{kind}", range(12))
    (tmp_path / "labels.txt").write_text("\n".join(NAMES))
    loader = loader_of(tmp_path)
    batches = list(loader.take(3))
    named = sorted(name for name, _ in loader.problems)
    assert [f"0000{number}.png" in " ".join(named) for number in range(10)] == [n % 3 == 1 for n in range(10)]
    assert len(named) == 4 and all("no image" in reason or "identify" in reason for _, reason in loader.problems)
    unknown = np.concatenate([(batch["labels"].to_dense() == -100).all(1).numpy() for batch in batches])
    rows = np.concatenate([batch["index"].numpy() for batch in batches])
    assert sorted(rows[unknown]) == [1, 4, 7, 10] and all(len(batch["index"]) == 4 for batch in batches)


def test_a_path_in_a_row_is_not_opened_and_a_batch_of_nothing_is_black(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(7))
    rows = {"image": [{"bytes": None, "path": str(secret)}] * 8, "labels": [["cat"]] * 8}
    features = Features({"image": Image(decode=False), "labels": List(Value("string"))})
    (tmp_path / "data").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    loader = loader_of(tmp_path / "data", label_names=["cat"])
    (batch,) = loader.take(1)
    assert (batch["pixel_values"] == 0).all() and (batch["labels"].to_dense() == -100).all()
    assert len(loader.problems) == 4 and "holds no image" in loader.problems[0][1]


def test_labels_that_are_wrong_are_told_by_name(tmp_path):
    write_tar(tmp_path / "train.tar", range(6), lambda number: ["cow"] if number == 3 else ["cat"])
    loader = loader_of(tmp_path, label_names=NAMES)
    list(loader.take(2))
    assert "train.tar, row 3 (train.tar/00003.png): label 'cow' is not among the 3 label names" in loader.fault
