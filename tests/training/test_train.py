"""The command itself, on a model a few channels wide and a few dozen built-in scenes."""

import errno
import json
import math
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

import training.loop.finish
import training.loop.saving
import training.loop.setup
import training.loop.step
import training.loop.validation
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from training import evaluate
from training.checkpoint.folder import verify
from training.checkpoint.series import checkpoints
from training.config import TrainingConfig, parse_config
from training.data.batches import MultiLabelCollator, build_dataloader
from training.data.dataset import MultiLabelDataset
from training.data.load import load
from training.data.scene_labels import SCENE_LABELS
from training.loop.setup import build_processor
from training.metrics.functional import multilabel_report
from training.scoring.measured_with import fingerprints
from training.train import main, train

from ..forked import forked
from ..tolerance import METRIC, assert_close_metrics
from .interruptions import at_once, interrupt, sigterm
from .tiny_run import NANO, SCENES

ROOT = Path(__file__).parents[2]


def log_of(folder, *, timeless=True):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not (timeless and "second" in key)} for line in lines]


def tensors_of(folder):
    return load_file(checkpoints(folder)[0] / "training_state" / "tensors.safetensors")


def score(folder, split="validation"):
    """Scores and labels of a split, through the checkpoint as a stranger would load it."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    loaded = load("scenes", scenes=SCENES)
    splits, names = loaded.splits, loaded.label_names
    loader = build_dataloader(MultiLabelDataset(splits[split], names, processor), batch_size=7, processor=processor)
    with torch.no_grad():
        pairs = [(model(batch["pixel_values"]).logits, batch["labels"]) for batch in loader]
    return *(torch.cat(part).double().numpy() for part in zip(*pairs, strict=True)), model


def test_the_loss_falls_and_everything_is_logged(finished):
    log = log_of(finished, timeless=False)
    steps = [line for line in log if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    losses = [line["train/loss"] for line in steps]
    assert np.mean(losses[-3:]) < 0.98 * np.mean(losses[:3])
    assert all(line["train/grad_norm"] > 0 and line["train/images_per_second"] > 0 for line in steps)
    rates = [line["train/learning_rate"] for line in steps]
    warmup = [3e-3 * step / 3 for step in range(3)]
    cosine = [3e-3 * 0.5 * (1 + np.cos(np.pi * step / 9)) for step in range(9)]
    assert rates == pytest.approx(warmup + cosine)
    epochs = [line for line in log if "validation/mAP" in line]
    assert [(line["step"], line["epoch"]) for line in epochs] == [(6, 1), (12, 2)]


def test_the_run_folder_is_whole_and_its_config_reads_back(finished, recipe):
    files = {"config.yaml", "log.jsonl", "results.json"}
    assert {path.name for path in finished.iterdir()} == {"best", "checkpoint-6", "checkpoint-12", *files}
    for folder in ("best", "checkpoint-6", "checkpoint-12"):
        assert "model.safetensors" in verify(finished / folder)["files"]
    expected = parse_config([recipe, "--output_dir", str(finished), "--evaluate_test"])
    assert parse_config([str(finished / "config.yaml")]) == expected
    assert {"config.json", "model.safetensors", "modeling_hsvlt.py", "processing_multilabel.py"} <= {
        path.name for path in (finished / "best").iterdir()
    }


def test_best_reloads_to_the_logged_validation_map(finished):
    logits, labels, model = score(finished / "best")
    logged = [line["validation/mAP"] for line in log_of(finished) if "validation/mAP" in line]
    results = json.loads((finished / "results.json").read_text())
    assert results["best_epoch"] == int(np.argmax(logged)) + 1
    assert results["validation"]["mAP"] == max(logged)
    seen = labels.any(axis=0)
    assert average_precision_score(labels[:, seen], logits[:, seen]) == pytest.approx(max(logged), abs=METRIC)
    assert list(model.config.id2label.values()) == list(SCENE_LABELS)


def test_best_has_thresholds_that_beat_one_half_on_validation(finished):
    logits, labels, model = score(finished / "best")
    scores = 1 / (1 + np.exp(-logits))
    thresholds = np.array(model.config.thresholds)
    assert thresholds.shape == (10,) and ((thresholds >= 0) & (thresholds <= 1)).all()

    def f1(threshold):
        predicted, present = scores >= threshold, labels == 1
        return np.mean(2 * (predicted & present).sum(0) / np.maximum((predicted.sum(0) + present.sum(0)), 1))

    assert f1(thresholds) > f1(0.5)
    results = json.loads((finished / "results.json").read_text())
    assert results["measured_with"] == fingerprints(json.loads((finished / "best" / "config.json").read_text()))
    at_thresholds = multilabel_report(scores, labels, thresholds.astype(np.float32))
    assert results["validation_at_thresholds"]["f1_macro"] == pytest.approx(at_thresholds["f1_macro"], abs=METRIC)


def test_a_checkpoint_holds_the_weight_average_and_the_weights(finished):
    tensors, plain = tensors_of(finished), load_file(finished / "checkpoint-12" / "model.safetensors")
    for name, tensor in plain.items():
        assert torch.equal(tensor, tensors[f"ema.module.{name}"])
    assert any(not torch.equal(tensors[f"model.{name}"], tensor) for name, tensor in plain.items())


def test_the_test_split_is_scored_once_at_the_end(finished):
    logits, labels, _ = score(finished / "best", "test")
    seen = labels.any(axis=0)
    expected = average_precision_score(labels[:, seen], logits[:, seen])
    assert json.loads((finished / "results.json").read_text())["test"]["mAP"] == pytest.approx(expected, abs=METRIC)
    assert not any("test" in key for line in log_of(finished) for key in line)


RESUME = [
    *("--gradient_accumulation_steps", "2"),
    *("--batch_size", "5"),
    *("--save_every_steps", "2"),
    *("--augmentation.mixup", "0.3"),
    *("--augmentation.rand_augment", "true"),
]


PLAIN = ["--scheduler", "plateau", "--ema_decay", "null", "--fresh_scenes", "false"]
MUON = ["--optimizer", "muon", "--backbone_lr_multiplier", "0.5"]


# Batches of epoch 1: 0 to 9. Ended at once inside it, at the start of epoch 2, and inside that; or asked to stop.
@pytest.mark.parametrize(
    ("at_batch", "how", "saved", "options"),
    [(7, at_once, 2, []), (11, sigterm, 6, []), (18, at_once, 8, MUON), (16, sigterm, 9, PLAIN)],
)
@pytest.mark.one_machine
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    recipe, tmp_path, tmp_path_factory, monkeypatch, capsys, at_batch, how, saved, options
):
    whole = tmp_path_factory.getbasetemp() / f"uninterrupted-{len(options)}"
    if not whole.exists():
        assert main([recipe, "--output_dir", str(whole), *RESUME, *options]) == 0
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, at_batch, how)
        assert main([recipe, "--output_dir", str(folder), *RESUME, *options]) == (130 if how is at_once else 0)
    said = capsys.readouterr().err
    assert f"checkpoint-{saved} is whole" in said and ("Stopped by SIGTERM" in said) == (how is sigterm)
    assert checkpoints(folder)[0].name == f"checkpoint-{saved}"
    torch.manual_seed(at_batch)  # whatever state the new process starts in
    assert main([str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_end(whole, folder)


def assert_same_end(whole, folder):
    expected, got = tensors_of(whole), tensors_of(folder)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    best = [load_file(run / "best" / "model.safetensors") for run in (whole, folder)]
    assert all(torch.equal(tensor, best[1][name]) for name, tensor in best[0].items())
    assert log_of(whole) == log_of(folder)
    assert (whole / "results.json").read_text() == (folder / "results.json").read_text()


@pytest.mark.one_machine
def test_a_stop_during_validation_saves_and_the_validation_is_done_again(finished, recipe, tmp_path, monkeypatch):
    folder, plain = tmp_path / "run", training.loop.validation.predict

    def predict(*arguments, **options):
        sigterm()
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training.loop.validation, "predict", predict)
        assert main([recipe, "--output_dir", str(folder), "--evaluate_test"]) == 0
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6"] and not (folder / "best").exists()
    assert main([str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_end(finished, folder)


@pytest.mark.one_machine
def test_damage_is_survived(finished, tmp_path, capsys):
    """The newest checkpoint and best/ are both hit: the run goes back one epoch and ends as it would have."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for path in (folder / "checkpoint-12/training_state/tensors.safetensors", folder / "best/model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert main([str(finished / "config.yaml"), "--output_dir", str(folder), "--resume"]) == 0
    said = capsys.readouterr()
    assert "going back to checkpoint-6" in said.err and "the best epoch is chosen anew" in said.err
    expected, got = tensors_of(finished), tensors_of(folder)
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    verify(folder / "best")


