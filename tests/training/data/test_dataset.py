"""From any source to uniform batches: same rows from every format, the processor's very pixels, clear refusals."""

import io
import json
import logging
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image as PILImage

import training.data.dataset as data
import training.data.load as load_module
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.data.batches import MultiLabelCollator, SparseBatch, build_dataloader, normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.leave_out import find_unreadable, leave_out_unreadable
from training.data.load import load
from training.data.scenes import SCENE_LABELS, SceneSplit

NAMES = ["dog", "cat", "tv monitor"]
LABELS = [["cat"], [], ["dog", "tv monitor"], ["cat", "dog"], ["tv monitor"]]
MULTI_HOT = np.array([[name in labels for name in NAMES] for labels in LABELS], dtype=np.float32)
SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the photographs of ../shared/data are not on this machine"
)


def metadata_rows(folder):
    """What lies outside the project may change, so its tests count against the list that is there."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n") if line.strip()]


def image(number, size=(50, 40)):
    return PILImage.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(number):
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


@pytest.fixture
def image_folder(tmp_path):
    """labels.txt, train/ with five images, validation/ with three of them."""
    root = tmp_path / "photos"
    for split, count in (("train", 5), ("validation", 3)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            image(number).save(root / split / f"{number}.png")
        rows = [json.dumps({"file_name": f"{number}.png", "labels": LABELS[number]}) for number in range(count)]
        (root / split / "metadata.jsonl").write_text(" \n".join(rows))
    (root / "labels.txt").write_text("\n".join(NAMES) + "  ")
    return root


def embedded(labels, feature, count=5):
    columns = {"image": [encoded(number) for number in range(count)], "labels": labels[:count]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "labels": feature}))


def dense(split, names=NAMES):
    return np.stack([sample["labels"].to_dense().numpy() for sample in MultiLabelDataset(split, names, squash(8))])


def squash(size, **kwargs):
    return MultiLabelImageProcessor(size={"height": size, "width": size}, **kwargs)


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


IDS = [[NAMES.index(name) for name in labels] for labels in LABELS]


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


def test_one_soft_or_unknown_entry_makes_nothing_dense():
    known, unknown = MULTI_HOT.tolist(), [[1, None, 0], *MULTI_HOT[1:].tolist()]
    source = DatasetDict(train=embedded(unknown, List(Value("float32"))), test=embedded(known, List(Value("float32"))))
    splits = load(source, label_names=NAMES).splits
    assert dense(splits["train"])[0].tolist() == [1, -100, 0] and np.array_equal(dense(splits["test"]), MULTI_HOT)
    assert splits["test"].labels.values.size == MULTI_HOT.sum() and splits["train"].labels.values.size == 7
    assert splits["train"][0]["labels"].is_sparse


def test_ten_thousand_labels_stay_sparse_until_the_device():
    names = [f"label {number}" for number in range(10_000)]
    splits = load(embedded([[9_999, 3], [], None, [5], [5]], List(ClassLabel(names=names)))).splits
    dataset = MultiLabelDataset(splits["train"], names, squash(8))
    samples = [dataset[row] for row in range(4)]
    assert [sample["labels"].is_sparse for sample in samples] == [True, True, False, True]
    assert samples[0]["labels"].values().numel() == 2
    labels = MultiLabelCollator(10_000)(samples)["labels"]
    assert labels.shape == (4, 10_000) and not labels.is_sparse
    assert MultiLabelCollator(10_000, sparse_labels=True)(samples)["labels"].equal(labels)  # one is dense
    del samples[2]
    batch = send_to_device(MultiLabelCollator(10_000, sparse_labels=True)(samples), "cpu")["labels"]
    assert isinstance(batch, SparseBatch) and len(batch) == 3 and len(pickle.dumps(batch)) < 2000
    assert batch.to_dense().equal(labels[[0, 1, 3]])
    assert send_to_device(batch, "meta").to_dense().is_meta  # made dense where it was sent
    with pytest.raises(ValueError, match="10000 labels for the 9999 of the model"):
        MultiLabelCollator(9_999, sparse_labels=True)(samples)
    assert labels[0].nonzero().flatten().tolist() == [3, 9_999] and (labels[2] == -100).all()


def test_labels_are_hidden_in_the_dataset_alone(image_folder):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    hidden = MultiLabelDataset(splits["train"], names, squash(8), partial_labels={"single_positive": True, "seed": 3})
    labels = MultiLabelCollator(3)([hidden[row] for row in range(5)])["labels"].numpy()
    assert np.isin(labels, (1, -100)).all() and (MULTI_HOT[labels == 1] == 1).all()
    assert ((labels == 1).sum(1) == MULTI_HOT.any(1)).all()
    assert np.array_equal(dense(splits["train"]), MULTI_HOT)
    assert hidden.sparse_labels.positives().sum() == 4
    with pytest.raises(ValueError, match="set fresh_scenes to false"):
        MultiLabelDataset(SceneSplit(3), SCENE_LABELS, squash(64), partial_labels={"known_fraction": 0.5})


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
    with pytest.raises(ValueError, match="list 'dog' twice"):
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


@pytest.mark.parametrize(
    "processor",
    [
        squash(32),
        MultiLabelImageProcessor(
            size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 32},
            image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4],
        ),
        squash(32, do_normalize=False),
        squash(32, do_rescale=False, do_normalize=False),
    ],
    ids=["squash", "center_crop", "unit_range", "bytes"],
)  # fmt: skip
def test_evaluation_pixels_are_the_processors_own(image_folder, processor):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    batch = MultiLabelCollator(3)([MultiLabelDataset(splits["train"], names, processor)[index] for index in range(5)])
    assert batch["pixel_values"].dtype == torch.uint8
    expected = processor(images=[image(number) for number in range(5)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalize_pixels(batch["pixel_values"], processor), expected.float(), rtol=0, atol=1e-6)
    normalized = MultiLabelCollator(3, processor)([MultiLabelDataset(splits["train"], names, processor)[2]])
    torch.testing.assert_close(normalized["pixel_values"], expected[2:3].float(), rtol=0, atol=1e-6)


def test_a_margin_leaves_room_for_a_crop_and_loses_nothing(image_folder):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    sample = MultiLabelDataset(splits["train"], names, squash(32), margin=0.125)[1]
    expected = np.asarray(image(1).resize((36, 36), squash(32).resample)).transpose(2, 0, 1)
    assert np.array_equal(sample["pixel_values"], expected)
    cropping = MultiLabelImageProcessor(
        size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 48}
    )
    assert MultiLabelDataset(splits["train"], names, cropping, margin=0.25)[0]["pixel_values"].shape == (3, 40, 60)


def test_large_jpegs_are_decoded_at_reduced_size_in_training_alone(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 255, 1600), np.linspace(0, 255, 1200))
    photo = PILImage.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    photo.save(tmp_path / "photo.jpg", quality=95)
    rows = Dataset.from_dict(
        {"image": [str(tmp_path / "photo.jpg")], "labels": [["cat"]]},
        features=Features({"image": Image(decode=False), "labels": List(Value("string"))}),
    )
    rows = load(rows, label_names=NAMES).splits["train"]
    sizes = []
    exact = MultiLabelDataset(rows, NAMES, squash(64))[0]["pixel_values"].float()
    quick = MultiLabelDataset(rows, NAMES, squash(64), margin=0.125)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PILImage.Image, "resize", _noting(PILImage.Image.resize, sizes))
        drafted = quick[0]["pixel_values"].float()
    assert sizes == [(200, 150)]
    full = torch.from_numpy(np.array(photo.resize((72, 72), squash(64).resample))).permute(2, 0, 1).float()
    assert (drafted - full).abs().mean() < 2
    assert (
        exact - torch.from_numpy(np.array(photo.resize((64, 64), squash(64).resample))).permute(2, 0, 1)
    ).abs().mean() < 2


def _noting(resize, sizes):
    def noted(image, *args, **kwargs):
        sizes.append(image.size)
        return resize(image, *args, **kwargs)

    return noted


def test_the_memory_cache_changes_no_pixel_and_decodes_once(image_folder, monkeypatch):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    plain = MultiLabelDataset(splits["train"], names, squash(24), margin=0.25)
    cached = MultiLabelDataset(splits["train"], names, squash(24), margin=0.25, cache_images="memory", num_workers=2)
    expected = [plain[index]["pixel_values"] for index in range(5)]
    monkeypatch.setattr(data, "load_image", None)  # Nothing may be decoded any more.
    for index in range(5):
        assert torch.equal(cached[index]["pixel_values"], expected[index])
    with pytest.raises(ValueError, match="cannot be cached"):
        MultiLabelDataset(SceneSplit(3), SCENE_LABELS, squash(64), cache_images="memory")
    with pytest.raises(ValueError, match="cache_images='disk'"):
        MultiLabelDataset(splits["train"], names, squash(24), cache_images="disk")


@pytest.fixture
def damaged(image_folder):
    """Row 1 truncated, row 2 no image at all, row 4 gone after loading."""
    loaded = load(image_folder)
    first = image_folder / "train/1.png"
    first.write_bytes(first.read_bytes()[:2000])
    (image_folder / "train/2.png").write_bytes(b"not an image")
    (image_folder / "train/4.png").unlink()
    return loaded


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


@pytest.mark.parametrize("index", [1, 2, 4])
def test_a_image_that_breaks_later_is_named(damaged, index):
    with pytest.raises(ValueError, match=rf"metadata.jsonl, line {index + 1} \({index}.png\) cannot be read: "):
        MultiLabelDataset(damaged.splits["train"], NAMES, squash(8))[index]


def test_the_collator_holds_the_label_contract():
    sample = {"pixel_values": torch.zeros(3, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0.0, 1.0]), "index": 7}
    batch = MultiLabelCollator(2)([sample, sample])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (2, 3, 4, 4), "labels": (2, 2), "index": (2,)
    }  # fmt: skip
    del sample["index"]  # as transformers' Trainer does
    assert set(MultiLabelCollator(2)([sample])) == {"pixel_values", "labels"}
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        MultiLabelCollator(3)([sample])
    with pytest.raises(ValueError, match=r"labels\[1, 0\] is 2"):
        MultiLabelCollator(2)([sample, {**sample, "labels": torch.tensor([2.0, 1.0])}])


def order(loader):
    return torch.cat([batch["index"] for batch in loader]).tolist()


def test_the_order_of_images_depends_on_the_seed_alone():
    dataset = MultiLabelDataset(SceneSplit(20, image_size=16, max_size=16), SCENE_LABELS, squash(16))

    def build(seed, **kwargs):
        return build_dataloader(dataset, batch_size=6, shuffle=True, seed=seed, **kwargs)

    assert order(build(1)) == order(build(1)) == order(build(1, num_workers=2))
    assert sorted(order(build(1))) == list(range(20)) != order(build(1))
    assert order(build(1)) != order(build(2))
    loader = build(1)
    assert order(loader) != order(loader)  # Another order every epoch.
    assert len(build(1)) == 4 and len(build(1, drop_last=True)) == 3
    assert order(build_dataloader(dataset, batch_size=6)) == list(range(20))


def test_accelerate_controls_order_and_epoch():
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    )

    def epochs(first, count, num_workers=0):
        dataset = MultiLabelDataset(SceneSplit(12, image_size=16, max_size=16), SCENE_LABELS, squash(16))
        loader = accelerator.prepare(build_dataloader(dataset, batch_size=4, shuffle=True, num_workers=num_workers))
        seen = []
        for epoch in range(first, first + count):
            loader.set_epoch(epoch)
            dataset.set_epoch(epoch)
            seen.append([(batch["index"].tolist(), batch["pixel_values"].sum().item()) for batch in loader])
        return seen

    three = epochs(0, 3)
    assert three == epochs(0, 3) == epochs(0, 3, num_workers=2)
    assert len({str(epoch) for epoch in three}) == 3
    assert three[2:] == epochs(2, 1)  # A run that resumes at epoch 2 sees what it would have seen.


@pytest.mark.slow
def test_workers_may_be_spawned(image_folder):
    """Where processes do not fork (macOS, Windows, Python from 3.14 on) the dataset travels by pickling."""
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    cached = MultiLabelDataset(splits["train"], names, squash(16), cache_images="memory")
    scenes = MultiLabelDataset(SceneSplit(4, image_size=16, max_size=16), SCENE_LABELS, squash(16))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([cached, scenes]),
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )
    for epoch in (0, 1):
        scenes.set_epoch(epoch)
        expected = [dataset[index]["pixel_values"] for dataset in (cached, scenes) for index in range(len(dataset))]
        assert torch.equal(torch.stack([sample["pixel_values"] for sample in loader]), torch.stack(expected))


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
