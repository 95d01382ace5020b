"""What cached label texts save: HP-DVAL beside its bare image tower and beside transformers' zero-shot pipeline.

    python -m benchmarks.cost.cached_text --num_labels 80 --batch_size 1 8 --json FILE

Random weights of CLIP's ViT-B/16 size, noise images, one process, interleaved: every round times each of them once,
in turn, and a ratio is the median of the ratios round by round. "tower" is `CLIPVisionModelWithProjection`, "hp_dval"
the classifier with its two views, and "zero_shot" what the pipeline `zero-shot-image-classification` runs for each
image: `CLIPModel` on it and on all label texts. With --pipelines both pipelines themselves, on a photograph that they
resize. With --compile the text tower is dropped first: in a graph it would run for every batch.
"""

import argparse
import statistics
import sys

import torch
from PIL import Image
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection
from transformers.pipelines import ZeroShotImageClassificationPipeline

from benchmarks.command import benchmark_parser, machine_options, run_benchmark
from benchmarks.peers.scene_clip import word_tokenizer
from benchmarks.timing import arithmetic, device_name, repeats_of, timed, warm_up
from modeling_hsvlt import (
    HPDVALForImageClassification,
    MultiLabelImageClassificationPipeline,
    MultiLabelImageProcessor,
    MultiLabelProcessor,
)

SIDE = 224


def build(num_labels: int, device: torch.device, layers: int = 12):
    """CLIP of the published size with a tokenizer whose label names are one token each, and the models made of it."""
    names = [f"label{index}" for index in range(num_labels)]
    tokenizer = word_tokenizer(("a", "photo", "of", *names))
    config = CLIPConfig(
        text_config={
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "num_hidden_layers": layers,
        },
        vision_config={"patch_size": 16, "num_hidden_layers": layers},
    )
    torch.manual_seed(0)
    clip = CLIPModel(config).eval()
    model = HPDVALForImageClassification.from_clip(clip, tokenizer, names, context_init="template").eval()
    tower = CLIPVisionModelWithProjection(config.vision_config).eval()
    return clip.to(device), model.to(device), tower.to(device), tokenizer, names


def run(args: argparse.Namespace) -> dict:
    """Times all and prints the table; returns what the JSON file holds."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    clip, model, tower, tokenizer, names = build(args.num_labels, device, args.layers)
    for each in (clip, model, tower):
        each.to(dtype)
    if args.compile:
        torch.compiler.reset()
        model.drop_text_model()
        for each in (clip, model, tower):
            each.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
    prompts = [f"a photo of a {name}." for name in names]
    padding = {"padding": "max_length", "max_length": 77} if args.max_length else {"padding": True}
    texts = tokenizer(prompts, return_tensors="pt", **padding).to(device)

    rows = []
    with torch.inference_mode():
        for batch_size in args.batch_size:
            pixels = torch.randn(batch_size, 3, SIDE, SIDE, device=device, dtype=dtype)
            steps = {
                "tower": lambda pixels=pixels: tower(pixels),
                "hp_dval": lambda pixels=pixels: model(pixels),
                # The pipeline hands over one image at a time, each with all texts.
                "zero_shot": lambda pixels=pixels: [clip(pixel_values=one[None], **texts) for one in pixels],
            }
            if args.pipelines and batch_size == 1:
                steps |= pipelines(clip, model, tokenizer, names, device)
            for step in steps.values():
                warm_up(step, device, args.compile)
            repeats = {name: repeats_of(step, device) for name, step in steps.items()}
            seconds = {name: [] for name in steps}
            for _ in tqdm(range(args.rounds), desc=f"batch {batch_size}", leave=False):
                for name, step in steps.items():
                    seconds[name].append(timed(step, device, repeats=repeats[name]))
            for name, reference in (("hp_dval", "tower"), ("zero_shot", "hp_dval"), ("pipeline_zero_shot", "pipeline")):
                if name in seconds:
                    ratios = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
                    row = {"batch_size": batch_size, "model": name, "over": reference}
                    row |= {"ratio": statistics.median(ratios), "ratio_spread": [min(ratios), max(ratios)]}
                    rows.append({**row, "ms": 1000 * statistics.median(seconds[name])})

    how = f"{args.dtype}, {'compiled' if args.compile else 'eager'}, {arithmetic(device)}"
    print(f"{device_name(device)}, {how}, {args.num_labels} labels of {texts['input_ids'].shape[1]} tokens")
    print("| images | what | over | ratio | least to most | ms |\n|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_spread"]
        print(
            f"| {row['batch_size']} | {row['model']} | {row['over']} | {row['ratio']:.3f} | {low:.3f} to {high:.3f} | "
            f"{row['ms']:.1f} |"
        )
    return {"device": device_name(device), "rows": rows}


def pipelines(clip, model, tokenizer, names, device) -> dict:
    """Both pipelines on one photograph of common size."""
    photograph = Image.effect_noise((640, 480), 60).convert("RGB")
    side = {"height": SIDE, "width": SIDE}
    zero_shot = ZeroShotImageClassificationPipeline(
        model=clip, tokenizer=tokenizer, image_processor=CLIPImageProcessor(), device=device
    )
    processor = MultiLabelProcessor(MultiLabelImageProcessor(size=side), id2label=model.config.id2label)
    ours = MultiLabelImageClassificationPipeline(model=model, processor=processor, device=device)
    return {
        "pipeline": lambda: ours(photograph),
        "pipeline_zero_shot": lambda: zero_shot(
            photograph, candidate_labels=names, hypothesis_template="a photo of a {}."
        ),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("cost.cached_text", __doc__)
    parser.add_argument("--num_labels", type=int, default=80)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=12, help="of each tower; fewer to try the command")
    parser.add_argument(
        "--max_length", action="store_true", help="pad texts to CLIP's 77 tokens, as some processors do"
    )
    parser.add_argument("--pipelines", action="store_true", help="time the two pipelines on a photograph as well")
    machine_options(parser, rounds=9, dtype="of the weights", compiled="torch.compile, with CUDA graphs on a GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
