"""What `training.tag` leaves on disk: part files that are complete or not there, and their summary.

A part is written beside its place, synced, and renamed into it. Which images are done is read from the parts alone,
so a kill at any moment costs the images of the parts in hand and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..checkpoint.atomic import remove_unfinished, write_file
from ..options import plain

SETTINGS_FILE, UNREADABLE_FILE = "tagging.json", "unreadable.txt"
FORMATS = ("parquet", "jsonl")


class Results:
    """The parts of a folder.

    Records are dictionaries: `file_name` (or `row`, for a data set), `labels` and `scores` from the highest score to
    the lowest, and `error`, which says why an image could not be read and is otherwise None. Beside a part stands,
    under its name with `intervals` for `part`, when labels were seen in its videos, if it has any.
    """

    def __init__(self, folder: Path, key_name: str, file_format: str):
        self.folder, self.key_name, self.format = folder, key_name, file_format
        self.schema = pa.schema(
            {
                key_name: pa.int64() if key_name == "row" else pa.string(),
                "labels": pa.list_(pa.string()),
                "scores": pa.list_(pa.float32()),
                "error": pa.string(),
            }
        )
        seconds = {"label": pa.string(), "start": pa.float64(), "end": pa.float64()}
        self.intervals_schema = pa.schema({key_name: self.schema.field(key_name).type, **seconds})

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"part-*.{self.format}"))

    def read(self, part: Path, columns: list[str] | None = None) -> list[dict]:
        """The records of a part."""
        try:
            if self.format == "parquet":
                return pq.read_table(part, columns=columns).to_pylist()
            with part.open(encoding="utf-8") as lines:
                records = [json.loads(line) for line in lines]
            return [{name: record[name] for name in columns} if columns else record for record in records]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{part} is damaged ({error!r:.200}): move it away, and its images are tagged again."
            ) from error

    def done(self) -> set:
        """The keys of all images that have a record."""
        return {record[self.key_name] for part in self.parts() for record in self.read(part, [self.key_name])}

    def next_run(self) -> int:
        """A number that no part of an earlier run has."""
        numbers = (part.name.split("-")[1] for part in self.parts())
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)

    def write(self, name: str, records: list[dict], intervals: list[dict]) -> None:
        """Writes a part; its intervals first, which count for nothing until it is there."""
        if intervals:
            self._write(f"intervals-{name}", intervals, self.intervals_schema)
        self._write(f"part-{name}", records, self.schema)

    def _write(self, name: str, rows: list[dict], schema: pa.Schema) -> None:
        if self.format == "parquet":
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, schema), sink, compression="zstd")
            data = sink.getvalue().to_pybytes()
        else:
            data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        write_file(self.folder / f"{name}.{self.format}", data)

    def begun_with(self, name: str) -> str | None:
        """A setting of the run that began the folder, if one did."""
        try:
            return json.loads((self.folder / SETTINGS_FILE).read_text(encoding="utf-8")).get(name)
        except (OSError, ValueError, AttributeError):  # `begin` says what is wrong with it
            return None

    def begin(self, settings: dict, data: Callable[[int], str | None], count: int, *, overwrite: bool) -> None:
        """Makes sure that what is in the folder was made with the same settings, or clears it away.

        Args:
            data: The mark of the first so many images, where their order is what they are known by.
            count: How many there are now.

        Raises:
            ValueError: it was not; names the setting.
        """
        path = self.folder / SETTINGS_FILE
        if overwrite:
            # The settings go last: a kill in between leaves parts that still belong to settings.
            for old in [*self._all_parts(), self.folder / UNREADABLE_FILE, path]:
                old.unlink(missing_ok=True)
        remove_unfinished(self.folder)
        parts = {part.name.removeprefix("part-") for part in self._all_parts()}
        for old in self._all_parts("intervals"):
            if old.name.removeprefix("intervals-") not in parts:  # killed before its part was written
                old.unlink()
        if not path.is_file():
            if parts := self._all_parts():
                raise ValueError(f"{parts[0]} is of no known run; choose another OUTPUT, or pass --overwrite.")
            self._write_settings(settings | {"images": count, "data": data(count)})
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict) or type(before.get("images", 0)) is not int:
            raise ValueError(f"{path} is damaged; choose another OUTPUT, or pass --overwrite to begin again.")
        settings |= {"data": data(before.get("images", count))}  # more may have come since
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{self.folder} was begun with {name} {before.get(name)!r}, not {value!r}; go on with that, choose "
                    "another OUTPUT, or pass --overwrite to begin again."
                )

        if count > before.get("images", count):
            self._write_settings(settings | {"images": count, "data": data(count)})

    def _write_settings(self, settings: dict) -> None:
        write_file(self.folder / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")

    def _all_parts(self, kind: str = "part") -> list[Path]:
        return sorted(part for file_format in FORMATS for part in self.folder.glob(f"{kind}-*.{file_format}"))


class PartWriter:
    """Collects one process's records and writes a part whenever there are enough."""

    def __init__(self, results: Results, run: int, process: int, part_size: int):
        self.results, self.prefix, self.part_size = results, f"{run:04d}-{process:04d}", part_size
        self.count, self.records, self.intervals = 0, [], []

    def add(self, record: dict, intervals: Sequence[dict] = ()) -> None:
        self.records.append(record)
        self.intervals += intervals
        if len(self.records) >= self.part_size:
            self.flush()

    def flush(self) -> None:
        if self.records:
            self.results.write(f"{self.prefix}-{self.count:06d}", self.records, self.intervals)
            self.count, self.records, self.intervals = self.count + 1, [], []


def summarise(results: Results, name: Callable[[object], str]) -> tuple[int, int]:
    """Writes `unreadable.txt` (a name, a tab and the reason a line) and counts records and unreadable images."""
    total, lines = 0, []
    for part in results.parts():
        for record in results.read(part, [results.key_name, "error"]):
            total += 1
            if record["error"] is not None:
                lines.append(f"{plain(name(record[results.key_name]))}\t{plain(' '.join(record['error'].split()))}\n")
    write_file(results.folder / UNREADABLE_FILE, "".join(sorted(lines)).encode())
    return total, len(lines)


def fingerprint(text: str) -> str:
    """A short mark of a text, by which two are told apart."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_weights(model: torch.nn.Module) -> str:
    """A short mark of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
