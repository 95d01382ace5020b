"""Every image below a folder is found, whatever it is called, once; what is left out is counted."""

import os
import unicodedata

import pytest

from modeling_hsvlt.load_video import VIDEO_SUFFIXES
from training.data.image_files import IMAGE_SUFFIXES, ImageFiles, ImageFinder, find_images

JPEG = b"\xff\xd8\xff\xe0 and so on"


def put(folder, *names, data=JPEG):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_whatever_it_is_called(tmp_path):
    names = ["__x__.jpg", "a.AVIF", "b.heic", "deep/C.JPEG", "no_suffix", "x.txt", "tab\there.png", "x" * 251 + ".jpg"]
    put(tmp_path, *names)
    put(tmp_path, "notes.txt", "data.json", data=b"text")
    put(tmp_path, ".hidden.jpg", "._x.jpg", ".thumbnails/1.jpg", "@eaDir/2.jpg", "__MACOSX/3.jpg")
    found = find_images(tmp_path, sniff=True)
    assert found.names == sorted(names)
    assert found.left_out == {"hidden files": 2, "in hidden or thumbnail folders": 3, "no images": 2}
    assert set(names) - set(find_images(tmp_path).names) == {"no_suffix", "x.txt"}


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
def test_accents_may_be_written_in_either_way(tmp_path, disk):
    there = unicodedata.normalize(disk, "é/è.jpg")
    put(tmp_path, there)
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é/è.jpg")
        assert ImageFiles(tmp_path).meant(name) == there
        assert ImageFinder(tmp_path).find(name) == tmp_path / there
        assert ImageFinder(tmp_path).find(f"x/{name}") == tmp_path / there
    put(tmp_path, unicodedata.normalize("NFC" if disk == "NFD" else "NFD", "é/è.jpg"))
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é/è.jpg")
        assert ImageFiles(tmp_path).meant(name) == name and ImageFinder(tmp_path).find(name) == tmp_path / name


def test_links_are_followed_and_end(tmp_path):
    put(tmp_path, "a/1.jpg", "elsewhere/2.jpg")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "1.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    (root / "loop").symlink_to(root)
    found = find_images(root)
    assert found.names == ["1.jpg", "link/2.jpg"]
    assert found.left_out == {"reached a second time by a link": 1}


@pytest.mark.parametrize(
    ("there", "name", "below", "found"),
    [
        (["images/a.jpg"], "images\\a.jpg", "", "images/a.jpg"),
        (["a.jpg"], "images/a.jpg", "", "a.jpg"),
        (["train/images/a.jpg"], "a.jpg", "", "train/images/a.jpg"),
        (["train/a.jpg", "test/a.jpg"], "a.jpg", "test", "test/a.jpg"),
        (["train/a.JPG"], "a.jpg", "", "train/a.JPG"),
        (["x/a.png"], "a", "", "x/a.png"),
        (["root/train/p/1.jpg"], "CheXpert/root/train/p/1.jpg", "", "root/train/p/1.jpg"),
        (["test/1.jpg"], "train/1.jpg", "", None),
        (["a.jpg.png"], "a.jpg", "", None),
        (["a.jpg"], "../a.jpg", "", None),
        (["a.jpg"], "", "", None),
    ],
)
def test_a_name_means_an_image_where_that_is_certain(there, name, below, found, tmp_path):
    put(tmp_path, *there)
    finder = ImageFinder(tmp_path)
    assert finder.find(name, below) == (None if found is None else tmp_path / found)
    assert finder.unlisted() == sorted(set(there) - {found})


def test_a_name_that_may_mean_two_images_is_refused(tmp_path):
    put(tmp_path, "train/a.jpg", "test/a.jpg")
    with pytest.raises(ValueError, match=r"'a.jpg' may be test/a.jpg or train/a.jpg"):
        ImageFinder(tmp_path).find("a.jpg")


def test_names_that_are_no_utf8_are_found(tmp_path):
    with open(os.fsencode(tmp_path) + b"/aab\xe9.jpg", "wb") as file:
        file.write(JPEG)
    assert [os.fsencode(name) for name in find_images(tmp_path).names] == [b"aab\xe9.jpg"]


def test_videos_are_found_where_asked_for(tmp_path):
    assert not VIDEO_SUFFIXES & IMAGE_SUFFIXES
    for name in ("b/clip.MP4", "a.mov", "moving.gif", "photo.jpg", "code.ts", ".hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"whatever it is")
    (tmp_path / "no_suffix").write_bytes(b"\0\0\0\x18ftypisom")
    found = find_images(tmp_path, sniff=True, videos=True)
    assert found.names == ["moving.gif", "photo.jpg"] and found.videos == ["a.mov", "b/clip.MP4", "no_suffix"]
    assert found.left_out == {"no images": 1}
    assert find_images(tmp_path, sniff=True).left_out == {"no images": 4}
