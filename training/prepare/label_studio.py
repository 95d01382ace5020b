"""Label Studio's own exports: JSON (a list of tasks with `annotations`), JSON_MIN and CSV (a row a task, with
`annotation_id`, `annotator` and `lead_time`). Choices and the labels of regions count alike. A task that nobody
annotated, or whose annotation was cancelled, takes no part; where annotators disagree about a label it is unknown.
SOURCE: the export beside the images (as they were uploaded, or below a folder), or the file."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..data.csv_table import read_table
from ..data.formats import LABEL_STUDIO_COLUMNS, Files, label_studio_files
from ..data.image_files import IMAGE_SUFFIXES
from ..data.label_cells import read_cell
from ..options import option
from .reading import Reading, Rows, SourceOptions, read_json

logger = logging.getLogger(__name__)

# Of a row, beside the data and the labels.
_OWN = LABEL_STUDIO_COLUMNS | {"id", "created_at", "updated_at", "total_annotations", "agreement", "comment"}


@dataclass(kw_only=True)
class Options(SourceOptions):
    image_folder: str | None = option(None, "where the images are; null: below SOURCE")
    label_column: str | None = option(None, "of a CSV or JSON_MIN with several; null: the one there")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the file and the task."""
    files = Files(args.source)
    names = label_studio_files(files) if args.source.is_dir() else [args.source.name]
    if not names:
        raise FileNotFoundError(f"{args.source} holds no export of Label Studio; give its JSON, JSON_MIN or CSV file.")
    if len(names) > 1:
        raise ValueError(
            f"{args.source} holds {names[0]} and {names[1]}, which may be the same tasks; give one of them."
        )
    path = files.root / names[0]
    rows = Rows(Path(args.image_folder) if args.image_folder else files.root, args)
    if path.suffix.lower() in (".csv", ".tsv"):
        tasks = _rows_of_table(path, args.label_column)
    else:
        tasks = _tasks(path, args.label_column)
    waiting = 0
    for where, image, readings in tasks:
        if not readings:
            waiting += 1
            continue
        present, seen = set.intersection(*readings), set.union(*readings)
        rows.add("", _names_of(image), sorted(present), where, unknown=sorted(seen - present), name=image)
    if waiting:
        logger.warning("Left out: %d tasks of %s that have no annotation.", waiting, path)
    return rows.reading()


def _tasks(path: Path, label_column: str | None) -> Iterator[tuple[str, str, list[set[str]]]]:
    """Words for the place, the image, and the labels by each annotator, of every task of a JSON export."""
    listed = read_json(path)
    if not isinstance(listed, list):
        raise ValueError(f"{path} must hold a list of tasks, as Label Studio exports it.")
    for number, task in enumerate(listed):
        where = f"{path}, task {number}"
        if not isinstance(task, dict):
            raise ValueError(f"{where} is {task!r:.80}, but must be an object.")
        annotations = task.get("annotations", task.get("completions"))
        if "data" not in task or annotations is None:
            labels = _flat(task, where, label_column)
            yield where, _image_of(task, where), [labels]
            continue
        if not isinstance(annotations, list) or not isinstance(task["data"], dict):
            raise ValueError(f"{where} must hold data and a list of annotations.")
        readings = []
        for annotation in annotations:
            results = annotation.get("result") if isinstance(annotation, dict) else None
            if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
                raise ValueError(f"{where}: an annotation has no list of results; export it again.")
            if not (annotation.get("was_cancelled") or annotation.get("skipped")):
                values = (result.get("value") for result in results)
                readings.append({name for value in values for name in _names(value, where)})
        yield where, _image_of(task["data"], where), readings


