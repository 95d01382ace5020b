"""What a killed run left in OUTPUT goes with the next one."""

from training.tagging.results import Results


def test_what_a_kill_left_half_written_goes(tmp_path):
    for name in ("part-0001-0000-000000.parquet", "tagging.json", "unreadable.txt"):
        (tmp_path / f".{name}.0123456789abcdef.new").touch()
    Results(tmp_path, "file_name", "parquet").begin({"a": 1}, lambda count: None, 3, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tagging.json"]
