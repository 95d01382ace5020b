"""webdataset shards: tar files in which the members of one key are a sample, `0001.jpg` with `0001.json` (its labels or
tags), `0001.txt` (tags, divided by commas) or `0001.cls` (class numbers, with a labels.txt beside the shards). The
split is that of the folder or file, `train-000000.tar`. SOURCE: the folder with the shards, or one of them."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..data.formats import Files
from ..data.label_name_files import read_label_names
from ..data.webdataset import SHARD_SUFFIXES, image_suffix, read_samples, sample_labels, split_of
from ..options import option
from .reading import Reading, Rows, SourceOptions


@dataclass(kw_only=True)
class Options(SourceOptions):
    label_column: str | None = option(None, "the field of the json with the labels; null: labels, tags, ...")
    label_separator: str = option(",", "between the tags of a text")


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with the shard and the key."""
    files = Files(args.source)
    shards = sorted(name for name in files.names if name.endswith(SHARD_SUFFIXES))
    if not shards:
        raise FileNotFoundError(f"{args.source} holds no .tar; give the folder of the shards.")
    names = next((read_label_names(path) for path in _names_files(files.root) if path.is_file()), None)
    rows = Rows(None, args)
    # On disk: a shard's images need not fit into memory together.
    folder = tempfile.TemporaryDirectory(prefix="shards-")
    count = 0
    for shard in shards:
        path, split = files.root / shard, split_of(shard)
        for key, parts in read_samples(path):
            where = f"{path}, {key}"
            image = image_suffix(parts, where)
            labels = sample_labels(parts, args.label_column, args.label_separator, names, where)
            if labels is None:
                raise ValueError(f"{where}: has None where its labels should be; write a list or a text.")
            if image is None:
                rows.add(split, None, labels, where, name=key)
                continue
            file = Path(folder.name) / f"{count:08}-{key.rpartition('/')[2][-80:]}{image}"
            file.write_bytes(parts[image])
            count += 1
            rows.add(split, file, labels, where, name=key)
    reading = rows.reading(names)
    reading.held = folder  # goes when the reading does
    return reading


def _names_files(root: Path) -> list[Path]:
    return [root / name for name in ("labels.txt", "classes.txt", "classnames.txt")]
