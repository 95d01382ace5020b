"""Labels that HSVLT was not trained on, by their names: what `exchange_labels` makes of classes and trained labels."""

import pytest
import torch
import torch.nn.functional as F

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification

from .tolerance import assert_close_outputs

BACKBONE = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 20], "depths": [1, 1, 1, 1], "patch_size": 2}
NAMES = ["cat", "dog", "sofa"]
K, C, D = 6, 20, 12


def make_model(**overrides):
    torch.manual_seed(0)
    fields = {"classifier": "shared", "residual_attention": True, "label_embedding_dim": D, "image_size": 32}
    config = HSVLTConfig(backbone_config=BACKBONE, id2label=dict(enumerate(NAMES)), **{**fields, **overrides})
    return HSVLTForImageClassification(config).eval()


def trained_model():
    """Labels that started from classes and then learned something."""
    model = make_model()
    generator = torch.Generator().manual_seed(1)
    classes, texts = torch.randn(K, C, generator=generator), torch.randn(K, D, generator=generator)
    model.start_from_classes(classes, texts)
    with torch.no_grad():
        model.residual_attention.weight.normal_(generator=generator)
        model.residual_attention.bias.normal_(generator=generator)
    return model, classes, texts


def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def naive_row(text, rows, texts):
    """One label's weights: class by class, from the equations in `transfer_classifier`'s docstring."""
    mean_row, mean_text = sum(rows) / len(rows), sum(texts) / len(texts)
    closeness = []
    for other in texts:
        one, two = text - mean_text, other - mean_text
        closeness.append(((one @ two) / (one.norm() * two.norm()) / 0.1).exp())
    row = sum(each * (other - mean_row) for each, other in zip(closeness, rows, strict=True)) / sum(closeness)
    row = row - row.mean()
    return row / row.norm() * 12 / C**0.5


@torch.no_grad()
def test_a_new_label_has_what_classes_and_trained_labels_of_similar_names_have():
    model, classes, texts = trained_model()
    attention, before = model.residual_attention, model.hsvlt.label_embeddings.weight.clone()
    learned, biases = (attention.weight + attention.text_weight).clone(), attention.bias.clone()
    new = torch.randn(2, D, generator=torch.Generator().manual_seed(3))
    model.exchange_labels(["hound", "sofa", "bus", "cat"], torch.stack((new[0], before[2], new[1], before[0])))
    scaled = classes - classes.mean(0)
    scaled = scaled * 12 / C**0.5 / (sum(row.norm() for row in scaled) / K)
    rows, all_texts = [*scaled, *learned], [*texts, *before]
    found = attention.weight + attention.text_weight
    for row, text in ((0, new[0]), (2, new[1])):
        assert_close_outputs(found[row], naive_row(text, rows, all_texts))
        assert attention.bias[row] == pytest.approx(biases.mean().item(), abs=1e-6)
    assert_close_outputs(found[[1, 3]], learned[[2, 0]])
    assert_close_outputs(attention.bias[[1, 3]], biases[[2, 0]])
    assert model.num_labels == model.config.num_labels == 4 and model.config.label2id["bus"] == 2


@torch.no_grad()
def test_a_known_label_keeps_its_score_and_what_is_saved_scores_alike(tmp_path):
    model, *_ = trained_model()
    scores, texts = model(images()).logits, model.hsvlt.label_embeddings.weight.clone()
    model.exchange_labels(["bus", "sofa"], torch.stack((torch.randn(D), texts[2])), encoder="some", pooling="mean")
    after = model(images()).logits
    assert after.shape == (2, 2)
    assert_close_outputs(after[:, 1], scores[:, 2])
    assert model.config.label_text_encoder == "some" and model.config.text_classes == K
    model.save_pretrained(tmp_path)
    loaded = HSVLTForImageClassification.from_pretrained(tmp_path).eval()
    assert_close_outputs(loaded(images()).logits, after)
    more = torch.randn(3, D, generator=torch.Generator().manual_seed(4))
    for each in (model, loaded):
        each.exchange_labels(["tree", "sofa", "sea"], more)
    assert_close_outputs(loaded(images()).logits, model(images()).logits)


@torch.no_grad()
def test_without_kept_classes_a_new_label_has_what_similar_trained_labels_have():
    model = make_model()
    model.residual_attention.weight.normal_()
    rows, texts = list(model.residual_attention.weight.clone()), list(model.hsvlt.label_embeddings.weight.clone())
    new = torch.randn(1, D)
    model.exchange_labels(["hound"], new)
    assert model.residual_attention.class_weight is None
    assert_close_outputs(model.residual_attention.text_weight[0], naive_row(new[0], rows, texts))
    stream = make_model(residual_attention=False)
    stream.exchange_labels(["hound", "bus"], torch.randn(2, D))
    assert stream(images()).logits.shape == (2, 2)


def test_exchanged_labels_can_be_trained():
    model, *_ = trained_model()
    model.residual_attention.bias.requires_grad_(False)
    model.exchange_labels(["bus", "cat"], torch.randn(2, D))
    model.train()(images(), labels=torch.tensor([[1.0, 0.0], [0.0, 1.0]])).loss.backward()
    assert model.residual_attention.weight.grad.shape == (2, C)
    assert not model.residual_attention.bias.requires_grad


def test_a_classifier_of_classes_starts_the_labels_and_is_kept_only_where_labels_can_be_exchanged():
    generator = torch.Generator().manual_seed(1)
    classes, texts = torch.randn(K, C, generator=generator), torch.randn(K, D, generator=generator)
    fixed, shared = make_model(classifier="per_label"), make_model()
    for model in (fixed, shared):
        model.start_from_classes(classes, texts)
        for row, text in enumerate(model.hsvlt.label_embeddings.weight):
            assert_close_outputs(model.residual_attention.text_weight[row], naive_row(text, list(classes), list(texts)))
    assert fixed.residual_attention.class_weight is None and fixed.config.text_classes is None
    lengths = shared.residual_attention.class_weight.norm(dim=1)
    assert lengths.mean().item() == pytest.approx(12 / C**0.5, rel=1e-5)
    ratio = lengths / (classes - classes.mean(0)).norm(dim=1)
    assert_close_outputs(ratio, ratio[:1].expand(K))


def test_an_exchange_that_cannot_be_is_refused_and_changes_nothing():
    model, *_ = trained_model()
    rows = F.normalize(model.residual_attention.text_weight.clone())
    for names, texts, message in (
        (
            ["bus", "sea"],
            torch.randn(3, D),
            r"have shape \(3, 12\) .* 2 names of this model need finite numbers, \(2, 12\)",
        ),
        (["bus"], torch.randn(1, D - 1), r"need finite numbers, \(1, 12\)"),
        (["bus", "bus"], torch.randn(2, D), "'bus' comes twice"),
        (["bus"], torch.full((1, D), float("nan")), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            model.exchange_labels(names, texts)
        assert list(model.config.id2label.values()) == NAMES
        assert torch.equal(F.normalize(model.residual_attention.text_weight), rows)
    with pytest.raises(ValueError, match="weights for each label: other labels need training"):
        make_model(classifier="per_label").exchange_labels(["bus"], torch.randn(1, D))
    with pytest.raises(ValueError, match="exchange_labels where classifier="):
        model(images(), text_embeddings=torch.randn(5, D))
    model.config.set_label_names(["bus"])
    with pytest.raises(ValueError, match=r"this model needs \(3, 12\)"):
        model.set_label_embeddings(torch.randn(1, D))
