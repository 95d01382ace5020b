"""Every file in configs/accelerate, read as `accelerate launch` reads it."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "training" / "configs" / "accelerate"
EXPECTED = {  # distributed type, processes, machines
    "one_gpu": ("NO", 1, 1),
    "eight_gpus": ("MULTI_GPU", 8, 1),
    "multi_node": ("MULTI_GPU", 64, 8),
    "cpu_two_processes": ("MULTI_GPU", 2, 1),
    "fsdp2": ("FSDP", 8, 1),
    "deepspeed": ("DEEPSPEED", 8, 1),
}


def test_all_files_are_known():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_file_reads_and_says_what_its_name_says(name):
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[name]
    assert not config.use_cpu, "accelerate would start one process, without a word"
    head = path.read_text().partition("\ncompute_environment")[0]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    assert f"--config_file training/configs/accelerate/{name}.yaml" in head, "the command is in the file"


def arguments(name, *more):
    parser = launch_command_parser()
    argv = ["--config_file", str(FOLDER / f"{name}.yaml"), *more, "-m", "training.train", "CONFIG.yaml"]
    return _validate_launch_command(parser.parse_args(argv))[0]


@pytest.mark.parametrize("name", ["eight_gpus", "multi_node", "cpu_two_processes", "fsdp2"])
def test_the_launcher_takes_the_values(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    more = ["--machine_rank", "3", "--main_process_ip", "10.0.0.1"] if name == "multi_node" else []
    args = arguments(name, *more)
    kind, processes, machines = EXPECTED[name]
    assert args.num_processes == processes and args.num_machines == machines
    assert (args.use_fsdp if kind == "FSDP" else args.multi_gpu) and not args.cpu
    environment = prepare_multi_gpu_env(args)
    if name != "cpu_two_processes":
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "multi_node":
        assert args.machine_rank == 3 and args.main_process_ip == "10.0.0.1"


def test_fsdp2_wraps_what_the_model_names(monkeypatch):
    for key, value in prepare_multi_gpu_env(arguments("fsdp2")).items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    # No list of classes here: accelerate then asks the model's `_no_split_modules` (tests of them: test_fsdp.py).
    assert not plugin.transformer_cls_names_to_wrap
    assert plugin.cpu_ram_efficient_loading is False and plugin.activation_checkpointing is False
