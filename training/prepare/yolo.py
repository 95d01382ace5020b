"""YOLO's labels/*.txt with data.yaml (ultralytics, Roboflow), or with classes.txt (Label Studio); or the boxes beside
the images, with obj.names (CVAT, Darknet) or _darknet.labels (Roboflow). An image has the labels of its boxes or
outlines; one whose file of labels is empty or missing shows none. SOURCE: the folder with data.yaml, or the yaml
file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import yaml

from ..data.formats import NOT_TAGS, Files, yolo_yaml
from ..data.image_files import ImageFinder, find_images
from ..data.label_name_files import read_label_names
from ..data.rows import SPLIT_NAMES
from ..data.text import read_text
from .reading import Reading, Rows, SourceOptions, first_folder, text_lines, usual_name

logger = logging.getLogger(__name__)


Options = SourceOptions


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file and line."""
    files = Files(args.source)
    yamls = [args.source.name] if args.source.is_file() else yolo_yaml(files)
    if len(yamls) > 1:
        raise ValueError(f"{args.source} holds {yamls[0]} and {yamls[1]}; give one of them.")
    if yamls:
        names, parts = _read_yaml(files.root / yamls[0])
    else:
        names, parts = _without_yaml(files.root)
    rows = Rows(files.root, args)
    without = 0
    for split, images in parts.items():
        for image in images:
            path = _labels_of(image, files.root)
            without += not path.is_file()
            labels = _read_labels(path, names) if path.is_file() else ()
            name = image.relative_to(files.root).as_posix() if image.is_relative_to(files.root) else ""
            found = rows.finder.find(name) if name else None
            rows.add(split, found or (image if image.is_file() else None), labels, str(path), name=str(image))
    owned = {_labels_of(files.root / image, files.root) for image in files.images}
    for text in files.by_suffix.get(".txt", ()):
        path = files.root / text
        if "labels" in text.split("/")[:-1] and path.name.lower() not in NOT_TAGS and path not in owned:
            rows.add("", None, (), str(path), name="an image of this name")
    if without == sum(map(len, parts.values())):
        raise ValueError(f"{args.source}: no image has a file of labels; put them into labels/ beside images/.")
    if without:
        logger.warning("%d images have no file of labels and are taken to show none.", without)
    return rows.reading(names)


def _read_yaml(path: Path) -> tuple[list[str], dict[str, list[Path]]]:
    """The names of the classes, and the images of each part."""
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)  # texts as they are written: `no` is a name, not False
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct it.") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if names.keys() != set(map(str, range(len(names)))):
            raise ValueError(f"{path}: the keys of names are {list(names)!r:.80}, but must count from 0.")
        names = [names[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has no list of names; add the names of the classes.")
    if content.get("nc", str(len(names))) != str(len(names)):
        raise ValueError(f"{path} says nc: {content['nc']}, but names {len(names)} classes; correct one of them.")
    parts = {}
    for split in ("train", "val", "valid", "validation", "test"):
        places = content.get(split)
        if places and places not in ("null", "~"):
            images = []
            for place in places if isinstance(places, list) else [places]:
                images += _images_of(path, str(content.get("path") or ""), str(place), split)
            parts[split] = images
    if not parts:
        raise ValueError(f"{path} names no train, val or test; add the folders of images.")
    return [name.strip() for name in names], parts


def _images_of(path: Path, root: str, place: str, split: str) -> list[Path]:
    """The images of a part: of a folder, or of a text file that lists them; places start where some program was run."""
    parts = [part for part in Path(place.replace("\\", "/")).parts if part not in ("..", "/")]
    for base in (path.parent / root, path.parent):
        for start in range(len(parts)):
            there = base.joinpath(*parts[start:])
            if start and not {split, usual_name(split), "images"} & {part.lower() for part in parts[start:]}:
                break  # what is left names no part any more
            if there.is_dir():
                return [there / name for name in find_images(there).names]
            if there.is_file():
                lines = [line for line in text_lines(there) if line]
                finder = ImageFinder(path.parent)
                return [finder.find(line) or there.parent / line for line in lines]
    raise FileNotFoundError(f"{path}: {split}: {place} is not there; correct the path.")


def _without_yaml(root: Path) -> tuple[list[str], dict[str, list[Path]]]:
    usual = ("classes.txt", "labels/classes.txt", "obj.names", "data/obj.names", "*/_darknet.labels", "*.names")
    found = [path for name in usual for path in sorted(root.glob(name)) if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{root} has boxes, but neither data.yaml nor classes.txt nor obj.names with their names; add one."
        )
    names = read_label_names(found[0])
    if odd := next((path for path in found[1:] if read_label_names(path) != names), None):
        raise ValueError(f"{odd} has other names than {found[0]}; make them the same.")
    folder = first_folder(root / "images", root)
    parts: dict[str, list[Path]] = {}
    for name in find_images(folder).names:
        first = next((part for part in name.split("/")[:-1] if part.lower() in SPLIT_NAMES), "")
        parts.setdefault(first, []).append(folder / name)
    return names, parts


def _labels_of(image: Path, root: Path) -> Path:
    """The file of labels of an image: `labels/` in place of the last `images/` below the source."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, len(root.parts) - 1 if image.is_relative_to(root) else -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    path = Path(*parts)
    return next(
        (there for suffix in (".txt", ".TXT") if (there := path.with_suffix(suffix)).is_file()),
        path.with_suffix(".txt"),
    )


def _read_labels(path: Path, names: list[str]) -> list[str]:
    found = set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        cells = line.split()
        if not cells:
            continue
        try:
            label, _ = int(cells[0]), [float(cell) for cell in cells[1:]]
        except ValueError:
            raise ValueError(f"{path}, line {number} is {line!r:.80}, but must be a class and numbers.") from None
        if len(cells) < 5:
            raise ValueError(f"{path}, line {number} is {line!r}, but must be a class and a box of four numbers.")
        if not 0 <= label < len(names):
            raise ValueError(f"{path}, line {number}: class {label} is out of range; there are {len(names)} names.")
        found.add(names[label])
    return sorted(found)
