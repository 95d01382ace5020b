"""What transformers' tools and users expect of any model, of all of ours at once."""

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification
from transformers.initialization import no_init_weights

from modeling_hsvlt import MlTrBackbone, MlTrConfig, MlTrForImageClassification, asymmetric_loss
from modeling_hsvlt.losses_multilabel import MULTILABEL_LOSSES

from .test_handlings import MLTR, MODELS, hsvlt, images, make
from .test_modeling_hp_dval import make_model as make_hp_dval
from .test_modeling_hp_dval import random_images
from .test_modeling_hsvlt import make_model as make_hsvlt
from .test_modeling_mltr import CAT_BLOCK
from .test_modeling_mltr import make_model as make_mltr
from .tolerance import assert_close_outputs, close_outputs

ASKED = {"output_hidden_states": True, "output_attentions": True}
HSVLT_STATES = ["hidden_states", "label_hidden_states", "multimodal_states"]
MLTR_STATES = ["hidden_states", "reshaped_hidden_states"]
MLTR_ATTENTIONS = ["attentions", "cross_attentions"]


def backbone():
    torch.manual_seed(0)
    return MlTrBackbone(MlTrConfig(**MLTR, out_features=["stage1", "stage4"])).eval()


def parts(name):
    """(model, what it always gives, states, attentions) of a classifier and of its base, or of MlTrBackbone."""
    if name == "backbone":
        return [(backbone(), ["feature_maps"], ["hidden_states"], ["attentions"])]
    model = make(name)
    if model.config.model_type == "mltr":
        return [
            (model, ["logits"], MLTR_STATES, MLTR_ATTENTIONS),
            (model.mltr, ["last_hidden_state", "pooler_output"], MLTR_STATES, MLTR_ATTENTIONS),
        ]
    candidates = ["class_ids"] if model.config.candidate_labels else []
    found = [(model, ["logits", *candidates], HSVLT_STATES, ["attentions"])]
    if model.config.label_stream != "tied":  # which is the rows of the classifier, and nothing without them
        found.append((model.hsvlt, ["last_hidden_state"], HSVLT_STATES, ["attentions"]))
    return found


# ---- outputs


@pytest.mark.parametrize("name", [*MODELS, "backbone"])
@torch.no_grad()
def test_outputs_are_in_declared_order_and_hold_what_was_asked_for(name):
    for model, always, states, attentions in parts(name):
        output = model(images(), **ASKED)
        assert list(output) == [*always, *states, *attentions]
        assert output[0] is output[always[0]] and (name == "backbone" or isinstance(output[0], torch.Tensor))
        assert all(len(output[key]) >= 4 for key in (*states, *attentions))
        assert list(model(images())) == always
        assert list(model(images(), output_hidden_states=True)) == [*always, *states]
        assert list(model(images(), output_attentions=True)) == [*always, *attentions]
        as_tuple = model(images(), return_dict=False, **ASKED)
        assert type(as_tuple) is tuple
        assert_close_outputs(as_tuple, output.to_tuple())
        if always[0] == "logits":
            labels = torch.ones(2, 5)
            output = model(images(), labels=labels, **ASKED)
            assert list(output) == ["loss", *always, *states, *attentions] and output[0].ndim == 0
            assert_close_outputs(model(images(), labels=labels, return_dict=False)[0], output.loss)


@pytest.mark.parametrize("name", [*MODELS, "backbone"])
@torch.no_grad()
def test_what_the_configuration_asks_for(name):
    for index, (_, always, states, attentions) in enumerate(parts(name)):
        model = parts(name)[index][0]  # with a configuration of its own
        model.set_attn_implementation("eager")  # transformers refuses output_attentions beside another
        model.config.output_hidden_states = True
        assert list(model(images())) == [*always, *states]
        assert list(model(images(), output_hidden_states=False)) == always
        model.config.output_attentions = True
        assert list(model(images())) == [*always, *states, *attentions]
        assert list(model(images(), output_attentions=False)) == [*always, *states]
        model.config.return_dict = False
        found = model(images())
        assert type(found) is tuple and len(found) == len([*always, *states, *attentions])
        assert list(model(images(), return_dict=True)) == [*always, *states, *attentions]


