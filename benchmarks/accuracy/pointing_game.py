"""The pointing game on the built-in scenes: does the peak of a label's heat map lie inside that label's object?

    python -m benchmarks.accuracy.pointing_game runs/quickstart/best [--split validation] [--num_scenes 1000] \
        [--json FILE]

(Zhang et al., "Top-down Neural Attention by Excitation Backprop", IJCV 2018.) Every label that is present is asked for
once; its peak is a hit inside any box of that label. "centre" guesses the middle of the image, "area" is the share
of the image that the boxes cover, what a random pixel would hit. Scenes are drawn as the checkpoint's own were: the
knobs are those of training/configs/quickstart.yaml unless --scenes says otherwise. Maps of HSVLT are shown for each
stage and for all four, which is what the pipeline's `explain=True` gives. Of each stage's attention also the share that
lies inside the boxes, beside "area", and its entropy divided by that of uniform attention.
"""

import argparse
import json
import math
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
HSVLT_MAPS = {"stage 1": [0], "stage 2": [1], "stage 3": [2], "stage 4": [3], "stages 2 to 4": [1, 2, 3]}
DEFAULT = "as explained"  # what explain=True gives


def covered(boxes: list[dict], labels: list[int], width: int, height: int) -> torch.Tensor:
    """Which pixels, (labels, height, width), lie in a box of each label; boxes are in px."""
    pixels = torch.zeros(len(labels), height, width, dtype=torch.bool)
    for box in boxes:
        rows, columns = slice(box["y"], box["y"] + box["h"]), slice(box["x"], box["x"] + box["w"])
        pixels[labels.index(box["label"]), rows, columns] = True
    return pixels


def hits(maps: torch.Tensor, objects: torch.Tensor) -> list[bool]:
    """Whether the peak of each map (labels, height, width) lies in `objects`, a mask of that shape."""
    return objects.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0].tolist()


def inside(attention: torch.Tensor, objects: torch.Tensor) -> list[float]:
    """The share of each map (labels, height, width), not negative, that lies in `objects`."""
    return ((attention * objects).sum((-2, -1)) / attention.sum((-2, -1))).tolist()


def entropy(attention: torch.Tensor) -> list[float]:
    """Of each label's weights (heads, labels, h, w) over the cells, relative to uniform ones; mean over heads."""
    return (torch.special.entr(attention).sum((-2, -1)).mean(0) / math.log(attention[0, 0].numel())).tolist()


@torch.inference_mode()
def play(model, image_processor, scenes, batch_size: int = 50) -> tuple[dict[str, list], dict[str, dict[str, list]]]:
    """One entry a present label: by map the hits, besides "centre" and "area", and, for HSVLT, by stage the share
    "inside" and the "entropy" of the attention."""
    kinds: dict[str, list[int] | None] = {DEFAULT: None}
    stages = []
    if model.config.model_type == "hsvlt":
        kinds |= HSVLT_MAPS
        stages = list(HSVLT_MAPS)[:4]
    outcome: dict[str, list] = {name: [] for name in ("centre", "area", *kinds)}
    looked: dict[str, dict[str, list]] = {stage: {"inside": [], "entropy": []} for stage in stages}
    everything = torch.arange(model.config.num_labels, device=model.device)
    scenes = scenes.cast_column("image", Image(decode=False))
    for start in range(0, len(scenes), batch_size):
        rows = scenes[start : start + batch_size]
        images = [load_image(image) for image in rows["image"]]
        pixels = image_processor(images=images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        maps = {name: label_heat_maps(model, pixels, stages=read)[1].cpu() for name, read in kinds.items()}
        attentions = {}
        if stages:
            output = model(pixel_values=pixels, class_ids=everything, output_attentions=True)
            attentions = {
                stage: each.float().cpu() for stage, each in zip(stages, output.attentions, strict=True)
            }  # (B, heads, N, h, w)
        for index, (image, boxes) in enumerate(zip(images, rows["boxes"], strict=True)):
            labels = sorted({box["label"] for box in boxes})
            box_in_input = image_box(image_processor, *image.size)
            objects = covered(boxes, labels, *image.size)
            outcome["centre"] += objects[:, image.height // 2, image.width // 2].tolist()
            outcome["area"] += objects.float().mean((-2, -1)).tolist()
            for name, each in maps.items():
                outcome[name] += hits(resize_to_image(each[index, labels], *image.size, box_in_input), objects)
            for stage, each in attentions.items():
                weights = each[index][:, labels]
                on_image = resize_to_image(weights.mean(0), *image.size, box_in_input)
                looked[stage]["inside"] += inside(on_image, objects)
                looked[stage]["entropy"] += entropy(weights)
    return outcome, looked


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
    outcome, looked = play(model, processor, scenes)
    count = len(outcome["centre"])
    means = {name: float(np.mean(values)) for name, values in outcome.items()}
    attention = {
        stage: {name: float(np.mean(values)) for name, values in each.items()} for stage, each in looked.items()
    }
    print(f"{model.config.model_type}, {args.split}, {len(scenes)} scenes, {count} labels; hits, 95% interval\n")
    print("| map | hits | +- | attention inside the boxes | its entropy |\n|---|---|---|---|---|")
    for name, mean in means.items():
        of_stage = " | ".join(f"{value:.3f}" for value in attention[name].values()) if name in attention else " | "
        print(f"| {name} | {mean:.3f} | {1.96 * np.std(outcome[name]) / count**0.5:.3f} | {of_stage} |")
    setting = {"checkpoint": Path(args.checkpoint).name, "split": args.split, "scenes": len(scenes), "labels": count}
    return {**setting, "hits": means, "attention": attention}


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("accuracy.pointing_game", __doc__)
    parser.add_argument("checkpoint", help="folder or Hub id of a model trained on the built-in scenes")
    parser.add_argument("--split", default="validation", choices=["train", "validation", "test"])
    parser.add_argument("--num_scenes", type=int, default=1000)
    parser.add_argument("--scenes", type=json.loads, default={}, help="knobs of the scenes, as JSON")
    return run_benchmark(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
