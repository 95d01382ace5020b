"""Images from wherever they are, decoded with care; a checkpoint carries this file."""

import base64
import binascii
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format

from .image_urls import fetch_image
from .png_chunks import SIGNATURE, readable_png

# Where Pillow itself begins to warn of a decompression bomb: a quarter of a gibibyte of RGB. Pillow refuses only twice
# as much, which a 20 KB file can reach in every worker of a data loader at once.
MAX_PIXELS = 89_478_485
MAX_BYTES = 2**28  # of an encoded image: as many as the largest one that is decoded has in RGB
# What photographs come in. Pillow reads forty more, of which some decode before any limit can be looked at (ICO, ICNS),
# unpack without end (FITS) or are programs (EPS). HEIF where pillow_heif is registered.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "HEIF")
MAX_METADATA = 2**24  # bytes in front of the pixels: a camera writes some hundred thousand
MAX_SECONDS = 10.0  # of processor time for one image: the largest that is decoded takes some 3
# Scans of a JPEG, of which programs write about 10: of the largest image, and of any.
MAX_SCANS, MOST_SCANS = 12, 500


def load_image(
    source,
    *,
    max_pixels: int | None = MAX_PIXELS,
    max_bytes: int | None = MAX_BYTES,
    size_hint: int | None = None,
    timeout: float | None = 10.0,
    allow_private_addresses: bool = False,
) -> Image.Image:
    """Decodes an image to RGB as people see it.

    The EXIF orientation is applied (and ignored where the EXIF data are broken), transparency is laid on white, CMYK is
    converted without its colour profile, and an animation gives its first frame. Grey and colour of more than 8 bits
    are scaled by the range they use: the bits that a TIFF declares if fewer than 16, else the fewest of 8, 10, 12, 14
    and 16 bits that hold the brightest pixel (16-bit files mostly carry 10 to 14 bits of a sensor); floats up to 1 by
    1; and what is negative or beyond 16 bits by the image's own minimum and maximum.

    Args:
        source: A path, a URL (`http://`, `https://`, `data:image/`), a base64 string, the bytes of a file, an open
            binary file, an undecoded `datasets.Image` (`{"bytes": ..., "path": ...}`), a `PIL.Image.Image`, or a NumPy
            array or tensor of shape (height, width), (height, width, channels) or (channels, height, width) with 1, 3
            or 4 channels.
        max_pixels: The largest width * height to decode; None leaves Pillow's own limit alone.
        max_bytes: The longest file or download to read; None for no limit. Of an animation one frame is read, however
            many there are.
        size_hint: Side in px that the image is going to be resized to. A JPEG whose two sides stay at least twice
            that long is then decoded at 1/2, 1/4 or 1/8 of its size: several times faster for a photograph of 12
            megapixels, at the price of slightly different pixels.
        timeout: Seconds that a URL may take, to the last byte.
        allow_private_addresses: Whether a URL may lead into a network or to this computer, which a stranger's URL must
            not; proxies of the environment are not used.

    Returns:
        An RGB image; `source` itself if it is one that needs no change.

    Raises:
        ValueError: the image cannot be had, is too large, truncated or in no known format; the message names it.
    """
    name = describe(source)
    if isinstance(source, np.ndarray) or torch.is_tensor(source):
        return image_of_array(source, name)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name, max_pixels, size_hint)
    with (
        _open_source(source, name, max_bytes, timeout, allow_private_addresses) as stream,
        read_header(stream, name) as image,
    ):
        if image.format in ("JPEG", "MPO") and max_pixels is not None:
            _check_scans(image, name, max_pixels)
        return _to_rgb(image, name, max_pixels, size_hint)


def read_header(stream, name: str) -> Image.Image:
    """The image in a binary stream, of which no pixel is decoded yet.

    Raises:
        ValueError: it is in no known format, or its header is damaged; the message begins with `name`.
    """
    with _naming_failures(name):
        Image.init()  # `formats` may hold one of a plugin that is not installed
        guarded = _Guarded(_prepared(stream, name))
        image = Image.open(guarded, formats=[known for known in FORMATS if known in Image.OPEN])
        guarded.metadata_left = None
    return image


def describe(source) -> str:
    """How messages call an image."""
    if isinstance(source, Mapping):
        return describe(source.get("path") or source.get("bytes") or f"a dict of {', '.join(map(str, source))}")
    if isinstance(source, Image.Image) or hasattr(source, "read"):
        source = getattr(source, "filename", None) or getattr(source, "name", None) or f"a {type(source).__name__}"
    if isinstance(source, (bytes, bytearray)):
        return f"an image of {len(source)} bytes"
    if isinstance(source, np.ndarray) or torch.is_tensor(source):
        return f"an array of shape {tuple(source.shape)}"
    # Escaped: a name must not steer the terminal that shows it.
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(source)[:5000])
    return text if len(text) <= 200 else f"{text[:60]}... ({len(str(source))} characters)"


