"""Batches: the label contract, and an order that depends on the seed alone."""

import pytest
import torch

from training.data.batches import MultiLabelCollator, build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.scene_labels import SCENE_LABELS
from training.data.scenes import SceneSplit

from ...forked import SERVER
from .test_dataset import squash


def test_the_collator_holds_the_label_contract():
    sample = {"pixel_values": torch.zeros(3, 4, 4, dtype=torch.uint8), "labels": torch.tensor([0.0, 1.0]), "index": 7}
    batch = MultiLabelCollator(2)([sample, sample])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "pixel_values": (2, 3, 4, 4), "labels": (2, 2), "index": (2,)
    }  # fmt: skip
    del sample["index"]  # as transformers' Trainer does
    assert set(MultiLabelCollator(2)([sample])) == {"pixel_values", "labels"}
    with pytest.raises(ValueError, match=r"\(batch, 3\)"):
        MultiLabelCollator(3)([sample])
    with pytest.raises(ValueError, match=r"labels\[1, 0\] is 2"):
        MultiLabelCollator(2)([sample, {**sample, "labels": torch.tensor([2.0, 1.0])}])


def order(loader):
    return torch.cat([batch["index"] for batch in loader]).tolist()


def test_the_order_of_images_depends_on_the_seed_alone():
    dataset = MultiLabelDataset(SceneSplit(20, image_size=16, max_size=16), SCENE_LABELS, squash(16))

    def build(seed, **kwargs):
        return build_dataloader(dataset, batch_size=6, shuffle=True, seed=seed, **kwargs)

    assert order(build(1)) == order(build(1)) == order(build(1, num_workers=2))
    assert sorted(order(build(1))) == list(range(20)) != order(build(1))
    assert order(build(1)) != order(build(2))
    loader = build(1)
    assert order(loader) != order(loader)  # Another order every epoch.
    assert len(build(1)) == 4 and len(build(1, drop_last=True)) == 3
    assert order(build_dataloader(dataset, batch_size=6)) == list(range(20))


def test_accelerate_controls_order_and_epoch():
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    )

    def epochs(first, count, num_workers=0):
        dataset = MultiLabelDataset(SceneSplit(12, image_size=16, max_size=16), SCENE_LABELS, squash(16))
        loader = accelerator.prepare(build_dataloader(dataset, batch_size=4, shuffle=True, num_workers=num_workers))
        seen = []
        for epoch in range(first, first + count):
            loader.set_epoch(epoch)
            dataset.set_epoch(epoch)
            seen.append([(batch["index"].tolist(), batch["pixel_values"].sum().item()) for batch in loader])
        return seen

    three = epochs(0, 3)
    assert three == epochs(0, 3) == epochs(0, 3, num_workers=2)
    assert len({str(epoch) for epoch in three}) == 3
    assert three[2:] == epochs(2, 1)  # A run that resumes at epoch 2 sees what it would have seen.


@pytest.mark.slow
def test_workers_may_be_spawned(image_folder):
    """Where processes do not fork (macOS, Windows, Python from 3.14 on) the dataset travels by pickling, as it does to
    a server of forks."""
    loaded = load(image_folder)
    splits, names = loaded.splits, loaded.label_names
    cached = MultiLabelDataset(splits["train"], names, squash(16), cache_images="memory")
    scenes = MultiLabelDataset(SceneSplit(4, image_size=16, max_size=16), SCENE_LABELS, squash(16))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([cached, scenes]),
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=SERVER,
    )
    for epoch in (0, 1):
        scenes.set_epoch(epoch)
        expected = [dataset[index]["pixel_values"] for dataset in (cached, scenes) for index in range(len(dataset))]
        assert torch.equal(torch.stack([sample["pixel_values"] for sample in loader]), torch.stack(expected))
