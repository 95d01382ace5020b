"""What a folder or file of a data set is, told by its structure: for `prepare auto`, and errors that name a command.

Recognising reads names, and the first and last letters of a few files, never a whole data set.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

from .image_files import IMAGE_SUFFIXES, STORAGE
from .rows import SPLIT_NAMES
from .text import delimiter_of

_PEEK = 2**18  # bytes at each end of a file
NOT_TAGS = frozenset(("labels.txt", "classes.txt", "readme.txt", "license.txt", "notes.txt", "requirements.txt"))
NOT_LABELS = STORAGE | {"labels", "annotations"}
YOLO_LINE = re.compile(r"\d+(\s+-?\d*\.?\d+([eE][-+]?\d+)?){4,}\s*")


class Files:
    """The names of all files of a source, relative to its folder; hidden ones are none."""

    def __init__(self, source: Path):
        self.source = source
        self.root = source if source.is_dir() else source.parent
        self.names = [source.name]
        if source.is_dir():
            self.names = []
            for root, folders, files in os.walk(source, followlinks=False):
                folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
                relative = os.path.relpath(root, source)
                prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
                self.names += [prefix + name for name in sorted(files) if not name.startswith(".")]

    @cached_property
    def by_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
        return found

    @cached_property
    def images(self) -> list[str]:
        return [name for suffix in IMAGE_SUFFIXES for name in self.by_suffix.get(suffix, ())]

    def peek(self, name: str) -> str:
        """The first and last letters of a file, whatever they are encoded as."""
        with (self.root / name).open("rb") as file:
            data = file.read(_PEEK)
            size = os.fstat(file.fileno()).st_size
            if size > _PEEK:
                file.seek(max(_PEEK, size - _PEEK))
                data += b"\n" + file.read(_PEEK)
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        return re.sub("\r\n?", "\n", data.decode(encoding, errors="replace"))

    def header(self, name: str) -> list[str]:
        """The names of the columns of a CSV."""
        line = self.peek(name).partition("\n")[0]
        try:
            return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter_of(name, line)), [])]
        except csv.Error:  # its reader says what is wrong
            return []

    @cached_property
    def tables(self) -> dict[str, list[str]]:
        """The columns of every CSV that is no list of tags."""
        names = [*self.by_suffix.get(".csv", ()), *self.by_suffix.get(".tsv", ())]
        names = [name for name in names if name.count("/") <= 2 and not name.endswith("selected_tags.csv")]
        return {name: self.header(name) for name in names[:100]}


def with_other_splits(found: Iterable[str], names: Iterable[str]) -> list[str]:
    """The files found, and those called like one of them but for the split: one that is empty or damaged is to be read
    as well, and refused, so that it does not pass for absent."""

    def bare(name: str) -> list[str]:
        words = re.findall(r"[a-z]+|.", name.lower())
        return ["split" if word in SPLIT_NAMES else word for word in words]

    found = list(found)
    wanted = [bare(name) for name in found]
    return found + [name for name in names if name not in found and bare(name) in wanted]


def coco_files(files: Files) -> list[str]:
    """JSON files with two or more of COCO's three lists, in the root, in annotations/ or in a folder of a split."""
    usual = SPLIT_NAMES | {"annotations", ""}
    names = [name for name in files.by_suffix.get(".json", ()) if name.count("/") <= 2]
    names = [name for name in names if name.rpartition("/")[0].partition("/")[0].lower() in usual]
    keys = ("images", "annotations", "categories")
    found = []
    for name in names[:100]:
        text = files.peek(name)
        if text.lstrip()[:1] == "{" and sum(bool(re.search(rf'"{key}"\s*:\s*\[', text)) for key in keys) >= 2:
            found.append(name)
    return with_other_splits(found, names)


def _coco(files: Files) -> str | None:
    found = coco_files(files)
    if not found:
        return None
    name = found[0].rpartition("/")[2]
    text = files.peek(found[0])
    tool = {
        "_annotations.coco.json": "Roboflow",
        "result.json": "Label Studio",
        "instances_default.json": "CVAT",
        "labels.json": "FiftyOne",
    }.get(name, "LVIS" if "neg_category_ids" in text or name.startswith("lvis") else "")
    return f"COCO json ({', '.join(found[:3])}){f', as {tool} writes it' if tool else ''}"


LABEL_STUDIO_COLUMNS = {"annotation_id", "annotator", "lead_time"}


