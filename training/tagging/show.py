"""A few images or videos and their labels, as a table for the terminal."""

from __future__ import annotations

import itertools

import torch

from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.load_video import is_video, sample_video
from modeling_hsvlt.video_labels import label_video

from ..checkpoint.loading import load_checkpoint
from ..options import plain
from ..say import counted

FRAMES_AT_ONCE = 8  # of a video
AT_LEAST = 5  # labels of a table, if so many are not found


def show_labels(args) -> None:
    """Prints the labels of a few images or videos, those found first, and when a video showed them.

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
        if is_video(file):
            labels = _of_video(file, model, processor, thresholds, args)
            found = {label["label"]: (label["score"], label["intervals"]) for label in labels}
        else:
            pixels = processor(images=load_image(file), return_tensors="pt")["pixel_values"]
            scores = _logits(model, pixels)[0].sigmoid().tolist()
            found = {name: (score, None) for name, score in zip(names, scores, strict=True)}
        listed = [(found[name][0], name, least) for name, least in zip(names, thresholds, strict=True) if name in found]
        rows = sorted(listed, reverse=True)
        rows.sort(key=lambda row: row[0] < row[2])
        count = sum(score >= least for score, _, least in rows)
        seen = "  seen, in seconds" if is_video(file) else ""
        print(f"\n{plain(file)}: {count} of {counted(len(names), 'label')} found")
        print(f"  {'label':<{width}}  score  threshold{seen}")
        for score, name, least in rows[: args.top_k or max(count, AT_LEAST)]:
            times = ", ".join(f"{start:.1f}-{end:.1f}" for start, end in found[name][1] or ())
            mark, times = "*" if score >= least else " ", f"  {times}" if times else ""
            print(f"{mark} {name:<{width}}  {score:>5.2f}  {least:>9.2f}{times}")


def _of_video(file: str, model, processor, thresholds: list[float], args) -> list[dict]:
    frames = sample_video(file, frames_per_second=args.frames_per_second, max_frames=args.max_frames)
    logits, times = [], []
    while batch := list(itertools.islice(frames, FRAMES_AT_ONCE)):
        times += [(frame.start, frame.end) for frame in batch]
        pixels = processor(images=[frame.image for frame in batch], return_tensors="pt")["pixel_values"]
        logits.append(_logits(model, pixels))
    pooling = {"pooling": args.pooling, "pooling_k": args.pooling_k}
    return label_video(torch.cat(logits), times, model.config.id2label, None, seen_from=thresholds, **pooling)


def _logits(model, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(pixel_values=pixels.to(model.dtype)).logits.float()
