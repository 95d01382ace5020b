"""transformers' own Trainer, with nothing told: no label names, no collator, no arguments that only our models need."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoProcessor, Trainer, TrainingArguments

from modeling_hsvlt import (
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
    MultiLabelImageProcessor,
    MultiLabelProcessor,
)
from training.metrics.functional import multilabel_report

from .forked import forked
from .tiny_clip import tiny_clip, tiny_clip_tokenizer

NAMES = ["cat", "dog", "bird", "plant"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
SIZE = 32


class Images(torch.utils.data.Dataset):
    """Noise, brighter in the quarter of each label that is present."""

    def __init__(self, count, known_fraction=1.0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = (torch.rand(count, len(NAMES), generator=generator) < 0.5).float()
        self.pixels = torch.randn(count, 3, SIZE, SIZE, generator=generator)
        self.pixels += 2 * self.labels.repeat_interleave(SIZE // len(NAMES), 1)[:, None, None]
        self.labels[torch.rand(count, len(NAMES), generator=generator) >= known_fraction] = -100

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def hsvlt(**options):
    backbone = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    config = HSVLTConfig.preset("nano", image_size=SIZE, backbone_config=backbone, **LABELS, **options)
    return HSVLTForImageClassification(config)


def mltr():
    fields = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "drop_path_rate": 0.0}
    return MlTrForImageClassification(MlTrConfig(image_size=SIZE, window_size=2, **fields, **LABELS))


def hp_dval():
    tokenizer = tiny_clip_tokenizer()
    model = HPDVALForImageClassification.from_clip(tiny_clip(tokenizer), tokenizer, NAMES, local_top_k=4)
    model.set_phase("phase1")
    return model


def lora(model, *targets):
    return get_peft_model(model, LoraConfig(target_modules=list(targets), r=2, modules_to_save=["classifier"]))


MODELS = {
    "hsvlt": hsvlt,
    "hsvlt, candidates": lambda: hsvlt(candidate_labels=2),
    "hsvlt, residual attention": lambda: hsvlt(residual_attention=True),
    "hsvlt, shared": lambda: hsvlt(classifier="shared"),
    "mltr": mltr,
    "hp_dval": hp_dval,
    "hsvlt, LoRA": lambda: lora(hsvlt(), "query", "value"),
    "mltr, LoRA": lambda: lora(mltr(), "qkv"),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """As AutoProcessor reads it from a checkpoint."""
    folder = tmp_path_factory.mktemp("processor")
    hsvlt().config.save_pretrained(folder)
    image_processor = MultiLabelImageProcessor(size={"height": SIZE, "width": SIZE})
    MultiLabelProcessor(image_processor, id2label=LABELS["id2label"]).save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


def compute_metrics(prediction):
    scores = torch.from_numpy(prediction.predictions).double().sigmoid().numpy()
    return {"mAP": multilabel_report(scores, prediction.label_ids, top_k=None)["mAP"]}


def arguments(folder, **options):
    return TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_only_model=True, **options
    )


@pytest.mark.parametrize("name", MODELS)
def test_trains_evaluates_and_keeps_the_best(name, processor, tmp_path):
    model = build(name)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=4,
            num_train_epochs=3,
            learning_rate=1e-2,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="mAP",
        ),
        train_dataset=Images(22, known_fraction=0.8),
        eval_dataset=Images(12, seed=1),
        compute_metrics=compute_metrics,
        processing_class=processor,
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    steps = [line for line in trainer.state.log_history if "loss" in line]
    assert len(steps) == 9 and all(0 < line["loss"] < 10 and line["grad_norm"] > 0 for line in steps)
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["epoch"] for line in evaluations] == [1, 2, 3]
    assert trainer.state.best_metric == max(line["eval_mAP"] for line in evaluations)

    # The best weights are back, and give the best metric again.
    kept = load_file(next(Path(trainer.state.best_model_checkpoint).glob("*model.safetensors")))
    if "LoRA" not in name:
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in kept.items())
    prediction = trainer.predict(trainer.eval_dataset)
    assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.shape == (12, len(NAMES))
    assert np.isfinite(prediction.predictions).all()
    np.testing.assert_array_equal(prediction.label_ids, trainer.eval_dataset.labels.numpy())
    assert prediction.metrics["test_mAP"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    if "candidates" not in name:  # whose loss is that of the candidates alone
        logits = torch.from_numpy(prediction.predictions)
        expected = F.binary_cross_entropy_with_logits(logits, trainer.eval_dataset.labels)
        assert prediction.metrics["test_loss"] == pytest.approx(expected.item(), rel=1e-5)


def first_step(name, folder, batch_size, accumulated):
    """(loss, gradient norm) of a step of 16 images with a fifth of their labels known."""
    options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
    trainer = Trainer(build(name), arguments(folder, **options), train_dataset=Images(48, known_fraction=0.2))
    trainer.train()
    line = trainer.state.log_history[0]
    return [line["loss"], line["grad_norm"]]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_however_its_images_are_divided(name, tmp_path):
    """Each known label counts once, and each image as often in what HP-DVAL adds to the loss."""
    whole = first_step(name, tmp_path, 16, 1)
    np.testing.assert_allclose(first_step(name, tmp_path, 4, 4), whole, rtol=1e-5)


def print_first_step(folder):
    figures = first_step("hsvlt", folder, 4, 2)
    assert os.environ["WORLD_SIZE"] == "2"
    if os.environ["RANK"] == "0":
        print("figures", json.dumps(figures))


@pytest.mark.slow
def test_two_processes_take_the_same_step(tmp_path):
    result = forked(print_first_step, tmp_path / "run", processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    double = [json.loads(line.split(" ", 1)[1]) for line in result.stdout.splitlines() if line.startswith("figures")]
    single = [first_step("hsvlt", tmp_path, 16, 1)]
    np.testing.assert_allclose(double, single, rtol=1e-5)
