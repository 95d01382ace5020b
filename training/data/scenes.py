"""Built-in scenes: real handwritten digits composed into small colour images, labelled "zero" ... "nine".

The digits are the 1,797 scans of the UCI *Optical Recognition of Handwritten Digits* test set that ships inside
scikit-learn (`sklearn.datasets.load_digits`), so nothing is downloaded. Each scene places a few of them at several
sizes, overlaps and contrasts on a coloured, mottled, noisy background among fragments of other digits (the clutter of
Mnih et al., "Recurrent Models of Visual Attention", 2014): a small multi-label, multi-scale problem on which a tiny
model learns in minutes.

A scene is a pure function of (seed, split, epoch, index): it does not depend on the order of access, on the number of
workers or on the machine. All pixels come from integer arithmetic and from uniform draws of numpy's PCG64 generator.

    python -m training.data.scenes FOLDER --num_scenes 12 --split test     # PNG files and a metadata.jsonl to look at
"""

import argparse
import json
import sys
from bisect import bisect
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from ..checkpoint.atomic import atomic_folder
from .rows import Table, no_such_split
from .scene_labels import COLOURS, PARTNER, ROWS, scene_labels

SPLITS = ("train", "validation", "test")
DEFAULT_NUM_SCENES = {"train": 6000, "validation": 1000, "test": 1000}

_LUMA = (299, 587, 114)  # ITU-R BT.601 luma in thousandths
_PLACEMENT_TRIES = 30


