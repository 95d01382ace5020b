import json

import pytest
from transformers import AutoModel

from benchmarks.cost import cpu
from benchmarks.timing import multiply_adds

from ...training.tiny_checkpoint import save_checkpoint, save_images, tiny_model


@pytest.mark.slow
def test_the_table_of_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "SIDE", 256)
    save_checkpoint(tmp_path / "checkpoint")
    save_images(tmp_path / "data")
    argv = [str(tmp_path / "checkpoint"), "--dataset", str(tmp_path / "data"), "--rounds", "2", "--threads", "1"]
    argv += ["--ways", "fp32", "bf16", "onnx_fp32", "onnx_int8", "bare_fp32", "--json", str(tmp_path / "cpu.json")]
    assert cpu.main([*argv, "--batch_size", "2"]) == 0
    rows = {row["way"]: row for row in json.loads((tmp_path / "cpu.json").read_text())}
    assert rows["fp32"]["to_fp32"] == rows["bare_fp32"]["to_bare"] == [1, 1]
    bare = tiny_model().config.backbone_config
    for way, build in (("fp32", tiny_model), ("bare_fp32", lambda: AutoModel.from_config(bare))):
        counted = rows[way]["gflops"] * 1e9 / 2 / rows[way]["rate"]
        assert counted == pytest.approx(multiply_adds(build, 16), rel=0.02), way  # a batch shares its labels
    assert rows["fp32"]["mAP"] == pytest.approx(rows["onnx_fp32"]["mAP"], abs=1e-6) and rows["bare_fp32"]["mAP"] is None
    assert all(row["rate"] > 0 and row["batch"] == 2 for row in rows.values())
    assert 0 < rows["fp32"]["share"] < 2 and rows["onnx_int8"]["share"] is None
    assert "| onnx_int8 | 2 |" in capsys.readouterr().out
    assert cpu.main(["--dataset", "scenes"]) == 2
