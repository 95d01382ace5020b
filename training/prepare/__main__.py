"""`hsvlt prepare auto SOURCE TARGET`: a data set in its own format becomes a Hugging Face dataset.

`auto` says what SOURCE is, by its structure; each format has a name of its own as well, with its options.

TARGET is a folder of parquet shards with the images in them, which `datasets.load_dataset` and the commands of this
folder read, and which can be uploaded as it is. Counts are printed beside the published ones.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import CommandParser, refuse
from ..say import counted, say_next

if TYPE_CHECKING:
    import numpy as np

    from ..data.sparse_labels import SparseLabels
    from .reading import Reading

# The module that reads a kind, and what it is; imported when it is asked for.
KINDS = {
    "auto": ("auto", "says what SOURCE is, by its structure, and reads it"),
    "coco": ("coco", "COCO json: instances, LVIS, and the exports of Roboflow, CVAT, Label Studio, FiftyOne"),
    "voc": ("voc", "PASCAL VOC, xml or lists of ImageSets/Main, and xml beside images"),
    "nuswide": ("nuswide", "NUS-WIDE's own lists"),
    "csv": (
        "tables",
        "CSV with file names, and labels as text or one column a label: a file, or a folder of SPLIT.csv",
    ),
    "imagefolder": ("tables", "images beside a SPLIT/metadata.jsonl"),
    "dataset": ("tables", "parquet, save_to_disk, or a data set of the Hub"),
    "label_studio": ("label_studio", "Label Studio's JSON, JSON_MIN and CSV"),
    "yolo": ("yolo", "YOLO: labels/*.txt with data.yaml or classes.txt"),
    "objects": ("objects", "tables with a row an object: OpenImages, _annotations.csv"),
    "tag_files": ("tag_files", "images with .txt or .caption files of tags: our sidecars, kohya, boorus"),
    "label_folders": ("label_folders", "a folder for each label; the same image may be in several"),
    "webdataset": ("webdataset", "tar shards of images with .json, .txt or .cls"),
    "chestxray14": ("image_tables", "ChestX-ray14: Data_Entry_2017.csv"),
    "chexpert": ("image_tables", "CheXpert: train.csv, valid.csv"),
    "planet": ("image_tables", "Planet: image_name, tags"),
    "isic": ("image_tables", "ISIC: image and one column a label"),
    "roboflow_csv": ("image_tables", "Roboflow's multi-label _classes.csv"),
}


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(chosen)
    args, _ = parser.parse_known_args(argv)
    from .write import write_dataset

    try:
        if args.kind == "auto":
            from .auto import find

            kind, words = find(args.source)
            print(f"{args.source} is {words}: {kind}.", flush=True)
            argv[argv.index("auto")] = kind
            parser = build_parser(kind)
        args = parser.parse_args(argv)
        if args.target.exists():
            raise FileExistsError(f"{args.target} exists: delete it, or choose another TARGET.")
        reading = select_splits(_reader(args.kind).read(args), args.split)
        if args.without_labels == "drop":
            drop_images_without_labels(reading)
        print(count_table(reading), flush=True)
        write_dataset(reading.splits, reading.label_names, args.target, max_shard_bytes=args.max_shard_mb * 1_000_000)
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("Stopped; nothing is written.", file=sys.stderr)
        return 130
    print(f"Written to {args.target}; load_dataset({str(args.target)!r}) and --dataset {args.target} read it.")
    if "validation" in reading.splits:
        say_next("check", args.target)
    else:
        say_next("split", args.target, f"{args.target}-split", "--fractions", 0.8, 0.1, 0.1)
    return 0


def _reader(kind: str):
    return import_module(f".{KINDS[kind][0]}", __package__)


def build_parser(chosen: str | None) -> CommandParser:
    """The parser of all kinds, with the options of the one that is `chosen`."""
    parser = CommandParser(prog="hsvlt prepare", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (_, words) in KINDS.items():
        if name != chosen:
            kinds.add_parser(name, help=words)
            continue
        module = _reader(name)
        kind = kinds.add_parser(name, dataclass_types=module.Options, help=words, description=module.__doc__)
        kind.add_argument("target", metavar="TARGET", type=Path, help="folder to make; refused if it exists")
        kind.add_argument(
            "--split",
            metavar="NAME=SPLIT",
            type=_pair,
            action="append",
            help="take the source's NAME as SPLIT, and nothing that is not named so (several times)",
        )
        kind.add_argument(
            "--without_labels", choices=("keep", "drop"), default="keep", help="images that show no label"
        )
        kind.add_argument("--max_shard_mb", type=int, default=500, help="of a parquet file, as the Hub advises")
    return parser


def _pair(text: str) -> tuple[str, str]:
    name, _, split = text.partition("=")
    if not name or not split.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=SPLIT, for example val2014=test")
    return name, split


def select_splits(reading: Reading, pairs: list[tuple[str, str]] | None) -> Reading:
    """The splits that `--split` names, under their new names.

    Raises:
        ValueError: a name that the source does not have, or one new name twice.
    """
    if pairs is None:
        pairs = [(name, split) for name, split in reading.usual_names.items() if name in reading.splits]
    for position, (name, split) in enumerate(pairs):
        if name not in reading.splits:
            raise ValueError(f"There is no {name!r}, only {', '.join(reading.splits)}; correct --split.")
        if split in [other for _, other in pairs[:position]]:
            raise ValueError(f"{name!r} is not the only one that would become {split!r}; choose with --split.")
    reading.splits = {split: reading.splits[name] for name, split in pairs}
    reading.published = {split: reading.published[name] for name, split in pairs if name in reading.published}
    return reading


def drop_images_without_labels(reading: Reading) -> None:
    import numpy as np

    for name, split in reading.splits.items():
        rows = np.flatnonzero(_shows_a_label(split.labels))
        print(f"Left out of {name}: {counted(len(split) - len(rows), 'image')} without a label.")
        reading.splits[name] = split.select(rows)


def _shows_a_label(labels: SparseLabels) -> np.ndarray:
    """(rows,) bool."""
    import numpy as np

    rows = np.repeat(np.arange(len(labels)), np.diff(labels.starts))
    return np.bincount(rows[labels.values >= 0.5], minlength=len(labels)) > 0


def count_table(reading: Reading) -> str:
    """Images, images that show a label, unknown entries; beside them what is published for the data set."""
    title = f"   published for {reading.title}" if reading.published else ""
    lines = [f"{'split':<12}{'images':>10}{'with a label':>14}{'positives':>12}{'unknown':>10}{title}"]
    for name, split in reading.splits.items():
        labels = split.labels
        unknown = int((labels.values < 0).sum() + (labels.default != 0).sum() * labels.num_labels)
        shown = int(_shows_a_label(labels).sum())
        line = f"{name:<12}{len(split):>10,}{shown:>14,}{labels.positives().sum():>12,}{unknown:>10,}"
        if name in reading.published:
            images, labelled = reading.published[name]
            line += f"   {counted(images, 'image')}" + (f", {labelled:,} with a label" if labelled else "")
            same = len(split) in (images, labelled) and labelled in (None, shown)
            line += ": the same" if same else ": NOT the same"
        lines.append(line)
    return "\n".join([*lines, counted(len(reading.label_names), "label")])


if __name__ == "__main__":
    raise SystemExit(main())