def _names(value: Any, where: str) -> list[str]:
    """The labels of a result: its `choices`, `rectanglelabels`, `labels`, ...; numbers and texts are none."""
    found = []
    for key, names in value.items() if isinstance(value, dict) else ():
        if key in ("choices", "taxonomy") or key.endswith("labels"):
            for name in names if isinstance(names, list) else [names]:
                name = name[-1] if isinstance(name, list) and name else name  # the leaf of a taxonomy
                if not isinstance(name, str):
                    raise ValueError(f"{where}: {key} holds {name!r}, which is no label.")
                found.append(name.strip())
    return found


def _flat(task: dict, where: str, label_column: str | None) -> set[str]:
    """The labels of a task of JSON_MIN or a row: in one field a name, a list of names, or regions with labels."""
    image = _image_of(task, where)
    fields = {key: value for key, value in task.items() if key not in _OWN and value != image}
    if label_column:
        fields = {label_column: task.get(label_column)}
    found, names = [], set()
    for key, value in fields.items():
        labels = _field(value, where)
        if labels is not None:
            found.append(key)
            names |= labels
    if len(found) > 1 and not label_column:
        raise ValueError(f"{where} holds labels in {' and '.join(sorted(found))}; choose with --label_column.")
    return names


def _field(value: Any, where: str) -> set[str] | None:
    if isinstance(value, str):
        return {value.strip()} if value.strip() else None
    if isinstance(value, dict):
        return set(_names(value, where)) if any(key == "choices" or key.endswith("labels") for key in value) else None
    if isinstance(value, list):
        names = [name for item in value for name in ([item] if isinstance(item, str) else _names(item, where))]
        return {name.strip() for name in names}
    return None


def _rows_of_table(path: Path, label_column: str | None) -> Iterator[tuple[str, str, list[set[str]]]]:
    """As `_tasks`, of a CSV; several rows of one image are several annotators."""
    header, rows = read_table(path)
    readings: dict[str, tuple[str, list[set[str]]]] = {}
    for line, cells in rows:
        where = f"{path}, line {line}"
        task: dict[str, Any] = dict(zip(header, cells, strict=True))
        image = _image_of(task, where)
        for key, cell in task.items():
            text = cell.strip()
            if key not in _OWN and cell != image and text[:1] in ("[", "{"):
                try:
                    task[key] = json.loads(text)
                except ValueError:
                    try:
                        task[key] = read_cell(text)
                    except ValueError as error:
                        raise ValueError(f"{where}: {text[:80]!r} {error}.") from error
        _, of_image = readings.setdefault(image, (where, []))
        of_image.append(_flat(task, where, label_column))
    for image, (where, of_image) in readings.items():
        yield where, image, of_image


def _image_of(data: dict, where: str) -> str:
    """The one value of a task that names an image file."""
    found = []
    for key, value in data.items():
        if isinstance(value, str) and key not in _OWN:
            path = _path_of(value)
            if "." + path.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not value.lstrip().startswith(("[", "{")):
                found.append(value)
    named = [value for key, value in data.items() if key in ("image", "img", "file_upload") and value in found]
    if len(set(found)) != 1 and len(set(named)) != 1:
        what = "no image" if not found else f"several images ({found[0]}, {found[1]})"
        raise ValueError(f"{where} names {what}; export it again.")
    return (named or found)[0]


def _path_of(image: str) -> str:
    """The path in `/data/local-files/?d=a/b.jpg`, `s3://bucket/a/b.jpg`, `https://host/a/b.jpg`."""
    parts = urlsplit(image)
    inner = parse_qs(parts.query).get("d") or parse_qs(parts.query).get("fileuri")
    return inner[0] if inner else unquote(parts.path) if parts.scheme or "%" in image else image


def _names_of(image: str) -> list[str]:
    """How an image may be called; an upload is `/data/upload/PROJECT/HASH-name.jpg`, and may lie there without its
    hash."""
    path = re.sub(r"^.*?/?data/upload/(\d+/)?", "", _path_of(image))
    file = path.replace("\\", "/").rpartition("/")[2]
    return [path, file, re.sub(r"^[0-9a-f]{8}-", "", file)]
