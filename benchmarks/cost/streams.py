"""Images a second of a hundred shards, read as a stream and as a map-style dataset: parquet and WebDataset."""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List
from datasets.utils import disable_progress_bars
from PIL import Image as PILImage
from tqdm.auto import tqdm

from modeling_hsvlt import MultiLabelImageProcessor
from training.data.batches import build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.stream_loader import StreamDataset, StreamLoader
from training.data.stream_parts import load_streamed
from training.options import DatasetOptions

NAMES = [f"label {index}" for index in range(80)]


def jpeg(rng: np.random.Generator) -> bytes:
    """As large as a photograph of a dataset, 500 x 375 px."""
    small = PILImage.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((500, 375), PILImage.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_shards(folder: Path, shards: int, images: int, seed: int, quiet: bool) -> None:
    """`parquet/` and `webdataset/` below `folder`, of the same images."""
    rng = np.random.default_rng(seed)
    features = Features({"image": Image(), "labels": List(ClassLabel(names=NAMES))})
    for kind in ("parquet", "webdataset"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "labels.txt").write_text("\n".join(NAMES))
    for shard in tqdm(range(shards), "Writing shards", disable=quiet):
        name = f"train-{shard:05}"
        rows = [(jpeg(rng), rng.choice(80, 3, replace=False).tolist()) for _ in range(images)]
        columns = {"image": [{"bytes": data, "path": None} for data, _ in rows], "labels": [ids for _, ids in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / "parquet" / f"{name}.parquet")
        with tarfile.open(folder / "webdataset" / f"{name}.tar", "w") as tar:
            for number, (data, ids) in enumerate(rows):
                written = json.dumps({"labels": [NAMES[index] for index in ids]}).encode()
                for suffix, content in (("jpg", data), ("json", written)):
                    member = tarfile.TarInfo(f"{number:05}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def stream_speed(
    *, shards: int, images: int, image_size: int, workers: int, batch_size: int, rounds: int, seed: int, quiet: bool
) -> dict[str, list[float]]:
    """Images a second of each round, by reader; the readers take turns, and each round is all images once.

    Args:
        images: Of a shard.
    """
    if quiet:
        disable_progress_bars()
    processor = MultiLabelImageProcessor(size={"height": image_size, "width": image_size})
    with tempfile.TemporaryDirectory(prefix="shards-") as place:
        folder = Path(place)
        write_shards(folder, shards, images, seed, quiet)
        count = shards * images // batch_size
        loaded = load(str(folder / "parquet"), splits=["train"], cache_dir=str(folder / "cache"))
        rows = MultiLabelDataset(loaded.splits["train"], NAMES, processor)
        how = {"batch_size": batch_size, "num_workers": workers, "seed": seed}
        loader = build_dataloader(rows, shuffle=True, sparse_labels=True, **how)
        readers: dict[str, Callable] = {"map-style": lambda: islice(loader, count)}
        streams = []
        for kind in ("parquet", "webdataset"):
            options = DatasetOptions(dataset=str(folder / kind), streaming=True)
            split = load_streamed(options, ["train"], train=True).splits["train"]
            stream = StreamLoader(StreamDataset(split, processor), epoch_batches=count, buffer=1000, **how)
            streams.append(stream)
            readers[f"stream, {kind}"] = lambda stream=stream: stream.take(count)
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for number in tqdm(range(rounds + 1), "Rounds", disable=quiet):
            for name, read in readers.items():
                begin, seen = time.perf_counter(), 0
                for batch in read():
                    seen += len(batch["index"])
                if number:  # the first starts workers
                    speeds[name].append(seen / (time.perf_counter() - begin))
        for stream in streams:
            stream.close()
    return speeds
