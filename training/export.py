"""Write a checkpoint as ONNX, for tools without PyTorch; the labels are folded in.

    python -m training.export CHECKPOINT TARGET
    python -m training.export CHECKPOINT TARGET --layout wd_tagger
    python -m training.export CHECKPOINT TARGET --quantize int8 --dataset DATASET --split validation

TARGET gets `model.onnx` and `selected_tags.csv`. The model is checked in onnxruntime against PyTorch before it is put
there. What a program needs to use it stands in its metadata: `labels` and `thresholds` (JSON lists in the order of the
outputs), `image_height`, `image_width`, `image_mean`, `image_std`, `rescale_factor`, `resize_mode`, `resample` and, for
a processor that crops, `resize` and `do_center_crop`.

The layout "standard" takes `pixel_values` (batch, 3, height, width), RGB, rescaled and normalised, and gives `logits`
(batch, labels), whose sigmoid is the score. "wd_tagger" takes what programs for WD taggers feed, `input`
(batch, height, width, 3), BGR, 0 to 255, and gives `output`, the scores themselves.

`--quantize int8` writes `model_int8.onnx` as well: weights of linear layers in 8 bits, activations quantised as they
come. Scores move a little with that, so its thresholds are fitted again on DATASET, and the loss in mAP is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from accelerate import Accelerator
from onnx import compose, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from torch.export import Dim
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.modeling_outputs import ImageClassifierOutput

from .checkpoint.loading import load_checkpoint
from .metrics.functional import multilabel_report
from .options import add_scoring_arguments
from .publish.selected_tags import FILE_NAME as TAGS_FILE
from .publish.selected_tags import write_selected_tags
from .scoring.predict import score_split
from .scoring.thresholds import MIN_POSITIVES, fit_thresholds, threshold_info

MODEL_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
LAYOUTS = ("standard", "wd_tagger")
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3, 8)


def export_onnx(
    model: PreTrainedModel, processor: BaseImageProcessor, path: Path, *, opset: int | None = None
) -> float:
    """Writes `model` in the standard layout, and compares it with PyTorch at several batch sizes.

    Args:
        model: Gives `logits` for `pixel_values` alone; is left in fp32 and evaluation mode, on the CPU.
        processor: Tells the size of the pictures and goes into the metadata.
        path: The file to write.
        opset: ONNX operator set; None takes the exporter's (20).

    Returns:
        The difference that `compare` finds.

    Raises:
        RuntimeError: onnxruntime computes something else.
    """
    model = prepare_model(model)
    size = picture_size(processor)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(max(CHECKED_BATCHES), 3, *size, generator=generator)
    shapes = {"pixel_values": {0: Dim("batch")}}
    with _quiet(), torch.no_grad():
        # Of two pictures: the exporter takes a dimension of 1 for a constant.
        config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
        exported = OnnxExporter().export(_LogitsOnly(model), {"pixel_values": pixels[:2]}, config)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            OnnxExporter.save_program(exported.program, Path(folder) / MODEL_FILE)
            proto = _fold_constants(Path(folder) / MODEL_FILE)
    write_metadata(proto, metadata(model, processor))
    onnx.save(proto, path)

    return compare(model, path, pixels)


def compare(model: PreTrainedModel, path: Path, pixels: torch.Tensor) -> float:
    """The largest difference between the logits of PyTorch and onnxruntime at batch 1, 3 and 8.

    Args:
        model: In evaluation mode.
        path: The ONNX file.
        pixels: At least 8 normalised pictures (8, 3, height, width).

    Returns:
        The difference in units of the largest logit if that is above 1.

    Raises:
        RuntimeError: it is above 1e-4.
    """
    session = _session(path)
    error = 0.0
    with torch.no_grad():
        for batch in CHECKED_BATCHES:
            expected = model(pixel_values=pixels[:batch]).logits.numpy()
            found = session.run(["logits"], {"pixel_values": pixels[:batch].numpy()})[0]
            differences = np.abs(found - expected) / max(1.0, float(np.abs(expected).max()))
            error = max(error, float(np.nan_to_num(differences, nan=np.inf).max()))
    if error > TOLERANCE:
        raise RuntimeError(
            f"onnxruntime and PyTorch differ by {error:.1e} of the largest logit, more than {TOLERANCE:.0e}; nothing "
            "was written. Try another --opset."
        )
    return error


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """fp32 on the CPU in evaluation mode, scoring every label from the pictures alone."""
    model = model.float().cpu().eval()
    if getattr(model, "candidate_scorer", None) is not None:
        model.candidate_scorer = None  # Which labels to leave out differs from picture to picture: all are scored.
    if getattr(model.config, "has_text_model", False):
        model.drop_text_model()  # Keeps the text embeddings of the labels.
    if getattr(model.config, "has_teacher", False):
        model.drop_teacher()
    return model


class _LogitsOnly(torch.nn.Module):
    """A model without its other outputs, which every run of the ONNX file would compute."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(pixel_values=pixel_values).logits}


