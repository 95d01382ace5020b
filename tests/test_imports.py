"""Who imports whom: the rooms of training/ and benchmarks/ only downwards, and nothing in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from training.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
# From the ground up. A room imports its own floor and those below; rooms of one floor not in a circle.
FLOORS = [
    {"places", "options", "say", "metrics", "checkpoint"},
    {"config", "data"},
    {"check", "prepare", "models", "scoring", "publish", "tagging"},
    {"report"},
    {"loop"},
    {"commands"},
    {"benchmarks"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of training/ and benchmarks/ by its dotted name."""
    files = [file for top in ("training", "benchmarks") for file in sorted((root / top).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(name: str, source: str, known: set[str], is_package: bool = False) -> set[str]:
    """The modules of `known`, or packages of tests/, that a module imports, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: None if is_package else -1]
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            # `from package import module` imports the module, `from module import name` the module itself.
            candidates = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        else:
            continue
        found |= {module for module in candidates if module in known or module.partition(".")[0] == "tests"}
    return found - {name}


def room(module: str) -> str:
    """Where a module lives; the modules on top of training/ are commands, but for `options` and `config`."""
    top, _, rest = module.partition(".")
    if top != "training":
        return top
    first, _, deeper = rest.partition(".")
    return first if deeper or first in FLOOR_OF or not first else "commands"


def wrong_ways(graph: dict[str, set[str]]) -> list[str]:
    """Each import that leads up, and the first circle of modules and of rooms; in words."""
    problems = []
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        for target in targets:
            here, there = room(module), room(target)
            if there not in FLOOR_OF:
                problems.append(f"{module} imports {target}, of {there}/")
            elif FLOOR_OF[there] > FLOOR_OF[here]:
                problems.append(f"{module} imports {target}: up, from {here} to {there}")
            elif here == there == "commands":
                problems.append(f"{module} imports {target}: a command, which parses and prints")
            if here != there:
                rooms.setdefault(here, set()).add(there)
    for what, edges in (("modules", graph), ("rooms", rooms)):
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            problems.append(f"a circle of {what}: {' > '.join(reversed(error.args[1]))}")
    return problems


def test_imports_lead_downwards_and_in_no_circle():
    files = modules()
    graph = {
        name: imports(name, file.read_text(encoding="utf-8"), set(files), file.name == "__init__.py")
        for name, file in files.items()
    }
    assert graph["training.loop.setup"] >= {"training.models.build", "training.data.load"}, "imports are not seen"
    assert wrong_ways(graph) == []


def test_every_room_has_its_floor():
    assert {room(name) for name in modules()} - {""} == set(FLOOR_OF)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f():\n    from ..report import page", "up, from scoring to report"),
        ("import training.loop.fit", "up, from scoring to loop"),
        ("from benchmarks.peers import heads", "up, from scoring to benchmarks"),
        ("from ..evaluate import run", "up, from scoring to commands"),
        ("from . import held_out", "a circle of modules: "),
        ("from ..publish.build import build_folder", "a circle of rooms: "),
        ("from tests.training import tiny_run", "of tests/"),
    ],
)
def test_a_wrong_way_is_named(source, words):
    known = {
        "training.scoring.thresholds": source,
        "training.scoring.held_out": "from .thresholds import fit",
        "training.publish.build": "from ..scoring.held_out import halves",
        "training.report.page": "",
        "training.loop.fit": "",
        "training.evaluate": "",
        "benchmarks.peers.heads": "",
    }
    problems = wrong_ways({name: imports(name, text, set(known)) for name, text in known.items()})
    assert problems and any(words in problem for problem in problems), problems


def test_on_top_of_training_stand_commands_and_no_file_is_long():
    top = {file.stem for file in (ROOT / "training").glob("*.py")}
    commands = {module for module, _ in COMMANDS.values() if "." not in module}
    assert top == commands | {"options", "config", "places", "say", "__init__", "__main__"} and len(commands) <= 12
    files = [*modules().values(), *(ROOT / "modeling_hsvlt").glob("*.py")]
    long = [file.name for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 400]
    assert [name for name in long if not name.startswith("modeling_")] == []
