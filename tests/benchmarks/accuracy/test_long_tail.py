import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from benchmarks.accuracy import long_tail
from benchmarks.cost import cached_text
from benchmarks.peers import scene_clip
from training.data.scene_labels import SCENE_LABELS


def test_captions_name_some_of_what_is_there():
    draw, seen = random.Random(0), set()
    for _ in range(50):
        caption = scene_clip.compose_caption(["two", "seven"], draw)
        named = {name for name in SCENE_LABELS if name in caption.replace(".", "").split()}
        assert named and named <= {"two", "seven"}
        seen.add(frozenset(named))
    assert len(seen) == 3


def test_every_word_of_a_caption_is_one_token():
    tokenizer = scene_clip.word_tokenizer()
    tokens = tokenizer.tokenize("a photo of a seven and a two.")
    assert tokens == [f"{word}</w>" for word in ("a", "photo", "of", "a", "seven", "and", "a", "two", ".")]


def test_scenes_are_drawn_as_the_dataset_draws_them():
    pixels, labels = scene_clip.draw_scenes(3, split="validation", seed=4, **scene_clip.TAGGED)
    row = scene_clip.SceneDataset(3, split="validation", seed=4, **scene_clip.TAGGED)[1]
    assert np.array_equal(pixels[1].permute(1, 2, 0).numpy(), np.asarray(row["image"]))
    assert labels[1] == row["labels"]


@pytest.mark.slow
def test_a_whole_run_of_a_second_a_step(tmp_path, capsys):
    assert scene_clip.main([str(tmp_path / "clip"), "--steps", "3", "--device", "cpu"]) == 0
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "clip")("a seven")["input_ids"][-1]
        == clip.config.text_config.eos_token_id
    )
    arguments = [
        "--clip",
        str(tmp_path / "clip"),
        "--seeds",
        "2",
        "--pool",
        "60",
        "--largest",
        "20",
        "--num_test",
        "60",
    ]
    arguments += ["--epochs", "0.01", "--device", "cpu", "--json", str(tmp_path / "run.json")]
    assert long_tail.main(arguments) == 0
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    assert len(runs) == 2 and runs[0]["positives_in_train"] != runs[1]["positives_in_train"]
    for run in runs:
        assert list(run["methods"]) == list(long_tail.METHODS)
        assert all(0 < report["mAP"] < 1 for report in run["methods"].values())
    # Each method trains what the table says.
    trained = {name: report["trained_parameters"] for name, report in runs[0]["methods"].items()}
    width = clip.config.text_config.hidden_size
    assert trained["zero_shot"] == 0
    assert trained["coop"] == trained["phase1_phase2"] == 2 * 4 * width
    assert trained["class_contexts"] == 10 * trained["coop"]
    vision = sum(parameter.numel() for parameter in clip.vision_model.parameters())
    assert trained["phase1"] == vision + clip.visual_projection.weight.numel()
    assert capsys.readouterr().out.count("| phase1 |") == 1


def test_zero_shot_is_clip_s_own_score(tmp_path):
    """Through the benchmark's data and model, against transformers alone."""
    tokenizer = scene_clip.word_tokenizer()
    clip = scene_clip.new_clip(tokenizer).eval()
    pixels, _ = scene_clip.draw_scenes(4, split="test", seed=0, **scene_clip.TAGGED)
    prompts = tokenizer([f"a photo of a {name}." for name in SCENE_LABELS], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(pixel_values=scene_clip.normalize(pixels), **prompts).logits_per_image / clip.logit_scale.exp()
    benchmark = object.__new__(long_tail.Benchmark)
    benchmark.device, benchmark.clip, benchmark.tokenizer = torch.device("cpu"), clip, tokenizer
    benchmark.label_names = list(SCENE_LABELS)
    benchmark.processor = scene_clip.image_processor()
    benchmark.args = long_tail.build_parser().parse_args(["--logit_scale", "1"])
    labels = torch.zeros(4, 10)
    labels[:, 0] = 1
    split = long_tail.Split(pixels, labels)
    model, trained = benchmark.train((), split, 0, {})
    assert trained == 0
    scores = benchmark.score(model, split) - model.scale.logit_bias.item()
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_cached_text_benchmark_runs(monkeypatch, tmp_path, capsys):
    tokenizer = scene_clip.word_tokenizer(("a", "photo", "of", "label0", "label1"))
    small = cached_text.build

    def build(num_labels, device, layers):
        clip, model, tower, _, names = small(num_labels, device, 1)
        return clip, model, tower, tokenizer, names

    config = cached_text.CLIPConfig
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

    def tiny(text_config, vision_config):
        return config(text_config={**tower, **text_config}, vision_config={**tower, **vision_config})

    monkeypatch.setattr(cached_text, "CLIPConfig", tiny)
    arguments = ["--num_labels", "2", "--batch_size", "1", "2", "--rounds", "2", "--pipelines", "--device", "cpu"]
    arguments += ["--threads", "1"]
    assert cached_text.main([*arguments, "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["batch_size"], row["model"]) for row in rows] == [
        (1, "hp_dval"),
        (1, "zero_shot"),
        (1, "pipeline_zero_shot"),
        (2, "hp_dval"),
        (2, "zero_shot"),
    ]
    assert "| 1 | hp_dval | tower |" in capsys.readouterr().out