def _open_source(source, name: str, max_bytes: int | None, timeout: float | None, allow_private: bool):
    """A binary stream that Pillow can open, as a context that closes what it opened itself."""

    def within_limit(size: int) -> None:
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{name} has {size} bytes, more than the limit of {max_bytes}; raise max_bytes.")

    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or source
    if isinstance(source, (bytes, bytearray)):
        within_limit(len(source))
        return nullcontext(BytesIO(source))
    if hasattr(source, "read"):
        if hasattr(source, "seek"):
            start = source.tell()
            within_limit(source.seek(0, os.SEEK_END) - start)
            source.seek(start)
        return nullcontext(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{name} ({type(source).__name__}) is no image; give a path, URL, bytes, file, image, array or tensor."
        )
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        try:
            data = fetch_image(text, timeout=timeout, max_bytes=max_bytes, allow_private=allow_private)
        except TimeoutError as error:
            raise ValueError(f"{name} cannot be downloaded: {error}; raise timeout.") from error
        except Exception as error:  # http.client and ssl have their own, and an odd name gives a UnicodeError
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{name} cannot be downloaded: {reason}. Check the address.") from error
        return nullcontext(BytesIO(data))
    if os.path.isfile(text):
        within_limit(os.path.getsize(text))
        with _naming_failures(name):
            return open(text, "rb")
    if os.path.exists(text):
        raise ValueError(f"{name} is a folder; give the image files in it.")
    within_limit(len(text) * 3 // 4)
    try:
        encoded = text.split(",", 1)[1] if text.startswith("data:image/") else text
        return nullcontext(BytesIO(base64.b64decode("".join(encoded.split()), validate=True)))  # it may come in lines
    except (binascii.Error, IndexError, ValueError) as error:
        raise ValueError(f"{name} does not exist; check the path.") from error


class _Guarded:
    """A file that ends what takes too long: Pillow reads through it, a block at a time, whatever the format."""

    def __init__(self, file):
        self._file, self._began = file, time.thread_time()
        self.metadata_left = MAX_METADATA  # None: what is read from now on are pixels

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if time.thread_time() - self._began > MAX_SECONDS:
            raise ValueError(f"it takes more than {MAX_SECONDS:g} seconds")
        data = self._file.read(size)
        if self.metadata_left is not None and size >= 0:  # WEBP and AVIF are read whole before anything is decoded
            self.metadata_left -= len(data)
            if self.metadata_left < 0:
                raise ValueError(f"it has more than {MAX_METADATA} bytes in front of its pixels")
        return data


def _check_scans(image: Any, name: str, max_pixels: int) -> None:
    """Each scan of a JPEG goes over all pixels, and a scan of a few bytes is enough for that. Pillow has just read the
    header of the first; one that holds all colours is the only one, unless it is progressive."""
    file, layers = image.fp, image.layers
    place = file.tell()
    file.seek(max(place - 8 - 2 * layers, 0))
    only = file.read(5)
    if image.info.get("progressive") or only != b"\xff\xda\0" + bytes((6 + 2 * layers, layers)):
        file.seek(0)
        scans = _count_scans(file.read())
        if scans > MOST_SCANS or scans * image.width * image.height > MAX_SCANS * max_pixels:
            raise ValueError(f"{name} is a JPEG of {scans} scans, too many for its size; save it again.")
    file.seek(place)


_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.S)


def _count_scans(data: bytes) -> int:
    """Scans up to the end of the image, behind which phones append films."""
    place, scans = 2, 0
    while (found := _MARKER.search(data, place)) and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        place = found.end() + max(int.from_bytes(data[found.end() : found.end() + 2], "big"), 2)
    return scans


def _prepared(stream, name: str):
    """The stream of a PNG without the extras that Pillow refuses; and what reads HEIC, where that is installed."""
    if not hasattr(stream, "seek"):
        return stream
    start = stream.tell()
    head = stream.read(12)
    stream.seek(start)
    if head.startswith(SIGNATURE):
        data = stream.read()
        return BytesIO(readable_png(data, name) or data)
    if head[4:8] == b"ftyp" and head[8:] != b"avif" and "HEIF" not in Image.OPEN and find_spec("pillow_heif"):
        import_module("pillow_heif").register_heif_opener()
    return stream


