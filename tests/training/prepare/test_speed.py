"""Large collections are read in seconds."""

import json
import os
import time

import pytest

from training.prepare.__main__ import main

from .formats import IMAGES, write


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "coco", "tag_files"])
def test_a_hundred_thousand_rows_take_seconds(kind, tmp_path):
    """Links to one image; seconds of the processor, several times what it takes."""
    source, count = tmp_path / "source", 100_000
    for row in range(count):
        image = source / "train" / f"{row}.jpg"
        if row % 20_000 == 0:  # a file system allows some ten thousand links to a file
            first = image
            write(image, IMAGES["train"][0])
        else:
            os.link(first, image)
    names = sorted(path.name for path in (source / "train").iterdir())
    if kind == "csv":
        write(source / "train.csv", "file_name,labels\n" + "".join(f'train/{name},"cat, dog"\n' for name in names))
    elif kind == "coco":
        content = {
            "images": [{"id": row, "file_name": name} for row, name in enumerate(names)],
            "annotations": [{"image_id": row, "category_id": row % 2} for row in range(len(names))],
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        }
        write(source / "annotations" / "instances_train.json", json.dumps(content))
    else:
        write(source / "meta_cap.json", json.dumps({f"train/{name}": {"tags": "cat, dog"} for name in names}))
    start = time.process_time()
    assert main(["auto", str(source), str(tmp_path / "target")]) == 0
    assert time.process_time() - start < 90
