"""One dialect: an option has one name and one spelling in YAML, on every command line, and in Python."""

import argparse
import csv
import dataclasses
import importlib
import json
import re
import runpy

import numpy as np
import pytest
import torch.distributed as dist
import transformers
from PIL import Image

from training import check_data, options, split, train
from training.config import TrainingConfig, parse_config
from training.data.load import load
from training.options import (
    CommandParser,
    DatasetOptions,
    ScoringOptions,
    dataset_options,
    option,
    refuse,
)
from training.prepare import __main__ as prepare
from training.prepare import long_tail

COMMANDS = {
    "evaluate": "EvaluateOptions",
    "fit_thresholds": "FitOptions",
    "calibrate": "CalibrateOptions",
    "tag": "TagOptions",
    "export": "ExportOptions",
    "push": "PushOptions",
    "serve": "ServeOptions",
    "check_data": "CheckOptions",
    "split": "SplitOptions",
    "convert": "ConvertOptions",
}
SEPARATORS = [("|", "|"), (",", ","), (":", ":"), ("\\t", "\t"), ("\t", "\t"), (";", ";"), (" / ", " / "), ("#", "#")]


def table(folder, separator):
    """Twenty images of which `train.csv` says in one text what they show."""
    folder.mkdir()
    rows = [["file_name", "labels"]]
    for index in range(20):
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append([f"{index}.png", separator.join(["cat", "dog"][: 1 + index % 2])])
    with (folder / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def readers():
    """Of every command line that reads a dataset: its words to its options."""
    found = {"train": parse_config}
    for command, kind in COMMANDS.items():
        kind = getattr(importlib.import_module(f"training.{command}"), kind)
        if issubclass(kind, DatasetOptions):
            names = [field.name for field in dataclasses.fields(kind) if field.metadata.get("positional")]
            needed = ["--fractions", "0.5", "0.5"] if command == "split" else []
            found[command] = lambda argv, kind=kind, names=names, needed=needed: CommandParser(kind).read(
                [*names, *needed, *argv]
            )
    for kind in ("csv", "imagefolder", "dataset"):
        found[f"prepare {kind}"] = lambda argv, kind=kind: prepare.build_parser(kind).parse_args(
            [kind, "a", "b", *argv]
        )
    for kind in (["draw", "a", "b", "--largest", "3"], ["episodes", "a", "b", "--novel", "x"]):
        found[f"long_tail {kind[0]}"] = lambda argv, kind=kind: long_tail.build_parser().parse_args([*kind, *argv])
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # it was imported before, by its own name
def test_options_are_imported_after_transformers_as_well():
    transformers.BertModel  # noqa: B018  (what is loaded on demand changes where transformers says that it is)
    assert issubclass(runpy.run_module("training.options")["CommandParser"], argparse.ArgumentParser)


@pytest.mark.parametrize("command", readers())
def test_every_command_reads_every_option_of_a_dataset_alike(command):
    written = {
        "dataset_revision": "r",
        "dataset_config": "c",
        "image_column": "i",
        "label_column": "l",
        "label_columns": "[cat, dog]",
        "label_names": "[dog, cat, on, 1.10]",
        "label_format": "names",
        "label_separator": "|",
        "image_folder": "f",
        "uncertain": "absent",
        "blank": "present",
        "no_label": "[none, nil]",
        "missing_images": "skip",
        "unlisted_images": "skip",
        "exclude": "e",
        "scenes": "{seed: 1}",
        "validation_images": "7",
    }
    read = {"label_columns": ["cat", "dog"], "label_names": ["dog", "cat", "on", "1.10"], "scenes": {"seed": 1}}
    read |= {"no_label": ["none", "nil"], "validation_images": 7}
    expected = written | read | {"streaming": False}
    if command == "check_data":  # finds what the others are told to leave out
        expected["exclude"] = None
        del written["exclude"], written["missing_images"], written["unlisted_images"]
    argv = [f"--{name}={text}" for name, text in written.items()]
    assert dataset_options(readers()[command](argv)) == expected
    assert dataset_options(readers()[command](["--streaming"]))["streaming"] is True  # contradicts exclude


@pytest.mark.parametrize("command", readers())
def test_a_separator_works_as_written_on_every_command_line(command, tmp_path):
    for number, (written, meant) in enumerate(SEPARATORS):
        folder = table(tmp_path / str(number), meant)
        for argv in (["--label_separator", written], [f"--label_separator={written}"]):
            assert load(folder, **dataset_options(readers()[command](argv))).label_names == ["cat", "dog"]


@pytest.mark.parametrize("words", [["cat", "dog"], ["[cat, dog]"]])
def test_columns_are_named_alike_in_preparing_and_training(words, tmp_path):
    folder = table(tmp_path / "photos", ",")
    rows = "".join(f"{index}.png,1,{index % 2},0\n" for index in range(20))
    (folder / "train.csv").write_text(f"file_name,cat,dog,other\n{rows}")
    argv = ["--label_columns", *words]
    assert prepare.main(["csv", str(folder), str(tmp_path / "made"), *argv]) == 0
    assert load(tmp_path / "made").label_names == ["cat", "dog"]
    assert load(folder, **dataset_options(parse_config(argv))).label_names == ["cat", "dog"]


def test_label_names_may_be_a_file_for_every_command(tmp_path):
    folder = table(tmp_path / "photos", ",")
    (tmp_path / "order.txt").write_text("dog\ncat\nsofa\n")
    for read in readers().values():
        given = dataset_options(read(["--label_names", str(tmp_path / "order.txt")]))
        assert load(folder, **given).label_names == ["dog", "cat", "sofa"]


@pytest.mark.parametrize(("written", "meant"), SEPARATORS, ids=lambda text: repr(text))
def test_a_separator_works_as_written(written, meant, tmp_path, capsys):
    folder = table(tmp_path / "photos", meant)
    flag = ["--label_separator", written]
    assert check_data.main([str(folder), *flag, "--output", str(tmp_path / "out")]) < 2, capsys.readouterr()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["labels"] == ["cat", "dog"]
    assert split.main([str(folder), str(tmp_path / "parts"), *flag, "--fractions", "[0.5, 0.5]"]) == 0
    assert prepare.main(["csv", str(folder), str(tmp_path / "made"), *flag]) == 0
    assert load(tmp_path / "made").label_names == ["cat", "dog"]

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"label_separator: {json.dumps(written)}\n")
    saved = tmp_path / "saved.yaml"
    saved.write_text(parse_config([str(recipe)]).to_yaml())
    for argv in ([str(recipe)], [str(saved)]):
        assert parse_config(argv).label_separator == meant
    assert load(folder, label_separator=written).label_names == ["cat", "dog"]


