"""What training, validation and saving share."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from modeling_hsvlt.processing_multilabel import MultiLabelProcessor

from ..checkpoint.atomic import CheckpointWriter
from ..checkpoint.deepspeed import ZeroOptimizer
from ..config import TrainingConfig
from ..data.augment import BatchAugmentation
from ..data.dataset import MultiLabelDataset
from ..data.stream_loader import StreamDataset, StreamLoader
from .interruption import StopRequest
from .log import JsonLinesTracker
from .optim import WarmupPlateau


@dataclass(kw_only=True)
class Progress:
    """How far a run is; saved with every checkpoint."""

    # what makes it the same run when it goes on
    label_names: list[str]
    dataset: str  # with a fingerprint of its images and labels
    total_steps: int
    batches: list[int]  # processes, images a batch, batches a step, seed
    options: dict  # of `TrainingConfig.shaping`
    # how far it is
    epoch: int = 0  # finished epochs
    batch: int = 0  # batches of the next epoch that are done
    step: int = 0  # optimizer steps
    best_mAP: float | None = None  # noqa: N815 (as the metric is called)
    best_epoch: int | None = None
    skipped_steps: int = 0  # those whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    log_bytes: int = 0  # of log.jsonl
    unreadable: int = 0  # images of a stream that were left out
    stream: list[dict] | None = None  # where each process is in it


@dataclass(kw_only=True)
class Run:
    """What `setup` builds and `fit` trains. `model` is wrapped for the device or devices, `plain_model` is not."""

    config: TrainingConfig
    accelerator: Accelerator
    folder: Path
    processor: MultiLabelProcessor
    train_data: MultiLabelDataset | StreamDataset
    groups: dict[str, np.ndarray] | None  # head, medium and tail labels, by their images in train
    loaders: dict[str, DataLoader | StreamLoader]  # "train", "validation" and, where asked for, "test"
    augmentation: BatchAugmentation | None
    plain_model: torch.nn.Module
    model: torch.nn.Module
    ema: AveragedModel | None
    optimizer: AcceleratedOptimizer
    stateful_optimizer: torch.optim.Optimizer | ZeroOptimizer  # whose state is saved
    scheduler: LambdaLR | WarmupPlateau
    total_steps: int
    progress: Progress
    log: JsonLinesTracker
    stop: StopRequest
    held: ExitStack  # the lock of the folder
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    @property
    def stream(self) -> StreamLoader | None:
        """The loader of train where that is a stream."""
        loader = self.loaders["train"]
        return loader if isinstance(loader, StreamLoader) else None

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The weights that are validated and kept: the average where there is one."""
        return self.plain_model if self.ema is None else self.ema.module
