import json

import numpy as np
import torch

from benchmarks.accuracy.pointing_game import DEFAULT, covered, entropy, hits, inside, main, play
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor, MultiLabelProcessor
from training.data.scene_labels import SCENE_LABELS
from training.data.scenes import build_scenes

BOXES = [{"x": 2, "y": 3, "w": 4, "h": 2, "label": 7}, {"x": 10, "y": 10, "w": 3, "h": 3, "label": 1}]


def test_a_peak_counts_inside_a_box_of_its_own_label():
    maps = torch.zeros(2, 16, 16)
    maps[0, 4, 5] = maps[1, 4, 5] = 1
    objects = covered(BOXES, [1, 7], 16, 16)
    assert objects.sum((-2, -1)).tolist() == [9, 8]
    assert objects[1, 3, 5] and not objects[1, 3, 6] and not objects[1, 5, 5], "right and bottom edges are outside"
    assert hits(maps, objects[[1, 0]]) == [True, False]


def test_attention_is_measured_inside_the_boxes_and_against_uniform():
    objects = torch.zeros(2, 2, 4, dtype=torch.bool)
    objects[0, 0, 0] = objects[1, 0] = True
    attention = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 0, 0]], [[0.125] * 4, [0.125] * 4]])
    assert inside(attention, objects) == [0.5, 0.5]
    # One bit of three; uniform. A second head that looks at one cell alone halves both.
    assert np.allclose(entropy(attention[None]), [1 / 3, 1])
    peak = torch.zeros(2, 2, 4)
    peak[:, 1, 1] = 1
    assert np.allclose(entropy(torch.stack((attention, peak))), [1 / 6, 1 / 2])


def test_the_game_on_scenes(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    backbone = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    names = dict(enumerate(SCENE_LABELS))
    config = HSVLTConfig.preset("nano", backbone_config=backbone, label_embedding_dim=8, id2label=names)
    HSVLTForImageClassification(config).save_pretrained(tmp_path)
    MultiLabelProcessor(MultiLabelImageProcessor(size=64), id2label=names).save_pretrained(tmp_path)
    assert main([str(tmp_path), "--num_scenes", "6", "--json", str(tmp_path / "out.json")]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["hits"]) >= {"centre", "area", DEFAULT, "stage 1", "stage 4"}
    assert set(result["attention"]) == {f"stage {stage}" for stage in (1, 2, 3, 4)}

    # A map that is the truth hits always; one that is its opposite, never. Areas are those of the boxes.
    scenes = build_scenes(6, split="validation", image_size=64)

    def truth(sign):
        def maps(model, pixels, stages=None):
            drawn = torch.zeros(len(pixels), 10, 64, 64)
            for row, boxes in enumerate(scenes["boxes"]):
                for box in boxes:
                    drawn[row, box["label"], box["y"] : box["y"] + box["h"], box["x"] : box["x"] + box["w"]] = sign
            return None, drawn

        return maps

    model = HSVLTForImageClassification.from_pretrained(tmp_path)
    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        monkeypatch.setattr("benchmarks.accuracy.pointing_game.label_heat_maps", truth(sign))
        outcome, _ = play(model, MultiLabelImageProcessor(size=64), scenes)
        assert np.mean(outcome[DEFAULT]) == expected
    labels = sum(len({box["label"] for box in boxes}) for boxes in scenes["boxes"])
    assert len(outcome["area"]) == len(outcome["centre"]) == labels
    lone = [boxes[0] for boxes in scenes["boxes"] if len(boxes) == 1]
    assert all(any(np.isclose(box["w"] * box["h"] / 64**2, outcome["area"])) for box in lone)

    # Queries of zero look everywhere alike: what lies in the boxes is their area, and no entropy is lost.
    for name, parameter in model.named_parameters():
        if name.endswith("query.weight"):
            torch.nn.init.zeros_(parameter)
    outcome, looked = play(model, MultiLabelImageProcessor(size=64), scenes)
    for stage in looked.values():
        assert np.allclose(stage["inside"], outcome["area"], atol=1e-5) and np.allclose(stage["entropy"], 1, atol=1e-5)