def test_a_separator_reaches_training_from_its_command_line(tmp_path, capsys):
    """As far as the missing validation split: the labels were read by then."""
    folder = table(tmp_path / "photos", "|")
    argv = ["--dataset", str(folder), "--output_dir", str(tmp_path / "run"), "--label_separator", "|"]
    assert train.main(argv) == 2
    assert "no split 'validation'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["[cat, dog]"], ["cat", "dog"], ['["cat","dog"]']])
def test_a_list_has_the_same_spelling_everywhere(words):
    assert parse_config(["--label_columns", *words, "--seed", "1"]).label_columns == ["cat", "dog"]
    assert CommandParser(ScoringOptions).read(["a", "b", "--label_columns", *words]).label_columns == ["cat", "dog"]
    fractions = CommandParser(split.SplitOptions).read(["a", "b", "--fractions", "[0.5, 1]", "--names", *words])
    assert (fractions.fractions, fractions.names) == ([0.5, 1.0], ["cat", "dog"])


def test_null_and_dictionaries_have_the_same_spelling_everywhere():
    argv = ["--exclude", "null", "--scenes", "{seed: 1}", "--label_names", "null"]
    for read in (parse_config(argv), CommandParser(ScoringOptions).read(["a", "b", *argv])):
        assert (read.exclude, read.scenes, read.label_names) == (None, {"seed": 1}, None)


