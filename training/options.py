"""Options that several commands share: where a data set is and how to read it, and what is scored."""

import argparse
import json


def add_dataset_arguments(parser: argparse.ArgumentParser, name: str = "dataset") -> None:
    """The options that `load_from_arguments` reads; as "--dataset" the data set itself is an option as well."""
    parser.add_argument(name, metavar="DATASET", help="folder, Hub id, or scenes")
    parser.add_argument("--dataset_revision", help="commit of a DATASET on the Hub")
    parser.add_argument("--dataset_config", help="configuration of a DATASET on the Hub")
    parser.add_argument(
        "--label_names", nargs="+", help="class order; default: labels.txt, else what the data set says"
    )
    parser.add_argument("--image_column", default="image", help="default: image")
    parser.add_argument("--label_column", default="labels", help="default: labels")
    parser.add_argument("--label_columns", nargs="+", help="one column a label, in place of label_column")
    parser.add_argument("--label_separator", default=",", help="between the labels of a text; default: a comma")
    parser.add_argument("--picture_folder", help="where the file names of a CSV start; default: where the CSV is")
    parser.add_argument("--label_format", default="auto", help="names, ids or multi_hot; default: by the column's type")


def add_scoring_arguments(parser: argparse.ArgumentParser, dataset: str = "dataset") -> None:
    """The options that `load_checkpoint` and `score_split` read; `dataset` as in `add_dataset_arguments`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id")
    add_dataset_arguments(parser, dataset)
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument("--revision", help="commit of a CHECKPOINT on the Hub")
    parser.add_argument(
        "--use_checkpoint_labels",
        action="store_true",
        help="read the labels with the checkpoint's vocabulary, for data that brings none of its own",
    )
    parser.add_argument("--exclude", help="list of rows to leave out: exclude.txt of training.check_data")
    for name, which in (("missing", "rows whose file does not exist"), ("unlisted", "files that no row names")):
        parser.add_argument(
            f"--{name}_pictures",
            choices=("error", "skip"),
            default="error",
            help=f"{which}; skip leaves them out and says so; default: error",
        )
    parser.add_argument("--scenes", type=json.loads, help="knobs of the built-in scenes, as JSON: '{\"seed\": 1}'")
    parser.add_argument("--batch_size", type=int, default=32, help="pictures per device; default: 32")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode pictures; default: 0")


def number_or_auto(text: str) -> float | str:
    """The type of --threshold."""
    return text if text == "auto" else float(text)
