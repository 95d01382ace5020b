"""FSDP2 as `accelerate launch --config_file .../fsdp2.yaml` applies it, on gloo and a CPU, where accelerate itself
turns it off: `fully_shard` on the modules that the models name, the state gathered, saved and put back."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
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
from training.checkpoint.state import copy_training_state, load_training_state
from training.loop.optim import build_ema, build_optimizer, build_scheduler
from training.scoring.predict import predict

from ...forked import forked
from ...tiny_clip import tiny_clip, tiny_clip_tokenizer
from ...tolerance import assert_close_outputs


def hsvlt(backbone=None):
    backbone = backbone or {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 2, 1]}
    return HSVLTForImageClassification(
        HSVLTConfig.preset("nano", image_size=32, num_labels=3, label_embedding_dim=8, backbone_config=backbone)
    )


def hsvlt_swin():
    return hsvlt({"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
                  "window_size": 2, "image_size": 32, "drop_path_rate": 0.0})  # fmt: skip


def mltr():
    return MlTrForImageClassification(
        MlTrConfig.preset("nano", image_size=32, num_labels=3, depths=[1, 1, 1, 1])
    )  # fmt: skip


def hp_dval():
    tokenizer = tiny_clip_tokenizer()
    names = ["cat", "dog", "bird"]
    model = HPDVALForImageClassification.from_clip(tiny_clip(tokenizer), tokenizer, names, local_top_k=4)
    model.set_phase("joint")  # student and contexts: frozen and trained parameters side by side
    with torch.no_grad():  # off the kink of both distances, where rounding alone would decide on a gradient's sign
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# What accelerate wraps by default: the classes that a model names, its backbone's among them.
MODELS = {
    "hsvlt": (hsvlt, {"HSVLTInteractionLayer", "ConvNextLayer"}),
    "hsvlt on swin": (hsvlt_swin, {"HSVLTInteractionLayer", "SwinStage"}),
    "mltr": (mltr, {"MlTrLayer"}),
    "hp_dval": (hp_dval, {"CLIPEncoderLayer"}),
}

# Not hsvlt with muon: its last map is one position here, so that gradients of its queries are rounding alone, of which
# Muon makes whole steps.
RUNS = [*((name, "adamw") for name in MODELS), ("mltr", "muon")]


def wrapped_names(model):
    names = set(model._no_split_modules)
    modules = model.named_modules()  # fully_shard puts FSDP in front of a class's name
    return {name: module for name, module in modules if type(module).__name__.removeprefix("FSDP") in names}


def shard(model, mesh):
    """Bottom up, then the whole, as accelerate does with `fsdp_reshard_after_forward`."""
    for module in reversed(list(wrapped_names(model).values())):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def shard_by_accelerate(model, mesh):
    """accelerate's own code, which `Accelerator.prepare` does not reach without a GPU, with what fsdp2.yaml says."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("data",): mesh},
        parallelism_config=SimpleNamespace(fsdp_dim_names=["data"]),
        mixed_precision="no",
        is_main_process=True,
    )
    return fsdp2_prepare_model(accelerator, model)


def build(make):
    torch.manual_seed(0)
    return make().train()


def parts(make, mesh=None, shard=shard, optimizer="adamw"):
    model = build(make)
    ema = build_ema(model, 0.9)
    if mesh is not None:
        shard(model, mesh)
        shard(ema.module, mesh)
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, optimizer=optimizer)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3  # with its own 1e-8 AdamW makes whole steps of gradients that are rounding alone
    scheduler = build_scheduler(optimizer, schedule="cosine", warmup_steps=0, total_steps=9)
    return {"model": model, "ema": ema, "optimizer": optimizer, "scheduler": scheduler, "scaler": None}


def train(run, steps, rank=0, world=1):
    losses = []
    for step in steps:
        torch.manual_seed(step)
        images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 2, (4, 3)).float()
        mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
        loss = run["model"](pixel_values=images[mine], labels=labels[mine]).loss
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


@pytest.mark.parametrize("name", MODELS)
def test_the_wrap_list_names_the_layers_that_repeat(name):
    make, expected = MODELS[name]
    model = make()
    found = {type(module).__name__ for module in wrapped_names(model).values()}
    assert expected <= found
    wrapped = sum(p.numel() for module in wrapped_names(model).values() for p in module.parameters())
    assert wrapped > 0


