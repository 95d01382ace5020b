"""`training.convert` against an independent, naive forward of the released HSVLT, written from its equations."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    BertTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextModel,
    ConvNextV2Config,
    ConvNextV2Model,
)

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from modeling_hsvlt.label_prompts import encode_labels
from training.config import TrainingConfig
from training.convert import main
from training.models.build import read_backbone_statistics
from training.models.convnext import convert_convnext_state_dict
from training.models.official_hsvlt import hsvlt_to_official, official_to_hsvlt

from ...tolerance import assert_close_outputs

WIDTHS, DEPTHS, NUM_LABELS, LABEL_DIM = [8, 16, 24, 32], [1, 1, 2, 1], 5, 12


def random_official(widths=WIDTHS, depths=DEPTHS, num_labels=NUM_LABELS, label_dim=LABEL_DIM, dead=True, seed=0):
    """A state dict in the released layout with its dead modules; weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def weight(key, *shape):
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 4
        state[key] = torch.randn(*shape, generator=generator) * fan_in**-0.5

    def linear(key, out, width, *kernel, bias=True):
        weight(f"{key}.weight", out, width, *kernel)
        if bias:
            weight(f"{key}.bias", out)

    def norm(key, width):
        state[f"{key}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        weight(f"{key}.bias", width)

    linear("downsample_layers.0.0", widths[0], 3, 4, 4)
    norm("downsample_layers.0.1", widths[0])
    for i in range(1, 4):
        norm(f"downsample_layers.{i}.0", widths[i - 1])
        linear(f"downsample_layers.{i}.1", widths[i], widths[i - 1], 2, 2)
    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        linear(f"langs.{i}", width, ([label_dim, *widths])[i])
        for j in range(depth):
            block = f"stages.{i}.{j}"
            weight(f"{block}.gamma", width)
            linear(f"{block}.dwconv", width, 1, 7, 7)
            norm(f"{block}.norm", width)
            linear(f"{block}.pwconv1", 4 * width, width)
            linear(f"{block}.pwconv2", width, 4 * width)
            for name in ("query", "key", "value"):
                linear(f"{block}.attn.{name}", width, width, bias=False)
            linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.attn.vis_project.0", width, width, 1)
            linear(f"{block}.attn.project_mm.0", width, width, 1)
            if dead or not (i == 3 and j == depth - 1):
                linear(f"{block}.res_gate.0", width, width, bias=False)
                linear(f"{block}.res_gate.2", width, width, bias=False)
            if dead:
                norm(f"{block}.norm2", width)
                linear(f"{block}.mlp.fc1", 4 * width, width)
                linear(f"{block}.mlp.fc2", width, 4 * width)
    linear("text_head2", num_labels, sum(widths))
    if dead:
        norm("norm", widths[-1])
        linear("head", 10, widths[-1])
        linear("attn.proj", 4, 4)
        linear("fuse.conv1_4", 4, 4, 3, bias=False)
    return state


def naive_logits(state, label_embeddings, pixels, depths=DEPTHS):
    """The released forward, equation by equation; explicit heads, keys and values."""

    def channel_norm(x, key):  # (B, C, H, W), over C
        mean = x.mean(1, keepdim=True)
        variance = ((x - mean) ** 2).mean(1, keepdim=True)
        scale, shift = (state[f"{key}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        return (x - mean) / torch.sqrt(variance + 1e-6) * scale + shift

    def apply(x, key, bias=True):  # a matrix on the last axis; 1x1 Conv1d included
        matrix = state[f"{key}.weight"]
        y = x @ matrix.reshape(matrix.shape[0], -1).T
        return y + state[f"{key}.bias"] if bias else y

    v = pixels
    labels = label_embeddings.expand(len(pixels), -1, -1)
    states = []
    for i, depth in enumerate(depths):
        conv = "downsample_layers.0.0" if i == 0 else f"downsample_layers.{i}.1"
        if i > 0:
            v = channel_norm(v, f"downsample_layers.{i}.0")
        v = F.conv2d(v, state[f"{conv}.weight"], state[f"{conv}.bias"], stride=4 if i == 0 else 2)
        if i == 0:
            v = channel_norm(v, "downsample_layers.0.1")
        labels = apply(labels, f"langs.{i}")
        for j in range(depth):
            b = f"stages.{i}.{j}"
            y = F.conv2d(v, state[f"{b}.dwconv.weight"], state[f"{b}.dwconv.bias"], padding=3, groups=v.shape[1])
            y = channel_norm(y, f"{b}.norm").permute(0, 2, 3, 1)
            y = state[f"{b}.gamma"] * apply(F.gelu(apply(y, f"{b}.pwconv1")), f"{b}.pwconv2")
            v = v + y.permute(0, 3, 1, 2)
            x = v.flatten(2).transpose(1, 2)  # (B, P, C)
            query, key, value = (
                apply(z, f"{b}.attn.{name}", bias=False) for z, name in ((labels, "query"), (x, "key"), (x, "value"))
            )
            attention = torch.softmax(query @ key.transpose(1, 2) / x.shape[-1] ** 0.5, dim=-1)  # (B, N, P)
            attended = apply(attention @ value, f"{b}.attn.proj")
            gate = F.gelu(apply(labels, f"{b}.attn.vis_project.0"))
            multimodal = F.gelu(apply(gate * attended, f"{b}.attn.project_mm.0"))
            labels = labels + multimodal
            inner = F.relu(apply(labels, f"{b}.res_gate.0", bias=False))
            labels = labels + torch.tanh(apply(inner, f"{b}.res_gate.2", bias=False)) * labels
        states.append(multimodal)
    features = torch.cat(states, dim=-1)
    return (features * state["text_head2.weight"]).sum(-1) + state["text_head2.bias"]


@pytest.fixture(scope="module")
def label_embeddings():
    return torch.randn(NUM_LABELS, LABEL_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def build(state_dict, config_kwargs, label_embeddings):
    model = HSVLTForImageClassification(HSVLTConfig(**config_kwargs)).eval()
    model.load_state_dict(state_dict | {"hsvlt.label_embeddings.weight": label_embeddings})
    return model


@pytest.mark.parametrize("absorb", [True, False])
@torch.no_grad()
def test_converted_model_computes_the_released_forward(label_embeddings, pixels, absorb):
    official = random_official()
    state_dict, config_kwargs = official_to_hsvlt(official)
    model = build(state_dict, {**config_kwargs, "absorb_projections": absorb}, label_embeddings)
    expected = naive_logits(official, label_embeddings, pixels)
    assert 0.05 < expected.std() < 50  # the comparison says something
    torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-5, atol=1e-5)


def test_configuration_is_read_from_the_shapes():
    state_dict, config_kwargs = official_to_hsvlt(random_official())
    backbone = config_kwargs.pop("backbone_config")
    assert backbone["hidden_sizes"] == WIDTHS and backbone["depths"] == DEPTHS and backbone["patch_size"] == 4
    assert config_kwargs == {
        "num_labels": NUM_LABELS,
        "label_embedding_dim": LABEL_DIM,
        "num_attention_heads": 1,
        "image_size": 448,
    }
    assert not any("norm2" in key or "mlp" in key for key in state_dict)


@pytest.mark.parametrize(("depths", "live"), [([3, 3, 27, 3], 744), ([3, 3, 9, 3], 384)])
def test_published_depths_have_the_published_number_of_live_tensors(depths, live):
    widths = [2, 4, 6, 8]
    state_dict, _ = official_to_hsvlt(random_official(widths=widths, depths=depths))
    assert len(state_dict) == live
    model = HSVLTForImageClassification(
        HSVLTConfig(
            backbone_config={"model_type": "convnext", "hidden_sizes": widths, "depths": depths},
            num_labels=NUM_LABELS,
            label_embedding_dim=LABEL_DIM,
        )
    )
    assert set(model.state_dict()) - set(state_dict) == {"hsvlt.label_embeddings.weight"}


def test_there_and_back_is_bit_exact_on_live_keys(label_embeddings):
    official, live = random_official(), random_official(dead=False)
    live = {key: official[key] for key in live}
    parallel = {f"module.{key}": tensor for key, tensor in official.items()}
    for source in (official, live, parallel, {"state_dict": official}):
        state_dict, config_kwargs = official_to_hsvlt(source)
        back = hsvlt_to_official(build(state_dict, config_kwargs, label_embeddings).state_dict())
        assert back.keys() == live.keys()
        assert all(torch.equal(back[key], live[key]) for key in live)


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "stages.2.1.attn.key.weight"), r"1 tensors are missing.*stages\.2\.1\.attn\.key\.weight"),
        (lambda s: without(s, "stages.0.0.res_gate.0.weight"), r"missing.*stages\.0\.0\.res_gate\.0\.weight"),
        (lambda s: s | {"stages.0.0.extra": torch.ones(1)}, r"1 tensors are unknown.*stages\.0\.0\.extra"),
        (lambda s: s | {"text_head2.weight": torch.ones(5, 16)}, "reads 16 features a label.*have 80"),
        (lambda s: {"epoch": 3}, "missing"),
    ],
)
def test_other_official_state_dicts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        official_to_hsvlt(change(random_official()))


