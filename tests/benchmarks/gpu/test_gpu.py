import json
import os
import shlex
import signal
import time

import pytest
import torch

from benchmarks.accuracy import heads
from benchmarks.cost import cached_text, speed
from benchmarks.cost import input as inputs
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import parts
from benchmarks.gpu.parts import GOALS, Suite, Unit, accuracy_table
from benchmarks.gpu.record import MARKS, Goal, Record
from training.config import parse_config

ABOUT = {"device": "a device", "torch": "2", "transformers": "5", "arithmetic": "in TF32", "smoke": False}
INFERENCE, STEP = "small, batch 64, bf16, compiled, inference", "small, batch 64, bf16, compiled, training"


def unit(name, run=lambda: {"line": "done", "table": "| a |"}):
    return Unit(name, f"command of {name}", run)


class Parts(Suite):
    units: list[Unit] = []

    def speed(self):
        return self.units


def run(tmp_path, *units, seconds=60.0):
    suite = Parts(smoke=True, data=None, folder=tmp_path)
    suite.units = list(units)
    record = Record(tmp_path / "results.json", ABOUT, GOALS)
    gpu.run_part(record, suite, "speed", seconds, time.monotonic())
    return json.loads((tmp_path / "results.json").read_text())["parts"]["speed"]


def test_a_part_stops_when_its_time_is_used_and_keeps_what_it_had(tmp_path, capsys):
    seen = []

    def slow():
        seen.append(json.loads((tmp_path / "results.json").read_text())["parts"]["speed"]["units"])
        try:
            time.sleep(30)
        except Exception:  # what a compiler does with what stops it
            seen.append("stopped")
        return {"line": "late", "table": ""}

    begin = time.monotonic()
    found = run(tmp_path, unit("first"), unit("second", slow), unit("third"), seconds=1.5)
    assert time.monotonic() - begin < 20
    assert list(found["units"]) == ["first"] and found["left_out"] == ["second", "third"]
    assert list(seen[0]) == ["first"], "written before the next one begins"
    assert len(seen) == 1 and "left out: second, third" in capsys.readouterr().out


def test_a_unit_that_fails_leaves_the_others(tmp_path, capsys):
    def fail():
        raise torch.OutOfMemoryError("too large")

    found = run(tmp_path, unit("first", fail), unit("second"))
    assert "too large" in found["units"]["first"]["error"] and "figures" in found["units"]["second"]
    assert "FAILED" in capsys.readouterr().out
    assert "failed: OutOfMemoryError: too large" in (tmp_path / "table.md").read_text()


def test_a_limit_that_was_set_before_holds_afterwards():
    rang = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    before = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with pytest.raises(gpu.TimeUpError), gpu.time_limit(0.01):
            time.sleep(30)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 60 < left <= 100 and not rang
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_goals_are_printed_beside_what_was_reached(tmp_path):
    record = Record(tmp_path / "results.json", ABOUT, GOALS)
    for name, time_, memory in ((INFERENCE, 1.09, 1.3), (STEP, 1.25, 1.2)):
        figures = {"table": "", "goals": {"64": {"time": time_, "memory": memory}}}
        record.add("speed", name, {"command": "", "seconds": 1.0, "figures": figures})
    lines = record.goal_table().splitlines()[2:]
    assert [line.split("|")[2:5] for line in lines[:4]] == [
        [" at most 1.10 ", " 1.090 ", " held "],
        [" at most 1.25 ", " 1.300 ", " **missed** "],
        [" at most 1.20 ", " 1.250 ", " **missed** "],
        [" at most 1.25 ", " 1.200 ", " held "],
    ]
    assert all("not measured" in line for line in lines[4:])
    loader = Goal("loader", 1.0, "input", "unit", ("loader",), at_least=True)
    assert loader.line({"unit": {"figures": {"goals": {"loader": 0.9}}}}).endswith("**missed** |")


def test_every_goal_names_a_unit_that_is_measured(tmp_path):
    suite = Suite(smoke=False, data=str(tmp_path), folder=tmp_path)
    for goal in GOALS:
        assert goal.unit in [each.name for each in getattr(suite, goal.part)()], goal


