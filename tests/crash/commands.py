"""A full disk in `fit_thresholds`, `calibrate`, `tag` and `push`, and signals at the requests of a push to a Hub on
this machine. `file_events.py` strikes the same commands at their file events.

Each attack returns how often it struck, and what went wrong.
"""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from tests.loopback_hub import LoopbackHub
from training.checkpoint.folder import verify

from .bench import content
from .processes import Command
from .strikes import spread

REPO = "me/crash"


def rewrite(bench, run: Path, name: str) -> Command:
    argv = [str(run / "best"), str(bench.folder / "images")]
    return Command(f"training.{name}", argv, bench.folder / f"{run.parent.name}-{name}.txt")


def tagging(bench, output: Path) -> Command:
    best, images = bench.reference(1) / "best", bench.folder / "images" / "train"
    options = ["--part_size", "4", "--batch_size", "2", "--num_workers", "1", "--threshold", "0"]
    return Command("training.tag", [str(best), str(images), str(output), *options], bench.folder / "tag.txt")


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
    run = bench.folder / "pushed-run"
    shutil.copytree(bench.reference(1), run)
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


def beside_a_run_that_is_overwritten(bench, chance: random.Random) -> tuple[int, list[str]]:
    """Commands that read best/ while a run writes it, again and again: each does its work, or says why not."""
    run, problems, struck = bench.folder / "overwritten", [], 0
    best, images = str(run / "best"), str(bench.folder / "images")
    with LoopbackHub() as hub:
        readers = {
            "training.tag": [best, f"{images}/validation", str(bench.folder / "beside-tags"), "--threshold", "0.5"],
            "training.evaluate": [best, images, "--output", str(bench.folder / "beside-report"), "--overwrite"],
            "training.export": [best, str(bench.folder / "beside-onnx"), "--overwrite"],
            "tests.crash.push": [hub.endpoint, str(run), REPO, "", str(bench.folder)],
        }
        writer = bench.start(run, 1)
        for main, argv in 2 * list(readers.items()):
            writer.wait_until(lambda: (run / "best").is_dir())
            reader = Command(main, argv, bench.folder / "beside.txt")
            while reader.alive():
                if not writer.alive():
                    if any(writer.wait()):
                        problems.append(f"the run broke beside {main}: {writer.tail(500)}")
                    argv = [str(bench.recipe(1)), "--output_dir", str(run), "--overwrite"]
                    writer = Command("training.train", argv, run.with_suffix(".txt"))
                time.sleep(0.01)
            status, said = reader.wait(), reader.tail()
            (bench.folder / "beside.txt").unlink()
            struck += 1
            if status not in ([0], [2]) or (status == [2]) != ("error: " in said) or "Traceback" in said:
                problems.append(f"{main} beside a run ended with {status}: {said[-500:]}")
        if any(writer.wait()):
            problems.append(f"the run broke: {writer.tail(500)}")
    return struck, problems + ([] if bench.same_end(run, 1) else ["the run came to another end"])


class StrikingRequests(list):
    """Of a Hub, which strikes a client while that waits for the answer to request `at`."""

    def __init__(self, command: Callable[[], Command]):
        self.at, self.number, self.command = 0, 0, command

    def append(self, request: tuple[str, str]) -> None:
        super().append(request)
        if len(self) == self.at:
            self.command().signal(self.number)


def requests_of_push(bench, chance: random.Random) -> tuple[int, list[str]]:
    """SIGINT and SIGTERM are undone, at any request. SIGKILL cannot be: the next push has to make it whole."""
    problems, struck, folder = [], 0, bench.folder / "to-push"
    shutil.copytree(bench.reference(1) / "best", folder)
    with LoopbackHub(lfs_bytes=1000) as hub:
        started = []

        def push(tag: str, at: int = 0, number: int = 0) -> list[int]:
            hub.requests = StrikingRequests(lambda: started[-1])
            hub.requests.at, hub.requests.number = at, number
            argv = [hub.endpoint, str(folder), REPO, tag]
            with hub.lock:
                started.append(Command("tests.crash.push", argv, bench.folder / "push.txt"))
            return started[-1].wait()

        def forget(exists: bool) -> None:
            """Of an older version, where there is one."""
            hub.repositories.clear()
            if exists:
                (folder / "notes.md").unlink(missing_ok=True)
                push("v1")
                (folder / "notes.md").write_text("second version")

        for exists in (False, True):
            forget(exists)
            if any(push("v2")):
                return struck, ["push fails by itself"]
            requests = list(hub.requests)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                for at in spread(len(requests), len(requests) if bench.every_event else 4):
                    forget(exists)
                    before, status = hub.state(REPO), push("v2", at, number)
                    struck += 1
                    what = f"{number.name} at request {at} of {len(requests)} {requests[at - 1]}"
                    if number == signal.SIGKILL:
                        if any(push("v3")):
                            problems.append(f"a push after {what} fails")
                        sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
                        if not sent <= set(hub.files(REPO)):
                            problems.append(f"a push after {what} is not whole")
                    elif status != [0] and hub.state(REPO) != before:  # 0: it was done before the signal came
                        problems.append(f"{what} left the Hub changed")
    return struck, problems


ATTACKS = (full_disk_in_each, full_disk_in_push, beside_a_run_that_is_overwritten, requests_of_push)
