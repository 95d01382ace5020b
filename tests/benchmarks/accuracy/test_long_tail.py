import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from benchmarks.accuracy import long_tail
from benchmarks.accuracy.prompt_recipes import chosen_recipe
from benchmarks.cost import cached_text
from benchmarks.peers import scene_clip
from tests.tolerance import assert_close_outputs
from training.data.scene_labels import SCENE_LABELS


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
    assert trained["phase1_phase2"] == 2 * 4 * width
    assert trained["coop"] == 4 * width  # its scores leave the local view out
    assert trained["class_contexts"] == 10 * trained["coop"]
    vision = sum(parameter.numel() for parameter in clip.vision_model.parameters())
    assert trained["phase1"] == vision + clip.visual_projection.weight.numel()
    assert capsys.readouterr().out.count("| phase1 |") == 1


def bare_benchmark(clip, tokenizer, *options):
    """A benchmark of this CLIP without data."""
    benchmark = object.__new__(long_tail.Benchmark)
    benchmark.device, benchmark.clip, benchmark.tokenizer = torch.device("cpu"), clip, tokenizer
    benchmark.label_names = list(SCENE_LABELS)
    benchmark.processor = scene_clip.image_processor()
    benchmark.args = long_tail.build_parser().parse_args([*options])
    return benchmark


def test_zero_shot_is_clip_s_own_score(tmp_path):
    """Through the benchmark's data and model, against transformers alone."""
    tokenizer = scene_clip.word_tokenizer()
    clip = scene_clip.new_clip(tokenizer).eval()
    pixels, _ = scene_clip.draw_scenes(4, split="test", seed=0, **scene_clip.TAGGED)
    prompts = tokenizer([f"a photo of a {name}." for name in SCENE_LABELS], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(pixel_values=scene_clip.normalize(pixels), **prompts).logits_per_image / clip.logit_scale.exp()
    benchmark = bare_benchmark(clip, tokenizer, "--logit_scale", "1")
    labels = torch.zeros(4, 10)
    labels[:, 0] = 1
    split = long_tail.Split(pixels, labels)
    model, trained = benchmark.train((), split, 0, {})
    assert trained == 0
    scores = benchmark.score(model, split) - model.scale.logit_bias.item()
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["coop", "phase2"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_prompts_learn_from_stored_features_what_they_learn_from_images(name, optimizer, monkeypatch):
    """A crop that changes nothing: then the steps are those of a plain loop over the images."""
    tokenizer, num_images, rate = scene_clip.word_tokenizer(), 5, {"adamw": 1e-2, "sgd": 10.0}[optimizer]
    torch.manual_seed(0)
    clip = scene_clip.new_clip(tokenizer).eval()
    pixels, rows = scene_clip.draw_scenes(num_images, split="train", seed=0, **scene_clip.TAGGED)
    labels = torch.tensor([[float(label in row["labels"]) for label in SCENE_LABELS] for row in rows])
    split = long_tail.Split(pixels, labels)
    options = ["--prompt_epochs", "3", "--prompt_rate", str(rate), "--prompt_optimizer", optimizer, "--batch_size", "8"]
    benchmark = bare_benchmark(clip, tokenizer, *options)
    recipe = chosen_recipe(name, benchmark.args)
    monkeypatch.setattr(long_tail.Benchmark, "crop", long_tail.Benchmark.batch)
    model = benchmark.new_model(split, **recipe.config)
    plain = copy.deepcopy(model)
    start = plain.hp_dval.text_embeds()
    benchmark.fit(model, split, recipe, seed=0)

    plain.set_phase("phase2")
    plain.train()
    contexts = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    if optimizer == "sgd":
        steps = torch.optim.SGD(contexts, lr=rate, momentum=0.9, weight_decay=5e-4)
    else:
        steps = torch.optim.AdamW(contexts, lr=rate, weight_decay=1e-4)
    for factor in (1, 0.75, 0.25):  # cosine: (1 + cos(pi * step / 3)) / 2
        steps.param_groups[0]["lr"] = rate * factor
        steps.zero_grad()
        plain(scene_clip.normalize(pixels), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(contexts, 1.0)
        steps.step()
    plain.eval()
    assert (model.hp_dval.text_embeds() - start).abs().max() > 1e-3
    torch.testing.assert_close(model.hp_dval.text_embeds(), plain.hp_dval.text_embeds(), atol=1e-4, rtol=1e-3)
    assert_close_outputs(benchmark.score(model, split), plain(scene_clip.normalize(pixels)).logits)


def test_calibration_finds_the_least_loss_and_keeps_the_ranking():
    tokenizer = scene_clip.word_tokenizer()
    torch.manual_seed(0)
    clip = scene_clip.new_clip(tokenizer).eval()
    pixels, rows = scene_clip.draw_scenes(12, split="train", seed=0, **scene_clip.TAGGED)
    labels = torch.tensor([[float(label in row["labels"]) for label in SCENE_LABELS] for row in rows])
    split = long_tail.Split(pixels, labels)
    benchmark = bare_benchmark(clip, tokenizer)
    model = benchmark.new_model(split)
    # Scores that agree with the labels somewhat, so that the best scale is no limit.
    benchmark.score = lambda model, split: (
        torch.add(split.labels, noise).mul(model.scale()[0]).add(model.scale()[1]).numpy()
    )
    noise = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))

    def loss(factor, shift):
        logits = torch.from_numpy(benchmark.score(model, split))
        mean = logits.mean()
        return model._loss((logits - mean) * factor + mean + shift, labels).item()

    before = benchmark.score(model, split), loss(1, 0)
    benchmark.calibrate(model, split)
    after = benchmark.score(model, split)
    assert loss(1, 0) < before[1] - 0.01
    for factor, shift in ((0.9, 0), (1.1, 0), (1, -0.1), (1, 0.1)):
        assert loss(factor, shift) > loss(1, 0)
    assert (after.argsort(0) == before[0].argsort(0)).all()
    assert model.config.logit_scale == pytest.approx(model.scale()[0].item())
    assert model.config.logit_bias == pytest.approx(model.scale()[1].item())


@pytest.mark.slow
def test_few_shots_with_another_recipe_of_prompts(tmp_path, capsys):
    assert scene_clip.main([str(tmp_path / "clip"), "--steps", "3", "--device", "cpu"]) == 0
    arguments = ["--clip", str(tmp_path / "clip"), "--seeds", "2", "--pool", "60", "--num_test", "60", "--shots", "2"]
    arguments += ["--methods", "zero_shot", "coop", "--context_init", "random", "--prompt_epochs", "2", "--calibrate"]
    arguments += ["--device", "cpu", "--json", str(tmp_path / "run.json")]
    assert long_tail.main(arguments) == 0
    runs = json.loads((tmp_path / "run.json").read_text())["runs"]
    gains = []
    for run in runs:
        assert 2 <= min(run["positives_in_train"]) <= max(run["positives_in_train"]) < 15
        gains.append(100 * (run["methods"]["coop"]["mAP"] - run["methods"]["zero_shot"]["mAP"]))
    assert all(gains)  # from random contexts, zero-shot's scores are not come back to in two steps
    line = f"coop over zero_shot: {np.mean(gains):+.2f} ± {np.std(gains, ddof=1):.2f}"
    assert line in capsys.readouterr().out


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
