import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
    ResNetConfig,
    SwinConfig,
    SwinModel,
    ViTConfig,
)

from benchmarks.timing import CountMultiplyAdds
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, hsvlt_candidates
from modeling_hsvlt.hsvlt_candidates import draw_labels
from modeling_hsvlt.label_contract import NOT_EVALUATED
from modeling_hsvlt.load_pretrained import load_pretrained

from .tolerance import assert_close_outputs

N = 5


def make_config(**overrides):
    fields = {
        "num_labels": N,
        "label_embedding_dim": 12,
        "backbone_config": ConvNextConfig(
            hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], patch_size=2, layer_scale_init_value=0.5
        ),
        "image_size": 32,
        "initializer_range": None,
    }
    return HSVLTConfig(**{**fields, **overrides})


def make_model(**overrides):
    torch.manual_seed(0)
    return HSVLTForImageClassification(make_config(**overrides)).eval()


def random_images(batch=2, size=32, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def targets(batch=2):
    return (torch.rand(batch, N, generator=torch.Generator().manual_seed(2)) > 0.5).float()


def backbone_config_of(kind):
    if kind == "swin":
        return SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, patch_size=2)
    if kind == "resnet":
        return ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic")
    return ConvNextV2Config(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 2, 1], patch_size=2)


# ---- sizes of the published models


@pytest.mark.parametrize(("name", "count"), [("tiny", 53_114_864), ("small", 96_003_824), ("base", 170_218_448)])
def test_parameter_count_is_the_published_one(name, count):
    with torch.device("meta"):
        model = HSVLTForImageClassification(HSVLTConfig.preset(name, num_labels=80))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "num_labels", "projected", "absorbed"),
    [
        ("tiny", 80, 24_943_242_240, 20_680e6),
        ("small", 80, 48_158_825_472, 39_733e6),
        ("base", 80, 84_287_016_960, 69_311e6),
        ("small", 20, 44.331e9, 35_982e6),
    ],
)
def test_multiply_adds_are_the_published_ones(name, num_labels, projected, absorbed):
    def count(**fields):
        with torch.device("meta"):
            config = HSVLTConfig.preset(name, num_labels=num_labels, attn_implementation="eager", **fields)
            model = HSVLTForImageClassification(config).eval()
            image = torch.empty(1, 3, 448, 448)
        with torch.no_grad(), CountMultiplyAdds() as counter:
            model(image)
        return counter.total

    widths = HSVLTConfig.preset(name).backbone_config.hidden_sizes
    # The released code also updates the label tokens after the last interaction, where nothing reads them, and
    # multiplies and sums the classifier element by element, which a counter of matrix products passes over.
    difference = 2 * num_labels * widths[-1] ** 2 - num_labels * sum(widths)
    if isinstance(projected, int):
        assert count(absorb_projections=False) + difference == projected
    else:
        assert count(absorb_projections=False) + difference == pytest.approx(projected, abs=0.5e6)
    # The spec's absorbed figures fold Wq Wk^T and Wv Wo, which would have to be kept up to date with the weights.
    depths = HSVLTConfig.preset(name).backbone_config.depths
    unfolded = 2 * num_labels * sum(depth * width**2 for depth, width in zip(depths, widths, strict=True))
    # They also take the labels' first projections, the same for every image, from a cache.
    first_projections = num_labels * (768 * widths[0] + 2 * widths[0] ** 2)
    assert count() - first_projections - unfolded == pytest.approx(absorbed, abs=1e6)


# ---- against a naive implementation


def naive_logits(model, pixel_values):
    """HSVLT from the equations, one image and one label at a time, on the model's own weights (one head)."""
    state, config = model.state_dict(), model.config

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    logits = pixel_values.new_zeros(len(pixel_values), config.num_labels)
    for b, image in enumerate(pixel_values):
        maps = list(model.hsvlt.backbone(image[None]))
        for n in range(config.num_labels):
            label, states, step = state["hsvlt.label_embeddings.weight"][n], [], 0
            for i, depth in enumerate(config.backbone_config.depths):
                label = linear(label, f"hsvlt.label_stream.stages.{i}.projection")
                for j in range(depth):
                    name = f"hsvlt.label_stream.stages.{i}.layers.{j}"
                    pixels = maps[step][0].flatten(1).T  # (P, C)
                    step += 1
                    keys, values = (linear(pixels, f"{name}.attention.{k}") for k in ("key", "value"))
                    scores = keys @ linear(label, f"{name}.attention.query") / len(label) ** 0.5
                    attended = linear(scores.softmax(0) @ values, f"{name}.attention.out_proj")
                    gated = F.gelu(linear(label, f"{name}.gate")) * attended
                    multimodal = F.gelu(linear(gated, f"{name}.multimodal"))
                    label = label + multimodal
                    if config.label_update == "gate" and step < sum(config.backbone_config.depths):
                        gate = linear(
                            F.relu(linear(label, f"{name}.label_gate.in_proj")), f"{name}.label_gate.out_proj"
                        )
                        label = label + torch.tanh(gate) * label
                if config.normalize_multimodal_states:
                    multimodal = F.layer_norm(multimodal, multimodal.shape)
                states.append(multimodal)
            features = torch.cat(states)
            logits[b, n] = (features * state["classifier.weight"][n]).sum() + state["classifier.bias"][n]
    return logits


