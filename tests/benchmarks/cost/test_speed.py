import json

import pytest

from benchmarks.cost import speed


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_the_table_of_a_small_run(train, tmp_path, capsys):
    argv = ["--preset", "nano", "--image_size", "64", "--num_labels", "6", "20", "--batch_size", "2", "--rounds", "2"]
    argv += ["--models", "bare", "linear", "hsvlt", "hsvlt_candidates", "ml_decoder", "--candidate_labels", "4"]
    argv += ["--threads", "1", "--no_memory", "--json", str(tmp_path / "speed.json"), *(["--train"] if train else [])]
    assert speed.main(argv) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["model"], row["num_labels"]): row for row in result["rows"]}
    assert result["reference"] == ("linear" if train else "bare")
    assert rows[result["reference"], 6]["ratio"] == 1
    assert ("bare", 6) not in rows if train else ("bare", 20) not in rows
    for row in rows.values():
        assert len(row["seconds"]) == 2 and row["images_per_second"] > 0
    # Candidates run the label stream for four labels whatever the number; the scorer grows by a linear layer.
    assert rows["hsvlt_candidates", 20]["gmacs"] - rows["hsvlt_candidates", 6]["gmacs"] < 1e-4
    assert rows["hsvlt", 20]["gmacs"] - rows["hsvlt", 6]["gmacs"] > 1e-3
    printed = capsys.readouterr().out
    assert "| hsvlt_candidates | 20 | 2 |" in printed and "torch" in printed
