import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from training.loop.optim import build_ema, build_optimizer, build_scheduler, parameter_groups


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.layer_scale_parameter = nn.Parameter(torch.ones(4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.backbone = Backbone()
        self.model.batch_norm = nn.BatchNorm1d(4)
        self.model.words = nn.Embedding(7, 4)
        self.model.weight = nn.Parameter(torch.ones(5, 4))
        self.model.bias = nn.Parameter(torch.zeros(5))
        self.head = nn.Linear(4, 2)


def named_groups(model, **options):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1e-2, weight_decay=0.1, **options)
    return {
        group["name"]: ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"]) for group in groups
    }


def test_groups_are_exact():
    groups = named_groups(Classifier(), backbone_lr_multiplier=0.1)
    backbone = "model.backbone."
    undecayed = {"stem.bias", "norm.weight", "norm.bias", "layer_scale_parameter", "relative_position_bias_table"}
    assert groups == {
        "backbone/decay": ({backbone + "stem.weight"}, pytest.approx(1e-3), 0.1),
        "backbone/no_decay": ({backbone + name for name in undecayed}, pytest.approx(1e-3), 0.0),
        "rest/decay": ({"model.weight", "head.weight"}, 1e-2, 0.1),
        "rest/no_decay": (
            {"model.bias", "model.batch_norm.weight", "model.batch_norm.bias", "model.words.weight", "head.bias"},
            1e-2,
            0.0,
        ),
    }


def test_a_part_has_its_own_rate_and_decay():
    parts = {"head": {"learning_rate": 0.5, "weight_decay": 3}, "backbone": {"weight_decay": 0.7}}
    groups = named_groups(Classifier(), backbone_lr_multiplier=0.1, parts=parts)
    assert groups["head/decay"] == ({"head.weight"}, 0.5, 3)
    assert groups["head/no_decay"] == ({"head.bias"}, 0.5, 0.0)
    assert groups["backbone/decay"] == ({"model.backbone.stem.weight"}, pytest.approx(1e-3), 0.7)
    assert groups["rest/decay"] == ({"model.weight"}, 1e-2, 0.1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"heads": {"learning_rate": 1.0}}, "no module of that name"),
        ({"head": {"rate": 1.0}}, "parts.head has rate"),
        ({"head": None}, "parts.head has nothing"),
    ],
)
def test_a_part_that_cannot_be_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        named_groups(Classifier(), parts=parts)


def test_every_parameter_decays_as_published_when_asked():
    groups = named_groups(Classifier(), decay_all=True)
    assert set(groups) == {"backbone/decay", "rest/decay"}
    assert all(decay == 0.1 for _, _, decay in groups.values())


def test_a_multiplier_that_reaches_nothing_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter below a module named `backbone`"):
        parameter_groups(nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.0, backbone_lr_multiplier=0.1)
    with pytest.raises(ValueError, match="unfreeze"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), learning_rate=1.0, weight_decay=0.0)


def test_optimizer_steps_as_plain_adamw_and_is_fused():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    reference = nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    ours = build_optimizer(model, learning_rate=0.1, weight_decay=0.3)
    theirs = torch.optim.AdamW(
        [{"params": [reference.weight], "weight_decay": 0.3}, {"params": [reference.bias], "weight_decay": 0.0}], lr=0.1
    )
    assert ours.defaults["fused"]
    x = torch.randn(5, 3)
    for _ in range(3):
        for module, optimizer in ((model, ours), (reference, theirs)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.weight, reference.weight)
    torch.testing.assert_close(model.bias, reference.bias)


