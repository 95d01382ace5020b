"""Commands that write, struck at their file events: killed, interrupted, and on a disk that is full from there on.

Each is run once undisturbed, which tells its events. Every strike, spread evenly over them, begins from the same files:
what it leaves has to be whole, it may say in one sentence what happened, and the same command again has to come to the
undisturbed end, with nothing left over.
"""

import shutil

import pyarrow.parquet as pq

from tests.loopback_hub import LoopbackHub
from training.checkpoint.folder import CheckpointError, verify

from .bench import Bench, content, end_of, losses_of
from .processes import Command
from .strikes import Strike, events_of, saves, spread

REPO = "me/crash"


class Struck:
    """A command, and the folder whose events count; `before` is what each strike begins from."""

    strikes = 4  # of each kind
    repeats = True  # the same command on its own result changes nothing
    interrupted, no_room = (130,), (2,)  # the statuses after SIGINT and on a full disk, where it says so

    def __init__(self, bench: Bench):
        self.bench, self.name = bench, type(self).__name__.lower()
        self.home = bench.folder / f"struck-{self.name}"
        self.folder, self.before = self.home / "work", self.home / "before"
        self.home.mkdir()
        self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    def start(self, strike: Strike | None) -> Command:
        raise NotImplementedError

    def left(self, failed: bool) -> list[str]:
        """What is wrong with what a strike left, before the command runs again; `failed`: it said so."""
        return []

    def result(self) -> object:
        """All that an undisturbed command comes to."""
        raise NotImplementedError

    def close(self) -> None:
        pass

    def command(self, main: str, *argv: object, strike: Strike | None) -> Command:
        output = self.home / "output.txt"
        output.unlink(missing_ok=True)
        return Command(main, [*map(str, argv)], output, strike=strike)

    def begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder)

    def strike(self) -> tuple[int, list[str]]:
        """How often it was struck, and what went wrong."""
        self.begin()
        seen, problems, struck = self.home / "events.txt", [], 0
        command = self.start(Strike(self.folder, seen=seen))
        if any(command.wait()):
            return 0, [f"{self.name} fails by itself: {command.tail()}"]
        self.whole, events = self.result(), events_of(seen)
        unlike = [at for at, event in enumerate(events, start=1) if not event.endswith(".py")]  # code is copied alike
        chosen = [unlike[number - 1] for number in spread(len(unlike), self.strikes)]
        for how, statuses in ("kill", (-9,)), ("interrupt", self.interrupted), ("full", self.no_room):
            for at in range(1, 1 + len(events)) if self.bench.every_event else chosen:
                struck += 1
                wrong = self.strike_once(Strike(self.folder, how, at), statuses)
                problems += [
                    f"{self.name}, {how} at event {at} of {len(events)} ({events[at - 1]}): {w}" for w in wrong
                ]
        return struck, problems

    def strike_once(self, strike: Strike, statuses: tuple[int, ...]) -> list[str]:
        self.begin()
        command = self.start(strike)
        (ended,), said = command.wait(), command.tail()
        wrong = [] if ended in (0, *statuses) else [f"it ended with {ended}: {said[-500:]}"]
        if "Traceback" in said:
            wrong.append(f"it has a traceback: {said[-800:]}")
        wrong += self.left(failed=ended > 0)
        done = (ended == 0 or not self.repeats) and self.result() == self.whole
        if ended == 0 and 0 not in statuses and not done:
            wrong.append("it said that it was done")
        if not done and any((command := self.start(None)).wait()):
            wrong.append(f"it does not go on: {command.tail(800)}")
        elif not done and self.result() != self.whole:
            wrong.append("it came to another end")
        hidden = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob(".*") if path.name != ".lock"]
        return wrong + ([f"it left {hidden}"] if hidden else [])


