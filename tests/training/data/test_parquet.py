"""Rows of parquet as other programs write it: a few at a time, and alike in all files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List

from training.data.parquet import read_rows
from training.data.shards import open_shards
from training.data.stream_parts import load_streamed
from training.options import DatasetOptions

from ..shards import NAMES, png

IMAGES = [{"bytes": png(number), "path": None} for number in range(4)]


def write(path, labels, images=IMAGES, **options):
    pq.write_table(pa.table({"image": images, "labels": labels}), path, **options)


def rows_and_labels(folder, **more):
    split = load_streamed(DatasetOptions(dataset=str(folder), **more), ["train"], train=True).splits["train"]
    rows = [row.values for shard in range(len(split.shards)) for row in split.shards.read(shard)]
    sparse = split.row_labels(rows, "row {}".format)
    return rows, [sparse.dense(row).tolist() for row in range(len(rows))]


@pytest.mark.parametrize("rows_of_group", [1, 3, 1000])
def test_every_row_from_any_place_on(tmp_path, rows_of_group):
    table = pa.table({"number": list(range(150)), "other": [[1]] * 150})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=rows_of_group)
    for first in (0, 1, 2, 3, 63, 64, 65, 149, 150):
        rows = read_rows(str(tmp_path / "a.parquet"), first, ["number"], None)
        assert list(rows) == [{"number": number} for number in range(first, 150)]


def test_a_large_row_group_is_not_held_as_a_whole(tmp_path):
    """As most writers make them: all rows in one. A page, which for pyarrow is 1,024 rows, is read as a whole."""
    image = bytes(range(256)) * 50
    write(tmp_path / "a.parquet", [["cat"]] * 6000, [image + str(n).encode() for n in range(6000)], compression="none")
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    before, most = pa.total_allocated_bytes(), 0
    for count, row in enumerate(read_rows(str(tmp_path / "a.parquet"), 0, ["image", "labels"], "image")):
        most = max(most, pa.total_allocated_bytes() - before)
        assert row["image"]["bytes"].endswith(str(count).encode())
    assert count == 5999 and most < 6000 * len(image) / 2


def test_images_as_bytes_and_in_structs(tmp_path):
    write(tmp_path / "train-0.parquet", [["cat"]] * 4)
    write(tmp_path / "train-1.parquet", [["dog"]] * 4, [image["bytes"] for image in IMAGES])
    write(tmp_path / "train-2.parquet", [["sea"]] * 2, [None, {"bytes": None, "path": "a.png"}])
    rows, labels = rows_and_labels(tmp_path)
    assert [row["image"] for row in rows] == [*IMAGES, *IMAGES, None, {"bytes": None, "path": "a.png"}]
    assert labels == [[1, 0, 0]] * 4 + [[0, 1, 0]] * 4 + [[0, 0, 1]] * 2
    write(tmp_path / "train-2.parquet", [["sea"]] * 2, [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"train-2.parquet has \[1, 2\] in the column 'image'"):
        rows_and_labels(tmp_path, label_names=NAMES)


def test_shards_without_a_row_or_a_label(tmp_path):
    write(tmp_path / "train-0.parquet", pa.array([[]] * 4))
    write(tmp_path / "train-1.parquet", pa.array([], pa.list_(pa.string())), pa.array([], pa.binary()))
    write(tmp_path / "train-2.parquet", [["cat"], [], ["dog", "cat"], None])
    rows, labels = rows_and_labels(tmp_path)
    assert len(rows) == 8 and labels == [[0, 0]] * 4 + [[1, 0], [0, 0], [1, 1], [-100, -100]]


def test_a_column_of_integers_is_one_of_floats_where_a_shard_has_blanks(tmp_path):
    for shard, values in enumerate(([1, 0], [None, 1.0])):
        table = pa.table({"image": IMAGES[:2], "cat": values, "dog": [0, 1]})
        pq.write_table(table, tmp_path / f"train-{shard}.parquet")
    labels = rows_and_labels(tmp_path, label_columns=["cat", "dog"])[1]
    assert labels == [[1, 0], [0, 1], [-100, 0], [1, 1]]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"labels": [[0]] * 4},
            r"train-1.*'int64'.* but .*train-0.*'string'.*write all shards alike",
        ),
        ({"tags": [["cat"]] * 4}, "train-1.parquet has no column 'labels', only image, tags"),
    ],
)
def test_other_columns_in_another_shard(tmp_path, other, message):
    write(tmp_path / "train-0.parquet", [["cat"]] * 4)
    pq.write_table(pa.table({"image": IMAGES, **other}), tmp_path / "train-1.parquet")
    with pytest.raises(ValueError, match=message):
        open_shards(DatasetOptions(dataset=str(tmp_path)))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_names_in_another_order_in_another_file(tmp_path, split):
    """Whose numbers would mean other labels."""
    for name, names in (("train-0", NAMES), (f"{split}-1", NAMES[::-1])):
        features = Features({"image": Image(), "labels": List(ClassLabel(names=names))})
        rows = {"image": IMAGES, "labels": [[0]] * 4}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="write all shards alike"):
        open_shards(DatasetOptions(dataset=str(tmp_path)))


def test_damage_is_named(tmp_path):
    write(tmp_path / "train-0.parquet", [["cat"]] * 4, row_group_size=2)
    data = bytearray((tmp_path / "train-0.parquet").read_bytes())
    data[100:300] = bytes(200)
    (tmp_path / "train-0.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"train-0.parquet cannot be read.*fetch or write it again"):
        rows_and_labels(tmp_path, label_names=NAMES)
