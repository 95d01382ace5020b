"""Every format gives the same images, byte for byte, and the same labels; what is malformed is refused by file and
line, and then nothing is left behind."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Features, Image, List, Value, load_dataset

from training.data.load import load
from training.prepare.__main__ import main
from training.prepare.reading import usual_name

from ..data.test_dataset import SHARED, metadata_rows, needs_shared
from .formats import (
    IMAGES,
    LABELS,
    MULTI_HOT,
    NAMES,
    write,
    write_coco,
    write_csv,
    write_image_folder,
    write_nuswide,
    write_parquet,
    write_selected_tags,
    write_voc,
)


def prepare(*arguments):
    return main([str(argument) for argument in arguments])


def dense(split, names=NAMES):
    assert split.labels.num_labels == len(names)
    return np.stack([split.labels.dense(row) for row in range(len(split))])


FORMATS = {
    "coco": (write_coco, ["coco", "--split", "train2014=train", "--split", "val2014=test"]),
    "voc_xml": (lambda root: write_voc(root).parent, ["voc"]),
    "voc_lists": (write_voc, ["voc", "--labels_from", "image_sets"]),
    "nuswide": (write_nuswide, ["nuswide"]),
    "nuswide_all_labels": (lambda root: write_nuswide(root, by_split=False), ["nuswide"]),
    "csv_text": (lambda root: write_csv(root, "text"), ["csv"]),
    "csv_columns": (lambda root: write_csv(root, "columns"), ["csv"]),
    "csv_split_column": (lambda root: write_csv(root, "split_column"), ["csv", "--label_separator", ";"]),
    "imagefolder": (write_image_folder, ["imagefolder"]),
    **{
        f"parquet_{layout}": (lambda root, layout=layout: write_parquet(root, layout), ["dataset"])
        for layout in ("names", "ids", "text")
    },
    "parquet_columns": (lambda root: write_parquet(root, "columns"), ["dataset", "--label_columns", *NAMES]),
    "parquet_multi_hot": (
        lambda root: write_parquet(root, "multi_hot"),
        ["dataset", "--label_names", "selected_tags.csv"],
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_dataset(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_selected_tags(tmp_path / "selected_tags.csv")
    build, (kind, *options) = FORMATS[name]
    assert prepare(kind, build(tmp_path / "source"), tmp_path / "made" / "target", *options) == 0
    table = capsys.readouterr().out
    assert [line.split()[:4] for line in table.splitlines() if line.startswith(("train ", "test "))] in (
        [["train", "3", "2", "3"], ["test", "2", "2", "3"]],
        [["test", "2", "2", "3"], ["train", "3", "2", "3"]],
    )
    target = tmp_path / "made" / "target"
    assert os.listdir(tmp_path / "made") == ["target"]
    loaded = load(target)
    splits, names = loaded.splits, loaded.label_names
    assert names == NAMES and set(splits) == set(LABELS)
    # And as anybody loads it, without this package.
    stock = load_dataset(str(target))
    for split in LABELS:
        assert [image["bytes"] for image in splits[split].images["image"]] == IMAGES[split]
        assert np.array_equal(dense(splits[split]), MULTI_HOT[split])
        assert stock[split].features == {"image": Image(), "labels": List(ClassLabel(names=NAMES))}
        assert [[NAMES[label] for label in row] for row in stock[split]["labels"]] == [sorted(r) for r in LABELS[split]]
        assert stock[split][0]["image"].size == (16, 12)


def edit(path, old, new):
    text = path.read_text()
    assert old in text, (path, text)
    path.write_text(text.replace(old, new, 1))


def edited(name, old, new):
    return lambda source: edit(source / name, old, new)


def edited_json(change):
    def apply(source):
        content = json.loads((source / COCO).read_text())
        change(content)
        write(source / COCO, json.dumps(content))

    return apply


COCO, VOC_SET = "annotations/instances_train2014.json", "ImageSets/Main/trainval.txt"
NUS_LABELS = "Groundtruth/TrainTestLabels/Labels_dog_Test.txt"
# format, what is done to it, and what is said: the file, the line or entry, and what is wrong
MALFORMED = [
    ("coco", edited(COCO, "{", "{,"), r"instances_train2014.json is not valid JSON \(.*line 1 column 2"),
    ("coco", lambda s: write(s / COCO, "[]"), r"instances_train2014.json must hold an object with images"),
    ("coco", edited_json(lambda c: c.pop("categories")), r"2014.json has no list 'categories'"),
    (
        "coco",
        edited_json(lambda c: c["images"][1].update(file_name=7)),
        r"instances_train2014.json, images\[1\]: file_name is 7, but must be of type str",
    ),
    (
        "coco",
        edited_json(lambda c: c["images"][1].update(file_name="../../x.jpg")),
        r"images\[1\]: file_name '../../x.jpg' leads out of the folder",
    ),
    (
        "coco",
        edited_json(lambda c: c["images"].append(c["images"][0])),
        r"2014.json, images\[3\]: the id 500 is that of .*images\[0\] as well",
    ),
    (
        "coco",
        edited_json(lambda c: c["images"].append({**c["images"][0], "id": 9})),
        r"2014.json, images\[3\]: '.*COCO_train2014_000000000000.jpg' has a row already on .*images\[0\]",
    ),
    (
        "coco",
        edited_json(lambda c: c["annotations"][2].update(category_id=5)),
        r"2014.json, annotations\[2\]: category_id 5 is no category",
    ),
    (
        "coco",
        edited_json(lambda c: c["annotations"][2].update(image_id=5)),
        r"2014.json, annotations\[2\]: image_id 5 is not among the images",
    ),
    (
        "coco",
        edited_json(lambda c: c["annotations"].append(c["annotations"][0])),
        r"annotations\[5\]: the id \d is that of another annotation",
    ),
    (
        "coco",
        edited_json(lambda c: c["categories"].append({"id": 1, "name": "dog"})),
        r"categories\[3\]: the category 1 is 'cat' as well",
    ),
    (
        "coco",
        edited_json(lambda c: c["categories"][0].update(name="tv")),
        r"instances_val2014.json has other categories than .*train2014.json",
    ),
    (
        "coco",
        lambda s: (s / "train2014/COCO_train2014_000000000001.jpg").unlink(),
        r"1 image \(.*train2014.json, images\[1\]: .*000000000001.jpg\) that are not there",
    ),
    ("coco", lambda s: (s / "annotations").rename(s / "gone"), r"source has neither annotations/instances"),
    ("voc_lists", edited(VOC_SET, "005001", "005001 1"), r"trainval.txt, line 2 is '005001 1', but must"),
    ("voc_lists", edited(VOC_SET, "005001", "005000"), r"trainval.txt, line 2: 005000 is listed before on"),
    (
        "voc_lists",
        edited("ImageSets/Main/dog_trainval.txt", "005001  0", "005001  2"),
        r"dog_trainval.txt, line 2 is '005001 2', but must be an image's id and 1, 0 or -1",
    ),
    (
        "voc_lists",
        edited("ImageSets/Main/dog_trainval.txt", "005001", "005009"),
        r"dog_trainval.txt, line 2: 005009 is not listed in trainval.txt",
    ),
    (
        "voc_lists",
        edited("ImageSets/Main/dog_trainval.txt", "005001", "005000"),
        r"dog_trainval.txt, line 2: 005000 is listed before",
    ),
    (
        "voc_lists",
        edited("ImageSets/Main/dog_trainval.txt", "005001  0\n", ""),
        r"dog_trainval.txt has no line for 005001",
    ),
    (
        "voc_lists",
        lambda s: (s / "JPEGImages/005001.jpg").unlink(),
        r"1 image \(.*trainval.txt, line 2: .*JPEGImages/005001.jpg\) that are not there",
    ),
    (
        "voc_xml",
        edited("VOC2007/Annotations/004000.xml", "<name>cat", "<name>cow"),
        r"004000.xml, line 9: label 'cow' is not among the 3 label names",
    ),
    (
        "voc_xml",
        edited("VOC2007/Annotations/004000.xml", "</annotation>", "</annotations>"),
        r"004000.xml, line 16 is not well-formed XML",
    ),
    (
        "voc_xml",
        edited("VOC2007/Annotations/004000.xml", "<name>cat</name>", ""),
        r"004000.xml, line 9: the object has no name",
    ),
    (
        "voc_xml",
        edited("VOC2007/Annotations/004000.xml", "<difficult>0", "<difficult>yes"),
        r"004000.xml, line 2: difficult is 'yes', but must be 0 or 1",
    ),
    (
        "voc_xml",
        lambda s: edit(
            s / "VOC2007/Annotations/004000.xml",
            "<annotation>",
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>',
        ),
        r"004000.xml, line 1 has a document type, which is refused",
    ),
    ("voc_xml", lambda s: (s / "VOC2007/Annotations/004000.xml").unlink(), r"004000.xml does not exist; add it"),
    ("nuswide", edited(NUS_LABELS, "1", "x"), r"Labels_dog_Test.txt, line 2 is 'x', but must be 0 or 1"),
    ("nuswide", edited(NUS_LABELS, "1", "1\n0"), r"Labels_dog_Test.txt has 3 lines for the 2 images of"),
    ("nuswide", lambda s: (s / NUS_LABELS).unlink(), r"Labels_dog_Test.txt does not exist"),
    (
        "nuswide",
        edited("ImageList/TestImagelist.txt", "0001_41", "0001_40"),
        r"TestImagelist.txt, line 2: actor/0001_40.jpg is listed before on line 1",
    ),
    (
        "nuswide",
        edited("ImageList/TestImagelist.txt", "0001_41.jpg", "..\\..\\x.jpg"),
        r"TestImagelist.txt, line 2 is .* but must be an image's file name",
    ),
    (
        "nuswide",
        edited("ConceptsList/Concepts81.txt", "dog", "cat"),
        r"Concepts81.txt, line 2: 'cat' is listed before on line 1",
    ),
    (
        "nuswide",
        lambda s: (s / "Flickr/actor/0001_41.jpg").unlink(),
        r"1 image \(.*TestImagelist.txt, line 2: .*0001_41.jpg\) that are not there",
    ),
    (
        "nuswide_all_labels",
        edited("ImageList/TestImagelist.txt", "0001_41", "0001_49"),
        r"TestImagelist.txt, line 2: actor/0001_49.jpg is not in Imagelist.txt",
    ),
    ("csv_text", edited("test.csv", '"tvm', '"t"vm'), r"test.csv, line 2 is not valid CSV"),
    ("csv_text", edited("test.csv", '"tvmonitor , cat"', "a,b"), r"test.csv, line 2 has 3 cells for 2 columns"),
    ("csv_text", edited("test.csv", " , cat", " ,, cat"), r"test.csv, line 2 \(test/0.jpg\): .* an empty label"),
    (
        "csv_text",
        edited("test.csv", "cat", "catt"),
        r"test.csv, line 2 \(test/0.jpg\): label 'catt' is in no row of train.*did you mean 'cat'",
    ),
    ("csv_text", edited("test.csv", "test/1", "test/0"), r"test.csv, line 3: 'test/0.jpg' has a row already on"),
    ("csv_text", edited("test.csv", "file_name", "file"), r"test.csv, line 1 has no column"),
    ("csv_text", lambda s: (s / "test/1.jpg").unlink(), r"test.csv names 1 image \(line 3: test/1.jpg\)"),
    ("csv_text", lambda s: write(s / "test/9.jpg", b""), r"source holds 1 image \(test/9.jpg\) without a row"),
    (
        "csv_columns",
        edited("test.csv", "0.jpg,1", "0.jpg,yes"),
        r"test.csv, line 2 \(test/0.jpg\): column 'cat' holds 'yes', but must hold 1",
    ),
    (
        "csv_columns",
        edited("test.csv", "0.jpg,1", "0.jpg,-1"),
        r"test.csv, line 2 \(test/0.jpg\): label 'cat' is -1, which is neither",
    ),
    ("csv_columns", edited("test.csv", "dog", "cat"), r"test.csv, line 1: the header has 'cat' twice"),
    ("csv_split_column", edited("all.csv", "train,", ","), r"all.csv, line 2 .*names no split"),
    ("csv_split_column", edited("all.csv", "train/0.jpg", ""), r"all.csv, line 2 names no image"),
    (
        "imagefolder",
        edited("train/metadata.jsonl", '["cat"]', '["cow"]'),
        r"metadata.jsonl, line 1 \(0.jpg\): label 'cow' is not among",
    ),
    (
        "imagefolder",
        edited("train/metadata.jsonl", '"1.jpg"', '"0.jpg"'),
        r"metadata.jsonl, line 2: '0.jpg' has a row already on line 1",
    ),
    ("imagefolder", edited("train/metadata.jsonl", "]}", "]"), r"metadata.jsonl, line 1 is not valid JSON"),
    ("imagefolder", lambda s: (s / "train/1.jpg").unlink(), r"metadata.jsonl names 1 image \(1.jpg\)"),
    (
        "parquet_multi_hot",
        lambda s: edit(s.parent / "selected_tags.csv", "dog", "cat"),
        r"selected_tags.csv, line 3: 'cat' is listed before on line 2",
    ),
    (
        "parquet_multi_hot",
        lambda s: edit(s.parent / "selected_tags.csv", ",name,", ",tag,"),
        r"selected_tags.csv, line 1 has no column 'name'",
    ),
    (
        "parquet_multi_hot",
        lambda s: edit(s.parent / "selected_tags.csv", "102,tvmonitor,0,7\n", ""),
        r"split '\w+', row 0: lists of 3 zeros and ones look like multi-hot, but there are 2 labels",
    ),
]


MALFORMED += [
    ("voc_xml", edited(f"VOC2007/{VOC_SET}", "005001", "005000"), r"trainval.txt, line 2: 005000 is listed"),
    (
        "voc_xml",
        lambda s: (s / "VOC2007/JPEGImages/005001.jpg").unlink(),
        r"1 image \(.*trainval.txt, line 2: .*JPEGImages/005001.jpg\) that are not there",
    ),
    ("voc_lists", lambda s: (s / "ImageSets/Main/dog_test.txt").unlink(), r"dog_test.txt does not exist"),
    (
        "nuswide_all_labels",
        edited("Groundtruth/AllLabels/Labels_dog.txt", "1", "x"),
        r"Labels_dog.txt, line \d is 'x', but must be 0 or 1",
    ),
    ("csv_columns", edited("test.csv", "test/1", "test/0"), r"test.csv, line 3: 'test/0.jpg' has a row"),
    ("csv_columns", lambda s: (s / "test/1.jpg").unlink(), r"test.csv names 1 image \(line 3: test/1.jpg\)"),
    (
        "csv_columns",
        lambda s: write(s / "labels.txt", "cat\ncow\ntvmonitor\n"),
        r"'cow' is not among both the label columns and the label names",
    ),
    ("csv_split_column", edited("all.csv", "train/1", "train/0"), r"all.csv, line 3: 'train/0.jpg' has a"),
    ("csv_split_column", lambda s: (s / "train/1.jpg").unlink(), r"all.csv names 1 image \(line 3: train/1.jpg\)"),
    (
        "parquet_names",
        lambda s: write(s / "data/test-00000-of-00001.parquet", b"PAR1 and then nothing"),
        r"test-00000-of-00001.parquet is not a whole parquet file",
    ),
]


@pytest.mark.parametrize(("name", "harm", "message"), MALFORMED)
def test_what_is_malformed_is_refused_with_file_and_line(name, harm, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_selected_tags(tmp_path / "selected_tags.csv")
    build, (kind, *options) = FORMATS[name]
    source = build(tmp_path / "source")
    harm(source if source.is_dir() else source.parent)
    assert prepare(kind, source, tmp_path / "made" / "target", *options) == 2
    error = capsys.readouterr().err
    assert [line for line in error.splitlines() if line.startswith("error: ")], error
    assert not (tmp_path / "made").exists()
    assert re.search(message, error), error


@pytest.mark.parametrize("missing", [None, {"bytes": None, "path": None}])
def test_missing_images_of_parquet_name_their_row(missing, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    images = [{"bytes": IMAGES["train"][0], "path": "a.jpg"}, missing]
    features = Features({"image": Image(decode=False), "labels": List(Value("string"))})
    # As others may have written it: `datasets` itself would not.
    rows = pa.Table.from_pydict({"image": images, "labels": [["cat"], ["dog"]]}, schema=features.arrow_schema)
    pq.write_table(rows, tmp_path / "source" / "train-00000-of-00001.parquet")
    command = ["dataset", tmp_path / "source", tmp_path / "target"]
    assert prepare(*command) == 2
    assert "The split 'train' of" in (error := capsys.readouterr().err) and "1 image (row 1)" in error
    assert prepare(*command, "--missing_images", "skip") == 0
    splits = load(tmp_path / "target").splits
    assert [image["bytes"] for image in splits["train"].images["image"]] == IMAGES["train"][:1]


def test_unknown_labels_of_parquet_name_their_row(tmp_path, capsys):
    for layout, options, message in (
        ("names", ["--label_names", "labels.txt"], "row 2: label 'dog' is not among the 2 label names"),
        ("text", ["--label_names", "labels.txt"], "row 2: label 'dog' is not among the 2 label names"),
        ("columns", ["--label_columns", "cat", "cow"], "no column 'cow', only image, cat, dog, tvmonitor"),
    ):
        source = write_parquet(tmp_path / layout, layout)
        write(tmp_path / "labels.txt", "cat\ntvmonitor\n")
        options = [tmp_path / option if option.endswith(".txt") else option for option in options]
        assert prepare("dataset", source, tmp_path / "target", *options) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("labels_from", ["annotations", "image_sets"])
@pytest.mark.parametrize("difficult", ["unknown", "negative"])
def test_difficult_objects_are_unknown_or_negative(labels_from, difficult, tmp_path, capsys):
    options = ["--difficult", difficult, "--labels_from", labels_from]
    assert prepare("voc", write_voc(tmp_path / "source"), tmp_path / "target", *options) == 0
    loaded = load(tmp_path / "target")
    splits, names = loaded.splits, loaded.label_names
    expected = MULTI_HOT["train"].copy()
    # A cat beside the difficult one stands in image 0, so it is present; the only dog of image 1 is difficult.
    expected[1, 1] = -100 if difficult == "unknown" else 0
    assert names == NAMES and np.array_equal(dense(splits["train"]), expected)
    assert np.array_equal(dense(splits["test"]), MULTI_HOT["test"])
    kind = Value("float32") if difficult == "unknown" else ClassLabel(names=NAMES)
    assert load_dataset(str(tmp_path / "target"))["train"].features["labels"] == List(kind)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:5] == ["train", "3", "2", "3", "1" if difficult == "unknown" else "0"]


def test_counts_stand_beside_the_published_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("training.prepare.coco.PUBLISHED", {"train2014": (3, 2), "val2014": (7, 6)})
    source = write_coco(tmp_path / "source")
    assert prepare("coco", source, tmp_path / "kept") == 0
    printed = capsys.readouterr().out
    assert "published for COCO-2014" in printed and "3 images, 2 with a label: the same" in printed
    assert "7 images, 6 with a label: NOT the same" in printed and "\nvalidation  " in printed
    assert prepare("coco", source, tmp_path / "dropped", "--without_labels", "drop", "--split", "train2014=train") == 0
    printed = capsys.readouterr().out
    assert "Left out of train: 1 image without a label." in printed and "2 with a label: the same" in printed
    splits = load(tmp_path / "dropped").splits
    assert set(splits) == {"train"} and np.array_equal(dense(splits["train"]), MULTI_HOT["train"][[0, 2]])


def test_the_published_counts_are_those_of_the_papers():
    from training.prepare import coco, nuswide, voc

    assert coco.PUBLISHED == {"train2014": (82783, 82081), "val2014": (40504, 40137)}
    assert voc.PUBLISHED == {"VOC2007": {"trainval": (5011, None), "test": (4952, None)}}
    assert nuswide.PUBLISHED == {"Train": (161789, 125449), "Test": (107859, 83898)}


def test_missing_images_can_be_left_out_and_are_told(tmp_path, caplog):
    source = write_nuswide(tmp_path / "source")
    (source / "Flickr/actor/0001_50.jpg").unlink()
    assert prepare("nuswide", source, tmp_path / "target", "--missing_images", "skip") == 0
    assert "Left out" in caplog.text and "TrainImagelist.txt, line 1" in caplog.text
    splits = load(tmp_path / "target").splits
    assert np.array_equal(dense(splits["train"]), MULTI_HOT["train"][1:]) and len(splits["test"]) == 2


@pytest.mark.parametrize(
    ("kind", "build", "extra"),
    [
        ("voc", write_voc, "JPEGImages/9.jpg"),
        ("nuswide", write_nuswide, "Flickr/actor/9.jpg"),
    ],
)
def test_images_that_no_list_names_are_told(kind, build, extra, tmp_path, capsys, caplog):
    source = build(tmp_path / "source")
    write(source / extra, IMAGES["train"][0])
    assert prepare(kind, source, tmp_path / "refused", "--unlisted_images", "error") == 2
    assert f"1 image ({extra.partition('/')[2]}) that nothing labels" in capsys.readouterr().err
    assert prepare(kind, source, tmp_path / "target") == 0 and "that nothing labels" in caplog.text


def test_a_name_that_may_be_two_images_is_refused_with_its_line(tmp_path, capsys):
    source = write_voc(tmp_path / "source")
    write(source / "JPEGImages/005001.png", IMAGES["train"][0])
    assert prepare("voc", source, tmp_path / "target") == 2
    assert "trainval.txt, line 2: '005001' may be 005001.jpg or 005001.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "usual"), [("Train", "train"), ("TEST", "test"), ("Valid_2", "validation"), ("x", "x")]
)
def test_a_split_is_known_in_any_letters(name, usual):
    assert usual_name(name) == usual


def test_unknown_cells_of_a_csv_stay_unknown(tmp_path, capsys):
    source = write_csv(tmp_path / "source", "columns")
    write(
        source / "train.csv",
        "file_name,cat,dog,tvmonitor\ntrain/0.jpg,1,,NaN\ntrain/1.jpg,-100,null,0.0\ntrain/2.jpg,?,true,0\n",
    )
    assert prepare("csv", source, tmp_path / "target") == 0
    loaded = load(tmp_path / "target")
    splits, names = loaded.splits, loaded.label_names
    assert names == NAMES
    assert np.array_equal(dense(splits["train"]), [[1, -100, -100], [-100, -100, 0], [-100, 1, 0]])


def test_splits_are_chosen_and_renamed(tmp_path, capsys):
    source = write_image_folder(tmp_path / "source")
    assert prepare("imagefolder", source, tmp_path / "target", "--split", "test=validation") == 0
    assert set(load(tmp_path / "target").splits) == {"validation"}
    capsys.readouterr()
    assert prepare("imagefolder", source, tmp_path / "other", "--split", "dev=train") == 2
    assert "There is no 'dev', only test, train" in capsys.readouterr().err
    assert prepare("imagefolder", source, tmp_path / "other", "--split", "test=train", "--split", "train=train") == 2
    assert "not the only one that would become 'train'" in capsys.readouterr().err


def test_an_interrupt_is_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.prepare.write._write_shard", interrupted)
    assert main(["csv", str(write_csv(tmp_path / "source", "text")), str(tmp_path / "target")]) == 130
    assert capsys.readouterr().err.endswith("Stopped; nothing is written.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_target_is_refused_untouched(tmp_path, capsys):
    write(tmp_path / "target" / "mine.txt", "mine")
    assert prepare("imagefolder", write_image_folder(tmp_path / "source"), tmp_path / "target") == 2
    assert "target exists: delete it" in capsys.readouterr().err
    assert os.listdir(tmp_path / "target") == ["mine.txt"]


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["voc", "coco"])
def test_photographs_are_prepared_with_their_exact_counts(name, tmp_path):
    source, target = SHARED / name, tmp_path / "target"
    assert prepare("imagefolder", source, target, "--max_shard_mb", 20) == 0
    loaded = load(source)
    before, names = loaded.splits, loaded.label_names
    loaded = load(target)
    after, same = loaded.splits, loaded.label_names
    assert names == same and after.keys() == before.keys() == {"train", "validation"}
    for split in after:
        assert len(after[split]) == len(before[split]) == len(metadata_rows(source / split)) > 0
        assert np.array_equal(dense(before[split], names), dense(after[split], names))
        for row in range(0, len(after[split]), 40):
            assert after[split][row]["image"]["bytes"] == Path(before[split][row]["image"]["path"]).read_bytes()
    if name == "voc":
        assert len(list((target / "data").glob("train-*"))) > 1
