"""Data sets that are drawn here and need no download, by the names that `--dataset` knows them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .rows import Table
from .scenes import read_scenes


@dataclass(frozen=True)
class BuiltIn:
    """
    Attributes:
        title: What a model card calls it.
        licence: Of weights that were trained on nothing else; images of it may be shown as well.
        read: Gives the rows of the splits `names`, with the settings `knobs`; see `scenes.read_scenes`.
    """

    title: str
    licence: str
    read: Callable[..., Table]


BUILT_IN = {"scenes": BuiltIn("the built-in scenes", "apache-2.0", read_scenes)}
