"""Everything that a training run needs, built and checked before its first step: `setup` turns options into a `Run`."""

import hashlib
import json
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    GradientAccumulationPlugin,
    gather_object,
    set_seed,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.utils.data import DataLoader
from transformers.image_utils import PILImageResampling

from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

from ..check.imbalance import long_tail_groups
from ..checkpoint.atomic import write_file
from ..checkpoint.deepspeed import ZeroOptimizer, configure_zero
from ..checkpoint.lock import locked
from ..checkpoint.series import holds_files, set_aside
from ..config import TrainingConfig
from ..data.augment import build_augmentation
from ..data.batches import build_dataloader
from ..data.dataset import MultiLabelDataset
from ..data.leave_out import find_unreadable, leave_out_unreadable
from ..data.load import load
from ..data.rows import Loaded, fingerprint_images
from ..data.stream_loader import StreamDataset, StreamLoader
from ..data.stream_parts import StreamSplit
from ..models.build import build_model, read_backbone_statistics
from ..options import dataset_options
from ..places import keep_freed_memory, native_precision
from ..say import counted
from .advice import advice
from .frozen import feature_loaders
from .interruption import StopRequest
from .log import JsonLinesTracker
from .optim import build_ema, build_optimizer, build_scheduler
from .resume import find_source, restore
from .run import Progress, Run
from .streams import open_stream, stream_loader


def setup(config: TrainingConfig) -> Run:
    """Check whatever can be checked, and build everything, before the first step.

    Raises:
        ValueError, OSError: in one sentence, what was wrong and what to do.
    """
    transformers.utils.logging.disable_progress_bar()  # one bar, ours
    folder = Path(config.output_dir)
    log = JsonLinesTracker(folder / "log.jsonl")
    if config.mixed_precision == "auto":
        config.mixed_precision = native_precision()  # config.yaml says what was used
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        # As a plugin: launched for DeepSpeed, accelerate takes the launcher's number over a plain one.
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
        log_with=[log, *config.trackers],
        project_dir=folder,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
    )
    missing = set(config.trackers) - {str(tracker) for tracker in accelerator.log_with}
    if missing:
        raise ValueError(
            f"The tracker {min(missing)!r} is not installed: pip install {min(missing)}, or leave it out of trackers."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_zero(accelerator, config.max_grad_norm, config.optimizer)
    held = ExitStack()
    held.enter_context(locked(folder, accelerator))
    try:
        return _build(config, accelerator, log, held)
    except BaseException:
        held.close()
        raise


def _build(config: TrainingConfig, accelerator: Accelerator, log: JsonLinesTracker, held: ExitStack) -> Run:
    folder, uses_zero = Path(config.output_dir), accelerator.distributed_type == DistributedType.DEEPSPEED
    source = find_source(folder, accelerator) if config.resume else None  # refused now if there is none
    if source is None and not config.overwrite and holds_files(folder):
        raise FileExistsError(
            f"{folder} is not empty: continue that run with --resume, delete it with --overwrite, or choose another "
            "--output_dir."
        )

    loaded = load_splits(config, accelerator, source)
    label_names = loaded.label_names
    if config.unfreeze_epochs and accelerator.num_processes > 1:
        raise ValueError(
            f"unfreeze_epochs is for one process, and there are {accelerator.num_processes}: train the backbone in a "
            "run of its own, with --init_from this run's best/."
        )
    if config.backbone_statistics:
        read_backbone_statistics(config)
    processor = build_processor(config, label_names)
    data = _build_datasets(config, loaded, processor)
    loaders = _build_loaders(config, data, processor, accelerator)

    positives = None if data["train"].sparse_labels is None else data["train"].sparse_labels.positives()
    _count_for_loss(config, positives, data)

    set_seed(config.seed)
    plain_model = build_model(config, label_names, accelerator.print).to(accelerator.device)
    if config.cache_features:
        loaders |= feature_loaders(config, plain_model, data, accelerator)
    if config.unfreeze_epochs:
        plain_model.hsvlt.backbone.requires_grad_(True)  # for the optimizer's groups
    ema = build_ema(plain_model, config.ema_decay) if config.ema_decay is not None else None
    if config.compile:
        plain_model.compile()
    optimizer = build_optimizer(
        plain_model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        backbone_lr_multiplier=config.backbone_lr_multiplier,
        parts=config.parts,
        decay_all=config.decay_all,
        optimizer=config.optimizer,
    )
    groups = [list(group["params"]) for group in optimizer.param_groups] if uses_zero else []
    to_prepare = {name: loader for name, loader in loaders.items() if not isinstance(loader, StreamLoader)}
    model, optimizer, *prepared = accelerator.prepare(plain_model, optimizer, *to_prepare.values())
    stateful = scheduled = optimizer.optimizer
    if uses_zero:
        stateful = ZeroOptimizer(model, groups)
        scheduled = stateful.partitions
    if accelerator.is_fsdp2 and ema is not None:  # sharded like the weights that it averages
        ema.module = fsdp2_prepare_model(accelerator, ema.module)
    loaders |= zip(to_prepare, prepared, strict=True)

    steps_per_epoch = math.ceil(len(loaders["train"]) / config.gradient_accumulation_steps)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or sys.maxsize)
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), total_steps // 2)
    scheduler = build_scheduler(
        scheduled,
        schedule=config.scheduler,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        plateau_factor=config.plateau_factor,
        plateau_patience=config.plateau_patience,
    )
    augmentation = config.augmentation
    if augmentation is not None:
        augmentation = build_augmentation(config.image_size, **augmentation)
    run = Run(
        config=config, accelerator=accelerator, folder=folder, processor=processor, train_data=data["train"],
        groups=None if positives is None else long_tail_groups(positives), loaders=loaders, augmentation=augmentation,
        plain_model=plain_model, model=model, ema=ema, optimizer=optimizer, stateful_optimizer=stateful,
        scheduler=scheduler, total_steps=total_steps, log=log, stop=StopRequest(config.stop_timeout), held=held,
        progress=Progress(
            label_names=label_names,
            dataset=f"{config.dataset} ({_fingerprint(config, data)})",
            total_steps=total_steps,
            batches=[accelerator.num_processes, config.batch_size, config.gradient_accumulation_steps, config.seed],
            options=config.shaping(),
        ),
    )  # fmt: skip
    _begin(run, source, positives)
    if accelerator.is_main_process:
        for words in advice(data, label_names, pretrained=bool(config.backbone or config.init_from)):
            print(f"warning: {words}", file=sys.stderr)
    return run


