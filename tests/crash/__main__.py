"""What training loses when it is hit: `make crash-test`, or `python -m tests.crash [--kills 12] [--seed 0]`.

A tiny model trains on a small folder of images with weight average, accumulation, mixup, RandAugment, random crops
and a data worker. Then, on one and on two processes:

- SIGKILL at random points of the run, a third of the times while a checkpoint is being written (told by the temporary
  folder, which is still there after the kill), and a restart after each;
- SIGTERM and SIGINT, which must end a run with exit status 0;
- a disk that fills up (a small tmpfs), a file that cannot be written to its end (RLIMIT_FSIZE), an image that
  disappears in the middle of an epoch, one of two processes killed under `accelerate launch`;
- a second run, `fit_thresholds` and `calibrate` in the folder of a run that trains, which have to be refused;
- the same kills where it trains on a stream of shards, with two data workers;
- Ctrl-C, as a terminal sends it, to the launcher and all that it started, which must end with exit status 0.

`fit_thresholds`, `calibrate`, `tag` and `push` (to a Hub on this machine) are killed and get a full disk as well, see
`commands.py`.

Every run is carried on to its end and compared with one that nothing happened to: all tensors of the last checkpoint
and of best/, results.json, and the log but for its times. The last line sums up; the exit status is 0 when nothing was
lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from tests.training.shards import write_shards, write_tar
from tests.training.tiny_run import TINY
from training.checkpoint.folder import CheckpointError, verify
from training.checkpoint.series import checkpoints
from training.data.scenes import main as write_scenes

from . import commands
from .processes import Command, children, environment_of

ROOT = Path(__file__).parents[2]
LAUNCH_CONFIG = ROOT / "training" / "configs" / "accelerate" / "cpu_two_processes.yaml"
EPOCHS, STEPS = 8, 64  # on one process; on two twice the epochs, of half the steps
STOP_BOUND = 300.0  # seconds in which a run leaves, on machines that do other work as well


class Bench:
    """Folders, the recipe, and the undisturbed runs that everything is compared with."""

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

    def finish(self, run: Path, processes: int) -> None:
        training = self.start(run, processes)
        status = training.wait()
        if any(status):
            raise AssertionError(f"A run that should have ended well has exit statuses {status}:\n{training.tail()}")

    def reference(self, processes: int) -> Path:
        if processes not in self.whole:
            self.whole[processes] = self.folder / f"whole{processes}"
            start = time.monotonic()
            self.finish(self.whole[processes], processes)
            print(f"undisturbed run, {processes} process(es): {time.monotonic() - start:.0f} s", flush=True)
        return self.whole[processes]

    def same_end(self, run: Path, processes: int) -> bool:
        """Whether `run` ended bit for bit like the undisturbed one."""
        whole = self.reference(processes)
        pairs = [(folder / "best" / "model.safetensors") for folder in (whole, run)]
        newest = [checkpoints(folder)[0] for folder in (whole, run)]
        if newest[0].name != newest[1].name:
            return False
        for first, second in (pairs, [folder / "training_state" / "tensors.safetensors" for folder in newest]):
            expected, found = load_file(first), load_file(second)
            if expected.keys() != found.keys():
                return False
            if not all(torch.equal(tensor, found[name]) for name, tensor in expected.items()):
                return False
        logs = [
            [{key: value for key, value in json.loads(line).items() if "second" not in key} for line in path.open()]
            for path in (whole / "log.jsonl", run / "log.jsonl")
        ]
        return logs[0] == logs[1] and (whole / "results.json").read_text() == (run / "results.json").read_text()


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


def is_saving(run: Path) -> bool:
    return run.is_dir() and any(entry.name.endswith((".new", ".old")) for entry in os.scandir(run))


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


def kill_often(bench: Bench, processes: int, kills: int, chance: random.Random) -> tuple[int, int, list[str], bool]:
    """Kills, those of them inside a save, what was lost, and whether the end is the same."""
    whole = bench.reference(processes)
    steps = step_of(whole)
    run, had, lost, inside, done = bench.folder / f"killed{processes}", set(), [], 0, 0
    start = time.monotonic()
    while done < kills:
        training = bench.start(run, processes)
        in_save = done % 3 == 1
        if done < 2:  # while it starts
            time.sleep(chance.uniform(0.0, 4.0))
        else:
            target = done * steps // (kills + 1)
            if not training.wait_until(lambda target=target: step_of(run) >= target):
                raise AssertionError(f"A restart did not go on:\n{training.tail()}")
            if in_save:
                training.wait_until(lambda: is_saving(run), interval=0.0005)
                time.sleep(chance.uniform(0.0, 0.02))
            else:
                time.sleep(chance.uniform(0.0, 0.5))
        training.kill()
        done += 1
        inside += is_saving(run)
        lost += losses_of(run, had)
    bench.finish(run, processes)
    lost += losses_of(run, had)
    same = bench.same_end(run, processes)
    print(
        f"SIGKILL, {processes} process(es): {kills} kills, {inside} inside a save, {len(lost)} lost, the same end: "
        f"{words(same)} ({time.monotonic() - start:.0f} s)",
        *lost,
        sep="\n    ",
        flush=True,
    )
    return kills, inside, lost, same


def words(yes: bool) -> str:
    return "yes" if yes else "NO"


def told(what: str, problems: list[str]) -> list[str]:
    print(f"{what}: {'as it should' if not problems else '; '.join(problems)}", flush=True)
    return [f"{what}: {problem}" for problem in problems]


def ended(bench: Bench, run: Path, processes: int = 1) -> list[str]:
    """Carry on to the end; what is wrong with it."""
    problems = losses_of(run, {path.name for path in checkpoints(run)})
    bench.finish(run, processes)
    return problems + ([] if bench.same_end(run, processes) else ["the end differs from the undisturbed run's"])


def kill_a_stream(bench: Bench, chance: random.Random) -> tuple[int, list[str]]:
    stream, problems, kills = StreamBench(bench.folder / "stream"), [], 0
    for processes in (1, 2):
        some = kill_often(stream, processes, 6, chance)
        kills, problems = kills + some[0], problems + some[2]
        if not some[3]:
            problems.append(f"on {processes} process(es) the end differs from the undisturbed run's")
    return kills, problems


def stop_by_signal(bench: Bench, processes: int) -> list[str]:
    run, problems, longest = bench.folder / f"stopped{processes}", [], 0.0
    for number, target in ((signal.SIGTERM, 6), (signal.SIGINT, 24), (signal.SIGTERM, 44)):
        training = bench.start(run, processes)
        training.wait_until(lambda target=target: step_of(run) >= target)
        training.signal(number)
        start = time.monotonic()
        status = training.wait(STOP_BOUND)
        longest = max(longest, time.monotonic() - start)
        if any(status):
            problems.append(f"{number.name} ended with {status}: {training.tail(500)}")
        elif not target <= int(checkpoints(run)[0].name.partition("-")[2]) < STEPS:
            problems.append(f"{number.name} at step {target} left {checkpoints(run)[0].name}")
    problems += ended(bench, run, processes)
    return told(f"SIGTERM and SIGINT, {processes} process(es), {longest:.1f} s at most to save and leave", problems)


def fill_the_disk(bench: Bench) -> list[str]:
    what, disk = "a full disk", bench.folder / "disk"
    size = sum(path.stat().st_size for path in bench.reference(1).rglob("*") if path.is_file())
    with commands.small_disk(disk, 1 + 3 * size // 2**20) as fill:
        if fill is None:
            print(f"{what}: SKIPPED, a tmpfs cannot be mounted here", flush=True)
            return []
        run = disk / "run"
        training = bench.start(run, 1)
        training.wait_until(lambda: len(checkpoints(run)) >= 2)
        fill()
        status, problems = training.wait(), []
        if status != [1] or "No space left on device" not in training.tail():
            problems.append(f"it ended with {status}: {training.tail(500)}")
        (disk / "filler").unlink()
        return told(what, problems + ended(bench, run))


def cut_a_file(bench: Bench) -> list[str]:
    """The kernel lets no file grow beyond half of what the training state needs: a write fails half way."""
    run = bench.folder / "cut"
    training = bench.start(run, 1)
    training.wait_until(lambda: len(checkpoints(run)) >= 2)
    training.kill()
    had = {path.name for path in checkpoints(run)}
    state = checkpoints(run)[0] / "training_state" / "tensors.safetensors"
    training = bench.start(run, 1, file_limit=state.stat().st_size // 2)
    status, problems = training.wait(), losses_of(run, had)
    if status != [1] or "could not be written" not in training.tail():
        problems.append(f"it ended with {status}: {training.tail(500)}")
    return told("a save that fails half way", problems + ended(bench, run))


def lose_a_image(bench: Bench) -> list[str]:
    run, image = bench.folder / "image", bench.folder / "images" / "train" / "00017.png"
    training = bench.start(run, 1)
    training.wait_until(lambda: step_of(run) >= 12)
    image.rename(image.with_suffix(".away"))
    try:
        status, problems = training.wait(), []
    finally:
        image.with_suffix(".away").rename(image)
    if status != [1] or "00017.png" not in training.tail():
        problems.append(f"it ended with {status}: {training.tail(500)}")
    return told("an image that disappears", problems + ended(bench, run))


def kill_one_of_two(bench: Bench) -> list[str]:
    """Under the real launcher, which has to end the other process."""
    run, problems = bench.folder / "one_of_two", []
    output = (bench.folder / "one_of_two.txt").open("w")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH_CONFIG)]
    command += ["-m", "training.train", str(bench.recipe(2)), "--output_dir", str(run)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    ) as launcher:
        until = time.monotonic() + 300
        while step_of(run) < 20 and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        ranks = [pid for pid in children(launcher.pid) if environment_of(pid).get("RANK") == "1"]
        os.kill(ranks[0], signal.SIGKILL)
        start = time.monotonic()
        try:
            status = launcher.wait(120)
        except subprocess.TimeoutExpired:
            problems.append("the launcher still runs 120 s later")
            os.killpg(launcher.pid, signal.SIGKILL)
        else:
            if status == 0:
                problems.append("the launcher ended with 0")
    what = f"one of two processes killed under accelerate launch, all ended {time.monotonic() - start:.1f} s later"
    return told(what, problems + ended(bench, run, 2))


def two_at_once(bench: Bench) -> list[str]:
    """A run that trains, and a second one, `fit_thresholds` and `calibrate` in its folder."""
    run, problems = bench.folder / "two", []
    training = bench.start(run, 1)
    training.wait_until(lambda: (run / "best").is_dir() and len(checkpoints(run)) >= 1)
    data = [str(run / "best"), str(bench.folder / "images")]
    others = {
        "training.train": [str(bench.recipe(1)), "--output_dir", str(run), "--overwrite"],
        "training.fit_thresholds": data,
        "training.calibrate": data,
    }
    for main, argv in others.items():
        second = Command(main, argv, run.with_name("second.txt"))
        if second.wait() != [2] or "Another process works in" not in second.tail():
            problems.append(f"a second {main} was not refused: {second.tail(500)}")
    if any(training.wait()):
        problems.append(f"the first did not go on: {training.tail(500)}")
    return told("two at once", problems + ended(bench, run))


def interrupt_the_launcher(bench: Bench) -> list[str]:
    """`hsvlt train` on two processes, of which the terminal sends SIGINT to every one, the launcher included."""
    run, problems = bench.folder / "launched", []
    options = ["--config_file", str(LAUNCH_CONFIG)]
    argv = [str(bench.recipe(2)), "--output_dir", str(run)]
    call = f"run_launcher({options}, 'training.train', {argv})"
    code = f"import sys; from training.__main__ import run_launcher; sys.exit({call})"
    output = run.with_suffix(".txt").open("w")
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, stdout=output,
        stderr=output, start_new_session=True,
    ) as launcher:  # fmt: skip
        until = time.monotonic() + 300
        while step_of(run) < 10 and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(launcher.pid, signal.SIGINT)
        try:
            status = launcher.wait(STOP_BOUND + 60)
        except subprocess.TimeoutExpired:
            problems.append("the launcher still runs two minutes later")
            os.killpg(launcher.pid, signal.SIGKILL)
        else:
            said = run.with_suffix(".txt").read_text(errors="replace")
            if status or "Traceback" in said:
                problems.append(f"the launcher ended with {status}: {said[-800:]}")
    return told("Ctrl-C under the launcher", problems + ended(bench, run, 2))


def attempt(attack, *arguments):
    """What an attack returns; one that does not come to its end is a problem, and the next one begins."""
    try:
        return attack(*arguments)
    except (TimeoutError, AssertionError) as error:
        return (
            (1, [str(error)]) if attack in (kill_a_stream, *commands.ATTACKS) else told(attack.__name__, [str(error)])
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="of training on one, and on two processes; default: 12")
    parser.add_argument("--only", nargs="+", default=[], help="attacks by the names of their functions")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work, and to leave everything; default: a temporary one")
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    folder = args.folder or Path(tempfile.mkdtemp(prefix="crash-"))
    os.environ["HF_HOME"] = str(folder / "hf")
    chance, start, problems, kills, inside, lost, same = random.Random(args.seed), time.monotonic(), [], 0, 0, [], True
    bench = Bench(folder)
    for processes in () if args.only else (1, 2):
        some = kill_often(bench, processes, args.kills, chance)
        kills, inside, lost, same = kills + some[0], inside + some[1], lost + some[2], same and some[3]
        if some[1] < args.kills // 4:
            problems.append(f"only {some[1]} of {some[0]} kills on {processes} process(es) were inside a save")
        problems += attempt(stop_by_signal, bench, processes)
    counts = Counter({"kills of training": kills, "stops by signals": 0 if args.only else 6})
    for attack in (fill_the_disk, cut_a_file, lose_a_image, kill_one_of_two, two_at_once, interrupt_the_launcher):
        if attack.__name__ in (args.only or attack.__name__):
            problems += attempt(attack, bench)
            counts[attack.__name__.replace("_", " ")] += 1
    for attack in (kill_a_stream, *commands.ATTACKS):
        if attack.__name__ in (args.only or attack.__name__):
            number, found = attempt(attack, bench, chance)
            problems += told(attack.__name__.replace("_", " "), found)
            counts[attack.__name__.replace("_", " ")] += number
    if args.folder is None and not (problems or lost) and same:
        shutil.rmtree(folder)
    else:
        print(f"Everything is in {folder}.")
    print(
        f"crash-test: {', '.join(f'{number} {kind}' for kind, number in counts.items())}; {inside} kills inside a "
        f"save, {len(lost)} checkpoints lost, final weights bit-identical: {words(same)}; "
        f"{'all survived' if not problems else '; '.join(problems)} ({(time.monotonic() - start) / 60:.1f} minutes)"
    )
    return 0 if same and not lost and not problems else 1


if __name__ == "__main__":
    sys.exit(main())
