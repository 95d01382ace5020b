import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import heads as accuracy
from benchmarks.accuracy.features import FeatureCache, ImageCache
from benchmarks.accuracy.hsvlt_parts import ABLATIONS
from modeling_hsvlt import EfficientNetLiteBackbone, EfficientNetLiteConfig
from training import evaluate
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.scoring import held_out

TINY = {
    "stem_channels": 8,
    "group_channels": [8, 8, 8, 8, 8, 16, 16],
    "group_depths": [1, 1, 1, 1, 1, 1, 1],
    "head_channels": 16,
}
LABELS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def write_split(folder, count, seed):
    """Images of coloured squares, one a label that is present."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as rows:
        for index in range(count):
            pixels = generator.integers(0, 60, (40, 48, 3), dtype=np.uint8)
            present = [name for k, name in enumerate(LABELS) if index % 3 == k or generator.random() < 0.3]
            for place, name in enumerate(present):
                pixels[5 + 10 * place : 14 + 10 * place, 8:24] = LABELS[name]
            Image.fromarray(pixels).save(folder / f"{index}.png")
            rows.write(json.dumps({"file_name": f"{index}.png", "labels": present}) + "\n")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    for seed, (split, count) in enumerate({"train": 24, "validation": 18, "test": 12}.items()):
        write_split(folder / "data" / split, count, seed)
    (folder / "data" / "test").rename(folder / "test")
    (folder / "data" / "labels.txt").write_text("\n".join(LABELS))
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """A small random backbone and small random label texts; everything else is the command itself."""

    def load_backbone(out_features=None, name="efficientnet_lite0"):
        torch.manual_seed(0)
        return EfficientNetLiteBackbone(EfficientNetLiteConfig(**TINY, out_features=out_features)).eval()

    monkeypatch.setattr(accuracy, "load_backbone", load_backbone)
    monkeypatch.setattr(
        accuracy, "load_classifier", lambda name: (torch.randn(5, TINY["head_channels"]), list("abcde"))
    )
    monkeypatch.setattr(accuracy, "read_label_texts", lambda names: torch.randn(len(names), 8))


def command(dataset, tmp_path, *options):
    argv = ["--dataset", str(dataset / "data"), "--cache", str(tmp_path / "cache"), "--epochs", "1", "--seeds", "1"]
    return accuracy.main([*argv, "--json", str(tmp_path / "table.json"), *options])


@pytest.mark.parametrize("budget", ["frozen", "finetune"])
def test_the_json_maps_each_head_to_its_figures(budget, dataset, tiny, tmp_path, capsys):
    assert command(dataset, tmp_path, "--budget", budget, "--heads", "linear", "hsvlt") == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert list(table) == ["linear", "hsvlt"]
    above = table["hsvlt"].pop("above_first")
    assert above["mAP"]["mean"] == pytest.approx(table["hsvlt"]["mAP"]["mean"] - table["linear"]["mAP"]["mean"])
    assert list(above) == ["mAP", "head", "medium", "tail"]
    for row in table.values():
        assert list(row) == ["mAP", "head", "medium", "tail", "macro_f1"]
        for cell in row.values():
            assert list(cell) == ["mean", "std"] and 0 <= cell["mean"] <= 1 and cell["std"] == 0
        assert row["mAP"]["mean"] == pytest.approx(np.mean([row[k]["mean"] for k in ("head", "medium", "tail")]))
    printed = capsys.readouterr().out
    assert "train 24 images, validation 18 images" in printed and "| hsvlt |" in printed and budget in printed


def test_the_test_split_is_measured_and_saved_runs_score_the_same(dataset, tiny, tmp_path):
    # From images: the rounding of cached maps to fp16 can swap ranks among a dozen images.
    options = [
        "--budget",
        "finetune",
        "--heads",
        "linear",
        "hsvlt",
        "--test",
        str(dataset / "test"),
        "--save",
        str(tmp_path / "runs"),
    ]
    assert command(dataset, tmp_path, *options) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    for head, row in table.items():
        argv = [str(tmp_path / "runs" / head), str(dataset), "--split", "test", "--use_checkpoint_labels"]
        argv += ["--threshold", "auto", "--output", str(tmp_path / f"scored-{head}")]
        assert evaluate.main(argv) == 0
        metrics = json.loads((tmp_path / f"scored-{head}" / "results.json").read_text())["metrics"]
        assert metrics["mAP"] == pytest.approx(row["mAP"]["mean"], abs=1e-3)
        assert metrics["f1_macro"] == pytest.approx(row["macro_f1"]["mean"], abs=1e-3)


@pytest.mark.one_machine
def test_a_run_repeats(dataset, tiny, tmp_path):
    tables = []
    for _ in range(2):
        assert command(dataset, tmp_path, "--heads", "linear") == 0
        tables.append(json.loads((tmp_path / "table.json").read_text()))
    assert tables[0] == tables[1]


def test_each_seed_draws_images_of_its_own(dataset, tiny, tmp_path, monkeypatch, capsys):
    drawn = []

    def train_head(model, recipe, cache, rows, seed):
        drawn.append(rows.tolist())
        return model.eval()

    monkeypatch.setattr(accuracy, "train_head", train_head)
    assert command(dataset, tmp_path, "--heads", "linear", "--seeds", "2", "--images", "10") == 0
    assert "10 images, efficientnet_lite0" in capsys.readouterr().out
    for seed, rows in enumerate(drawn):  # the draws of training/configs/README.md
        random.seed(seed)
        assert rows == random.sample(list(range(24)), 10)
    assert command(dataset, tmp_path, "--heads", "linear", "--images", "all") == 0
    assert drawn[-1] == list(range(24))
    assert command(dataset, tmp_path, "--heads", "linear", "--images", "25") == 2
    assert "train has 24" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(dataset, tmp_path, "--images", "0")


def test_the_trunk_decides_the_size_of_its_images(dataset, tiny, tmp_path, monkeypatch):
    asked = []
    small = accuracy.load_backbone

    def load_backbone(out_features, name):
        asked.append(name)
        backbone = small(out_features, name)
        backbone.config.image_size = 64
        return backbone

    monkeypatch.setattr(accuracy, "load_backbone", load_backbone)
    monkeypatch.setattr(accuracy, "train_head", lambda model, recipe, cache, rows, seed: model.eval())
    save = ["--save", str(tmp_path / "runs")]
    assert command(dataset, tmp_path, "--heads", "linear", "--backbone", "efficientnet_lite2", *save) == 0
    processor = json.loads((tmp_path / "runs" / "linear" / "preprocessor_config.json").read_text())
    assert asked == ["efficientnet_lite2"] and processor["size"] == {"height": 64, "width": 64}


@pytest.mark.slow
def test_every_ablation_trains(dataset, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "multiply_adds", lambda *_: 10**6)  # counted above, and slowly
    assert command(dataset, tmp_path, "--ablation") == 0
    assert list(json.loads((tmp_path / "table.json").read_text())) == list(ABLATIONS)


def test_thirds_of_labels():
    groups = accuracy.label_groups(np.array([5, 100, 7, 7, 1, 2, 60, 3]))
    assert {name: list(group) for name, group in groups.items()} == {
        "head": [1, 6, 2],
        "medium": [3, 0, 7],
        "tail": [5, 4],
    }
    assert len(accuracy.label_groups(np.arange(20))["tail"]) == 6


def test_thresholds_never_see_what_they_decide(monkeypatch):
    seen = []

    def fit(scores, labels, *_, **options):
        seen.append(scores)
        return np.full(scores.shape[1], 0.5, dtype=np.float32)

    for module in (accuracy, held_out):
        monkeypatch.setattr(module, "fit_thresholds", fit)
    scores = np.random.default_rng(0).random((11, 3)).astype(np.float32)
    labels = (scores > 0.4).astype(np.float32)
    groups = accuracy.label_groups(labels.sum(0))
    accuracy.measure(scores, labels, groups, None)
    first, second = ({float(value) for value in half[:, 0]} for half in seen)
    assert not first & second and len(first | second) == 11
    validation = (scores[:4], labels[:4])
    accuracy.measure(scores, labels, groups, validation)
    assert len(seen) == 3 and seen[2] is validation[0]


def test_cached_maps_are_the_backbone_s(dataset, tiny, tmp_path):
    loaded = load(dataset / "data")
    splits, names = loaded.splits, loaded.label_names
    backbone = accuracy.load_backbone(accuracy.OUT_FEATURES)
    images = MultiLabelDataset(splits["validation"], names, accuracy.image_processor(32))
    cache = FeatureCache(images, backbone, tmp_path, "validation")
    rows, mirrored = torch.tensor([3, 0]), torch.tensor([True, False])
    pixels = ImageCache(images).batch(rows, mirrored)
    with torch.inference_mode():
        expected = backbone(pixels).feature_maps
    for each, other in zip(cache.batch(rows, mirrored), expected, strict=True):
        torch.testing.assert_close(each, other, atol=2e-3, rtol=2e-3)
    (last,) = cache.last_map().batch(rows, mirrored)
    torch.testing.assert_close(last, expected[-1], atol=2e-3, rtol=2e-3)
    assert torch.equal(cache.labels[3], images[3]["labels"].to_dense())
    (store,) = tmp_path.iterdir()
    written = (store / "maps.bin").stat().st_size
    FeatureCache(images, backbone, tmp_path, "validation")  # found again, not computed again
    assert list(tmp_path.iterdir()) == [store] and (store / "maps.bin").stat().st_size == written
    FeatureCache(images, backbone, tmp_path / "alone", "validation", mirrored=False)
    (alone,) = (tmp_path / "alone").glob("*/maps.bin")
    assert alone.stat().st_size == written // 2


def test_what_is_refused(dataset, tiny, tmp_path, capsys):
    assert command(dataset, tmp_path, "--heads", "linear", "--test", str(dataset / "data")) == 2
    assert "give the folder of the one to be measured" in capsys.readouterr().err
