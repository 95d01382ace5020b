"""Accidents that destroyed finished work."""

import json
import os
import shutil
import signal

import pytest

import training.loop.setup
from modeling_hsvlt.modeling_hsvlt import HSVLTForImageClassification
from training import calibrate, evaluate, fit_thresholds, tag, train
from training.checkpoint.folder import verify

from .conftest import files, held_by_another, killed_at

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("words", [["--resume"], ["--overwrite"]])
def test_a_second_run_in_a_folder_is_refused(finished, words, capsys):
    before = files(finished)
    with held_by_another(finished):
        assert train.main([str(finished / "config.yaml"), *words]) == 2
        assert "Another process works in" in capsys.readouterr().err
        for command in (fit_thresholds, calibrate):
            assert command.main([str(finished / "best"), "scenes"]) == 2
            assert "Another process works in" in capsys.readouterr().err
    assert files(finished) == before


@pytest.mark.parametrize("command", [fit_thresholds, calibrate])
def test_a_checkpoint_of_its_own_is_changed_by_one_process_at_a_time(checkpoint, photos, command, capsys):
    before = files(checkpoint)
    with held_by_another(checkpoint):
        assert command.main([str(checkpoint), str(photos)]) == 2
        assert "Another process works in" in capsys.readouterr().err
    assert files(checkpoint) == before
    assert command.main([str(checkpoint), str(photos)]) == 0
    assert ".lock" not in files(checkpoint)


def test_what_appears_in_the_folder_while_a_run_starts_is_not_deleted(recipe, tmp_path, monkeypatch):
    """A copy, a download or a run of an older version: nobody asked for --overwrite."""
    run, build = tmp_path / "run", training.loop.setup.build_model

    def meanwhile(*arguments):
        (run / "best").mkdir(parents=True)
        (run / "best" / WEIGHTS).write_text("days of work")
        return build(*arguments)

    monkeypatch.setattr(training.loop.setup, "build_model", meanwhile)
    status = train.main([recipe, "--output_dir", str(run), "--max_steps", "1"])
    kept = [path for path in run.rglob(WEIGHTS) if path.read_bytes() == b"days of work"]
    assert status == 2 and kept == [run / "best" / WEIGHTS]


def test_overwriting_deletes_nothing_before_the_new_run_has_saved(finished, monkeypatch):
    weights = (finished / "best" / WEIGHTS).read_bytes()

    killed_at(monkeypatch, "fit")
    assert train.main([str(finished / "config.yaml"), "--overwrite"]) == 130
    assert weights in [path.read_bytes() for path in finished.rglob(WEIGHTS)]
    monkeypatch.undo()
    assert train.main([str(finished / "config.yaml"), "--overwrite", "--epochs", "1"]) == 0
    assert sorted(path.name for path in finished.iterdir()) == [
        "best", "checkpoint-6", "config.yaml", "log.jsonl", "results.json"
    ]  # fmt: skip


@pytest.mark.parametrize("command", [fit_thresholds, calibrate])
def test_a_kill_while_a_command_changes_best_leaves_the_old_or_the_new(finished, command, monkeypatch):
    """At every file that reaches the disk, in turn."""
    before, count, fsync = files(finished / "best"), [0], os.fsync
    for stop_at in (1, 2, 5):
        count[0] = 0

        def killed(descriptor, stop_at=stop_at):
            count[0] += 1
            if count[0] == stop_at:
                raise KeyboardInterrupt
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", killed)
        arguments = [str(finished / "best"), "scenes", "--scenes", "{image_size: 32, num_scenes: {validation: 20}}"]
        assert command.main(arguments) == 130
        monkeypatch.undo()
        assert files(finished / "best") == before
        verify(finished / "best")


def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """There is no moment without best/, in which a reader or a kill could fall."""
    from training.checkpoint.atomic import atomic_folder

    target, missing = tmp_path / "best", []
    for text in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "file").write_text(text)
            rename = os.rename

            def watched(*names, rename=rename, **options):
                rename(*names, **options)
                missing.append(not target.exists())

            monkeypatch.setattr(os, "rename", watched)
        monkeypatch.undo()
    assert (target / "file").read_text() == "two" and not any(missing)


def edit_config(best):
    path = best / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "thresholds": [0.3] * 10}))


def drop_marker(best):
    (best / "checkpoint.json").unlink()


@pytest.mark.parametrize("hurt", [edit_config, drop_marker])
def test_resuming_a_finished_run_never_overwrites_best_weights(finished, hurt):
    # Weights that no epoch of the run could make again.
    model = HSVLTForImageClassification.from_pretrained(finished / "best")
    with fit_sealed(finished / "best") as best:
        model.classifier.bias.data += 0.125
        model.save_pretrained(best)
    weights = (finished / "best" / WEIGHTS).read_bytes()
    hurt(finished / "best")
    assert train.main([str(finished / "config.yaml"), "--resume"]) == 0
    assert weights in [path.read_bytes() for path in finished.rglob(WEIGHTS)]