def _build_datasets(
    config: TrainingConfig, loaded: Loaded, processor: MultiLabelProcessor
) -> dict[str, MultiLabelDataset | StreamDataset]:
    crops = config.augmentation is not None and config.augmentation.get("crop_scale", True)
    data = {}
    for name, split in loaded.splits.items():
        margin = config.crop_margin if name == "train" and crops else 0.0
        if isinstance(split, StreamSplit):
            data[name] = StreamDataset(split, processor, margin)
            continue
        cache = "memory" if config.cache_images and split.labels is not None else None
        data[name] = MultiLabelDataset(
            split,
            loaded.label_names,
            processor,
            margin=margin,
            cache_images=cache,
            num_workers=config.workers,
            partial_labels=config.partial_labels if name == "train" else None,
        )
        if name != "train":
            _check_measurable(name, data[name].sparse_labels.values)
    return data


def _build_loaders(
    config: TrainingConfig,
    data: dict[str, MultiLabelDataset | StreamDataset],
    processor: MultiLabelProcessor,
    accelerator: Accelerator,
) -> dict[str, DataLoader | StreamLoader]:
    return {
        name: stream_loader(config, dataset, accelerator)
        if isinstance(dataset, StreamDataset)
        else build_dataloader(
            dataset,
            batch_size=config.batch_size if name == "train" else config.eval_batch_size or config.batch_size,
            shuffle=name == "train",
            seed=config.seed,
            num_workers=0 if config.cache_images else config.workers,
            processor=None if name == "train" else processor,
            sparse_labels=True,
        )
        for name, dataset in data.items()
    }


def _count_for_loss(
    config: TrainingConfig, positives: np.ndarray | None, data: dict[str, MultiLabelDataset | StreamDataset]
) -> None:
    """Give a loss that weights labels by their frequency the counts that it was not given."""
    if config.loss_type == "distribution_balanced" and "class_counts" not in (config.loss_kwargs or {}):
        if positives is None:
            raise ValueError(
                "The loss weights labels by how often they occur, and scenes that are drawn afresh have no counts, nor "
                "has a stream: set fresh_scenes to false, or give class_counts and num_samples in loss_kwargs."
            )
        counts = {"class_counts": positives.tolist(), "num_samples": len(data["train"])}
        config.loss_kwargs = {**(config.loss_kwargs or {}), **counts}