@pytest.mark.parametrize("name", [*MODELS, "backbone"])
@torch.no_grad()
def test_chosen_states(name):
    for model, always, states, _ in parts(name):
        every = model(images(), output_hidden_states=True)
        count = len(every.hidden_states)
        for asked, kept in (([0, 2], {0, 2}), (-1, {count - 1}), (0, {0}), ((1, -2), {1, count - 2}), ([9, -9], set())):
            chosen = model(images(), output_hidden_states=asked)
            assert list(chosen) == [*always, *states]
            for key in states:
                assert {i for i, state in enumerate(chosen[key]) if state is not None} == kept
                assert_close_outputs([chosen[key][i] for i in kept], [every[key][i] for i in kept])
            assert_close_outputs(chosen[0], every[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_can_be_read_at_what_is_returned(name, training):
    for model, _, states, attentions in parts(name):
        output = model.train(training)(images(), **ASKED)
        kept = {(key, i): x for key in (*states, *attentions) for i, x in enumerate(output[key])}
        # The maps are another view of the hidden states; label tokens have no reader after the last interaction.
        beside = {("label_hidden_states", 3), *(("reshaped_hidden_states", i) for i in range(5))}
        if getattr(model.config, "label_stream", "") == "tied":  # a tied one shows its classifier's rows in parts
            beside |= {("label_hidden_states", i) for i in range(4)}
        for tensor in kept.values():
            tensor.retain_grad()
        output[0].square().sum().backward()
        assert {key for key, x in kept.items() if x.grad is None} == beside & kept.keys()
        assert all(kept[key].grad.any() for key in kept.keys() - beside)


@pytest.mark.parametrize("name", [*MODELS, "backbone"])
def test_arguments_that_no_model_knows(name, caplog):
    logger = logging.getLogger("transformers")
    logger.propagate = True
    try:
        for model, *_ in parts(name):
            caplog.clear()
            unknown = f"cats_of_{name}_{type(model).__name__}"  # a warning is given once in a process
            with torch.no_grad():
                for _ in range(2):
                    found = model(images(), is_causal=False, num_items_in_batch=None, **{unknown: True})[0]
                assert_close_outputs(found, model(images())[0])
            told = [record.message for record in caplog.records if unknown in record.message]
            assert told == [f"{type(model).__name__} makes no use of {unknown}."]
            assert not [record.message for record in caplog.records if "is_causal" in record.message]
    finally:
        logger.propagate = False


@pytest.mark.parametrize("name", [*MODELS, "backbone", "hp_dval"])
def test_no_images(name):
    for model, *_ in parts(name) if name != "hp_dval" else [(make_hp_dval(),)]:
        with pytest.raises(ValueError, match=r"holds no image.*leave the batch out"):
            model(images(0))
        with pytest.raises(ValueError, match="pixel_values is missing"):
            model()


# ---- loading and saving


@pytest.mark.parametrize("name", [*MODELS, "backbone"])
def test_buffers_are_right_without_initialisation(name):
    """As DeepSpeed builds a model, and on the meta device, as loading does."""
    expected = backbone() if name == "backbone" else make(name)
    buffers = dict(expected.named_buffers())
    assert buffers
    with no_init_weights():
        model = type(expected)(expected.config)
    for key, buffer in buffers.items():
        assert torch.equal(model.get_buffer(key), buffer), key
    with torch.device("meta"):
        model = type(expected)(expected.config)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(images().to("meta"))[0] is not None


@pytest.mark.parametrize("name", MODELS)
def test_saving_by_position_and_beside_the_main_process(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "main", True)
    other = {key: value + 1 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "weights", True, dict(other))
    for folder, weights in (("main", model.state_dict()), ("weights", other)):
        loaded = type(model).from_pretrained(tmp_path / folder).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    model.save_pretrained(tmp_path / "beside", False)
    model.save_pretrained(tmp_path / "beside", is_main_process=False)
    assert not list((tmp_path / "beside").rglob("*"))


WAYS_TO_FP16 = {
    "half": lambda model: model.half(),
    "to": lambda model: model.to(torch.float16),
    "to a device": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.float16),
    "in a container": lambda model: nn.Sequential(nn.Sequential(model)).half()[0][0],
}


@pytest.mark.parametrize("name", [*MODELS, "hp_dval"])
def test_every_way_to_fp16_keeps_the_same_parts_in_fp32(name, tmp_path):
    build = make_hp_dval if name == "hp_dval" else lambda: make(name)
    build().save_pretrained(tmp_path)
    loaded = type(build()).from_pretrained(tmp_path, dtype=torch.float16)
    kinds = {key: tensor.dtype for key, tensor in loaded.state_dict().items()}
    assert torch.float16 in kinds.values()
    assert ("hsvlt" in name) == (torch.float32 in kinds.values())
    for way, cast in WAYS_TO_FP16.items():
        model = build()
        labels = torch.ones(2, model.num_labels)
        model.train()(images(), labels=labels).loss.backward()
        indices = {key: x.clone() for key, x in model.named_buffers() if not x.is_floating_point()}
        model = cast(model)
        assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == kinds, way
        # A gradient has the dtype of its weight, and an index stays one.
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters()), way
        assert all(torch.equal(model.get_buffer(key), x) and x.dtype == torch.int64 for key, x in indices.items()), way
        with torch.no_grad():
            assert model.eval()(images().half()).logits.isfinite().all(), way
    # What was cast down comes back up.
    assert {x.dtype for x in model.float().state_dict().values() if x.is_floating_point()} == {torch.float32}


