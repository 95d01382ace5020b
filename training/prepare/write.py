"""Writes splits as parquet shards with the pictures in them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

from ..checkpoint.atomic import atomic_folder

# Rows of a parquet row group: what a reader of one row must read; the Hub's viewer asks for no more.
_GROUP = 100


def write_dataset(
    splits: Mapping[str, Dataset], label_names: list[str], target: Path, *, max_shard_bytes: int = 500_000_000
) -> None:
    """Writes `data/<split>-00000-of-00001.parquet` and `labels.txt`; `target` appears when everything is on disk.

    Args:
        splits: As `load_multilabel_dataset` gives them. Files are copied byte for byte, not decoded.
        label_names: In class order; `labels.txt` keeps them where multi-hot lists have no names in the features.
        max_shard_bytes: Pictures of one shard, roughly.

    Raises:
        FileExistsError: `target` exists.
        ValueError: nothing to write, or a name that a line of labels.txt cannot hold.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists: delete it, or choose another TARGET.")
    for name in label_names:
        if not name or name != name.strip() or len(name.splitlines()) != 1:
            raise ValueError(f"The label name {name!r} is empty, or has blanks around it or a line break; rename it.")
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"The split {name!r} has no pictures left; take it out with --split, or add some.")
    total = sum(len(split) for split in splits.values())
    try:
        with atomic_folder(target) as folder, tqdm(total=total, desc="Writing", unit="img") as progress:
            (folder / "data").mkdir()
            (folder / "labels.txt").write_text("".join(f"{name}\n" for name in label_names), encoding="utf-8")
            for name, split in splits.items():
                count = min(len(split), -(-_picture_bytes(split) // max_shard_bytes) or 1)
                for number in range(count):
                    shard = split.shard(count, number, contiguous=True)
                    _write_shard(shard, folder / "data" / f"{name}-{number:05}-of-{count:05}.parquet", progress)
    except BaseException:
        shutil.rmtree(target.with_name(f".{target.name}.new"), ignore_errors=True)
        raise


def _picture_bytes(split: Dataset) -> int:
    images = split.select_columns(["image"])["image"]
    return sum(len(image["bytes"]) if image["bytes"] else Path(image["path"]).stat().st_size for image in images)


def _write_shard(shard: Dataset, path: Path, progress: tqdm) -> None:
    schema = Features({"image": Image(), "labels": shard.features["labels"]}).arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for table in shard.select_columns(["image", "labels"]).with_format("arrow").iter(_GROUP):
            # `to_parquet` would store paths; this reads the files.
            writer.write_table(embed_table_storage(table.cast(schema)))
            progress.update(len(table))
