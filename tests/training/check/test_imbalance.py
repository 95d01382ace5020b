"""Head, medium and tail, and their plot."""

import numpy as np
from PIL import Image as PILImage

from training.check.imbalance import long_tail_groups, plot_imbalance


def test_head_medium_and_tail_are_divided_as_in_the_literature(tmp_path):
    groups = long_tail_groups(np.array([0, 19, 20, 99, 100, 5000]))
    assert {name: labels.tolist() for name, labels in groups.items()} == {
        "head": [4, 5],
        "medium": [2, 3],
        "tail": [0, 1],
    }
    for counts in ({"train": np.array([300, 0]), "test": np.array([3, 1])}, {"test": np.zeros(500, int)}):
        plot_imbalance(counts, [str(i) for i in range(len(counts["test"]))], tmp_path / "plot.png")
        with PILImage.open(tmp_path / "plot.png") as plot:
            assert np.asarray(plot.convert("L")).std() > 5
