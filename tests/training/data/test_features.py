"""Maps on disk: they are the backbone's, found again by what made them, and kept within bounds, whatever interrupts."""

import os

import pytest
import torch
from PIL import Image

from modeling_hsvlt import EfficientNetLiteBackbone, EfficientNetLiteConfig
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor
from training.data.batches import normalize_pixels
from training.data.dataset import MultiLabelDataset
from training.data.features import (
    FeatureDataset,
    FeatureStore,
    compute_features,
    image_keys,
    make_room,
    map_shapes,
    store_name,
    view_key,
)
from training.data.load import load

from ...test_modeling_efficientnet_lite import TINY
from ..tiny_checkpoint import save_images


def processor(**changes):
    return MultiLabelImageProcessor(**{"size": {"height": 32, "width": 32}, **changes})


def backbone(seed=0):
    torch.manual_seed(seed)
    return EfficientNetLiteBackbone(EfficientNetLiteConfig(**TINY, out_features=["stage3", "head"])).eval()


class Counting:
    """A backbone that counts the images it is shown, and breaks off where told."""

    def __init__(self, model, breaks_at=None):
        self.model, self.breaks_at, self.images = model, breaks_at, 0

    def __call__(self, pixels):
        self.images += len(pixels)
        if self.breaks_at is not None and self.images > self.breaks_at:
            raise KeyboardInterrupt
        return self.model(pixels).feature_maps


@pytest.fixture
def images(tmp_path):
    save_images(tmp_path / "photos")
    return tmp_path / "photos"


def dataset(folder):
    loaded = load(folder)
    return MultiLabelDataset(loaded.splits["validation"], loaded.label_names, processor())


def compute(folder, images, views=2, breaks_at=None, **options):
    """A store filled with the maps of `images`, its keys, and how many images the backbone was shown."""
    data, model = dataset(images), Counting(backbone(), breaks_at)
    keys = image_keys(data.split.images)
    store = FeatureStore(folder, map_shapes(model, processor()))
    model.images = 0
    compute_features(store, data, keys, views, model, batch_size=2, **options)
    store.refresh()
    return store, keys, model.images


def test_maps_are_the_backbone_s_of_image_and_mirror_image(tmp_path, images):
    store, keys, shown = compute(tmp_path / "store", images)
    data = dataset(images)
    assert shown == 2 * len(data) == len(store.keys())
    features = FeatureDataset(data, store, keys, 2)
    for row in (0, 5):
        pixels = normalize_pixels(data[row]["pixel_values"][None], processor())
        for view, shown in enumerate((pixels, pixels.flip(-1))):
            with torch.no_grad():
                expected = backbone()(shown).feature_maps
            maps = store.unpack(features[row]["features"][view][None])
            for actual, each in zip(maps, expected, strict=True):
                torch.testing.assert_close(actual, each, atol=2e-3, rtol=2e-3)  # fp16
        assert torch.equal(features[row]["labels"].to_dense(), data[row]["labels"].to_dense())


def test_maps_are_found_again_and_only_what_changed_is_computed(tmp_path, images):
    compute(tmp_path / "store", images, views=1)
    assert compute(tmp_path / "store", images, views=1)[2] == 0
    assert compute(tmp_path / "store", images, views=2)[2] == len(dataset(images))  # the mirror images
    file = next((images / "validation").glob("*.png"))
    with Image.open(file) as image:
        pixel = image.getpixel((0, 0))
        image.putpixel((0, 0), (pixel[0] ^ 1, *pixel[1:]))
        image.save(file)
    store, keys, shown = compute(tmp_path / "store", images)
    assert shown == 2 and store.keys().issuperset(keys)


