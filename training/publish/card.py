"""Model cards, filled from what a run left.

Names, thresholds and calibration come from the checkpoint's config.json, figures from the run's results.json,
evaluation/ or report/, log.jsonl, config.yaml and speed.json. Figures that were measured with other names, thresholds
or calibration than the checkpoint now has are left out, and the card says so. Figures of papers are in the templates,
in a section of their own.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageClassification

import modeling_hsvlt  # noqa: F401  (registers the model types)

from ..check.imbalance import GROUP_WORDS
from ..checkpoint.public_names import public_name
from ..data.built_in import BUILT_IN
from ..metrics.glossary import FIGURES, HEAT_MAPS
from ..places import shipped
from ..say import counted
from ..scoring.measured_with import AT_THRESHOLDS, names_of
from .card_page import templates
from .measured import (
    evaluation_file,
    is_hub_id,
    read_config,
    read_evaluation,
    read_json,
    read_options,
    read_results,
)

TEMPLATES = {"hsvlt": "hsvlt.md", "mltr": "mltr.md", "hp_dval": "hp_dval.md"}
MAX_LABEL_ROWS = 200  # of the per-label table; the rest is in per_label.csv
SPLITS = ("validation", "test")
HEADLINES = ("mAP", "mAP_voc07", "mAP_voc10", "mAP_micro", "LRAP")
DECISIONS = ("CP", "CR", "CF1", "OP", "OR", "OF1", "f1_macro")
LABEL_COLUMNS = ("AP", "precision", "recall", "f1")


def escape(text: object) -> str:
    """Text that Markdown and HTML show as it is, in a table cell as well: everything but letters, digits and a few
    harmless signs becomes a character reference."""
    return "".join(
        letter if letter.isalnum() or letter in " ,;'\"?%" else " " if letter.isspace() else f"&#{ord(letter)};"
        for letter in str(text)
    )


def figure(value: float | None, digits: int = 4) -> str:
    """A number with `digits` decimals; a dash where it is not defined."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def render_card(
    run: Path,
    folder: Path,
    *,
    repo_id: str,
    tag: str | None = None,
    licence: str | None = None,
    adapter_revision: str | None = None,
    images: bool = False,
) -> ModelCard:
    """The card of what lies in `folder`, and its images, which are written into `folder / "figures"`.

    Args:
        run: The run folder, for results.json, config.yaml, log.jsonl, evaluation/, speed.json and predictions.png,
            whichever there are.
        folder: What is published: a checkpoint or an adapter.
        repo_id, tag, licence, adapter_revision, images: see `training.publish.hub.push_run`.

    Raises:
        ValueError: a model without a template.
    """
    facts = collect(run, folder)
    options = facts["options"]
    built_in = BUILT_IN.get(options.get("dataset"))
    own = built_in is not None and not (options.get("backbone") or options.get("init_from"))
    template = "adapter.md" if facts["base"] else TEMPLATES.get(facts["model"].get("model_type"))
    if template is None:
        raise ValueError(f"{folder} holds no model of a type that has a card ({', '.join(TEMPLATES)}) and no adapter.")
    licence = licence or (built_in.licence if own else "unknown")
    figures = _write_figures(run, folder, facts, images or built_in is not None)
    data = ModelCardData(
        license=licence,
        library_name="peft" if facts["base"] else "transformers",
        pipeline_tag="image-classification",
        tags=["multi-label-image-classification", facts["model"].get("model_type") or "hp_dval", "custom_code"],
        base_model=facts["base"],
        datasets=[options["dataset"]] if is_hub_id(options.get("dataset", "")) else None,
        model_name=repo_id.partition("/")[2] or repo_id,
        eval_results=_eval_results(facts) or None,
    )
    environment = templates(shipped("model_cards"), keep_trailing_newline=True)
    environment.filters |= {"escape": escape, "figure": figure, "counted": counted}
    text = environment.get_template(template).render(
        facts, card_data=data.to_yaml(), repo_id=repo_id, tag=tag, licence=licence, own=own, figures=figures,
        adapter_revision=adapter_revision, headlines={name: FIGURES[name] for name in HEADLINES},
        decisions={name: FIGURES[name] for name in DECISIONS}, group_words=GROUP_WORDS,
    )  # fmt: skip
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text), ignore_metadata_errors=False)


