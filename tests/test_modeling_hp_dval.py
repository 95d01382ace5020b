"""HP-DVAL on tiny random CLIPs. F3 to F9 are the fixtures of the method's specification."""

import copy
import logging
import os

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    CLIPTextModelWithProjection,
    ViTConfig,
    ViTModel,
    pipeline,
)
from transformers.initialization import no_init_weights

from modeling_hsvlt import (
    HPDVALConfig,
    HPDVALForImageClassification,
    HPDVALModel,
    MultiLabelImageProcessor,
    MultiLabelProcessor,
)
from modeling_hsvlt.hp_dval_prompts import GLOBAL, HANDWRITTEN, LOCAL, encode_in_parts

from .fresh import python
from .tiny_clip import tiny_clip, tiny_clip_tokenizer
from .tolerance import assert_close_outputs, close_outputs

NAMES = ["cat", "dog", "potted_plant"]
TOKENIZER = tiny_clip_tokenizer()
CLIP = tiny_clip(TOKENIZER)
TABLE = "hp_dval.text.text_model.embeddings.token_embedding"


def make_model(names=NAMES, **config):
    torch.manual_seed(0)
    fields = {"local_top_k": 4, "context_init": "template", **config}
    return HPDVALForImageClassification.from_clip(CLIP, TOKENIZER, names, **fields).eval()


def tiny_vit():
    torch.manual_seed(3)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(**tower, image_size=32, patch_size=8)).eval()


