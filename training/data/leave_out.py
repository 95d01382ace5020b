"""Rows to leave out: those that a list names, and images that cannot be read.

Lists are written by `training.check_data` and obeyed by `--exclude FILE` of `training.train`, `training.evaluate`,
`training.fit_thresholds` and `training.calibrate`. One row a line: split, row, file, reason, with tabs between. What
stands behind # is not read, so that a line can be taken back without losing it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from modeling_hsvlt.load_image import load_image

from ..checkpoint.atomic import write_file
from .rows import Loaded, Split, only_images

logger = logging.getLogger(__name__)


def write_exclusions(path: Path, entries: Iterable[tuple[str, int, str, str]]) -> None:
    """Writes (split, row, file, reason) lines; the rows are those of `load`, from 0."""
    lines = ["# split, row, file, reason; put a # before the lines of images that are to stay"]
    lines += ["\t".join((split, str(row), file, " ".join(reason.split()))) for split, row, file, reason in entries]
    write_file(path, "\n".join(lines) + "\n")


def read_exclusions(path: str | Path, splits: Mapping[str, Split]) -> dict[str, dict[int, str]]:
    """The rows of each split that a list names, with their reasons; says how many they are.

    Lines about splits that are not among `splits` (a test split that is not used) do not matter here.

    Raises:
        ValueError: a malformed line, or a row that is not the image that the list says, with the line.
        FileNotFoundError: no such list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; hsvlt check DATASET --output DIR writes one.")
    rows: dict[str, dict[int, str]] = {name: {} for name in splits}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split("\t")
        if len(parts) < 3 or not parts[1].isdecimal():
            raise ValueError(f"{path}, line {number}: {line!r} is not split, row, file and reason with tabs between.")
        name, row, file = parts[0], int(parts[1]), parts[2]
        if name not in splits:
            continue
        if not same_image(splits[name].images, row, file):
            raise ValueError(
                f"{path}, line {number}: row {row} of {name} is not {file!r} (any more); run hsvlt check again."
            )
        rows[name][row] = " ".join(parts[3:])
    for name, out in rows.items():
        if out:
            logger.warning("Left out %d of %d images of %s, as %s says.", len(out), len(splits[name]), name, path)
    return rows


def image_name(image: dict | None) -> str:
    """The file of a row as lists and reports call it: its last two parts, which do not change when a data set is moved;
    empty for an image without one."""
    path = (image or {}).get("path") or ""
    return "/".join(Path(path).parts[-2:]).replace("\t", " ")


def same_image(images: Dataset, row: int, file: str) -> bool:
    """Whether a row of `images` exists and is the image that `image_name` called `file`."""
    return row < len(images) and image_name(images[row]["image"]) == file


def find_unreadable(rows: Dataset, num_workers: int = 0) -> list[tuple[int, str, str]]:
    """Decodes every image in full, with a progress bar.

    Args:
        rows: With a column `image`.
        num_workers: Threads (decoding releases Python's lock).

    Returns:
        (row, file name, reason) of each image that cannot be decoded: corrupt, truncated, too large, missing.
    """

    def reason(image: dict | None) -> str | None:
        try:
            load_image(image)
        except ValueError as error:
            return str(error)
        return None

    column = only_images(rows, "image")
    unreadable = []
    with (
        ThreadPoolExecutor(max(num_workers, 1)) as pool,
        tqdm(total=len(column), desc="Checking images", unit="img") as progress,
    ):
        # In slices, for `pool.map` would queue the bytes of a whole data set.
        for start in range(0, len(column), 256):
            images = column[start : start + 256]["image"]
            for offset, problem in enumerate(pool.map(reason, images)):
                progress.update()
                if problem is not None:
                    name = (images[offset] or {}).get("path") or f"row {start + offset}"
                    unreadable.append((start + offset, name, problem))
    return unreadable


def leave_out_unreadable(
    loaded: Loaded, split: str, unreadable: Sequence[tuple[int, str, str]], on_unreadable: str = "error"
) -> None:
    """Takes out of a split the images that `find_unreadable` found.

    Args:
        on_unreadable: "skip" logs each and leaves it out; "error" raises.

    Raises:
        ValueError: there are some and the policy is "error"; names each (up to 20).
    """
    if on_unreadable not in ("error", "skip"):
        raise ValueError(f"on_unreadable={on_unreadable!r} must be 'error' or 'skip'.")
    if not unreadable:
        return
    count = f"{len(unreadable)} of {len(loaded.splits[split])} images"
    listing = "; ".join(f"{name}: {reason}" for _, name, reason in unreadable[:20])
    listing += f"; and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
    if on_unreadable == "error":
        raise ValueError(
            f"{count} cannot be read ({listing}); repair or remove them, or pass on_unreadable='skip' to train without "
            "them."
        )
    logger.warning("Left out %s that cannot be read (%s).", count, listing)
    loaded.leave_out("unreadable", split, {row: reason for row, _, reason in unreadable})
