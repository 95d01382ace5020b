"""Malformed images against everything that decodes: `make fuzz`, or `python -m tests.fuzz --images 500 --seed 0`.

Each goes through `load_image` as a file and as bytes, in a process with a memory limit, and through training's
`find_unreadable` as a folder. An image must end as an image or as a ValueError with its name in it, within seconds
and a bounded amount of memory. Every file is listed with what became of it.

What decodes although it is malformed is what no decoder can tell from an image: damage behind the first frame, which
alone is read; flipped bits where a format has no checksum, which are other pixels; zeros in formats without
compression, which are black pixels; a header that promises less than there is; a bomb in texts or colour profiles,
which are not unpacked. What a decoder warned of is listed.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .decoding import fuzz
from .malformed import KINDS, malformed


def unreadable_in_training(folder: Path) -> dict[str, str]:
    """What `find_unreadable` says, by file name."""
    from datasets import Dataset, Features, Image

    from training.data.leave_out import find_unreadable

    paths = [str(path) for path in sorted(folder.iterdir())]
    dataset = Dataset.from_dict({"image": paths}, features=Features({"image": Image(decode=False)}))
    return {Path(name).name: reason for _, name, reason in find_unreadable(dataset)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name) / "images"
        folder.mkdir()
        for file, data in malformed(args.images, args.seed):
            (folder / file).write_bytes(data)
        os.environ["HF_HOME"] = str(Path(name) / "hf")
        outcomes, longest, peak = fuzz(folder)
        named = {file for file, (kind, _) in outcomes.items() if kind == "named"}
        training = unreadable_in_training(folder)
        agree = set(training) == named and all(file in reason for file, reason in training.items())
    for file, (kind, message) in outcomes.items():
        print(f"{file} {kind}: {message.replace(str(folder / file), file)}")
    print(f"\n{'':<18}{'named':>8}{'decoded':>9}")
    for kind in KINDS:
        counts = Counter(outcome for file, (outcome, _) in outcomes.items() if f"-{kind}." in file)
        print(f"{kind:<18}{counts['named']:>8}{counts['decoded']:>9}")
    counts = Counter(kind for kind, _ in outcomes.values())
    bad = {kind: counts[kind] for kind in ("crashed", "hung", "unnamed")}
    print(
        f"fuzz: {len(outcomes)} malformed images: {counts['named']} refused by name, {counts['decoded']} decoded all "
        f"the same, {bad['crashed']} crashes, {bad['hung']} hangs, {bad['unnamed']} without a name; longest "
        f"{longest:.1f} s, memory {peak:.0f} MiB at most; find_unreadable names the same: {'yes' if agree else 'NO'} "
        f"({time.monotonic() - start:.0f} s)"
    )
    return 0 if agree and not any(bad.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