def random_images(batch=2, size=32, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def targets(batch=2, seed=2):
    return (torch.rand(batch, len(NAMES), generator=torch.Generator().manual_seed(seed)) > 0.5).float()


def train(model, steps=2, lr=0.05):
    """A few steps of SGD, which moves every weight in proportion to its gradient; in training mode before and after."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(random_images(), labels=targets())
        output.loss.backward()
        optimizer.step()
    return output


def changed_keys(model, before):
    """Without the keys' bias, whose gradient is zero but for rounding: a softmax does not feel it."""
    state = model.state_dict()
    return {key for key in state if "k_proj.bias" not in key and not torch.equal(state[key], before[key])}


def student_keys(state):
    return {key for key in state if key.startswith("hp_dval.student.") and "k_proj.bias" not in key}


@torch.no_grad()
def text_features(prompts, clip=CLIP):
    """CLIP's own, straight from transformers."""
    return clip.get_text_features(**TOKENIZER(prompts, padding=True, return_tensors="pt")).pooler_output


@torch.no_grad()
def reference_logits(clip, text_global, text_local, alpha=0.4, k=4):
    """HP-DVAL eq. 4 and 5, an image, a label and a patch at a time."""
    states = clip.vision_model(random_images()).last_hidden_state
    embeds = clip.visual_projection(clip.vision_model.post_layernorm(states))
    logits = torch.zeros(len(embeds), len(text_global))
    for row, (cls, *patches) in enumerate(embeds):
        for label in range(len(text_global)):
            local = sorted(F.cosine_similarity(text_local[label], patch, dim=0).item() for patch in patches)[-k:]
            view = F.cosine_similarity(text_global[label], cls, dim=0)
            logits[row, label] = alpha * view + (1 - alpha) * sum(local) / k
    return logits


class count_calls:  # noqa: N801
    """How often `module` runs inside the block."""

    def __init__(self, module):
        self.module, self.count = module, 0

    def __enter__(self):
        self.hook = self.module.register_forward_hook(self.add)
        return self

    def add(self, *_):
        self.count += 1

    def __exit__(self, *_):
        self.hook.remove()


# ---- scores


def test_a_new_model_is_its_clip_in_two_views():
    model = make_model()
    text = text_features(["a photo of a cat.", "a photo of a dog.", "a photo of a potted plant."])
    for view in (HANDWRITTEN, GLOBAL, LOCAL):
        assert_close_outputs(model.hp_dval.prompts.text_embeddings[view], text)
    assert_close_outputs(model(random_images()).logits, reference_logits(CLIP, text, text))
    # With the global view alone it is CLIP's own zero-shot score.
    zero_shot = (
        F.normalize(CLIP.get_image_features(random_images()).pooler_output, dim=-1) @ F.normalize(text, dim=-1).T
    )
    assert_close_outputs(make_model(alpha=1.0)(random_images()).logits, zero_shot)


def test_view_weights_and_top_k():
    # F3: each view alone, the mean of all patches, the best patch.
    generator = torch.Generator().manual_seed(5)
    image, patches = torch.randn(2, 12, generator=generator), torch.randn(2, 16, 12, generator=generator)
    text = torch.randn(2, 3, 12, generator=generator)
    cosines = F.normalize(patches, dim=-1) @ F.normalize(text[1], dim=-1).T  # (2, 16, 3)

    model = make_model(alpha=1.0)
    assert_close_outputs(model.scores(image, None, text), model.scores(image, 3 * patches, text))
    model = make_model(alpha=0.0, local_top_k=16)
    assert_close_outputs(model.scores(image, patches, text), model.scores(image + 1, patches, text))
    assert_close_outputs(model.scores(image, patches, text), cosines.mean(1))
    model = make_model(alpha=0.0, local_top_k=1)
    assert_close_outputs(model.scores(image, patches, text), cosines.amax(1))
    with pytest.raises(ValueError, match="fewer than local_top_k=1"):
        model.scores(image, patches[:, :0], text)


def test_score_normalizations():
    # F8: the paper's scores do not depend on the length of a feature, the code's not on a logit scale.
    generator = torch.Generator().manual_seed(5)
    image, patches = torch.randn(2, 12, generator=generator), torch.randn(2, 16, 12, generator=generator)
    text = torch.randn(2, 3, 12, generator=generator)
    cosine = make_model()
    assert_close_outputs(cosine.scores(3 * image, 5 * patches, 2 * text), cosine.scores(image, patches, text))
    by_class = make_model(score_normalization="class_l2")
    scaled = make_model(score_normalization="class_l2", logit_scale=20.0)
    expected = by_class.scores(image, patches, text)
    assert_close_outputs(scaled.scores(image, patches, text), expected)
    assert_close_outputs(
        make_model(logit_scale=20.0).scores(image, patches, text), 20 * cosine.scores(image, patches, text)
    )
    local = (patches @ text[1].T).topk(4, dim=1).values.mean(1)
    assert_close_outputs(expected, 0.4 * F.normalize(image @ text[0].T) + 0.6 * F.normalize(local))


def test_other_image_sizes_interpolate_positions():
    model = make_model()
    assert model(random_images(size=48)).logits.shape == (2, 3)
    assert model(random_images(size=48)).patch_embeds.shape == (2, 36, 12)
    with pytest.raises(ValueError, match="an image has 1 patches, fewer than local_top_k=4"):
        model(random_images(size=8))


def test_logits_are_fp32_under_autocast_and_in_half_precision():
    model = make_model()
    expected = model(random_images()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(random_images()).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.03, rtol=0)
    half = model.bfloat16()(random_images().bfloat16()).logits
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("student", ["clip", "vit"])
def test_outputs_are_in_declared_order_and_hold_what_was_asked_for(student):
    model = make_model(**({"student": tiny_vit()} if student == "vit" else {}), attn_implementation="eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    output = model(random_images(), labels=targets(), **asked)
    assert [state.shape for state in output.hidden_states] == 3 * [(2, 17, 16)]
    assert [attention.shape for attention in output.attentions] == 2 * [(2, 2, 17, 17)]
    always = ["logits", "image_embeds", "patch_embeds"]
    assert list(output) == ["loss", *always, "hidden_states", "attentions"]
    assert list(model(random_images())) == always
    base = model.hp_dval(random_images(), **asked)
    assert list(base) == ["image_embeds", "patch_embeds", "text_embeds", "hidden_states", "attentions"]
    assert torch.equal(base[0], base.image_embeds)
    loss, logits, *_ = model(random_images(), labels=targets(), return_dict=False)
    assert_close_outputs(loss, output.loss)
    torch.testing.assert_close(logits, output.logits)
    assert len(model.hp_dval(random_images(), return_dict=False, **asked)) == 5

    # By the configuration.
    model.config.return_dict = False
    assert type(model(random_images())) is tuple and len(model(random_images())) == len(always)
    model.config.return_dict = True
    model.config.output_hidden_states = True
    assert list(model(random_images())) == [*always, "hidden_states"]
    model.config.output_attentions = True
    assert list(model(random_images(), output_hidden_states=False)) == [*always, "attentions"]
    assert list(model(random_images(), output_attentions=False)) == [*always, "hidden_states"]


@pytest.mark.parametrize("student", ["clip", "vit"])
def test_chosen_hidden_states_and_their_gradients(student):
    model = make_model(**({"student": tiny_vit()} if student == "vit" else {}), attn_implementation="eager")
    every = model(random_images(), output_hidden_states=True).hidden_states
    chosen = model(random_images(), output_hidden_states=[0, 2]).hidden_states
    assert chosen[1] is None
    torch.testing.assert_close((chosen[0], chosen[2]), (every[0], every[2]))
    output = model(random_images(), output_hidden_states=True, output_attentions=True)
    kept = [*output.hidden_states, *output.attentions, output.image_embeds, output.patch_embeds]
    for tensor in kept:
        tensor.retain_grad()
    output.logits.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)


def test_arguments_that_stock_models_take(caplog):
    model = make_model()
    expected = model(random_images()).logits
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        for _ in range(2):
            logits = model(random_images(), is_causal=False, num_items_in_batch=None, images_of_cats=True).logits
    finally:
        logger.propagate = False
    torch.testing.assert_close(logits, expected)
    told = [record.message for record in caplog.records if "images_of_cats" in record.message]
    assert len(told) == 1 and "makes no use of" in told[0]


def test_the_mlp_head_has_a_tanh_between_its_layers():
    model = make_model(student=tiny_vit())
    states = model.hp_dval.student.backbone(random_images()).last_hidden_state[:, 0]
    first, _, second = model.hp_dval.student.projection
    torch.testing.assert_close(model(random_images()).image_embeds, second(torch.tanh(first(states))))


def test_the_loss_of_the_paper_is_taken():
    model = make_model()
    model.config.loss_type = "distribution_balanced"
    model.config.loss_kwargs = {"class_counts": [20, 5, 1], "num_samples": 30, "positive_weight": "class"}
    unknown = torch.full((2, 3), -100)
    assert model(random_images(), labels=unknown).loss == 0
    assert 0.1 < model(random_images(), labels=targets()).loss < 2


# ---- phases


def test_phase_1_distils_from_a_real_copy_and_trains_the_student_alone():
    # F5: the distance is 0 before the first step, and not after it.
    model = make_model(learn_logit_scale=False)
    model.set_phase("phase1")
    before = copy.deepcopy(model.state_dict())
    model.train()
    first = model(random_images(), labels=targets())
    assert first.distillation_loss < 1e-5
    assert first.semantic_consistency_loss is None
    assert_close_outputs(
        first.loss, first.distillation_loss + F.binary_cross_entropy_with_logits(first.logits, targets())
    )
    train(model, steps=1)
    assert model(random_images(), labels=targets()).distillation_loss > 1e-4
    assert changed_keys(model, before) == student_keys(before)
    # Nor is anything shared with the CLIP that it came from.
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in CLIP.parameters()}
    assert len(own) == len(list(model.parameters()))


