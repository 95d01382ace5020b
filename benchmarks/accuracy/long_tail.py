"""What each step of HP-DVAL buys on long-tailed labels, from CLIP zero-shot to both phases: one command, several seeds.

    # the built-in scenes and a small CLIP that is trained here first, from scratch, on a CPU or a GPU
    python -m benchmarks.accuracy.long_tail --seeds 3 --json FILE
    # your own data and CLIP
    python -m benchmarks.accuracy.long_tail --dataset FOLDER --clip FOLDER_OR_HUB_ID [--clip_revision COMMIT]

| method | trains |
|---|---|
| zero_shot | nothing: CLIP's score of "a photo of a NAME." |
| linear_probe | a logistic regression a label on the frozen image tower; its strength chosen on validation |
| coop | one context for all labels (CoOp), on the frozen CLIP |
| class_contexts | one context a label (as LMPT, without its captions), on the frozen CLIP |
| phase1 | HP-DVAL's student in two views, with distillation |
| phase1_phase2 | then, on the frozen student, HP-DVAL's two contexts |

A seed draws the long-tailed train split anew (`training.prepare.long_tail`) and the order of training; the last step
counts, nothing is chosen on the split that is measured. Labels are head with at least 100 images in train, medium
with 20 to 99, tail with fewer.
"""

import argparse
import copy
import hashlib
import inspect
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, get_cosine_schedule_with_warmup

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.peers import scene_clip
from benchmarks.peers.scene_clip import TAGGED, image_processor, word_tokenizer
from modeling_hsvlt import HPDVALForImageClassification, MultiLabelImageProcessor
from modeling_hsvlt.load_pretrained import load_pretrained
from training.check.imbalance import long_tail_groups
from training.data import scenes
from training.data.augment import build_augmentation
from training.data.batches import normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.metrics.functional import average_precision, multilabel_report
from training.prepare.long_tail import draw_long_tail, is_present, pareto_targets

# What a table shows, and its unit: percent, the variance over labels in percent squared as in the papers.
COLUMNS = {"mAP": 1e2, "mAP_head": 1e2, "mAP_medium": 1e2, "mAP_tail": 1e2, "mAP_variance": 1e4}
# What the published code uses for VOC-LT, whose 20 labels are nearest to these data; `--positive_weight class` is DB*.
LOSS = {"mu": 0.3, "negative_scale": 5.0, "kappa": 0.01}
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Recipe:
    """How a method is trained. `config` are fields of `HPDVALConfig`."""

    phase: str
    epochs: int
    learning_rate: float
    config: dict = field(default_factory=dict)


PROMPTS_ALONE = {"alpha": 1.0, "semantic_consistency_weight": 0.0, "context_init": "template"}
# Chosen on the validation split of seed 0, for prompts as for the student. Contexts that start at random, as CoOp's do,
# stayed far below zero-shot here in as many epochs.
RECIPES = {
    "coop": Recipe("phase2", 20, 2e-4, PROMPTS_ALONE),
    "class_contexts": Recipe("phase2", 20, 2e-4, {**PROMPTS_ALONE, "class_specific": True}),
    "phase1": Recipe("phase1", 20, 1e-3, {"alpha": 0.7}),
    "phase2": Recipe("phase2", 20, 2e-4, {"context_init": "template"}),
}
# The recipes of each method, one after the other.
METHODS = {
    "zero_shot": (),
    "linear_probe": (),
    "coop": ("coop",),
    "class_contexts": ("class_contexts",),
    "phase1": ("phase1",),
    "phase1_phase2": ("phase1", "phase2"),
}


@dataclass
class Split:
    """Images of a split in memory: uint8 pixels `(N, 3, H, W)`, labels `(N, num_labels)`."""

    pixels: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def read(cls, split, label_names: list[str], processor) -> "Split":
        rows = MultiLabelDataset(split, label_names, processor)
        rows = [rows[index] for index in tqdm(range(len(rows)), "Reading images", unit="img", leave=False)]
        return cls(
            torch.stack([row["pixel_values"] for row in rows]), torch.stack([row["labels"].to_dense() for row in rows])
        )


def cached_clip(cache: Path, tokenizer, steps: int, device: torch.device) -> CLIPModel:
    """The small CLIP of the scenes; trained once, and kept in `cache` under what it depends on."""
    sources = [inspect.getsource(module) for module in (scene_clip, scenes)]
    folder = cache / f"scene-clip-{hashlib.sha256(json.dumps([steps, *sources]).encode()).hexdigest()[:16]}"
    if not (folder / "model.safetensors").is_file():
        scene_clip.train_clip(tokenizer, steps=steps, device=device).cpu().save_pretrained(folder)
    return load_pretrained(CLIPModel, folder).eval()