class Train(Struck):
    """The end of a run: it resumes, takes the last steps, saves, keeps the best and writes its results."""

    strikes, interrupted, no_room = 6, (0, 130), (1, 2)

    def prepare(self) -> None:
        killed = self.bench.folder / "almost"
        self.bench.start(killed, 1, strike=Strike(killed, "kill", saves(self.bench.events(1))[-2])).wait()
        killed.rename(self.before)

    def start(self, strike):
        resume = "--resume" if self.folder.is_dir() else "--overwrite"
        return self.command("training.train", self.bench.recipe(1), "--output_dir", self.folder, resume, strike=strike)

    def left(self, failed):
        return losses_of(self.folder, {path.name for path in self.before.glob("checkpoint-*")} | {"best"})

    def result(self):
        return end_of(self.folder) if (self.folder / "results.json").exists() else None


class Revise(Struck):
    """A command that changes best/."""

    def prepare(self) -> None:
        shutil.copytree(self.bench.reference(1), self.before)

    def start(self, strike):
        return self.command(f"training.{self.name}", self.folder / "best", self.bench.folder / "images", strike=strike)

    def left(self, failed):
        try:
            verify(self.folder / "best")
        except CheckpointError as error:
            return [str(error)]
        found = content(self.folder / "best")
        return [] if found in (content(self.before / "best"), self.whole) else ["best/ is neither old nor new"]

    def result(self):
        return content(self.folder / "best")


class Fit_Thresholds(Revise):  # noqa: N801
    pass


class Calibrate(Revise):
    repeats = False  # it fits what is left, of the order of rounding


class Tag(Struck):
    """With sidecars beside the images."""

    no_room = (1, 2)  # 1: of sidecars alone

    def prepare(self) -> None:
        shutil.copytree(self.bench.folder / "images" / "train", self.before / "images")

    def start(self, strike):
        options = ["--part_size", "10", "--batch_size", "5", "--num_workers", "1", "--threshold", "0"]
        best, images, output = self.bench.reference(1) / "best", self.folder / "images", self.folder / "tags"
        return self.command("training.tag", best, images, output, *options, "--sidecars", "txt", "xmp", strike=strike)

    def result(self):
        rows = [
            row for part in sorted((self.folder / "tags").glob("part-*")) for row in pq.read_table(part).to_pylist()
        ]
        beside = {path.name: path.read_bytes() for path in (self.folder / "images").iterdir()}
        return sorted(rows, key=lambda row: row["file_name"]), beside


class Push(Struck):
    """A whole push, which builds its folder in `work`, to a Hub on this machine."""

    strikes = 3

    def prepare(self) -> None:
        self.before.mkdir()
        self.run_folder = self.home / "run"
        shutil.copytree(self.bench.reference(1), self.run_folder)
        self.hub = LoopbackHub().__enter__()

    def begin(self) -> None:
        super().begin()
        self.hub.repositories.clear()

    def start(self, strike):
        return self.command(
            "tests.crash.push", self.hub.endpoint, self.run_folder, REPO, "", self.folder, strike=strike
        )

    def left(self, failed):
        if content(self.run_folder / "best") != content(self.bench.reference(1) / "best"):
            return ["the run was changed"]
        left = [path.name for path in self.folder.iterdir()]
        for name in left:  # what a killed process built in the machine's temporary folder
            shutil.rmtree(self.folder / name)
        return ["it left something on the Hub or this machine"] if failed and (left or self.hub.repositories) else []

    def result(self):
        files = self.hub.files(REPO)
        return {name: data for name, data in files.items() if name != "README.md"}  # which has the day

    def close(self) -> None:
        self.hub.__exit__()


def _attack(kind: type[Struck]):
    def attack(bench: Bench, chance: object) -> tuple[int, list[str]]:
        struck = kind(bench)
        try:
            return struck.strike()
        finally:
            struck.close()

    attack.__name__ = f"file_events_of_{kind.__name__.lower()}"
    return attack


ATTACKS = tuple(map(_attack, (Train, Fit_Thresholds, Calibrate, Tag, Push)))