@pytest.mark.parametrize("absorb", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("label_update", "label_width"), [("gate", None), ("none", None), ("gate", 10)])
@torch.no_grad()
def test_logits_equal_the_equations(absorb, normalize, label_update, label_width):
    model = make_model(
        absorb_projections=absorb,
        normalize_multimodal_states=normalize,
        label_update=label_update,
        label_width=label_width,
    ).double()
    for layer in (layer for stage in model.hsvlt.label_stream.stages for layer in stage.layers):
        for parameter in layer.parameters():  # so that every step shows in the logits
            parameter.mul_(2)
    expected = naive_logits(model, random_images().double())
    torch.testing.assert_close(model(random_images().double()).logits, expected, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_label_tokens_are_no_wider_than_label_width():
    model = make_model(label_width=10, normalize_visual_tokens=True)
    output = model(random_images(), output_hidden_states=True)
    for states in (output.label_hidden_states, output.multimodal_states):
        assert [each.shape for each in states] == [(2, N, width) for width in (8, 10, 10, 10)]
    assert [each.shape[1] for each in output.hidden_states] == [8, 12, 16, 20]
    published = make_model(label_width=20).state_dict()
    assert {name: each.shape for name, each in published.items()} == {
        name: each.shape for name, each in make_model().state_dict().items()
    }
    assert make_model(label_width=10, aggregation="topdown")(random_images()).logits.shape == (2, N)


def test_without_a_gate_there_is_none():
    names = {name for name, _ in make_model(label_update="none").named_parameters()}
    assert {name for name, _ in make_model().named_parameters()} - names == {
        f"hsvlt.label_stream.stages.{stage}.layers.{layer}.label_gate.{part}.weight"
        for stage, layer in ((0, 0), (1, 0), (2, 0), (2, 1))  # not after the last interaction
        for part in ("in_proj", "out_proj")
    }


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(ConvNextConfig, ConvNextModel), (ConvNextV2Config, ConvNextV2Model)]
)
def test_backbone_is_transformers_own(config_class, model_class, tmp_path):
    backbone = config_class(hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 2, 1], out_features=["stage1", "stage4"])
    torch.manual_seed(3)
    reference = model_class(backbone).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "grn" in name or "layer_scale" in name:
                parameter.normal_()
    reference.save_pretrained(tmp_path)
    model = HSVLTForImageClassification.from_backbone(tmp_path, num_labels=N, label_embedding_dim=12).eval()
    with torch.no_grad():
        maps = model(random_images(size=64), output_hidden_states=True).hidden_states
        expected = reference(random_images(size=64), output_hidden_states=True).hidden_states[-4:]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_from_backbone_keeps_the_given_config(tmp_path):
    ConvNextModel(make_config().backbone_config).save_pretrained(tmp_path)
    config = make_config(aggregation="topdown", id2label={i: f"name {i}" for i in range(3)}, num_labels=3)
    model = HSVLTForImageClassification.from_backbone(tmp_path, config=config)
    assert model.config.aggregation == "topdown" and model.config.id2label[2] == "name 2"
    swin = tmp_path / "swin"
    SwinModel(backbone_config_of("swin")).save_pretrained(swin)
    model = HSVLTForImageClassification.from_backbone(swin, num_labels=N, label_embedding_dim=12)
    weights = SwinModel.from_pretrained(swin).state_dict()
    ours = model.hsvlt.backbone.model.state_dict()
    name = next(key for key in weights if "attention" in key and key.endswith("weight"))
    match = [value for key, value in ours.items() if key.endswith(name)]
    assert len(match) == 1 and torch.equal(match[0], weights[name])


# ---- absorbed = projected


