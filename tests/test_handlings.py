"""Models as people handle them: whatever was done to a model, it gives what its plain layers give, or says why not.

Each row does something that libraries and users do to models; each column is a model. The reference is the same model
with every fast path shut, so that each layer is called as it stands. What a row does must show in the scores.
"""

import copy
import io
import sys
from functools import cache

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import ConvNextConfig, ConvNextV2Config, SwinConfig
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from modeling_hsvlt import (
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
    convnext_in_rows,
    modeling_hsvlt,
    modeling_mltr,
)
from modeling_hsvlt.label_contract import NOT_EVALUATED

from .tolerance import assert_close_outputs, close_outputs

WIDTHS = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1], "patch_size": 2}
CONVNEXT = ConvNextConfig(**WIDTHS, layer_scale_init_value=0.5, initializer_range=0.2)
SWIN = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, patch_size=2)
MLTR = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
MLTR |= {"window_size": 4, "initializer_range": None}


def hsvlt(backbone_config=CONVNEXT, **fields):
    fields = {"num_labels": 5, "label_embedding_dim": 12, "image_size": 32, "initializer_range": None, **fields}
    return HSVLTForImageClassification(HSVLTConfig(backbone_config=copy.deepcopy(backbone_config), **fields))


def with_every_option():
    model = hsvlt(
        ConvNextV2Config(**WIDTHS, initializer_range=0.2),
        num_attention_heads=2,
        label_update="none",
        aggregation="topdown",
        normalize_visual_tokens=True,
        normalize_label_tokens=True,
        normalize_multimodal_states=True,
        label_chunk_size=2,
        candidate_labels=4,
        residual_attention=True,
    )
    nn.init.normal_(model.residual_attention.weight)
    return model


def tied():
    model = hsvlt(label_stream="tied")
    nn.init.normal_(model.classifier.weight)
    return model


MODELS = {
    "hsvlt": hsvlt,
    "hsvlt_4_heads": lambda: hsvlt(num_attention_heads=4),
    "hsvlt_shared": lambda: hsvlt(classifier="shared", residual_attention=True, text_classes=3),
    "hsvlt_every_option": with_every_option,
    "hsvlt_tied": tied,
    "hsvlt_swin": lambda: hsvlt(SWIN),
    "hsvlt_mltr": lambda: hsvlt(MlTrConfig(**MLTR)),
    "mltr": lambda: MlTrForImageClassification(MlTrConfig(**MLTR, num_labels=5)),
    "cat": lambda: MlTrForImageClassification(
        MlTrConfig(**MLTR, num_labels=5, block_pattern=("pixel", "mlp", "cross", "mlp"), use_absolute_embeddings=True)
    ),
}


@cache
def built(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def make(name):
    model = copy.deepcopy(built(name))  # which takes a fraction of building one
    torch.manual_seed(0)
    return model


def images(batch=2, seed=1):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def scores(model, pixel_values):
    """Logits, with 0 for those that candidates left out, whose own number would hide all differences."""
    with torch.no_grad():
        logits = model(pixel_values=pixel_values).logits
        return logits.masked_fill(logits == NOT_EVALUATED, 0)


@cache
def untouched_scores(name):
    return scores(make(name), images())


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    monkeypatch.setattr(convnext_in_rows, "PIECE_NUMEL", 4 * 8 * 50)


@pytest.fixture
def plainly(monkeypatch):
    """Scores with every fast path shut."""

    def run(model, pixel_values):
        with monkeypatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith("modeling_hsvlt.") and hasattr(module, "is_plain"):
                    patch.setattr(module, "is_plain", lambda *modules: False)
            return scores(model, pixel_values)

    return run


def linears(model):
    return [module for module in model.modules() if type(module) is nn.Linear]


# ---- what is done to a model in place, or gives another one


def add_hooks_that_change(model):
    for module in model.modules():
        if type(module) in (nn.Linear, nn.LayerNorm, ConvNextLayer):
            module.register_forward_hook(lambda module, args, output: output * 1.5)


def add_hooks_that_change_inputs(model):
    for module in linears(model):
        module.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))


def replace_forward(model):
    for module in linears(model):
        module.forward = lambda x, module=module: 1.5 * nn.Linear.forward(module, x)


def parametrise(model):
    for module in linears(model):
        parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.data *= 1.5


def old_weight_norm(model):
    for module in linears(model):
        nn.utils.weight_norm(module)
        module.weight_g.data *= 1.5


def prune_layers(model):
    for module in linears(model):
        prune.l1_unstructured(module, "weight", amount=0.5)


