"""Tables are found where they are meant, and read row by row; what is malformed is tested in prepare/test_main.py."""

from pathlib import Path

import pytest
from PIL import Image

from training.data.csv_table import find_csv_tables, read_csv_tables
from training.data.formats import recognise


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def table(path, text, **encoding):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, **encoding)
    return path


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["train.csv", "val.csv", "a.jpg"], {"train": "train.csv", "val": "val.csv"}),
        (["train/metadata.csv", "test/metadata.csv"], {"test": "test/metadata.csv", "train": "train/metadata.csv"}),
        (["metadata.csv", "selected_tags.csv"], {"": "metadata.csv"}),
        (["selected_tags.csv"], {}),
        (["train/metadata.jsonl", "statistics.csv"], {}),
        (["data/train-0.parquet", "statistics.csv"], {}),
        (["dataset_dict.json", "statistics.csv"], {}),
    ],
)
def test_tables_are_found_where_they_are_meant(tmp_path, files, found):
    touch(tmp_path, *files)
    assert {name: str(path.relative_to(tmp_path)) for name, path in find_csv_tables(tmp_path).items()} == found


def test_a_file_is_one_table(tmp_path):
    touch(tmp_path, "photos.csv", "photos.tsv", "photos.txt")
    assert find_csv_tables(tmp_path / "photos.csv") == {"": tmp_path / "photos.csv"}
    assert find_csv_tables(tmp_path / "photos.tsv") and not find_csv_tables(tmp_path / "photos.txt")
    assert not find_csv_tables(Path("user/name"))


def test_rows_come_in_order_with_their_lines(tmp_path):
    """A byte order mark, Windows line ends, a line break in a cell, blank lines, tabs, and names with backslashes."""
    for name in ("a.png", "b.png", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    rows = [
        ["note", "filename", "labels"],
        ['"two\nlines"', "b.png", '"cat,dog"'],
        ["", "./a.png", ""],
        ["", "deep\\c.png", " dog "],
    ]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        text = "\n\n".join(delimiter.join(row) for row in rows) + "\n"
        path = table(tmp_path / f"photos.{suffix}", text, encoding="utf-8-sig", newline="\r\n")
        read = read_csv_tables({"": path})
        splits, words = read.splits, read.row_names
        assert (list(splits), read.image_column, read.label_columns) == (["train"], "filename", None)
        assert splits["train"]["filename"] == [str(tmp_path / name) for name in ("b.png", "a.png", "deep/c.png")]
        assert splits["train"]["labels"] == ["cat,dog", "", " dog "]
        assert words["train"](0) == f"{path}, line 4 (b.png)" and words["train"](2).endswith("line 8 (deep/c.png)")


def test_columns_are_the_labels_where_there_is_no_text(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = table(tmp_path / "photos.csv", "split,cat,path,dog,width\nval,1,a.png,0,640\n")
    assert read_csv_tables({"": path}).label_columns == ["cat", "dog", "width"]
    read = read_csv_tables({"": path}, label_columns=["dog", "cat"])
    assert (list(read.splits), read.image_column, read.label_columns) == (["validation"], "path", ["dog", "cat"])
    with pytest.raises(ValueError, match=r"photos.csv, line 1 has no column 'cow', only split, cat, path"):
        read_csv_tables({"": path}, label_columns=["cow"])
    with pytest.raises(ValueError, match="missing_images='ignore' must be 'error' or 'skip'"):
        read_csv_tables({"": path}, missing_images="ignore")


@pytest.mark.parametrize("divider", [";", "\t"])
def test_what_spreadsheets_write_in_place_of_commas_is_read(tmp_path, divider):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = table(tmp_path / "train.csv", divider.join(("file_name", "labels\n")) + divider.join(("a.png", "cat,dog\n")))
    assert read_csv_tables({"train": path}).splits["train"]["labels"] == ["cat,dog"]
    assert recognise(tmp_path).keys() == {"csv"}


def test_splits_are_known_in_any_letters_and_never_merged(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    path = table(tmp_path / "all.csv", "file_name,labels,split\na.png,cat,TRAIN\nb.png,dog,Test\n")
    assert read_csv_tables({"": path}).splits.keys() == {"train", "test"}
    table(path, "file_name,labels,split\na.png,cat,0\nb.png,dog,1\n")
    with pytest.raises(ValueError, match=r"all.csv, line 2 \(a.png\) names '0' for a split; write train"):
        read_csv_tables({"": path})
    for column, one, other in (("is_valid", "False", "True"), ("subset", "Train", "val")):
        for labels in ("labels", "cat"):
            table(path, f"file_name,{labels},{column}\na.png,1,{one}\nb.png,0,{other}\n")
            with pytest.raises(ValueError, match=rf"line 1: the column '{column}' seems to say the split of each row"):
                read_csv_tables({"": path})


def test_two_tables_for_one_split_and_tables_of_other_columns_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    paths = {name: table(tmp_path / f"{name}.csv", "file_name,cat\na.png,1\n") for name in ("val", "dev", "test")}
    with pytest.raises(ValueError, match=r"val.csv is not the only table for its split"):
        read_csv_tables(paths)
    table(paths["test"], "file_name,cat,dog\na.png,1,1\n")
    with pytest.raises(ValueError, match=r"test.csv, line 1: the column 'dog' is not in every table"):
        read_csv_tables({name: paths[name] for name in ("val", "test")})
    table(paths["test"], "file_name,cat\n../../etc/x.png,1\n")
    with pytest.raises(ValueError, match=r"test.csv names 1 image \(line 2: ../../etc/x.png\) that"):
        read_csv_tables({"test": paths["test"]})
    paths["test"].write_bytes(b"file_name,cat\n\xff.png,1\n")
    with pytest.raises(ValueError, match=r"test.csv, line 2 is not UTF-8 text"):
        read_csv_tables({"test": paths["test"]})
