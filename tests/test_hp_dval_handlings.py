"""HP-DVAL under the stack's ordinary tools: each gives the plain result, or says in one sentence why not.

Two tables. The first changes the text tower in every way a weight can change: kept text embeddings may never be old.
The second handles the model in every way a stock model is handled.
"""

import copy
import io
import itertools

import onnxruntime
import pytest
import torch
import torch.nn.utils.prune
from accelerate import cpu_offload, disk_offload, dispatch_model, infer_auto_device_map
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import ViTConfig, ViTModel

from modeling_hsvlt import HPDVALForImageClassification
from modeling_hsvlt.hp_dval_prompts import choose_prompts, encode_in_parts

from .test_modeling_hp_dval import CLIP, NAMES, TOKENIZER, make_model, random_images, targets
from .tolerance import assert_close_outputs, close_outputs

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def with_contexts(model):
    """Contexts as phase 2 leaves them."""
    table, ids = model.hp_dval.get_input_embeddings().weight, model.config.context_token_ids
    with torch.no_grad():
        table[ids] = torch.randn(len(ids), table.shape[1], generator=torch.Generator().manual_seed(0))
    return model


def vit_student():
    torch.manual_seed(3)
    vit = ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8))
    return HPDVALForImageClassification.from_clip(CLIP, TOKENIZER, NAMES, student=vit, local_top_k=4).eval()


def inference_only():
    model = with_contexts(make_model())
    model.drop_teacher()
    model.drop_text_model()
    return model


def in_phase_2():
    model = make_model()
    model.set_phase("phase2")
    return model


MODELS = {
    "clip": lambda: with_contexts(make_model()),
    "vit": vit_student,
    "phase2": in_phase_2,
    "inference only": inference_only,
}


@torch.no_grad()
def plain_logits(model, pixels):
    """The text tower's own embeddings, nothing kept."""
    base = model.hp_dval
    text = encode_in_parts(base.text, choose_prompts(base.prompts.prompt_ids, base.context_rows()))
    image, patches, *_ = base.student(pixels)
    return model.scores(image, patches, text)


# ---- the text tower changes


def layer(model):
    return model.hp_dval.text.text_model.encoder.layers[0].mlp.fc1


class Int8Weight(torch.Tensor):
    """A weight kept as eight bits, as torchao's and others' weight-only quantisation keeps it."""

    @staticmethod
    def __new__(cls, levels, scale):
        return torch.Tensor._make_wrapper_subclass(cls, levels.shape, dtype=scale.dtype)

    def __init__(self, levels, scale):
        self.levels, self.scale = levels, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].levels, args[0].scale)
        args = torch.utils._pytree.tree_map(lambda a: a.levels * a.scale if isinstance(a, cls) else a, args)
        return function(*args, **kwargs or {})


def int8(model):
    weight = layer(model).weight.detach()
    scale = weight.abs().max() / 8
    layer(model).weight = nn.Parameter(Int8Weight((weight / scale).round().to(torch.int8), scale), requires_grad=False)


@torch.inference_mode()
def copy_in_inference_mode(model):
    layer(model).weight.copy_(layer(model).weight * 1.5)


def assign(model):
    model.load_state_dict(
        {k: v * 1.5 if ".text.text_model.encoder.layers.0.mlp.fc1." in k else v for k, v in model.state_dict().items()},
        assign=True,
    )


def average(model):
    """Copied in, looked at and copied out, as an exponential moving average is, and changed once more."""
    own = [weight.detach().clone() for weight in model.parameters()]
    for weight in model.parameters():
        weight.data.copy_(1.1 * weight.data)
    assert not close_outputs(model(random_images()).logits, model.kept)
    for weight, value in zip(model.parameters(), own, strict=True):
        weight.data.copy_(value)
    torch.testing.assert_close(model(random_images()).logits, model.kept)
    layer(model).weight.data.mul_(1.5)


def words(model):
    model.hp_dval.prompts.prompt_ids[:, 0] = model.hp_dval.prompts.prompt_ids[:, 1].clone()


