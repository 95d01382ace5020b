"""A few images or videos and their labels, as a table for the terminal."""

from __future__ import annotations

from modeling_hsvlt.load_video import is_video
from modeling_hsvlt.pipeline_multilabel import MultiLabelImageClassificationPipeline

from ..checkpoint.loading import computing, load_checkpoint
from ..options import plain
from ..say import counted

AT_LEAST = 5  # labels of a table, if so many are not found


def show_labels(args) -> None:
    """Prints the labels of a few images or videos, those found first, and when a video showed them.

    Args:
        args: `training.tag.ShowOptions`.

    Raises:
        ValueError, OSError: in one sentence, what was wrong and what to do.
    """
    model, processor = load_checkpoint(args)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    thresholds = getattr(model.config, "thresholds", None)
    if args.threshold != "auto" or thresholds is None:
        thresholds = [0.5 if args.threshold == "auto" else args.threshold] * len(names)
    model.config.thresholds = thresholds  # from which on a frame of a video counts
    options = ("frames_per_second", "max_frames", "pooling", "pooling_k")
    tagger = MultiLabelImageClassificationPipeline(model=model, image_processor=processor, device="cpu")
    least, width = dict(zip(names, thresholds, strict=True)), max(map(len, ("label", *names)))
    for file in args.images:
        with computing(model):
            labels = tagger(file, intervals=True, **{name: getattr(args, name) for name in options})
        rows = sorted(((label["score"], label["label"], label.get("intervals", ())) for label in labels), reverse=True)
        rows.sort(key=lambda row: row[0] < least[row[1]])
        count = sum(score >= least[name] for score, name, _ in rows)
        seen = "  seen, in seconds" if is_video(file) else ""
        print(f"\n{plain(file)}: {count} of {counted(len(names), 'label')} found")
        print(f"  {'label':<{width}}  score  threshold{seen}")
        for score, name, intervals in rows[: args.top_k or max(count, AT_LEAST)]:
            times = ", ".join(f"{start:.1f}-{end:.1f}" for start, end in intervals)
            mark, times = "*" if score >= least[name] else " ", f"  {times}" if times else ""
            print(f"{mark} {name:<{width}}  {score:>5.2f}  {least[name]:>9.2f}{times}")
