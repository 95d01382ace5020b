"""Checkpoints in the hands of those who do not have this package: in processes that cannot import it."""

import ast
import filecmp
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_hsvlt import (
    HPDVALConfig,
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
    MultiLabelImageProcessor,
    MultiLabelProcessor,
)

from .fresh import python
from .loopback_hub import LoopbackHub
from .tolerance import assert_close_outputs

pytestmark = pytest.mark.slow

PACKAGE = Path(__file__).parent.parent / "modeling_hsvlt"
FAMILIES = {
    "hsvlt": (HSVLTConfig, HSVLTForImageClassification),
    "mltr": (MlTrConfig, MlTrForImageClassification),
    "hp_dval": (HPDVALConfig, HPDVALForImageClassification),
}
NAMES = {index: f"label {index}" for index in range(7)}
THRESHOLDS = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]

# Whoever is asked for the package says that there is none, installed or not.
WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_hsvlt":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

USE = """
import json
from functools import partial
import torch
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor, pipeline
)

TRUST = {"trust_remote_code": True}

def use(repo, **kwargs):
    processor = AutoProcessor.from_pretrained(repo, **TRUST, **kwargs)
    image_processor = AutoImageProcessor.from_pretrained(repo, **TRUST, **kwargs)
    autos = (AutoModel, AutoModelForImageClassification)
    models = [auto.from_pretrained(repo, **TRUST, **kwargs).eval() for auto in autos]
    pixels = [one(images="image.png", return_tensors="pt")["pixel_values"] for one in (processor, image_processor)]
    assert torch.equal(*pixels)
    with torch.no_grad():
        outputs = [model(pixel_values=pixels[0]) for model in models]
    tagger = pipeline(model=repo, device="cpu", **TRUST, **kwargs)
    stock = pipeline("image-classification", model=repo, device="cpu", top_k=7, **TRUST, **kwargs)
    for thing in (processor, image_processor, *models, tagger):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    return {
        "pixels": pixels[0].tolist(),
        "logits": [output.logits.tolist() for output in outputs],
        "labels": processor.post_process_multi_label_classification(outputs[0], threshold="auto")[0],
        "task": tagger.task,
        "tagger": tagger("image.png"),
        "auto": tagger(["image.png"] * 3, threshold="auto", batch_size=2)[2],
        "stock": stock("image.png"),
        "thresholds": [models[0].config.thresholds, processor.thresholds],
    }
"""


def run(script, folder, *arguments, package=False, **environment):
    """Runs a script in `folder`, by itself, and gives what it printed last as JSON."""
    script = USE + script if package else WITHOUT_THE_PACKAGE + USE + script
    settings = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    settings = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings
    if package:
        settings["PYTHONPATH"] = str(PACKAGE.parent)  # this tree's, whatever is installed
    result = python("-c", script, *arguments, cwd=folder, env=settings)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def checkpoint(family):
    return noisy(*FAMILIES[family])


def hsvlt_on(backbone):
    return noisy(*FAMILIES["hsvlt"], backbone_config=backbone)


def noisy(config_class, model_class, **fields):
    torch.manual_seed(0)
    config = config_class.preset("nano", num_labels=7, id2label=NAMES, thresholds=THRESHOLDS, **fields)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # Fresh heads give scores that hardly differ.
            parameter.add_(0.02 * torch.randn_like(parameter))
    image_processor = MultiLabelImageProcessor(size=64, resize_mode="pad", image_mean=[0.3, 0.4, 0.5], resample=2)
    return model, MultiLabelProcessor(image_processor, config.id2label, config.thresholds)


def check(used, model, processor, image):
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.tensor(used["pixels"]), pixels)
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    for remote in used["logits"]:
        torch.testing.assert_close(torch.tensor(remote), logits, rtol=1e-4, atol=1e-5)
    every = processor.post_process_multi_label_classification(logits)[0]
    own = processor.post_process_multi_label_classification(logits, "auto")[0]
    assert {label["label"] for label in own} == {f"label {index}" for index in (0, 2, 4, 6)}
    assert used["task"] == "multi-label-image-classification" and used["thresholds"] == [THRESHOLDS, THRESHOLDS]
    for key, expected in {"tagger": every, "stock": every, "auto": own, "labels": own}.items():
        found = used[key]
        assert [label["label"] for label in found] == [label["label"] for label in expected]
        assert [label["score"] for label in found] == pytest.approx([label["score"] for label in expected], abs=1e-5)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    return path