TEXT_CHANGES = {
    "data": lambda model: layer(model).weight.data.mul_(1.5),
    "one number": lambda model: layer(model).bias.data[:1].add_(1.0),
    "rows that change places": lambda model: layer(model).weight.data.copy_(layer(model).weight.flip(0)),
    "copy in inference mode": copy_in_inference_mode,
    "assign": assign,
    "another parameter": lambda model: setattr(layer(model), "weight", nn.Parameter(1.5 * layer(model).weight)),
    "another module": lambda model: setattr(model.hp_dval.text.text_model, "final_layer_norm", nn.Identity()),
    "a setting": lambda model: setattr(model.hp_dval.text.text_model.encoder.layers[0].layer_norm2, "eps", 1e3),
    "an average in and out": average,
    "a forward hook": lambda model: layer(model).register_forward_hook(lambda module, args, output: 1.5 * output),
    "a forward pre-hook": lambda model: layer(model).register_forward_pre_hook(lambda module, args: (1.5 * args[0],)),
    "a replaced forward": lambda model: setattr(layer(model), "forward", lambda x: torch.cat((x, x), -1)),
    "a parametrisation": lambda model: torch.nn.utils.parametrizations.orthogonal(layer(model)),
    "pruning": lambda model: torch.nn.utils.prune.l1_unstructured(layer(model), "weight", 0.5),
    "int8 weights": int8,
    "dynamic quantisation": lambda model: torch.ao.quantization.quantize_dynamic(
        model.hp_dval.text, {nn.Linear}, inplace=True
    ),
    "context rows": lambda model: with_contexts(model),
    "the token table": lambda model: model.hp_dval.get_input_embeddings().weight.data.mul_(1.5),
    "prompts": words,
}  # fmt: skip


@pytest.mark.parametrize("change", TEXT_CHANGES)
@torch.no_grad()
def test_no_change_of_the_text_tower_leaves_old_embeddings(change, tmp_path):
    model = make_model()
    model.kept = model(random_images()).logits
    assert_close_outputs(model(random_images()).logits, model.kept)
    TEXT_CHANGES[change](model)
    logits = model(random_images()).logits
    assert not torch.allclose(logits, model.kept, atol=1e-5)
    torch.testing.assert_close(logits, plain_logits(model, random_images()))
    # Nor what is left when the text tower goes.
    model.drop_text_model()
    torch.testing.assert_close(model(random_images()).logits, logits)


def test_a_global_hook_is_seen():
    model = make_model()
    before = model(random_images()).logits
    seen = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module) and None)
    try:
        model(random_images())
    finally:
        handle.remove()
    assert layer(model) in seen
    torch.testing.assert_close(model(random_images()).logits, before)


def test_hand_written_embeddings_follow_the_text_tower_in_phase_2():
    model = make_model()
    model.set_phase("phase2")
    model.train()
    model(random_images(), labels=targets())
    layer(model).weight.data.mul_(1.5)
    output = model(random_images(), labels=targets())
    assert output.semantic_consistency_loss < 1e-6  # contexts are still the template's words
    assert output.semantic_consistency_loss.requires_grad


def test_the_caller_may_write_into_what_it_gets():
    model = make_model()
    with torch.no_grad():
        before = model(random_images()).logits
        model.hp_dval(random_images()).text_embeds.zero_()
        assert_close_outputs(model(random_images()).logits, before)


# ---- the model is handled


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


def onnx_logits(model, pixels, folder, **how):
    path = folder / "model.onnx"
    torch.onnx.export(Logits(model), (random_images(2, seed=7),), path, input_names=["p"], verbose=False, **how)
    (logits,) = onnxruntime.InferenceSession(path).run(None, {"p": pixels.numpy()})
    return torch.from_numpy(logits)


def legacy_onnx(model, pixels, folder):
    return onnx_logits(model, pixels, folder, dynamo=False, dynamic_axes={"p": {0: "batch"}})


def dynamo_onnx(model, pixels, folder):
    batch = torch.export.Dim("batch", min=1, max=8)
    return onnx_logits(model, pixels, folder, dynamo=True, dynamic_shapes={"pixel_values": {0: batch}})


def jit_trace(model, pixels, folder):
    return torch.jit.trace(Logits(model), (random_images(2, seed=7),))(pixels)


def export(model, pixels, folder):
    return torch.export.export(Logits(model), (pixels,)).module()(pixels)


def compiled(model, pixels, folder):
    torch.compiler.reset()  # after some models it compiles no more
    return torch.compile(model, backend="eager", fullgraph=True)(pixels).logits


def on_the_cpu(model, pixels, folder):
    cpu_offload(model, offload_buffers=True)
    return model(pixels).logits


def on_disk(model, pixels, folder):
    disk_offload(model, folder, offload_buffers=True)
    return model(pixels).logits


