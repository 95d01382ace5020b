"""What SOURCE is, by its structure: the registry of `data/formats.py` is walked, and the reader of what was found reads
it with its own options."""

from __future__ import annotations

from pathlib import Path

from ..data.formats import RECOGNISERS, recognise
from .reading import SourceOptions

Options = SourceOptions


def find(source: Path) -> tuple[str, str]:
    """The kind of a source, and what it is in words.

    Raises:
        FileNotFoundError, ValueError: nothing there, nothing that is known, or what may be several.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give the folder or file of the data set.")
    found = recognise(source)
    if not found:
        kinds, inside = ", ".join(RECOGNISERS), [path for path in source.glob("[!.]*") if path.name != "__MACOSX"]
        if len(inside) == 1 and inside[0].is_dir():
            raise ValueError(f"{source} holds nothing but {inside[0].name}/: give {inside[0]}.")
        raise ValueError(
            f"{source} is in no format that is known here ({kinds}); see training/prepare/README.md. Where every "
            "folder is a label, say so: hsvlt prepare label_folders."
        )
    if len(found) > 1:
        words = " and ".join(f"{words} ({kind})" for kind, words in found.items())
        raise ValueError(f"{source} may be {words}; say which: hsvlt prepare {next(iter(found))} ...")
    return next(iter(found.items()))
