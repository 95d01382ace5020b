"""Training on streams of shards that the tests make: interrupted anywhere, on one process and on two, with workers."""

import json
import shutil
import signal
from collections import Counter
from itertools import chain

import pytest
import torch
import yaml
from safetensors.torch import load_file

import training.data.stream_loader
import training.loop.step
from training.checkpoint.series import checkpoints
from training.config import TrainingConfig
from training.evaluate import main as evaluate
from training.train import main

from ..forked import Ended, forked
from .interruptions import at_once, interrupt, sigterm
from .shards import labels_of, png, write_shards, write_tar
from .tiny_run import TINY

SIZES = [9, 14, 3, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("shards"), "tar", SIZES)
    return write_shards(folder, "tar", [9, 4], split="validation", first=40)


def write_recipe(path, folder, **more):
    options = {name: value for name, value in TINY.items() if name != "scenes"}
    options |= {"dataset": str(folder), "streaming": True, "shuffle_buffer": 6, "epoch_steps": 5, "batch_size": 3}
    path.write_text(yaml.safe_dump({**options, "save_every_steps": 2, "warmup_epochs": 0, **more}))
    return str(path)


@pytest.fixture(scope="module")
def recipe(folder, tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe") / "stream.yaml", folder, gradient_accumulation_steps=2)


def spy(seen, dataset, rows):
    """The images of a batch as they are decoded here; of the passes as well."""
    part = rows.state["parts"][0]
    seen.append((part["number"], [(row.shard, row.row) for row in rows]))
    return plain_getitems(dataset, rows)


plain_getitems = training.data.stream_loader.StreamDataset.__getitems__


def watch(monkeypatch):
    seen = []
    monkeypatch.setattr(
        training.data.stream_loader.StreamDataset, "__getitems__", lambda dataset, rows: spy(seen, dataset, rows)
    )
    return seen


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines(folder)]


def tensors_of(folder):
    return load_file(checkpoints(folder)[0] / "training_state" / "tensors.safetensors")


def assert_same_end(whole, folder):
    expected, got = tensors_of(whole), tensors_of(folder)
    assert [name for name in expected | got if not torch.equal(expected[name], got[name])] == []
    assert timeless(whole) == timeless(folder)
    assert (whole / "results.json").read_text() == (folder / "results.json").read_text()


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([recipe, "--output_dir", str(folder)]) == 0
    return folder


def test_a_run_sees_each_image_once_a_pass_and_is_scored_on_its_part(recipe, whole, tmp_path, monkeypatch, capsys):
    seen = watch(monkeypatch)
    assert main([recipe, "--output_dir", str(tmp_path / "run"), "--max_steps", "8"]) == 0
    said = capsys.readouterr().out
    assert "A stream of 4 shards to train on, 13 to validate, 3 labels" in said and "8 steps of 6 images" in said
    rows = list(chain.from_iterable(rows for _, rows in seen))
    assert len(rows) >= 48 and len(set(rows[:37])) == 37
    assert Counter(rows[:37]) == Counter((shard, row) for shard, size in enumerate(SIZES) for row in range(size))
    log = lines(whole)
    assert [line["epoch"] for line in log if "validation/mAP" in line] == [1, 2]
    assert [line["step"] for line in log if "train/loss" in line] == list(range(1, 11))
    results = json.loads((whole / "results.json").read_text())
    assert results["unreadable_images"] == 0 and results["validation"]["num_samples"] == 13


def test_the_next_command_scores_the_same_part(folder, whole, tmp_path, capsys):
    options = ["--streaming", "--split", "validation", "--num_workers", "0", "--output", str(tmp_path / "scored")]
    assert evaluate([str(whole), str(folder), *options]) == 0
    scored = (tmp_path / "scored" / "results.json").read_text()
    expected = json.loads((whole / "results.json").read_text())["validation"]["mAP"]
    assert json.loads(scored)["metrics"]["mAP"] == pytest.approx(expected)


