import base64
import re
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_hsvlt.load_image import MAX_PIXELS, load_image
from modeling_hsvlt.png_chunks import readable_png
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format="PNG", **kwargs):
    stream = BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def pixels(source, **kwargs):
    image = load_image(source, **kwargs)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


# What an image may be, and how it looks


# EXIF orientation -> from the stored array to the upright one (EXIF 2.32, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
    9: lambda a: a,  # No such orientation
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_once(orientation):
    stored = noise(5, 8)
    exif = Image.Exif()
    exif[274] = orientation
    loaded = load_image(encoded(Image.fromarray(stored), exif=exif))
    assert np.array_equal(loaded, UPRIGHT[orientation](stored))
    assert np.array_equal(load_image(loaded), loaded)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_data_leave_a_image_readable(format):
    for garbage in (
        b"Exif\0\0garbage!",
        b"Exif\0\0II",
        b"Exif\0\0MM\0*\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01",
    ):
        assert pixels(encoded(Image.fromarray(noise(8, 8)), format, exif=garbage)).shape == (8, 8, 3)


def on_white(rgb, alpha):
    alpha = alpha[..., None] / 255
    return np.asarray(rgb) * alpha + 255 * (1 - alpha)


def test_transparency_is_laid_on_white():
    rgba = noise(6, 7, 4)
    grey_alpha = noise(6, 7, 2)
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(rgba))), on_white(rgba[..., :3], rgba[..., 3]), atol=1)
    expected = on_white(grey_alpha[..., :1].repeat(3, -1), grey_alpha[..., 1])
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(grey_alpha, "LA"))), expected, atol=1)
    # One transparent colour (PNG's tRNS) of RGB and of grey
    rgb = np.array([[[10, 20, 30], [40, 50, 60]]], dtype=np.uint8)
    keyed = pixels(encoded(Image.fromarray(rgb), transparency=(40, 50, 60)))
    assert keyed.tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    assert pixels(encoded(grey, transparency=9)).tolist() == [[[7] * 3, [255] * 3]]


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.putdata([0, 1, 2, 3])
    assert pixels(encoded(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]]
    clear = [[255, 0, 0], [255, 255, 255], [0, 0, 255], [9, 9, 9]]
    assert pixels(encoded(image, transparency=1)).tolist() == [clear]
    assert pixels(encoded(image, "GIF", transparency=1)).tolist() == [clear]
    half = pixels(encoded(image, transparency=bytes([255, 128, 255, 255])))
    np.testing.assert_allclose(half[0, 1], [127, 255, 127], atol=1)


def test_cmyk_is_converted_and_not_inverted():
    cmyk = noise(5, 5, 4)
    ink, key = cmyk[..., :3] / 255, cmyk[..., 3:] / 255
    expected = 255 * (1 - ink) * (1 - key)
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(cmyk, "CMYK"), "TIFF")), expected, atol=1)
    # Adobe's JPEGs store CMYK inverted.
    white = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert pixels(white).min() > 250


def test_grey_of_more_than_8_bits_is_scaled_by_its_own_range():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16, 1).repeat(3, -1)
    for depth, top in ((16, 65535), (14, 16383), (12, 4095), (10, 1023)):
        grey = np.rint(ramp * (top / 65535)).astype(np.uint16)
        for image in (
            encoded(Image.fromarray(grey)),
            encoded(Image.fromarray(grey), "TIFF"),
            Image.fromarray(grey),
            grey,
        ):
            np.testing.assert_allclose(pixels(image), expected, atol=1, err_msg=f"{depth} bits")
    big_endian = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    np.testing.assert_allclose(pixels(big_endian), expected, atol=1)
    # A 32-bit image that holds 16 bits (as Pillow opens PGM), one that is signed, and floats up to 1.
    np.testing.assert_allclose(pixels(Image.fromarray(ramp.astype(np.int32))), expected, atol=1)
    np.testing.assert_allclose(pixels(Image.fromarray(ramp.astype(np.int32) - 30000)), expected, atol=1)
    floats = (ramp / 65535).astype(np.float32)
    np.testing.assert_allclose(pixels(encoded(Image.fromarray(floats), "TIFF")), expected, atol=1)
    # Not stretched: half of the range stays half as bright.
    assert pixels(encoded(Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)))).tolist()[0][0] == [128] * 3
    assert pixels(np.full((4, 4), 0.5, dtype=np.float32)).max() == 128
    assert pixels(Image.new("F", (4, 4), -1.0)).max() == 0  # No range at all


