"""Whatever `training.data.load.load` reads, with the options of every command: image folders, CSV tables, parquet, data
sets of the Hub; with labels as lists of names or ids, multi-hot lists, text, or one column a label."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.csv_table import find_csv_tables
from ..data.load import load
from ..options import DatasetOptions, dataset_options
from .reading import Reading

Options = DatasetOptions


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file, line and label."""
    source = Path(args.dataset)
    if args.kind == "csv" and not find_csv_tables(source):
        raise FileNotFoundError(f"{source} is no CSV file and has no SPLIT.csv or SPLIT/metadata.csv; give one.")
    if args.kind == "imagefolder" and not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder; give one with SPLIT/metadata.jsonl beside the images.")
    loaded = load(args.dataset, **dataset_options(args))
    names = {name: name for name in loaded.splits}
    return Reading(splits=loaded.splits, label_names=loaded.label_names, usual_names=names)
