"""A synthetic data set of a million rows and ten thousand labels: read, checked, split and scored.

    python -m benchmarks.cost.million_rows --rows 1000000 --labels 10000

    python -m benchmarks.cost.million_rows --rows 0 --shards 100 --workers 2

Then images a second from a hundred shards, decoded and resized: parquet and WebDataset as streams, parquet map-style.
A `--rows` or `--shards` of 0 leaves that part out.

Prints the seconds of each step, those of work on all cores, and the peak memory of the process. Labels stay sparse
throughout, and scores exist for one block of the matrix at a time. Scored is with the whole of `multilabel_report`. No
image is decoded: the check's index is given fingerprints, a hundredth of them copies.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value
from scipy.sparse import csr_array
from tqdm.auto import tqdm

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.cost.streams import stream_speed
from training.check.duplicates import Fingerprints, group_duplicates
from training.check.findings import check_labels
from training.check.imbalance import long_tail_groups
from training.data.load import load
from training.metrics.functional import multilabel_report
from training.prepare.stratify import positives_by_split, stratified_split

FRACTIONS = (0.8, 0.1, 0.1)


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
    """Fingerprints of images that differ, but for the last hundredth, copies of the first with two bits flipped."""
    rng = np.random.default_rng(seed)
    phashes = rng.integers(0, 1 << 64, rows, dtype=np.uint64)
    thumbnails = rng.integers(0, 256, (rows, 192), dtype=np.uint8)
    copies = rows // 100
    phashes[rows - copies :] = phashes[:copies] ^ np.uint64(0x0000_0100_0000_0001)
    thumbnails[rows - copies :] = thumbnails[:copies]
    return Fingerprints([row.to_bytes(16, "big") for row in range(rows)], phashes, thumbnails)


class SyntheticScores:
    """A (rows, labels) float32 matrix of scores that is computed where it is read: noise that a hash of row and label
    gives, in [0, 2/3), and a third more where the label is present.

    Args:
        labels: (rows, labels) of 0 and 1.
        seed: Of the noise.
        progress: A bar that is told of entries as they are read.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, labels: csr_array, seed: int, progress: tqdm):
        self.shape = labels.shape
        self._by_row, self._by_label, self._progress = labels, labels.tocsc(), progress
        rng = np.random.default_rng([seed, 1])
        self._row_keys, self._label_keys = (rng.integers(0, 1 << 32, size, dtype=np.uint32) for size in labels.shape)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        # Of few labels, label by label in memory, as whoever reads these goes through them.
        by_label = index[0] == slice(None)
        present = (self._by_label[index].T if by_label else self._by_row[index]).tocoo()
        outer, inner = self._row_keys[index[0]], self._label_keys[index[1]]
        bits = np.bitwise_xor.outer(*(inner, outer) if by_label else (outer, inner))
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits ^= bits >> np.uint32(shift)
            bits *= np.uint32(factor)
        scores = bits.astype(np.float32)
        scores *= np.float32(2 / 3 / (1 << 32))
        scores[present.row, present.col] += np.float32(1 / 3)
        self._progress.update(scores.size)
        return scores.T if by_label else scores


def run(args: argparse.Namespace) -> dict:
    """Does both parts; returns the figures."""
    figures = run_rows(args) if args.rows else {}
    if args.shards:
        speeds = figures["images_per_second"] = stream_speed(
            shards=args.shards,
            images=args.shard_images,
            image_size=args.image_size,
            workers=args.workers,
            batch_size=32,
            rounds=args.rounds,
            seed=args.seed,
            quiet=args.quiet,
        )
        reference = statistics.median(speeds["map-style"])
        print(f"{args.shards} shards of {args.shard_images} JPEGs, 500 x 375 px to {args.image_size} px")
        for name, values in speeds.items():
            median = statistics.median(values)
            span = f"{min(values):,.0f} to {max(values):,.0f}"
            print(f"{name:<20}{median:>9,.0f} images/s ({span}), {median / reference:.2f} of map-style")
    return figures


def run_rows(args: argparse.Namespace) -> dict:
    """A million rows: prints a line a step; returns the figures."""
    figures = {"rows": args.rows, "labels": args.labels, "threads": args.threads, "seconds": {}, "cpu_seconds": {}}

    @contextmanager
    def timed(step: str):
        began, worked = time.perf_counter(), time.process_time()
        yield
        figures["seconds"][step] = time.perf_counter() - began
        figures["cpu_seconds"][step] = time.process_time() - worked
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{step:<34}{figures['seconds'][step]:>9.1f} s {figures['cpu_seconds'][step]:>9.1f} s of CPU   "
            f"peak {peak:.2f} GiB",
            flush=True,
        )

    with timed("make the labels"):
        dataset, names = synthetic_dataset(args.rows, args.labels, args.per_row, args.seed)
    with timed("read and check every label"):
        loaded = load(dataset, label_names=names)
        splits, names = loaded.splits, loaded.label_names
        labels = splits["train"].labels
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

    shape = (args.rows, args.labels)
    matrix = csr_array((labels.values.astype(np.int8), labels.ids, labels.starts), shape=shape)
    figures["positives"] = matrix.nnz
    groups = {name: ids for name, ids in long_tail_groups(labels.positives()).items() if len(ids)}
    figures["findings"] = {finding.kind: len(finding.examples) for finding in findings if finding.examples}
    del dataset, splits, labels, findings, split_of_row, group_of_row
    entries = 2 * args.rows * args.labels
    with (
        timed("make and score 2 x all scores"),
        tqdm(total=entries, desc="Scoring", unit="score", unit_scale=True, disable=args.quiet) as progress,
    ):
        scores = SyntheticScores(matrix, args.seed, progress)
        figures["report"] = multilabel_report(scores, matrix, groups=groups, num_threads=args.threads)
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.rows:,} rows, {args.labels:,} labels, {figures['positives']:,} positives; "
        f"mAP {figures['report']['mAP']:.4f}; {sum(figures['seconds'].values()):.0f} s in all "
        f"({sum(figures['cpu_seconds'].values()):.0f} s of CPU), peak memory {figures['peak_gib']:.2f} GiB"
    )
    return figures


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = benchmark_parser("cost.million_rows", __doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default: 1,000,000")
    parser.add_argument("--labels", type=int, default=10_000, help="default: 10,000")
    parser.add_argument("--per_row", type=float, default=4, help="labels of a row, on average; default: 4")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="blocks scored at once; default: all cores")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--shards", type=int, default=100, help="default: 100")
    parser.add_argument("--shard_images", type=int, default=20, help="images of a shard; default: 20")
    parser.add_argument("--image_size", type=int, default=224, help="default: 224")
    parser.add_argument("--workers", type=int, default=0, help="that decode; default: 0, the process itself")
    parser.add_argument("--rounds", type=int, default=3, help="all images so often, in turn; default: 3")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return run_benchmark(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
