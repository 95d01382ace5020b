"""Image folders: read line by line, held against the images, and refused with file and line."""

import json
import logging

import pytest
from PIL import Image

from training.data.image_folder import read_image_folders
from training.data.label_name_files import read_label_names

ROWS = [
    {"file_name": "a.jpg", "labels": ["cat"], "boxes": [[1, 2, 3, 4]]},
    {"file_name": "deep/b.png", "labels": []},
    {"file_name": "c.JPG", "labels": ["dog", "cat"]},
]


def write_split(folder, rows=ROWS, images=("a.jpg", "deep/b.png", "c.JPG"), end="\n"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")


@pytest.mark.parametrize("end", ["\n", "", " \n", "  ", "\n\n  \n"])
def test_rows_come_in_order_whatever_the_file_ends_with(tmp_path, end):
    write_split(tmp_path / "train", end=end)
    table = read_image_folders(tmp_path)
    splits, words = table.splits, table.row_names
    assert [row["labels"] for row in splits["train"]] == [["cat"], [], ["dog", "cat"]]
    assert splits["train"][1]["image"] == {"bytes": None, "path": str(tmp_path / "train" / "deep/b.png")}
    assert words["train"](2) == f"{tmp_path / 'train' / 'metadata.jsonl'}, line 3 (c.JPG)"


def test_byte_order_mark_blank_lines_and_hidden_files_are_no_rows(tmp_path):
    write_split(tmp_path, rows=["\ufeff" + json.dumps(ROWS[0]), "", json.dumps(ROWS[1]) + "  ", json.dumps(ROWS[2])])
    (tmp_path / "._a.jpg").write_bytes(b"macOS leaves these")
    (tmp_path / "notes.txt").write_text("no image")
    table = read_image_folders(tmp_path)
    splits, words = table.splits, table.row_names
    assert list(splits) == ["train"] and len(splits["train"]) == 3
    assert ", line 4 " in words["train"](2)


def test_usual_split_names_are_known_and_may_not_meet(tmp_path):
    for name in ("train", "val", "hidden"):
        write_split(tmp_path / name)
    assert set(read_image_folders(tmp_path).splits) == {"train", "validation", "hidden"}
    write_split(tmp_path / "dev")
    with pytest.raises(ValueError, match=r"two metadata.jsonl for the split 'validation'"):
        read_image_folders(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], '{"file_name": "c.JPG", "labels": ["dog"'], r"line 2 is not valid JSON"),
        ([ROWS[0], "[1]"], r"line 2 must be an object with file_name and labels"),
        ([ROWS[0], {"labels": ["cat"]}], r"line 2 must be an object with file_name and labels"),
        ([{"file_name": "a.jpg", "tags": ["cat"]}], r"line 1 must be an object with file_name and labels"),
        ([ROWS[0], {"file_name": "c.JPG", "labels": "dog"}], r"line 2 \(c.JPG\): labels is 'dog', but must be a list"),
        ([ROWS[0], ROWS[2], ROWS[0]], r"line 3: 'a.jpg' has a row already on line 1; keep one"),
        ([*ROWS, {"file_name": "gone.jpg", "labels": []}], r"names 1 image \(gone.jpg\) that .* does not hold"),
        ([*ROWS, {"file_name": "../../secret.jpg", "labels": []}], r"names 1 image \(../../secret.jpg\)"),
        (ROWS[:1], r"holds 2 images \(c.JPG, deep/b.png\) without a row in metadata.jsonl"),
        (
            [*ROWS[:2], {"file_name": "c.JPG", "labels": [1]}],
            r"line 3 \(c.JPG\): its labels are numbers, but those .* names",
        ),
        ([ROWS[0], {"file_name": "c.JPG", "labels": ["dog", 1]}], r"line 2 \(c.JPG\): .* only names or only numbers"),
        ([ROWS[0], {"file_name": "c.JPG", "labels": [{"id": 1}]}], r"line 2 \(c.JPG\): .* only names or only numbers"),
        ([ROWS[0], {**ROWS[0], "file_name": "./a.jpg"}], r"line 2: 'a.jpg' has a row already on line 1"),
    ],
)
def test_bad_rows_are_refused_with_file_and_line(tmp_path, rows, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    root = tmp_path / "a {brace}"
    write_split(root / "train", rows=rows)
    with pytest.raises(ValueError, match=message) as refusal:
        read_image_folders(root)
    assert str(root / "train") in str(refusal.value) and "\n" not in str(refusal.value)


def test_splits_may_share_a_folder_of_images(tmp_path):
    write_split(tmp_path / "images", rows=[], images=["a.jpg", "b.jpg"])
    (tmp_path / "images" / "metadata.jsonl").unlink()
    for split, name in (("train", "a.jpg"), ("test", "b.jpg")):
        write_split(tmp_path / split, rows=[{"file_name": f"../images/{name}", "labels": []}], images=[])
    splits = read_image_folders(tmp_path).splits
    assert {name: [row["image"]["path"][-5:] for row in split] for name, split in splits.items()} == {
        "train": ["a.jpg"],
        "test": ["b.jpg"],
    }


def test_mismatches_pass_when_asked_and_are_told(tmp_path, caplog):
    names = [f"{number}.jpg" for number in range(7)]
    rows = [{"file_name": name, "labels": []} for name in ("gone.jpg", "0.jpg")]
    write_split(tmp_path / "train", rows=rows, images=names)
    with caplog.at_level(logging.WARNING):
        table = read_image_folders(tmp_path, unlisted_images="skip", missing_images="skip")
    splits, words = table.splits, table.row_names
    assert [row["image"]["path"][-5:] for row in splits["train"]] == ["0.jpg"]
    assert "line 2 (0.jpg)" in words["train"](0)
    assert "6 images (1.jpg, 2.jpg, 3.jpg, 4.jpg, 5.jpg, ...)" in caplog.text and "gone.jpg" in caplog.text
    folder = tmp_path / "train"
    assert table.left_out == [
        ("missing_image", "train", "gone.jpg", f"{folder}/metadata.jsonl: gone.jpg"),
        *(("unlisted_image", "train", name, f"{folder}: {name}") for name in names[1:]),
    ]
    with pytest.raises(ValueError, match="unlisted_images='drop' must be"):
        read_image_folders(tmp_path, unlisted_images="drop")


def test_labels_txt_gives_the_class_order(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"\xef\xbb\xbfdog \r\ntv monitor\t\ncat\n\n \n")
    assert read_label_names(path) == ["dog", "tv monitor", "cat"]
    path.write_text("dog\ncat")
    assert read_label_names(path) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("text", "message"),
    [(" \n", "is empty"), ("dog\n\ncat\n", "line 2 is empty"), ("dog\ncat\ndog", "line 3: 'dog' .* line 1")],
)
def test_bad_labels_txt_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_label_names(tmp_path / "labels.txt")


def test_names_of_a_taggers_vocabulary(tmp_path):
    path = tmp_path / "selected_tags.csv"
    path.write_text('tag_id,name,category,count\n9,general,9,807\n1,1girl,0,4\n2,"a, b",0,3\n', encoding="utf-8-sig")
    assert read_label_names(path) == ["general", "1girl", "a, b"]
    for content, message in (
        ("tag_id,tag\n1,cat\n", "line 1 has no column 'name'"),
        ("tag_id,name\n1,cat\n2,cat\n", "line 3: 'cat' is listed before on line 2"),
        ("tag_id,name\n1,\n", "line 2 is empty"),
        ('tag_id,name\n1,"cat"s"\n', "line 2 is not valid CSV"),
        ("tag_id,name\n", "is empty; write one label name a line"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_label_names(path)