def test_models_that_the_released_layout_cannot_hold_are_refused():
    backbone = {"model_type": "convnext", "hidden_sizes": WIDTHS, "depths": DEPTHS}
    for change, message in (
        ({"normalize_label_tokens": True}, r"unknown.*label_norm"),
        ({"label_update": "none"}, r"missing.*label_gate"),
        ({"aggregation": "topdown"}, r"unknown.*aggregation"),
        (
            {"backbone_config": {**backbone, "model_type": "convnextv2"}},
            r"missing.*layer_scale_parameter.*unknown.*grn",
        ),
    ):
        config = HSVLTConfig(**{"backbone_config": backbone, "num_labels": 2, "label_embedding_dim": 4, **change})
        with pytest.raises(ValueError, match=message):
            hsvlt_to_official(HSVLTForImageClassification(config).state_dict())


def convnext(depths=DEPTHS, num_labels=3):
    torch.manual_seed(0)
    config = ConvNextConfig(
        hidden_sizes=WIDTHS, depths=depths, layer_scale_init_value=1.0, initializer_range=0.3, num_labels=num_labels
    )
    model = ConvNextForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def in_layout(layout, model):
    """The model's state dict as other code bases write it, by text replacement."""
    state = {key.removeprefix("convnext."): tensor for key, tensor in model.state_dict().items()}
    if layout == "transformers":
        return dict(model.state_dict())
    if layout == "transformers_model":
        return dict(model.convnext.state_dict())
    renamed = {}
    for key, tensor in state.items():
        if key.startswith(("layernorm.", "classifier.")):
            original = {"layernorm": "norm", "classifier": "head"}
            timm = {"layernorm": "head.norm", "classifier": "head.fc"}
            module, kind = key.split(".")
            key = f"{(original if layout == 'original' else timm)[module]}.{kind}"
        elif layout == "original":
            key = key.replace("embeddings.patch_embeddings", "downsample_layers.0.0")
            key = key.replace("embeddings.layernorm", "downsample_layers.0.1").replace("encoder.", "")
            key = (
                key.replace(".layers.", ".").replace(".layernorm.", ".norm.").replace("layer_scale_parameter", "gamma")
            )
            if "downsampling_layer" in key:
                _, i, _, k, kind = key.split(".")
                key = f"downsample_layers.{i}.{k}.{kind}"
        else:
            key = key.replace("embeddings.patch_embeddings", "stem.0").replace("embeddings.layernorm", "stem.1")
            key = (
                key.replace("encoder.", "").replace(".layers.", ".blocks.").replace("downsampling_layer", "downsample")
            )
            key = key.replace(".dwconv.", ".conv_dw.").replace(".layernorm.", ".norm.")
            key = key.replace(".pwconv1.", ".mlp.fc1.").replace(".pwconv2.", ".mlp.fc2.")
            key = key.replace("layer_scale_parameter", "gamma")
            if layout == "timm_conv_mlp" and ".mlp." in key and key.endswith("weight"):
                tensor = tensor[:, :, None, None]
        renamed[key] = tensor
    return {"model": renamed} if layout == "original" else renamed