def label_studio_files(files: Files) -> list[str]:
    """JSON lists of tasks, and tables with Label Studio's columns."""
    found = [name for name, header in files.tables.items() if len(LABEL_STUDIO_COLUMNS & set(header)) >= 2]
    for name in files.by_suffix.get(".json", ())[:100]:
        text = files.peek(name).lstrip()
        own = re.search(r'"(annotations|completions)"\s*:\s*\[', text) and re.search(r'"data"\s*:\s*\{', text)
        small = sum(f'"{column}"' in text for column in LABEL_STUDIO_COLUMNS) >= 2
        if text[:1] == "[" and (own or small):
            found.append(name)
    return found


def _label_studio(files: Files) -> str | None:
    found = label_studio_files(files)
    return f"Label Studio's own export ({found[0]})" if found else None


def yolo_yaml(files: Files) -> list[str]:
    """`data.yaml` and what else names classes and parts."""
    names = [*files.by_suffix.get(".yaml", ()), *files.by_suffix.get(".yml", ())]
    return [
        name
        for name in names[:100]
        if name.count("/") <= 1 and re.search(r"^names\s*:", text := files.peek(name), re.M)
        if re.search(r"^(train|val|test|path|nc)\s*:", text, re.M)
    ]


def _yolo(files: Files) -> str | None:
    if found := yolo_yaml(files):
        return f"YOLO ({found[0]})"
    texts = [name for name in files.by_suffix.get(".txt", ()) if "labels" in name.split("/")[:-1]]
    texts = texts or [text for _, text in tag_files(files)]
    if texts and any(YOLO_LINE.fullmatch(line) for name in texts[:20] for line in files.peek(name).splitlines()[:1]):
        return "YOLO's boxes in *.txt"
    return None


def _voc(files: Files) -> str | None:
    if any("ImageSets/Main/" in name for name in files.by_suffix.get(".txt", ())):
        return "PASCAL VOC with ImageSets/Main"
    for name in files.by_suffix.get(".xml", ())[:20]:
        if re.search(r"<annotation[\s>]", files.peek(name)):
            return "PASCAL VOC's xml beside the images"
    return None


def _nuswide(files: Files) -> str | None:
    return "NUS-WIDE's lists" if any(name.endswith("Concepts81.txt") for name in files.names) else None


def _by_columns(words: str, *columns: str) -> Callable[[Files], str | None]:
    def recognise(files: Files) -> str | None:
        for name, header in files.tables.items():
            if set(columns) <= set(header):
                return f"{words} ({name})"
        return None

    return recognise


OBJECT_COLUMNS = ({"ImageID", "LabelName"}, {"filename", "class", "xmin"}, {"image", "label", "xmin"})


def object_tables(files: Files) -> list[str]:
    """Tables with a row an object."""
    found = [name for name, header in files.tables.items() if any(want <= set(header) for want in OBJECT_COLUMNS)]
    return with_other_splits(found, files.tables)


def _objects(files: Files) -> str | None:
    found = object_tables(files)
    tool = "OpenImages" if found and "LabelName" in files.tables[found[0]] else "a row an object"
    return f"a table of objects ({found[0]}: {tool})" if found else None


def _roboflow_csv(files: Files) -> str | None:
    found = [name for name in files.tables if name.rpartition("/")[2] == "_classes.csv"]
    return f"Roboflow's {found[0]}" if found else None


def isic_tables(files: Files) -> list[str]:
    """Tables of `image` and one column a label whose first name has no suffix."""
    found = []
    for name, header in files.tables.items():
        lines = files.peek(name).splitlines()
        if header[:1] == ["image"] and len(header) > 2 and len(lines) > 1:
            first, *cells = [cell.strip() for cell in lines[1].split(",")]
            numbers = all(re.fullmatch(r"-?\d*\.?\d*", cell) for cell in cells)
            if numbers and os.path.splitext(first)[1].lower() not in IMAGE_SUFFIXES:
                found.append(name)
    return with_other_splits(found, files.tables)


def _isic(files: Files) -> str | None:
    found = isic_tables(files)
    return f"ISIC's table of image and one column a label ({found[0]})" if found else None


def _webdataset(files: Files) -> str | None:
    found = [*files.by_suffix.get(".tar", ()), *(name for name in files.names if name.endswith((".tar.gz", ".tgz")))]
    return f"webdataset shards ({found[0]}, ...)" if found else None


def _dataset(files: Files) -> str | None:
    there = set(files.names)
    if there & {"dataset_dict.json", "state.json"}:
        return "a data set that save_to_disk wrote"
    return "parquet files" if files.by_suffix.get(".parquet") else None


