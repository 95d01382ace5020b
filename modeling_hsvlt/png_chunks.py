"""PNG files whose texts, colour profile or other extras would keep Pillow from their pixels."""

import struct
import warnings
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_TEXT = 2**20  # bytes that Pillow decompresses of one chunk
_MAX_TEXTS = 2**25  # half of what it takes of all
_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP")
_LENGTHS = {b"pHYs": 9, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1}


def readable_png(data: bytes, name: str) -> bytes | None:
    """The file without the ancillary chunks that Pillow refuses; None where there are none, and the file will do.

    Texts and colour profiles of more than a mebibyte are left out in silence: nothing here uses them. What is damaged
    is left out with a warning. Critical chunks stay as they are.

    Args:
        data: A whole PNG file.
        name: What a warning calls it.
    """
    kept, dropped, place, texts = [SIGNATURE], False, len(SIGNATURE), 0
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if end > len(data):
            break  # truncated: Pillow says so, or reads what is there
        chunk = data[place:end]
        if kind[:1].islower():
            content = memoryview(chunk)[8:-4]
            damaged = zlib.crc32(memoryview(chunk)[4:-4]) != int.from_bytes(chunk[-4:], "big")
            damaged = damaged or _LENGTHS.get(kind, length) != length
            texts += length if kind == b"tEXt" else 0
            large = kind in _COMPRESSED and length > 1000 and _is_large(bytes(content))
            if damaged:
                warnings.warn(f"{name}: the PNG chunk {kind!r} is damaged and was left out.", stacklevel=2)
            if damaged or large or (kind == b"tEXt" and texts > _MAX_TEXTS):
                dropped, chunk = True, b""
        kept.append(chunk)
        place = end
    return b"".join([*kept, data[place:]]) if dropped else None


def _is_large(content: bytes) -> bool:
    """Whether the text or profile of a chunk has more than `_MAX_TEXT` bytes, or cannot be told."""
    for start in _zlib_starts(content):
        try:
            if len(zlib.decompressobj().decompress(content[start:], _MAX_TEXT + 1)) > _MAX_TEXT:
                return True
        except zlib.error:
            continue
    return len(content) > _MAX_TEXT


def _zlib_starts(content: bytes) -> list[int]:
    """Where compressed data may begin: after the name of a zTXt or iCCP, or after the fields of an iTXt."""
    first = content.find(b"\0")
    if first < 0:
        return []
    language = content.find(b"\0", first + 3)
    translated = content.find(b"\0", language + 1) if language >= 0 else -1
    return [first + 2, *([translated + 1] if translated >= 0 else [])]
