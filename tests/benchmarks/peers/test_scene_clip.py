import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from benchmarks.accuracy import long_tail
from benchmarks.peers import scene_clip
from training.data.scene_labels import COLOURS, SCENE_LABELS


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
    pixels, rows = scene_clip.draw_scenes(3, split="validation", seed=4, **scene_clip.TAGGED)
    row = scene_clip.SceneDataset(3, split="validation", seed=4, **scene_clip.TAGGED)[1]
    assert np.array_equal(pixels[1].permute(1, 2, 0).numpy(), np.asarray(row["image"]))
    assert rows[1]["boxes"] == row["boxes"]


def parsed(caption):
    """What a rich caption says: of each digit its adjectives and its place."""
    caption = re.sub("^a photo of |^an image of |^a scene with ", "", caption).removesuffix(".")
    said = {}
    for phrase in caption.split(" and "):
        words, _, place = phrase.removeprefix("a ").partition(" at the ")
        *adjectives, name = words.split()
        assert name not in said
        said[name] = adjectives, place
    return said


@pytest.mark.parametrize("colours", [0, 8])
def test_rich_captions_say_what_is_true(colours):
    knobs = {**scene_clip.CAPTIONED, "places": scene_clip.PLACES, "colours": colours, "max_objects": 3}
    _, rows = scene_clip.draw_scenes(200, split="train", seed=0, **knobs)
    draw, forms = random.Random(0), set()
    for row in rows:
        shown = {name: [box for box in row["boxes"] if name in box["label"].split()] for name in SCENE_LABELS}
        for name, (adjectives, place) in parsed(scene_clip.compose_rich_caption(row["boxes"], draw)).items():
            boxes = shown[name]
            assert boxes
            for word in adjectives:
                if word in ("single", "double", "triple"):
                    assert len(boxes) == {"single": 1, "double": 2, "triple": 3}[word]
                    forms.add(word)
                elif word in ("small", "large"):
                    assert len(boxes) == 1 and (word == "small") == (boxes[0]["h"] < 15)
                    forms.add(word)
                else:
                    assert len(boxes) == 1 and boxes[0]["label"].split()[0] == word in COLOURS
                    forms.add("colour")
            if place:
                assert len(boxes) == 1 and boxes[0]["label"].endswith(f"{name} {place}")
                forms.add("place")
    assert {"single", "double", "small", "large", "place"} <= forms
    assert ("colour" in forms) == bool(colours)


def test_every_word_of_a_rich_caption_is_one_token_and_the_longest_fits():
    tokenizer = scene_clip.word_tokenizer(scene_clip.WORDS_OF["rich"])
    thing = "a single small purple {} at the bottom centre"
    caption = f"a scene with {' and '.join(thing.format(name) for name in ('three', 'seven'))}."
    tokens = tokenizer(caption)["input_ids"]
    assert len(tokens) == 2 + len(caption.split()) + 1
    clip = scene_clip.new_clip(tokenizer, "rich")
    assert len(tokens) <= clip.config.text_config.max_position_embeddings


def test_a_clip_of_rich_captions_trains_on_from_the_image_tower_of_another(tmp_path):
    names, rich = tmp_path / "names", tmp_path / "rich"
    assert scene_clip.main([str(names), "--steps", "1", "--device", "cpu"]) == 0
    assert scene_clip.main([str(rich), "--captions", "rich", "--start", str(names), "--steps", "0"]) == 0
    start, clip = CLIPModel.from_pretrained(names), CLIPModel.from_pretrained(rich)
    text = clip.config.text_config
    assert (text.num_hidden_layers, text.vocab_size) == (2, len(AutoTokenizer.from_pretrained(rich)))
    for part in ("vision_model", "visual_projection"):
        expected = getattr(start, part).state_dict()
        for key, value in getattr(clip, part).state_dict().items():
            assert torch.equal(value, expected[key])


def test_the_benchmark_keeps_both_clips_and_trains_the_second_on_from_the_first(tmp_path, monkeypatch):
    trained = []
    train_clip = scene_clip.train_clip
    monkeypatch.setattr(scene_clip, "train_clip", lambda *a, **k: trained.append(k) or train_clip(*a, **k))
    for _ in range(2):
        clip = long_tail.cached_clip(tmp_path, "rich", 1, torch.device("cpu"))
    assert [options["captions"] for options in trained] == ["names", "rich"]
    assert trained[0]["start"] is None
    names = long_tail.cached_clip(tmp_path, "names", 1, torch.device("cpu"))
    begun = trained[1]["start"].vision_model.state_dict()
    assert all(torch.equal(value, begun[key]) for key, value in names.vision_model.state_dict().items())
    assert clip.config.text_config.num_hidden_layers == 2