def test_distillation_follows_the_paper_and_can_be_left_out():
    model = make_model()
    model.set_phase("phase1")
    with torch.no_grad():
        model.hp_dval.student.projection.weight.mul_(1.5)
    model.train()
    output = model(random_images(), labels=targets())
    teacher = CLIP.get_image_features(random_images()).pooler_output
    assert_close_outputs(output.distillation_loss, (output.image_embeds - teacher).abs().mean())
    model.config.distillation_weight = 0
    with count_calls(model.hp_dval.teacher) as teacher:
        assert model(random_images(), labels=targets()).distillation_loss is None
    assert teacher.count == 0


@pytest.mark.parametrize("phase", ["phase1", "phase2", "joint"])
def test_the_weights_of_the_other_losses(phase):
    model = make_model(context_init="random", distillation_weight=0.3, semantic_consistency_weight=2.5)
    model.set_phase(phase)
    with torch.no_grad():
        model.hp_dval.student.projection.weight.mul_(1.5)
    output = model.train()(random_images(), labels=targets())
    expected = F.binary_cross_entropy_with_logits(output.logits, targets())
    if phase != "phase2":
        assert output.distillation_loss > 0.01
        expected = expected + 0.3 * output.distillation_loss
    if phase != "phase1":
        assert output.semantic_consistency_loss > 0.01
        expected = expected + 2.5 * output.semantic_consistency_loss
    torch.testing.assert_close(output.loss, expected)


def step_gradients(phase, batch_size, labels):
    """Of one optimizer step over eight images, in batches, as Trainer makes it."""
    model = make_model(context_init="random", learn_logit_scale=True)
    model.set_phase(phase)
    with torch.no_grad():
        model.hp_dval.student.projection.weight.mul_(1.5)
    model.train()
    known, total = (labels != -100).sum(), 0
    for pixels, part in zip(random_images(8).split(batch_size), labels.split(batch_size), strict=True):
        loss = model(pixels, labels=part, num_items_in_batch=known).loss
        loss.backward()
        total += loss.item()
    return total, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("phase", ["phase1", "phase2", "joint"])
def test_a_step_is_the_same_however_it_is_split(phase):
    labels = targets(8)
    whole, _ = step_gradients(phase, 8, labels)
    model = make_model(context_init="random", learn_logit_scale=True)
    model.set_phase(phase)
    with torch.no_grad():
        model.hp_dval.student.projection.weight.mul_(1.5)
    # All labels known: the means.
    assert whole == pytest.approx(model.train()(random_images(8), labels=labels).loss.item(), rel=1e-5)
    # Halves with 12 and 3 known labels, and one batch with none.
    labels[4:6, 1:] = -100
    labels[6, :2] = -100
    labels[6, 2] = labels[7] = -100
    labels[5] = -100
    labels[7, 0] = 1
    whole, expected = step_gradients(phase, 8, labels)
    for batch_size in (4, 2, 1):
        total, gradients = step_gradients(phase, batch_size, labels)
        assert total == pytest.approx(whole, rel=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_phase_2_starts_at_the_hand_written_prompts_and_trains_their_contexts_alone():
    # F4
    model = make_model()
    model.set_phase("phase2")
    model.train()
    output = model(random_images(), labels=targets())
    assert output.semantic_consistency_loss < 1e-5
    assert output.distillation_loss is None
    assert_close_outputs(output.logits, make_model()(random_images()).logits)
    before = copy.deepcopy(model.state_dict())
    train(model)
    assert changed_keys(model, before) == {f"{TABLE}.trainable_tokens_delta.prompts"}
    rows = model.state_dict()[f"{TABLE}.trainable_tokens_delta.prompts"]
    assert rows.shape == (2 * 4, 16)
    assert (rows != before[f"{TABLE}.trainable_tokens_delta.prompts"]).all()
    assert model(random_images(), labels=targets()).semantic_consistency_loss > 1e-4
    frozen = (model.hp_dval.student, model.hp_dval.text, model.hp_dval.teacher)
    assert not any(module.training for tower in frozen for module in tower.modules())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "delta" not in name)


def test_phase_2_changes_only_the_context_rows_of_a_saved_checkpoint(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    model.set_phase("phase2")
    train(model)
    model.save_pretrained(tmp_path / "two")
    one = HPDVALForImageClassification.from_pretrained(tmp_path / "one").state_dict()
    two = HPDVALForImageClassification.from_pretrained(tmp_path / "two").state_dict()
    assert one.keys() == two.keys()
    changed = {key for key in one if not torch.equal(one[key], two[key])}
    assert changed == {f"{TABLE}.weight", "hp_dval.prompts.text_embeddings"}
    rows = (one[f"{TABLE}.weight"] != two[f"{TABLE}.weight"]).any(1).nonzero().flatten().tolist()
    assert rows == model.config.context_token_ids
    assert torch.equal(
        one["hp_dval.prompts.text_embeddings"][HANDWRITTEN], two["hp_dval.prompts.text_embeddings"][HANDWRITTEN]
    )


def test_semantic_consistency_holds_the_global_contexts_alone():
    model = make_model(context_init="random")
    model.set_phase("phase2")
    model(random_images())  # the cached embeddings of both views are now the learned ones
    model.train()
    output = model(random_images(), labels=targets())
    output.semantic_consistency_loss.backward()
    gradient = model.get_parameter(f"{TABLE}.trainable_tokens_delta.prompts").grad
    assert (gradient[:4] != 0).all()
    assert (gradient[4:] == 0).all()
    handwritten = text_features(["a photo of a cat.", "a photo of a dog.", "a photo of a potted plant."])
    text = encode_in_parts(model.hp_dval.text, model.hp_dval.prompts.prompt_ids[GLOBAL])
    torch.testing.assert_close(output.semantic_consistency_loss, (text - handwritten).abs().mean())


def test_joint_trains_both():
    model = make_model()
    model.set_phase("joint")
    before = copy.deepcopy(model.state_dict())
    output = train(model)
    assert output.distillation_loss is not None
    assert output.semantic_consistency_loss is not None
    assert changed_keys(model, before) == student_keys(before) | {f"{TABLE}.trainable_tokens_delta.prompts"}


def test_training_in_another_state_than_the_phase_s_is_refused():
    model = make_model().train()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="requires gradients, but phase1 keeps it frozen"):
        model(random_images(), labels=targets())
    model.set_phase("phase1")
    model(random_images(), labels=targets())
    model.config.phase = "phase2"
    with pytest.raises(ValueError, match="phase2 keeps it frozen"):
        model(random_images(), labels=targets())
    model = make_model(phase="phase2").train()
    with pytest.raises(ValueError, match="have no adapter yet: call set_phase first"):
        model(random_images(), labels=targets())
    with pytest.raises(ValueError, match="phase must be one of"):
        model.set_phase("phase3")


