"""Damage of an MlTr's and an HP-DVAL's checkpoint; HSVLT's has test_hostile_input.py and attacks/test_open_doors.py.

Every command that takes a checkpoint loads it by `load_checkpoint`, but push, convert and train, which call the same
`load_pretrained`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_hsvlt import MlTrForImageClassification, MultiLabelImageProcessor, MultiLabelProcessor
from training import evaluate, push, tag
from training.checkpoint.loading import load_checkpoint
from training.options import CheckpointOptions

from .test_modeling_hp_dval import NAMES
from .test_modeling_hp_dval import make_model as make_hp_dval
from .test_modeling_mltr import make_config as mltr_config
from .training.tiny_checkpoint import save_images

WEIGHTS = "model.safetensors"


def make_mltr():
    return MlTrForImageClassification(mltr_config(num_labels=3, id2label=dict(enumerate(NAMES))))


def save(model, folder):
    model.save_pretrained(folder)
    processor = MultiLabelImageProcessor(size={"height": 32, "width": 32})
    MultiLabelProcessor(processor, id2label=model.config.id2label).save_pretrained(folder)


@pytest.fixture(scope="module", params=[make_mltr, make_hp_dval], ids=["mltr", "hp_dval"])
def saved_once(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(request.param(), folder)
    return folder


@pytest.fixture
def checkpoint(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "checkpoint")


def load(folder):
    return load_checkpoint(CheckpointOptions(checkpoint=str(folder)))


def cut(length):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


def change(work):
    """Of the tensors, by `work(tensors, name of a matrix)`."""

    def changed(folder):
        tensors = load_file(folder / WEIGHTS)
        work(tensors, next(name for name in sorted(tensors) if tensors[name].ndim == 2))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def put(number):
    return lambda tensors, name: tensors[name].view(-1)[:1].fill_(number)


def index(folder):
    names = list(load_file(folder / WEIGHTS))
    (folder / WEIGHTS).rename(folder / "weights.bin")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "weights.bin")}))


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "me/other", "peft_type": "LORA"}')
    (folder / "adapter_model.bin").touch()


def edit(**values):
    def edited(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edited


DAMAGE = {
    "empty": (cut(0), "cannot be loaded"),
    "a few bytes": (cut(9), "cannot be loaded"),
    "a byte too few": (cut(-1), "cannot be loaded"),
    "no tensor": (change(lambda tensors, name: tensors.clear()), "lacks|cannot be loaded|no tensor"),
    "a tensor too few": (change(lambda tensors, name: tensors.pop(name)), "lacks 1 tensors"),
    "another name": (change(lambda tensors, name: tensors.update(x=tensors.pop(name))), "lacks 1 tensors"),
    "another shape": (change(lambda tensors, name: tensors.update({name: tensors[name][1:]})), "of size"),
    "no rows": (change(lambda tensors, name: tensors.update({name: tensors[name][:0]})), "of size"),
    "int64": (change(lambda tensors, name: tensors.update({name: tensors[name].long()})), "as I64, which are no"),
    "bool": (change(lambda tensors, name: tensors.update({name: tensors[name].bool()})), "as BOOL, which are no"),
    "complex": (change(lambda tensors, name: tensors.update({name: tensors[name].to(torch.cfloat)})), "as C64"),
    "NaN": (change(put(float("nan"))), "not finite"),
    "infinity": (change(put(float("-inf"))), "not finite"),
    "an index of other files": (index, "'weights.bin', which is no safetensors file"),
    "an adapter that is a pickle": (adapter, "adapter that is no safetensors file"),
    "a field that is no number": (edit(initializer_range=float("nan")), "initializer_range nan, which is not finite"),
    "a field without end": (edit(hidden_dropout_prob=float("inf")), "hidden_dropout_prob inf, which is not finite"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_sentence_about_the_folder(checkpoint, what):
    hurt, words = DAMAGE[what]
    hurt(checkpoint)
    with pytest.raises((ValueError, OSError), match=words) as error:
        load(checkpoint)
    assert str(checkpoint) in str(error.value) and "\n" not in str(error.value)


def edit_processor(folder, **values):
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= values
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("command", ["evaluate", "tag", "show", "push"])
@pytest.mark.parametrize("what", ["a number of heads", "no epsilon", "a pixel"])
def test_what_only_shows_when_it_computes_is_one_sentence(tmp_path, what, command, capsys):
    """An HP-DVAL: its layers are transformers' own, which look at little."""
    checkpoint, photos = tmp_path / "checkpoint", tmp_path / "photos"
    save(make_hp_dval(), checkpoint)
    save_images(photos, [["cat"], ["dog", "potted_plant"]], NAMES)
    if what == "a pixel":
        edit_processor(checkpoint, size={"height": 1, "width": 1})
    else:
        text = json.loads((checkpoint / "config.json").read_text())["text_config"]
        field = {"num_attention_heads": -1} if what == "a number of heads" else {"layer_norm_eps": None}
        edit(text_config=text | field)(checkpoint)
    source, images = str(checkpoint), photos / "validation"
    call = {
        "evaluate": lambda: evaluate.main([source, str(photos)]),
        "tag": lambda: tag.main([source, str(images), str(tmp_path / "out"), "--num_workers=0", "--threshold=0.5"]),
        "show": lambda: tag.main([source, str(images / "0.png")]),
        "push": lambda: push.main([source, "me/model", "--dry_run"]),
    }[command]
    status, said = call(), capsys.readouterr().err
    assert "Traceback" not in said
    if status != 0:  # a text tower is not asked where the embeddings of its labels are kept
        assert status == 2 and f"error: {checkpoint} cannot compute scores (" in said
    assert status == 2 or (what != "a pixel" and command != "push")


def test_a_whole_one_loads(checkpoint):
    model, _ = load(checkpoint)
    assert list(model.config.id2label.values()) == NAMES
