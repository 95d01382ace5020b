"""8-bit weights against numpy, and scores against those of fp32."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper, parser

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor
from training.publish.int8 import quantize_weights
from training.publish.to_onnx import export_onnx

WEIGHTS = {"right": (6, 5), "left": (4, 6), "turned": (5, 5), "small": (5, 2)}


def test_each_output_of_a_weight_has_its_scale(tmp_path):
    """A scale an output: rows of a factor of thousand keep as many digits each, on whichever side the weight is."""
    generator = np.random.default_rng(0)
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    weights["right"] *= 1000.0 ** -np.arange(5, dtype=np.float32)
    weights["turned"] *= 1000.0 ** -np.arange(5, dtype=np.float32)[:, None]
    weights["left"] *= 1000.0 ** -np.arange(4, dtype=np.float32)[:, None]
    weights["right"][:, 4] = 0
    graph = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 6, 6] x) => (float[n, 4, 2] y) {
            a = MatMul (left, x)
            b = MatMul (a, right)
            shape = Constant <value = int64[2] {-1, 5}> ()
            c = Reshape (b, shape)
            d = Gemm <transB = 1> (c, turned)
            e = MatMul (d, small)
            f = Constant <value = int64[3] {-1, 4, 2}> ()
            y = Reshape (e, f)
        }"""
    )
    graph.graph.initializer.extend(numpy_helper.from_array(weight, name) for name, weight in weights.items())
    onnx.save(graph, tmp_path / "model.onnx")
    quantize_weights(tmp_path / "model.onnx", tmp_path / "int8.onnx", smallest=20)

    written = onnx.load(tmp_path / "int8.onnx")
    onnx.checker.check_model(written, full_check=True)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    assert set(stored) == {"small"} | {
        f"{name}_{what}" for name in WEIGHTS if name != "small" for what in ("int8", "scale")
    }
    expected = {"small": weights["small"]}
    for name, axis in {"right": 1, "left": 0, "turned": 0}.items():
        assert stored[f"{name}_int8"].dtype == np.int8
        assert stored[f"{name}_scale"].shape == tuple(np.where(np.arange(2) == axis, weights[name].shape, 1))
        expected[name] = stored[f"{name}_int8"] * stored[f"{name}_scale"]
        largest = np.abs(weights[name]).max(1 - axis, keepdims=True)
        assert (np.abs(expected[name] - weights[name]) <= largest / 127 / 2 * 1.001).all()
    x = generator.standard_normal((3, 6, 6)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"x": x})
    by_hand = (expected["left"] @ x @ expected["right"]) @ expected["turned"].T @ expected["small"]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classifier", ["per_label", "shared"])
def test_scores_are_those_of_fp32(classifier, tmp_path):
    torch.manual_seed(0)
    config = HSVLTConfig.preset("nano", num_labels=7, classifier=classifier)
    model = HSVLTForImageClassification(config)
    processor = MultiLabelImageProcessor(size={"height": 32, "width": 32})
    export_onnx(model, processor, tmp_path / "model.onnx")
    quantize_weights(tmp_path / "model.onnx", tmp_path / "int8.onnx", smallest=2**10)
    pixels = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    scores = []
    for name in ("model", "int8"):
        (logits,) = onnxruntime.InferenceSession(tmp_path / f"{name}.onnx").run(None, {"pixel_values": pixels})
        scores.append(1 / (1 + np.exp(-logits)))
    assert 0 < np.abs(scores[1] - scores[0]).max() < 1e-3
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("model", "int8")]
    assert sizes[1] < 0.6 * sizes[0]
