"""Which way of computing MlTr's cross-window attention is fastest: layouts, kernels, with and without folded weights.

    python -m benchmarks.cost.cross_window --preset s --batch_size 4
    python -m benchmarks.cost.cross_window --preset m --batch_size 64 --device cuda --dtype bfloat16

One row a stage, one column a way; milliseconds are the median over rounds in which each way runs once, in turn, and the
ratio to the model's own way is the median of the ratios round by round. All ways give the same result, which is checked
first. In training the time is of forward and backward.

"model" is `MlTrCrossWindowAttention` as it stands: folded weights, (B, C, n, P) by plain products. "sdpa" is the same
through the fused kernel, with the channels in the slot of the heads. "no transpose" stays in the stream's layout
(B, n, P, C) and leaves it to einsum. "unfolded" forms queries, keys and values, as CAT's code does.
"""

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from benchmarks.command import benchmark_parser, run_benchmark
from benchmarks.timing import device_name
from modeling_hsvlt import MlTrConfig
from modeling_hsvlt.modeling_mltr import MlTrCrossWindowAttention


def model(attention: MlTrCrossWindowAttention, x: torch.Tensor) -> torch.Tensor:
    return attention(x)[0]


def unfolded(attention: MlTrCrossWindowAttention, x: torch.Tensor) -> torch.Tensor:
    query, key, value = attention.qkv(x.permute(0, 3, 1, 2)).chunk(3, dim=-1)
    weights = (query @ key.transpose(2, 3) * attention.scaling).softmax(-1)
    return attention.proj(weights @ value).permute(0, 2, 3, 1)


def sdpa_unfolded(attention: MlTrCrossWindowAttention, x: torch.Tensor) -> torch.Tensor:
    query, key, value = attention.qkv(x.permute(0, 3, 1, 2)).chunk(3, dim=-1)
    return attention.proj(F.scaled_dot_product_attention(query, key, value)).permute(0, 2, 3, 1)


def sdpa(attention: MlTrCrossWindowAttention, x: torch.Tensor) -> torch.Tensor:
    query_weight, query_bias, value_weight, value_bias = fold(attention)
    windows = x.permute(0, 3, 1, 2).contiguous()
    query = F.linear(windows, query_weight, query_bias)
    context = F.scaled_dot_product_attention(query, windows, windows, scale=1.0)
    return F.linear(context, value_weight, value_bias).permute(0, 2, 3, 1)


def no_transpose(attention: MlTrCrossWindowAttention, x: torch.Tensor) -> torch.Tensor:
    query_weight, query_bias, value_weight, value_bias = fold(attention)
    query = query_weight @ x + query_bias[:, None]
    weights = torch.einsum("bnpc,bmpc->bcnm", query, x).softmax(-1)
    return value_weight @ torch.einsum("bcnm,bmpc->bnpc", weights, x) + value_bias[:, None]


def no_transpose_unfolded(attention: MlTrCrossWindowAttention, x: torch.Tensor) -> torch.Tensor:
    query, key, value = (attention.qkv.weight @ x + attention.qkv.bias[:, None]).chunk(3, dim=2)
    weights = (torch.einsum("bnpc,bmpc->bcnm", query, key) * attention.scaling).softmax(-1)
    context = torch.einsum("bcnm,bmpc->bnpc", weights, value)
    return attention.proj.weight @ context + attention.proj.bias[:, None]


def fold(attention: MlTrCrossWindowAttention) -> tuple[torch.Tensor, ...]:
    """Weight and bias of the query and of the value, see `MlTrCrossWindowAttention`."""
    weight_q, weight_k, weight_v = attention.qkv.weight.chunk(3)
    bias_q, _, bias_v = attention.qkv.bias.chunk(3)
    output = attention.proj.weight
    query_bias = torch.mv(weight_k.t(), bias_q) * attention.scaling
    value_bias = torch.mv(output, bias_v) + attention.proj.bias
    return weight_k.t() @ weight_q * attention.scaling, query_bias, output @ weight_v, value_bias


WAYS = {
    "model": model,
    "unfolded": unfolded,
    "sdpa": sdpa,
    "sdpa, unfolded": sdpa_unfolded,
    "no transpose": no_transpose,
    "no transpose, unfolded": no_transpose_unfolded,
}


def time_ways(attention: MlTrCrossWindowAttention, x: torch.Tensor, training: bool, rounds: int) -> dict[str, list]:
    """Seconds of each way in each round.

    Raises:
        ValueError: a way gives another result than the model.
    """
    x = x.requires_grad_(training)
    expected = model(attention, x)
    tolerance = 1e-4 if x.dtype == torch.float32 else 0.05
    seconds = {name: [] for name in WAYS}
    for index in range(rounds + 1):
        for name, way in WAYS.items():
            begin = time.perf_counter()
            with torch.set_grad_enabled(training):
                output = way(attention, x)
                if training:
                    output.backward(x.detach())
            if x.device.type == "cuda":
                torch.cuda.synchronize()
            if index > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
            elif not torch.allclose(output, expected, atol=tolerance, rtol=tolerance):
                raise ValueError(f"the way {name!r} gives another result than the model: correct it before timing.")
    return seconds


def run(args: argparse.Namespace) -> list[dict]:
    """Times all stages; returns what the JSON file holds."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    config = MlTrConfig.preset(args.preset)
    config._attn_implementation = "sdpa"
    device, dtype, rows = torch.device(args.device), getattr(torch, args.dtype), []
    print(
        f"MlTr-{args.preset}, batch {args.batch_size}, {args.dtype}, {device_name(device)}, torch {torch.__version__}"
    )
    print(f"| {' | '.join(['stage', 'n', 'P', 'C', 'mode', *WAYS])} |\n{'|---' * (5 + len(WAYS))}|")
    for stage in range(4):
        grid, window, channels = config.grid_sizes[stage], config.window_sizes[stage], config.hidden_sizes[stage]
        num_windows = (-(-grid // window)) ** 2
        attention = MlTrCrossWindowAttention(config, window).to(device, dtype)
        x = torch.randn(args.batch_size, num_windows, window**2, channels, device=device, dtype=dtype)
        for mode in ("inference", "training"):
            seconds = time_ways(attention, x, mode == "training", args.rounds)
            row = {"stage": stage + 1, "n": num_windows, "P": window**2, "C": channels, "mode": mode}
            cells = [str(value) for value in row.values()]
            for name, times in seconds.items():
                ratio = statistics.median(a / b for a, b in zip(times, seconds["model"], strict=True))
                row[name] = {"ms": 1e3 * statistics.median(times), "ratio": ratio}
                cells.append(f"{row[name]['ms']:.2f} ({ratio:.2f})")
            rows.append(row)
            print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("cost.cross_window", __doc__)
    parser.add_argument("--preset", default="s", help="size of MlTr whose four stages are timed")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    return run_benchmark(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
