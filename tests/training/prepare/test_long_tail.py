from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from training.check.imbalance import long_tail_groups
from training.data.load import load
from training.prepare.long_tail import (
    PUBLISHED,
    co_occurrence_order,
    draw_episode,
    draw_long_tail,
    main,
    pareto_targets,
    read_list,
)

LISTS = Path(__file__).parents[3] / "../shared/data/long_tail"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="the published lists are not in ../shared/data/long_tail")

# What the construction of the published splits aims at, as recorded in their repository.
VOC_TARGETS = [800, 529, 359, 248, 175, 125, 91, 67, 50, 38, 29, 23, 18, 14, 11, 9, 7, 6, 5, 4]


@needs_lists
@pytest.mark.parametrize(
    ("name", "most", "labels", "groups"), [("coco", 14, 8316, (22, 33, 25)), ("voc", 6, 2346, (6, 6, 8))]
)
def test_published_lists_parse_to_the_published_counts(name, most, labels, groups):
    published = PUBLISHED[name]
    train, test = (
        read_list(LISTS / f"{name}_lt_{split}.txt", len(published.label_names)) for split in ("train", "test")
    )
    assert (len(train), len(test)) == (published.num_train, published.num_test)
    counts = np.bincount([label for _, row in train for label in row])
    assert counts.tolist() == published.positives
    assert counts.sum() == labels
    lengths = [len(row) for _, row in train]
    assert (min(lengths), max(lengths)) == (1, most)
    # F6: groups at 100 and 20 positives, the bounds included.
    assert tuple(len(group) for group in long_tail_groups(counts).values()) == groups
    if name == "coco":
        assert sum(not row for _, row in test) == 48


def test_the_total_recombines_from_the_groups():
    # F6: with every label in one group, the total is the mean of the groups weighted by their sizes.
    for published in PUBLISHED.values():
        groups = long_tail_groups(np.array(published.positives))
        ap = np.random.default_rng(0).random(len(published.positives))
        weighted = sum(len(labels) * ap[labels].mean() for labels in groups.values())
        assert weighted == pytest.approx(len(ap) * ap.mean())


def test_targets_are_those_of_the_published_splits():
    assert pareto_targets(20, 800).tolist() == VOC_TARGETS
    coco = pareto_targets(80, 1200)
    assert coco[:3].tolist() == [1200, 1084, 981]
    assert coco[-3:].tolist() == [7, 6, 6]
    with pytest.raises(ValueError, match="must fall"):
        pareto_targets(5, 10, smallest=20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 0 2\nb.jpg 3\n", "line 2: '3' is no label index; use 0 to 2"),
        ("a.jpg 0\nb.jpg x", "line 2: 'x' is no label index"),
        ("a.jpg -1", "line 1: '-1' is no label index"),
        ("a.jpg 1 1", "line 1: 'a.jpg 1 1' names a label twice"),
        ("a.jpg 1\n\nb.jpg 1", "line 2 is '', but must begin with a path"),
        ("../a.jpg 1", "must begin with a path below the images"),
    ],
)
def test_wrong_lists_are_refused_by_line(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "list.txt", 3)


def test_a_line_may_lack_labels_and_a_last_line_its_end(tmp_path):
    (tmp_path / "list.txt").write_text("a.jpg 0 2 \nb.jpg\nc/d.jpg 1")
    assert read_list(tmp_path / "list.txt", 3) == [("a.jpg", [0, 2]), ("b.jpg", []), ("c/d.jpg", [1])]


def random_labels(seed=0, images=3000, num_labels=8):
    random = np.random.default_rng(seed)
    present = random.random((images, num_labels)) < random.uniform(0.05, 0.4, num_labels)
    present[:, 1] |= present[:, 0]  # label 1 comes with every 0
    return present


def test_co_occurrence_order_matches_a_loop():
    present = random_labels()
    sums = [sum((present[:, i] & present[:, j]).sum() / present[:, i].sum() for i in range(8)) for j in range(8)]
    assert co_occurrence_order(present).tolist() == sorted(range(8), key=lambda label: -sums[label])


def test_draw_follows_the_targets():
    present = random_labels()
    targets = pareto_targets(8, 300)
    rows = draw_long_tail(present, targets, seed=3)
    assert np.array_equal(rows, draw_long_tail(present, targets, seed=3))
    assert not np.array_equal(rows, draw_long_tail(present, targets, seed=4))
    assert (np.diff(rows) > 0).all()
    order = co_occurrence_order(present)
    counts = present[rows].sum(0)[order]
    assert counts[-1] == targets[-1]
    # Labels that are visited later take images away again, so that no early one ends above its target by much.
    assert (counts >= 1).all()
    assert np.corrcoef(np.log(counts), np.log(targets))[0, 1] > 0.9


def test_draw_is_capped_by_what_there_is():
    present = np.eye(4, dtype=bool)[[0] * 5 + [1] * 3 + [2] * 2 + [3]]
    assert present[draw_long_tail(present, [4, 4, 4, 4])].sum(0).tolist() == [4, 3, 2, 1]
    with pytest.raises(ValueError, match="2 targets for 4 labels"):
        draw_long_tail(present, [4, 4])


