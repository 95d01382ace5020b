"""Losses for partly labelled data beside plain binary cross-entropy: a linear head on frozen features of photographs.

    python -m benchmarks.accuracy.partial_labels --dataset ../shared/data/voc --seeds 3

Labels of the train split are hidden by seed: all but a fraction, or all but one present label an image. The head
stands on EfficientNet-Lite0's pooled last map (ImageNet weights, 224 px), which is computed once and kept. Printed is
mAP on the whole validation split, of which nothing is hidden; mean and standard deviation over seeds.
"""

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.accuracy.features import FeatureCache, default_cache
from benchmarks.accuracy.heads import OUT_FEATURES  # the same maps, if they are there already
from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.peers.efficientnet_lite import image_processor, load_backbone
from modeling_hsvlt import multilabel_loss
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.sparse_labels import SparseLabels
from training.metrics.functional import average_precision

# What stays known, and the losses that are tried on it. "assumed absent" trains on every unknown label as absent.
USUAL = {"bce": "bce", "assumed absent": "bce"}
SETTINGS = {
    "all labels": (None, {"bce": "bce"}),
    "known fraction 0.3": ({"known_fraction": 0.3}, {**USUAL, "partial_bce": "partial_bce"}),
    "known fraction 0.1": ({"known_fraction": 0.1}, {**USUAL, "partial_bce": "partial_bce"}),
    "single positive": ({"single_positive": True}, {**USUAL, "weak_assume_negative": "weak_assume_negative"}),
}


def pooled_features(cache: FeatureCache) -> torch.Tensor:
    """(n, channels) means over the places of the last map."""
    return torch.cat([cache.batch(rows)[-1].mean((-2, -1)) for rows in torch.arange(len(cache)).split(128)])


def visible_labels(labels: SparseLabels, hide: dict | None, loss: str, seed: int) -> torch.Tensor:
    """(n, num_labels) of the label contract."""
    labels = labels if hide is None else labels.partially_known(**hide, seed=seed)
    dense = torch.from_numpy(np.stack([labels.dense(row) for row in range(len(labels))]))
    return dense.clamp(min=0) if loss == "assumed absent" else dense


def train_linear(features: torch.Tensor, labels: torch.Tensor, loss_type: str, *, epochs: int, seed: int):
    """A linear head, AdamW, cosine schedule."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(features.shape[1], labels.shape[1])
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.constant_(model.bias, -2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    batches = -(-len(features) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(features)).split(64):
            loss = multilabel_loss(model(features[rows]), labels[rows], loss_type)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def run(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Trains, measures and prints; returns the mAP of each setting, loss and seed."""
    loaded = load(args.dataset, splits=["train", "validation"])
    splits, label_names = loaded.splits, loaded.label_names
    backbone = load_backbone(OUT_FEATURES)
    datasets = {name: MultiLabelDataset(split, label_names, image_processor()) for name, split in splits.items()}
    caches = {name: FeatureCache(each, backbone, args.cache, name, mirrored=False) for name, each in datasets.items()}
    features = {name: pooled_features(cache) for name, cache in caches.items()}
    expected = caches["validation"].labels.numpy()
    results = {}
    for setting, (hide, losses) in tqdm(SETTINGS.items(), disable=args.quiet):
        results[setting] = {}
        for loss, loss_type in losses.items():
            found = []
            for seed in range(args.seeds):
                labels = visible_labels(datasets["train"].sparse_labels, hide, loss, seed)
                model = train_linear(features["train"], labels, loss_type, epochs=args.epochs, seed=seed)
                with torch.no_grad():
                    scores = model(features["validation"]).sigmoid().numpy()
                found.append(100 * float(np.nanmean(average_precision(scores, expected))))
            results[setting][loss] = found
    print("| known | loss | mAP |\n|---|---|---|")
    for setting, losses in results.items():
        for loss, found in losses.items():
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            print(f"| {setting} | {loss} | {statistics.fmean(found):.1f}{spread} |")
    return results


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused."""
    parser = benchmark_parser("accuracy.partial_labels", __doc__)
    parser.add_argument("--dataset", required=True, help="imagefolder with the splits train and validation")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...; default: 3")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--cache", type=Path, metavar="DIR", default=default_cache(), help="of feature maps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return run_benchmark(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
