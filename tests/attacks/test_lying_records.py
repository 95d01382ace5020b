"""Records that said what was not so."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from training import tag, train

from .conftest import killed_at

WEIGHTS = "model.safetensors"


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        PILImage.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    return tmp_path / "images"


def run(checkpoint, source, output, *options):
    return tag.main([str(checkpoint), str(source), str(output), "--num_workers", "0", "--threshold", "0", *options])


def records(output):
    return [row for part in sorted(output.glob("part-*")) for row in pq.read_table(part).to_pylist()]


def other_weights(checkpoint):
    tensors = load_file(checkpoint / WEIGHTS)
    name = next(name for name in tensors if "classifier" in name)
    save_file(tensors | {name: tensors[name] + 1}, checkpoint / WEIGHTS, metadata={"format": "pt"})


def other_processor(checkpoint):
    path = checkpoint / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("change", "word"), [(other_weights, "weights"), (other_processor, "processor")])
def test_tagging_is_not_resumed_with_another_model(checkpoint, images, tmp_path, change, word, capsys):
    assert run(checkpoint, images, tmp_path / "out") == 0
    before = records(tmp_path / "out")
    shutil.copy(images / "0.png", images / "new.png")
    change(checkpoint)
    assert run(checkpoint, images, tmp_path / "out") == 2
    assert f"was begun with {word}" in capsys.readouterr().err
    assert records(tmp_path / "out") == before


def rows_of(images, order, target):
    shutil.rmtree(target, ignore_errors=True)
    stored = [{"bytes": (images / f"{number}.png").read_bytes(), "path": None} for number in order]
    Dataset.from_dict({"image": stored}).cast_column("image", Image()).save_to_disk(target)


def test_tagging_rows_in_another_order_is_not_resumed(checkpoint, images, tmp_path, capsys):
    rows_of(images, [0, 1, 2, 3], tmp_path / "rows")
    assert run(checkpoint, tmp_path / "rows", tmp_path / "out") == 0
    rows_of(images, [0, 1, 2, 3, 4], tmp_path / "rows")
    assert run(checkpoint, tmp_path / "rows", tmp_path / "out") == 0, "rows that came since are tagged"
    assert len(records(tmp_path / "out")) == 5
    rows_of(images, [0, 1, 2, 4, 3, 5], tmp_path / "rows")
    assert run(checkpoint, tmp_path / "rows", tmp_path / "out") == 2
    assert "was begun with data" in capsys.readouterr().err


def test_a_folder_that_vanishes_is_no_verdict_on_its_images(checkpoint, images, tmp_path, monkeypatch, capsys):
    from training.tagging import loop

    plain, away = loop.Images.__getitem__, tmp_path / "away"

    def vanish(self, index):
        if index == 2 and not away.exists():
            images.rename(away)
        return plain(self, index)

    monkeypatch.setattr(loop.Images, "__getitem__", vanish)
    status = run(checkpoint, images, tmp_path / "out")
    assert [row["error"] for row in records(tmp_path / "out")] == [None, None] and status != 0
    away.rename(images)
    monkeypatch.undo()
    assert run(checkpoint, images, tmp_path / "out") == 0
    assert sorted(row["file_name"] for row in records(tmp_path / "out")) == [f"{number}.png" for number in range(6)]
    assert not any(row["error"] for row in records(tmp_path / "out"))


@pytest.mark.parametrize("output", [".", "tags", "a/b"])
def test_output_inside_the_source_is_refused(checkpoint, images, output, capsys):
    before = sorted(images.iterdir())
    assert run(checkpoint, images, images / output) == 2
    assert "is in SOURCE" in capsys.readouterr().err and sorted(images.iterdir()) == before


def test_an_image_under_three_spellings_is_tagged_once(checkpoint, images, tmp_path):
    spellings = ["images/0.png", "./images/0.png", "images/../images//0.png", str(images / "0.png")]
    for first in range(len(spellings)):
        names = spellings[first:] + spellings[:first]
        (tmp_path / "list.txt").write_text("\n".join(names))
        assert run(checkpoint, tmp_path / "list.txt", tmp_path / "out") == 0
    assert [row["file_name"] for row in records(tmp_path / "out")] == ["images/0.png"]


def test_names_write_no_lines_into_the_list_of_unreadable_images(checkpoint, images, tmp_path):
    (images / "a\netc:passwd\tfine\x1b[2J.png").write_bytes(b"no image")
    assert run(checkpoint, images, tmp_path / "out") == 0
    (line,) = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert line.count("\t") == 1 and "\x1b" not in line and r"a\netc:passwd\tfine" in line


def test_a_name_that_is_no_text_is_one_record(checkpoint, images, tmp_path):
    (images.parent / os.fsdecode(b"images/\xff\xfe.png")).write_bytes((images / "0.png").read_bytes())
    assert run(checkpoint, images, tmp_path / "out") == 0
    names = [row["file_name"] for row in records(tmp_path / "out")]
    assert names.count("\\xff\\xfe.png") == 1 and len(names) == len(set(names))


def other_pixels(folder):
    path = folder / "train" / "3.png"
    PILImage.new("RGB", (30, 20), "red").save(path)


@pytest.fixture
def stopped(photos, recipe, tmp_path, monkeypatch):
    """A run after its first epoch, and the command that goes on with it."""
    shutil.copytree(photos / "validation", photos / "train")
    command = ["--dataset", str(photos), "--batch_size", "4", "--output_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        killed_at(patch, "finish")
        assert train.main([recipe, *command, "--epochs", "1"]) == 130
    return [str(tmp_path / "run" / "config.yaml"), "--resume"]


def test_a_run_is_not_resumed_on_other_pixels_behind_the_same_labels(stopped, photos, capsys):
    other_pixels(photos)
    assert train.main(stopped) == 2
    assert "was trained with dataset" in capsys.readouterr().err


def test_a_run_can_be_held_to_the_bytes_of_its_images_alone(recipe, photos, tmp_path, capsys):
    shutil.copytree(photos / "validation", photos / "train")
    command = ["--dataset", str(photos), "--batch_size", "4", "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    assert train.main([recipe, *command, "--compare_bytes", "true"]) == 0
    resume = [str(tmp_path / "run" / "config.yaml"), "--resume"]
    for path in (photos / "train").glob("*.png"):
        os.utime(path, (1, 1))  # a copy
    assert train.main(resume) == 0
    data = (photos / "train" / "3.png").read_bytes()
    facts = os.stat(photos / "train" / "3.png")
    other_pixels(photos)
    other = (photos / "train" / "3.png").read_bytes()
    (photos / "train" / "3.png").write_bytes(other.ljust(len(data), b"\0"))
    os.utime(photos / "train" / "3.png", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert train.main(resume) == 2


@pytest.mark.parametrize("option", [["--learning_rate", "0.5"], ["--loss_type", "focal"], ["--ema_decay", "0.5"]])
def test_a_run_is_not_resumed_with_other_options_that_shape_it(stopped, option, capsys):
    assert train.main([*stopped, *option]) == 2
    assert f"was trained with {option[0][2:]}" in capsys.readouterr().err
    assert train.main([*stopped, *option, "--resume_despite", "[options]"]) == 0


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_rows_of_a_table_do_not_name_files_of_this_machine(checkpoint, images, tmp_path, kind, capsys):
    secret = tmp_path / "secret.png"
    shutil.copy(images / "0.png", secret)
    rows = Dataset.from_dict({"image": [{"bytes": None, "path": str(secret)}]}).cast_column("image", Image())
    if kind == "parquet":
        (tmp_path / "data").mkdir()
        pq.write_table(
            pa.table({"image": pa.array([{"bytes": None, "path": str(secret)}], rows.features.arrow_schema[0].type)}),
            tmp_path / "data" / "train.parquet",
        )
        table = pq.read_table(tmp_path / "data" / "train.parquet")
        schema = rows.features.arrow_schema.metadata
        pq.write_table(table.replace_schema_metadata(schema), tmp_path / "data" / "train.parquet")
    else:
        rows.save_to_disk(tmp_path / "data")
        table = rows.data.table
        path = next((tmp_path / "data").glob("*.arrow"))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    assert run(checkpoint, tmp_path / "data", tmp_path / "out") == 2
    assert "store the images' bytes" in capsys.readouterr().err