def fit_sealed(best):
    from training.checkpoint.folder import revised

    return revised(best)


def test_a_marker_is_not_renewed_over_damage(finished, capsys):
    with (finished / "best" / "modeling_hsvlt.py").open("a") as file:
        file.write("# somebody's edit")
    for command in (fit_thresholds, calibrate):
        assert command.main([str(finished / "best"), "scenes"]) == 2
        assert "modeling_hsvlt.py is not what was written" in capsys.readouterr().err


def full_disk(path):
    """A file that opens, and takes nothing."""
    raise OSError(28, "No space left on device", str(path))


def test_a_full_disk_leaves_config_and_results_as_they_were(finished, monkeypatch):
    before = {name: (finished / name).read_bytes() for name in ("config.yaml", "results.json")}
    monkeypatch.setattr(os, "fsync", lambda descriptor: full_disk(descriptor))
    assert train.main([str(finished / "config.yaml"), "--resume"]) in (1, 2)
    monkeypatch.undo()
    assert {name: (finished / name).read_bytes() for name in before} == before


def test_an_empty_config_is_refused_and_not_taken_for_the_defaults(finished, capsys):
    (finished / "config.yaml").write_text("")
    assert train.main([str(finished / "config.yaml"), "--output_dir", str(finished), "--resume"]) == 2
    assert "is empty" in capsys.readouterr().err


def test_a_run_folder_may_be_a_link(recipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert train.main([recipe, "--output_dir", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "best" / WEIGHTS).is_file()
    assert train.main([recipe, "--output_dir", str(tmp_path / "run"), "--epochs", "1", "--overwrite"]) == 0
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "best" / WEIGHTS).is_file()


def test_a_checkpoint_that_is_a_link_is_changed_where_it_is(checkpoint, photos, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    assert calibrate.main([str(link), str(photos)]) == 0
    assert link.is_symlink() and "calibration_info" in json.loads((checkpoint / "config.json").read_text())
    shutil.rmtree(checkpoint)


REPO = "me/tagger"


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import HfApi, constants

    import training.publish.hub

    from ..loopback_hub import TOKEN, LoopbackHub

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub(lfs_bytes=1000) as hub:
        monkeypatch.setattr(training.publish.hub, "HfApi", lambda: HfApi(endpoint=hub.endpoint, token=TOKEN))
        yield hub


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("after", ["create_repo", "create_commit", "create_tag"])
def test_a_push_that_is_interrupted_leaves_the_hub_as_it_was(hub, tmp_path, monkeypatch, after, number, exists):
    from huggingface_hub import HfApi

    from training.publish import hub as publishing

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(b"weights")
    if exists:
        publishing.push_folder(folder, REPO, private=True, tag="v1", api=publishing.HfApi())
        (folder / WEIGHTS).write_bytes(b"other weights")
    before, plain = hub.state(REPO), getattr(HfApi, after)

    def interrupted(self, *arguments, **options):
        if options.get("commit_message", "").startswith("Take back"):
            return plain(self, *arguments, **options)
        done = plain(self, *arguments, **options)
        os.kill(os.getpid(), number)
        return done

    if after == "create_repo" and exists:
        pytest.skip("there is nothing to create")
    monkeypatch.setattr(HfApi, after, interrupted)
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            publishing.push_folder(folder, REPO, private=True, tag="v2", api=publishing.HfApi())
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert hub.state(REPO) == before


def test_workers_without_shared_memory_are_refused_before_the_first_step(recipe, tmp_path, monkeypatch, capsys):
    """A container has 64 MiB of it unless told; workers that need more hang for ever."""
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000) if "shm" in str(path) else usage(path)
    )
    command = [recipe, "--output_dir", str(tmp_path / "run"), "--epochs", "1", "--num_workers", "1"]
    assert train.main(command) == 2
    assert "--shm-size" in capsys.readouterr().err


def test_processes_that_do_not_know_of_each_other_are_refused(
    recipe, tmp_path, checkpoint, photos, monkeypatch, capsys
):
    """`accelerate launch` of two on a CPU, without ACCELERATE_USE_CPU: each takes itself for the only one."""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        for command in (
            lambda: train.main([recipe, "--output_dir", str(tmp_path / "run")]),
            lambda: fit_thresholds.main([str(checkpoint), str(photos)]),
            lambda: calibrate.main([str(checkpoint), str(photos)]),
            lambda: tag.main([str(checkpoint), f"{photos}/validation", str(tmp_path / "tags")]),
            lambda: evaluate.main([str(checkpoint), str(photos)]),
        ):
            assert command() == 2
            assert "ACCELERATE_USE_CPU=true" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.yaml").exists()