def test_the_logit_scale_trains_where_asked():
    model = make_model(learn_logit_scale=True, logit_scale=5.0, logit_bias=-2.0)
    assert_close_outputs(model(random_images()).logits, 5 * make_model()(random_images()).logits - 2)
    model.set_phase("phase2")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "scale.logit_scale",
        "scale.logit_bias",
        f"{TABLE}.trainable_tokens_delta.prompts",
    }
    assert model.scale.logit_scale.exp().item() == pytest.approx(5)


def test_a_scale_that_is_not_trained_is_no_parameter_and_loads_as_one(tmp_path):
    """FSDP2 refuses parameters without a dimension; checkpoints are the same either way."""
    fixed, trained = (make_model(learn_logit_scale=learn, logit_scale=5.0, logit_bias=-2.0) for learn in (False, True))
    assert all(parameter.ndim for parameter in fixed.parameters())
    assert trained.num_parameters() == fixed.num_parameters() + 2
    assert {key: value.shape for key, value in trained.state_dict().items()} == {
        key: value.shape for key, value in fixed.state_dict().items()
    }
    for number, (model, learn) in enumerate(((fixed, True), (trained, False))):
        model.save_pretrained(tmp_path / str(number))
        loaded = HPDVALForImageClassification.from_pretrained(tmp_path / str(number), learn_logit_scale=learn)
        assert loaded.scale.logit_scale.requires_grad == loaded.scale.logit_bias.requires_grad == learn
        torch.testing.assert_close(loaded(random_images()).logits, model(random_images()).logits)


def test_random_contexts_start_at_the_published_spread():
    model = make_model(context_init="random", num_context_tokens=8)
    assert not model.hp_dval.has_learned_context()
    model.set_phase("phase2")
    rows = model.hp_dval.context_rows()
    assert rows.shape == (16, 16)
    assert rows.std().item() == pytest.approx(0.02, rel=0.2)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_model(context_init="random")
        model.set_phase("joint")
        with torch.no_grad():  # at a distance of 0 to the teacher, rounding would decide on the sign of its gradient
            for parameter in model.hp_dval.student.parameters():
                parameter.mul_(1.1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(random_images(), labels=targets()).loss.backward()
        gradients.append(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in name}
        )
    for name, gradient in gradients[0].items():
        assert_close_outputs(gradients[1][name], gradient)


# ---- prompts


def test_prompt_tokens_are_a_sentence_with_contexts_in_place_of_words():
    model = make_model()
    ids = model.hp_dval.prompts.prompt_ids
    tokenizer = copy.deepcopy(TOKENIZER)
    assert tokenizer.add_tokens(model.config.context_tokens, special_tokens=True) == 8
    assert tokenizer.convert_tokens_to_ids(model.config.context_tokens) == model.config.context_token_ids
    for view, words in (
        (HANDWRITTEN, "a photo of a"),
        (GLOBAL, "<global_0><global_1><global_2><global_3>"),
        (LOCAL, "<local_0><local_1><local_2><local_3>"),
    ):
        for label, name in enumerate(("cat", "dog", "potted plant")):
            expected = tokenizer(f"{words} {name}.")["input_ids"]
            assert ids[view, label, : len(expected)].tolist() == expected
            assert (ids[view, label, len(expected) :] == tokenizer.eos_token_id).all()
    assert ids.shape[-1] == len(tokenizer("a photo of a potted plant.")["input_ids"]) == model.config.prompt_length


def test_both_views_in_one_call_equal_two_calls():
    # F9
    model = make_model(context_init="random")
    model.set_phase("phase2")
    base = model.hp_dval
    together = encode_in_parts(base.text, base.prompts.prompt_ids[GLOBAL:])
    for view in (GLOBAL, LOCAL):
        assert_close_outputs(together[view - 1], encode_in_parts(base.text, base.prompts.prompt_ids[view]))


def test_trainable_tokens_equal_coop_s_splicing():
    """The text tower with learned tokens, against context vectors put between embeddings by hand."""
    model = make_model(context_init="random")
    model.set_phase("phase2")
    train(model)
    model.eval()
    model(random_images())
    contexts = model.hp_dval.context_rows().detach()
    text_model = copy.deepcopy(CLIP.text_model)
    tokens = TOKENIZER("a photo of a dog.", return_tensors="pt")["input_ids"]
    embeds = text_model.embeddings.token_embedding(tokens).detach()
    for view in (GLOBAL, LOCAL):
        embeds[0, 1:5] = contexts[4 * (view - 1) : 4 * view]
        # The ends of a forward pass, since CLIPTextModel takes no embeddings.
        hook = text_model.embeddings.token_embedding.register_forward_hook(lambda *_: embeds)
        spliced = CLIP.text_projection(text_model(tokens).pooler_output)
        hook.remove()
        torch.testing.assert_close(model.hp_dval.text_embeds()[view - 1, 1], spliced[0], atol=1e-6, rtol=1e-5)


def test_class_specific_contexts():
    model = make_model(class_specific=True)
    model.set_phase("phase2")
    assert len(model.config.context_token_ids) == 2 * 3 * 4
    assert_close_outputs(model(random_images()).logits, make_model()(random_images()).logits)
    train(model)
    rows = model.hp_dval.context_rows().view(2, 3, 4, -1)
    assert not torch.equal(rows[:, 0], rows[:, 1])
    with pytest.raises(ValueError, match="a context for each of its labels"):
        model.set_labels(["bird"], TOKENIZER)


