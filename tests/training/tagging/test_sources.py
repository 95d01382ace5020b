"""Images to tag come from `training.data.load`, whatever their labels are."""

import os
import sys

import pytest
from datasets import Dataset, DatasetDict, Image
from PIL import Image as PILImage

from training.data.load import load_images
from training.tag import main
from training.tagging.sources import FileSource, open_source

from ..test_tag import checkpoint, draw, read  # noqa: F401  (a fixture)
from ..tiny_checkpoint import save_images


@pytest.fixture
def saved(tmp_path):
    """Two splits with a column of labels that no vocabulary explains."""
    save_images(tmp_path / "photos")
    paths = sorted(str(path) for path in (tmp_path / "photos").rglob("*.png"))
    rows = Dataset.from_dict({"image": paths, "labels": list(range(len(paths)))}).cast_column("image", Image())
    DatasetDict({"train": rows.select([0]), "val": rows}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_split_is_chosen_by_any_of_its_names(saved):
    for name in ("val", "validation"):
        source = open_source(str(saved), split=name)
        assert len(source.keys) == 7 and source.image(0)["path"].endswith("0.png")
    with pytest.raises(ValueError, match=r"has the splits train, validation; choose one with --split"):
        open_source(str(saved))
    with pytest.raises(ValueError, match=r"has no split 'test', only train, validation"):
        open_source(str(saved), split="test")
    with pytest.raises(ValueError, match=r"has no column 'photo', only image, labels"):
        open_source(str(saved), split="train", image_column="photo")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet is not a whole parquet file"):
        open_source(str(tmp_path))


def test_the_built_in_scenes_are_a_source():
    knobs = {"num_scenes": {"test": 3}}
    assert load_images("scenes", scenes=knobs).column_names == ["image"]
    assert len(load_images("scenes", "test", scenes=knobs)) == 3


def test_odd_names_are_one_record_each_and_what_is_left_out_is_told(checkpoint, tmp_path, capsys):  # noqa: F811
    images = tmp_path / "images"
    draw(images, 3)
    content = (images / "0" / "0.png").read_bytes()
    names = ["__x__.jpg", "tab\there.jpg", "new\nline.png", "y" * 251 + ".jpg", "no_suffix", "UPPER.JPG"]
    for name in names:
        (images / name).write_bytes(content)
    with open(os.fsencode(images) + b"/aab\xe9.png", "wb") as file:
        file.write(content)
    PILImage.open(images / "0" / "0.png").save(images / "a.avif")
    (images / ".thumbnails").mkdir()
    (images / ".thumbnails" / "1.png").write_bytes(content)
    (images / "._x.jpg").write_bytes(b"Mac")
    (images / "notes.md").write_text("no image")
    command = [str(checkpoint), str(images), str(tmp_path / "out"), "--num_workers", "0", "--threshold", "0"]
    for file_format in ("parquet", "jsonl"):
        # No file system here takes a name of 259 bytes, which one xmp would have: that is told, and is no success.
        assert main([*command, "--format", file_format, "--overwrite", "--sidecars", "txt", "xmp"]) == 1
        found = read(tmp_path / "out")
        assert set(found) == {"0/0.png", "1/1.png", "2/2.png", *names, "a.avif", "aab\\xe9.png"}
        assert not any(record["error"] for record in found.values())
        assert found["aab\\xe9.png"]["labels"] == found["0/0.png"]["labels"]
    printed, told = capsys.readouterr()
    assert told.count("error: 1 sidecar could not be written") == 2
    assert "left out: 1 hidden files, 1 in hidden or thumbnail folders, " in printed
    assert (images / "UPPER.txt").exists() and os.path.exists(os.fsencode(images) + b"/aab\xe9.txt")


def test_one_image_a_list_and_urls(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    images = tmp_path / "images"
    draw(images, 2)
    content = (images / "1" / "1.png").read_bytes()
    options = ["--num_workers", "0", "--threshold", "0"]
    assert main([str(checkpoint), str(images / "1" / "1.png"), str(tmp_path / "one"), *options]) == 0
    one = read(tmp_path / "one")
    assert list(one) == ["1.png"] and one["1.png"]["error"] is None

    monkeypatch.setattr(sys.modules["modeling_hsvlt.load_image"], "fetch_image", lambda url, **_: content)
    url = "https://example.com/a%20b.png?size=1"
    (tmp_path / "list.txt").write_text(f"{url}\r\nimages/1/1.png\r\n\r\n", encoding="utf-8-sig")
    assert main([str(checkpoint), str(tmp_path / "list.txt"), str(tmp_path / "listed"), *options]) == 0
    listed = read(tmp_path / "listed")
    assert list(listed) == [url, "images/1/1.png"] and listed[url]["scores"] == one["1.png"]["scores"]
    assert main([str(checkpoint), url, str(tmp_path / "url"), *options]) == 0
    assert list(read(tmp_path / "url")) == [url]
    assert main([str(checkpoint), url, str(tmp_path / "url"), *options, "--sidecars", "txt"]) == 2

    (tmp_path / "latin.txt").write_bytes(b"images/1/1.png\naab\xe9.png\n")
    with pytest.raises(ValueError, match=r"latin.txt, line 2 is not UTF-8"):
        open_source(str(tmp_path / "latin.txt"))


def test_names_that_would_be_written_alike_stay_two(tmp_path):
    source = FileSource(tmp_path, ["aab\\xe9.png", os.fsdecode(b"aab\xe9.png")])
    assert source.keys == ["aab\\xe9.png", "aab\\xe9.png\\"]
    assert [os.fsencode(source.path(key).name) for key in source.keys] == [b"aab\\xe9.png", b"aab\xe9.png"]
