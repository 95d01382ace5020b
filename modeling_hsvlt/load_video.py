"""Frames of a video, at a rate, as they are decoded; a checkpoint carries this file.

PyAV decodes, and is imported when a video comes and no sooner. One frame is in memory, never the clip.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from time import process_time
from typing import NamedTuple

from PIL import Image

from .load_image import MAX_PIXELS, describe

# What cameras and programs write. FFmpeg knows three hundred more, of which some are lists of files and addresses.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
# Not .ts and .mts, which are mostly TypeScript: such a video is known by how it begins.
VIDEO_SUFFIXES = frozenset(
    ".3g2 .3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .qt .webm .wmv".split()  # noqa: SIM905
)
_STILL_OR_SOUND = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"M4A ", b"M4B ")
MAX_FRAMES = 600
MAX_SECONDS = 30.0  # of processor time for each frame that is looked at, with those that are decoded on the way
NEEDS_PYAV = "is a video, which PyAV reads; pip install av"


class Frame(NamedTuple):
    """What is on the screen at `start`, in seconds from the video's first frame, and stands for the time to `end`."""

    start: float
    end: float
    image: Image.Image


def can_read_videos() -> bool:
    return find_spec("av") is not None


def is_video(source) -> bool:
    """Whether a path, URL, bytes, open file or undecoded `datasets.Video` is called or begins like a video. GIF, WebP
    and AVIF are images, also where they move."""
    source = _unwrapped(source)
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if not isinstance(path, str) or path.startswith("data:"):
            return False
        if path.startswith(("http://", "https://")):
            return _suffix(path.partition("?")[0].partition("#")[0]) in VIDEO_SUFFIXES
        if not os.path.isfile(path):
            return False
        if _suffix(path) in VIDEO_SUFFIXES:
            return True
        try:
            with open(path, "rb") as file:
                return begins_like_video(file.read(400))
        except OSError:
            return False
    if isinstance(source, (bytes, bytearray)):
        return begins_like_video(bytes(source[:400]))
    if hasattr(source, "read") and hasattr(source, "seek"):
        start = source.tell()
        begin = source.read(400)
        source.seek(start)
        return isinstance(begin, bytes) and begins_like_video(begin)
    return False


def begins_like_video(begin: bytes) -> bool:
    """By the first 400 bytes of a file."""
    if begin[4:8] == b"ftyp":
        return begin[8:12] not in _STILL_OR_SOUND
    if begin[4:8] in (b"moov", b"mdat", b"wide") or begin.startswith((b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"FLV\1")):
        return True
    if begin[:4] == b"RIFF":
        return begin[8:12] == b"AVI "
    return any(begin[at : at + 1] == begin[at + step : at + step + 1] == b"G" for at, step in ((0, 188), (4, 192)))


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _unwrapped(source):
    return source.get("bytes") or source.get("path") if isinstance(source, Mapping) else source


