"""What a run leaves on disk, written so that a kill at any moment leaves the last good state readable.

    RUN/best/    plain checkpoint (what `from_pretrained` loads) of the epoch with the highest validation mAP
    RUN/last/    plain checkpoint of the newest weights, and in `last/training_state/` what `--resume` needs:
                 tensors.safetensors (weights, weight average, optimizer) and state.json (everything else)

A folder is written beside its place, synced, and renamed into it. Nothing is ever pickled.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

FORMAT_VERSION = 1
STATE_FOLDER = "training_state"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; when the block ends without an error it takes `target`'s place.

    The old `target` exists until the new one is complete and on disk. A kill between the two renames leaves it under
    `.{name}.old`, from where `recover` brings it back.
    """
    written, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    recover(target)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    yield written
    for path in [*written.rglob("*"), written]:
        _sync(path)
    if target.exists():
        target.rename(old)
    written.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Undo a half-finished replacement of `target` by `atomic_folder`."""
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, model: nn.Module, processor) -> None:
    """Write weights, configuration, code and processor into `folder`: all that `from_pretrained` needs."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def save_training_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler,
    ema: AveragedModel | None,
    scaler: torch.amp.GradScaler | None,
    progress: dict,
) -> None:
    """Write into `folder / "training_state"` what `load_training_state` gives back, bit for bit.

    Arguments:
        model: unwrapped; its training weights (not the average).
        progress: counters and scores of the loop, anything JSON holds.
    """
    optimizer_state = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for index, values in optimizer_state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in values.items()}
    state = {
        "format_version": FORMAT_VERSION,
        "progress": progress,
        "param_groups": optimizer_state["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "ema": ema is not None,
    }
    (folder / STATE_FOLDER).mkdir()
    # Clones: safetensors refuses tensors that share memory (tied weights).
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, _tensors_file(folder))
    (folder / STATE_FOLDER / "state.json").write_text(json.dumps(state, indent=1))


def read_progress(folder: Path) -> dict:
    """The `progress` that was saved in `folder`.

    Raises:
        FileNotFoundError: there is no training state to resume from.
        ValueError: it was written in another format.
    """
    return _read_state(folder)["progress"]


def load_training_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler,
    ema: AveragedModel | None,
    scaler: torch.amp.GradScaler | None,
) -> dict:
    """Put everything back where `save_training_state` took it from, and return `progress`.

    Raises:
        FileNotFoundError: there is no training state to resume from.
        ValueError: it is of another format version, or with a weight average where this run has none, or the reverse.
    """
    state = _read_state(folder)
    if state["ema"] != (ema is not None):
        raise ValueError(
            f"{folder} was trained {'with' if state['ema'] else 'without'} a weight average: resume with the same "
            "ema_decay, or start a new run from its weights with --init_from."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, tensor in load_file(_tensors_file(folder)).items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    model.load_state_dict(parts["model"])
    if ema is not None:
        ema.load_state_dict(parts["ema"])
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, field = name.partition(".")
        optimizer_state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": state["param_groups"]})
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(state["scaler"])
    return state["progress"]


def _tensors_file(folder: Path) -> Path:
    return folder / STATE_FOLDER / "tensors.safetensors"


def _read_state(folder: Path) -> dict:
    path = folder / STATE_FOLDER / "state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no training state to resume from: start without --resume.")
    state = json.loads(path.read_text())
    if state["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {state['format_version']}, this code reads {FORMAT_VERSION}: resume with the "
            "version of the code that wrote it, or start a new run from its weights with --init_from."
        )
    return state


def push_checkpoint(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a plain checkpoint folder to the Hub in one commit, and return its address."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message="Upload the trained model",
        ignore_patterns=[f"{STATE_FOLDER}/*"],
    )
    return str(commit.commit_url)