def test_labels_can_be_exchanged_under_learned_contexts():
    model = make_model()
    model.set_phase("phase2")
    train(model)
    model.eval()
    before = model(random_images()).logits
    model.config.thresholds = [0.5, 0.5, 0.5]
    model.set_labels(["bird", "cat"], TOKENIZER)
    assert model.config.id2label == {0: "bird", 1: "cat"}
    assert model.config.thresholds is None
    assert_close_outputs(model(random_images()).logits[:, 1], before[:, 0])
    model.set_labels(["pottedplant"], TOKENIZER, label_text={"pottedplant": "potted plant"})
    assert_close_outputs(model(random_images()).logits[:, 0], before[:, 2])


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (["cat", "_"], {}, "label 1 has an empty name"),
        (["cat", "cat"], {}, "have the same name"),
        (["potted_plant", "cat", "potted plant"], {}, "labels 0 .'potted_plant'. and 2 .'potted plant'. have the same"),
        (["cat", "hippopotamusses and rhinoceroses"], {}, "tokens, but a prompt has room for 18"),
        (["cat"], {"num_context_tokens": 3}, "'a photo of a ' has 4 tokens"),
    ],
)
def test_label_errors(names, config, message):
    with pytest.raises(ValueError, match=message):
        make_model(names, **config)


def test_other_labels_of_the_same_number_drop_what_was_fitted():
    model = make_model(thresholds=[0.1, 0.2, 0.3], threshold_info={"objective": "F1"})
    model.set_labels(NAMES, TOKENIZER)
    assert list(model.config.thresholds) == [0.1, 0.2, 0.3]
    before = model(random_images()).logits
    model.set_labels(["dog", "cat", "potted_plant"], TOKENIZER)
    assert model.config.thresholds is None and model.config.threshold_info is None
    torch.testing.assert_close(model(random_images()).logits, before[:, [1, 0, 2]])


def test_the_template_of_the_time_is_read():
    model = make_model()
    model.config.label_template = "photo of dog a {} plant"
    model.set_labels(["cat", "bird"], TOKENIZER)
    text = text_features(["photo of dog a cat plant", "photo of dog a bird plant"])
    assert_close_outputs(model(random_images()).logits, reference_logits(CLIP, text, text))


def test_the_token_table_keeps_its_size():
    model = make_model()
    tokens = model.config.text_config.vocab_size
    assert model.resize_token_embeddings() is model.resize_token_embeddings(tokens) is model.get_input_embeddings()
    for part in (model, model.hp_dval):
        with pytest.raises(ValueError, match=r"the last 8 of the text tower's .* tokens are contexts"):
            part.resize_token_embeddings(tokens + 8)


def test_a_tokenizer_of_another_clip_is_refused():
    with pytest.raises(ValueError, match="they are not of one model"):
        HPDVALForImageClassification.from_clip(
            CLIP, tiny_clip_tokenizer(("hippopotamus", "rhinoceros", "crocodile", "elephant")), NAMES
        )


# ---- text embeddings fit the weights, always


def fresh_logits(model):
    """Logits with text embeddings encoded anew."""
    model = copy.deepcopy(model).eval()
    model.hp_dval._views._kept = None
    return model(random_images()).logits


@pytest.fixture
def text_calls(monkeypatch):
    """How often a text tower ran, without a hook, which would have it run each time."""
    calls = []
    forward = CLIPTextModelWithProjection.forward

    def counted(self, *args, **kwargs):
        calls.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CLIPTextModelWithProjection, "forward", counted)
    return calls


def test_inference_runs_the_text_tower_once(tmp_path, text_calls):
    model = make_model()
    model.set_phase("phase2")
    train(model)
    expected = fresh_logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    text_calls.clear()
    with torch.inference_mode():
        logits = loaded(random_images()).logits
        assert_close_outputs(loaded(random_images()).logits, logits)
        assert len(text_calls) == 1
        moved = loaded.to(torch.float64).to(torch.float32)(random_images()).logits
        loaded.drop_text_model()
        text_calls.clear()
        alone = loaded(random_images()).logits
    assert not text_calls
    for same in (logits, moved, alone):
        torch.testing.assert_close(same, expected)


