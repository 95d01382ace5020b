"""Optimizer, learning-rate schedule and weight average of a training run.

`build_optimizer`  AdamW, or Muon for matrices and AdamW for the rest, with groups: backbone or rest, decayed or not.
`build_scheduler`  linear warm-up, then cosine to zero (our default), constant with a linear end, or reduce-on-plateau
                   (published HSVLT).
`build_ema`        exponential moving average of the weights, with its own warm-up.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

NORM_LAYERS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)
# Tables and tokens that are raw parameters of two or more dimensions (Swin's bias table, ViT's positions and class
# token): like nn.Embedding rows they are looked up, not multiplied by: shrinking them to zero regularises nothing.
TABLE_NAMES = ("position_embedding", "pos_embed", "relative_position_bias_table", "cls_token", "class_embedding")
MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MUON = "/muon"  # ends the names of groups that Muon steps


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    backbone_lr_multiplier: float = 1.0,
    parts: Mapping[str, Mapping[str, float]] | None = None,
    decay_all: bool = False,
    muon: bool = False,
) -> list[dict]:
    """Sort a model's trainable parameters into groups: backbone, parts or rest, decayed or not, by optimizer.

    A parameter is not decayed when it belongs to a norm, has fewer than two dimensions (biases, ConvNeXt's
    `layer_scale_parameter`, scales), or is an embedding table. A module called `backbone` is it.

    Arguments:
        learning_rate: of everything outside the backbone.
        weight_decay: AdamW's decoupled decay, multiplied by the learning rate at each step.
        backbone_lr_multiplier: the backbone's learning rate is `learning_rate` times this.
        parts: a `learning_rate` and a `weight_decay` of its own for what lies below a module of that name.
        decay_all: decay every parameter, as the official HSVLT run did.
        muon: groups of their own for the weights of linear layers and of convolutions that are not grouped.

    Returns:
        Groups with the keys `name` ("backbone/decay", "rest/no_decay", "PART/decay", ..., and with "/muon" behind it),
        `params`, `lr` and `weight_decay`; empty groups are left out. Frozen parameters are in none.

    Raises:
        ValueError: nothing is trainable, a part is no module or has another option, `muon` finds no matrix, or a
            multiplier other than 1 is asked of a model that has no backbone. (In the official HSVLT code such a group
            silently matched nothing.)
    """
    parts = parts or {}
    for part, options in parts.items():
        if not any(part in name.split(".") for name, _ in model.named_modules()):
            raise ValueError(f"parts names {part!r}, but {type(model).__name__} has no module of that name.")
        for key in options or {"nothing"}:
            if key not in ("learning_rate", "weight_decay"):
                raise ValueError(f"parts.{part} has {key}: give it a learning_rate, a weight_decay, or both.")
    undecayed, matrices, tables = set(), set(), set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            is_table = isinstance(module, nn.Embedding) or any(table in name for table in TABLE_NAMES)
            if parameter.ndim < 2 or is_table or isinstance(module, NORM_LAYERS):
                undecayed.add(full_name)
            if is_table:
                tables.add(parameter)
            elif isinstance(module, MATRIX_LAYERS) and name == "weight" and getattr(module, "groups", 1) == 1:
                matrices.add(parameter)
    matrices = matrices - tables if muon else set()  # one that is tied to a table is one

    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.split(".")
        backbone = "backbone" in path
        part = next((each for each in parts if each in path), "backbone" if backbone else "rest")
        own = parts.get(part, {})
        decayed = decay_all or name not in undecayed
        group_name = f"{part}/{'decay' if decayed else 'no_decay'}"
        if parameter in matrices:
            group_name += MUON
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "params": [],
                "lr": own.get("learning_rate", learning_rate * (backbone_lr_multiplier if backbone else 1.0)),
                "weight_decay": own.get("weight_decay", weight_decay) if decayed else 0.0,
            },
        )
        group["params"].append(parameter)

    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameter: unfreeze something before training it.")
    if muon and not any(name.endswith(MUON) for name in groups):
        raise ValueError(
            f"optimizer is muon, but {type(model).__name__} trains no weight of a linear or convolution layer: "
            "set it to adamw."
        )
    if backbone_lr_multiplier != 1.0 and not any(name.startswith("backbone/") for name in groups):
        raise ValueError(
            f"backbone_lr_multiplier is {backbone_lr_multiplier}, but {type(model).__name__} has no trainable "
            f"parameter below a module named `backbone`: set it to 1."
        )
    return list(groups.values())


def build_optimizer(
    model: nn.Module, *, learning_rate: float, optimizer: str = "adamw", **how
) -> torch.optim.Optimizer:
    """AdamW over `parameter_groups`, which takes `how`, with the fused kernel where the parameters' device has one; or
    `Muon`."""
    groups = parameter_groups(model, learning_rate=learning_rate, muon=optimizer == "muon", **how)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    kind = Muon if optimizer == "muon" else torch.optim.AdamW
    return kind(groups, lr=learning_rate, fused=devices <= {"cpu", "cuda", "mps", "xpu"})


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards U V^T of each matrix U S V^T in (number, rows, columns): singular values of some
    0.7 to 1.2.

    Coefficients are Keller Jordan's (https://kellerjordan.github.io/posts/muon/). Products are in bfloat16 on a GPU, as
    published. On a CPU they stay in fp32: one without bfloat16 instructions takes twenty times as long for them, and
    `torch.optim.Muon` always uses them. Each step multiplies a matrix by a polynomial of its own X X^T; where it is
    twice as long as wide, these small factors are multiplied among themselves first, which takes a third less.
    """
    if matrices.size(1) > matrices.size(2):
        return orthogonalise(matrices.mT).mT
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.bfloat16 or x.size(2) < 2 * x.size(1):  # bfloat16 would round too much of a product of factors
        for _ in range(5):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        return x
    gram, product = x @ x.mT, torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        product, gram = factor @ product, factor @ gram @ factor
    return product @ x


