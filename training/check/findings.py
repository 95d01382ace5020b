"""What can be wrong with a data set: unreadable images, labels that cannot be learned or measured, duplicates."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from modeling_hsvlt.label_contract import UNKNOWN_LABEL
from modeling_hsvlt.load_image import MAX_PIXELS

from ..data.leave_out import image_name
from ..data.similar_names import similar_names
from ..data.sparse_labels import SparseLabels
from ..data.vocabulary import LABEL_NOTES, LabelNote
from .duplicates import (
    MAX_DIFFERENCE,
    MAX_DISTANCE,
    Fingerprint,
    Fingerprints,
    fingerprint,
    group_duplicates,
    likeness,
)
from .imbalance import long_tail_groups


@dataclass
class Finding:
    """One kind of thing that was found.

    Attributes:
        kind: Its name in report.json.
        breaks_training: Whether training refuses the data for it, or could only go wrong.
        text: What it means and what to do.
        examples: Everything of the kind, the worst first; texts, or objects with `split`, `row`, `file`.
    """

    kind: str
    breaks_training: bool
    text: str
    examples: list


def inspect_images(
    splits: dict[str, Dataset], *, max_pixels: int = MAX_PIXELS, num_workers: int = 1
) -> tuple[dict[str, list[str]], dict[tuple[str, int], Fingerprint], list[Finding]]:
    """Decodes every image in full, with a progress bar.

    Args:
        splits: Column `image`, not decoded.
        max_pixels: The largest width * height that counts as readable; that of `load_image` is what training takes.
        num_workers: Threads (decoding releases Python's lock).

    Returns:
        The file names of each split, the fingerprints of readable images by (split, row), and what is missing,
        oversized, corrupt, or decodes with a warning.
    """
    thread = threading.local()

    def hear(message, *args, **kwargs) -> None:
        getattr(thread, "warned", []).append(str(message))

    def look(image: dict | None) -> tuple[Fingerprint | tuple[str, str], list[str]]:
        thread.warned = []
        return decode(image), list(dict.fromkeys(thread.warned))

    def decode(image: dict | None) -> Fingerprint | tuple[str, str]:
        try:
            if image is None or (image.get("bytes") is None and not image.get("path")):
                return "missing", "the row holds no image"
            return fingerprint(image, max_pixels)
        except OSError as error:
            return "missing", str(error)
        except ValueError as error:
            bomb = isinstance(error.__cause__, Image.DecompressionBombError)
            return "oversized" if bomb or f"limit of {max_pixels}" in str(error) else "corrupt", str(error)

    names: dict[str, list[str]] = {}
    prints: dict[tuple[str, int], Fingerprint] = {}
    failures: dict[str, list] = {"missing": [], "corrupt": [], "oversized": [], "doubtful": []}
    for name, column in splits.items():
        names[name] = []
        with (
            warnings.catch_warnings(),
            ThreadPoolExecutor(max(num_workers, 1)) as pool,
            tqdm(total=len(column), desc=f"Checking images of {name}", unit="img") as progress,
        ):
            warnings.simplefilter("always")  # of each image, not of the first
            warnings.showwarning = hear  # in the thread that decodes; what `catch_warnings` records is of all of them
            for start in range(0, len(column), 256):  # `pool.map` would queue the bytes of a whole data set
                images = column[start : start + 256]["image"]
                looks = zip(images, pool.map(look, images), strict=True)
                for row, (image, (seen, warned)) in enumerate(looks, start):
                    progress.update()
                    names[name].append(image_name(image))
                    if isinstance(seen, Fingerprint):
                        prints[name, row] = seen
                        seen = ("doubtful", "; ".join(warned)) if warned else None
                    if seen is not None:
                        member = {"split": name, "row": row, "file": names[name][row], "reason": seen[1]}
                        failures[seen[0]].append(member)
    return (
        names,
        prints,
        [
            Finding("rows_without_an_image", True, "The image of a row is not there.", failures["missing"]),
            Finding("corrupt_images", True, "They cannot be decoded; replace them.", failures["corrupt"]),
            Finding(
                "oversized_images",
                True,
                f"They have more than {max_pixels:,} pixels, which may be an attack on memory; shrink them.",
                failures["oversized"],
            ),
            Finding(
                "images_that_decode_with_a_warning",
                False,
                "Part of the file is damaged or odd; look at them, and save them anew where they are right.",
                failures["doubtful"],
            ),
        ],
    )


def check_labels(
    labels: dict[str, SparseLabels], label_names: list[str], embeddings: np.ndarray | None = None
) -> list[Finding]:
    """What labels alone show.

    Args:
        labels: Of each split.
        label_names: The vocabulary.
        embeddings: Of the names, see `similar_names`.
    """
    soft, nothing, without, unknown, absent = [], [], [], [], []
    for name, of_split in labels.items():
        rows = np.repeat(np.arange(len(of_split)), np.diff(of_split.starts))
        present = np.bincount(rows[of_split.values > 0], minlength=len(of_split))
        num_unknown = np.bincount(rows[of_split.values == UNKNOWN_LABEL], minlength=len(of_split))
        num_unknown += np.where(of_split.default == 0, 0, of_split.num_labels - np.diff(of_split.starts))
        for found, where in (
            (without, (present == 0) & (num_unknown == 0)),
            (unknown, num_unknown == of_split.num_labels),
        ):
            found += [{"split": name, "row": row} for row in np.flatnonzero(where).tolist()]
        between = (of_split.values > 0) & (of_split.values < 1)
        if name != "train":
            soft += [{"split": name, "row": row} for row in np.unique(rows[between]).tolist()]
        positives = of_split.positives()
        if not positives.any():
            nothing.append(f"{name}: no image shows any label")
        absent += [f"{label_names[label]}: absent from {name}" for label in np.flatnonzero(positives == 0).tolist()]
    wanted = [f"there is no split {name!r}" for name in ("train", "validation") if name not in labels]
    few = []
    if "train" in labels:
        positives = labels["train"].positives()
        tail = long_tail_groups(positives)["tail"]
        few = [
            f"{label_names[label]}: {positives[label]}" for label in tail[np.argsort(positives[tail], kind="stable")]
        ]
    return [
        Finding("missing_splits", True, "Training needs both; hsvlt split makes them.", wanted),
        Finding("splits_without_a_positive", True, "There is nothing to learn or to measure.", nothing),
        Finding("soft_labels_to_measure", True, "Only train may hold labels between 0 and 1.", soft),
        Finding("labels_absent_from_a_split", False, "They are not learned, or not measured.", absent),
        Finding("labels_with_few_positives", False, "Fewer than 20 images of train show them.", few),
        Finding("images_without_a_label", False, "Right if they show none; else they teach mistakes.", without),
        Finding("images_with_nothing_known", False, "All their labels are unknown; they teach nothing.", unknown),
        Finding(
            "names_that_may_mean_the_same",
            False,
            "If two names are one label, merge them: each is a negative of the other.",
            [
                f"{one} / {other} ({reason} {alike:.2f})"
                for one, other, reason, alike in similar_names(label_names, embeddings)
            ],
        ),
    ]


def note_findings(notes: list[LabelNote]) -> list[Finding]:
    """What `load` noted about names, of which training refuses the first two kinds."""
    texts = {kind: [note.text for note in notes if note.kind == kind] for kind in LABEL_NOTES}
    return [
        Finding(
            "labels_that_look_misspelled",
            True,
            "Correct them, or list both names in labels.txt or label_names.",
            texts["misspelled"],
        ),
        Finding(
            "labels_outside_the_vocabulary",
            True,
            "Correct them, or add them to labels.txt or label_names.",
            texts["not_in_vocabulary"],
        ),
        Finding("labels_that_train_never_shows", False, "They are not learned.", texts["only_elsewhere"]),
    ]


def find_duplicates(
    prints: dict[tuple[str, int], Fingerprint],
    names: dict[str, list[str]],
    labels: dict[str, SparseLabels],
    label_names: list[str],
    max_distance: int = MAX_DISTANCE,
) -> list[dict]:
    """Groups of images that show the same, those with the most members first.

    Returns:
        Dictionaries: `members` (split, row, file, labels, and of each whether it `matches` the first by itself, not
        only by way of others); `identical`, whether all files are equal; `splits`; `conflicts`, labels that one member
        shows and another denies. The first member is the one to keep: of the most held-out split, then the first row.
    """
    held_out = {"test": 0, "validation": 1}
    places = sorted(prints, key=lambda place: (held_out.get(place[0], 2), place))
    table = Fingerprints.of([prints[place] for place in places])
    duplicates = []
    for group in group_duplicates(table, max_distance):
        distance, difference = likeness(table, group[0], group)
        dense = np.stack([labels[places[index][0]].dense(places[index][1]) for index in group])
        present = dense >= 0.5
        conflicts = present.any(axis=0) & (~present & (dense != UNKNOWN_LABEL)).any(axis=0)
        members = [
            {
                "split": places[index][0],
                "row": places[index][1],
                "file": names[places[index][0]][places[index][1]],
                "labels": [label_names[label] for label in np.flatnonzero(present[number])],
                "matches": bool(distance[number] <= max_distance and difference[number] <= MAX_DIFFERENCE),
            }
            for number, index in enumerate(group)
        ]
        duplicates.append(
            {
                "members": members,
                "identical": len({table.digests[index] for index in group}) == 1,
                "splits": list(dict.fromkeys(member["split"] for member in members)),
                "conflicts": [label_names[label] for label in np.flatnonzero(conflicts)],
            }
        )
    return sorted(duplicates, key=lambda group: -len(group["members"]))


def duplicate_findings(duplicates: list[dict]) -> list[Finding]:
    """What groups of `find_duplicates` mean for training."""

    def words(group: dict) -> str:
        members = [f"{member['split']} {member['row']} {member['file']}" for member in group["members"]]
        return " = ".join(members[:4]) + (f" = {len(members) - 4} more" if len(members) > 4 else "")

    across = [group for group in duplicates if len(group["splits"]) > 1]
    within = [group for group in duplicates if len(group["splits"]) == 1]
    conflicts = [group for group in duplicates if group["conflicts"]]
    return [
        Finding(
            "duplicates_across_splits",
            False,
            "What is measured on them was trained on; exclude.txt leaves out all but the most held-out copy.",
            [words(group) for group in across],
        ),
        Finding(
            "duplicates_within_a_split",
            False,
            "They count several times; exclude.txt leaves out all but the first (of test, none).",
            [words(group) for group in within],
        ),
        Finding(
            "duplicates_with_other_labels",
            False,
            "The same image is labelled in two ways; decide which is right.",
            [f"{words(group)}: {', '.join(group['conflicts'])}" for group in conflicts],
        ),
    ]


def exclusions(findings: list[Finding], duplicates: list[dict]) -> list[tuple[str, int, str, str]]:
    """The rows for exclude.txt: unreadable images, and copies of an image that stays."""
    entries = {}
    for group in duplicates:
        first, *copies = group["members"]
        for copy in copies:
            if copy["matches"] and copy["split"] != "test":
                reason = f"copy of {first['split']} {first['row']} {first['file']}"
                if group["conflicts"]:
                    reason += f", labels differ in {', '.join(group['conflicts'])}"
                entries[copy["split"], copy["row"]] = copy["file"], reason
    for finding in findings:
        if finding.kind in ("rows_without_an_image", "corrupt_images", "oversized_images"):
            for member in finding.examples:
                if isinstance(member, dict):
                    entries[member["split"], member["row"]] = member["file"], member["reason"]
    return [(split, row, *entries[split, row]) for split, row in sorted(entries)]