def _fold_constants(path: Path) -> onnx.ModelProto:
    """The model with all that depends on no picture computed: label stream, text norms, products of weights.

    The exporter folds only small tensors and no layer norms.
    """
    options = onnxruntime.SessionOptions()
    # "Basic" keeps to standard operators, which other runtimes know.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    folded = path.with_name("folded.onnx")
    options.optimized_model_filepath = str(folded)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    proto = onnx.load(folded)
    used = {node.domain for node in proto.graph.node}
    opsets = [opset for opset in proto.opset_import if opset.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(proto, full_check=True)
    return proto


def picture_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the `pixel_values` that the processor makes.

    Raises:
        ValueError: they depend on the picture.
    """
    shapes = set()
    for size in ((40, 60), (60, 40)):
        shapes.add(tuple(processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[-2:]))
    if len(shapes) > 1:
        raise ValueError(
            "The processor gives pictures of different sizes; give its size a height and width, or let it crop."
        )
    return shapes.pop()


def metadata(model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, str]:
    """What a program needs beside the graph, as ONNX keeps it: strings, with JSON for lists."""
    config, (height, width) = model.config, picture_size(processor)
    normalizes = bool(processor.do_normalize)
    values = {
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "thresholds": getattr(config, "thresholds", None),
        "threshold_info": getattr(config, "threshold_info", None),
        "image_height": height,
        "image_width": width,
        "image_mean": list(processor.image_mean) if normalizes else [0.0] * 3,
        "image_std": list(processor.image_std) if normalizes else [1.0] * 3,
        "rescale_factor": processor.rescale_factor if processor.do_rescale else 1.0,
        "resize": {name: side for name, side in dict(processor.size).items() if side},
        "resize_mode": getattr(processor, "resize_mode", None) or "squash",
        "resample": Image.Resampling(int(processor.resample)).name.lower(),
        "do_center_crop": bool(getattr(processor, "do_center_crop", None)),
        "channel_order": "RGB",
        "layout": "standard",
        "model_type": config.model_type,
    }
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    return {name: text for name, text in texts.items() if text != "null"}


def write_metadata(proto: onnx.ModelProto, values: dict[str, str]) -> None:
    """Sets `values` among the model's metadata."""
    helper.set_model_props(proto, {**{prop.key: prop.value for prop in proto.metadata_props}, **values})


def to_wd_tagger(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The standard layout's model behind the input and output of the WD taggers."""
    props = {prop.key: prop.value for prop in proto.metadata_props}
    mean, std = (np.float32(json.loads(props[name])) for name in ("image_mean", "image_std"))
    scale = np.float32(json.loads(props["rescale_factor"])) / std
    size = [json.loads(props[name]) for name in ("image_height", "image_width")]
    names = ("wd_order", "wd_scale", "wd_shift")
    tensors = (np.array([2, 1, 0]), scale, -mean / std)
    pictures = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", *size, 3])
    nodes = [
        helper.make_node("Gather", ["input", "wd_order"], ["wd_rgb"], axis=3),
        helper.make_node("Mul", ["wd_rgb", "wd_scale"], ["wd_scaled"]),
        helper.make_node("Add", ["wd_scaled", "wd_shift"], ["wd_normalised"]),
        helper.make_node("Transpose", ["wd_normalised"], ["wd_pixels"], perm=[0, 3, 1, 2]),
    ]
    pixels = helper.make_tensor_value_info("wd_pixels", onnx.TensorProto.FLOAT, ["batch", 3, *size])
    initializers = [numpy_helper.from_array(tensor, name) for tensor, name in zip(tensors, names, strict=True)]
    before = helper.make_graph(nodes, "wd_tagger_input", [pictures], [pixels], initializers)
    count = len(json.loads(props["labels"]))
    logits, output = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", count])
        for name in ("wd_logits", "output")
    )
    after = helper.make_graph([helper.make_node("Sigmoid", ["wd_logits"], ["output"])], "scores", [logits], [output])
    options = {"opset_imports": proto.opset_import, "ir_version": proto.ir_version}
    joined = compose.merge_models(helper.make_model(before, **options), proto, [("wd_pixels", "pixel_values")])
    joined = compose.merge_models(joined, helper.make_model(after, **options), [("logits", "wd_logits")])
    write_metadata(joined, {**props, "layout": "wd_tagger", "channel_order": "BGR"})
    onnx.checker.check_model(joined, full_check=True)
    return joined


def quantize_int8(source: Path, target: Path) -> None:
    """Writes `source` with the weights of its linear layers in 8 bits; convolutions stay as they are.

    Activations are quantised when they come (dynamic quantisation), so no calibration is needed.
    """
    with _quiet():
        # Unsigned weights: signed ones overflow on CPUs without VNNI. One scale a tensor: onnxruntime fails on batched
        # products with one a channel.
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QUInt8)


