import json

import pytest

from benchmarks.cost import serve


@pytest.mark.slow
def test_the_table_of_a_small_run(tmp_path, capsys):
    argv = ["--image_size", "32", "--clients", "1", "4", "--seconds", "1", "--json", str(tmp_path / "load.json")]
    assert serve.main([*argv, "--serve", "--wait_ms", "20"]) == 0
    one, four = json.loads((tmp_path / "load.json").read_text())
    for row in (one, four):
        assert row["rate"] > 0 and row["refused"] == 0 and 20 <= row["median"] <= row["p99"]
    assert one["batch"] == 1 < four["batch"] <= 4
    assert len(capsys.readouterr().out.splitlines()) == 3