def _image_folder(files: Files) -> str | None:
    found = [name for name in files.by_suffix.get(".jsonl", ()) if name.rpartition("/")[2] == "metadata.jsonl"]
    return f"images beside {found[0]}" if any(name.count("/") <= 1 for name in found) else None


def _csv(files: Files) -> str | None:
    return f"tables of file names and labels ({next(iter(files.tables))})" if files.tables else None


def tag_files(files: Files) -> list[tuple[str, str]]:
    """(image, its file of tags) of all images that have one: `1.txt`, `1.caption` or `1.jpg.txt`."""
    texts = {
        name
        for suffix in (".txt", ".caption")
        for name in files.by_suffix.get(suffix, ())
        if name.rpartition("/")[2].lower() not in NOT_TAGS
    }
    pairs = []
    for image in files.images if texts else ():
        stem = os.path.splitext(image)[0]
        found = [
            name for name in (f"{image}.txt", f"{image}.caption", f"{stem}.txt", f"{stem}.caption") if name in texts
        ]
        if found:
            pairs.append((image, found[0]))
    return pairs


def kohya_files(files: Files) -> list[str]:
    """JSON files that map images to their tags or captions, `meta_cap.json` and `meta_lat.json`."""
    begin = re.compile(r'\{\s*"[^"]+"\s*:\s*\{\s*"(tags|caption|train_resolution)"\s*:')
    return [name for name in files.by_suffix.get(".json", ())[:100] if begin.match(files.peek(name).lstrip())]


def _tag_files(files: Files) -> str | None:
    if found := kohya_files(files):
        return f"kohya's tags of all images ({found[0]})"
    pairs = tag_files(files)
    return f"files of tags beside the images ({pairs[0][1]}, ...)" if pairs else None


def label_folders(files: Files) -> bool:
    """Whether every image stands in a folder of its label, with or without a folder of its split above."""
    depths, folders = set(), set()
    for name in files.images:
        parts = name.split("/")[:-1]
        if len(parts) > 1 and parts[0].lower() in SPLIT_NAMES:  # train/1.jpg shows a train
            parts = parts[1:]
        depths.add(len(parts))
        folders.update(parts[-1:])
    return depths == {1} and not {folder.lower() for folder in folders} & NOT_LABELS


def _label_folders(files: Files) -> str | None:
    """Folders of images and of nothing else: beside annotations that are not known here, they may be anything."""
    annotations = [name for suffix in (".json", ".xml") for name in files.by_suffix.get(suffix, ())]
    annotations += [name for name in files.by_suffix.get(".txt", ()) if "/" in name]
    several = len({name.rpartition("/")[0].rpartition("/")[2] for name in files.images}) > 1
    return "a folder for each label" if several and not annotations and label_folders(files) else None


# The first that speaks is right, but for those further down that say something else of the same files.
RECOGNISERS: dict[str, Callable[[Files], str | None]] = {
    "dataset": _dataset,
    "webdataset": _webdataset,
    "nuswide": _nuswide,
    "imagefolder": _image_folder,
    "coco": _coco,
    "label_studio": _label_studio,
    "yolo": _yolo,
    "voc": _voc,
    "chestxray14": _by_columns("ChestX-ray14's table", "Image Index", "Finding Labels"),
    "chexpert": _by_columns("CheXpert's table", "Path", "No Finding"),
    "planet": _by_columns("Planet's table", "image_name", "tags"),
    "roboflow_csv": _roboflow_csv,
    "objects": _objects,
    "isic": _isic,
    "csv": _csv,
    "tag_files": _tag_files,
    "label_folders": _label_folders,
}
# What may lie about beside data of any other format.
FALLBACKS = ("csv", "tag_files", "label_folders")
# What `load` reads itself.
LOADABLE = ("dataset", "imagefolder", "csv")


def recognise(source: Path) -> dict[str, str]:
    """What a source may be, in words, by kind; more than one only where that cannot be told from its structure."""
    files = Files(source)
    found = {}
    for kind, look in RECOGNISERS.items():
        if kind in FALLBACKS and found:
            break
        if words := look(files):
            found[kind] = words
    return found


def command_for(source: Path) -> str | None:
    """The sentence for a source that only `training.prepare` reads; None for any other."""
    if not source.exists():
        return None
    found = recognise(source)
    if not found or any(kind in LOADABLE for kind in found):
        return None
    kind, words = next(iter(found.items()))
    command = f"prepare {kind} {source} TARGET"
    return f"{source} is {words}; make a data set of it first: hsvlt {command}, or python -m training.{command}"
