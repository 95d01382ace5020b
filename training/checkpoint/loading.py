"""Loading a checkpoint, with the code of this checkout, and what is refused before."""

import json
from collections.abc import Iterable
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import logging

import modeling_hsvlt  # noqa: F401  (registers the model types, so that the code of this checkout is used)
from modeling_hsvlt.label_names import check_label_names

from ..options import CheckpointOptions
from .folder import verify


def refuse_leads_elsewhere(source: str | Path) -> None:
    """Refuse a checkpoint folder whose own files send the loader to another place; Hub ids pass.

    Raises:
        ValueError: a list of shards that names a file outside the folder, or an adapter whose base is no folder here.
    """
    folder = Path(source)
    index, adapter = folder / "model.safetensors.index.json", folder / "adapter_config.json"
    if index.is_file():
        for shard in sorted(set(json.loads(index.read_text())["weight_map"].values())):
            if Path(shard).name != shard:
                raise ValueError(f"{index} names the file {shard!r}, which is not in its folder: do not load this.")
    if adapter.is_file() and not (folder / "config.json").is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        if not Path(str(base)).is_dir():
            raise ValueError(
                f"{folder} is an adapter of {base!r}, and a downloaded file does not choose what is downloaded next: "
                "put the folder of its base there, or merge it first."
            )


def load_checkpoint(args: CheckpointOptions) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model and image processor of `args.checkpoint`, with the code of this checkout and never with a pickle.

    Raises:
        ValueError, OSError: there is none, not of a known type, or with a label name that no reader takes.
    """
    if not Path(args.checkpoint).is_dir() and (args.checkpoint[:1] in "./~" or args.checkpoint.count("/") > 1):
        raise FileNotFoundError(f"{args.checkpoint} is no folder; give the folder of a checkpoint or a Hub id.")
    refuse_leads_elsewhere(args.checkpoint)
    revision = args.revision or "main"
    logging.disable_progress_bar()  # of a second; what is downloaded has its own
    model = AutoModelForImageClassification.from_pretrained(args.checkpoint, revision=revision, use_safetensors=True)
    check_label_names(model.config.id2label.values())
    return model, AutoImageProcessor.from_pretrained(args.checkpoint, revision=revision)


def still_loads(folder: Path) -> bool:
    """Whether the weights of a sealed checkpoint are what was sealed, and the configuration beside them can be read."""
    try:
        verify(folder, "*.safetensors")
        AutoConfig.from_pretrained(folder)
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
