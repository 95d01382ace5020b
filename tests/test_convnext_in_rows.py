import pytest
import torch
from transformers import ConvNextConfig, ConvNextV2Config
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, convnext_in_rows, hsvlt_backbones
from modeling_hsvlt.convnext_in_rows import convnext_layer_in_rows, runs_in_rows


def make_layer(channels: int = 12) -> ConvNextLayer:
    torch.manual_seed(0)
    layer = ConvNextLayer(ConvNextConfig(layer_scale_init_value=0.5), channels).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("rows", [1, 7, 60, 1000])  # 2 x 5 x 6 pixels: one, uneven, one piece, more than there are
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_equals_the_stock_layer(rows, memory_format, monkeypatch):
    layer = make_layer()
    monkeypatch.setattr(convnext_in_rows, "PIECE_NUMEL", rows * 4 * 12)
    hidden_state = torch.randn(2, 12, 5, 6).contiguous(memory_format=memory_format)
    before = hidden_state.clone()
    with torch.no_grad():
        expected = layer(hidden_state)
        output = convnext_layer_in_rows(layer, hidden_state)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_state, before, rtol=0, atol=0)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_stands_in_for_the_stock_layer_at_inference_alone():
    layer, hidden_state = make_layer(), torch.randn(1, 12, 4, 4)
    assert not runs_in_rows(layer, hidden_state)  # gradients are on
    with torch.no_grad():
        assert runs_in_rows(layer, hidden_state)
        assert not runs_in_rows(layer, hidden_state.to("meta"))
        assert not runs_in_rows(layer.train(), hidden_state)  # stochastic depth
        assert not runs_in_rows(ConvNextV2Layer(ConvNextV2Config(), 12).eval(), hidden_state)
        assert not runs_in_rows(ConvNextLayer(ConvNextConfig(layer_scale_init_value=0.0), 12).eval(), hidden_state)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not runs_in_rows(layer.eval(), hidden_state)
        hook = layer.register_forward_hook(lambda *_: None)
        assert not runs_in_rows(layer, hidden_state)
        hook.remove()
        assert runs_in_rows(layer, hidden_state)
        layer.forward = layer.forward  # as accelerate puts its own in place, to load what was offloaded
        assert not runs_in_rows(layer, hidden_state)


def test_the_model_takes_it_and_gives_the_same_logits(monkeypatch):
    model = HSVLTForImageClassification(HSVLTConfig.preset("nano", num_labels=3)).eval()
    pixel_values = torch.randn(2, 3, 64, 64)
    called = []

    def count(layer, hidden_state):
        called.append(layer)
        return convnext_layer_in_rows(layer, hidden_state)

    monkeypatch.setattr(hsvlt_backbones, "convnext_layer_in_rows", count)
    expected = model(pixel_values).logits.detach()  # gradients on: the stock layers
    assert not called
    with torch.no_grad():
        logits = model(pixel_values).logits
    assert len(called) == sum(model.config.backbone_config.depths)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