@pytest.mark.parametrize(("at_batch", "how", "workers"), [(7, at_once, 0), (13, sigterm, 0), (17, at_once, 2)])
@pytest.mark.one_machine
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    recipe, whole, tmp_path, monkeypatch, at_batch, how, workers
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, at_batch, how)
        options = ["--num_workers", str(workers)]
        assert main([recipe, "--output_dir", str(folder), *options]) == (130 if how is at_once else 0)
    # Another number of workers: neither the order nor what they had ready matters.
    assert main([str(folder), "--resume", "--num_workers", "0" if workers else "1"]) == 0
    assert_same_end(whole, folder)


@pytest.mark.slow
def test_resuming_refuses_other_shards_and_can_begin_anew_with_them(recipe, whole, folder, tmp_path, capsys):
    other, run = tmp_path / "shards", tmp_path / "run"
    shutil.copytree(folder, other)
    shutil.copytree(whole, run)
    write_tar(other / "train-00002.tar", range(3))
    options = ["--resume", "--dataset", str(other), "--epochs", "3", "--output_dir", str(run)]
    assert main([str(run), *options]) == 2
    assert "was trained with dataset" in capsys.readouterr().err
    assert main([str(run), *options, "--resume_despite", "[dataset, total_steps]"]) == 0
    assert lines(run)[-1]["step"] == 15


def test_parquet_counts_its_rows_and_holds_a_part_of_train_out(tmp_path, monkeypatch, capsys):
    """Which alone another command scores: a larger part would hold images of training."""
    folder = write_shards(tmp_path / "shards", "parquet", [9, 12], names=False)
    recipe = write_recipe(tmp_path / "r.yaml", folder, epoch_steps=None, validation_images=4, epochs=1, loss_type="asl")
    seen = watch(monkeypatch)
    assert main([recipe, "--output_dir", str(tmp_path / "run")]) == 0
    assert "4 to validate" in (said := capsys.readouterr().out) and "6 steps of 3 images" in said
    rows = [row for number, rows in seen for row in rows][:17]
    assert sorted(rows) == [(0, row) for row in range(2, 9)] + [(1, row) for row in range(2, 12)]
    command = [str(tmp_path / "run"), str(folder), "--streaming", "--num_workers", "0", "--validation_images"]
    assert evaluate([*command, "6"]) == 2 and "--validation_images 4: give the same" in capsys.readouterr().err
    assert evaluate([*command, "4"]) == 0


