"""MS-COCO and what is annotated like it: `annotations/instances_SPLIT.json` beside folders of images, or
`SPLIT/_annotations.coco.json` among them. An image has the labels of its annotations, crowds included; labels are in
the order of the category ids. By default train2014 becomes train and val2014 validation; for the papers' protocol:
--split train2014=train --split val2014=test --without_labels drop, and a validation split cut from train. SOURCE:
the folder with annotations/ and the images, or one json file."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from ..data.rows import SPLIT_ALIASES
from ..options import option
from .reading import Reading, Rows, SourceOptions, checked, first_folder

# Images, and those with an annotation.
PUBLISHED = {"train2014": (82_783, 82_081), "val2014": (40_504, 40_137)}


@dataclass(kw_only=True)
class Options(SourceOptions):
    image_folder: str | None = option(None, "where the images are; null: SPLIT or images/SPLIT in SOURCE")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the file and the entry."""
    source = args.source
    if source.is_file():
        files = {source.stem.removeprefix("instances_"): source}
        root = source.parent.parent if source.parent.name == "annotations" else source.parent
    else:
        files = {
            path.stem.removeprefix("instances_"): path
            for path in sorted((source / "annotations").glob("instances_*.json"))
        } or {path.parent.name: path for path in sorted(source.glob("*/_annotations.coco.json"))}
        root = source
    if not files:
        raise FileNotFoundError(f"{source} has neither annotations/instances_*.json nor */_annotations.coco.json.")
    if args.split:  # a json of COCO takes gigabytes of memory: read those that are asked for
        files = {name: path for name, path in files.items() if name in dict(args.split)} or files
    categories, first, splits = None, None, {}
    for name, path in files.items():
        folder = (
            Path(args.image_folder)
            if args.image_folder
            else (
                path.parent
                if path.name == "_annotations.coco.json"
                else first_folder(root / name, root / "images" / name, root / "images", root)
            )
        )
        names_of_ids, rows = _read_file(path, folder, args.missing_images)
        if categories is None:
            categories, first = names_of_ids, path
        elif names_of_ids != categories:
            raise ValueError(f"{path} has other categories than {first}; make them the same.")
        splits[name] = rows.dataset(pa.int64())
    label_names = [categories[number] for number in sorted(categories)]
    return Reading(
        splits=checked(splits, label_names, "ids"),
        label_names=label_names,
        usual_names={name: _usual_name(name) for name in splits},
        title="COCO-2014",
        published={name: counts for name, counts in PUBLISHED.items() if name in splits},
    )


def _usual_name(name: str) -> str:
    bare = re.sub(r"[\d_-]+$", "", name)
    return SPLIT_ALIASES.get(bare, bare)


def _read_file(path: Path, folder: Path, missing_images: str) -> tuple[dict[int, str], Rows]:
    """Names by category id, and rows."""

    def without_outlines(entry: dict) -> dict:  # most of the file, and of no use here
        entry.pop("segmentation", None)
        return entry

    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=without_outlines)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object with images, annotations and categories.")

    def entries(key: str, **fields: type):
        listed = content.get(key)
        if not isinstance(listed, list):
            raise ValueError(f"{path} has no list {key!r}; COCO files hold images, annotations and categories.")
        for number, entry in enumerate(listed):
            where = f"{path}, {key}[{number}]"
            for name, kind in fields.items():
                value = entry.get(name) if isinstance(entry, dict) else None
                if not isinstance(value, kind) or isinstance(value, bool):
                    raise ValueError(f"{where}: {name} is {value!r}, but must be of type {kind.__name__}.")
            yield where, entry

    names: dict[int, str] = {}
    for where, entry in entries("categories", id=int, name=str):
        if entry["id"] in names or entry["name"] in names.values():
            raise ValueError(f"{where}: the category {entry['id']} {entry['name']!r} is listed twice; keep one.")
        names[entry["id"]] = entry["name"]
    index = {number: position for position, number in enumerate(sorted(names))}
    images: dict[int, tuple[str, str]] = {}
    for where, entry in entries("images", id=int, file_name=str):
        if entry["id"] in images:
            raise ValueError(
                f"{where}: the id {entry['id']} is that of {images[entry['id']][0]} as well; give each its own."
            )
        if PurePosixPath(entry["file_name"]).is_absolute() or ".." in PurePosixPath(entry["file_name"]).parts:
            raise ValueError(f"{where}: file_name {entry['file_name']!r} leads out of the folder; correct it.")
        images[entry["id"]] = where, entry["file_name"]
    labels: dict[int, set[int]] = {number: set() for number in images}
    seen: set[int] = set()
    for where, entry in entries("annotations", id=int, image_id=int, category_id=int):
        if entry["id"] in seen:
            raise ValueError(f"{where}: the id {entry['id']} is that of another annotation as well; give each its own.")
        seen.add(entry["id"])
        if entry["image_id"] not in labels:
            raise ValueError(f"{where}: image_id {entry['image_id']} is not among the images; correct or delete it.")
        if entry["category_id"] not in index:
            raise ValueError(f"{where}: category_id {entry['category_id']} is no category; correct or delete it.")
        labels[entry["image_id"]].add(index[entry["category_id"]])
    rows = Rows(missing_images)
    for number, (where, file_name) in images.items():
        rows.add(folder / file_name, sorted(labels[number]), where)
    return names, rows
