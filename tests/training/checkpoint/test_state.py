"""A run that is continued from its saved state goes on bit for bit."""

import json

import pytest
import torch
from torch import nn

from training.checkpoint.folder import STATE_FOLDER, CheckpointError
from training.checkpoint.state import copy_training_state, load_training_state, read_progress
from training.loop.optim import build_ema, build_optimizer, build_scheduler


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(2, 2)  # the optimizer never gets a state for it

    def forward(self, x):
        return self.norm(self.first(x)) + self.tied(x)


def parts(schedule="cosine", with_ema=True, optimizer="adamw"):
    torch.manual_seed(0)
    model = Net()
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1, optimizer=optimizer)
    scheduler = build_scheduler(optimizer, schedule=schedule, warmup_steps=2, total_steps=20)
    ema = build_ema(model, 0.9) if with_ema else None
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema, "scaler": None}


def train(run, steps):
    for step in steps:
        torch.manual_seed(step)
        run["model"](torch.randn(6, 3)).square().sum().backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()
        run["scheduler"].step()
        if run["ema"] is not None:
            run["ema"].update_parameters(run["model"])
        if step % 3 == 2 and hasattr(run["scheduler"], "step_metric"):
            run["scheduler"].step_metric(0.5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize("with_ema", [True, False])
@pytest.mark.one_machine
def test_training_continues_bit_for_bit(tmp_path, schedule, with_ema, optimizer):
    whole = parts(schedule, with_ema, optimizer)
    train(whole, range(5))
    state = copy_training_state(progress={"step": 5, "best": 0.1 + 0.2}, **whole)
    train(whole, range(5, 12))
    state.write(tmp_path)  # later, in a thread: what was copied must not follow the training

    resumed = parts(schedule, with_ema, optimizer)
    assert load_training_state(tmp_path, **resumed) == {"step": 5, "best": 0.1 + 0.2} == read_progress(tmp_path)
    train(resumed, range(5, 12))
    modules = ("model", "ema") if with_ema else ("model",)
    for name in modules:
        for key, tensor in whole[name].state_dict().items():
            assert torch.equal(tensor, resumed[name].state_dict()[key]), (name, key)
    assert resumed["scheduler"].state_dict() == whole["scheduler"].state_dict()


def test_nothing_is_pickled(tmp_path):
    run = parts()
    train(run, range(2))
    copy_training_state(progress={}, **run).write(tmp_path)
    assert sorted(path.name for path in (tmp_path / STATE_FOLDER).iterdir()) == ["state.json", "tensors.safetensors"]


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    run = parts()
    train(run, range(2))
    copy_training_state(progress={}, **run).write(tmp_path)
    with pytest.raises(ValueError, match="with a weight average"):
        load_training_state(tmp_path, **parts(with_ema=False))
    other = parts()
    other["model"].first = nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"another model than these options describe: .*first.weight"):
        load_training_state(tmp_path, **other)
    with pytest.raises(ValueError, match=r"other groups of parameters .* the same optimizer, decay_all"):
        load_training_state(tmp_path, **parts(optimizer="muon"))


@pytest.mark.parametrize("where", ["weights", "average", "optimizer", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_written(tmp_path, where, value):
    run = parts()
    train(run, range(2))
    tensor = {
        "weights": run["model"].first.weight.data,
        "average": run["ema"].module.first.weight.data,
        "optimizer": run["optimizer"].state[run["model"].first.weight]["exp_avg_sq"],
        "buffer": run["model"].norm.running_var,
    }[where]
    tensor.view(-1)[1] = value
    with pytest.raises(CheckpointError, match="not finite; nothing is saved"):
        copy_training_state(progress={}, **run).write(tmp_path)
    assert not (tmp_path / STATE_FOLDER).exists()


def test_the_weights_to_evaluate_are_the_average_where_there_is_one():
    for with_ema in (True, False):
        run = parts(with_ema=with_ema)
        train(run, range(3))
        expected = (run["ema"].module if with_ema else run["model"]).state_dict()
        weights = copy_training_state(progress={}, **run).weights()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_the_scale_of_fp16_is_kept(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    run = {**parts(), "scaler": scaler}
    scaler.scale(run["model"](torch.randn(6, 3)).square().sum()).backward()
    run["model"].first.weight.grad[0, 0] = float("inf")
    scaler.step(run["optimizer"])
    scaler.update()
    run["optimizer"].zero_grad()
    train(run, range(2))
    copy_training_state(progress={"step": 1}, **run).write(tmp_path)
    resumed = {**parts(), "scaler": torch.amp.GradScaler("cpu", init_scale=64.0)}
    load_training_state(tmp_path, **resumed)
    assert resumed["scaler"].state_dict() == scaler.state_dict() and resumed["scaler"].get_scale() == 4.0
    assert read_progress(tmp_path) == {"step": 1}
    assert json.loads((tmp_path / STATE_FOLDER / "state.json").read_text())["scaler"]["scale"] == 4.0
