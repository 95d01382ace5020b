"""Files of text: UTF-8, and what is not is named by file and line."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

_DECLARATION = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)[\"'][^>]*\?>")
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark and with every line end as `\\n`.

    Raises:
        ValueError: other bytes, with the line.
    """
    return decode(path.read_bytes(), path).replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes, path: Path | str) -> str:
    """`data` of the file `path` as text. Raises a ValueError as `read_text` does."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = "UTF-16" if data[:2] in _UTF16 else f"the byte {error.object[error.start]:#04x}, as in Latin-1 or GB2312"
        raise ValueError(f"{path}, line {line} is not UTF-8 text ({what}); save the file as UTF-8.") from None
    if 3 * text[:200].count("\0") > len(text[:200]):
        raise ValueError(f"{path}, line 1 is not UTF-8 text (zero bytes, as in UTF-16); save the file as UTF-8.")
    return text


def delimiter_of(name: str, text: str) -> str:
    """What divides the cells of the table `name`: tabs in a `.tsv`; commas, or where its first line has none what
    spreadsheets write in their place, semicolons or tabs."""
    line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    return "\t" if name.lower().endswith(".tsv") else next((letter for letter in ",;\t" if letter in line), ",")


def decode_line(data: bytes, path: Path, number: int) -> str:
    """One line of a UTF-8 file. Raises a ValueError as `read_text` does."""
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return decode(b"\n" * (number - 1) + data if data[:2] not in _UTF16 else data, path)


def parse_json(text: str, drop: str = "") -> Any:
    """What JSON holds, without the entries `drop` of its objects.

    Raises:
        ValueError: damage, an object with a key twice (of which one would be lost), numbers of thousands of digits or a
            depth that no data set has; in words that follow the name of the file.
    """

    def whole(pairs: list[tuple[str, Any]]) -> dict:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{key!r:.80} stands twice in one object")
        entry.pop(drop, None)
        return entry

    try:
        return json.loads(text, object_pairs_hook=whole)
    except RecursionError:
        raise ValueError("is nested too deep to be a data set") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error})") from error


def xml_text(data: bytes, path: Path | str) -> tuple[str, str, bytes]:
    """The text of an XML file in the encoding that it declares; that encoding; and the mark before it.

    Raises:
        ValueError: an encoding that does not exist, or bytes that are not in it, with the line.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    declared = _DECLARATION.match(data)
    name = _MARKS.get(mark) or (declared[1].decode("ascii") if declared else "utf-8")
    try:
        if not codecs.lookup(name)._is_text_encoding:
            raise LookupError
        if codecs.lookup(name).name == "utf-8":
            decode(data, path)  # for its sentence
        return data[len(mark) :].decode(name), name, mark
    except LookupError:
        raise ValueError(f"{path}, line 1 declares the encoding {name!r}, which does not exist; correct it.") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not {name} text, as line 1 says; save the file anew.") from None


def decode_xml(data: bytes, path: Path | str) -> str:
    """The text of an XML file without the declaration of its encoding. Raises a ValueError as `xml_text` does."""
    return re.sub(r"^\s*<\?xml.*?\?>", "", xml_text(data, path)[0], count=1, flags=re.S)
