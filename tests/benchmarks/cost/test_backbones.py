from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from benchmarks.cost import backbones
from modeling_hsvlt.hsvlt_backbones import HSVLTTowerBackbone


def test_every_type_that_transformers_lists_is_tried():
    assert backbones.BACKBONES.keys() == MODEL_FOR_BACKBONE_MAPPING_NAMES.keys()


def test_a_line_says_what_was_seen_and_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backbones, "load_all", lambda names, folder: dict.fromkeys(names, "yes"))
    assert backbones.main(["dinov2", "vitpose_backbone", "dinat", "vit_mae", "--skip_onnx"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {cells[1]: cells[2:] for cells in ([cell.strip() for cell in line.split("|")] for line in lines)}
    assert rows["dinov2"][:7] == ["2, 4, 6, 8", "yes", "yes", "all", "yes", "-", "4 x 4"]
    assert rows["vitpose_backbone"][1:4] == ["yes", "no, 64 x 64 alone, and says so", "all"]
    assert rows["dinat"][0].startswith("refused:") and "natten" in rows["dinat"][0]
    assert "shuffles" in rows["vit_mae"][0]


def test_tokens_of_no_patch_that_are_read_as_patches_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(HSVLTTowerBackbone, "tokens_behind", property(lambda self: 0, lambda self, value: None))
    row = backbones.try_backbone("yolos", backbones.TOWERS["yolos"], tmp_path, onnx=False)
    assert row["in place"] == "no: a change in one corner shows in another"


def test_an_unknown_type_is_told(capsys):
    assert backbones.main(["dinov9"]) == 2
    assert "'dinov9' is none of beit" in capsys.readouterr().err


def test_a_difference_after_loading_is_no_success(tmp_path, monkeypatch):
    class Done:
        returncode, stdout, stderr = 0, 'x\n{"a": 1e-7, "b": 0.1, "c": "no file"}\n', ""

    monkeypatch.setattr(backbones.subprocess, "run", lambda *args, **kwargs: Done)
    found = backbones.load_all(["a", "b", "c"], tmp_path)
    assert found == {"a": "yes", "b": "no: off by 1e-01", "c": "no: no file"}
