import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from modeling_hsvlt.label_prompts import encode_labels, transfer_classifier
from training.config import TrainingConfig
from training.models.build import build_model

from ...tolerance import assert_close_outputs

BACKBONE = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
TINY = {"preset": "nano", "image_size": 32}
NAMES = ["cat", "dog", "tv monitor", "person"]
MODEL = {"backbone_config": BACKBONE, "label_embedding_dim": 8}


def build(names=NAMES, *, model=None, **options):
    model = MODEL if model is None else model
    return build_model(TrainingConfig(**TINY, model=model, **options), names)


def logits(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.rand(2, 3, 32, 32)).logits


def test_a_new_model_knows_its_labels_and_loss():
    model = build(loss_type="asl", loss_kwargs={"gamma_neg": 2.0})
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id == {name: index for index, name in enumerate(NAMES)}
    assert (model.config.loss_type, model.config.loss_kwargs) == ("asl", {"gamma_neg": 2.0})
    assert model.config.image_size == 32 and model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_a_pretrained_backbone_from_a_folder(tmp_path, kind):
    torch.manual_seed(0)
    if kind == "convnext":
        backbone = ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 2, 1]))
    else:
        backbone = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1]))
    backbone.save_pretrained(tmp_path)
    model = build(model={"label_embedding_dim": 8}, backbone=str(tmp_path))
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        maps = list(model.eval().hsvlt.backbone(images))
        expected = backbone.eval()(images, output_hidden_states=True).hidden_states[-1]
    assert_close_outputs(maps[-1], expected)


def test_a_pyramid_stands_on_the_backbone_that_is_named_and_not_on_the_preset_s(tmp_path):
    vit = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(**vit, image_size=32, patch_size=16)).save_pretrained(tmp_path)
    model = build(model={"label_embedding_dim": 8, "pyramid": "simple"}, backbone=str(tmp_path))
    maps = model(torch.rand(2, 3, 64, 64), output_hidden_states=True).hidden_states
    assert [each.shape[-1] for each in maps] == [16, 8, 4, 2]


def checkpoint(folder, model):
    model.config.thresholds = [0.1, 0.2, 0.3, 0.4]
    model.save_pretrained(folder)
    return str(folder)


def test_init_from_the_same_labels_gives_the_same_scores(tmp_path):
    source = build()
    folder = checkpoint(tmp_path, source)
    model = build_model(TrainingConfig(image_size=32, init_from=folder, loss_type="focal"), NAMES)
    assert_close_outputs(logits(model), logits(source))
    assert model.config.loss_type == "focal" and model.config.thresholds is None


@pytest.mark.parametrize("names", [["person", "bicycle", "cat"], ["dog", "cat", "bicycle", "person"], ["bicycle"]])
@pytest.mark.parametrize("classifier", ["per_label", "shared"])
def test_init_from_carries_labels_over_by_name(tmp_path, names, classifier):
    torch.manual_seed(0)
    source = build(model={"backbone_config": BACKBONE, "label_embedding_dim": 8, "classifier": classifier})
    folder = checkpoint(tmp_path, source)
    model = build_model(TrainingConfig(image_size=32, init_from=folder), names)
    assert list(model.config.id2label.values()) == names and model.config.thresholds is None
    old, new = logits(source), logits(model)
    assert new.shape == (2, len(names))
    for column, name in enumerate(names):
        if name in NAMES:
            assert_close_outputs(new[:, column], old[:, NAMES.index(name)])


@pytest.mark.parametrize("names", [NAMES, ["person", "bird", "cat"]])
@pytest.mark.parametrize(
    "change, fresh, why",
    [
        (
            {"label_embedding_dim": 12},
            r"label_embeddings|stages\.0\.projection\.weight",
            "(4, 8) there, ({n}, 12) here",
        ),
        ({"classifier": "shared"}, r"^classifier", "(4, 48) there, (1, 48) here"),
        ({"normalize_visual_tokens": False, "normalize_multimodal_states": True}, r"multimodal_norms", "are not in"),
        ({"candidate_labels": 2}, r"candidate_scorer", "are not in"),
    ],
)
def test_init_from_keeps_the_weights_that_fit_and_names_the_others(tmp_path, caplog, names, change, fresh, why):
    source = build()
    folder = checkpoint(tmp_path, source)
    model = build_model(TrainingConfig(image_size=32, init_from=folder, model=change), names)
    assert logits(model).shape == (2, len(names))
    known = [(row, NAMES.index(name)) for row, name in enumerate(names) if name in NAMES]
    rows, source_rows = (list(side) for side in zip(*known, strict=True))
    old, kept = source.state_dict(), 0
    for name, value in model.state_dict().items():
        if re.search(fresh, name) is None:
            of_labels = name.startswith(("classifier.", "hsvlt.label_embeddings."))
            assert torch.equal(value[rows] if of_labels else value, old[name][source_rows] if of_labels else old[name])
            kept += 1
    assert kept > 50
    (words,) = [each.getMessage() for each in caplog.records if "start fresh: " in each.getMessage()]
    assert f"{len(model.state_dict()) - kept} of {len(model.state_dict())} weights" in words
    assert why.format(n=len(names)) in words
    for field, value in change.items():
        assert f"{field} ({getattr(source.config, field)} there, {value} here)" in words


