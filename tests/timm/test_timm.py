"""Backbones of timm: `make timm-test`, in an environment of its own, where torchvision imports."""

import json

import pytest
import torch

timm = pytest.importorskip("timm", reason="timm is not in this environment: make timm-test", exc_type=ImportError)

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import TimmBackboneConfig  # noqa: E402

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification  # noqa: E402

LABELS = {"num_labels": 5, "label_embedding_dim": 12, "initializer_range": None}
# A convolutional net, a plain ViT (one resolution), a hierarchical transformer.
NAMES = {
    "resnet10t": [4, 8, 16, 32],
    "vit_tiny_patch16_224": [16, 16, 16, 16],
    "swin_tiny_patch4_window7_224": [4, 8, 16, 32],
    "test_vit": [16, 16, 16, 16],
}


def random_images(size=224, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def source_of(name, folder):
    """A folder as timm's repositories are, with random weights of a classifier; its model."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=7)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architecture": name, "num_classes": 7, "label_names": [str(i) for i in range(7)], "num_features": 8}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 224, 224]}
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


def build(name, **fields):
    torch.manual_seed(0)
    config = HSVLTConfig(backbone_config=TimmBackboneConfig(backbone=name), image_size=224, **LABELS, **fields)
    return HSVLTForImageClassification(config)


@pytest.mark.parametrize(("name", "strides"), NAMES.items())
def test_maps_and_gradients(name, strides):
    model = build(name).train()
    size = 160 if name == "test_vit" else 224
    output = model(random_images(size), labels=torch.ones(2, 5), output_hidden_states=True)
    assert [size / each.shape[-1] for each in output.hidden_states] == strides
    assert [each.shape[1] for each in output.hidden_states] == model.hsvlt.backbone.channels
    output.loss.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_plain_vit_is_read_at_four_evenly_spaced_blocks_of_any_grid():
    model = build("vit_tiny_patch16_224").eval()
    assert model.config.backbone_config.out_indices == [2, 5, 8, 11]
    with torch.no_grad():
        assert model(random_images(256)).logits.shape == (2, 5)
    pyramid = build("vit_tiny_patch16_224", pyramid="simple").eval()
    with torch.no_grad():
        maps = pyramid(random_images(), output_hidden_states=True).hidden_states
    assert [each.shape[-1] for each in maps] == [56, 28, 14, 7]


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_weights_come_from_safetensors_and_the_checkpoint_loads(name, tmp_path):
    source = source_of(name, tmp_path / "timm" / name)
    model = HSVLTForImageClassification.from_backbone(tmp_path / "timm" / name, **LABELS).eval()
    with torch.no_grad():
        maps = model.hsvlt.backbone(random_images())
        last = source.forward_intermediates(random_images(), intermediates_only=True, norm=False)[-1]
        torch.testing.assert_close(maps[-1], last, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        again = HSVLTForImageClassification.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(again(random_images()).logits, model(random_images()).logits)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["backbone_config"]
    assert (saved["backbone"], saved["model_type"]) == (name, "timm_backbone")
    assert load_file(tmp_path / "saved" / "model.safetensors")


def test_a_source_that_does_not_fit_is_told(tmp_path):
    source_of("resnet10t", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for change, error, reason in [
        ({"architecture": "resnet18"}, ValueError, "do not fit timm's resnet18"),
        ({"architecture": "hf-hub:org/name"}, ValueError, "no name of a timm architecture"),
        ({"model_args": {"depth": 3}}, ValueError, "model_args"),
    ]:
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=reason):
            HSVLTForImageClassification.from_backbone(tmp_path / "other", **LABELS)
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"holds no model\.safetensors"):
        HSVLTForImageClassification.from_backbone(tmp_path / "other", **LABELS)