def tiff_of_12_bits(values):
    """A little-endian TIFF of one row, two 12-bit pixels in three bytes."""
    pairs = zip(values[::2], values[1::2], strict=True)
    data = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = [(256, len(values)), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, len(data))]
    offset = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    body = data.ljust(offset - 8, b"\0") + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"
    return b"II*\0" + struct.pack("<I", offset) + body


def test_the_bits_that_a_tiff_declares_are_its_range():
    # 1000 would fit 10 bits and be nearly white by that.
    assert pixels(tiff_of_12_bits([0, 1000, 500, 1000]))[0, :, 0].tolist() == [0, 62, 31, 62]


def test_bilevel_grey_and_animated_images():
    assert pixels(encoded(Image.fromarray(np.array([[True, False]])))).tolist() == [[[255] * 3, [0] * 3]]
    grey = noise(4, 5, 0)
    assert np.array_equal(pixels(encoded(Image.fromarray(grey))), grey[..., None].repeat(3, -1))
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF"):
        animation = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(pixels(animation)[0, 0], [255, 0, 0], atol=3, err_msg=format)


class Slow(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/slow.png":
            self.server.released.wait(5)
        self.send_response(404 if self.path == "/nothing.png" else 200)
        self.end_headers()
        self.wfile.write(self.server.image)


@pytest.fixture
def site():
    server = HTTPServer(("127.0.0.1", 0), Slow)
    server.image, server.released = encoded(Image.fromarray(noise(6, 9))), threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()
    server.server_close()


def test_every_kind_of_source_gives_the_same_image(tmp_path, site):
    array = noise(6, 9)
    data = encoded(Image.fromarray(array))
    path = tmp_path / "image.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = {
        "path": path, "text": str(path), "bytes": data, "bytearray": bytearray(data), "stream": BytesIO(data),
        "embedded": {"bytes": data, "path": None}, "linked": {"bytes": None, "path": str(path)},
        "url": f"{site}/image.png", "data": f"data:image/png;base64,{text}", "base64": text,
        "lines": base64.encodebytes(data).decode(),
        "pil": Image.fromarray(array), "lazy": Image.open(path), "array": array, "first": array.transpose(2, 0, 1),
        "tensor": torch.from_numpy(array), "tensor_first": torch.from_numpy(array).permute(2, 0, 1),
        "unit": array / 255, "unit_tensor": torch.from_numpy(array).permute(2, 0, 1) / 255,
        "float": array.astype(float), "integer": array.astype(np.int64), "16 bits": array.astype(np.uint16) * 257,
    }  # fmt: skip
    for kind, source in sources.items():
        allow = {"allow_private_addresses": True} if kind == "url" else {}
        assert np.array_equal(np.asarray(load_image(source, **allow)), array), kind
    with path.open("rb") as file:
        assert np.array_equal(pixels(file), array)
    half = torch.from_numpy(array).permute(2, 0, 1) / 255
    np.testing.assert_allclose(pixels(half.bfloat16()), array, atol=1)
    rgba = np.dstack([array, np.full((6, 9), 128, dtype=np.uint8)])
    np.testing.assert_allclose(pixels(rgba), on_white(array, rgba[..., 3]), atol=1)
    for grey in (array[..., :1], array[..., 0]):
        assert np.array_equal(pixels(grey), array[..., :1].repeat(3, -1))