def _begin(run: Run, source: Path | None, positives: np.ndarray | None) -> None:
    """Continue from `source`, or begin in an empty folder; in both, say what is about to happen."""
    config, accelerator, folder, names = run.config, run.accelerator, run.folder, run.train_data.label_names
    validated = len(run.loaders["validation"].dataset)
    if source is not None:
        restore(run, source)
        run.log.cut(run.progress.log_bytes)
    elif accelerator.is_main_process:
        if config.overwrite:
            set_aside(folder)
        elif holds_files(folder):  # since it was looked at
            raise FileExistsError(f"Something was written to {folder} meanwhile: choose another --output_dir.")
        if positives is not None:
            run.log.log({"positives_in_train": dict(zip(names, positives.tolist(), strict=True))}, step=0)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        kept = replace(
            config, resume=False, overwrite=False, resume_despite=[]
        )  # for `train.py RUN/config.yaml --resume`
        write_file(folder / "config.yaml", kept.to_yaml())
    accelerator.init_trackers(config.project_name, config={key: str(value) for key, value in vars(config).items()})
    if run.stream is None:
        to_train = counted(len(run.train_data), "image")
    else:
        to_train = f"A stream of {counted(len(run.train_data.split.shards), 'shard')}"
    accelerator.print(
        f"{to_train} to train on, {validated:,} to validate, "
        f"{counted(len(names), 'label')}; {run.plain_model.num_parameters():,} parameters; "
        f"{counted(run.total_steps, 'step')} of "
        f"{counted(config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes, 'image')} on "
        f"{accelerator.num_processes} x {accelerator.device.type}."
    )


def _check_measurable(split: str, values: np.ndarray) -> None:
    """Refuse now what the metrics would refuse after the first epoch; `values` are the entries that are not 0."""
    if not (values == 1).any():
        raise ValueError(f"No image of the {split} split shows a label: check its labels, or take another split.")
    if ((values > 0) & (values < 1)).any():
        raise ValueError(
            f"The {split} split has labels between 0 and 1, which only training can use: make them 0 or 1."
        )


def load_splits(config: TrainingConfig, accelerator: Accelerator, source: Path | None = None) -> Loaded:
    """The train and validation split (and test, where asked for) with only images that can be read; train may be a
    stream. `source` is a checkpoint to go on from."""
    splits = ["train", "validation", "test"] if config.evaluate_test else ["train", "validation"]
    if config.streaming:
        loaded = open_stream(config, splits, accelerator, source)
    else:
        with accelerator.main_process_first():  # the others then find the cache
            options = dataset_options(config)
            loaded = load(config.dataset, splits=splits, fresh_scenes=config.fresh_scenes, **options)
    to_check = {name: split for name, split in loaded.splits.items() if config.check_images and not split.drawn}
    for name, split in to_check.items():
        count, rank = accelerator.num_processes, accelerator.process_index
        mine = find_unreadable(split.images.shard(count, rank, contiguous=False), config.workers)
        unreadable = gather_object([(row * count + rank, file, reason) for row, file, reason in mine])
        leave_out_unreadable(loaded, name, sorted(unreadable), config.on_unreadable)
    return loaded


def build_processor(config: TrainingConfig, label_names: list[str]) -> MultiLabelProcessor:
    """Resize to the training size, scale to [0, 1] and normalise: what the checkpoint will do to every image."""
    statistics = {"do_normalize": False}
    if config.image_mean is not None:
        statistics = {"image_mean": config.image_mean, "image_std": config.image_std}
    image_processor = MultiLabelImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        resize_mode=config.resize_mode,
        resample=PILImageResampling[config.resample.upper()],
        **statistics,
    )
    return MultiLabelProcessor(image_processor, id2label=dict(enumerate(label_names)))


def _fingerprint(config: TrainingConfig, data: dict[str, MultiLabelDataset]) -> str:
    """What tells a dataset from another under the same name: its images and their labels, in order."""
    digest = hashlib.sha256(json.dumps(config.scenes, sort_keys=True).encode())
    for name in ("train", "validation"):
        if isinstance(data[name], StreamDataset):
            digest.update(data[name].split.shards.fingerprint().encode())
            continue
        labels = data[name].sparse_labels
        digest.update(f"{name} {len(data[name])}".encode())
        if labels is not None and not data[name].split.drawn:
            digest.update(fingerprint_images(data[name].split.images, every_byte=config.compare_bytes).encode())
        for array in () if labels is None else (labels.starts, labels.ids, labels.values, labels.default):
            digest.update(np.ascontiguousarray(array).tobytes())
    train = data["train"]
    count = counted(len(train.split.shards), "shard") if isinstance(train, StreamDataset) else len(train)
    return f"{count} + {len(data['validation'])} images, {digest.hexdigest()[:16]}"
