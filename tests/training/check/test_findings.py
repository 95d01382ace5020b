"""What is found about images, labels and copies, each by itself."""

import io

import numpy as np
from datasets import Dataset, Features, Image

from training.check.findings import check_labels, exclusions, inspect_images
from training.data.sparse_labels import SparseLabels

from .test_duplicates import photo


def test_what_a_decoder_warns_of_is_told_of_its_image():
    rows = []
    for row in range(8):
        file = io.BytesIO()  # EXIF data that promise a hundred entries and hold none
        photo(row).save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0d\0" if row in (2, 5) else b"")
        rows.append({"bytes": file.getvalue(), "path": f"{row}.jpg"})
    split = Dataset.from_dict({"image": rows}, features=Features({"image": Image(decode=False)}))
    _, prints, findings = inspect_images({"train": split}, num_workers=2)
    assert len(prints) == 8, "they decode"
    (finding,) = (each for each in findings if each.examples)
    assert finding.kind == "images_that_decode_with_a_warning" and not finding.breaks_training
    assert [(each["split"], each["row"], each["file"]) for each in finding.examples] == [
        ("train", 2, "2.jpg"),
        ("train", 5, "5.jpg"),
    ]
    assert all("EXIF" in example["reason"] for example in finding.examples)


def test_a_split_without_any_positive_is_told():
    none = SparseLabels(np.zeros(3, int), np.zeros(0, int), np.zeros(0, np.float32), np.zeros(2, np.float32), 2, "ids")
    one = SparseLabels(np.array([0, 1]), np.array([1]), np.ones(1, np.float32), np.zeros(1, np.float32), 2, "ids")
    findings = {each.kind: each for each in check_labels({"train": one, "validation": none}, ["a", "b"])}
    assert findings["splits_without_a_positive"].examples == ["validation: no image shows any label"]
    assert findings["splits_without_a_positive"].breaks_training


def test_copies_in_test_stay_and_so_do_copies_of_copies_that_differ_from_the_first():
    def member(split, row, matches=True):
        return {"split": split, "row": row, "file": f"{split}/{row}.png", "matches": matches}

    members = [member("test", 0), member("test", 1), member("validation", 2), member("train", 3, matches=False)]
    excluded = exclusions([], [{"members": members, "conflicts": []}])
    assert excluded == [("validation", 2, "validation/2.png", "copy of test 0 test/0.png")]
