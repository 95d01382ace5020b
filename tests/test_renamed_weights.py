"""Checkpoints from before 0.1 load: weights and fields of the configuration under their older names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from .test_handlings import make
from .test_modeling_hp_dval import make_model

OLDER = {
    "label_embeddings.weight": "label_embeddings",
    "hsvlt.backbone.model.": "hsvlt.trunk.backbone.",
    "hsvlt.backbone.": "hsvlt.trunk.",
    "hp_dval.prompts.": "hp_dval.",
    "scale.logit_": "logit_",
}


@pytest.mark.parametrize("name", ["hsvlt", "hsvlt_every_option", "hsvlt_mltr", "hp_dval"])
def test_weights_under_older_names_are_read_and_saved_under_those_of_now(name, tmp_path):
    model = make_model().eval() if name == "hp_dval" else make(name)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    older = {}
    for key, value in weights.items():
        for now, before in OLDER.items():
            key = key.replace(now, before)
        older[key] = value
    assert older.keys() != weights.keys()
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()


@pytest.mark.parametrize(
    ("name", "older", "field", "value"),
    [
        ("hsvlt", {"label_reading": "mean"}, "label_pooling", "mean"),
        ("hp_dval", {"stage": "stage2"}, "phase", "phase2"),
        ("hp_dval", {"class_specific_context": True}, "class_specific", True),
        ("hp_dval", {"prompt_template": "a {}"}, "label_template", "a {}"),
    ],
)
def test_fields_under_older_names_are_read(name, older, field, value, tmp_path):
    reserved = {"class_specific": value} if field == "class_specific" else {}  # tokens that the vocabulary must have
    model = make_model(**reserved) if name == "hp_dval" else make(name)
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    fields.pop(field, None)
    file.write_text(json.dumps(fields | older))
    config = type(model.config).from_pretrained(tmp_path)
    assert getattr(config, field) == value and not hasattr(config, next(iter(older)))