# ---- every known label counts once, wherever it is

LOSSES = sorted(MULTILABEL_LOSSES.keys() - {"two_way"})  # which compares the images of a batch
LOSS_KWARGS = {"distribution_balanced": {"class_counts": [5, 1, 9, 3, 0], "num_samples": 20}}
TRAINED = {
    "hsvlt": lambda **fields: hsvlt(residual_attention=True, candidate_labels=2, **fields).train(),
    "mltr": lambda **fields: MlTrForImageClassification(MlTrConfig(**MLTR, num_labels=5, drop_path_rate=0.0, **fields)),
}


def trained(name, loss_type):
    torch.manual_seed(0)
    model = TRAINED[name](loss_type=loss_type, loss_kwargs=LOSS_KWARGS.get(loss_type))
    if name == "hsvlt":
        nn.init.normal_(model.residual_attention.weight)
    return model


def partly_known(batch=6):
    """Labels of which as few as none of an image are known, one of them soft."""
    generator = torch.Generator().manual_seed(4)
    labels = (torch.rand(batch, 5, generator=generator) > 0.5).float()
    labels[torch.rand(batch, 5, generator=generator) > 0.4] = -100
    labels[0], labels[1] = torch.tensor([1.0, 0, 0, 1, 0.3]), -100
    return labels


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("name", TRAINED)
def test_the_parts_of_any_split_add_up(name, loss_type):
    model, labels = trained(name, loss_type), partly_known()
    known = (labels != -100).sum()

    def step(sizes, items):
        """(loss, gradients) of a step in batches of these sizes."""
        model.zero_grad()
        total = 0
        for pixels, part in zip(images(6).split(sizes), labels.split(sizes), strict=True):
            loss = model(pixels, labels=part, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = step([6], known)
    # Each image alone: the mean over its labels, as often as it has known ones.
    alone = [model(images(6)[i : i + 1], labels=labels[i : i + 1]).loss.item() for i in range(6)]
    counts = (labels != -100).sum(1).tolist()
    assert whole[0] == pytest.approx(sum(x * n for x, n in zip(alone, counts, strict=True)) / known.item(), rel=1e-4)
    # 1 to 6: a batch of the second image, of which nothing is known, is a part as well.
    for sizes, items in (([3, 3], known), ([1, 1, 4], known.item()), ([1] * 6, known.view(1))):
        loss, gradients = step(sizes, items)
        assert loss == pytest.approx(whole[0], rel=1e-4)
        assert_close_outputs(gradients, whole[1], steps=1024)  # added up in another order
    if loss_type in ("bce", "focal", "asl", "distribution_balanced"):  # of entries: all known at once, the mean
        assert whole[0] == pytest.approx(model(images(6), labels=labels).loss.item(), rel=1e-4)
    doubled = step([6], 2 * known)[0]
    assert doubled == pytest.approx(whole[0] / 2, rel=1e-4)


@pytest.mark.parametrize("loss_type", sorted(MULTILABEL_LOSSES))
@pytest.mark.parametrize("name", TRAINED)
def test_no_known_label_gives_no_loss(name, loss_type):
    model = trained(name, loss_type)
    for items in (None, 0, 7, torch.tensor(0), torch.tensor([7])):
        model.zero_grad()
        loss = model(images(), labels=torch.full((2, 5), -100), num_items_in_batch=items).loss
        assert loss.item() == 0 and loss.dtype == torch.float32
        loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)  # nor NaN, which is something


# ---- labels of the candidates


