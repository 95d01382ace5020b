"""A few images and their labels, as a table for the terminal."""

from __future__ import annotations

import torch

from modeling_hsvlt.load_image import load_image

from ..checkpoint.loading import load_checkpoint
from ..options import plain
from ..say import counted

AT_LEAST = 5  # labels of a table, if so many are not found


def show_labels(args) -> None:
    """Prints the labels of a few images, those found first.

    Args:
        args: `training.tag.ShowOptions`.

    Raises:
        ValueError, OSError: in one sentence, what was wrong and what to do.
    """
    model, processor = load_checkpoint(args)
    model.eval()
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    thresholds = getattr(model.config, "thresholds", None)
    if args.threshold != "auto" or thresholds is None:
        thresholds = [0.5 if args.threshold == "auto" else args.threshold] * len(names)
    width = max(map(len, ("label", *names)))
    for file in args.images:
        pixels = processor(images=load_image(file), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            scores = model(pixel_values=pixels.to(model.dtype)).logits[0].float().sigmoid().tolist()
        rows = sorted(zip(scores, names, thresholds, strict=True), reverse=True)
        rows.sort(key=lambda row: row[0] < row[2])
        found = sum(score >= least for score, _, least in rows)
        print(
            f"\n{plain(file)}: {found} of {counted(len(names), 'label')} found\n  {'label':<{width}}  score  threshold"
        )
        for score, name, least in rows[: args.top_k or max(found, AT_LEAST)]:
            print(f"{'*' if score >= least else ' '} {name:<{width}}  {score:>5.2f}  {least:>9.2f}")
