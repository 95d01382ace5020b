"""Labels that a model was not trained on, scored by their names alone: on a frozen backbone, with cached maps.

    python -m benchmarks.accuracy.unseen_labels --dataset ../shared/data/voc --json FILE

Each seed leaves out six labels, which are then scored: seeds 0, 1 and 2 others each, seed 3 those of seed 0 again, and
so on. Train's images of them stay; nothing says that they show them. The same for labels that were trained on and are
called otherwise (`RENAMED`). mAP in percent on validation, mean and standard deviation over seeds; with `--choose`,
other labels are left out and a third of train is held out to measure on: what is chosen is chosen there. The finer
maps are averaged to 7 x 7, and the label stream is narrow: a training takes seconds.

| row | what it is |
|---|---|
| random | scores by chance |
| label stream | HSVLT with `classifier="shared"`, without its residual attention |
| alignment | what can be had of HP-DVAL's way without a CLIP, see `Alignment` |
| ImageNet by name | residual attention with the weights of `transfer_classifier`, nothing trained |
| HSVLT | both of its paths; weights of new labels come from ImageNet's classes and the trained labels, by name |
| HSVLT, residual attention | that path alone |
| trained on | HSVLT trained on all labels |
"""

import argparse
import copy
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from benchmarks.accuracy.features import FeatureCache, default_cache
from benchmarks.accuracy.frozen import PRIOR_BIAS, build_head, freeze_backbone, score_head, train_head
from benchmarks.accuracy.heads import OUT_FEATURES, RECIPES, read_label_texts
from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.peers.efficientnet_lite import image_processor, load_backbone, load_classifier
from modeling_hsvlt import multilabel_loss
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.metrics.functional import average_precision

LEFT_OUT = 6
DRAWS = 3
# Other names of PASCAL VOC's labels, two of each, written down before any was scored on validation.
RENAMED = {
    "aeroplane": ("airplane", "aircraft"),
    "bicycle": ("bike", "cycle"),
    "bird": ("birds", "fowl"),
    "boat": ("ship", "vessel"),
    "bottle": ("flask", "bottles"),
    "bus": ("coach", "omnibus"),
    "car": ("automobile", "motorcar"),
    "cat": ("kitten", "feline"),
    "chair": ("seat", "armchair"),
    "cow": ("cattle", "ox"),
    "dining table": ("table", "dinner table"),
    "dog": ("hound", "canine"),
    "horse": ("pony", "mare"),
    "motorbike": ("motorcycle", "scooter"),
    "person": ("human", "people"),
    "potted plant": ("houseplant", "pot plant"),
    "sheep": ("lamb", "ewe"),
    "sofa": ("couch", "settee"),
    "train": ("railway", "locomotive"),
    "tv monitor": ("television", "screen"),
}


