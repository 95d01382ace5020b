"""Images as no program writes them, from a seed."""

import random
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO", "PPM", "TGA", "JPEG2000")
KINDS = (
    "truncated",
    "bit_flipped",
    "wrong_header",
    "bomb",
    "zero_bytes",
    "huge_dimensions",
    "animated",
    "scans",
    "nested",
)


def valid(image_format: str, chance: random.Random, side: int = 48) -> bytes:
    """A small image with edges and noise."""
    pixels = np.random.default_rng(chance.getrandbits(32)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[: side // 2] = chance.randrange(256)
    file = BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def truncated(chance: random.Random) -> tuple[str, bytes]:
    image_format = chance.choice(FORMATS)
    data = valid(image_format, chance)
    return image_format, data[: chance.randrange(1, max(2, len(data) * 9 // 10))]


def bit_flipped(chance: random.Random) -> tuple[str, bytes]:
    """A few bits anywhere, or many in the first hundred bytes, where the structure is."""
    image_format = chance.choice(FORMATS)
    data = bytearray(valid(image_format, chance))
    reach = len(data) if chance.random() < 0.5 else min(100, len(data))
    for _ in range(chance.choice((1, 3, 20))):
        data[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    return image_format, bytes(data)


def wrong_header(chance: random.Random) -> tuple[str, bytes]:
    """The first bytes of one format before the rest of another, or before noise."""
    first, second = chance.sample(FORMATS, 2)
    length = chance.randrange(4, 40)
    rest = valid(second, chance)[length:] if chance.random() < 0.7 else chance.randbytes(chance.randrange(1, 4000))
    return first, valid(first, chance)[:length] + rest


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bomb(chance: random.Random) -> tuple[str, bytes]:
    """Kilobytes that become gigabytes: pixels, a compressed text, a compressed colour profile."""
    zeros = zlib.compress(bytes(chance.randrange(20, 60) * 2**20), 1)
    small = zlib.compress(b"".join(b"\0" + bytes(3 * 8) for _ in range(8)))
    choice = chance.randrange(4)
    if choice == 0:
        side = chance.randrange(9500, 60000)
        return "PNG", png(side, side, zeros)
    if choice == 1:
        return "PNG", png(8, 8, small, *[chunk(b"zTXt", b"comment\0\0" + zeros)] * chance.randrange(1, 5))
    if choice == 2:
        return "PNG", png(8, 8, small, chunk(b"iCCP", b"profile\0\0" + zeros))
    return "PNG", png(8, 8, zeros)  # more pixels than the header has room for


def zero_bytes(chance: random.Random) -> tuple[str, bytes]:
    """Nothing, nothing but zeros, or zeros from somewhere on, as after a crash of the file system."""
    image_format = chance.choice(FORMATS)
    data = valid(image_format, chance)
    length = chance.choice((0, 1, 100, len(data)))
    if length < len(data):
        return image_format, bytes(length)
    kept = chance.randrange(1, len(data) // 2)
    return image_format, data[:kept] + bytes(len(data) - kept)


def huge_dimensions(chance: random.Random) -> tuple[str, bytes]:
    """A header that promises up to 2^31 pixels a side, and no pixels to speak of."""
    width, height = (chance.choice((0, 1, 9000, 65535, 2**20, 2**31 - 1)) for _ in range(2))
    short = (chance.choice((0, 1, 9000, 65535)), chance.choice((1, 9000, 65535)))
    choice = chance.randrange(6)
    if choice == 0:
        return "PNG", png(width, height, zlib.compress(b"\0" * 100))
    if choice == 1:
        return "BMP", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    if choice == 2:
        return "GIF", b"GIF89a" + struct.pack("<HH", *short) + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + (
            struct.pack("<HH", *short) + b"\0\x02\x02L\x01\0;"
        )  # fmt: skip
    if choice == 3:
        return "PPM", f"P6 {width} {height} 255\n".encode() + bytes(100)
    if choice == 4:
        data = bytearray(valid("JPEG", chance))
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", *short)
        return "JPEG", bytes(data)
    entries = ((256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 9))
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, min(value, 2**32 - 1)) for tag, value in entries)
    return "TIFF", b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + fields + bytes(4)


def animated(chance: random.Random) -> tuple[str, bytes]:
    """Hundreds of frames, cut, flipped or whole."""
    image_format = chance.choice(("GIF", "PNG", "WEBP", "TIFF"))
    frames = [
        Image.new("RGB", (16, 16), (shade % 256, 0, shade // 2 % 256)) for shade in range(chance.choice((3, 300)))
    ]
    file = BytesIO()
    frames[0].save(file, image_format, save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    if chance.random() < 0.5:
        return image_format, bytes(data[: chance.randrange(1, len(data))])
    for _ in range(chance.choice((0, 5, 50))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return image_format, bytes(data)


def scans(chance: random.Random) -> tuple[str, bytes]:
    """A progressive JPEG in which the last scan comes again and again; each goes over all pixels."""
    file = BytesIO()
    Image.new("L", (chance.randrange(500, 3000),) * 2, chance.randrange(256)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return "JPEG", data[:-2] + data[data.rindex(b"\xff\xda") : -2] * chance.randrange(50, 5000) + b"\xff\xd9"


def nested(chance: random.Random) -> tuple[str, bytes]:
    """A small image by its header, with one beyond every limit in it, that some decoders open at once."""
    side = chance.randrange(9_500, 12_000)
    inner = png(side, side, zlib.compress(bytes(2**20), 1))
    if chance.random() < 0.5:
        return "ICO", struct.pack("<HHHBBBBHHII", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(inner), 22) + inner
    return "ICNS", b"icns" + struct.pack(">I", len(inner) + 16) + b"ic09" + struct.pack(">I", len(inner) + 8) + inner


def malformed(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of `count` images, the kinds in turn."""
    makers = [globals()[kind] for kind in KINDS]
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        image_format, data = makers[number % len(makers)](chance)
        yield f"{number:04d}-{KINDS[number % len(makers)]}.{image_format.lower()}", data
