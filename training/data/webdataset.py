"""webdataset shards: tar files in which the members of one key are a sample, an image and a file of its labels."""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec

from modeling_hsvlt.load_image import MAX_BYTES

from .image_files import IMAGE_SUFFIXES
from .label_cells import read_cell, read_number
from .rows import SPLIT_ALIASES, SPLIT_NAMES
from .text import decode, parse_json

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_LABEL_SUFFIXES = (".json", ".txt", ".cls")
# Fields of a sample's json that hold its labels, where none is named.
_FIELDS = ("labels", "tags", "label", "classes", "class", "categories", "category", "cls", "tag_string")


class _Member(tarfile.TarInfo):
    """Of a tar: one whose next header is damaged or cut off is damaged, where `tarfile` takes that for its end."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # blocks of zeros
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error or 'unexpected end of data'}") from error


def split_of(shard: str) -> str:
    """The split that a folder or file is called after, `train-000000.tar` or `val/0.tar`; "" where there is none."""
    words = shard.lower().replace("-", "/").replace("_", "/").replace(".", "/").split("/")
    bare = (word.rstrip("0123456789") for word in words)
    return next((SPLIT_ALIASES.get(word, word) for word in bare if word in SPLIT_NAMES), "")


def check_ends(path: Path) -> None:
    """Looks at the first header of a file, and at its end, where it is not compressed: zeros, if nothing is missing.

    Raises:
        ValueError: no tar file, or not a whole one.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, tarinfo=_Member):
            if path.suffix == ".tar" and not _is_gzip(file):
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2 * tarfile.BLOCKSIZE))
                if file.read().strip(b"\0"):
                    raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise _no_whole_tar(path, error) from error


def read_samples(path: Path | str, first: int = 0, *, images: bool = True) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The members of each key by suffix; a key is what stands before the first dot of a file's name.

    Only images and files of labels take part: of other files nothing is read.

    Args:
        path: A file, or an address that `fsspec` opens.
        first: Samples before this one are passed over, unread.
        images: False leaves the images unread, `b""`.

    Raises:
        ValueError: no whole tar file, a key or a file of it twice, a link, a member too large; with the shard and the
            key.
    """
    seen, key, parts = set(), None, {}
    try:
        with fsspec.open(str(path), "rb") as file, tarfile.open(fileobj=file, tarinfo=_Member) as shard:
            for member in shard:
                shard.members = []  # tarfile keeps them all
                if member.isdir():
                    continue
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not stem or not dot:
                    continue  # hidden files, and those of no sample
                name, suffix = f"{folder}/{stem}".lstrip("/"), f".{suffix.lower()}"
                if not (is_image_suffix(suffix) or suffix in _LABEL_SUFFIXES):
                    continue
                if not member.isreg():
                    raise ValueError(
                        f"{path}, {member.name} is a link or no file, and has no content: write the shard with tar "
                        "--dereference --hard-dereference."
                    )
                if name != key:
                    if len(seen) > first:
                        yield key, parts
                    if name in seen:
                        raise ValueError(
                            f"{path}: the key {name} comes twice, with others between; give each sample its own, and "
                            "put its files next to each other (tar --sort=name)."
                        )
                    seen.add(name)
                    key, parts = name, {}
                if suffix in parts:
                    raise ValueError(f"{path}: the key {name} has two files {suffix}; keep one.")
                if member.size > MAX_BYTES:
                    raise ValueError(f"{path}, {member.name} has {member.size:,} bytes, more than {MAX_BYTES:,}.")
                data = b""
                if len(seen) > first and (images or not is_image_suffix(suffix)):
                    data = shard.extractfile(member).read()
                    if len(data) != member.size:
                        raise tarfile.ReadError("unexpected end of data")
                parts[suffix] = data
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise _no_whole_tar(path, error, key) from error
    if len(seen) > first:
        yield key, parts


def _is_gzip(file: IO[bytes]) -> bool:
    file.seek(0)
    return file.read(2) == b"\x1f\x8b"


def _no_whole_tar(path: Path | str, error: Exception, key: str | None = None) -> ValueError:
    reason = str(error).splitlines()[0].rstrip(":")  # tarfile goes on with every kind of compression
    after = "" if key is None else f", after {key}"
    return ValueError(f"{path} is not a whole tar file ({reason}{after}); fetch or write it again.")


def is_image_suffix(suffix: str) -> bool:
    """Of a member, `.jpg` or `.seg.png`."""
    return f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES


def image_suffix(parts: dict[str, bytes], where: str, wanted: str | None = None) -> str | None:
    """The suffix of a sample's image; None where it has none.

    Args:
        wanted: The suffix, of samples with several images: `jpg`.

    Raises:
        ValueError: several.
    """
    images = [suffix for suffix in parts if is_image_suffix(suffix)]
    if wanted is not None:
        images = [suffix for suffix in images if suffix[1:] == wanted.lower().lstrip(".")]
    if len(images) > 1:
        raise ValueError(
            f"{where} has several images ({', '.join(images)}); keep one a key, or stream the shards with "
            f"--image_column {images[0][1:]}."
        )
    return images[0] if images else None


def sample_labels(
    parts: dict[str, bytes],
    label_column: str | None,
    separator: str,
    names: Sequence[str] | None,
    where: str,
    label_format: str = "auto",
) -> list[str] | None:
    """The names of a sample's labels; None where its json says null.

    Args:
        label_column: The field of the json that holds them; None: the usual ones.
        separator: Between the labels of a text.
        names: What class numbers stand for.
        label_format: "ids" where a list of as many zeros and ones as there are labels is one of class numbers.

    Raises:
        ValueError: none, or what cannot be read as labels; with the sample.
    """
    try:
        content = read_json(parts, where) if ".json" in parts else None
        if ".cls" in parts and label_column is None and not _has_labels(content):
            value = decode(parts[".cls"], f"{where}.cls").strip()
            if not re.fullmatch(r"[\d\s,]*", value):
                raise ValueError(f"has {value!r:.60} in its .cls, where class numbers should be")
            value = [int(number) for number in value.replace(",", " ").split()]
        elif ".json" in parts:
            value = _field(content, label_column)
            separator = " " if isinstance(content, dict) and "tag_string" in content else separator
            if label_format == "auto" and names and _looks_multi_hot(value, len(names)):
                raise ValueError(
                    f"has {value!r:.60}, which may be class numbers or a 0 or 1 for each label; write names, or "
                    "stream the shards with --label_format ids or multi_hot"
                )
        elif ".txt" in parts:
            value = decode(parts[".txt"], f"{where}.txt").strip()
        else:
            raise ValueError(
                "has no .json, .txt or .cls with its labels beside it; add one, or put the files of a sample next to "
                "each other (tar --sort=name)"
            )
        if isinstance(value, str):
            value = read_cell(value, separator)
        value = [value] if isinstance(value, int) else value
        if value is None:
            return None
        if not isinstance(value, list):
            raise ValueError(f"has {value!r:.60} where its labels should be; write a list or a text")
        return [_name(item, names) for item in value]
    except (ValueError, TypeError) as error:
        raise _with_place(error, where) from error


def sample_numbers(parts: dict[str, bytes], label_column: str | None, where: str) -> list[float | None] | None:
    """One number a label, of the json's field; null is unknown. Raises a ValueError as `sample_labels` does."""
    try:
        value = _field(read_json(parts, where), label_column)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"has {value!r:.60} where one number a label should be")
        return value if value is None else [None if item is None else float(item) for item in value]
    except (ValueError, TypeError) as error:
        raise _with_place(error, where) from error