class Alignment(nn.Module):
    """Pixels and label texts compared as a CLIP does, as far as that goes here: a linear map brings pixels to the space
    of the texts, and a label's score is halved between the mean pixel and the eighth of the pixels nearest to the
    label, which stand for HP-DVAL's global and local view.

    No CLIP is at hand without a download, and one trained here from scratch has never read the names of other labels.
    So the map starts from what pairs of text and image there are, ImageNet's classes and their names (ridge
    regression), and is trained on the labels. Unlike a CLIP's, projected pixels keep their length.

    Args:
        start (`torch.Tensor` of shape `(D, C)`): the map.
        texts (`torch.Tensor` of shape `(N, D)`): of the labels.
    """

    def __init__(self, start: torch.Tensor, texts: torch.Tensor, loss_type: str, loss_kwargs: dict | None):
        super().__init__()
        self.norm, self.map = nn.LayerNorm(start.shape[1]), nn.Parameter(start.clone())
        self.bias = nn.Parameter(torch.tensor(PRIOR_BIAS))
        self.texts, self.loss, self.device = texts, (loss_type, loss_kwargs), torch.device("cpu")

    def forward(self, feature_maps, labels=None):
        pixels = self.norm(feature_maps[-1].flatten(2).transpose(1, 2))  # (B, P, C)
        scores = (pixels @ (F.normalize(self.texts, dim=-1) @ self.map).T).float()  # (B, P, N)
        nearest = scores.topk(max(1, scores.shape[1] // 8), dim=1).values
        logits = (scores.mean(1) + nearest.mean(1)) / 2 + self.bias
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else multilabel_loss(logits, labels, *self.loss)
        )


class SmallMaps:
    """A `FeatureCache` whose finer maps are averaged to the size of the last one, which spares most of the time.

    Args:
        columns (`list[int]`, *optional*): the labels to show; None: all.
    """

    def __init__(self, cache: FeatureCache, columns: list[int] | None = None):
        self.cache, self.labels = cache, cache.labels if columns is None else cache.labels[:, columns]

    def __len__(self) -> int:
        return len(self.cache)

    def batch(self, rows: torch.Tensor, mirrored: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        maps = self.cache.batch(rows, mirrored)
        return tuple(F.adaptive_avg_pool2d(each, maps[-1].shape[-2:]) for each in maps)


def left_out_labels(number: int, seed: int) -> list[list[int]]:
    """`DRAWS` times `LEFT_OUT` of `number` labels, no label twice while there are enough."""
    order = random.Random(seed).sample(range(number), number)
    return [[order[(draw * LEFT_OUT + each) % number] for each in range(LEFT_OUT)] for draw in range(DRAWS)]


class Comparison:
    """The maps, the texts and ImageNet's classifier that all rows share.

    Args:
        args (`argparse.Namespace`): of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        loaded = load(args.dataset, splits=["train", "validation"])
        self.names, self.backbone = loaded.label_names, load_backbone(OUT_FEATURES)
        if len(self.names) <= LEFT_OUT:
            raise ValueError(f"{args.dataset} has {len(self.names)} labels; to leave out {LEFT_OUT} it needs more.")
        if not args.no_renamed and (lacking := sorted(set(self.names) - RENAMED.keys())):
            raise ValueError(f"RENAMED has no other names for {', '.join(lacking)}: add them, or give --no_renamed.")
        self.caches = {
            name: FeatureCache(
                MultiLabelDataset(loaded.splits[name], self.names, image_processor()), self.backbone, args.cache, name
            )
            for name in ("train", *([] if args.choose else ["validation"]))
        }
        rows = torch.arange(len(self.caches["train"]))
        measured, self.train_rows, self.measured_rows = self.caches.get("validation"), rows, None
        if args.choose:
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
            third = len(rows) // 3
            measured, self.measured_rows, self.train_rows = self.caches["train"], order[:third], order[third:]
        self.measured = SmallMaps(measured)
        self.classes, class_names = load_classifier()
        other = [] if args.no_renamed else [name for own in self.names for name in RENAMED[own]]
        every = list(dict.fromkeys([*class_names, *self.names, *other]))
        self.texts = dict(zip(every, read_label_texts(every), strict=True))
        self.class_texts = self.encode(class_names)
        self.recipe = RECIPES["hsvlt"]
        fields = {**self.recipe.model, "classifier": "shared", "label_width": args.label_width}
        self.recipe = replace(self.recipe, model=fields, epochs=args.epochs, bf16=False)

    def encode(self, names: list[str]) -> torch.Tensor:
        return torch.stack([self.texts[name] for name in names])

    def hsvlt(self, columns: list[int], seed: int):
        """HSVLT for these labels, as it starts."""
        names = [self.names[column] for column in columns]
        model = build_head("hsvlt", self.recipe, self.backbone, names, self.encode(names), seed)
        model.start_from_classes(self.classes, self.class_texts)
        freeze_backbone(model)
        return model

    def alignment(self, columns: list[int], seed: int) -> Alignment:
        texts, weight = F.normalize(self.center(self.class_texts), dim=-1), self.classes - self.classes.mean(0)
        start = torch.linalg.solve(texts.T @ texts + torch.eye(texts.shape[1]), texts.T @ weight)
        start = start * (12 / weight.shape[1] ** 0.5 / (texts @ start).norm(dim=1).mean())  # as HSVLT's rows start
        torch.manual_seed(seed)
        labels = self.center(self.encode([self.names[column] for column in columns]))
        return Alignment(start, labels, self.recipe.loss_type, self.recipe.loss_kwargs)

    def center(self, texts: torch.Tensor) -> torch.Tensor:
        return texts - self.class_texts.mean(0)

    def train(self, model, columns: list[int], seed: int):
        return train_head(model, self.recipe, SmallMaps(self.caches["train"], columns), self.train_rows, seed)

    def mean_ap(self, scores: np.ndarray, columns: list[int]) -> float:
        rows = slice(None) if self.measured_rows is None else self.measured_rows
        return 100 * float(np.nanmean(average_precision(scores, self.measured.labels[rows][:, columns].numpy())))

    @torch.inference_mode()
    def scores(self, trained, columns: list[int], names: list[str]) -> dict[str, np.ndarray]:
        """Scores of the labels `columns` called `names`: of HSVLT, of each of its paths, and of the classes alone."""
        model = copy.deepcopy(trained)
        if names != list(model.config.id2label.values()):
            model.exchange_labels(names, self.encode(names))
        start = self.hsvlt(columns, seed=0).eval()
        start.set_label_embeddings(self.encode(names))
        start.start_from_classes(self.classes, self.class_texts)
        found, join = defaultdict(list), model.residual_attention.join

        def read(stream_logits, pixel_logits):
            found["label stream"].append(stream_logits)
            found["HSVLT, residual attention"].append(pixel_logits)
            return join(stream_logits, pixel_logits)

        model.residual_attention.join = read
        rows = torch.arange(len(self.measured)) if self.measured_rows is None else self.measured_rows
        for batch in rows.split(64):
            maps = self.measured.batch(batch)
            found["HSVLT"].append(model(feature_maps=maps).logits)
            found["ImageNet by name"].append(start.residual_attention(maps[-1]))
        return {path: torch.cat(logits).float().numpy() for path, logits in found.items()}


def run(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Trains, measures and prints; returns the figures behind each cell of the two tables."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    comparison = Comparison(args)
    names, everything = comparison.names, list(range(len(comparison.names)))
    draws = left_out_labels(len(names), seed=1 if args.choose else 0)
    unseen, renamed = defaultdict(list), defaultdict(list)
    for seed in tqdm(range(args.seeds), desc="seeds"):
        draw = draws[seed % DRAWS]
        seen, called = [each for each in everything if each not in draw], [names[each] for each in draw]
        model = comparison.train(comparison.hsvlt(everything, seed), everything, seed)
        own = comparison.scores(model, everything, names)
        unseen["trained on"].append(comparison.mean_ap(own["HSVLT"][:, draw], draw))
        chance = np.random.default_rng(seed).random((100, len(own["HSVLT"]), len(draw)))
        unseen["random"].append(statistics.fmean(comparison.mean_ap(each, draw) for each in chance))
        kinds = {"own names": own}
        if not args.no_renamed:
            for which in (0, 1):
                others = [RENAMED[name][which] for name in names]
                kinds[f"other names, {which + 1}"] = comparison.scores(model, everything, others)
        for kind, of_paths in kinds.items():
            for path, scores in of_paths.items():
                renamed[f"{path}: {kind}"].append(comparison.mean_ap(scores, everything))
        tqdm.write(f"seed {seed}, trained on all labels: " + shown(renamed))
        model = comparison.train(comparison.hsvlt(seen, seed), seen, seed)
        for path, scores in comparison.scores(model, draw, called).items():
            unseen[path].append(comparison.mean_ap(scores, draw))
        aligned = comparison.train(comparison.alignment(seen, seed), seen, seed)
        aligned.texts = comparison.center(comparison.encode(called))
        scores = score_head(aligned, comparison.measured, comparison.measured_rows)
        unseen["alignment"].append(comparison.mean_ap(scores, draw))
        tqdm.write(f"seed {seed}, without {', '.join(called)}: " + shown(unseen))
    print_tables(unseen, renamed)
    return {"unseen": unseen, "renamed": renamed}


def shown(figures: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {values[-1]:.1f}" for name, values in figures.items())


def cell(values: list[float]) -> str:
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def print_tables(unseen: dict, renamed: dict) -> None:
    print("| never trained on | mAP | each seed | times random | of trained on |\n|---|---|---|---|---|")
    mean = {row: statistics.fmean(values) for row, values in unseen.items()}
    for row, values in sorted(unseen.items(), key=lambda each: mean[each[0]]):
        each = ", ".join(f"{value:.1f}" for value in values)
        shares = f"{mean[row] / mean['random']:.1f} | {mean[row] / mean['trained on']:.2f}"
        print(f"| {row} | {cell(values)} | {each} | {shares} |")
    paths, kinds = (list(dict.fromkeys(each.split(": ")[part] for each in renamed)) for part in (0, 1))
    print(f"\n| trained on all labels, under | {' | '.join(kinds)} |\n{'|---' * (len(kinds) + 1)}|")
    for path in paths:
        print(f"| {path} | {' | '.join(cell(renamed[f'{path}: {kind}']) for kind in kinds)} |")


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("accuracy.unseen_labels", __doc__)
    parser.add_argument("--dataset", required=True, help="imagefolder with the splits train and validation")
    parser.add_argument("--choose", action="store_true", help="measure other draws, on a third of train")
    parser.add_argument("--no_renamed", action="store_true", help="leave out the labels called otherwise")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...; default: 3")
    parser.add_argument("--epochs", type=int, default=3, help="default: 3")
    parser.add_argument("--label_width", type=int, default=32, help="of the label stream; default: 32")
    parser.add_argument("--cache", type=Path, metavar="DIR", default=default_cache(), help="of feature maps")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused."""
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
