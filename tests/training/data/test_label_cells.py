"""A cell of text is read as what it is or refused with its row, and a name is one everywhere or nowhere."""

import json

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from PIL import Image

from modeling_hsvlt import HSVLTConfig
from training.check_data import main as check_data
from training.checkpoint.loading import load_checkpoint
from training.data.label_cells import clean_names, read_cell, split_text
from training.data.label_name_files import read_label_names
from training.data.load import load
from training.options import CheckpointOptions
from training.prepare.__main__ import main as prepare

from ..tiny_checkpoint import save_checkpoint


@pytest.mark.parametrize(
    ("text", "separator", "labels"),
    [
        ("cat, dog", ",", ["cat", "dog"]),
        ("  ", ",", []),
        ("[]", ",", []),
        ("['cat', 'dog']", ",", ["cat", "dog"]),
        ('["a, b"]', ",", ["a, b"]),
        ("'cat', 'dog'", ",", ["cat", "dog"]),
        ('["it\'s", " x "]', ",", ["it's", "x"]),
        ('{"choices": ["cat", "dog"]}', ",", ["cat", "dog"]),
        ('{"choices": "cat"}', ",", ["cat"]),
        ("('cat',)", "|", ["cat"]),
        ("[1, 0, 1]", ",", [1, 0, 1]),
        ("nan", ",", None),
        ("None", ",", None),
        ("null", "|", None),
        (" haze  primary ", " ", ["haze", "primary"]),
        ("a\t\tb\t", "\t", ["a", "b"]),
        ("(o)_(o), :3", ",", ["(o)_(o)", ":3"]),
        ('\\(^o^)/, x_(y), b-side, 5" pipe', ",", ["\\(^o^)/", "x_(y)", "b-side", '5" pipe']),
        ("<NA>", ",", None),
        (r"\N", ",", None),
        ("NA", ",", None),
        ("'90s", ",", ["'90s"]),
    ],
)
def test_a_cell_is_read_as_what_it_is(text, separator, labels):
    assert read_cell(text, separator) == labels


@pytest.mark.parametrize(
    "text",
    [
        "['cat' 'dog']",
        "[cat, dog]",
        "['cat'",
        '["a"',
        "a, [b]",
        '{"a": 1, "b": 2}',
        "[[1]]",
        "cat, nan",
        '[""]',
        "a,,b",
        '["null"]',
        "[" * 100_000,
        '{"choices": [{"x": 1}]}',
        "array(['cat', 'dog'], dtype=object)",
        "tensor([0, 1])",
        "set()",
        "frozenset({'cat'})",
        "OrderedDict([('cat', 1)])",
        "Series([], dtype: object)",
        "[np.str_('cat'), np.str_('dog')]",
        "np.str_('cat')",
        "\"['cat', 'dog']\"",
        "b'cat'",
        "cat, #N/A",
        "-",
        " \u2014 ",
    ],
)
def test_a_cell_that_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match=r"list|label"):
        read_cell(text)


@pytest.mark.parametrize("name", ["['cat'", "'dog']", "['cat', 'dog']", "set()", "b'cat'", "\ufeffcat", "\u200b"])
def test_a_name_in_a_list_is_no_piece_of_a_list_and_can_be_seen(name):
    with pytest.raises(ValueError, match="row 1: it lists"):
        clean_names(pa.array([["cat"], [name]]), "row {}".format)
    assert clean_names(pa.array([["it's (5')", "b'day", "[x]", "a\u200cb"]]), "row {}".format).to_pylist()


@pytest.mark.parametrize("cell", ["cat;dog", "cat | dog", "dog\uff0ccat", "cat/dog", "dog + cat", "cat & bird"])
def test_two_labels_with_another_separator_between_them_are_refused_by_row(cell):
    with pytest.raises(ValueError, match=r"row 2: .* is 2 labels of other rows in one"):
        split_text(pa.chunked_array([pa.array(["cat, bird", "dog", cell])]))


def test_names_that_are_given_are_labels_whatever_they_look_like():
    assert read_cell("none, [x]", known={"none", "[x]"}) == ["none", "[x]"]
    assert read_cell("none", known={"none"}) == ["none"]


