"""The options that commands share, each declared once with its reason, and how a command line is read.

An option has one name and one spelling: in YAML, on the command line of every command, and as a keyword in Python. A
text is taken as it is written, `--label_separator "|"`. A list is YAML's, `--label_names "[cat, dog]"`, and on a
command line also its words, `--label_names cat dog`. A dictionary is YAML's, `--scenes "{seed: 1}"`. `null` means none.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from .places import checkpoint_folder, free_cores, keep_freed_memory


def option(default: Any = dataclasses.MISSING, reason: str = "", *, positional: bool = False, **more) -> Any:
    """A field of a command's options; default `list` or `dict`: a new one each time.

    Args:
        more: `metavar` and `choices` as of argparse; `read`, what makes the value of a word; `path=True` where it may
            hold a path of this machine: no push publishes that.
    """
    which = "default_factory" if default in (list, dict) else "default"
    return dataclasses.field(**{which: default}, metadata={"help": reason, "positional": positional, **more})


LABEL_NAMES = "class order: names, or one file of them, a labels.txt or a tagger's selected_tags.csv"


@dataclasses.dataclass(kw_only=True)
class ImageOptions:
    dataset_revision: str | None = option(None, "commit or tag of a dataset on the Hub; pin it, datasets change")
    dataset_config: str | None = option(None, "the configuration of a dataset on the Hub that has several")
    image_column: str = option("image", "the name that imagefolder gives")
    streaming: bool = option(False, "read shards, parquet or WebDataset, as they come; nothing is copied to this disk")


@dataclasses.dataclass(kw_only=True)
class DatasetOptions(ImageOptions):
    """Where a dataset is and how to read it; `training.data.load.load` takes the same as keywords."""

    dataset: str = option(reason="Hub id, folder, or scenes: the built-in data", positional=True, metavar="DATASET")
    label_names: list[str] | None = option(None, f"{LABEL_NAMES}; null: what the dataset says")
    label_column: str = option("labels", "lists, or text")
    label_columns: list[str] | None = option(
        None,
        "one column a label in place of label_column: 1, 0, empty for unknown; null: in a CSV without label_column "
        "every column that is no file name",
    )
    label_format: Literal["auto", "names", "ids", "multi_hot"] = option("auto", "auto: by the column's type")
    label_separator: str = option(",", "between the labels of a text; \\t is a tab")
    uncertain: Literal["unknown", "absent", "present"] | None = option(
        None, "what -1 means, and a blank where --blank does not say; null: -1 is refused, a blank is unknown"
    )
    blank: Literal["unknown", "absent", "present"] | None = option(
        None, "what a blank, NaN or null means where each label has a value; null: what --uncertain says"
    )
    no_label: list[str] | None = option(None, "names that mean that no label is present, such as 'No Finding'")
    image_folder: str | None = option(None, "where the file names of a CSV start; null: where the CSV is", path=True)
    scenes: dict = option(dict, "knobs of training.data.scenes.build_scenes, for the dataset scenes: {seed: 1}")
    missing_images: Literal["error", "skip"] = option("error", "rows whose file does not exist; skip says how many")
    unlisted_images: Literal["error", "skip"] = option("error", "files that no row names; skip says how many")
    exclude: str | None = option(None, "list of rows to leave out: exclude.txt of hsvlt check", path=True)
    validation_images: int = option(
        5000, "with streaming: of validation and test at most so many, the same every time; train where there is none"
    )

    def __post_init__(self):
        if self.streaming and self.exclude is not None:
            raise ValueError(
                "exclude names rows by their numbers, which a stream does not have: leave out one of them."
            )
        if self.validation_images < 1:
            raise ValueError(f"validation_images is {self.validation_images}, but must be at least 1.")
        if not self.label_separator:
            raise ValueError("label_separator is empty: give what stands between the labels of a text, quoted in YAML.")
        self.label_separator = self.label_separator.replace("\\t", "\t")


@dataclasses.dataclass(kw_only=True)
class CheckpointOptions:
    checkpoint: str = option(
        reason="of a run or a checkpoint the folder, or a Hub id",
        positional=True,
        read=checkpoint_folder,
        metavar="CHECKPOINT",
    )
    revision: str | None = option(None, "commit of a CHECKPOINT on the Hub")


@dataclasses.dataclass(kw_only=True)
class NewestOptions:
    """A checkpoint, or where it is left out `places.last_run`."""

    checkpoint: str | None = option(
        None,
        "folder or Hub id; left out: the newest run",
        positional=True,
        read=checkpoint_folder,
        metavar="CHECKPOINT",
    )


@dataclasses.dataclass(kw_only=True)
class ScoringOptions(DatasetOptions, CheckpointOptions):
    """What `training.scoring.predict.score_split` reads."""

    split: str = option("validation", "what to score")
    use_checkpoint_labels: bool = option(
        False, "read the labels with the checkpoint's vocabulary, for data that brings none of its own"
    )
    batch_size: int = option(32, "images per device")
    num_workers: int = dataclasses.field(
        default_factory=free_cores, metadata={"help": "processes that decode images; 0: this one; by the cores here"}
    )


def dataset_options(options: Any) -> dict[str, Any]:
    """The keywords of `training.data.load.load` among the options of a command."""
    names = [field.name for field in dataclasses.fields(DatasetOptions) if field.name != "dataset"]
    return {name: getattr(options, name) for name in names}


def number_or_auto(text: str) -> float | str:
    """The type of --threshold."""
    return text if text == "auto" else float(text)


def refuse_to_replace(folder: Path, names: Iterable[str], option: str) -> None:
    """
    Raises:
        FileExistsError: one of these files is in the folder, which `option` chose, and there was no --overwrite.
    """
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists; choose another {option}, or pass --overwrite to replace it."
            )


# --- reading


def read_text(word: str) -> str | None:
    return None if word == "null" else word


def read_yaml(text: str) -> Any:
    """
    Raises:
        ValueError: not YAML.
    """
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ValueError(f"{text!r} cannot be read as YAML: {' '.join(str(error).split())}") from error


def read_list(words: Sequence[str]) -> list[str] | None:
    """`[cat, dog]` or `cat dog`, each item as it is written: `on` and `1.10` are no switch and no number here.

    Raises:
        ValueError: not YAML.
    """
    if list(words) == ["null"]:
        return None
    if len(words) > 1 or words[0][:1] != "[":
        return list(words)
    try:
        return yaml.load(words[0], yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{words[0]!r} cannot be read as YAML: {' '.join(str(error).split())}") from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), None)


class _ReadList(argparse.Action):
    def __init__(self, *args, kind: type = str, allowed: Sequence[str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind, self.allowed = kind, allowed

    def __call__(self, parser, namespace, words, option_string=None):
        try:
            items = read_list(words)
            items = items if items is None else [self.kind(item) for item in items]
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentError(self, str(error)) from error
        for item in items or ():
            if self.allowed is not None and item not in self.allowed:
                raise argparse.ArgumentError(self, f"{item!r}: choose from {', '.join(self.allowed)}")
        setattr(namespace, self.dest, items)


# Alone: all of transformers takes 0.6 s, more than the rest of a command's --help (0.13 s), and is not needed before.
_file = Path(find_spec("transformers").origin).with_name("hf_argparser.py")
_spec = spec_from_file_location("transformers.hf_argparser", _file)
_hf_argparser = module_from_spec(_spec)
_spec.loader.exec_module(_hf_argparser)


class CommandParser(_hf_argparser.HfArgumentParser):
    """`HfArgumentParser` that knows positional arguments, takes lists in both spellings, and shows defaults."""

    def __init__(self, dataclass_types: type | None = None, **kwargs):
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(dataclass_types, **settings | kwargs)

    def add_argument(self, *names, positional: bool = False, path: bool = False, read: Any = None, **kwargs):
        if positional:
            names = (names[0].removeprefix("--"),)
            if not kwargs.pop("required", False):
                kwargs["nargs"] = "?"
        if kwargs.get("nargs") == "+":
            kwargs["action"] = partial(_ReadList, kind=kwargs.pop("type", str), allowed=kwargs.pop("choices", None))
        elif read or kwargs.get("type") in (str, dict) or "choices" in kwargs:
            kwargs["type"] = read or {dict: read_yaml}.get(kwargs.get("type"), read_text)
        if "help" in kwargs and names[0] not in ("-h", "--help"):
            default = kwargs.get("default")
            shown = "" if default in (None, False, [], {}) else f"; default: {default}"
            kwargs["help"] = (kwargs["help"] + shown).removeprefix("; ").replace("%", "%%")
        return super().add_argument(*names, **kwargs)

    def error(self, message: str) -> NoReturn:
        """One line, in place of the whole usage before it."""
        hint = "" if "--help" in message else f" ({self.prog} --help)"
        self.exit(2, f"error: {message}{hint}\n")

    def read(self, argv: Sequence[str] | None = None) -> Any:
        """The options that `argv` gives; ends with status 2 where it cannot be read."""
        options, rest = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        if rest:
            wrong = next((word for word in rest if word.startswith("--")), rest[0]).partition("=")[0]
            near = nearest(wrong.lstrip("-").replace("-", "_"), vars(options))
            self.error(f"unknown option {wrong}" + (f": did you mean --{near}?" if near else ", see --help."))
        return options


def say_error(error: Exception) -> None:
    """Prints, in one line, what went wrong.

    Of several processes the first speaks at once, and its end makes the launcher end the others, which mostly would say
    the same; they speak where it has not ended.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30)
    print(f"error: {plain(' '.join(str(error).split()))}", file=sys.stderr)


def plain(text: str) -> str:
    """What strangers named, on one line and so that it does not steer the terminal that shows it."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def refuse(error: Exception) -> int:
    """Says what was refused, and leaves the process group, whose threads may abort a process that ends in it.

    Returns:
        The exit status, 2.
    """
    say_error(error)
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    return 2


def command(
    run: Callable[[Any], Any],
    kind: type,
    name: str,
    description: str | None,
    refused: tuple[type[Exception], ...] = (ValueError, OSError),
    *,
    status: Callable[[Any], int] = lambda result: 0,
    stopped: str = "Stopped.",
) -> Callable[[Sequence[str] | None], int]:
    """The `main` of a command: `run` on its options.

    Returns:
        A function of the command line: `status` of what `run` returned, 0 by default; 2 when one of `refused` was
        raised, which is printed; 130 after Ctrl-C, when `stopped` is.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        keep_freed_memory()
        try:
            return status(run(CommandParser(kind, prog=f"hsvlt {name}", description=description).read(argv)))
        except (*refused, SafetensorError) as error:  # of which a full disk is one
            return refuse(error)
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
            return 130

    return main
