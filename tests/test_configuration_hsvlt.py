import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, ConvNextV2Config, SwinConfig

from modeling_hsvlt import HSVLTConfig


def test_round_trip_through_json(tmp_path):
    config = HSVLTConfig.preset(
        "nano", num_labels=3, loss_type="asl", loss_kwargs={"gamma_neg": 2.0}, thresholds=[0.1, 0.2, 0.3]
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert again.backbone_config.hidden_sizes == [32, 64, 128, 192]
    assert again.problem_type == "multi_label_classification"
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == saved["auto_map"]["AutoModelForImageClassification"]
    assert "multi-label-image-classification" in saved["custom_pipelines"]


@pytest.mark.parametrize(
    ("name", "depths", "widths"),
    [
        ("tiny", [3, 3, 9, 3], [96, 192, 384, 768]),
        ("small", [3, 3, 27, 3], [96, 192, 384, 768]),
        ("base", [3, 3, 27, 3], [128, 256, 512, 1024]),
    ],
)
def test_presets_are_the_published_sizes(name, depths, widths):
    config = HSVLTConfig.preset(name)
    assert config.backbone_config.depths == depths
    assert config.backbone_config.hidden_sizes == widths
    # What helps small data must be off where published numbers are to be reproduced.
    assert not config.normalize_visual_tokens and not config.normalize_label_tokens
    assert (config.num_attention_heads, config.aggregation, config.classifier) == (1, "concat", "per_label")
    assert config.backbone_config.layer_scale_init_value == 1e-6


def test_preset_overrides():
    config = HSVLTConfig.preset("nano", num_labels=7, backbone_config={"depths": [1, 1, 1, 1]})
    assert config.num_labels == 7
    assert config.backbone_config.depths == [1, 1, 1, 1] and config.backbone_config.patch_size == 2
    assert HSVLTConfig.preset("tiny", backbone_config=ConvNextV2Config()).backbone_config.model_type == "convnextv2"
    with pytest.raises(ValueError, match=r"'huge' is unknown.*nano"):
        HSVLTConfig.preset("huge")
    # Presets are not changed by a model made from them.
    config.backbone_config.hidden_sizes[0] = 1
    assert HSVLTConfig.preset("nano").backbone_config.hidden_sizes[0] == 32


def test_other_backbones_read_four_stages():
    config = HSVLTConfig(backbone_config=SwinConfig(depths=[1, 1, 1, 1]))
    assert config.backbone_config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    with pytest.raises(ValueError, match="stages; HSVLT reads four"):
        HSVLTConfig(backbone_config={"model_type": "dinov2", "num_hidden_layers": 2})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aggregation": "sum"}, "aggregation must be one of"),
        ({"classifier": "mlp"}, "classifier must be one of"),
        ({"label_update": "gru"}, "label_update must be one of"),
        ({"interaction_depths": [1, 2]}, "four positive numbers"),
        ({"label_chunk_size": 0}, "label_chunk_size must be a positive number"),
        ({"residual_attention": True, "text_classes": 4}, 'text_classes belongs to .* with classifier="shared"'),
        ({"classifier": "shared", "text_classes": 4}, "text_classes belongs to residual_attention"),
        ({"text_classes": 0}, "text_classes must be a positive number"),
        ({"label_stream": "tied", "classifier": "shared"}, "needs classifier=.per_label"),
        ({"label_stream": "tied", "aggregation": "topdown"}, "and aggregation=.concat"),
        ({"label_stream": "tied", "residual_attention": True}, "set one of the two"),
        ({"sampled_labels": 0}, "sampled_labels must be a positive number"),
        (
            {"sampled_labels": 4, "loss_type": "zlpr"},
            "sampled_labels needs a loss that is a sum .* 'zlpr': choose one of bce",
        ),
        ({"candidate_labels": 0}, "candidate_labels must be a positive number"),
        ({"label_width": 0}, "label_width must be a positive number"),
        ({"interaction_depths": [1, 2, 0, 1]}, "four positive numbers"),
        ({"residual_attention_weight": 0.0}, "must lie between 0 and 1"),
        ({"residual_attention_weight": 1.0}, "must lie between 0 and 1"),
        ({"candidate_labels": 4, "candidate_loss_weight": 0}, "candidate_loss_weight must be above 0"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        HSVLTConfig(**fields)


def test_wrong_type_is_named():
    with pytest.raises(StrictDataclassFieldValidationError, match="num_attention_heads"):
        HSVLTConfig(num_attention_heads="one")


@pytest.mark.parametrize("key", ["backbone", "use_pretrained_backbone", "use_timm_backbone", "backbone_kwargs"])
def test_a_config_cannot_name_a_repository(key):
    with pytest.raises(ValueError, match=f"{key} is not accepted"):
        HSVLTConfig(**{key: "someone/else"})
