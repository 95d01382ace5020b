"""What each part of MlTr is worth, on the built-in scenes: the same scenes, budget and seeds for every variant.

    python -m benchmarks.accuracy.mltr_parts --seeds 3 --json FILE
    python -m benchmarks.accuracy.mltr_parts --seeds 1 --epochs 1 --num_scenes 500    # a try of the command, no result

MlTr, reconstructed; layout inferred from the published parameter counts. Its paper names three problems: small objects,
similar objects, and objects that are likely given others. So the scenes hold digits from 12 to 32 px, half of them
bring a partner along, and recall is split: by the height of the largest object of a label (thirds of the test scenes),
and by whether the label's partner is in the scene as well. "false alarms" is how often a label is seen that is not
there while its partner is. Decisions are at the thresholds that training fitted on validation.

Each run is training/configs/mltr_nano_scenes.yaml through `training.train`, in a folder of its own below --output; a
finished run with the same options is not repeated.
"""

import argparse
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import yaml

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.timing import device_name, multiply_adds
from training import train
from training.checkpoint.loading import load_checkpoint
from training.config import TrainingConfig, parse_config
from training.data.batches import build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.scene_labels import SCENE_LABELS
from training.data.scenes import PARTNER, build_scenes
from training.metrics.functional import average_precision
from training.models.build import build_model
from training.options import CheckpointOptions
from training.places import native_precision
from training.scoring.predict import predict

RECIPE = Path(__file__).parents[2] / "training" / "configs" / "mltr_nano_scenes.yaml"
SCENES = {"min_size": 12, "cooccurrence": 0.5}  # over the recipe's
# Options over the recipe's. Without one of its sublayers a variant has fewer parameters and less to compute, as listed.
VARIANTS = {
    "pixel and cross-window attention": {},
    "without position bias": {"model": {"use_relative_position_bias": False}},
    "with absolute position embedding": {"model": {"use_absolute_embeddings": True}},
    "pixel attention alone": {"model": {"block_pattern": ["pixel", "mlp"]}},
    "cross-window attention alone": {"model": {"block_pattern": ["cross", "mlp"]}},
    "no attention": {"model": {"block_pattern": ["mlp"]}},
    "HSVLT nano": {"model_type": "hsvlt"},  # for comparison, at the same cost
}
COLUMNS = ("mAP", "small", "medium", "large", "alone", "with partner", "false alarms")


def label_groups(boxes: list[list[dict]]) -> dict[str, np.ndarray]:
    """Which labels of which scenes belong to which column.

    Args:
        boxes: for each scene the `boxes` of `training.data.scenes`, labels as numbers.

    Returns:
        Boolean arrays (scenes, 10). "small", "medium" and "large" part the labels that are present by the height of
        their largest object, "alone" and "with partner" by whether their `PARTNER` is present; "false alarms" are the
        absent labels whose partner is present.
    """
    heights = np.zeros((len(boxes), len(SCENE_LABELS)))
    for scene, objects in enumerate(boxes):
        for box in objects:
            heights[scene, box["label"]] = max(heights[scene, box["label"]], box["h"])
    present = heights > 0
    partner = present[:, list(PARTNER)]
    small, large = np.quantile(heights[present], [1 / 3, 2 / 3])
    return {
        "small": present & (heights <= small),
        "medium": present & (heights > small) & (heights <= large),
        "large": heights > large,
        "alone": present & ~partner,
        "with partner": present & partner,
        "false alarms": ~present & partner,
    }


def options(variant: str, seed: int, args: argparse.Namespace) -> TrainingConfig:
    """The training run of a variant."""
    folder = args.output / f"{variant.lower().replace(' ', '-')}-{seed}"
    fields = {"output_dir": str(folder), "seed": seed, "evaluate_test": False, **VARIANTS[variant]}
    if args.epochs is not None:
        fields["epochs"] = args.epochs
    scenes = dict(SCENES)
    if args.num_scenes is not None:
        scenes["num_scenes"] = {"train": args.num_scenes, "validation": min(args.num_scenes, 1000)}
    fields |= {f"scenes.{knob}": value for knob, value in scenes.items()}
    fields["mixed_precision"] = native_precision()  # as the recipe's "auto" stands in the config.yaml of a run
    words = {field: value if isinstance(value, str) else yaml.safe_dump(value) for field, value in fields.items()}
    return parse_config([str(RECIPE), *(f"--{field}={text}" for field, text in words.items())])


