"""Shards: every image's bytes, in order; a folder that is complete or not there."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image
from PIL import Image as Picture

import training.prepare.write as writing
from training.data.rows import Split
from training.data.sparse_labels import SparseLabels
from training.prepare.write import write_dataset

NAMES = ["cat", "dog"]


def rows(count, folder=None):
    images = [{"bytes": bytes([row]) * 100, "path": f"{row}.jpg"} for row in range(count)]
    if folder is not None:
        for row, image in enumerate(images):
            (folder / image["path"]).write_bytes(image["bytes"])
            images[row] = {"bytes": None, "path": str(folder / image["path"])}
    images = Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    return Split(images, SparseLabels.from_arrow(pa.array(labels_of(count)), NAMES, label_format="ids"))


def labels_of(count):
    return [None if row == 1 else [row % 2] * (row > 2) for row in range(count)]


@pytest.mark.parametrize("stored", ["bytes", "files"])
def test_shards_hold_every_image_in_order(tmp_path, stored):
    split = rows(10, tmp_path if stored == "files" else None)
    write_dataset({"train": split, "test": rows(2)}, NAMES, tmp_path / "out", max_shard_bytes=400)
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert names == ["test-00000-of-00001.parquet", *(f"train-0000{number}-of-00003.parquet" for number in range(3))]
    tables = [pq.read_table(tmp_path / "out" / "data" / name).to_pylist() for name in names[1:]]
    read = [row for table in tables for row in table]
    assert [row["image"] for row in read] == [{"bytes": bytes([n]) * 100, "path": f"{n}.jpg"} for n in range(10)]
    assert [row["labels"] for row in read] == labels_of(10) and read[1]["labels"] is None
    assert (tmp_path / "out" / "labels.txt").read_text() == "cat\ndog\n"


def test_rows_are_grouped_so_that_one_can_be_read_alone(tmp_path):
    write_dataset({"train": rows(230)}, NAMES, tmp_path / "out")
    assert pq.ParquetFile(tmp_path / "out/data/train-00000-of-00001.parquet").num_row_groups == 3


def test_files_that_are_no_images_are_counted(tmp_path, capsys):
    split = rows(5, tmp_path)
    Picture.new("RGB", (3, 2)).save(tmp_path / "1.jpg")
    Picture.new("L", (3, 2)).save(tmp_path / "4.jpg", "PNG")
    (tmp_path / "2.jpg").write_bytes(b"")
    write_dataset({"train": split.select([1, 4])}, NAMES, tmp_path / "images")
    assert "no image" not in capsys.readouterr().err
    write_dataset({"train": split}, NAMES, tmp_path / "out")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("warning: 3 of 5 files are no image: ")
    assert "0.jpg is in no image format" in said and f"hsvlt check {tmp_path / 'out'} lists them" in said


def test_nothing_is_left_of_a_write_that_fails(tmp_path, monkeypatch):
    split = rows(10, tmp_path)
    calls = []

    def write_shard(shard, path, *_):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        assert not (tmp_path / "out").exists()
        path.write_bytes(b"shard")
        return []

    monkeypatch.setattr(writing, "_write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        write_dataset({"train": split}, NAMES, tmp_path / "out", max_shard_bytes=400)
    assert len(calls) == 2 and not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a\\nb' is empty, or has blanks around it or a line break"):
        write_dataset({"train": rows(2)}, ["cat", "a\nb"], tmp_path / "out")
    with pytest.raises(ValueError, match="split 'test' has no images left"):
        write_dataset({"train": rows(2), "test": rows(0)}, NAMES, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists: delete it"):
        write_dataset({"train": rows(2)}, NAMES, tmp_path)
