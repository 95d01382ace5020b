import json

import pytest
import torch
from torch import nn

from training.checkpoint import (
    STATE_FOLDER,
    atomic_folder,
    load_training_state,
    push_checkpoint,
    read_progress,
    recover,
    save_training_state,
)
from training.optim import build_ema, build_optimizer, build_scheduler


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "runs" / "best"
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(text)
            assert not target.exists() or (target / "sub" / "file").read_text() == "one"
        assert (target / "sub" / "file").read_text() == text
    assert contents(target.parent) == ["best"], "nothing may be left beside it"


def test_a_save_that_fails_leaves_the_old_folder(tmp_path):
    target = tmp_path / "last"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("good")
    with pytest.raises(OSError, match="disk full"), atomic_folder(target) as folder:
        (folder / "half").write_text("ba")
        raise OSError("disk full")
    assert contents(target) == ["file"]
    with atomic_folder(target) as folder:
        (folder / "file").write_text("better")
    assert contents(target) == ["file"] and contents(tmp_path) == ["last"]


def test_a_kill_between_the_renames_is_undone(tmp_path):
    target, old = tmp_path / "last", tmp_path / ".last.old"
    old.mkdir()
    (old / "file").write_text("good")
    recover(target)
    assert (target / "file").read_text() == "good" and not old.exists()

    old.mkdir()  # a kill after both renames: the new folder counts
    recover(target)
    assert (target / "file").read_text() == "good" and not old.exists()


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


def parts(schedule="cosine", with_ema=True):
    torch.manual_seed(0)
    model = Net()
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.1)
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


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize("with_ema", [True, False])
def test_training_continues_bit_for_bit(tmp_path, schedule, with_ema):
    whole = parts(schedule, with_ema)
    train(whole, range(5))
    save_training_state(tmp_path, progress={"step": 5, "best": 0.1 + 0.2}, **whole)
    train(whole, range(5, 12))

    resumed = parts(schedule, with_ema)
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
    save_training_state(tmp_path, progress={}, **run)
    assert contents(tmp_path / STATE_FOLDER) == ["state.json", "tensors.safetensors"]


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        read_progress(tmp_path)
    run = parts()
    train(run, range(2))
    save_training_state(tmp_path, progress={}, **run)
    with pytest.raises(ValueError, match="with a weight average"):
        load_training_state(tmp_path, **parts(with_ema=False))
    path = tmp_path / STATE_FOLDER / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 0}))
    with pytest.raises(ValueError, match="format version 0"):
        read_progress(tmp_path)


def test_push_uploads_the_plain_checkpoint_privately(tmp_path, monkeypatch):
    calls = []

    class Commit:
        commit_url = "https://example.org/commit"

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, **options):
            calls.append(("upload", options))
            return Commit

    monkeypatch.setattr("training.checkpoint.HfApi", Api)
    assert push_checkpoint(tmp_path, "me/model", private=True) == Commit.commit_url
    assert calls[0] == ("create", "me/model", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == tmp_path and STATE_FOLDER in calls[1][1]["ignore_patterns"][0]
