"""Draws the example images: python space/make_examples.py, from the root of the project."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from training.data.scenes import SceneDataset  # noqa: E402

# Four times the size of the quickstart's scenes, of handwriting that its model has not seen.
scenes = SceneDataset(
    6, seed=12, split="test", image_size=256, min_size=64, max_size=128, min_objects=2, clutter=0, contrast=(0.5, 0.9)
)
for number in range(len(scenes)):
    scene = scenes[number]
    name = "-".join(scene["labels"])
    scene["image"].save(Path(__file__).parent / "examples" / f"{number + 1}-{name}.jpg", quality=90)
    print(name)
