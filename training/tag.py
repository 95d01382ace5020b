"""Label images and videos: a few in the terminal, or any number, on all devices, in a run that may be killed and
started again.

    hsvlt tag photo.jpg                      a table, by the newest run below runs/
    hsvlt tag clip.mp4 --frames_per_second 2
    hsvlt tag CHECKPOINT 1.jpg 2.jpg --top_k 3
    hsvlt tag CHECKPOINT SOURCE OUTPUT
    hsvlt tag CHECKPOINT photos tags --threshold 0.5 --top_k 20 --format jsonl
    hsvlt tag CHECKPOINT photos tags --sidecars txt xmp

SOURCE is a folder of images and videos (with the folders in it), one of them, a text file that names one a line, or a
data set of images (a folder that `datasets` wrote, a folder of parquet files, or a Hub id). OUTPUT gets part files,
complete or not there: `file_name` (or `row`, for a data set), `labels` and `scores` from the highest score on, and
`error` for an image that cannot be read; those are listed in `unreadable.txt` as well. Read them all with
`datasets.load_dataset("parquet", data_files="OUTPUT/part-*.parquet")`.

A video (pip install av) is one record: --frames_per_second are looked at, at most --max_frames in all, and --pooling
makes one score of theirs for each label, which the threshold is compared with. Beside each part, `intervals-*` has a
row for each time that one of these labels was seen: `file_name`, `label`, `start` and `end`, in seconds.

An image that is not there any more, or whose disk fails, is none that cannot be read: nothing is written about it, the
exit status is 1, and the same command tries it again.

The same command again goes on where the last one was killed, with any number of processes, and tags images that came
since. Each image has one record, whatever happened. At the end it prints where the time went.

--sidecars writes the labels beside each image when all are tagged: `txt`, a line `dog, sofa` in 1.txt (1.jpg.txt where
1.png is there too), and `xmp`, keywords for photo tools in 1.jpg.xmp. `hsvlt prepare auto` reads the text files,
corrected or not. Files that exist are left alone, unless --overwrite_sidecars says otherwise.
"""

from __future__ import annotations

import mimetypes
import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

from .options import CheckpointOptions, ImageOptions, command, number_or_auto, option, refuse
from .places import free_cores, last_run

WRITERS = ("txt", "xmp")


@dataclass(kw_only=True)
class VideoOptions:
    frames_per_second: float = option(1.0, "of a video to look at")
    max_frames: int = option(600, "at most so many of a video, evenly spaced beyond")
    pooling: Literal["max", "mean", "top_k_mean"] = option("max", "one score of those of all frames, for each label")
    pooling_k: int = option(5, "of top_k_mean: how many of the highest scores")


@dataclass(kw_only=True)
class ShowOptions(VideoOptions, CheckpointOptions):
    """Of images and videos whose labels are printed."""

    images: list[str] = option(reason="image or video files, or addresses of images", positional=True, metavar="IMAGE")
    threshold: float | str = option("auto", "a number, or auto: the checkpoint's, or 0.5", read=number_or_auto)
    top_k: int | None = option(None, "labels to print; null: those found, and others up to five")


@dataclass(kw_only=True)
class TagOptions(VideoOptions, ImageOptions, CheckpointOptions):
    source: str = option(reason="folder, list of files, or dataset", positional=True, metavar="SOURCE")
    output: Path = option(reason="folder to write into", positional=True, metavar="OUTPUT")
    threshold: float | str = option("auto", "a number, or auto: the thresholds in the checkpoint", read=number_or_auto)
    top_k: int | None = option(None, "at most so many labels an image; null: all above the threshold")
    format: Literal["parquet", "jsonl"] = option("parquet", "of the part files")
    batch_size: int = option(32, "images per device")
    num_workers: int = field(
        default_factory=free_cores, metadata={"help": "processes that decode images, per device; by the cores here"}
    )
    part_size: int = option(1000, "images per part file")
    sidecars: list[str] = option(list, f"write the labels beside each image: {', '.join(WRITERS)}", choices=WRITERS)
    overwrite_sidecars: bool = option(False, "replace text files that exist, and the keywords in XMP files that do")
    overwrite: bool = option(False, "begin again, without the parts that are in OUTPUT")
    split: str | None = option(None, "of a dataset that has several")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] | None = option(
        None,
        "to compute in; auto: 16 bits where the processor is made for them and the first 100 images get the same "
        "labels (a run that goes on keeps what it began with); null: as the checkpoint",
    )


def few_images(argv: list[str]) -> list[str] | None:
    """The words of `ShowOptions` where a command line names images, and no source and output; else None.

    Raises:
        FileNotFoundError: an image alone, and no run to look at it.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if words and is_image(words[0]):
        words, argv = ["", *words], [last_run(), *argv]
    return argv if len(words) > 1 and all(map(is_image, words[1:])) else None


def is_image(word: str) -> bool:
    """Whether a word of the command line is an image or a video, and not a list of them."""
    if word.startswith(("http://", "https://")):
        return True
    from modeling_hsvlt.load_video import is_video

    kind = mimetypes.guess_type(word, strict=False)[0] or ""
    return Path(word).is_file() and (kind.startswith("image/") or is_video(word))


def run(args: ShowOptions | TagOptions) -> int:
    """Labels the images; returns how many could not be got at."""
    if isinstance(args, ShowOptions):
        from .tagging.show import show_labels

        show_labels(args)
        return 0
    from .tagging.run import tag_source

    return tag_source(args)


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when all is done, 1 when images could not be got at, 2 when something was refused, 130 after
    Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        images = few_images(argv)
    except FileNotFoundError as error:
        return refuse(error)
    kind, stopped = ShowOptions, "Stopped."
    if images is None:
        kind, stopped = TagOptions, "Stopped; what is tagged is kept, and the same command goes on from there."
    label = command(run, kind, "tag", __doc__, status=lambda left: 1 if left else 0, stopped=stopped)
    return label(images or argv)


if __name__ == "__main__":
    sys.exit(main())