def test_init_from_a_shared_classifier_with_one_a_label(tmp_path, caplog):
    """Its only row is no label's."""
    folder = checkpoint(tmp_path, build(model=MODEL | {"classifier": "shared"}))
    model = build_model(TrainingConfig(image_size=32, init_from=folder, model={"classifier": "per_label"}), NAMES)
    assert model.classifier.weight.shape == (4, 48) and logits(model).shape == (2, 4)
    assert "classifier.weight ((1, 48) there, (4, 48) here)" in caplog.text


def test_init_from_a_model_of_which_nothing_fits_is_refused(tmp_path):
    folder = checkpoint(tmp_path, build())
    wide = {"model_type": "convnext", "hidden_sizes": [12, 12, 20, 20], "depths": [1, 1, 1, 1], "patch_size": 4}
    wide = {"backbone_config": wide, "label_embedding_dim": 6}
    with pytest.raises(ValueError, match=r"No weight of .* fits .*backbone_config, label_embedding_dim"):
        build_model(TrainingConfig(image_size=32, init_from=folder, model=wide), ["bird"])


@pytest.mark.parametrize(
    "fields, message",
    [({"num_head": 2}, "no field 'num_head'"), ({"backbone_config": {"depths": [1, 1, 1, 1]}}, "fits no HSVLTConfig")],
)
def test_init_from_refuses_fields_that_no_model_has(tmp_path, fields, message):
    folder = checkpoint(tmp_path, build())
    with pytest.raises(ValueError, match=message):
        build_model(TrainingConfig(image_size=32, init_from=folder, model=fields), NAMES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "dog", "tv", "monitor", "person"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=len(words), **sizes)).eval()
    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, bert, tokenizer


@pytest.mark.parametrize("names", [NAMES, ["person", "dog"]])
def test_init_from_takes_another_width_with_another_text_encoder(encoder, tmp_path, names, caplog):
    folder, bert, tokenizer = encoder
    source = checkpoint(tmp_path, build())
    model = build_model(TrainingConfig(image_size=32, init_from=source, label_encoder=str(folder)), names)
    assert torch.equal(model.hsvlt.label_embeddings.weight, encode_labels(names, bert, tokenizer))
    assert "label_embedding_dim (8 there, 12 here)" in caplog.text
    assert logits(model).shape == (2, len(names))


@pytest.mark.parametrize("reading", ["mean", "official"])
def test_label_embeddings_come_from_the_encoder(encoder, reading):
    folder, bert, tokenizer = encoder
    names = ["cat", "dog", "tvmonitor", "person"]
    text = {"tvmonitor": "tv monitor"}
    model = build(
        names, model={"backbone_config": BACKBONE}, label_encoder=str(folder), label_pooling=reading, label_text=text
    )
    expected = encode_labels(names, bert, tokenizer, pooling=reading, label_text=text)
    assert_close_outputs(model.hsvlt.label_embeddings.weight, expected)
    assert model.config.label_embedding_dim == 12 and model.config.label_pooling == reading
    assert model.config.label_template == (None if reading == "official" else "a photo of a {}")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"model_type": "mltr", "model": {}}, "reads no label text"),
        ({"model_type": "hsvlt"}, "label_encoder, which reads it, is not set"),
        ({"model_type": "hsvlt", "label_encoder": "bert", "label_pooling": "official"}, "official pooling takes none"),
        ({"model_type": "hp_dval", "model": {}, "init_from": "best"}, "init_from keeps"),
    ],
)
def test_a_template_that_nothing_would_read_is_refused(options, why):
    with pytest.raises(ValueError, match=why):
        build(label_template="a drawing of a {}", **options)


def save_classifier(folder, names, hidden_sizes=(8, 8, 16, 24)):
    torch.manual_seed(0)
    labels = {"num_labels": 5} if names is None else {"id2label": dict(enumerate(names))}
    source = ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=list(hidden_sizes), depths=[1, 1, 1, 1], initializer_range=0.5, **labels)
    )
    source.save_pretrained(folder)
    return source


def build_with_text_classifier(encoder, folder, model=None, **options):
    model = model or {"residual_attention": True}
    return build(model=model, backbone=str(folder), label_encoder=str(encoder[0]), text_classifier=True, **options)


