"""The pointing game on the built-in scenes: does the peak of a label's heat map lie inside that label's object?

    python -m benchmarks.accuracy.pointing_game runs/quickstart/best [--split validation] [--num_scenes 1000] \
        [--json FILE]

(Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018.) Every label that is present is asked for
once; its peak is a hit inside any box of that label. "centre" guesses the middle of the image, "area" is the share
of the image that the boxes cover, what a random pixel would hit. Scenes are drawn as the checkpoint's own were: the
knobs are those of training/configs/quickstart.yaml unless --scenes says otherwise. Maps of HSVLT are shown for each
stage and for all four, which is what the pipeline's `explain=True` gives.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from datasets import Image

from benchmarks.command import benchmark_parser, run_benchmark
from modeling_hsvlt.heat_maps_multilabel import image_box, label_heat_maps, resize_to_image
from modeling_hsvlt.load_image import load_image
from training.checkpoint.loading import load_checkpoint
from training.data.scenes import build_scenes
from training.options import CheckpointOptions

RECIPE = Path(__file__).parents[2] / "training" / "configs" / "quickstart.yaml"
HSVLT_MAPS = {"stage 1": [0], "stage 2": [1], "stage 3": [2], "stage 4": [3], "mean of 2 to 4": [1, 2, 3]}
DEFAULT = "as explained"  # what explain=True gives


def hits(maps: torch.Tensor, boxes: list[dict], labels: list[int]) -> list[bool]:
    """Whether the peak of each map (labels, height, width) lies in a box of its label."""
    found = []
    for each, label in zip(maps, labels, strict=True):
        y, x = divmod(int(each.argmax()), each.shape[1])
        found.append(contains(boxes, label, x + 0.5, y + 0.5))
    return found


def contains(boxes: list[dict], label: int, x: float, y: float) -> bool:
    """Whether a point, in px, lies in one of the boxes of `label`."""
    return any(
        box["x"] <= x < box["x"] + box["w"] and box["y"] <= y < box["y"] + box["h"]
        for box in boxes
        if box["label"] == label
    )


@torch.inference_mode()
def play(model, image_processor, scenes, batch_size: int = 50) -> dict[str, list[bool | float]]:
    """One entry a present label and map; besides "centre" and "area"."""
    kinds = {DEFAULT: None}
    if model.config.model_type == "hsvlt":
        kinds |= HSVLT_MAPS
    outcome: dict[str, list] = {name: [] for name in ("centre", "area", *kinds)}
    scenes = scenes.cast_column("image", Image(decode=False))
    for start in range(0, len(scenes), batch_size):
        rows = scenes[start : start + batch_size]
        images = [load_image(image) for image in rows["image"]]
        pixels = image_processor(images=images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        maps = {name: label_heat_maps(model, pixels, stages=stages)[1].cpu() for name, stages in kinds.items()}
        for index, (image, boxes) in enumerate(zip(images, rows["boxes"], strict=True)):
            labels = sorted({box["label"] for box in boxes})
            box_in_input = image_box(image_processor, *image.size)
            for label in labels:
                outcome["centre"].append(contains(boxes, label, image.width / 2, image.height / 2))
                covered = np.zeros((image.height, image.width), dtype=bool)
                for box in boxes:
                    if box["label"] == label:
                        covered[box["y"] : box["y"] + box["h"], box["x"] : box["x"] + box["w"]] = True
                outcome["area"].append(float(covered.mean()))
            for name, each in maps.items():
                resized = resize_to_image(each[index, labels], *image.size, box_in_input)
                outcome[name] += hits(resized, boxes, labels)
    return outcome


def run(args: argparse.Namespace) -> dict:
    """Plays and prints the table; returns what the JSON file holds."""
    knobs = {**yaml.safe_load(RECIPE.read_text())["scenes"], **args.scenes}
    del knobs["num_scenes"]
    model, processor = load_checkpoint(CheckpointOptions(checkpoint=args.checkpoint))
    model.eval()
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    scenes = build_scenes(args.num_scenes, split=args.split, **knobs)
    if names != scenes.features["boxes"].feature["label"].names:
        raise ValueError(f"{args.checkpoint} was not trained on the built-in scenes: its labels are others.")
    outcome = play(model, processor, scenes)
    count = len(outcome["centre"])
    means = {name: float(np.mean(values)) for name, values in outcome.items()}
    print(f"{model.config.model_type}, {args.split}, {len(scenes)} scenes, {count} labels; hits, 95% interval\n")
    print("| map | hits | +- |\n|---|---|---|")
    for name, mean in means.items():
        print(f"| {name} | {mean:.3f} | {1.96 * np.std(outcome[name]) / count**0.5:.3f} |")
    setting = {"checkpoint": Path(args.checkpoint).name, "split": args.split, "scenes": len(scenes), "labels": count}
    return {**setting, "hits": means}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("accuracy.pointing_game", __doc__)
    parser.add_argument("checkpoint", help="folder or Hub id of a model trained on the built-in scenes")
    parser.add_argument("--split", default="validation", choices=["train", "validation", "test"])
    parser.add_argument("--num_scenes", type=int, default=1000)
    parser.add_argument("--scenes", type=json.loads, default={}, help="knobs of the scenes, as JSON")
    return run_benchmark(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
