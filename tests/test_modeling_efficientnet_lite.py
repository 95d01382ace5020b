import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoBackbone, AutoModelForImageClassification

from modeling_hsvlt import (
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
)
from modeling_hsvlt.modeling_efficientnet_lite import EfficientNetLiteConvolution

from .tolerance import assert_close_outputs

TINY = {
    "stem_channels": 4,
    "group_channels": [4, 4, 8, 8, 8, 12, 12],
    "group_depths": [1, 1, 1, 1, 2, 1, 1],
    "head_channels": 16,
}
ALL = ["stage1", "stage2", "stage3", "stage4", "head"]


def test_maps_have_their_strides_and_widths():
    config = EfficientNetLiteConfig(**TINY, out_features=ALL)
    backbone = AutoBackbone.from_config(config).eval()
    assert isinstance(backbone, EfficientNetLiteBackbone) and backbone.channels == [4, 8, 8, 12, 16]
    maps = backbone(torch.randn(2, 3, 64, 96)).feature_maps
    expected = [(4, 16, 24), (8, 8, 12), (8, 4, 6), (12, 2, 3), (16, 2, 3)]
    assert [tuple(each.shape) for each in maps] == [(2, *shape) for shape in expected]


# Of the released weights, classifier included.
@pytest.mark.parametrize(("size", "number"), [("lite0", 4_652_008), ("lite1", 5_416_680), ("lite2", 6_092_072)])
def test_sizes_are_the_released_ones(size, number):
    with torch.device("meta"):
        model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig.preset(size, num_labels=1000))
    assert model.num_parameters() == number


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
                        expected[y, x] += image[0, 0, row, column] * layer.convolution.weight[0, 0, i, j]
    assert_close_outputs(layer(image)[0, 0] * (1 + 1e-3) ** 0.5, expected)


def test_random_weights_keep_the_spread_of_what_passes():
    torch.manual_seed(0)
    maps = EfficientNetLiteBackbone(EfficientNetLiteConfig(out_features=ALL)).eval()(torch.randn(2, 3, 64, 64))
    assert all(0.1 < each.std() < 10 for each in maps.feature_maps)


@pytest.mark.parametrize("classifier", [False, True], ids=["hsvlt", "classifier"])
def test_a_checkpoint_loads_again(tmp_path, classifier):
    torch.manual_seed(0)
    labels = {"id2label": {0: "cat", 1: "dog", 2: "bus"}, "label2id": {"cat": 0, "dog": 1, "bus": 2}}
    if classifier:
        model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(**TINY, **labels))
    else:
        backbone = EfficientNetLiteConfig(**TINY)
        model = HSVLTForImageClassification(HSVLTConfig(backbone_config=backbone, label_embedding_dim=6, **labels))
        assert model.config.backbone_config.out_features == ALL[1:]  # the last four
    pixels = torch.randn(2, 3, 32, 32)
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.id2label == labels["id2label"]
    assert_close_outputs(again(pixels).logits, model(pixels).logits)


def test_an_hsvlt_starts_from_a_classifier_s_backbone(tmp_path):
    torch.manual_seed(0)
    source = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(**TINY, num_labels=3)).eval()
    source.save_pretrained(tmp_path)
    model = HSVLTForImageClassification.from_backbone(tmp_path, num_labels=2, label_embedding_dim=6).eval()
    pixels = torch.randn(1, 3, 32, 32)
    maps = list(model.hsvlt.backbone(pixels))
    assert [each.shape[1] for each in maps] == [8, 8, 12, 16]
    assert_close_outputs(maps[-1], source.backbone(pixels).feature_maps[-1])


def test_a_wrong_number_of_groups_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="must hold 7 numbers"):
        EfficientNetLiteConfig(group_depths=[1, 2])
    with pytest.raises(ValueError, match="choose one of"):
        EfficientNetLiteConfig.preset("lite9")