def test_embeddings_follow_every_change_of_the_text_side(tmp_path):
    model = make_model()
    start = model(random_images()).logits
    model.set_phase("phase2")
    train(model)
    model.eval()
    assert_close_outputs(model(random_images()).logits, fresh_logits(model))
    assert not close_outputs(model(random_images()).logits, start)

    # In place, by an optimizer that writes through `.data`, from a state dict, and by a new tensor.
    delta = model.get_parameter(f"{TABLE}.trainable_tokens_delta.prompts")
    noise = 0.3 * torch.randn(delta.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        delta.add_(noise)
    assert_close_outputs(model(random_images()).logits, fresh_logits(model))
    model.train()
    delta.data.add_(noise)
    model.eval()
    assert_close_outputs(model(random_images()).logits, fresh_logits(model))
    state = {key: value + noise if "delta" in key else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert_close_outputs(model(random_images()).logits, fresh_logits(model))
    model.hp_dval.text.text_projection.weight = torch.nn.Parameter(0.5 + model.hp_dval.text.text_projection.weight)
    assert_close_outputs(model(random_images()).logits, fresh_logits(model))

    # Saving encodes anew where no forward pass has.
    with torch.no_grad():
        delta.add_(noise)
    model.save_pretrained(tmp_path)
    loaded = HPDVALForImageClassification.from_pretrained(tmp_path)
    assert_close_outputs(loaded(random_images()).logits, fresh_logits(model))


def adamw_step(model, fused=True):
    """A step from gradients of the prompts alone, in whatever mode the model is; a fused one raises no version."""
    encode_in_parts(model.hp_dval.text, model.hp_dval.prompts.prompt_ids[GLOBAL]).square().sum().backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, fused=fused).step()
    model.zero_grad()


@pytest.mark.parametrize("grad_after", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_embeddings_follow_fused_optimizers(mode, grad_after, tmp_path):
    """Everything that is done between two fused steps and a look, in either mode."""
    make_model().save_pretrained(tmp_path / "base")
    base = HPDVALForImageClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, base.prompt_adapter_config())
    model.set_phase("phase2")
    adamw_step(base)
    model.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", adapter_name="second", is_trainable=True)

    def looks_fresh():
        base.eval()
        with torch.set_grad_enabled(grad_after):
            logits = model(random_images()).logits
        assert_close_outputs(logits.detach(), fresh_logits(base).detach())
        base.train(mode == "train")
        return logits.detach()

    base.train(mode == "train")
    seen = []
    for change in (
        lambda: None,
        lambda: model.set_adapter("second"),
        lambda: adamw_step(base),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: (adamw_step(base), model.load_adapter(tmp_path / "adapter", adapter_name="second")),
        lambda: (model.set_adapter("default"), adamw_step(base)),
        lambda: (adamw_step(base), model.merge_adapter()),
        lambda: model.unmerge_adapter(),
        # Frozen after the step: what is no longer trained was trained since the last look.
        lambda: (adamw_step(base), model.set_phase("phase1")),
    ):
        before = looks_fresh()
        change()
        seen.append((before, looks_fresh()))
    moved = [not close_outputs(before, after) for before, after in seen]
    assert moved[2] and moved[3] and moved[4] and moved[6] and moved[9]

    model.set_phase("phase2")
    adamw_step(base)
    base.save_pretrained(tmp_path / "plain")
    merged = model.merge_and_unload().eval()
    saved = HPDVALForImageClassification.from_pretrained(tmp_path / "plain")
    assert not close_outputs(merged(random_images()).logits, seen[-1][1])
    assert_close_outputs(merged(random_images()).logits, fresh_logits(merged))
    assert_close_outputs(saved(random_images()).logits, fresh_logits(merged))


def test_a_fused_step_in_the_middle_of_evaluation_is_seen(text_calls):
    """Gradients from before, a look, the step, a look: no mode changes and nothing runs in between."""
    model = make_model()
    model.set_phase("phase2")
    encode_in_parts(model.hp_dval.text, model.hp_dval.prompts.prompt_ids[GLOBAL]).square().sum().backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, fused=True)
    with torch.inference_mode():
        before = model(random_images()).logits
    optimizer.step()
    text_calls.clear()
    with torch.inference_mode():
        after = model(random_images()).logits
        again = model(random_images()).logits
    assert not torch.equal(before, after) and len(text_calls) == 1
    assert_close_outputs([after, again], [fresh_logits(model)] * 2)


def test_other_weights_are_saved_with_their_own_embeddings(tmp_path):
    """What training saves in a thread of its own: a copy of the weights, or their average."""
    model = make_model()
    model.set_phase("phase2")
    train(model)
    copied = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.eval()(random_images()).logits
    train(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "copy", state_dict=copied)
    assert not changed_keys(model, before)
    saved = HPDVALForImageClassification.from_pretrained(tmp_path / "copy")
    assert_close_outputs(saved(random_images()).logits, expected)
    assert_close_outputs(fresh_logits(saved), expected)

    delta = f"{TABLE}.trainable_tokens_delta.prompts"
    middle = {key: value.lerp(before[key], 0.5) if key == delta else value for key, value in copied.items()}
    model.save_pretrained(tmp_path / "average", state_dict=middle)
    saved = HPDVALForImageClassification.from_pretrained(tmp_path / "average")
    logits = saved(random_images()).logits
    torch.testing.assert_close(saved.hp_dval.prompts.text_embeddings[GLOBAL:], saved.hp_dval.text_embeds())
    assert not torch.allclose(logits, expected, atol=1e-5)


def test_embeddings_reach_a_compiled_model():
    model = make_model()
    model.set_phase("phase2")
    torch.compiler.reset()  # after some models it compiles no more
    compiled = torch.compile(model, backend="eager")
    assert_close_outputs(compiled(random_images()).logits, model(random_images()).logits)
    train(model)
    model.eval()
    assert_close_outputs(compiled(random_images()).logits, fresh_logits(model))


def test_export_and_a_whole_graph_without_text_tower():
    model = make_model()
    expected = model(random_images()).logits
    exported = torch.export.export(model, (random_images(),)).module()
    assert_close_outputs(exported(random_images()).logits, expected)
    model.drop_text_model()
    torch.compiler.reset()  # after some models it compiles no more
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close_outputs(compiled(random_images()).logits, expected)


# ---- adapters of peft


