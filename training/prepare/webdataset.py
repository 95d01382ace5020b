"""webdataset shards: tar files in which the members of one key are a sample, `0001.jpg` with `0001.json` (its labels or
tags), `0001.txt` (tags, divided by commas) or `0001.cls` (class numbers, with a labels.txt beside the shards). The
split is that of the folder or file, `train-000000.tar`. SOURCE: the folder with the shards, or one of them."""

from __future__ import annotations

import argparse
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling_hsvlt.load_image import MAX_BYTES

from ..data.formats import Files
from ..data.image_files import IMAGE_SUFFIXES
from ..data.label_cells import read_cell
from ..data.label_name_files import read_label_names
from ..data.rows import SPLIT_NAMES
from ..data.text import decode, parse_json
from ..options import option
from .reading import Reading, Rows, SourceOptions, usual_name

_FIELDS = ("labels", "tags", "label", "classes", "class", "categories", "category", "cls", "tag_string")


@dataclass(kw_only=True)
class Options(SourceOptions):
    label_column: str | None = option(None, "the field of the json with the labels; null: labels, tags, ...")
    label_separator: str = option(",", "between the tags of a text")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the shard and the key."""
    files = Files(args.source)
    shards = sorted(name for name in files.names if name.endswith((".tar", ".tar.gz", ".tgz")))
    if not shards:
        raise FileNotFoundError(f"{args.source} holds no .tar; give the folder of the shards.")
    names = next((read_label_names(path) for path in _names_files(files.root) if path.is_file()), None)
    rows = Rows(None, args)
    # On disk: a shard's images need not fit into memory together.
    folder = tempfile.TemporaryDirectory(prefix="shards-")
    count = 0
    for shard in shards:
        path, split = files.root / shard, _split_of(shard)
        for key, parts in _samples(path):
            where = f"{path}, {key}"
            images = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
            if len(images) > 1:
                raise ValueError(f"{where} has several images ({', '.join(images)}); keep one a key.")
            labels = _labels(parts, args, names, where)
            if not images:
                rows.add(split, None, labels, where, name=key)
                continue
            file = Path(folder.name) / f"{count:08}-{key.rpartition('/')[2][-80:]}{images[0]}"
            file.write_bytes(parts[images[0]])
            count += 1
            rows.add(split, file, labels, where, name=key)
    reading = rows.reading(names)
    reading.held = folder  # goes when the reading does
    return reading


def _names_files(root: Path) -> list[Path]:
    return [root / name for name in ("labels.txt", "classes.txt", "classnames.txt")]


def _split_of(shard: str) -> str:
    words = shard.replace("-", "/").replace("_", "/").replace(".", "/").split("/")
    return next((word for word in words if word and usual_name(word).lower() in SPLIT_NAMES), "")


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each key by suffix; a key is what stands before the first dot of a file's name."""
    seen, key, parts = set(), None, {}
    try:
        with tarfile.open(path, "r:*") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                folder, _, file = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = file.partition(".")
                if not stem or not dot:
                    continue  # hidden files, and those of no sample
                name = f"{folder}/{stem}".lstrip("/")
                if name != key:
                    if key is not None:
                        yield key, parts
                    if name in seen:
                        raise ValueError(f"{path}: the key {name} comes twice; give each sample its own.")
                    seen.add(name)
                    key, parts = name, {}
                if member.size > MAX_BYTES:
                    raise ValueError(f"{path}, {member.name} has {member.size:,} bytes, more than {MAX_BYTES:,}.")
                data = shard.extractfile(member).read()
                if len(data) != member.size:
                    raise tarfile.ReadError("unexpected end of data")
                parts[f".{suffix.lower()}"] = data
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole tar file ({error}, after {key}); fetch or write it again.") from error
    if key is not None:
        yield key, parts


def _labels(parts: dict[str, bytes], args: argparse.Namespace, names: list[str] | None, where: str) -> list[str]:
    try:
        if ".json" in parts:
            content = _json(decode(parts[".json"], f"{where}.json"), f"{where}.json")
            value = _field(content, args.label_column)
            separator = " " if isinstance(content, dict) and "tag_string" in content else args.label_separator
        elif ".cls" in parts or ".txt" in parts:
            suffix = ".cls" if ".cls" in parts else ".txt"
            value, separator = decode(parts[suffix], f"{where}{suffix}").strip(), args.label_separator
            if suffix == ".cls":
                value = [int(number) for number in value.replace(",", " ").split()]
        else:
            raise ValueError("has no .json, .txt or .cls with its labels; add one")
        if isinstance(value, str):
            value = read_cell(value, separator)
        value = [value] if isinstance(value, int) else value
        if not isinstance(value, list):
            raise ValueError(f"has {value!r:.60} where its labels should be; write a list or a text")
        return [_name(item, names) for item in value]
    except (ValueError, TypeError) as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {error}.") from error


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} {error}; correct it.") from error


def _field(content: Any, label_column: str | None) -> Any:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise ValueError(f"its json is {content!r:.60}, but must be an object with labels or tags")
    if label_column:
        if label_column not in content:
            raise ValueError(f"its json has no {label_column!r}, only {', '.join(content)}; choose another")
        return content[label_column]
    there = [name for name in _FIELDS if name in content]
    if len(there) > 1:
        raise ValueError(f"its json holds {' and '.join(there)}; choose with --label_column")
    if there:
        return content[there[0]]
    if isinstance(objects := content.get("objects", content.get("annotations")), list):
        return [item.get("category", item.get("label")) if isinstance(item, dict) else item for item in objects]
    raise ValueError(f"its json holds no labels, only {', '.join(content)}; name the field with --label_column")


def _name(item: Any, names: list[str] | None) -> str:
    if isinstance(item, str):
        return item.strip()
    if isinstance(item, bool) or not isinstance(item, int):
        raise ValueError(f"{item!r} is no label")
    if names is None:
        raise ValueError(f"class {item} has no name; put a labels.txt beside the shards, one name a line")
    if not 0 <= item < len(names):
        raise ValueError(f"class {item} is out of range; there are {len(names)} names")
    return names[item]
