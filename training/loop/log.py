"""`log.jsonl`, as a tracker of accelerate."""

import json
import os
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process


class JsonLinesTracker(GeneralTracker):
    """One JSON object a line: `step`, and whatever was logged at it."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        """The configuration is in config.yaml."""

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def size(self) -> int:
        """Bytes written so far, which are on disk when this returns."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    @on_main_process
    def cut(self, size: int) -> None:
        """Drop what an interrupted run logged after the checkpoint that is resumed from."""
        if self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)