class Matrices(nn.Module):
    """Every kind of parameter: those that Muon takes are the first four."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.pointwise = nn.Conv2d(3, 5, 1)
        self.backbone.full = nn.Conv2d(5, 4, 2, bias=False)
        self.wide = nn.Linear(36, 3)
        self.tall = nn.Linear(3, 6, bias=False)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.norm = nn.LayerNorm([4, 3, 3])
        self.rows = nn.Embedding(7, 6)
        self.tied = nn.Linear(6, 7, bias=False)
        self.tied.weight = self.rows.weight
        self.per_label = nn.Parameter(torch.randn(7, 6))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x):  # (batch, 3, 4, 4)
        x = self.backbone.full(self.backbone.pointwise(x).relu())
        x = self.norm(self.grouped(self.depthwise(x)))
        x = self.tall(self.wide(x.flatten(1)))
        return self.tied(x) + x @ self.per_label.T


TAKEN = ["backbone.pointwise.weight", "backbone.full.weight", "wide.weight", "tall.weight"]


def matrices_after(steps, change=lambda model: model, **options):
    torch.manual_seed(0)
    model = change(Matrices())
    optimizer = build_optimizer(model, learning_rate=0.02, weight_decay=0.3, **options)
    gradients = []
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(9, 3, 4, 4)).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, gradients


def test_muon_takes_matrices_and_full_convolutions_alone():
    model = Matrices()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(
        model, learning_rate=1.0, weight_decay=0.1, backbone_lr_multiplier=0.1, optimizer="muon"
    )
    found = {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found["backbone/decay/muon"] == TAKEN[:2] and rates["backbone/decay/muon"] == (0.1, 0.1)
    assert found["rest/decay/muon"] == TAKEN[2:] and rates["rest/decay/muon"] == (1.0, 0.1)
    others = {name for name, p in model.named_parameters() if p.requires_grad} - set(TAKEN)
    assert {name for group, members in found.items() if not group.endswith("/muon") for name in members} == others
    assert {"rows.weight", "per_label", "depthwise.weight", "grouped.weight", "norm.weight", "wide.bias"} <= others


def test_muon_steps_as_written_by_hand():
    """Muon in fp64 by a loop over the equations; AdamW where that is named; all three at their own rate and decay."""
    rate, decay = 0.02, 0.3
    torch.manual_seed(0)
    start = {name: p.detach().clone() for name, p in Matrices().named_parameters()}
    model, _, gradients = matrices_after(4, optimizer="muon", backbone_lr_multiplier=0.5)
    for name in TAKEN:
        lr = rate * (0.5 if name.startswith("backbone") else 1.0)
        weight = start[name].double().flatten(1).numpy()
        buffer = np.zeros_like(weight)
        for step in gradients:
            gradient = step[name].double().numpy().reshape(weight.shape)
            buffer = 0.95 * buffer + gradient
            x = gradient + 0.95 * buffer  # Nesterov
            x = x / np.sqrt((x**2).sum())
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
            weight = weight * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(weight.shape)) * x
        moved = dict(model.named_parameters())[name].detach().flatten(1)
        assert not torch.equal(moved, start[name].flatten(1))
        # Five steps make a rounding error of a small singular value up to 3.4445 ** 5 times as large.
        torch.testing.assert_close(moved.double(), torch.from_numpy(weight), rtol=1e-3, atol=1e-4, msg=name)

    torch.manual_seed(0)
    reference = Matrices()
    rest = {name: p for name, p in reference.named_parameters() if name not in TAKEN and p.requires_grad}
    undecayed = [name for name, p in rest.items() if p.ndim < 2 or name.startswith(("norm", "rows"))]
    adamw = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": 0.0 if name in undecayed else decay,
             "lr": rate * (0.5 if name.startswith("backbone") else 1.0)}
            for name, p in rest.items()
        ],
    )  # fmt: skip
    for step in gradients:
        for name, p in rest.items():
            p.grad = step[name]
        adamw.step()
    for name, p in rest.items():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, msg=name)


def test_muon_steps_as_torch_s_own():
    """torch's multiplies in bfloat16, whose three digits five Newton-Schulz steps keep."""
    torch.manual_seed(0)
    ours, theirs = nn.Linear(24, 40, bias=False), nn.Linear(24, 40, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    pair = (
        (ours, build_optimizer(ours, learning_rate=0.1, weight_decay=0.2, optimizer="muon")),
        (theirs, torch.optim.Muon(theirs.parameters(), lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")),
    )
    for step in range(3):
        torch.manual_seed(step)
        gradient = torch.randn(40, 24)
        for module, optimizer in pair:
            module.weight.grad = gradient.clone()
            optimizer.step()
    moved = (theirs.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved and moved > 1


def test_muon_changes_the_weight_itself_whatever_its_memory_looks_like():
    plain, _, _ = matrices_after(2, optimizer="muon")
    last, _, _ = matrices_after(2, lambda model: model.to(memory_format=torch.channels_last), optimizer="muon")
    assert last.backbone.full.weight.is_contiguous(memory_format=torch.channels_last)
    for (name, expected), (_, found) in zip(plain.named_parameters(), last.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)


def test_muon_leaves_out_a_step_that_overflowed():
    """The gradient of a matrix is fine, that of another parameter not: nothing moves, no momentum is taken."""
    model, optimizer, _ = matrices_after(1, optimizer="muon")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values() if "momentum_buffer" in state]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.randn(9, 3, 4, 4)).square().sum()).backward()
    model.per_label.grad[0, 0] = math.inf
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0 and len(momentum) == 4
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    after = [state["momentum_buffer"] for state in optimizer.state.values() if "momentum_buffer" in state]
    assert all(map(torch.equal, momentum, after))


def test_muon_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match="trains no weight of a linear or convolution layer: set it to adamw"):
        build_optimizer(nn.Embedding(3, 2), learning_rate=1.0, weight_decay=0.0, optimizer="muon")


