"""How well inference uses this processor: images a second by data type and runtime, and the share of what it could do.

    python -m benchmarks.cost.cpu                                   random weights, small at 448 px
    python -m benchmarks.cost.cpu CHECKPOINT --dataset ../shared/data/voc --split validation --json FILE

Every round runs each way once, in turn, on the same noise; a ratio is the median of the ratios round by round. "limit"
is the time that the model's multiply-adds take as plain matrix products of the same data type (2048 x 2048 x 2048, in
the same round) to the time that the model takes; int8 has no such product to be compared with here. "compiled" is
`torch.compile` with the weights as constants, laid out for the processor once (`torch._inductor.config.freezing`).
"bare" is transformers' own backbone with random weights, as anybody would call it. With --dataset each way's mAP is
computed too. int8 is that of `hsvlt export`.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch._inductor.config
from accelerate import Accelerator
from transformers import AutoModel

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.timing import CountMultiplyAdds, device_name, timed
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor
from training.checkpoint.loading import load_checkpoint
from training.metrics.functional import average_precision
from training.options import ScoringOptions
from training.publish.to_onnx import OnnxClassifier, export_onnx, image_size, quantize_int8
from training.scoring.predict import load_scored, score_split

WAYS = ("fp32", "bf16", "fp32_compiled", "bf16_compiled", "onnx_fp32", "onnx_int8", "bare_fp32", "bare_bf16")
SIDE = 2048  # of a plain product: large enough for the full speed, small enough for a second


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("cost.cpu", __doc__)
    parser.add_argument("checkpoint", nargs="?", help="folder; left out: random weights")
    parser.add_argument("--preset", default="small", help="of the random weights")
    parser.add_argument("--image_size", type=int, default=448, help="of the random weights, in px")
    parser.add_argument("--num_labels", type=int, default=80, help="of the random weights")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dataset", help="for mAP")
    parser.add_argument("--split", default="validation")
    return run_benchmark(run, parser, argv)


@torch._inductor.config.patch(freezing=True)
@torch.inference_mode()
def run(args: argparse.Namespace) -> list[dict]:
    """A row for each way and batch size.

    Raises:
        ValueError, OSError: the checkpoint or the dataset cannot be read, or a mAP of random weights was asked for.
    """
    torch.set_num_threads(args.threads)
    if args.checkpoint is None and args.dataset is not None:
        raise ValueError("Random weights have no mAP worth printing; give a checkpoint, or leave out --dataset.")
    if args.checkpoint is None:
        model = HSVLTForImageClassification(HSVLTConfig.preset(args.preset, num_labels=args.num_labels))
        processor = MultiLabelImageProcessor(size={"height": args.image_size, "width": args.image_size})
    else:
        model, processor = load_checkpoint(argparse.Namespace(checkpoint=args.checkpoint, revision=None))
    model, size = model.float().eval(), image_size(processor)
    with tempfile.TemporaryDirectory() as folder:
        models = {way: build(way, model, processor, Path(folder)) for way in WAYS if way in args.ways}
        rows = [row for batch in args.batch_size for row in measure(models, torch.randn(batch, 3, *size), args.rounds)]
        found = mean_precisions(models, processor, args) if args.dataset else {}
    print(f"\n{device_name(torch.device('cpu'))}, torch {torch.__version__}, {size[0]} x {size[1]} px\n")
    print(
        "| way | batch | images/s | time to fp32's (min-max) | to the bare one's | GFLOP/s | share of the limit | mAP |"
    )
    print("|---" * 8 + "|")
    for row in rows:
        row["mAP"] = found.get(row["way"])
        share = "-" if row["share"] is None else f"{row['share']:.2f}"
        print(
            f"| {row['way']} | {row['batch']} | {row['rate']:.2f} | {of_rounds(row['to_fp32'])} "
            f"| {of_rounds(row['to_bare'])} | {row['gflops']:.0f} | {share} "
            f"| {'-' if row['mAP'] is None else format(row['mAP'], '.4f')} |"
        )
    return rows


def of_rounds(ratios: list[float]) -> str:
    """Median, least and largest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"


