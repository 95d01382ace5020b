"""Score a checkpoint on a split.

    python -m training.evaluate CHECKPOINT DATASET --split validation [--threshold 0.5 | auto] [--output FOLDER]

CHECKPOINT and DATASET are folders or Hub ids. Prints mAP, CP/CR/CF1 and OP/OR/OF1 at the threshold and among the top 3;
with --output writes results.json (all metrics), per_label.csv and report.html, a page with plots and the most confident
mistakes that opens without a server. `accelerate launch -m training.evaluate ...` spreads
the pictures over several devices and gives the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

import modeling_hsvlt  # noqa: F401  (registers the model types, so that the code of this checkout is used)

from .checkpoint import refuse_leads_elsewhere
from .data import MultiLabelDataset, build_dataloader, class_counts
from .dataset_arguments import add_dataset_arguments, load_from_arguments
from .exclude import without_excluded
from .imbalance import long_tail_groups
from .metrics.functional import per_label_report

METRIC = Path(__file__).with_name("metrics") / "multilabel_classification"
AP_DEFINITION = "non-interpolated"
RESULT_FILES = ("results.json", "per_label.csv", "report.html")


class ScoredSplit(NamedTuple):
    """A split and what a checkpoint found in it; scores and labels are (n, num_labels), in the checkpoint's order."""

    label_names: list[str]
    scores: np.ndarray
    labels: np.ndarray
    rows: Dataset


