"""Scores of a model for every image of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

from ..checkpoint.loading import computing
from ..checkpoint.lock import run_folder
from ..data.batches import build_dataloader
from ..data.dataset import MultiLabelDataset
from ..data.load import load
from ..data.rows import Loaded
from ..options import ScoringOptions, dataset_options


class ScoredSplit(NamedTuple):
    """A split and what a checkpoint found in it; scores and labels are (n, num_labels), in the checkpoint's order."""

    label_names: list[str]
    scores: np.ndarray
    labels: np.ndarray
    images: Dataset
    counts: np.ndarray | None  # (num_labels,) images of another split that show each label


def predict(
    model: torch.nn.Module,
    dataloader: DataLoader,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    before_batch: Callable[[], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every image, in the order of the dataset's rows whatever the number of processes.

    Args:
        model: Gives `logits` (batch, num_labels) for `pixel_values`. Put in evaluation mode, and back.
        dataloader: Of a `MultiLabelDataset`, built with the processor (normalised pixels), or of a `FeatureDataset`;
            prepared or not.
        accelerator: None makes one, and moves the model to its device.
        progress: Whether the main process shows a bar.
        before_batch: Called before every batch; may raise to end the scoring.

    Returns:
        Sigmoid scores and labels, both (n, num_labels) float32, on every process. Labels that a model with
        `candidate_labels` left out score 0.

    Raises:
        ValueError: pixels that were not normalised.
        RuntimeError: the loader left out rows.
    """
    if accelerator is None:
        accelerator = Accelerator()
        model.to(accelerator.device)
    dataloader = accelerator.prepare_data_loader(dataloader)
    num_rows, dtype = len(dataloader.dataset), next(model.parameters()).dtype
    batch_size = dataloader.total_batch_size // accelerator.num_processes
    scores = labels = None
    seen = np.zeros(num_rows, dtype=bool)
    was_training = model.training
    model.eval()
    bar = tqdm(dataloader, "Scoring", leave=False, disable=not (progress and accelerator.is_main_process))
    # FSDP2 keeps buffers that it makes in inference mode, and cannot train with them afterwards (torch 2.13).
    sharded = isinstance(next(model.parameters()), DTensor)
    with torch.no_grad() if sharded else torch.inference_mode():
        for batch in bar:
            if before_batch is not None:
                before_batch()
            inputs = batch["features" if "features" in batch else "pixel_values"]
            if inputs.dtype == torch.uint8:
                raise ValueError("The pixels are uint8; build the loader with processor=..., which normalises them.")
            # Only batches of one size: matrix products round differently for another, and how many images the last
            # batch has depends on the number of processes.
            count = len(inputs)
            inputs = torch.cat([inputs, inputs[-1:].expand(batch_size - count, *inputs.shape[1:])])
            with computing(model):
                if "features" in batch:
                    maps = dataloader.dataset.store.unpack(inputs[:, 0])
                    output = model(feature_maps=[each.to(dtype) for each in maps])
                else:
                    output = model(pixel_values=inputs.to(dtype))
            batch_scores = output.logits.float().sigmoid()
            batch_scores = batch_scores[:count]
            batch_labels = batch["labels"].to_dense().float()
            gathered = accelerator.gather_for_metrics((batch["index"], batch_scores, batch_labels))
            index, batch_scores, batch_labels = (tensor.cpu().numpy() for tensor in gathered)
            if scores is None:
                scores, labels = (np.empty((num_rows, batch_scores.shape[1]), np.float32) for _ in range(2))
            # By row, so that neither the order of the processes nor a row that two of them had matters.
            scores[index], labels[index], seen[index] = batch_scores, batch_labels, True
    model.train(was_training)
    if not seen.all():
        raise RuntimeError(
            f"The loader gave {seen.sum()} of {num_rows} rows; build it with drop_last=False and without a sampler."
        )
    return scores, labels


def score_split(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    args: ScoringOptions,
    accelerator: Accelerator,
    *,
    loaded: Loaded | None = None,
    count_split: str | None = None,
) -> ScoredSplit:
    """Predicts the split that `args` name.

    Args:
        loaded: Of `load_scored`; None loads it here.
        count_split: The split whose labels are counted.

    Raises:
        ValueError, OSError: in one sentence, what was wrong with the dataset and what to do.
    """
    if loaded is None:
        loaded = load_scored(model.config, args, accelerator, count_split)
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    order = match_labels(label_names, loaded.label_names, args.checkpoint, args.dataset)
    dataset = MultiLabelDataset(loaded.splits[args.split], loaded.label_names, processor)
    loader = build_dataloader(
        dataset, batch_size=args.batch_size, num_workers=args.num_workers, processor=processor, sparse_labels=True
    )
    with accelerator.autocast():
        scores, labels = predict(model.to(accelerator.device), loader, accelerator)
    if np.isnan(scores).any():
        raise ValueError(f"{args.checkpoint} gives scores that are no numbers: its weights are damaged or too large.")
    counts = None if count_split is None else loaded.splits[count_split].labels.positives()[order]
    return ScoredSplit(label_names, scores, labels[:, order], dataset.split.images, counts)


def load_scored(
    config: PretrainedConfig, args: ScoringOptions, accelerator: Accelerator, count_split: str | None = None
) -> Loaded:
    """The splits to score and to count of the data set that `args` name.

    Raises:
        ValueError, OSError: in one sentence, what was wrong with it; or images that the checkpoint was trained on.
    """
    if args.use_checkpoint_labels:
        args.label_names = [config.id2label[index] for index in range(config.num_labels)]
    with accelerator.main_process_first():  # the others then find the cache
        splits = [args.split] if count_split in (None, args.split) else [args.split, count_split]
        loaded = load(args.dataset, splits=splits, **dataset_options(args))
    if loaded.validation_of_train and (trained := _left_out_by_run(args.checkpoint)) not in (
        None,
        args.validation_images,
    ):
        raise ValueError(
            f"{args.dataset} has no validation split, and of its train split {args.checkpoint} left out those of "
            f"--validation_images {trained}: give the same number, for of {args.validation_images} it was trained on "
            "some."
        )
    return loaded


def _left_out_by_run(checkpoint: str) -> int | None:
    """The `validation_images` of the run on a stream that a checkpoint is of; None where that is not known."""
    with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):  # none there, or damaged
        options = yaml.safe_load((run_folder(Path(checkpoint)) / "config.yaml").read_text(encoding="utf-8"))
        if isinstance(options, dict) and options.get("streaming"):
            return options.get("validation_images")
    return None


def match_labels(label_names: Sequence[str], dataset_names: Sequence[str], checkpoint: str, dataset: str) -> list[int]:
    """Where each of the checkpoint's labels stands among the dataset's.

    Raises:
        ValueError: the two do not have the same names.
    """
    differences = []
    for names, others, owner in ((label_names, dataset_names, checkpoint), (dataset_names, label_names, dataset)):
        only = [name for name in names if name not in set(others)]
        if only:
            listing = ", ".join(map(repr, only[:5])) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
            differences.append(f"only {owner} has {listing}")
    if differences:
        raise ValueError(
            f"The labels of checkpoint and dataset differ: {'; '.join(differences)}; rename them in the dataset (its "
            "labels.txt or features), or pass --use_checkpoint_labels where the dataset lists no vocabulary of its own."
        )
    position = {name: index for index, name in enumerate(dataset_names)}
    return [position[name] for name in label_names]
