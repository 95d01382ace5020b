"""HP-DVAL through the training command: both phases, one after the other, on a CLIP a few channels wide."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import training.loop.fit
from modeling_hsvlt import HPDVALForImageClassification
from training.checkpoint.series import checkpoints
from training.config import TrainingConfig, parse_config
from training.data.scene_labels import SCENE_LABELS
from training.models.build import build_model
from training.scoring.measured_with import fingerprints
from training.train import main

from ..tiny_clip import tiny_clip, tiny_clip_tokenizer
from .tiny_run import ONE_EPOCH

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
TABLE = "hp_dval.text.text_model.embeddings.token_embedding.weight"
TINY = {**ONE_EPOCH, "learning_rate": 1e-3}


@pytest.fixture
def clip(tmp_path):
    tokenizer = tiny_clip_tokenizer()
    tiny_clip(tokenizer).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    return str(tmp_path / "clip")


def command(recipe, output, **options):
    options = {**TINY, "output_dir": str(output), **options}
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return main([str(CONFIGS / recipe), *(f"--{key}={value}" for key, value in written.items())])


def run(recipe, output, **options):
    assert command(recipe, output, **options) == 0
    return json.loads((output / "results.json").read_text()), load_file(output / "best" / "model.safetensors")


def changed(before, after):
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_the_recipes_are_read():
    for phase in ("phase1", "phase2", "joint"):
        config = parse_config([str(CONFIGS / f"hp_dval_{phase}.yaml")])
        assert config.model["phase"] == phase
        assert config.loss_kwargs["positive_weight"] == "class"


@pytest.mark.slow
def test_both_phases_train_what_they_say(tmp_path, clip):
    small = {"model.local_top_k": 4}
    results, one = run("hp_dval_phase1.yaml", tmp_path / "one", backbone=clip, **small)
    start = build_model(
        TrainingConfig(model_type="hp_dval", backbone=clip, image_size=32, model={"local_top_k": 4}),
        list(SCENE_LABELS),
    ).state_dict()
    moved = {key for key in changed(start, one) if "k_proj.bias" not in key}
    assert moved == {key for key in start if ".student." in key and "k_proj.bias" not in key}

    # The counts went into the loss, the groups into the report.
    config = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())
    assert config["loss_kwargs"]["class_counts"] == results["positives_in_train"]
    first = json.loads((tmp_path / "one" / "log.jsonl").read_text().partition("\n")[0])
    counts = dict(zip(SCENE_LABELS, results["positives_in_train"], strict=True))
    assert first == {"step": 0, "positives_in_train": counts}
    assert config["loss_kwargs"]["num_samples"] == 48
    report = results["validation"]
    assert 0 <= report["mAP_tail"] <= 1
    sizes = (report["num_labels_medium"], report["num_labels_tail"], report["num_labels_without_positive"])
    assert sum(sizes) == 10

    results, two = run("hp_dval_phase2.yaml", tmp_path / "two", init_from=str(tmp_path / "one" / "best"))
    assert changed(one, two) == {TABLE, "hp_dval.prompts.text_embeddings"}
    model = HPDVALForImageClassification.from_pretrained(tmp_path / "two" / "best")
    rows = (one[TABLE] != two[TABLE]).any(1).nonzero().flatten().tolist()
    assert rows == model.config.context_token_ids
    assert model.config.phase == "phase2"
    assert fingerprints(model.config.to_dict()) == results["measured_with"]


@pytest.mark.slow
@pytest.mark.one_machine
def test_joint_training_resumes_exactly(tmp_path, clip, monkeypatch):
    options = {"backbone": clip, "model.local_top_k": 4, "epochs": 2}
    run("hp_dval_joint.yaml", tmp_path / "whole", **options)
    validate, calls = training.loop.fit.validate, []

    def interrupted(run):
        calls.append(run)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(run)

    with monkeypatch.context() as patch:
        patch.setattr(training.loop.fit, "validate", interrupted)
        assert command("hp_dval_joint.yaml", tmp_path / "halves", **options) == 130
    assert main([str(tmp_path / "halves" / "config.yaml"), "--resume"]) == 0
    whole, halves = (load_file(checkpoints(tmp_path / name)[0] / "model.safetensors") for name in ("whole", "halves"))
    assert not changed(whole, halves)


def test_another_label_set_needs_its_clip(tmp_path, clip):
    options = {"model_type": "hp_dval", "image_size": 32}
    base = build_model(TrainingConfig(**options, backbone=clip, model={"local_top_k": 4}), ["cat", "dog"])
    base.save_pretrained(tmp_path / "base")
    few = {**options, "init_from": str(tmp_path / "base"), "model": {"phase": "phase2", "context_init": "template"}}
    with pytest.raises(ValueError, match="name its CLIP with label_encoder"):
        build_model(TrainingConfig(**few), ["bird", "cat"])
    model = build_model(TrainingConfig(**few, label_encoder=clip, label_text={"tv": "photo"}), ["bird", "cat", "tv"])
    assert list(model.config.id2label.values()) == ["bird", "cat", "tv"]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).logits[:, 1], base.eval()(images).logits[:, 0])
    # What trains is as the phase says from the start.
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        TABLE.replace("weight", "trainable_tokens_delta.prompts")
    ]


def test_the_template_is_that_of_the_options(clip):
    options = {"model_type": "hp_dval", "image_size": 32, "backbone": clip, "model": {"local_top_k": 4}}
    models = [
        build_model(TrainingConfig(**options, label_template=template), ["cat", "dog"])
        for template in (None, "a photo of a {}.", "{} of a photo")
    ]
    assert [model.config.label_template for model in models] == [
        "a photo of a {}.",
        "a photo of a {}.",
        "{} of a photo",
    ]
    plain, same, other = (model.hp_dval.prompts.prompt_ids for model in models)
    assert torch.equal(plain, same) and not torch.equal(plain, other)


def test_counts_are_asked_for_where_scenes_have_none(tmp_path, clip, capsys):
    assert command("hp_dval_phase1.yaml", tmp_path / "run", backbone=clip, fresh_scenes=True) == 2
    assert "set fresh_scenes to false" in capsys.readouterr().err