class OnnxClassifier(torch.nn.Module):
    """An ONNX file of the standard layout behind what `training.evaluate` asks of a model.

    Args:
        path: The file.
        config: Of the model it was written from.
    """

    def __init__(self, path: Path, config):
        super().__init__()
        self.config, self._session = config, _session(path)
        self.fp32 = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # Tells the dtype of the pixels.

    def forward(self, pixel_values: torch.Tensor) -> ImageClassifierOutput:
        """(batch, 3, height, width) to logits (batch, num_labels)."""
        logits = self._session.run(["logits"], {"pixel_values": pixel_values.cpu().numpy()})[0]
        return ImageClassifierOutput(logits=torch.from_numpy(logits).to(pixel_values.device))


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters speak of decompositions, missing torchvision operators and tried versions, none of which helps."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _quantize_and_refit(
    model: PreTrainedModel, processor: BaseImageProcessor, source: Path, target: Path, args: argparse.Namespace
) -> None:
    """Writes the int8 file with thresholds fitted to its own scores, and prints what that costs."""
    quantize_int8(source, target)
    accelerator = Accelerator(cpu=True)
    rows = {}
    for name, path in (("fp32", source), ("int8", target)):
        begin = time.perf_counter()
        split = score_split(OnnxClassifier(path, model.config), processor, args, accelerator)
        seconds = time.perf_counter() - begin
        rows[name] = (multilabel_report(split.scores, split.labels, top_k=None)["mAP"], path.stat().st_size, seconds)
    info = getattr(model.config, "threshold_info", None) or {}
    fit = {
        "objective": info.get("objective", "f1"),
        "target": info.get("target"),
        "min_positives": info.get("min_positives", MIN_POSITIVES),
    }
    fitted = fit_thresholds(split.scores, split.labels, label_names=split.label_names, **fit)
    print(f"On {args.dataset}, split {args.split}, {len(split.scores):,} pictures:")
    for name, (mean_ap, size, seconds) in rows.items():
        print(f"  {name}: mAP {mean_ap:.4f}, {size / 1e6:.1f} MB, {seconds:.1f} s with decoding")
    print(f"  int8 loses {100 * (rows['fp32'][0] - rows['int8'][0]):.2f} points of mAP.")
    thresholds = {"fitted again": fitted}
    if getattr(model.config, "thresholds", None) is not None:
        thresholds = {"as they were": np.array(model.config.thresholds), **thresholds}
    for words, values in thresholds.items():
        report = multilabel_report(split.scores, split.labels, values, top_k=None)
        print(f"  int8, thresholds {words}: macro F1 {report['f1_macro']:.4f}, micro F1 {report['f1_micro']:.4f}")
    info = threshold_info(split.labels, **fit, dataset=args.dataset, split=args.split)
    proto = onnx.load(target)
    props = {prop.key: prop.value for prop in onnx.load(source, load_external_data=False).metadata_props}
    refitted = {"thresholds": json.dumps(fitted.tolist()), "threshold_info": json.dumps(info)}
    write_metadata(proto, {**props, **refitted, "quantization": "dynamic int8 of linear layers"})
    onnx.save(proto, target)


def run(args: argparse.Namespace) -> None:
    """Exports, checks, prints; puts the files into the target only when all went well."""
    names = [MODEL_FILE, TAGS_FILE] + ([INT8_FILE] if args.quantize else [])
    existing = [name for name in names if (args.target / name).exists()]
    if existing and not args.overwrite:
        raise FileExistsError(
            f"{args.target / existing[0]} exists; choose another TARGET, or pass --overwrite to replace it."
        )
    if args.quantize and args.dataset is None:
        raise ValueError("--quantize needs --dataset: the thresholds are fitted again to the scores of the int8 model.")
    model, processor = load_checkpoint(args)
    args.target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.target, prefix=".export-") as folder:
        folder = Path(folder)
        path = folder / MODEL_FILE
        error = export_onnx(model, processor, path, opset=args.opset)
        print(
            f"{args.checkpoint}: onnxruntime and PyTorch differ by at most {error:.1e} of the largest logit at batch "
            f"{', '.join(map(str, CHECKED_BATCHES))}."
        )
        if args.quantize:
            _quantize_and_refit(model, processor, path, folder / INT8_FILE, args)
        if args.layout == "wd_tagger":
            for file in folder.glob("*.onnx"):
                onnx.save(to_wd_tagger(onnx.load(file)), file)
        write_selected_tags(folder / TAGS_FILE, [model.config.id2label[i] for i in range(model.config.num_labels)])
        for name in names:
            os.replace(folder / name, args.target / name)
    print(f"Written: {', '.join(str(args.target / name) for name in names)}")
    if getattr(model.config, "thresholds", None) is None and not args.quantize:
        print(
            "The checkpoint has no thresholds, so the file has none; fit them with python -m training.fit_thresholds."
        )


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m training.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_scoring_arguments(parser, dataset="--dataset")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to write into")
    parser.add_argument("--layout", choices=LAYOUTS, default="standard", help="see above; default: standard")
    parser.add_argument("--opset", type=int, help="ONNX operator set; default: the exporter's")
    parser.add_argument("--quantize", choices=["int8"], help="write model_int8.onnx as well; needs --dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace files in TARGET")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
