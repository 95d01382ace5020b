"""Images a second of HSVLT beside its bare backbone and the heads people would pick instead.

    python -m benchmarks.cost.speed --preset small --image_size 448 --num_labels 80 --batch_size 8 --json FILE

All models run in one process on random weights and noise images, interleaved: every round times each of them once,
in turn, and a ratio is the median of the ratios round by round, so that a machine whose speed drifts drifts for all.
"bare" is transformers' ConvNextModel as anybody would call it; in training it is ConvNextForImageClassification, since
a bare backbone has no loss. "vit" is ViT-B/16 as ViTModel, "hsvlt_vit" the label stream on it. Memory is the peak
beyond the weights (of the device; on a CPU of the process, in one of its own), and with all that stays: weights and, in
training, the optimizer's state. While CUDA graphs are replayed nothing is allocated: with them there is no figure.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, ConvNextForImageClassification, SwinConfig, ViTConfig

from benchmarks.command import benchmark_parser, machine_options, run_benchmark
from benchmarks.peers.heads import HEADS
from benchmarks.timing import arithmetic, device_name, multiply_adds, repeats_of, synchronise, timed, warm_up
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MlTrConfig, MlTrForImageClassification


class BackboneWithHead(nn.Module):
    """transformers' own backbone under one of the peers' heads."""

    def __init__(self, backbone_config, head: str, num_labels: int):
        super().__init__()
        self.backbone = AutoModel.from_config(backbone_config)
        self.head = HEADS[head](backbone_config.hidden_sizes[-1], num_labels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(pixel_values).last_hidden_state)


def build(name: str, preset: str, image_size: int, num_labels: int, candidate_labels: int, chunk: int | None):
    """The model that a row of the table stands for."""
    config = HSVLTConfig.preset(preset, num_labels=num_labels, label_chunk_size=chunk)
    if name.startswith("bare"):
        return AutoModel.from_config(config.backbone_config)
    if name == "linear":
        config.backbone_config.num_labels = num_labels
        return ConvNextForImageClassification(config.backbone_config)
    if name == "hsvlt_projected":
        config.absorb_projections = False
    elif name == "hsvlt_candidates":
        config.candidate_labels = candidate_labels
    if name.startswith("hsvlt") and name != "hsvlt_vit":
        return HSVLTForImageClassification(config)
    if name.endswith("vit"):
        tower = ViTConfig(image_size=image_size)  # ViT-B/16
        if name == "vit":
            return AutoModel.from_config(tower, add_pooling_layer=False)
        return HSVLTForImageClassification(
            HSVLTConfig(backbone_config=tower, image_size=image_size, num_labels=num_labels, label_chunk_size=chunk)
        )
    if name == "swin_t":
        return AutoModel.from_config(SwinConfig(image_size=image_size))
    if name.startswith("mltr_"):
        return MlTrForImageClassification(
            MlTrConfig.preset(name.removeprefix("mltr_"), num_labels=num_labels, image_size=image_size)
        )
    return BackboneWithHead(config.backbone_config, name, num_labels)


MODELS = (
    *("bare", "bare_eager", "bare_channels_last", "linear"),
    *("hsvlt", "hsvlt_projected", "hsvlt_candidates"),
    *("query2label", "ml_decoder", "swin_t", "mltr_s", "mltr_m", "mltr_l"),
    *("vit", "hsvlt_vit"),
)
DEFAULT_MODELS = ("bare", "bare_channels_last", "linear", "hsvlt", "hsvlt_projected", "query2label", "ml_decoder")


def logits_of(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return next(output[name] for name in ("logits", "pooler_output", "last_hidden_state") if name in output)


def make_step(
    model: nn.Module,
    name: str,
    batch: torch.Tensor,
    num_labels: int,
    dtype,
    train: bool,
    mode: str | None,
    cast_weights: bool,
):
    """One forward pass, or one training step, to be timed.

    Args:
        mode (`str`, *optional*): of `torch.compile`; None: eager.
        cast_weights: at inference, whether weights and images are in `dtype`, and not cast by autocast every time.
    """
    cast_weights = cast_weights and not train
    if cast_weights:
        model, batch = model.to(dtype), batch.to(dtype)
    if name == "bare_channels_last":
        batch = batch.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    device = batch.device.type
    run = torch.compile(model, dynamic=False, mode=mode) if mode is not None and name != "bare_eager" else model
    autocast = torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32 and not cast_weights)
    if not train:
        model.eval()

        def infer():
            with torch.inference_mode(), autocast:
                logits_of(run(batch))

        return infer

    model.train()
    labels = (torch.rand(len(batch), num_labels, device=batch.device) < 0.05).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with autocast:
            logits = logits_of(run(batch))
        nn.functional.binary_cross_entropy_with_logits(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_memory_cuda(step: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronise(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _peak_memory_worker(queue, name, build_args, batch_size, num_labels, dtype, train, threads, cast_weights):
    torch.set_num_threads(threads)
    image_size = build_args[1]
    model, batch = build(name, *build_args), torch.randn(batch_size, 3, image_size, image_size)
    step = make_step(model, name, batch, num_labels, dtype, train, None, cast_weights)
    step()  # allocates what stays: gradients and optimizer state, folded weights
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _resident_mb("VmRSS")
    step()
    queue.put(_resident_mb("VmHWM") - before)


def _resident_mb(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


def peak_memory_cpu(*args) -> float:
    """In a new process, whose memory holds nothing else; NaN where there is no /proc."""
    context = get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_peak_memory_worker, args=(queue, *args))
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else float("nan")


def resident_mb(model: nn.Module, train: bool) -> float:
    """Weights and buffers, and in training AdamW's two averages."""
    tensors = [*model.parameters(), *model.buffers()] + (2 * list(model.parameters()) if train else [])
    return sum(tensor.nbytes for tensor in tensors) / 2**20


