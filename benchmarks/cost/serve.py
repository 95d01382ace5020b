"""What `hsvlt serve` answers in a second: requests, median and 99th percentile of their time, by the number of clients.

    python -m benchmarks.cost.serve                               random weights, nano at 224 px
    python -m benchmarks.cost.serve runs/quickstart/best --clients 1 8 64 --image photo.jpg --json FILE

The server is a process of its own on this machine, with a connection for each client over loopback; a client sends its
next image when it has the labels of the last. All share the cores of this machine. A request is an upload of one JPEG.
"""

import argparse
import asyncio
import io
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from benchmarks.command import benchmark_parser, run_benchmark
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor, MultiLabelProcessor


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("cost.serve", __doc__)
    parser.add_argument("checkpoint", nargs="?", help="folder; left out: random weights")
    parser.add_argument("--preset", default="nano", help="of the random weights")
    parser.add_argument("--image_size", type=int, default=224, help="of the random weights, in px")
    parser.add_argument("--image", type=Path, help="what is sent; left out: noise of 500 x 375 px")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="for each number of clients, after one of warming up"
    )
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="options of hsvlt serve, as the last words"
    )
    return run_benchmark(run, parser, argv)


def run(args: argparse.Namespace) -> list[dict]:
    """The figures of each number of clients.

    Raises:
        ValueError: the server did not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if args.checkpoint is None:
            save_random(scratch, args.preset, args.image_size)
        image = args.image.read_bytes() if args.image else noise_jpeg()
        command = [sys.executable, "-m", "training", "serve", args.checkpoint or scratch, "--port", "0", *args.serve]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                found = re.search(r"http://[^\s/]+", server.stdout.readline())
                if found is None:
                    raise ValueError("The server did not start; it says above why.")
                print("clients  requests/s  median ms  99th ms  images a batch  refused")
                figures = []
                for clients in args.clients:
                    figures.append(asyncio.run(load(found[0], image, clients, args.seconds)))
                    row = "{clients:>7}  {rate:>10.1f}  {median:>9.1f}  {p99:>7.1f}  {batch:>14.1f}  {refused:>7}"
                    print(row.format(**figures[-1]))
            finally:
                server.terminate()
    return figures


async def load(url: str, image: bytes, clients: int, seconds: float) -> dict:
    """Requests a second, times in ms, mean size of a batch and refusals, with so many clients side by side."""
    # Below the server's five seconds: a connection that both would end at the same moment breaks a request.
    limits = httpx2.Limits(max_connections=clients + 1, keepalive_expiry=2.0)
    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=120, trust_env=False) as client:

        async def ask(until: float) -> list[tuple[float, int]]:
            found = []
            while (began := time.perf_counter()) < until:
                answer = await client.post("/predict", files={"image": image})
                found.append((time.perf_counter() - began, answer.status_code))
            return found

        async def batches() -> tuple[float, float]:
            text = (await client.get("/metrics")).text
            return tuple(
                float(re.search(rf"^hsvlt_batch_size_{part} (\S+)", text, re.M)[1]) for part in ("sum", "count")
            )

        await asyncio.gather(*(ask(time.perf_counter() + 1) for _ in range(clients)))
        before, began = await batches(), time.perf_counter()
        found = await asyncio.gather(*(ask(began + seconds) for _ in range(clients)))
        took, after = time.perf_counter() - began, await batches()
    answers = [answer for one in found for answer in one]
    times = [1000 * duration for duration, status in answers if status == 200]
    median, p99 = np.percentile(times, [50, 99]) if times else (float("nan"), float("nan"))
    return {
        "clients": clients,
        "rate": len(times) / took,
        "median": float(median),
        "p99": float(p99),
        "batch": (after[0] - before[0]) / max(after[1] - before[1], 1),
        "refused": len(answers) - len(times),
    }


def save_random(folder: str, preset: str, image_size: int) -> None:
    model = HSVLTForImageClassification(HSVLTConfig.preset(preset, num_labels=80))
    model.save_pretrained(folder)
    processor = MultiLabelImageProcessor(size={"height": image_size, "width": image_size})
    MultiLabelProcessor(processor, id2label=model.config.id2label).save_pretrained(folder)


def noise_jpeg() -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((500, 375)).save(file, "JPEG", quality=90)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
