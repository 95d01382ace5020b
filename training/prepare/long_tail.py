"""Long-tailed and few-shot multi-label data: the published splits, the same construction for any data, and episodes.

    # COCO-LT or VOC-LT, from the published lists (of the Distribution-Balanced Loss) over your own COCO or VOC images
    python -m training.prepare.long_tail lists coco coco_lt_train.txt coco_lt_test.txt COCO_FOLDER TARGET
    # a long-tailed draw of the train split of any multi-label data set, by the construction of those splits
    python -m training.prepare.long_tail draw DATASET TARGET --largest 800
    # few-shot episodes: base labels to train on, and for the novel ones small sets to learn from
    python -m training.prepare.long_tail episodes DATASET TARGET --novel cat dog sofa --shots 5

An episode is a data set of its own, to be trained in a run of its own (`--init_from` the base run), so that neither the
model nor the optimizer of one episode reaches the next.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..check.imbalance import long_tail_groups
from ..data.load import load
from ..data.rows import Split
from ..data.sparse_labels import SparseLabels
from ..options import CommandParser, DatasetOptions, dataset_options, refuse
from .reading import Rows, text_lines
from .write import write_dataset

# fmt: off
COCO_LABELS = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]
VOC_LABELS = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]
COCO_POSITIVES = [
    1128, 37, 276, 32, 9, 41, 18, 87, 20, 50, 11, 13, 8, 97, 19, 49, 70, 17, 7, 10, 8, 6, 7, 7, 100, 39, 189, 31, 24,
    11, 12, 8, 35, 10, 25, 21, 17, 10, 20, 460, 84, 498, 126, 207, 173, 366, 39, 35, 44, 36, 29, 25, 14, 45, 16, 73,
    585, 153, 164, 44, 624, 25, 200, 137, 70, 89, 73, 127, 91, 175, 9, 237, 119, 292, 87, 113, 15, 21, 6, 11,
]
VOC_POSITIVES = [6, 34, 8, 14, 154, 17, 249, 29, 479, 4, 240, 48, 11, 20, 775, 100, 5, 82, 7, 64]
# fmt: on


@dataclass(frozen=True)
class PublishedSplit:
    """What a published long-tailed split must hold: images of train and test, and the positives of train by label.

    Counted in the published lists, which are the same byte by byte in the repositories that carry them.
    """

    label_names: list[str]
    num_train: int
    num_test: int
    positives: list[int]


PUBLISHED = {
    "coco": PublishedSplit(COCO_LABELS, 1909, 5000, COCO_POSITIVES),
    "voc": PublishedSplit(VOC_LABELS, 1142, 4952, VOC_POSITIVES),
}


def read_list(path: Path, num_labels: int) -> list[tuple[str, list[int]]]:
    """The images of a list and their label indices, in order.

    Args:
        path: One line an image: its path, then label indices; possibly none, possibly a blank at the end.
        num_labels: Indices go from 0 to `num_labels - 1`.

    Raises:
        FileNotFoundError, ValueError: no such file; or, with the line, a word that is no such index, or one twice.
    """
    rows = []
    for number, line in enumerate(text_lines(path), 1):
        image, *words = line.split() or [""]
        if not image or Path(image).is_absolute() or ".." in Path(image).parts:
            raise ValueError(f"{path}, line {number} is {line!r}, but must begin with a path below the images.")
        for word in words:
            if not word.isascii() or not word.isdigit() or int(word) >= num_labels:
                raise ValueError(
                    f"{path}, line {number}: {word!r} is no label index; use 0 to {num_labels - 1}, in class order."
                )
        labels = [int(word) for word in words]
        if len(set(labels)) < len(labels):
            raise ValueError(f"{path}, line {number}: {line!r} names a label twice; keep one.")
        rows.append((image, labels))
    return rows


def pareto_targets(num_labels: int, largest: int, smallest: int = 1, shape: float = 6.0) -> np.ndarray:
    """The target counts that COCO-LT (`largest=1200`) and VOC-LT (800) were drawn by.

    The density of a Pareto distribution of this shape at `num_labels` evenly spaced points from its 0 to its 0.99
    quantile, scaled to fall from `largest` towards `smallest`.

    Returns:
        (num_labels,) int64, falling.

    Raises:
        ValueError: counts that do not fall.
    """
    if not 1 <= smallest <= largest:
        raise ValueError(f"The counts must fall, but largest is {largest} and smallest {smallest}.")
    points = np.linspace(1.0, (1 - 0.99) ** (-1 / shape), num_labels)
    density = points ** (-shape - 1)  # over its value at 1, which is `shape`
    return (density * (largest - smallest) + smallest).astype(np.int64)


def co_occurrence_order(present: np.ndarray) -> np.ndarray:
    """Labels by the sum over all labels i of the share of i's images that show them as well, largest first.

    Args:
        present: (images, num_labels) bool.
    """
    counts = present.T.astype(np.float64) @ present.astype(np.float64)
    shares = counts / np.maximum(counts.diagonal(), 1)[:, None]
    return np.argsort(-shares.sum(0), kind="stable")


def draw_long_tail(present: np.ndarray, targets: Sequence[int], *, seed: int = 0) -> np.ndarray:
    """Draws images so that label counts fall as `targets` do, by the construction of COCO-LT and VOC-LT.

    Labels are visited in `co_occurrence_order`, and the i-th of them gets the i-th target: random images that show
    it are added until there are so many (or no more), or, where those drawn for labels before it already bring more,
    random ones of them are taken out again. Counts of labels visited early therefore end off their targets; that of
    the last one is exact.

    Args:
        present: (images, num_labels) bool.
        targets: (num_labels,), see `pareto_targets`.
        seed: Decides the draws. The published lists came from another generator: this does not give them again.

    Returns:
        Rising indices of the images drawn.

    Raises:
        ValueError: another number of targets than labels.
    """
    if len(targets) != present.shape[1]:
        raise ValueError(f"There are {len(targets)} targets for {present.shape[1]} labels.")
    random = np.random.default_rng(seed)
    drawn = np.zeros(len(present), dtype=bool)
    for label, target in zip(co_occurrence_order(present), targets, strict=True):
        missing = int(target) - int((drawn & present[:, label]).sum())
        candidates = np.flatnonzero(present[:, label] & (drawn != (missing > 0)))
        chosen = random.permutation(candidates)[: abs(missing)]
        drawn[chosen] = missing > 0
    return np.flatnonzero(drawn)


def draw_episode(present: np.ndarray, shots: int, *, seed: int = 0) -> np.ndarray:
    """Draws a support set in which each label occurs `shots` times, or more where others bring it along.

    Args:
        present: (images, num_labels) bool, of the novel labels alone.

    Returns:
        Rising indices of the images drawn.

    Raises:
        ValueError: a label with fewer images than `shots`.
    """
    if (few := np.flatnonzero(present.sum(0) < shots)).size:
        raise ValueError(f"Label {few[0]} has {present[:, few[0]].sum()} images, fewer than {shots} shots.")
    random = np.random.default_rng(seed)
    drawn = np.zeros(len(present), dtype=bool)
    for label in random.permutation(present.shape[1]):
        missing = shots - int((drawn & present[:, label]).sum())
        if missing > 0:
            drawn[random.permutation(np.flatnonzero(present[:, label] & ~drawn))[:missing]] = True
    return np.flatnonzero(drawn)


def is_present(labels: SparseLabels) -> np.ndarray:
    """(images, num_labels) bool: what is shown; unknown labels are not."""
    present = np.zeros((len(labels), labels.num_labels), dtype=bool)
    rows = np.repeat(np.arange(len(labels)), np.diff(labels.starts))
    shown = labels.values >= 0.5
    present[rows[shown], labels.ids[shown]] = True
    return present


def _with_labels(split: Split, rows: np.ndarray, present: np.ndarray, label_names: list[str]) -> Split:
    """These rows of a split with the labels of `present` (rows, num_labels) alone."""
    ids = pa.array([np.flatnonzero(row) for row in present], pa.list_(pa.int64()))
    return replace(split.select(rows), labels=SparseLabels.from_arrow(ids, label_names, label_format="ids"))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.target.exists():
            raise FileExistsError(f"{args.target} exists: delete it, or choose another TARGET.")
        {"lists": _write_lists, "draw": _write_draw, "episodes": _write_episodes}[args.kind](args)
    except (ValueError, OSError) as error:
        return refuse(error)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m training.prepare.long_tail", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    lists = kinds.add_parser("lists", help="COCO-LT or VOC-LT from the published lists")
    lists.add_argument("name", choices=tuple(PUBLISHED))
    lists.add_argument("train_list", type=Path, help="coco_lt_train.txt or voc_lt_train.txt")
    lists.add_argument("test_list", type=Path, help="coco_lt_test.txt or voc_lt_test.txt")
    lists.add_argument("images", type=Path, help="where the lists' paths start: holds train2017/ or VOCdevkit/")
    lists.add_argument("--missing_images", choices=("error", "skip"), default="error", help="listed but not there")
    draw = kinds.add_parser("draw", dataclass_types=DatasetOptions, help="a long-tailed draw of a train split")
    draw.add_argument(
        "--largest", type=int, required=True, help="count of the most frequent label, about (VOC-LT: 800)"
    )
    draw.add_argument("--smallest", type=int, default=1, help="count of the rarest label")
    draw.add_argument("--seed", type=int, default=0, help="of what is drawn")
    episodes = kinds.add_parser("episodes", dataclass_types=DatasetOptions, help="few-shot episodes")
    episodes.add_argument("--novel", nargs="+", required=True, metavar="LABEL", help="the labels of the episodes")
    episodes.add_argument("--shots", type=int, default=1, help="images of each novel label")
    episodes.add_argument("--episodes", type=int, default=10, help="how many")
    episodes.add_argument(
        "--mixed",
        choices=("keep", "drop"),
        default="keep",
        help="images with base and novel labels: keep, without the labels of the other side (LaSO's COCO split), or "
        "drop (the VOC split)",
    )
    episodes.add_argument("--seed", type=int, default=0, help="of what is drawn")
    for kind in (lists, draw, episodes):
        kind.add_argument("target", metavar="TARGET", type=Path, help="folder to make; refused if it exists")
    return parser


def _write_lists(args: argparse.Namespace) -> None:
    published = PUBLISHED[args.name]
    rows = Rows(args.images, args, unlisted=False)
    for split, path, num_images in (
        ("train", args.train_list, published.num_train),
        ("test", args.test_list, published.num_test),
    ):
        listed = read_list(path, len(published.label_names))
        for number, (image, labels) in enumerate(listed, 1):
            rows.add(split, [image], [published.label_names[label] for label in labels], f"{path}, line {number}")
        counts = np.bincount([label for _, labels in listed for label in labels], minlength=len(published.label_names))
        same = len(listed) == num_images and (split != "train" or counts.tolist() == published.positives)
        print(f"{path}: {len(listed):,} images, {counts.sum():,} labels: {'' if same else 'NOT '}the published split")
    _write(rows.reading(published.label_names).splits, published.label_names, args.target)


def _write_draw(args: argparse.Namespace) -> None:
    loaded = load(args.dataset, **dataset_options(args))
    splits, label_names = loaded.splits, loaded.label_names
    if "train" not in splits:
        raise ValueError(f"{args.dataset} has no train split to draw from, only {', '.join(splits)}.")
    present = is_present(splits["train"].labels)
    rows = draw_long_tail(present, pareto_targets(len(label_names), args.largest, args.smallest), seed=args.seed)
    _write({**splits, "train": splits["train"].select(rows)}, label_names, args.target)


def _write_episodes(args: argparse.Namespace) -> None:
    loaded = load(args.dataset, **dataset_options(args))
    splits, label_names = loaded.splits, loaded.label_names
    query = next((name for name in ("test", "validation") if name in splits), None)
    if "train" not in splits or query is None:
        raise ValueError(f"{args.dataset} needs a train split and a test or validation split; it has {list(splits)}.")
    for name in args.novel:
        if name not in label_names:
            raise ValueError(f"--novel {name!r} is not among the {len(label_names)} label names; correct it.")
    present = {name: is_present(split.labels) for name, split in splits.items()}

    def side(name: str, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The split's rows that show one of these labels, and what they show of them."""
        here = present[name][:, labels]
        shown = here.any(1)
        if args.mixed == "drop":
            shown &= present[name].sum(1) == here.sum(1)
        rows = np.flatnonzero(shown)
        return rows, here[rows]

    novel = [label_names.index(name) for name in args.novel]
    base = [label for label in range(len(label_names)) if label not in novel]
    names = [label_names[label] for label in base]
    parts = {name: _with_labels(split, *side(name, base), names) for name, split in splits.items()}
    _write(parts, names, args.target / "base")
    rows, here = side("train", novel)
    queries = _with_labels(splits[query], *side(query, novel), args.novel)
    for episode in range(args.episodes):
        drawn = draw_episode(here, args.shots, seed=args.seed + episode)
        support = _with_labels(splits["train"], rows[drawn], here[drawn], args.novel)
        _write({"train": support, "test": queries}, args.novel, args.target / f"episode-{episode:02}")


def _write(splits: dict[str, Split], label_names: list[str], target: Path) -> None:
    counts = splits["train"].labels.positives()
    groups = ", ".join(f"{len(labels)} {name}" for name, labels in long_tail_groups(counts).items())
    print(f"{target}: {', '.join(f'{len(split):,} in {name}' for name, split in splits.items())}; labels: {groups}")
    print(f"  positives in train: {counts.tolist()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_dataset(splits, label_names, target)


if __name__ == "__main__":
    raise SystemExit(main())
