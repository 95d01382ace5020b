"""Images with a file of tags beside each: `1.txt`, `1.caption` or `1.jpg.txt`, as `training.tag --sidecars txt`,
kohya's scripts and booru downloaders write them. Tags are divided by commas, or stand one a line; with
--label_separator " " by blanks. Or kohya's one json for all, `meta_cap.json` or `meta_lat.json`, which maps images to
`tags` or `caption`. The first folder is the split where it is called so. SOURCE: the folder, or the json."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..data.formats import YOLO_LINE, Files, kohya_files, tag_files
from ..data.label_name_files import given_names
from ..data.rows import SPLIT_NAMES
from ..data.text import read_text
from ..options import LABEL_NAMES, option
from .reading import Reading, Rows, SourceOptions, read_json


@dataclass(kw_only=True)
class Options(SourceOptions):
    unlisted_images: Literal["error", "skip"] = option("error", "without a file of tags; skip leaves out, and says so")
    label_names: list[str] | None = option(None, f"{LABEL_NAMES}; null: all tags there are")
    label_separator: str | None = option(None, "between tags; null: commas or lines, whichever the files use")
    label_column: str | None = option(None, "of kohya's json: tags or caption; null: tags")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the file."""
    files = Files(args.source)
    if found := [args.source.name] if args.source.is_file() else kohya_files(files):
        return _read_json(files, found, args)
    pairs = tag_files(files)
    if not pairs:
        raise FileNotFoundError(f"{args.source} has no image with a .txt or .caption beside it; give another folder.")
    owners = Counter(text for _, text in pairs)
    shared = [image for image, text in pairs if owners[text] > 1]
    if shared:
        raise ValueError(
            f"{args.source}: {shared[0]} and {shared[1]} share one file of tags; call each after its whole image, as "
            f"{shared[0]}.txt."
        )
    texts = {text: read_text(files.root / text).strip() for _, text in pairs}
    separator = args.label_separator or _separator(texts, str(args.source))
    rows = Rows(files.root, args)
    for image, text in sorted(pairs):
        for number, line in enumerate(texts[text].split("\n"), 1):
            if YOLO_LINE.fullmatch(line):
                raise ValueError(f"{files.root / text}, line {number} is a box of YOLO, {line!r:.60}; prepare yolo it.")
        rows.add(_split_of(image), [image], _tags(texts[text], separator), str(files.root / text))
    return rows.reading(given_names(args.label_names))


def _split_of(image: str) -> str:
    folder = image.partition("/")[0]
    return folder if "/" in image and folder.lower() in SPLIT_NAMES else ""


def _tags(text: str, separator: str) -> list[str]:
    parts = text.replace("\n", separator).split(None if separator == " " else separator)
    tags = [part.strip().replace("\\(", "(").replace("\\)", ")") for part in parts]
    return [tag for tag in tags if tag]


def _read_json(files: Files, found: list[str], args: argparse.Namespace) -> Reading:
    """Images are named by their path on the machine of then, or by their name without suffix. One without tags counts
    as unlisted."""
    if len(found) > 1:
        raise ValueError(f"{args.source} holds {found[0]} and {found[1]}, which may be of the same images; give one.")
    path, field = files.root / found[0], args.label_column or "tags"
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must map names of images to their tags.")
    texts = {}
    for image, entry in content.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(field, ""), str):
            raise ValueError(f"{path}, {image!r} is {entry!r:.80}, but must be an object with a text {field!r}.")
        if field in entry:
            texts[image] = entry[field].strip()
    if not texts:
        raise ValueError(f"{path} has no {field!r}; choose another with --label_column, if tags stand there.")
    separator = args.label_separator or _separator(texts, str(path))
    rows = Rows(files.root, args)
    for image, text in texts.items():
        where = f"{path}, {image!r}"
        try:
            there = rows.finder.find(image)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from error
        split = "" if there is None else _split_of(there.relative_to(files.root).as_posix())
        rows.add(split, there, _tags(text, separator), where, name=image)
    return rows.reading(given_names(args.label_names))


def _separator(texts: dict[str, str], source: str) -> str:
    """
    Raises:
        ValueError: no file tells whether blanks stand within tags or between them.
    """
    if any("," in text for text in texts.values()):
        return ","
    if any("\n" in text for text in texts.values()):
        return "\n"
    doubtful = [name for name, text in texts.items() if len(text.split()) > 1]
    if not doubtful:
        return ","
    if any("_" in text for text in texts.values()):  # boorus write blanks within tags so
        return " "
    raise ValueError(
        f"{source}/{doubtful[0]} is {texts[doubtful[0]]!r:.80}, which may be one tag or several; say --label_separator "
        "',' or --label_separator ' '."
    )