def _memory(model):
    """Room for the student, and for nothing else of a whole model."""
    share = 0.9 if model.hp_dval.text is None else 0.5
    return {"cpu": int(share * sum(weight.nbytes for weight in model.parameters())), "disk": 10**9}


def dispatched(model, pixels, folder):
    places = infer_auto_device_map(model, _memory(model), no_split_module_classes=model._no_split_modules)
    assert "disk" in places.values()
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)(pixels).logits


def device_map_auto(model, pixels, folder):
    model.save_pretrained(folder / "saved")
    loaded = HPDVALForImageClassification.from_pretrained(
        folder / "saved", device_map="auto", max_memory=_memory(model), offload_folder=folder / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    return loaded(pixels).logits


def pruned(model, pixels, folder):
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        torch.nn.utils.prune.identity(module, "weight")
    return model(pixels).logits


def weight_norm(model, pixels, folder):
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        torch.nn.utils.parametrizations.weight_norm(module)
    return model(pixels).logits


def lora_everywhere(model, pixels, folder):
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()(pixels).logits


def functional(model, pixels, folder):
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return torch.func.functional_call(model, weights, (pixels,)).logits


def ensemble(model, pixels, folder):
    weights = {name: torch.stack((weight, weight)) for name, weight in model.named_parameters()}
    return torch.func.vmap(lambda weights: torch.func.functional_call(model, weights, (pixels,)).logits)(weights)[1]


def pickled(model, pixels, folder):
    model(pixels)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(pixels).logits


def state_dict(model, pixels, folder):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.mul_(1.1)
    twin(pixels)
    twin.load_state_dict(model.state_dict())
    return twin(pixels).logits


HANDLINGS = [
    jit_trace, legacy_onnx, export, compiled, on_the_cpu, on_disk, dispatched, device_map_auto, pruned,
    weight_norm, lora_everywhere, functional, ensemble, pickled, state_dict,
    pytest.param(dynamo_onnx, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("handling", HANDLINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_handling_gives_the_plain_result(kind, handling, tmp_path):
    model, pixels = MODELS[kind](), random_images(3)
    expected = copy.deepcopy(model)(pixels).logits
    if kind == "phase2" and handling in (on_the_cpu, on_disk, dispatched):
        with pytest.raises(ValueError, match="peft's adapter of the contexts cannot read"):
            handling(model, pixels, tmp_path)
        return
    logits = handling(model, pixels, tmp_path)
    torch.testing.assert_close(logits.detach(), expected.detach(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_dynamic_quantisation(kind):
    """int8 arithmetic gives other scores, near the plain ones."""
    model = MODELS[kind]()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantised(random_images()).logits, model(random_images()).logits, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_are_called_on_every_module_that_computes(kind):
    model = MODELS[kind]()
    called = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: called.add(module))
    model(random_images())
    towers = [model.hp_dval.student] + ([model.hp_dval.text] if model.hp_dval.text is not None else [])
    silent = [
        name
        for tower in towers
        for name, module in tower.named_modules()
        if module not in called and not isinstance(module, nn.ModuleList | nn.ParameterDict) and "dropout" not in name
    ]
    # peft's layer holds the table that it computes with, as it does anywhere.
    assert [name for name in silent if not name.endswith(("base_layer", "token_adapter", "original"))] == []
    assert {model.hp_dval.prompts, model.scale} < called


DTYPES = {torch.bfloat16: 0.05, torch.float16: 0.005, torch.float64: 1e-5}


@pytest.mark.parametrize(("kind", "dtype"), itertools.product(("clip", "vit"), DTYPES))
def test_other_precisions_load_cast_and_train(kind, dtype, tmp_path):
    model = MODELS[kind]()
    expected = model(random_images()).logits
    model.save_pretrained(tmp_path)
    loaded = HPDVALForImageClassification.from_pretrained(tmp_path, dtype=dtype).eval()
    cast = copy.deepcopy(model).to(dtype)
    for other in (loaded, cast):
        logits = other(random_images().to(dtype)).logits
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=DTYPES[dtype], rtol=0)
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {
        name: t.dtype for name, t in cast.state_dict().items()
    }
    if dtype == torch.float16:
        half = copy.deepcopy(model).half().state_dict()
        assert all(torch.equal(value, half[name]) for name, value in cast.state_dict().items())
    for phase in ("phase1", "phase2", "joint"):
        cast.set_phase(phase)
        cast.train()(random_images().to(dtype), labels=targets()).loss.backward()
        gradients = [weight.grad for weight in cast.parameters() if weight.requires_grad]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        cast.zero_grad()
