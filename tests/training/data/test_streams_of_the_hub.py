"""Shards of a repository, from a Hub on this machine: read in place, with nothing of them in a cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from tests.loopback_hub import TOKEN, LoopbackHub

from ..shards import NAMES, labels_of, write_shards

ROOT = Path(__file__).parents[3]
READ = """
import json, sys
from training.data.stream_parts import load_streamed
from training.options import DatasetOptions
from training.tagging.sources import open_source
found = {}
for kind in ("parquet", "tar"):
    options = DatasetOptions(dataset=f"me/{kind}", streaming=True)
    loaded = load_streamed(options, ["train", "validation"], train=True)
    split = loaded.splits["train"]
    rows = [row.values for shard in range(3) for row in split.shards.read(shard)]
    labels = split.row_labels(rows, "row {}".format)
    tagged = [key for key, _ in open_source(f"me/{kind}", streaming=True, split="train").images()]
    found[kind] = {
        "names": loaded.label_names, "count": split.shards.count(), "validation": len(loaded.splits["validation"]),
        "labels": [labels.dense(row).tolist() for row in range(len(rows))], "tagged": tagged,
        "mark": split.shards.fingerprint(), "file": split.shards.files[1],
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_shards_of_the_hub_are_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub(lfs_bytes=1000) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        for kind in ("parquet", "tar"):
            folder = write_shards(tmp_path / kind, kind, [7, 5, 9], names=kind == "tar")
            write_shards(folder, kind, [4], split="validation", first=30, names=False)
            api.create_repo(f"me/{kind}", repo_type="dataset")
            api.upload_folder(folder_path=folder, repo_id=f"me/{kind}", repo_type="dataset")
        environment = os.environ | hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", READ]
        said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr[-2000:]
    for kind, found in json.loads(said.stdout.splitlines()[-1]).items():
        assert found["names"] == NAMES and found["validation"] == 4
        assert found["labels"] == [[float(name in labels_of(number)) for name in NAMES] for number in range(21)]
        assert found["count"] == (21 if kind == "parquet" else None) and f"me/{kind}@" in found["file"]
        assert found["tagged"][:2] == (
            [0, 1] if kind == "parquet" else ["train-00000.tar/00000.png", "train-00000.tar/00001.png"]
        )
    assert hub.unknown == []
    kept = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not [name for name in kept if name.endswith((".parquet", ".tar", ".arrow"))]
