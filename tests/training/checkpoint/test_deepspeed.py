"""DeepSpeed's ZeRO through accelerate: two processes on a CPU, with this trainer's checkpoints."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.checkpoint.deepspeed import configure_zero
from training.checkpoint.series import newest_good
from training.train import main

from ...forked import free_port
from ..tiny_run import write_recipe

ROOT = Path(__file__).parents[3]
OPTIONS = ["--ema_decay", "0.9", "--gradient_accumulation_steps", "2", "--fresh_scenes", "false"]
OPTIONS += ["--partial_labels", "{known_fraction: 0.3}"]
OPTIONS += ["--augmentation", "null", "--save_every_steps", "4", "--keep_checkpoints", "9", "--warmup_epochs", "0"]
# accelerate 1.15 gives a CPU under DeepSpeed no backend unless told.
COMMAND = """
import functools, sys
from accelerate import Accelerator, InitProcessGroupKwargs
import training.loop.setup as setup
import training.train

setup.Accelerator = functools.partial(Accelerator, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
sys.exit(training.train.main())
"""


def accelerator(stage=2, mixed_precision="no", offload="none"):
    config = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": offload}}}
    plugin = SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(deepspeed_plugin=plugin, mixed_precision=mixed_precision, gradient_accumulation_steps=4)


@pytest.mark.parametrize("what", [{"stage": 3}, {"stage": 0}, {"offload": "cpu"}])
def test_what_could_not_be_saved_is_refused_with_what_to_take_instead(what):
    with pytest.raises(ValueError, match=r"zero_stage 1 or 2 .*/fsdp2\.yaml"):
        configure_zero(accelerator(**what), 1.0)


def test_muon_is_refused_where_there_are_no_matrices():
    with pytest.raises(ValueError, match=r"set optimizer to adamw, or launch with .*/fsdp2\.yaml"):
        configure_zero(accelerator(), 1.0, "muon")


def test_precision_clipping_and_accumulation_are_the_run_s():
    with pytest.raises(ValueError, match=r"bf16 or fp32.* now fp16"):
        configure_zero(accelerator(mixed_precision="fp16"), 1.0)
    given = accelerator(mixed_precision="bf16")
    configure_zero(given, None)
    config = given.deepspeed_plugin.deepspeed_config
    assert config["gradient_clipping"] == 0 and config["gradient_accumulation_steps"] == 4
    assert config["bf16"] == {"enabled": False}, "weights would be cast"
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


def train_on_two(folder, *arguments):
    script = folder.parent / "command.py"
    script.write_text(COMMAND)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", free_port()]
    command += ["--config_file", str(ROOT / "training" / "configs" / "accelerate" / "deepspeed.yaml"), str(script)]
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *arguments, "--output_dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "on 2 x cpu" in result.stdout


def end(folder):
    return load_file(newest_good(folder) / "training_state" / "tensors.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_processes_train_like_one_and_resume_on_two_and_on_one(tmp_path):
    """6 steps of 16 images: on two processes, on one, and from step 4 of the two on two and on one."""
    recipe, whole = write_recipe(tmp_path), tmp_path / "whole"
    train_on_two(whole, recipe, "--batch_size", "4", *OPTIONS)
    assert not list(whole.rglob("*.pt")) and len(list(whole.glob("checkpoint-*"))) == 3
    for name in ("resumed", "on_one"):
        shutil.copytree(whole, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-6"))
    train_on_two(tmp_path / "resumed", str(whole / "config.yaml"), "--resume")
    options = ["--resume", "--resume_despite", "[batches]", "--batch_size", "8"]
    assert main([str(whole / "config.yaml"), "--output_dir", str(tmp_path / "on_one"), *options]) == 0
    assert main([recipe, "--output_dir", str(tmp_path / "plain"), "--batch_size", "8", *OPTIONS]) == 0

    last = end(whole)
    assert any(name.startswith("optimizer.") for name in last) and any(name.startswith("ema.") for name in last)
    assert all(map(torch.equal, last.values(), end(tmp_path / "resumed").values()))
    for name in ("on_one", "plain"):
        other = end(tmp_path / name)
        assert other.keys() == last.keys()
        for key, tensor in last.items():
            torch.testing.assert_close(other[key], tensor, rtol=1e-3, atol=1e-6, msg=f"{name}: {key}")
    curves = []
    for name in ("whole", "resumed", "on_one", "plain"):
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        curves.append([(line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line])
    assert len(curves[0]) == 6
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=2e-4)
