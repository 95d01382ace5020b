"""The int8 file: its scores differ, so its thresholds are fitted again, and what that costs is said.

There are two of them. On a server its purpose is speed: activations are quantised as well (dynamic quantisation). On
the way to a browser it is size: weights alone are, so that scores stay those of PyTorch to about 1e-3.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx
from accelerate import Accelerator
from onnx import helper, numpy_helper
from transformers import BaseImageProcessor, PreTrainedModel

from ..metrics.functional import average_precision, decision_report
from ..metrics.glossary import shown
from ..options import ScoringOptions
from ..say import counted
from ..scoring.predict import load_scored, score_split
from ..scoring.thresholds import MIN_POSITIVES, fit_thresholds, threshold_info
from .to_onnx import OnnxClassifier, quantize_int8, write_metadata

SMALLEST = 2**16  # numbers of a weight: smaller ones take a few percent of a file, and classifiers are among them


def quantize_weights(source: Path, target: Path, smallest: int = SMALLEST) -> None:
    """Writes `source` with the weights of its linear layers in 8 bits, one scale an output; all is computed in fp32.

    Args:
        source: ONNX file.
        target: File to write.
        smallest: Weights of fewer numbers stay in fp32.
    """
    proto = onnx.load(source)
    graph, outputs = proto.graph, {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            transposed = {"transA": 0, "transB": 0, **{each.name: each.i for each in node.attribute}}
            outputs[node.input[0]] = -1 if transposed["transA"] else -2
            outputs[node.input[1]] = -2 if transposed["transB"] else -1
    kept, added = [], []
    for tensor in graph.initializer:
        name, axis = tensor.name, outputs.get(tensor.name)
        if axis is None or len(tensor.dims) < 2 or np.prod(tensor.dims) < smallest:
            kept.append(tensor)
            continue
        weight = numpy_helper.to_array(tensor)
        others = tuple(np.delete(np.arange(weight.ndim), axis).tolist())
        scale = np.maximum(np.abs(weight).max(others, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
        for what, values in (("int8", np.rint(weight / scale).astype(np.int8)), ("scale", scale)):
            kept.append(numpy_helper.from_array(values, f"{name}_{what}"))
        # Under the weight's own name, so that whoever reads it reads this. Not DequantizeLinear, which onnxruntime
        # joins with a product to an operation that rounds activations to 8 bits too. This it computes once, at the
        # start.
        added.append(helper.make_node("Cast", [f"{name}_int8"], [f"{name}_wide"], to=onnx.TensorProto.FLOAT))
        added.append(helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [name]))
    nodes = [*added, *graph.node]
    for field, values in ((graph.initializer, kept), (graph.node, nodes)):
        del field[:]
        field.extend(values)
    onnx.save(proto, target)


def quantize_and_refit(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    source: Path,
    target: Path,
    args: ScoringOptions,
    *,
    weights_alone: bool,
) -> None:
    """Writes the int8 file with thresholds fitted to its own scores, and prints what that costs."""
    (quantize_weights if weights_alone else quantize_int8)(source, target)
    accelerator = Accelerator(cpu=True)
    loaded = load_scored(model.config, args, accelerator)
    rows = {}
    for name, path in (("fp32", source), ("int8", target)):
        begin = time.perf_counter()
        split = score_split(OnnxClassifier(path, model.config), processor, args, accelerator, loaded=loaded)
        seconds = time.perf_counter() - begin
        rows[name] = (np.nanmean(average_precision(split.scores, split.labels)), path.stat().st_size, seconds)
    info = getattr(model.config, "threshold_info", None) or {}
    fit = {
        "objective": info.get("objective", "f1"),
        "target": info.get("target"),
        "min_positives": info.get("min_positives", MIN_POSITIVES),
    }
    fitted = fit_thresholds(split.scores, split.labels, label_names=split.label_names, **fit)
    print(f"On {args.dataset}, split {args.split}, {counted(len(split.scores), 'image')}:")
    for name, (mean_ap, size, seconds) in rows.items():
        print(f"  {name}: mAP {mean_ap:.4f}, {size / 1e6:.1f} MB, {seconds:.1f} s with decoding")
    change = float(rows["int8"][0] - rows["fp32"][0])
    print(f"  int8 {'loses' if change < 0 else 'gains'} {abs(change):.4f} of mAP.")
    thresholds = {"fitted again": fitted}
    if getattr(model.config, "thresholds", None) is not None:
        thresholds = {"as they were": np.array(model.config.thresholds), **thresholds}
    for words, values in thresholds.items():
        report = decision_report(split.scores, split.labels, values)
        print(f"  int8, thresholds {words}: {shown(report, 'f1_macro', 'f1_micro')}")
    info = threshold_info(split.labels, **fit, dataset=args.dataset, split=args.split)
    changes = {"thresholds": json.dumps(fitted.tolist()), "threshold_info": json.dumps(info)}
    _name(source, target, changes, weights_alone)


def quantize_alone(source: Path, target: Path) -> None:
    """Writes the int8 file of a browser with the thresholds of the other, for which no data are needed."""
    quantize_weights(source, target)
    _name(source, target, {}, weights_alone=True)


def _name(source: Path, target: Path, changes: dict[str, str], weights_alone: bool) -> None:
    """Gives the int8 file the metadata of its source, with these changes."""
    proto = onnx.load(target)
    props = {prop.key: prop.value for prop in onnx.load(source, load_external_data=False).metadata_props}
    what = "int8 weights of linear layers" if weights_alone else "dynamic int8 of linear layers"
    write_metadata(proto, {**props, **changes, "quantization": what})
    onnx.save(proto, target)
