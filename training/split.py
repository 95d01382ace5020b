"""Divide labelled images into splits in which every label keeps its share.

    hsvlt split DATASET TARGET --fractions 0.8 0.1 0.1

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD 2011)
on sparse labels, with one addition: a label with a positive for every split has one in every split.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .options import DatasetOptions, command, dataset_options, option
from .say import say_next

if TYPE_CHECKING:
    import numpy as np

    from .data.rows import Split

DEFAULT_NAMES = {2: ["train", "validation"], 3: ["train", "validation", "test"]}


@dataclass(kw_only=True)
class SplitOptions(DatasetOptions):
    target: Path = option(reason="new folder; parquet with the images in it", positional=True, metavar="TARGET")
    fractions: list[float] = option(reason="share of each new split, sum 1")
    names: list[str] | None = option(None, "of the new splits; null: train validation [test]")
    divide: list[str] = field(
        default_factory=lambda: ["train"], metadata={"help": "the splits to pool and divide; others are kept"}
    )
    duplicates: Path | None = option(None, "report.json of hsvlt check: copies stay together", metavar="REPORT")
    seed: int = option(0, "the same seed gives the same splits")


def run(args: SplitOptions) -> None:
    """Loads, divides, prints and writes."""
    import numpy as np
    from datasets import concatenate_datasets

    from .data.load import load
    from .data.rows import Split
    from .data.sparse_labels import SparseLabels
    from .prepare.stratify import positives_by_split, stratified_split
    from .prepare.write import write_dataset

    names = args.names or DEFAULT_NAMES.get(len(args.fractions))
    if names is None or len(names) != len(args.fractions) or len(set(names)) != len(names):
        raise ValueError(f"{len(args.fractions)} fractions need as many different --names.")
    if args.target.exists():
        raise FileExistsError(f"{args.target} exists: delete it, or choose another TARGET.")
    data = load(args.dataset, **dataset_options(args))
    loaded, label_names = data.splits, data.label_names
    for name in args.divide:
        if name not in loaded:
            raise ValueError(f"{args.dataset} has no split {name!r} to divide, only {', '.join(loaded)}.")
    kept = {name: split for name, split in loaded.items() if name not in args.divide}
    for name in names:
        if name in kept:
            raise ValueError(
                f"{args.dataset} has a split {name!r} already; divide it too (--divide {' '.join([*args.divide, name])}"
                "), or name the new splits otherwise with --names."
            )
    divided = {name: loaded[name] for name in args.divide}
    labels = SparseLabels.concatenate([split.labels for split in divided.values()])
    pool = Split(concatenate_datasets([split.images for split in divided.values()]), labels)
    groups = None
    if args.duplicates is not None:
        groups = _duplicate_groups(args.duplicates, divided)
    split_of_row = stratified_split(labels, args.fractions, groups=groups, seed=args.seed)
    new = {name: pool.select(np.flatnonzero(split_of_row == i)) for i, name in enumerate(names)}

    counts = positives_by_split(labels, split_of_row, len(names))
    print(
        f"{'':<12}{'images':>10}{'share':>8}{'labels absent':>15}{'positives of a label off by, mean':>36}{'most':>8}"
    )
    for i, (name, fraction) in enumerate(zip(names, args.fractions, strict=True)):
        off = np.abs(counts[i] - fraction * counts.sum(0))
        print(
            f"{name:<12}{len(new[name]):>10,}{len(new[name]) / len(pool):>8.3f}{(counts[i] == 0).sum():>15,}"
            f"{off.mean():>36.2f}{off.max():>8.2f}"
        )
    for name, split in kept.items():
        print(f"{name:<12}{len(split):>10,}  as it was")
    absent = [name for name, present in zip(label_names, (counts > 0).all(0), strict=True) if not present]
    if absent:
        print(f"Labels that are absent from a new split: {', '.join(absent[:20])}{', ...' if absent[20:] else ''}.")
    write_dataset(new | kept, label_names, args.target)
    print(f"Written: {args.target}")
    say_next("check", args.target)


def _duplicate_groups(report: Path, splits: dict[str, Split]) -> np.ndarray:
    """(rows of all splits,) group ids from the duplicates that training.check_data found."""
    import numpy as np

    from .data.leave_out import same_image

    starts = dict(zip(splits, np.cumsum([0, *(len(split) for split in splits.values())]).tolist(), strict=False))
    groups = np.arange(sum(len(split) for split in splits.values()))
    try:
        found = json.loads(report.read_text(encoding="utf-8"))["duplicates"]
        found = [[(member["split"], member["row"], member["file"]) for member in group["members"]] for group in found]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{report} is no report.json of hsvlt check ({error!r}); run that again.") from error
    for members in found:
        rows = []
        for name, row, file in members:
            if name not in splits:
                continue
            if not same_image(splits[name].images, row, file):
                raise ValueError(f"{report}: row {row} of {name} is not {file!r} (any more); run hsvlt check again.")
            rows.append(starts[name] + row)
        groups[rows] = min(rows, default=0)
    return groups


main = command(run, SplitOptions, "split", __doc__)


if __name__ == "__main__":
    sys.exit(main())
