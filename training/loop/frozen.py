"""A backbone that is not trained, or only in the last epochs, and its maps from disk."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..config import TrainingConfig
from ..data.augment import BatchAugmentation, changes_images
from ..data.batches import build_dataloader
from ..data.dataset import MultiLabelDataset
from ..data.features import (
    FeatureDataset,
    FeatureStore,
    compute_features,
    image_keys,
    make_room,
    map_shapes,
    store_name,
    view_key,
)
from ..places import user_cache
from .run import Run

FEATURES = " from features"  # behind the name of a split: its loader of stored maps


def feature_loaders(
    config: TrainingConfig, model: torch.nn.Module, data: dict[str, MultiLabelDataset], accelerator: Accelerator
) -> dict[str, DataLoader]:
    """Loaders of the train and validation split that give the backbone's maps, from disk or computed here.

    Raises:
        ValueError: images that change, or more maps than `feature_cache_gib` or the disk allows.
    """
    if data["train"].sparse_labels is None:
        raise ValueError("cache_features needs images that stay the same: set fresh_scenes to false.")
    backbone, device = model.hsvlt.backbone.eval(), accelerator.device
    processor = data["train"].image_processor
    root = Path(config.feature_cache) if config.feature_cache else user_cache() / "features"
    settings = [model.hsvlt.config.backbone_config.to_dict(), model.hsvlt.config.interaction_depths]
    if model.hsvlt.pyramid is not None:
        settings.append(model.hsvlt.config.pyramid)
    folder, shapes = root / store_name(backbone, settings, processor), map_shapes(backbone, processor, device)
    mirrors = config.augmentation is not None and "horizontal_flip" in changes_images(config.augmentation)
    views = {"train": 2 if mirrors else 1, "validation": 1}
    keys = {name: image_keys(data[name].split.images) for name in views}
    wanted = {view_key(key, view) for name, count in views.items() for key in keys[name] for view in range(count)}
    if accelerator.is_main_process:
        make_room(root, FeatureStore(folder, shapes), wanted, config.feature_cache_gib * 2**30)
    accelerator.wait_for_everyone()
    store = FeatureStore(folder, shapes)
    accelerator.print(
        f"Maps of the backbone: {len(wanted & store.keys()):,} of {len(wanted):,} are in {folder} "
        f"({len(wanted) * store.record_bytes / 2**30:.2f} GiB)."
    )
    for name, count in views.items():
        compute_features(
            store,
            data[name],
            keys[name],
            count,
            backbone,
            batch_size=config.eval_batch_size or config.batch_size,
            num_workers=config.workers,
            device=device,
            rank=accelerator.process_index,
            processes=accelerator.num_processes,
            name=name,
        )
    accelerator.wait_for_everyone()
    store.refresh()
    return {
        name + FEATURES: build_dataloader(
            FeatureDataset(data[name], store, keys[name], count),
            batch_size=config.batch_size if name == "train" else config.eval_batch_size or config.batch_size,
            shuffle=name == "train",
            seed=config.seed,
            sparse_labels=True,
        )
        for name, count in views.items()
    }


def trains_backbone(run: Run) -> bool:
    """Whether this epoch trains the backbone."""
    config = run.config
    return not config.freeze_backbone or run.progress.epoch >= config.epochs - config.unfreeze_epochs


def loader_name(run: Run, split: str) -> str:
    """The loader to use in this epoch: stored maps are those of the backbone as it came."""
    return split if trains_backbone(run) or split + FEATURES not in run.loaders else split + FEATURES


def loader_of_best(run: Run) -> str:
    """The loader of validation for best/: stored maps where no epoch has changed the backbone, since its maps of images
    would be those of `mixed_precision`."""
    stored = "validation" + FEATURES
    return stored if stored in run.loaders and not run.config.unfreeze_epochs else "validation"


def set_training_mode(run: Run) -> None:
    """Training mode for what trains in this epoch. Batch statistics of a backbone that was ever frozen stay those it
    came with: a few small batches know less."""
    run.model.train()
    if run.config.freeze_backbone:
        backbone, trains = run.plain_model.hsvlt.backbone, trains_backbone(run)
        backbone.train(trains).requires_grad_(trains)
        for module in backbone.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()


def mirrored(augmentation: BatchAugmentation | None, labels: torch.Tensor) -> torch.Tensor:
    """Which images of a batch the augmentation would mirror, (B,) of 0 and 1: what it does to images 2 px wide."""
    if augmentation is None:
        return torch.zeros(len(labels), dtype=torch.long)
    probe = torch.tensor([1.0, 0.0]).expand(len(labels), 3, 1, 2)
    return augmentation(probe, torch.zeros(len(labels), 1))[0][:, 0, 0, 1].long()