@torch.no_grad()
def test_what_candidates_give_can_be_told_apart():
    """Each row of an image's states is that of the label `class_ids` names, as a model without candidates gives it."""
    torch.manual_seed(0)
    model = hsvlt(candidate_labels=3, num_attention_heads=2).eval()
    pixels = images(4, seed=5)
    scorer = model.candidate_scorer
    nn.init.normal_(scorer.weight)
    with torch.no_grad():  # so that images differ in their candidates
        scorer.bias.sub_(scorer(list(model.hsvlt.backbone(pixels)), model.hsvlt.label_embeddings()).mean(0))
    found = model(pixels, labels=partly_known(4).tolist(), **ASKED)
    ids = found.class_ids
    assert ids.shape == (4, 3) and (ids.diff() > 0).all() and len(ids.unique(dim=0)) > 1
    model.config.candidate_labels = 5
    every = model(pixels, **ASKED)
    assert every.class_ids is None
    for image in range(4):
        for row, label in enumerate(ids[image].tolist()):
            assert_close_outputs(found.logits[image, label], every.logits[image, label])
            for stage in range(4):
                for key in ("label_hidden_states", "multimodal_states"):
                    ours, expected = found[key][stage][image, row], every[key][stage][image, label]
                    assert_close_outputs(ours, expected)
                ours, expected = found.attentions[stage][image, :, row], every.attentions[stage][image, :, label]
                assert_close_outputs(ours, expected)
    assert not close_outputs(every.multimodal_states[3][:, 0], every.multimodal_states[3][:, 1])
    known = partly_known(4).gather(1, ids)
    chosen = every.logits.gather(1, ids)[known != -100]
    assert_close_outputs(found.loss, F.binary_cross_entropy_with_logits(chosen, known[known != -100]))


# ---- labels and loss

FAMILIES = {"hsvlt": make_hsvlt, "mltr": make_mltr, "hp_dval": make_hp_dval}
of_every_family = pytest.mark.parametrize("family", FAMILIES)


def targets(model, batch=2):
    return (torch.rand(batch, model.num_labels, generator=torch.Generator().manual_seed(2)) > 0.5).float()


@of_every_family
def test_loss_is_that_of_the_returned_logits(family):
    model = FAMILIES[family]()
    labels = targets(model)
    for dtype in (torch.int64, torch.float32, torch.bool, torch.float64):
        output = model(random_images(), labels=labels.to(dtype))
        assert output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, labels))


@of_every_family
def test_loss_type_comes_from_the_config(family):
    kwargs = {"gamma_neg": 2.0, "clip": 0.1, "reduction": "sum"}
    model = FAMILIES[family](loss_type="asl", loss_kwargs=kwargs)
    output = model(random_images(), labels=targets(model))
    torch.testing.assert_close(output.loss, asymmetric_loss(output.logits, targets(model), **kwargs))


@of_every_family
def test_unknown_labels_have_exactly_no_gradient(family):
    model = FAMILIES[family]()
    labels = targets(model)
    labels[:, 1] = labels[0, 2] = -100
    output = model(random_images(), labels=labels)
    output.logits.retain_grad()
    output.loss.backward()
    assert torch.equal(output.logits.grad == 0, labels == -100)
    assert family == "hp_dval" or not model.classifier.weight.grad[1].any()
    all_unknown = model(random_images(), labels=torch.full_like(labels, -100))
    assert all_unknown.loss.item() == 0
    all_unknown.loss.backward()


