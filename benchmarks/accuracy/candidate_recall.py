"""How many of the labels that are there a candidate scorer lets through, by the number of candidates, and what that
costs in mAP.

    hsvlt train quickstart \\
        --model '{"num_attention_heads": 4, "candidate_labels": 5}' --output_dir runs/candidates
    python -m benchmarks.accuracy.candidate_recall runs/candidates/best scenes --split test --candidates 1 2 3 5 7 \\
        --scenes '{"clutter": 0, "contrast": [0.5, 0.9]}'

A label that is left out scores 0, and equal scores of a label are one cut of its precision-recall curve: what is left
out ranks behind all that was scored, and no order among it is assumed. So a label's AP falls only where a present label
was left out, and the share of labels with such an image is the most that candidates can cost in mAP, however good the
label stream is: the column "lost at most", which says little of few labels with many images. mAP may rise as well, for
the scorer is a second opinion. The last row is that of all labels, which learn as in a run without candidates.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from training.checkpoint.loading import load_checkpoint
from training.metrics.functional import average_precision
from training.options import CommandParser, ScoringOptions, option
from training.scoring.predict import score_split


@dataclass(kw_only=True)
class CandidateOptions(ScoringOptions):
    candidates: list[int] = option(reason="numbers of candidates to try", metavar="M")
    json: Path | None = option(None, "write the table here as well")


def candidate_recall(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of the present labels that were candidates.

    Args:
        scores: (n, num_labels) of `training.scoring.predict`: 0 where a label was left out.
        labels: (n, num_labels), 1 present, anything else absent or unknown.
    """
    return float((scores[labels == 1] > 0).mean())


def most_lost(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of labels, of those that are present anywhere, that were left out of an image where they are present:
    at most what mAP can lose. Arguments as for `candidate_recall`."""
    present = labels == 1
    missed = (present & ~(scores > 0)).any(0)
    return float(missed[present.any(0)].mean())


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(CandidateOptions, description=__doc__)
    args = parser.read(argv)

    model, processor = load_checkpoint(args)
    if getattr(model, "candidate_scorer", None) is None:
        parser.error(f"{args.checkpoint} has no candidate scorer; train with --model '{{\"candidate_labels\": M}}'.")
    if not all(0 < m <= model.num_labels for m in args.candidates):
        parser.error(f"--candidates must lie between 1 and the {model.num_labels} labels of this checkpoint.")

    accelerator, rows = Accelerator(), {}
    print("| candidates | recall | mAP | lost at most |\n|---|---|---|---|")
    for m in sorted({*args.candidates, model.num_labels}):
        model.config.candidate_labels = m
        scored = score_split(model, processor, args, accelerator)
        rows[m] = {
            "recall": candidate_recall(scored.scores, scored.labels),
            "lost at most": most_lost(scored.scores, scored.labels),
            "mAP": float(np.nanmean(average_precision(scored.scores, scored.labels))),
        }
        recall, lost, mean = rows[m].values()
        print(f"| {m} of {model.num_labels} | {recall:.4f} | {mean:.4f} | {lost:.4f} |")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