@contextmanager
def _naming_failures(name: str):
    """Turns whatever Pillow's plugins raise, which is nearly every exception, into a ValueError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is in no image format that is read here; convert it or leave it out; HEIC needs pillow-heif."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels.") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded ({error}); replace the file or leave it out.") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int | None, size_hint: int | None) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{name} has no pixels ({width} x {height}); leave it out.")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than the limit of {max_pixels}; shrink it or raise max_pixels."
        )
    if image.format == "EPS":  # opened elsewhere; Pillow would hand the file, which is a program, to Ghostscript
        raise ValueError(f"{name} is an EPS drawing; convert it to PNG or leave it out.")
    with _naming_failures(name):
        if size_hint is not None:
            image.draft(None, (2 * size_hint, 2 * size_hint))
        image.load()
        if _orientation(image) in range(2, 9):
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # TIFF's BitsPerSample (tag 258); Pillow fills the lower bits and drops the number.
            bits = image.tag_v2.get(258, (None,))[0] if hasattr(image, "tag_v2") else None
            image = Image.fromarray(_to_uint8(np.asarray(image), bits))
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image.convert("RGBA"))
            image = canvas
        return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # An image with broken EXIF data is still an image.
        return 1


def image_of_array(array, name: str, data_format: str | ChannelDimension | None = None) -> Image.Image:
    array = channels_last(array, name, data_format)
    if array.dtype != bool and array.min() < 0:
        raise ValueError(f"{name} has negative pixels, so it seems normalised; give pixels in [0, 255] or [0, 1].")
    with _naming_failures(name):
        return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(array))), name, None, None)


def channels_last(array, name: str, data_format: str | ChannelDimension | None) -> np.ndarray:
    """(height, width) or (height, width, 3 or 4) of what `load_image` takes for an image."""
    if torch.is_tensor(array):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"{name} is no image; it needs numbers of shape (height, width) or 1, 3 or 4 channels.")
    if array.ndim == 3:
        with suppress(ValueError):  # no such number of channels
            data_format = data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        array = np.moveaxis(array, 0, -1) if data_format == ChannelDimension.FIRST else array
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"{name} is no image; it needs 1, 3 or 4 channels, first or last.")
        array = array[..., 0] if array.shape[-1] == 1 else array
    return array


def float_planes(array: np.ndarray, name: str) -> list[Image.Image]:
    """Red, green and blue of floats that stay as they are: 8 bits would round them and bring them to [0, 255]."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has pixels that are NaN or infinite; leave it out.")
    if array.ndim == 3 and array.shape[-1] == 4:
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has an alpha channel, so without rescaling its values must lie in [0, 1].")
        array = array[..., :3] * array[..., 3:] + (1 - array[..., 3:])
    planes = [array] * 3 if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]


def _to_uint8(pixels: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Pixels of any number type to uint8, by the rule that `load_image` states."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    low, high = 0.0, float(pixels.max())
    if not np.isfinite(pixels).all():
        raise ValueError("it has pixels that are NaN or infinite")
    if pixels.min() < 0 or high > 65535:
        low = float(pixels.min())
    elif np.issubdtype(pixels.dtype, np.floating) and high <= 1:
        high = 1.0
    elif bits is not None and bits < 16:  # 16 is the container's size, whatever the sensor gave.
        high = 2.0**bits - 1
    else:
        high = next(2.0**depth - 1 for depth in (8, 10, 12, 14, 16) if high < 2**depth)
    return np.rint((pixels.astype(np.float64) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def flat_images(images) -> Iterator:
    """Each image of what may be one or many."""
    if hasattr(images, "column_name") and hasattr(images, "source"):
        images = undecoded(images.source, images.column_name)[images.column_name]
    if not is_many(images):
        yield images
        return
    for image in images:
        yield from flat_images(image)


def is_many(images) -> bool:
    """Whether these are several images: a batch, or anything to iterate over that is not itself an image."""
    if isinstance(images, np.ndarray) or torch.is_tensor(images):
        # (batch, height, width, channels), or an array of paths or images
        return images.ndim == 4 or (images.ndim == 1 and isinstance(images, np.ndarray) and images.dtype.kind in "OUS")
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping, Image.Image)) or hasattr(images, "read"):
        return False
    return isinstance(images, Iterable)


def undecoded(dataset, column: str):
    """A `datasets` dataset in which the images of a column are left for [`load_image`] to decode, with its care."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"  # a user's own, of decoded images
    if hasattr(feature, "decode") and hasattr(dataset, "cast_column") and not transformed:
        dataset = dataset.cast_column(column, type(feature)(decode=False))  # type: ignore[misc]
    return dataset
