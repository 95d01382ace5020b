"""The state of a training run as tensors and JSON: copied in one go, written later, put back bit for bit.

What is sharded over processes (FSDP2's `DTensor`) is gathered into whole tensors on its way out and divided again on
its way in, so that a checkpoint does not depend on how many processes wrote it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from .folder import STATE_FOLDER, CheckpointError


@dataclass
class TrainingState:
    """A copy, on the CPU, that training no longer touches."""

    tensors: dict[str, torch.Tensor]  # "model.*", "ema.*" and "optimizer.INDEX.*"
    values: dict  # all else, as JSON holds it

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate: the average where there is one."""
        prefix = "ema.module." if self.values["ema"] else "model."
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def write(self, folder: Path) -> None:
        """Write training_state/ into `folder`.

        Raises:
            CheckpointError: a tensor is not finite, so that resuming from it could only go wrong.
        """
        for name, tensor in self.tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{name} holds numbers that are not finite; nothing is saved")
        (folder / STATE_FOLDER).mkdir()
        save_file(self.tensors, folder / STATE_FOLDER / "tensors.safetensors")
        (folder / STATE_FOLDER / "state.json").write_text(json.dumps(self.values, indent=1))


def copy_training_state(
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler,
    ema: AveragedModel | None,
    scaler: torch.amp.GradScaler | None,
    progress: dict,
    keep: bool = True,
) -> TrainingState:
    """Copy everything that the next step depends on.

    Arguments:
        model: unwrapped; its training weights (not the average).
        progress: counters and scores of the loop, anything JSON holds.
        keep: False where another process writes: nothing is copied, but where the state is sharded every process has
            to call this.
    """
    optimizer_state = optimizer.state_dict()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for index, state in optimizer_state["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    values = {
        "progress": progress,
        "param_groups": optimizer_state["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "ema": ema is not None,
    }
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if keep:
            copies[name] = whole.to("cpu", copy=True)
    return TrainingState(copies, json.loads(json.dumps(values)))


def read_progress(folder: Path) -> dict:
    """The `progress` that was saved in checkpoint `folder`."""
    return _read_values(folder)["progress"]


def load_training_state(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler,
    ema: AveragedModel | None,
    scaler: torch.amp.GradScaler | None,
) -> dict:
    """Put everything back where `copy_training_state` took it from, and return `progress`.

    Raises:
        ValueError: it has a weight average where this run has none, or the reverse, weights of other shapes, or another
            optimizer.
    """
    values = _read_values(folder)
    if values["ema"] != (ema is not None):
        raise ValueError(
            f"{folder} was trained {'with' if values['ema'] else 'without'} a weight average: resume with the same "
            "ema_decay, or start a new run from its weights with --init_from."
        )
    own_groups, groups = optimizer.param_groups, values["param_groups"]
    if [group.get("name") for group in own_groups] != [group.get("name") for group in groups]:
        raise ValueError(
            f"{folder} was trained with other groups of parameters than these options make: resume with the same "
            "optimizer, decay_all and frozen parts as in config.yaml, or start a new run from its weights with "
            "--init_from."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, tensor in load_file(folder / STATE_FOLDER / "tensors.safetensors").items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    for part, module in (("model", model), ("ema", ema)):
        if module is None:
            continue
        own = module.state_dict()
        try:
            module.load_state_dict({name: _like(tensor, own.get(name)) for name, tensor in parts[part].items()})
        except RuntimeError as error:
            raise ValueError(
                f"{folder} holds another model than these options describe: resume with the options in config.yaml, "
                f"or start a new run from its weights with --init_from. ({' '.join(str(error).split())[:300]})"
            ) from error
    parameters = [parameter for group in own_groups for parameter in group["params"]]
    optimizer_state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, field = name.partition(".")
        optimizer_state.setdefault(int(index), {})[field] = _like(tensor, parameters[int(index)])
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    scheduler.load_state_dict(values["scheduler"])
    if scaler is not None and values["scaler"] is not None:
        scaler.load_state_dict(values["scaler"])
    return values["progress"]


def _read_values(folder: Path) -> dict:
    return json.loads((folder / STATE_FOLDER / "state.json").read_text())


def _like(tensor: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """`tensor`, divided over the processes as `own` is; a step counter, which has no shape, is on all of them."""
    if isinstance(own, DTensor) and tensor.shape == own.shape:
        return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)
    return tensor
