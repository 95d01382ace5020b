"""Writes splits as parquet shards with the images in them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

from modeling_hsvlt.label_names import check_label_names
from modeling_hsvlt.load_image import describe, read_header

from ..checkpoint.atomic import atomic_folder
from ..data.label_name_files import read_label_names
from ..data.parquet import read_features
from ..data.rows import Split
from ..data.sparse_labels import SparseLabels, class_names
from ..say import counted

# Rows of a parquet row group: what a reader of one row must read; the Hub's viewer asks for no more.
_GROUP = 100


def write_dataset(
    splits: Mapping[str, Split], label_names: list[str], target: Path, *, max_shard_bytes: int = 500_000_000
) -> None:
    """Writes `data/<split>-00000-of-00001.parquet` and `labels.txt`; `target` appears when everything is on disk.

    Args:
        splits: As `load` gives them. Files are copied byte for byte, not decoded; how many are no images, by their
            headers, is said on stderr.
        label_names: In class order; `labels.txt` keeps them where multi-hot lists have no names in the features.
        max_shard_bytes: Images of one shard, roughly.

    Raises:
        FileExistsError: `target` exists.
        ValueError: nothing to write, or a name that a line of labels.txt cannot hold.
    """
    for name in label_names:
        if not name or name != name.strip() or "\n" in name or "\r" in name:
            raise ValueError(f"The label name {name!r} is empty, or has blanks around it or a line break; rename it.")
    check_label_names(label_names)
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"The split {name!r} has no images left; take it out with --split, or add some.")
    total, no_images = sum(len(split) for split in splits.values()), []
    with atomic_folder(target) as folder:
        if target.exists():
            raise FileExistsError(f"{target} exists: delete it, or choose another TARGET.")
        with tqdm(total=total, desc="Writing", unit="img") as progress:
            (folder / "data").mkdir()
            (folder / "labels.txt").write_text("".join(f"{name}\n" for name in label_names), encoding="utf-8")
            # One form for all splits, which `datasets` asks for.
            as_ids = all(split.labels.are_ids() for split in splits.values())
            labels = List(ClassLabel(names=label_names) if as_ids else Value("float32"))
            features, written = Features({"image": Image(), "labels": labels}), []
            for name, split in splits.items():
                count = min(len(split), -(-_image_bytes(split.images) // max_shard_bytes) or 1)
                for number, rows in enumerate(np.array_split(np.arange(len(split)), count)):
                    path = folder / "data" / f"{name}-{number:05}-of-{count:05}.parquet"
                    written.append((split.select(rows), path))
                    no_images += _write_shard(*written[-1], features, as_ids, progress)
            for shard, path in written:
                _check_shard(shard, path, label_names, as_ids)
            if read_label_names(folder / "labels.txt") != list(label_names):
                raise ValueError("labels.txt does not read back as it was written; give the labels plainer names.")
    if no_images:
        number = f"{len(no_images):,} of {counted(total, 'file')} {'is' if len(no_images) == 1 else 'are'} no image"
        print(
            f"warning: {number}: {no_images[0]} hsvlt check {target} lists them and those that are damaged further on; "
            "hsvlt train refuses them, or leaves them out with --on_unreadable skip.",
            file=sys.stderr,
        )


def _check_shard(shard: Split, path: Path, label_names: list[str], as_ids: bool) -> None:
    """
    Raises:
        ValueError: the labels do not read back as they were, which nobody should find out by training.
    """
    start, own_names = 0, class_names(read_features(str(path)), "labels")
    for batch in pq.ParquetFile(path).iter_batches(1000, columns=["labels"]):
        read = SparseLabels.from_arrow(
            batch.column("labels"),
            label_names,
            class_names=own_names,
            label_format="ids" if as_ids else "multi_hot",
        )
        written = shard.labels.select(np.arange(start, start + len(read)))
        same = (own_names or label_names) == list(label_names) and all(
            np.array_equal(getattr(read, field), getattr(written, field))
            for field in ("starts", "ids", "values", "default")
        )
        if not same:
            raise ValueError(f"{path.name}, rows from {start} on: the labels do not read back as they were written.")
        start += len(read)
    if start != len(shard):
        raise ValueError(f"{path.name} reads back {start} rows in place of {len(shard)}.")


def _image_bytes(images: Dataset) -> int:
    return sum(
        len(image["bytes"]) if image["bytes"] else Path(image["path"]).stat().st_size for image in images["image"]
    )


def _write_shard(shard: Split, path: Path, features: Features, as_ids: bool, progress: tqdm) -> list[str]:
    """Returns why files in it are no images."""
    schema, no_images = features.arrow_schema, []
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(shard), _GROUP):
            rows = np.arange(start, min(start + _GROUP, len(shard)))
            images = shard.images.select(rows).with_format("arrow")[:].column("image")
            table = pa.table({"image": images, "labels": shard.labels.select(rows).lists(as_ids)})
            # `to_parquet` would store paths; this reads the files.
            table = embed_table_storage(table.cast(schema))
            writer.write_table(table)
            for image in table.column("image").to_pylist():
                try:
                    read_header(BytesIO((image or {}).get("bytes") or b""), describe(image or b""))
                except ValueError as error:
                    no_images.append(str(error))
            progress.update(len(table))
    return no_images
