"""The commands as a user has them: from the wheel, in an empty folder, without the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .training.tiny_run import TINY

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def test_help_takes_less_than_a_second(wheel, tmp_path):
    """Of processor time, so that a busy machine does not matter; of three tries."""
    import resource

    def seconds(command):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call = [sys.executable, wheel.site / "bin" / "hsvlt", command, "--help"]
        environment = {**os.environ, "PYTHONPATH": str(wheel.site)}
        ran = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert f"hsvlt {command}" in ran.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for command in ("train", "tag", "evaluate", "prepare"):
        assert any(seconds(command) < 1 for _ in range(3)), command


def test_the_page_for_a_browser_is_in_the_wheel(wheel):
    browser = ROOT / "training" / "publish" / "browser"
    for file in browser.iterdir():
        installed = wheel.site / "hsvlt_training" / "publish" / "browser" / file.name
        assert installed.read_bytes() == file.read_bytes()


def test_a_run_is_trained_evaluated_and_pushed_and_the_other_commands_start(wheel, tmp_path):
    """What is wrong is one line, and the exit status 2."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"report": True}))
    wheel.hsvlt("train", "tiny.yaml", "--output_dir", "runs/tiny", folder=tmp_path)
    assert (tmp_path / "runs" / "tiny" / "best" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "tiny" / "report" / "report.html").is_file()  # its template is in the wheel

    error = wheel.hsvlt("demo", folder=tmp_path, status=2).stderr  # without gradio
    assert error.count("\n") == 1 and "MODELS=runs/tiny/best" in error
    assert "gradio" in Path(re.search(r"-r (\S+)", error)[1]).read_text()

    commands = [
        ["evaluate", "runs/tiny", "scenes", "--scenes", json.dumps(TINY["scenes"])],  # by its own name
        ["push", "runs/tiny", "org/name", "--dry_run", "--folder", "built"],
        ["check", "nowhere"],
        ["split", "nowhere", "target", "--fractions", "0.5", "0.5"],
        ["prepare", "coco", "nowhere", "target"],
        ["thresholds", "nowhere/at/all", "scenes"],
        ["calibrate", "nowhere/at/all", "scenes"],
        ["export", "nowhere/at/all", "target"],
        ["convert", "nowhere", "target"],
        ["train", "photos", "nowhere"],
        ["tag", "nowhere/at/all", "nowhere", "tags"],
    ]
    script = """
import contextlib, io, json, sys
import hsvlt_training, modeling_hsvlt
from hsvlt_training.__main__ import main
said = [hsvlt_training.__file__, modeling_hsvlt.__file__]
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as error:
        said.append([main(command), output.getvalue(), error.getvalue()])
print(json.dumps(said))
"""
    # In one process, since each takes seconds to import.
    ran = wheel.run("-c", script, json.dumps(commands), folder=tmp_path)
    ours, models, evaluated, pushed, *others = json.loads(ran.stdout.splitlines()[-1])
    assert ours.startswith(str(wheel.site)) and models.startswith(str(wheel.site))
    assert evaluated[0] == 0 and "mAP" in evaluated[1], evaluated
    assert pushed[0] == 0 and "Dry run: nothing was sent" in pushed[1], pushed
    assert "pipeline(" in (tmp_path / "built" / "README.md").read_text()
    for (name, *_), (status, _, error) in zip(commands[2:], others, strict=True):
        assert status == 2 and re.search("^error: .", error, re.MULTILINE), (name, status, error)


def test_the_notebook_runs_from_top_to_bottom(wheel, tmp_path):
    """Its cells, as a notebook runs them, with the value of each one's last line."""
    notebook = json.loads((ROOT / "examples" / "finetune.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "outputs are not kept"
    few = '("train", 32), ("validation", 16)'
    cells[0], before = cells[0].replace('("train", 64), ("validation", 32)', few), cells[0]
    assert cells[0] != before
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    (tmp_path / "run.py").write_text(
        """
import ast, json
space, values = {}, []
for cell in json.load(open("cells.json")):
    tree, last = ast.parse(cell), None
    if isinstance(tree.body[-1], ast.Expr):
        last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, "cell", "exec"), space)
    values.append(None if last is None else eval(compile(last, "cell", "eval"), space))
sheets = [value for value in values if hasattr(value, "_repr_png_")]
for number, sheet in enumerate(sheets):
    sheet.save(f"sheet-{number}.png")
assert len(sheets) == 2 and min(sheet.width for sheet in sheets) > 600, values
assert set(values[-1][0]) >= {"label", "score"} if values[-1] else values[-1] == []
print("mAP", space["results"]["validation"]["mAP"])
"""
    )
    ran = wheel.run("run.py", folder=tmp_path, XDG_CACHE_HOME=tmp_path / "cache")
    assert float(ran.stdout.rpartition("mAP ")[2]) > 0.2  # of ten digits each image shows one to four
    assert (tmp_path / "runs" / "notebook" / "best" / "model.safetensors").is_file()
