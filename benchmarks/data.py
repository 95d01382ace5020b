"""A synthetic data set of a million rows and ten thousand labels: read, checked, split and scored.

    python -m benchmarks.data --rows 1000000 --labels 10000

Prints the seconds of each step and the peak memory of the process. Labels stay sparse throughout, scores exist for a
few labels at a time. No picture is decoded: the check's index is given fingerprints, a hundredth of them copies.
"""

import argparse
import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value
from scipy.sparse import csc_array
from tqdm.auto import tqdm

from training.data import load_multilabel_dataset
from training.duplicates import Fingerprints, group_duplicates
from training.findings import check_labels
from training.metrics.functional import average_precision
from training.sparse_labels import SparseLabels
from training.split import positives_by_split, stratified_split

FRACTIONS = (0.8, 0.1, 0.1)
SCORES_AT_A_TIME = 32  # labels of a block of scores: 128 MB for a million rows


def synthetic_dataset(rows: int, labels: int, per_row: float, seed: int) -> tuple[Dataset, list[str]]:
    """A split of rows with names of labels that follow Zipf's law, in the form of a metadata table."""
    rng = np.random.default_rng(seed)
    chance = 1 / np.arange(1, labels + 1)
    lengths = rng.poisson(per_row, rows)
    ids = np.searchsorted(np.cumsum(chance / chance.sum())[:-1], rng.random(lengths.sum()))
    names = [f"label {index:05d}" for index in range(labels)]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    lists = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), pa.array(names).take(pa.array(ids)))
    paths = pa.array([f"{row:07d}.jpg" for row in range(rows)])
    images = pa.StructArray.from_arrays([pa.nulls(rows, pa.binary()), paths], ["bytes", "path"])
    features = Features({"image": Image(decode=False), "labels": List(Value("string"))})
    table = pa.table({"image": images, "labels": lists}).cast(features.arrow_schema)
    return Dataset(table), names


def synthetic_fingerprints(rows: int, seed: int) -> Fingerprints:
    """Fingerprints of pictures that differ, but for the last hundredth, copies of the first with two bits flipped."""
    rng = np.random.default_rng(seed)
    phashes = rng.integers(0, 1 << 64, rows, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (rows, 192), dtype=np.uint8)
    copies = rows // 100
    phashes[rows - copies :] = phashes[:copies] ^ np.uint64(0x0000_0100_0000_0001)
    thumbnails[rows - copies :] = thumbnails[:copies]
    return Fingerprints([row.to_bytes(16, "big") for row in range(rows)], phashes, thumbnails)


def score_block(labels: csc_array, start: int, stop: int, seed: int) -> np.ndarray:
    """(rows, stop - start) float32 scores of some labels: noise, and half its range more where a label is present."""
    scores = np.random.default_rng([seed, start]).random((stop - start, labels.shape[0]), dtype=np.float32).T
    present = labels[:, start:stop].tocoo()
    scores[present.row, present.col] += np.float32(0.5)
    return scores


def run(args: argparse.Namespace) -> dict:
    """Does it all and prints a line a step; returns the figures."""
    figures = {"rows": args.rows, "labels": args.labels, "threads": args.threads, "seconds": {}}

    @contextmanager
    def timed(step: str):
        began = time.perf_counter()
        yield
        figures["seconds"][step] = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{step:<34}{figures['seconds'][step]:>9.1f} s   peak {peak:.2f} GiB", flush=True)

    with timed("make the labels"):
        dataset, names = synthetic_dataset(args.rows, args.labels, args.per_row, args.seed)
    with timed("read and check every label"):
        splits, names = load_multilabel_dataset(dataset, label_names=names)
        labels = SparseLabels.from_dataset(splits["train"], names)
        findings = check_labels({"train": labels}, names)
    with timed("make the fingerprints"):
        prints = synthetic_fingerprints(args.rows, args.seed)
    with timed("find duplicates"):
        groups = group_duplicates(prints)
    figures["duplicate_groups"] = len(groups)
    del prints

    group_of_row = np.arange(args.rows)
    for group in groups:
        group_of_row[group] = group[0]
    with timed("split, duplicates together"):
        split_of_row = stratified_split(labels, FRACTIONS, groups=group_of_row, seed=args.seed)
    counts = positives_by_split(labels, split_of_row, len(FRACTIONS))
    by_chance = np.random.default_rng(args.seed).choice(len(FRACTIONS), args.rows, p=FRACTIONS)
    at_random = positives_by_split(labels, by_chance, len(FRACTIONS))
    wanted = np.outer(FRACTIONS, labels.positives())
    enough = labels.positives() >= len(FRACTIONS)
    for name, placed in (("stratified", counts), ("random", at_random)):
        off, lacking = np.abs(placed - wanted).mean(), int((placed == 0)[:, enough].any(axis=0).sum())
        figures[name] = {"mean_positives_off": off, "labels_absent_from_a_split": lacking}
        print(f"    {name:<12}positives of a label off by {off:.2f}; labels that a split lacks: {lacking:,}")

    matrix = csc_array((labels.values, labels.ids, labels.starts), shape=(args.labels, args.rows), copy=False)
    matrix = matrix.T.tocsc()

    def score(start: int) -> np.ndarray:
        stop = min(start + SCORES_AT_A_TIME, args.labels)
        return average_precision(score_block(matrix, start, stop, args.seed), matrix[:, start:stop])

    blocks = range(0, args.labels, SCORES_AT_A_TIME)
    with timed("make and rank scores, AP of each"), ThreadPoolExecutor(args.threads) as pool:
        precisions = np.concatenate(list(tqdm(pool.map(score, blocks), "Scoring", len(blocks), disable=args.quiet)))
    figures["mAP"] = float(np.nanmean(precisions))
    figures["positives"] = int(labels.positives().sum())
    figures["findings"] = {finding.kind: len(finding.examples) for finding in findings if finding.examples}
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.rows:,} rows, {args.labels:,} labels, {figures['positives']:,} positives; mAP {figures['mAP']:.4f}; "
        f"{sum(figures['seconds'].values()):.0f} s in all, peak memory {figures['peak_gib']:.2f} GiB"
    )
    return figures


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: 1,000,000")
    parser.add_argument("--labels", type=int, default=10_000, help="default: 10,000")
    parser.add_argument("--per_row", type=float, default=4, help="labels of a row, on average; default: 4")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that score; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    figures = run(args)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