def imported_files(folder: Path, name: str) -> set[str]:
    """The files of this package that a file imports, and those that they import, by reading the code."""
    reached, pending = set(), [name]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            tree = ast.parse((folder / name).read_text())
            nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)
            pending += [f"{node.module}.py" for node in nodes]
    return reached


def assert_same_weights(saved, expected):
    """Bit for bit, but for what saving computes: HP-DVAL's text embeddings."""
    computed = "hp_dval.prompts.text_embeddings"
    assert_close_outputs(saved.pop(computed, 0), expected.get(computed, 0))
    assert saved.keys() == expected.keys() - {computed}
    assert [name for name, tensor in saved.items() if not torch.equal(tensor, expected[name])] == []


def test_folders_load_and_save_and_load_without_the_package(tmp_path, image):
    """But not unless their code is trusted. A backbone of this package travels along."""
    lite = {"model_type": "efficientnet_lite", "group_channels": [8, 8, 8, 8, 8, 16, 16], "head_channels": 32}
    mltr = {"model_type": "mltr", "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "image_size": 64}
    checkpoints = {family: checkpoint(family) for family in FAMILIES}
    others = {"on_lite": hsvlt_on(lite), "on_mltr": hsvlt_on(mltr)}
    for name, (model, processor) in (checkpoints | others).items():
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    script = """
refused = []
tasks = (partial(pipeline, None), partial(pipeline, "multi-label-image-classification"))
for load in (AutoModel.from_pretrained, AutoProcessor.from_pretrained, *tasks):
    try:
        load("hsvlt", trust_remote_code=False)
    except ValueError as error:
        refused.append("trust_remote_code=True" in str(error))
families, others = map(json.loads, sys.argv[1:])
results = {}
for family in families:
    results[family] = use(family)
    AutoModel.from_pretrained(family, **TRUST).save_pretrained(f"{family}_again")
    AutoProcessor.from_pretrained(family, **TRUST).save_pretrained(f"{family}_again")
    results[f"{family}_again"] = use(f"{family}_again")
    pipeline(model=family, device="cpu", **TRUST).save_pretrained(f"{family}_piped")
    results[f"{family}_piped"] = use(f"{family}_piped")
used = {}
for name in others:
    AutoModelForImageClassification.from_pretrained(name, **TRUST).save_pretrained(f"{name}_again")
    AutoProcessor.from_pretrained(name, **TRUST).save_pretrained(f"{name}_again")
    used |= {again: use(again) for again in (name, f"{name}_again")}
assert "modeling_hsvlt" not in sys.modules
print(json.dumps([refused, results, used]))
"""
    refused, results, used_others = run(script, tmp_path, json.dumps([*FAMILIES]), json.dumps([*others]))
    assert refused == [True] * 4
    assert len(used_others) == 4
    for name, used in used_others.items():
        check(used, *others[name.removesuffix("_again")], image)
    assert (tmp_path / "on_lite" / "modeling_efficientnet_lite.py").is_file()
    for name, used in results.items():
        family = name.removesuffix("_again").removesuffix("_piped")
        check(used, *checkpoints[family], image)
        # The code that travels is the package's, to the byte, however often it was saved.
        code = sorted(path.name for path in (tmp_path / name).glob("*.py"))
        needed = imported_files(PACKAGE, f"modeling_{family}.py")
        assert {f"configuration_{family}.py", "pipeline_multilabel.py", "processing_multilabel.py"} <= needed
        assert set(code) == needed | imported_files(PACKAGE, "processing_multilabel.py")
        named = re.findall(r'"(\w+)\.\w+"', json.dumps(json.loads((tmp_path / name / "config.json").read_text())))
        assert {f"{module}.py" for module in named} <= set(code), "auto_map and custom_pipelines"
        assert filecmp.cmpfiles(tmp_path / name, PACKAGE, code, shallow=False) == (code, [], [])
        assert_same_weights(*(load_file(tmp_path / folder / "model.safetensors") for folder in (name, family)))
    again = json.loads((tmp_path / "hsvlt_again/processor_config.json").read_text())
    assert again == json.loads((tmp_path / "hsvlt/processor_config.json").read_text())


def test_with_the_package_its_own_code_runs_and_none_of_the_checkpoint_s(tmp_path, image):
    model, processor = checkpoint("hsvlt")
    model.save_pretrained(tmp_path / "hsvlt")
    processor.save_pretrained(tmp_path / "hsvlt")
    for path in (tmp_path / "hsvlt").glob("*.py"):
        path.write_text("raise SystemExit('code of a checkpoint was run')\n")
    evil = json.loads((tmp_path / "hsvlt/config.json").read_text())
    names = ("image-classification", "object-detection")
    pipelines = {name: {**next(iter(evil["custom_pipelines"].values())), "impl": "evil.Evil"} for name in names}
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/config.json").write_text(json.dumps({**evil, "custom_pipelines": pipelines}))
    for name in ("model.safetensors", "processor_config.json"):
        shutil.copy(tmp_path / "hsvlt" / name, tmp_path / "evil" / name)
    (tmp_path / "evil/evil.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    script = """
import modeling_hsvlt
results = []
for kwargs in ({}, {"trust_remote_code": False}, {"task": None}, {"task": None, "trust_remote_code": True}):
    tagger = pipeline(**{"task": "multi-label-image-classification", "model": "hsvlt", "device": "cpu"} | kwargs)
    assert type(tagger) is modeling_hsvlt.MultiLabelImageClassificationPipeline
    results.append(tagger("image.png"))
pipeline("image-classification", model="evil", device="cpu")("image.png")
assert not any(name.startswith("transformers_modules") for name in sys.modules)
print(json.dumps(results))
"""
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = processor.post_process_multi_label_classification(model(pixel_values=pixels))[0]
    for result in run("import sys\n" + script, tmp_path, package=True, PYTHONPATH=str(PACKAGE.parent)):
        assert [label["label"] for label in result] == [label["label"] for label in expected]


def test_pushed_checkpoints_load_from_the_hub_without_the_package(tmp_path, image):
    model, processor = checkpoint("hsvlt")
    model.save_pretrained(tmp_path / "local")
    processor.save_pretrained(tmp_path / "local")
    push = """
from modeling_hsvlt import HSVLTForImageClassification, MultiLabelProcessor
from huggingface_hub import HfApi
model = HSVLTForImageClassification.from_pretrained("local")
model.push_to_hub("me/tagger")
MultiLabelProcessor.from_pretrained("local").push_to_hub("me/tagger")
HfApi().create_tag("me/tagger", tag="v1")
model.config.thresholds = [0.5] * 7
model.push_to_hub("me/tagger", commit_message="other thresholds")
print(json.dumps(None))
"""
    load = """
from huggingface_hub import HfApi
results = {"tag": use("me/tagger", revision="v1"), "main": AutoConfig.from_pretrained("me/tagger", **TRUST).thresholds}
# On from here: what was downloaded is pushed again, and what was pushed again is downloaded.
AutoModel.from_pretrained("me/tagger", revision="v1", **TRUST).push_to_hub("me/copy")
AutoProcessor.from_pretrained("me/tagger", revision="v1", **TRUST).push_to_hub("me/copy")
results["copy"] = use("me/copy")
pipeline(model="me/copy", device="cpu", **TRUST).push_to_hub("me/piped")
results["piped"] = use("me/piped")
for repo, revision in (("me/nothing", None), ("me/tagger", "v2")):
    try:
        AutoModel.from_pretrained(repo, revision=revision, **TRUST)
    except OSError as error:
        results[f"{repo}@{revision}"] = str(error)
print(json.dumps(results))
"""
    with LoopbackHub() as hub:
        run(push, tmp_path, package=True, **hub.environment(tmp_path / "sender"))
        receiver = hub.environment(tmp_path / "receiver")
        results = run(load, tmp_path, **receiver)
    offline = receiver | {"HF_HUB_OFFLINE": "1"}  # from the cache, when the Hub is away
    cached = run('print(json.dumps(use("me/tagger", revision="v1")))', tmp_path, **offline)
    for used in (results["tag"], results["copy"], results["piped"], cached):
        check(used, model, processor, image)
    assert results["main"] == [0.5] * 7
    assert "me/nothing is not a local folder and is not a valid model identifier" in results["me/nothing@None"]
    assert "v2 is not a valid git identifier" in results["me/tagger@v2"]
    assert hub.unknown == []
    for name in ("me/tagger", "me/copy", "me/piped"):
        files = hub.files(name)
        code = {path: data for path, data in files.items() if path.endswith(".py")}
        assert {"modeling_hsvlt.py", "pipeline_multilabel.py", "processing_multilabel.py"} <= set(code)
        assert all(data == (PACKAGE / path).read_bytes() for path, data in code.items())
        assert files["model.safetensors"] == (tmp_path / "local/model.safetensors").read_bytes()
    assert any(method == "PUT" and path.startswith("/lfs/") for method, path in hub.requests)
