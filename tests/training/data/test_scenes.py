"""Built-in scenes: reproducible, honest about their splits, and as their knobs say."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Image
from PIL import Image as PILImage

from training.data import scenes
from training.data.load import load
from training.data.scene_labels import COLOURS, PARTNER, SCENE_LABELS, scene_labels
from training.data.scenes import (
    SPLITS,
    SceneDataset,
    SceneSplit,
    build_scenes,
    source_digits,
)


def pixels(dataset, count):
    return np.stack([np.asarray(dataset[index]["image"]) for index in range(count)])


def test_same_bytes_on_any_machine():
    """The digest was written down once; another platform or library must draw the very same pixels and boxes."""
    drawn = SceneDataset(20, seed=7, cooccurrence=0.3, imbalance=4)
    digest = hashlib.sha256(pixels(drawn, 20).tobytes())
    digest.update(repr([(row["labels"], row["boxes"]) for row in map(drawn.__getitem__, range(20))]).encode())
    assert digest.hexdigest() == "3de059e691308ed99e82923729bec26d83d3f7917020c1d66a8335ffbe3ca8d0"


def test_a_scene_depends_on_seed_split_epoch_and_index_alone():
    first = pixels(SceneDataset(6, seed=1), 6)
    backwards = SceneDataset(9, seed=1)
    for index in (5, 0, 3):
        assert np.array_equal(np.asarray(backwards[index]["image"]), first[index])
    assert not np.array_equal(pixels(SceneDataset(6, seed=2), 6), first)
    assert not np.array_equal(pixels(SceneDataset(6, seed=1, split="test"), 6), first)
    backwards.set_epoch(1)
    assert not any(np.array_equal(new, old) for new, old in zip(pixels(backwards, 6), first, strict=True))
    backwards.set_epoch(0)
    assert np.array_equal(pixels(backwards, 6), first)
    assert len({scene.tobytes() for scene in first}) == 6


def test_workers_that_outlive_an_epoch_draw_the_new_one():
    drawn = SceneDataset(8, seed=1)
    loader = torch.utils.data.DataLoader(
        drawn, batch_size=None, num_workers=2, persistent_workers=True, collate_fn=lambda row: np.asarray(row["image"])
    )
    for epoch in (0, 1):
        drawn.set_epoch(epoch)
        assert np.array_equal(np.stack(list(loader)), pixels(drawn, 8))


def test_splits_share_no_handwritten_digit(monkeypatch):
    images, rows = source_digits()
    of_split = {split: set(np.concatenate(rows[split]).tolist()) for split in SPLITS}
    assert sum(map(len, of_split.values())) == len(images) == 1797
    assert len(set.union(*of_split.values())) == 1797
    # Disjoint not only by number: no two splits hold the same image.
    scans = {split: {images[row].tobytes() for row in of_split[split]} for split in SPLITS}
    assert not (scans["train"] & scans["validation"] or scans["train"] & scans["test"])
    for split in SPLITS:
        shown, glyph = set(), scenes._glyph
        monkeypatch.setattr(
            scenes, "_glyph", lambda row, size, shown=shown, glyph=glyph: shown.add(row) or glyph(row, size)
        )
        for index in range(150):
            SceneDataset(150, split=split)[index]
        monkeypatch.undo()
        assert shown and shown <= of_split[split]


def box_iou(a, b):
    """Independent of the builder: by counting pixels."""
    canvas = np.zeros((2, 64, 64), dtype=bool)
    for layer, box in zip(canvas, (a, b), strict=True):
        layer[box["y"] : box["y"] + box["h"], box["x"] : box["x"] + box["w"]] = True
    return (canvas[0] & canvas[1]).sum() / (canvas[0] | canvas[1]).sum()


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.3])
def test_boxes_agree_with_labels_sizes_and_overlap(overlap):
    counts, sizes, most = Counter(), [], 0.0
    drawn = SceneDataset(300, seed=3, overlap=overlap)
    for row in map(drawn.__getitem__, range(300)):
        boxes = row["boxes"]
        counts[len(boxes)] += 1
        assert row["labels"] == sorted({box["label"] for box in boxes}, key=SCENE_LABELS.index)
        for number, box in enumerate(boxes):
            assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["w"] <= 64 and box["y"] + box["h"] <= 64
            sizes.append(box["h"])
            most = max([most, *(box_iou(box, other) for other in boxes[:number])])
    assert most <= overlap
    assert most > overlap - 0.02  # The knob is used, not merely obeyed.
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 40
    assert 13 <= min(sizes) < 18 and 30 < max(sizes) <= 32


def test_what_a_box_holds_is_visible():
    """Inside a box pixels differ as the contrast says; the same scene with little contrast is flatter there."""

    def spread(contrast):
        drawn = SceneDataset(60, seed=5, contrast=contrast, clutter=0)
        luma = pixels(drawn, 60) @ np.array([0.299, 0.587, 0.114])
        return np.median(
            [
                np.ptp(
                    np.percentile(luma[index, box["y"] : box["y"] + box["h"], box["x"] : box["x"] + box["w"]], [5, 95])
                )
                for index in range(60)
                for box in drawn[index]["boxes"]
            ]
        )

    assert spread((0.5, 0.5)) > 110
    assert spread((0.1, 0.1)) < 80


def test_a_colour_has_the_luma_it_was_asked_for():
    rng = np.random.default_rng(0)
    for luma in rng.uniform(0, 255, 200):
        red, green, blue = scenes._colour(luma, rng.uniform(size=3).tolist())
        assert abs(0.299 * red + 0.587 * green + 0.114 * blue - luma) <= 1


def partner_rate(cooccurrence):
    drawn = SceneDataset(400, seed=2, min_objects=2, max_objects=2, max_size=20, cooccurrence=cooccurrence)
    pairs = [[SCENE_LABELS.index(box["label"]) for box in drawn[index]["boxes"]] for index in range(400)]
    return np.mean([PARTNER[a] == b for a, b in pairs])


def test_cooccurrence_is_the_probability_of_the_partner():
    assert partner_rate(1.0) == 1.0
    assert partner_rate(0.5) == pytest.approx(0.5 + 0.5 * 0.1, abs=0.08)
    assert partner_rate(0.0) == pytest.approx(0.1, abs=0.05)
    assert all(PARTNER[PARTNER[digit]] == digit != PARTNER[digit] for digit in range(10))


@pytest.mark.parametrize("imbalance", [1, 20])
def test_imbalance_is_head_over_tail(imbalance):
    drawn = SceneDataset(4000, seed=4, max_objects=1, image_size=16, max_size=16, clutter=0, imbalance=imbalance)
    counts = Counter(drawn[index]["labels"][0] for index in range(4000))
    frequency = np.array([counts[name] for name in SCENE_LABELS]) / 4000
    expected = float(imbalance) ** (-np.arange(10) / 9)
    expected /= expected.sum()
    assert np.abs(frequency - expected).max() < 4 * np.sqrt(0.1 / 4000)


def test_build_scenes_embeds_the_drawn_pixels():
    built = build_scenes({"train": 5, "validation": 3}, seed=1, image_size=48)
    assert {name: len(split) for name, split in built.items()} == {"train": 5, "validation": 3}
    drawn = SceneDataset(3, seed=1, split="validation", image_size=48)
    for index, row in enumerate(built["validation"]):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(drawn[index]["image"]))
        assert row["image"].size == (48, 48)
        assert row["labels"] == drawn[index]["labels"]
        assert [SCENE_LABELS[box["label"]] for box in row["boxes"]] == [box["label"] for box in drawn[index]["boxes"]]
    raw = built["train"].cast_column("image", Image(decode=False))[4]["image"]
    assert raw["bytes"].startswith(b"\x89PNG") and raw["path"] == "train-000004.png"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"split": "dev"}, "split='dev'"),
        ({"seed": -1}, "seed=-1"),
        ({"min_objects": 0}, "min_objects=0"),
        ({"min_objects": 5}, "min_objects=5"),
        ({"max_size": 65}, "max_size=65"),
        ({"min_size": 4}, "min_size=4"),
        ({"overlap": 1.5}, "overlap=1.5"),
        ({"contrast": (0.9, 0.2)}, "contrast="),
        ({"cooccurrence": 2}, "cooccurrence=2"),
        ({"cooccurrence": 0.5, "max_objects": 1}, "max_objects"),
        ({"imbalance": 0.5}, "imbalance=0.5"),
        ({"clutter": -1}, "clutter=-1"),
        ({"colours": 9}, "colours=9"),
        ({"places": 0}, "places=0"),
    ],
)
def test_impossible_settings_are_refused_by_name(setting, named):
    with pytest.raises(ValueError, match=named):
        SceneDataset(10, **setting)


def test_labels_of_compositions():
    assert scene_labels() == SCENE_LABELS
    names = scene_labels(8, 5)
    assert len(set(names)) == len(names) == 2000
    assert names[:2] == ("red zero top far left", "red zero top left") and names[-1] == "purple nine bottom far right"
    assert scene_labels(2)[:3] == ("red zero", "green zero", "red one")
    assert scene_labels(places=2)[:5] == (
        "zero top left",
        "zero top right",
        "zero bottom left",
        "zero bottom right",
        "one top left",
    )


@pytest.mark.parametrize(("colours", "places"), [(8, 5), (3, 1), (0, 3)])
def test_compositions_name_what_is_drawn(colours, places):
    """The digit of the same scene without names, the colour nearest to the brightest ink, the place by its bounds."""
    same = {"seed": 6, "clutter": 0, "overlap": 0.0}
    drawn, plain = SceneDataset(80, colours=colours, places=places, **same), SceneDataset(80, **same)
    palette, seen = np.array(list(COLOURS.values())[:colours]), set()
    rows = ["top", "upper", "middle", "lower", "bottom"] if places == 5 else ["top", "middle", "bottom"]
    columns = ["far left", "left", "centre", "right", "far right"] if places == 5 else ["left", "centre", "right"]
    for index in range(80):
        row = drawn[index]
        image = np.asarray(row["image"]).astype(int)
        assert set(row["labels"]) == {box["label"] for box in row["boxes"]}
        assert row["labels"] == sorted(row["labels"], key=drawn.label_names.index)
        for box, digit in zip(row["boxes"], plain[index]["boxes"], strict=True):
            expected = [digit["label"]]
            if colours:
                ink = image[box["y"] : box["y"] + box["h"], box["x"] : box["x"] + box["w"]].reshape(-1, 3)
                brightest = ink[np.argsort(ink.max(1))[-len(ink) // 8 :]].mean(0)
                expected.insert(0, list(COLOURS)[np.abs(palette - brightest).sum(1).argmin()])
            if places > 1:
                for at, side, words in ((box["y"], box["h"], rows), (box["x"], box["w"], columns)):
                    bounds = np.linspace(0, 64 - side + 1, places + 1)  # of the places that a corner can be in
                    expected.append(words[np.searchsorted(bounds, at, side="right") - 1])
            assert box["label"] == " ".join(expected)
            seen.add(box["label"])
    assert len(seen) > min(100, 8 * colours * places)


def test_compositions_are_read_as_a_data_set():
    options = {"num_scenes": {"train": 4, "validation": 3}, "colours": 8, "places": 5, "seed": 2}
    loaded = load("scenes", scenes=options, splits=["train", "validation"], fresh_scenes=True)
    assert loaded.label_names == list(scene_labels(8, 5))
    for name, size in options["num_scenes"].items():
        expected = SceneDataset(size, split=name, colours=8, places=5, seed=2)
        for index in range(size):
            found = loaded.splits[name][index]["labels"].coalesce().indices()[0].tolist()
            assert [loaded.label_names[label] for label in found] == expected[index]["labels"]
    with pytest.raises(ValueError, match=r"red zero, green zero, .*\.\.\.; take these"):
        SceneSplit(3, colours=2, label_names=SCENE_LABELS)


def test_index_out_of_range_ends_iteration():
    assert len(list(SceneDataset(3))) == 3
    with pytest.raises(IndexError):
        SceneDataset(3)[3]


def test_scenes_are_written_as_an_image_folder(tmp_path, capsys):
    folder = tmp_path / "scenes" / "test"
    argv = [str(folder), "--num_scenes", "3", "--seed", "5", "--scenes", '{"image_size": 48}']
    assert scenes.main(argv) == 0
    expected = SceneDataset(3, seed=5, split="test", image_size=48)
    loaded = load(str(tmp_path / "scenes"))
    splits, names = loaded.splits, loaded.label_names
    for index in range(3):
        with PILImage.open(folder / f"{index:05d}.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected[index]["image"]))
        assert [names[label] for label in splits["test"].labels.entries(index)[0]] == sorted(expected[index]["labels"])
    with pytest.raises(SystemExit):
        scenes.main(argv)
    assert "--overwrite" in capsys.readouterr().err
    assert scenes.main([*argv, "--overwrite"]) == 0
    with pytest.raises(SystemExit):
        scenes.main([*argv, "--overwrite", "--scenes", '{"colour": 1}'])