LAYOUTS = ["transformers", "transformers_model", "original", "timm", "timm_conv_mlp"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convnext_weights_become_exactly_those_of_convnext_model(layout):
    model = convnext()
    converted = convert_convnext_state_dict(in_layout(layout, model))
    expected = model.convnext.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_backbone_gives_the_feature_maps_of_convnext_model(layout, pixels):
    model = convnext()
    converted = convert_convnext_state_dict(in_layout(layout, model))
    backbone = {f"hsvlt.backbone.{key}": value for key, value in converted.items() if not key.startswith("layernorm.")}
    hsvlt = HSVLTForImageClassification(
        HSVLTConfig(backbone_config=model.config.to_dict(), num_labels=2, label_embedding_dim=4)
    ).eval()
    missing, unexpected = hsvlt.load_state_dict(backbone, strict=False)
    assert not unexpected and not any(".backbone." in key for key in missing)
    maps = hsvlt(pixels, output_hidden_states=True).hidden_states
    expected = model.convnext(pixels, output_hidden_states=True).hidden_states[-4:]
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (16, 8, 8), (24, 4, 4), (32, 2, 2)]
    for ours, theirs in zip(maps, expected, strict=True):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_convnext_of_another_kind_is_refused():
    state = in_layout("timm", convnext())
    with pytest.raises(
        ValueError, match=r"timm layout: 1 tensors are missing \(the first is stages\.2\.blocks\.1\.gamma"
    ):
        convert_convnext_state_dict(without(state, "stages.2.blocks.1.gamma"))
    with pytest.raises(ValueError, match=r"transformers layout.*missing.*layer_scale_parameter.*unknown.*grn"):
        v2 = ConvNextV2Model(ConvNextV2Config(hidden_sizes=WIDTHS, depths=DEPTHS))
        convert_convnext_state_dict(v2.state_dict())
    with pytest.raises(ValueError, match=r"no ConvNeXt state dict.*stem\.0\.weight \(timm\)"):
        convert_convnext_state_dict({"conv1.weight": torch.ones(1)})
    # A feature extractor has no final norm, and the backbone needs none.
    assert "layernorm.weight" not in convert_convnext_state_dict(
        without(without(state, "head.norm.weight"), "head.norm.bias")
    )


