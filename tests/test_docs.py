"""Commands in the READMEs can be read by the commands themselves; mAP has one scale."""

import re
import shlex
from pathlib import Path

import pytest

from training.__main__ import COMMANDS as HSVLT
from training.config import parse_config
from training.options import CommandParser, NewestOptions
from training.places import recipes
from training.prepare.__main__ import build_parser

from .training.test_options import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "training/README.md", "training/prepare/README.md", "training/configs/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "model_cards").glob("*.md"))
MODULES = {"check": "check_data", "thresholds": "fit_thresholds"}


def commands() -> list[str]:
    """Every `hsvlt ...` in a block of code."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            found += [line.partition("  #")[0] for line in block.splitlines() if line.startswith("hsvlt ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_a_command_of_a_readme_can_be_read(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my_photos", "FOLDER"):
        (tmp_path / name).mkdir()
    for name in ("photo.jpg", "clip.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "runs" / "photos" / "best").mkdir(parents=True)
    (tmp_path / "runs" / "photos" / "config.yaml").write_text("epochs: 1\n")
    (tmp_path / "runs" / "photos" / "best" / "config.json").touch()
    name, *words = shlex.split(line)[1:]
    if name == "train":
        parse_config(words)
    elif name == "prepare":
        build_parser(words[0]).parse_args(words)
    elif name == "tag" and (images := import_command("tag").few_images(words)) is not None:
        CommandParser(import_command("tag").ShowOptions).read(images)
    elif name == "demo":
        CommandParser(NewestOptions).read(words)
    else:
        module = MODULES.get(name, name)
        CommandParser(getattr(import_command(module), COMMANDS[module])).read(words)


def import_command(name):
    return __import__(f"training.{name}", fromlist=[name])


@pytest.mark.parametrize("page", [*PAGES, *sorted(f"training/configs/{name}.yaml" for name in recipes())])
def test_map_is_a_fraction(page):
    text = (ROOT / page).read_text()
    assert not re.findall(r"mAP (?:of |is )?\d{2}\.\d|\d{2}\.\d+ mAP", text)


def test_every_command_has_a_line_in_the_readme():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = [line.removeprefix("| `").partition("`")[0].partition(" ")[0] for line in rows]
    for command in HSVLT:
        assert named.count(command) == 1, command


def test_the_tables_of_files_are_whole():
    for top, page in (("training", "training"), ("benchmarks", "benchmarks"), ("training/prepare", "training/prepare")):
        text = (ROOT / page / "README.md").read_text()
        for file in sorted((ROOT / top).rglob("*.py")):
            elsewhere = page == "training" and file.parent.name == "prepare"
            is_command, is_module = file.parent == ROOT / "training", file.stem == file.parent.name
            if not (elsewhere or is_command or is_module or file.name.startswith("__")):
                assert f"{file.name}`" in text, f"{file.relative_to(ROOT)} is not in {page}/README.md"
    text = (ROOT / "training" / "configs" / "README.md").read_text()
    assert [name for name in recipes() if f"`{name}.yaml`" not in text] == []
