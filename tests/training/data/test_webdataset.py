"""Shards as other programs write them: read whole, or refused by name, and never with a sample lost."""

import gzip
import io
import json
import os
import tarfile

import pytest

from training.data.shards import open_shards
from training.data.webdataset import read_samples, sample_labels
from training.options import DatasetOptions

from ..shards import NAMES, png, write_shards, write_tar

JSON = json.dumps(["cat"]).encode()


def write(path, members):
    """Members of (name, content); a text is where a hard link leads."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content
                shard.addfile(member)
            else:
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def keys(path, **more):
    return [(key, sorted(parts)) for key, parts in read_samples(path, **more)]


def test_files_of_no_sample_are_passed_over(tmp_path, monkeypatch):
    members = [("./", b""), ("README.md", b"#"), ("./a.b/1.jpg", png(1)), ("./a.b/1.json", JSON)]
    members += [("./a.b/._1.jpg", b"\0"), (".DS_Store", b"x"), ("./a.b/1.npy", bytes(99_999)), ("2.JPG", png(2))]
    monkeypatch.setattr("training.data.webdataset.MAX_BYTES", 9_999)  # of what is read
    assert keys(write(tmp_path / "0.tar", members)) == [("a.b/1", [".jpg", ".json"]), ("2", [".jpg"])]


def test_samples_that_were_given_are_passed_over_unread(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", range(6))
    every, plain, read = list(read_samples(tmp_path / "0.tar")), tarfile.TarFile.extractfile, []
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda tar, of: read.append(of.name) or plain(tar, of))
    for first in range(8):
        read.clear()
        assert list(read_samples(tmp_path / "0.tar", first)) == every[first:]
        assert len(read) == 2 * len(every[first:])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", png(1)), ("1.json", JSON), ("2.json", JSON), ("2.jpg", "1.jpg")], "2.jpg is a link"),
        ([("1.jpg", png(1)), ("1.json", JSON), ("1.jpg", png(2))], "the key 1 has two files .jpg"),
        ([("1.jpg", png(1)), ("2.jpg", png(2)), ("1.json", JSON)], "the key 1 comes twice.*--sort=name"),
    ],
)
def test_what_would_lose_a_sample_is_refused(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        list(read_samples(write(tmp_path / "0.tar", members)))


@pytest.mark.parametrize("kind", ["cut", "page", "empty", "gz", "damaged gz"])
def test_a_damaged_shard_is_named(tmp_path, kind):
    write_shards(tmp_path, "tar", [40, 40], names=False)
    path, data = tmp_path / "train-00001.tar", (tmp_path / "train-00000.tar").read_bytes()
    packed = bytearray(gzip.compress(data))
    packed[500:700] = bytes(200)
    content = {"cut": data[:20_480], "page": b"<html>404</html>" * 99, "empty": b"", "gz": gzip.compress(data)[:999]}
    path.write_bytes(content.get(kind, packed))
    with pytest.raises(ValueError, match=r"train-00001\.tar is not a whole tar file"):
        list(read_samples(path))
    if "gz" not in kind:  # before anything is read
        with pytest.raises(ValueError, match=r"train-00001\.tar is not a whole tar file"):
            open_shards(DatasetOptions(dataset=str(tmp_path)))


def test_what_stands_beside_the_shards(tmp_path):
    """Tables of img2dataset, hidden folders; and shards that are not read are no shards that are not there."""

    def files():
        return [
            os.path.relpath(file, tmp_path)
            for file in open_shards(DatasetOptions(dataset=str(tmp_path)))[0]["train"].files
        ]

    write_shards(tmp_path, "tar", [1, 1], names=False)
    for name in ("train-00000.parquet", "train-00001.parquet", "train-00000_stats.json"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".snapshot").mkdir()
    write_tar(tmp_path / ".snapshot" / "train-00000.tar", [1])
    assert files() == ["train-00000.tar", "train-00001.tar"]
    (tmp_path / "train-00002.tar.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-00002\.tar\.zst is compressed in a way"):
        files()


def test_one_of_several_images_is_chosen(tmp_path):
    write(tmp_path / "s" / "0.tar", [("1.jpg", png(1)), ("1.seg.png", png(2)), ("1.json", JSON)])

    def image(**more):
        options = DatasetOptions(dataset=str(tmp_path / "s"), **more)
        return next(open_shards(options)[0]["train"].read(0)).values["image"]

    with pytest.raises(ValueError, match=r"several images .*--image_column jpg"):
        image()
    assert image(image_column="jpg") == {"bytes": png(1), "path": "0.tar/1.jpg"}
    assert image(image_column="seg.png") == {"bytes": png(2), "path": "0.tar/1.seg.png"}


def test_labels_of_a_sample():
    def labels(label_format="auto", **parts):
        parts = {f".{suffix}": content for suffix, content in parts.items()}
        return sample_labels(parts, None, ",", NAMES, "0.tar, 1", label_format)

    assert labels(json=b"[0, 2]") == ["cat", "sea"] and labels(cls=b"0 2\n") == ["cat", "sea"]
    assert labels(cls=b"1", json=b'{"width": 16}') == ["dog"], "a json without labels"
    assert labels(cls=b"1", json=b'{"labels": ["cat"]}') == ["cat"]
    with pytest.raises(ValueError, match=r"\[1, 0, 1\], which may be class numbers or a 0 or 1 for each label"):
        labels(json=b"[1, 0, 1]")
    assert labels("ids", json=b"[1, 0, 1]") == ["dog", "cat", "dog"]
    with pytest.raises(ValueError, match=r"'cat' in its \.cls, where class numbers"):
        labels(cls=b"cat")
    with pytest.raises(ValueError, match="next to each other"):
        labels(jpg=b"")
