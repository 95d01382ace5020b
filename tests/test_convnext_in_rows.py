import pytest
import torch
from transformers import ConvNextConfig, ConvNextV2Config
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, convnext_in_rows, hsvlt_backbones
from modeling_hsvlt.convnext_in_rows import convnext_layer_in_rows, has_fused_linear, runs_in_rows


def make_layer(channels: int = 12) -> ConvNextLayer:
    torch.manual_seed(0)
    layer = ConvNextLayer(ConvNextConfig(layer_scale_init_value=0.5), channels).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("rows", [1, 7, 60, 1000])  # 2 x 5 x 6 pixels: one, uneven, one piece, more than there are
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_stock_layer(rows, memory_format, onednn, dtype, monkeypatch):
    layer = make_layer().to(dtype)
    monkeypatch.setattr(convnext_in_rows, "PIECE_NUMEL", rows * 4 * 12)
    hidden_state = torch.randn(2, 12, 5, 6, dtype=dtype).contiguous(memory_format=memory_format)
    before = hidden_state.clone()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", onednn)
    with torch.no_grad():
        expected = layer(hidden_state)
        output = convnext_layer_in_rows(layer, hidden_state)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_state, before, rtol=0, atol=0)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [7, 1000])
def test_is_as_near_to_full_precision_as_the_stock_layer(dtype, rows, monkeypatch):
    monkeypatch.setattr(convnext_in_rows, "PIECE_NUMEL", rows * 4 * 12)
    layer = make_layer()
    half = ConvNextLayer(ConvNextConfig(layer_scale_init_value=0.5), 12).eval()
    half.load_state_dict(layer.state_dict())
    half, hidden_state = half.to(dtype), torch.randn(8, 12, 9, 9)
    with torch.no_grad():
        exact = layer(hidden_state)
        stock, output = half(hidden_state.to(dtype)), convnext_layer_in_rows(half, hidden_state.to(dtype))
    assert (output - exact).square().mean() <= 1.05 * (stock - exact).square().mean()


@pytest.mark.parametrize("schema", ["mkldnn::_linear_pointwise(Tensor X) -> Tensor Y", None])
def test_calls_no_other_operation_than_it_knows(schema, monkeypatch):
    class Other:
        def __getattr__(self, name):
            assert name in ("_linear_pointwise", "_reorder_linear_weight"), "called"
            if schema is None:
                raise AttributeError(name)
            return type("Operation", (), {"_schema": schema})

    layer, hidden_state = make_layer(), torch.randn(1, 12, 4, 4)
    with torch.no_grad():
        expected = convnext_layer_in_rows(layer, hidden_state)
        monkeypatch.setattr(torch.ops, "mkldnn", Other())
        monkeypatch.setattr(convnext_in_rows, "_fused_dtypes", convnext_in_rows._fused_dtypes.__wrapped__)  # uncached
        assert not has_fused_linear(torch.float32)
        torch.testing.assert_close(convnext_layer_in_rows(layer, hidden_state), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_different_types_fail_as_the_stock_layer_does():
    layer, hidden_state = make_layer(), torch.randn(1, 12, 4, 4)
    layer.pwconv1.to(torch.bfloat16)
    for call in (layer, lambda hidden_state: convnext_layer_in_rows(layer, hidden_state)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="same dtype"):
            call(hidden_state)


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