def alike(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those that have a gradient, by the shape of their matrix: what is multiplied together, up to 64 MiB of fp32."""
    kinds: dict[tuple, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            rows = parameter.shape[0]
            kind = (rows, parameter.numel() // rows, parameter.dtype, parameter.device)
            kinds.setdefault(kind, []).append(parameter)
    for (rows, columns, *_), found in kinds.items():
        at_once = max(1, 2**24 // (rows * columns))
        yield from (found[start : start + at_once] for start in range(0, len(found), at_once))


class Muon(torch.optim.Optimizer):
    """Muon for the groups whose name ends in "/muon", AdamW for the others; one optimizer to all that hold it.

    As `torch.optim.Muon(momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")`, which takes matrices alone:
    here a convolution's weight is one of (out, in * height * width). With that adjustment, 0.2 * sqrt(longer side), an
    update is as large as AdamW's, whose learning rate and decay it shares (https://arxiv.org/abs/2502.16982).
    """

    def __init__(self, groups: list[dict], **options):
        self.adamw = torch.optim.AdamW(groups, **options)
        super().__init__(self.adamw.param_groups, self.adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        # Groups and state are this object's, where a checkpoint, FSDP2 or a schedule may have replaced them.
        self.adamw.param_groups = [group for group in self.param_groups if not group["name"].endswith(MUON)]
        self.adamw.state = self.state
        loss = self.adamw.step(closure)
        for group in self.param_groups:
            if not group["name"].endswith(MUON):
                continue
            for parameters in alike(group["params"]):
                updates = [self._momentum(parameter) for parameter in parameters]
                # FSDP2 divides them
                whole = [each.full_tensor() if isinstance(each, DTensor) else each for each in updates]
                orthogonal = orthogonalise(torch.stack([each.flatten(1) for each in whole]))
                for parameter, update, matrix in zip(parameters, updates, orthogonal, strict=True):
                    step = matrix.to(update.dtype).reshape(update.shape)
                    if isinstance(update, DTensor):  # every process takes its part of what they all have
                        step = distribute_tensor(step, update.device_mesh, update.placements, src_data_rank=None)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(step, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
        return loss

    def _momentum(self, parameter: nn.Parameter) -> torch.Tensor:
        """Nesterov's: the gradient and its running mean, which takes it in."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum = state["momentum_buffer"].lerp_(parameter.grad, 0.05)
        return parameter.grad.lerp(momentum, 0.95)


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
    0.5 * (1 + cos(pi * (s - w) / (T - w))); for "wsd" (warm-up, stable, decay) 1 up to 0.6 T, then linear to zero; for
    "plateau" see `WarmupPlateau`. All groups keep their ratio.

    Raises:
        ValueError: `schedule` is none of "cosine", "wsd" and "plateau", or the warm-up is as long as the whole run.
    """
    if warmup_steps and warmup_steps >= total_steps:
        raise ValueError(
            f"The warm-up takes {warmup_steps} steps of a run of {total_steps}: shorten the warm-up or train longer."
        )
    if schedule == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    if schedule == "wsd":
        decay_steps = min(round(0.4 * total_steps), total_steps - warmup_steps)
        return get_wsd_schedule(optimizer, warmup_steps, decay_steps, total_steps, decay_type="linear")
    if schedule == "plateau":
        return WarmupPlateau(optimizer, warmup_steps=warmup_steps, factor=plateau_factor, patience=plateau_patience)
    raise ValueError(f"scheduler is {schedule!r}: choose 'cosine', 'wsd' or 'plateau'.")


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
