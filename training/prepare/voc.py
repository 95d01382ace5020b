"""PASCAL VOC and what is annotated like it: JPEGImages/, ImageSets/Main/SET.txt, and labels from Annotations/*.xml or
from ImageSets/Main/CLASS_SET.txt; without ImageSets, every xml with its image beside it or in a folder of images, as
Roboflow, Label Studio and labelImg write them. A label of which an image shows difficult objects only is unknown (as
VOC scores it) or negative (as it is usually trained). By default trainval becomes train and test test. SOURCE:
VOCdevkit/VOC2007, or VOCdevkit where it holds one year; else the folder of the export."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree
from xml.parsers import expat

from ..data.label_name_files import given_names
from ..data.rows import SPLIT_NAMES
from ..data.text import decode_xml
from ..options import LABEL_NAMES, option
from .reading import Reading, Rows, SourceOptions, first_folder, text_lines

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
        years = sorted(path.parent.parent for path in root.rglob("ImageSets/Main"))
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
    if args.labels_from == "image_sets" and not label_names:
        raise FileNotFoundError(f"{main} has no CLASS_SET.txt; take the labels from annotations.")
    folder = first_folder(root / "JPEGImages", root / "images", root)
    rows = Rows(folder, args, unlisted=not args.split)
    every: set[str] = set()
    for name, ids in lists.items():
        if args.labels_from == "image_sets":
            shown = _shown_in_lists(main, name, ids, label_names)
        else:
            shown = {image: _parse_annotation(root / "Annotations" / f"{image}.xml", label_names)[0] for image in ids}
        for image, line in ids.items():
            present, difficult = shown[image]
            every |= present | difficult
            unknown = difficult if args.difficult == "unknown" else ()
            place = f"{main / name}.txt, line {line}"
            rows.add(name, [image], sorted(present), place, unknown=unknown, name=f"{folder / image}.jpg")
    reading = rows.reading(label_names or sorted(every))
    reading.usual_names, reading.title, reading.published = usual, root.name, PUBLISHED.get(root.name, {})
    return reading


def _read_beside(args: argparse.Namespace) -> Reading:
    """Every xml below the source, each with its image; the first folder is the split where it is called so."""
    rows = Rows(args.source, args)
    label_names = given_names(args.label_names)
    for path in sorted(args.source.rglob("*.xml")):
        inside = path.relative_to(args.source).parts[:-1]
        split = inside[0] if inside and inside[0].lower() in SPLIT_NAMES else ""
        (present, difficult), file_name = _parse_annotation(path, label_names)
        unknown = difficult if args.difficult == "unknown" else ()
        names, below = [path.stem, file_name], ["/".join(inside), split]
        rows.add(split, names, sorted(present), str(path), unknown=unknown, name=file_name, below=below)
    return rows.reading(label_names)


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


# Labels that an image shows, and those of which it shows difficult objects only.
Shown = tuple[set[str], set[str]]


def _shown_in_lists(main: Path, name: str, ids: dict[str, int], label_names: list[str]) -> dict[str, Shown]:
    labels: dict[str, Shown] = {image: (set(), set()) for image in ids}
    for label in label_names:
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
            if flags != ["-1"]:
                labels[image][flags == ["0"]].add(label)
        if len(seen) < len(ids):
            absent = next(image for image in ids if image not in seen)
            raise ValueError(f"{path} has no line for {absent}, which {name}.txt lists; add it.")
    return labels


def _parse_annotation(path: Path, label_names: Collection[str] | None) -> tuple[Shown, str]:
    """The labels of an image, and its name.

    Raises:
        ValueError: a label that is not among `label_names`, where there are some; no well-formed XML, a document type
            (it could define entities that grow without bound or read other files; VOC's files have none), an object
            without a name, or difficult other than 0 and 1.
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
    found: Shown = set(), set()
    for element in root.findall("object"):
        where = f"{path}, line {lines[element]}"
        label, difficult = _read_object(element, where)
        if label_names and label not in label_names:
            raise ValueError(
                f"{where}: label {label!r} is not among the {len(label_names)} label names; correct it, or give names "
                "with --label_names."
            )
        found[difficult].add(label)
    return (found[0], found[1] - found[0]), (root.findtext("filename") or "").strip()


def _read_object(element: ElementTree.Element, where: str) -> tuple[str, bool]:
    name = (element.findtext("name") or "").strip()
    difficult = (element.findtext("difficult") or "").strip() or "0"
    if not name:
        raise ValueError(f"{where}: the object has no name; add it.")
    if difficult not in ("0", "1"):
        raise ValueError(f"{where}: difficult is {difficult!r}, but must be 0 or 1.")
    return name, difficult == "1"
