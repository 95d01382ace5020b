"""Where `training.tag` takes its images from: a folder tree, a list of files, or a data set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from datasets import Dataset

from modeling_hsvlt.load_video import NEEDS_PYAV, can_read_videos, is_video

from ..data.image_files import find_images, is_image
from ..data.load import load_images
from ..data.rows import SPLIT_ALIASES, fingerprint_images, no_such_split
from ..data.shards import Shards, are_tables_of_shards, open_shards
from ..data.stream_order import one_pass
from ..data.text import read_text
from ..data.webdataset import SHARD_SUFFIXES
from ..options import DatasetOptions

_URLS = ("http://", "https://", "data:image/")
# What makes a folder a data set and not a tree of images.
DATASET_FILES = ("dataset_dict.json", "state.json", "*.parquet", "*/*.parquet", "*.arrow", "*/*.arrow")


class FileSource:
    """Image files, known by their names relative to `root` (or absolute ones, or the URLs, of a list).

    A name that is not UTF-8 is known by itself with `\\xe9` for such a byte: no file of results could hold it.

    Attributes:
        keys: What the images and videos are known by.
        videos: Which of them are videos.
        left_out: How many files took no part, by the reason.
    """

    key_name = "file_name"

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        left_out: Mapping[str, int] | None = None,
        videos: Collection[str] = (),
    ):
        self.root, self.left_out, self.videos = root, dict(left_out or {}), set()
        self._names: dict[str, str] = {}  # of those whose key is another
        keys: dict[str, None] = {}
        for name in names:
            key = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
            while key != name and (key in keys or key in self._names):
                key += "\\"
            if key != name:
                self._names[key] = name
            keys[key] = None
            if name in videos:
                self.videos.add(key)
        self.keys = list(keys)

    def path(self, key: str) -> Path:
        return self.root / self._names.get(key, key)

    def image(self, key: str) -> Path | str:
        """What `load_image` takes: a file, or a URL."""
        return key if self.is_url(key) else self.path(key)

    def where(self, key: str) -> str:
        """How a list calls an image."""
        return key if self.is_url(key) else os.path.abspath(self.root / key)

    def fingerprint(self, count: int) -> str | None:
        return None  # each image is known by its name

    @staticmethod
    def is_url(key: str) -> bool:
        return key.startswith(_URLS)


class DatasetSource:
    """The rows of a data set, known by their numbers."""

    key_name = "row"

    def __init__(self, rows: Dataset):
        self.rows, self.keys, self.left_out, self.videos = rows, range(len(rows)), {}, set()

    def image(self, key: int) -> dict | None:
        return self.rows[key]["image"]

    def fingerprint(self, count: int) -> str | None:
        """Of the first rows: what a number stands for."""
        return fingerprint_images(self.rows.select(range(min(count, len(self.rows)))))


class StreamSource:
    """The images of shards, read as they come: known by their row of parquet, else by their shard and name in it."""

    def __init__(self, shards: Shards, source: str):
        self.shards, self.left_out, self.videos = shards, {}, set()
        self._names = shards.short_names(source)
        counts = shards.counts()
        self._first = None if counts is None else [0, *itertools.accumulate(counts)]  # row of each shard
        self.key_name = "file_name" if counts is None else "row"

    def __len__(self) -> int:
        return len(self.shards)

    def images(self, process: int = 0, processes: int = 1, done: Collection = ()) -> Iterator[tuple[str | int, dict]]:
        """Key and image of what a process is to tag."""
        for row in one_pass(self.shards, process, processes):
            image = row.values[self.shards.image_column] or {"bytes": None, "path": None}
            if self._first is not None:
                key = self._first[row.shard] + row.row
            else:
                key = f"{self._names[row.shard]}/{image['path'].partition('/')[2]}"
            if key not in done:
                yield key, image

    def fingerprint(self, count: int) -> str | None:
        """Of the first `count` shards."""
        return self.shards.fingerprint(count)


def open_source(
    source: str, *, split: str | None = None, streaming: bool = False, **options
) -> FileSource | DatasetSource | StreamSource:
    """The images and videos of a folder (with the folders in it), or of a text file that names one a line; the images
    of a data set; or one image or video. A name may be a URL.

    A folder that `datasets` wrote, or of parquet files, is a data set; so is what is no path, an id on the Hub. In a
    list, relative names start where the list is, and what follows a tab is left out, so that the `unreadable.txt` of
    another run is a list. With `streaming`, and where a file or folder is of `.tar` shards alone, nothing of a data
    set is copied. `split` and `options`: as of `training.data.load.load_images`.

    Raises:
        FileNotFoundError, ValueError: in one sentence, what is wrong and what to do.
    """
    path = Path(source)
    if source.startswith(_URLS):
        return _named(Path(), [source])
    if streaming or source.endswith(SHARD_SUFFIXES):
        return _stream(source, split, **options)
    if path.is_file() and (is_image(path) or is_video(path)):
        return _named(path.parent, [path.name])
    if path.is_file():
        written = (name for line in read_text(path).split("\n") if (name := line.partition("\t")[0].strip()))
        names = list(dict.fromkeys(_one_spelling(name, path.parent) for name in written))
        if not names:
            raise ValueError(f"{path} names no image; write one path a line.")
        return _named(path.parent, names)
    if path.is_dir() and not any(next(path.glob(pattern), None) for pattern in DATASET_FILES):
        found = find_images(path, sniff=True, videos=True)
        videos = found.videos if can_read_videos() else []
        if len(videos) < len(found.videos):
            found.left_out["videos (pip install av)"] = len(found.videos)
        if not found.names and not videos:
            if any(next(path.rglob(f"*{suffix}"), None) for suffix in SHARD_SUFFIXES):
                return _stream(source, split, **options)
            why = "; for its videos install PyAV, pip install av, or" if found.videos else ";"
            raise ValueError(f"{path} holds no images{why} give another folder, a list, or a data set.")
        return FileSource(path, [*found.names, *videos], found.left_out, videos)
    if are_tables_of_shards([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
        return _stream(source, split, **options)
    return DatasetSource(load_images(source, split, **options))


def _stream(source: str, split: str | None, **options) -> StreamSource:
    """
    Raises:
        ValueError: several splits and none chosen, or none of that name.
    """
    shards, _ = open_shards(DatasetOptions(dataset=source, **options), only="images")
    if split is None and len(shards) > 1:
        raise ValueError(f"{source} has the splits {', '.join(shards)}; choose one with --split.")
    name = SPLIT_ALIASES.get(split, split) or next(iter(shards))
    if name not in shards:
        raise no_such_split(name, shards, source)
    return StreamSource(shards[name], source)


def _named(root: Path, names: Sequence[str]) -> FileSource:
    """
    Raises:
        ValueError: a video among them, and no PyAV.
    """
    source = FileSource(root, names)
    source.videos = {key for key in source.keys if is_video(source.image(key)) and not is_image(source.path(key))}
    if source.videos and not can_read_videos():
        raise ValueError(f"{min(source.videos)} {NEEDS_PYAV}, or leave it out.")
    return source


def _one_spelling(name: str, root: Path) -> str:
    """Of all ways to write a path, one: `./a.jpg`, `b/../a.jpg` and `/root/a.jpg` are `a.jpg`; a URL is as it is."""
    if name.startswith(_URLS):
        return name
    return os.path.normpath(name).removeprefix(os.path.join(os.path.abspath(root), ""))
