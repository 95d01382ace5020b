"""Files from strangers, each with an attack in it: code that would run, addresses that would be fetched, sizes that
would fill the memory. Images have tests/fuzz, URLs test_image_urls.py, pickles of others' checkpoints
training/models/test_official_hsvlt.py."""

import json
import os
import pickle
import shutil
import socket
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, ConvNextConfig

from modeling_hsvlt import HPDVALConfig, HSVLTConfig, MlTrConfig
from modeling_hsvlt.label_names import MAX_LABEL_NAME
from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.pipeline_multilabel import MultiLabelImageClassificationPipeline
from modeling_hsvlt.processing_multilabel import check_image_settings
from training.checkpoint.folder import write_marker
from training.checkpoint.loading import load_checkpoint
from training.checkpoint.series import checkpoints, newest_good
from training.config import TrainingConfig
from training.data.image_folder import read_image_folders
from training.data.label_name_files import MAX_LABEL_FILE, read_label_names
from training.models.build import build_model
from training.tag import main as tag

from .training.tiny_checkpoint import NAMES, save_checkpoint, save_images

RAN = "HOSTILE_CODE_RAN"


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    save_checkpoint(folder := tmp_path_factory.mktemp("saved"))
    return folder


@pytest.fixture
def checkpoint(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def nothing_is_fetched_or_run(monkeypatch):
    """Whatever an attack tries, no address outside is looked up and no code of it runs."""
    asked = []

    def refused(host, *arguments, **options):
        asked.append(host)
        raise socket.gaierror(f"{host} was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.delenv(RAN, raising=False)
    yield
    assert not asked and RAN not in os.environ


def load(folder):
    class Arguments:
        checkpoint, revision = str(folder), None

    return load_checkpoint(Arguments)


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- pickles


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_wherever_weights_are_read(checkpoint, tmp_path):
    touched = tmp_path / "touched"
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(touched)))
    backbone = tmp_path / "backbone"
    ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]).save_pretrained(backbone)
    shutil.copy(checkpoint / "pytorch_model.bin", backbone)
    with pytest.raises(OSError, match="safetensors"):
        load(checkpoint)
    with pytest.raises(OSError, match="safetensors"):
        build_model(TrainingConfig(init_from=str(checkpoint)), NAMES)
    with pytest.raises(OSError, match="safetensors"):
        build_model(TrainingConfig(preset=None, backbone=str(backbone)), NAMES)
    assert not touched.exists()


def test_pickles_beside_a_checkpoint_of_a_run_are_not_read(tmp_path):
    """What accelerate and the Trainer would load: optimizer.bin, scheduler.pt, random states."""
    touched, folder = tmp_path / "touched", tmp_path / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    write_marker(folder, step=3)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb(touched)))
    assert newest_good(tmp_path / "run") == folder == checkpoints(tmp_path / "run")[0]
    assert not touched.exists()


# --- configurations


@pytest.mark.parametrize("where", ["evil", "evil/repository--evil"])
def test_a_config_that_names_code_gets_ours(checkpoint, where):
    (checkpoint / "evil.py").write_text(f"import os\nos.environ[{RAN!r}] = 'yes'\nclass Evil: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageClassification"), f"{where}.Evil")
    edit(checkpoint, auto_map=auto_map)
    model, _ = load(checkpoint)
    assert type(model).__module__ == "modeling_hsvlt.modeling_hsvlt"


@pytest.mark.parametrize(
    "values",
    [
        {"backbone": "evil/repository", "use_pretrained_backbone": True},
        {"use_timm_backbone": True},
        {"backbone_kwargs": {"pretrained": True}},
    ],
)
def test_a_config_that_names_a_backbone_to_download_is_refused(checkpoint, values):
    edit(checkpoint, **values)
    with pytest.raises(ValueError, match="is not accepted: describe the backbone in backbone_config"):
        load(checkpoint)


def test_a_text_encoder_in_a_config_is_a_record_and_not_a_source(checkpoint):
    edit(checkpoint, label_text_encoder="evil/repository", _name_or_path="evil/repository")
    model, _ = load(checkpoint)
    assert model.config.label_text_encoder == "evil/repository"
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, len(NAMES))


def test_an_adapter_does_not_choose_its_base(checkpoint, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "evil/repository", "peft_type": "LORA"})
    )
    with pytest.raises(ValueError, match=r"adapter of 'evil/repository', and a downloaded file does not choose"):
        load(adapter)
    with pytest.raises(ValueError, match=r"adapter of 'evil/repository'"):
        build_model(TrainingConfig(init_from=str(adapter)), NAMES)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        (
            "label_embedding_dim",
            16,
            r"holds hsvlt\.\S+ of size \[8, 8\], and its config.json asks for \[8, 16\]",
        ),
        (
            "normalize_label_tokens",
            False,
            r"holds \d+ tensors that its config.json has no place for, the first is",
        ),
        ("residual_attention", True, r"lacks 5 tensors, the first is residual_attention\.bias"),
    ],
)
def test_a_config_beside_weights_of_another_model_is_one_sentence(checkpoint, field, value, words, capfd):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=words):
        load(checkpoint)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_weights_are_refused(checkpoint, kind):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].to(kind)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds classifier\.weight as (I8|BOOL|C64), which are no weights"):
        load(checkpoint)


def test_what_is_wrong_with_a_folder_is_said_of_the_folder(checkpoint):
    for name, words in (("processor_config.json", "cannot be loaded"), ("config.json", "has no config.json: give")):
        (checkpoint / name).unlink()
        with pytest.raises((OSError, ValueError), match=rf"^{checkpoint} {words}") as error:
            load(checkpoint)
        assert "huggingface.co" not in str(error.value)
    (checkpoint / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises((OSError, ValueError), match=str(checkpoint)):
        load(checkpoint)


@pytest.mark.parametrize(("name", "value"), [("rescale_factor", [[1]]), ("rescale_factor", [1]), ("image_mean", [[1]])])
def test_settings_of_images_that_are_nested_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"has {name} "):
        check_image_settings({name: value})


