"""Videos among images: one record each, and a row for each time a label was seen."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoProcessor

import modeling_hsvlt.load_video
from modeling_hsvlt import HSVLTForImageClassification
from training.tag import few_images, main
from training.tagging.results import Results
from training.tagging.sources import open_source

from ...clips import av, clip
from ...test_video_labels import runs
from ..test_tag import checkpoint, draw, read  # noqa: F401  (a fixture)
from ..tiny_checkpoint import NAMES

COLOURS = ["red", "green", "blue", "white", "red", "red"]
CUTS = [0.3, 0.5, 0.7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    draw(folder, 3)
    clip(COLOURS, folder / "0" / "clip.mp4", fps=1)
    clip(COLOURS[::-1], folder / "no_suffix", fps=1, container="matroska")
    (folder / "broken.MOV").write_bytes((folder / "0" / "clip.mp4").read_bytes()[:400])
    return folder


@pytest.fixture(scope="module")
def scores(checkpoint, folder):  # noqa: F811
    """(frames, labels) of clip.mp4, each frame as PyAV gives it, alone."""
    model = HSVLTForImageClassification.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    with av.open(str(folder / "0" / "clip.mp4")) as video, torch.no_grad():
        frames = [processor(images=frame.to_image(), return_tensors="pt") for frame in video.decode(video=0)]
        return np.stack([model(**frame).logits[0].sigmoid().numpy() for frame in frames])


def read_intervals(output):
    files = sorted(output.glob("intervals-*"))
    rows = [row for file in files if file.suffix == ".parquet" for row in pq.read_table(file).to_pylist()]
    return rows + [json.loads(line) for file in files if file.suffix == ".jsonl" for line in file.open()]


def seen_in(rows, name):
    return {
        label: [(row["start"], row["end"]) for row in rows if (row["file_name"], row["label"]) == (name, label)]
        for label in {row["label"] for row in rows if row["file_name"] == name}
    }


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_folder_with_videos(file_format, checkpoint, folder, scores, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"
    command = [str(checkpoint), str(folder), str(output), "--format", file_format, "--num_workers", "0"]
    command += ["--batch_size", "4", "--part_size", "2"]
    assert main(command) == 0
    assert "3 images and 3 videos, 6 of them to be tagged" in capsys.readouterr().out
    found = read(output)
    assert set(found) == {"0/0.png", "1/1.png", "2/2.png", "0/clip.mp4", "no_suffix", "broken.MOV"}
    assert found["broken.MOV"]["labels"] is None and "broken.MOV" in found["broken.MOV"]["error"]
    assert "broken.MOV" in (output / "unreadable.txt").read_text()

    pooled = scores.max(axis=0)
    wanted = [index for index in np.argsort(-pooled) if pooled[index] >= CUTS[index]]
    assert wanted and found["0/clip.mp4"]["labels"] == [NAMES[index] for index in wanted]
    assert found["0/clip.mp4"]["scores"] == pytest.approx(pooled[wanted], abs=1e-5)
    rows = read_intervals(output)
    assert {row["file_name"] for row in rows} == {"0/clip.mp4", "no_suffix"}
    by_hand = {NAMES[index]: runs(scores[:, index] >= CUTS[index]) for index in wanted}
    assert seen_in(rows, "0/clip.mp4") == by_hand
    backwards = {label: [(6 - end, 6 - start) for start, end in times[::-1]] for label, times in by_hand.items()}
    assert seen_in(rows, "no_suffix") == backwards

    # Killed between the two files of a part: what has no record is tagged again, and its intervals are there once.
    before = sorted(map(str, rows))
    (part,) = (part for part in output.glob("part-*") if "0/clip.mp4" in {row["file_name"] for row in read_part(part)})
    part.unlink()
    assert main(command) == 0
    assert set(read(output)) == set(found) and sorted(map(str, read_intervals(output))) == before
    # Again: nothing is left. Other settings do not go on with these results.
    assert main(command) == 0
    assert "0 of them to be tagged" in capsys.readouterr().out
    assert main([*command, "--pooling", "mean"]) == 2
    assert "begun with pooling 'max', not 'mean'" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--threshold", "1"]) == 0
    assert not read_intervals(output) and len(read(output)) == 6


def read_part(part):
    return Results(part.parent, "file_name", part.suffix[1:]).read(part)


def test_workers_and_poolings_in_a_list(checkpoint, folder, scores, tmp_path):  # noqa: F811
    (tmp_path / "list.txt").write_text(f"{folder}/0/clip.mp4\n{folder}/no_suffix\n{folder}/1/1.png\n")
    command = [str(checkpoint), str(tmp_path / "list.txt"), str(tmp_path / "out"), "--threshold", "0"]
    command += ["--pooling", "top_k_mean", "--pooling_k", "2", "--batch_size", "3", "--num_workers", "2"]
    assert main(command) == 0
    found = read(tmp_path / "out")
    pooled = np.sort(scores, axis=0)[-2:].mean(axis=0)
    for name in ("0/clip.mp4", "no_suffix"):
        record = found[f"{folder}/{name}"]
        np.testing.assert_allclose(record["scores"], np.sort(pooled)[::-1], atol=1e-4)
    rows = read_intervals(tmp_path / "out")
    assert seen_in(rows, f"{folder}/0/clip.mp4") == {name: [(0, 6)] for name in NAMES}


def test_a_video_in_the_terminal(checkpoint, folder, scores, capsys):  # noqa: F811
    file = str(folder / "0" / "clip.mp4")
    assert few_images([str(checkpoint), file]) == [str(checkpoint), file]
    assert main([str(checkpoint), file, str(folder / "1" / "1.png"), "--threshold", "0.5"]) == 0
    printed = capsys.readouterr().out
    for index, name in enumerate(NAMES):
        (line,) = (line for line in printed.split("\n\n")[0].splitlines() if line[2:].startswith(name))
        times = ", ".join(f"{start:.1f}-{end:.1f}" for start, end in runs(scores[:, index] >= 0.5))
        assert line.endswith(f"0.50  {times}" if times else "0.50")
        assert f"{scores[:, index].max():.2f}" in line and (line[0] == "*") == bool(times)
    assert main([str(checkpoint), str(folder / "broken.MOV")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "broken.MOV" in error and error.count("\n") == 1


def test_without_pyav(checkpoint, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(modeling_hsvlt.load_video, "find_spec", lambda name: None)
    source = open_source(str(folder))
    assert source.keys == ["0/0.png", "1/1.png", "2/2.png"] and source.left_out["videos (pip install av)"] == 3
    for named in (folder / "0" / "clip.mp4", tmp_path / "list.txt"):
        (tmp_path / "list.txt").write_text(str(folder / "0" / "clip.mp4"))
        with pytest.raises(ValueError, match=r"clip.mp4 is a video, which PyAV reads; pip install av"):
            open_source(str(named))
    shutil.copytree(folder / "0", tmp_path / "only")
    (tmp_path / "only" / "0.png").unlink()
    with pytest.raises(ValueError, match="holds no images; for its videos install PyAV, pip install av"):
        open_source(str(tmp_path / "only"))


def test_a_video_that_goes_away_has_no_record(checkpoint, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    kept = open_source(str(images))
    monkeypatch.setattr("training.tagging.run.open_source", lambda *_, **__: kept)
    (images / "no_suffix").unlink()
    command = [str(checkpoint), str(images), str(tmp_path / "out"), "--num_workers", "0"]
    assert main(command) == 1
    assert "no_suffix" not in read(tmp_path / "out") and "no_suffix" in capsys.readouterr().err
    shutil.copy(folder / "no_suffix", images)
    assert main(command) == 0
    assert "no_suffix" in read(tmp_path / "out")


@pytest.mark.parametrize("words", [["--frames_per_second", "0"], ["--max_frames", "0"], ["--pooling_k", "0"]])
def test_numbers_that_make_no_sense(words, checkpoint, folder, tmp_path, capsys):  # noqa: F811
    assert main([str(checkpoint), str(folder), str(tmp_path / "out"), *words]) == 2
    assert words[0].strip("-") in capsys.readouterr().err
