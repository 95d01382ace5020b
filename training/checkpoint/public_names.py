"""Folders and files of this machine, in what others get to see: by their last name, never by their path."""

import os
import re

# From the root, home or a dot, of any system: a run may be published from another one than it was trained on.
_ROOTED = re.compile(r"[/\\]|~[\w.-]*[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:")
LABEL_FIELDS = ("id2label", "label2id", "label_names", "label_columns", "label_text")  # whose strings are names


def is_path(text: str) -> bool:
    """Whether a text is a path: rooted, or one in several parts at which there is something here."""
    return bool(_ROOTED.match(text)) or (bool(re.search(r"[/\\]", text)) and os.path.exists(text))


def last_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def public_name(text: str) -> str:
    """`text`, or the last name of the path that it is."""
    return last_name(text) if is_path(text) else text


def without_paths(value, name=public_name):
    """`value`, as JSON or YAML hold it, with `name` of every string in it but the names of labels."""
    if isinstance(value, str):
        return name(value)
    if isinstance(value, dict):
        return {key: inner if key in LABEL_FIELDS else without_paths(inner, name) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner, name) for inner in value]
    return value
