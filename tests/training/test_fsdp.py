"""FSDP2 as `accelerate launch --config_file .../fsdp2.yaml` applies it, on gloo and a CPU, where accelerate itself
turns it off: `fully_shard` on the modules that the models name, the state gathered, saved and put back."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from modeling_hsvlt import (
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
)
from training.evaluate import predict
from training.optim import build_ema, build_optimizer, build_scheduler
from training.training_state import copy_training_state, load_training_state

from ..tiny_clip import tiny_clip, tiny_clip_tokenizer
from .tiny_run import reset_accelerate

ROOT = Path(__file__).parents[2]


def hsvlt(backbone=None):
    backbone = backbone or {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
    return HSVLTForImageClassification(
        HSVLTConfig.preset("nano", image_size=32, num_labels=3, label_embedding_dim=8, backbone_config=backbone)
    )


def hsvlt_swin():
    return hsvlt({"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
                  "window_size": 2, "image_size": 32})  # fmt: skip


def mltr():
    return MlTrForImageClassification(
        MlTrConfig.preset("nano", image_size=32, num_labels=3)
    )  # fmt: skip


def hp_dval():
    tokenizer = tiny_clip_tokenizer()
    names = ["cat", "dog", "bird"]
    return HPDVALForImageClassification.from_clip(tiny_clip(tokenizer), tokenizer, names, local_top_k=4)


# What accelerate wraps by default: the classes that a model names, its trunk's among them.
MODELS = {
    "hsvlt": (hsvlt, {"HSVLTInteractionLayer", "ConvNextLayer"}),
    "hsvlt on swin": (hsvlt_swin, {"HSVLTInteractionLayer", "SwinStage"}),
    "mltr": (mltr, {"MlTrLayer"}),
    "hp_dval": (hp_dval, {"CLIPEncoderLayer"}),
}


def wrapped_names(model):
    names = set(model._no_split_modules)
    modules = model.named_modules()  # fully_shard puts FSDP in front of a class's name
    return {name: module for name, module in modules if type(module).__name__.removeprefix("FSDP") in names}


def shard(model, mesh):
    """Bottom up, then the whole, as accelerate does with `fsdp_reshard_after_forward`."""
    for module in reversed(list(wrapped_names(model).values())):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def build(make):
    torch.manual_seed(0)
    return make().train()


def parts(make, mesh=None):
    model = build(make)
    ema = build_ema(model, 0.9)
    if mesh is not None:
        shard(model, mesh)
        shard(ema.module, mesh)
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1)
    scheduler = build_scheduler(optimizer, schedule="cosine", warmup_steps=1, total_steps=9)
    return {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler, "scaler": None}


def train(run, steps, rank=0, world=1):
    losses = []
    for step in steps:
        torch.manual_seed(step)
        pictures, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 2, (4, 3)).float()
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        loss = run["model"](pixel_values=pictures[mine], labels=labels[mine]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(run["model"].parameters(), 1.0)
        run["optimizer"].step()
        run["optimizer"].zero_grad()
        run["scheduler"].step()
        run["ema"].update_parameters(run["model"])
        losses.append((loss.item(), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)))
    return losses


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    reset_accelerate()


@pytest.mark.parametrize("name", MODELS)
def test_the_wrap_list_names_the_layers_that_repeat(name):
    make, expected = MODELS[name]
    model = make()
    found = {type(module).__name__ for module in wrapped_names(model).values()}
    assert expected <= found
    wrapped = sum(p.numel() for module in wrapped_names(model).values() for p in module.parameters())
    assert wrapped > 0


SHARDED = [name for name in MODELS if name != "hp_dval"]


def test_clip_s_scalar_keeps_hp_dval_from_being_sharded(mesh):
    with pytest.raises(ValueError, match=r"doesn't support scalar parameters. Change logit_scale"):
        shard(hp_dval(), mesh)


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_trains_and_saves_like_a_plain_one(name, mesh, tmp_path):
    make, _ = MODELS[name]
    plain, sharded = parts(make), parts(make, mesh)
    assert all(isinstance(module, FSDPModule) for module in wrapped_names(sharded["model"]).values())
    assert all(isinstance(parameter, DTensor) for parameter in sharded["model"].parameters())
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.zeros(3), "index": row} for row in range(3)]
    for model in (sharded["model"], sharded["ema"].module):  # a validation must leave it fit for training
        predict(model, DataLoader(rows, batch_size=2), Accelerator(cpu=True), progress=False)
    torch.testing.assert_close(train(sharded, range(3)), train(plain, range(3)))

    expected, state = (copy_training_state(progress={"step": 3}, **run) for run in (plain, sharded))
    assert expected.tensors.keys() == state.tensors.keys() and expected.values == state.values
    for key, tensor in expected.tensors.items():
        assert not isinstance(state.tensors[key], DTensor)
        torch.testing.assert_close(state.tensors[key], tensor, rtol=1e-4, atol=1e-6, msg=key)
    sharded["model"].save_pretrained(tmp_path / "plain", state_dict=state.weights())
    merged = type(plain["model"]).from_pretrained(tmp_path / "plain")  # one file, the plain class
    assert merged.config.architectures == [type(plain["model"]).__name__]
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, state.weights()[key])

    state.write(tmp_path)
    resumed, on_one = parts(make, mesh), parts(make)
    for run in (resumed, on_one):  # on as many processes, and without sharding
        assert load_training_state(tmp_path, **run) == {"step": 3}
    assert train(resumed, range(3, 5)) == train(sharded, range(3, 5))
    torch.testing.assert_close(train(on_one, range(3, 5)), train(plain, range(3, 5)))
