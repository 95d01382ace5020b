"""Learned context in front of HSVLT's label names, with tiny random text encoders."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from peft import PeftModel
from torch import nn
from transformers import CLIPTextModel
from transformers.modeling_outputs import BaseModelOutput

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, label_context
from modeling_hsvlt.label_context import LabelContext
from modeling_hsvlt.label_prompts import encode_labels

from .test_label_prompts import tiny_bert
from .tiny_clip import tiny_clip, tiny_clip_tokenizer
from .tolerance import assert_close_outputs, close_outputs

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "red", "bird", "fish", "."]
NAMES = ["cat", "dog", "red_bird"]

ENCODER, TOKENIZER = tiny_bert({word: index for index, word in enumerate(WORDS)})


def make_model(context=None, **config):
    torch.manual_seed(0)
    backbone = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
    fields = {"backbone_config": backbone, "label_embedding_dim": 16, "image_size": 32, "num_labels": 3, **config}
    model = HSVLTForImageClassification(HSVLTConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that logits differ visibly between labels
            parameter.normal_(std=0.4)
    model.label_context = context
    return model


def random_images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def train(model, steps=2, fused=True):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(steps):
        optimizer.zero_grad()
        model(random_images(), labels=torch.tensor([[1.0, 0, 0], [0, 1, 1]])).loss.backward()
        optimizer.step()
    return model


def fresh(context):
    """Its embeddings, by a copy that has none kept."""
    twin = copy.deepcopy(context)
    twin._kept._kept = None
    with torch.no_grad():
        return twin()


@pytest.mark.parametrize("class_specific", [False, True])
def test_contexts_start_at_the_hand_written_words(class_specific):
    context = LabelContext(ENCODER, TOKENIZER, NAMES, class_specific=class_specific)
    expected = encode_labels(NAMES, ENCODER, TOKENIZER, template="a photo of a {}")
    assert_close_outputs(context(), expected)
    assert sum(p.numel() for p in context.parameters() if p.requires_grad) == (3 if class_specific else 1) * 4 * 16


def test_tokens_are_a_sentence_with_contexts_in_place_of_words():
    options = {"num_context_tokens": 2, "class_specific": True, "template": "a photo of a {} ."}
    context = LabelContext(ENCODER, TOKENIZER, NAMES, **options)
    first = len(WORDS)
    end = [WORDS.index("."), WORDS.index("[SEP]")]
    ids = [WORDS.index(word) for word in ("[CLS]", "cat", "dog", "red", "bird")]
    assert context._tokens == [
        ([ids[0], first, first + 1, ids[1], *end], [3]),
        ([ids[0], first + 2, first + 3, ids[2], *end], [3]),
        ([ids[0], first + 4, first + 5, ids[3], ids[4], *end], [3, 4]),
    ]
    assert 0.01 < context.rows().std() < 0.04  # another number than the template's words: at random
    assert len(TOKENIZER) == len(WORDS) and ENCODER.get_input_embeddings().weight.shape[0] == len(WORDS)


def test_gradients_equal_splicing_the_rows_into_the_sentence():
    """Against the encoder run on embeddings put together by hand (CoOp)."""
    context = LabelContext(ENCODER, TOKENIZER, ["cat"])
    weights = torch.randn(16, generator=torch.Generator().manual_seed(0))  # a LayerNorm's squares have one sum
    (context() * weights).sum().backward()
    (delta,) = (p for p in context.parameters() if p.requires_grad)
    table = ENCODER.get_input_embeddings().weight.detach()
    rows = table[[WORDS.index(word) for word in ("a", "photo", "of", "a")]].requires_grad_()
    start, name, end = (table[[WORDS.index(word)]] for word in ("[CLS]", "cat", "[SEP]"))
    states = ENCODER(inputs_embeds=torch.cat((start, rows, name, end))[None]).last_hidden_state
    (states[0, 5] * weights).sum().backward()
    assert rows.grad.abs().max() > 0.01
    assert_close_outputs(delta.grad, rows.grad)
    ENCODER.zero_grad()


@pytest.mark.parametrize("frozen", [None, "backbone", "model"])
def test_training_moves_the_rows_and_what_is_not_frozen(frozen):
    model = make_model(LabelContext(ENCODER, TOKENIZER, NAMES))
    if frozen is not None:
        for part in (model.hsvlt.backbone,) if frozen == "backbone" else (model.hsvlt, model.classifier):
            part.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train(model)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    (rows,) = (key for key in moved if key.startswith("label_context."))
    assert rows.endswith("trainable_tokens_delta.default")
    assert any(".backbone." in key for key in moved) == (frozen is None)
    assert any("label_stream" in key for key in moved) == (frozen != "model")


def test_embeddings_are_kept_while_the_rows_are_the_same(monkeypatch):
    context = LabelContext(ENCODER, TOKENIZER, NAMES)
    model = make_model(context)
    for p in (*model.hsvlt.parameters(), *model.classifier.parameters()):
        p.requires_grad_(False)
    calls = []
    mean_states = label_context._mean_states
    monkeypatch.setattr(
        label_context, "_mean_states", lambda *args, **how: calls.append(1) or mean_states(*args, **how)
    )

    def logits():
        with torch.inference_mode():
            result = model(random_images()).logits
        with torch.no_grad():
            assert_close_outputs(result, model(random_images(), text_embeddings=fresh(context)).logits)
        return result

    start = logits()
    calls.clear()
    assert_close_outputs(logits(), start)
    with torch.no_grad():
        model(random_images())
    assert len(calls) == 1  # by `fresh`
    train(model)
    trained = logits()
    assert not close_outputs(trained, start)
    # A fused step in evaluation mode, between two looks.
    model.eval()
    model(random_images()).logits.sum().backward()
    torch.optim.AdamW([p for p in context.parameters() if p.requires_grad], lr=0.1, fused=True).step()
    assert not close_outputs(logits(), trained)
    with context.encoder.disable_adapter():
        assert_close_outputs(logits(), start)
    context.encoder.merge_adapter()
    logits()


def _layer(context):
    return context.encoder.get_base_model().encoder.layer[0].output.dense


def _assign(context):
    state = {key: value * 1.5 if "dense" in key else value for key, value in context.state_dict().items()}
    context.load_state_dict(state, assign=True)


@torch.inference_mode()
def _copy(context):
    _layer(context).weight.copy_(_layer(context).weight * 1.5)


CHANGES = {
    "data": lambda context: _layer(context).weight.data.mul_(1.5),
    "rows that change places": lambda context: _layer(context).weight.data.copy_(_layer(context).weight.flip(0)),
    "inference mode": _copy,
    "assign": _assign,
    "another parameter": lambda context: setattr(_layer(context), "weight", nn.Parameter(_layer(context).weight * 1.5)),
    "another module": lambda context: setattr(context.encoder.get_base_model().encoder, "layer", nn.ModuleList()),
    "a setting": lambda context: setattr(context.encoder.get_base_model().embeddings.LayerNorm, "eps", 0.5),
    "hook": lambda context: _layer(context).register_forward_hook(lambda module, args, output: 1.5 * output),
    "hook around the encoder": lambda context: context.encoder.register_forward_hook(
        lambda module, args, output: BaseModelOutput(last_hidden_state=1.5 * output.last_hidden_state)
    ),
    "parametrisation": lambda context: torch.nn.utils.parametrizations.orthogonal(_layer(context)),
    "pruning": lambda context: torch.nn.utils.prune.l1_unstructured(_layer(context), "weight", 0.5),
    "quantisation": lambda context: torch.ao.quantization.quantize_dynamic(context, {nn.Linear}, inplace=True),
    "token table": lambda context: context.encoder.get_input_embeddings().base_layer.weight.data.mul_(1.5),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_no_change_of_the_encoder_leaves_old_embeddings(change):
    context = LabelContext(ENCODER, TOKENIZER, NAMES).eval()
    before = context()
    assert torch.equal(context(), before)
    CHANGES[change](context)
    after = context()
    assert not torch.allclose(after, before, atol=1e-5)
    with torch.enable_grad():  # computed in any case
        torch.testing.assert_close(after, context().detach())


def test_checkpoints_are_plain_and_the_adapter_serves_other_labels(tmp_path):
    context = LabelContext(ENCODER, TOKENIZER, NAMES)
    model = train(make_model(context)).eval()
    with torch.no_grad():
        expected = model(random_images()).logits
    model.save_pretrained(tmp_path)
    plain, info = HSVLTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert plain.label_context is None and not info["unexpected_keys"] and not info["missing_keys"]
    assert_close_outputs(plain(random_images()).logits, expected)

    folder = tmp_path / "label_context"
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * 16 * 4 + 500
    again = LabelContext(ENCODER, TOKENIZER, ["fish", "cat"], adapter=folder)
    assert_close_outputs(again()[1], context()[0])
    # peft alone, and the reading that there is without contexts.
    tokenizer, encoder = copy.deepcopy(TOKENIZER), copy.deepcopy(ENCODER)
    tokenizer.add_tokens([f"<context_{index}>" for index in range(4)], special_tokens=True)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder = PeftModel.from_pretrained(encoder, folder)
    by_peft = encode_labels(NAMES, encoder, tokenizer, template=context.templates[0])
    assert_close_outputs(by_peft, fresh(context))
    with pytest.raises(ValueError, match="holds 4 context tokens"):
        LabelContext(ENCODER, TOKENIZER, NAMES, num_context_tokens=3, adapter=folder)


def test_other_weights_are_saved_with_their_own_embeddings(tmp_path):
    context = LabelContext(ENCODER, TOKENIZER, NAMES)
    model = train(make_model(context))
    copied = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model.eval()(random_images()).logits
    train(model)
    model.save_pretrained(tmp_path, state_dict=copied)
    assert_close_outputs(HSVLTForImageClassification.from_pretrained(tmp_path)(random_images()).logits, expected)


def test_saving_by_position_and_beside_the_main_process(tmp_path):
    model = train(make_model(LabelContext(ENCODER, TOKENIZER, NAMES))).eval()
    model.save_pretrained(tmp_path / "main", True)
    model.save_pretrained(tmp_path / "weights", True, dict(model.state_dict()))
    for folder in ("main", "weights"):
        assert (tmp_path / folder / "label_context" / "adapter_model.safetensors").exists()
        plain = HSVLTForImageClassification.from_pretrained(tmp_path / folder)
        assert_close_outputs(plain(random_images()).logits, model(random_images()).logits)
    model.save_pretrained(tmp_path / "beside", False)
    model.save_pretrained(tmp_path / "beside", is_main_process=False)
    assert not list((tmp_path / "beside").rglob("*"))


def test_embeddings_that_would_have_no_effect_are_refused():
    model = make_model(LabelContext(ENCODER, TOKENIZER, NAMES))
    before = model.hsvlt.label_embeddings.weight.clone()
    with pytest.raises(ValueError, match="a learned label context gives this model its label embeddings"):
        model.set_label_embeddings(torch.zeros(3, 16), encoder="some-encoder")
    assert torch.equal(model.hsvlt.label_embeddings.weight, before) and model.config.label_text_encoder is None
    model.label_context = None
    model.set_label_embeddings(torch.zeros(3, 16), encoder="some-encoder")
    assert not model.hsvlt.label_embeddings.weight.any() and model.config.label_text_encoder == "some-encoder"


def test_clip_s_text_tower():
    tokenizer = tiny_clip_tokenizer()
    clip = tiny_clip(tokenizer)
    encoder = CLIPTextModel(clip.config.text_config).eval()
    context = LabelContext(encoder, tokenizer, NAMES[:2])
    assert_close_outputs(context(), encode_labels(NAMES[:2], encoder, tokenizer))
    context()[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in context.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_context_tokens": 0}, "at least 1"), ({"template": "a photo"}, "hold {} once")],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        LabelContext(ENCODER, TOKENIZER, NAMES, **options)
