"""HP-DVAL over SigLIP, whose second version of fixed size has the same classes, against transformers' own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Siglip2Config, Siglip2Tokenizer, Siglip2VisionConfig, SiglipConfig, SiglipModel

from modeling_hsvlt import HPDVALConfig, HPDVALForImageClassification
from training.config import TrainingConfig
from training.models.build import build_model

from .tolerance import assert_close_outputs

LABELS = ["cat", "potted plant", "dog"]


def tiny_tokenizer(padding_side="right"):
    """SigLIP 2's own, spelling all but some words; no start, and blanks at the beginning of words."""
    merges = [("▁", "a"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz.▁", *map("".join, merges)]
    return Siglip2Tokenizer({word: index for index, word in enumerate(words)}, merges, padding_side=padding_side)


def tiny_siglip(tokenizer):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0}
    text |= {"bos_token_id": 2, "eos_token_id": 1}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else None
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model.eval()


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer()
    return tiny_siglip(tokenizer), tokenizer, torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(parts, **config):
    torch.manual_seed(0)
    return HPDVALForImageClassification.from_clip(*parts[:2], LABELS, local_top_k=3, **config).eval()


def prompts_of(tokenizer):
    texts = [f"a photo of a {name}." for name in LABELS]
    return tokenizer(texts, padding="max_length", max_length=32, return_tensors="pt")["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_global_view_is_siglip_s_own_zero_shot_score(padding_side, parts):
    siglip, _, pixels = parts
    tokenizer = tiny_tokenizer(padding_side)
    model = build((siglip, tokenizer), alpha=1.0)
    assert torch.equal(model.hp_dval.prompts.prompt_ids[0], prompts_of(tokenizer))
    expected = siglip(input_ids=prompts_of(tokenizer), pixel_values=pixels).logits_per_image
    assert expected.std() > 0.01
    assert_close_outputs(model(pixels).logits, expected)


@torch.no_grad()
def test_the_local_view_is_the_same_head_over_one_patch(parts):
    siglip, tokenizer, pixels = parts
    states = siglip.vision_model(pixels).last_hidden_state
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
    view = F.normalize(siglip.vision_model(pixels).pooler_output, dim=-1) @ text.T
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
        ({"embedding_head": "clip"}, "does not go with a siglip_vision_model"),
        ({"vision_config": Siglip2VisionConfig().to_dict()}, "of fixed size"),
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
    (tmp_path / "naflex").mkdir()
    Siglip2Config().save_pretrained(tmp_path / "naflex")
    with pytest.raises(ValueError, match="a SigLIP 2 of fixed size"):
        build_model(replace(config, backbone=str(tmp_path / "naflex")), LABELS)
