"""ONNX files against PyTorch, and against whoever reads nothing but the file."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, SwinConfig

from modeling_hsvlt import (
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
    MultiLabelImageProcessor,
    label_heat_maps,
)
from training.export import _positives, main
from training.publish.to_onnx import compare, export_onnx, image_size

from ...tiny_clip import tiny_clip, tiny_clip_tokenizer
from ...tiny_siglip import tiny_siglip, tiny_tokenizer
from ..tiny_checkpoint import NAMES, save_checkpoint, save_images, tiny_model

STAGES = [f"stage{number}" for number in range(1, 5)]
SIZE = 32


def processor(**overrides):
    fields = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    return MultiLabelImageProcessor(**{**fields, **overrides})


def hsvlt(backbone, **fields):
    return HSVLTForImageClassification(
        HSVLTConfig(num_labels=5, label_embedding_dim=8, backbone_config=backbone.to_dict(), **fields)
    )


def resnet_backbone():
    widths = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return hsvlt(ResNetConfig(**widths, out_features=STAGES), num_attention_heads=2)


def tied():
    widths = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return hsvlt(ResNetConfig(**widths, out_features=STAGES), label_stream="tied")


def swin_backbone():
    sizes = {"image_size": SIZE, "patch_size": 2, "window_size": 2}
    return hsvlt(SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], **sizes, out_features=STAGES))


def mltr():
    fields = {"image_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": [1] * 4, "window_size": 3}
    return MlTrForImageClassification(MlTrConfig(num_labels=5, num_heads=[1, 2, 2, 4], **fields))


def hp_dval():
    tokenizer = tiny_clip_tokenizer()
    names = ["cat", "dog", "potted plant"]
    return HPDVALForImageClassification.from_clip(tiny_clip(tokenizer), tokenizer, names, local_top_k=4)


def hp_dval_on_naflex():
    tokenizer = tiny_tokenizer()
    names = ["cat", "dog", "potted plant"]
    return HPDVALForImageClassification.from_clip(tiny_siglip(tokenizer, naflex=True), tokenizer, names, local_top_k=4)


FAMILIES = {
    "block_backbone": lambda: tiny_model(candidate_labels=2),  # which ONNX leaves out: it scores all labels
    "resnet_backbone": resnet_backbone,
    "tied_label_stream": tied,
    "swin_backbone": swin_backbone,
    "mltr": mltr,
    "hp_dval": hp_dval,
    "hp_dval_on_naflex": hp_dval_on_naflex,
}


def constant_nodes(graph):
    """Operators whose inputs are all known before any image is."""
    known = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
            found.append(node.op_type)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_equals_torch(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert export_onnx(model, processor(), tmp_path / "model.onnx") < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [value.shape for value in session.get_inputs()] == [["batch", 3, SIZE, SIZE]]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("logits", ["batch", model.config.num_labels])
    ]
    for batch in (1, 3, 8):
        pixels = torch.randn(batch, 3, SIZE, SIZE)
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits.numpy()
        found = session.run(None, {"pixel_values": pixels.numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert np.ptp(expected, axis=1).min() > 1e-3  # logits that differ, or every order would pass
    proto = onnx.load(tmp_path / "model.onnx")
    assert constant_nodes(proto.graph) == []
    assert {node.domain for node in proto.graph.node} == {""}
    # Another model's file is told apart, and nothing is said to be equal that is NaN.
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    for change in (1.5, float("nan")):
        with torch.no_grad():
            list(model.parameters())[-1].add_(change)
        with pytest.raises(RuntimeError, match="onnxruntime and PyTorch differ"):
            compare(model, tmp_path / "model.onnx", torch.randn(8, 3, SIZE, SIZE))


@pytest.mark.slow
def test_the_heat_map_of_a_label(tmp_path):
    model = tiny_model(residual_attention=True)
    assert export_onnx(model, processor(), tmp_path / "model.onnx", heat_map=True) < 1e-4
    session, pixels = onnxruntime.InferenceSession(tmp_path / "model.onnx"), torch.randn(3, 3, SIZE, SIZE)
    assert constant_nodes(onnx.load(tmp_path / "model.onnx").graph) == []
    with torch.no_grad():
        logits, maps = label_heat_maps(model, pixels)
    for label in range(3):
        inputs = {"pixel_values": pixels.numpy(), "label": np.array([label])}
        found, heat_map = session.run(["logits", "heat_map"], inputs)
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(heat_map, maps[:, label], rtol=0, atol=1e-4)
    assert np.ptp(maps[0].numpy(), axis=0).max() > 0.01  # maps that differ, or any would pass


def scores_by_the_file_alone(path, image):
    """Scores of an image as a program has them that knows the file's metadata and nothing else."""
    session = onnxruntime.InferenceSession(path)
    facts = session.get_modelmeta().custom_metadata_map
    size = int(facts["image_width"]), int(facts["image_height"])
    pixels = image.resize(size, Image.Resampling[facts["resample"].upper()])
    pixels = np.asarray(pixels, np.float32) * float(facts["rescale_factor"])
    pixels = (pixels - np.array(json.loads(facts["image_mean"]))) / np.array(json.loads(facts["image_std"]))
    logits = session.run(["logits"], {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0][0]
    return dict(zip(json.loads(facts["labels"]), 1 / (1 + np.exp(-logits)), strict=True)), facts


@pytest.mark.slow
def test_files_that_other_programs_read(tmp_path, capsys, monkeypatch):
    model = save_checkpoint(tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config["thresholds"] = [0.25, 0.5, 0.75]
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config))
    save_images(tmp_path / "data")
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "onnx")]
    quantize = ["--quantize", "int8", "--dataset", str(tmp_path / "data"), "--batch_size", "3"]
    assert main([*arguments, *quantize]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"int8 (loses|gains) 0\.\d+ of mAP", printed) and "thresholds fitted again: macro F1" in printed

    # The snippet of training/README.md
    readme = (Path(__file__).parents[3] / "training" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(import json\n.*?onnxruntime.*?)```", readme, re.S)
    assert len([line for line in snippet.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    monkeypatch.chdir(tmp_path)
    street = Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    street.rotate(90, expand=True).save("street.png", exif=exif)
    names: dict = {}
    exec(snippet.replace("street.jpg", "street.png"), names)
    expected, _ = scores_by_the_file_alone(tmp_path / "onnx" / "model.onnx", street)
    assert names["scores"] == pytest.approx(expected, abs=1e-5)

    image = Image.open(tmp_path / "data" / "validation" / "0.png")
    image_processor = MultiLabelImageProcessor(size={"height": 16, "width": 16})
    with torch.no_grad():
        expected = model(**image_processor(images=image, return_tensors="pt")).logits[0].sigmoid().tolist()
    scores, facts = scores_by_the_file_alone(tmp_path / "onnx" / "model.onnx", image)
    assert scores == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-4)
    assert json.loads(facts["thresholds"]) == [0.25, 0.5, 0.75]
    scores, facts = scores_by_the_file_alone(tmp_path / "onnx" / "model_int8.onnx", image)
    assert scores == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=0.3)
    assert json.loads(facts["thresholds"]) != [0.25, 0.5, 0.75]
    assert json.loads(facts["threshold_info"])["split"] == "validation"
    graph = onnx.load(tmp_path / "onnx" / "model_int8.onnx").graph
    assert "MatMulInteger" in {node.op_type for node in graph.node}
    int8 = onnx.TensorProto.INT8
    weights = [onnx.numpy_helper.to_array(each) for each in graph.initializer if each.data_type == int8]
    assert weights and max(np.abs(weight.astype(int)).max() for weight in weights) <= 64  # 2 x 255 x 64 fit 16 bits
    with (tmp_path / "onnx" / "selected_tags.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == NAMES

    # What is there is not replaced unasked, and a wish that cannot be met is told before anything is computed.
    assert main(arguments) == 2
    assert "model.onnx exists" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--quantize", "int8"]) == 2
    assert "needs --dataset" in capsys.readouterr().err

    results = tmp_path / "checkpoint" / "results.json"  # as in a published folder; of a run it is one folder above
    results.write_text(json.dumps({"positives_in_train": [5, 6, 7]}))
    assert main([*arguments, "--overwrite", "--layout", "wd_tagger"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    (wanted,) = session.get_inputs()
    assert wanted.shape == ["batch", 16, 16, 3]
    # As the taggers' own programs do: BGR from 0 to 255, channels last, and what comes out are scores.
    pixels = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), np.float32)[None, :, :, ::-1]
    found = session.run(None, {wanted.name: np.ascontiguousarray(np.repeat(pixels, 2, axis=0))})[0]
    assert found.shape == (2, 4 + len(NAMES))
    with (tmp_path / "onnx" / "selected_tags.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["tag_id", "name", "category", "count"]
    assert [row[3] for row in rows] == ["0", "0", "0", "0", "5", "6", "7"]
    for scores in found:
        # By index, as kohya's and toriato's programs read it: four ratings, then tags in the order of category 0.
        general = [row[1] for row in rows if row[2] == "0"]
        np.testing.assert_allclose(
            [dict(zip(general, scores[4:], strict=True))[name] for name in NAMES], expected, atol=1e-4
        )
        assert not scores[:4].any() and len([row for row in rows if row[2] == "9"]) == 4
        # By category, as the others do: the place of a row is that of its score.
        of_row = {row[1]: scores[place] for place, row in enumerate(rows) if row[2] == "0"}
        np.testing.assert_allclose([of_row[name] for name in NAMES], expected, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == [row[1] for row in rows]
    assert "programs for WD taggers resize to 448 px" in capsys.readouterr().out
    assert not list((tmp_path / "onnx").glob(".export-*"))


def test_counts_are_those_of_the_run_or_none(tmp_path):
    (tmp_path / "best").mkdir()
    results = tmp_path / "results.json"
    assert _positives(str(tmp_path / "best"), 3) is None
    for content, counts in (
        ({"positives_in_train": [5, 6, 7]}, [5, 6, 7]),
        ({"positives_in_train": [5, 6]}, None),  # of other labels
        ({"positives_in_train": 7}, None),
        ({}, None),
    ):
        results.write_text(json.dumps(content))
        assert _positives(str(tmp_path / "best"), 3) == counts
    results.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        _positives(str(tmp_path / "best"), 3)


def test_a_processor_without_one_size_is_refused():
    assert image_size(processor(size={"height": 24, "width": 40})) == (24, 40)
    with pytest.raises(ValueError, match="images of different sizes"):
        image_size(processor(size={"shortest_edge": 20}))