def test_episodes_have_their_shots():
    present = random_labels()
    for shots in (1, 5):
        rows = draw_episode(present, shots, seed=1)
        counts = present[rows].sum(0)
        assert (counts >= shots).all()
        assert counts.min() == shots
        assert len(rows) <= shots * present.shape[1]
    assert not np.array_equal(rows, draw_episode(present, 5, seed=2))
    with pytest.raises(ValueError, match="Label 0 has 0 images, fewer than 1 shots"):
        draw_episode(np.zeros((3, 2), dtype=bool), 1)


# ---- commands


def image_files(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)


def lists(split):
    """Ids of each row."""
    return split.labels.lists(as_ids=True).to_pylist()


def test_lists_command_writes_a_dataset(tmp_path, capsys):
    image_files(tmp_path / "images", ["VOCdevkit/1.jpg", "VOCdevkit/2.jpg", "VOCdevkit/3.jpg"])
    (tmp_path / "train.txt").write_text("VOCdevkit/1.jpg 0 19\nVOCdevkit/2.jpg 4")
    (tmp_path / "test.txt").write_text("VOCdevkit/3.jpg 14\n")
    arguments = [str(tmp_path / name) for name in ("train.txt", "test.txt", "images", "target")]
    assert main(["lists", "voc", *arguments]) == 0
    assert "2 images, 3 labels: NOT the published split" in capsys.readouterr().out
    loaded = load(tmp_path / "target")
    splits, names = loaded.splits, loaded.label_names
    assert names == PUBLISHED["voc"].label_names
    assert lists(splits["train"]) == [[0, 19], [4]]
    assert load_dataset(str(tmp_path / "target"))["test"][0]["image"].size == (8, 8)
    assert main(["lists", "voc", *arguments]) == 2
    assert "exists" in capsys.readouterr().err


@needs_lists
def test_lists_command_names_missing_images(tmp_path, capsys):
    lists = [str(LISTS / "voc_lt_train.txt"), str(LISTS / "voc_lt_test.txt")]
    assert main(["lists", "voc", *lists, str(tmp_path), str(tmp_path / "target")]) == 2
    printed = capsys.readouterr()
    assert "1,142 images, 2,346 labels: the published split" in printed.out
    assert "2008_000023.jpg" in printed.err


@pytest.fixture
def folder(tmp_path):
    """60 images a split with labels among four."""
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        lines = []
        for number in range(60):
            present = [
                name for name, chance in zip("abcd", (0.7, 0.5, 0.4, 0.4), strict=True) if random.random() < chance
            ]
            present = present or ["a"]
            lines.append(f'{{"file_name": "{number}.png", "labels": {present}}}'.replace("'", '"'))
        image_files(tmp_path / "data" / split, [f"{number}.png" for number in range(60)])
        (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


def test_draw_command(folder, capsys):
    assert main(["draw", str(folder), str(folder.parent / "drawn"), "--largest", "30"]) == 0
    loaded = load(folder)
    before, names = loaded.splits, loaded.label_names
    loaded = load(folder.parent / "drawn")
    after, same_names = loaded.splits, loaded.label_names
    assert same_names == names == list("abcd")
    assert len(after["test"]) == 60
    assert 0 < len(after["train"]) < len(before["train"])
    counts = np.bincount(np.concatenate(lists(after["train"])), minlength=4)
    assert counts.min() <= 3
    assert f"positives in train: {counts.tolist()}" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", ["keep", "drop"])
def test_episodes_command(folder, mixed):
    target = folder.parent / "few"
    arguments = ["--novel", "d", "b", "--shots", "2", "--episodes", "2", "--mixed", mixed]
    assert main(["episodes", str(folder), str(target), *arguments]) == 0
    loaded = load(folder)
    source, names = loaded.splits, loaded.label_names
    loaded = load(target / "base")
    base, base_names = loaded.splits, loaded.label_names
    assert base_names == ["a", "c"]
    novel_ids = {names.index("b"), names.index("d")}
    wanted = [set(row) for row in lists(source["train"])]
    wanted = [row for row in wanted if row - novel_ids and (mixed == "keep" or not row & novel_ids)]
    assert len(base["train"]) == len(wanted)
    for episode in ("episode-00", "episode-01"):
        loaded = load(target / episode)
        splits, novel_names = loaded.splits, loaded.label_names
        assert novel_names == ["d", "b"]
        counts = np.bincount(np.concatenate(lists(splits["train"])), minlength=2)
        assert counts.min() == 2
        assert len(splits["train"]) <= 4
        assert all(lists(splits["test"]))


def test_episodes_command_names_an_unknown_label(folder, capsys):
    assert main(["episodes", str(folder), str(folder.parent / "few"), "--novel", "zebra"]) == 2
    assert "'zebra' is not among the 4 label names" in capsys.readouterr().err
