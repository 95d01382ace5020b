"""A run of the training command that takes a second: a model a few channels wide on a few dozen built-in scenes."""

from pathlib import Path

import yaml

NANO = {
    "backbone_config": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "label_embedding_dim": 8,
}
SCENES = {"num_scenes": {"train": 48, "validation": 24, "test": 24}, "image_size": 32, "max_objects": 2, "max_size": 20}
TINY = {
    "preset": "nano",
    "image_size": 32,
    "model": NANO,
    "scenes": SCENES,
    "augmentation": {"horizontal_flip": 0, "crop_scale": [0.9, 1.0]},
    "num_workers": 0,
    "batch_size": 8,
    "epochs": 2,
    "learning_rate": 3e-3,
    "warmup_epochs": 0.5,
    "log_every_steps": 1,
}
# What makes any recipe small, as options of a command line.
ONE_EPOCH = {
    "dataset": "scenes",
    "scenes": {**SCENES, "imbalance": 50.0},
    "image_size": 32,
    "augmentation": None,
    "batch_size": 8,
    "epochs": 1,
    "warmup_epochs": 0,
    "num_workers": 0,
    "log_every_steps": 1,
}


def write_recipe(folder: Path) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)