def test_prompt_adapter_trains_saves_switches_and_merges(tmp_path):
    make_model().save_pretrained(tmp_path / "base")

    def base():
        return HPDVALForImageClassification.from_pretrained(tmp_path / "base")

    zero_shot = base()(random_images()).logits
    logits = []
    for run in range(2):
        torch.manual_seed(run)
        model = base()
        model.config.context_init = ("template", "random")[run]
        tuned = get_peft_model(model, model.prompt_adapter_config())
        tuned.set_phase("phase2")
        assert sum(p.numel() for p in tuned.parameters() if p.requires_grad) == 2 * 4 * 16
        train(tuned)
        logits.append(tuned.eval()(random_images()).logits)
        tuned.save_pretrained(tmp_path / f"adapter{run}")
    assert not close_outputs(logits[0], logits[1])

    weights = (tmp_path / "adapter0" / "adapter_model.safetensors").stat().st_size
    assert weights < 2 * 4 * 16 * 4 + 500
    tuned = PeftModel.from_pretrained(base(), tmp_path / "adapter0").eval()
    assert_close_outputs(tuned(random_images()).logits, logits[0])
    tuned.load_adapter(tmp_path / "adapter1", adapter_name="second")
    tuned.set_adapter("second")
    assert_close_outputs(tuned(random_images()).logits, logits[1])
    with tuned.disable_adapter():
        assert_close_outputs(tuned(random_images()).logits, zero_shot)
    assert_close_outputs(tuned(random_images()).logits, logits[1])
    tuned.merge_adapter()
    assert_close_outputs(tuned(random_images()).logits, logits[1])
    tuned.unmerge_adapter()
    tuned.set_adapter("default")
    assert_close_outputs(tuned(random_images()).logits, logits[0])

    # Merged, it is a plain checkpoint that needs no text tower.
    merged = tuned.merge_and_unload()
    assert_close_outputs(merged(random_images()).logits, logits[0])
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    plain.drop_text_model()
    torch.testing.assert_close(plain(random_images()).logits, logits[0])


def test_transformers_loads_the_adapter_by_itself(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    model = HPDVALForImageClassification.from_pretrained(tmp_path / "base")
    model.set_phase("phase2")
    train(model)
    expected = model.eval()(random_images()).logits
    model.save_prompt_adapter(tmp_path / "adapter")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert_close_outputs(loaded(random_images()).logits, expected)
    tuned = PeftModel.from_pretrained(
        HPDVALForImageClassification.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert_close_outputs(tuned.eval()(random_images()).logits, expected)
    model = HPDVALForImageClassification.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "adapter")
    assert_close_outputs(model.eval()(random_images()).logits, expected)
    model.disable_adapters()
    assert_close_outputs(model(random_images()).logits, make_model()(random_images()).logits)


def test_lora_on_the_student_trains_in_its_place(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=r".*student.*\.(q_proj|v_proj)"))
    lora.set_phase("phase1")
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("student" in name and "lora_" in name for name in trained)
    train(lora, lr=1.0)
    expected = lora.eval()(random_images()).logits
    lora.save_pretrained(tmp_path / "lora")
    base = HPDVALForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    assert_close_outputs(loaded(random_images()).logits, expected)
    assert not close_outputs(expected, make_model()(random_images()).logits)


def test_lora_and_contexts_in_one_adapter(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2,
        target_modules=r".*student.*\.(q_proj|v_proj)",
        trainable_token_indices={"token_embedding": model.config.context_token_ids},
    )
    both = get_peft_model(model, config)
    both.set_phase("joint")
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert {"lora" if "lora_" in name else "delta" if "delta" in name else name for name in trained} == {
        "lora",
        "delta",
    }
    train(both, lr=1.0)
    expected = both.eval()(random_images()).logits
    both.save_pretrained(tmp_path / "both")
    base = HPDVALForImageClassification.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "both").merge_and_unload()
    assert_close_outputs(loaded(random_images()).logits, expected)


def test_an_adapter_of_part_of_the_contexts():
    """Two adapters with ids of their own, one a view."""
    model = make_model()
    ids = model.config.context_token_ids
    views = {"global": ids[:4], "local": ids[4:]}
    tuned = get_peft_model(
        model, TrainableTokensConfig(token_indices=views["global"], target_modules=["token_embedding"]), "global"
    )
    tuned.add_adapter("local", TrainableTokensConfig(token_indices=views["local"], target_modules=["token_embedding"]))
    tuned.base_model.set_adapter(["global", "local"])
    tuned.set_phase("phase2")
    assert sum(p.requires_grad for p in tuned.parameters()) == 2
    assert_close_outputs(tuned(random_images()).logits, make_model()(random_images()).logits)


# ---- checkpoints


def test_save_and_load(tmp_path):
    model = make_model()
    expected = model(random_images()).logits
    model.save_pretrained(tmp_path)
    for load in (HPDVALForImageClassification, AutoModel, AutoModelForImageClassification):
        loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_close_outputs(loaded(random_images()).logits, expected)
        # What trains is as the phase says, after loading too.
        assert {name.split(".")[1] for name, p in loaded.named_parameters() if p.requires_grad} == {"student"}
    base = HPDVALModel.from_pretrained(tmp_path)
    assert_close_outputs(base(random_images()).text_embeds, model.hp_dval.prompts.text_embeddings[GLOBAL:])


def test_saving_by_position_and_beside_the_main_process(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "main", True)
    model.save_pretrained(tmp_path / "weights", True, model.state_dict())
    for folder in ("main", "weights"):
        loaded = HPDVALForImageClassification.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(loaded(random_images()).logits, model(random_images()).logits)
    model.save_pretrained(tmp_path / "beside", False)
    model.set_phase("phase2")
    model.save_pretrained(tmp_path / "beside", is_main_process=False)
    model.save_prompt_adapter(tmp_path / "adapter", False)
    adapted = HPDVALForImageClassification.from_pretrained(tmp_path / "main")
    adapted.add_adapter(adapted.prompt_adapter_config())
    adapted.save_pretrained(tmp_path / "beside", is_main_process=False)
    assert not [path for name in ("beside", "adapter") for path in (tmp_path / name).rglob("*")]


def test_buffers_are_right_without_initialisation():
    """As DeepSpeed builds a model, and on the meta device, as loading does."""
    expected = HPDVALForImageClassification(HPDVALConfig.preset("nano", num_labels=3, logit_scale=3.0))
    with no_init_weights():
        model = HPDVALForImageClassification(expected.config)
    for name, buffer in expected.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    with torch.device("meta"):
        model = HPDVALForImageClassification(expected.config)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model(random_images(size=64).to("meta")).logits.shape == (2, 3)


