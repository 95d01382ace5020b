"""The benchmark of labels never trained on, on made squares and a tiny random backbone."""

import json

import pytest
import torch

from benchmarks.accuracy import unseen_labels as accuracy
from modeling_hsvlt import EfficientNetLiteBackbone, EfficientNetLiteConfig

from .test_heads import LABELS, TINY, dataset  # noqa: F401  (a fixture)


@pytest.fixture
def tiny(monkeypatch):
    def load_backbone(out_features=None):
        torch.manual_seed(0)
        return EfficientNetLiteBackbone(EfficientNetLiteConfig(**TINY, out_features=out_features)).eval()

    def texts(names):  # of a name alone, whatever the others
        return torch.stack([torch.randn(8, generator=torch.Generator().manual_seed(sum(map(ord, n)))) for n in names])

    classes = (torch.randn(5, TINY["head_channels"], generator=torch.Generator().manual_seed(1)), list("abcde"))
    monkeypatch.setattr(accuracy, "load_backbone", load_backbone)
    monkeypatch.setattr(accuracy, "load_classifier", lambda: classes)
    monkeypatch.setattr(accuracy, "read_label_texts", texts)
    monkeypatch.setattr(accuracy, "LEFT_OUT", 1)
    monkeypatch.setattr(accuracy, "RENAMED", {name: (f"{name}ish", f"quite {name}") for name in LABELS})
    original = accuracy.RECIPES["hsvlt"]
    fields = {**original.model, "num_attention_heads": 2}
    monkeypatch.setitem(accuracy.RECIPES, "hsvlt", accuracy.replace(original, model=fields))


def command(dataset, tmp_path, *options):  # noqa: F811
    argv = ["--dataset", str(dataset / "data"), "--cache", str(tmp_path / "cache"), "--epochs", "1", "--seeds", "2"]
    return accuracy.main([*argv, "--label_width", "8", "--json", str(tmp_path / "table.json"), *options])


def test_no_label_is_left_out_twice():
    draws = accuracy.left_out_labels(20, seed=0)
    assert draws == accuracy.left_out_labels(20, seed=0) != accuracy.left_out_labels(20, seed=1)
    assert len({each for draw in draws for each in draw}) == accuracy.DRAWS * accuracy.LEFT_OUT


@pytest.mark.parametrize("where", [(), ("--choose",)])
def test_every_row_is_measured_without_the_labels_left_out(dataset, tiny, tmp_path, monkeypatch, capsys, where):  # noqa: F811
    trained = []
    train_head = accuracy.train_head

    def spy(model, recipe, cache, rows, seed):
        trained.append((cache.labels.shape[1], len(rows)))
        return train_head(model, recipe, cache, rows, seed)

    monkeypatch.setattr(accuracy, "train_head", spy)
    assert command(dataset, tmp_path, *where) == 0
    images = 16 if where else 24
    assert trained == 2 * [(3, images), (2, images), (2, images)]
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table["unseen"]) == 7 and all(len(values) == 2 for values in table["unseen"].values())
    assert len(table["renamed"]) == 4 * 3 and "HSVLT: other names, 2" in table["renamed"]
    for values in (*table["unseen"].values(), *table["renamed"].values()):
        assert all(0 <= value <= 100 for value in values)
    printed = capsys.readouterr().out
    assert "times random" in printed and "| HSVLT, residual attention |" in printed


def test_names_without_another_are_refused(dataset, tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(accuracy, "RENAMED", {"red": ("scarlet", "crimson")})
    assert command(dataset, tmp_path) == 2
    assert "no other names for blue, green" in capsys.readouterr().err
    assert command(dataset, tmp_path, "--no_renamed") == 0
    assert len(json.loads((tmp_path / "table.json").read_text())["renamed"]) == 4


def test_alignment_scores_the_text_that_its_pixels_show():
    texts, start = torch.eye(3), torch.eye(3, 6)
    model = accuracy.Alignment(start, texts, "bce", None)
    maps = torch.zeros(3, 6, 4, 4)
    for image in range(3):
        maps[image, image, :2] = 1.0  # in half of its pixels
    logits = model((maps,)).logits
    assert (logits.argmax(1) == torch.arange(3)).all()
    # The norm leaves its pixels sqrt 5 where it shows itself, and nothing of the others.
    torch.testing.assert_close(logits.diagonal(), torch.full((3,), (5**0.5 / 2 + 5**0.5) / 2 - 4), rtol=1e-3, atol=1e-3)
