"""What a label may be called: one rule for every file of names, every data set and every checkpoint."""

import unicodedata

# Far above what people write and far below what fills a memory: names come from strangers as well.
MAX_LABEL_NAME = 1000  # letters

# They make a line show itself backwards; joiners and blanks of other widths are letters to those who write them.
_TURN_TEXT = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_REFUSED = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of characters, and what ends a line


def fault_of_label_name(name: str) -> str | None:
    """What is wrong with a label's name, in words, or None."""
    if not name or name.isspace():
        return "is empty"
    if len(name) > MAX_LABEL_NAME:
        return f"has {len(name):,} letters"
    if name.isprintable():
        return None
    if any(letter in _TURN_TEXT or unicodedata.category(letter) in _REFUSED for letter in name):
        return "has control characters"
    return None


def check_label_names(names) -> None:
    """
    Raises:
        ValueError: a name that is empty, too long, or has control characters.
    """
    for name in names:
        if fault := fault_of_label_name(str(name)):
            raise ValueError(f"The label name {str(name)[:40]!r} {fault}; give the label a plain name.")