def test_a_checkpoint_for_inference_alone(tmp_path):
    model = make_model()
    model.set_phase("phase2")
    train(model)
    expected = model.eval()(random_images()).logits
    model.drop_teacher()
    model.drop_text_model()
    model.save_pretrained(tmp_path)
    loaded = HPDVALForImageClassification.from_pretrained(tmp_path)
    assert_close_outputs(loaded(random_images()).logits, expected)
    assert {".".join(key.split(".")[:2]) for key in loaded.state_dict()} == {
        "hp_dval.student",
        "hp_dval.prompts",
        "scale.logit_scale",
        "scale.logit_bias",
    }
    with pytest.raises(ValueError, match="needs the teacher"):
        loaded.set_phase("phase1")
    with pytest.raises(ValueError, match="holds none"):
        loaded.set_phase("phase2")
    with pytest.raises(ValueError, match="holds none"):
        loaded.set_labels(["cat"], TOKENIZER)


def test_missing_weights_are_initialised(tmp_path):
    """Loading builds on the meta device: what a checkpoint lacks must not come back as garbage."""
    from safetensors.torch import load_file, save_file

    make_model(logit_scale=3.0, logit_bias=-1.5).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "teacher" in key or "student" in key}
    save_file(
        {k: v for k, v in kept.items() if "projection" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    loaded = HPDVALForImageClassification.from_pretrained(tmp_path)
    assert loaded.scale.logit_scale.exp().item() == pytest.approx(3)
    assert loaded.scale.logit_bias.item() == -1.5
    assert not loaded.hp_dval.has_learned_context()
    assert 0.1 < loaded.hp_dval.student.projection.weight.std() < 0.5
    logits = loaded(random_images()).logits
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, fresh_logits(loaded))
    assert len(loaded.hp_dval.text_embeds()[0].unique(dim=0)) == 3


def test_another_number_of_labels_on_loading(tmp_path):
    make_model(thresholds=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    loaded = HPDVALForImageClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert loaded.config.thresholds is None
    assert_close_outputs(loaded(random_images()).logits, fresh_logits(loaded))
    loaded.set_labels(NAMES, TOKENIZER)
    assert_close_outputs(loaded(random_images()).logits, make_model()(random_images()).logits)


def test_a_model_from_its_configuration_alone_trains():
    model = HPDVALForImageClassification(HPDVALConfig.preset("nano", num_labels=3))
    for phase in ("phase1", "phase2"):
        model.set_phase(phase)
        assert torch.isfinite(train(model).loss)
    torch.testing.assert_close(model.eval()(random_images(size=64)).logits.shape, torch.Size([2, 3]))


def test_an_imagenet_student():
    vit = tiny_vit()
    model = make_model(student=vit)
    assert model.config.embedding_head == "mlp"
    states = vit(random_images()).last_hidden_state
    assert_close_outputs(model(random_images()).image_embeds, model.hp_dval.student.projection(states[:, 0]))
    assert train(model).distillation_loss > 0


def test_attention_implementations_agree():
    expected = make_model()(random_images()).logits
    eager = make_model()
    eager.set_attn_implementation("eager")
    assert_close_outputs(eager(random_images()).logits, expected)


CLEAN_PROCESS = """
import sys, torch
from transformers import AutoModel, pipeline
from PIL import Image
folder, adapter, expected = sys.argv[1:4]
expected = torch.load(expected, weights_only=True)
assert "modeling_hsvlt" not in sys.modules
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert "modeling_hsvlt" not in sys.modules
torch.testing.assert_close(model(expected["images"]).logits, expected["base"])
scores = pipeline("image-classification", model=folder, trust_remote_code=True)(Image.new("RGB", (40, 32), "red"))
assert {entry["label"] for entry in scores} == {"cat", "dog", "potted_plant"}, scores
tagger = pipeline(model=folder, trust_remote_code=True)
assert type(tagger).__name__ == "MultiLabelImageClassificationPipeline", type(tagger)
assert {entry["label"] for entry in tagger(Image.new("RGB", (40, 32), "red"))} == {"cat", "dog", "potted_plant"}

from peft import PeftModel
tuned = PeftModel.from_pretrained(model, adapter)
torch.testing.assert_close(tuned(expected["images"]).logits, expected["adapter"])
native = AutoModel.from_pretrained(adapter, trust_remote_code=True)
torch.testing.assert_close(native(expected["images"]).logits, expected["adapter"])
print("same")
"""


@pytest.mark.slow
def test_a_saved_folder_works_in_a_clean_process_with_and_without_adapter(tmp_path):
    model = make_model()
    base = model(random_images()).logits
    model.save_pretrained(tmp_path / "base")
    processor = MultiLabelProcessor(
        MultiLabelImageProcessor(size={"height": 32, "width": 32}), id2label=model.config.id2label
    )
    processor.save_pretrained(tmp_path / "base")
    model = HPDVALForImageClassification.from_pretrained(tmp_path / "base")
    model.set_phase("phase2")
    train(model)
    adapter = model.eval()(random_images()).logits
    model.save_prompt_adapter(tmp_path / "adapter")
    torch.save(
        {"images": random_images(), "base": base.detach(), "adapter": adapter.detach()}, tmp_path / "expected.pt"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [tmp_path / "base", tmp_path / "adapter", tmp_path / "expected.pt"]
    done = python("-c", CLEAN_PROCESS, *arguments, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.strip().endswith("same"), done.stderr[-2000:]


def test_the_pipeline_of_this_package_reads_a_saved_folder(tmp_path):
    model = make_model(thresholds=[0.0, 1.0, 0.0])
    model.save_pretrained(tmp_path)
    MultiLabelProcessor(
        MultiLabelImageProcessor(size={"height": 32, "width": 32}), id2label=model.config.id2label
    ).save_pretrained(tmp_path)
    tagger = pipeline("multi-label-image-classification", model=str(tmp_path), threshold="auto", trust_remote_code=True)
    assert {entry["label"] for entry in tagger(Image.new("RGB", (40, 32), "red"))} == {"cat", "potted_plant"}