def test_scores_that_are_no_numbers_are_no_answer(checkpoint, capsys):
    tensors = {name: tensor * 1e30 for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    image = checkpoint.parent / "red.png"
    Image.new("RGB", (16, 16), "red").save(image)
    assert tag([str(checkpoint), str(image)]) == 2
    assert "scores are no numbers" in capsys.readouterr().err
    model, processor = load(checkpoint)
    with pytest.raises(ValueError, match="scores are no numbers"):
        MultiLabelImageClassificationPipeline(model=model, image_processor=processor)(str(image))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", [HSVLTConfig, MlTrConfig, HPDVALConfig])
def test_a_config_that_asks_for_another_attention_kernel_is_refused(kind, key, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**kind().to_dict(), key: "evil/attention"}))
    with pytest.raises(ValueError, match=r"asks for the attention kernel 'evil/attention'"):
        AutoConfig.from_pretrained(tmp_path)
    for part in [name for name in kind().sub_configs if getattr(kind(), name) is not None]:
        values = kind().to_dict()
        values[part][key] = "evil/attention"
        (tmp_path / "config.json").write_text(json.dumps(values))
        inner = getattr(AutoConfig.from_pretrained(tmp_path), part)
        assert inner._attn_implementation is None, "the outer configuration's holds"
    assert kind(attn_implementation="eager")._attn_implementation == "eager"


@pytest.mark.parametrize("shard", ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors"])
def test_shards_outside_the_folder_are_refused(checkpoint, tmp_path, shard):
    outside = tmp_path / "outside.safetensors"
    shutil.move(checkpoint / "model.safetensors", outside)
    names = [name for name, _ in AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(checkpoint))
             .named_parameters()]  # fmt: skip
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard.format(outside=outside))}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not in its folder: do not load this"):
        load(checkpoint)


# --- label files


def test_a_label_file_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "labels.txt"
    path.touch()
    os.truncate(path, 2**40)  # a hole: no disk holds it
    with pytest.raises(ValueError, match=f"1,099,511,627,776 bytes, more than the limit of {MAX_LABEL_FILE:,}"):
        read_label_names(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * (MAX_LABEL_NAME + 1), r"line 2: the name 'x{40}' has 1,001 letters"),
        ("\x1b]0;pwned\x07cat", r"line 2: the name '\\x1b\]0;pwned\\x07cat' has control characters"),
        ("ca\0t", r"has control characters"),
        ("cat\u202egpj.exe", r"'cat\\u202egpj.exe' has control characters"),  # writes itself backwards
    ],
)
def test_names_that_steer_a_terminal_or_fill_a_page_are_refused(tmp_path, name, message):
    (tmp_path / "labels.txt").write_text(f"dog\n{name}\n")
    with pytest.raises(ValueError, match=message):
        read_label_names(tmp_path / "labels.txt")


def test_names_with_path_parts_are_names_and_lead_nowhere(tmp_path):
    names = ["../../outside", "/etc/passwd", "a/b", "..", "C:\\x"]
    (tmp_path / "labels.txt").write_text("\n".join(names))
    assert read_label_names(tmp_path / "labels.txt") == names
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    before = sorted(path for path in tmp_path.rglob("*"))
    save_checkpoint(work / "checkpoint", names)
    model, _ = load(work / "checkpoint")
    assert list(model.config.id2label.values()) == names
    written = [path for path in tmp_path.rglob("*") if path not in before]
    assert all(path.is_relative_to(work / "checkpoint") for path in written)
    assert all(path.parent in (work, work / "checkpoint") for path in written), "no name became a folder"


def test_rows_do_not_reach_out_of_the_data_set_and_are_not_endless(tmp_path):
    data, rows = tmp_path / "data", tmp_path / "data" / "validation" / "metadata.jsonl"
    save_images(data)
    whole = rows.read_text()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    for name in ("../../secret.png", str(tmp_path / "secret.png")):
        rows.write_text(whole + "\n" + json.dumps({"file_name": name, "labels": []}))
        with pytest.raises(ValueError, match=r"names 1 image .*secret.png"):
            read_image_folders(data)
    rows.write_text(json.dumps({"file_name": "0.png", "labels": ["x" * 2**24]}))
    with pytest.raises(ValueError, match="line 1 is longer than 16,777,216 letters; it is no row"):
        read_image_folders(data)


# --- images: limits (kinds of damage are in tests/fuzz)


def test_pixels_frames_and_bytes_are_limited(tmp_path, monkeypatch):
    loaded = []
    plain = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: (loaded.append(self.size), plain(self))[1])
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(bomb)  # 50 KB, 1.2 GB as RGB
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bomb.png"):
        load_image(bomb)
    assert not loaded, "refused before it is decoded"

    long = tmp_path / "long.gif"
    frames = [Image.new("L", (300, 300), shade % 256) for shade in range(300)]
    frames[0].save(long, save_all=True, append_images=frames[1:])
    stream = BytesIO(long.read_bytes())
    assert load_image(stream).size == (300, 300) and set(loaded) == {(300, 300)}
    assert stream.tell() < long.stat().st_size / 2, "one block, with one frame of 300, was read"

    data = long.read_bytes()
    for source in (str(long), data, {"bytes": data, "path": str(long)}, BytesIO(data)):
        with pytest.raises(ValueError, match=r"bytes, more than the limit of 1000; raise max_bytes"):
            load_image(source, max_bytes=1000)
