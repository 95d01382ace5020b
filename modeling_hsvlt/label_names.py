"""What a label may be called: one rule for every file of names, every data set and every checkpoint."""

import unicodedata
from collections import Counter
from collections.abc import Mapping

# Far above what people write and far below what fills a memory: names come from strangers as well.
MAX_LABEL_NAME = 1000  # letters

# They make a line show itself backwards, or are left of files put together (the byte order mark); joiners and blanks of
# other widths are letters to those who write them.
_NO_LETTERS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
_REFUSED = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, and what ends a line


def fault_of_label_name(name: str) -> str | None:
    """What is wrong with a label's name, in words, or None."""
    if not name or name.isspace():
        return "is empty"
    if len(name) > MAX_LABEL_NAME:
        return f"has {len(name):,} letters"
    if name.isprintable():
        return None
    if any(letter in _NO_LETTERS or unicodedata.category(letter) in _REFUSED for letter in name):
        return "has control characters"
    if all(unicodedata.category(letter) in ("Cf", "Zs") for letter in name):
        return "has nothing that can be seen"
    return None


def check_label_names(names) -> None:
    """
    Raises:
        ValueError: a name that is empty, too long, has control characters, or comes twice.
    """
    names = [str(name) for name in names]
    for name in names:
        if fault := fault_of_label_name(name):
            raise ValueError(f"The label name {name[:40]!r} {fault}; give the label a plain name.")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"label names must differ, but {twice[0]!r} comes twice.")


def in_order(id2label: Mapping) -> list:
    """Label names in the order of their numbers, which JSON turns into text."""
    return [id2label[key] for key in sorted(id2label, key=int)]


def names_of(id2label: Mapping) -> list[str]:
    """The names of `id2label` in the order of their numbers, which JSON turns into text.

    Raises:
        ValueError: it does not map 0, 1, ... without a gap to texts that `check_label_names` lets through.
    """
    try:
        names = {int(key): name for key, name in id2label.items()}
        ordered = [names[index] for index in range(len(id2label))]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("id2label must give a label name to each of 0, 1, 2 and so on, without a gap.") from None
    odd = next((name for name in ordered if not isinstance(name, str)), None)
    if odd is not None or None in ordered:
        raise ValueError(f"id2label holds {odd!r} where a label name should be; write a text.")
    check_label_names(ordered)
    return ordered