def test_a_image_that_needs_no_change_is_not_copied():
    image = Image.fromarray(noise(4, 4))
    assert load_image(image) is image


# What is refused


def png(width, height, data=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_the_pixel_limit_holds_before_decoding():
    # Files without a single pixel in them: decoding would fail otherwise.
    with pytest.raises(
        ValueError, match="12000 x 12000 pixels, more than the limit of 89478485; shrink it or raise max"
    ):
        load_image(png(12000, 12000))
    with pytest.raises(ValueError, match=r"an image of \d+ bytes.*raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels"):
        load_image(png(60000, 60000))
    with pytest.raises(ValueError, match="cannot be decoded"):
        load_image(png(9000, 9000))
    assert 9000 * 9000 < MAX_PIXELS < 12000 * 12000
    data = encoded(Image.fromarray(noise(10, 10)))
    assert load_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(ValueError, match="10 x 10 pixels"):
        load_image(data, max_pixels=99)
    with pytest.raises(ValueError, match="10 x 10 pixels"):
        load_image(data, max_pixels=99, size_hint=2)


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    good = noise(64, 64)
    broken = {
        "truncated.jpg": (encoded(Image.fromarray(good), "JPEG")[:-700], "truncated"),
        "truncated.png": (encoded(Image.fromarray(good))[:3000], "cannot be decoded"),
        "cut.gif": (encoded(Image.fromarray(good[..., 0]), "GIF")[:900], "cannot be decoded"),
        "header.webp": (encoded(Image.fromarray(good), "WEBP")[:40], ""),
        "page.jpg": (b"<html>404 Not Found</html>", "no image format"),
        "empty.png": (b"", "no image format"),
        "drawing.eps": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
            "no image format",
        ),
    }
    for name, (data, reason) in broken.items():
        path = tmp_path / name
        path.write_bytes(data)
        for source in (path, str(path), {"bytes": data, "path": str(path)}):
            with pytest.raises(ValueError, match=rf"{re.escape(name)}.*{reason}.*\.$"):
                load_image(source)
        with pytest.raises(ValueError, match=reason):
            load_image(data)
    with (tmp_path / "page.jpg").open("rb") as file, pytest.raises(ValueError, match=r"page\.jpg"):
        load_image(file)
    with Image.open(tmp_path / "truncated.jpg") as image, pytest.raises(ValueError, match=r"truncated\.jpg"):
        load_image(image)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/photo.jpg", r"missing/photo\.jpg does not exist; check the path"),
        (Path("missing.jpg"), r"missing\.jpg does not exist"),
        ("photo", r"photo is in no image format|photo does not exist"),
        ("data:image/png;base64,@@@", "data:image/png.* does not exist"),
        (".", "folder; give the image files in it"),
        ("no\0name", "does not exist"),
        (7, r"7 \(int\) is no image; give a path"),
        (None, r"None \(NoneType\) is no image"),
        ({"bytes": None, "path": None}, "is no image"),
        (np.zeros((2, 3, 4, 5)), r"array of shape \(2, 3, 4, 5\) is no image"),
        (np.zeros((5, 6, 2)), "needs 1, 3 or 4 channels"),
        (np.zeros((0, 4, 3)), "is no image"),
        (np.full((4, 4, 3), -0.5), "negative pixels, so it seems normalised"),
        (np.full((4, 4, 3), np.nan), "NaN"),
        (np.zeros((4, 4), dtype=complex), "needs numbers of shape"),
        (Image.new("RGB", (0, 4)), "no pixels"),
        ("x" * 5000, r"x{60}\.\.\. \(5000 characters\)"),
        ("\x1b[2Jphoto\n.jpg", r"^\\x1b\[2Jphoto\\n\.jpg does not exist"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_told(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_a_url_that_fails_is_told_in_time(site):
    inside = {"allow_private_addresses": True}
    with pytest.raises(ValueError, match=r"nothing\.png cannot be downloaded: .*404.*Check the address"):
        load_image(f"{site}/nothing.png", **inside)
    with pytest.raises(ValueError, match=r"slow\.png cannot be downloaded: .*raise timeout"):
        load_image(f"{site}/slow.png", timeout=0.2, **inside)
    with pytest.raises(ValueError, match="cannot be downloaded"):
        load_image("http://127.0.0.1:1/image.png", **inside)


def test_a_size_hint_decodes_less_and_changes_little():
    y, x = np.mgrid[0:1200, 0:1600]
    photo = np.stack([x * 255 / 1600, y * 255 / 1200, 128 + 100 * np.sin(x / 40) * np.cos(y / 30)], -1).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(Image.fromarray(photo), "JPEG", quality=95, exif=exif)
    sizes = {hint: load_image(data, size_hint=hint).size for hint in (50, 100, 150, 300, 301, 5000)}
    # Turned by its EXIF orientation, and never below twice the hint.
    assert sizes == {
        50: (150, 200),
        100: (300, 400),
        150: (300, 400),
        300: (600, 800),
        301: (1200, 1600),
        5000: (1200, 1600),
    }
    processor = MultiLabelImageProcessor(size=128, do_normalize=False)
    full, reduced = (processor(load_image(data, size_hint=hint))["pixel_values"][0] for hint in (None, 128))
    assert np.abs(full - reduced).mean() < 1 / 255
    assert load_image(encoded(Image.fromarray(photo[:64, :64])), size_hint=8).size == (64, 64)  # PNGs have no draft.


def chunk(kind, content, crc=None):
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


LARGE = zlib.compress(bytes(3 * 2**20))
EXTRAS = {
    "zTXt": chunk(b"zTXt", b"comment\0\0" + LARGE),
    "iTXt": chunk(b"iTXt", b"comment\0\1\0\0\0" + LARGE),
    "iCCP": chunk(b"iCCP", b"profile\0\0" + LARGE),
    "tEXt": chunk(b"tEXt", b"comment\0" + b"x" * 2**26) + chunk(b"tEXt", b"more\0x"),
    "bad crc": chunk(b"tEXt", b"comment\0text", crc=1),
    "short": chunk(b"pHYs", b"\0\0\0\1"),
    "unknown": chunk(b"abCd", b"1234", crc=7),
}


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("name", EXTRAS)
def test_extras_of_a_png_do_not_keep_from_its_pixels(name, as_path, tmp_path, recwarn):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    plain = encoded(Image.fromarray(pixels))
    head, tail = plain[:33], plain[-12:]  # up to IHDR, and IEND
    for data in (head + EXTRAS[name] + plain[33:], plain[:-12] + EXTRAS[name] + tail):
        source = data
        if as_path:
            (source := tmp_path / "extra.png").write_bytes(data)
        assert np.array_equal(np.asarray(load_image(source)), pixels)
    damaged = name in ("bad crc", "short", "unknown")
    assert any("is damaged and was left out" in str(warning.message) for warning in recwarn) == damaged


def test_a_png_without_extras_is_opened_as_it_is_and_a_damaged_one_is_refused():
    plain = encoded(Image.new("RGB", (4, 4)))
    assert readable_png(plain, "x.png") is None and readable_png(plain[:40], "x.png") is None
    with pytest.raises(ValueError, match="no image format"):
        load_image(plain.replace(b"IDAT", b"IDAX"))


def test_heic_is_read_where_pillow_heif_is_installed():
    pytest.importorskip("pillow_heif", reason="pillow-heif is the extra heic")
    pytest.importorskip("pillow_heif").register_heif_opener()
    data = encoded(Image.new("RGB", (64, 48), (200, 30, 30)), "HEIF")
    Image.OPEN.pop("HEIF"), Image.ID.remove("HEIF")  # as in a process that has not met one yet
    assert np.abs(pixels(data) - [200, 30, 30]).max() < 12 and pixels(data).shape == (48, 64, 3)
