"""The check on data where everything is wrong once, on clean data, and on the photographs."""

import io
import json
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from training.check_data import main
from training.config import TrainingConfig
from training.loop.setup import load_splits

from .check.test_duplicates import photo
from .data.test_dataset import SHARED, metadata_rows, needs_shared


def bomb(side):
    """A PNG of a few hundred bytes whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def write_split(folder, rows, extra=()):
    """rows: (file name, seed of a photo, JPEG quality or None for PNG, or bytes; None: no file; labels)."""
    folder.mkdir(parents=True)
    for name, content, _ in [*rows, *((name, content, None) for name, content in extra)]:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            photo(content).save(folder / name)
    lines = [json.dumps({"file_name": name, "labels": labels}) for name, _, labels in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def ill(tmp_path_factory):
    """An image folder with one of everything."""
    root = tmp_path_factory.mktemp("ill") / "photos"
    whole = io.BytesIO()
    photo(50, size=(400, 300)).save(whole, "JPEG")
    write_split(
        root / "train",
        [
            ("a.png", 1, ["cat", "dog"]),
            ("b.png", 2, ["dog"]),
            ("b_again.jpg", 2, ["dog"]),
            ("c.png", 3, ["cat"]),
            ("cut.jpg", whole.getvalue()[:2000], ["dog"]),
            ("empty.png", 4, []),
            ("gone.png", None, ["dog"]),
            ("huge.png", bomb(20_000), ["dog"]),
            ("text.png", b"not an image", ["dogs"]),
            ("e.png", 5, ["horse"]),
        ],
        extra=[("stray.png", 6)],
    )
    write_split(root / "validation", [("v.png", 7, ["dog"]), ("c_copy.jpg", 3, ["dog"])])
    return root


@pytest.fixture(scope="module")
def report(ill, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    assert main([str(ill), "--output", str(folder), "--num_workers", "2"]) == 1
    return folder


def found(report):
    return {each["kind"]: each for each in json.loads((report / "report.json").read_text())["findings"]}


def files(finding):
    return [(each["split"], each["row"], each["file"]) for each in finding["examples"]]


def test_unreadable_images_are_told_apart(report, ill):
    findings = found(report)
    # Rows are counted without gone.png, which the loader leaves out.
    assert files(findings["corrupt_images"]) == [("train", 4, "train/cut.jpg"), ("train", 7, "train/text.png")]
    assert "truncated" in findings["corrupt_images"]["examples"][0]["reason"]
    assert files(findings["oversized_images"]) == [("train", 6, "train/huge.png")]
    assert findings["rows_without_an_image"]["examples"] == [f"{ill}/train/metadata.jsonl: gone.png"]
    assert findings["images_without_a_row"]["examples"] == [f"{ill}/train/stray.png"]
    for kind in ("corrupt_images", "oversized_images", "rows_without_an_image", "images_without_a_row"):
        assert findings[kind]["breaks_training"]


def test_what_is_odd_about_labels_is_told(report):
    findings = found(report)
    assert files(findings["images_without_a_label"]) == [("train", 5, "train/empty.png")]
    absent = findings["labels_absent_from_a_split"]["examples"]
    assert absent == ["cat: absent from validation", "dogs: absent from validation", "horse: absent from validation"]
    assert findings["names_that_may_mean_the_same"]["examples"] == ["dog / dogs (form 1.00)"]
    few = findings["labels_with_few_positives"]["examples"]
    assert few == ["dogs: 1", "horse: 1", "cat: 2", "dog: 5"]
    assert not findings["labels_with_few_positives"]["breaks_training"]


def test_copies_within_and_across_splits_and_their_labels(report):
    findings, groups = found(report), json.loads((report / "report.json").read_text())["duplicates"]
    within = findings["duplicates_within_a_split"]["examples"]
    assert within == ["train 1 train/b.png = train 2 train/b_again.jpg"]
    across = "validation 1 validation/c_copy.jpg = train 3 train/c.png"
    assert findings["duplicates_across_splits"]["examples"] == [across]
    assert findings["duplicates_with_other_labels"]["examples"] == [f"{across}: cat, dog"]
    assert len(groups) == 2 and not any(group["identical"] for group in groups)
    assert groups[0]["members"][0]["labels"] == ["dog"]


def test_training_leaves_out_what_the_list_says_and_nothing_else(report, ill, caplog):
    lines = [line.split("\t") for line in (report / "exclude.txt").read_text().splitlines()[1:]]
    assert [line[2] for line in lines] == [
        "train/b_again.jpg",
        "train/c.png",
        "train/cut.jpg",
        "train/huge.png",
        "train/text.png",
    ]
    assert lines[1][3] == "copy of validation 1 validation/c_copy.jpg, labels differ in cat, dog"
    options = {"dataset": str(ill), "missing_images": "skip", "unlisted_images": "skip"}
    with caplog.at_level(logging.WARNING):
        loaded = load_splits(TrainingConfig(**options, exclude=str(report / "exclude.txt")), Accelerator())
    splits = loaded.splits
    assert [each[1:3] for each in loaded.left_out if each.kind == "excluded"][1:3] == [
        ("train", f"{ill}/train/metadata.jsonl, line {number} ({name})")
        for number, name in ((4, "c.png"), (5, "cut.jpg"))
    ]
    assert [Path(image["path"]).name for image in splits["train"].images["image"]] == [
        "a.png",
        "b.png",
        "empty.png",
        "e.png",
    ]
    assert len(splits["validation"]) == 2
    assert "Left out 5 of 9 images of train" in caplog.text


def test_the_summary_counts_first(ill, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main([str(ill), "--output", str(folder), "--examples", "1"]) == 1
    out = capsys.readouterr().out
    assert out.index("2  corrupt images") < out.index("1  duplicates across splits") < out.index("Corrupt images: 2.")
    assert "train 4 train/cut.jpg" in out and "train/text.png" not in out and "and 1 more" in out
    assert "with 5 rows to leave out in exclude.txt" in out
    with PILImage.open(folder / "imbalance.png") as plot:
        assert plot.size[0] > 800


def test_a_report_is_replaced_only_when_told(ill, report, capsys):
    before = (report / "exclude.txt").read_bytes()
    assert main([str(ill), "--output", str(report)]) == 2
    assert "report.json exists" in capsys.readouterr().err
    (report / "exclude.txt").write_text("mine")
    assert main([str(ill), "--output", str(report), "--overwrite"]) == 1
    assert (report / "exclude.txt").read_bytes() == before


def embedded(labels, feature, seeds):
    buffers = [io.BytesIO() for _ in seeds]
    for seed, buffer in zip(seeds, buffers, strict=True):
        photo(seed).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    return Dataset.from_dict({"image": images, "labels": labels}, Features({"image": Image(), "labels": feature}))


def test_clean_data_end_with_0(tmp_path, capsys):
    names = List(Value("string"))
    splits = DatasetDict(
        train=embedded([["cat"], ["dog"]], names, [1, 2]), validation=embedded([["cat", "dog"]], names, [3])
    )
    splits.save_to_disk(tmp_path / "clean")
    assert main([str(tmp_path / "clean"), "--output", str(tmp_path / "out")]) == 0
    findings = found(tmp_path / "out")
    assert all(not each["examples"] for kind, each in findings.items() if kind != "labels_with_few_positives")
    assert (tmp_path / "out" / "exclude.txt").read_text().count("\n") == 1


def test_splits_that_training_would_refuse(tmp_path):
    nan = float("nan")
    labels = [[0.5, 0, 1], [1, nan, 0], None, [nan, nan, nan], [0, 0, nan]]
    only_validation = embedded(labels, List(Value("float32")), [1, 2, 3, 4, 5])
    DatasetDict(validation=only_validation).save_to_disk(tmp_path / "saved")
    argv = [str(tmp_path / "saved"), "--label_names", "a", "b", "c", "--output", str(tmp_path / "out")]
    assert main(argv) == 1
    findings = found(tmp_path / "out")
    assert findings["missing_splits"]["examples"] == ["there is no split 'train'"]
    assert files(findings["soft_labels_to_measure"]) == [("validation", 0, "")]
    assert files(findings["images_with_nothing_known"]) == [("validation", 2, ""), ("validation", 3, "")]
    assert findings["images_without_a_label"]["examples"] == []


def test_labels_that_cannot_be_loaded_are_a_finding_and_no_data_an_error(ill, tmp_path, capsys):
    argv = [str(ill), "--label_names", "cat", "dog", "--output", str(tmp_path / "out")]
    assert main(argv) == 1
    assert "label 'dogs' is not among the 2 label names" in capsys.readouterr().out
    findings = found(tmp_path / "out")
    assert len(findings["labels_outside_the_vocabulary"]["examples"]) == 2 and "images_without_a_label" in findings
    assert main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out2")]) == 2
    assert "nowhere" in capsys.readouterr().err


def correlation(*files):
    """Of two photographs, 32 pixels a side in grey: near 1 for one photograph twice, far from it for two."""
    small = [np.asarray(PILImage.open(file).convert("L").resize((32, 32)), dtype=float).ravel() for file in files]
    return np.corrcoef(small)[0, 1]


@needs_shared
@pytest.mark.parametrize("name", ["coco", "voc"])
def test_photographs_encoded_again_are_found_and_no_others(name, tmp_path):
    """As VOC2012 holds photographs of VOC2007: smaller, compressed anew, and in the other split."""
    copies = {}
    for split, count in (("train", 300), ("validation", 90)):
        rows = metadata_rows(SHARED / name / split)[:count]
        (tmp_path / "data" / split).mkdir(parents=True)
        for row in rows:
            os.symlink(SHARED / name / split / row["file_name"], tmp_path / "data" / split / row["file_name"])
        if split == "validation":
            for row in metadata_rows(SHARED / name / "train")[:300:40]:
                file = tmp_path / "data" / split / f"again_{row['file_name']}"
                with PILImage.open(SHARED / name / "train" / row["file_name"]) as image:
                    image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(file, quality=60)
                copies[file.name] = row["file_name"]
                rows.append({"file_name": file.name, "labels": row["labels"]})
        (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "data" / "labels.txt").write_text((SHARED / name / "labels.txt").read_text())
    assert main([str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    groups = json.loads((tmp_path / "out" / "report.json").read_text())["duplicates"]
    found = [{Path(member["file"]).name for member in group["members"]} for group in groups]
    for again, file in copies.items():
        assert any({again, file} <= group for group in found), again
    for group in groups:  # what the photographs themselves hold twice is none of our business, but must look alike
        first, *others = (
            tmp_path / "data" / member["split"] / Path(member["file"]).name for member in group["members"]
        )
        assert all(correlation(first, other) > 0.95 for other in others), group
