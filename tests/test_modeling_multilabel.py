"""What transformers' tools and users expect of any model, of all of ours at once."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.initialization import no_init_weights

from modeling_hsvlt import MlTrBackbone, MlTrConfig, MlTrForImageClassification
from modeling_hsvlt.losses_multilabel import MULTILABEL_LOSSES

from .test_handlings import MLTR, MODELS, hsvlt, images, make
from .test_modeling_hp_dval import make_model as make_hp_dval
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
    return [
        (model, ["logits", *candidates], HSVLT_STATES, ["attentions"]),
        (model.hsvlt, ["last_hidden_state"], HSVLT_STATES, ["attentions"]),
    ]


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
    "mltr": lambda **fields: make_mltr(**fields).train(),
}


def make_mltr(**fields):
    return MlTrForImageClassification(MlTrConfig(**MLTR, num_labels=5, drop_path_rate=0.0, **fields))


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
    nn.init.normal_(model.candidate_scorer.linear.weight)
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
