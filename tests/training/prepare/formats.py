"""The same five images and labels in the files of every format, as those look when they are unpacked."""

import csv
import io
import json
import random

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

NAMES = ["cat", "dog", "tvmonitor"]
LABELS = {"train": [["cat"], [], ["dog", "tvmonitor"]], "test": [["tvmonitor", "cat"], ["dog"]]}
MULTI_HOT = {
    split: np.array([[name in labels for name in NAMES] for labels in rows], dtype=np.float32)
    for split, rows in LABELS.items()
}


def image(split, row):
    """The bytes of a JPEG file."""
    pixels = np.random.default_rng((len(split), row)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


IMAGES = {split: [image(split, row) for row in range(len(rows))] for split, rows in LABELS.items()}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content, encoding="utf-8")


def each():
    """(split, row, label names, bytes) of every image."""
    for split, rows in LABELS.items():
        for row, labels in enumerate(rows):
            yield split, row, labels, IMAGES[split][row]


def write_coco(root):
    """Category ids with a gap and out of order, several objects of a category, a crowd, and outlines."""
    categories = [{"id": 90, "name": "tvmonitor"}, {"id": 1, "name": "cat"}, {"id": 18, "name": "dog"}]
    ids = {entry["name"]: entry["id"] for entry in categories}
    for split, name in (("train", "train2014"), ("test", "val2014")):
        images, annotations = [], []
        for row, labels in enumerate(LABELS[split]):
            file_name = f"COCO_{name}_{row:012}.jpg"
            write(root / name / file_name, IMAGES[split][row])
            images.append({"id": 500 + row, "file_name": file_name, "width": 16, "height": 12})
            for label in [*labels, *labels[:1]]:
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": 500 + row,
                        "category_id": ids[label],
                        "segmentation": {"counts": [1, 2], "size": [12, 16]},
                        "iscrowd": 1,
                        "bbox": [0, 0, 4, 4],
                    }
                )
        random.Random(0).shuffle(annotations)
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{name}.json", json.dumps(content))
    write(root / "annotations" / "captions_val2014.json", "{}")
    return root


def voc_object(name, difficult=0):
    """An object with parts, which have names as well."""
    return (
        f"\t<object>\n\t\t<name>{name}</name>\n\t\t<difficult>{difficult}</difficult>\n"
        "\t\t<part>\n\t\t\t<name>head</name>\n\t\t</part>\n\t</object>\n"
    )


def write_voc(root):
    """A dog in image 1 of train is difficult; so is a second cat in image 0, beside one that is not."""
    base = root / "VOCdevkit" / "VOC2007"
    flags = {}
    for split, row, labels, content in each():
        name, number = {"train": "trainval", "test": "test"}[split], f"00{len(split)}{row:03}"
        write(base / "JPEGImages" / f"{number}.jpg", content)
        objects = "".join(map(voc_object, labels))
        difficult = {("train", 1): "dog", ("train", 0): "cat"}.get((split, row))
        objects += voc_object(difficult, 1) if difficult else ""
        write(base / "Annotations" / f"{number}.xml", f"<annotation>\n{objects}</annotation>\n")
        for label in NAMES:
            flag = 1 if label in labels else 0 if label == difficult else -1
            flags.setdefault((label, name), []).append(f"{number} {flag:2}")
        flags.setdefault(("", name), []).append(number)
    for (label, name), lines in flags.items():
        write(base / "ImageSets" / "Main" / f"{label}_{name}.txt".removeprefix("_"), "\n".join(lines) + "\n")
    return base


def write_nuswide(root, by_split=True):
    lists = {"Train": [], "Test": [], "": []}
    flags = {}
    for split, row, labels, content in each():
        name, file_name = split.capitalize(), f"0001_{len(split)}{row}.jpg"
        write(root / "Flickr" / "actor" / file_name, content)
        for part in (name, ""):
            lists[part].append(f"actor\\{file_name}")
            for label in NAMES:
                flags.setdefault((label, part), []).append("1" if label in labels else "0")
    lists[""].reverse()  # the whole list is in another order
    for part, lines in lists.items():
        write(root / "ImageList" / f"{part}Imagelist.txt", "\r\n".join(lines) + " \r\n")
    for (label, part), lines in flags.items():
        if by_split and part:
            write(root / "Groundtruth" / "TrainTestLabels" / f"Labels_{label}_{part}.txt", "\n".join(lines))
        elif not by_split and not part:
            write(root / "Groundtruth" / "AllLabels" / f"Labels_{label}.txt", "\n".join(reversed(lines)))
    write(root / "ConceptsList" / "Concepts81.txt", "\n".join(NAMES) + "\n")
    return root


def write_csv(root, layout):
    """`text` and `columns`: one table a split; `split_column`: one table of all."""
    tables = {}
    for split, row, labels, content in each():
        file_name = f"{split}/{row}.jpg"
        write(root / file_name, content)
        if layout == "columns":
            values = [str(int(name in labels)) for name in NAMES]
            table, header, cells = split, ["file_name", *NAMES], [file_name, *values]
        elif layout == "text":
            table, header, cells = split, ["file_name", "labels"], [file_name, " , ".join(labels)]
        else:
            table, header, cells = "all", ["labels", "split", "file_name"], [";".join(labels), split, file_name]
        tables.setdefault(table, [header]).append(cells)
    for table, rows in tables.items():
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        write(root / f"{table}.csv", text.getvalue())
    return root / "all.csv" if layout == "split_column" else root


def write_image_folder(root):
    for split, row, _, content in each():
        write(root / split / f"{row}.jpg", content)
    for split, rows in LABELS.items():
        lines = [json.dumps({"file_name": f"{row}.jpg", "labels": labels}) for row, labels in enumerate(rows)]
        write(root / split / "metadata.jsonl", "\n".join(lines))
    write(root / "labels.txt", "\n".join(NAMES))
    return root


def write_parquet(root, layout):
    """Labels as lists of `names` or `ids`, as `multi_hot` lists, as `text`, or as `columns`."""
    splits = DatasetDict()
    for split, rows in LABELS.items():
        columns = {"image": [{"bytes": content, "path": None} for content in IMAGES[split]]}
        features = {"image": Image()}
        hot = MULTI_HOT[split]
        if layout == "columns":
            columns |= {name: hot[:, index].astype(int).tolist() for index, name in enumerate(NAMES)}
            features |= {name: Value("int8") for name in NAMES}
        else:
            feature, labels = {
                "names": (List(Value("string")), rows),
                "ids": (List(ClassLabel(names=NAMES)), [[NAMES.index(name) for name in names] for names in rows]),
                "multi_hot": (List(Value("int8")), hot.astype(int).tolist()),
                "text": (Value("string"), [",".join(names) for names in rows]),
            }[layout]
            columns["labels"], features["labels"] = labels, feature
        splits[split] = Dataset.from_dict(columns, features=Features(features))
    for split, dataset in splits.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def write_selected_tags(path):
    rows = [f"{100 + index},{name},0,{9 - index}" for index, name in enumerate(NAMES)]
    write(path, "\n".join(["tag_id,name,category,count", *rows]) + "\n")
    return path
