"""The other commands, hit while they write: `fit_thresholds`, `calibrate`, `tag`, and `push` to a Hub on this machine.

Each attack returns how often it struck, and what went wrong.
"""

import json
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

from tests.loopback_hub import LoopbackHub
from training.checkpoint.folder import CheckpointError, verify

from .processes import Command

REPO = "me/crash"


def rewrite(bench, run: Path, name: str) -> Command:
    argv = [str(run / "best"), str(bench.folder / "images")]
    return Command(f"training.{name}", argv, bench.folder / f"{run.parent.name}-{name}.txt")


def whole_run(bench, name: str) -> Path:
    run = bench.folder / name
    shutil.copytree(bench.reference(1), run)
    return run


def content(best: Path) -> tuple:
    """Weights, and what was fitted, but for the date of that."""
    config = json.loads((best / "config.json").read_text())
    info = {name: dict(config.get(name) or {}, date=None) for name in ("threshold_info", "calibration_info")}
    weights = {name: tensor.numpy().tobytes() for name, tensor in load_file(best / "model.safetensors").items()}
    return weights, config.get("thresholds"), info


def kill_while_best_is_changed(bench, chance: random.Random, name: str, kills: int = 4) -> tuple[int, list[str]]:
    run, problems = whole_run(bench, name), []
    before = content(run / "best")
    undisturbed = whole_run(bench, f"{name}-undisturbed")
    if any(rewrite(bench, undisturbed, name).wait()):
        return 0, [f"{name} fails by itself"]
    after = content(undisturbed / "best")
    for number in range(kills):
        command = rewrite(bench, run, name)
        if number:
            command.wait_until(lambda: (run / ".best.new").exists(), interval=0.0005)
            time.sleep(chance.uniform(0.0, 0.03))
        else:
            time.sleep(chance.uniform(0.0, 2.0))
        command.kill()
        try:
            verify(run / "best")
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
        found = content(run / "best")
        if found == after:
            shutil.rmtree(run)
            shutil.copytree(bench.reference(1), run)
        elif found != before:
            problems.append(f"{name} left neither the old nor the new")
    if any(rewrite(bench, run, name).wait()) or content(run / "best") != after:
        problems.append(f"{name} after its kills differs from an undisturbed one")
    return kills, problems


def kills_inside_fit_thresholds(bench, chance: random.Random) -> tuple[int, list[str]]:
    return kill_while_best_is_changed(bench, chance, "fit_thresholds")


def kills_inside_calibrate(bench, chance: random.Random) -> tuple[int, list[str]]:
    return kill_while_best_is_changed(bench, chance, "calibrate")


def tagging(bench, output: Path) -> Command:
    best, images = bench.reference(1) / "best", bench.folder / "images" / "train"
    options = ["--part_size", "4", "--batch_size", "2", "--num_workers", "1", "--threshold", "0"]
    return Command("training.tag", [str(best), str(images), str(output), *options], bench.folder / "tag.txt")


def records(output: Path) -> list[dict]:
    rows = [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]
    return sorted(rows, key=lambda row: row["file_name"])


def kills_inside_tag(bench, chance: random.Random, kills: int = 5) -> tuple[int, list[str]]:
    output, whole = bench.folder / "tags", bench.folder / "tags-whole"
    if any(tagging(bench, whole).wait()):
        return 0, ["tag fails by itself"]
    for number in range(kills):
        command, parts = tagging(bench, output), len(list(output.glob("part-*")))
        command.wait_until(lambda parts=parts: len(list(output.glob("part-*"))) > parts, interval=0.0005)
        time.sleep(chance.uniform(0.0, 0.02) * (number > 0))
        command.kill()
    if any(tagging(bench, output).wait()) or records(output) != records(whole):
        return kills, ["tag after its kills has other records than an undisturbed one"]
    return kills, []


