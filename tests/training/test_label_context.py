"""Learned context of HSVLT's label names through the training command, on a text encoder a few channels wide."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from modeling_hsvlt.label_context import LabelContext
from modeling_hsvlt.label_prompts import load_text_encoder
from training.config import TrainingConfig
from training.data.scene_labels import SCENE_LABELS
from training.models.build import build_model
from training.train import main

from .tiny_run import ONE_EPOCH

RECIPE = Path(__file__).parents[2] / "training" / "configs" / "hsvlt_label_context.yaml"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", *SCENE_LABELS]
BACKBONE = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(WORDS), initializer_range=0.5, **tower)).save_pretrained(tmp_path / "bert")
    BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)}).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_the_recipe_learns_contexts_alone_and_leaves_a_plain_checkpoint(tmp_path, encoder):
    config = HSVLTConfig(
        backbone_config=BACKBONE,
        label_embedding_dim=16,
        image_size=32,
        id2label=dict(enumerate(SCENE_LABELS)),
        label2id={name: index for index, name in enumerate(SCENE_LABELS)},
    )
    torch.manual_seed(0)
    model = HSVLTForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "base")
    options = {
        "output_dir": str(tmp_path / "run"),
        **ONE_EPOCH,
        "init_from": str(tmp_path / "base"),
        "label_encoder": encoder,
        "label_context.train": "nothing",
        "ema_decay": 0.5,
    }
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    assert main([str(RECIPE), *(f"--{key}={value}" for key, value in written.items())]) == 0

    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert before.keys() == after.keys()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"hsvlt.label_embeddings.weight"}
    # The embeddings are those of the adapter beside them, and no longer the hand-written ones.
    towers = load_text_encoder(encoder)
    learned = LabelContext(*towers, SCENE_LABELS, adapter=tmp_path / "run" / "best" / "label_context")
    torch.testing.assert_close(after["hsvlt.label_embeddings.weight"], learned())
    assert not torch.allclose(after["hsvlt.label_embeddings.weight"], LabelContext(*towers, SCENE_LABELS)(), atol=1e-4)
    loaded = HSVLTForImageClassification.from_pretrained(tmp_path / "run" / "best")
    assert loaded.label_context is None
    assert loaded.config.label_template == "<context_0><context_1><context_2><context_3> {}"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["validation"]["num_labels_tail"] and len(results["positives_in_train"]) == 10
    # Its training state goes back into a new model with a context.
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert options["label_context"] == {"num_context_tokens": 4, "class_specific": False, "train": "nothing"}
    assert main([str(tmp_path / "run" / "config.yaml"), "--resume"]) == 0


@pytest.mark.parametrize("beside", ["all", "all_but_backbone", "nothing"])
def test_what_trains_beside_the_contexts(encoder, beside):
    options = {"model": {"backbone_config": BACKBONE}, "preset": None, "image_size": 32, "label_encoder": encoder}
    context = {"class_specific": True, "train": beside}
    model = build_model(TrainingConfig(**options, label_context=context), ["one", "two"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    (rows,) = (name for name in trained if name.startswith("label_context."))
    assert model.get_parameter(rows).shape == (2 * 4, 16)
    assert any(".backbone." in name for name in trained) == (beside == "all")
    assert any(".label_stream." in name for name in trained) == (beside != "nothing")


@pytest.mark.parametrize(
    ("context", "message"),
    [({"train": "some"}, "choose one of all"), ({"tokens": 4}, "no option 'tokens'")],
)
def test_errors(encoder, context, message):
    options = {"model": {"backbone_config": BACKBONE}, "preset": None, "image_size": 32, "label_encoder": encoder}
    with pytest.raises(ValueError, match=message):
        build_model(TrainingConfig(**options, label_context=context), ["one", "two"])


def test_a_context_needs_an_encoder_and_an_hsvlt(encoder):
    with pytest.raises(ValueError, match="needs the label_encoder"):
        TrainingConfig(label_context={})
    with pytest.raises(ValueError, match="is for hsvlt"):
        build_model(TrainingConfig(model_type="mltr", label_encoder=encoder, label_context={}), ["one", "two"])
