"""HP-DVAL over SigLIP, whose second version of fixed size has the same classes, and over SigLIP 2's NaFlex, against
transformers' own models and image processor."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BlipConfig, Siglip2ImageProcessorPil, Siglip2Model

from modeling_hsvlt import HPDVALConfig, HPDVALForImageClassification
from training.config import TrainingConfig
from training.models.build import build_model

from .tiny_siglip import tiny_siglip, tiny_tokenizer
from .tolerance import assert_close_outputs

LABELS = ["cat", "potted plant", "dog"]


@pytest.fixture(scope="module", params=["siglip", "naflex"])
def parts(request):
    tokenizer = tiny_tokenizer()
    return tiny_siglip(tokenizer, request.param == "naflex"), tokenizer, random_images(32, 32)


def random_images(height, width):
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def images_for(siglip, pixels):
    """What transformers' own model takes; NaFlex's patches as its own processor cuts them, padded to 5 too many."""
    if not isinstance(siglip, Siglip2Model):
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}
    num_patches = pixels[0, 0].numel() // 64 + 5
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=num_patches, do_resize=False)
    as_they_are = {"do_rescale": False, "do_normalize": False, "input_data_format": "channels_first"}
    return dict(processor(list(pixels.numpy()), return_tensors="pt", **as_they_are))


def build(parts, **config):
    torch.manual_seed(0)
    return HPDVALForImageClassification.from_clip(*parts[:2], LABELS, local_top_k=3, **config).eval()


def prompts_of(tokenizer):
    texts = [f"a photo of a {name}." for name in LABELS]
    return tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize(("padding_side", "size"), [("left", (32, 32)), ("right", (32, 32)), ("right", (24, 64))])
def test_the_global_view_is_siglip_s_own_zero_shot_score(padding_side, size, parts):
    siglip, pixels = parts[0], random_images(*size)
    tokenizer = tiny_tokenizer(padding_side)
    model = build((siglip, tokenizer), alpha=1.0)
    assert torch.equal(model.hp_dval.prompts.prompt_ids[0], prompts_of(tokenizer))
    expected = siglip(input_ids=prompts_of(tokenizer), **images_for(siglip, pixels)).logits_per_image
    assert expected.std() > 0.01
    assert_close_outputs(model(pixels).logits, expected)


@torch.no_grad()
def test_the_local_view_is_the_same_head_over_one_patch(parts):
    siglip, tokenizer, pixels = parts
    seen_whole = siglip.vision_model(**images_for(siglip, pixels))
    states = seen_whole.last_hidden_state
    head = siglip.vision_model.head
    text = F.normalize(siglip.text_model(prompts_of(tokenizer)).pooler_output, dim=-1)
    local = torch.empty(3, 16, 3)
    for image in range(3):
        for patch in range(16):
            value = states[image, patch]
            weight, bias = head.attention.in_proj_weight[32:], head.attention.in_proj_bias[32:]
            seen = head.attention.out_proj(F.linear(value, weight, bias))  # one key: its weight is 1
            seen = seen + head.mlp(head.layernorm(seen))
            local[image, patch] = text @ F.normalize(seen, dim=-1)
    local = local.sort(dim=1).values[:, -3:].mean(1)
    view = F.normalize(seen_whole.pooler_output, dim=-1) @ text.T
    scale, bias = siglip.logit_scale.exp(), siglip.logit_bias
    assert_close_outputs(build(parts)(pixels).logits, scale * (0.4 * view + 0.6 * local) + bias)


def test_phases_saving_and_adapters(parts, tmp_path):
    pixels = parts[2]
    model = build(parts)
    labels = torch.tensor(np.eye(3), dtype=torch.float32)
    for phase in ("phase1", "phase2"):
        model.set_phase(phase)
        model.train()
        model(pixels, labels=labels).loss.backward()
        trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert any("student" in name for name in trained) == (phase == "phase1")
        model.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = model(pixels).logits
        model.save_pretrained(tmp_path / "whole")
        assert_close_outputs(HPDVALForImageClassification.from_pretrained(tmp_path / "whole")(pixels).logits, expected)
        model.save_pretrained(tmp_path / "other", state_dict=model.state_dict())
        assert_close_outputs(HPDVALForImageClassification.from_pretrained(tmp_path / "other")(pixels).logits, expected)
        peft = pytest.importorskip("peft")
        model.save_prompt_adapter(tmp_path / "adapter")
        adapted = peft.PeftModel.from_pretrained(build(parts), tmp_path / "adapter")
        assert_close_outputs(adapted(pixels).logits, expected)
        model.drop_teacher()
        model.drop_text_model()
        assert_close_outputs(model(pixels).logits, expected)


def test_what_does_not_go_together_is_said(parts):
    config = build(parts).config.to_dict()
    for change, words in (
        ({"embedding_head": "clip"}, r"does not go with a siglip2?_vision_model"),
        ({"vision_config": {**config["vision_config"], "vision_use_head": False}}, "read by that head"),
        ({"teacher_config": {"model_type": "clip_vision_model"}}, "two towers of one CLIP or SigLIP"),
    ):
        with pytest.raises(Exception, match=words):
            HPDVALConfig(**{**config, **change})


def test_training_builds_it_from_a_folder(parts, tmp_path):
    siglip, tokenizer, pixels = parts
    siglip.save_pretrained(tmp_path / "siglip")
    tokenizer.save_pretrained(tmp_path / "siglip")
    config = TrainingConfig(
        model_type="hp_dval", backbone=str(tmp_path / "siglip"), image_size=32, model={"local_top_k": 3}
    )
    with torch.no_grad():
        assert_close_outputs(build_model(config, LABELS).eval()(pixels).logits, build(parts)(pixels).logits)
    BlipConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'blip'; HP-DVAL stands on a CLIP, a SigLIP or a SigLIP 2"):
        build_model(replace(config, backbone=str(tmp_path / "other")), LABELS)