@pytest.mark.parametrize(
    "change",
    [
        {"processor": processor(image_mean=[0.4, 0.5, 0.5])},
        {"processor": processor(size={"height": 64, "width": 64})},
        {"processor": processor(resize_mode="pad")},
        {"processor": processor(resample=2)},
        {"backbone": backbone(1)},
        {"settings": [EfficientNetLiteConfig(**TINY, out_features=["stage4", "head"]).to_dict(), None]},
        {"settings": [EfficientNetLiteConfig(**TINY).to_dict(), [1, 2, 1, 1]]},
    ],
    ids=["mean", "size", "resize mode", "resample", "weights", "maps", "interactions"],
)
def test_what_makes_other_maps_makes_another_store(change):
    def name(**changes):
        given = {"backbone": backbone(), "processor": processor(), "settings": [backbone().config.to_dict(), None]}
        given |= changes
        return store_name(given["backbone"], given["settings"], given["processor"])

    assert name() == name()
    assert name(**change) != name()


def test_a_last_digit_of_a_weight_counts_and_a_path_does_not():
    model, config = backbone(), backbone().config
    before = store_name(model, [config.to_dict(), None], processor())
    config._name_or_path = "elsewhere"
    assert store_name(model, [config.to_dict(), None], processor()) == before
    with torch.no_grad():
        weight = model.head.normalization.running_mean
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert store_name(model, [config.to_dict(), None], processor()) != before


def test_an_interrupted_computation_continues(tmp_path, images):
    whole, keys, _ = compute(tmp_path / "whole", images)
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "store", images, breaks_at=6)
    with (tmp_path / "store" / "maps.bin").open("ab") as maps:  # killed in the middle of a write
        maps.write(b"half a record")
    with (tmp_path / "store" / "index.bin").open("ab") as index:
        index.write(b"half a key")
    store, _, shown = compute(tmp_path / "store", images)
    assert shown == 2 * len(keys) - 6
    for key in keys:
        for view in range(2):
            assert torch.equal(store.record(view_key(key, view)), whole.record(view_key(key, view)))


def test_processes_share_a_store(tmp_path, images):
    for rank in range(2):
        store, keys, _ = compute(tmp_path / "store", images, rank=rank, processes=2)
    assert len(store.keys()) == 2 * len(keys)
    assert compute(tmp_path / "store", images)[2] == 0


def filled(folder, keys, age=0.0):
    store = FeatureStore(folder, [(1, 1, 4)])  # 8 bytes a record
    store.append(keys, [torch.ones(len(keys), 4, 1, 1)])
    store.refresh()
    os.utime(folder / "index.bin", (1e9 - age, 1e9 - age))
    return store


def keys_of(*numbers):
    return [bytes([number]) * 32 for number in numbers]


def sizes(root):
    return {folder.name: (folder / "maps.bin").stat().st_size for folder in root.iterdir()}


def test_the_stores_not_used_for_longest_make_room(tmp_path):
    for number, age in enumerate((5, 50, 500)):
        filled(tmp_path / f"other{number}", keys_of(1, 2), age)
    one = sum(file.stat().st_size for file in (tmp_path / "other0").iterdir())
    store = filled(tmp_path / "mine", keys_of(1))
    make_room(tmp_path, store, set(keys_of(1, 2, 3)), limit=24 + one)
    assert set(sizes(tmp_path)) == {"mine", "other0"}
    make_room(tmp_path, store, set(keys_of(1, 2, 3)), limit=24)
    assert set(sizes(tmp_path)) == {"mine"}


def test_maps_of_images_that_are_gone_make_room(tmp_path):
    store = filled(tmp_path / "mine", keys_of(1, 2, 3))
    assert make_room(tmp_path, store, set(keys_of(3, 4)), limit=32).keys() == set(keys_of(1, 2, 3))
    assert make_room(tmp_path, store, set(keys_of(3, 4)), limit=24).keys() == set()
    assert sizes(tmp_path) == {"mine": 0}


def test_more_than_the_bound_is_refused(tmp_path):
    store = filled(tmp_path / "mine", keys_of(1))
    with pytest.raises(ValueError, match=r"3 images and mirror images take .* feature_cache_gib"):
        make_room(tmp_path, store, set(keys_of(1, 2, 3)), limit=23)


def test_numbers_beyond_fp16_are_refused(tmp_path):
    store = FeatureStore(tmp_path / "store", [(1, 1, 4)])
    with pytest.raises(ValueError, match="beyond fp16"):
        store.append(keys_of(1), [torch.full((1, 4, 1, 1), 1e5)])
    store.refresh()
    assert store.keys() == set()