@of_every_family
def test_labels_outside_the_contract_are_named(family):
    model = FAMILIES[family]()
    for row, column, value in ((1, 2, 2.0), (0, 0, -1.0), (1, 0, float("nan")), (0, 2, float("inf"))):
        labels = targets(model)
        labels[row, column] = value
        with pytest.raises(ValueError, match=rf"labels\[{row}, {column}\].*neither in \[0, 1\] nor -100"):
            model(random_images(), labels=labels)
    with pytest.raises(ValueError, match=rf"shape \(batch, {model.num_labels}\)"):
        model(random_images(), labels=torch.ones(2, model.num_labels - 1))
    with pytest.raises(ValueError, match="multi-hot"):
        model(random_images(), labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(labels=targets(model))


@of_every_family
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(family):
    model = FAMILIES[family]()
    alone = torch.cat([model(image[None]).logits for image in random_images(4)])
    torch.testing.assert_close(model(random_images(4)).logits, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ["hsvlt", "mltr"])
def test_gradient_checkpointing_changes_no_gradient(family, use_reentrant):
    plain, checkpointed = (FAMILIES[family]().train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    part = {
        "hsvlt": "hsvlt.label_stream.stages.2.layers.0.gate",
        "mltr": "mltr.encoder.stages.2.layers.1.sublayers.0.norm",
    }[family]
    calls = []
    checkpointed.get_submodule(part).register_forward_hook(lambda *args: calls.append(1))
    for model in (plain, checkpointed):
        model(random_images(), labels=targets(model)).loss.backward()
    assert len(calls) == 2  # once forward, once more in backward
    for (name, p), (_, q) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5, msg=name)


# ---- checkpoints


def without_dtypes(fields):
    """A config.json without what is null before the first load."""
    fields = {key: value for key, value in fields.items() if key != "dtype"}
    return {key: without_dtypes(value) if isinstance(value, dict) else value for key, value in fields.items()}


@of_every_family
@torch.no_grad()
def test_save_load_save_is_identical(family, tmp_path):
    fields = {"block_pattern": CAT_BLOCK, "use_absolute_embeddings": True} if family == "mltr" else {}
    model = FAMILIES[family](**fields)
    model.config.thresholds = [0.1 * (label + 1) for label in range(model.num_labels)]
    model.save_pretrained(tmp_path / "a")
    again = AutoModel.from_pretrained(tmp_path / "a")
    assert type(again) is type(model)  # AutoModel gives the classifier
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "a")) is type(model)
    again.save_pretrained(tmp_path / "b")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    code = [f"modeling_{family}.py", f"configuration_{family}.py", "pipeline_multilabel.py", "processing_multilabel.py"]
    assert names >= {*code, "label_contract.py", "losses_multilabel.py"}
    for name in names:
        first, second = (tmp_path / folder / name for folder in "ab")
        if name == "config.json":
            first, second = (without_dtypes(json.loads(path.read_text())) for path in (first, second))
            assert first == second
        elif name == "model.safetensors" and family == "hp_dval":  # text embeddings are computed as it is saved
            assert_close_outputs(load_file(first), load_file(second))
        else:
            assert first.read_bytes() == second.read_bytes(), name
    assert_close_outputs(again(random_images()).logits, model(random_images()).logits)
    assert again.config.thresholds == model.config.thresholds


@of_every_family
@torch.no_grad()
def test_the_base_model_loads_from_the_classifier_and_back(family, tmp_path):
    model = FAMILIES[family]()
    expected = model.base_model(random_images())[0]
    model.save_pretrained(tmp_path / "classifier")
    base = type(model.base_model).from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(base(random_images())[0], expected)
    base.save_pretrained(tmp_path / "base")
    again, info = type(model).from_pretrained(tmp_path / "base", output_loading_info=True)
    own = {key for key in model.state_dict() if not key.startswith(f"{model.base_model_prefix}.")}
    assert set(info["missing_keys"]) == own
    torch.testing.assert_close(again.base_model(random_images())[0], expected)


@of_every_family
@torch.no_grad()
def test_meta_device_then_load(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(p.is_meta for p in empty.parameters())
    pytest.importorskip("accelerate")
    again = type(model).from_pretrained(tmp_path, device_map="cpu")
    assert_close_outputs(again(random_images()).logits, model(random_images()).logits)


@of_every_family
@torch.no_grad()
def test_another_number_of_labels(family, tmp_path):
    model = FAMILIES[family]()
    model.config.thresholds = [0.5] * model.num_labels
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, num_labels=9)
    other = type(model).from_pretrained(tmp_path, num_labels=9, ignore_mismatched_sizes=True)
    assert other.config.thresholds is None and other.num_labels == 9
    assert family != "hsvlt" or other.hsvlt.label_embeddings.weight.shape == (9, 12)
    logits = other(random_images()).logits
    assert logits.shape == (2, 9) and torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["hsvlt", "mltr"])
def test_sixteen_bit_stays_finite_and_close(family, dtype, tmp_path):
    model = FAMILIES[family](**({"use_absolute_embeddings": True} if family == "mltr" else {}))
    tolerance = 0.03 if family == "hsvlt" else {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    close = {"atol": tolerance, "rtol": tolerance}
    with torch.no_grad():
        expected = model(random_images()).logits
        model.save_pretrained(tmp_path)
        half = type(model).from_pretrained(tmp_path, dtype=dtype)
        images = random_images().to(dtype)
        if family == "hsvlt":
            assert half.hsvlt.backbone.embeddings.patch_embeddings.weight.dtype == dtype
        else:
            assert {p.dtype for p in half.parameters()} == {dtype}
            torch.testing.assert_close(half(random_images()).logits.float(), expected, **close)  # images stay fp32
            assert half(torch.randn(1, 3, 50, 41)).logits.isfinite().all()
        torch.testing.assert_close(half(images).logits.float(), expected, **close)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(model(random_images()).logits.float(), expected, **close)
    loss = half(images, labels=targets(half)).loss
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())
