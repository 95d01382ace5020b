"""A model for the browser: a page of its own that needs no server, and a folder that transformers.js loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .onnxruntime_web import FILES, VERSION

BROWSER = Path(__file__).with_name("browser")
PAGE = ("index.html", "style.css", "app.mjs", "worker.mjs", "pixels.mjs", "files.mjs")
WEB_FILES = ("README.md", *PAGE, "model.json", *(f"onnxruntime/{name}" for name in FILES))
RESAMPLES = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # that pixels.mjs has
JS_MODEL, JS_INT8 = "onnx/model.onnx", "onnx/model_quantized.onnx"  # names that transformers.js asks for
SETTINGS, PROCESSOR = "config.json", "preprocessor_config.json"
TRANSFORMERS_JS_FILES = ("README.md", SETTINGS, PROCESSOR, "tag.mjs", "pixels.mjs", JS_MODEL, JS_INT8)


def read_metadata(path: Path) -> dict[str, str]:
    """What `to_onnx.metadata` wrote into an ONNX file."""
    proto = onnx.load(path, load_external_data=False)
    return {prop.key: prop.value for prop in proto.metadata_props}


def pixel_settings(facts: dict[str, str]) -> dict[str, Any]:
    """What pixels.mjs needs to make the pixels that the model's processor makes.

    Args:
        facts: `read_metadata`.

    Raises:
        ValueError: a processor that pixels.mjs cannot stand in for.
    """
    names = ("rescale_factor", "image_mean", "image_std")
    settings = {name: json.loads(facts[name]) for name in names}
    crops, mode = facts["do_center_crop"] == "true", facts["resize_mode"]
    if facts["resample"] not in RESAMPLES:
        raise ValueError(f"The page resizes by {', '.join(RESAMPLES)}, and this processor by {facts['resample']}.")
    if mode == "pad" and crops:
        raise ValueError("The page can pad an image or crop it, and this processor does both.")
    fill = np.rint(np.float32(settings["image_mean"]) / settings["rescale_factor"]).clip(0, 255)  # as the processor
    return {
        **settings,
        "width": int(facts["image_width"]),
        "height": int(facts["image_height"]),
        "size": json.loads(facts["resize"]),
        "resize_mode": mode,
        "resample": facts["resample"],
        "fill": np.broadcast_to(fill, 3).astype(int).tolist() if mode == "pad" else [0, 0, 0],
    }


def label_settings(facts: dict[str, str]) -> tuple[list[str], list[float]]:
    """Label names and thresholds, 0.5 where none were fitted."""
    labels = json.loads(facts["labels"])
    return labels, json.loads(facts.get("thresholds", "null")) or [0.5] * len(labels)


def write_web(folder: Path, model: Path, title: str, *, heat_map: bool, runtime: Mapping[str, bytes]) -> None:
    """Writes `WEB_FILES` for a model that lies in the folder: a static Space, or any folder behind a web server.

    Args:
        folder: Where to.
        model: The ONNX file in it.
        title: Of the page; shown as text.
        heat_map: Whether the file gives one, see `export_onnx`.
        runtime: Of `runtime_files`.

    Raises:
        ValueError: as `pixel_settings`.
    """
    facts = read_metadata(model)
    labels, thresholds = label_settings(facts)
    settings = {
        "title": title,
        "file": model.name,
        "int8": "quantization" in facts,
        "heat_map": heat_map,
        "labels": labels,
        "thresholds": thresholds,
        **pixel_settings(facts),
    }
    _write_json(folder / "model.json", settings)
    for name in PAGE:
        (folder / name).write_bytes((BROWSER / name).read_bytes())
    card = (BROWSER / "space.md").read_text(encoding="utf-8").replace("VERSION", VERSION)
    # In the front matter, which is YAML, as text whatever it holds.
    (folder / "README.md").write_text(
        card.replace("title: TITLE", f"title: {json.dumps(title, ensure_ascii=False)}"), encoding="utf-8"
    )
    (folder / "onnxruntime").mkdir()
    for name, data in runtime.items():
        (folder / "onnxruntime" / name).write_bytes(data)


def write_transformers_js(folder: Path, model: Path, int8: Path) -> None:
    """Writes `TRANSFORMERS_JS_FILES` for two models that lie in the folder, which it moves.

    Args:
        folder: Where to.
        model, int8: ONNX files of the standard layout in it.

    Raises:
        ValueError: as `pixel_settings`.
    """
    facts = read_metadata(model)
    labels, thresholds = label_settings(facts)
    pixels = pixel_settings(facts)
    config = {
        "model_type": "vit",  # any type that transformers.js knows an image classifier of: the graph is in the file
        "architectures": ["ViTForImageClassification"],
        "problem_type": "multi_label_classification",
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "thresholds": thresholds,
        "thresholds_q8": label_settings(read_metadata(int8))[1],
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": pixels["height"], "width": pixels["width"]},
        "resample": int(facts["resample_number"]),
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        **{name: pixels[name] for name in ("rescale_factor", "image_mean", "image_std")},
        "pixels": pixels,  # for pixels.mjs
    }
    _write_json(folder / SETTINGS, config)
    _write_json(folder / PROCESSOR, processor)
    for name in ("tag.mjs", "pixels.mjs"):
        (folder / name).write_bytes((BROWSER / name).read_bytes())
    (folder / "README.md").write_bytes((BROWSER / "transformers_js.md").read_bytes())
    (folder / "onnx").mkdir()
    model.rename(folder / JS_MODEL)
    int8.rename(folder / JS_INT8)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