@pytest.fixture
def released(tmp_path, label_embeddings):
    """What a user of the released code has: `best_model.pth`, `bert.npy` and the label names."""
    torch.save({f"module.{key}": value for key, value in random_official().items()}, tmp_path / "best_model.pth")
    np.save(tmp_path / "bert.npy", label_embeddings.numpy())
    (tmp_path / "labels.txt").write_text("person\ndog\ntraffic light\ncat\ndiningtable\n")
    return tmp_path


def test_command_makes_a_checkpoint_that_stands_alone(released, label_embeddings, pixels):
    source, target = str(released / "best_model.pth"), released / "ours"
    arguments = [source, str(target), "--labels", str(released / "labels.txt")]
    assert main([*arguments, "--label_embeddings", str(released / "bert.npy")]) == 0
    model = AutoModel.from_pretrained(target)
    assert model.config.id2label == {0: "person", 1: "dog", 2: "traffic light", 3: "cat", 4: "diningtable"}
    assert model.config.label2id["cat"] == 3 and model.config.problem_type == "multi_label_classification"
    with torch.no_grad():
        expected = naive_logits(random_official(), label_embeddings, pixels)
        torch.testing.assert_close(model(pixels).logits, expected, rtol=1e-5, atol=1e-5)

    # Images as the released code feeds them: Resize((448, 448)), bilinear, and ToTensor; nothing subtracted.
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    resized = np.asarray(image.resize((448, 448), Image.Resampling.BILINEAR))
    pixel_values = AutoProcessor.from_pretrained(target)(images=image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values[0], torch.tensor(resized).permute(2, 0, 1) / 255, rtol=0, atol=1e-6)
    assert {"modeling_hsvlt.py", "pipeline_multilabel.py", "model.safetensors"} <= {p.name for p in target.iterdir()}


@pytest.mark.parametrize("target", ["back/best_model.pth", "back.safetensors", "back"])
def test_command_writes_the_released_layout(released, label_embeddings, target, capsys):
    ours = str(released / "ours")
    assert main([str(released / "best_model.pth"), ours, "--label_embeddings", str(released / "bert.npy")]) == 0
    target = released / target
    assert main([ours, str(target), "--to", "official"]) == 0
    if target.is_dir():
        target = target / "best_model.safetensors"
    back = torch.load(target, weights_only=True) if target.suffix == ".pth" else load_file(target)
    live = random_official(dead=False).keys()
    official = random_official()
    assert back.keys() == live and all(torch.equal(back[key], official[key]) for key in live)
    assert np.array_equal(np.load(target.with_suffix(".npy")), label_embeddings.numpy())
    assert "bert.npy" in capsys.readouterr().out
    # Neither of the two files is replaced unasked.
    target.unlink()
    assert main([ours, str(target), "--to", "official"]) == 2 and not target.exists()
    assert f"{target.with_suffix('.npy')}' exists" in capsys.readouterr().err
    assert main([ours, str(target), "--to", "official", "--overwrite"]) == 0 and target.is_file()