def collect(run: Path, folder: Path) -> dict:
    """What a run says about itself, in the words of the templates; what it does not say is None or empty."""
    run, folder = Path(run), Path(folder)
    adapter = read_json(folder / "adapter_config.json")
    model = read_config(run, folder)
    processor = read_json(folder / "processor_config.json")
    results, changed = read_results(run, model)
    evaluation, measured_rows, evaluation_changed = read_evaluation(run, model)
    options = read_options(run)
    built_in = BUILT_IN.get(options.get("dataset"))
    names = names_of(model)
    splits = {name: results[name] for name in SPLITS if name in results}
    at_thresholds = {name: results[name + AT_THRESHOLDS] for name in splits if name + AT_THRESHOLDS in results}
    measured_on = public_name(evaluation.get("dataset") or "") or options.get("dataset")
    lines = (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").is_file() else []
    log = [json.loads(line) for line in lines if line.strip()]
    seen = [line["train/images_per_second"] for line in log if "train/images_per_second" in line]
    return {
        "base": adapter.get("base_model_name_or_path") if adapter else None,
        "model": model,
        "image": processor.get("image_processor") or processor,
        "options": options,
        "dataset_name": built_in.title if built_in else options.get("dataset"),
        "results": results,
        "splits": splits,
        "at_thresholds": at_thresholds,
        "changed": changed,
        "evaluation": evaluation,
        "evaluation_changed": evaluation_changed,
        "label_names": names,
        "label_rows": _label_rows(names, model, results, measured_rows),
        "max_label_rows": MAX_LABEL_ROWS,
        "groups": [group for group in GROUP_WORDS if any(f"mAP_{group}" in report for report in splits.values())],
        "speed": read_json(run / "speed.json"),
        "log": log,
        "training_speed": sorted(seen)[len(seen) // 2] if seen else None,
        "num_parameters": _num_parameters(folder),
        "heat_map": HEAT_MAPS.get("hp_dval" if adapter else model.get("model_type")),
        # Of the very split that the run measured: no second opinion, its labels one by one.
        "by_label": evaluation.get("split") in splits
        and evaluation["metrics"]["mAP"] == splits[evaluation["split"]]["mAP"],
        "evaluation_dataset": None if measured_on == options.get("dataset") else measured_on,
    }


def _num_parameters(folder: Path) -> int:
    """Parameters of the model, as training counts them; those that an adapter brings."""
    if (folder / "config.json").is_file():
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
        return model.num_parameters()
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _label_rows(names: list[str], model: dict, results: dict, measured_rows: list[dict]) -> list[dict]:
    """One row a label: threshold, positives in train, and those of `LABEL_COLUMNS` that were measured."""
    thresholds = model.get("thresholds") or [None] * len(names)
    positives = results.get("positives_in_train") or [None] * len(names)
    measured = {row["label"]: row for row in measured_rows}
    columns = [column for column in LABEL_COLUMNS if measured_rows and column in measured_rows[0]]
    rows = []
    for name, *values in zip(names, thresholds, positives, strict=True):
        row = dict(zip(("label", "threshold", "positives_in_train"), (name, *values), strict=True))
        for column in columns:
            value = measured.get(name, {}).get(column)
            row[column] = float(value) if value else None
        rows.append(row)
    return rows


def _eval_results(facts: dict) -> list[EvalResult]:
    """The model-index: mAP of each split, and F1 at the fitted thresholds."""
    dataset = facts["options"].get("dataset") or "unknown"
    common = {
        "task_type": "image-classification",
        "task_name": "Multi-label image classification",
        "dataset_type": dataset,
        "dataset_name": facts["dataset_name"] or "unknown",
        "dataset_revision": facts["options"].get("dataset_revision"),
    }
    entries = []
    for split, report in facts["splits"].items():
        chosen = {"mAP": report["mAP"]}
        if split in facts["at_thresholds"]:
            chosen |= {key: facts["at_thresholds"][split][key] for key in ("CF1", "OF1")}
        for key, value in chosen.items():
            name, words = FIGURES[key]
            if not math.isnan(value):
                name = f"{name} ({words}{'' if key == 'mAP' else '; at the fitted thresholds'})"
                entries.append(
                    EvalResult(**common, dataset_split=split, metric_type=key, metric_name=name, metric_value=value)
                )
    return entries


def _write_figures(run: Path, folder: Path, facts: dict, images: bool) -> dict[str, str]:
    """Copies and draws the card's images; name -> path within the folder."""
    figures = {}
    target = folder / "figures"
    if images:
        paths = {"predictions": run / "predictions.png", "heat_maps": evaluation_file(run, "heat_maps.png")}
        for name, path in paths.items():
            if path.is_file():
                target.mkdir(exist_ok=True)
                shutil.copyfile(path, target / path.name)
                figures[name] = f"figures/{path.name}"
    epochs = [line for line in facts["log"] if "validation/mAP" in line]
    if len(epochs) > 1:
        target.mkdir(exist_ok=True)
        _plot_training(facts["log"], epochs, target / "training.png")
        figures["training"] = "figures/training.png"
    return figures


def _plot_training(log: list[dict], epochs: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    losses = [(line["step"], line["train/loss"]) for line in log if "train/loss" in line]
    drawn = Figure(figsize=(6.4, 2.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    left.plot(*zip(*losses, strict=True), color="#3b6ea5", linewidth=1)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.plot([line["epoch"] for line in epochs], [line["validation/mAP"] for line in epochs], "o-", color="#4f9d69")
    right.set(xlabel="epoch", ylabel="validation mAP")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    drawn.savefig(path, dpi=150, metadata={"Software": None})
