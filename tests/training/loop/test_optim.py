import math

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


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
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
    with pytest.raises(ValueError, match="'cosine' or 'plateau'"):
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
