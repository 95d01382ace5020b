"""Score a checkpoint on a split.

    hsvlt evaluate CHECKPOINT DATASET --split validation [--threshold 0.5 | auto] [--output FOLDER]

CHECKPOINT and DATASET are folders or Hub ids. Prints mAP, CP/CR/CF1 and OP/OR/OF1 at the threshold and among the top 3;
with --output writes results.json (all metrics), per_label.csv and report.html, a page with plots and the most confident
mistakes that opens without a server. `accelerate launch -m training.evaluate ...` spreads
the images over several devices and gives the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .metrics.glossary import AP_DEFINITION, FIGURES, shown
from .options import ScoringOptions, command, number_or_auto, option, refuse_to_replace
from .places import run_of
from .say import counted, say_next

RESULT_FILES = ("results.json", "per_label.csv", "report.html")


@dataclass(kw_only=True)
class EvaluateOptions(ScoringOptions):
    threshold: float | str = option(0.5, "a number, or auto: the thresholds in the checkpoint", read=number_or_auto)
    count_split: str | None = option(
        None, "split whose positives make a label head, medium or tail, as a rule train; null: no groups"
    )
    output: Path | None = option(None, f"where to write {', '.join(RESULT_FILES)}", metavar="FOLDER")
    overwrite: bool = option(False, "replace results that are in FOLDER")


def format_report(report: dict, threshold_words: str, absent: Sequence[str]) -> str:
    """A table that fits a terminal."""
    columns = ("CP", "CR", "CF1", "OP", "OR", "OF1", "CF1_per_class")
    rows = {threshold_words: "", "top 3 of these": "_top3"}
    width = max(map(len, rows))
    lines = [
        f"{shown(report, 'mAP')} ({AP_DEFINITION}); "
        + shown(report, "mAP_voc07", "mAP_voc10", "mAP_micro", "mAP_weighted"),
        " " * width + "".join(f"{name:>{max(8, len(name) + 2)}}" for name in columns),
    ]
    for words, suffix in rows.items():
        values = (f"{report[name + suffix]:>{max(8, len(name) + 2)}.4f}" for name in columns)
        lines.append(f"{words:<{width}}" + "".join(values))
    lines.append(
        f"{shown(report, 'LRAP', 'ranking_loss')}; {FIGURES['coverage_error'].name} {report['coverage_error']:.2f} of "
        f"{report['num_labels']} labels"
    )
    if absent:
        listing = ", ".join(absent[:10]) + (", ..." if len(absent) > 10 else "")
        lines.append(f"Left out of the means, having no positive here: {counted(len(absent), 'label')} ({listing}).")
    if report["num_unknown"]:
        lines.append(f"Unknown, and counted nowhere: {counted(report['num_unknown'], 'entry')}.")
    return "\n".join(lines)


def run(args: EvaluateOptions) -> dict:
    """Scores, prints and writes; returns what results.json holds (on the main process)."""
    from accelerate import Accelerator

    from .check.imbalance import long_tail_groups
    from .checkpoint.loading import load_checkpoint, of_one_moment
    from .checkpoint.lock import check_launch
    from .metrics.functional import multilabel_report
    from .report.page import result_record, write_report
    from .scoring.measured_with import weights_of
    from .scoring.predict import score_split

    if args.output is not None and not args.overwrite:
        refuse_to_replace(args.output, RESULT_FILES, "--output")

    def load() -> tuple:
        model, processor = load_checkpoint(args)
        return model, processor, weights_of(args.checkpoint, model.config.to_dict())

    model, processor, weights = of_one_moment(args.checkpoint, load)
    threshold = args.threshold
    if threshold == "auto":
        threshold = getattr(model.config, "thresholds", None)
        if threshold is None:
            raise ValueError(
                f"{args.checkpoint} holds no thresholds; fit them with hsvlt thresholds, or give a number for "
                "--threshold."
            )
    accelerator = Accelerator()
    check_launch(accelerator)
    scored = score_split(model, processor, args, accelerator, count_split=args.count_split)
    label_names, scores, labels, _, counts = scored
    accelerator.end_training()
    if not accelerator.is_main_process:
        return {}
    report = multilabel_report(
        scores,
        labels,
        threshold,
        groups=None if counts is None else long_tail_groups(counts),
        label_names=label_names,
    )
    results = result_record(
        report,
        model.config,
        weights=weights,
        checkpoint=args.checkpoint,
        revision=getattr(model.config, "_commit_hash", None) or args.revision,
        dataset=args.dataset,
        dataset_revision=args.dataset_revision,
        split=args.split,
        count_split=args.count_split,
        threshold=args.threshold,
    )
    absent = [name for name, shown in zip(label_names, (labels == 1).any(0), strict=True) if not shown]
    words = "fitted thresholds" if args.threshold == "auto" else f"score >= {args.threshold:g}"
    print(
        f"{args.checkpoint} on {args.dataset}, split {args.split}: {counted(len(scores), 'image')}, "
        f"{counted(len(label_names), 'label')}\n" + format_report(report, words, absent)
    )
    if args.output is not None:
        write_report(args.output, results, scored, model, processor)
        print(f"Written: {', '.join(str(args.output / name) for name in RESULT_FILES)}")
        say_next("push", run_of(args.checkpoint), "org/name", "--dry_run")
    else:
        folder = Path(run_of(args.checkpoint)) if Path(args.checkpoint).is_dir() else Path("evaluations")
        how = ["--split", args.split, "--threshold", args.threshold, "--output", folder / "evaluation"]
        say_next("evaluate", args.checkpoint, args.dataset, *how, like=args)
    return results


main = command(run, EvaluateOptions, "evaluate", __doc__)


if __name__ == "__main__":
    sys.exit(main())