def sample_columns(parts: dict[str, bytes], columns: Sequence[str], where: str) -> dict[str, float]:
    """The json's field of each label, of which null and an empty text are unknown (NaN). Raises as `sample_labels`."""
    try:
        content = read_json(parts, where)
        lacking = [name for name in columns if not isinstance(content, dict) or name not in content]
        if lacking:
            raise ValueError(f"its json has no {lacking[0]!r}; add it, or leave it out of label_columns")
        return {name: read_number("" if content[name] is None else str(content[name])) for name in columns}
    except (ValueError, TypeError) as error:
        raise _with_place(error, where) from error


def read_json(parts: dict[str, bytes], where: str) -> Any:
    """
    Raises:
        ValueError: none, or damage.
    """
    if ".json" not in parts:
        raise ValueError("has no .json; add one")
    try:
        return parse_json(decode(parts[".json"], f"{where}.json"))
    except ValueError as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}.json {error}; correct it.") from error


def _with_place(error: Exception, where: str) -> ValueError:
    return ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}.")


def _looks_multi_hot(value: Any, num_labels: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == num_labels
        and all(type(item) is int and item in (0, 1) for item in value)
    )


def _has_labels(content: Any) -> bool:
    """Whether a sample's json holds labels, beside which a `.cls` is not looked at."""
    return isinstance(content, list) or (
        isinstance(content, dict) and not {*_FIELDS, "objects", "annotations"}.isdisjoint(content)
    )


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


def _name(item: Any, names: Sequence[str] | None) -> str:
    if isinstance(item, str):
        return item.strip()
    if isinstance(item, bool) or not isinstance(item, int):
        raise ValueError(f"{item!r} is no label")
    if names is None:
        raise ValueError(f"class {item} has no name; put a labels.txt beside the shards, one name a line")
    if not 0 <= item < len(names):
        raise ValueError(f"class {item} is out of range; there are {len(names)} names")
    return names[item]