def train_once(config: TrainingConfig) -> float | None:
    """Trains unless the very run is there; seconds, or None.

    Raises:
        RuntimeError: training broke off.
    """
    folder = Path(config.output_dir)
    if (folder / "results.json").is_file() and parse_config([str(folder / "config.yaml")]) == config:
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    begin = time.perf_counter()
    if train.main([str(recipe), "--overwrite"]) != 0:
        raise RuntimeError(f"training of {folder} broke off; what it said stands above.")
    recipe.unlink()
    return time.perf_counter() - begin


def score(folder: Path, scenes) -> dict[str, float]:
    """A finished run's row on the test scenes."""
    model, processor = load_checkpoint(CheckpointOptions(checkpoint=str(folder / "best")))
    split = load(scenes, label_names=SCENE_LABELS).splits["train"]
    dataset = MultiLabelDataset(split, list(SCENE_LABELS), processor)
    scores, labels = predict(model, build_dataloader(dataset, batch_size=100, processor=processor), progress=False)
    decided = scores >= np.array(model.config.thresholds)
    rates = {name: float(decided[group].mean()) for name, group in label_groups(scenes["boxes"]).items()}
    return {"mAP": float(np.nanmean(average_precision(scores, labels))), **rates}


def print_table(results: dict[str, dict]) -> None:
    header = ["variant", "mAP", *(f"recall {name}" for name in COLUMNS[1:-1]), COLUMNS[-1]]
    header += ["parameters", "MMAC", "s/run"]
    print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for variant, row in results.items():
        cells = [f"{100 * row[name]['mean']:.1f} ± {100 * row[name]['std']:.1f}" for name in COLUMNS]
        cells += [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}"]
        cells.append("-" if row["seconds"] is None else f"{row['seconds']:.0f}")
        print(f"| {variant} | {' | '.join(cells)} |")


def run(args: argparse.Namespace) -> dict[str, dict]:
    """Trains and measures; returns what the JSON file holds."""
    # All of the training first: what scores afterwards leaves this process set up for another precision.
    seconds: dict[str, list[float | None]] = {variant: [] for variant in args.variants}
    for seed in range(args.seeds):
        for variant in args.variants:
            seconds[variant].append(train_once(options(variant, seed, args)))
    results = {}
    for variant in args.variants:
        rows = []
        for seed in range(args.seeds):
            config = options(variant, seed, args)
            knobs = {knob: value for knob, value in config.scenes.items() if knob != "num_scenes"}
            rows.append(score(Path(config.output_dir), build_scenes(args.test_scenes, split="test", **knobs)))
        with torch.device("meta"):
            parameters = build_model(config, list(SCENE_LABELS)).num_parameters()
        results[variant] = {
            name: {
                "mean": statistics.fmean(row[name] for row in rows),
                "std": statistics.stdev([row[name] for row in rows]) if len(rows) > 1 else 0.0,
            }
            for name in COLUMNS
        } | {
            "parameters": parameters,
            "macs": multiply_adds(lambda c=config: build_model(c, list(SCENE_LABELS)), config.image_size),
            "seconds": None if None in seconds[variant] else statistics.fmean(seconds[variant]),
        }
    date = datetime.now(UTC).date().isoformat()
    print(
        f"\n{config.epochs} epochs of {config.scenes['num_scenes']['train']:,} scenes, {args.seeds} seeds, mean and "
        f"sample standard deviation in percent, {args.test_scenes:,} test scenes, {device_name(torch.device('cpu'))}, "
        f"torch {torch.__version__}, {date}"
    )
    print_table(results)
    return results


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 2 when something was refused, 1 when a training broke off."""
    parser = benchmark_parser("accuracy.mltr_parts", __doc__)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ...")
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--num_scenes", type=int, help="training scenes an epoch, in place of the recipe's")
    parser.add_argument("--test_scenes", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="folder of the runs")
    try:
        return run_benchmark(run, parser, argv)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
