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
from .interruption import StopRequest
from .log import JsonLinesTracker
from .optim import WarmupPlateau


@dataclass(kw_only=True)
class Run:
    """What `setup` builds and `fit` trains. `model` is wrapped for the device or devices, `plain_model` is not."""

    config: TrainingConfig
    accelerator: Accelerator
    folder: Path
    processor: MultiLabelProcessor
    train_data: MultiLabelDataset
    groups: dict[str, np.ndarray] | None  # head, medium and tail labels, by their images in train
    loaders: dict[str, DataLoader]  # "train", "validation" and, where asked for, "test"
    augmentation: BatchAugmentation | None
    plain_model: torch.nn.Module
    model: torch.nn.Module
    ema: AveragedModel | None
    optimizer: AcceleratedOptimizer
    stateful_optimizer: torch.optim.Optimizer | ZeroOptimizer  # whose state is saved
    scheduler: LambdaLR | WarmupPlateau
    total_steps: int
    progress: dict  # counters and scores; saved with every checkpoint
    log: "JsonLinesTracker"
    stop: StopRequest
    held: ExitStack  # the lock of the folder
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    @property
    def evaluated_model(self) -> torch.nn.Module:
        """The weights that are validated and kept: the average where there is one."""
        return self.plain_model if self.ema is None else self.ema.module
