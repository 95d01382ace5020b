"""Whatever `training.data.load.load` reads: image folders, CSV tables, parquet, data sets of the
Hub; with labels as lists of names or ids, multi-hot lists, text, or one column a label."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.csv_table import find_csv_tables
from ..data.label_names import read_label_names
from ..data.load import load
from .reading import Reading

HELP = {
    "csv": "CSV with file names, and labels as text or one column a label",
    "imagefolder": "images beside a metadata.jsonl or metadata.csv",
    "dataset": "parquet, save_to_disk, or a data set of the Hub",
}
SOURCE = {
    "csv": "a CSV file, or a folder of SPLIT.csv or SPLIT/metadata.csv",
    "imagefolder": "a folder with SPLIT/metadata.jsonl",
    "dataset": "a folder, or the id of a data set on the Hub",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset_revision", help="commit of a SOURCE on the Hub")
    parser.add_argument("--dataset_config", help="configuration of a SOURCE on the Hub")
    parser.add_argument(
        "--label_names", type=Path, help="class order: a labels.txt, one name a line, or a tagger's selected_tags.csv"
    )
    parser.add_argument("--image_column", default="image", help="default: image, in a CSV also file_name")
    parser.add_argument("--label_column", default="labels", help="default: labels")
    parser.add_argument("--label_columns", nargs="+", help="one column a label: 1, 0, empty for unknown")
    parser.add_argument("--label_format", default="auto", help="names, ids or multi_hot; default: by the column's type")
    parser.add_argument("--label_separator", default=",", help="between the labels of a text; default: a comma")
    parser.add_argument("--image_folder", type=Path, help="where file names of a CSV start; default: its folder")
    parser.add_argument(
        "--unlisted_images",
        choices=("error", "skip"),
        default="error",
        help="images that no row names; skip leaves them out and says so; default: error",
    )


def read(args: argparse.Namespace) -> Reading:
    """Raises ValueError or FileNotFoundError, in one sentence with file, line and label."""
    source = Path(args.source)
    if args.kind == "csv" and not find_csv_tables(source):
        raise FileNotFoundError(f"{source} is no CSV file and has no SPLIT.csv or SPLIT/metadata.csv; give one.")
    if args.kind == "imagefolder" and not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder; give one with SPLIT/metadata.jsonl beside the images.")
    loaded = load(
        args.source,
        dataset_revision=args.dataset_revision,
        dataset_config=args.dataset_config,
        label_names=read_label_names(args.label_names) if args.label_names else None,
        image_column=args.image_column,
        label_column=args.label_column,
        label_columns=args.label_columns,
        label_format=args.label_format,
        label_separator=args.label_separator,
        image_folder=args.image_folder,
        unlisted_images=args.unlisted_images,
        missing_images=args.missing_images,
    )
    names = {name: name for name in loaded.splits}
    return Reading(splits=loaded.splits, label_names=loaded.label_names, usual_names=names)
