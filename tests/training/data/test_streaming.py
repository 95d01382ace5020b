"""A stream gives what the same rows on disk give, whichever way the labels are written; bad rows end it by name."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.data.batches import MultiLabelCollator, build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.streaming import StreamingMultiLabelDataset

NAMES = ["dog", "cat", "tv monitor"]
LABELS = [["cat"], [], ["dog", "tv monitor"], ["cat", "dog"], ["tv monitor"], ["dog"]]
IDS = [[NAMES.index(name) for name in labels] for labels in LABELS]
MULTI_HOT = [[float(name in labels) for name in NAMES] for labels in LABELS]
PROCESSOR = MultiLabelImageProcessor(size={"height": 8, "width": 8})


def encoded(number):
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def rows(labels, feature):
    columns = {"image": [encoded(number) for number in range(len(labels))], "labels": labels}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "labels": feature}))


def batch_of(dataset):
    return MultiLabelCollator(3)(list(dataset))


@pytest.mark.parametrize(
    ("labels", "feature", "options"),
    [
        (LABELS, List(Value("string")), {}),
        (IDS, List(ClassLabel(names=NAMES)), {"label_names": None}),
        (IDS, List(Value("int64")), {"label_format": "ids"}),
        (MULTI_HOT, List(Value("float32")), {}),
        ([[int(value) for value in row] for row in MULTI_HOT], List(Value("int8")), {"label_format": "multi_hot"}),
        ([";".join(row) for row in LABELS], Value("string"), {"label_separator": ";"}),
    ],
    ids=["names", "class_labels", "ids", "floats", "integers", "text"],
)
def test_a_stream_gives_what_the_rows_give(labels, feature, options):
    disk = rows(labels, feature)
    loaded = load(disk, **{"label_names": NAMES, **options})
    splits, names = loaded.splits, loaded.label_names
    expected = MultiLabelDataset(splits["train"], names, PROCESSOR, margin=0.25)
    expected = MultiLabelCollator(3)([expected[row] for row in range(6)])
    options = {"label_names": NAMES, **options}
    stream = StreamingMultiLabelDataset(disk.to_iterable_dataset(), processor=PROCESSOR, margin=0.25, **options)
    found = batch_of(stream)
    assert stream.label_names == NAMES and np.array_equal(found["labels"], MULTI_HOT)
    assert all(torch.equal(found[key], expected[key]) for key in ("pixel_values", "labels", "index"))


def test_columns_and_unknown_labels():
    table = rows(LABELS, List(Value("string"))).remove_columns("labels")
    for name, column in zip(
        NAMES, ([1, 0, 1, None, 0, 1], [1.0, 0.0, float("nan"), 1.0, -100.0, 0.0], list("10?100")), strict=True
    ):
        table = table.add_column(name, column)
    stream = StreamingMultiLabelDataset(table.to_iterable_dataset(), None, PROCESSOR, label_columns=NAMES)
    expected = [[1, 1, 1], [0, 0, 0], [1, -100, -100], [-100, 1, 1], [0, -100, 0], [1, 0, 0]]
    assert np.array_equal(batch_of(stream)["labels"], expected)
    unknown = rows([[1, None, 0], None], List(Value("float32"))).to_iterable_dataset()
    assert batch_of(StreamingMultiLabelDataset(unknown, NAMES, PROCESSOR))["labels"].tolist() == [
        [1, -100, 0],
        [-100] * 3,
    ]


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([["cat"], ["cow"]], List(Value("string")), r"row 1 of the stream \(1.png\): label 'cow' is not among"),
        ([[0.0, 1, 0], [0, 2, 0]], List(Value("float32")), r"row 1 of the stream \(1.png\): label 'cat' is 2"),
        ([[0], [1]], List(Value("int64")), r"row 0 of the stream \(0.png\): one list of integers .*; set label_format"),
    ],
)
def test_bad_rows_end_the_stream_by_name(labels, feature, message):
    with pytest.raises(ValueError, match=message):
        batch_of(StreamingMultiLabelDataset(rows(labels, feature).to_iterable_dataset(), NAMES, PROCESSOR))


def test_images_that_cannot_be_read_and_missing_names():
    broken = Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": "x.jpg"}], "labels": [["cat"]]},
        features=Features({"image": Image(decode=False), "labels": List(Value("string"))}),
    ).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"row 0 of the stream \(x.jpg\) cannot be read"):
        batch_of(StreamingMultiLabelDataset(broken, NAMES, PROCESSOR))
    with pytest.raises(ValueError, match="name no labels; give label_names"):
        StreamingMultiLabelDataset(broken, None, PROCESSOR)


def test_order_and_place_are_the_sources():
    source = rows(IDS, List(ClassLabel(names=NAMES))).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
    stream = StreamingMultiLabelDataset(source, None, PROCESSOR)

    def sums():
        return [int(sample["pixel_values"].sum()) for sample in stream]

    stream.set_epoch(0)
    first = sums()
    stream.set_epoch(1)
    assert sums() != first and sorted(sums()) == sorted(first)
    plain = StreamingMultiLabelDataset(
        rows(IDS, List(ClassLabel(names=NAMES))).to_iterable_dataset(num_shards=3), None, PROCESSOR
    )
    whole, begun = [int(sample["pixel_values"].sum()) for sample in plain], iter(plain)
    next(begun), next(begun)
    state = plain.state_dict()
    plain.load_state_dict(state)
    assert [int(sample["pixel_values"].sum()) for sample in plain] == whole[2:]


@pytest.mark.slow
def test_workers_share_the_shards_of_a_folder_that_is_streamed(tmp_path):
    source = rows(IDS, List(ClassLabel(names=NAMES)))
    (tmp_path / "data").mkdir()
    for number in range(3):
        source.shard(3, number, contiguous=True).to_parquet(tmp_path / "data" / f"train-0000{number}-of-00003.parquet")
    stream = load_dataset(str(tmp_path), streaming=True, cache_dir=str(tmp_path / "cache"))["train"]
    dataset = StreamingMultiLabelDataset(stream, None, PROCESSOR)
    loader = build_dataloader(dataset, batch_size=2, num_workers=2)
    found = sorted(map(tuple, torch.cat([batch["labels"] for batch in loader]).tolist()))
    assert found == sorted(map(tuple, MULTI_HOT))


def test_a_stream_is_refused_where_rows_are_needed():
    with pytest.raises(ValueError, match="streaming data set has no rows to count and check"):
        load(rows(IDS, List(ClassLabel(names=NAMES))).to_iterable_dataset())


@pytest.mark.parametrize("shards", [1, 2, 3, 6])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_sees_every_row_once(shards, processes):
    source = rows(IDS, List(ClassLabel(names=NAMES))).to_iterable_dataset(num_shards=shards)
    stream = StreamingMultiLabelDataset(source.shuffle(seed=1, buffer_size=4), None, PROCESSOR)
    stream.set_epoch(2)
    whole = sorted(int(sample["pixel_values"].sum()) for sample in stream)
    parts = [[int(sample["pixel_values"].sum()) for sample in stream.for_process(rank, processes)]
             for rank in range(processes)]  # fmt: skip
    assert sorted(value for part in parts for value in part) == whole and len(whole) == 6
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 or shards % processes == 0
