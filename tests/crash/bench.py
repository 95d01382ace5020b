"""Folders, recipes, undisturbed runs, and what there is to compare with them."""

import json
import time
from pathlib import Path

import yaml
from safetensors.torch import load_file

from tests.training.shards import write_shards, write_tar
from tests.training.tiny_run import TINY
from training.checkpoint.folder import CheckpointError, verify
from training.checkpoint.series import checkpoints
from training.data.scenes import main as write_scenes

from .processes import Command
from .strikes import Strike, events_of

EPOCHS, STEPS = 8, 64  # on one process; on two twice the epochs, of half the steps


class Bench:
    """Folders, the recipe, and the undisturbed runs that everything is compared with, with their file events."""

    every_event = False  # strike at each file event, not at a few

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, {}
        scenes = json.dumps({"image_size": 32, "max_objects": 2, "max_size": 20})
        for split, count in (("train", 44), ("validation", 14)):
            write_scenes(
                [str(folder / "images" / split), "--split", split, "--num_scenes", str(count), "--scenes", scenes]
            )

    def recipe(self, processes: int) -> Path:
        """44 images by batches of 3: the last batch is uneven for one process and for two."""
        path = self.folder / f"recipe{processes}.yaml"
        options = {
            **TINY,
            "dataset": str(self.folder / "images"),
            "augmentation": {"horizontal_flip": 0.5, "crop_scale": [0.8, 1.0], "rand_augment": True, "mixup": 0.3},
            "batch_size": 3,
            "gradient_accumulation_steps": 2,
            "epochs": EPOCHS * processes,
            "save_every_steps": 3,
            "num_workers": 1,
        }
        del options["scenes"]
        path.write_text(yaml.safe_dump(options))
        return path

    def start(self, run: Path, processes: int, **options) -> Command:
        argv = [str(self.recipe(processes)), "--output_dir", str(run)]
        argv.append("--resume" if checkpoints(run) else "--overwrite")
        return Command("training.train", argv, run.with_suffix(".txt"), processes, **options)

    def finish(self, run: Path, processes: int, **options) -> None:
        training = self.start(run, processes, **options)
        status = training.wait()
        if any(status):
            raise AssertionError(f"A run that should have ended well has exit statuses {status}:\n{training.tail()}")

    def reference(self, processes: int) -> Path:
        if processes not in self.whole:
            self.whole[processes] = whole = self.folder / f"whole{processes}"
            start = time.monotonic()
            self.finish(whole, processes, strike=Strike(whole, seen=whole.with_suffix(".events")))
            print(f"undisturbed run, {processes} process(es): {time.monotonic() - start:.0f} s", flush=True)
        return self.whole[processes]

    def same_end(self, run: Path, processes: int) -> bool:
        """Whether `run` ended bit for bit like the undisturbed one."""
        return end_of(run) == end_of(self.reference(processes))

    def events(self, processes: int) -> list[str]:
        return events_of(self.reference(processes).with_suffix(".events"))


class StreamBench(Bench):
    """The same on a stream: 61 images in shards of many sizes, one of them unreadable."""

    def __init__(self, folder: Path):
        self.folder, self.whole = folder, {}
        write_shards(folder / "shards", "tar", [17, 3, 0, 24, 16])
        write_tar(folder / "shards" / "train-00005.tar", [60], content=lambda number: b"no image")
        write_shards(folder / "shards", "tar", [14], split="validation", first=70)

    def recipe(self, processes: int) -> Path:
        path = super().recipe(processes)
        options = yaml.safe_load(path.read_text()) | {
            "dataset": str(self.folder / "shards"), "streaming": True, "shuffle_buffer": 8,
            "epoch_steps": STEPS // EPOCHS // processes, "on_unreadable": "skip", "num_workers": 2,
        }  # fmt: skip
        path.write_text(yaml.safe_dump(options))
        return path


def step_of(run: Path) -> int:
    """The last step in the log."""
    try:
        lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        return json.loads(whole[-1])["step"] if whole else 0
    except (OSError, ValueError):
        return 0


def tensors_of(path: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}


def end_of(run: Path) -> dict:
    """All that a run came to, but for its times."""
    newest = checkpoints(run)[0]
    lines = [json.loads(line) for line in (run / "log.jsonl").open()]
    return {
        "newest": newest.name,
        "best": tensors_of(run / "best" / "model.safetensors"),
        "state": tensors_of(newest / "training_state" / "tensors.safetensors"),
        "log": [{key: value for key, value in line.items() if "second" not in key} for line in lines],
        "results": (run / "results.json").read_text(),
    }


def content(best: Path) -> tuple:
    """Weights, and what was fitted, but for the date of that."""
    config = json.loads((best / "config.json").read_text())
    info = {name: dict(config.get(name) or {}, date=None) for name in ("threshold_info", "calibration_info")}
    return tensors_of(best / "model.safetensors"), config.get("thresholds"), info


def losses_of(run: Path, had: set[str]) -> list[str]:
    """Checkpoints that were there before and are not whole now; `had` collects the names."""
    lost = [f"{path.name} was damaged" for path in run.glob("damaged-*")]
    newest = checkpoints(run)
    for folder in [*newest, run / "best"]:
        if folder.is_dir():
            try:
                verify(folder)
            except CheckpointError as error:
                lost.append(str(error))
    before = max((int(name.partition("-")[2]) for name in had if name != "best"), default=-1)
    if before > (int(newest[0].name.partition("-")[2]) if newest else -1):
        lost.append(f"checkpoint-{before} is gone")
    if "best" in had and not (run / "best").is_dir() and not (run / ".best.old").is_dir():
        lost.append("best/ is gone")
    had |= {path.name for path in [*newest, run / "best"] if path.is_dir()}
    return lost
