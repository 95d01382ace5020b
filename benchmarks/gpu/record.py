"""What the GPU suite found: a JSON file that is whole after every figure, the goals, and tables in Markdown."""

import json
import math
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MARKS = "<!-- gpu: begin -->", "<!-- gpu: end -->"  # in the page that takes the tables in


@dataclass(frozen=True)
class Goal:
    """`what` at most (or at least) `limit`: the value under `path` of the figures of a unit of a part."""

    what: str
    limit: float
    part: str
    unit: str
    path: tuple
    at_least: bool = False

    def reached(self, units: dict) -> float | None:
        """None where it was not measured."""
        found: Any = units.get(self.unit, {}).get("figures", {}).get("goals", {})
        for key in self.path:
            found = found.get(key) if isinstance(found, dict) else None
        return None if found is None or math.isnan(found) else found

    def line(self, units: dict) -> str:
        """As a row: what, limit, reached, verdict."""
        limit = f"{'at least' if self.at_least else 'at most'} {self.limit:.2f}"
        value = self.reached(units)
        if value is None:
            return f"| {self.what} | {limit} | not measured | |"
        held = value >= self.limit if self.at_least else value <= self.limit
        return f"| {self.what} | {limit} | {value:.3f} | {'held' if held else '**missed**'} |"


@dataclass
class Record:
    """The results file. What an earlier run wrote there stays until the same unit is measured again.

    Args:
        file (`Path`): JSON; `parts[PART].units[NAME]` has the command, seconds, date, device and `figures` or `error`.
        about (`dict`): where this run takes place.
    """

    file: Path
    about: dict
    goals: list[Goal]
    parts: dict[str, dict] = field(default_factory=dict)

    def __post_init__(self):
        if self.file.exists():
            earlier = json.loads(self.file.read_text(encoding="utf-8"))
            if earlier["about"]["smoke"] == self.about["smoke"]:
                self.parts = earlier["parts"]

    def units(self, part: str) -> dict:
        return self.parts.setdefault(part, {"units": {}, "left_out": []})["units"]

    def add(self, part: str, name: str, unit: dict) -> None:
        where = {key: self.about[key] for key in ("device", "torch")}
        self.units(part)[name] = {**unit, **where, "date": datetime.now(UTC).date().isoformat()}
        self.write()

    def left_out(self, part: str, names: list[str]) -> None:
        self.units(part)
        self.parts[part]["left_out"] = names
        self.write()

    def write(self) -> None:
        """In one step: whoever is killed leaves the file as it was or as it is to be."""
        goals = [
            {"what": goal.what, "limit": goal.limit, "at_least": goal.at_least, "reached": self.value(goal)}
            for goal in self.goals
        ]
        whole = {"about": self.about, "goals": goals, "parts": self.parts}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.file)
        self.file.with_name("table.md").write_text(self.table(), encoding="utf-8")

    def value(self, goal: Goal) -> float | None:
        return goal.reached(self.units(goal.part)) if goal.part in self.parts else None

    def goal_table(self) -> str:
        rows = [goal.line(self.parts.get(goal.part, {}).get("units", {})) for goal in self.goals]
        note = ["A smoke run: tiny models, whose figures mean nothing.", ""] if self.about["smoke"] else []
        return "\n".join([*note, "| goal | | reached | |", "|---|---|---|---|", *rows])

    def table(self) -> str:
        """All that was found, in Markdown."""
        about = self.about
        lines = [
            f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}; {about['arithmetic']}."
        ]
        lines += ["", self.goal_table()]
        for part, found in self.parts.items():
            lines += ["", f"### {part}"]
            for name, unit in found["units"].items():
                lines += ["", f"{name} ({unit['date']}, {unit['device']}, {unit['seconds']:.0f} s):"]
                lines += [f"`{unit['command']}`"] if unit["command"] else []
                lines += ["", unit["figures"]["table"] if "figures" in unit else f"failed: {unit['error']}"]
            if found["left_out"]:
                lines += ["", f"Left out, the part's time was used: {', '.join(found['left_out'])}."]
        return "\n".join(lines) + "\n"

    def put_into(self, page: Path) -> None:
        """Puts the tables into a page, between its marks.

        Raises:
            ValueError: the page has no marks.
        """
        text = page.read_text(encoding="utf-8")
        begin, end = (text.find(mark) for mark in MARKS)
        if not 0 <= begin < end:
            raise ValueError(f"{page} has no lines {MARKS[0]} and {MARKS[1]}, between which the tables would go.")
        text = f"{text[: begin + len(MARKS[0])]}\n{self.table()}{text[end:]}"
        page.write_text(text, encoding="utf-8")