@contextmanager
def small_disk(folder: Path, mebibytes: int):
    """A tmpfs, which is full but for a few bytes while the block runs; None where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return

    def fill() -> None:
        with (folder / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 4096):
                    pass
            except OSError:
                pass

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def full_disk_in_each(bench, chance: random.Random) -> tuple[int, list[str]]:
    problems, struck = [], 0
    for name in ("fit_thresholds", "calibrate", "tag"):
        disk = bench.folder / f"disk-{name}"
        with small_disk(disk, 32) as fill:
            if fill is None:
                print(f"full disk in {name}: SKIPPED, a tmpfs cannot be mounted here", flush=True)
                continue
            struck += 1
            run = disk / "run"
            if name == "tag":
                run.mkdir()
            else:
                shutil.copytree(bench.reference(1), run)
            before = content(run / "best") if name != "tag" else None
            fill()
            command = tagging(bench, run) if name == "tag" else rewrite(bench, run, name)
            status = command.wait()
            if status == [0] or (name != "tag" and "No space left on device" not in command.tail()):
                problems.append(f"{name} on a full disk ended with {status}: {command.tail(500)}")
            if name != "tag":
                verify(run / "best")
                if content(run / "best") != before:
                    problems.append(f"{name} on a full disk changed best/")
            (disk / "filler").unlink()
            again = tagging(bench, run) if name == "tag" else rewrite(bench, run, name)
            if any(again.wait()):
                problems.append(f"{name} does not go on when there is room again")
    return struck, problems


def full_disk_in_push(bench, chance: random.Random) -> tuple[int, list[str]]:
    """Where the folder to send is built. Nothing is sent, and the run stays as it was."""
    disk, problems = bench.folder / "disk-push", []
    run = whole_run(bench, "pushed-run")
    before = content(run / "best")
    with LoopbackHub() as hub, small_disk(disk, 8) as fill:
        if fill is None:
            print("full disk in push: SKIPPED, a tmpfs cannot be mounted here", flush=True)
            return 0, []
        fill()
        argv = [hub.endpoint, str(run), REPO, "v1", str(disk)]
        command = Command("tests.crash.push", argv, bench.folder / "push-full.txt")
        status, said = command.wait(), command.tail()
        if status != [2] or "No space left on device" not in said or "Traceback" in said:
            problems.append(f"push on a full disk ended with {status}: {said[-500:]}")
        if ("model", REPO) in hub.repositories or content(run / "best") != before:
            problems.append("push on a full disk left something on the Hub, or changed the run")
    return 1, problems


def interrupted_and_killed_pushes(bench, chance: random.Random) -> tuple[int, list[str]]:
    """SIGINT and SIGTERM are undone. SIGKILL cannot be: the next push has to make it whole."""
    problems, struck, folder = [], 0, bench.folder / "to-push"
    shutil.copytree(bench.reference(1) / "best", folder)
    with LoopbackHub(lfs_bytes=1000) as hub:

        def push(tag: str) -> Command:
            argv = [hub.endpoint, str(folder), REPO, tag]
            return Command("tests.crash.push", argv, bench.folder / "push.txt")

        for exists in (False, True):
            if exists:
                if any(push("v1").wait()):
                    return struck, ["push fails by itself"]
                (folder / "notes.md").write_text("second version")
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                before, asked = hub.state(REPO), len(hub.requests)
                command, target = push("v2"), chance.randrange(1, 12)
                reached = command.wait_until(
                    lambda asked=asked, target=target: len(hub.requests) >= asked + target, interval=0.0005
                )
                if not reached:
                    continue
                command.signal(number)
                status = command.wait()
                struck += 1
                if status == [0]:  # done before the signal came
                    (folder / "notes.md").write_text(f"version {struck}")
                    hub.repositories["model", REPO].tags.pop("v2")
                elif hub.state(REPO) != before:
                    problems.append(f"{signal.Signals(number).name} after {target} requests left the Hub changed")
        command = push("v2")
        asked = len(hub.requests)
        command.wait_until(lambda: len(hub.requests) >= asked + 5, interval=0.0005)
        command.kill()
        struck += 1
        if any(push("v3").wait()):
            problems.append("a push after a killed one fails")
        sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        if not sent <= set(hub.files(REPO)):
            problems.append("a push after a killed one is not whole")
    return struck, problems


ATTACKS = (
    kills_inside_fit_thresholds,
    kills_inside_calibrate,
    kills_inside_tag,
    full_disk_in_each,
    full_disk_in_push,
    interrupted_and_killed_pushes,
)
