"""The vocabulary that the rows themselves bring: the names of all splits, and what looks wrong about them."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .similar_names import similar_names
from .sparse_labels import SparseLabels, unknown_label

logger = logging.getLogger(__name__)


LABEL_NOTES = ("misspelled", "not_in_vocabulary", "only_elsewhere")


class LabelNote(NamedTuple):
    """Something about a label that a user should see."""

    kind: str  # one of LABEL_NOTES
    label: str
    text: str


def names_of_splits(
    lists: Mapping[str, pa.Array], row_names: Mapping[str, Callable[[int], str]], *, report: bool = False
) -> tuple[list[str], list[LabelNote]]:
    """The sorted names of all splits, with a warning that lists those that train does not hold.

    Args:
        lists: Of names, by split; the first is train where no split is called so.
        row_names: Words for a row, by split.
        report: Give likely misspellings as notes in place of an error.

    Raises:
        ValueError: a name that train does not hold and that is nearly one of train's, with the row.
    """
    names = {split: set(pc.list_flatten(column).unique().drop_null().to_pylist()) for split, column in lists.items()}
    train = "train" if "train" in names else next(iter(names))
    everything = sorted(set().union(*names.values()))
    elsewhere = {name for name in everything if name not in names[train]}
    notes = [LabelNote("only_elsewhere", name, f"{name}: in no row of {train}") for name in sorted(elsewhere)]

    def misspelled(name: str, words: str) -> None:
        split = next(split for split in names if name in names[split])
        where = row_names[split](row_of_name(lists[split], name))
        text = f"{where}: label {words}, or list both in labels.txt or label_names"
        if not report:
            raise ValueError(text + ".")
        notes.append(LabelNote("misspelled", name, text))

    seen: dict[str, str] = {}
    for name in everything:
        if (other := seen.setdefault(_seen(name), name)) != name:
            misspelled(name, f"{name!a} looks like {other!a}, which is in other rows; write one of them everywhere")
    if not elsewhere:
        return everything, notes
    near = {}
    for one, other, reason, _ in similar_names(everything) if names[train] else ():
        if reason in ("form", "spelling") and (one in elsewhere) != (other in elsewhere):
            wrong, right = (one, other) if one in elsewhere else (other, one)
            near.setdefault(wrong, right)
    for wrong, right in near.items():
        misspelled(
            wrong, f"{wrong!r} is in no row of {train}, which has {right!r} (did you mean {right!r}?); correct it"
        )
    _warn("Labels that no row of %s holds, so that they are not learned: %s.", train, sorted(elsewhere))
    return everything, notes


def _seen(name: str) -> str:
    """What can be seen of a name."""
    letters = (letter for letter in unicodedata.normalize("NFC", name) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(letters).split())


def names_outside(
    lists: Mapping[str, pa.Array], label_names: Sequence[str], row_names: Mapping[str, Callable[[int], str]]
) -> list[LabelNote]:
    """A note for each name of the rows that is not among `label_names`."""
    notes, known = [], set(label_names)
    for split, column in lists.items():
        for name in pc.list_flatten(column).unique().drop_null().to_pylist():
            if name not in known:
                known.add(name)
                where = row_names[split](row_of_name(column, name))
                notes.append(LabelNote("not_in_vocabulary", name, f"{where}: {unknown_label(name, label_names)}"))
    return notes


def warn_without_positive(train: SparseLabels, label_names: Sequence[str], told: Sequence[LabelNote]) -> None:
    """Lists the labels of which train shows no positive, but for those that were told already."""
    known = {note.label for note in told}
    absent = [label_names[label] for label in np.flatnonzero(train.positives() == 0).tolist()]
    if absent := [name for name in absent if name not in known]:
        _warn("Labels without a positive in %s, so that they are not learned: %s.", "train", absent)


def row_of_name(lists: pa.Array, name: str) -> int:
    """The first row that lists a name."""
    entry = pc.index(pc.list_flatten(lists), pa.scalar(name, pa.large_string())).as_py()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
    return int(np.searchsorted(ends, entry, side="right"))


def _warn(words: str, train: str, names: list[str]) -> None:
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
    logger.warning(words, train, f"{len(names)} ({listed})")