def test_command_embeds_labels_in_the_official_reading(released):
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "person",
        "dog",
        "traffic",
        "light",
        "cat",
        "dining",
        "table",
    ]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate([*vocab, "##table"])})
    torch.manual_seed(0)
    size = {"hidden_size": LABEL_DIM, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertModel(BertConfig(vocab_size=len(vocab) + 1, **size)).eval()
    bert.save_pretrained(released / "bert")
    tokenizer.save_pretrained(released / "bert")
    arguments = [str(released / "best_model.pth"), str(released / "ours"), "--labels", str(released / "labels.txt")]
    assert main([*arguments, "--text_encoder", str(released / "bert"), "--voc_label_text"]) == 0
    model = AutoModel.from_pretrained(released / "ours")
    names = ["person", "dog", "traffic light", "cat", "dining table"]
    expected = encode_labels(names, bert, tokenizer, pooling="official")
    assert_close_outputs(model.hsvlt.label_embeddings.weight, expected)
    assert (model.config.label_text_encoder, model.config.label_pooling) == ("bert", "official")


@pytest.mark.parametrize("layout", ["original", "timm"])
def test_command_makes_a_backbone_folder(tmp_path, layout, pixels):
    model = convnext()
    torch.save(in_layout(layout, model), tmp_path / "weights.pth")
    assert main([str(tmp_path / "weights.pth"), str(tmp_path / "backbone"), "--to", "convnext"]) == 0
    config = TrainingConfig(backbone_statistics=True, backbone=str(tmp_path / "backbone"))  # as photos.yaml asks
    read_backbone_statistics(config)
    assert config.image_mean == [0.485, 0.456, 0.406] and config.image_std == [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = model.convnext(pixels).pooler_output
        torch.testing.assert_close(ConvNextModel.from_pretrained(tmp_path / "backbone")(pixels).pooler_output, expected)
    hsvlt = HSVLTForImageClassification.from_backbone(str(tmp_path / "backbone"), num_labels=2, label_embedding_dim=4)
    expected = model.convnext.embeddings.patch_embeddings.weight
    assert torch.equal(hsvlt.hsvlt.backbone.embeddings.patch_embeddings.weight, expected)


class Payload:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def test_command_refuses_in_one_sentence(released, capsys):
    source, ours, embeddings = (str(released / name) for name in ("best_model.pth", "ours", "bert.npy"))

    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        output = capsys.readouterr()
        assert "code from a pickle ran" not in output.out and output.err.startswith("error: ")
        return output.err

    assert "needs its label embeddings" in refused(source, ours)
    assert "needs its label embeddings" in refused(source, ours, "--text_encoder", released)  # of which labels?
    assert "is not a file" in refused(released / "nothing.pth", ours, "--label_embeddings", embeddings)
    assert "unknown (the first is langs.0.weight)" in refused(source, ours, "--to", "convnext")

    (released / "four.txt").write_text("a\nb\nc\nd\n")
    error = refused(source, ours, "--label_embeddings", embeddings, "--labels", released / "four.txt")
    assert "has 4 names" in error and "has 5 labels" in error

    np.save(released / "wide.npy", np.zeros((NUM_LABELS, 99), dtype=np.float32))
    assert "(5, 99)" in refused(source, ours, "--label_embeddings", released / "wide.npy")
    np.save(released / "object.npy", np.array([Payload()]), allow_pickle=True)
    assert "allow_pickle" in refused(source, ours, "--label_embeddings", released / "object.npy")

    (released / "evil.pth").write_bytes(pickle.dumps(Payload()))
    assert "tensors alone" in refused(released / "evil.pth", ours, "--label_embeddings", embeddings)
    torch.save({"model": Payload()}, released / "evil_zip.pth")
    assert "tensors alone" in refused(released / "evil_zip.pth", ours, "--label_embeddings", embeddings)
    (released / "broken.safetensors").write_bytes(b"not tensors")
    assert "tensors alone" in refused(released / "broken.safetensors", ours, "--label_embeddings", embeddings)
    assert not (released / "ours").exists()


def test_command_never_overwrites_unasked(released, capsys):
    source, target = str(released / "best_model.pth"), released / "ours"
    arguments = [source, str(target), "--label_embeddings", str(released / "bert.npy")]
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    assert main(arguments) == 2
    assert "exists: choose another TARGET, or replace it with --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 2
    assert "no checkpoint folder" in capsys.readouterr().err
    assert (target / "thesis.txt").read_text() == "years of work"

    (target / "thesis.txt").unlink()
    target.rmdir()
    assert main(arguments) == 0
    save_file(random_official(seed=7), released / "other.safetensors")
    other = [str(released / "other.safetensors"), *arguments[1:]]
    weights = (target / "model.safetensors").read_bytes()
    assert main(other) == 2 and (target / "model.safetensors").read_bytes() == weights
    assert main([*other, "--overwrite"]) == 0 and (target / "model.safetensors").read_bytes() != weights
    assert json.loads((target / "config.json").read_text())["model_type"] == "hsvlt"
