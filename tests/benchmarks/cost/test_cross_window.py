import json

import pytest
import torch

from benchmarks.cost.cross_window import WAYS, main
from modeling_hsvlt import MlTrConfig
from modeling_hsvlt.modeling_mltr import MlTrCrossWindowAttention


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_gives_the_models_result_and_gradients(way):
    torch.manual_seed(0)
    attention = MlTrCrossWindowAttention(MlTrConfig(), 4).double()
    x = torch.randn(2, 6, 16, 3).double().requires_grad_()
    results = []
    for function in (attention._projected, lambda x, _: (WAYS[way](attention, x),)):
        output = function(x, False)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), [x, *attention.parameters()])))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)


def test_command_times_every_stage(tmp_path, capsys):
    arguments = ["--preset", "nano", "--batch_size", "1", "--rounds", "1", "--json", str(tmp_path / "table.json")]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["n"], row["P"], row["mode"]) for row in rows[::2]] == [
        (windows, 16, "inference") for windows in (64, 16, 4, 1)
    ]
    assert all(row[way]["ms"] > 0 for row in rows for way in WAYS) and rows[0]["model"]["ratio"] == 1
    assert capsys.readouterr().out.count("| inference |") == 4


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(WAYS, "sdpa", lambda attention, x: WAYS["model"](attention, x) + 1)
    assert main(["--preset", "nano", "--rounds", "1"]) == 2
    assert "the way 'sdpa' gives another result" in capsys.readouterr().err