@lru_cache(maxsize=1)
def source_digits() -> tuple[np.ndarray, dict[str, list[np.ndarray]]]:
    """The handwritten digits and which split may show which.

    Returns:
        `images` (1797, 8, 8) uint8 ink, 0 to 255, and for each split a list of ten index arrays into it, one a digit.
        Of every 20 scans of a digit 14 go to train, 3 to validation, 3 to test: splits share writers, never a scan.
    """
    digits = load_digits()
    images = (digits.images.astype(np.int64) * 255 // 16).astype(np.uint8)
    rows = {split: [] for split in SPLITS}
    for digit in range(10):
        of_digit = np.flatnonzero(digits.target == digit)
        place = np.arange(len(of_digit)) % 20
        rows["train"].append(of_digit[place < 14])
        rows["validation"].append(of_digit[(place >= 14) & (place < 17)])
        rows["test"].append(of_digit[place >= 17])
    return images, rows


@lru_cache(maxsize=1 << 15)
def _glyph(row: int, size: int) -> np.ndarray:
    """Opacity (h, w, 1) int32, 0 to 256, of one scan enlarged to `size` px, cut to its ink."""
    scan = PILImage.fromarray(source_digits()[0][row])
    ink = np.asarray(scan.resize((size, size), PILImage.Resampling.BICUBIC), dtype=np.int32)
    # An enlarged 8 x 8 scan is all slopes; steeper ones give a stroke with a soft rim.
    opacity = np.clip((ink - 48) * 2, 0, 256)
    rows, columns = np.flatnonzero(opacity.any(axis=1)), np.flatnonzero(opacity.any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, None]


class SceneDataset(torch.utils.data.Dataset):
    """Map-style dataset of scenes drawn on access; `set_epoch` gives new scenes without end.

    Each row is a dictionary with `image` (RGB `PIL.Image`, `image_size` square), `labels` (distinct names, in digit
    order) and `boxes` (one `{"x", "y", "w", "h", "label"}` per object, whole pixels around its ink; painted in this
    order).

    Args:
        num_scenes: Scenes per epoch.
        seed: Any non-negative integer.
        split: "train", "validation" or "test". The splits use disjoint handwritten digits.
        image_size: Side of the square image in px.
        min_objects, max_objects: Number of digits in a scene, uniform. Where `overlap` leaves no room a scene holds
            fewer (at least one); a partner (see `cooccurrence`) may add to the drawn number up to `max_objects`.
        min_size, max_size: Side in px to which a digit's 8 x 8 scan is enlarged, uniform; its ink is about as
            high, and narrower.
        overlap: Largest intersection over union that two boxes may have. The smaller digit is painted on top.
        contrast: Range of the difference of luma (0 to 1) between a digit and what lies under it, before noise, as far
            as there is room: no luma is further than 0.5 from a middle grey.
        cooccurrence: Probability that a drawn digit brings its `PARTNER`, while there is room for one more object.
        imbalance: Frequency of the most common digit (zero) over that of the rarest (nine), falling geometrically as in
            long-tailed CIFAR; 1 is balanced. It holds for the draws: partners flatten it a little.
        clutter: Largest number of digit fragments under the digits.
        colours: How many of `COLOURS` the digits have, on dark grey and without regard to `contrast`; labels name them.
            0: any colour, which no label names.
        places: Rows, and columns, of the places that labels name, 1 to 5: in which part of the room that a box has does
            its top left corner lie? With 8 colours and 5 places there are 2,000 labels, see `scene_labels`.

    Raises:
        ValueError: for a setting that cannot be met, naming it.
    """

    def __init__(
        self,
        num_scenes: int,
        *,
        seed: int = 0,
        split: str = "train",
        image_size: int = 64,
        min_objects: int = 1,
        max_objects: int = 4,
        min_size: int = 16,
        max_size: int = 32,
        overlap: float = 0.1,
        contrast: tuple[float, float] = (0.3, 0.9),
        cooccurrence: float = 0.0,
        imbalance: float = 1.0,
        clutter: int = 3,
        colours: int = 0,
        places: int = 1,
    ):
        low, high = contrast
        for fine, problem in (
            (split in SPLITS, f"split={split!r} is none of {', '.join(SPLITS)}"),
            (num_scenes >= 0 and seed >= 0, f"num_scenes={num_scenes} and seed={seed} must not be negative"),
            (1 <= min_objects <= max_objects, f"min_objects={min_objects} must be from 1 to max_objects={max_objects}"),
            (
                8 <= min_size <= max_size <= image_size,
                f"min_size={min_size} and max_size={max_size} must rise from 8 to image_size={image_size}",
            ),
            (0 <= overlap <= 1, f"overlap={overlap} must be from 0 to 1"),
            (0 < low <= high <= 1, f"contrast={tuple(contrast)} must be a rising pair in (0, 1]"),
            (0 <= cooccurrence <= 1, f"cooccurrence={cooccurrence} must be from 0 to 1"),
            (cooccurrence == 0 or max_objects >= 2, "cooccurrence needs max_objects of at least 2"),
            (imbalance >= 1, f"imbalance={imbalance} is head over tail and must be at least 1"),
            (clutter >= 0, f"clutter={clutter} must not be negative"),
            (colours in range(len(COLOURS) + 1), f"colours={colours} must be from 0 to {len(COLOURS)}"),
            (places in ROWS, f"places={places} must be from 1 to {len(ROWS)}"),
        ):
            if not fine:
                raise ValueError(f"Scenes cannot be drawn: {problem}.")
        self.num_scenes, self.seed, self.split, self.image_size = num_scenes, seed, split, image_size
        self.min_objects, self.max_objects, self.min_size, self.max_size = min_objects, max_objects, min_size, max_size
        self.overlap, self.contrast, self.cooccurrence, self.clutter = overlap, (low, high), cooccurrence, clutter
        self.colours, self.places, self.label_names = colours, places, scene_labels(colours, places)
        self._cumulative = list(accumulate(imbalance ** (-digit / 9) for digit in range(10)))
        self._rows = [rows.tolist() for rows in source_digits()[1][split]]
        # Shared memory: workers that live through all epochs (persistent_workers) must see the new epoch as well.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self.num_scenes

    def set_epoch(self, epoch: int) -> None:
        """Draw the scenes of this epoch from now on; every epoch has its own."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"Scene {index} of {self.num_scenes} does not exist.")
        pixels, boxes = self._draw(
            np.random.default_rng([self.seed, SPLITS.index(self.split), int(self._epoch), index])
        )
        return {
            "image": PILImage.fromarray(pixels),
            "labels": [self.label_names[label] for label in sorted({box["label"] for box in boxes})],
            "boxes": [{**box, "label": self.label_names[box["label"]]} for box in boxes],
        }

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
        canvas = self._background(rng)
        for _ in range(int(rng.random() * (self.clutter + 1))):
            glyph = self._random_glyph(int(rng.random() * 10), rng)
            top, left, y, x = rng.random(4).tolist()
            # A piece of 2/5 of the height and width: ink, but never a digit.
            height, width = max(glyph.shape[0] * 2 // 5, 1), max(glyph.shape[1] * 2 // 5, 1)
            top, left = int(top * (glyph.shape[0] - height + 1)), int(left * (glyph.shape[1] - width + 1))
            y, x = int(y * (self.image_size - height + 1)), int(x * (self.image_size - width + 1))
            self._paint(canvas, glyph[top : top + height, left : left + width], y, x, rng)

        boxes = []
        glyphs = [(digit, self._random_glyph(digit, rng)) for digit in self._draw_digits(rng)]
        # The largest first: they are the hardest to place, and what is painted later is never hidden by a larger one.
        for digit, glyph in sorted(glyphs, key=lambda item: -item[1].shape[0]):
            place = self._place(glyph, boxes, rng)
            if place is not None:
                y, x = place
                label = digit * max(self.colours, 1) + self._paint(canvas, glyph, y, x, rng)
                for at, side in ((y, glyph.shape[0]), (x, glyph.shape[1])):
                    label = label * self.places + at * self.places // (self.image_size - side + 1)
                boxes.append({"x": x, "y": y, "w": glyph.shape[1], "h": glyph.shape[0], "label": label})

        noise = int(rng.random() * 20)
        if noise:
            canvas += rng.integers(-noise, noise + 1, size=canvas.shape, dtype=np.int8)
        return np.clip(canvas, 0, 255).astype(np.uint8), boxes

    def _draw_digits(self, rng: np.random.Generator) -> list[int]:
        count = self.min_objects + int(rng.random() * (self.max_objects - self.min_objects + 1))
        digits = []
        while len(digits) < count:
            digit, brings = rng.random(2).tolist()
            digits.append(min(bisect(self._cumulative, digit * self._cumulative[-1]), 9))
            if brings < self.cooccurrence and len(digits) < self.max_objects:
                digits.append(PARTNER[digits[-1]])
        return digits

    def _random_glyph(self, digit: int, rng: np.random.Generator) -> np.ndarray:
        row, size = rng.random(2).tolist()
        rows = self._rows[digit]
        return _glyph(rows[int(row * len(rows))], self.min_size + int(size * (self.max_size - self.min_size + 1)))

    def _place(self, glyph: np.ndarray, boxes: list[dict], rng: np.random.Generator) -> tuple[int, int] | None:
        """Top and left of a place within the image where no box overlaps too much, or None where none was found."""
        height, width, _ = glyph.shape
        for _ in range(_PLACEMENT_TRIES):
            y, x = rng.random(2).tolist()
            y, x = int(y * (self.image_size - height + 1)), int(x * (self.image_size - width + 1))
            for box in boxes:
                rows = min(y + height, box["y"] + box["h"]) - max(y, box["y"])
                columns = min(x + width, box["x"] + box["w"]) - max(x, box["x"])
                common = max(rows, 0) * max(columns, 0)
                if common > self.overlap * (height * width + box["h"] * box["w"] - common):
                    break
            else:
                return y, x
        return None

    def _paint(self, canvas: np.ndarray, glyph: np.ndarray, y: int, x: int, rng: np.random.Generator) -> int:
        """Blend a glyph in one colour: of those with a name, whose number is returned, or one that differs in luma from
        what lies under it by a contrast from the range."""
        region = canvas[y : y + glyph.shape[0], x : x + glyph.shape[1]]
        sample = region[::4, ::4].reshape(-1, 3)
        below = sum(w * s for w, s in zip(_LUMA, sample.sum(axis=0).tolist(), strict=True)) / (1000 * len(sample))
        amount, side, *chroma = rng.random(5).tolist()
        step = 255 * (self.contrast[0] + amount * (self.contrast[1] - self.contrast[0]))
        brighter, darker = min(255 - below, step), min(below, step)
        # Where only one side has room for the whole contrast it is that side, else either.
        if brighter == darker:
            luma = below + (step if side < 0.5 else -step)
        else:
            luma = below + brighter if brighter > darker else below - darker
        number = int(chroma[0] * self.colours)
        colour = list(COLOURS.values())[number] if self.colours else _colour(luma, chroma)
        region += ((np.array(colour, dtype=np.int32) - region) * glyph) >> 8
        return number

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """(image_size, image_size, 3) int32: a coarse grid of related colours, enlarged."""
        cells = (1, 2, 3, 4, 6)[int(rng.random() * 5)]
        luma, spread, *chroma = rng.random(5).tolist()
        luma, spread, variety = 20 + 215 * luma, 70 * spread, 0.5
        if self.colours:  # named ones stand on dark grey
            luma, spread, variety, chroma = luma / 6, spread / 6, 0.0, [0.5] * 3
        grid = [
            _colour(
                min(max(luma + spread * (2 * shade - 1), 0), 255),
                [c + variety * (j - 0.5) for c, j in zip(chroma, jitter, strict=True)],
            )
            for shade, *jitter in rng.random((cells * cells, 4)).tolist()
        ]
        coarse = PILImage.fromarray(np.array(grid, dtype=np.uint8).reshape(cells, cells, 3))
        return np.asarray(coarse.resize((self.image_size,) * 2, PILImage.Resampling.BICUBIC)).astype(np.int32)


def _colour(luma: float, chroma: list[float]) -> list[int]:
    """An RGB colour of exactly this luma (0 to 255): as much of the `chroma` (around 0.5) as fits without clipping."""
    grey = sum(w * c for w, c in zip(_LUMA, chroma, strict=True)) / 1000
    offsets = [c - grey for c in chroma]
    room = min(((255 - luma) / o if o > 0 else -luma / o for o in offsets if abs(o) > 1e-6), default=0.0)
    strength = max(min(room, 255.0), 0.0)
    return [min(max(int(luma + strength * offset + 0.5), 0), 255) for offset in offsets]


def build_scenes(
    num_scenes: int | dict[str, int], *, seed: int = 0, split: str = "train", **knobs
) -> Dataset | DatasetDict:
    """Draw scenes once into a `datasets.Dataset` with the images embedded (PNG, lossless).

    The rows are those of `SceneDataset` at epoch 0, with `labels` as names; `knobs` are its settings.

    Args:
        num_scenes: The number of scenes of `split`, or `{"train": 6000, "validation": 1000}` for a `DatasetDict`.
    """
    if isinstance(num_scenes, dict):
        return DatasetDict({name: build_scenes(n, seed=seed, split=name, **knobs) for name, n in num_scenes.items()})
    scenes = SceneDataset(num_scenes, seed=seed, split=split, **knobs)
    columns = {"image": [], "labels": [], "boxes": []}
    for index in tqdm(range(num_scenes), desc=f"Drawing {split} scenes", unit="scene", disable=num_scenes < 2000):
        row = scenes[index]
        png = BytesIO()
        row["image"].save(png, "PNG", compress_level=1)
        columns["image"].append({"bytes": png.getvalue(), "path": f"{split}-{index:06d}.png"})
        columns["labels"].append(row["labels"])
        columns["boxes"].append(row["boxes"])
    side, name = Value("int32"), ClassLabel(names=list(scenes.label_names))
    features = Features(
        {
            "image": Image(),
            "labels": List(Value("string")),
            "boxes": List({"x": side, "y": side, "w": side, "h": side, "label": name}),
        }
    )
    return Dataset.from_dict(columns, features=features)


class SceneSplit(SceneDataset):
    """Scenes as a `rows.Split` whose images and labels are others every epoch, to be trained on without end.

    Args:
        label_names: The vocabulary in class order, all labels of these scenes among it; None: these.
        num_scenes, knobs: As for `SceneDataset`.

    Raises:
        ValueError: other label names.
    """

    labels = None  # nothing to count before they are drawn
    drawn = True

    def __init__(self, num_scenes: int, *, label_names: Sequence[str] | None = None, **knobs):
        super().__init__(num_scenes, **knobs)
        label_names = label_names or self.label_names
        if not set(self.label_names) <= set(label_names):
            names = ", ".join(self.label_names[:10]) + ", ..." * (len(self.label_names) > 10)
            raise ValueError(f"Scenes are labelled {names}; take these as the label names.")
        self._index = {name: index for index, name in enumerate(label_names)}

    def __getitem__(self, index: int) -> dict:
        row = super().__getitem__(index)
        ids = torch.tensor(sorted(self._index[name] for name in row["labels"]))[None]
        size = (len(self._index),)
        labels = torch.sparse_coo_tensor(ids, torch.ones(ids.shape[1]), size, is_coalesced=True, check_invariants=True)
        return {"image": row["image"], "labels": labels}

    def row_name(self, row: int) -> str:
        return f"row {row}"


def read_scenes(
    names: Sequence[str] | None, knobs: dict | None, *, label_names: Sequence[str] | None = None, fresh: bool = False
) -> Table:
    """The built-in data set.

    Args:
        names: Of the splits to draw; None: all.
        knobs: Settings of `SceneDataset`, with `num_scenes` of each split.
        label_names: The vocabulary in class order.
        fresh: Whether the train split is a `SceneSplit`.

    Raises:
        ValueError: a split without a number of scenes, or a setting that cannot be met.
    """
    knobs = {"num_scenes": DEFAULT_NUM_SCENES, **(knobs or {})}
    counts = knobs.pop("num_scenes")
    if not isinstance(counts, dict):
        raise ValueError("scenes.num_scenes must give a number of scenes for train and for each other split.")
    names = list(names or counts)
    for name in names:
        if name not in counts:
            raise no_such_split(name, counts, "scenes")
    table = Table({}, label_names=list(SceneDataset(0, **knobs).label_names), drawn=True)
    for name in names:
        if fresh and name == "train":
            table.ready[name] = SceneSplit(counts[name], label_names=label_names, **knobs)
        else:
            table.splits[name] = build_scenes(counts[name], split=name, **knobs)
    return table


def main(argv: list[str] | None = None) -> int:
    """Write scenes as a folder of images with their labels and boxes."""
    parser = argparse.ArgumentParser(description="Write built-in scenes as PNG files with a metadata.jsonl.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num_scenes", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--scenes", type=json.loads, default={}, help="knobs, such as '{\"clutter\": 0}'")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    if args.folder.exists() and not args.overwrite:
        parser.error(f"{args.folder} exists: choose another folder or give --overwrite.")
    try:
        scenes = SceneDataset(args.num_scenes, seed=args.seed, split=args.split, **args.scenes)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    with atomic_folder(args.folder) as folder, (folder / "metadata.jsonl").open("w") as metadata:
        for index in range(len(scenes)):
            scene = scenes[index]
            name = f"{index:05d}.png"
            scene["image"].save(folder / name)
            metadata.write(json.dumps({"file_name": name, "labels": scene["labels"], "boxes": scene["boxes"]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
