"""Loading a checkpoint, with the code of this checkout, and what is refused before."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

import modeling_hsvlt  # noqa: F401  (registers the model types, so that the code of this checkout is used)
from modeling_hsvlt.load_pretrained import load_pretrained

from ..options import CheckpointOptions
from .folder import MARKER, verify

T = TypeVar("T")


def load_checkpoint(args: CheckpointOptions) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and image processor of `args.checkpoint`, with the code of this checkout and never with a pickle.

    Raises:
        ValueError, OSError: there is none, not of a known type, or with a label name that no reader takes.
    """
    if not Path(args.checkpoint).is_dir() and (args.checkpoint[:1] in "./~" or args.checkpoint.count("/") > 1):
        raise FileNotFoundError(f"{args.checkpoint} is no folder; give the folder of a checkpoint or a Hub id.")
    logging.disable_progress_bar()  # of a second; what is downloaded has its own
    kinds = (AutoModelForImageClassification, AutoImageProcessor)

    def load() -> list:
        return [load_pretrained(kind, args.checkpoint, revision=args.revision) for kind in kinds]

    model, processor = of_one_moment(args.checkpoint, load)
    return model, processor


def of_one_moment(checkpoint: str | Path, read: Callable[[], T]) -> T:
    """What `read` makes of several files of a checkpoint; it is called again where a run replaced the folder meanwhile,
    so that weights of one epoch do not go with the configuration of another.

    Raises:
        ValueError: it was replaced each time; and whatever `read` raises.
    """
    for _ in range(5):
        before = seal_of(checkpoint)
        try:
            found = read()
        except (ValueError, OSError):
            if seal_of(checkpoint) == before:
                raise
        else:
            if seal_of(checkpoint) == before:
                return found
    raise ValueError(f"{checkpoint} was replaced while it was read, five times: wait for the run that writes it.")


def seal_of(checkpoint: str | Path) -> bytes | None:
    """What tells a checkpoint from the one that takes its place; None for a Hub id, and for none."""
    for name in (MARKER, "config.json"):
        try:
            return (Path(checkpoint) / name).read_bytes()
        except OSError:
            pass
    return None


@contextmanager
def computing(model: PreTrainedModel) -> Iterator[None]:
    """Where a model computes: what only then shows that its configuration or processor was tampered with.

    Raises:
        ValueError: in place of whatever a layer raises.
    """
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ValueError(
            f"{getattr(model, 'name_or_path', '') or 'The model'} cannot compute scores ({text}): its config.json or "
            "processor_config.json does not fit its weights, or memory is short."
        ) from error


def still_loads(folder: Path) -> bool:
    """Whether the weights of a sealed checkpoint are what was sealed, and the configuration beside them can be read."""
    try:
        verify(folder, "*.safetensors")
        load_pretrained(AutoConfig, folder)
    except (ValueError, OSError):
        return False
    return True


def check_pinned(option: str, source: str, revision: str | None, names: Iterable[str] = ()) -> None:
    """Refuse a Hub id without a revision: a branch moves, and a run must be repeatable; `names` are other sources."""
    if revision is None and not Path(source).is_dir():
        known = f"is no folder and not {' or '.join(names)}" if names else "is no folder"
        raise ValueError(
            f"{option} {source!r} {known}, and as a Hub id it needs --{option}_revision: the commit that the "
            "repository's page shows under 'Files and versions'."
        )


def commit_of(loaded_config) -> str | None:
    return getattr(loaded_config, "_commit_hash", None)  # set by transformers where it came from the Hub