@pytest.mark.parametrize(("name", "optimizer"), RUNS)
def test_a_sharded_model_trains_like_a_plain_one(name, optimizer, mesh):
    make, _ = MODELS[name]
    plain, sharded = parts(make, optimizer=optimizer), parts(make, mesh, optimizer=optimizer)
    assert all(isinstance(module, FSDPModule) for module in wrapped_names(sharded["model"]).values())
    assert all(isinstance(parameter, DTensor) for parameter in sharded["model"].parameters())
    rows = [{"pixel_values": torch.zeros(3, 32, 32), "labels": torch.zeros(3), "index": row} for row in range(3)]
    for model in (part for run in (plain, sharded) for part in (run["model"], run["ema"].module)):
        # A validation must leave it fit for training.
        predict(model, DataLoader(rows, batch_size=2), Accelerator(cpu=True), progress=False)
    assert_close_outputs(train(sharded, range(2)), train(plain, range(2)), steps=4096)  # two steps of AdamW apart

    expected, state = (copy_training_state(progress={"step": 2}, **run) for run in (plain, sharded))
    assert expected.tensors.keys() == state.tensors.keys() and expected.values == state.values
    for key, tensor in expected.tensors.items():
        assert not isinstance(state.tensors[key], DTensor)
        atol = max(1e-6, 5e-4 * tensor.abs().max().item())  # some gradients are rounding alone, in any step
        torch.testing.assert_close(state.tensors[key], tensor, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_accelerate_s_own_code_wraps_the_same_layers(name, mesh):
    make, expected = MODELS[name]
    model = shard_by_accelerate(make(), mesh)
    assert all(isinstance(module, FSDPModule) for module in wrapped_names(model).values())
    assert expected <= {type(module).__name__.removeprefix("FSDP") for module in wrapped_names(model).values()}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def two_ranks(folder):
    """One of two processes: every model, sharded by accelerate, against one process with all images."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def check(found, expected, what, rtol=1e-4):
        assert found.keys() == expected.keys(), what
        # Muon makes a step of 0.02 of a matrix in bf16, whose last digit is 0.4 % of it.
        atol = 2e-4 if "muon" in what else 1e-6
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=rtol, atol=atol, msg=f"{what}: {key}")

    def curve(losses, ranks):  # gradients are of the mean over the ranks, and their norm is of all
        values = torch.tensor(losses)
        if ranks == 2:
            dist.all_reduce(values)
        return {"loss and norm": values / ranks}

    def saved(run, where):
        """Copied by every rank and written by the first, as training does it."""
        state = copy_training_state(progress={"step": 1}, keep=rank == 0, **run)
        assert bool(state.tensors) == (rank == 0)
        if rank == 0:
            run["model"].save_pretrained(where, state_dict=state.weights())
            state.write(where)
        dist.barrier()
        return state, type(plain["model"]).from_pretrained(where).state_dict()  # one file, the plain class

    def scores(run):
        with torch.no_grad():
            logits = run["model"].eval()(pixel_values=torch.ones(2, 3, 32, 32)).logits
        run["model"].train()
        return {"logits": logits}

    for name, optimizer in RUNS:
        make, _ = MODELS[name]
        plain = parts(make, optimizer=optimizer)
        before = [parameter.detach().clone() for parameter in plain["model"].parameters()]
        first, between = curve(train(plain, range(1)), 1), scores(plain)
        assert not all(map(torch.equal, plain["model"].parameters(), before)), "they learn"
        expected, weights = saved(plain, folder / f"{name} {optimizer} on one")
        then = curve(train(plain, range(1, 2)), 1)
        # accelerate's own code for all; ours above, which one rank tries with all, for one.
        for method in (shard, shard_by_accelerate) if (name, optimizer) == RUNS[0] else (shard_by_accelerate,):
            what = f"{name} {optimizer} {method.__name__}"
            where = folder / what
            run = parts(make, mesh, method, optimizer)
            mine = sum(parameter.to_local().numel() for parameter in run["model"].parameters())
            assert mine < 0.75 * plain["model"].num_parameters(), what
            check(curve(train(run, range(1), rank, 2), 2), first, what)
            check(scores(run), between, what)  # a validation, which must leave it fit for training
            state, merged = saved(run, where)
            check(state.tensors, expected.tensors, what)
            assert state.values == expected.values, what
            check(merged, weights, what)
            resumed, on_one = parts(make, mesh, method, optimizer), parts(make, optimizer=optimizer)
            for other in (resumed, on_one):
                assert load_training_state(where, **other) == {"step": 1}
            went_on = train(run, range(1, 2), rank, 2)
            assert train(resumed, range(1, 2), rank, 2) == went_on, what
            check(curve(went_on, 2), then, what)
            check(curve(train(on_one, range(1, 2)), 1), then, what)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_and_save_as_one_process_and_either_goes_on(tmp_path):
    done = forked(two_ranks, tmp_path, processes=2, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
