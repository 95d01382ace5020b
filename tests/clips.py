"""Videos of a few frames of one colour each, as PyAV writes them."""

from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest

av = pytest.importorskip("av", reason="PyAV is the extra video")

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


def clip(frames, path=None, *, fps=4, container="mp4", codec="libx264", size=(64, 48), times=None, rotation=0):
    """Bytes of a video, which also go to `path`.

    Args:
        frames: Names of `COLOURS`, or arrays of shape (height, width, 3).
        times: Of each frame, in ticks of 1 / fps; None: one after the other.
    """
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, colour in enumerate(frames):
            if isinstance(colour, str):
                colour = np.full((size[1], size[0], 3), COLOURS[colour], dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(colour, format="rgb24")
            frame.pts, frame.time_base = number if times is None else times[number], Fraction(1, fps)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    if path is not None:
        path.write_bytes(file.getvalue())
    return file.getvalue()


def sound(container="mp4", seconds=1):
    """A file with a tone and no images."""
    file = BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream("aac", rate=16000, layout="mono")
        tone = np.sin(np.arange(16000 * seconds) / 20).astype(np.float32)
        for start in range(0, len(tone) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def colour_of(image) -> str:
    """Which of `COLOURS` an image is nearest to."""
    mean = np.asarray(image).reshape(-1, 3).mean(axis=0)
    return min(COLOURS, key=lambda name: np.abs(mean - COLOURS[name]).sum())
