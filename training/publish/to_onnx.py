"""A model as ONNX, checked in onnxruntime against PyTorch; its labels are constants of the graph."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import torch
from onnx import compose, helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image
from torch.export import Dim
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.exporters import OnnxConfig, OnnxExporter
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_hsvlt.heat_maps_multilabel import scored_heat_maps

from .selected_tags import wd_outputs

MODEL_FILE, INT8_FILE = "model.onnx", "model_int8.onnx"
TOLERANCE = 1e-4
CHECKED_BATCHES = (1, 3, 8)


def export_onnx(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    path: Path,
    *,
    opset: int | None = None,
    heat_map: bool = False,
) -> float:
    """Writes `model` in the standard layout, and compares it with PyTorch at several batch sizes.

    Args:
        model: Gives `logits` for `pixel_values` alone; is left in fp32 and evaluation mode, on the CPU.
        processor: Tells the size of the images and goes into the metadata.
        path: The file to write.
        opset: ONNX operator set; None takes the exporter's (20).
        heat_map: One more input, `label` (1,), int64, and one more output, `heat_map` (batch, h, w) from 0 to 1: where
            the model found the label of that index, as `label_heat_maps` has it.

    Returns:
        The difference that `compare` finds.

    Raises:
        RuntimeError: onnxruntime computes something else.
        ValueError: heat maps of a model that has none.
    """
    model = prepare_model(model)
    size = image_size(processor)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(max(CHECKED_BATCHES), 3, *size, generator=generator)
    shapes: dict[str, dict] = {"pixel_values": {0: Dim("batch")}}
    inputs, wrapped = {"pixel_values": pixels[:2]}, _LogitsOnly(model)  # two: of 1, a dimension becomes a constant
    if heat_map:
        wrapped, shapes["label"], inputs["label"] = _WithHeatMap(model), {}, torch.tensor([0])
    with _quiet(), torch.no_grad():
        config = OnnxConfig(dynamic_shapes=shapes, opset_version=opset)
        exported = OnnxExporter().export(wrapped, inputs, config)
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
        pixels: At least 8 normalised images (8, 3, height, width).

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
            found = _logits(session, pixels[:batch])
            differences = np.abs(found - expected) / max(1.0, float(np.abs(expected).max()))
            error = max(error, float(np.nan_to_num(differences, nan=np.inf).max()))
    if error > TOLERANCE:
        raise RuntimeError(
            f"onnxruntime and PyTorch differ by {error:.1e} of the largest logit, more than {TOLERANCE:.0e}; nothing "
            "was written. Try another --opset."
        )
    return error


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """fp32 on the CPU in evaluation mode, scoring every label from the images alone."""
    model = model.float().cpu().eval()
    if getattr(model, "candidate_scorer", None) is not None:
        model.candidate_scorer = None  # Which labels to leave out differs from image to image: all are scored.
    if getattr(model.config, "has_text_model", False):
        model.drop_text_model()  # Keeps the text embeddings of the labels.
    if getattr(model.config, "has_teacher", False):
        model.drop_teacher()
    return model


def has_heat_maps(model: PreTrainedModel) -> bool:
    """Whether `export_onnx` can give one; an HP-DVAL that scores the whole image alone has none."""
    return model.config.model_type in ("hsvlt", "mltr") or getattr(model.config, "alpha", 1) != 1


class _LogitsOnly(torch.nn.Module):
    """A model without its other outputs, which every run of the ONNX file would compute."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(pixel_values=pixel_values).logits}


