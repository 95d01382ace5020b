"""The int8 file: its scores differ, so its thresholds are fitted again, and what that costs is said."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnx
from accelerate import Accelerator
from transformers import BaseImageProcessor, PreTrainedModel

from ..metrics.functional import average_precision, decision_report
from ..metrics.glossary import shown
from ..options import ScoringOptions
from ..say import counted
from ..scoring.predict import load_scored, score_split
from ..scoring.thresholds import MIN_POSITIVES, fit_thresholds, threshold_info
from .to_onnx import OnnxClassifier, quantize_int8, write_metadata


def quantize_and_refit(
    model: PreTrainedModel, processor: BaseImageProcessor, source: Path, target: Path, args: ScoringOptions
) -> None:
    """Writes the int8 file with thresholds fitted to its own scores, and prints what that costs."""
    quantize_int8(source, target)
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
    _name(source, target, {"thresholds": json.dumps(fitted.tolist()), "threshold_info": json.dumps(info)})


def quantize_alone(source: Path, target: Path) -> None:
    """Writes the int8 file with the thresholds of the other, for which no data are needed."""
    quantize_int8(source, target)
    _name(source, target, {})


def _name(source: Path, target: Path, changes: dict[str, str]) -> None:
    """Gives the int8 file the metadata of its source, with these changes."""
    proto = onnx.load(target)
    props = {prop.key: prop.value for prop in onnx.load(source, load_external_data=False).metadata_props}
    write_metadata(proto, {**props, **changes, "quantization": "dynamic int8 of linear layers"})
    onnx.save(proto, target)
