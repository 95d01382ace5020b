"""Files of text: UTF-8, and what is not is named by file and line."""

from __future__ import annotations

from pathlib import Path

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