def test_every_command_can_be_read(tmp_path):
    suite = Suite(smoke=False, data=str(tmp_path), folder=tmp_path)
    modules = {"speed": speed, "cached_text": cached_text, "input": inputs, "heads": heads}
    read = []
    for part in gpu.SHARES:
        for each in getattr(suite, part)():
            words = shlex.split(each.command)
            name = words[2].rpartition(".")[2]
            if name in modules:
                modules[name].build_parser().parse_args(words[3:])
            elif "training.train" in words:
                parse_config(words[words.index("training.train") + 1 :])
            else:
                assert name == "pytest" and "tests/test_cuda.py" in words
            read.append(part)
    assert set(read) == set(gpu.SHARES) and sum(gpu.SHARES.values()) == pytest.approx(1)


def test_an_earlier_run_s_other_figures_stay(tmp_path):
    measured = {"command": "", "seconds": 1.0, "figures": {"table": "| old |"}}
    Record(tmp_path / "results.json", ABOUT, GOALS).add("mltr", "fp32", measured)
    record = Record(tmp_path / "results.json", ABOUT, GOALS)
    record.add("labels", "fp32", {**measured, "figures": {"table": "| new |"}})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    record.put_into(page)
    text = page.read_text()
    assert text.startswith(f"before\n{MARKS[0]}\na device") and text.endswith(f"{MARKS[1]}\nafter\n")
    assert "| old |" in text and "| new |" in text and "in TF32" in text
    assert Record(tmp_path / "results.json", {**ABOUT, "smoke": True}, GOALS).parts == {}, "a smoke run is none"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines <!-- gpu: begin -->"):
        record.put_into(page)


def test_seeds_are_put_together():
    row = {"mAP": 0.5, "head": 0.6, "medium": 0.5, "tail": float("nan"), "macro_f1": 0.4}
    units = {
        str(seed): {"figures": {"size": 224, "head": "hsvlt", "seed": seed, "row": {**row, "mAP": 0.5 + seed / 10}}}
        for seed in range(3)
    }
    assert accuracy_table(units).splitlines()[-1] == (
        "| 224 | hsvlt | 3 | 60.0 ± 10.0 | 60.0 ± 0.0 | 50.0 ± 0.0 | - | 40.0 ± 0.0 |"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no CUDA device is there for torch"),
        (["--smoke"], "GPU_DATA is 'nowhere', which is no folder"),
    ],
)
def test_refusals(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("GPU_DATA", "nowhere")
    assert gpu.main([*argv, "--output", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the smoke run is for machines without a GPU")
def test_smoke(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("GPU_DATA", raising=False)
    monkeypatch.setattr(parts, "HEADS", ("linear",))
    monkeypatch.setattr(heads, "read_label_texts", lambda names: torch.randn(len(names), 8))
    page = tmp_path / "README.md"
    page.write_text("\n".join(MARKS))
    argv = ["--smoke", "--parts", "labels", "input", "accuracy", "--output", str(tmp_path), "--page", str(page)]
    assert gpu.main([*argv, "--minutes", "8", "--json", str(tmp_path / "also.json")]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert (
        list(result["parts"])
        == ["labels", "input", "accuracy"]
        == list(json.loads((tmp_path / "also.json").read_text())["parts"])
    )
    for name, part in result["parts"].items():
        assert part["units"] and not part["left_out"], name
        assert all("figures" in unit for unit in part["units"].values()), part["units"]
    reached = {goal["what"]: goal["reached"] for goal in result["goals"]}
    assert (
        reached["10,000 labels with 128 candidates, to 80 labels"] > 0
        and reached["loader, to what the model takes"] > 0
    )
    printed = capsys.readouterr().out
    assert "accuracy: linear, 32 px, seed 0: mAP" in printed and "| 32 | linear | 1 |" in printed
    assert "A smoke run" in page.read_text() and os.listdir(tmp_path) and "not measured" in printed
