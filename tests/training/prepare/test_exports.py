"""Every export gives the images and labels of the plain layout; what is damaged is refused with file and place."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from training.data.formats import recognise
from training.data.load import load
from training.prepare.__main__ import KINDS, main

from . import exports
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
    write_voc,
)


def write_saved(root):
    features = Features({"image": Image(), "labels": List(Value("string"))})
    images = {split: [{"bytes": content, "path": None} for content in contents] for split, contents in IMAGES.items()}
    rows = {split: {"image": images[split], "labels": LABELS[split]} for split in LABELS}
    splits = {split: Dataset.from_dict(columns, features=features) for split, columns in rows.items()}
    DatasetDict(splits).save_to_disk(root)
    return root


def of(function, *arguments):
    return lambda root: function(root, *arguments)


# kind, what writes it, options of the command by name
EXPORTS = {
    "coco": ("coco", write_coco, ["--split", "train2014=train", "--split", "val2014=test"]),
    "coco_label_studio": ("coco", exports.write_coco_label_studio, []),
    "coco_cvat": ("coco", exports.write_coco_cvat, []),
    "coco_roboflow": ("coco", exports.write_coco_roboflow, []),
    "coco_lvis": ("coco", exports.write_coco_lvis, []),
    "coco_fiftyone": ("coco", exports.write_coco_fiftyone, []),
    **{
        f"label_studio_{form}": ("label_studio", of(exports.write_label_studio, form), [])
        for form in ("json", "min", "csv")
    },
    "voc": ("voc", write_voc, []),
    "voc_roboflow": ("voc", exports.write_voc_roboflow, []),
    "voc_label_studio": ("voc", exports.write_voc_label_studio, []),
    "voc_cvat": ("voc", exports.write_voc_cvat, []),
    "nuswide": ("nuswide", write_nuswide, []),
    "roboflow_csv": ("roboflow_csv", exports.write_roboflow_csv, []),
    "annotations_csv": ("objects", exports.write_annotations_csv, []),
    "open_images": ("objects", exports.write_open_images, []),
    "chestxray14": ("chestxray14", exports.write_chestxray14, []),
    "chexpert": ("chexpert", exports.write_chexpert, []),
    "planet": ("planet", exports.write_planet, []),
    "isic": ("isic", exports.write_isic, []),
    **{
        f"yolo_{layout}": ("yolo", of(exports.write_yolo, layout), [])
        for layout in ("ultralytics", "roboflow", "label_studio", "darknet")
    },
    **{
        f"tags_{layout}": ("tag_files", of(exports.write_tag_files, layout), [])
        for layout in ("kohya", "caption", "lines", "meta_lat")
    },
    "label_folders": ("label_folders", exports.write_label_folders, []),
    **{
        f"webdataset_{layout}": ("webdataset", of(exports.write_webdataset, layout), [])
        for layout in ("json", "txt", "cls")
    },
    **{
        f"parquet_{layout}": ("dataset", of(exports.write_struct_parquet, layout), [])
        for layout in ("struct", "list", "string_view")
    },
    "save_to_disk": ("dataset", write_saved, []),
    "imagefolder": ("imagefolder", write_image_folder, []),
    "root_jsonl": ("imagefolder", of(exports.write_root_metadata, "jsonl"), []),
    "root_csv": ("csv", of(exports.write_root_metadata, "csv"), []),
    "csv_text": ("csv", of(write_csv, "text"), []),
}
WITHOUT_TEST = ("label_studio", "voc_cvat", "yolo_label_studio")  # they know no splits
WITHOUT_UNLABELLED = ("label_folders",)


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("by_name", [False, True], ids=["auto", "by_name"])
@pytest.mark.parametrize("name", EXPORTS)
def test_the_same_images_and_labels_as_from_the_plain_layout(name, by_name, tmp_path, capsys):
    kind, build, options = EXPORTS[name]
    source = build(tmp_path / "source")
    assert run(kind if by_name else "auto", source, tmp_path / "target", *options) == 0, capsys.readouterr().err
    assert by_name or f": {kind}." in capsys.readouterr().out
    loaded = load(tmp_path / "target")
    expected = ["train"] if name.startswith(WITHOUT_TEST) else list(LABELS)
    assert sorted(loaded.splits) == sorted(expected) and sorted(loaded.label_names) == sorted(NAMES)
    order = [loaded.label_names.index(label) for label in NAMES]
    for split in expected:
        rows = loaded.splits[split]
        found = {
            image["bytes"]: rows.labels.dense(row)[order].tolist() for row, image in enumerate(rows.images["image"])
        }
        wanted = dict(zip(IMAGES[split], MULTI_HOT[split].tolist(), strict=True))
        if name in WITHOUT_UNLABELLED:
            wanted = {image: labels for image, labels in wanted.items() if any(labels)}
        assert found == wanted and len(rows) == len(wanted)


def edit(path, old, new):
    data = path.read_bytes()
    old, new = (text if isinstance(text, bytes) else text.encode() for text in (old, new))
    assert old in data, (path, data)
    path.write_bytes(data.replace(old, new, 1))


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


DAMAGED = [
    (
        "coco_cvat",
        lambda s: edit(s / "annotations/instances_test.json", "test-0", b"t\xe9st-0"),
        r"test.json, line 1 is not UTF-8",
    ),
    ("coco_roboflow", lambda s: (s / "test/0_jpg.rf.0a.jpg").unlink(), r"test/_annotations.coco.json, images\[0\]"),
    (
        "coco_fiftyone",
        lambda s: edit_json(s / "train/labels.json", lambda c: c["annotations"][0].update(category_id="none")),
        r"categories\[4\]: the category has no name, but .*annotations\[0\]",
    ),
    (
        "coco_lvis",
        lambda s: edit_json(s / "lvis_v1_train.json", lambda c: c["categories"][0].update(id=5)),
        r"categories\[2\]: the category 5 is 'tvmonitor' as well",
    ),
    ("coco_label_studio", lambda s: truncate(s / "test/result.json"), r"result.json"),
    # What of one split is empty or of no use must not pass for absent.
    *(
        (name, lambda s, file=file: (s / file).write_text(""), rf"{file} is (empty|not valid JSON)")
        for name, file in (
            ("coco_label_studio", "train/result.json"),
            ("coco_fiftyone", "test/labels.json"),
            ("coco_lvis", "lvis_v1_train.json"),
            ("open_images", "oidv7-test-annotations-human-imagelabels.csv"),
            ("chexpert", "test.csv"),
            ("planet", "test_v2.csv"),
            ("isic", "ISIC_test_GroundTruth.csv"),
        )
    ),
    ("planet", lambda s: write(s / "test_v2.csv", "image_name,tags"), r"test_v2.csv has a header and no rows"),
    ("planet", lambda s: edit(s / "test_v2.csv", "tags", "tag"), r"test_v2.csv, line 1 has no column 'tags'"),
    ("annotations_csv", lambda s: edit(s / "test/_annotations.csv", "class", "kind"), r"line 1 has no column 'class'"),
    (
        "label_studio_json",
        lambda s: edit(s / "project-1.json", '"result": [{', '"result": {"a": [{'),
        r"not valid JSON",
    ),
    (
        "label_studio_json",
        lambda s: edit_json(s / "project-1.json", lambda c: c[1]["annotations"][0].pop("result")),
        r"project-1.json, task 1: an annotation has no list of results",
    ),
    (
        "label_studio_json",
        lambda s: edit_json(s / "project-1.json", lambda c: c[0]["annotations"][0]["result"].append("cat")),
        r"project-1.json, task 0: an annotation has no list of results",
    ),
    (
        "open_images",
        lambda s: write(s / "oidv7-class-descriptions.csv", "/m/00," + "x" * 200_000),
        r"class-descriptions.csv, line 1 is not valid CSV",
    ),
    ("label_studio_csv", lambda s: edit(s / "project-1.csv", '[""dog', '[""dog"" ""'), r"project-1.csv, line 4"),
    ("label_studio_min", lambda s: (s / "images/1.jpg").unlink(), r"project-1.json, task 1"),
    (
        "voc_roboflow",
        lambda s: truncate(s / "train/0_jpg.rf.0a.xml"),
        r"train/0_jpg.rf.0a.xml, line 1 is not well-formed",
    ),
    (
        "voc_roboflow",
        lambda s: edit(s / "train/0_jpg.rf.0a.xml", "<name>cat", "<name>"),
        r"0a.xml, line 1: the object has no name",
    ),
    (
        "voc_label_studio",
        lambda s: edit(s / "train/Annotations/0.xml", "GB2312", "utf-8"),
        r"0.xml, line 2 is not UTF-8",
    ),
    ("voc_label_studio", lambda s: edit(s / "train/Annotations/0.xml", "GB2312", "klingon"), r"0.xml, line 1 declares"),
    (
        "voc_label_studio",
        lambda s: edit(s / "train/Annotations/0.xml", "cat", b"c\xff\xff"),
        r"0.xml, line 2 is not GB2312",
    ),
    (
        "roboflow_csv",
        lambda s: edit(s / "test/_classes.csv", "0.jpg, 1", "0.jpg, 7"),
        r"_classes.csv, line 2: label 'cat' is",
    ),
    (
        "roboflow_csv",
        lambda s: edit(s / "test/_classes.csv", "0.jpg, 1", "0.jpg, x"),
        r"_classes.csv, line 2: column 'cat'",
    ),
    (
        "annotations_csv",
        lambda s: edit(s / "test/_annotations.csv", "0.jpg,16", ",16"),
        r"_annotations.csv, line 2 names no",
    ),
    (
        "open_images",
        lambda s: edit(s / "oidv7-class-descriptions.csv", "/m/01", "/m/09"),
        r"imagelabels.csv, line 3: /m/01 is",
    ),
    (
        "chestxray14",
        lambda s: edit(s / "Data_Entry_2017.csv", "|tv", "|No Finding|tv"),
        r"2017.csv, line 4: .*says that there",
    ),
    ("chestxray14", lambda s: edit(s / "Data_Entry_2017.csv", "cat", b"c\xe4t"), r"2017.csv, line 2 is not UTF-8 text"),
    ("chexpert", lambda s: edit(s / "test.csv", "1.0", "2.0"), r"test.csv, line 2: label 'cat' is 2.0"),
    ("planet", lambda s: edit(s / "train_v2.csv", "train_0", "train_7"), r"train_v2.csv, line 2: train_7"),
    (
        "isic",
        lambda s: edit(s / "ISIC_test_GroundTruth.csv", ",dog", ",cow"),
        r"Truth.csv, line 1: the column '(cow|dog)'",
    ),
    (
        "yolo_roboflow",
        lambda s: edit(s / "train/labels/0.txt", "0 0.5", "9 0.5"),
        r"labels/0.txt, line 1: class 9 is out of",
    ),
    ("yolo_roboflow", lambda s: edit(s / "train/labels/0.txt", "0 0.5", "x 0.5"), r"labels/0.txt, line 1 is 'x 0.5"),
    ("yolo_roboflow", lambda s: edit(s / "data.yaml", "nc: 3", "nc: 4"), r"data.yaml says nc: 4, but names 3"),
    (
        "yolo_ultralytics",
        lambda s: edit(s / "data.yaml", "images/train", "images/gone"),
        r"data.yaml: train: images/gone",
    ),
    ("tags_kohya", lambda s: (s / "train/10_all/0.txt").write_bytes(b"c\xe4t"), r"10_all/0.txt, line 1 is not UTF-8"),
    (
        "tags_kohya",
        lambda s: (s / "train/10_all/0.txt").write_bytes("cat".encode("utf-16")),
        r"0.txt, line 1 is not UTF-8 .*UTF-16",
    ),
    (
        "tags_kohya",
        lambda s: (s / "train/10_all/0.txt").unlink(),
        r"1 image \(train/10_all/0.jpg\) that nothing labels",
    ),
    (
        "tags_meta_lat",
        lambda s: edit(s / "meta_lat.json", "train/10_all/1.jpg", "train/10_all/0.jpg"),
        r"meta_lat.json is not valid JSON \('/home/me/set/train/10_all/0.jpg' stands twice",
    ),
    (
        "tags_meta_lat",
        lambda s: edit(s / "meta_lat.json", '"tags"', '"tag"'),
        r"1 image \(train/10_all/0.jpg\) that nothing labels",
    ),
    (
        "tags_meta_lat",
        lambda s: edit_json(s / "meta_lat.json", lambda c: next(iter(c.values())).update(tags=["cat"])),
        r"meta_lat.json, '/home/me/set/train/10_all/0.jpg' is .*must be an object with a text 'tags'",
    ),
    (
        "tags_kohya",
        lambda s: write(s / "train/10_all/0.txt", "0 0.5 0.5 0.1 0.1"),
        r"10_all/0.txt, line 1 is a box of YOLO",
    ),
    (
        "yolo_roboflow",
        lambda s: (s / "train/images/1.jpg").unlink(),
        r"train/labels/1.txt: an image of this name\) that",
    ),
    ("yolo_darknet", lambda s: edit(s / "test/_darknet.labels", "dog", "cow"), r"other names than"),
    (
        "webdataset_json",
        lambda s: edit(s / "test-000000.tar", b'"labels": [', b'"labels": {'),
        r"test-000000.tar, 00000.json is not valid JSON",
    ),
    ("label_folders", lambda s: write(s / "train/9.jpg", b"x"), r"format|train/9.jpg"),
    (
        "webdataset_json",
        lambda s: truncate(s / "test-000000.tar"),
        r"test-000000.tar.* is not a whole tar|has no .json",
    ),
    # What follows a damaged header, or is cut off at one, must not pass for absent.
    (
        "webdataset_json",
        lambda s: edit(s / "test-000000.tar", b"00001.jpg", b"00001.jpx"),
        r"tar is not a whole tar file",
    ),
    (
        "webdataset_json",
        lambda s: (s / "test-000000.tar").write_bytes((s / "test-000000.tar").read_bytes().rstrip(b"\0") + bytes(400)),
        r"tar is not a whole tar file",
    ),
    ("webdataset_json", lambda s: edit(s / "test-000000.tar", b'{"labels"', b'{"labels!'), r"test-000000.tar, 00000"),
    ("webdataset_cls", lambda s: (s / "labels.txt").unlink(), r"train-000000.tar, 00000: class 0 has no name|test-"),
    (
        "root_jsonl",
        lambda s: edit(s / "metadata.jsonl", "train/0.jpg", "0.jpg"),
        r"metadata.jsonl, line 1 names '0.jpg', which",
    ),
    ("root_csv", lambda s: edit(s / "labels.csv", "train/0.jpg", "0.jpg"), r"labels.csv, line 2 names '0.jpg', which"),
]


@pytest.mark.parametrize(("name", "harm", "message"), DAMAGED)
def test_what_is_damaged_is_refused_with_file_and_place(name, harm, message, tmp_path, capsys):
    kind, build, options = EXPORTS[name]
    source = build(tmp_path / "source")
    harm(source)
    assert run(kind, source, tmp_path / "target", *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error and not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "name", ["coco", "yolo_roboflow", "label_studio_json", "chexpert", "tags_kohya", "label_folders"]
)
def test_a_format_in_the_wrong_place_is_named_with_the_command(name, tmp_path):
    kind, build, _ = EXPORTS[name]
    source = build(tmp_path / "source")
    with pytest.raises(ValueError, match=rf"python -m training.prepare {kind} .*source TARGET"):
        load(source)


def test_auto_says_what_it_does_not_know_and_what_may_be_several(tmp_path, capsys):
    write(tmp_path / "empty" / "a.jpg", IMAGES["train"][0])
    assert run("auto", tmp_path / "empty", tmp_path / "target") == 2
    assert "is in no format that is known here" in capsys.readouterr().err
    source = exports.write_yolo(exports.write_voc_roboflow(tmp_path / "both"), "roboflow")
    assert run("auto", source, tmp_path / "target") == 2
    assert "YOLO (data.yaml) (yolo) and PASCAL VOC's xml" in capsys.readouterr().err
    assert run("auto", tmp_path / "gone", tmp_path / "target") == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["darknet", "ultralytics"])
def test_boxes_are_found_below_any_folder_and_in_any_letters(layout, tmp_path):
    source = exports.write_yolo(tmp_path / "images" / "source", layout)
    for path in [*source.rglob("0.txt")]:
        path.rename(path.with_suffix(".TXT"))
    assert run("auto", source, tmp_path / "target") == 0
    loaded = load(str(tmp_path / "target"))
    for split, labels in MULTI_HOT.items():
        assert (loaded.splits[split].labels.dense(0) == labels[0]).all()


def test_a_folder_above_merges_no_splits(tmp_path):
    write_voc(tmp_path / "source")  # in VOCdevkit/VOC2007
    assert run("voc", tmp_path / "source", tmp_path / "target") == 0
    assert load(str(tmp_path / "target")).splits.keys() == {"train", "test"}


def test_a_supercategory_may_be_anything(tmp_path):
    source = exports.write_coco_roboflow(tmp_path / "source")
    for split in LABELS:
        path = source / split / "_annotations.coco.json"
        edit_json(path, lambda c: [entry.update(supercategory=["a", {}]) for entry in c["categories"]])
    assert run("coco", source, tmp_path / "target") == 0


@pytest.mark.parametrize("name", ["label_studio_csv", "planet"])
def test_lines_may_end_as_old_machines_end_them(name, tmp_path):
    kind, build, options = EXPORTS[name]
    source = build(tmp_path / "source")
    for path in source.glob("*.csv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    assert run("auto", source, tmp_path / "target", *options) == 0
    assert kind in recognise(source)


def test_a_label_may_have_the_name_of_a_split(tmp_path):
    for row, folder in enumerate(("train", "bus", "car")):
        write(tmp_path / "source" / folder / "1.jpg", IMAGES["train"][row])
    assert recognise(tmp_path / "source").keys() == {"label_folders"}
    assert run("auto", tmp_path / "source", tmp_path / "target") == 0
    assert load(str(tmp_path / "target"), splits=["train"]).label_names == ["bus", "car", "train"]


@pytest.mark.parametrize("beside", ["labels.json", "pictures/1.json", "pictures/1.xml", "text/1.txt"])
def test_folders_beside_annotations_that_are_not_known_are_no_labels(beside, tmp_path, capsys):
    for folder in ("pictures", "more"):
        write(tmp_path / "source" / folder / "1.jpg", IMAGES["train"][0])
    assert recognise(tmp_path / "source").keys() == {"label_folders"}
    write(tmp_path / "source" / beside, "{}")
    assert run("auto", tmp_path / "source", tmp_path / "target") == 2
    assert "is in no format that is known here" in capsys.readouterr().err


def test_every_kind_has_an_export_to_test_it():
    assert {kind for kind, *_ in EXPORTS.values()} == set(KINDS) - {"auto"}


def test_annotators_who_disagree_leave_a_label_unknown(tmp_path):
    source = exports.write_label_studio(tmp_path / "source", "json")
    again = {"was_cancelled": False, "result": [{"value": {"choices": ["dog"]}}]}
    edit_json(source / "project-1.json", lambda tasks: tasks[2]["annotations"].append(again))
    assert run("auto", source, tmp_path / "target") == 0
    loaded = load(tmp_path / "target")
    rows = [loaded.splits["train"].labels.dense(row).tolist() for row in range(3)]
    assert loaded.label_names == NAMES and rows == [[1, 0, 0], [0, 0, 0], [0, 1, -100]]


@pytest.mark.parametrize("name", ["open_images", "coco_lvis"])
def test_labels_that_nobody_judged_are_unknown_where_that_is_asked_for(name, tmp_path):
    kind, build, _ = EXPORTS[name]
    source = build(tmp_path / "source")
    if name == "coco_lvis":  # cat was looked for in image 1 and not found
        edit_json(source / "lvis_v1_train.json", lambda c: c["images"][1].update(neg_category_ids=[5]))
    else:
        path = source / "oidv7-train-annotations-human-imagelabels.csv"
        gone = ("train1,verification,/m/01", "train1,verification,/m/02")
        path.write_text("\n".join(line for line in path.read_text().split("\n") if not line.startswith(gone)))
    assert run(kind, source, tmp_path / "target", "--unjudged", "unknown") == 0
    loaded = load(tmp_path / "target")
    row = [image["bytes"] for image in loaded.splits["train"].images["image"]].index(IMAGES["train"][1])
    values = dict(zip(loaded.label_names, loaded.splits["train"].labels.dense(row).tolist(), strict=True))
    assert values == {"cat": 0, "dog": -100, "tvmonitor": -100}


def test_images_that_nothing_names_are_told(tmp_path, caplog):
    source = exports.write_coco_roboflow(tmp_path / "source")
    write(source / "train" / "extra.jpg", IMAGES["train"][0] + b"x")
    assert run("auto", source, tmp_path / "target") == 0
    assert "extra.jpg" in caplog.text
    assert run("coco", source, tmp_path / "other", "--unlisted_images", "error") == 2


def test_blanks_and_minus_one_of_chexpert_are_what_the_options_say(tmp_path):
    source = exports.write_chexpert(tmp_path / "source")
    edit(source / "train.csv", ",1.0,,", ",1.0,,-1.0")
    assert run("chexpert", source, tmp_path / "one") == 0
    assert run("chexpert", source, tmp_path / "two", "--uncertain", "present", "--blank", "unknown") == 0
    first = [load(tmp_path / name).splits["train"].labels.dense(0).tolist() for name in ("one", "two")]
    assert first == [[1, 0, -100], [1, -100, 1]]
