"""Frames of clips that are made here: which, when, and one sentence for what is no whole video."""

import tracemalloc
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import modeling_hsvlt.load_video
from modeling_hsvlt.load_video import VIDEO_SUFFIXES, is_video, sample_video

from .clips import clip, colour_of, sound

SECONDS = ["red"] * 4 + ["green"] * 4 + ["blue"] * 4  # three seconds at 4 frames a second
FORMATS = [
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("matroska", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("mpegts", "libx264"),
]


def seen(source, **options):
    return [(frame.start, frame.end, colour_of(frame.image)) for frame in sample_video(source, **options)]


@pytest.mark.parametrize(("container", "codec"), FORMATS)
def test_one_frame_a_second_in_every_container(container, codec, tmp_path):
    data = clip(SECONDS, tmp_path / "clip.video", container=container, codec=codec)
    assert is_video(data) and is_video(tmp_path / "clip.video")
    found = seen(tmp_path / "clip.video")
    assert [colour for *_, colour in found] == ["red", "green", "blue"]
    np.testing.assert_allclose([frame[:2] for frame in found], [(0, 1), (1, 2), (2, 3)], atol=1e-6)
    for source in (data, bytearray(data), BytesIO(data), {"bytes": data, "path": None}, str(tmp_path / "clip.video")):
        assert seen(source) == found


def test_other_rates_and_a_limit_of_frames():
    data = clip(SECONDS)
    assert [frame[2] for frame in seen(data, frames_per_second=2)] == [name for name in SECONDS[::4] for _ in "12"]
    assert len(seen(data, frames_per_second=4)) == 12
    assert [frame[0] for frame in seen(data, frames_per_second=8)] == [step / 8 for step in range(24)]
    assert seen(data, frames_per_second=0.1) == [(0, 3, "red")]
    assert seen(data, frames_per_second=30, max_frames=2) == [(0, 1.5, "red"), (1.5, 3, "green")]
    assert len(seen(data, frames_per_second=4 / 3)) == 4


def test_a_variable_rate_gives_what_is_on_the_screen():
    data = clip(["red", "green", "blue"], fps=10, times=[0, 25, 27], container="matroska", codec="mpeg4")
    assert [frame[2] for frame in seen(data, frames_per_second=2)] == ["red"] * 5 + ["green"]
    assert [frame[2] for frame in seen(data)] == ["red"] * 3
    assert seen(data, frames_per_second=10)[-1][2] == "blue"


def test_a_clip_that_does_not_begin_at_0_counts_from_its_first_frame():
    data = clip(SECONDS, times=range(40, 52), container="mpegts")
    assert [round(frame[0], 6) for frame in seen(data)] == [0, 1, 2]
    assert [frame[2] for frame in seen(data)] == ["red", "green", "blue"]


@pytest.mark.parametrize("turned", [90, 180, -90])
def test_a_turned_camera(turned):
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:24, :32] = 250  # a white quarter, above on the left
    (frame,) = sample_video(clip([picture] * 4, rotation=turned))
    expected = np.rot90(picture, turned // 90)  # against the clock, as FFmpeg counts
    assert frame.image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(frame.image).astype(int) - expected).mean() < 10


def test_only_videos_are_videos(tmp_path):
    for suffix, format in ((".gif", "GIF"), (".webp", "WEBP"), (".avif", "AVIF"), (".png", "PNG"), (".tif", "TIFF")):
        image = Image.new("RGB", (16, 16), "red")
        more = {} if format in ("PNG", "TIFF") else {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}
        image.save(tmp_path / f"moving{suffix}", format, **more)
        assert not is_video(tmp_path / f"moving{suffix}")
        assert not is_video((tmp_path / f"moving{suffix}").read_bytes())
    (tmp_path / "code.ts").write_text("export const G = 1;\n" * 50)
    (tmp_path / "folder.mp4").mkdir()
    for other in ("code.ts", "folder.mp4", "gone.mp4"):
        assert not is_video(tmp_path / other)
    for other in (image, np.zeros((4, 4, 3)), b"", BytesIO(), "data:image/png;base64,AAAA", {"bytes": None}, None, 7):
        assert not is_video(other)
    stream = BytesIO(b"12345" + clip(SECONDS))
    stream.seek(5)
    assert is_video(stream) and stream.tell() == 5


def one_sentence(source, *words, **options):
    with pytest.raises(ValueError) as caught:
        list(sample_video(source, **options))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert message.endswith(".") and "\n" not in message
    return message


def noisy(count=40, size=(64, 48)):
    return list(np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8))