def build(way: str, model, processor, folder: Path):
    """The model as this way computes it: gives `logits`, or a backbone's outputs, for `pixel_values`."""
    if way.startswith("onnx"):
        path = folder / "model.onnx"
        if not path.exists():
            export_onnx(copy.deepcopy(model), processor, path)
        if way == "onnx_int8":
            quantize_int8(path, folder / "int8.onnx")
            path = folder / "int8.onnx"
        return OnnxClassifier(path, model.config)
    own = AutoModel.from_config(model.config.backbone_config) if way.startswith("bare") else copy.deepcopy(model)
    own = own.eval().to(torch.bfloat16 if "bf16" in way else torch.float32)
    if way.endswith("compiled"):
        own.compile(dynamic=False)
    return own


def measure(models: dict, pixels: torch.Tensor, rounds: int) -> list[dict]:
    """Rows of one batch size."""
    device = torch.device("cpu")
    dtypes = {way: torch.bfloat16 if "bf16" in way else torch.float32 for way in models}
    inputs = {way: pixels.to(dtypes[way]) for way in models}
    products = {dtype: torch.randn(SIDE, SIDE).to(dtype) for dtype in dict.fromkeys(dtypes.values())}
    work = {}
    for way, model in models.items():  # and so each has been called once
        if "compiled" in way or "onnx" in way:
            model(pixel_values=inputs[way])
            continue
        # Under inference_mode linear layers and convolutions are not seen as the products that they are.
        with torch.inference_mode(False), torch.no_grad(), CountMultiplyAdds() as counter:
            model(pixel_values=torch.zeros(pixels.shape, dtype=dtypes[way]))
        work[way] = counter.total
    plain = next((work[way] for way in ("fp32", "bf16") if work.get(way)), 0)
    work = {way: work.get(way, plain) for way in models}
    seconds, limits = {way: [] for way in models}, {dtype: [] for dtype in products}
    for matrix in products.values():
        matrix @ matrix
    for _ in range(rounds):
        for dtype, matrix in products.items():
            limits[dtype].append(SIDE**3 / timed(lambda matrix=matrix: matrix @ matrix, device))
        for way, model in models.items():
            seconds[way].append(timed(lambda model=model, way=way: model(pixel_values=inputs[way]), device))
    rows = []
    for way, times in seconds.items():
        middle = statistics.median(times)
        shares = [work[way] / rate / took for rate, took in zip(limits[dtypes[way]], times, strict=True)]
        base = "bare_fp32" if way.startswith("bare") else "fp32"
        bare = "bare_bf16" if dtypes[way] == torch.bfloat16 else "bare_fp32"
        to_fp32, to_bare = ([a / b for a, b in zip(times, seconds.get(to, []), strict=False)] for to in (base, bare))
        rows.append(
            {
                "way": way,
                "batch": len(pixels),
                "rate": len(pixels) / middle,
                "to_fp32": to_fp32,
                "to_bare": to_bare,
                "gflops": 2 * work[way] / middle / 1e9,
                "share": None if way == "onnx_int8" or not work[way] else statistics.median(shares),
                "seconds": times,
            }
        )
    return rows


def mean_precisions(models: dict, processor, args: argparse.Namespace) -> dict[str, float]:
    """mAP of each way that gives scores, on the same images."""
    options = ScoringOptions(checkpoint=args.checkpoint, dataset=args.dataset, split=args.split)
    accelerator, found = Accelerator(cpu=True), {}
    for way, model in models.items():
        if not way.startswith("bare"):
            loaded = load_scored(model.config, options, accelerator)
            scored = score_split(model, processor, options, accelerator, loaded=loaded)
            found[way] = float(np.nanmean(average_precision(scored.scores, scored.labels)))
    return found


if __name__ == "__main__":
    sys.exit(main())
