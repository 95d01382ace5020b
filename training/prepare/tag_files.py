"""Images with a file of tags beside each: `1.txt`, `1.caption` or `1.jpg.txt`, as `training.tag --sidecars txt`,
kohya's scripts and booru downloaders write them. Tags are divided by commas, or stand one a line; with
--label_separator " " by blanks. The first folder is the split where it is called so. SOURCE: the folder."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from ..data.formats import Files, tag_files
from ..data.label_name_files import given_names
from ..data.rows import SPLIT_NAMES
from ..data.text import read_text
from ..options import LABEL_NAMES, option
from .reading import Reading, Rows, SourceOptions


@dataclass(kw_only=True)
class Options(SourceOptions):
    unlisted_images: Literal["error", "skip"] = option("error", "without a file of tags; skip leaves out, and says so")
    label_names: list[str] | None = option(None, f"{LABEL_NAMES}; null: all tags there are")
    label_separator: str | None = option(None, "between tags; null: commas or lines, whichever the files use")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the file."""
    files = Files(args.source)
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
        folder = image.partition("/")[0]
        split = folder if "/" in image and folder.lower() in SPLIT_NAMES else ""
        parts = texts[text].replace("\n", separator).split(None if separator == " " else separator)
        tags = [part.strip().replace("\\(", "(").replace("\\)", ")") for part in parts]
        rows.add(split, [image], [tag for tag in tags if tag], str(files.root / text))
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
