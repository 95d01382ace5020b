import ast
import re
import sys
import tomllib
import zipfile
from inspect import ismodule
from pathlib import Path

import pytest

import modeling_hsvlt

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "modeling_hsvlt").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What whoever loads a checkpoint has: transformers and what it needs.
ALLOWED = {"torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("file", [file for file in FILES if file.name != "__init__.py"], ids=lambda file: file.name)
def test_a_checkpoint_can_carry_the_file(file):
    """transformers follows `from .name import thing` and nothing else when it copies a model's code."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert (file.parent / f"{node.module}.py").exists(), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] in ALLOWED, ast.unparse(node)
        elif isinstance(node, ast.Import):
            assert all(name.name.partition(".")[0] in ALLOWED for name in node.names), ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Its scanner reads docstrings as well.
            assert not any(line.lstrip().startswith(("from .", "import .")) for line in node.value.splitlines())


def test_the_package_s_names_are_those_it_lists():
    names = {name for name, item in vars(modeling_hsvlt).items() if not name.startswith("_") and not ismodule(item)}
    assert names == set(modeling_hsvlt.__all__)


def test_no_other_file_lists_public_names():
    files = (ROOT / "modeling_hsvlt").glob("*.py")
    assert {file.name for file in files if "\n__all__" in file.read_text()} == {"__init__.py"}


def test_public_names_exist_and_are_documented():
    for name in modeling_hsvlt.__all__:
        item = getattr(modeling_hsvlt, name)
        if callable(item):
            assert item.__doc__, f"{name} has no docstring"


def test_version_is_the_distribution_s():
    assert PROJECT["version"] == modeling_hsvlt.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation


def pins(file: str) -> dict[str, str]:
    """Version by distribution of a file of pinned requirements."""
    lines = [line.partition("==") for line in (ROOT / file).read_text().splitlines() if "==" in line]
    return {name.lower().replace("_", "-"): version for name, _, version in lines}


def test_no_version_is_allowed_that_is_older_than_what_is_tested():
    tested = pins("constraints.txt")
    # gradio wants Pillow below 13, and the Space's tests run with that.
    tested["pillow"] = pins("tests/space/requirements.txt")["pillow"]
    tested["timm"] = pins("tests/timm/requirements.txt")["timm"]
    extras = PROJECT["optional-dependencies"].values()
    for requirement in [*PROJECT["dependencies"], *(requirement for extra in extras for requirement in extra)]:
        name, _, floor = requirement.partition(">=")
        assert f"{tested[name.lower().replace('_', '-')]}.".startswith(f"{floor}."), requirement


def test_the_hooks_check_with_the_tested_versions():
    tested = pins("constraints.txt")
    for name, version in re.findall(r"\[([\w-]+)==([\d.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text()):
        assert tested[name] == version, name


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages_and_what_they_read(wheel):
    packed = {name for name in zipfile.ZipFile(wheel.file).namelist() if ".dist-info/" not in name}
    places = {"training": "hsvlt_training", "modeling_hsvlt": "modeling_hsvlt"}
    places |= {name: f"hsvlt_training/{name}" for name in ("model_cards", "space")}
    wanted = set()
    for top, inside in places.items():
        files = (path.relative_to(ROOT / top) for path in (ROOT / top).rglob("*") if path.is_file())
        wanted |= {f"{inside}/{file.as_posix()}" for file in files if "__pycache__" not in file.parts}
    assert packed == wanted
    assert any(name.endswith("LICENSE") for name in zipfile.ZipFile(wheel.file).namelist())
