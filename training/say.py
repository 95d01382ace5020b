"""What the commands say alike: how many there are, and what to do next."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from .options import DatasetOptions


def counted(count: int, noun: str) -> str:
    """`1 image`, `1,234 images`, `2 entries`, `2 processes`."""
    if count != 1:
        noun = noun[:-1] + "ies" if noun.endswith("ry") else noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun}"


def say_next(*words: object, like: Any = None) -> None:
    """Prints a command to go on with, and with it the options in `like` that say how its dataset is read."""
    print(f"Next: hsvlt {shlex.join([*map(str, words), *([] if like is None else dataset_words(like))])}")


def dataset_words(options: Any) -> list[str]:
    """What a command line says of how its dataset is read; nothing where that is as usual."""
    words = []
    shared = {field.name: field for field in dataclasses.fields(DatasetOptions) if field.name != "dataset"}
    for field in dataclasses.fields(options):
        value, usual = getattr(options, field.name), shared.get(field.name)
        if usual is None or not field.init:
            continue
        factory = usual.default_factory
        if value != (usual.default if factory is dataclasses.MISSING else factory()):
            words += [f"--{field.name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return words
