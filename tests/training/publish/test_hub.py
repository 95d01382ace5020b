"""Pushing over real sockets to a Hub in this process; the whole way, in clean processes, is `make hub-test`."""

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file

import training.publish.build
import training.publish.hub
from modeling_hsvlt import HSVLTForImageClassification
from training.publish.build import build_folder
from training.publish.hub import PushError, push_folder, push_run
from training.publish.reload import scratch_folder
from training.push import main
from training.scoring.measured_with import fingerprints

from ...loopback_hub import TOKEN, Fault, LoopbackHub
from ..tiny_checkpoint import NAMES, save_checkpoint

REPO = "me/tagger"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the waits between attempts
    with LoopbackHub(lfs_bytes=1000) as hub:
        monkeypatch.setattr(training.publish.hub, "HfApi", lambda: HfApi(endpoint=hub.endpoint, token=TOKEN))
        yield hub


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "figures").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    (folder / "model.safetensors").write_bytes(b"weights" * 10)
    (folder / "modeling.py").write_text("# code\n")
    (folder / "figures" / "large.png").write_bytes(b"p" * 2000)
    return folder


def push(folder, hub, tag="v1", repo=REPO):
    return push_folder(folder, repo, private=True, tag=tag, api=training.publish.hub.HfApi())


def sent(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub, revision="main", repo=REPO):
    return {path: data for path, data in hub.files(repo, revision).items() if path != ".gitattributes"}


def test_one_private_commit_with_a_tag(hub, folder):
    revision = push(folder, hub)
    repository = hub.repositories["model", REPO]
    assert repository.private and repository.branches["main"] == revision == repository.tags["v1"]
    assert len(repository.commits) == 2 and published(hub) == sent(folder)
    assert sum(method == "PUT" for method, _ in hub.requests) == 2, "the weights, and what is large"


def test_a_second_version_replaces_what_would_be_mistaken_for_part_of_it(hub, folder):
    first = push(folder, hub)
    api = training.publish.hub.HfApi()
    for path in ("adapter_config.json", "old.py", "model-00001-of-00002.safetensors", "onnx/model.onnx", "notes.md"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=path, repo_id=REPO)
    (folder / "modeling.py").write_text("# better code\n")
    push(folder, hub, "v2")
    assert published(hub) == sent(folder) | {"onnx/model.onnx": b"x", "notes.md": b"x"}
    assert hub.repositories["model", REPO].tags["v1"] == first and published(hub, "v1")["modeling.py"] == b"# code\n"


TRANSIENT = [
    Fault("GET", "/api/models/", "refuse", 2),
    Fault("POST", "/repos/create", "lose"),
    Fault("POST", "/preupload/", "busy", 2),
    Fault("PUT", "/lfs/", "refuse"),
    Fault("POST", "/commit/", "refuse"),
    Fault("POST", "/commit/", "lose"),
    Fault("POST", "/tag/", "busy"),
    Fault("POST", "/tag/", "lose"),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda fault: f"{fault.kind} {fault.method} {fault.pattern}")
def test_what_passes_is_tried_again(hub, folder, fault):
    hub.faults = [Fault(**vars(fault))]
    revision = push(folder, hub)
    repository = hub.repositories["model", REPO]
    assert hub.faults[0].times == 0 and published(hub) == sent(folder)
    assert len(repository.commits) == 2 and repository.tags == {"v1": revision}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(("method", "pattern"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/tag/")])
def test_a_push_that_fails_half_way_leaves_the_remote_as_it_was(hub, folder, method, pattern, exists):
    if exists:
        push(folder, hub)
        training.publish.hub.HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="old.py", repo_id=REPO)
        (folder / "model.safetensors").write_bytes(b"other weights")
        (folder / "modeling.py").write_text("# other code\n")
        (folder / "new.txt").write_text("new")
    before = hub.state(REPO)
    # Long enough for every attempt, but for /commit/ not for the commit that takes a push back.
    hub.faults = [Fault(method, pattern, "refuse", 10_000)]
    with pytest.raises(PushError, match=r"me/tagger was not pushed: .* as it was; try again"):
        push(folder, hub, "v2")
    assert hub.state(REPO) == before


def test_somebody_else_s_commit_is_not_overwritten(hub, folder, monkeypatch):
    push(folder, hub)
    api, commit = training.publish.hub.HfApi(), training.publish.hub._commit

    def late(*args):
        if not hub.repositories["model", REPO].titles[-1].startswith("Theirs"):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=REPO, commit_message="Theirs")
        return commit(*args)

    monkeypatch.setattr(training.publish.hub, "_commit", late)
    (folder / "modeling.py").write_text("# other code\n")
    with pytest.raises(PushError, match="somebody else has committed meanwhile"):
        push(folder, hub, "v2")
    assert published(hub)["modeling.py"] == b"# code\n" and set(hub.repositories["model", REPO].tags) == {"v1"}


# What is built


