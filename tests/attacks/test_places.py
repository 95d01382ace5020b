"""Folders, disks and memory that are not what a program expects."""

import inspect
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from training import calibrate, fit_thresholds, tag, train
from training.checkpoint.folder import verify
from training.data import batches

from ..fresh import python
from .conftest import files

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


@contextmanager
def mounted(folder, *options):
    """A mount on `folder`, as a container's volume is one."""
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def volume(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "volume").mkdir()
    with mounted(tmp_path / "volume", "--bind", str(tmp_path / "disk")) as folder:
        yield folder


def test_a_run_folder_may_be_a_mount_point(volume, recipe, tmp_path):
    command = [recipe, "--output_dir", str(volume), "--epochs", "1"]
    assert train.main(command) == 0
    assert train.main([*command, "--overwrite"]) == 0
    verify(volume / "best")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == sorted(path.name for path in volume.iterdir())


def test_a_mount_point_in_a_run_that_is_overwritten_stays_and_so_does_all_else(finished, recipe, capsys, tmp_path):
    shutil.copytree(finished / "best", tmp_path / "disk")
    with mounted(finished / "best", "--bind", str(tmp_path / "disk")):
        before = files(finished)
        assert train.main([recipe, "--output_dir", str(finished), "--overwrite"]) == 2
        assert files(finished) == before and not list(finished.glob(".overwritten*"))
    assert "best cannot be moved aside" in capsys.readouterr().err


@pytest.mark.parametrize("command", [fit_thresholds, calibrate])
def test_a_checkpoint_that_is_a_mount_point_stays_as_it_is(volume, checkpoint, photos, command, capsys):
    shutil.copytree(checkpoint, volume, dirs_exist_ok=True)
    before = files(volume)
    assert command.main([str(volume), str(photos)]) == 2
    assert files(volume) == before and "is a mount point" in capsys.readouterr().err
    assert not [path for path in volume.parent.iterdir() if path.name.startswith(".volume")]


def test_a_folder_that_cannot_be_written_is_refused_in_one_sentence(checkpoint, photos, recipe, tmp_path, capsys):
    with mounted(checkpoint, "--bind", str(checkpoint)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(checkpoint)], check=True)
        before = files(checkpoint)
        for call in (
            lambda: fit_thresholds.main([str(checkpoint), str(photos)]),
            lambda: calibrate.main([str(checkpoint), str(photos)]),
            lambda: train.main([recipe, "--output_dir", str(checkpoint / "run")]),
            lambda: tag.main([str(checkpoint), f"{photos}/validation", str(checkpoint / "tags"), "--threshold", "0"]),
        ):
            assert call() == 2
            error = capsys.readouterr().err
            assert "Read-only file system" in error and "Traceback" not in error
        assert files(checkpoint) == before


