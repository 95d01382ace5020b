"""The commands as a user has them: from the wheel, in an empty folder, without the checkout."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from .training.tiny_run import TINY

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
    """An empty folder in which a user has trained a tiny model."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"report": True}))
    ran = wheel.hsvlt("train", "tiny.yaml", "--output_dir", "runs/tiny", folder=folder)
    (folder / "train.txt").write_text(ran.stdout)
    images = "from hsvlt_training.data.scenes import main; main(['scenes', '--num_scenes', '3'])"
    wheel.run([sys.executable, "-c", images], folder)
    return folder


def test_help_takes_less_than_a_second(wheel, tmp_path):
    """Of processor time, so that a busy machine does not matter; the best of three."""
    import resource

    for command in ("train", "tag", "evaluate", "prepare"):
        seconds = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert f"hsvlt {command}" in wheel.hsvlt(command, "--help", folder=tmp_path).stdout
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(seconds) < 1, command


def test_training_leaves_a_run_with_its_report(folder):
    assert (folder / "runs" / "tiny" / "best" / "model.safetensors").is_file()
    assert (folder / "runs" / "tiny" / "report" / "report.html").is_file()  # its template is in the wheel


def test_the_page_for_a_browser_is_in_the_wheel(wheel):
    browser = ROOT / "training" / "publish" / "browser"
    for file in browser.iterdir():
        installed = wheel.site / "hsvlt_training" / "publish" / "browser" / file.name
        assert installed.read_bytes() == file.read_bytes()


def test_a_run_is_evaluated_by_its_own_name(wheel, folder):
    ran = wheel.hsvlt("evaluate", "runs/tiny", "scenes", "--scenes", json.dumps(TINY["scenes"]), folder=folder)
    assert "mAP" in ran.stdout


def test_a_push_is_built_with_its_card(wheel, folder):
    ran = wheel.hsvlt("push", "runs/tiny", "org/name", "--dry_run", "--folder", "built", folder=folder)
    assert "Dry run: nothing was sent" in ran.stdout
    assert "pipeline(" in (folder / "built" / "README.md").read_text()


def test_the_other_commands_start(wheel, folder):
    """What is wrong is one line, and the exit status 2; in one process, since each takes seconds to import."""
    commands = (
        ["check", "nowhere"],
        ["split", "nowhere", "target", "--fractions", "0.5", "0.5"],
        ["prepare", "coco", "nowhere", "target"],
        ["thresholds", "nowhere/at/all", "scenes"],
        ["calibrate", "nowhere/at/all", "scenes"],
        ["export", "nowhere/at/all", "target"],
        ["convert", "nowhere", "target"],
        ["train", "photos", "nowhere"],
        ["tag", "nowhere/at/all", "nowhere", "tags"],
    )
    script = """
import contextlib, io, json, sys
from hsvlt_training.__main__ import main
said = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        said.append([command[0], main(command), error.getvalue()])
print(json.dumps(said))
"""
    ran = wheel.run([sys.executable, "-c", script, json.dumps(commands)], folder)
    for name, status, error in json.loads(ran.stdout.splitlines()[-1]):
        assert status == 2 and re.search("^error: .", error, re.MULTILINE), (name, status, error)


def test_a_demo_without_gradio_says_what_to_install(wheel, folder):
    error = wheel.hsvlt("demo", folder=folder, status=2).stderr
    assert error.count("\n") == 1 and "MODELS=runs/tiny/best" in error
    assert "gradio" in Path(re.search(r"-r (\S+)", error)[1]).read_text()


def test_the_notebook_runs_from_top_to_bottom(wheel, tmp_path):
    """Its cells, as a notebook runs them, with the value of each one's last line."""
    notebook = json.loads((ROOT / "examples" / "finetune.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "outputs are not kept"
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
    ran = wheel.run([sys.executable, "run.py"], tmp_path, XDG_CACHE_HOME=tmp_path / "cache")
    assert float(ran.stdout.rpartition("mAP ")[2]) > 0.2  # of ten digits each image shows one to four
    assert (tmp_path / "runs" / "notebook" / "best" / "model.safetensors").is_file()
