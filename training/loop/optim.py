"""Optimizer, learning-rate schedule and weight average of a training run.

`build_optimizer`  AdamW with groups: backbone or rest, decayed or not.
`build_scheduler`  linear warm-up, then cosine to zero (our default) or reduce-on-plateau (published HSVLT).
`build_ema`        exponential moving average of the weights, with its own warm-up.
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from transformers import get_cosine_schedule_with_warmup

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
# Tables and tokens that are raw parameters of two or more dimensions (Swin's bias table, ViT's positions and class
# token): like nn.Embedding rows they are looked up, not multiplied by: shrinking them to zero regularises nothing.
TABLE_NAMES = ("position_embedding", "pos_embed", "relative_position_bias_table", "cls_token", "class_embedding")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    backbone_lr_multiplier: float = 1.0,
    decay_all: bool = False,
) -> list[dict]:
    """Sort a model's trainable parameters into at most four AdamW groups.

    A parameter is not decayed when it belongs to a norm, has fewer than two dimensions (biases, ConvNeXt's
    `layer_scale_parameter`, scales), or is an embedding table. A module called `backbone` is it.

    Arguments:
        learning_rate: of everything outside the backbone.
        weight_decay: AdamW's decoupled decay, multiplied by the learning rate at each step.
        backbone_lr_multiplier: the backbone's learning rate is `learning_rate` times this.
        decay_all: decay every parameter, as the official HSVLT run did.

    Returns:
        Groups with the keys `name` ("backbone/decay", "backbone/no_decay", "rest/decay" or "rest/no_decay"), `params`,
        `lr` and `weight_decay`; empty groups are left out. Frozen parameters are in none.

    Raises:
        ValueError: nothing is trainable, or a multiplier other than 1 is asked of a model that has no backbone. (In the
            official HSVLT code such a group silently matched nothing.)
    """
    undecayed = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            is_table = isinstance(module, nn.Embedding) or any(table in name for table in TABLE_NAMES)
            if parameter.ndim < 2 or is_table or isinstance(module, NORM_LAYERS):
                undecayed.add(full_name)

    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = "backbone" in name.split(".")
        decayed = decay_all or name not in undecayed
        group_name = f"{'backbone' if backbone else 'rest'}/{'decay' if decayed else 'no_decay'}"
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "params": [],
                "lr": learning_rate * (backbone_lr_multiplier if backbone else 1.0),
                "weight_decay": weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)

    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: unfreeze something before training it.")
    if backbone_lr_multiplier != 1.0 and not any(name.startswith("backbone/") for name in groups):
        raise ValueError(
            f"backbone_lr_multiplier is {backbone_lr_multiplier}, but {type(model).__name__} has no trainable "
            f"parameter below a module named `backbone`: set it to 1."
        )
    return list(groups.values())


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    backbone_lr_multiplier: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    decay_all: bool = False,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, with the fused kernel where the parameters' device has one."""
    groups = parameter_groups(
        model,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        backbone_lr_multiplier=backbone_lr_multiplier,
        decay_all=decay_all,
    )
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=devices <= {"cpu", "cuda", "mps", "xpu"})


class WarmupPlateau:
    """Linear warm-up by step, then the learning rate is cut when the validation metric stops rising.

    This is the schedule of the official HSVLT run: lr = base * step / warmup_steps, then ReduceLROnPlateau(mode max,
    factor 0.1, patience 1) stepped once an epoch on validation mAP.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, warmup_steps: int, factor: float, patience: int):
        self.warmup_steps = warmup_steps
        self.warmup = LambdaLR(optimizer, lambda step: min(1.0, step / max(1, warmup_steps)))
        if warmup_steps == 0:  # LambdaLR has already set the factor of step 0
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]
        self.plateau = ReduceLROnPlateau(optimizer, mode="max", factor=factor, patience=patience)

    def step(self) -> None:
        """Count one optimizer step."""
        if self.warmup.last_epoch < self.warmup_steps:  # afterwards the plateau part alone owns the learning rate
            self.warmup.step()

    def step_metric(self, value: float) -> None:
        """Count one epoch that ended with this validation metric."""
        self.plateau.step(value)

    def state_dict(self) -> dict:
        return {"warmup": self.warmup.state_dict(), "plateau": self.plateau.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.warmup.load_state_dict(state["warmup"])
        self.plateau.load_state_dict(state["plateau"])


def build_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    schedule: str,
    warmup_steps: int,
    total_steps: int,
    plateau_factor: float = 0.1,
    plateau_patience: int = 1,
) -> LambdaLR | WarmupPlateau:
    """Linear warm-up from 0 over `warmup_steps` optimizer steps, then `schedule`.

    With w = warmup_steps and T = total_steps, the factor of step s is s / w before w, and after it for "cosine"
    0.5 * (1 + cos(pi * (s - w) / (T - w))); for "plateau" see `WarmupPlateau`. All groups keep their ratio.

    Raises:
        ValueError: `schedule` is neither "cosine" nor "plateau", or the warm-up is as long as the whole run.
    """
    if warmup_steps and warmup_steps >= total_steps:
        raise ValueError(
            f"The warm-up takes {warmup_steps} steps of a run of {total_steps}: shorten the warm-up or train longer."
        )
    if schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    if schedule == "plateau":
        return WarmupPlateau(optimizer, warmup_steps=warmup_steps, factor=plateau_factor, patience=plateau_patience)
    raise ValueError(f"scheduler is {schedule!r}: choose 'cosine' or 'plateau'.")


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of `model`'s weights, kept by `torch.optim.swa_utils.AveragedModel`.

    The first update copies the weights; update n (counted from 0) then sets ema = d * ema + (1 - d) * weights with
    d = min(decay, (1 + n) / (10 + n)). The ramp is TensorFlow's `ExponentialMovingAverage(num_updates=...)`: without it
    a run of a few thousand steps at decay 0.9997 would still be averaging its random start. Buffers (batch
    statistics, label embeddings) are copied, not averaged.
    """
    if not 0.0 < decay < 1.0:
        raise ValueError(f"ema_decay is {decay}: give a number between 0 and 1, or null for no average.")

    @torch.no_grad()
    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], updates: torch.Tensor | int) -> None:
        count = int(updates)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1 + count) / (10 + count)))

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=False)
    return ema.requires_grad_(False)
