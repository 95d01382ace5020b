"""What one cell of text says about labels, and the one rule for names in lists: nothing is guessed in silence."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from modeling_hsvlt.label_names import fault_of_label_name

# How programs write that there is nothing, where no label is called so: pandas' words, SQL's, a spreadsheet's errors.
NULL_WORDS = frozenset(
    ("nan", "-nan", "none", "null", "(null)", r"\n", "<na>", "na", "n/a", "#n/a", "#na", "#n/a n/a", "nat", "1.#qnan",
     "-1.#qnan", "1.#ind", "-1.#ind", "#value!", "#ref!", "#name?", "#null!", "#num!", "#div/0!")
)  # fmt: skip
_BRACKETS = {"[": "]", "{": "}"}
_QUOTES = "'\""
# What others put between labels where we expect a comma; the last three are Chinese.
_OTHER_SEPARATORS = "|;\uff0c\u3001\uff1b"
_JOINED = re.compile(rf"[{_OTHER_SEPARATORS}/+&]")
_DASHES = frozenset(("-", "--", "---", "\u2013", "\u2014"))
# How Python prints an object that holds texts, `array(['cat'`, `set()`, `b'cat'`; a list in quotes; pieces of a list.
_PRINTED = re.compile(r"[A-Za-z_][\w.]*\(([\[{('\"]|\)$)|[bu]('.*'|\".*\")$|['\"]+[\[{(]")
_PIECE = re.compile(rf"{_PRINTED.pattern}|[\[{{(]\s*['\"]|.*['\"]\s*[\]}}]$", re.S)


def read_cell(text: str, separator: str = ",", known: Collection[str] = (), numbers: bool = False) -> list | None:
    """The labels of a cell: `cat, dog`, a list of JSON or Python, `{"choices": [...]}`; None where it says null.

    Args:
        text: Without labels where it is blank.
        separator: Between labels; a blank stands for any number of them.
        known: Names that are labels whatever they look like.
        numbers: Whether the labels are written as numbers, of which `nan` is one.

    Returns:
        Texts without blanks around them; numbers where a list holds numbers.

    Raises:
        ValueError: what is wrong with it, in words that follow the cell.
    """
    text = text.strip()
    if not text or text in known:
        return [text] if text else []
    if text.casefold() in NULL_WORDS:
        return None
    if text in _DASHES:
        raise ValueError("is no label; leave the cell empty where there is none, or write nan where that is not known")
    items = text.split(None if separator == " " else separator)
    items = [item.strip() for item in items]
    if separator.isspace():
        items = [item for item in items if item]
    if known and all(item in known for item in items):
        return items
    if _PRINTED.match(text):
        raise ValueError("looks like what a program printed of a list; write names alone, or a whole list")
    quoted = all(len(item) > 1 and item[0] in _QUOTES and item[-1] == item[0] for item in items)
    if text[0] in _BRACKETS or (text[0] == "(" and text[1:2] in (*_QUOTES, ")")) or quoted:
        return _listed(_literal(f"[{','.join(items)}]" if quoted else text))
    if not all(items):
        raise ValueError("lists an empty label; take out the separator too many")
    if any(item[0] in _BRACKETS or _PRINTED.match(item) for item in items):
        raise ValueError("looks like a list but is none; write names alone, or a whole list")
    for item in items:
        if item.casefold() in NULL_WORDS and item not in known and not numbers:
            raise ValueError(f"lists {item!r} as a label; take it out, or give it in label_names")
    return items


def _literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tree = ast.parse(text, mode="eval")
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # Python reads 'cat' 'dog', which numpy prints, as one text.
                part = ast.get_source_segment(text, node) or ""
                if part.count(part[-1:]) > 2 and ast.literal_eval(part) != part[1:-1].replace("\\", ""):
                    raise ValueError
        return ast.literal_eval(tree)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(
            "looks like a list or JSON but cannot be read as one; write names with a separator, or a whole list"
        ) from None


def _listed(value: Any) -> list:
    """The labels in what a cell holds: a list, or an object that holds one list or text."""
    if isinstance(value, dict) and len(value) == 1:
        (inner,) = value.values()  # {"choices": [...]} of Label Studio, {"labels": [...]}
        value = [inner] if isinstance(inner, str) else inner
    if isinstance(value, set | tuple):
        value = sorted(value, key=str) if isinstance(value, set) else list(value)
    if not isinstance(value, list) or any(isinstance(item, list | dict | tuple | set) for item in value):
        raise ValueError("holds more than a list of labels; give the labels alone")
    items = [item.strip() if isinstance(item, str) else item for item in value]
    for item in items:
        if item == "":
            raise ValueError("lists an empty label; take it out")
        if isinstance(item, str) and item.casefold() in NULL_WORDS:
            raise ValueError(f"lists {item!r} as a label; take it out")
        if not isinstance(item, str | int | float | None):
            raise ValueError(f"lists {item!r}, which is no label")
    return items


def clean_names(
    lists: pa.Array,
    where: Callable[[int], str],
    *,
    known: Collection[str] = (),
    no_label: Collection[str] = (),
) -> pa.Array:
    """Lists of names without blanks around them, and without the names that mean that there is no label.

    Args:
        lists: Lists of any kind of text.
        where: Gives the words that name a row in an error.
        known: Names that are labels whatever they look like.
        no_label: See `options.DatasetOptions.no_label`.

    Raises:
        ValueError: a name that cannot be one, or one of `no_label` beside a label; with the row.
    """
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    lists = lists.cast(pa.large_list(pa.large_string()))
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    coded = pc.dictionary_encode(pc.list_flatten(lists))
    codes = pc.fill_null(coded.indices, len(coded.dictionary)).to_numpy(zero_copy_only=False)

    def refuse(code: int, words: str) -> None:
        row = int(row_of[np.argmax(codes == code)])
        raise ValueError(f"{where(row)}: {words}")

    names = [name.strip() for name in coded.dictionary.to_pylist()]
    for code, name in enumerate(names):
        if fault := None if name in known else fault_of_label_name(name):
            refuse(code, f"it lists the label {name[:40]!r}, which {fault}; correct it.")
        if _PIECE.match(name) and name not in known:
            refuse(code, f"it lists {name[:80]!r}, which looks like a printed list; write each label as its own text.")
        if name.casefold() in NULL_WORDS and name not in known:
            refuse(code, f"it lists {name!r} as a label; take it out, or give it in label_names if it is one.")
    dropped = np.array([name in no_label for name in names] + [False])[codes]
    if dropped.any():
        left = np.bincount(row_of[~dropped], minlength=len(lengths))
        mixed = np.flatnonzero(dropped & (left[row_of] > 0))
        if len(mixed):
            word = names[codes[mixed[0]]]
            raise ValueError(f"{where(int(row_of[mixed[0]]))}: {word!r} stands beside a label; take one of them out.")
        codes, lengths = codes[~dropped], left
    values = pc.take(pa.array([*names, None], pa.large_string()), pa.array(codes))
    starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    return pa.LargeListArray.from_arrays(starts, values, mask=lists.is_null())


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def split_text(
    column: pa.ChunkedArray,
    separator: str = ",",
    label_format: str = "auto",
    where: Callable[[int], str] = "row {}".format,
    known: Collection[str] = (),
) -> pa.Array:
    """Texts such as "cat, dog" as lists of names; of integers or floats for `label_format` "ids" and "multi_hot", and
    where the cells are lists of them. A cell is read by `label_cells.read_cell`.

    An empty text is an image without labels, `null` one of unknown labels.

    Raises:
        ValueError: a cell that is no list of labels, no number where numbers are asked for, or numbers in one row and
            names in another; with the row.
    """
    texts = column.to_pylist()
    if label_format in ("auto", "names"):
        _check_separator(texts, separator, where, known)
    rows, kinds = [], {}
    for row, text in enumerate(texts):
        try:
            items = None if text is None else read_cell(text, separator, known, label_format in ("ids", "multi_hot"))
        except ValueError as error:
            raise ValueError(f"{where(row)}: {text[:200]!r} {error}.") from error
        if items and label_format in ("ids", "multi_hot"):
            try:
                parse = int if label_format == "ids" else read_number
                items = [parse(item) if isinstance(item, str) else item for item in items]
            except ValueError as error:
                raise ValueError(
                    f"{where(row)}: {text!r} must list numbers (label_format={label_format!r})."
                ) from error
        for item in items or ():
            if item is not None:
                kinds.setdefault(type(item), row)
        rows.append(items)
    _check_joined(rows, where, known)
    words = {item.casefold() for items in rows for item in items or () if isinstance(item, str)} - {
        name.casefold() for name in known
    }
    if words and words <= _WORDS.keys():
        raise ValueError(
            f"{where(kinds[str])}: the labels are true and false, which are no names; name the columns of such values "
            "with label_columns."
        )
    if str in kinds and len(kinds) > 1:
        row = max(kinds[str], min(first for kind, first in kinds.items() if kind is not str))
        raise ValueError(f"{where(row)}: some cells list names and some numbers; write the same kind in every row.")
    if label_format == "ids" or (label_format != "multi_hot" and set(kinds) == {int}):
        return pa.array(rows, pa.list_(pa.int64()))
    if label_format == "multi_hot" or (kinds and str not in kinds):
        return pa.array(rows, pa.list_(pa.float32()))
    return pa.array(rows, pa.list_(pa.string()))


# Spellings of "unknown" in a column of text, beside an empty cell.
_UNKNOWN_CELLS = NULL_WORDS | {"", "?"}
_WORDS = {"true": 1.0, "false": 0.0}


def _check_separator(
    texts: Sequence[str | None], separator: str, where: Callable[[int], str], known: Collection[str]
) -> None:
    """
    Raises:
        ValueError: no cell holds the separator, and one holds what others use for it.
    """
    if any(text is not None and separator in text for text in texts):
        return
    for row, text in enumerate(texts):
        if text and text not in known and text[0] not in _BRACKETS:
            for other in _OTHER_SEPARATORS.replace(separator, ""):
                if other in text:
                    raise ValueError(
                        f"{where(row)}: {text[:200]!r} holds {other!r} and no cell holds {separator!r}; say "
                        f"--label_separator '{other}', or give the names of the labels with label_names."
                    )


def _check_joined(rows: Sequence[list | None], where: Callable[[int], str], known: Collection[str]) -> None:
    """
    Raises:
        ValueError: a label is two others with another separator between them, as where tables were put together.
    """
    first: dict[Any, int] = {}
    for row, items in enumerate(rows):
        for item in items or ():
            first.setdefault(item, row)
    for item, row in first.items():
        if isinstance(item, str) and item not in known:
            parts = [part.strip() for part in _JOINED.split(item)]
            if len(parts) > 1 and all(part in first for part in parts):
                raise ValueError(
                    f"{where(row)}: {item[:200]!r} is {len(parts)} labels of other rows in one; divide them as there."
                )


def read_number(cell: str) -> float:
    """A number, `true` or `false`; NaN for the spellings of unknown."""
    cell = cell.strip().lower()
    return np.nan if cell in _UNKNOWN_CELLS else _WORDS[cell] if cell in _WORDS else float(cell)


def stack_columns(split: Dataset, columns: Sequence[str], where: Callable[[int], str] = "row {}".format) -> pa.Array:
    """One column a label (numbers, booleans or text) as multi-hot lists of float32; `null`, NaN and an empty text are
    NaN, which is unknown.

    Raises:
        ValueError: a text that is no number, or a column of another type; with the row and column.
    """
    table = split.select_columns(list(columns)).with_format("arrow")[:]
    stacked = np.empty((len(split), len(columns)), dtype=np.float32)
    for number, name in enumerate(columns):
        column = table.column(name)
        if is_text(column.type):
            cells = pc.dictionary_encode(column.combine_chunks().cast(pa.large_string()))
            try:
                values = np.array([*map(read_number, cells.dictionary.to_pylist()), np.nan], dtype=np.float32)
            except ValueError:
                cells = column.to_pylist()
                row = next(row for row, cell in enumerate(cells) if cell is not None and not _is_number(cell))
                raise ValueError(
                    f"{where(row)}: column {name!r} holds {cells[row]!r}, but must hold 1 for present, 0 for absent, "
                    "nothing for unknown; name the columns that are labels with label_columns."
                ) from None
            stacked[:, number] = values[pc.fill_null(cells.indices, len(values) - 1).to_numpy(zero_copy_only=False)]
        elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type):
            numbers = pc.fill_null(column.cast(pa.float32()), np.nan)
            stacked[:, number] = numbers.to_numpy()
        elif pa.types.is_null(column.type):
            stacked[:, number] = np.nan
        else:
            raise ValueError(f"{where(0)}: column {name!r} is of type {column.type}, but must hold numbers.")
    starts = np.arange(len(split) + 1, dtype=np.int64) * len(columns)
    return pa.LargeListArray.from_arrays(pa.array(starts), pa.array(stacked.ravel()))


def _is_number(cell: str) -> bool:
    try:
        read_number(cell)
    except ValueError:
        return False
    return True
