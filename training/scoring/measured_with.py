"""Whether scores still belong to a checkpoint: it may have got other weights, names, thresholds or calibration since.

Its files alone hold those; a file of scores keeps a fingerprint of each, as `weights` and `measured_with`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from modeling_hsvlt.label_names import in_order

AT_THRESHOLDS = "_at_thresholds"
RANKING = ("mAP_micro", "LRAP", "ranking_loss", "coverage_error")  # of scores of several labels


def names_of(config: Mapping) -> list[str]:
    """Label names in class order, of what config.json holds."""
    return in_order(config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"})  # transformers leaves these two out


def fingerprints(config: Mapping) -> dict[str, str | None]:
    """Of the names, thresholds and calibration that config.json holds; None for what it does not."""
    calibration = config.get("calibration_info")
    values = {
        "label_names": names_of(config),
        "thresholds": config.get("thresholds"),
        "calibration": calibration and [calibration["scale"], calibration["bias"]],
    }
    return {
        name: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] if value else None
        for name, value in values.items()
    }


def weights_of(folder: str | Path, config: Mapping) -> str | None:
    """Fingerprint of a checkpoint's weights as they were trained: of its files, or of those that calibration changed.
    None where no weights lie in `folder`, a Hub id for example."""
    if (before := (config.get("calibration_info") or {}).get("weights")) is not None:
        return before
    digest, files = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else None


def still_true(results: Mapping, config: Mapping, weights: str | None = None) -> tuple[dict, list[str]]:
    """What of a file of scores holds for the checkpoint as it is now.

    Args:
        results: A results.json, of a run or of `training.evaluate`.
        config: The checkpoint's config.json.
        weights: Of `weights_of`; None, or where `results` has none: they are taken for the same.

    Returns:
        What holds, and what is another since: "weights", and which of `fingerprints` (all of them, where `results` does
        not say). With other weights or names nothing holds; with other thresholds no decision at the old ones; with
        another calibration only what the order within each label decides, that is the mAP.
    """
    before = results.get("measured_with") or {}
    changed = [name for name, value in fingerprints(config).items() if name not in before or before[name] != value]
    if weights is not None and results.get("weights") not in (None, weights):
        changed.insert(0, "weights")
    if not results or not changed:
        return dict(results), []
    if "weights" in changed or "label_names" in changed:
        return {}, changed
    of_both = ("thresholds_compared", "calibration_error")
    kept = {name: value for name, value in results.items() if not name.endswith(AT_THRESHOLDS) and name not in of_both}
    decisions_hold = "calibration" not in changed and results.get("threshold") != "auto"
    for name in ("validation", "test", "metrics"):
        if name in kept:
            kept[name] = {
                key: value
                for key, value in kept[name].items()
                if (key.startswith(("mAP", "num_")) and key not in RANKING)
                or ("calibration" not in changed if key in RANKING else decisions_hold)
            }
    return kept, changed