def optimizer_of(lrs=(1.0, 0.1)):
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs])


def run(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 4])
def test_warmup_and_cosine_by_formula(warmup):
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, schedule="cosine", warmup_steps=warmup, total_steps=20)
    for step, rates in enumerate(run(optimizer, scheduler, 21)):
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (20 - warmup)))
        assert rates == pytest.approx([factor, 0.1 * factor], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 4, 15])
def test_warmup_stable_and_decay_by_formula(warmup):
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, schedule="wsd", warmup_steps=warmup, total_steps=20)
    start = max(warmup, 12)
    for step, rates in enumerate(run(optimizer, scheduler, 21)):
        factor = step / warmup if step < warmup else min(1, (20 - step) / (20 - start))
        assert rates == pytest.approx([factor, 0.1 * factor], abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 4])
def test_warmup_and_plateau_as_published(warmup):
    optimizer = optimizer_of()
    scheduler = build_scheduler(optimizer, schedule="plateau", warmup_steps=warmup, total_steps=100)
    rates = [rate for rate, _ in run(optimizer, scheduler, warmup + 1)]
    assert rates == pytest.approx([step / 4 for step in range(warmup)] + [1.0])

    reference = optimizer_of()
    plateau = ReduceLROnPlateau(reference, mode="max", factor=0.1, patience=1)
    for metric in [0.5, 0.6, 0.59, 0.6, 0.7, 0.1, 0.1, 0.1, 0.1]:
        run(optimizer, scheduler, 3)
        scheduler.step_metric(metric)
        plateau.step(metric)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([g["lr"] for g in reference.param_groups])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)  # it fell three times


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "plateau"])
@pytest.mark.parametrize("stop", [2, 7])
def test_schedule_continues_from_its_state(schedule, stop):
    def build():
        optimizer = optimizer_of()
        return optimizer, build_scheduler(optimizer, schedule=schedule, warmup_steps=4, total_steps=12)

    def advance(optimizer, scheduler, steps, metric):
        rates = run(optimizer, scheduler, steps)
        if schedule == "plateau":
            scheduler.step_metric(metric)
        return rates

    whole_optimizer, whole = build()
    advance(whole_optimizer, whole, stop, 0.5)
    optimizer, scheduler = build()
    scheduler.load_state_dict(whole.state_dict())
    optimizer.load_state_dict(whole_optimizer.state_dict())
    for metric in (0.4, 0.4, 0.4):
        assert advance(optimizer, scheduler, 3, metric) == advance(whole_optimizer, whole, 3, metric)


def test_schedules_refuse_what_cannot_work():
    with pytest.raises(ValueError, match="shorten the warm-up"):
        build_scheduler(optimizer_of(), schedule="cosine", warmup_steps=10, total_steps=10)
    with pytest.raises(ValueError, match="'cosine', 'wsd' or 'plateau'"):
        build_scheduler(optimizer_of(), schedule="step", warmup_steps=0, total_steps=10)


def test_ema_by_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = build_ema(model, decay=0.5)
    expected = None
    for update in range(30):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        ema.update_parameters(model)
        decay = min(0.5, (1 + update) / (10 + update))
        weight = model[0].weight.detach().clone()
        expected = weight if update == 0 else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(ema.module[0].weight, expected)
        assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    assert decay == 0.5, "the ramp must have ended"
    assert not any(parameter.requires_grad for parameter in ema.parameters())


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_ema_decay_outside_0_to_1_is_refused(decay):
    with pytest.raises(ValueError, match="between 0 and 1"):
        build_ema(nn.Linear(1, 1), decay)
