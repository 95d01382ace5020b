"""PASCAL VOC and what is annotated like it: JPEGImages/, ImageSets/Main/SET.txt, and labels from Annotations/*.xml or
from ImageSets/Main/CLASS_SET.txt; without ImageSets, every xml with its image beside it or in a folder of images, as
Roboflow, Label Studio and labelImg write them. A label of which an image shows difficult objects only is unknown (as
VOC scores it) or negative (as it is usually trained). By default trainval becomes train and test test. SOURCE:
VOCdevkit/VOC2007, or VOCdevkit where it holds one year; else the folder of the export."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import pyarrow as pa

from modeling_hsvlt.losses_multilabel import UNKNOWN_LABEL

from ..data.image_files import ImageFinder
from ..data.label_name_files import given_names
from ..data.rows import SPLIT_ALIASES, SPLIT_NAMES
from ..data.text import decode_xml
from ..options import LABEL_NAMES, option
from .reading import NamedRows, Reading, Rows, SourceOptions, checked, first_folder, text_lines

PUBLISHED = {"VOC2007": {"trainval": (5_011, None), "test": (4_952, None)}}


@dataclass(kw_only=True)
class Options(SourceOptions):
    difficult: Literal["unknown", "negative"] = option(
        "negative", "labels of which an image shows difficult objects only; negative, as papers train"
    )
    labels_from: Literal["annotations", "image_sets"] = option(
        "annotations", "Annotations/*.xml, or the lists of ImageSets/Main"
    )
    label_names: list[str] | None = option(None, f"{LABEL_NAMES}; null: the classes of ImageSets/Main, by name")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file and line."""
    root = args.source
    if not (root / "ImageSets" / "Main").is_dir():
        years = sorted(path.parent.parent for path in root.glob("*/ImageSets/Main"))
        if not years and any(root.rglob("*.xml")):
            return _read_beside(args)
        if len(years) != 1:
            raise FileNotFoundError(
                f"{root} has no ImageSets/Main" + (f"; give one of {', '.join(map(str, years))}." if years else ".")
            )
        root = years[0]
    main = root / "ImageSets" / "Main"
    sets = {path.stem for path in main.glob("*.txt")}
    sets = sets & {"train", "val", "trainval", "test"} or sets & {"default"}
    usual = {"trainval": "train", "test": "test"} if "trainval" in sets else {"train": "train", "val": "validation"}
    usual |= {"test": "test", "default": "train"}
    wanted = dict(args.split).keys() if args.split else [name for name in usual if name in sets]
    if not wanted:
        raise FileNotFoundError(f"{main} has no trainval.txt, train.txt, val.txt or test.txt.")
    lists = {name: _read_set(main / f"{name}.txt") for name in wanted}
    label_names = given_names(args.label_names)
    if label_names is None:
        found = {path.stem.removesuffix(f"_{name}") for name in wanted for path in main.glob(f"*_{name}.txt")}
        label_names = sorted(found)
    difficult = UNKNOWN_LABEL if args.difficult == "unknown" else 0
    if args.labels_from == "image_sets":
        if not label_names:
            raise FileNotFoundError(f"{main} has no CLASS_SET.txt; take the labels from annotations.")
        labels = {name: _labels_of_lists(main, name, ids, label_names) for name, ids in lists.items()}
    else:
        objects = {
            name: {image: _read_annotation(root / "Annotations" / f"{image}.xml") for image in ids}
            for name, ids in lists.items()
        }
        if not label_names:
            label_names = sorted({label for ids in objects.values() for found in ids.values() for label, *_ in found})
        labels = {name: _labels_of_objects(ids, label_names) for name, ids in objects.items()}
    splits, finder = {}, ImageFinder(first_folder(root / "JPEGImages", root / "images", root))
    for name, ids in lists.items():
        rows = Rows(args.missing_images)
        for image, line in ids.items():
            values = labels[name][image]
            where = f"{main / name}.txt, line {line}"
            values = np.where(values == 0, difficult, values > 0).astype(np.float32)
            rows.add(finder.find(image) or finder.folder / f"{image}.jpg", values, where)
        splits[name] = rows.dataset(pa.float32())
    return Reading(
        splits=checked(splits, label_names, "multi_hot"),
        label_names=label_names,
        usual_names={name: usual.get(name) or SPLIT_ALIASES.get(name, name) for name in splits},
        title=root.name,
        published={name: counts for name, counts in PUBLISHED.get(root.name, {}).items() if name in splits},
    )