@cache
def gmacs(name: str, *build_args) -> float:
    return multiply_adds(lambda: build(name, *build_args), build_args[1]) / 1e9


def run(args: argparse.Namespace) -> dict:
    """Times every model and prints the table; returns what the JSON file holds."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    names = [name for name in args.models if not (args.train and name.startswith("bare"))]
    usual = args.reference or ("linear" if args.train else "bare")
    reference = usual if usual in names else names[0]
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    compiled = args.compile or args.cuda_graphs
    mode = None if not compiled else "reduce-overhead" if args.cuda_graphs else "default"
    torch.compiler.reset()  # of other runs in this process: past some variants of a model torch stays eager

    rows, out_of_memory = [], []
    for batch_size in args.batch_size:
        batch = torch.randn(batch_size, 3, args.image_size, args.image_size, device=device)
        for num_labels in args.num_labels:
            for name in names:
                if (name.startswith("bare") or name in ("swin_t", "vit")) and num_labels != args.num_labels[0]:
                    continue
                build_args = (args.preset, args.image_size, num_labels, args.candidate_labels, args.label_chunk_size)
                torch.manual_seed(0)
                with device:
                    model = build(name, *build_args)
                step = make_step(model, name, batch, num_labels, dtype, args.train, mode, args.cast_weights)
                row = {"model": name, "num_labels": num_labels, "batch_size": batch_size}
                row["parameters"] = sum(p.numel() for p in model.parameters())
                row["resident_mb"], row["gmacs"] = resident_mb(model, args.train), gmacs(name, *build_args)
                worker = (name, build_args, batch_size, num_labels, dtype, args.train, args.threads, args.cast_weights)
                row["memory_args"], row["step"], row["seconds"] = worker, step, []
                rows.append(row)
    for row in tqdm(rows[:], desc="warm-up"):
        try:
            warm_up(row["step"], device, compiled)
            row["repeats"] = repeats_of(row["step"], device)
        except torch.OutOfMemoryError:
            rows.remove(row)
            out_of_memory.append({key: row[key] for key in ("model", "num_labels", "batch_size")})
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for row in rows:
            row["seconds"].append(timed(row["step"], device, clock, row["repeats"]))

    for row in rows:
        step, worker = row.pop("step"), row.pop("memory_args")
        row["peak_memory_mb"] = row["total_memory_mb"] = None
        if not (args.no_memory or args.cuda_graphs):
            row["peak_memory_mb"] = (
                peak_memory_cuda(step, device) if device.type == "cuda" else peak_memory_cpu(*worker)
            )
            row["total_memory_mb"] = row["resident_mb"] + row["peak_memory_mb"]
    for row in rows:
        same = [
            r
            for r in rows
            if r["model"] == reference
            and r["batch_size"] == row["batch_size"]
            and r["num_labels"] in (row["num_labels"], args.num_labels[0])
        ]
        none = {"seconds": [math.nan] * args.rounds, "gmacs": math.nan, "total_memory_mb": math.nan}
        base = (same or [none])[0]  # it may have run out of memory
        ratios = [a / b for a, b in zip(row["seconds"], base["seconds"], strict=True)]
        row["ratio"] = statistics.median(ratios)
        row["ratio_spread"] = [min(ratios), max(ratios)]
        row["arithmetic_ratio"] = row["gmacs"] / base["gmacs"]
        if row["total_memory_mb"] is not None:
            row["memory_ratio"] = row["total_memory_mb"] / base["total_memory_mb"]
        row["median_seconds"] = statistics.median(row["seconds"])
        row["images_per_second"] = row["batch_size"] / row["median_seconds"]
        row["ms_per_gmac"] = 1000 * row["median_seconds"] / row["batch_size"] / row["gmacs"]

    what = "training step" if args.train else "inference"
    name_of_mode = {None: "eager", "default": "compiled", "reduce-overhead": "compiled with CUDA graphs"}[mode]
    how = f"{what}, {args.preset}, {args.image_size} px, {args.dtype}, {name_of_mode}"
    where = f"{device_name(device)}, {arithmetic(device)}, torch {torch.__version__}"
    print(f"\n{how}, {where}; ratios to {reference!r}, {args.rounds} rounds\n")
    columns = ["model", "labels", "batch", "images/s", "ratio (min-max)", "arithmetic ratio"]
    columns += ["ms/GMAC", "peak MB", "with what stays", "ratio of that", "GMAC", "parameters"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for r in rows:
        memory = "- | - | -"
        if r["peak_memory_mb"] is not None:
            memory = f"{r['peak_memory_mb']:,.0f} | {r['total_memory_mb']:,.0f} | {r['memory_ratio']:.3f}"
        low, high = r["ratio_spread"]
        print(
            f"| {r['model']} | {r['num_labels']:,} | {r['batch_size']} | {r['images_per_second']:,.2f} "
            f"| {r['ratio']:.3f} ({low:.3f}-{high:.3f}) | {r['arithmetic_ratio']:.3f} | {r['ms_per_gmac']:.2f} "
            f"| {memory} | {r['gmacs']:.2f} | {r['parameters'] / 1e6:.1f} M |"
        )
    for r in out_of_memory:
        print(f"| {r['model']} | {r['num_labels']:,} | {r['batch_size']} | out of memory |")
    figures = {"device": device_name(device), "arithmetic": arithmetic(device), "torch": torch.__version__}
    figures |= {"reference": reference, "rows": rows, "out_of_memory": out_of_memory}
    return {"setting": {**vars(args), "json": None}, **figures}


def build_parser() -> argparse.ArgumentParser:
    parser = benchmark_parser("cost.speed", __doc__)
    parser.add_argument("--preset", default="small", help="nano, tiny, small or base")
    parser.add_argument("--image_size", type=int, default=448)
    parser.add_argument("--num_labels", type=int, nargs="+", default=[80])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(DEFAULT_MODELS))
    parser.add_argument("--candidate_labels", type=int, default=128, help="for the model hsvlt_candidates")
    parser.add_argument("--label_chunk_size", type=int, help="labels at a time, bounds memory")
    parser.add_argument("--cast_weights", action="store_true", help="inference: weights in --dtype, no autocast")
    parser.add_argument("--cuda_graphs", action="store_true", help="torch.compile in the mode reduce-overhead")
    parser.add_argument("--train", action="store_true", help="time training steps in place of inference")
    parser.add_argument("--reference", choices=MODELS, help="what ratios are to; default: bare, or linear in training")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: time of this process's threads")
    machine_options(parser, rounds=7, dtype="autocast", compiled="torch.compile every model but bare_eager")
    parser.add_argument("--no_memory", action="store_true", help="skip the measurement of memory")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_benchmark(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
