import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor, MultiLabelProcessor
from training.publish.try_checkpoint import draw

from ...fresh import python
from ...test_remote_code import WITHOUT_THE_PACKAGE

SCRIPT = Path(__file__).parents[3] / "training" / "publish" / "try_checkpoint.py"


@pytest.mark.slow
def test_a_checkpoint_is_tried_without_the_package(tmp_path):
    names = {0: "cat", 1: "dog", 2: "sofa"}
    torch.manual_seed(0)
    config = HSVLTConfig.preset("nano", id2label=names, thresholds=[0.0, 1.0, 0.0])
    model = HSVLTForImageClassification(config).eval()
    processor = MultiLabelProcessor(MultiLabelImageProcessor(size={"height": 64, "width": 64}), id2label=names)
    checkpoint, images = tmp_path / "checkpoint", tmp_path / "images"
    model.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    images.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "labels": ["dog", "sofa"]} for i in range(3)]
    (images / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    script = f"{WITHOUT_THE_PACKAGE}\nimport runpy\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    arguments = [checkpoint, images, "--output", tmp_path / "grid.png"]
    result = python("-c", script, *arguments, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    with torch.inference_mode():
        first = Image.open(images / "0.png")
        scores = model(**processor(images=first, return_tensors="pt")).logits.sigmoid()[0].tolist()
    lines = [line for line in result.stdout.splitlines() if line.startswith("0.png")]
    # "auto": cat and sofa from 0 on, dog never; highest first.
    shown = sorted(((scores[i], names[i]) for i in (0, 2)), reverse=True)
    expected = ", ".join(f"{name} {score:.2f}" for score, name in shown)
    assert lines == [f"0.png: {expected}   (true: dog, sofa)"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * 150 and np.asarray(grid).std() > 10


def test_long_names_under_an_image_do_not_touch(monkeypatch):
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *args, **options: figures.append(figure))
    names = ["Wide-Mouthed frog at the waterfall", "an_extremely_long_tag_name_as", "cat", "traffic light"]
    labels = [{"label": name, "score": 0.5} for name in names]
    draw([Image.new("RGB", (8, 8))] * 5, [labels] * 5, [["cat", "zebra crossing ahead", "mountains behind"]] * 5, None)
    (figure,) = figures
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
