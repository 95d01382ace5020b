"""What training loses when it is hit: `make crash-test`, or `python -m tests.crash [--kills 12] [--seed 0]`.

A tiny model trains on a small folder of images with weight average, accumulation, mixup, RandAugment, random crops
and a data worker. Then, on one and on two processes:

- SIGKILL at random points of the run, every third time at a file event of a save (`strikes.py`; the temporary folder
  is still there after the kill), each time at another, and a restart after each;
- SIGTERM and SIGINT, which must end a run with exit status 0;
- a disk that fills up (a small tmpfs), a file that cannot be written to its end (RLIMIT_FSIZE), an image that
  disappears in the middle of an epoch, one of two processes killed under `accelerate launch`;
- a second run, `fit_thresholds` and `calibrate` in the folder of a run that trains, which have to be refused;
- the same kills where it trains on a stream of shards, with two data workers;
- Ctrl-C, as a terminal sends it, to the launcher and all that it started, which must end with exit status 0.

The end of a run, `fit_thresholds`, `calibrate`, `tag` with sidecars, and `push` (to a Hub on this machine) are killed,
interrupted and left without room at their file events, and `push` at its requests, see `file_events.py` and
`commands.py`; other commands read a run that is overwritten meanwhile.

Every run is carried on to its end and compared with one that nothing happened to: all tensors of the last checkpoint
and of best/, results.json, and the log but for its times. The last line sums up; the exit status is 0 when nothing was
lost.
"""

import argparse
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

from training.checkpoint.series import checkpoints

from . import commands, file_events
from .bench import STEPS, Bench, StreamBench, losses_of, step_of
from .processes import Command, children, environment_of
from .strikes import Strike, is_saving, saves, spread

ROOT = Path(__file__).parents[2]
LAUNCH_CONFIG = ROOT / "training" / "configs" / "accelerate" / "cpu_two_processes.yaml"
TRIES = 5  # to hit a run before its end
STOP_BOUND = 300.0  # seconds in which a run leaves, on machines that do other work as well


def kill_often(bench: Bench, processes: int, kills: int, chance: random.Random) -> tuple[int, int, list[str], bool]:
    """Kills, those of them inside a save, what was lost, and whether the end is the same.

    Every third kill has to be inside a save: at a file event of it, each time at another, so that it does not depend
    on how fast a machine writes and looks. A run that came to its end before it was hit, as kills come late on a
    machine that does other work, is compared, and the kill is for another one, which has all its saves before it.
    """
    whole = bench.reference(processes)
    steps, events = step_of(whole), bench.events(processes)
    moments = spread(2 * len(events) // len(saves(events)), kills // 3)  # over two saves; with some goes best/
    run, had, lost, inside, same = bench.folder / f"killed{processes}", set(), [], 0, True
    start = time.monotonic()
    for number in range(kills):
        in_save = number % 3 == 2
        strike = Strike(run, "kill", moments[number // 3], in_save=True) if in_save else None
        for _ in range(TRIES):
            training = bench.start(run, processes, strike=strike)
            if in_save:
                training.wait_for_first()  # which is struck
            elif number < 2:  # while it starts
                time.sleep(chance.uniform(0.0, 4.0))
            else:
                target = number * steps // (kills + 1)
                training.wait_until(lambda target=target: step_of(run) >= target)
                time.sleep(chance.uniform(0.0, 0.5))
            status = training.kill()
            if -signal.SIGKILL in (status[:1] if in_save else status):
                break
            if any(code > 0 for code in status):
                raise AssertionError(f"A restart did not go on:\n{training.tail()}")
            bench.finish(run, processes)  # the second of two processes may have been hit
            same = same and bench.same_end(run, processes)
            shutil.rmtree(run)
            had.clear()
        else:
            raise AssertionError(f"{TRIES} runs came to their end before kill {number + 1} of {kills}")
        inside += in_save and is_saving(run)
        lost += losses_of(run, had)
    bench.finish(run, processes)
    lost += losses_of(run, had)
    same = same and bench.same_end(run, processes)
    print(
        f"SIGKILL, {processes} process(es): {kills} kills, {inside} inside a save, {len(lost)} lost, the same end: "
        f"{words(same)} ({time.monotonic() - start:.0f} s)",
        *lost,
        sep="\n    ",
        flush=True,
    )
    return kills, inside, lost, same


def not_inside(some: tuple) -> list[str]:
    kills, inside = some[:2]
    return (
        [] if inside == kills // 3 else [f"{inside} of {kills // 3} kills that were meant for a save were inside one"]
    )


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
        kills, problems = kills + some[0], problems + some[2] + not_inside(some)
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


COUNTED = (kill_a_stream, *commands.ATTACKS, *file_events.ATTACKS)  # these say how often they struck


def attempt(attack, *arguments):
    """What an attack returns; one that does not come to its end is a problem, and the next one begins."""
    try:
        return attack(*arguments)
    except (TimeoutError, AssertionError) as error:
        return (1, [str(error)]) if attack in COUNTED else told(attack.__name__, [str(error)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="of training on one, and on two processes; default: 12")
    parser.add_argument("--only", nargs="+", default=[], help="attacks by the names of their functions")
    parser.add_argument("--every_event", action="store_true", help="strike commands at each file event; hours")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work, and to leave everything; default: a temporary one")
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    folder = args.folder or Path(tempfile.mkdtemp(prefix="crash-"))
    os.environ["HF_HOME"] = str(folder / "hf")
    chance, start, problems, kills, inside, lost, same = random.Random(args.seed), time.monotonic(), [], 0, 0, [], True
    bench = Bench(folder)
    bench.every_event = args.every_event
    for processes in (1, 2) if "kill_often" in (args.only or "kill_often") else ():
        some = kill_often(bench, processes, args.kills, chance)
        kills, inside, lost, same = kills + some[0], inside + some[1], lost + some[2], same and some[3]
        problems += not_inside(some) + attempt(stop_by_signal, bench, processes)
    counts = Counter({"kills of training": kills, "stops by signals": 6 * (kills > 0)})
    for attack in (fill_the_disk, cut_a_file, lose_a_image, kill_one_of_two, two_at_once, interrupt_the_launcher):
        if attack.__name__ in (args.only or attack.__name__):
            problems += attempt(attack, bench)
            counts[attack.__name__.replace("_", " ")] += 1
    for attack in COUNTED:
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
