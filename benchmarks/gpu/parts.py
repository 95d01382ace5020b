"""The parts of the GPU suite: each a list of units, the most telling first, each with the command it stands for."""

import contextlib
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from benchmarks.accuracy import heads
from benchmarks.cost import cached_text, input, speed
from benchmarks.gpu.record import Goal

ROOT = Path(__file__).parents[2]
FORWARD = ("bare", "linear", "hsvlt", "query2label", "ml_decoder")
TRAIN = ("linear", "hsvlt", "query2label", "ml_decoder")
BF16 = ("--dtype", "bfloat16", "--cast_weights")
HEADS, SIZES, SEEDS, EPOCHS = ("linear", "ml_decoder", "query2label", "hsvlt"), (224, 448), 3, 12


@dataclass(frozen=True)
class Unit:
    """What is measured in one go. `run` gives `table`, in Markdown, `line`, and by `goals` what goals are held to."""

    name: str
    command: str
    run: Callable[[], dict]


@dataclass
class Suite:
    """What the parts are told.

    Args:
        smoke: Tiny sizes and eager models, for a machine without a GPU.
        data: Folder of photographs with the splits train and validation; None: what needs them is left out or, where
            any images do, gets made ones.
    """

    smoke: bool
    data: str | None
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="hsvlt-gpu-")))

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    # --- tests

    def tests(self) -> list[Unit]:
        """Of the tests, those that need a CUDA device."""
        files = sorted((ROOT / "tests").rglob("test_*.py"))
        files = [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text(encoding="utf-8")]

        def unit(name: str, marks: str) -> Unit:
            command = ["-m", "pytest", "-m", marks, "-p", "no:cacheprovider", *files]

            def run() -> dict:
                done = launched(command)
                last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
                if done.returncode:
                    raise RuntimeError(f"{last}\n{done.stdout[-3000:]}")
                return {"line": last, "table": last}

            return Unit(name, shlex.join(["python", *command]), run)

        return [unit("quick", "cuda and not slow"), unit("compiled", "cuda and slow")]

    # --- cost

    def _unit(self, benchmark: ModuleType, name: str, argv: Iterable[str], smoke: list[str], read: Callable) -> Unit:
        """Of another benchmark: what it prints, all its figures, and what `read` makes of them; a smoke run has the
        options `smoke` and compiles nothing."""
        argv = list(argv)

        def run() -> dict:
            options = argv
            if self.smoke:
                options = [word for word in argv if word not in ("--compile", "--cuda_graphs")] + smoke
            with contextlib.redirect_stdout(StringIO()) as printed:
                figures = benchmark.run(benchmark.build_parser().parse_args(options))
            return {"table": printed.getvalue().strip(), **read(figures), **figures}

        return Unit(name, shlex.join(["python", "-m", benchmark.__name__, *argv]), run)

    def _speed(self, name: str, *argv: str, goals: Callable[[dict], dict] = lambda figures: {}) -> Unit:
        def read(figures: dict) -> dict:
            line = ", ".join(
                f"{row['model']} ({row['num_labels']} labels, batch {row['batch_size']}) {row['ratio']:.2f}"
                for row in figures["rows"]
                if row["model"] != figures["reference"] or row["num_labels"] != figures["rows"][0]["num_labels"]
            )
            return {"line": f"to {figures['reference']}: {line}", "goals": goals(figures)}

        side = "224" if "swin_t" in argv else "64"  # transformers' Swin needs a window a stage
        smoke = ["--preset", "nano", "--image_size", side, "--batch_size", "2", "--rounds", "1"]
        smoke += ["--candidate_labels", "4", "--no_memory", "--threads", str(torch.get_num_threads())]
        smoke += ["--num_labels", "8", "40"] if "10000" in argv else []
        return self._unit(speed, name, [*argv, "--rounds", "9"], smoke, read)

    def speed(self) -> list[Unit]:
        """HSVLT beside its bare backbone and the peers' heads. What a compiler needs a minute for comes after what
        takes seconds, but for the goals."""

        def unit(preset: str, batches: str, precision: str, mode: str, what: str, models: Iterable[str]) -> Unit:
            argv = ["--preset", preset, "--batch_size", *batches.split(), "--models", *models]
            if precision == "bf16":
                argv += BF16[:2] if what == "training" else BF16
            argv += {"eager": [], "compiled": ["--compile"], "graphs": ["--cuda_graphs"]}[mode]
            argv += ["--train"] if what == "training" else []
            name = f"{preset}, batch {' '.join(batches.split())}, {precision}, {mode}, {what}"
            return self._speed(name, *argv, goals=hsvlt_to_reference)

        plain, step = "inference", "training"
        return [
            unit("small", "64", "bf16", "eager", plain, FORWARD),
            unit("small", "64", "bf16", "compiled", plain, ("bare", "hsvlt")),
            unit("small", "64", "bf16", "compiled", step, ("linear", "hsvlt")),
            unit("small", "64", "bf16", "eager", step, TRAIN),
            unit("small", "1 8", "bf16", "eager", plain, FORWARD),
            unit("small", "1 8 64", "fp32", "eager", plain, FORWARD),
            unit("base", "1 8 64", "bf16", "eager", plain, FORWARD),
            unit("base", "1 8 64", "fp32", "eager", plain, FORWARD),
            unit("small", "1", "bf16", "graphs", plain, ("bare", "hsvlt")),
            unit("small", "64", "bf16", "graphs", plain, ("bare", "hsvlt")),
            unit("small", "8", "bf16", "graphs", plain, ("bare", "hsvlt")),
            unit("base", "64", "bf16", "graphs", plain, ("bare", "hsvlt")),
            unit("base", "64", "bf16", "eager", step, TRAIN),
            unit("base", "64", "bf16", "compiled", step, ("linear", "hsvlt")),
            unit("base", "1", "bf16", "graphs", plain, ("bare", "hsvlt")),
            unit("base", "8", "bf16", "graphs", plain, ("bare", "hsvlt")),
            unit("small", "64", "bf16", "graphs", "peers, inference", ("bare", "query2label", "ml_decoder")),
            unit("small", "1 8 64", "fp32", "graphs", plain, ("bare", "hsvlt")),
            unit("base", "1 8 64", "fp32", "graphs", plain, ("bare", "hsvlt")),
            unit("small", "64", "fp32", "eager", step, TRAIN),
        ]

    def labels(self) -> list[Unit]:
        """80, 1,000 and 10,000 labels, all of them and 128 candidates."""
        argv = ["--preset", "small", "--batch_size", "64", *BF16, "--models", "hsvlt", "hsvlt_candidates"]
        argv += ["--label_chunk_size", "512", "--num_labels", "80"]
        return [
            self._speed("bf16, eager", *argv, "1000", "10000", goals=candidates_to_few),
            self._speed("fp32, eager", *(word for word in argv if word not in BF16), "1000", "10000"),
            # All 10,000 labels in a graph would be twenty chunks, compiled one by one.
            self._speed("bf16, compiled, candidates", *argv, "10000", "--models", "hsvlt_candidates", "--compile"),
        ]

    def hp_dval(self) -> list[Unit]:
        """HP-DVAL on CLIP's ViT-B/16 beside its bare image tower and the zero-shot pipeline."""

        def read(figures: dict) -> dict:
            rows = [row for row in figures["rows"] if row["model"] == "hp_dval"]
            line = ", ".join(f"batch {row['batch_size']} {row['ratio']:.2f}" for row in rows)
            return {"line": f"to the image tower: {line}"}

        def unit(name: str, *argv: str) -> Unit:
            return self._unit(cached_text, name, ["--batch_size", "1", "8", "64", *argv], smoke, read)

        smoke = ["--batch_size", "1", "--layers", "1", "--num_labels", "4", "--rounds", "1"]
        half = ("--dtype", "bfloat16")
        return [
            unit("bf16, eager", *half),
            unit("bf16, compiled with CUDA graphs", *half, "--compile"),
            unit("fp32, eager"),
        ]

    def mltr(self) -> list[Unit]:
        """MlTr-S beside transformers' Swin-T."""
        argv = ["--image_size", "224", "--batch_size", "8", "64", "--models", "swin_t", "mltr_s"]
        return [
            self._speed("bf16, eager", *argv, *BF16),
            self._speed("bf16, compiled", *argv, *BF16, "--compile"),
            self._speed("fp32, eager", *argv),
        ]

    def input(self) -> list[Unit]:
        """Decoding and the loader beside the model that they feed."""
        cores = os.cpu_count() or 1
        images = self.data or str(self.folder / "photographs")
        argv = ["--images", images, "--image_size", "448", "--preset", "small", "--batch_size", "32", *BF16[:2]]
        argv += ["--compile", "--limit", "2048", "--rounds", "2", "--workers", "0", str(max(cores // 2, 1)), str(cores)]

        smoke = ["--image_size", "64", "--preset", "nano", "--batch_size", "2", "--workers", "0", "--limit", "4"]
        smoke += ["--rounds", "1"]

        def read(figures: dict) -> dict:
            best = max(times for name, times in figures["times_the_model"].items() if name.endswith("workers"))
            return {"line": f"the loader gives {best:.2f} times what the model takes", "goals": {"loader": best}}

        def run() -> dict:
            if self.data is None:
                make_photographs(Path(images), 4 if self.smoke else 1024)
            return unit.run()

        unit = self._unit(input, "small, 448 px, bf16, compiled", argv, smoke, read)
        return [replace(unit, run=run)]

    # --- training as users start it

    def training(self) -> list[Unit]:
        """`accelerate launch` of training itself: bf16, fp16 with the scaler, FSDP2."""
        size = ["--preset", "tiny", "--image_size", "224", "--batch_size", "32", "--max_steps", "30"]
        scenes = "{num_scenes: {train: 1920, validation: 64, test: 64}, image_size: 64}"
        if self.smoke:
            size = ["--preset", "nano", "--image_size", "64", "--batch_size", "4", "--max_steps", "4"]
            scenes = "{num_scenes: {train: 16, validation: 8, test: 8}, image_size: 64}"
        common = [*size, "--dataset", "scenes", "--scenes", scenes, "--epochs", "1", "--augmentation", "null"]
        common += ["--log_every_steps", "2", "--overwrite", "true", "--check_images", "false"]

        def unit(name: str, config: str, processes: int, *argv: str) -> Unit:
            run_folder = self.folder / name.partition(",")[0].replace(" ", "_")
            file = f"training/configs/accelerate/{config}.yaml"
            launch = ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(processes)]
            command = [*launch, "-m", "training.train", *common, *argv, "--output_dir", str(run_folder)]

            def run() -> dict:
                done = launched(command)
                if done.returncode:
                    raise RuntimeError(done.stderr[-3000:])
                steps = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
                steps = [step for step in steps if "train/loss" in step]
                late = steps[len(steps) // 2 :]
                rate = statistics.median(step["train/images_per_second"] for step in late)
                loss = late[-1]["train/loss"]
                line = f"{rate:,.1f} images/s, loss {steps[0]['train/loss']:.3f} to {loss:.3f}"
                if "train/grad_scale" in late[-1]:
                    line += f", gradient scale {late[-1]['train/grad_scale']:g}"
                return {"line": line, "table": line, "images_per_second": rate, "steps": steps}

            return Unit(name, shlex.join(["python", *command]), run)

        if self.smoke:
            return [unit("one process", "one_gpu", 1, "--mixed_precision", "no")]
        ranks = min(torch.cuda.device_count(), 2) or 1
        sharded = ("--mixed_precision", "bf16", "--compile", "true")
        return [
            unit("fp16 with the scaler", "one_gpu", 1, "--mixed_precision", "fp16"),
            unit(f"FSDP2, bf16, compiled, ranks: {ranks}", "fsdp2", ranks, *sharded),
            unit("bf16", "one_gpu", 1, "--mixed_precision", "bf16"),
        ]

    # --- accuracy

    def accuracy(self) -> list[Unit]:
        """Backbone and head fine-tuned on photographs; seed by seed, so that what there was time for can be compared.

        Raises:
            ValueError: no photographs.
        """
        data, sizes, seeds, epochs = self.data, SIZES, SEEDS, EPOCHS
        if self.smoke:
            sizes, seeds, epochs = (32,), 1, 1
            data = data or str(make_squares(self.folder / "squares"))
        if data is None:
            raise ValueError("GPU_DATA is not set: an imagefolder with the splits train and validation.")
        comparisons: dict[int, heads.Comparison] = {}

        def unit(head: str, size: int, seed: int) -> Unit:
            argv = ["--dataset", data, "--budget", "finetune", "--image_size", str(size), "--epochs", str(epochs)]

            def run() -> dict:
                if size not in comparisons:
                    comparisons[size] = heads.Comparison(heads.build_parser().parse_args(argv))
                _, row, *_ = comparisons[size].train(heads.head_variants([head])[head], seed)
                line = ", ".join(f"{key} {100 * row[key]:.1f}" for key in heads.METRICS)
                return {"line": line, "table": line, "row": row, "head": head, "size": size, "seed": seed}

            command = ["python", "-m", "benchmarks.accuracy.heads", *argv, "--heads", head, "--seeds", str(seed + 1)]
            return Unit(f"{head}, {size} px, seed {seed}", shlex.join(command), run)

        return [unit(head, size, seed) for seed in range(seeds) for size in sizes for head in HEADS]


def hsvlt_to_reference(result: dict) -> dict:
    """Of a table of speed: time and memory of HSVLT to those of the reference, by batch size."""
    rows = [row for row in result["rows"] if row["model"] == "hsvlt"]
    return {str(row["batch_size"]): {"time": row["ratio"], "memory": row.get("memory_ratio")} for row in rows}


def candidates_to_few(result: dict) -> dict:
    """Time of the most labels with candidates to that of the fewest labels without."""
    most = max(row["num_labels"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["model"] == "hsvlt_candidates" and row["num_labels"] == most]
    return {"candidates": rows[0]["ratio"]} if rows else {}


_INFERENCE, _TRAINING = (f"small, batch 64, bf16, compiled, {what}" for what in ("inference", "training"))
GOALS = [
    Goal("HSVLT small, batch 64, bf16, compiled, to its bare backbone", 1.10, "speed", _INFERENCE, ("64", "time")),
    Goal("memory of that", 1.25, "speed", _INFERENCE, ("64", "memory")),
    Goal("training step of that, to ConvNextForImageClassification", 1.20, "speed", _TRAINING, ("64", "time")),
    Goal("memory of that step", 1.25, "speed", _TRAINING, ("64", "memory")),
    Goal("10,000 labels with 128 candidates, to 80 labels", 1.15, "labels", "bf16, eager", ("candidates",)),
    Goal("loader, to what the model takes", 1.0, "input", "small, 448 px, bf16, compiled", ("loader",), at_least=True),
]


def accuracy_table(units: dict) -> str:
    """Mean and standard deviation over the seeds that there are."""
    cells: dict[tuple, list[dict]] = {}
    for unit in units.values():
        if "figures" in unit:
            cells.setdefault((unit["figures"]["size"], unit["figures"]["head"]), []).append(unit["figures"]["row"])
    lines = ["| px | head | seeds | mAP | head third | medium | tail | macro F1 |", "|---" * 8 + "|"]
    for (size, head), rows in sorted(cells.items(), key=lambda item: (item[0][0], HEADS.index(item[0][1]))):
        summary = heads.summarise(rows)
        found = [
            "-" if cell["mean"] is None else f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}"
            for cell in (summary[key] for key in heads.METRICS)
        ]
        lines.append(f"| {size} | {head} | {len(rows)} | {' | '.join(found)} |")
    return "\n".join(lines)


def launched(command: list[str]) -> subprocess.CompletedProcess:
    """`python COMMAND` in the checkout, without network; it and what it started end when this is left."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def make_photographs(folder: Path, count: int) -> None:
    """JPEGs of 640 x 480 px, as hard to decode as photographs: noise, blurred."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        coarse = np.random.default_rng(index).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg", quality=90)


def make_squares(folder: Path) -> Path:
    """An imagefolder of a few coloured images of three labels."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    for split, count in {"train": 12, "validation": 9}.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = []
        for index in range(count):
            name = list(colours)[index % 3]
            noise = np.random.default_rng(index + 100 * count).integers(0, 60, (40, 40, 3), dtype=np.uint8)
            noise[8:24, 8:24] = colours[name]
            Image.fromarray(noise).save(folder / split / f"{index}.png")
            rows.append(json.dumps({"file_name": f"{index}.png", "labels": [name]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