def write_csv(folder, splits, header="file_name,labels"):
    """CSV files of rows, each with its image."""
    for split, rows in splits.items():
        (folder / split).mkdir(parents=True)
        lines = [header]
        for number, row in enumerate(rows):
            Image.new("RGB", (8, 8), (number, 0, len(split))).save(folder / split / f"{number}.png")
            lines.append(f"{split}/{number}.png,{row}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def names_of(loaded, split):
    labels = loaded.splits[split].labels
    return [
        [loaded.label_names[label] for label in np.flatnonzero(labels.dense(row) == 1)] for row in range(len(labels))
    ]


def test_tables_hold_lists_as_text_and_a_bad_one_is_refused_by_line(tmp_path):
    rows = ["\"['cat', 'dog']\"", '"[""cat""]"', "[]", '"{""choices"": [""dog""]}"', "None"]
    loaded = load(write_csv(tmp_path / "a", {"train": rows}))
    assert loaded.label_names == ["cat", "dog"] and names_of(loaded, "train") == [
        ["cat", "dog"],
        ["cat"],
        [],
        ["dog"],
        [],
    ]
    assert loaded.splits["train"].labels.default.tolist() == [0, 0, 0, 0, -100]
    with pytest.raises(ValueError, match=r"train.csv, line 3 \(train/1.png\): \"\['cat'\" looks like a list"):
        load(write_csv(tmp_path / "b", {"train": ["cat", "['cat'"]}))
    ids = load(write_csv(tmp_path / "c", {"train": ['"[0, 2]"', "[]", "[1]"]}), label_names=["a", "b", "c"])
    assert names_of(ids, "train") == [["a", "c"], [], ["b"]]
    with pytest.raises(ValueError, match=r"line 3 .*some cells list names and some numbers"):
        load(write_csv(tmp_path / "d", {"train": ["cat", "[1]"]}))


def test_blanks_around_names_go_in_lists_and_bad_names_are_refused_by_row(tmp_path):
    source = Dataset.from_dict({"image": [{"bytes": b"x", "path": "0.png"}] * 2, "labels": [[" cat", "dog "], ["cat"]]})
    loaded = load(source)
    assert loaded.label_names == ["cat", "dog"] and names_of(loaded, "train") == [["cat", "dog"], ["cat"]]
    for bad, message in (
        (["a\x07"], "has control characters"),
        ([" "], "is empty"),
        (["nan"], "lists 'nan' as a label"),
    ):
        rows = Dataset.from_dict({"image": [{"bytes": b"x", "path": "0.png"}] * 2, "labels": [["cat"], bad]})
        with pytest.raises(ValueError, match=f"row 1.*{message}"):
            load(rows)


def test_every_split_makes_the_vocabulary_and_what_train_lacks_is_told(tmp_path, caplog, capsys):
    folder = write_csv(tmp_path / "a", {"train": ["cat", "dog"], "validation": ["zebra", '"cat, dog"']})
    loaded = load(folder)
    assert loaded.label_names == ["cat", "dog", "zebra"] and "no row of train holds" in caplog.text
    assert "zebra" in caplog.text and load(folder, splits=["train"]).label_names == ["cat", "dog", "zebra"]
    caplog.clear()
    (folder / "labels.txt").write_text("cat\ndog\nzebra\nyak\n")
    load(folder)
    assert "without a positive in train" in caplog.text and "zebra, yak" in caplog.text


@pytest.mark.parametrize(("typo", "right"), [("dgo", "dog"), ("Dog", "dog"), ("dogs", "dog"), ("umbrxlla", "umbrella")])
def test_likely_misspellings_are_errors_that_check_data_lists(typo, right, tmp_path, capsys):
    splits = {"train": ["cat", "dog", "umbrella"], "validation": ["cat", typo, "zebra"]}
    folder = write_csv(tmp_path / "a", splits)
    with pytest.raises(ValueError, match=rf"validation.csv, line 3 .*label '{typo}' .*did you mean '{right}'"):
        load(folder)
    assert check_data([str(folder), "--output", str(tmp_path / "out")]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {finding["kind"]: finding["examples"] for finding in report["findings"]}
    assert len(found["labels_that_look_misspelled"]) == 1 and len(found["labels_that_train_never_shows"]) == 2
    assert "splits" in report and "labels_absent_from_a_split" in found
    (folder / "labels.txt").write_text("cat\ndog\numbrella\n")
    assert check_data([str(folder), "--output", str(tmp_path / "out"), "--overwrite"]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {finding["kind"]: finding["examples"] for finding in report["findings"]}
    assert len(found["labels_outside_the_vocabulary"]) == 2


@pytest.mark.parametrize(
    ("one", "other"), [("\u00e9", "e\u0301"), ("cat", "c\u200bat"), ("cat", "cat\u200f"), ("a b", "a\u00a0 b")]
)
def test_two_labels_that_look_the_same_are_refused_by_row(one, other, tmp_path):
    folder = write_csv(tmp_path / "a", {"train": [one, "dog", other]})
    with pytest.raises(ValueError, match=r"train.csv, line [24] .*label '.*' looks like '.*', which is in other rows"):
        load(folder)
    assert check_data([str(folder), "--output", str(tmp_path / "out")]) == 1
    (folder / "labels.txt").write_text(f"{one}\ndog\n", encoding="utf-8")
    with pytest.raises(ValueError, match="is not among the 2 label names"):
        load(folder)
    (folder / "labels.txt").write_text(f"{one}\ndog\n{other}\n", encoding="utf-8")
    assert len(load(folder).label_names) == 3


def test_true_and_false_are_no_names():
    with pytest.raises(ValueError, match=r"row 0: the labels are true and false, .* with label_columns"):
        split_text(pa.chunked_array([pa.array(["True", "False", None])]))
    assert split_text(pa.chunked_array([pa.array(["True", "False"])]), known=["True", "False"]).to_pylist()


NAMES = ["\u06af\u0631\u0628\u0647\u200c\u0647\u0627", "a\u00a0b", "👩\u200d👧", "naïve", "日本"]


def test_one_rule_for_names_in_files_data_and_checkpoints(tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(NAMES), encoding="utf-8")
    assert read_label_names(tmp_path / "labels.txt") == NAMES
    folder = write_csv(tmp_path / "a", {"train": NAMES})
    assert sorted(load(folder).label_names) == sorted(NAMES)
    assert prepare(["csv", str(folder), str(tmp_path / "made")]) == 0
    assert load(tmp_path / "made").label_names == load(folder).label_names
    config = HSVLTConfig()
    config.set_label_names(NAMES)
    assert list(config.id2label.values()) == NAMES
    for bad in ("a\x1bb", "a\nb", "a\u202eb", ""):
        with pytest.raises(ValueError, match="label name"):
            config.set_label_names(["cat", bad])


def test_prepare_refuses_what_does_not_read_back(tmp_path, monkeypatch, capsys):
    folder = write_csv(tmp_path / "a", {"train": ["cat", "dog"]})
    monkeypatch.setattr("training.prepare.write._write_shard", broken_shard)
    assert prepare(["csv", str(folder), str(tmp_path / "made")]) == 2
    assert "do not read back" in capsys.readouterr().err and not (tmp_path / "made").exists()


def broken_shard(shard, path, features, as_ids, progress):
    import pyarrow.parquet as pq

    labels = shard.labels.lists(as_ids).to_pylist()[::-1]
    images = pa.array([{"bytes": b"", "path": ""}] * len(labels), features.arrow_schema.field("image").type)
    pq.write_table(pa.table({"image": images, "labels": labels}, schema=features.arrow_schema), path)
    return []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"uncertain": "unknown"}, [-100, 1, -100]),
        ({"uncertain": "absent"}, [0, 1, 0]),
        ({"uncertain": "present"}, [1, 1, 1]),
        ({"uncertain": "unknown", "blank": "absent"}, [-100, 1, 0]),
    ],
)
def test_minus_one_and_blanks_are_what_the_options_say(options, expected, tmp_path):
    folder = write_csv(tmp_path / "a", {"train": ["-1.0,1.0,", "0,1,0"]}, "file_name,cat,dog,cow")
    with pytest.raises(ValueError, match=r"line 2 .*label 'cat' is -1, .*--uncertain"):
        load(folder)
    assert load(folder, **options).splits["train"].labels.dense(0).tolist() == expected
    lists = Dataset.from_dict({"image": [{"bytes": b"x", "path": "0.png"}], "labels": [[-1.0, 1.0, None]]})
    loaded = load(lists, label_names=["cat", "dog", "cow"], **options)
    assert loaded.splits["train"].labels.dense(0).tolist() == expected


def test_no_finding_is_no_label(tmp_path):
    folder = write_csv(tmp_path / "a", {"train": ["No Finding", "Mass|Nodule", "Mass"]})
    loaded = load(folder, label_separator="|", no_label=["No Finding"])
    assert loaded.label_names == ["Mass", "Nodule"] and names_of(loaded, "train") == [[], ["Mass", "Nodule"], ["Mass"]]
    folder = write_csv(tmp_path / "b", {"train": ["Mass|No Finding"]})
    with pytest.raises(ValueError, match=r"line 2 .*'No Finding' stands beside a label"):
        load(folder, label_separator="|", no_label=["No Finding"])
    folder = write_csv(tmp_path / "c", {"train": ["1,0", "0,1"]}, "file_name,No Finding,Mass")
    assert names_of(load(folder, no_label=["No Finding"]), "train") == [[], ["Mass"]]


def test_a_checkpoint_with_a_name_that_no_reader_takes_is_refused(tmp_path):
    save_checkpoint(tmp_path, ["cat", "a\x1bb"])
    with pytest.raises(ValueError, match=r"label name 'a\\x1bb' has control characters"):
        load_checkpoint(CheckpointOptions(checkpoint=str(tmp_path)))
