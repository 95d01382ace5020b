import pytest
from transformers import AutoConfig, CLIPVisionConfig, ViTConfig

from modeling_hsvlt import HPDVALConfig


def test_preset_is_clip_vit_b_16():
    config = HPDVALConfig.preset("vit-b-16", num_labels=80)
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size, vision.image_size) == (768, 12, 16, 224)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (512, 12, 8)
    assert (config.alpha, config.local_top_k, config.num_context_tokens) == (0.4, 32, 4)
    # CLIP's 49,408 tokens, and behind them 2 x 4 contexts.
    assert config.context_token_ids == list(range(49408, 49416))
    assert config.context_tokens == [*(f"<global_{i}>" for i in range(4)), *(f"<local_{i}>" for i in range(4))]
    assert HPDVALConfig(num_labels=80).to_dict() == config.to_dict()


def test_class_specifics_are_reserved_for_every_label():
    config = HPDVALConfig.preset("nano", num_labels=3, class_specific=True, num_context_tokens=2)
    assert config.context_token_ids == list(range(512, 512 + 2 * 3 * 2))
    assert config.context_tokens[:3] == ["<global_0_0>", "<global_0_1>", "<global_1_0>"]
    assert config.context_tokens[-1] == "<local_2_1>"


def test_round_trip(tmp_path):
    config = HPDVALConfig.preset("nano", num_labels=3, phase="phase2", vision_config={"num_hidden_layers": 1})
    assert config.vision_config.hidden_size == 64
    config.save_pretrained(tmp_path)
    for load in (HPDVALConfig, AutoConfig):
        loaded = load.from_pretrained(tmp_path)
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_the_teacher_is_like_a_clip_student_and_must_be_given_for_another():
    config = HPDVALConfig.preset("nano")
    assert config.teacher_config.to_dict() == config.vision_config.to_dict()
    assert config.teacher_config is not config.vision_config
    assert HPDVALConfig.preset("nano", has_teacher=False).teacher_config is None

    vit = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=64, patch_size=8).to_dict()
    with pytest.raises(Exception, match="teacher_config is missing"):
        HPDVALConfig(vision_config=vit)
    config = HPDVALConfig(vision_config=vit, teacher_config=CLIPVisionConfig())
    assert config.embedding_head == "mlp"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "alpha must be within"),
        ({"local_top_k": 65}, "from 1 to the 64 patches of an image of 64 px"),  # F3
        ({"local_top_k": 0}, "from 1 to the 64 patches"),
        ({"image_size": 16}, "from 1 to the 4 patches of an image of 16 px"),
        ({"phase": "phase3"}, "phase must be one of"),
        ({"score_normalization": "none"}, "score_normalization must be one of"),
        ({"context_init": "a photo of a"}, "context_init must be one of"),
        ({"embedding_head": "linear"}, "embedding_head must be one of"),
        ({"logit_scale": 0}, "logit_scale must be above 0"),
        ({"num_context_tokens": 0}, "num_context_tokens must be at least 1"),
        ({"num_context_tokens": 14}, "prompt_length must be from 17"),
        ({"prompt_length": 33}, "to 32"),
        ({"label_template": "a photo"}, "must hold {} once"),
        ({"text_config": {"projection_dim": 32}}, "text_config.projection_dim is 32"),
        ({"text_config": {"eos_token_id": 2}}, "the mark of early CLIP configurations"),
        ({"text_config": {"vocab_size": 500}}, "leaves no room for 8 context tokens"),
        ({"vision_config": {"model_type": "swin"}}, "choose one of"),
    ],
)
def test_errors_name_the_field(fields, message):
    with pytest.raises(Exception, match=message):
        HPDVALConfig.preset("nano", **fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="'vit-l-14' is unknown"):
        HPDVALConfig.preset("vit-l-14")
