"""What the commands say alike: how many there are, and what to do next."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection
from typing import Any

from .options import dataset_options


def counted(count: int, noun: str) -> str:
    """`1 image`, `1,234 images`, `2 entries`, `2 processes`."""
    if count != 1:
        noun = noun[:-1] + "ies" if noun.endswith("ry") else noun + ("es" if noun.endswith("s") else "s")
    return f"{count:,} {noun}"


def say_next(*words: object, like: Any = None) -> None:
    """Prints a command to go on with, and with it the options in `like` that say how its dataset is read."""
    dataset = [] if like is None else option_words(like, dataset_options(like))
    print(f"Next: hsvlt {shlex.join([*map(str, words), *dataset])}")


def option_words(options: Any, names: Collection[str]) -> list[str]:
    """What a command line says of these options; nothing of those that are as usual."""
    words = []
    for field in dataclasses.fields(options):
        if field.name not in names or not field.init:
            continue
        value, factory = getattr(options, field.name), field.default_factory
        if value != (field.default if factory is dataclasses.MISSING else factory()):
            words += [f"--{field.name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return words
