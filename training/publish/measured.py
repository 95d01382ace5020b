"""What a run says about itself, as far as it holds for the checkpoint that is published, and without paths."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.public_names import is_path, last_name, without_paths
from ..config import TrainingConfig
from ..data.built_in import BUILT_IN
from ..scoring.measured_with import still_true, weights_of

PATH_OPTIONS = [field.name for field in dataclasses.fields(TrainingConfig) if field.metadata.get("path")]
# Their Hub ids are pinned (`check_pinned`): without a revision beside it, one of these is a folder.
PINNED = ("backbone", "label_encoder", "init_from")


def checkpoint_of(run: Path) -> Path:
    """best/ of a run; a checkpoint's own folder."""
    return run / "best" if (run / "best").is_dir() else run


def read_config(run: Path, folder: Path) -> dict:
    """config.json of what is published; where `folder` is an adapter, that of the run, or else what its processor
    holds of it."""
    config = read_json(folder / "config.json") or read_json(checkpoint_of(run) / "config.json")
    processor = read_json(folder / "processor_config.json")
    return config or {name: processor[name] for name in ("id2label", "thresholds") if name in processor}


def read_results(run: Path, config: dict) -> tuple[dict, list[str]]:
    """See `still_true`: of the run's results.json."""
    return still_true(read_json(run / "results.json"), config, weights_of(checkpoint_of(run), config))


def read_evaluation(run: Path, config: dict) -> tuple[dict, list[dict], list[str]]:
    """What `still_true` leaves of the evaluation's results.json, and of the rows of its per_label.csv; what changed."""
    weights = weights_of(checkpoint_of(run), config)
    record, changed = still_true(read_json(evaluation_file(run, "results.json")), config, weights)
    path = evaluation_file(run, "per_label.csv")
    if not record or not path.is_file():
        return record, [], changed
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if "CP" not in record["metrics"]:
        rows = [{name: row[name] for name in ("label", "positives", "known", "AP") if name in row} for row in rows]
    return record, rows, changed


def evaluation_file(run: Path, name: str) -> Path:
    """A file that `hsvlt evaluate --output RUN/evaluation` wrote, or else the end of training, into RUN/report."""
    path = Path(run) / "evaluation" / name
    return path if path.is_file() else Path(run) / "report" / name


def read_options(run: Path) -> dict:
    """The options of a run as others may see them: of each folder and file its last name."""

    def unless_hub_id(text: str) -> str:
        return text if is_hub_id(text) else last_name(text)

    raw = read_raw_options(run)
    options = without_paths(raw)
    for name in PATH_OPTIONS:
        if name in raw:
            is_folder = name in PINNED and not raw.get(f"{name}_revision")
            options[name] = without_paths(raw[name], last_name if is_folder else unless_hub_id)
    if options.get("dataset") in BUILT_IN and raw["dataset"] != options["dataset"]:  # a folder of that name is another
        options["dataset"] = f"./{options['dataset']}"
    return options


def read_raw_options(run: Path) -> dict:
    """config.yaml of a run, as it lies there. Raises a ValueError as `read_json` does."""
    return _mapping(run / "config.yaml", yaml.safe_load)


def read_json(path: Path) -> dict:
    """What a file of ours holds; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    return _mapping(path, json.loads)


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict:
    try:
        values = parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); write it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(values).__name__}; write it again.")
    return values


def is_hub_id(text: str) -> bool:
    """Whether a text can be the name of a repository, "org/name", and is no folder here."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", text)) and not is_path(text)
