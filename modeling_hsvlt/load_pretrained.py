"""Loading what others saved, a folder or a repository, with more care than plain `from_pretrained` takes.

Whatever the source says: tensors come from safetensors files alone, no code of the source runs and nobody is asked
whether it should, no tensor is missing or holds numbers that are not finite, and a configuration asks for no more
layers and labels than there are tensors for, which is looked at before anything is allocated. A source that is damaged
gives one sentence.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .label_names import names_of
from .processing_multilabel import IMAGE_SETTINGS, check_image_settings

OURS = ("hsvlt", "mltr", "hp_dval")  # whose label names are shown; ImageNet has two cranes
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What a configuration keeps as a record; nothing is built from it.
_RECORDS = ("loss_kwargs", "threshold_info", "calibration_info", "id2label", "label2id", "task_specific_params")
_MANY = re.compile(r"layers|depths?$|blocks|stages")  # of these there is a tensor each, at least
_SMALL = 2**16  # below this a number can do no harm
_LENGTHS = re.compile(r"position|length|token")  # of texts, which rotary embeddings need no tensor for
_LONG = 2**24


def load_pretrained(
    kind: Any, source: str | os.PathLike, *, revision: str | None = None, may_lack: str = "", **options
):
    """`kind.from_pretrained(source)`, as the head of this file says.

    Args:
        kind: Class of a model, configuration, processor or tokenizer, or an Auto class of transformers.
        source: Folder or Hub id.
        revision: Commit or tag of a Hub id.
        may_lack: Pattern of the names of tensors that may be missing, and then start at random.
        options: Of `from_pretrained`. With `output_loading_info=True` whoever calls looks for missing tensors.

    Raises:
        OSError: there is no such source, or no safetensors file in it.
        ValueError: anything else that is wrong with it, in one sentence.
    """
    source = os.fspath(source)
    is_model = hasattr(kind, "from_config") or issubclass(kind, PreTrainedModel)
    hub = {} if revision is None else {"revision": revision}
    verbosity = logging.get_verbosity()
    try:
        shapes, kinds = _tensors_of(_base_of(source, hub), hub) if is_model else ({}, {})
        config = _config_of(source, hub)
        _check_numbers(config, shapes, source)
        if config.get("model_type") in OURS and config.get("id2label") is not None:
            names_of(config["id2label"])
        options |= hub | {"trust_remote_code": False}
        if not is_model:
            loaded = kind.from_pretrained(source, **options)
            settings = getattr(loaded, "image_processor", loaded)
            check_image_settings({name: getattr(settings, name, None) for name in IMAGE_SETTINGS}, source)
            return loaded
        wants_info = options.pop("output_loading_info", False)
        logging.set_verbosity_error()  # a table of tensors; what is wrong with them is said below
        try:
            model, info = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
        except RuntimeError:
            _check_sizes(kind, source, hub, shapes)
            raise
        missing = sorted(name for name in info["missing_keys"] if not (may_lack and re.search(may_lack, name)))
        if missing and not wants_info:
            raise ValueError(f"{source} lacks {len(missing)} tensors, the first is {missing[0]}: fetch it again.")
        spare = sorted(info["unexpected_keys"])
        if spare and not wants_info and type(model).__name__.endswith("ForImageClassification"):
            raise ValueError(
                f"{source} holds {len(spare)} tensors that its config.json has no place for, the first is {spare[0]}: "
                "they are of two models; fetch both files again."
            )
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not kinds.get(name, "F").startswith(("F", "BF")):
                raise ValueError(f"{source} holds {name} as {kinds[name]}, which are no weights: fetch it again.")
        check_finite(model.state_dict(), source)
        return (model, info) if wants_info else model
    except Exception as error:  # what damaged files make transformers raise is nearly everything
        text, kind_of_error = _one_line(error), OSError if isinstance(error, OSError) else ValueError
        ours = text.startswith(source)
        if is_model and not ours and os.path.isdir(source) and not os.path.isfile(os.path.join(source, CONFIG)):
            text = f"{source} has no {CONFIG}: give the folder of a checkpoint, or fetch it again."
        elif not isinstance(error, OSError | ValueError):
            text = f"{source} cannot be loaded ({type(error).__name__}: {text}): fetch or write it again."
        elif os.path.basename(source) not in text or "If you were trying" in text:
            text = f"{source} cannot be loaded ({text.partition('. If you were')[0]}): fetch or write it again."
        raise kind_of_error(text) from error
    finally:
        logging.set_verbosity(verbosity)


def _check_sizes(kind: Any, source: str, hub: dict, shapes: dict[str, list[int]]) -> None:
    """
    Raises:
        ValueError: a tensor of another size than the configuration says.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
    with torch.device("meta"):
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    for name, tensor in model.state_dict().items():
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{source} holds {name} of size {shapes[name]}, and its config.json asks for {list(tensor.shape)}: "
                "they are of two models; fetch both files again."
            )


