"""From any source to uniform batches: same rows from every format, the processor's very pixels, clear refusals."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import send_to_device
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

import training.data.dataset as data
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.data.batches import MultiLabelCollator, SparseBatch, normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.scene_labels import SCENE_LABELS
from training.data.scenes import SceneSplit

NAMES = ["dog", "cat", "tv monitor"]
LABELS = [["cat"], [], ["dog", "tv monitor"], ["cat", "dog"], ["tv monitor"]]
MULTI_HOT = np.array([[name in labels for name in NAMES] for labels in LABELS], dtype=np.float32)
SHARED = Path(__file__).parents[4] / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the photographs of ../shared/data are not on this machine"
)


def metadata_rows(folder):
    """What lies outside the project may change, so its tests count against the list that is there."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().split("\n") if line.strip()]


def image(number, size=(50, 40)):
    return PILImage.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def encoded(number):
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{number}.png"}


def embedded(labels, feature, count=5):
    columns = {"image": [encoded(number) for number in range(count)], "labels": labels[:count]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "labels": feature}))


def dense(split, names=NAMES):
    return np.stack([sample["labels"].to_dense().numpy() for sample in MultiLabelDataset(split, names, squash(8))])


def squash(size, **kwargs):
    return MultiLabelImageProcessor(size={"height": size, "width": size}, **kwargs)


IDS = [[NAMES.index(name) for name in labels] for labels in LABELS]


def test_one_soft_or_unknown_entry_makes_nothing_dense():
    known, unknown = MULTI_HOT.tolist(), [[1, None, 0], *MULTI_HOT[1:].tolist()]
    source = DatasetDict(train=embedded(unknown, List(Value("float32"))), test=embedded(known, List(Value("float32"))))
    splits = load(source, label_names=NAMES).splits
    assert dense(splits["train"])[0].tolist() == [1, -100, 0] and np.array_equal(dense(splits["test"]), MULTI_HOT)
    assert splits["test"].labels.values.size == MULTI_HOT.sum() and splits["train"].labels.values.size == 7
    assert splits["train"][0]["labels"].is_sparse


def test_ten_thousand_labels_stay_sparse_until_the_device():
    names = [f"label {number}" for number in range(10_000)]
    splits = load(embedded([[9_999, 3], [], None, [5], [5]], List(ClassLabel(names=names)))).splits
    dataset = MultiLabelDataset(splits["train"], names, squash(8))
    samples = [dataset[row] for row in range(4)]
    assert [sample["labels"].is_sparse for sample in samples] == [True, True, False, True]
    assert samples[0]["labels"].values().numel() == 2
    labels = MultiLabelCollator(10_000)(samples)["labels"]
    assert labels.shape == (4, 10_000) and not labels.is_sparse
    assert MultiLabelCollator(10_000, sparse_labels=True)(samples)["labels"].equal(labels)  # one is dense
    del samples[2]
    batch = send_to_device(MultiLabelCollator(10_000, sparse_labels=True)(samples), "cpu")["labels"]
    assert isinstance(batch, SparseBatch) and len(batch) == 3 and len(pickle.dumps(batch)) < 2000
    assert batch.to_dense().equal(labels[[0, 1, 3]])
    assert send_to_device(batch, "meta").to_dense().is_meta  # made dense where it was sent
    with pytest.raises(ValueError, match="10000 labels for the 9999 of the model"):
        MultiLabelCollator(9_999, sparse_labels=True)(samples)
    assert labels[0].nonzero().flatten().tolist() == [3, 9_999] and (labels[2] == -100).all()


def test_labels_are_hidden_in_the_dataset_alone(image_folder):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    hidden = MultiLabelDataset(splits["train"], names, squash(8), partial_labels={"single_positive": True, "seed": 3})
    labels = MultiLabelCollator(3)([hidden[row] for row in range(5)])["labels"].numpy()
    assert np.isin(labels, (1, -100)).all() and (MULTI_HOT[labels == 1] == 1).all()
    assert ((labels == 1).sum(1) == MULTI_HOT.any(1)).all()
    assert np.array_equal(dense(splits["train"]), MULTI_HOT)
    assert hidden.sparse_labels.positives().sum() == 4
    with pytest.raises(ValueError, match="set fresh_scenes to false"):
        MultiLabelDataset(SceneSplit(3), SCENE_LABELS, squash(64), partial_labels={"known_fraction": 0.5})