def index_in_front(data):
    """Of an MP4, as those on the web have it; others stay as they are."""
    boxes, at = {}, 0
    if data[4:8] != b"ftyp":
        return data
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        boxes[data[at + 4 : at + 8]] = data[at : at + size]
        at += size
    moov = bytearray(boxes[b"moov"])
    table = moov.index(b"stco")  # where chunks begin in the file
    for place in range(table + 12, table + 12 + 4 * int.from_bytes(moov[table + 8 : table + 12]), 4):
        moov[place : place + 4] = (int.from_bytes(moov[place : place + 4]) + len(moov)).to_bytes(4)
    return boxes[b"ftyp"] + bytes(moov) + boxes.get(b"free", b"") + boxes.get(b"wide", b"") + boxes[b"mdat"]


@pytest.mark.parametrize(("container", "codec"), FORMATS[:5])
@pytest.mark.parametrize("kept", [0.0005, 0.05, 0.6, 0.9])
def test_what_is_cut_off_is_refused(container, codec, kept, tmp_path):
    data = index_in_front(clip(noisy(), container=container, codec=codec))
    path = tmp_path / "holiday.mp4"
    path.write_bytes(data[: int(len(data) * kept)])
    one_sentence(path, "holiday.mp4", "leave it out")


def test_damage_within_is_refused_or_survived(tmp_path):
    data = index_in_front(clip(noisy()))
    rng, refused = np.random.default_rng(0), 0
    for _ in range(8):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 100):
            broken[place] = rng.integers(256)
        (tmp_path / "broken.mp4").write_bytes(broken)
        try:
            assert list(sample_video(tmp_path / "broken.mp4"))
        except ValueError as error:
            assert "broken.mp4" in str(error) and str(error).endswith("."), error
            refused += 1
    assert refused
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    one_sentence(tmp_path / "text.mp4", "text.mp4", "cannot be decoded")
    (tmp_path / "empty.mov").write_bytes(b"")
    one_sentence(tmp_path / "empty.mov", "empty.mov")


def test_a_video_that_takes_too_long_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "long.mp4").write_bytes(clip(noisy()))
    monkeypatch.setattr(modeling_hsvlt.load_video, "MAX_SECONDS", 0.0)
    one_sentence(tmp_path / "long.mp4", "long.mp4", "it takes more than 0 seconds")


def test_sound_alone_has_no_images(tmp_path):
    (tmp_path / "song.mp4").write_bytes(sound())
    one_sentence(tmp_path / "song.mp4", "no video stream")


def test_a_file_that_leads_to_others_leads_nowhere(tmp_path):
    clip(SECONDS, tmp_path / "secret.ts", container="mpegts")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{tmp_path / 'secret.ts'}\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.mp4").write_text(playlist)
    one_sentence(tmp_path / "list.mp4", "list.mp4", "cannot be decoded")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'secret.ts'}'\n")
    one_sentence(tmp_path / "concat.mp4", "concat.mp4", "cannot be decoded")


def test_frames_have_the_limit_of_images():
    one_sentence(clip(SECONDS), "64 x 48 pixels", "limit of 3000", max_pixels=3000)
    assert len(seen(clip(SECONDS), max_pixels=64 * 48)) == len(seen(clip(SECONDS), max_pixels=None)) == 3


def test_a_file_that_cannot_be_had_has_the_reason_as_its_cause(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    clip(SECONDS, path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(modeling_hsvlt.load_video, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"clip.mp4 cannot be decoded \(Permission denied\)") as caught:
        list(sample_video(path))
    assert isinstance(caught.value.__cause__, OSError)


def test_addresses_and_missing_pyav_are_one_sentence(tmp_path, monkeypatch):
    assert is_video("https://example.com/a.mp4?size=1")
    one_sentence("https://example.com/a.mp4?size=1", "is not read from the web")
    clip(SECONDS, tmp_path / "clip.mp4")
    monkeypatch.setattr(modeling_hsvlt.load_video, "find_spec", lambda name: None)
    one_sentence(tmp_path / "clip.mp4", "clip.mp4", "pip install av")


@pytest.mark.parametrize("options", [{"frames_per_second": 0}, {"frames_per_second": "1"}, {"max_frames": 0}])
def test_sampling_that_makes_no_sense(options):
    one_sentence(b"", next(iter(options)), **options)


def test_the_clip_is_never_in_memory():
    data = clip([np.full((240, 320, 3), shade, dtype=np.uint8) for shade in range(100)], size=(320, 240), fps=10)
    tracemalloc.start()
    assert sum(1 for _ in sample_video(data, frames_per_second=10)) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(data) + 10 * 320 * 240 * 3


def test_suffixes_are_lower_case_and_no_image_s():
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in VIDEO_SUFFIXES)
    assert not VIDEO_SUFFIXES & {".gif", ".webp", ".avif", ".heic", ".ts", ".mts"}