class Benchmark:
    """A CLIP, its processor, and the data that all methods share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        if args.clip is None:
            self.tokenizer = word_tokenizer()
            self.clip = cached_clip(args.cache, self.tokenizer, args.clip_steps, self.device)
            self.processor = image_processor()
        else:
            pinned = {"revision": args.clip_revision}
            self.tokenizer = load_pretrained(AutoTokenizer, args.clip, **pinned)
            self.clip = load_pretrained(CLIPModel, args.clip, dtype=torch.float32, **pinned).eval()
            saved = load_pretrained(AutoImageProcessor, args.clip, **pinned)
            side = self.clip.config.vision_config.image_size
            statistics = {"image_mean": saved.image_mean, "image_std": saved.image_std}
            self.processor = MultiLabelImageProcessor(size={"height": side, "width": side}, **statistics)
        knobs = {"num_scenes": {"train": args.pool, "validation": 500, "test": args.num_test}, **TAGGED}
        loaded = load(args.dataset, scenes=knobs)
        self.splits, self.label_names = loaded.splits, loaded.label_names
        self.measured = self.validation = Split.read(self.splits["validation"], self.label_names, self.processor)
        if args.split != "validation":
            self.measured = Split.read(self.splits[args.split], self.label_names, self.processor)

    def draw(self, seed: int) -> Split:
        """The train split of a seed."""
        train = self.splits["train"]
        if self.args.largest:
            targets = pareto_targets(len(self.label_names), self.args.largest)
            train = train.select(draw_long_tail(is_present(train.labels), targets, seed=seed))
        return Split.read(train, self.label_names, self.processor)

    def new_model(self, train: Split, **config) -> HPDVALForImageClassification:
        """HP-DVAL at its start: CLIP's zero-shot scores."""
        counts = (train.labels == 1).sum(0).tolist()
        loss = {"class_counts": counts, "num_samples": len(train.labels), "positive_weight": self.args.positive_weight}
        patches = (self.clip.config.vision_config.image_size // self.clip.config.vision_config.patch_size) ** 2
        fields = {
            "loss_type": "distribution_balanced",
            "loss_kwargs": {**LOSS, **loss},
            "logit_scale": self.args.logit_scale,
            "local_top_k": max(1, round(patches * 32 / 196)),  # the published share of the patches
        }
        model = HPDVALForImageClassification.from_clip(self.clip, self.tokenizer, self.label_names, **fields, **config)
        model = model.to(self.device).eval()
        # The mean logit starts at what label frequency asks for: cosines know nothing of it.
        frequency = sum(counts) / (train.labels != -100).sum().item()
        model.config.logit_bias = math.log(frequency / (1 - frequency)) - float(self.score(model, train).mean())
        torch.nn.init.constant_(model.scale.logit_bias, model.config.logit_bias)
        return model

    def batch(self, pixels: torch.Tensor) -> torch.Tensor:
        return normalize_pixels(pixels.to(self.device), self.processor)

    def fit(self, model: HPDVALForImageClassification, train: Split, recipe: Recipe, seed: int) -> None:
        """Trains `model` as `recipe` says; AdamW, cosine, random crops."""
        torch.manual_seed(seed)
        model.set_phase(recipe.phase)
        model.train()
        epochs = max(1, round(recipe.epochs * self.args.epochs))
        batches = -(-len(train.pixels) // self.args.batch_size)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=1e-4)
        scheduler = get_cosine_schedule_with_warmup(optimizer, epochs * batches // 10, epochs * batches)
        crop = build_augmentation(train.pixels.shape[-1], horizontal_flip=0.0, crop_scale=(0.7, 1.0))
        for _ in range(epochs):
            for rows in torch.randperm(len(train.pixels)).split(self.args.batch_size):
                labels = train.labels[rows].to(self.device)
                pixels, labels = crop(train.pixels[rows].to(self.device).float() / 255, labels)
                loss = model(self.batch(pixels * 255), labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                scheduler.step()
        model.eval()

    @torch.inference_mode()
    def score(self, model: HPDVALForImageClassification, split: Split) -> np.ndarray:
        parts = split.pixels.split(self.args.batch_size * 4)
        return torch.cat([model(self.batch(pixels)).logits for pixels in parts]).cpu().numpy()

    @torch.inference_mode()
    def features(self, split: Split) -> np.ndarray:
        """CLIP's class token before its projection, which drops what no caption told apart."""
        tower = self.clip.to(self.device).vision_model
        parts = split.pixels.split(self.args.batch_size * 4)
        return torch.cat([tower(self.batch(pixels)).pooler_output for pixels in parts]).cpu().numpy()

    def linear_probe(self, train: Split) -> np.ndarray:
        """Scores of the measured split by one logistic regression a label, on standardised features."""
        fitted, validation, measured = (self.features(split) for split in (train, self.validation, self.measured))
        mean, std = fitted.mean(0), fitted.std(0) + 1e-6
        fitted, validation, measured = ((part - mean) / std for part in (fitted, validation, measured))
        best = (-1.0, None)
        for strength in PROBE_STRENGTHS:
            scores = {"validation": [], "measured": []}
            for label in range(train.labels.shape[1]):
                known = (train.labels[:, label] != -100).numpy()
                target = train.labels[known, label].numpy() > 0.5
                if target.all() or not target.any():
                    scores["validation"].append(np.zeros(len(validation)))
                    scores["measured"].append(np.zeros(len(measured)))
                    continue
                regression = LogisticRegression(C=strength, max_iter=2000).fit(fitted[known], target)
                scores["validation"].append(regression.decision_function(validation))
                scores["measured"].append(regression.decision_function(measured))
            on_validation = average_precision(np.stack(scores["validation"], 1), self.validation.labels.numpy())
            best = max(best, (np.nanmean(on_validation), strength), key=lambda entry: entry[0])
            if best[1] == strength:
                kept = np.stack(scores["measured"], 1)
        return kept

    def train(
        self,
        names: tuple[str, ...],
        train: Split,
        seed: int,
        trained: dict[tuple[str, ...], HPDVALForImageClassification],
    ) -> tuple[HPDVALForImageClassification, int]:
        """A model after these recipes, and how many numbers the last of them trained. `trained` are models that are
        ready, by their recipes; what went before the last recipe is taken from there, and the result joins them."""
        if not names:
            return self.new_model(train, **PROMPTS_ALONE), 0
        recipe, before = RECIPES[names[-1]], names[:-1]
        if before:
            model = trained[before] if before in trained else self.train(before, train, seed, trained)[0]
            model = copy.deepcopy(model)
            model.config.context_init = recipe.config.get("context_init", model.config.context_init)
        else:
            model = self.new_model(train, **recipe.config)
        self.fit(model, train, recipe, seed)
        trained[names] = model
        return model, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    def run(self, seed: int) -> dict:
        """The report of every method on the measured split."""
        train = self.draw(seed)
        positives = (train.labels == 1).sum(0).numpy()
        groups, labels = long_tail_groups(positives), self.measured.labels.numpy()
        methods, ready = {}, {}
        for method in self.args.methods:
            start = time.perf_counter()
            if method == "linear_probe":
                scores = self.linear_probe(train)
                trained = (self.clip.config.vision_config.hidden_size + 1) * len(self.label_names)
            else:
                model, trained = self.train(METHODS[method], train, seed, ready)
                scores = self.score(model, self.measured)
            report = multilabel_report(scores, labels, top_k=None, groups=groups)
            methods[method] = {**report, "seconds": time.perf_counter() - start, "trained_parameters": trained}
            figures = "".join(f"{unit * report.get(name, np.nan):8.2f}" for name, unit in COLUMNS.items())
            print(f"seed {seed}: {method:<16}{figures}", flush=True)
        return {"positives_in_train": positives.tolist(), "methods": methods}


def table(runs: list[dict], methods: list[str]) -> str:
    """mAP in percent, mean and standard deviation over the seeds."""
    lines = [
        "| method | total | head | medium | tail | variance | trained numbers | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        reports = [run["methods"][method] for run in runs]
        cells = []
        for name, unit in COLUMNS.items():
            values = [unit * report[name] for report in reports if name in report]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "-")
        seconds = statistics.mean(report["seconds"] for report in reports)
        lines.append(f"| {method} | {' | '.join(cells)} | {reports[0]['trained_parameters']:,} | {seconds:.0f} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict:
    """Trains and measures every method; returns what the JSON file holds."""
    start = time.perf_counter()
    benchmark = Benchmark(args)
    print(f"CLIP and data ready after {time.perf_counter() - start:.0f} s")
    runs = [benchmark.run(seed) for seed in range(args.seeds)]
    print(table(runs, args.methods))
    return {"options": {key: str(value) for key, value in vars(args).items()}, "runs": runs}


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("accuracy.long_tail", __doc__)
    parser.add_argument("--dataset", default="scenes", help="folder, Hub id, or scenes; default: scenes")
    parser.add_argument("--clip", help="folder or Hub id; default: a small one, trained here on the scenes")
    parser.add_argument("--clip_revision", help="commit of a CLIP on the Hub")
    parser.add_argument("--clip_steps", type=int, default=3000, help="training of the small one; default: 3000")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where it is kept; default: runs/cache")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=800, help="see draw_long_tail; 0: train as it is; default: 800")
    parser.add_argument("--pool", type=int, default=4000, help="scenes to draw the train split from; default: 4000")
    parser.add_argument("--num_test", type=int, default=2000, help="scenes to measure; default: 2000")
    parser.add_argument("--split", default="test", help="what to measure; default: test. Choose recipes on validation")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor of every method's epochs; default: 1")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--logit_scale", type=float, default=10.0, help="1 is the paper's; default: 10")
    parser.add_argument("--positive_weight", default="none", help="none (DB) or class (DB*); default: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
