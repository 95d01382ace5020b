import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

from modeling_hsvlt import MlTrConfig
from training.config import parse_config
from training.data.augment import build_augmentation
from training.models.build import build_model

RECIPES = Path(__file__).parent.parent / "training" / "configs"


def test_round_trip_through_json(tmp_path):
    config = MlTrConfig.preset(
        "nano",
        num_labels=3,
        loss_type="asl",
        loss_kwargs={"gamma_neg": 2.0},
        thresholds=[0.1, 0.2, 0.3],
        last_stage_block_pattern=["pixel", "mlp"],
        out_features=["stage2", "stage4"],
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MlTrConfig
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert again.out_indices == [2, 4] and again.problem_type == "multi_label_classification"
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == saved["auto_map"]["AutoModelForImageClassification"]
    assert "multi-label-image-classification" in saved["custom_pipelines"]


def test_what_a_repository_says_about_its_code_is_kept():
    auto_map = {"AutoConfig": "someone/else--configuration_mltr.MlTrConfig"}
    assert MlTrConfig(auto_map=auto_map).auto_map == auto_map
    assert MlTrConfig(custom_pipelines={}).custom_pipelines == {}


@pytest.mark.parametrize(
    ("name", "grids", "windows", "widths", "drop_path_rate"),
    [
        ("s", [56, 28, 14, 7], 7, [96, 192, 384, 768], 0.1),
        ("m", [96, 48, 24, 12], 12, [96, 192, 384, 768], 0.2),
        ("l", [96, 48, 24, 12], 12, [128, 256, 512, 1024], 0.3),
        ("cat_t", [56, 28, 14, 7], 7, [64, 128, 256, 512], 0.1),
        ("cat_b", [56, 28, 14, 7], 7, [96, 192, 384, 768], 0.3),
        ("nano", [32, 16, 8, 4], 4, [24, 48, 96, 192], 0.0),
    ],
)
def test_presets(name, grids, windows, widths, drop_path_rate):
    config = MlTrConfig.preset(name)
    assert config.grid_sizes == grids and config.window_sizes == [windows] * 4
    assert [(grid // windows) ** 2 for grid in grids] == [64, 16, 4, 1]  # windows a stage
    assert config.hidden_sizes == widths and config.hidden_size == widths[-1]
    assert config.drop_path_rate == drop_path_rate
    assert all(
        width // heads == (24 if name == "nano" else 32) for width, heads in zip(widths, config.num_heads, strict=True)
    )
    assert config.use_absolute_embeddings == name.startswith("cat")


def test_preset_overrides():
    config = MlTrConfig.preset("s", num_labels=7, image_size=384, window_size=12)
    assert (config.num_labels, config.image_size, config.window_sizes) == (7, 384, [12] * 4)
    with pytest.raises(ValueError, match=r"preset 'huge' is unknown; choose one of \['nano', 's'"):
        MlTrConfig.preset("huge")


def test_windows_are_no_larger_than_the_map():
    config = MlTrConfig(image_size=70, patch_size=4, window_size=7)
    assert config.grid_sizes == [18, 9, 5, 3] and config.window_sizes == [7, 7, 5, 3]


def test_patterns_of_the_stages():
    assert MlTrConfig().stage_patterns == [("pixel", "cross", "mlp")] * 4
    pattern = ["pixel", "mlp", "cross", "mlp"]
    config = MlTrConfig(block_pattern=pattern, last_stage_block_pattern=["pixel", "mlp"])
    assert config.stage_patterns == [tuple(pattern)] * 3 + [("pixel", "mlp")]
    config = MlTrConfig(skip_single_window_cross=True)
    assert config.stage_patterns == [("pixel", "cross", "mlp")] * 3 + [("pixel", "mlp")]


def test_backbone_features():
    config = MlTrConfig()
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.out_features == ["stage4"] and config.out_indices == [4]
    config.out_features = ["stage1", "stage3"]
    assert config.out_indices == [1, 3]
    with pytest.raises(ValueError, match="subset of stage_names"):
        MlTrConfig(out_features=["stage5"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 2]}, "depths must be four positive numbers"),
        ({"num_heads": [1, 2, 4, 0]}, "num_heads must be four positive numbers"),
        ({"num_heads": [3, 6, 7, 24]}, "num_heads of stage 3 is 7, which does not divide its 384 channels"),
        ({"block_pattern": ["pixel", "conv"]}, "block_pattern must name sublayers"),
        ({"block_pattern": []}, "block_pattern must name sublayers"),
        ({"last_stage_block_pattern": ["attention"]}, "last_stage_block_pattern must name sublayers"),
        ({"block_pattern": ["cross"], "skip_single_window_cross": True}, "leaves blocks of the last stage empty"),
        ({"window_size": 0}, "window_size must be a positive number"),
        ({"image_size": -1}, "image_size must be a positive number"),
        ({"stem_kernel_size": 3}, r"stem_kernel_size \(3\) is smaller than patch_size \(4\)"),
        ({"position_kernel_size": 4}, "position_kernel_size must be 0 or odd"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        MlTrConfig(**fields)


def test_wrong_type_is_named():
    with pytest.raises(StrictDataclassFieldValidationError, match="embed_dim"):
        MlTrConfig(embed_dim="wide")


@pytest.mark.parametrize(("name", "params"), [("s", 33_068_486), ("m", 62_213_426), ("l", 108_461_480)])
def test_coco_recipes_train_the_published_sizes(name, params):
    options = parse_config([str(RECIPES / f"mltr_{name}_coco.yaml")])
    with torch.device("meta"):
        model = build_model(options, [f"label {i}" for i in range(80)])
    assert model.num_parameters() == params
    assert model.config.image_size == options.image_size == MlTrConfig.preset(name).image_size
    assert build_augmentation(options.image_size, **options.augmentation) is not None


def test_the_nano_recipe_has_the_scenes_of_hsvlts():
    ours, hsvlts = (vars(parse_config([str(RECIPES / name)])) for name in ("mltr_nano_scenes.yaml", "quickstart.yaml"))
    schedule = {"epochs", "learning_rate", "warmup_epochs", "ema_decay"}
    assert {key for key in ours if ours[key] != hsvlts[key]} - schedule == {"output_dir", "model_type", "model"}