def check_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Raises:
        ValueError: a tensor that holds a number that is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{source} holds numbers that are not finite in {name}: fetch or train it again.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:1000]


def _config_of(source: str, hub: dict) -> dict:
    try:
        return PreTrainedConfig.get_config_dict(source, **hub)[0]
    except OSError:
        if os.path.isfile(os.path.join(source, "config.json")):
            raise
        return {}  # a folder of a tokenizer alone, or of an adapter


def file_of(source: str, name: str, hub: dict) -> str | None:
    """Where the file `name` of a folder or Hub id is on this machine; None where it has none."""
    return cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def _base_of(source: str, hub: dict) -> str:
    """Where the weights are: `source`, or the base of the adapter that it is.

    Raises:
        ValueError: an adapter that is no safetensors file, or whose base is no folder here.
    """
    path = file_of(source, "adapter_config.json", hub)
    if path is None:
        return source
    base = source
    if file_of(source, "config.json", hub) is None:
        with open(path, encoding="utf-8") as file:
            base = json.load(file).get("base_model_name_or_path")
    if base != source and not os.path.isdir(str(base)):
        raise ValueError(
            f"{source} is an adapter of {base!r}, and a downloaded file does not choose what is downloaded next: put "
            "the folder of its base there, or merge it first."
        )
    if file_of(source, "adapter_model.safetensors", hub) is None:
        raise ValueError(f"{source} holds an adapter that is no safetensors file: do not load this.")
    return base


def options_of_part(names: Iterable[str], source: str | os.PathLike, revision: str | None = None) -> dict[str, Any]:
    """How `from_pretrained` is told what stands before these names of tensors in a `source` that holds more than them,
    such as a BLIP-2 or a LLaVA of which the image tower is read: its `key_mapping`. Nothing where they stand there by
    themselves or under names that transformers knows, and where there are no files, which `load_pretrained` tells.
    """
    try:
        held = _tensors_of(os.fspath(source), {} if revision is None else {"revision": revision})[0]
    except Exception:
        return {}
    first, *others = names
    prefixes = (name.removesuffix(first) for name in held if name.endswith(f".{first}"))
    whole = [prefix for prefix in prefixes if all(prefix + name in held for name in others)]
    return {"key_mapping": {f"^{re.escape(whole[0])}": ""}} if len(whole) == 1 and first not in held else {}


def _tensors_of(source: str, hub: dict) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Every tensor's shape, and its kind of numbers, from the headers of the files that `from_pretrained` would read.

    Raises:
        ValueError: an index names a file that is no safetensors file of this very folder.
    """
    names = [WEIGHTS]
    index = file_of(source, INDEX, hub)
    if index is not None:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        for shard in shards:
            if PurePosixPath(shard).name != shard or os.path.basename(shard) != shard:
                raise ValueError(f"{index} names the file {shard!r}, which is not in its folder: do not load this.")
            if not shard.endswith(".safetensors"):
                raise ValueError(f"{index} names {shard!r}, which is no safetensors file: do not load this.")
        names += shards
    shapes: dict[str, list[int]] = {}
    kinds: dict[str, str] = {}
    for path in filter(None, (file_of(source, name, hub) for name in names)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                part = file.get_slice(name)
                shapes[name] = part.get_shape()
                kinds[name] = part.get_dtype()
    return shapes, kinds


def _check_numbers(config: dict, shapes: dict[str, list[int]], source: str) -> None:
    """
    Raises:
        ValueError: a number in the configuration that the tensors do not bear out, or that is not finite; or the name
            of another file.
    """
    if "transformers_weights" in config:
        raise ValueError(f"{source}: its config.json names a file of weights (transformers_weights): do not load this.")
    largest = max([_SMALL, *(size for shape in shapes.values() for size in shape)])
    for name, number in _numbers(config):
        if not math.isfinite(number):
            raise ValueError(f"{source}: its config.json has {name} {number}, which is not finite: do not load this.")
        if type(number) is float:
            continue
        limit = largest if not _LENGTHS.search(name) else max(largest, _LONG)
        if shapes and _MANY.search(name):
            limit = len(shapes)
        if abs(number) <= limit:
            continue
        raise ValueError(
            f"{source}: its config.json has {name} {number:,}, which no tensor of it bears out (at most {limit:,}): "
            "do not load this."
        )


def _numbers(config: Any, name: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key not in _RECORDS:
                yield from _numbers(value, str(key))
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, name)
        if config and _MANY.search(name) and all(type(value) is int for value in config):
            yield name, sum(config)
    elif type(config) in (int, float):
        yield name, config