@pytest.fixture
def run_folder(tmp_path):
    run = tmp_path / "run"
    save_checkpoint(run / "best")
    (run / "best" / "training_state").mkdir()
    for secret in ("training_state/tensors.safetensors", "optimizer.bin", "checkpoint.json", "notes.txt"):
        (run / "best" / secret).write_bytes(b"secret")
    measured_with = fingerprints({"id2label": dict(enumerate(NAMES))})
    (run / "results.json").write_text(json.dumps({"measured_with": measured_with, "positives_in_train": [5, 6, 7]}))
    options = {"output_dir": "/home/someone/run", "dataset": "/home/someone/photos", "learning_rate": 0.1, "seed": 0}
    options |= {"batch_size": 2, "gradient_accumulation_steps": 1, "epochs": 1, "weight_decay": 0, "loss_type": "bce"}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    return run


def test_the_folder_holds_what_is_needed_and_nothing_else(run_folder, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    pixels, logits = build_folder(run_folder, target)
    names = {path.name for path in target.iterdir()}
    assert {path for path in names if not path.endswith(".py")} == {
        "config.json", "model.safetensors", "processor_config.json", "requirements.txt", "results.json",
        "selected_tags.csv", "training_options.yaml",
    }  # fmt: skip
    assert b"someone" not in b"".join(path.read_bytes() for path in target.iterdir())
    assert yaml.safe_load((target / "training_options.yaml").read_text())["dataset"] == "photos"
    assert (target / "selected_tags.csv").read_text().splitlines()[1:] == ["0,dog,0,5", "1,cat,0,6", "2,tv monitor,0,7"]
    weights = [load_file(folder / "model.safetensors") for folder in (target, run_folder / "best")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[1])
    model = HSVLTForImageClassification.from_pretrained(target).eval()
    assert pixels.shape == (1, 3, 16, 16)
    torch.testing.assert_close(model(pixels).logits, logits)


def test_a_dry_run_shows_the_tree_and_sends_nothing(run_folder, hub, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(training.publish.hub, "check_folder", lambda *args: 0.0)
    built = tmp_path / "built"
    assert main([str(run_folder), REPO, "--dry_run", "--folder", str(built)]) == 0
    said = capsys.readouterr().out
    for path in built.rglob("*"):
        assert path.is_dir() or f"{path.stat().st_size:,}  {path.relative_to(built)}\n" in said
    assert "nothing was sent" in said and hub.requests == []
    page = run_folder / "card.html"
    assert f"The card as a page: {page}\n" in said and REPO in page.read_text()
    assert main([str(run_folder), REPO, "--dry_run", "--folder", str(built)]) == 2, "a folder that is not empty"


def test_the_command_pushes_and_prints_the_revision(run_folder, hub, capsys, monkeypatch):
    monkeypatch.setattr(training.publish.hub, "check_folder", lambda *args: 0.0)
    assert main([str(run_folder), REPO]) == 0 and main([str(run_folder), REPO, "--public"]) == 0
    repository = hub.repositories["model", REPO]
    assert repository.private and set(repository.tags) == {"v1", "v2"}
    assert f"{REPO} at revision {repository.branches['main']}, tag v2." in capsys.readouterr().out
    assert main([str(run_folder), REPO, "--tag", "v1"]) == 2
    assert "has a tag 'v1' already" in capsys.readouterr().err
    assert main([str(run_folder), "me/open", "--public", "--tag", "first"]) == 0
    assert not hub.repositories["model", "me/open"].private
    assert hub.files("me/open")["README.md"].startswith(b"---\n")


def test_a_folder_that_gives_other_logits_is_not_pushed(run_folder, hub, monkeypatch):
    """Loaded for real in a clean process; what the run says is falsified."""
    built = training.publish.hub.build_folder

    def falsified(*args, **kwargs):
        pixels, logits = built(*args, **kwargs)
        return pixels, logits + 0.01

    monkeypatch.setattr(training.publish.hub, "build_folder", falsified)
    with pytest.raises(ValueError, match=r"other logits than the run, by up to 1\.00e-02; nothing was pushed"):
        push_run(run_folder, REPO)
    assert hub.state(REPO) is None


def test_ctrl_c_while_a_temporary_folder_is_removed_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    unlink, calls = os.unlink, iter(range(10))

    def interrupted(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt), scratch_folder() as scratch:
        for name in "abc":
            (Path(scratch) / name).touch()
    assert not list(tmp_path.iterdir())


def test_a_run_that_changes_while_it_is_read_is_not_pushed(run_folder, hub, monkeypatch, capsys):
    def check_folder(folder, *args):
        (run_folder / "best" / "checkpoint.json").write_text("of the next epoch")
        return 0.0

    monkeypatch.setattr(training.publish.hub, "check_folder", check_folder)
    assert main([str(run_folder), REPO]) == 2
    assert "was changed while it was read: wait for the end of the run" in capsys.readouterr().err
    assert hub.state(REPO) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: None, "only HP-DVAL learns contexts"),
        (lambda run: (run / "best" / "config.json").unlink(), "holds neither best/ nor a checkpoint"),
    ],
)
def test_what_cannot_be_pushed_is_said(run_folder, hub, change, message, monkeypatch):
    monkeypatch.setattr(training.publish.build, "_check_base", lambda *args: None)
    change(run_folder)
    with pytest.raises((ValueError, OSError), match=message):
        push_run(run_folder, REPO, adapter_of="me/base")
    with pytest.raises(ValueError, match="which nobody else has; give its Hub id"):
        monkeypatch.undo()
        training.publish.build._check_base(str(run_folder), None, None)
