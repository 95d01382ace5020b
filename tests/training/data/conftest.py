"""A folder of images that the tests of this room read."""

import json

import pytest

from training.data.load import load

from .test_dataset import LABELS, NAMES, image


@pytest.fixture
def image_folder(tmp_path):
    """labels.txt, train/ with five images, validation/ with three of them."""
    root = tmp_path / "photos"
    for split, count in (("train", 5), ("validation", 3)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            image(number).save(root / split / f"{number}.png")
        rows = [json.dumps({"file_name": f"{number}.png", "labels": LABELS[number]}) for number in range(count)]
        (root / split / "metadata.jsonl").write_text(" \n".join(rows))
    (root / "labels.txt").write_text("\n".join(NAMES) + "  ")
    return root


@pytest.fixture
def damaged(image_folder):
    """Row 1 truncated, row 2 no image at all, row 4 gone after loading."""
    loaded = load(image_folder)
    first = image_folder / "train/1.png"
    first.write_bytes(first.read_bytes()[:2000])
    (image_folder / "train/2.png").write_bytes(b"not an image")
    (image_folder / "train/4.png").unlink()
    return loaded