def unreadable(number):
    return b"no image" if number in (3, 17) else png(number)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("damaged"), "tar", [6], split="validation", first=40)
    for shard in (0, 1):
        write_tar(folder / f"train-{shard}.tar", range(12 * shard, 12 * shard + 12), content=unreadable)
    return folder


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_images_that_cannot_be_read_end_a_run_by_name_or_are_counted(damaged, tmp_path, capsys, processes):
    def launched(command):
        if processes > 1:
            return forked(main, command, processes=processes)
        return Ended(main(command), *capsys.readouterr())

    recipe = write_recipe(tmp_path / "r.yaml", damaged, epoch_steps=12 // processes, epochs=1)
    command = [recipe, "--output_dir", str(tmp_path / "run")]
    ended = launched(command)
    assert ended.returncode == 1 and "cannot be read" in ended.stderr and "--on_unreadable skip" in ended.stderr
    assert "Traceback" not in ended.stderr and any(name in ended.stderr for name in ("00003.png", "00017.png"))
    ended = launched([*command, "--on_unreadable", "skip", "--overwrite"])
    assert ended.returncode == 0, ended.stderr[-2000:]
    named = [name for line in lines(tmp_path / "run") for name in line.get("unreadable", ())]
    assert all(any(number in name for name in named) for number in ("00003.png", "00017.png"))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["unreadable_images"] == len(named)
    assert named[0] in ended.stderr


def test_wrong_labels_end_a_run_by_name(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", "tar", [6], split="validation", first=40)
    write_tar(folder / "train-0.tar", range(9), lambda number: ["cow"] if number == 5 else labels_of(number))
    recipe = write_recipe(tmp_path / "r.yaml", folder)
    assert main([recipe, "--output_dir", str(tmp_path / "run"), "--on_unreadable", "skip"]) == 1
    assert "00005.png): label 'cow' is not among the 3 label names" in capsys.readouterr().err


def train_watched(command, folder, stop_at):
    """Writes what each process decodes; and kills itself in the middle of batch `stop_at`."""
    import os

    rank = os.environ.get("RANK", "0")

    def getitems(dataset, rows):
        part = rows.state["parts"][0]
        with open(f"{folder}/seen-{rank}", "a") as file:
            file.write(json.dumps([part["number"], [(row.shard, row.row) for row in rows]]) + "\n")
        return plain_getitems(dataset, rows)

    training.data.stream_loader.StreamDataset.__getitems__ = getitems
    batches, plain = iter(range(10_000)), training.loop.step.normalize_pixels

    def normalize_pixels(*arguments):
        if next(batches) == stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    training.loop.step.normalize_pixels = normalize_pixels
    return main(command)


@pytest.mark.slow
@pytest.mark.one_machine
def test_two_processes_share_a_stream_are_killed_and_end_alike(recipe, tmp_path):
    """Of 37 images in 4 shards and then, with --resume_despite, one process goes on where both were."""
    command = [recipe, "--gradient_accumulation_steps", "1", "--epoch_steps", "7", "--output_dir"]
    for name in ("whole", "killed", "again"):
        (tmp_path / name).mkdir()
    ended = forked(train_watched, [*command, str(tmp_path / "w")], tmp_path / "whole", None, processes=2)
    assert ended.returncode == 0, ended.stderr[-2000:]
    files = [tmp_path / "whole" / f"seen-{rank}" for rank in (0, 1)]
    seen = [[json.loads(line)[1] for line in file.read_text().splitlines()] for file in files]
    rows = Counter(tuple(row) for of_rank in seen for batch in of_rank[:5] for row in batch)
    assert len(rows) == 30 and set(rows.values()) == {1}, "two processes, an image once"
    ended = forked(train_watched, [*command, str(tmp_path / "k")], tmp_path / "killed", 9, processes=2)
    assert ended.returncode == signal.SIGKILL
    assert checkpoints(tmp_path / "k")[0].name in ("checkpoint-7", "checkpoint-8")
    shutil.copytree(tmp_path / "k", tmp_path / "one")
    ended = forked(main, [str(tmp_path / "k"), "--resume"], processes=2)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert_same_end(tmp_path / "w", tmp_path / "k")
    how = ["--resume", "--resume_despite", "[batches]", "--output_dir", str(tmp_path / "one")]
    ended = forked(train_watched, [str(tmp_path / "one"), *how], tmp_path / "again", None)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert lines(tmp_path / "one")[-1]["step"] == 14


def test_what_does_not_go_with_a_stream_is_refused():
    for options, message in (
        ({"cache_images": True}, "cache_images needs a dataset that is read whole"),
        ({"partial_labels": {"known_fraction": 0.1}}, "partial_labels needs"),
        ({"exclude": "list.txt"}, "a stream does not have"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"streaming": False, "epoch_steps": 3}, "epoch_steps belongs to a stream"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainingConfig(**{"streaming": True, "dataset": "folder", **options})


def test_scenes_are_no_stream(tmp_path, capsys):
    assert main(["quickstart", "--streaming", "--output_dir", str(tmp_path / "run")]) == 2
    assert "scenes are drawn, and no stream" in capsys.readouterr().err


def test_a_length_that_nobody_knows_is_asked_for(folder, recipe, tmp_path, capsys):
    assert main([recipe, "--epoch_steps", "null", "--output_dir", str(tmp_path / "run")]) == 2
    assert "say with epoch_steps how many steps an epoch is" in capsys.readouterr().err
