"""MS-COCO and what is annotated like it: `annotations/instances_SPLIT.json` beside folders of images,
`SPLIT/_annotations.coco.json` among them (Roboflow), `result.json` (Label Studio), `labels.json` beside data/
(FiftyOne), `lvis_v1_SPLIT.json`, or any json with images, annotations and categories. An image has the labels of its
annotations, crowds included; labels are in the order of the category ids. By default train2014 becomes train and
val2014 validation; for the papers' protocol: --split train2014=train --split val2014=test --without_labels drop, and a
validation split cut from train. SOURCE: the folder with annotations/ and the images, or one json file."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from ..data.formats import Files, coco_files
from ..data.rows import SPLIT_NAMES
from ..options import option
from .reading import Reading, Rows, SourceOptions, read_json, usual_name

logger = logging.getLogger(__name__)

# Images, and those with an annotation.
PUBLISHED = {"train2014": (82_783, 82_081), "val2014": (40_504, 40_137)}
# Beside instances_*.json, of the same images.
_OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")


@dataclass(kw_only=True)
class Options(SourceOptions):
    image_folder: str | None = option(None, "where the images are; null: in SOURCE")
    unjudged: Literal["absent", "unknown"] = option(
        "absent", "categories that LVIS judged neither present nor absent in an image"
    )


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the file and the entry."""
    root = args.source
    if root.is_file():
        files = {_name_of(root): root}
        root = root.parent.parent if root.parent.name == "annotations" else root.parent
    else:
        names = [name for name in coco_files(Files(root)) if not Path(name).name.startswith(_OTHER_TASKS)]
        # What is there but unreadable must not pass for absent.
        names += [
            path.relative_to(root).as_posix()
            for pattern in ("annotations/instances_*.json", "*/_annotations.coco.json")
            for path in root.glob(pattern)
        ]
        instances = [name for name in names if Path(name).name.startswith("instances_")]
        files: dict[str, Path] = {}
        for name in sorted(set(instances or names)):
            if files.setdefault(_name_of(root / name), root / name) != root / name:
                raise ValueError(
                    f"{root / name} and {files[_name_of(root / name)]} are both {_name_of(root / name)!r}."
                )
    if not files:
        raise FileNotFoundError(
            f"{args.source} has neither annotations/instances_*.json nor */_annotations.coco.json, nor any other json "
            "with images, annotations and categories."
        )
    if args.split:  # a json of COCO takes gigabytes of memory: read those that are asked for
        files = {name: path for name, path in files.items() if name in dict(args.split)} or files
    folder = Path(args.image_folder) if args.image_folder else root
    rows = Rows(folder, args, unlisted=not args.split)
    parts = {name: _File(path) for name, path in files.items()}
    label_names = _vocabulary(list(parts.values()))
    for name, part in parts.items():
        places = (part.path.parent, folder / name, folder / "images" / name)
        inside = (place for place in places if place.is_dir() and place != folder and place.is_relative_to(folder))
        below = next((place for place in inside if place.name != "annotations"), folder).relative_to(folder).as_posix()
        part.add_rows(rows, name, "" if below == "." else below, label_names, args.unjudged)
    reading = rows.reading(label_names)
    reading.usual_names = {name: usual_name(name) for name in reading.splits}
    if len(files) == 1 and not set(reading.usual_names.values()) & SPLIT_NAMES:
        reading.usual_names = dict.fromkeys(reading.splits, "train")
    reading.title, reading.published = "COCO-2014", PUBLISHED
    return reading


def _name_of(path: Path) -> str:
    """The split of a file, by its folder or its own name."""
    if path.parent.name.lower() in SPLIT_NAMES:
        return path.parent.name
    name = path.stem.removeprefix("instances_")
    words = name.replace("-", "_").split("_")
    return next((word for word in words if usual_name(word).lower() in SPLIT_NAMES and word != ""), name)


