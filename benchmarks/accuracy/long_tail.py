"""What each step of HP-DVAL buys on long-tailed labels, from CLIP zero-shot to both phases: one command, several seeds.

    # the built-in scenes and a small CLIP that is trained here first, from scratch, on a CPU or a GPU
    python -m benchmarks.accuracy.long_tail --seeds 3 --json FILE
    # few images a label in place of a long tail; a CLIP that has read more of places, colours, sizes and counts
    python -m benchmarks.accuracy.long_tail --shots 16 --captions rich
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

A seed draws the train split anew (`training.prepare.long_tail`) and the order of training; the last step counts,
nothing is chosen on the split that is measured. Labels are head with at least 100 images in train, medium with 20 to
99, tail with fewer. Prompts train on what the frozen image tower gives for some crops of each image.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, get_cosine_schedule_with_warmup

from benchmarks.accuracy.prompt_recipes import BEFORE, METHODS, PROMPTS_ALONE, Recipe, StoredFeatures, chosen_recipe
from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.peers import scene_clip
from benchmarks.peers.scene_clip import TAGGED, WORDS_OF, image_processor, word_tokenizer
from modeling_hsvlt import HPDVALForImageClassification, MultiLabelImageProcessor, multilabel_loss
from modeling_hsvlt.load_pretrained import load_pretrained
from training.check.imbalance import long_tail_groups
from training.data import scenes
from training.data.augment import build_augmentation
from training.data.batches import normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.metrics.functional import average_precision, multilabel_report
from training.prepare.long_tail import draw_episode, draw_long_tail, is_present, pareto_targets

# What a table shows, and its unit: percent, the variance over labels in percent squared as in the papers.
COLUMNS = {"mAP": 1e2, "mAP_head": 1e2, "mAP_medium": 1e2, "mAP_tail": 1e2, "mAP_variance": 1e4}
# What the published code uses for VOC-LT, whose 20 labels are nearest to these data; `--positive_weight class` is DB*.
LOSS = {"mu": 0.3, "negative_scale": 5.0, "kappa": 0.01}
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
CROPS = 8  # of each image, for prompts on a frozen image tower


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


def cached_clip(cache: Path, captions: str, steps: int, device: torch.device) -> CLIPModel:
    """The small CLIP of the scenes; trained once, and kept in `cache` under what it depends on. That of rich captions
    trains the image tower of the other on, for as many steps again."""
    depends = [captions, steps, *(inspect.getsource(module) for module in (scene_clip, scenes))]
    folder = cache / f"scene-clip-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}"
    if not (folder / "model.safetensors").is_file():
        options = {"steps": steps, "captions": captions, "device": device}
        options["start"] = cached_clip(cache, "names", steps, device) if captions == "rich" else None
        scene_clip.train_clip(word_tokenizer(WORDS_OF[captions]), **options).cpu().save_pretrained(folder)
    return load_pretrained(CLIPModel, folder).eval()


class Benchmark:
    """A CLIP, its processor, and the data that all methods share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        if args.clip is None:
            self.tokenizer = word_tokenizer(WORDS_OF[args.captions])
            self.clip = cached_clip(args.cache, args.captions, args.clip_steps, self.device)
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
        if self.args.shots:
            train = train.select(draw_episode(is_present(train.labels), self.args.shots, seed=seed))
        elif self.args.largest:
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
        """Trains `model` as `recipe` says; cosine, random crops."""
        torch.manual_seed(seed)
        model.set_phase(recipe.phase)
        if recipe.phase == "phase2" and self.args.calibrate:
            self.calibrate(model, train)
        model.train()
        epochs, num_images = max(1, round(recipe.epochs * self.args.epochs)), len(train.pixels)
        batches = -(-num_images // self.args.batch_size)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if recipe.optimizer == "sgd":  # as CoOp's
            optimizer = torch.optim.SGD(trained, lr=recipe.learning_rate, momentum=0.9, weight_decay=5e-4)
        else:
            optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=1e-4)
        scheduler = get_cosine_schedule_with_warmup(optimizer, epochs * batches // 10, epochs * batches)
        student, crops = model.hp_dval.student, min(CROPS, epochs)
        if recipe.phase == "phase2":
            model.hp_dval.student = self.store(student, train, crops, patches=model.config.alpha < 1)
        for epoch in range(epochs):
            for rows in torch.randperm(num_images).split(self.args.batch_size):
                labels = train.labels[rows].to(self.device)
                if recipe.phase == "phase2":
                    inputs = (rows + epoch % crops * num_images).to(self.device)
                else:
                    inputs = self.crop(train.pixels[rows])
                loss = model(inputs, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                scheduler.step()
        model.hp_dval.student = student
        model.eval()

    def calibrate(self, model: HPDVALForImageClassification, train: Split) -> None:
        """Moves the logits' scale and bias, which no ranking depends on, to where the loss on the train split is least:
        prompts would else learn to make all cosines smaller or larger first, at the cost of their order."""
        scores, labels = torch.from_numpy(self.score(model, train)), train.labels
        factor, shift = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        optimizer = torch.optim.LBFGS([factor, shift], max_iter=100, line_search_fn="strong_wolfe")
        mean = scores.mean()  # around it the two are nearly independent

        def loss() -> torch.Tensor:
            logits = factor.exp() * (scores - mean) + mean + shift
            value = multilabel_loss(logits, labels, model.config.loss_type, model.config.loss_kwargs)
            optimizer.zero_grad()
            value.backward()
            return value

        optimizer.step(loss)
        config, factor = model.config, factor.exp().item()
        config.logit_scale = factor * config.logit_scale
        config.logit_bias = factor * (config.logit_bias - mean.item()) + mean.item() + shift.item()
        torch.nn.init.constant_(model.scale.logit_scale, math.log(config.logit_scale))
        torch.nn.init.constant_(model.scale.logit_bias, config.logit_bias)

    def crop(self, pixels: torch.Tensor) -> torch.Tensor:
        """Random crops of uint8 images, normalised."""
        crop = build_augmentation(pixels.shape[-1], horizontal_flip=0.0, crop_scale=(0.7, 1.0))
        cropped, _ = crop(pixels.to(self.device).float() / 255, pixels.new_zeros(len(pixels), 1).float())
        return self.batch(cropped * 255)

    @torch.no_grad()
    def store(self, student: nn.Module, train: Split, crops: int, *, patches: bool) -> StoredFeatures:
        """What a frozen student gives for so many crops of each image: those of all images, again and again."""
        parts = train.pixels.split(self.args.batch_size * 4)
        image, local, *_ = zip(
            *(student(self.crop(part), patches) for _ in range(crops) for part in parts), strict=True
        )
        return StoredFeatures(torch.cat(image), torch.cat(local) if patches else None)

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
        recipe, before = chosen_recipe(names[-1], self.args), names[:-1]
        if before:
            model = trained[before] if before in trained else self.train(before, train, seed, trained)[0]
            model = copy.deepcopy(model)
            for name, value in recipe.config.items():
                setattr(model.config, name, value)
        else:
            model = self.new_model(train, **recipe.config)
        self.fit(model, train, recipe, seed)
        trained[names] = model
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # At `alpha` 1 scores leave the local view out, and half of the contexts are its own.
        return model, count // 2 if recipe.phase == "phase2" and model.config.alpha == 1 else count

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


def gains(runs: list[dict], methods: list[str]) -> str:
    """What prompts add to what they start from, in points of mAP: mean and standard deviation over the draws."""
    lines = []
    for method, before in BEFORE.items():
        if method in methods and before in methods:
            of = [100 * (run["methods"][method]["mAP"] - run["methods"][before]["mAP"]) for run in runs]
            spread = f" ± {statistics.stdev(of):.2f}" if len(of) > 1 else ""
            lines.append(f"{method} over {before}: {statistics.mean(of):+.2f}{spread}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict:
    """Trains and measures every method; returns what the JSON file holds."""
    start = time.perf_counter()
    benchmark = Benchmark(args)
    print(f"CLIP and data ready after {time.perf_counter() - start:.0f} s")
    runs = [benchmark.run(seed) for seed in range(args.seeds)]
    print(table(runs, args.methods))
    print(gains(runs, args.methods))
    return {"options": {key: str(value) for key, value in vars(args).items()}, "runs": runs}


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("accuracy.long_tail", __doc__)
    parser.add_argument("--dataset", default="scenes", help="folder, Hub id, or scenes; default: scenes")
    parser.add_argument("--clip", help="folder or Hub id; default: a small one, trained here on the scenes")
    parser.add_argument("--clip_revision", help="commit of a CLIP on the Hub")
    parser.add_argument("--captions", choices=tuple(WORDS_OF), default="names", help="of the small one; default: names")
    parser.add_argument("--clip_steps", type=int, default=3000, help="training of the small one; default: 3000")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where it is kept; default: runs/cache")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--largest", type=int, default=800, help="see draw_long_tail; 0: train as it is; default: 800")
    parser.add_argument("--shots", type=int, help="so many images a label (draw_episode) in place of a long tail")
    parser.add_argument("--pool", type=int, default=4000, help="scenes to draw the train split from; default: 4000")
    parser.add_argument("--num_test", type=int, default=2000, help="scenes to measure; default: 2000")
    parser.add_argument("--split", default="test", help="what to measure; default: test. Choose recipes on validation")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor of every method's epochs; default: 1")
    parser.add_argument("--calibrate", action="store_true", help="set scale and bias by the loss before prompts train")
    parser.add_argument("--context_init", choices=("template", "random"), help="start of prompts; default: template")
    parser.add_argument("--prompt_rate", type=float, help="learning rate of prompts; default: the recipe's, 2e-4")
    parser.add_argument("--prompt_epochs", type=int, help="epochs of prompts; default: the recipe's, 20")
    parser.add_argument("--prompt_optimizer", choices=("adamw", "sgd"), help="of prompts; default: adamw")
    parser.add_argument("--consistency", type=float, help="weight of phase 2's semantic consistency; default: 1")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--logit_scale", type=float, default=10.0, help="1 is the paper's; default: 10")
    parser.add_argument("--positive_weight", default="none", help="none (DB) or class (DB*); default: none")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