def test_a_text_classifier_comes_from_the_backbone(encoder, tmp_path):
    _, bert, tokenizer = encoder
    source = save_classifier(tmp_path, ["dog, hound", "tv", "monitor, screen", "dog, toy"])  # two of one name
    model = build_with_text_classifier(encoder, tmp_path)
    classes = encode_labels(["dog", "tv", "monitor"], bert, tokenizer)[[0, 1, 2, 0]]
    expected = transfer_classifier(source.classifier.weight, classes, encode_labels(NAMES, bert, tokenizer))
    assert_close_outputs(model.residual_attention.text_weight, expected)
    assert expected.abs().sum() > 0 and not model.residual_attention.weight.any()
    shared = {"residual_attention": True, "classifier": "shared"}
    shared = build(model=shared, backbone=str(tmp_path), label_encoder=str(encoder[0]))
    assert_close_outputs(shared.residual_attention.text_weight, expected)
    assert_close_outputs(shared.residual_attention.class_embeddings, classes)
    assert shared.config.text_classes == 4 and model.config.text_classes is None
    tied = build_with_text_classifier(encoder, tmp_path, {"label_stream": "tied"})
    assert_close_outputs(tied.classifier.text_weight, expected)


def test_it_is_said_which_classes_each_label_started_from(encoder, tmp_path):
    save_classifier(tmp_path, ["dog, hound", "tv", "monitor, screen", "dog, toy"])
    options = {"backbone": str(tmp_path), "label_encoder": str(encoder[0])}
    said = []
    config = TrainingConfig(image_size=32, preset="nano", model={"residual_attention": True}, **options)
    model = build_model(config, NAMES, said.append)
    assert model.residual_attention.text_weight.abs().sum() > 0, "null: on, as there is a classifier"
    lines = {line.partition(":")[0].strip(): line.partition(":")[2] for line in said[1:]}
    assert list(lines) == NAMES and lines["dog"].split()[0] == "dog" and "%" in lines["cat"]

    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1])).save_pretrained(tmp_path / "bare")
    config.backbone, said[:] = str(tmp_path / "bare"), []
    model = build_model(config, NAMES, said.append)
    assert not model.residual_attention.text_weight.any() and "has no linear classifier" in said[0]
    config.model, said[:] = {}, []  # without residual attention there is nothing to start
    build_model(config, NAMES, said.append)
    assert said == []


def test_labels_start_absent_where_told():
    options = {"model": {"backbone_config": BACKBONE, "residual_attention": True, "candidate_labels": 2}}
    model = build(initial_bias=-4.0, **options)
    for bias in (model.classifier.bias, model.residual_attention.bias, model.candidate_scorer.bias):
        assert (bias == -4).all()
    assert (build(model_type="mltr", model={}, initial_bias=-4.0).classifier.bias == -4).all()


def test_labels_that_start_fresh_beside_those_of_a_checkpoint_start_absent(tmp_path):
    folder = checkpoint(tmp_path, source := build())
    options = TrainingConfig(image_size=32, init_from=folder, initial_bias=-4.0, model={"candidate_labels": 2})
    model = build_model(options, ["bird", "dog"])
    assert model.classifier.bias.tolist() == [-4, source.classifier.bias[1].item()]
    assert (model.candidate_scorer.bias == -4).all()


def test_a_short_name_is_a_backbone(tmp_path, monkeypatch):
    save_classifier(tmp_path / "written", ["dog", "cat"])
    monkeypatch.setattr("training.models.build.local_source", lambda name, known: str(tmp_path / "written"))
    model = build(backbone="efficientnet_lite0", model={})
    assert model.config.backbone_config.hidden_sizes == [8, 8, 16, 24]


def test_a_text_classifier_that_cannot_be_is_refused(encoder, tmp_path):
    save_classifier(tmp_path / "nameless", None)
    with pytest.raises(ValueError, match="does not name its classes"):
        build_with_text_classifier(encoder, tmp_path / "nameless")
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1])).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no linear classifier"):
        build_with_text_classifier(encoder, tmp_path / "bare")
    with pytest.raises(ValueError, match="residual_attention"):
        build(backbone=str(tmp_path / "bare"), label_encoder=str(encoder[0]), text_classifier=True, model={})
    with pytest.raises(ValueError, match="needs a backbone"):
        build(label_encoder=str(encoder[0]), text_classifier=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "vit"}, "choose one of .*hsvlt"),
        ({"model": {"num_head": 2}}, "no field 'num_head'"),
        ({"backbone": "facebook/convnext-small-224"}, "not efficientnet_lite0 or .* needs --backbone_revision"),
        ({"label_encoder": "google-bert/bert-base-uncased"}, "needs --label_encoder_revision"),
        ({"init_from": "me/model"}, "needs --init_from_revision"),
        ({"loss_type": "bse"}, "bse"),
        ({"loss_kwargs": {"gama": 1}}, "do not fit loss_type 'bce'.*gama"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_checkpoint_of_another_house_is_refused(tmp_path):
    from transformers import ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give it as backbone"):
        build_model(TrainingConfig(init_from=str(tmp_path)), NAMES)