class _File:
    """One json: its categories, and its images with their annotations."""

    def __init__(self, path: Path):
        self.path = path
        self.content = read_json(path, drop="segmentation")  # most of the file, and of no use here
        if not isinstance(self.content, dict):
            raise ValueError(f"{path} must hold an object with images, annotations and categories.")
        self.names: dict[str, str] = {}  # by category id
        self.where: dict[str, str] = {}
        parents = set()
        for where, entry in self._entries("categories"):
            number, name = self._id(entry, "id", where), self._text(entry, "name", where).strip()
            if self.names.get(number, name) != name:
                raise ValueError(
                    f"{where}: the category {entry['id']} is {self.names[number]!r} as well; give each its own id."
                )
            self.names[number], self.where[number] = name, where
            parents.add(str(entry.get("supercategory") or "none"))
        self.present: dict[str, set[str]] = {}
        self.images: dict[str, tuple[str, str, dict]] = {}
        for where, entry in self._entries("images"):
            number = self._id(entry, "id", where)
            if number in self.images:
                raise ValueError(
                    f"{where}: the id {entry['id']} is that of {self.images[number][0]} as well; give each its own."
                )
            self.images[number] = where, self._file_name(entry, where), entry
            self.present[number] = set()
        used, seen = set(), set()
        for where, entry in self._entries("annotations"):
            if "id" in entry:
                number = self._id(entry, "id", where)
                if number in seen:
                    raise ValueError(
                        f"{where}: the id {entry['id']} is that of another annotation as well; give each its own."
                    )
                seen.add(number)
            image, category = self._id(entry, "image_id", where), self._id(entry, "category_id", where)
            if image not in self.present:
                raise ValueError(
                    f"{where}: image_id {entry['image_id']} is not among the images; correct or delete it."
                )
            if category not in self.names:
                raise ValueError(f"{where}: category_id {entry['category_id']} is no category; correct or delete it.")
            if not self.names[category]:
                raise ValueError(f"{self.where[category]}: the category has no name, but {where} is of it; name it.")
            used.add(category)
            self.present[image].add(self.names[category])
        self.used = {self.names[number] for number in used}
        # Roboflow's root: a category that only stands above the others.
        roots = {name for name in self.names.values() if name in parents and name not in self.used}
        numbers = sorted(self.names, key=int) if all(number.isdecimal() for number in self.names) else self.names
        listed = dict.fromkeys(self.names[number] for number in numbers)
        own_root = roots if len(parents - {"none"}) == 1 and len(listed) > 1 else set()
        self.listed = [name for name in listed if name and name not in own_root]

    def add_rows(self, rows: Rows, split: str, below: str, label_names: list[str], unjudged: str) -> None:
        federated = any("neg_category_ids" in entry for _, _, entry in self.images.values())
        if federated and unjudged == "absent":
            logger.warning(
                "%s says for each image which categories were looked for; the others are taken as absent, or with "
                "--unjudged unknown as unknown.",
                self.path,
            )
        for number, (where, name, entry) in self.images.items():
            present, unknown = self.present[number], ()
            if federated and unjudged == "unknown":
                judged = {self.names.get(_key(category), "") for category in entry.get("neg_category_ids", ())}
                unknown = [other for other in label_names if other not in judged and other not in present]
            # A URL keeps the folder that the file had where it was published.
            names = [name] if "file_name" in entry else [name, PurePosixPath(name).name]
            rows.add(split, names, sorted(present), where, unknown=unknown, below=[below])

    def _entries(self, key: str) -> Iterator[tuple[str, dict]]:
        listed = self.content.get(key)
        if not isinstance(listed, list):
            raise ValueError(f"{self.path} has no list {key!r}; COCO files hold images, annotations and categories.")
        for number, entry in enumerate(listed):
            where = f"{self.path}, {key}[{number}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{where} is {entry!r}, but must be an object.")
            yield where, entry

    def _id(self, entry: dict, name: str, where: str) -> str:
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
            raise ValueError(f"{where}: {name} is {value!r}, but must be of type int.")
        return _key(value)

    def _text(self, entry: dict, name: str, where: str) -> str:
        value = entry.get(name)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is {value!r}, but must be of type str.")
        return value

    def _file_name(self, entry: dict, where: str) -> str:
        if entry.get("file_name") is None and isinstance(entry.get("coco_url"), str):
            name = "/".join(unquote(urlsplit(entry["coco_url"]).path).split("/")[-2:])
        else:
            name = self._text(entry, "file_name", where).replace("\\", "/")
        if ".." in PurePosixPath(name).parts:
            raise ValueError(f"{where}: file_name {name!r} leads out of the folder; correct it.")
        return name


def _key(value: Any) -> str:
    """An id as text: 1, 1.0 and "1" are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _vocabulary(files: list[_File]) -> list[str]:
    """The names of all files, in the order of their ids.

    Raises:
        ValueError: a file uses a category that another one does not know.
    """
    first = files[0]
    for file in files[1:]:
        for one, other in ((file, first), (first, file)):
            if odd := sorted(one.used - set(other.listed)) if other.listed else []:
                raise ValueError(
                    f"{file.path} has other categories than {first.path} ({odd[0]!r}); make them the same."
                )
    names = list(dict.fromkeys(name for file in files for name in file.listed))
    if not names:
        raise ValueError(f"{first.path} has no categories; add some.")
    return names
