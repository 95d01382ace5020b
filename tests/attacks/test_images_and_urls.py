"""Images and addresses of strangers that took too long, too much memory, or led inside."""

import gzip
import re
import socket
import struct
import time
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from modeling_hsvlt import image_urls
from modeling_hsvlt.image_urls import is_public

try:
    from modeling_hsvlt.load_image import load_image
except ImportError:  # older commits
    from modeling_hsvlt.processing_multilabel import load_image


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b:1::1", "fec0::1", "::8.8.8.8", "5f00::1", "3fff::1", "192.0.0.8", "2001::1", "2001:db8::1", "100::1",
        "192.88.99.1", "::ffff:0:8.8.8.8", "4000::1",
    ],
)  # fmt: skip
def test_public_is_what_the_registry_says(address):
    assert not is_public(address)
    assert is_public("2a00:1450:4001:80b::200e") and is_public("1.1.1.1")


def test_a_name_with_many_mute_addresses_has_one_deadline(monkeypatch):
    """Each address is a port whose queue is full, so that nobody answers."""
    mute = []
    for _ in range(8):
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        mute += [server, *fillers]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname()) for server in mute[::4]]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        image_urls.fetch_image("http://many.example/", timeout=0.5, max_bytes=1000, allow_private=True)
    assert time.monotonic() - start < 1.5
    for each in mute:
        each.close()


def saved(image, image_format, **options):
    file = BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def ico():
    """64 x 64 by its own header; the PNG in it is larger than the limit of pixels."""
    inner = saved(Image.new("1", (11_000, 9_000)), "PNG")
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(inner), 22) + inner


def icns():
    inner = saved(Image.new("1", (11_000, 9_000)), "PNG")
    return b"icns" + struct.pack(">I", len(inner) + 16) + b"ic09" + struct.pack(">I", len(inner) + 8) + inner


def fits():
    header = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2",
              "NAXIS1  =                 9000", "NAXIS2  =                 9000", "END"]  # fmt: skip
    return gzip.compress("".join(card.ljust(80) for card in header).ljust(2880).encode() + bytes(9000 * 9000))


def many_exif_segments():
    whole = saved(Image.new("RGB", (8, 8)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 65_535) + b"Exif\0\0" + bytes(65_527)
    return whole[:2] + segment * 1_500 + whole[2:]


def many_scans():
    whole = saved(Image.new("L", (4_000, 4_000), "gray"), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * 2_000 + b"\xff\xd9"


def many_scans_of_one_colour():
    """Not progressive: the header says three colours, and each scan has one."""
    whole = saved(Image.new("RGB", (4_000, 4_000), "gray"), "JPEG", subsampling=0)
    at = whole.rindex(b"\xff\xda")
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(4)
    return whole[:at] + scan * 5_000 + b"\xff\xd9"


@pytest.mark.parametrize("make", [ico, icns, fits, many_exif_segments, many_scans, many_scans_of_one_colour])
def test_an_image_that_fills_memory_or_time_is_refused_at_once(make, tmp_path):
    path = tmp_path / "attack.img"
    path.write_bytes(make())
    start = time.thread_time()
    with pytest.raises(ValueError, match=re.escape("attack.img")):
        load_image(path)
    assert time.thread_time() - start < 1.5


def test_an_image_that_is_read_whole_and_one_with_a_film_behind_it_are_no_attacks(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2_400, 2_600, 3), dtype=np.uint8)
    (tmp_path / "large.webp").write_bytes(saved(Image.fromarray(pixels), "WEBP", lossless=True, method=0, quality=0))
    assert (tmp_path / "large.webp").stat().st_size > 2**24
    film = b"\xff\xda\0\x08" * 600
    (tmp_path / "motion.jpg").write_bytes(saved(Image.fromarray(pixels[:100]), "JPEG", progressive=True) + film)
    for name in ("large.webp", "motion.jpg"):
        assert load_image(tmp_path / name).width == 2_600


def test_what_cameras_and_programs_write_is_read(tmp_path):
    image = Image.effect_noise((640, 480), 60).convert("RGB")
    for number, (image_format, options) in enumerate(
        [
            ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(60_000)}),
            ("JPEG", {"comment": b"x" * 60_000}),
            ("PNG", {}),
            ("WEBP", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
            ("BMP", {}),
            ("GIF", {}),
            ("PPM", {}),
            ("TGA", {}),
            ("JPEG2000", {}),
        ]
    ):
        path = tmp_path / str(number)
        path.write_bytes(saved(image, image_format, **options))
        assert load_image(path).size == load_image(path.read_bytes()).size == (640, 480)