def _read_beside(args: argparse.Namespace) -> Reading:
    """Every xml below the source, each with its image; the first folder is the split where it is called so."""
    rows = NamedRows(ImageFinder(args.source), args.missing_images, args.unlisted_images)
    for path in sorted(args.source.rglob("*.xml")):
        inside = path.relative_to(args.source).parts[:-1]
        split = inside[0] if inside and inside[0].lower() in SPLIT_NAMES else ""
        objects, file_name = _parse_annotation(path)
        present = {label for label, difficult, _ in objects if not difficult}
        difficult = {label for label, *_ in objects} - present
        name, where = path.stem, str(path)
        below = "/".join(inside)
        try:
            image = rows.finder.find(name, below, split) or rows.finder.find(file_name, below, split)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
        unknown = difficult if args.difficult == "unknown" else ()
        rows.add(split, image, sorted(present), where, unknown=unknown, name=file_name or name)
    return rows.reading(given_names(args.label_names))


def _read_set(path: Path) -> dict[str, int]:
    """Image ids of a list, with their lines."""
    lines: dict[str, int] = {}
    for number, line in enumerate(text_lines(path), 1):
        if len(line.split()) != 1 or "/" in line or "\\" in line:
            raise ValueError(f"{path}, line {number} is {line!r}, but must be one image's id.")
        if line in lines:
            raise ValueError(f"{path}, line {number}: {line} is listed before on line {lines[line]}; keep one.")
        lines[line] = number
    return lines


# Below, an image's labels are (num_labels,) int8 in VOC's own code: 1 present, 0 difficult objects only, -1 absent.


def _labels_of_lists(main: Path, name: str, ids: dict[str, int], label_names: list[str]) -> dict[str, np.ndarray]:
    labels = {image: np.zeros(len(label_names), dtype=np.int8) for image in ids}
    for column, label in enumerate(label_names):
        path, seen = main / f"{label}_{name}.txt", set()
        for number, line in enumerate(text_lines(path), 1):
            image, *flags = line.split() or [""]
            if flags not in (["1"], ["0"], ["-1"]):
                raise ValueError(f"{path}, line {number} is {line!r}, but must be an image's id and 1, 0 or -1.")
            if image not in labels:
                raise ValueError(f"{path}, line {number}: {image} is not listed in {name}.txt; take it out.")
            if image in seen:
                raise ValueError(f"{path}, line {number}: {image} is listed before; keep one of its lines.")
            seen.add(image)
            labels[image][column] = int(flags[0])
        if len(seen) < len(ids):
            absent = next(image for image in ids if image not in seen)
            raise ValueError(f"{path} has no line for {absent}, which {name}.txt lists; add it.")
    return labels


def _labels_of_objects(objects: dict[str, list], label_names: list[str]) -> dict[str, np.ndarray]:
    index = {label: column for column, label in enumerate(label_names)}
    labels = {}
    for image, found in objects.items():
        values = np.full(len(label_names), -1, dtype=np.int8)
        for label, difficult, where in found:
            if label not in index:
                raise ValueError(
                    f"{where}: label {label!r} is not among the {len(index)} label names; correct it, or give names "
                    "with --label_names."
                )
            values[index[label]] = max(values[index[label]], 0 if difficult else 1)
        labels[image] = values
    return labels


def _read_annotation(path: Path) -> list[tuple[str, bool, str]]:
    return _parse_annotation(path)[0]


def _parse_annotation(path: Path) -> tuple[list[tuple[str, bool, str]], str]:
    """Label, whether difficult, and the words for file and line, of each object; and the name of the image.

    Raises:
        ValueError: no well-formed XML, a document type (it could define entities that grow without bound or read other
            files; VOC's files have none), an object without a name, or difficult other than 0 and 1.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; add it, or take the image out of the list.")
    builder, lines = ElementTree.TreeBuilder(), {}
    parser = expat.ParserCreate()

    def start(tag: str, attributes: dict) -> None:
        lines[builder.start(tag, attributes)] = parser.CurrentLineNumber

    def refuse(*_) -> None:
        raise ValueError(f"{path}, line {parser.CurrentLineNumber} has a document type, which is refused; take it out.")

    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(decode_xml(path.read_bytes(), path), True)
    except expat.ExpatError as error:
        raise ValueError(f"{path}, line {error.lineno} is not well-formed XML ({error}); correct it.") from error
    root = builder.close()
    if root.tag != "annotation":
        raise ValueError(f"{path}, line {lines[root]}: the root is {root.tag!r}, but must be 'annotation'.")
    objects = [_read_object(element, f"{path}, line {lines[element]}") for element in root.findall("object")]
    return objects, (root.findtext("filename") or "").strip()


def _read_object(element: ElementTree.Element, where: str) -> tuple[str, bool, str]:
    name = (element.findtext("name") or "").strip()
    difficult = (element.findtext("difficult") or "").strip() or "0"
    if not name:
        raise ValueError(f"{where}: the object has no name; add it.")
    if difficult not in ("0", "1"):
        raise ValueError(f"{where}: difficult is {difficult!r}, but must be 0 or 1.")
    return name, difficult == "1", where
