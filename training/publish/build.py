"""The folder that is published: built from a run, and nothing copied from beside the checkpoint but by name."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification, AutoProcessor, PreTrainedModel

import modeling_hsvlt  # noqa: F401  (registers the model types)
from modeling_hsvlt.load_pretrained import load_pretrained
from modeling_hsvlt.processing_multilabel import MultiLabelProcessor

from ..checkpoint.loading import computing
from ..checkpoint.public_names import without_paths
from .measured import (
    PATH_OPTIONS,
    checkpoint_of,
    read_config,
    read_evaluation,
    read_options,
    read_raw_options,
    read_results,
)
from .selected_tags import write_selected_tags

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def build_folder(
    run: Path, target: Path, *, adapter_of: str | None = None, adapter_revision: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes all but the card into `target`. Nothing is copied from beside the checkpoint but by name: no optimizer
    state, no log, no image; no scores that no longer hold for the checkpoint, and no path.

    Returns:
        Pixels (1, 3, H, W) of `noise_image` and the model's logits (1, num_labels) for them.

    Raises:
        ValueError, OSError: there is no checkpoint, or not one that can be published.
    """
    run = Path(run)
    checkpoint = checkpoint_of(run)
    if (checkpoint / ADAPTER_FILES[0]).is_file():
        model, processor = _build_adapter(checkpoint, target, adapter_of, adapter_revision)
    elif (checkpoint / "config.json").is_file():
        model = load_pretrained(AutoModelForImageClassification, checkpoint)
        processor = load_pretrained(AutoProcessor, checkpoint)
        if adapter_of is None:
            with computing(model):  # HP-DVAL's text embeddings
                model.save_pretrained(target)
            shutil.copyfile(Path(__file__).with_name("handler.py"), target / "handler.py")
            # An endpoint installs it; transformers of before may not read what this one writes.
            (target / "requirements.txt").write_text(f"transformers>={transformers.__version__}\n")
        else:
            _check_base(adapter_of, model, adapter_revision)
            if not hasattr(model, "save_prompt_adapter"):
                raise ValueError(f"{checkpoint} holds a {type(model).__name__}; only HP-DVAL learns contexts.")
            model.save_prompt_adapter(target)
            _set_base(target, adapter_of)
    else:
        raise FileNotFoundError(f"{run} holds neither best/ nor a checkpoint (config.json or adapter_config.json).")
    processor.save_pretrained(target)
    label_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    config = read_config(run, target)
    results, _ = read_results(run, config)
    _, rows, _ = read_evaluation(run, config)
    write_selected_tags(target, label_names, results.get("positives_in_train"))
    if results:
        (target / "results.json").write_text(json.dumps(results, indent=1))
    if rows:
        with (target / "per_label.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if options := read_options(run):
        (target / "training_options.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    for path in target.rglob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if without_paths(values) != values:
            path.write_text(json.dumps(without_paths(values), indent=2) + "\n", encoding="utf-8")
    return _logits(model, processor)


def check_no_path(run: Path, folder: Path) -> None:
    """Looks in all that is to be published, card and code as well, for folders of this machine and of the run.

    Raises:
        ValueError: a file holds one.
    """
    options = read_raw_options(run)
    texts: list[str] = []
    for name in PATH_OPTIONS:
        without_paths(options.get(name), lambda text: texts.append(text) or text)
    paths = [Path(text) for text in (*texts, os.path.abspath(run), os.getcwd(), tempfile.gettempdir())]
    # Of a folder of the root, such as /data, the name alone is in many a text.
    known = {str(path) for path in paths if path.is_absolute() and len(path.parts) > 2} | {f"{Path.home()}{os.sep}"}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            held = [text for text in known if text.encode() in path.read_bytes()]
            if held:
                raise ValueError(f"{path.relative_to(folder)} would publish the path {held[0]}; nothing was pushed.")


def _build_adapter(checkpoint: Path, target: Path, adapter_of: str | None, revision: str | None):
    for name in ADAPTER_FILES:
        shutil.copyfile(checkpoint / name, target / name)
    base = adapter_of or json.loads((target / ADAPTER_FILES[0]).read_text()).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{checkpoint} does not name the model it adapts; give it with adapter_of.")
    model = load_pretrained(AutoModelForImageClassification, base, revision=revision)
    _check_base(base, model, revision)
    model.load_adapter(str(checkpoint))
    source = checkpoint if (checkpoint / "processor_config.json").is_file() else base
    _set_base(target, base)
    return model, load_pretrained(AutoProcessor, source, revision=None if source is checkpoint else revision)


def _check_base(base: str, model: PreTrainedModel, revision: str | None) -> None:
    if Path(base).exists():
        raise ValueError(f"The adapter's base is the folder {base}, which nobody else has; give its Hub id.")
    names = load_pretrained(AutoConfig, base, revision=revision).id2label
    if names != model.config.id2label:
        raise ValueError(f"{base} has other labels than the adapter; push the run as a whole model.")


def _set_base(target: Path, base: str) -> None:
    path = target / ADAPTER_FILES[0]
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}, indent=2))


@torch.no_grad()
def _logits(model: PreTrainedModel, processor: MultiLabelProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = processor(images=noise_image(), return_tensors="pt")["pixel_values"]
    with computing(model):
        return pixels, model.eval()(pixel_values=pixels.to(model.dtype)).logits.float()


def noise_image() -> Image.Image:
    """An image of noise, neither square nor of a round size, so that the preprocessing is compared as well."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (151, 203, 3), dtype=np.uint8))
