"""Which checkpoint of a run is resumed from, and which are removed."""

import pytest

from training.checkpoint.folder import MARKER, CheckpointError, verify
from training.checkpoint.series import checkpoints, newest_good, prune, recover_run

from .test_folder import DAMAGE, TENSORS, contents, flip, sealed


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    hurt, message = DAMAGE[damage]
    good, newest = sealed(tmp_path, 8), sealed(tmp_path, 12)
    assert newest_good(tmp_path) == newest
    hurt(newest)
    with pytest.raises(CheckpointError, match=message):
        verify(newest)
    assert newest_good(tmp_path) == good
    said = capsys.readouterr().err
    assert "kept as damaged-checkpoint-12, going back to checkpoint-8" in said
    # Out of the way: it must not count among the newest that are kept.
    assert checkpoints(tmp_path) == [good] and (tmp_path / "damaged-checkpoint-12").is_dir()


def test_nothing_good_is_said_and_nothing_is_touched(tmp_path):
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        newest_good(tmp_path)
    flip(sealed(tmp_path, 4) / TENSORS)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be resumed.*--init_from"):
        newest_good(tmp_path)
    assert contents(tmp_path) == ["checkpoint-4"]


def test_the_newest_stay_and_a_kill_in_the_middle_of_a_removal_leaves_no_half(tmp_path, monkeypatch):
    for step in (2, 8, 10, 12):
        sealed(tmp_path, step)
    prune(tmp_path, 2)
    assert contents(tmp_path) == ["checkpoint-10", "checkpoint-12"]
    sealed(tmp_path, 14)

    def killed(path, **options):
        if path.exists():
            (path / MARKER).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("training.checkpoint.series.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 2)
    monkeypatch.undo()
    assert contents(tmp_path) == [".checkpoint-10.new", "checkpoint-12", "checkpoint-14"]
    recover_run(tmp_path)
    assert contents(tmp_path) == ["checkpoint-12", "checkpoint-14"]
