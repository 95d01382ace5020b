"""Shards are tagged as they come: an image a record, like those of files, resumed, and on any number of processes."""

import signal

import pyarrow.parquet as pq
import pytest

import training.tagging.run
from training.data.stream_order import one_pass
from training.tag import main
from training.tagging.sources import StreamSource, open_source

from ...forked import forked
from ..shards import png, write_parquet, write_shards, write_tar
from ..test_tag import checkpoint, read  # noqa: F401 (a fixture)


def content(number):
    return b"no image" if number == 5 else png(number)


@pytest.fixture
def tars(tmp_path):
    for folder, shard, numbers in (("a", 0, range(4)), ("a", 1, range(4, 5)), ("b", 0, range(5, 12))):
        (tmp_path / "tars" / folder).mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / "tars" / folder / f"{shard}.tar", numbers, content=content)
    return tmp_path / "tars"


KEYS = (
    {f"a/0.tar/0000{n}.png" for n in range(4)} | {"a/1.tar/00004.png"} | {f"b/0.tar/{n:05}.png" for n in range(5, 12)}
)


def test_webdataset_gives_what_its_files_give(checkpoint, tars, tmp_path, capsys):  # noqa: F811
    for number in range(12):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{number:05}.png").write_bytes(content(number))
    options = ["--batch_size", "4", "--num_workers", "2", "--dtype", "auto"]
    assert main([str(checkpoint), str(tars), str(tmp_path / "out"), *options]) == 0
    assert "3 shards; 0 images of them have a record" in (said := capsys.readouterr().out) and "12 images" in said
    assert main([str(checkpoint), str(tmp_path / "files"), str(tmp_path / "of_files"), *options]) == 0
    found, expected = read(tmp_path / "out"), read(tmp_path / "of_files")
    assert set(found) == KEYS
    for key, record in found.items():
        other = expected[key.rpartition("/")[2]]
        assert (record["labels"], record["scores"]) == (other["labels"], other["scores"])
        assert (record["error"] is None) == (other["error"] is None) == ("00005" not in key)
    assert "b/0.tar/00005.png\t" in (tmp_path / "out" / "unreadable.txt").read_text()


def test_parquet_gives_the_same_rows_as_a_copy_of_it(checkpoint, tmp_path):  # noqa: F811
    write_shards(tmp_path / "data", "parquet", [3, 1, 4])
    options = ["--batch_size", "2", "--num_workers", "0"]
    assert main([str(checkpoint), str(tmp_path / "data"), str(tmp_path / "copied"), *options]) == 0
    assert main([str(checkpoint), str(tmp_path / "data"), str(tmp_path / "out"), "--streaming", *options]) == 0
    assert read(tmp_path / "out") == read(tmp_path / "copied") and set(read(tmp_path / "out")) == set(range(8))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on(checkpoint, tars, tmp_path, processes):  # noqa: F811
    command = [str(checkpoint), str(tars), str(tmp_path / "out"), "--part_size", "2", "--batch_size", "2"]
    command += ["--num_workers", "0", "--threshold", "0"]
    ended = forked(killed_after_a_part, command, processes=processes)
    assert ended.returncode == signal.SIGKILL
    before = {part.name: pq.read_table(part).to_pylist() for part in (tmp_path / "out").glob("part-*")}
    assert before and len(read(tmp_path / "out")) < 12
    ended = forked(main, command, processes=processes)
    assert ended.returncode == 0, ended.stderr
    assert set(read(tmp_path / "out")) == KEYS
    assert all(pq.read_table(tmp_path / "out" / name).to_pylist() == rows for name, rows in before.items())
    write_tar(tars / "c.tar", range(12, 14))  # shards that came since
    assert main(command) == 0
    assert set(read(tmp_path / "out")) == {*KEYS, "c.tar/00012.png", "c.tar/00013.png"}
    write_tar(tars / "a" / "0.tar", range(3))
    assert main(command) == 2


def killed_after_a_part(command):
    import os

    plain = training.tagging.run.PartWriter.flush

    def flush(writer):
        plain(writer)
        if writer.count:
            os.kill(os.getpid(), signal.SIGKILL)

    training.tagging.run.PartWriter.flush = flush
    return main(command)


def test_sources(tars, tmp_path, capsys, checkpoint):  # noqa: F811
    source = open_source(str(tars / "a" / "0.tar"))
    assert isinstance(source, StreamSource) and [key for key, _ in source.images()] == [
        f"0.tar/0000{number}.png" for number in range(4)
    ]
    for processes in (1, 2, 5):
        rows = [row.index for process in range(processes) for row in one_pass(source.shards, process, processes)]
        assert sorted(rows) == list(range(4))
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train.parquet", [1])
    write_parquet(tmp_path / "data" / "test.parquet", [1])
    write_shards(tmp_path / "img2dataset", "tar", [2, 1])
    for shard in (0, 1):
        write_parquet(tmp_path / "img2dataset" / f"train-{shard:05}.parquet", [1])
    assert len([key for key, _ in open_source(str(tmp_path / "img2dataset")).images()]) == 3
    with pytest.raises(ValueError, match=r"splits test, train; choose one with --split"):
        open_source(str(tmp_path / "data"), streaming=True)
    command = [str(checkpoint), str(tars), str(tmp_path / "out"), "--sidecars", "txt"]
    assert main(command) == 2 and "no folder for sidecars" in capsys.readouterr().err
