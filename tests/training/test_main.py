"""`hsvlt`: one command in front of all; what it needs is imported after its options are read."""

import json
import subprocess
import sys

import pytest
import torch

from training import __main__ as hsvlt
from training import places

from ..forked import forked, free_port
from .tiny_run import write_recipe

HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "huggingface_hub")


def test_every_command_is_listed_and_explains_itself(capsys):
    assert hsvlt.main(["--help"]) == 0 and hsvlt.main([]) == 2
    shown = capsys.readouterr().out
    for name, (_, words) in hsvlt.COMMANDS.items():
        assert f"    {name} " in shown and words in shown


def test_no_help_waits_for_an_import(capsys):
    script = f"""
import json, sys
from training.__main__ import COMMANDS, main
found = {{}}
for name in COMMANDS:
    try:
        status = main([name, "--help"])
    except SystemExit as end:
        status = end.code
    found[name] = [status, [module for module in {HEAVY} if module in sys.modules]]
print(json.dumps(found), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(ran.stderr) == {name: [0, []] for name in hsvlt.COMMANDS}
    assert all(f"hsvlt {name}" in ran.stdout for name in hsvlt.COMMANDS)


def test_a_command_that_there_is_not(capsys):
    assert hsvlt.main(["evaluat"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'evaluat': did you mean evaluate?\n"
    assert hsvlt.main(["zzzz"]) == 2 and "see hsvlt --help" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "extra"), [("sklearn", "[train]"), ("onnxruntime", "[train,onnx]"), ("uvicorn", "[train,serve]")]
)
def test_a_missing_package_is_named_with_its_extra(package, extra, monkeypatch, capsys):
    def absent(arguments):
        raise ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.metrics")

    monkeypatch.setattr("training.split.main", absent)
    assert hsvlt.main(["split"]) == 2
    error = capsys.readouterr().err
    assert f"'{package}'" in error and extra in error and error.count("\n") == 1


def test_without_the_extra_the_overview_is_there_and_a_command_names_the_extra():
    script = """
import sys
sys.modules |= dict.fromkeys(("omegaconf", "yaml", "accelerate", "datasets"))
from training.__main__ import main
assert main(["--help"]) == 0
sys.exit(main(["evaluate", "--help"]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 2 and "evaluate" in ran.stdout
    assert "hsvlt evaluate needs the package" in ran.stderr and '".[train]"' in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_an_import_of_ours_that_fails_is_no_missing_extra(monkeypatch):
    def broken(arguments):
        raise ModuleNotFoundError("No module named 'training.gone'", name="training.gone")

    monkeypatch.setattr("training.split.main", broken)
    with pytest.raises(ModuleNotFoundError):
        hsvlt.main(["split"])


@pytest.fixture
def unlaunched(monkeypatch, tmp_path):
    """As in a fresh shell of a machine on which `accelerate config` never ran."""
    for name in (*hsvlt.LAUNCHED, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(path))
    started = []
    monkeypatch.setattr(hsvlt, "run_launcher", lambda *call: started.append(call) or 0)
    monkeypatch.setattr(hsvlt, "cores", lambda: 8)
    return path, started


@pytest.mark.parametrize(("gpus", "bf16", "precision"), [(0, False, "no"), (1, True, "bf16"), (1, False, "fp16")])
def test_one_process_is_this_one(gpus, bf16, precision, unlaunched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert hsvlt.launch("training.train", ["--epochs", "1"], mixed_precision=True) is None
    assert hsvlt.os.environ["ACCELERATE_MIXED_PRECISION"] == precision
    assert not unlaunched[1]


@pytest.mark.parametrize(("told", "threads", "expected"), [(None, 64, [8]), (None, 4, []), ("64", 64, [])])
def test_threads_fit_the_cores_that_there_are(told, threads, expected, unlaunched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    assert hsvlt.launch("training.train", [], mixed_precision=True) is None and found == expected


def test_several_gpus_are_all_used(unlaunched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert hsvlt.launch("training.train", ["--epochs", "1"], mixed_precision=True) == 0
    ((how, module, arguments),) = unlaunched[1]
    assert (module, arguments) == ("training.train", ["--epochs", "1"])
    said = dict(zip(how[1::2], how[2::2], strict=True))
    assert how[0] == "--multi_gpu" and said["--num_processes"] == "4" and said["--mixed_precision"] == "bf16"
    assert hsvlt.os.environ["OMP_NUM_THREADS"] == "2"


def test_the_user_s_accelerate_config_decides(unlaunched):
    path, started = unlaunched
    path.write_text("compute_environment: LOCAL_MACHINE\n")
    assert hsvlt.launch("training.train", [], mixed_precision=True) == 0
    assert started[0][0] == []  # nothing on the command line, which would go before what is in the file


def test_what_a_launcher_started_is_not_launched_again(unlaunched, monkeypatch):
    unlaunched[0].write_text("compute_environment: LOCAL_MACHINE\n")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert hsvlt.launch("training.train", [], mixed_precision=True) is None and not unlaunched[1]


def test_a_container_s_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(places.os, "sched_getaffinity", lambda _: range(16))
    for text, count in (("max 100000", 16), ("400000 100000", 4), ("50000 100000", 1)):
        monkeypatch.setattr(places.Path, "read_text", lambda _, text=text: text)
        assert places.cores() == count
        assert places.free_cores() == max(1, min(8, count - 1))


@pytest.mark.slow
def test_a_launch_that_ends_badly_is_one_line(tmp_path):
    """Refused in the processes that were launched, by what only they look at."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("kept")
    how = ["--config_file", "training/configs/accelerate/cpu_two_processes.yaml", "--main_process_port", free_port()]
    arguments = [write_recipe(tmp_path), "--output_dir", str(tmp_path / "run")]
    ran = forked(hsvlt.run_launcher, how, "training.train", arguments)
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.count("is not empty") == ran.stderr.count("error: ") == 1
    assert "Traceback" not in ran.stderr and "ChildFailed" not in ran.stderr