def sample_video(
    source, *, frames_per_second: float = 1.0, max_frames: int = MAX_FRAMES, max_pixels: int | None = MAX_PIXELS
) -> Iterator[Frame]:
    """Frames of a video, evenly spaced in time from its first on, decoded one after the other and turned as people see
    them.

    The video is read twice: once for the times of its frames, without decoding, for headers are wrong or silent about
    them; then to decode. So it need not fit in memory, and a variable frame rate gives what is on the screen at each
    time. Where the rate would give more than `max_frames`, they are as far apart as it takes.

    Args:
        source: What [`is_video`] knows.
        frames_per_second, max_frames: How many.
        max_pixels: As in [`load_image`], of a frame.

    Raises:
        ValueError: PyAV is not installed, or the video cannot be had, is damaged, cut off, too large or without frames;
            the message names it.
    """
    check_sampling(frames_per_second, max_frames)
    name = describe(source)
    if not can_read_videos():
        raise ValueError(f"{name} {NEEDS_PYAV}.")
    source = _unwrapped(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{name} is a video, which is not read from the web; download it and give the file.")
    with _naming_failures(name), _file(source) as file:
        begin, end = _extent(file, name, max_pixels)
        step = max(1 / Fraction(frames_per_second).limit_denominator(10**6), (end - begin) / max_frames)
        count = max(math.ceil((end - begin) / step), 1)

        def frame_at(number: int, image: Image.Image) -> Frame:
            return Frame(float(number * step), float(min((number + 1) * step, end - begin)), image)

        number, shown, image = 0, None, None
        for time, frame in _decoded(file, name, max_pixels, MAX_SECONDS * count):
            while shown is not None and number < count and begin + number * step < time:
                image = image or _upright(shown)
                yield frame_at(number, image)
                number += 1
            if number == count:
                return
            shown, image = frame, None
        if shown is None:
            raise ValueError("it has no whole frame")
        image = image or _upright(shown)
        for last in range(number, count):
            yield frame_at(last, image)


def _file(source):
    """What is read, as a context that closes what it opened itself."""
    if isinstance(source, (str, os.PathLike)):
        return open(source, "rb")
    return nullcontext(BytesIO(source) if isinstance(source, (bytes, bytearray)) else source)


def check_sampling(frames_per_second, max_frames) -> None:
    """
    Raises:
        ValueError: not a positive number of frames a second, or less than one in all.
    """
    if isinstance(frames_per_second, bool) or not isinstance(frames_per_second, (int, float)):
        raise ValueError(f"frames_per_second must be a number, but it is {frames_per_second!r}.")
    if not 1e-5 <= frames_per_second <= 1000:
        raise ValueError(f"frames_per_second must lie between 0.00001 and 1000, but it is {frames_per_second!r}.")
    if type(max_frames) is not int or max_frames < 1:
        raise ValueError(f"max_frames must be a whole number from 1 on, but it is {max_frames!r}.")


@contextmanager
def _naming_failures(name: str):
    """One sentence for whatever FFmpeg finds; what the operating system does not give is the error's cause."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(name):
            raise
        why = (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
        from_disk = isinstance(error, OSError) and not type(error).__module__.startswith("av")
        raise ValueError(f"{name} cannot be decoded ({why}); replace the file or leave it out.") from (
            error if from_disk else None
        )


@contextmanager
def _opened(file, name: str, max_pixels: int | None):
    """The container and its first stream of moving images; nothing else is opened, whatever the file asks for."""
    file.seek(0)
    with import_module("av").open(
        file,
        options={} if max_pixels is None else {"max_pixels": str(min(max_pixels, 2**31 - 1))},
        container_options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none"},
    ) as container:
        covers = import_module("av.stream").Disposition.attached_pic  # of an album
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise ValueError(f"{name} has no video stream, or is cut off before it; replace it or leave it out.")
        _check_size(streams[0].codec_context, name, max_pixels)
        yield container, streams[0]


def _check_size(size, name: str, max_pixels: int | None) -> None:
    if max_pixels is not None and size.width * size.height > max_pixels:
        raise ValueError(
            f"{name} has {size.width} x {size.height} pixels, more than the limit of {max_pixels}; shrink it or raise "
            "max_pixels."
        )


def _extent(file, name: str, max_pixels: int | None) -> tuple[Fraction, Fraction]:
    """When the first frame is shown and when the last ends, by the packets.

    Raises:
        ValueError: the file ends before its header says.
    """
    begin, end, read_to, whole, lasts = Fraction(0), None, Fraction(0), True, Fraction(0)
    with _opened(file, name, max_pixels) as (container, stream):
        usual = 1 / stream.average_rate if stream.average_rate else Fraction(0)
        for packet in container.demux():
            pts = packet.dts if packet.pts is None else packet.pts
            if pts is None or not packet.size:
                continue
            time, duration = pts * packet.time_base, (packet.duration or 0) * packet.time_base
            read_to = max(read_to, time + duration)
            if packet.stream.index == stream.index:
                until = time + (duration or usual)
                begin, end = (time, until) if end is None else (min(begin, time), max(end, until))
                whole, lasts = not packet.is_corrupt, duration
        if end is None:
            raise ValueError(f"{name} has no frames, or is cut off before them; replace it or leave it out.")
        declared = Fraction((container.start_time or 0) + (container.duration or 0), 10**6)
        # A last frame that does not say how long it lasts may be what the header counts and the packets do not.
        if not whole or (lasts and declared - read_to > max(Fraction(1), declared / 20)):
            raise ValueError(f"{name} is cut off after {float(end - begin):.1f} s; replace it or leave it out.")
        return begin, end


def _decoded(file, name: str, max_pixels: int | None, max_seconds: float) -> Iterator[tuple[Fraction, object]]:
    """Each frame, and when it comes on the screen, within half a tick of the video's clock.

    Raises:
        ValueError: that takes more processor time than `max_seconds`.
    """
    with _opened(file, name, max_pixels) as (container, stream):
        frames, left = container.decode(stream), max_seconds
        while True:
            began = process_time()
            frame = next(frames, None)
            left -= process_time() - began
            if left < 0:
                raise ValueError(f"it takes more than {max_seconds:g} seconds")
            if frame is None:
                return
            pts = frame.dts if frame.pts is None else frame.pts
            if pts is None or frame.is_corrupt:  # as the first ones of what was cut from a broadcast
                continue
            _check_size(frame, name, max_pixels)
            yield (pts - Fraction(1, 2)) * frame.time_base, frame


def _upright(frame) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