def predict(
    model: torch.nn.Module,
    dataloader: DataLoader,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    before_batch: Callable[[], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every picture, in the order of the dataset's rows whatever the number of processes.

    Args:
        model: Gives `logits` (batch, num_labels) for `pixel_values`. Put in evaluation mode, and back.
        dataloader: Of a `MultiLabelDataset`, built with the processor (normalised pixels); prepared or not.
        accelerator: None makes one, and moves the model to its device.
        progress: Whether the main process shows a bar.
        before_batch: Called before every batch; may raise to end the scoring.

    Returns:
        Sigmoid scores and labels, both (n, num_labels) float32, on every process. Labels that a model with
        `candidate_labels` left out score 0.

    Raises:
        ValueError: pixels that were not normalised.
        RuntimeError: the loader left out rows.
    """
    if accelerator is None:
        accelerator = Accelerator()
        model.to(accelerator.device)
    dataloader = accelerator.prepare_data_loader(dataloader)
    num_rows, dtype = len(dataloader.dataset), next(model.parameters()).dtype
    batch_size = dataloader.total_batch_size // accelerator.num_processes
    scores = labels = None
    seen = np.zeros(num_rows, dtype=bool)
    was_training = model.training
    model.eval()
    bar = tqdm(dataloader, "Scoring", leave=False, disable=not (progress and accelerator.is_main_process))
    # FSDP2 keeps buffers that it makes in inference mode, and cannot train with them afterwards (torch 2.13).
    sharded = isinstance(next(model.parameters()), DTensor)
    with torch.no_grad() if sharded else torch.inference_mode():
        for batch in bar:
            if before_batch is not None:
                before_batch()
            if batch["pixel_values"].dtype == torch.uint8:
                raise ValueError("The pixels are uint8; build the loader with processor=..., which normalises them.")
            # Only batches of one size: matrix products round differently for another, and how many pictures the last
            # batch has depends on the number of processes.
            pixel_values = batch["pixel_values"].to(dtype)
            count = len(pixel_values)
            padding = pixel_values[-1:].expand(batch_size - count, *pixel_values.shape[1:])
            output = model(pixel_values=torch.cat([pixel_values, padding]))
            batch_scores = output.logits.float().sigmoid()
            batch_scores = batch_scores[:count]
            batch_labels = batch["labels"].to_dense().float()
            gathered = accelerator.gather_for_metrics((batch["index"], batch_scores, batch_labels))
            index, batch_scores, batch_labels = (tensor.cpu().numpy() for tensor in gathered)
            if scores is None:
                scores, labels = (np.empty((num_rows, batch_scores.shape[1]), np.float32) for _ in range(2))
            # By row, so that neither the order of the processes nor a row that two of them had matters.
            scores[index], labels[index], seen[index] = batch_scores, batch_labels, True
    model.train(was_training)
    if not seen.all():
        raise RuntimeError(
            f"The loader gave {seen.sum()} of {num_rows} rows; build it with drop_last=False and without a sampler."
        )
    return scores, labels


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


def register_trunk_of_benchmarks(checkpoint: str) -> None:
    """Makes a run of `benchmarks.accuracy` loadable: its trunk is not one of transformers'."""
    path = Path(checkpoint) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "efficientnet_lite" in (config.get("model_type"), (config.get("backbone_config") or {}).get("model_type")):
        from benchmarks import efficientnet_lite  # noqa: F401


def load_checkpoint(args: argparse.Namespace) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and image processor of `args.checkpoint`, with the code of this checkout and never with a pickle.

    Raises:
        ValueError, OSError: there is none, or not of a known type.
    """
    if not Path(args.checkpoint).is_dir() and (args.checkpoint[:1] in "./~" or args.checkpoint.count("/") > 1):
        raise FileNotFoundError(f"{args.checkpoint} is no folder; give the folder of a checkpoint or a Hub id.")
    refuse_leads_elsewhere(args.checkpoint)
    register_trunk_of_benchmarks(args.checkpoint)
    revision = args.revision or "main"
    model = AutoModelForImageClassification.from_pretrained(args.checkpoint, revision=revision, use_safetensors=True)
    return model, AutoImageProcessor.from_pretrained(args.checkpoint, revision=revision)


def score_split(
    model: PreTrainedModel, processor: BaseImageProcessor, args: argparse.Namespace, accelerator: Accelerator
) -> ScoredSplit:
    """Predicts the split that `args`, parsed `add_scoring_arguments`, names.

    Raises:
        ValueError, OSError: in one sentence, what was wrong with the dataset and what to do.
    """
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    if args.use_checkpoint_labels:
        args.label_names = label_names
    with accelerator.main_process_first():  # the others then find the cache
        split, dataset_names = load_split(args, args.split)
    order = match_labels(label_names, dataset_names, args.checkpoint, args.dataset)
    dataset = MultiLabelDataset(split, dataset_names, processor)
    loader = build_dataloader(
        dataset, batch_size=args.batch_size, num_workers=args.num_workers, processor=processor, sparse_labels=True
    )
    with accelerator.autocast():
        scores, labels = predict(model.to(accelerator.device), loader, accelerator)
    return ScoredSplit(label_names, scores, labels[:, order], dataset.split)


def load_split(args: argparse.Namespace, name: str) -> tuple[Dataset, list[str]]:
    """A split of the data set that `args`, parsed `add_scoring_arguments`, names, without the rows that it excludes;
    and its label names."""
    splits, label_names = load_from_arguments(
        args,
        splits=[name],
        scenes=args.scenes,
        missing_pictures=args.missing_pictures,
        unlisted_pictures=args.unlisted_pictures,
    )
    if args.exclude is not None:
        splits = without_excluded(splits, args.exclude)
    return splits[name], label_names


def count_positives(label_names: Sequence[str], args: argparse.Namespace) -> np.ndarray:
    """(num_labels,) pictures of `args.count_split` that show each label."""
    split, dataset_names = load_split(args, args.count_split)
    order = match_labels(label_names, dataset_names, args.checkpoint, args.dataset)
    return class_counts(MultiLabelDataset(split, dataset_names, None), len(dataset_names))[order]


def match_labels(label_names: Sequence[str], dataset_names: Sequence[str], checkpoint: str, dataset: str) -> list[int]:
    """Where each of the checkpoint's labels stands among the dataset's.

    Raises:
        ValueError: the two do not have the same names.
    """
    differences = []
    for names, others, owner in ((label_names, dataset_names, checkpoint), (dataset_names, label_names, dataset)):
        only = [name for name in names if name not in set(others)]
        if only:
            listing = ", ".join(map(repr, only[:5])) + (f" and {len(only) - 5} more" if len(only) > 5 else "")
            differences.append(f"only {owner} has {listing}")
    if differences:
        raise ValueError(
            f"The labels of checkpoint and dataset differ: {'; '.join(differences)}; rename them in the dataset (its "
            "labels.txt or features), or pass --use_checkpoint_labels where the dataset lists no vocabulary of its own."
        )
    position = {name: index for index, name in enumerate(dataset_names)}
    return [position[name] for name in label_names]


def result_record(
    metrics: dict,
    *,
    checkpoint: str,
    dataset: str,
    split: str,
    threshold: float | str,
    revision: str | None = None,
    dataset_revision: str | None = None,
    count_split: str | None = None,
) -> dict:
    """What the results.json of a report holds: metrics, and of what they are."""
    return {
        "checkpoint": checkpoint,
        "revision": revision,
        "dataset": dataset,
        "dataset_revision": dataset_revision,
        "split": split,
        "count_split": count_split,
        "threshold": threshold,
        "ap_definition": AP_DEFINITION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "metrics": metrics,
    }


def format_report(report: dict, threshold_words: str, absent: Sequence[str], top_k: int = 3) -> str:
    """A table that fits a terminal."""
    columns = ("CP", "CR", "CF1", "OP", "OR", "OF1", "CF1_per_class")
    rows = {threshold_words: "", f"top {top_k} of these": f"_top{top_k}"}
    width = max(map(len, rows))
    lines = [
        f"mAP {report['mAP']:.4f} ({AP_DEFINITION}; VOC07 11-point {report['mAP_voc07']:.4f}, VOC10 "
        f"{report['mAP_voc10']:.4f}, micro {report['mAP_micro']:.4f}, weighted {report['mAP_weighted']:.4f})",
        " " * width + "".join(f"{name:>{max(8, len(name) + 2)}}" for name in columns),
    ]
    for words, suffix in rows.items():
        values = (f"{report[name + suffix]:>{max(8, len(name) + 2)}.4f}" for name in columns)
        lines.append(f"{words:<{width}}" + "".join(values))
    lines.append(
        f"LRAP {report['LRAP']:.4f}, ranking loss {report['ranking_loss']:.4f}, coverage "
        f"{report['coverage_error']:.2f} of {report['num_labels']} labels"
    )
    if absent:
        listing = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        lines.append(f"Left out of the means, having no positive here: {len(absent)} labels ({listing}).")
    if report["num_unknown"]:
        lines.append(f"Unknown, and counted nowhere: {report['num_unknown']:,} entries.")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict:
    """Scores, prints and writes; returns what results.json holds (on the main process)."""
    existing = [name for name in RESULT_FILES if args.output is not None and (args.output / name).exists()]
    if existing and not args.overwrite:
        raise FileExistsError(
            f"{args.output / existing[0]} exists; choose another --output, or pass --overwrite to replace it."
        )
    model, processor = load_checkpoint(args)
    threshold = args.threshold
    if threshold == "auto":
        threshold = getattr(model.config, "thresholds", None)
        if threshold is None:
            raise ValueError(
                f"{args.checkpoint} holds no thresholds; fit them with python -m training.thresholds, or give a number "
                "for --threshold."
            )
    accelerator = Accelerator()
    label_names, scores, labels, rows = score_split(model, processor, args, accelerator)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}
    counts = None if args.count_split is None else count_positives(label_names, args)
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    report = metric.compute(
        predictions=scores,
        references=labels,
        threshold=threshold,
        groups=None if counts is None else long_tail_groups(counts),
        label_names=label_names,
    )
    per_label = per_label_report(scores, labels, threshold, label_names=label_names)
    results = result_record(
        report,
        checkpoint=args.checkpoint,
        revision=getattr(model.config, "_commit_hash", None) or args.revision,
        dataset=args.dataset,
        dataset_revision=args.dataset_revision,
        split=args.split,
        count_split=args.count_split,
        threshold=args.threshold,
    )
    absent = [name for name, positives in zip(label_names, per_label["positives"], strict=True) if not positives]
    words = "fitted thresholds" if args.threshold == "auto" else f"score >= {args.threshold:g}"
    print(
        f"{args.checkpoint} on {args.dataset}, split {args.split}: {len(scores):,} pictures, "
        f"{len(label_names)} labels\n" + format_report(report, words, absent)
    )
    if args.output is not None:
        from .report import write_report  # which imports this module

        named_counts = None if counts is None else (args.count_split, counts)
        write_report(
            args.output, results, label_names, scores, labels, rows, per_label, model.config, named_counts,
            explained_by=(model, processor),
        )  # fmt: skip
        print(f"Written: {', '.join(str(args.output / name) for name in RESULT_FILES)}")
    return results


def number_or_auto(text: str) -> float | str:
    """The type of --threshold."""
    return text if text == "auto" else float(text)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_scoring_arguments(parser)
    parser.add_argument(
        "--threshold",
        type=number_or_auto,
        default=0.5,
        help="a number, or auto: the thresholds in the checkpoint; default: 0.5",
    )
    parser.add_argument(
        "--count_split",
        help="split whose positives make a label head, medium or tail, as a rule train; default: no groups",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"where to write {', '.join(RESULT_FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are in FOLDER")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
