"""Any source gives the same rows and labels, checked; what is wrong is refused by file and row."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, List, Value
from huggingface_hub.errors import EntryNotFoundError

import training.data.load as load_module
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.data.batches import build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.scene_labels import SCENE_LABELS
from training.data.scenes import SceneSplit

from .test_dataset import (
    IDS,
    LABELS,
    MULTI_HOT,
    NAMES,
    SHARED,
    dense,
    embedded,
    encoded,
    image,
    metadata_rows,
    needs_shared,
    squash,
)


def test_an_image_folder_gives_names_in_class_order_and_checked_labels(image_folder):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    assert names == NAMES and set(splits) == {"train", "validation"}
    row = splits["train"][3]
    assert row["image"] == {"bytes": None, "path": str(image_folder / "train/3.png")}
    assert row["labels"].is_sparse and row["labels"].indices().tolist() == [[0, 1]]
    assert np.array_equal(dense(splits["train"]), MULTI_HOT)
    assert np.array_equal(dense(splits["validation"]), MULTI_HOT[:3])
    assert load(image_folder, label_names=NAMES[::-1]).label_names == NAMES[::-1]
    (image_folder / "labels.txt").unlink()
    assert load(image_folder).label_names == ["cat", "dog", "tv monitor"]


@pytest.mark.parametrize(
    ("labels", "feature", "given"),
    [
        (LABELS, List(Value("string")), NAMES),
        (IDS, List(ClassLabel(names=NAMES)), None),
        (IDS, List(Value("int64")), NAMES),
        (MULTI_HOT.astype(int).tolist(), List(Value("int8")), NAMES),
        (MULTI_HOT.tolist(), List(Value("float64"), length=3), NAMES),
        (MULTI_HOT.astype(bool).tolist(), List(Value("bool")), NAMES),
    ],
    ids=["names", "class_labels", "ids", "multi_hot_int", "multi_hot_float", "multi_hot_bool"],
)
@pytest.mark.parametrize("container", ["memory", "parquet", "saved_split", "saved_dict"])
def test_every_label_format_and_container_gives_the_same(tmp_path, labels, feature, given, container):
    source = embedded(labels, feature)
    folder = tmp_path / container
    if container == "memory":
        loaded = source
    elif container == "parquet":
        folder.mkdir()
        source.to_parquet(folder / "train.parquet")
        loaded = str(folder)
    else:
        (source if container == "saved_split" else DatasetDict(train=source)).save_to_disk(folder)
        loaded = folder
    loaded = load(loaded, label_names=given, cache_dir=str(tmp_path / "cache"))
    splits, names = loaded.splits, loaded.label_names
    assert names == NAMES
    dataset = MultiLabelDataset(splits["train"], names, MultiLabelImageProcessor(size={"height": 40, "width": 50}))
    for number in range(5):
        assert np.array_equal(dataset[number]["labels"].to_dense(), MULTI_HOT[number])
        assert np.array_equal(dataset[number]["pixel_values"].permute(1, 2, 0), np.asarray(image(number)))
        assert dataset[number]["index"] == number
    assert dataset.sparse_labels.positives().tolist() == [2, 2, 2]


def test_text_and_label_columns_give_the_same_rows(tmp_path):
    text = embedded([" , ".join(labels) for labels in LABELS], Value("string"))
    columns = {"image": [encoded(number) for number in range(5)]}
    columns |= {name: MULTI_HOT[:, index].astype(int) for index, name in enumerate(NAMES)}
    columns = Dataset.from_dict(columns).cast_column("image", Image())
    for source, options in (
        (text, {"label_names": NAMES}),
        (columns, {"label_columns": NAMES}),
        (columns, {"label_columns": sorted(NAMES), "label_names": NAMES}),
    ):
        loaded = load(source, **options)
        splits, names = loaded.splits, loaded.label_names
        assert names == NAMES and np.array_equal(dense(splits["train"]), MULTI_HOT)
        assert splits["train"].labels.values.size == MULTI_HOT.sum()
    assert load(text).label_names == sorted(NAMES)
    with pytest.raises(ValueError, match="'tv monitor' is not among both the label columns and the label names"):
        load(columns, label_columns=["dog", "cat"], label_names=NAMES)
    with pytest.raises(ValueError, match="no column 'cow', only image, dog, cat, tv monitor"):
        load(columns, label_columns=["dog", "cow"])


@pytest.mark.parametrize("layout", ["text", "columns", "one_table"])
def test_csv_tables_are_read_where_they_are(image_folder, layout):
    for split in ("train", "validation"):
        count = len(list((image_folder / split).glob("*.png")))
        (image_folder / split / "metadata.jsonl").unlink()
        if layout == "columns":
            rows = [["file_name", *NAMES], *([f"{n}.png", *map(int, MULTI_HOT[n])] for n in range(count))]
        else:
            rows = [["file_name", "labels"], *([f"{n}.png", f'"{",".join(LABELS[n])}"'] for n in range(count))]
        (image_folder / split / "metadata.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    if layout == "one_table":
        rows = [
            f'{split}/{n}.png,{split},"{",".join(LABELS[n])}"' for split in ("train", "validation") for n in range(3)
        ]
        for path in image_folder.glob("*/metadata.csv"):
            path.unlink()
        (image_folder / "all.csv").write_text("\n".join(["file_name,split,labels", *rows]))
        with pytest.raises(ValueError, match=r"holds 2 images \(train/3.png, train/4.png\) without a row in a table"):
            load(image_folder / "all.csv")
        loaded = load(image_folder / "all.csv", unlisted_images="skip")
        splits, names = loaded.splits, loaded.label_names
    else:
        loaded = load(image_folder)
        splits, names = loaded.splits, loaded.label_names
    assert names == NAMES
    assert np.array_equal(dense(splits["train"]), MULTI_HOT[: len(splits["train"])])
    assert np.array_equal(dense(splits["validation"]), MULTI_HOT[:3])


def test_unknown_labels_in_columns_arrive(caplog):
    columns = {"image": [encoded(number) for number in range(5)]}
    columns |= {
        "dog": [1, 0, None, -100, 1],
        "cat": [0.0, float("nan"), None, 1.0, 0.0],
        "tv monitor": ["1", "", "?", "0", "0"],
    }
    splits = load(Dataset.from_dict(columns).cast_column("image", Image()), label_columns=NAMES).splits
    expected = [[1, 0, 1], [0, -100, -100], [-100] * 3, [-100, 1, 0], [1, 0, 0]]
    assert np.array_equal(dense(splits["train"]), expected)


def test_names_of_multi_hot_lists_come_from_the_repository(tmp_path, monkeypatch):
    def load_dataset(path, **kwargs):
        return DatasetDict(train=embedded(MULTI_HOT.tolist(), List(Value("float32"))))

    def hf_hub_download(repo_id, filename, *, repo_type, revision):
        if repo_id == "user/without":
            raise EntryNotFoundError("no such file")
        assert (repo_id, filename, repo_type, revision) == ("user/photos", "labels.txt", "dataset", "0123abc")
        (tmp_path / "labels.txt").write_text("\n".join(NAMES))
        return str(tmp_path / "labels.txt")

    monkeypatch.setattr(load_module, "load_dataset", load_dataset)
    monkeypatch.setattr(load_module, "hf_hub_download", hf_hub_download)
    loaded = load("user/photos", dataset_revision="0123abc")
    splits, names = loaded.splits, loaded.label_names
    assert names == NAMES and np.array_equal(dense(splits["train"]), MULTI_HOT)
    with pytest.raises(ValueError, match=r"The labels of user/without .* carry no names"):
        load("user/without")


def test_unknown_and_soft_labels_arrive(caplog):
    labels = [[0.5, None, float("nan")], [-100, 0, 1], None, [1, 1, 1], [0, 0, 0]]
    with caplog.at_level(logging.WARNING):
        splits = load(embedded(labels, List(Value("float32"))), label_names=NAMES).splits
    assert "1 of 5 rows have null for labels" in caplog.text and "row 2 (2.png)" in caplog.text
    expected = [[0.5, -100, -100], [-100, 0, 1], [-100] * 3, [1, 1, 1], [0, 0, 0]]
    assert np.array_equal(dense(splits["train"]), expected)
    assert splits["train"].labels.positives().tolist() == [2, 1, 2]
    names_with_null = embedded([["cat"], None, [], ["dog"], []], List(Value("string")))
    assert np.array_equal(dense(load(names_with_null, label_names=NAMES).splits["train"])[1], [-100] * 3)


def test_a_checkpoints_class_order_wins():
    order = ["tv monitor", "unseen", "cat", "dog"]
    loaded = load(embedded(IDS, List(ClassLabel(names=NAMES))), label_names=order)
    splits, names = loaded.splits, loaded.label_names
    assert names == order
    assert np.array_equal(dense(splits["train"], order)[:, [3, 2, 0, 1]], np.pad(MULTI_HOT, ((0, 0), (0, 1))))


def test_hub_ids_are_loaded_at_their_revision(monkeypatch):
    asked = {}

    def load_dataset(path, **kwargs):
        asked.update(path=path, **kwargs)
        return DatasetDict(
            train=embedded(LABELS, List(Value("string"))).rename_columns({"image": "img", "labels": "tags"})
        )

    monkeypatch.setattr(load_module, "load_dataset", load_dataset)
    loaded = load(
        "user/photos", dataset_revision="0123abc", dataset_config="small", image_column="img", label_column="tags"
    )
    splits, names = loaded.splits, loaded.label_names
    assert asked == {"path": "user/photos", "revision": "0123abc", "name": "small", "cache_dir": None}
    assert names == sorted(NAMES) and splits["train"].images.column_names == ["image"]


def test_scenes_are_a_dataset_like_any_other():
    options = {"num_scenes": {"train": 6, "validation": 4}, "image_size": 32, "seed": 3}
    loaded = load("scenes", scenes=options)
    splits, names = loaded.splits, loaded.label_names
    assert names == list(SCENE_LABELS) and {name: len(split) for name, split in splits.items()} == options["num_scenes"]
    drawn = MultiLabelDataset(SceneSplit(6, image_size=32, seed=3), names, squash(32))
    built = MultiLabelDataset(splits["train"], names, squash(32))
    for index in range(6):
        assert torch.equal(drawn[index]["pixel_values"], built[index]["pixel_values"])
        labels = drawn[index]["labels"].to_dense()
        assert torch.equal(labels, built[index]["labels"].to_dense()) and labels.sum() >= 1
    drawn.set_epoch(1)
    assert not torch.equal(drawn[0]["pixel_values"], built[0]["pixel_values"])


def test_wrong_sources_and_splits_are_refused(image_folder, tmp_path):
    for source in ("./nowhere", tmp_path / "nowhere", image_folder / "labels.txt"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            load(source)
    with pytest.raises(ValueError, match=r"photos has no split 'test', only train, validation"):
        load(image_folder, splits=["train", "test"])
    assert list(load(image_folder, splits=["validation"]).splits) == ["validation"]
    for path in (image_folder / "validation").iterdir():
        path.unlink()
    (image_folder / "validation/metadata.jsonl").touch()
    with pytest.raises(ValueError, match=r"The split 'validation' of .*photos has no rows"):
        load(image_folder)
    with pytest.raises(ValueError, match=r"no column 'tags', only image, labels; name the right one"):
        load(embedded(LABELS, List(Value("string"))), label_column="tags")
    with pytest.raises(ValueError, match="carry no names; give label_names"):
        load(embedded(IDS, List(Value("int64"))))
    with pytest.raises(ValueError, match="must differ, but 'dog' comes twice"):
        load(embedded(LABELS, List(Value("string"))), label_names=["dog", "cat", "dog"])


def test_bad_labels_are_refused_with_file_and_row(image_folder):
    rows = (image_folder / "train/metadata.jsonl").read_text()
    (image_folder / "train/metadata.jsonl").write_text(rows.replace('["cat", "dog"]', '["cat", "dgo"]'))
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 4 \(3.png\): label 'dgo' .*did you mean 'dog'"):
        load(image_folder)
    with pytest.raises(ValueError, match=r"split 'train', row 2 \(2.png\): label id 7 is out of range; use 0 to 2"):
        load(embedded([[0], [], [1, 7], [], []], List(Value("int64"))), label_names=NAMES)
    bad = [[0, 1, 0], [0, 0, 0.5], [0, 1.1, 0], [1, 1, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"split 'train', row 2 \(2.png\): label 'cat' is 1.1, which is neither"):
        load(embedded(bad, List(Value("float64"))), label_names=NAMES)
    with pytest.raises(ValueError, match=r"row 1 \(1.png\): label 'cow'"):
        load(embedded([["cat"], ["cow"], [], [], []], List(Value("string"))), label_names=NAMES)


def test_unlisted_images_are_refused_or_told(image_folder, caplog):
    image(9).save(image_folder / "train" / "extra.png")
    with pytest.raises(ValueError, match=r"holds 1 image \(extra.png\) without a row"):
        load(image_folder)
    with caplog.at_level(logging.WARNING):
        splits = load(image_folder, unlisted_images="skip").splits
    assert len(splits["train"]) == 5 and "extra.png" in caplog.text


@needs_shared
@pytest.mark.parametrize("name", ["voc", "coco"])
def test_photographs_load_with_their_exact_counts(name):
    loaded = load(SHARED / name)
    splits, names = loaded.splits, loaded.label_names
    assert names == (SHARED / name / "labels.txt").read_text().split("\n")[: len(names)]
    for split in ("train", "validation"):
        rows = metadata_rows(SHARED / name / split)
        positives = Counter(label for row in rows for label in set(row["labels"]))
        assert len(splits[split]) == len(rows) > 0
        assert splits[split].labels.positives().tolist() == [positives[label] for label in names]
        assert set(positives) <= set(names)
    batch = next(iter(build_dataloader(MultiLabelDataset(splits["validation"], names, squash(64)), batch_size=8)))
    assert batch["pixel_values"].shape == (8, 3, 64, 64) and batch["labels"].shape == (8, len(names))