@pytest.mark.parametrize(("heads", "label_width"), [(1, None), (2, None), (4, None), (2, 6)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_absorbed_equals_projected_forward_and_gradients(heads, label_width, implementation):
    absorbed = make_model(
        num_attention_heads=heads, label_width=label_width, attn_implementation=implementation
    ).double()
    projected = copy.deepcopy(absorbed)
    projected.config.absorb_projections = False
    for module in projected.modules():
        if hasattr(module, "config"):
            module.config = projected.config
    results = []
    for model in (absorbed, projected):
        output = model(random_images().double(), labels=targets())
        output.loss.backward()
        results.append((output.logits, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], atol=1e-6, rtol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(absorbed(random_images().double()).logits, results[1][0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2])
def test_an_exported_graph_multiplies_as_much_as_the_model(heads):
    model = make_model(num_attention_heads=heads, attn_implementation="eager")
    with torch.no_grad():
        graph = torch.export.export(model, (), {"pixel_values": random_images()}, strict=False).module()
        counts = []
        for each in (model, graph):
            with CountMultiplyAdds() as counter:
                each(pixel_values=random_images())
            counts.append(counter.total)
        model.config.absorb_projections = False
        with CountMultiplyAdds() as projected:
            model(pixel_values=random_images())
    assert counts[0] == counts[1] < projected.total


def test_an_exported_graph_keeps_what_adapters_add():
    model = get_peft_model(make_model(), LoraConfig(target_modules=["key", "value"], init_lora_weights=False))
    with torch.no_grad():
        expected = model.eval()(random_images()).logits
        graph = torch.export.export(model.base_model.model, (), {"pixel_values": random_images()}, strict=False)
        found = graph.module()(pixel_values=random_images()).logits
        with model.disable_adapter():
            assert not torch.allclose(model(random_images()).logits, expected, atol=1e-3)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_absorption_is_chosen_by_the_rule_of_the_shapes():
    attention = make_model(num_attention_heads=4).hsvlt.label_stream.stages[0].layers[0].attention
    for labels, pixels, channels in [(5, 256, 8), (1, 256, 8), (80, 4, 8), (2, 1000, 8)]:
        assert attention._absorbs(labels, channels, pixels, channels) == (
            3 * labels * pixels + labels * channels < pixels * channels
        )
    # Labels of width 8, pixels of width 64: queries by keys and attention by pixels are in multiply-adds
    # 2 * 5 * 8 * 64 + 2 * 4 * 5 * 49 * 64, against 2 * 49 * 64 * 8 + 2 * 5 * 49 * 8 with keys and values.
    assert not attention._absorbs(5, 8, 49, 64) and attention._absorbs(1, 8, 49, 64)


def test_lora_on_a_projection_is_not_bypassed():
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.LoraConfig(target_modules=["key", "value"], r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        adapted = tuned(random_images()).logits
        assert (adapted - model(random_images()).logits).abs().max() > 1e-4
        torch.testing.assert_close(tuned.merge_and_unload()(random_images()).logits, adapted, atol=1e-5, rtol=1e-5)


# ---- labels do not interact


def test_label_subset_and_permutation_reproduce_logits():
    model = make_model(label_chunk_size=None)
    ids = torch.tensor([3, 0, 4])
    with torch.no_grad():
        logits = model(random_images()).logits
        torch.testing.assert_close(model(random_images(), class_ids=ids).logits, logits[:, ids], atol=1e-6, rtol=1e-5)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        permuted = copy.deepcopy(model)
        permuted.hsvlt.label_embeddings.weight.copy_(model.hsvlt.label_embeddings.weight[order])
        permuted.classifier.weight.copy_(model.classifier.weight[order])
        permuted.classifier.bias.copy_(model.classifier.bias[order])
        torch.testing.assert_close(permuted(random_images()).logits, logits[:, order], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            model(random_images(), class_ids=ids, labels=targets()[:, ids]).loss,
            F.binary_cross_entropy_with_logits(logits[:, ids], targets()[:, ids]),
        )


def test_label_chunks_give_the_whole():
    model = make_model()
    with torch.no_grad():
        whole = model(random_images(), output_hidden_states=True, output_attentions=True)
        model.config.label_chunk_size = 2
        chunked = model(random_images(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(chunked.logits, whole.logits, atol=1e-6, rtol=1e-5)
    for field in ("hidden_states", "label_hidden_states", "multimodal_states", "attentions"):
        for ours, theirs in zip(getattr(chunked, field), getattr(whole, field), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def with_scorer(**overrides):
    """A model whose candidate scorer tells labels apart."""
    model = make_model(candidate_labels=2, **overrides)
    weight = (
        model.candidate_scorer.weight if model.candidate_scorer.text is None else model.candidate_scorer.text.weight
    )
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return model


def normed(norm, values):
    return (values - values.mean()) / (values.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias


def naive_scores(model, pixel_values, cell=1):
    """The scorer pixel by pixel and label by label, of cells of so many places a side; of the five maps those that end
    a stage."""
    scorer, maps = model.candidate_scorer, list(model.hsvlt.backbone(pixel_values))
    maps = [maps[0], maps[1], maps[3], maps[4]]
    side = maps[2].shape[2]
    assert maps[2].shape[2:] == (side, side) and maps[3].shape[2] * 2 == side
    scores = torch.empty(len(pixel_values), N)
    for image in range(len(pixel_values)):
        grid = torch.empty(side, side, 64)
        for y in range(side):
            for x in range(side):
                parts = []
                for (norm, linear), each in zip(scorer.pixels, maps, strict=True):
                    ratio = each.shape[2] / side
                    rows = range(int(y * ratio), max(int((y + 1) * ratio), int(y * ratio) + 1))
                    columns = range(int(x * ratio), max(int((x + 1) * ratio), int(x * ratio) + 1))
                    pixels = [each[image, :, row, column] for row in rows for column in columns]
                    values = [F.gelu(linear.weight @ normed(norm, pixel) + linear.bias) for pixel in pixels]
                    parts.append(sum(values) / len(values))
                grid[y, x] = scorer.join.weight @ torch.cat(parts) + scorer.join.bias
        for block in scorer.blocks:
            before = grid.clone()
            for y in range(side):
                for x in range(side):
                    value = block.depthwise.bias.clone()
                    for down in (-1, 0, 1):
                        for right in (-1, 0, 1):
                            if 0 <= y + down < side and 0 <= x + right < side:
                                value += block.depthwise.weight[:, 0, down + 1, right + 1] * before[y + down, x + right]
                    hidden = F.gelu(block.wide.weight @ normed(block.norm, value) + block.wide.bias)
                    grid[y, x] = before[y, x] + block.narrow.weight @ hidden + block.narrow.bias
        for y in range(side):
            for x in range(side):
                grid[y, x] = normed(scorer.norm, grid[y, x])
        corners = [(y, x) for y in range(0, side, cell) for x in range(0, side, cell)]
        cells = [grid[y : y + cell, x : x + cell].amax((0, 1)) for y, x in corners]
        for label in range(N):
            own = model.config.classifier == "per_label"
            text = model.hsvlt.label_embeddings.weight[label]
            vector = scorer.weight[label] if own else scorer.text.weight @ text
            bias = scorer.bias[label if own else 0]
            scores[image, label] = max(cell @ vector for cell in cells) + bias
    return scores


@torch.no_grad()
@pytest.mark.parametrize("classifier, places, cell", [("per_label", 64, 1), ("shared", 64, 1), ("per_label", 63, 2)])
def test_candidate_labels_are_exact_and_the_rest_is_not_a_score(classifier, places, cell, monkeypatch):
    """The third of these maps has 8 x 8 places."""
    monkeypatch.setattr(hsvlt_candidates, "CANDIDATE_PLACES", places)
    model, pixel_values = with_scorer(classifier=classifier), random_images(size=64)
    output = model(pixel_values, labels=targets())
    scores = naive_scores(model, pixel_values, cell)
    maps = list(model.hsvlt.backbone(pixel_values))
    assert_close_outputs(model.candidate_scorer(maps, model.hsvlt.label_embeddings()), scores)
    model.config.candidate_labels = N
    full = model(pixel_values)
    chosen = torch.zeros(2, N, dtype=torch.bool).scatter(1, scores.topk(2).indices, True)
    assert torch.equal(output.class_ids, scores.topk(2).indices.sort().values)
    assert torch.equal(output.logits == NOT_EVALUATED, ~chosen)
    assert torch.equal(output.logits.sigmoid() == 0, ~chosen)
    torch.testing.assert_close(output.logits[chosen], full.logits[chosen], atol=1e-6, rtol=1e-5)
    expected = F.binary_cross_entropy_with_logits(full.logits[chosen], targets()[chosen])
    torch.testing.assert_close(output.loss, expected)


@torch.no_grad()
def test_a_shared_scorer_proposes_labels_that_it_never_saw():
    model = with_scorer(classifier="shared")
    others = torch.randn(9, 12, generator=torch.Generator().manual_seed(4))
    output = model(random_images(size=64), text_embeddings=others)
    maps = list(model.hsvlt.backbone(random_images(size=64)))
    assert output.logits.shape == (2, 9)
    assert torch.equal(output.class_ids, model.candidate_scorer(maps, others).topk(2).indices.sort().values)
    model.config.set_label_names([f"label {label}" for label in range(9)])
    model.set_label_embeddings(others)
    assert torch.equal(model(random_images(size=64)).class_ids, output.class_ids)


@pytest.mark.parametrize("pyramid", ["none", "simple"])
def test_a_scorer_reads_every_kind_of_backbone(pyramid):
    kind = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = make_model(candidate_labels=2, backbone_config=kind, pyramid=pyramid).train()
    model(random_images(), labels=targets()).loss.backward()
    assert model.candidate_scorer.weight.grad.abs().sum() > 0
    assert model.eval()(random_images()).class_ids.shape == (2, 2)


@pytest.mark.parametrize("options", [{}, {"classifier": "shared"}, {"residual_attention": True}, {"sampled_labels": 1}])
def test_a_scorer_changes_nothing_beside_it(options):
    """The same weights from the same seed, and the same gradients; with and without its loss."""
    models = [make_model(**options), make_model(**options, candidate_labels=2, candidate_loss_weight=0.5)]
    losses = []
    for model in models:
        model.train()
        torch.manual_seed(1)
        output = model(random_images(), labels=targets())
        assert output.logits.shape == (2, N) and (output.class_ids is None) == ("sampled_labels" not in options)
        output.loss.backward()
        losses.append(output.loss.detach())
    without, beside = (dict(model.named_parameters()) for model in models)
    assert {name.partition(".")[0] for name in beside.keys() - without.keys()} == {"candidate_scorer"}
    for name, parameter in without.items():
        assert torch.equal(parameter, beside[name]), name
        assert_close_outputs(parameter.grad, beside[name].grad)
    maps = list(models[1].hsvlt.backbone(random_images()))
    scores = models[1].candidate_scorer(maps, models[1].hsvlt.label_embeddings())
    own = 0.5 * F.binary_cross_entropy_with_logits(scores, targets())
    torch.testing.assert_close(losses[1], losses[0] + own)
    own.backward()  # once more: all that it reaches has twice the gradient, and nothing else has more
    for name, parameter in beside.items():
        if name not in without:
            continue
        assert_close_outputs(parameter.grad, without[name].grad)


@pytest.mark.parametrize("classifier", ["per_label", "shared"])
def test_every_weight_of_a_scorer_learns(classifier):
    model = with_scorer(classifier=classifier).train()
    model(random_images(size=64), labels=targets()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("classifier, former", [("per_label", "linear.weight"), ("shared", "weight")])
def test_a_scorer_of_before_is_refused_in_a_sentence(tmp_path, classifier, former):
    make_model(candidate_labels=2, classifier=classifier).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: each for name, each in weights.items() if not name.startswith("candidate_scorer.")}
    weights[f"candidate_scorer.{former}"] = torch.zeros(N, 20)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for load in (HSVLTForImageClassification.from_pretrained, partial(load_pretrained, HSVLTForImageClassification)):
        with pytest.raises(ValueError, match=r"scorer .* is one of before 0\.1.* set candidate_labels to null"):
            load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "candidate_labels": None}))
    loaded = load_pretrained(HSVLTForImageClassification, tmp_path)
    assert loaded.candidate_scorer is None
    expected = make_model(classifier=classifier)(random_images()).logits
    assert_close_outputs(loaded(random_images()).logits, expected)


# ---- labels of which a training step reads some


def test_drawn_labels_are_those_present_and_some_others():
    labels = torch.zeros(3, 40)
    labels[0, 7] = labels[2, 3] = 1
    labels[1, 20] = 0.3
    labels[:, 5] = -100
    counts = torch.zeros(40)
    for seed in range(300):
        torch.manual_seed(seed)
        weights = draw_labels(labels, 6)
        assert (weights[[3, 7, 20]] == 1).all()
        others = weights[[label for label in range(40) if label not in (3, 7, 20)]]
        assert sorted(others.unique().tolist()) == [0, pytest.approx(37 / 6)] and (others > 0).sum() == 6
        counts += weights > 0
    assert counts[[label for label in range(40) if label not in (3, 7, 20)]].min() > 25  # 49 are expected of each
    assert draw_labels(labels, 100).tolist() == [1] * 40
    assert draw_labels(torch.ones(1, 4), 2).tolist() == [1] * 4


LOSSES = {
    "bce": {},
    "asl": {"loss_kwargs": {"gamma_neg": 2.0, "reduction": "sum"}},
    "distribution_balanced": {"loss_kwargs": {"class_counts": [1, 2, 3, 4, 5], "num_samples": 9}},
}


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("num_items", [None, 20])
def test_the_loss_of_drawn_labels_is_on_average_that_of_all(loss_type, num_items):
    """Over all ways to draw one of three absent labels; with the same gradients."""
    labels = torch.tensor([[1.0, 0, 0, 0, -100], [0, 0, 0, 1, 0]])
    options = {"loss_type": loss_type, **LOSSES[loss_type]}
    whole = make_model(**options).train()
    whole.hsvlt.label_embeddings.weight.mul_(3)  # so that logits differ
    expected = whole(random_images(), labels=labels, num_items_in_batch=num_items).loss
    expected.backward()
    model = make_model(sampled_labels=1, **options).train()
    model.load_state_dict(whole.state_dict())
    found = {}
    for seed in range(200):
        torch.manual_seed(seed)
        output = model(random_images(), labels=labels, num_items_in_batch=num_items)
        read = tuple(output.class_ids[0].tolist())
        assert {0, 3} < set(read) and len(read) == 3 and torch.equal(output.class_ids[0], output.class_ids[1])
        assert torch.equal((output.logits != NOT_EVALUATED).nonzero()[:, 1], torch.tensor(read * 2))
        found[read] = output.loss
        if len(found) == 3:
            break
    assert len(found) == 3
    mean = sum(found.values()) / 3
    torch.testing.assert_close(mean, expected)
    model.zero_grad()
    mean.backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close_outputs(ours.grad, theirs.grad)


def test_labels_are_drawn_in_training_alone():
    model = make_model(sampled_labels=1)
    assert model(random_images(), labels=targets()).class_ids is None
    assert model.train()(random_images()).class_ids is None
    ids = torch.tensor([4, 1])
    assert model(random_images(), labels=targets()[:, ids], class_ids=ids).logits.shape == (2, 2)


def with_residual_attention(**overrides):
    model = make_model(residual_attention=True, residual_attention_weight=0.3, **overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (model.residual_attention.weight, model.residual_attention.bias):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    model.set_text_classifier(torch.randn(N, 20, generator=generator))
    return model


def naive_residual_attention(model, pixel_values):
    """Pixel by pixel and label by label, from the equations of Zhu & Wu (2021) with lambda = 1, halved."""
    module = model.residual_attention
    last = list(model.hsvlt.backbone(pixel_values))[-1]
    logits = torch.empty(len(last), N)
    for image in range(len(last)):
        pixels = [last[image, :, y, x] for y in range(last.shape[2]) for x in range(last.shape[3])]
        for label in range(N):
            scores = []
            for pixel in pixels:
                normed = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + module.norm.eps).sqrt()
                scores.append(normed @ (module.weight[label] + module.text_weight[label]) + module.bias[label])
            weights = [score.exp() for score in scores]
            average = sum(scores) / len(scores)
            attended = sum(w * s for w, s in zip(weights, scores, strict=True)) / sum(weights)
            logits[image, label] = (average + attended) / 2
    return logits


@torch.no_grad()
def test_residual_attention_equals_the_equations():
    model, pixel_values = with_residual_attention(), random_images(size=64)  # a last map of 4 x 4
    attention = naive_residual_attention(model, pixel_values)
    expected = 0.7 * naive_logits(model, pixel_values) + 0.3 * attention
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)
    maps = list(model.hsvlt.backbone(pixel_values))
    torch.testing.assert_close(model(feature_maps=maps).logits, expected, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([3, 0, 4])
    torch.testing.assert_close(model(pixel_values, class_ids=ids).logits, expected[:, ids], rtol=1e-4, atol=1e-5)
    model.config.label_chunk_size = 2
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_residual_attention_of_candidate_labels():
    model, pixel_values = with_residual_attention(candidate_labels=2), random_images(size=64)
    output = model(pixel_values)
    full = with_residual_attention()
    full.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("candidate_scorer")})
    assert output.class_ids.shape == (2, 2)
    expected = full(pixel_values).logits.gather(1, output.class_ids)
    torch.testing.assert_close(output.logits.gather(1, output.class_ids), expected)


def test_with_residual_attention_each_path_learns_by_its_own_loss():
    model, pixel_values, labels = with_residual_attention().train(), random_images(), targets()
    output = model(pixel_values, labels=labels)
    attention = model.residual_attention(list(model.hsvlt.backbone(pixel_values))[-1])
    stream = (output.logits - 0.3 * attention) / 0.7
    expected = (
        F.binary_cross_entropy_with_logits(stream, labels) + F.binary_cross_entropy_with_logits(attention, labels)
    ) / 2
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.residual_attention.weight.grad.abs().sum() > 0 and model.classifier.weight.grad.abs().sum() > 0
    evaluated = model.eval()(pixel_values, labels=labels)
    torch.testing.assert_close(evaluated.loss, F.binary_cross_entropy_with_logits(evaluated.logits, labels))


def test_residual_attention_starts_even_and_is_saved(tmp_path):
    fresh = make_model(residual_attention=True)
    assert not fresh.residual_attention(torch.randn(2, 20, 3, 3)).any()
    model = with_residual_attention()
    model.save_pretrained(tmp_path)
    loaded = HSVLTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert_close_outputs(loaded(random_images()).logits, model(random_images()).logits)


def test_a_text_classifier_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="has neither"):
        make_model().set_text_classifier(torch.zeros(N, 20))
    model = make_model(residual_attention=True)
    with pytest.raises(ValueError, match=r"\(5, 20\).*it is \(5, 19\)"):
        model.set_text_classifier(torch.zeros(N, 19))
    with pytest.raises(ValueError, match="not finite"):
        model.set_text_classifier(torch.full((N, 20), float("nan")))


def test_label_embeddings_can_be_exchanged_with_a_shared_classifier():
    model = make_model(classifier="shared")
    other = torch.randn(9, 12)
    with torch.no_grad():
        logits = model(random_images(), text_embeddings=other).logits
        assert logits.shape == (2, 9)
        torch.testing.assert_close(model(random_images(), text_embeddings=other[[7]]).logits, logits[:, [7]])
    with pytest.raises(ValueError, match=r"9 labels do not fit.*classifier='shared'"):
        make_model()(random_images(), text_embeddings=other)
    with pytest.raises(ValueError, match=r"text_embeddings are 3 wide.*label_embedding_dim=12"):
        model(random_images(), text_embeddings=torch.randn(N, 3))


# ---- outputs and backbones


def test_outputs_have_their_shapes_and_attention_sums_to_one():
    model = make_model(num_attention_heads=2)
    with torch.no_grad():
        output = model(random_images(), output_hidden_states=True, output_attentions=True)
        plain = model(random_images())
    sides, widths = [16, 8, 4, 2], [8, 12, 16, 20]
    for i in range(4):
        assert output.hidden_states[i].shape == (2, widths[i], sides[i], sides[i])
        assert output.label_hidden_states[i].shape == (2, N, widths[i])
        assert output.multimodal_states[i].shape == (2, N, widths[i])
        assert output.attentions[i].shape == (2, 2, N, sides[i], sides[i])
        torch.testing.assert_close(output.attentions[i].sum((-2, -1)), torch.ones(2, 2, N))
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-6, rtol=1e-5)
    assert plain.hidden_states is None and plain.attentions is None and plain.multimodal_states is None
    as_tuple = model(random_images(), labels=targets(), return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0 and as_tuple[1].shape == (2, N)
    base = model.hsvlt(random_images(), output_hidden_states=True)
    torch.testing.assert_close(torch.cat(base.multimodal_states, -1), base.last_hidden_state)


def test_attention_maps_are_those_of_the_equations():
    model = make_model()
    with torch.no_grad():
        output = model(random_images(), output_attentions=True, output_hidden_states=True)
        layer = model.hsvlt.label_stream.stages[0].layers[0]
        labels = model.hsvlt.label_stream.stages[0].projection(model.hsvlt.label_embeddings.weight)
        pixels = output.hidden_states[0].flatten(2).transpose(1, 2)
        scores = layer.attention.query(labels) @ layer.attention.key(pixels).transpose(1, 2) / 8**0.5
    torch.testing.assert_close(output.attentions[0].flatten(3)[:, 0], scores.softmax(-1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["swin", "resnet", "convnextv2"])
@pytest.mark.parametrize("interaction_depths", [None, [1, 2, 1, 1]])
def test_any_four_stage_backbone(kind, interaction_depths, tmp_path):
    model = make_model(backbone_config=backbone_config_of(kind), interaction_depths=interaction_depths)
    depths = interaction_depths or ([1, 1, 2, 1] if kind == "convnextv2" else [1, 1, 1, 1])
    assert [len(stage.layers) for stage in model.hsvlt.label_stream.stages] == depths
    model.train()
    output = model(random_images(size=64), labels=targets(), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    output.loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None]
    assert dead == []
    model.eval().save_pretrained(tmp_path)
    again = HSVLTForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(random_images(size=64)).logits, model(random_images(size=64)).logits)


def test_pixels_reach_the_labels_without_a_copy():
    model = make_model()
    seen = []
    attention = model.hsvlt.label_stream.stages[2].layers[1].attention
    original = attention.forward
    attention.forward = lambda labels, pixels, *rest: (seen.append(pixels), original(labels, pixels, *rest))[1]
    with torch.no_grad():
        maps = model(random_images(), output_hidden_states=True).hidden_states
    for feature_map in maps:
        assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].data_ptr() == maps[2].data_ptr() and seen[0].is_contiguous()


def test_labels_are_not_copied_to_the_batch_before_they_meet_it():
    model = make_model()
    layer = model.hsvlt.label_stream.stages[0].layers[0]
    shapes = []
    layer.gate.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    with torch.no_grad():
        model(random_images(7))
    assert shapes == [(1, N, 8)]


@pytest.mark.parametrize("aggregation", ["concat", "topdown"])
@pytest.mark.parametrize("classifier", ["per_label", "shared"])
@pytest.mark.parametrize("label_update", ["gate", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_gradient_reaches_every_parameter(aggregation, classifier, label_update, normalize):
    model = make_model(
        aggregation=aggregation,
        classifier=classifier,
        label_update=label_update,
        normalize_visual_tokens=normalize,
        normalize_label_tokens=normalize,
        normalize_multimodal_states=normalize,
    ).train()
    model(random_images(), labels=targets()).loss.backward()
    # With an absorbed query the gradient of a key bias would be zero; there is none, so all must be above it.
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_topdown_aggregation_by_hand():
    model = make_model(aggregation="topdown")
    states = [torch.randn(2, N, width) for width in (8, 12, 16, 20)]
    x = states[3]
    for scale, finer in zip(model.hsvlt.aggregation.scales, (states[2], states[1], states[0]), strict=True):
        x = torch.cat((x, finer), -1)
        for linear, norm in ((scale[0], scale[1]), (scale[3], scale[4])):
            assert linear.bias is None
            x = F.relu(F.layer_norm(x @ linear.weight.T, (10,), norm.weight, norm.bias))
    torch.testing.assert_close(model.hsvlt.aggregation(tuple(states)), x)
    assert x.shape == (2, N, 10)  # half the width of the last stage


@pytest.mark.parametrize("heads", [1, 2])
def test_eager_equals_sdpa(heads):
    # Absorbed, the CPU has one implementation; projected, it has both.
    eager = make_model(num_attention_heads=heads, attn_implementation="eager", absorb_projections=False)
    sdpa = make_model(num_attention_heads=heads, attn_implementation="sdpa", absorb_projections=False)
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = eager(random_images()).logits
        torch.testing.assert_close(sdpa(random_images()).logits, expected, atol=1e-5, rtol=1e-5)
        sdpa.set_attn_implementation("eager")
        assert_close_outputs(sdpa(random_images()).logits, expected)
        sdpa.set_attn_implementation("sdpa")
        assert sdpa.config._attn_implementation == "sdpa"


# ---- the common tests of transformers' models


def test_missing_weights_are_initialised_not_garbage(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(initializer_range=0.02, aggregation="topdown", normalize_label_tokens=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if "backbone.embeddings" in key}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = HSVLTForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(again.hsvlt.label_embeddings.weight, model.hsvlt.label_embeddings.weight)  # by seed
    for name, parameter in again.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if "layer_scale" in name:
            assert (parameter == 0.5).all(), name
        elif "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif any(part in name for part in ("attention", "label_gate", "projection")) and name.endswith("weight"):
            assert 0.01 < parameter.std() < 0.03 and parameter.abs().max() < 0.1, name
        elif name.startswith("classifier"):
            assert 0 < parameter.abs().max() <= again.classifier.weight.shape[1] ** -0.5, name


def uniform_up_to(tensor, bound):
    return 0.8 * bound < tensor.abs().max() <= bound and abs(tensor.std() / bound - 3**-0.5) < 0.1


def test_norms_start_as_ones_whatever_the_layers_beside_them_start_as():
    config = HSVLTConfig.preset("nano", num_labels=9, candidate_labels=2, residual_attention=True)
    model = HSVLTForImageClassification(config)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert any(norm is model.candidate_scorer.norm for norm in norms)
    assert all(bool((norm.weight == 1).all()) and not norm.bias.any() for norm in norms)
    assert model.candidate_scorer.weight.std() < 0.03
    assert_close_outputs(
        model.candidate_scorer.bias.sigmoid() / (1 - model.candidate_scorer.bias.sigmoid()) * 9, torch.ones(9)
    )


@pytest.mark.parametrize("initializer_range", [0.02, None])
def test_initialisation_of_the_label_stream(initializer_range):
    """Gate, multi-modal layer and classifier as torch starts a linear layer, whatever the range of the others."""
    backbone = ConvNextConfig(hidden_sizes=[40, 48, 56, 64], depths=[1, 1, 1, 1])
    model = make_model(backbone_config=backbone, label_embedding_dim=64, initializer_range=initializer_range)
    for stage in model.hsvlt.label_stream.stages:
        layer = stage.layers[0]
        bound = layer.gate.in_features**-0.5
        for linear in (layer.gate, layer.multimodal):
            assert uniform_up_to(linear.weight, bound) and 0.5 * bound < linear.bias.abs().max() <= bound
        others = [stage.projection, *(linear for linear in layer.attention.children())]
        others += [] if layer.label_gate is None else layer.label_gate.children()
        for linear in others:
            if initializer_range is None:
                assert uniform_up_to(linear.weight, linear.in_features**-0.5)
                assert linear.bias is None or linear.bias.any()
            else:
                assert abs(linear.weight.std() / 0.02 - 1) < 0.1 and (linear.weight.abs() > 0.04).any()
                assert linear.bias is None or not linear.bias.any()
    assert uniform_up_to(model.classifier.weight, 208**-0.5) and model.classifier.bias.any()
    shared = make_model(classifier="shared", backbone_config=backbone, initializer_range=initializer_range).classifier
    assert uniform_up_to(shared.weight, 208**-0.5) and shared.bias.any()


def test_what_a_checkpoint_holds_is_kept_beside_what_it_lacks(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(initializer_range=0.02, residual_attention=True)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = [key for key in state if key.endswith(("query.weight", "gate.bias", "classifier.bias", "attention.weight"))]
    lost = [key for key in lost if "backbone" not in key]
    assert len(lost) == 5 + 5 + 1 + 1
    kept = {key: value for key, value in state.items() if key not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = HSVLTForImageClassification.from_pretrained(tmp_path).state_dict()
    assert {key for key, value in again.items() if not (value == 7).all()} == set(lost)


def test_training_lowers_the_loss_and_is_deterministic():
    losses = []
    for _ in range(2):
        model = make_model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        history = []
        for _ in range(20):
            loss = model(random_images(4), labels=targets(4)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        losses.append(history)
    assert_close_outputs(losses[0][:5], losses[1][:5])  # later ones grow apart by rounding alone
    assert losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    model = make_model().train(training)
    torch.compiler.reset()  # after some models it compiles no more
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(random_images(), labels=targets())
    output = compiled(random_images(), labels=targets())
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(compiled(random_images(5)).logits, model(random_images(5)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", ["from_pretrained", "autocast", "half"])
def test_a_label_stream_beyond_fp16_stays_finite(way, tmp_path):
    model = make_model()
    with torch.no_grad():
        for layer in (layer for stage in model.hsvlt.label_stream.stages for layer in stage.layers):
            layer.multimodal.bias.fill_(2e5)  # beyond the largest fp16, 65504
        expected = model(random_images()).logits
        if way == "from_pretrained":
            model.save_pretrained(tmp_path)
            output = HSVLTForImageClassification.from_pretrained(tmp_path, dtype=torch.float16)(random_images().half())
        elif way == "half":
            output = copy.deepcopy(model).half()(random_images().half())
        else:
            with torch.autocast("cpu", dtype=torch.float16):
                output = model(random_images())
    assert torch.isfinite(output.logits).all()
    torch.testing.assert_close(output.logits.float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_any_image_size():
    model = make_model()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 48, 80)).logits.shape == (1, N)


def test_set_label_embeddings():
    model = make_model()
    embeddings = torch.randn(N, 12)
    model.set_label_embeddings(embeddings, encoder="some-encoder", pooling="mean", template="a {}")
    assert torch.equal(model.hsvlt.label_embeddings.weight, embeddings)
    assert (model.config.label_text_encoder, model.config.label_pooling) == ("some-encoder", "mean")
    with pytest.raises(ValueError, match=r"shape \(5, 13\).*\(5, 12\)"):
        model.set_label_embeddings(torch.randn(N, 13))
    with pytest.raises(ValueError, match="not finite"):
        model.set_label_embeddings(torch.full((N, 12), float("nan")))


def test_other_labels_of_a_shared_classifier(tmp_path):
    model = make_model(classifier="shared", thresholds=[0.5] * N, label_text_encoder="an encoder")
    table = model.hsvlt.label_embeddings.weight
    with pytest.raises(ValueError, match=r"shape \(7, 12\).*needs \(5, 12\)"):  # names come first
        model.set_label_embeddings(torch.randn(7, 12))
    names = [f"name {i}" for i in range(7)]
    model.config.set_label_names(names)
    assert model.config.thresholds is None and model.config.label_text_encoder is None
    embeddings = torch.randn(7, 12)
    embeddings[3] = table[1]
    with torch.no_grad():
        before = model(random_images(), text_embeddings=table).logits
        model.set_label_embeddings(embeddings, encoder="another", pooling="official", template="{}")
        output = model(random_images(), labels=torch.ones(2, 7))
        assert_close_outputs(output.logits[:, 3], before[:, 1])
        assert_close_outputs(output.loss, F.softplus(-output.logits).mean())
    assert model.num_labels == model.config.num_labels == 7 and model.config.label_template == "{}"
    model.save_pretrained(tmp_path)
    again = HSVLTForImageClassification.from_pretrained(tmp_path)
    assert list(again.config.id2label.values()) == names and again.config.label_pooling == "official"
    with torch.no_grad():
        assert_close_outputs(again(random_images()).logits, output.logits)
    # As many labels as before: in place, so that whatever holds the table holds the new one.
    table = model.hsvlt.label_embeddings.weight
    model.set_label_embeddings(torch.zeros(7, 12))
    assert model.hsvlt.label_embeddings.weight is table and not table.any()
    assert model.config.label_text_encoder is model.config.label_pooling is model.config.label_template is None


def test_renamed_labels_of_a_model_lose_their_thresholds(tmp_path):
    names = [f"name {i}" for i in range(N)]
    model = make_model(thresholds=[0.5] * N, label_text_encoder="an encoder")
    model.save_pretrained(tmp_path)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    other = HSVLTForImageClassification.from_pretrained(tmp_path, **labels)
    assert other.config.thresholds is None and other.config.label_text_encoder is None
    same = HSVLTForImageClassification.from_pretrained(tmp_path)
    assert same.config.thresholds == [0.5] * N and same.config.label_text_encoder == "an encoder"


def test_random_label_embeddings_are_given_by_the_seed():
    first, second, third = (make_model(label_seed=seed).hsvlt.label_embeddings.weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"num_attention_heads \(3\) must divide the 8 channels"):
        make_model(num_attention_heads=3)


# ---- the tied label stream


def tied(**overrides):
    model = make_model(label_stream="tied", **overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        for norm in model.hsvlt.label_stream.norms:
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
    return model


def naive_tied_logits(model, pixel_values):
    """Place by place and label by label, from the equations; and the attention."""
    stream, depths = model.hsvlt.label_stream, model.hsvlt.backbone.interaction_depths
    ends = torch.tensor(depths).cumsum(0) - 1
    maps = [list(model.hsvlt.backbone(pixel_values))[end] for end in ends.tolist()]
    height, width = maps[-1].shape[-2:]
    rows = model.classifier.weight.clone()
    rows[:, -model.classifier.text_weight.shape[1] :] += model.classifier.text_weight
    logits, attention = torch.empty(len(pixel_values), N), torch.empty(len(pixel_values), N, height, width)
    for image in range(len(pixel_values)):
        places = []
        for y in range(height):
            for x in range(width):
                parts = []
                for norm, feature_map in zip(stream.norms, maps, strict=True):
                    side = feature_map.shape[-1] // width
                    cell = feature_map[image, :, y * side : (y + 1) * side, x * side : (x + 1) * side].flatten(1).T
                    centred = cell - cell.mean(1, keepdim=True)
                    normed = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt()
                    parts.append((normed * norm.weight + norm.bias).mean(0))
                places.append(torch.cat(parts))
        for label in range(N):
            scores = torch.stack([place @ rows[label] for place in places])
            weights = scores.exp() / scores.exp().sum()
            attention[image, label] = weights.view(height, width)
            logits[image, label] = (scores.mean() + (weights * scores).sum()) / 2 + model.classifier.bias[label]
    return logits, attention


@torch.no_grad()
@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_tied_logits_equal_the_equations(kind):
    model = tied() if kind == "convnext" else tied(backbone_config=backbone_config_of(kind))
    model.set_text_classifier(torch.randn(model.classifier.text_weight.shape))
    pixel_values = random_images(size=64)
    expected, attention = naive_tied_logits(model, pixel_values)
    output = model(pixel_values, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    assert len(output.attentions) == len(output.multimodal_states) == len(output.label_hidden_states) == 4
    for each in output.attentions:
        torch.testing.assert_close(each[:, 0], attention, rtol=1e-3, atol=1e-5)
    ids = torch.tensor([3, 0, 4])
    torch.testing.assert_close(model(pixel_values, class_ids=ids).logits, expected[:, ids], rtol=1e-4, atol=1e-4)
    model.config.label_chunk_size = 2
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tied_candidates_have_their_own_logits():
    model = tied(candidate_labels=2)
    output = model(random_images())
    expected = naive_tied_logits(model, random_images())[0]
    chosen = expected.gather(1, output.class_ids)
    torch.testing.assert_close(output.logits.gather(1, output.class_ids), chosen, rtol=1e-4, atol=1e-4)
    assert output.class_ids.shape == (2, 2) and (output.logits == NOT_EVALUATED).sum() == 2 * (N - 2)


def test_a_tied_stream_starts_as_a_linear_classifier_of_the_mean_pixel(tmp_path):
    fresh = make_model(label_stream="tied")
    output = fresh(random_images(), output_attentions=True)
    assert not output.logits.any() and not output.attentions[-1].sub(output.attentions[-1].mean()).abs().gt(1e-6).any()
    model = tied().train()
    model(random_images(size=64), labels=targets()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model.save_pretrained(tmp_path)
    loaded = HSVLTForImageClassification.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert_close_outputs(loaded(random_images()).logits, model.eval()(random_images()).logits)


def test_a_tied_stream_reads_no_texts():
    model = tied()
    with pytest.raises(ValueError, match="reads no label texts"):
        model(random_images(), text_embeddings=torch.randn(N, 12))
    with pytest.raises(ValueError, match="rows of a classifier"):
        model.hsvlt(random_images())
