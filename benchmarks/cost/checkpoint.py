"""What a checkpoint costs: the seconds that training stands still, and those of the write beside it.

    python -m benchmarks.cost.checkpoint [--preset small] [--repeats 3] [--folder DIR]

The real save of training (`training.loop.saving.save`) of a whole HSVLT with AdamW's two moments and a weight average,
on the CPU. On a GPU the copy goes over the bus instead; the write is the same.
"""

import argparse
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from training.checkpoint.atomic import CheckpointWriter
from training.checkpoint.series import newest_good
from training.config import TrainingConfig
from training.loop.optim import build_ema, build_optimizer, build_scheduler
from training.loop.run import Progress
from training.loop.saving import check_writer, save
from training.loop.setup import build_processor


def prepare(preset: str, folder: Path) -> SimpleNamespace:
    """What `save` reads of a run, after one step."""
    names = [f"label {index}" for index in range(80)]
    model = HSVLTForImageClassification(HSVLTConfig.preset(preset, id2label=dict(enumerate(names))))
    optimizer = build_optimizer(model, learning_rate=1e-4, weight_decay=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    config = TrainingConfig(output_dir=str(folder))
    return SimpleNamespace(
        config=config,
        accelerator=Accelerator(cpu=True),
        folder=folder,
        processor=build_processor(config, names),
        plain_model=model,
        ema=build_ema(model, 0.9997),
        stateful_optimizer=optimizer,
        scheduler=build_scheduler(optimizer, schedule="cosine", warmup_steps=1, total_steps=100),
        progress=Progress(label_names=names, dataset="none", total_steps=100, batches=[1, 16, 1, 0]),
        log=SimpleNamespace(size=lambda: 0),
        writer=CheckpointWriter(),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", help="of HSVLTConfig; default: small")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    try:
        run = prepare(args.preset, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        blocking, writing, reading = [], [], []
        for step in range(1, args.repeats + 1):
            run.progress.step = step
            start = time.perf_counter()
            save(run)
            blocking.append(time.perf_counter() - start)
            check_writer(run, wait=True)
            writing.append(time.perf_counter() - start - blocking[-1])
            start = time.perf_counter()
            newest = newest_good(folder)
            reading.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    million = run.plain_model.num_parameters() / 1e6
    print(f"HSVLT {args.preset}, {million:.1f} M parameters; a checkpoint has {size / 2**20:,.0f} MiB\n")
    print("| part of a checkpoint | seconds, median (least to most) |\n|---|---|")
    for words, seconds in (
        ("training stands still: the state is copied", blocking),
        ("beside training: write, hash, sync, rename", writing),
        ("at resume: hashes checked", reading),
    ):
        print(f"| {words} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |")
    share = statistics.median(blocking) / (statistics.median(blocking) + statistics.median(writing))
    print(f"\nTraining stands still for {share:.0%} of what a save in one go would take.")
    print(f"Memory: {(after - before) / 2**10:,.0f} MiB more at the peak, which is one copy of the state.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
