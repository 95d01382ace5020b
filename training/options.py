"""Options that commands share: where a data set is, and how to read it."""

import argparse


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