class _WithHeatMap(_LogitsOnly):
    """A model with the heat map of one label."""

    def forward(self, pixel_values: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        logits, maps, _ = scored_heat_maps(self.model, pixel_values, maps_of=label)
        return {"logits": logits, "heat_map": maps[:, 0]}


def _fold_constants(path: Path) -> onnx.ModelProto:
    """The model with all that depends on no image computed: label stream, text norms, products of weights.

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
    for value in (proto.graph.input[0], *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(proto, full_check=True)
    return proto


def image_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the `pixel_values` that the processor makes.

    Raises:
        ValueError: they depend on the image.
    """
    shapes = set()
    for size in ((40, 60), (60, 40)):
        shapes.add(tuple(processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"].shape[-2:]))
    if len(shapes) > 1:
        raise ValueError(
            "The processor gives images of different sizes; give its size a height and width, or let it crop."
        )
    return shapes.pop()


def metadata(model: PreTrainedModel, processor: BaseImageProcessor) -> dict[str, str]:
    """What a program needs beside the graph, as ONNX keeps it: strings, with JSON for lists."""
    config, (height, width) = model.config, image_size(processor)
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
        "resize": {name: side for name, side in dict(processor.size or {}).items() if side and processor.do_resize},
        "resize_mode": getattr(processor, "resize_mode", None) or "squash",
        "resample": Image.Resampling(int(processor.resample)).name.lower(),
        "resample_number": int(processor.resample),  # what Pillow's resize takes
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
    """The standard layout's model behind the input and output of the WD taggers.

    Programs take the first four outputs for ratings and count the tags from the fifth on, whatever the table says
    (kohya's sd-scripts, finetune/tag_images_by_wd14_tagger.py: `prob[:4]`, `prob[4:]`), so four stand in front: a label
    that is called like a rating is that output, any other rating is 0.
    """
    props = {prop.key: prop.value for prop in proto.metadata_props}
    mean, std = (np.float32(json.loads(props[name])) for name in ("image_mean", "image_std"))
    scale = np.float32(json.loads(props["rescale_factor"])) / std
    scale, shift = (_listed(np.broadcast_to(values, 3)) for values in (scale, -mean / std))
    height, width = (json.loads(props[name]) for name in ("image_height", "image_width"))
    labels = json.loads(props["labels"])
    outputs, place = wd_outputs(labels), {name: index for index, name in enumerate(labels)}
    before = f"""wd_input (float[batch, {height}, {width}, 3] input) => (float[batch, 3, {height}, {width}] wd_pixels)
        <int64[3] wd_order = {{2, 1, 0}}, float[3] wd_scale = {scale}, float[3] wd_shift = {shift}>
        {{
            wd_rgb = Gather <axis = 3> (input, wd_order)
            wd_scaled = Mul (wd_rgb, wd_scale)
            wd_normalised = Add (wd_scaled, wd_shift)
            wd_pixels = Transpose <perm = [0, 3, 1, 2]> (wd_normalised)
        }}"""
    places = [place.get(name, len(labels)) for name in outputs]
    after = f"""wd_scores (float[batch, {len(labels)}] wd_logits) => (float[batch, {len(outputs)}] output)
        <int64[4] wd_pads = {{0, 0, 0, 1}}, int64[{len(places)}] wd_places = {_listed(places)}>
        {{
            wd_scores = Sigmoid (wd_logits)
            wd_all = Pad (wd_scores, wd_pads)
            output = Gather <axis = 1> (wd_all, wd_places)
        }}"""
    before, after = map(onnx.parser.parse_graph, (before, after))
    options = {"opset_imports": proto.opset_import, "ir_version": proto.ir_version}
    joined = compose.merge_models(helper.make_model(before, **options), proto, [("wd_pixels", "pixel_values")])
    joined = compose.merge_models(joined, helper.make_model(after, **options), [("logits", "wd_logits")])
    facts = {"labels": json.dumps(outputs), "layout": "wd_tagger", "channel_order": "BGR"}
    if "thresholds" in props:
        thresholds = json.loads(props["thresholds"])
        facts["thresholds"] = json.dumps([thresholds[place[name]] if name in place else 1.0 for name in outputs])
    write_metadata(joined, {**props, **facts})
    onnx.checker.check_model(joined, full_check=True)
    return joined


def _listed(numbers: Iterable) -> str:
    return f"{{{', '.join(repr(number) for number in np.asarray(numbers).tolist())}}}"


def quantize_int8(source: Path, target: Path) -> None:
    """Writes `source` with the weights of its linear layers as int8, of which 7 bits are used; convolutions stay.

    Activations are quantised when they come (dynamic quantisation), so no calibration is needed.
    """
    graph = onnx.load(source).graph
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    batched = [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] not in matrices]
    with _quiet():
        # Signed weights: unsigned ones take onnxruntime past the instructions made for this (VNNI), and half the speed.
        # In 7 bits: without those instructions the sum of two products of 8 bits overflows. One scale an output.
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=batched,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )


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
        logits = _logits(self._session, pixel_values.cpu())
        return ImageClassifierOutput(logits=torch.from_numpy(logits).to(pixel_values.device))


def _logits(session: onnxruntime.InferenceSession, pixel_values: torch.Tensor) -> np.ndarray:
    """Logits of a file with or without a heat map."""
    inputs = {"pixel_values": pixel_values.numpy(), "label": np.zeros(1, np.int64)}
    names = [value.name for value in session.get_inputs()]
    return session.run(["logits"], {name: inputs[name] for name in names})[0]


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
