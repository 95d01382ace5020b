"""Every image once, whatever happens: results, resumed runs, and what is refused."""

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import debug_launcher
from datasets import Dataset, Image
from PIL import Image as PILImage
from transformers import AutoProcessor

from modeling_hsvlt import HSVLTForImageClassification
from modeling_hsvlt.load_image import load_image
from training.checkpoint.lock import FolderLock
from training.data.scenes import SceneDataset
from training.tag import main
from training.tagging.sources import open_source

from ..forked import forked
from ..tolerance import assert_close_outputs
from .tiny_checkpoint import NAMES, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tag") / "checkpoint"
    save_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["thresholds"] = [0.3, 0.5, 0.7]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw(folder, count, first=0):
    for number in range(first, first + count):
        path = folder / f"{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).resize((20, 24), PILImage.Resampling.NEAREST).save(path)


def read(output):
    """All records by name; a name that has two fails."""
    records = [row for part in sorted(output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    records += [
        json.loads(line) for part in sorted(output.glob("part-*.jsonl")) for line in part.read_text().splitlines()
    ]
    key = "row" if "row" in records[0] else "file_name"
    assert max(Counter(record[key] for record in records).values()) == 1
    return {record[key]: record for record in records}


def expected_labels(checkpoint, path, threshold="auto", top_k=None):
    """One image by itself, by the processor that the checkpoint brings."""
    model = HSVLTForImageClassification.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    with torch.no_grad():
        outputs = model(**processor(images=load_image(path), return_tensors="pt"))
    return processor.post_process_multi_label_classification(outputs, threshold, top_k)[0]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_folder_tree(file_format, checkpoint, tmp_path, capsys):
    images, output = tmp_path / "images", tmp_path / "out"
    draw(images, 11)
    (images / "1" / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    (images / "notes.txt").write_text("no image")
    command = [str(checkpoint), str(images), str(output), "--format", file_format, "--num_workers", "0"]
    command += ["--batch_size", "4", "--part_size", "5"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "12 images, 12 of them to be tagged" in printed and "bottleneck" in printed
    found = read(output)
    assert set(found) == {*(f"{n % 3}/{n}.png" for n in range(11)), "1/broken.jpg"}
    for name in ("0/0.png", "1/10.png"):
        wanted = expected_labels(checkpoint, images / name)
        assert found[name]["labels"] == [label["label"] for label in wanted] and found[name]["error"] is None
        assert found[name]["scores"] == pytest.approx([label["score"] for label in wanted], abs=1e-5)
    assert len({tuple(record["labels"] or ()) for record in found.values()}) > 2
    broken = found["1/broken.jpg"]
    assert broken["labels"] is None and "broken.jpg" in broken["error"]
    (line,) = (output / "unreadable.txt").read_text().splitlines()
    assert line.split("\t")[0] == str(images / "1" / "broken.jpg")
    assert open_source(str(output / "unreadable.txt")).keys == [str(images / "1" / "broken.jpg")]

    # Again: only what is new.
    draw(images, 2, first=11)
    before = {part.name: part.read_bytes() for part in output.glob("part-*")}
    assert main(command) == 0
    assert "14 images, 2 of them to be tagged" in capsys.readouterr().out
    assert len(read(output)) == 14
    assert all((output / name).read_bytes() == content for name, content in before.items())

    # Other settings do not go on with these results, unless told to begin again.
    assert main([*command, "--threshold", "0.5"]) == 2
    assert "begun with threshold 'auto', not 0.5" in capsys.readouterr().err
    assert main([*command, "--threshold", "0", "--top_k", "1", "--overwrite"]) == 0
    assert all(record["error"] or len(record["labels"]) == 1 for record in read(output).values())


def test_a_list_and_a_data_set(checkpoint, tmp_path, capsys):
    images = tmp_path / "images"
    draw(images, 4)
    names = ["images/0/3.png", str(images / "1" / "1.png"), "images/gone.png"]
    keys = ["images/0/3.png", "images/1/1.png"]
    (tmp_path / "list.txt").write_text("\n".join([*names, "", names[0]]))
    options = ["--num_workers", "0", "--threshold", "0"]
    assert main([str(checkpoint), str(tmp_path / "list.txt"), str(tmp_path / "listed"), *options]) == 1
    assert "gone.png does not exist" in capsys.readouterr().err
    listed = read(tmp_path / "listed")
    assert set(listed) == set(keys)
    assert len(listed[names[0]]["labels"]) == len(NAMES)

    rows = Dataset.from_dict({"photo": [str(images / "0" / "3.png"), None, str(images / "1" / "1.png")]})
    rows.cast_column("photo", Image()).save_to_disk(tmp_path / "saved")
    command = [str(checkpoint), str(tmp_path / "saved"), str(tmp_path / "rows"), *options]
    assert main(command) == 2  # no column "image"
    assert main([*command, "--image_column", "photo"]) == 0
    by_row = read(tmp_path / "rows")
    assert_close_outputs([by_row[row]["scores"] for row in (0, 2)], [listed[name]["scores"] for name in keys])
    assert by_row[1]["error"] and (tmp_path / "rows" / "unreadable.txt").read_text().startswith("1\t")
    assert main([*command, "--image_column", "photo", "--sidecars", "txt"]) == 2


def test_what_cannot_be_done_is_said(checkpoint, tmp_path, capsys):
    draw(tmp_path / "images", 1)
    (tmp_path / "empty").mkdir()
    output = tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-0001-0000-000000.jsonl").write_text("")
    for source, target, message in (
        ("empty", output, "holds no images"),
        ("gone", output, "does not exist"),
        ("images", tmp_path / "other", "is of no known run"),
    ):
        assert main([str(checkpoint), str(tmp_path / source), str(target), "--num_workers", "0"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "strict", "chosen", "words"),
    [
        ("bf16", False, "bf16", "On the first 12 images bf16 changes"),
        ("bf16", True, "fp32", "scores by up to"),
        ("no", False, "fp32", "no faster instructions here"),
    ],
)
def test_16_bits_where_the_first_images_get_the_same_labels(
    precision, strict, chosen, words, checkpoint, tmp_path, monkeypatch, capsys
):
    images, output = tmp_path / "images", tmp_path / "out"
    draw(images, 12)
    (images / "0" / "broken.jpg").write_bytes(b"no image")
    monkeypatch.setattr("training.tagging.precision.native_precision", lambda: precision)
    monkeypatch.setattr("training.tagging.precision.MOST_SCORE", 0.0 if strict else 1.0)
    monkeypatch.setattr("training.tagging.precision.MOST_LABELS", 1.0)
    command = [str(checkpoint), str(images), str(output), "--num_workers", "0", "--threshold", "0"]
    assert main([*command, "--dtype", "auto"]) == 0
    assert f"--dtype auto: {chosen}" in (said := capsys.readouterr().out) and words in said
    found = {name: record for name, record in read(output).items() if record["error"] is None}
    apart = max(
        abs(dict(zip(record["labels"], record["scores"], strict=True))[label["label"]] - label["score"])
        for name, record in found.items()
        for label in expected_labels(checkpoint, images / name, 0.0)
    )
    assert len(found) == 12 and (1e-5 < apart < 0.1 if chosen == "bf16" else apart < 1e-5)

    draw(images, 1, first=12)  # goes on as it began, whatever would be chosen now
    monkeypatch.setattr("training.tagging.precision.native_precision", lambda: "no" if chosen == "bf16" else "bf16")
    monkeypatch.setattr("training.tagging.precision.MOST_SCORE", 1.0)
    assert main([*command, "--dtype", "auto"]) == 0 and main([*command, "--dtype", chosen]) == 0
    assert json.loads((output / "tagging.json").read_text())["dtype"] == chosen and len(read(output)) == 14
    other = "fp32" if chosen == "bf16" else "bf16"
    capsys.readouterr()
    assert main([*command, "--dtype", other]) == 2
    assert f"was begun with dtype '{chosen}', not '{other}'" in capsys.readouterr().err


def hold_lock(folder, ready):
    lock = FolderLock(Path(folder))
    lock.take(alone=False)
    Path(ready).touch()
    time.sleep(60)
    lock.release()


def test_two_runs_do_not_share_a_folder(checkpoint, tmp_path, capsys):
    draw(tmp_path / "images", 1)
    output, ready = tmp_path / "out", tmp_path / "ready"
    output.mkdir()
    holder = os.fork()
    if holder == 0:
        try:
            hold_lock(output, ready)
        finally:
            os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        command = [str(checkpoint), str(tmp_path / "images"), str(output), "--num_workers", "0"]
        assert main(command) == 2
        assert "Another run is writing" in capsys.readouterr().err
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert main(command) == 0


def run_and_kill(output, command):
    """The command, run and killed, with other numbers of processes, until it is done."""

    def parts():
        return len(list(output.glob("part-*")))

    # Processes of each run, and after how many new parts all of them are killed (None: never).
    for processes, until in ((1, 2), (2, 3), (3, 2), (2, None)):
        before = parts()
        child = os.fork()
        if child == 0:
            os.setsid()
            if processes == 1:
                os._exit(main(command))
            debug_launcher(main, (command,), num_processes=processes)
            os._exit(0)
        if until is None:
            assert os.waitpid(child, 0)[1] == 0
            break
        while parts() < before + until:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended before it could be killed"
            time.sleep(0.002)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while True:  # until the last of its processes is gone
            try:
                os.killpg(child, 0)
            except ProcessLookupError:
                break
            time.sleep(0.01)
        print("killed with", parts(), "parts", flush=True)  # before the next fork


@pytest.mark.slow
def test_a_run_killed_three_times(checkpoint, tmp_path):
    images, output = tmp_path / "images", tmp_path / "out"
    scenes = SceneDataset(1000, image_size=32, min_size=8, max_size=16)
    for number in range(len(scenes)):
        (images / str(number % 7)).mkdir(parents=True, exist_ok=True)
        scenes[number]["image"].save(images / str(number % 7) / f"{number:04d}.png", compress_level=1)
    for number in (5, 750):
        path = next(images.glob(f"*/{number:04d}.png"))
        path.write_bytes(path.read_bytes()[:200])
    options = [str(checkpoint), str(images), str(output), "--batch_size", "16", "--part_size", "32"]
    result = forked(run_and_kill, output, [*options, "--num_workers", "1", "--threshold", "0"], timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("killed with") == 3
    found = read(output)  # which fails where an image has two records
    assert set(found) == {path.relative_to(images).as_posix() for path in images.glob("*/*.png")}
    assert len(found) == 1000 and sum(record["error"] is not None for record in found.values()) == 2
    assert len((output / "unreadable.txt").read_text().splitlines()) == 2
    # What several processes and broken runs found is what one image by itself gives.
    for number in (0, 377, 999):
        (name,) = (name for name in found if name.endswith(f"{number:04d}.png"))
        wanted = expected_labels(checkpoint, images / name, threshold=0.0)
        assert found[name]["scores"] == pytest.approx([label["score"] for label in wanted], abs=1e-5)


def table_of(capsys):
    """The rows of what was printed, by image: label, score and threshold, with a star where it was found."""
    tables = {}
    for block in capsys.readouterr().out.strip().split("\n\n"):
        title, _, *rows = block.splitlines()
        tables[title.partition(":")[0]] = [(row[0] == "*", *row[2:].rsplit(maxsplit=2)) for row in rows]
    return tables


def test_images_are_shown_in_the_terminal(checkpoint, tmp_path, capsys, monkeypatch):
    draw(tmp_path, 2)
    files = [str(tmp_path / "0" / "0.png"), str(tmp_path / "1" / "1.png")]
    assert main([str(checkpoint), *files]) == 0
    shown = table_of(capsys)
    for file in files:
        every = expected_labels(checkpoint, file, threshold=None)
        thresholds = dict(zip(NAMES, [0.3, 0.5, 0.7], strict=True))
        found = [label for label in every if label["score"] >= thresholds[label["label"]]]
        rest = [label for label in every if label not in found]
        assert shown[file] == [
            (label in found, label["label"], f"{label['score']:.2f}", f"{thresholds[label['label']]:.2f}")
            for label in found + rest
        ]
    assert main([str(checkpoint), files[0], "--threshold", "0.5", "--top_k", "1"]) == 0
    ((row,),) = table_of(capsys).values()
    assert row[3] == "0.50"


def test_an_image_alone_is_for_the_last_run(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path, 1)
    assert main(["0/0.png"]) == 2
    assert "There is no run below runs/" in capsys.readouterr().err
    shutil.copytree(checkpoint, tmp_path / "runs" / "mine" / "best")
    assert main(["0/0.png"]) == 0
    assert list(table_of(capsys)) == ["0/0.png"]


def test_an_image_that_cannot_be_read_is_one_line(checkpoint, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    assert main([str(checkpoint), str(tmp_path / "broken.jpg")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "broken.jpg" in error and error.count("\n") == 1