def test_a_file_where_a_folder_should_be_is_refused_and_stays(checkpoint, photos, recipe, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("precious")
    for call in (
        lambda: train.main([recipe, "--output_dir", str(out)]),
        lambda: train.main([recipe, "--output_dir", str(out), "--overwrite"]),
        lambda: train.main([recipe, "--output_dir", str(out), "--resume"]),
        lambda: train.main([recipe, "--output_dir", str(out / "below")]),
        lambda: tag.main([str(checkpoint), f"{photos}/validation", str(out), "--threshold", "0"]),
        lambda: fit_thresholds.main([str(out), str(photos)]),
    ):
        assert call() == 2
        error = capsys.readouterr().err
        assert "out" in error and "error: " in error and "Traceback" not in error
    assert out.read_text() == "precious"


def test_a_link_laid_where_the_lock_is_made_is_not_followed(checkpoint, photos, tmp_path, capsys):
    (checkpoint / ".lock").symlink_to(tmp_path / "made")
    assert calibrate.main([str(checkpoint), str(photos)]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_shared_memory_that_is_too_small_is_told_before_the_first_step(recipe, tmp_path, monkeypatch, capsys):
    """A real one, of 16 KiB; a container's default of 64 MiB holds fewer batches of larger images."""
    (tmp_path / "shm").mkdir()
    with mounted(tmp_path / "shm", "-t", "tmpfs", "-o", "size=16k", "tmpfs"):
        monkeypatch.setattr(batches, "SHARED_MEMORY", str(tmp_path / "shm"))
        assert train.main([recipe, "--output_dir", str(tmp_path / "run"), "--num_workers", "2"]) == 2
        assert "--shm-size=8g" in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_as_many_batches_wait_as_shared_memory_has_room_for(monkeypatch):
    """Beside two that are in use: without those, a run on a real /dev/shm of 64 MiB hung in its first validation."""
    usage = shutil._ntuple_diskusage(2**26, 0, 2**26)
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda path: usage)
    mebibyte = 2**20
    assert [batches.prefetch_that_fits(size * mebibyte, 2) for size in (1, 6, 9, 10, 16)] == [4, 4, 2, 2, 1]
    with pytest.raises(ValueError, match="2 workers hand over batches of 17 MiB"):
        batches.prefetch_that_fits(17 * mebibyte, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="room for 16 MiB"):
        batches.prefetch_that_fits(5 * mebibyte, 2)


class Stuck(torch.utils.data.Dataset):
    """Its second image never comes."""

    label_names = ("cat",)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index:
            time.sleep(600)
        return {"pixel_values": torch.zeros(3, 4, 4), "labels": torch.zeros(1)}


def test_a_worker_that_hangs_ends_the_run_with_a_sentence(monkeypatch):
    monkeypatch.setattr(batches, "WORKER_TIMEOUT", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits for it to end
    loader = batches.build_dataloader(Stuck(), batch_size=1, num_workers=1)
    with pytest.raises(OSError, match=r"gave nothing for 1 s .*set num_workers to 0"), batches.naming_dead_workers():
        list(loader)


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_keep_the_process(tmp_path):
    """It heeds no SIGTERM, which Python sends it at the end, and then waits."""
    code = (
        "import time, torch; from training.data import batches\n"
        f"{inspect.getsource(Stuck)}\n"
        "batches.WORKER_TIMEOUT, torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1, 0.1\n"
        "with batches.naming_dead_workers():\n"
        "    list(batches.build_dataloader(Stuck(), batch_size=1, num_workers=1))"
    )
    ended = python("-c", code, cwd=ROOT, env=dict(os.environ))
    assert ended.returncode == 1 and "set num_workers to 0" in ended.stderr.splitlines()[-1]


def test_json_of_a_run_that_was_damaged_is_told_and_kept(finished, capsys):
    """What another program or a bad disk left, in each file that a resume reads."""
    for name, damage in (
        ("config.yaml", b"a: [1"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", b"[" * 5_000),
        ("config.yaml", b"epochs: " + b"9" * 5_000),
        ("results.json", b'{"a": ' + b"9" * 5_000 + b"}"),
        ("best/config.json", b"[" * 100_000),
        ("best/checkpoint.json", b'{"files": {"a": NaN}}'),
        ("best/checkpoint.json", b"[]"),
        ("log.jsonl", b"\xff\n{"),
    ):
        path = finished / name
        whole = path.read_bytes()
        weights = (finished / "best" / WEIGHTS).read_bytes()
        path.write_bytes(damage)
        status = train.main([str(finished / "config.yaml"), "--output_dir", str(finished), "--resume"])
        error = capsys.readouterr().err
        assert status in (0, 1, 2) and "Traceback" not in error, (name, damage[:20], error[-800:])
        assert weights in [found.read_bytes() for found in finished.rglob(WEIGHTS)], (name, damage[:20])
        for aside in finished.glob("damaged-*"):
            shutil.rmtree(aside)
        path.write_bytes(whole)


def test_a_folder_of_tags_that_became_a_file_stays(checkpoint, photos, tmp_path, capsys):
    command = [str(checkpoint), f"{photos}/validation", str(tmp_path / "out"), "--num_workers", "0", "--threshold", "0"]
    assert tag.main(command) == 0
    for name in ("tagging.json", "part-0001-0000-000000.parquet"):
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        for damage in (b"", b"[" * 100_000, whole[: len(whole) // 2], b"\xff\xfe"):
            path.write_bytes(damage)
            assert tag.main(command) == 2
            assert f"{path} is damaged" in capsys.readouterr().err
        path.write_bytes(whole)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("precious")
    assert tag.main(command) == 2
    assert (tmp_path / "out").read_text() == "precious"
