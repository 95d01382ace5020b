"""Images to tag come from `training.data.load`, whatever their labels are."""

import pytest
from datasets import Dataset, DatasetDict, Image

from training.data.load import load_images
from training.tagging.sources import open_source

from ..tiny_checkpoint import save_images


@pytest.fixture
def saved(tmp_path):
    """Two splits with a column of labels that no vocabulary explains."""
    save_images(tmp_path / "photos")
    paths = sorted(str(path) for path in (tmp_path / "photos").rglob("*.png"))
    rows = Dataset.from_dict({"image": paths, "labels": list(range(len(paths)))}).cast_column("image", Image())
    DatasetDict({"train": rows.select([0]), "val": rows}).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_split_is_chosen_by_any_of_its_names(saved):
    for name in ("val", "validation"):
        source = open_source(str(saved), split=name)
        assert len(source.keys) == 7 and source.image(0)["path"].endswith("0.png")
    with pytest.raises(ValueError, match=r"has the splits train, validation; choose one with --split"):
        open_source(str(saved))
    with pytest.raises(ValueError, match=r"has no split 'test', only train, validation"):
        open_source(str(saved), split="test")
    with pytest.raises(ValueError, match=r"has no column 'photo', only image, labels"):
        open_source(str(saved), split="train", image_column="photo")


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet is not a whole parquet file"):
        open_source(str(tmp_path))


def test_the_built_in_scenes_are_a_source():
    knobs = {"num_scenes": {"test": 3}}
    assert load_images("scenes", scenes=knobs).column_names == ["image"]
    assert len(load_images("scenes", "test", scenes=knobs)) == 3
