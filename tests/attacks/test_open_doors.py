"""Files from strangers that ran code, read what they should not, or filled the memory."""

import json
import pickle
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, ConvNextConfig, ConvNextModel

from training import calibrate, convert, evaluate, export, fit_thresholds, push, tag, train

WEIGHTS = "model.safetensors"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def commands(checkpoint, photos, tmp_path, recipe):
    """Every command that loads a checkpoint, as a call that gives its exit status."""
    source, data, out = str(checkpoint), str(photos), str(tmp_path / "out")
    return {
        "evaluate": lambda: evaluate.main([source, data]),
        "fit_thresholds": lambda: fit_thresholds.main([source, data]),
        "calibrate": lambda: calibrate.main([source, data]),
        "tag": lambda: tag.main([source, f"{data}/validation", out, "--num_workers", "0"]),
        "export": lambda: export.main([source, out]),
        "push": lambda: push.main([source, "me/model", "--dry_run"]),
        "convert": lambda: convert.main([source, f"{out}.safetensors", "--to", "official"]),
        "train": lambda: train.main([recipe, "--output_dir", out, "--init_from", source]),
    }


def refused(call, capsys, words):
    """One sentence and a status above 0."""
    capsys.readouterr()
    assert call() in (1, 2)
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and words in said[0] and "Traceback" not in error, error[-2000:]


def index_of_a_pickle(folder, touched):
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).unlink()
    (folder / "weights.bin").write_bytes(pickle.dumps(Bomb(touched)))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_index_that_names_a_pickle_is_refused_by_every_command(checkpoint, photos, tmp_path, recipe, capsys):
    index_of_a_pickle(checkpoint, tmp_path / "touched")
    for call in commands(checkpoint, photos, tmp_path, recipe).values():
        refused(call, capsys, "'weights.bin', which is no safetensors file")
    assert not (tmp_path / "touched").exists()


def test_an_index_of_a_backbone_or_text_encoder_that_names_a_pickle_is_refused(tmp_path, recipe, capsys):
    backbone, encoder = tmp_path / "backbone", tmp_path / "encoder"
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])).save_pretrained(backbone)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    CLIPTextModel(CLIPTextConfig(vocab_size=50, **small)).save_pretrained(encoder)
    for option, folder in (("--backbone", backbone), ("--label_encoder", encoder)):
        index_of_a_pickle(folder, tmp_path / "touched")
        call = [recipe, "--output_dir", str(tmp_path / "out"), option, str(folder)]
        refused(lambda call=call: train.main(call), capsys, "no safetensors file")
    assert not (tmp_path / "touched").exists()


