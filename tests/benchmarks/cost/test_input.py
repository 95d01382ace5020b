import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.cost import input as input_benchmark


@pytest.mark.slow
def test_every_step_is_timed(tmp_path, capsys):
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg")
    argv = ["--images", str(tmp_path), "--image_size", "32", "--preset", "nano", "--batch_size", "2", "--rounds", "1"]
    assert input_benchmark.main([*argv, "--workers", "0", "--json", str(tmp_path / "rates.json")]) == 0
    rates = json.loads((tmp_path / "rates.json").read_text())["images_per_second"]
    assert {"decode", "processor", "loader, 0 workers", "augmentation", "model (nano)"} <= set(rates)
    assert all(rate > 0 for values in rates.values() for rate in values)
    assert "3 images of 60 x 40 px" in capsys.readouterr().out
    assert input_benchmark.main(["--images", str(tmp_path / "nothing")]) == 2