def test_interrupted_before_the_first_save(recipe, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, 1, at_once)
    assert main([recipe, "--output_dir", str(tmp_path / "run")]) == 130
    assert "nothing to continue from" in capsys.readouterr().err


@pytest.mark.one_machine
def test_a_save_that_fails_ends_the_run_and_leaves_what_there_was(finished, recipe, tmp_path, monkeypatch, capsys):
    folder, plain, saves = tmp_path / "run", training.loop.saving.write_marker, iter(range(100))

    def write_marker(target, **facts):
        if next(saves) == 2:  # best/ and checkpoint-6 went well
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(target, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(training.loop.saving, "write_marker", write_marker)
        assert main([recipe, "--output_dir", str(folder), "--evaluate_test"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "--resume continues from checkpoint-6" in error
    assert not list(folder.glob(".*")), "what was half written must not fill the disk"
    assert main([str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_end(finished, folder)


def divide_by_zero(monkeypatch, at_batch):
    batches, plain = iter(range(100)), training.loop.step.normalize_pixels
    monkeypatch.setattr(
        training.loop.step,
        "normalize_pixels",
        lambda *inputs: plain(*inputs) / (0.0 if next(batches) in at_batch else 1.0),
    )


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(recipe, tmp_path, monkeypatch, capsys):
    divide_by_zero(monkeypatch, [7])
    folder = tmp_path / "run"
    assert main([recipe, "--output_dir", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "loss is not finite at step 8 (epoch 2, batch 2: row " in error and "learning_rate" in error
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder).values())
    assert checkpoints(folder)[0].name == "checkpoint-6"


def test_steps_that_are_not_finite_are_left_out_where_that_is_wanted(recipe, tmp_path, monkeypatch, capsys):
    divide_by_zero(monkeypatch, [3, 7])
    folder = tmp_path / "run"
    assert main([recipe, "--output_dir", str(folder), "--on_nonfinite", "skip", "--fresh_scenes", "false"]) == 0
    error = capsys.readouterr().err
    assert (
        "not finite at step 4 (epoch 1, batch 4: split 'train', row " in error
        and "step 8" in error
        and "left out" in error
    )
    assert [line["train/skipped_steps"] for line in log_of(folder) if "train/loss" in line] == [0] * 3 + [1] * 4 + [
        2
    ] * 5
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder).values())
    # The two steps changed nothing: ten updates of each weight, not twelve.
    assert {float(value) for name, value in tensors_of(folder).items() if name.endswith(".step")} == {10.0}


def test_skipping_ends_where_every_step_is_broken(recipe, tmp_path, monkeypatch, capsys):
    divide_by_zero(monkeypatch, range(100))
    assert main([recipe, "--output_dir", str(tmp_path / "run"), "--on_nonfinite", "skip", "--epochs", "4"]) == 1
    error = capsys.readouterr().err
    assert "10 steps one after the other were not finite" in error


def test_help_lists_every_option_with_its_reason(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in vars(TrainingConfig()):
        assert f"\n{name}: " in text, name
    assert "accelerate launch" in text and "# as published" in text


def test_bf16_keeps_weights_in_fp32(recipe, tmp_path):
    options = ["--mixed_precision", "bf16", "--max_steps", "2", "--warmup_epochs", "0"]
    assert main([recipe, "--output_dir", str(tmp_path / "run"), *options]) == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/best/model.safetensors").values()} == {torch.float32}


class Fp16OnCpu(Accelerator):
    """accelerate takes mixed_precision="fp16" on a CPU, and then does nothing about it: what it does on a GPU."""

    def __init__(self, **options):
        super().__init__(**options)
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)


# Twelve steps as elsewhere, of fewer images: a CPU is slow in fp16.
FP16 = ["--mixed_precision", "fp16", "--fresh_scenes", "false", "--save_every_steps", "2", "--batch_size", "2"]
FP16 += ["--scenes.num_scenes.train", "12", "--scenes.num_scenes.validation", "6"]


def scales_of(folder):
    """(step, scale after it, whether its gradient overflowed)."""
    lines = [line for line in log_of(folder) if "train/loss" in line]
    return [(line["step"], line["train/grad_scale"], line["train/grad_norm"] == math.inf) for line in lines]


def state_of(folder):
    return json.loads((checkpoints(folder)[0] / "training_state" / "state.json").read_text())


@pytest.mark.one_machine
def test_fp16_steps_that_overflow_count_for_nothing_and_the_scale_is_resumed(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(training.loop.setup, "Accelerator", Fp16OnCpu)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    options = [*FP16, "--optimizer", "muon"]  # both kinds: a fused AdamW leaves out such a step itself
    assert main([recipe, "--output_dir", str(whole), *options]) == 0
    before, overflows = 2.0**24, 0
    for _, scale, overflowed in scales_of(whole):
        assert scale == before / 2 if overflowed else scale in (before, 2 * before)
        before, overflows = scale, overflows + overflowed
    assert 1 < overflows < 10
    tensors, state = tensors_of(whole), state_of(whole)
    assert {float(value) for name, value in tensors.items() if name.endswith(".step")} == {12.0 - overflows}
    assert state["scheduler"]["last_epoch"] == tensors["ema.n_averaged"] == 12 - overflows
    assert state["progress"]["step"] == 12 and state["scaler"]["scale"] == before
    assert state["progress"]["skipped_steps"] == 0, "an overflow is no fault of an image"

    with monkeypatch.context() as patch:
        interrupt(patch, 7, at_once)
        assert main([recipe, "--output_dir", str(folder), *options]) == 130
    assert main([str(folder / "config.yaml"), "--resume"]) == 0
    assert_same_end(whole, folder)
    assert state_of(folder)["scaler"] == state["scaler"]


def test_fp16_names_a_loss_that_is_not_finite_and_lowers_its_scale(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training.loop.setup, "Accelerator", Fp16OnCpu)
    divide_by_zero(monkeypatch, [6])
    folder = tmp_path / "run"
    assert main([recipe, "--output_dir", str(folder), *FP16, "--on_nonfinite", "skip"]) == 0
    assert "loss is not finite at step 7 (epoch 2, batch 1: split 'train', row " in capsys.readouterr().err
    scales = {step: scale for step, scale, _ in scales_of(folder)}
    assert scales[7] == scales[6] / 2
    assert state_of(folder)["progress"]["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in tensors_of(folder).values())


def test_early_stopping_waits_for_validation(recipe, tmp_path):
    options = ["--learning_rate", "0", "--epochs", "9", "--early_stopping_patience", "2"]
    assert main([recipe, "--output_dir", str(tmp_path / "run"), *options]) == 0
    epochs = [line["epoch"] for line in log_of(tmp_path / "run") if "validation/mAP" in line]
    assert epochs == [1, 2, 3], "nothing improved after epoch 1, so two more epochs are run"


def test_finished_training_is_pushed_when_asked(recipe, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        training.loop.finish, "push_run", lambda run, repo, private: pushed.append((run, repo, private))
    )
    folder = tmp_path / "run"
    options = ["--max_steps", "1", "--warmup_epochs", "0", "--push_to_hub", "me/model"]
    assert main([recipe, "--output_dir", str(folder), *options]) == 0
    assert pushed == [(folder, "me/model", True)]
    assert json.loads((folder / "best" / "config.json").read_text())["thresholds"] is not None


def test_transformers_trainer_trains_the_model(tmp_path):
    config = TrainingConfig(image_size=32)
    loaded = load("scenes", scenes=SCENES)
    splits, names = loaded.splits, loaded.label_names
    processor = build_processor(config, names)
    model = HSVLTForImageClassification(HSVLTConfig.preset("nano", num_labels=10, image_size=32, **NANO))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=8,
            num_train_epochs=3,
            learning_rate=5e-3,
            logging_steps=1,
            eval_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=MultiLabelDataset(splits["train"], names, processor),
        eval_dataset=MultiLabelDataset(splits["validation"], names, processor),
        data_collator=MultiLabelCollator(10, processor),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 18 and np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    prediction = trainer.predict(trainer.eval_dataset)
    assert prediction.predictions.shape == (24, 10) and prediction.metrics["test_loss"] > 0


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    parse_config([str(path)])


class Forked:
    """What `accelerate launch` starts, in a fork of the launcher, which imported all of it."""

    def __init__(self, command, env):
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(env)
            python, flag, module, *arguments = command
            assert (python, flag) == (sys.executable, "-m")
            sys.argv = [module, *arguments]
            status = 1
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code or 0
            finally:
                sys.stdout.flush()
                os._exit(status)

    def wait(self):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def accelerate_launch(arguments):
    launch.subprocess = SimpleNamespace(Popen=Forked)
    launch_command(launch_command_parser().parse_args(arguments))


@pytest.mark.slow
def test_accelerate_launch_runs_the_command(recipe, tmp_path):
    arguments = ["--num_cpu_threads_per_process", "1", "-m", "training.train"]
    arguments += [recipe, "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    result = forked(accelerate_launch, arguments)
    assert result.returncode == 0, result.stderr
    assert "steps of 8 images on 1 x cpu" in result.stdout and (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_two_processes_train_like_one(recipe, tmp_path):
    """45 images by 4 on two processes and by 8 on one: the same loss curve to rounding, though the last batch is
    uneven (5 images: 4 and 1); and the same metrics of one model on 23 images."""
    folder, single = tmp_path / "two", tmp_path / "one"
    options = ["--fresh_scenes", "false", "--augmentation", "null"]
    options += ["--scenes.num_scenes.train", "45", "--scenes.num_scenes.validation", "23"]
    result = forked(main, [recipe, "--output_dir", str(folder), "--batch_size", "4", *options], processes=2)
    assert result.returncode == 0, result.stderr
    assert "12 steps of 8 images on 2 x cpu" in result.stdout
    assert main([recipe, "--output_dir", str(single), "--batch_size", "8", *options]) == 0
    curves = [
        [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in log_of(run) if "train/loss" in line]
        for run in (folder, single)
    ]
    assert len(curves[0]) == 12, "one process logs"
    np.testing.assert_allclose(*curves, rtol=2e-4)

    logged = [line for line in log_of(folder) if "validation/mAP" in line]
    best = max(logged, key=lambda line: line["validation/mAP"])
    accelerator = Accelerator(cpu=True)
    scenes = {**SCENES, "num_scenes": {"train": 1, "validation": 23}}
    loaded = load("scenes", scenes=scenes)
    splits, names = loaded.splits, loaded.label_names
    processor = AutoImageProcessor.from_pretrained(folder / "best")
    dataset = MultiLabelDataset(splits["validation"], names, processor)
    loader = accelerator.prepare(build_dataloader(dataset, batch_size=4, processor=processor))
    model = AutoModelForImageClassification.from_pretrained(folder / "best")
    scores, labels = training.loop.validation.predict(model, loader, accelerator)
    assert scores.shape == (23, 10)
    report = training.loop.validation.multilabel_report(scores, labels)
    assert_close_metrics(report, {name: best[f"validation/{name}"] for name in report})


def test_training_from_python_gives_the_results_and_can_be_called_again(recipe, tmp_path, capsys):
    """As a notebook does: several runs in one process, with other settings of accelerate."""
    for number, options in enumerate(([], ["--gradient_accumulation_steps", "2", "--mixed_precision", "bf16"])):
        folder = tmp_path / f"run{number}"
        config = parse_config([recipe, "--output_dir", str(folder), "--max_steps", "2", *options])
        results = train(config)
        assert results["validation"] == json.loads((folder / "results.json").read_text())["validation"]
        assert config.gradient_accumulation_steps == 1 + number
    with pytest.raises(ValueError, match="bse"):
        train(parse_config([recipe, "--output_dir", str(tmp_path / "other"), "--loss_type", "bse"]))


def test_a_run_ends_with_the_commands_to_go_on_with(finished, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([recipe, "--output_dir", "runs/mine", "--max_steps", "2"]) == 0
    captured = capsys.readouterr()
    first, second = [line for line in captured.out.splitlines() if line.startswith("Next: ")]
    assert second == "Next: hsvlt tag runs/mine photo.jpg"
    words = shlex.split(first.removeprefix("Next: hsvlt evaluate "))
    assert evaluate.main(words) == 0  # of the same scenes, as the command says
    assert (tmp_path / "runs" / "mine" / "evaluation" / "report.html").is_file()
    assert "warning: 24 images to validate" in captured.err