def test_the_options_of_a_dataset_are_those_of_every_command_that_reads_one(monkeypatch):
    shared = {field.name: field.default for field in dataclasses.fields(DatasetOptions)}
    ours = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    assert {name: ours[name] for name in shared if name != "dataset"} == {
        name: default for name, default in shared.items() if name != "dataset"
    }
    # A new one is declared once, and then reaches the loader from every command.
    new = dataclasses.make_dataclass("New", [("new", str, option("x", "a reason"))], bases=(DatasetOptions,))
    monkeypatch.setattr(options, "DatasetOptions", new)
    assert options.dataset_options(new(dataset="d", new="y"))["new"] == "y"


@pytest.mark.parametrize(("command", "positionals"), [("evaluate", 2), ("tag", 3)])
def test_a_threshold_is_a_number_or_auto(command, positionals, capsys):
    kind = getattr(importlib.import_module(f"training.{command}"), COMMANDS[command])
    for text, value in (("auto", "auto"), ("0.25", 0.25), ("1", 1.0)):
        assert CommandParser(kind).read([*"abc"[:positionals], "--threshold", text]).threshold == value
    with pytest.raises(SystemExit):
        CommandParser(kind).read([*"abc"[:positionals], "--threshold", "high"])
    assert "argument --threshold: invalid number_or_auto value: 'high'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_defaults_and_reasons(command, capsys):
    module = importlib.import_module(f"training.{command}")
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for field in dataclasses.fields(getattr(module, COMMANDS[command])):
        if field.init:
            reason = field.metadata["help"]
            assert len(reason) > 3 and " ".join(reason.split()) in shown, field.name
    assert "hsvlt " in shown


def test_help_of_training_shows_the_shared_options_too(capsys):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^    photos +Your own photographs", shown, re.MULTILINE)
    for words in ("label_separator", "between the labels of a text", "learning_rate: float = 1e-4  # of what starts"):
        assert words in shown
    assert "def " not in shown.partition("Options,")[2] and "class " not in shown.partition("Options,")[2][:200]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "b", "--label_colum", "x"], "unknown option --label_colum: did you mean --label_column"),
        (["a", "b", "--zzzz"], "unknown option --zzzz, see --help"),
        (["a", "b", "--label_columns", "[a, b"], "cannot be read as YAML"),
        (["a", "b", "--scenes", "{seed: 1"], "argument --scenes"),
        (["a", "b", "--missing_images", "drop"], "invalid choice"),
        (["a"], "required: DATASET"),
    ],
)
def test_what_a_command_line_has_wrong_is_said(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        CommandParser(ScoringOptions).read(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_empty_separator_and_broken_yaml_are_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("label_separator: |\n")  # what YAML makes of it: an empty text
    with pytest.raises(ValueError, match="label_separator is empty"):
        parse_config([str(tmp_path / "recipe.yaml")])
    (tmp_path / "recipe.yaml").write_text("label_separator: ,\n")
    with pytest.raises(ValueError, match=r"recipe.yaml cannot be read as YAML"):
        parse_config([str(tmp_path / "recipe.yaml")])
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        parse_config(["--model", "{a: 1"])


def test_odd_names_are_kept_as_they_are(tmp_path):
    """To OmegaConf `???` is a value that is missing, and `${...}` one that stands elsewhere."""
    names = ["???", "${other}", "^_^", "a: b", "|_|", "#x"]
    config = TrainingConfig(label_names=names, label_template="${x}", label_text={"???": "???"})
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    for read in (config, parse_config([str(path)]), parse_config(["--label_names", *names, "--label_template=${x}"])):
        assert read.label_names == names and read.label_template == "${x}"
    assert parse_config([str(path)]) == config


def test_a_refusal_leaves_the_process_group(capsys):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert refuse(ValueError("not\nthis")) == 2
    assert not dist.is_initialized() and capsys.readouterr().err == "error: not this\n"


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        (3, 3, ""),
        (ValueError("no"), 2, "error: no\n"),
        (FileNotFoundError("none"), 2, "error: none\n"),
        (KeyboardInterrupt(), 130, "Stopped; all is kept.\n"),
    ],
)
def test_commands_end_alike(outcome, status, words, capsys):
    def run(options):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    argv = ["scenes", "--image_column", "photo"]
    ended = options.command(run, DatasetOptions, "NAME", None, status=int, stopped="Stopped; all is kept.")(argv)
    assert (ended, capsys.readouterr().err) == (status, words)