def offload_to_cpu(model):
    cpu_offload(model, torch.device("cpu"))


def quantise(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


class HalvedTensor(torch.Tensor):
    """A weight that is more than its numbers, as quantised and distributed ones are: it stands for half of them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        aten = torch.ops.aten
        if function in (aten.t.default, aten.mm.default, aten.addmm.default, aten.linear.default):
            plain = [arg.inner / 2 if isinstance(arg, cls) else arg for arg in args]
            return function(*plain, **(kwargs or {}))
        raise NotImplementedError(f"{function} of a weight that only a linear layer can use")


def replace_weights(model):
    for module in linears(model):
        module.weight = nn.Parameter(HalvedTensor(module.weight.detach()), requires_grad=False)


def low_rank_adapters(model):
    torch.manual_seed(2)
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def cast_to_fp64(model):
    return model.double()


def swap_parameters(model):
    for module in linears(model):
        module.weight = nn.Parameter(module.weight.detach() * 1.5)


def write_through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def write_in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.copy_(parameter * 1.5)


def assign_a_state_dict(model):
    model.load_state_dict({key: value.clone() * 1.5 for key, value in model.state_dict().items()}, assign=True)


def step_a_fused_optimizer(model):
    model(pixel_values=images(), labels=torch.ones(2, 5)).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def copy_deeply(model):
    return copy.deepcopy(swap(model))


def pickle(model):
    buffer = io.BytesIO()
    torch.save(swap(model), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def swap(model):
    swap_parameters(model)
    return model


HANDLINGS = [
    add_hooks_that_change,
    add_hooks_that_change_inputs,
    replace_forward,
    parametrise,
    old_weight_norm,
    prune_layers,
    quantise,
    replace_weights,
    low_rank_adapters,
    swap_parameters,
    write_through_data,
    write_in_inference_mode,
    assign_a_state_dict,
    step_a_fused_optimizer,
    copy_deeply,
    pickle,
]


@pytest.mark.parametrize("name", MODELS)
def test_an_untouched_model_gives_what_the_plain_layers_give(name, plainly):
    assert_close_outputs(scores(make(name), images()), plainly(make(name), images()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("handling", HANDLINGS, ids=lambda handling: handling.__name__)
def test_gives_what_the_plain_layers_give(handling, name, plainly):
    if (name, handling) == ("hsvlt_swin", pickle):
        pytest.skip("a backbone of transformers that records its outputs by hooks cannot be pickled")
    before = untouched_scores(name)
    model = make(name)
    handled = handling(model) or model
    handled.eval()
    found = scores(handled, images())
    assert found.shape == (2, 5)
    assert_close_outputs(found, plainly(handled, images()))
    assert not close_outputs(found, before)
    with torch.inference_mode():
        assert_close_outputs(scores(handled, images()), found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", ["cpu", "disk", "two parts"])
def test_offloaded(name, place, tmp_path):
    model = make(name)
    expected = scores(model, images())
    if place == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif place == "disk":
        disk_offload(model, str(tmp_path), torch.device("cpu"), offload_buffers=True)
    else:  # as device_map="auto" does where one device is too small: half of it stays on disk
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        # Room for half, beside what the largest part would need to be brought in.
        device_map = infer_auto_device_map(
            model, {"cpu": int(0.75 * size), "disk": 10**9}, no_split_module_classes=model._no_split_modules
        )
        assert set(device_map.values()) == {"cpu", "disk"}
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), offload_buffers=True)
    assert_close_outputs(scores(model, images()), expected)


@pytest.mark.parametrize("name", MODELS)
def test_an_average_copied_in_and_out_between_two_evaluations(name):
    model = make(name)
    own = [parameter.detach().clone() for parameter in model.parameters()]
    before = scores(model, images())
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.5)
    averaged = scores(model, images())
    fresh = make(name)
    fresh.load_state_dict(model.state_dict())
    assert_close_outputs(averaged, scores(fresh, images()))
    assert not close_outputs(averaged, before)
    for parameter, value in zip(model.parameters(), own, strict=True):
        parameter.data.copy_(value)
    assert_close_outputs(scores(model, images()), before)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_that_is_called_in_training_is_called_with_a_hook_on_it(name):
    """A hook sees a module work, at inference as in training, where no fast path is taken."""
    model = make(name)
    called = set()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, path=path: called.add(path))
    scores(model, images())
    at_inference = set(called)
    called.clear()
    model.train()(pixel_values=images(), labels=torch.ones(2, 5)).loss.backward()
    assert called == at_inference
    # What is never called only holds others, or is another way's.
    missed = {path for path, module in model.named_modules() if path not in called and not list(module.children())}
    assert not {path for path in missed if next(model.get_submodule(path).parameters(), None) is not None}


def test_hooks_on_a_whole_encoder_or_stage():
    model, seen = make("hsvlt"), []
    before = scores(model, images())
    encoder = model.hsvlt.backbone.encoder
    encoder.register_forward_hook(lambda module, args, output: seen.append("encoder"))
    encoder.stages[1].register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    after = scores(model, images())
    assert seen == ["encoder"] and not close_outputs(after, before)


def test_global_hooks():
    model, called = make("hsvlt"), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: called.append(module))
    try:
        scores(model, images())
    finally:
        handle.remove()
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    assert layers and all(any(module is layer for module in called) for layer in layers)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        logits = self.model(pixel_values=pixel_values).logits
        return logits.masked_fill(logits == NOT_EVALUATED, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_traced(name):
    model = make(name)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(model).eval(), images(), check_trace=False)
    assert_close_outputs(traced(images(seed=2)), scores(model, images(seed=2)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_exported_to_onnx_by_the_legacy_exporter(name, tmp_path):  # the other one: tests/training/publish
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make(name)

    file = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits(model).eval(), (images(),), str(file), dynamo=False, input_names=["pixel_values"], opset_version=17
    )
    session = onnxruntime.InferenceSession(str(file))
    found = session.run(None, {"pixel_values": images(seed=2).numpy()})[0]
    assert_close_outputs(found, scores(model, images(seed=2)), steps=2048)


@pytest.mark.parametrize("name", ["hsvlt", "hsvlt_every_option", "hsvlt_swin", "cat"])
def test_compiled_as_one_graph(name):
    model = make(name)
    torch.compiler.reset()  # after some models it compiles no more
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close_outputs(scores(compiled, images()), scores(model, images()), steps=1024)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_in_other_dtypes(name, dtype, tmp_path):
    model = make(name)
    expected = scores(model, images())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    cast = make(name).to(dtype)
    kinds = {key: value.dtype for key, value in loaded.state_dict().items()}
    assert kinds == {key: value.dtype for key, value in cast.state_dict().items()}
    if dtype == torch.float16:
        assert kinds == {key: value.dtype for key, value in make(name).half().state_dict().items()}
    for each in (loaded, cast):
        found = scores(each, images().to(dtype))
        assert found.isfinite().all()
        if "every_option" not in name:  # whose candidates may be others
            as_fine = torch.float32 if dtype == torch.float64 else dtype  # expected was computed in fp32
            assert_close_outputs(found.to(as_fine), expected.to(as_fine), steps=64)
        each.train()(pixel_values=images().to(dtype), labels=torch.ones(2, 5)).loss.backward()
        assert all(p.grad.isfinite().all() for p in each.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_functional_call(name):
    model = make(name)
    weights = {key: value * 1.5 for key, value in model.state_dict().items() if value.is_floating_point()}
    with torch.no_grad():
        found = torch.func.functional_call(Logits(model), {f"model.{k}": v for k, v in weights.items()}, images())
    model.load_state_dict(weights, strict=False)
    assert_close_outputs(found, scores(model, images()))


@pytest.mark.parametrize("name", ["hsvlt", "hsvlt_shared", "cat"])
def test_mapped_over_weights(name):
    """An ensemble in one call, as `torch.func` does it."""
    model = make(name)
    names = [key for key, value in model.named_parameters()]
    state = {key: torch.stack([value.detach(), value.detach() * 1.2]) for key, value in model.named_parameters()}

    pixel_values = images()

    def run(weights):
        return torch.func.functional_call(model, weights, kwargs={"pixel_values": pixel_values}).logits

    with torch.no_grad():
        found = torch.func.vmap(run)(state)
        for index in range(2):
            assert_close_outputs(found[index], run({key: state[key][index] for key in names}))


@pytest.mark.parametrize("name", ["hsvlt", "mltr"])
def test_the_fast_paths_are_taken_where_nothing_was_done(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the plain way was taken")

    monkeypatch.setattr(modeling_hsvlt.HSVLTAttention, "_projected", refuse)
    monkeypatch.setattr(modeling_mltr.MlTrCrossWindowAttention, "_projected", refuse)
    monkeypatch.setattr(ConvNextLayer, "forward", refuse)
    scores(make(name), torch.randn(1, 3, 64, 64))  # at 32 px the last map has fewer pixels than there are labels