@pytest.mark.parametrize(
    "processor",
    [
        squash(32),
        MultiLabelImageProcessor(
            size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 32},
            image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4],
        ),
        squash(32, do_normalize=False),
        squash(32, do_rescale=False, do_normalize=False),
    ],
    ids=["squash", "center_crop", "unit_range", "bytes"],
)  # fmt: skip
def test_evaluation_pixels_are_the_processors_own(image_folder, processor):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    batch = MultiLabelCollator(3)([MultiLabelDataset(splits["train"], names, processor)[index] for index in range(5)])
    assert batch["pixel_values"].dtype == torch.uint8
    expected = processor(images=[image(number) for number in range(5)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalize_pixels(batch["pixel_values"], processor), expected.float(), rtol=0, atol=1e-6)
    normalized = MultiLabelCollator(3, processor)([MultiLabelDataset(splits["train"], names, processor)[2]])
    torch.testing.assert_close(normalized["pixel_values"], expected[2:3].float(), rtol=0, atol=1e-6)


SQUARE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("processor", "passes"),
    [
        (squash(32), {(32, 32)}),
        (MultiLabelImageProcessor(size={"height": 32, "width": 48}), {(48, 32)}),
        (MultiLabelImageProcessor(size={"shortest_edge": 36}, do_center_crop=True, crop_size=SQUARE), set()),
        (MultiLabelImageProcessor(size={"shortest_edge": 32}, do_center_crop=True, crop_size=SQUARE), {(32, 32)}),
    ],
    ids=["squash", "oblong", "enlarged", "cropped"],
)  # fmt: skip
def test_what_the_processor_leaves_as_it_is_does_not_pass_it(processor, passes, monkeypatch):
    sizes = [(32, 32), (48, 32), (32, 48), (36, 36)]
    resize, calls, call = data.ImageResizer(processor), [], MultiLabelImageProcessor.__call__
    monkeypatch.setattr(MultiLabelImageProcessor, "__call__", lambda *a, **k: calls.append(1) or call(*a, **k))
    for size in sizes:
        calls.clear()
        pixels, skipped = resize(image(3, size)), not calls
        expected = processor(images=image(3, size), do_rescale=False, do_normalize=False, return_tensors="pt")
        assert torch.equal(pixels, expected["pixel_values"][0])
        assert skipped == (size in passes)
    assert resize(image(3).convert("L").resize((32, 32))).shape[0] == 3


def test_a_margin_leaves_room_for_a_crop_and_loses_nothing(image_folder):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    sample = MultiLabelDataset(splits["train"], names, squash(32), margin=0.125)[1]
    expected = np.asarray(image(1).resize((36, 36), squash(32).resample)).transpose(2, 0, 1)
    assert np.array_equal(sample["pixel_values"], expected)
    cropping = MultiLabelImageProcessor(
        size={"shortest_edge": 36}, do_center_crop=True, crop_size={"height": 32, "width": 48}
    )
    assert MultiLabelDataset(splits["train"], names, cropping, margin=0.25)[0]["pixel_values"].shape == (3, 40, 60)


def test_large_jpegs_are_decoded_at_reduced_size_in_training_alone(tmp_path):
    x, y = np.meshgrid(np.linspace(0, 255, 1600), np.linspace(0, 255, 1200))
    photo = PILImage.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))
    photo.save(tmp_path / "photo.jpg", quality=95)
    rows = Dataset.from_dict(
        {"image": [str(tmp_path / "photo.jpg")], "labels": [["cat"]]},
        features=Features({"image": Image(decode=False), "labels": List(Value("string"))}),
    )
    rows = load(rows, label_names=NAMES).splits["train"]
    sizes = []
    exact = MultiLabelDataset(rows, NAMES, squash(64))[0]["pixel_values"].float()
    quick = MultiLabelDataset(rows, NAMES, squash(64), margin=0.125)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PILImage.Image, "resize", _noting(PILImage.Image.resize, sizes))
        drafted = quick[0]["pixel_values"].float()
    assert sizes == [(200, 150)]
    full = torch.from_numpy(np.array(photo.resize((72, 72), squash(64).resample))).permute(2, 0, 1).float()
    assert (drafted - full).abs().mean() < 2
    assert (
        exact - torch.from_numpy(np.array(photo.resize((64, 64), squash(64).resample))).permute(2, 0, 1)
    ).abs().mean() < 2


def _noting(resize, sizes):
    def noted(image, *args, **kwargs):
        sizes.append(image.size)
        return resize(image, *args, **kwargs)

    return noted


def test_the_memory_cache_changes_no_pixel_and_decodes_once(image_folder, monkeypatch):
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    plain = MultiLabelDataset(splits["train"], names, squash(24), margin=0.25)
    cached = MultiLabelDataset(splits["train"], names, squash(24), margin=0.25, cache_images="memory", num_workers=2)
    expected = [plain[index]["pixel_values"] for index in range(5)]
    monkeypatch.setattr(data, "load_image", None)  # Nothing may be decoded any more.
    for index in range(5):
        assert torch.equal(cached[index]["pixel_values"], expected[index])
    with pytest.raises(ValueError, match="cannot be cached"):
        MultiLabelDataset(SceneSplit(3), SCENE_LABELS, squash(64), cache_images="memory")
    with pytest.raises(ValueError, match="cache_images='disk'"):
        MultiLabelDataset(splits["train"], names, squash(24), cache_images="disk")


@pytest.mark.parametrize("index", [1, 2, 4])
def test_a_image_that_breaks_later_is_named(damaged, index):
    with pytest.raises(ValueError, match=rf"metadata.jsonl, line {index + 1} \({index}.png\) cannot be read: "):
        MultiLabelDataset(damaged.splits["train"], NAMES, squash(8))[index]
