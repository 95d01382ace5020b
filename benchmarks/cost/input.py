"""Does decoding keep up with the model? Images a second of every step from file to prediction.

    python -m benchmarks.cost.input --images ../shared/data/voc/validation --image_size 224 --json FILE

One process on one machine, every step over the same images, in turn: decoding in full and at reduced scale (JPEG
draft mode), this package's processor and the stock Pillow processor of transformers, the data loader with 0, 1, 2, ...
workers (decode, resize and batch), batch augmentation, and the model. It is enough when the loader outruns the model.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, Image
from tqdm import tqdm
from transformers import ConvNextImageProcessorPil

from benchmarks.command import benchmark_parser, machine_options, run_benchmark
from benchmarks.timing import device_name, synchronise, warm_up
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor, load_image
from training.data.augment import build_augmentation
from training.data.batches import build_dataloader, normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.load import load as read_data

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def run(args: argparse.Namespace) -> dict:
    """Times every step and prints the table; returns what the JSON file holds."""
    files = sorted(file for file in args.images.rglob("*") if file.suffix.lower() in SUFFIXES)[: args.limit]
    if not files:
        raise ValueError(f"{args.images} holds no image ({', '.join(sorted(SUFFIXES))}).")
    torch.set_num_threads(args.threads)
    device, size = torch.device(args.device), {"height": args.image_size, "width": args.image_size}
    processor = MultiLabelImageProcessor(size=size)
    stock = ConvNextImageProcessorPil(size={"shortest_edge": args.image_size}, crop_pct=1.0, do_convert_rgb=True)
    images = [load_image(file) for file in files]
    split = Dataset.from_dict({"image": [str(file) for file in files], "labels": [[]] * len(files)})
    split = read_data(split.cast_column("image", Image(decode=False)), label_names=["a label"], label_format="ids")
    model = HSVLTForImageClassification(HSVLTConfig.preset(args.preset, num_labels=80)).eval()
    model.to(device, getattr(torch, args.dtype))
    if args.compile:
        model.compile(dynamic=False)
    augment = build_augmentation(args.image_size, horizontal_flip=0.5, color_jitter=0.2)
    batch = torch.rand(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.zeros(args.batch_size, 80, device=device)

    def each(function: Callable, items) -> Callable[[], int]:
        def run() -> int:
            for item in items:
                function(item)
            return len(items)

        return run

    def load(workers: int, margin: float = 0.0) -> Callable[[], int]:
        dataset = MultiLabelDataset(split.splits["train"], ["a label"], processor, margin=margin)
        loader = build_dataloader(dataset, batch_size=args.batch_size, num_workers=workers)
        next(iter(loader))  # starting workers is not decoding

        def run() -> int:
            pixels = (rows["pixel_values"].to(device, non_blocking=True) for rows in loader)
            return sum(len(normalize_pixels(each, processor)) for each in pixels)

        return run

    def forward() -> int:
        with torch.inference_mode():
            model(batch.to(model.dtype))
        return len(batch)

    def augmented() -> int:
        augment(batch, labels)
        return len(batch)

    steps = {
        "decode": each(load_image, files),
        "decode, reduced": each(lambda file: load_image(file, size_hint=args.image_size), files),
        "processor": each(lambda image: processor(image, return_tensors="pt"), images),
        "processor, stock": each(lambda image: stock(image, return_tensors="pt"), images),
        **{f"loader, {workers} workers": load(workers) for workers in args.workers},
        "loader for crops, 0 workers": load(0, margin=0.125),
        "augmentation": augmented,
        f"model ({args.preset})": forward,
    }
    warm_up(forward, device, args.compile)
    warm_up(augmented, device, False)
    rates = {name: [] for name in steps}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for name, step in steps.items():
            synchronise(device)
            start = time.perf_counter()
            count = step()
            synchronise(device)
            rates[name].append(count / (time.perf_counter() - start))

    medians = {name: statistics.median(values) for name, values in rates.items()}
    reference = medians[f"model ({args.preset})"]
    average = [sum(side) / len(images) for side in zip(*(image.size for image in images), strict=True)]
    print(
        f"\n{len(files)} images of {average[0]:.0f} x {average[1]:.0f} px on average to {args.image_size} px, "
        f"{device_name(device)}, torch {torch.__version__}, {args.rounds} rounds\n"
    )
    print("| step | images/s (min-max) | times the model's |\n|---|---|---|")
    for name, values in rates.items():
        span = f"{min(values):,.1f}-{max(values):,.1f}"
        print(f"| {name} | {medians[name]:,.1f} ({span}) | {medians[name] / reference:,.1f} |")
    times = {name: rate / reference for name, rate in medians.items()}
    return {"device": device_name(device), "images_per_second": rates, "times_the_model": times}


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("cost.input", __doc__)
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    parser.add_argument("--limit", type=int, default=256, help="at most so many of them")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--preset", default="tiny", help="the model whose speed is to be reached")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    machine_options(parser, rounds=3, dtype="of the weights", compiled="torch.compile the model")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
