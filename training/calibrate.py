"""Calibrated scores: fit a scale and a bias of each label's logit on a validation split, fold them into the classifier.

    hsvlt calibrate CHECKPOINT DATASET --split validation [--method platt] [--shared]

Of the images to which a calibrated label gives 0.8, eight in ten show it. The last layer is linear, so that
`scale * logit + bias` is exactly another classifier: afterwards every way of using the checkpoint (pipelines,
AutoModel, ONNX) gives calibrated scores, at no cost. A label's ranking of the images, and so its AP, stays as it was;
thresholds in the checkpoint are moved along, so that they decide as before. What was folded in is kept in
`config.calibration_info`: a second run starts from the raw scores again. Fit on images that the model was not trained
on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .options import ScoringOptions, command, option
from .say import counted, say_next

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .scoring.calibration import Calibration


@dataclass(kw_only=True)
class CalibrateOptions(ScoringOptions):
    method: Literal["platt", "temperature"] = option("platt", "scale and bias, or scale")
    shared: bool = option(False, "one scale and bias for all labels")
    shrinkage: float = option(10.0, "labels with about so few positives lie halfway to the fit of all labels")


def run(args: CalibrateOptions) -> Calibration:
    """Predicts, fits, folds, writes and prints; returns what the checkpoint then holds."""
    from .checkpoint.lock import rewrite

    return rewrite(args.checkpoint, "its weights are to be written", partial(_calibrate, args))


def _calibrate(args: CalibrateOptions, folder: Path, accelerator: Accelerator) -> Calibration:
    import numpy as np

    from .checkpoint.folder import revised, verify_if_sealed
    from .checkpoint.loading import load_checkpoint
    from .scoring.calibration import (
        check_foldable,
        fit_calibration,
        fold_calibration,
        mean_log_loss,
        move_thresholds,
        stored_calibration,
    )
    from .scoring.held_out import held_out_scores
    from .scoring.measured_with import weights_of
    from .scoring.predict import score_split
    from .scoring.reliability import NUM_BINS, reliability
    from .scoring.thresholds import fit_record

    verify_if_sealed(folder)
    model, processor = load_checkpoint(args)
    check_foldable(model, not args.shared)
    label_names, found, labels, *_ = score_split(model, processor, args, accelerator)
    old = stored_calibration(model.config)
    raw = found if old is None else old.inverse().apply(found)
    how = {"per_label": not args.shared, "shrinkage": args.shrinkage, "label_names": label_names}
    new = fit_calibration(raw, labels, args.method, **how)
    if accelerator.is_main_process:
        stages = {"raw": raw, "calibrated": new.apply(raw)}
        held_out = held_out_scores(raw, labels, args.method, **how)
        if held_out is not None:
            stages["held out"] = held_out
        errors = {words: reliability(scores, labels) for words, scores in stages.items()}
        step = new if old is None else old.inverse().then(new)
        fold_calibration(model, step)
        if getattr(model.config, "thresholds", None) is not None:
            model.config.thresholds = move_thresholds(model.config.thresholds, step)
        weights = weights_of(folder, model.config.to_dict())  # before this changes them
        model.config.calibration_info = {
            "method": args.method,
            "per_label": not args.shared,
            "shrinkage": args.shrinkage,
            "ece": {words.replace(" ", "_"): bins.ece() for words, bins in errors.items()},
            **fit_record(labels, dataset=args.dataset, split=args.split),
            "scale": new.scale.tolist(),
            "bias": new.bias.tolist(),
            "weights": weights,
        }
        with revised(folder) as copy:
            model.save_pretrained(copy)
        print(f"{'':<12}{'ECE':>8}{'ECE per label':>15}{'log loss':>10}")
        for words, bins in errors.items():
            values = np.nanmean(bins.ece_per_label()), mean_log_loss(stages[words], labels)
            print(f"{words:<12}{bins.ece():>8.4f}{values[0]:>15.4f}{values[1]:>10.4f}")
        print(
            f"ECE: {NUM_BINS} bins of equal width, all known entries in common; per label: the mean over labels of "
            f"each one's own. {counted(len(found), 'image')}; held out: fitted on one half of them, applied to the "
            "other, and back."
        )
        print(f"Written: the classifier and config.json of {folder}")
        how = ["--split", args.split, "--threshold", "auto"]
        say_next("evaluate", args.checkpoint, args.dataset, *how, like=args)
    return new


main = command(run, CalibrateOptions, "calibrate", __doc__)


if __name__ == "__main__":
    sys.exit(main())
