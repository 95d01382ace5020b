"""A frozen backbone, with and without maps on disk, through the training command."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_hsvlt import EfficientNetLiteConfig, EfficientNetLiteForImageClassification, MultiLabelImageProcessor
from training.config import TrainingConfig
from training.data.augment import build_augmentation
from training.loop.frozen import mirrored
from training.models.build import read_backbone_statistics
from training.train import main

from ...test_modeling_efficientnet_lite import TINY
from ..tiny_checkpoint import save_images

FROZEN = {
    "image_size": 32,
    "preset": None,
    "model": {"label_embedding_dim": 8},
    "backbone_statistics": True,
    "freeze_backbone": True,
    "augmentation": {"horizontal_flip": 0.5, "crop_scale": None},
    "num_workers": 0,
    "batch_size": 3,
    "epochs": 3,
    "learning_rate": 3e-3,
    "warmup_epochs": 0.5,
    "log_every_steps": 1,
    "keep_checkpoints": 5,
}
PREFIX = "hsvlt.backbone.model."


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, and a classifier whose backbone the runs stand on."""
    folder = tmp_path_factory.mktemp("place")
    for split in ("train", "validation"):
        save_images(folder / "photos", split=split)
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(**TINY, num_labels=3)
    EfficientNetLiteForImageClassification(config).save_pretrained(folder / "backbone")
    statistics = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3}
    MultiLabelImageProcessor(size={"height": 32, "width": 32}, **statistics).save_pretrained(folder / "backbone")
    paths = {"dataset": str(folder / "photos"), "backbone": str(folder / "backbone")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**FROZEN, **paths, "feature_cache": str(folder / "cache")}))
    return folder


def train(place, name, *options):
    assert main([str(place / "recipe.yaml"), "--output_dir", str(place / name), *options]) == 0
    return place / name


def weights(folder):
    return load_file(folder / "model.safetensors")


def backbone_of(folder):
    return {name.removeprefix(PREFIX): value for name, value in weights(folder).items() if name.startswith(PREFIX)}


def losses(run):
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.fixture(scope="module")
def cached(place):
    return train(place, "cached", "--cache_features")


def test_a_frozen_backbone_stays_as_it_came(place, cached):
    source = {name.removeprefix("backbone."): value for name, value in weights(place / "backbone").items()}
    for folder in (cached / "best", cached / "checkpoint-9"):
        for name, value in backbone_of(folder).items():
            assert torch.equal(value, source[name]), name
    heads = [weights(cached / f"checkpoint-{step}")["classifier.weight"] for step in (3, 9)]
    assert not torch.equal(*heads)


def test_cached_maps_train_as_images_do(place, cached):
    plain = train(place, "plain")
    assert losses(cached) == pytest.approx(losses(plain), rel=2e-3)  # fp16
    results = [json.loads((run / "results.json").read_text())["validation"]["mAP"] for run in (cached, plain)]
    assert results[0] == pytest.approx(results[1], abs=0.01)


def test_cached_maps_train_in_16_bits(place, cached):
    run = train(place, "bf16", "--cache_features", "--mixed_precision", "bf16", "--epochs", "1")
    assert losses(run) == pytest.approx(losses(cached)[:3], rel=0.1)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    logged = [row["validation/mAP"] for row in rows if "validation/mAP" in row]
    assert [json.loads((run / "results.json").read_text())["validation"]["mAP"]] == pytest.approx(logged, abs=1e-6)


def test_the_next_run_finds_the_maps(place, cached, capfd):
    (store,) = (place / "cache").iterdir()
    written = (store / "maps.bin").stat().st_size
    again = train(place, "again", "--cache_features", "--seed", "1")
    assert "14 of 14 are in" in capfd.readouterr().out  # 7 images, the same in both splits
    assert (store / "maps.bin").stat().st_size == written and losses(again) != losses(cached)


def test_an_interruption_while_maps_are_computed_is_no_error(place, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.loop.frozen.compute_features", interrupted)
    assert main([str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), "--cache_features"]) == 130
    assert "the same command starts again" in capsys.readouterr().err


def test_the_last_epochs_train_the_backbone_and_resume(place):
    run = train(place, "unfrozen", "--cache_features", "--unfreeze_epochs", "1")
    source = {name.removeprefix("backbone."): value for name, value in weights(place / "backbone").items()}
    frozen, unfrozen = backbone_of(run / "checkpoint-6"), backbone_of(run / "checkpoint-9")
    for name, value in frozen.items():
        assert torch.equal(value, source[name]), name
        statistics = "running" in name or "num_batches" in name
        assert torch.equal(unfrozen[name], source[name]) == statistics, name
    (run / "checkpoint-9").rename(place / "expected")
    assert main([str(run / "config.yaml"), "--resume"]) == 0
    for name, value in weights(place / "expected").items():
        assert torch.equal(weights(run / "checkpoint-9")[name], value), name


def test_the_cached_view_is_what_the_augmentation_would_show():
    augmentation = build_augmentation(8, horizontal_flip=0.5, crop_scale=None)
    images, labels = torch.rand(32, 3, 8, 8), torch.zeros(32, 2)
    torch.manual_seed(5)
    shown = augmentation(images, labels)[0]
    torch.manual_seed(5)
    views = mirrored(augmentation, labels)
    assert 0 < views.sum() < 32
    assert torch.equal(shown, torch.where(views[:, None, None, None] == 1, images.flip(-1), images))
    assert not mirrored(None, labels).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_features": True}, "set freeze_backbone to true"),
        ({"unfreeze_epochs": 1}, "set freeze_backbone to true"),
        ({"freeze_backbone": True, "backbone": None}, "give backbone or init_from"),
        ({"backbone_statistics": True, "backbone": None}, "give backbone or init_from"),
        ({"freeze_backbone": True, "unfreeze_epochs": 20}, "must be less than epochs, 20"),
        ({"cached": True, "augmentation": {}}, "cannot have crop_scale: set it to null"),
        ({"cached": True, "augmentation": {"crop_scale": None, "mixup": 0.2}}, "cannot have mixup: set it to 0"),
        ({"cached": True, "augmentation": {"crop_scale": None, "rand_augment": True}}, "cannot have rand_augment"),
        ({"cached": True, "augmentation": None, "cache_images": True}, "leave cache_images out"),
        ({"cached": True, "augmentation": None, "feature_cache_gib": 0.0}, "must be above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, message):
    options = dict(options)
    if options.pop("cached", False):
        options |= {"freeze_backbone": True, "cache_features": True}
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{"backbone": "somewhere", **options})


def test_statistics_are_those_of_what_the_run_starts_from(place, cached, tmp_path):
    assert yaml.safe_load((cached / "config.yaml").read_text())["image_mean"] == [0.4] * 3
    config = TrainingConfig(backbone_statistics=True, init_from=str(cached / "best"))
    read_backbone_statistics(config)
    assert config.image_mean == [0.4] * 3 and config.image_std == [0.3] * 3
    with pytest.raises(ValueError, match="give image_mean and image_std"):
        read_backbone_statistics(TrainingConfig(backbone_statistics=True, backbone=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cache_features", "--feature_cache_gib", "1.0e-6"], "feature_cache_gib"),
        (["--cache_features", "--dataset", "scenes", "--scenes.image_size", "32"], "set fresh_scenes to false"),
        (["--model_type", "mltr", "--preset", "nano", "--model", "{}"], "stands on no other backbone"),
    ],
)
def test_what_the_data_or_model_cannot_is_refused(place, tmp_path, capsys, options, message):
    assert main([str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
