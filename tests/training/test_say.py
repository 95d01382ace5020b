"""Counts read well, and a printed command does what it says: read again, it gives the same options."""

import shlex

import pytest

from training import push
from training.options import CommandParser, DatasetOptions, ScoringOptions, dataset_options
from training.say import counted, say_next


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (1234, "image", "1,234 images"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (3, "entry", "3 entries"),
    ],
)
def test_one_is_singular(count, noun, words):
    assert counted(count, noun) == words


def test_a_dataset_that_is_read_as_usual_needs_no_words(capsys):
    say_next("check", "photos", like=DatasetOptions(dataset="photos"))
    assert capsys.readouterr().out == "Next: hsvlt check photos\n"


@pytest.mark.parametrize(
    "given",
    [
        {"label_names": ["cat", "tv monitor", "-1", "[x]", "on"]},
        {"label_columns": ["cat"]},
        {"label_separator": "|", "image_column": "file name"},
        {"label_separator": "\t"},
        {"scenes": {"seed": 1, "num_scenes": {"train": 3}}},
        {"missing_images": "skip", "exclude": "checked/it's here.txt"},
    ],
)
def test_a_printed_command_reads_the_same_dataset(given, capsys):
    options = DatasetOptions(dataset="my photos", **given)
    say_next("evaluate", "runs/a run", options.dataset, like=options)
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == ["Next:", "hsvlt", "evaluate", "runs/a run", "my photos"]
    read = CommandParser(ScoringOptions).read(words[3:])
    assert dataset_options(read) == dataset_options(options)


def test_a_dry_run_s_next_command_pushes_the_same(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("training.publish.hub.push_run", lambda *args, **kwargs: calls.append((args, kwargs)))
    given = ["runs/my run", "org/name", "--license", "mit", "--public", "--tag", "v2"]
    assert push.main([*given, "--dry_run", "--folder", str(tmp_path / "built")]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["Next:", "hsvlt", "push"] and push.main(words[3:]) == 0
    (dry, settings), (real, others) = calls
    assert dry == real and others == {**settings, "dry_run": False, "folder": None}
    assert capsys.readouterr().out == "Next: hsvlt tag org/name photo.jpg\n"
