"""What belongs to a label set goes with it, in all three configurations and however the names change."""

import copy
import dataclasses
import inspect
import json
import logging
import pickle
import re

import pytest

from modeling_hsvlt import HPDVALConfig, HSVLTConfig, MlTrConfig
from modeling_hsvlt.configuration_multilabel import MultiLabelConfig

NAMES, OTHERS = ["cat", "dog", "bird"], ["cat", "bird", "dog"]
FITTED = {
    "thresholds": [0.1, 0.2, 0.3],
    "threshold_info": {"objective": "F1"},
    "calibration_info": {"method": "platt", "scale": [1.0, 2.0, 3.0]},
}
PROVENANCE = {"label_text_encoder": "some-encoder", "label_pooling": "mean", "label_template": "a {}"}
CONFIGS = {
    "hsvlt": (HSVLTConfig, {**FITTED, **PROVENANCE}),
    "mltr": (MlTrConfig, FITTED),
    "hp_dval": (HPDVALConfig, FITTED),
}


def labels(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def make_config(kind):
    config_class, fields = CONFIGS[kind]
    return config_class.preset("nano", **labels(NAMES), **fields)


def fitted(config, kind):
    return {key: getattr(config, key) for key in CONFIGS[kind][1]}


HEADINGS = ["Published", "Generalisations", "Speed", "Not published", "Bookkeeping"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_fields_are_documented_under_headings_in_the_order_of_their_declaration(kind):
    config_class = CONFIGS[kind][0]
    own = [field.name.lstrip("_") for field in dataclasses.fields(config_class)]
    own = own[len(dataclasses.fields(MultiLabelConfig)) :]
    arguments = config_class.__doc__.partition("    Args:\n")[2].partition("\n    Further fields")[0]
    entries = re.findall(r"^ {8}(> \w[\w ]*|\w.*:$)", arguments, re.MULTILINE)
    headings = [entry[2:] for entry in entries if entry.startswith("> ")]
    assert headings == [heading for heading in HEADINGS if heading in headings] and len(headings) >= 3
    names = [name for entry in entries if entry[0] != ">" for name in re.findall(r"(\w+)(?:, | \()", entry)]
    assert [name for name in names if name in own] == own
    # Where the fields are declared, each heading is a comment in front of the same field.
    source = inspect.getsource(config_class).partition('"""')[2].partition('"""')[2]
    declared = re.findall(r"^ {4}(?:# (\w[\w ]*)(?=[:,\n])|_?(\w+): .* = )", source, re.MULTILINE)
    documented = [name for entry in entries for name in re.findall(r"> (\w[\w ]*)|(\w+)(?:, | \()", entry)]
    kept = {*own, *HEADINGS}
    assert [a or b for a, b in declared if (a or b) in kept] == [a or b for a, b in documented if (a or b) in kept]


@pytest.fixture
def warnings(caplog):
    logger = logging.getLogger("transformers")
    logger.propagate = True
    yield lambda: [record.message for record in caplog.records if "Dropped from the configuration" in record.message]
    logger.propagate = False


def loaded(config, folder, **fields):
    config.save_pretrained(folder)
    return type(config).from_pretrained(folder, **fields)


def assigned(config, folder, names=OTHERS):
    config.id2label = dict(enumerate(names))
    return config


def assigned_from_json(config, folder):
    config.id2label = {str(index): name for index, name in enumerate(OTHERS)}
    return config


def set_by_method(config, folder, names=OTHERS):
    config.set_label_names(names)
    return config


def set_number(config, folder):
    config.num_labels = 4
    return config


WAYS = {
    "assigned": assigned,
    "assigned with text for numbers": assigned_from_json,
    "set_label_names": set_by_method,
    "more names": lambda config, folder: set_by_method(config, folder, [*NAMES, "fish"]),
    "num_labels": set_number,
    "from_pretrained": lambda config, folder: loaded(config, folder, **labels(OTHERS)),
    "from_pretrained, another number": lambda config, folder: loaded(config, folder, **labels([*NAMES, "fish"])),
    "from_dict": lambda config, folder: type(config).from_dict(config.to_dict(), **labels(OTHERS)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_other_names_drop_what_belonged_to_the_old_ones(kind, way, tmp_path, warnings):
    config = WAYS[way](make_config(kind), tmp_path)
    assert set(fitted(config, kind).values()) == {None}
    (message,) = warnings()
    assert all(field in message for field in CONFIGS[kind][1])
    names = list(config.id2label.values())
    assert (
        config.num_labels == len(names)
        and names != NAMES
        and sorted(map(int, config.id2label)) == list(range(len(names)))
    )
    if not way.startswith("assigned"):
        assert config.label2id == {name: index for index, name in enumerate(names)}
    again = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert list(again.id2label.values()) == names and set(fitted(again, kind).values()) == {None}
    assert len(warnings()) == 1  # once is enough


SAME = {
    "assigned": lambda config, folder: assigned(config, folder, NAMES),
    "set_label_names": lambda config, folder: set_by_method(config, folder, NAMES),
    "num_labels": lambda config, folder: setattr(config, "num_labels", 3) or config,
    "from_pretrained": lambda config, folder: loaded(config, folder, **labels(NAMES)),
    "saved and loaded": loaded,
    "deepcopy": lambda config, folder: copy.deepcopy(config),
    "pickle": lambda config, folder: pickle.loads(pickle.dumps(config)),
    "JSON": lambda config, folder: type(config).from_dict(json.loads(config.to_json_string())),
    "dict": lambda config, folder: type(config)(**config.to_dict()),
}


@pytest.mark.parametrize("way", SAME)
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_names_keep_it(kind, way, tmp_path, warnings):
    config = SAME[way](make_config(kind), tmp_path)
    assert fitted(config, kind) == CONFIGS[kind][1] and list(config.id2label.values()) == NAMES
    assert not warnings()


@pytest.mark.parametrize("kind", CONFIGS)
def test_thresholds_given_with_their_names_stay(kind, tmp_path, warnings):
    given = {"thresholds": [0.4, 0.5, 0.6], **labels(OTHERS)}
    for fields in (given, dict(reversed(given.items()))):  # in whatever order
        config = loaded(make_config(kind), tmp_path, **fields)
        assert config.thresholds == [0.4, 0.5, 0.6] and config.threshold_info is config.calibration_info is None
    config = CONFIGS[kind][0].preset("nano", **given)
    assert config.thresholds == [0.4, 0.5, 0.6]
    four = {"thresholds": [0.5] * 4, "num_labels": 4}
    assert CONFIGS[kind][0].preset("nano", **four).thresholds == [0.5] * 4
    assert loaded(make_config(kind), tmp_path, **four).thresholds == [0.5] * 4


@pytest.mark.parametrize("kind", CONFIGS)
def test_thresholds_of_another_number_of_labels_are_dropped(kind, warnings):
    config = CONFIGS[kind][0].preset("nano", **labels(NAMES), **{**FITTED, "thresholds": [0.5] * 4})
    assert config.thresholds is config.threshold_info is config.calibration_info is None
    (message,) = warnings()
    assert "there are 4 thresholds for 3 labels" in message


@pytest.mark.parametrize("kind", CONFIGS)
def test_names_that_cannot_be_told_apart(kind):
    config = make_config(kind)
    with pytest.raises(ValueError, match="'dog' comes twice"):
        config.set_label_names(["cat", "dog", "dog"])
    with pytest.raises(ValueError, match="names is empty"):
        config.set_label_names([])
    assert fitted(config, kind) == CONFIGS[kind][1] and list(config.id2label.values()) == NAMES


def test_names_are_compared_by_their_numbers():
    """Not in the order of a dict, in which as text 10 comes before 2."""
    config = MlTrConfig.preset("nano", **labels([f"name {i}" for i in range(12)]), thresholds=[0.5] * 12)
    config.id2label = {str(i): name for i, name in sorted(config.id2label.items(), key=lambda item: str(item[0]))}
    assert config.thresholds == [0.5] * 12
