"""The folder that `hsvlt evaluate --output` writes: results.json, per_label.csv and report.html.

The page needs no server, no network and no file beside it: plots and images are data URIs. Whatever text it shows is
escaped, for names of labels and files may hold markup.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import numpy as np
from transformers import BaseImageProcessor, PreTrainedModel

from ..checkpoint.atomic import write_file
from ..metrics.functional import decision_report, per_label_report
from ..metrics.glossary import AP_DEFINITION, FIGURES, HEAT_MAPS
from ..publish.card_page import templates
from ..say import counted
from ..scoring.calibration import stored_calibration
from ..scoring.held_out import held_out_decisions
from ..scoring.measured_with import fingerprints
from ..scoring.predict import ScoredSplit
from ..scoring.reliability import NUM_BINS, Reliability, reliability
from ..scoring.thresholds import fit_record
from .heat_maps import SCALE_WORDS, draw_explained, explain_found_labels, heat_map_page
from .mistakes import co_occurrence_confusion, confident_mistakes, confusion_page, mistake_page
from .plots import MIN_COUNT, plot_long_tail, plot_precision_recall, plot_reliability, svg_uri

HEADLINES = ("mAP", "mAP_voc07", "mAP_voc10", "mAP_micro", "mAP_weighted", "LRAP", "ranking_loss", "coverage_error")
DECISIONS = ("f1_macro", "f1_micro", "CP", "CR", "CF1", "OP", "OR")


def compare_thresholds(scores: np.ndarray, labels: np.ndarray, config, threshold: float | str) -> dict[str, dict]:
    """`DECISIONS` at 0.5, at thresholds fitted to other images, and at those in use.

    "fitted, held out" is fitted to a random half of the images, measured on the other half, and the other way round,
    as the checkpoint's own were (`config.threshold_info`; else for F1). It is missing where the halves are too small.
    """

    def measure(scores: np.ndarray, threshold: float | np.ndarray = 0.5) -> dict[str, float]:
        report = decision_report(scores, labels, threshold)
        return {name: report[name] for name in DECISIONS}

    rows = {"0.5 for every label": measure(scores)}
    if threshold not in ("auto", 0.5):
        rows[f"{threshold:g} for every label"] = measure(scores, threshold)
    info = getattr(config, "threshold_info", None) or {}
    how = {name: info[name] for name in ("objective", "target", "min_positives") if name in info}
    decided = held_out_decisions(scores, labels, **how)
    if decided is not None:
        rows["fitted, held out"] = measure(decided.astype(np.float32))
    if getattr(config, "thresholds", None) is not None:
        same = info.get("split_fingerprint") == fit_record(labels, dataset="", split="")["split_fingerprint"]
        words = "the checkpoint's" + (", fitted to these very images" if same else "")
        rows[words] = measure(scores, np.array(config.thresholds))
    return rows


def calibration_stages(scores: np.ndarray, labels: np.ndarray, config) -> dict[str, Reliability]:
    """Reliability of the scores; before the calibration as well where the checkpoint holds one."""
    calibration = stored_calibration(config)
    if calibration is None:
        return {"scores": reliability(scores, labels)}
    before = calibration.inverse().apply(scores)
    return {"before calibration": reliability(before, labels), "calibrated": reliability(scores, labels)}


def write_tables(folder: Path, results: dict, label_names: Sequence[str], columns: Mapping[str, list]) -> None:
    """Writes results.json, and per_label.csv with one row per label (empty where a value is not defined)."""
    write_file(folder / "results.json", json.dumps(results, indent=1) + "\n")
    with StringIO(newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["label", *columns])
        for name, *values in zip(label_names, *columns.values(), strict=True):
            writer.writerow([name, *("" if math.isnan(value) else value for value in values)])
        write_file(folder / "per_label.csv", table.getvalue())


def write_report(
    folder: Path, results: dict, scored: ScoredSplit, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> None:
    """Writes results.json, per_label.csv and report.html into `folder`; heat_maps.png where there are heat maps.

    Args:
        results: Of `result_record`, for results.json; the comparison of thresholds and the calibration error are added.
        scored: The split, with undecoded images; its `counts` are for the long-tail plot, of the split `count_split`,
            or without them those of the split itself.
        model, image_processor: What scored it; shows what spoke for labels that were found rightly.
    """
    (label_names, scores, labels, rows, counts), config = scored, model.config
    threshold = config.thresholds if results["threshold"] == "auto" else results["threshold"]
    per_label = per_label_report(scores, labels, threshold, label_names=label_names)
    thresholds = np.array(per_label["threshold"], dtype=scores.dtype)
    comparison = compare_thresholds(scores, labels, config, results["threshold"])
    stages = calibration_stages(scores, labels, config)
    results["thresholds_compared"] = comparison
    results["calibration_error"] = {
        words: {"ECE": bins.ece(), "ECE_per_label": float(np.nanmean(bins.ece_per_label()))}
        for words, bins in stages.items()
    }
    average_precision = np.array(per_label["AP"], dtype=np.float64)
    counted_in, positives = results["split"], np.array(per_label["positives"])
    columns = {"positives": per_label["positives"], **per_label}
    if counts is not None:
        counted_in, positives = results["count_split"], counts
        columns = {f"positives in {counted_in}": positives.tolist(), **columns}
    columns["ECE"] = list(stages.values())[-1].ece_per_label().tolist()
    explained = explain_found_labels(model, image_processor, rows, scores, labels, thresholds)
    page = {
        "heat_maps": heat_map_page(explained),
        "heat_map_meaning": HEAT_MAPS.get(config.model_type),
        "scale_words": SCALE_WORDS,
        "results": results,
        "metrics": results["metrics"],
        "headlines": {name: FIGURES[name] for name in HEADLINES},
        "decisions": {name: FIGURES[name] for name in DECISIONS},
        "comparison": comparison,
        "num_bins": NUM_BINS,
        "min_count": MIN_COUNT,
        "columns": list(columns),
        "table": list(zip(label_names, *columns.values(), strict=True)),
        "plots": {
            "long_tail": svg_uri(plot_long_tail(average_precision, positives, label_names, counted_in)),
            "precision_recall": svg_uri(plot_precision_recall(scores, labels, average_precision, label_names)),
            "reliability": svg_uri(plot_reliability(stages)),
        },
        "false_positives": mistake_page(
            confident_mistakes(scores, labels, thresholds, "false positives"), labels, rows, label_names
        ),
        "misses": mistake_page(confident_mistakes(scores, labels, thresholds, "misses"), labels, rows, label_names),
        "confusion": confusion_page(co_occurrence_confusion(scores, labels, thresholds), label_names),
        "threshold_info": getattr(config, "threshold_info", None),
        "calibration_info": getattr(config, "calibration_info", None),
    }
    environment = templates(*Path(__file__).parents[:2], autoescape=True)
    environment.filters["counted"] = counted
    html = environment.get_template("template.html").render(page)
    folder.mkdir(parents=True, exist_ok=True)
    write_tables(folder, results, label_names, columns)
    if explained:
        write_file(folder / "heat_maps.png", draw_explained(explained))
    write_file(folder / "report.html", html)


def result_record(
    metrics: dict,
    config,
    *,
    weights: str | None,
    checkpoint: str,
    dataset: str,
    split: str,
    threshold: float | str,
    revision: str | None = None,
    dataset_revision: str | None = None,
    count_split: str | None = None,
) -> dict:
    """What the results.json of a report holds: metrics, and of what they are; `config` is the model's, and `weights` of
    `weights_of`, from when they were loaded."""
    return {
        "checkpoint": checkpoint,
        "revision": revision,
        "dataset": dataset,
        "dataset_revision": dataset_revision,
        "split": split,
        "count_split": count_split,
        "threshold": threshold,
        "weights": weights,
        "measured_with": fingerprints(config.to_dict()),
        "ap_definition": AP_DEFINITION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "metrics": metrics,
    }