def test_a_config_may_not_name_another_file_of_weights(checkpoint, photos, capsys):
    edit(checkpoint / "config.json", transformers_weights="other.safetensors.index.json")
    refused(lambda: evaluate.main([str(checkpoint), str(photos)]), capsys, "transformers_weights")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_processor(checkpoint, **values):
    path = checkpoint / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= values
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("hurt", ["config", "processor"])
def test_code_that_a_file_names_is_neither_run_nor_asked_about(
    checkpoint, photos, tmp_path, recipe, capsys, monkeypatch, hurt
):
    """transformers asks on standard input, and a `y` runs it."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda words: (asked.append(words), "y")[1])
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor", "AutoProcessor")
    code = dict.fromkeys(names, "evil.Evil")
    if hurt == "config":
        edit(checkpoint / "config.json", auto_map=code, model_type="evil", architectures=["Evil"])
    else:
        edit(checkpoint / "processor_config.json", auto_map=code, processor_class="EvilProcessor")
        edit_processor(checkpoint, auto_map=code, image_processor_type="EvilProcessor")
    for name, call in commands(checkpoint, photos, tmp_path, recipe).items():
        if hurt == "config" or name not in ("train", "convert"):  # of which the first reads no processor
            call()
            assert "Traceback" not in capsys.readouterr().err
    assert not asked and not (tmp_path / "ran").exists()


def set_weight(checkpoint, value):
    tensors = load_file(checkpoint / WEIGHTS)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name].flatten()[0] = value
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def drop_weight(checkpoint):
    tensors = load_file(checkpoint / WEIGHTS)
    del tensors[next(name for name in tensors if "classifier" in name)]
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


def scale_weights(checkpoint, factor):
    tensors = {name: tensor * factor for name, tensor in load_file(checkpoint / WEIGHTS).items()}
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})


NOT_NUMBERS = {
    "a weight": (lambda folder: set_weight(folder, float("nan")), "not finite"),
    "an infinite weight": (lambda folder: set_weight(folder, float("inf")), "not finite"),
    "a missing tensor": (drop_weight, "lacks 1 tensors"),
    "a threshold": (lambda folder: edit(folder / "config.json", thresholds=[0.5, float("nan"), 0.5]), "not finite"),
    "a mean": (lambda folder: edit_processor(folder, image_mean=[float("nan")] * 3), "image_mean"),
    "a standard deviation of 0": (lambda folder: edit_processor(folder, image_std=[0.2, 0.0, 0.2]), "image_std"),
    "four means": (lambda folder: edit_processor(folder, image_mean=[0.5] * 4), "image_mean"),
    "a word for a mean": (lambda folder: edit_processor(folder, image_mean="half"), "image_mean"),
    "a standard deviation next to 0": (lambda folder: edit_processor(folder, image_std=[1e-300] * 3), "image_std"),
    "weights that overflow": (lambda folder: scale_weights(folder, 1e30), "scores that are no numbers"),
    "a rescale factor": (lambda folder: edit_processor(folder, rescale_factor=float("inf")), "rescale_factor"),
}


@pytest.mark.parametrize("what", NOT_NUMBERS)
def test_numbers_that_are_not_finite_and_missing_tensors_are_refused(checkpoint, photos, tmp_path, what, capsys):
    hurt, words = NOT_NUMBERS[what]
    hurt(checkpoint)
    refused(lambda: evaluate.main([str(checkpoint), str(photos)]), capsys, words)
    arguments = [str(checkpoint), f"{photos}/validation", str(tmp_path / "out"), "--threshold", "0.5"]
    refused(lambda: tag.main(arguments), capsys, words)
    assert not list(tmp_path.glob("out/part-*"))


HUGE = {
    "depths": {"backbone_config": {"model_type": "convnext", "hidden_sizes": [8] * 4, "depths": [10**6, 1, 1, 1]}},
    "small depths": {"backbone_config": {"model_type": "convnext", "hidden_sizes": [8] * 4, "depths": [900, 1, 1, 1]}},
    "widths": {"backbone_config": {"model_type": "convnext", "hidden_sizes": [8, 8, 8, 10**9], "depths": [1] * 4}},
    "labels": {"num_labels": 2 * 10**9, "id2label": None, "label2id": None},
}


@pytest.mark.parametrize("what", HUGE)
def test_a_config_is_checked_against_the_tensors_before_anything_is_allocated(checkpoint, photos, what, capsys):
    edit(checkpoint / "config.json", **HUGE[what])
    refused(lambda: evaluate.main([str(checkpoint), str(photos)]), capsys, "which no tensor of it bears out")


@pytest.mark.parametrize("size", [{"height": 100_000, "width": 100_000}, {"shortest_edge": 10**9}, {"height": -1}])
def test_a_processor_of_an_absurd_size_is_refused(checkpoint, photos, size, capsys):
    edit_processor(checkpoint, size=size)
    refused(lambda: evaluate.main([str(checkpoint), str(photos)]), capsys, "size")


LABELS = {
    "holes": {"0": "dog", "1": "cat", "7": "sofa"},
    "null": {"0": "dog", "1": None, "2": "sofa"},
    "a list": ["dog", "cat", "sofa"],
    "words": {"a": "dog", "b": "cat", "c": "sofa"},
    "surrogates": {"0": "dog", "1": "\ud800", "2": "sofa"},
    "an escape": {"0": "dog", "1": "\x1b[31mcat", "2": "sofa"},
    "twice": {"0": "dog", "1": "dog", "2": "sofa"},
    "empty": {"0": "dog", "1": "", "2": "sofa"},
}


@pytest.mark.parametrize("what", LABELS)
def test_label_names_of_a_config_are_plain_names_or_refused(checkpoint, photos, what, capsys):
    edit(checkpoint / "config.json", id2label=LABELS[what], label2id=None)
    refused(lambda: evaluate.main([str(checkpoint), str(photos)]), capsys, "label" if what != "a list" else "id2label")


@pytest.mark.parametrize("source", ["rows", "a column", "an option", "labels.txt"])
def test_label_names_of_data_are_under_the_same_rule(photos, checkpoint, source, capsys, recipe, tmp_path):
    shutil.copytree(photos / "validation", photos / "train")
    options, evil = [], "\x1b]0;pwned\x07cat"
    if source == "labels.txt":
        (photos / "labels.txt").write_text(f"dog\n{evil}\n")
    else:
        (photos / "labels.txt").unlink()
    if source == "rows":
        for split in ("train", "validation"):
            rows = (photos / split / "metadata.jsonl").read_text()
            (photos / split / "metadata.jsonl").write_text(rows.replace('"cat"', json.dumps(evil)))
    elif source == "an option":
        options = ["--label_names", json.dumps(["dog", evil])]
    elif source == "a column":
        for split in ("train", "validation"):
            (photos / split / "metadata.jsonl").unlink()
            names = [f"{number}.png,1,0" for number in range(7)]
            (photos / split / "metadata.csv").write_text("\n".join([f'file_name,dog,"{evil}"', *names]))
    call = [recipe, "--dataset", str(photos), "--output_dir", str(tmp_path / "out"), *options]
    capsys.readouterr()
    assert train.main(call) == 2
    error = capsys.readouterr().err
    assert "control characters" in error and "\x1b]0" not in error


DAMAGE = {
    "nothing": b"",
    "half": None,
    "noise": bytes(range(256)) * 8,
    "a list": b"[1, 2]",
    "null": b"null",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "a huge number": b'{"hidden_size": ' + b"9" * 5_000 + b"}",
    "a key twice": b'{"model_type": "hsvlt", "model_type": "mltr"}',
    "latin-1": '{"model_type": "hsvlt\xe9"}'.encode("latin-1"),
}


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", WEIGHTS])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_of_a_checkpoint_ends_in_one_sentence(checkpoint, photos, name, what, capsys):
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if what == "half" else DAMAGE[what])
    refused(lambda: evaluate.main([str(checkpoint), str(photos)]), capsys, "")


def test_a_long_thin_image_does_not_become_a_huge_one(tmp_path):
    from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor

    processor = MultiLabelImageProcessor(size={"shortest_edge": 2000})
    with pytest.raises(ValueError, match="400000 x 2 px is too long"):
        processor(torch.zeros(3, 2, 400_000, dtype=torch.uint8))


def test_a_link_laid_where_a_sidecar_is_written_first_is_not_followed(checkpoint, photos, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".0.txt.new", ".0.png.xmp.new", "1.txt", "1.png.xmp"):
        (photos / "validation" / name).symlink_to(victim)
    command = [str(checkpoint), f"{photos}/validation", str(tmp_path / "out"), "--num_workers", "0"]
    assert tag.main([*command, "--threshold", "0", "--sidecars", "txt", "xmp", "--overwrite_sidecars"]) == 0
    assert victim.read_text() == "precious"
    assert "dog" in (photos / "validation" / "0.txt").read_text()
    assert "dog" in (photos / "validation" / "1.txt").read_text()


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_rows_of_parquet_do_not_name_files_of_this_machine(checkpoint, recipe, tmp_path, command, capsys):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (30, 20)).save(secret)
    features = Features({"image": ImageFeature(), "labels": List(Value("string"))})
    rows = {"image": [{"bytes": None, "path": str(secret)}], "labels": [["cat"]]}
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        table = pa.table(rows, schema=features.arrow_schema)
        pq.write_table(table, tmp_path / "data" / f"{split}.parquet")
    capsys.readouterr()
    if command == "train":
        status = train.main([recipe, "--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")])
    else:
        status = evaluate.main([str(checkpoint), str(tmp_path / "data"), "--label_names", "dog", "cat", "tv monitor"])
    assert status == 2 and "store the images' bytes" in capsys.readouterr().err


@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("name", ["metadata.jsonl", "labels.txt", "data.parquet", "state.json", "rows.csv"])
def test_damage_of_a_data_set_ends_in_one_sentence(checkpoint, photos, tmp_path, name, what, capsys):
    if name == "labels.txt":
        path = photos / name
    elif name == "metadata.jsonl":
        path = photos / "validation" / name
    else:
        shutil.rmtree(photos)
        photos.mkdir()
        path = photos / ("validation.csv" if name == "rows.csv" else name)
        path.write_bytes(b"file_name,labels\n0.png,cat\n")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if what == "half" else DAMAGE[what])
    capsys.readouterr()
    status = evaluate.main([str(checkpoint), str(photos)])  # half a list of labels may be a list of labels
    error = capsys.readouterr().err
    assert status in (0, 2) and "Traceback" not in error and (status == 0 or "error: " in error)
