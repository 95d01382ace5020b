"""Folders of shards, parquet or WebDataset, whose images tell their number: red and green are its digits, base 200."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List
from PIL import Image as PILImage

NAMES = ["cat", "dog", "sea"]


def labels_of(number: int) -> list[str]:
    """Of image `number`: each label in half of the images."""
    return [name for bit, name in enumerate(NAMES) if number >> bit & 1]


def png(number: int, side: int = 16) -> bytes:
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = (number // 200, number % 200, 100)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def number_of(pixels: np.ndarray) -> int:
    """The number of an image (3, height, width), of any size."""
    return int(pixels[0, 0, 0]) * 200 + int(pixels[1, 0, 0])


def write_tar(path: Path, numbers, labels=labels_of, content=png, form: str = "json") -> None:
    with tarfile.open(path, "w") as shard:
        for number in numbers:
            written = json.dumps({"labels": labels(number)}) if form == "json" else ", ".join(labels(number))
            for suffix, data in (("png", content(number)), (form, written.encode())):
                member = tarfile.TarInfo(f"{number:05}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, numbers, labels=labels_of, content=png) -> None:
    rows = {
        "image": [{"bytes": content(number), "path": f"{number:05}.png"} for number in numbers],
        "labels": [labels(number) for number in numbers],
    }
    features = Features({"image": Image(), "labels": List(ClassLabel(names=NAMES))})
    Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=5)


def write_shards(folder: Path, kind: str, sizes, *, split: str = "train", first: int = 0, names: bool = True) -> Path:
    """`split-00000.tar` and so on, with so many images each, numbered on from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(sizes):
        write = write_parquet if kind == "parquet" else write_tar
        write(folder / f"{split}-{shard:05}.{kind}", range(first, first + size))
        first += size
    if names:
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder
