"""Fit each label's decision threshold on a validation split and store it in the checkpoint.

    hsvlt thresholds CHECKPOINT DATASET --split validation [--objective f1]
    hsvlt thresholds CHECKPOINT DATASET --objective precision --target 0.9
    hsvlt thresholds CHECKPOINT DATASET --objective cost --target 5  # a false alarm costs 5 misses

Afterwards `pipeline(..., threshold="auto")` and `hsvlt evaluate ... --threshold auto` use them. Fit on
images that the model was not trained on. On the images they were fitted to thresholds look better than they are;
what to expect elsewhere is printed as "held out": fitted on one half of the images, applied to the other, and back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .metrics.glossary import FIGURES
from .options import ScoringOptions, command, option
from .say import counted, say_next

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator


@dataclass(kw_only=True)
class FitOptions(ScoringOptions):
    objective: Literal["f1", "precision", "recall", "cost"] = option("f1", "what each label's threshold is best for")
    target: float | None = option(
        None, "the wanted precision or recall, or what a false positive costs in false negatives"
    )
    min_positives: int = option(10, "labels with fewer lean on a threshold shared by all")


def run(args: FitOptions) -> np.ndarray:
    """Predicts, fits, stores and prints; returns the thresholds."""
    from .checkpoint.lock import rewrite

    return rewrite(args.checkpoint, "thresholds are written into its config.json", partial(_fit, args))


def _fit(args: FitOptions, folder: Path, accelerator: Accelerator) -> np.ndarray:
    import numpy as np

    from .checkpoint.folder import revised, verify_if_sealed
    from .checkpoint.loading import load_checkpoint
    from .metrics.functional import decision_report
    from .scoring.held_out import held_out_decisions
    from .scoring.predict import score_split
    from .scoring.thresholds import fit_thresholds, store_thresholds, threshold_info

    verify_if_sealed(folder)
    model, processor = load_checkpoint(args)
    label_names, scores, labels, *_ = score_split(model, processor, args, accelerator)
    thresholds = fit_thresholds(
        scores, labels, args.objective, args.target, min_positives=args.min_positives, label_names=label_names
    )
    if accelerator.is_main_process:
        before = getattr(model.config, "thresholds", None)
        old = decision_report(scores, labels, 0.5 if before is None else np.array(before))
        new = decision_report(scores, labels, thresholds)
        info = threshold_info(
            labels, args.objective, args.target, args.min_positives, dataset=args.dataset, split=args.split
        )
        with revised(folder) as copy:
            store_thresholds(copy, thresholds, info)
        columns = ("CP", "CR", "OP", "OR", "f1_macro", "f1_micro")
        print(f"{'':<10}" + "".join(f"{FIGURES[column].name:>10}" for column in columns))
        rows = [("0.5" if before is None else "as it was", old), ("fitted", new)]
        decided = held_out_decisions(scores, labels, args.objective, args.target, min_positives=args.min_positives)
        if decided is not None:
            rows.append(("held out", decision_report(decided.astype(np.float32), labels)))
        for words, report in rows:
            print(f"{words:<10}" + "".join(f"{report[column]:>10.4f}" for column in columns))
        few = int(((labels == 1).sum(0) < args.min_positives).sum())
        print(
            f"On the {counted(len(scores), 'image')} they were fitted to; held out: fitted on one half of them, "
            f"applied to the other, and back. Labels with fewer than {args.min_positives} positives, which lean on "
            f"the shared threshold: {few} of {len(label_names)}."
        )
        print(f"Written: {folder / 'config.json'}")
        how = ["--split", args.split, "--threshold", "auto"]
        say_next("evaluate", args.checkpoint, args.dataset, *how, like=args)
    return thresholds


main = command(run, FitOptions, "thresholds", __doc__)


if __name__ == "__main__":
    sys.exit(main())
