import csv

import pytest

from training.publish.selected_tags import write_selected_tags

NAMES = ["dog", 'a "cat", big', "tv_monitor"]


def read(path):
    # As the taggers' own readers do: by column name, categories as numbers.
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_in_class_order_with_counts(tmp_path):
    write_selected_tags(tmp_path, NAMES, {"tv_monitor": 7, "dog": 3})
    rows = read(tmp_path / "selected_tags.csv")
    assert (tmp_path / "selected_tags.csv").read_text().startswith("tag_id,name,category,count\n")
    assert [row["name"] for row in rows] == NAMES
    assert [int(row["tag_id"]) for row in rows] == [0, 1, 2]
    assert {row["category"] for row in rows} == {"0"}
    assert [int(row["count"]) for row in rows] == [3, 0, 7]


def test_counts_in_class_order_or_none(tmp_path):
    write_selected_tags(tmp_path / "a.csv", NAMES, [1, 2, 3])
    assert [row["count"] for row in read(tmp_path / "a.csv")] == ["1", "2", "3"]
    write_selected_tags(tmp_path / "a.csv", NAMES)
    assert [row["count"] for row in read(tmp_path / "a.csv")] == ["0", "0", "0"]
    with pytest.raises(ValueError, match="2 counts for 3 labels"):
        write_selected_tags(tmp_path / "a.csv", NAMES, [1, 2])
