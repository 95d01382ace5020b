"""CAT's conversion against a naive forward of CAT under CAT's own names, and against what resizing must keep."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from modeling_hsvlt import HSVLTForImageClassification, MlTrConfig, MlTrForImageClassification
from modeling_hsvlt.modeling_mltr import MlTrCrossWindowAttention
from tests.test_modeling_mltr import (
    naive_bicubic,
    naive_cross_attention,
    naive_linear,
    naive_norm,
    naive_pixel_attention,
)
from tests.tolerance import assert_close_outputs
from training.config import TrainingConfig
from training.convert import main
from training.models.build import build_model
from training.models.cat import cat_names, cat_to_mltr
from training.models.resolution import resize_windows

WIDTH, DEPTHS, HEADS, WINDOW, GRID, PATCH, NUM_LABELS = 8, [1, 1, 2, 1], [1, 2, 2, 4], 2, 16, 2, 5


def random_cat(ape=True, qkv_bias=True, seed=0):
    """A state dict in CAT's layout, with the index buffers that its checkpoints hold."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def linear(key, out, width, *kernel, bias=True):
        state[f"{key}.weight"] = torch.randn(out, width, *kernel, generator=generator) * width**-0.5
        if bias:
            state[f"{key}.bias"] = 0.3 * torch.randn(out, generator=generator)

    def norm(key, width):
        state[f"{key}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[f"{key}.bias"] = 0.2 * torch.randn(width, generator=generator)

    linear("patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    norm("patch_embed.norm", WIDTH)
    if ape:
        state["ape"] = torch.randn(1, GRID**2, WIDTH, generator=generator)
    for i, depth in enumerate(DEPTHS):
        c = WIDTH * 2**i
        for blocks in ("pre_ipsa_blocks", "cpsa_blocks", "post_ipsa_blocks"):
            for j in range(depth):
                block = f"layers.{i}.{blocks}.{j}"
                dim = WINDOW**2 if blocks == "cpsa_blocks" else c
                norm(f"{block}.norm1", c)
                linear(f"{block}.attn.qkv", 3 * dim, dim, bias=qkv_bias)
                linear(f"{block}.attn.proj", dim, dim)
                if blocks != "cpsa_blocks":
                    table = torch.randn((2 * WINDOW - 1) ** 2, HEADS[i], generator=generator)
                    state[f"{block}.attn.relative_position_bias_table"] = table
                    index = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.long)
                    state[f"{block}.attn.relative_position_index"] = index
                norm(f"{block}.norm2", c)
                linear(f"{block}.mlp.fc1", 4 * c, c)
                linear(f"{block}.mlp.fc2", c, 4 * c)
        if i < 3:
            norm(f"layers.{i}.downsample.norm", 4 * c)
            linear(f"layers.{i}.downsample.reduction", 2 * c, 4 * c, bias=False)
    norm("norm", 8 * WIDTH)
    linear("head", NUM_LABELS, 8 * WIDTH)
    return state


def naive_cat(state, image):
    """Logits of one image (3, 32, 32)."""
    state = {key.replace(".attn.relative", ".attn.relative_position_bias.relative"): t for key, t in state.items()}
    x = F.conv2d(image[None], state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=PATCH)[0]
    x = naive_norm(x.permute(1, 2, 0), state, "patch_embed.norm")
    if "ape" in state:
        x = x + state["ape"].view(GRID, GRID, WIDTH)
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            for blocks in ("pre_ipsa_blocks", "cpsa_blocks", "post_ipsa_blocks"):
                block = f"layers.{i}.{blocks}.{j}"
                y = naive_norm(x, state, f"{block}.norm1")
                if blocks == "cpsa_blocks":
                    x = x + naive_cross_attention(y, state, f"{block}.attn", WINDOW)
                else:
                    x = x + naive_pixel_attention(y, state, f"{block}.attn", WINDOW, HEADS[i])
                y = naive_linear(naive_norm(x, state, f"{block}.norm2"), state, f"{block}.mlp.fc1")
                x = x + naive_linear(F.gelu(y), state, f"{block}.mlp.fc2")
        if i < 3:
            x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
            x = naive_linear(
                naive_norm(x, state, f"layers.{i}.downsample.norm"), state, f"layers.{i}.downsample.reduction"
            )
    return naive_linear(naive_norm(x, state, "norm").mean((0, 1)), state, "head")


@pytest.mark.parametrize("ape", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_converted_cat_computes_what_cat_computes(ape, qkv_bias):
    state = random_cat(ape, qkv_bias)
    converted, config_kwargs = cat_to_mltr({"model": {f"module.{key}": tensor for key, tensor in state.items()}})
    model = MlTrForImageClassification(MlTrConfig(**config_kwargs)).eval()
    model.load_state_dict(converted)
    assert model.config.image_size == 32 and model.config.num_labels == NUM_LABELS
    image = torch.randn(3, 32, 32)
    with torch.no_grad():
        logits = model.double()(image[None].double()).logits[0]
        expected = naive_cat({key: tensor.double() for key, tensor in state.items()}, image.double())
    torch.testing.assert_close(logits, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("preset", ["cat_t", "cat_s", "cat_b"])
def test_released_sizes_are_recognised(preset):
    config = MlTrConfig.preset(preset, num_labels=1000)
    with torch.device("meta"):
        ours = MlTrForImageClassification(config).state_dict()
    names = cat_names(list(config.depths))
    assert set(names.values()) == set(ours) and len(names) == len(ours)
    converted, config_kwargs = cat_to_mltr({cat: ours[name] for cat, name in names.items()})
    assert converted.keys() == ours.keys()
    for field, value in config_kwargs.items():
        expected = getattr(config, field)
        assert value == (list(expected) if isinstance(expected, tuple) else expected), field


def test_other_state_dicts_are_refused():
    state = random_cat()
    with pytest.raises(ValueError, match=r"not a CAT classifier: 1 tensors are unknown \(the first is extra\)"):
        cat_to_mltr({**state, "extra": torch.ones(1)})
    del state["layers.2.post_ipsa_blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"missing \(the first is layers.2.post_ipsa_blocks.1.mlp.fc2.bias\)"):
        cat_to_mltr(state)
    with pytest.raises(ValueError, match="not a CAT classifier"):
        cat_to_mltr({"conv1.weight": torch.ones(1)})


# ---- another resolution, another window


def sized_model(image_size, window_size, **fields):
    torch.manual_seed(0)
    defaults = {"patch_size": 4, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    defaults |= {"use_absolute_embeddings": True, "num_labels": NUM_LABELS, "initializer_range": None}
    return MlTrForImageClassification(
        MlTrConfig(image_size=image_size, window_size=window_size, **{**defaults, **fields})
    ).eval()


def test_from_224_to_384_and_from_windows_of_7_to_12():
    source, target = sized_model(224, 7), sized_model(384, 12)
    state = source.state_dict()
    resized = resize_windows(state, source.config, target.config)
    target.load_state_dict(resized)
    changed = {name for name, tensor in resized.items() if tensor is not state[name]}
    parts = ("position_embeddings", "bias_table", "sublayers.1.attn")
    assert changed == {name for name in state if any(part in name for part in parts)}
    with torch.no_grad():
        assert torch.isfinite(target(torch.randn(1, 3, 384, 384)).logits).all()


def test_the_same_window_keeps_every_tensor_but_the_position_embedding():
    source, target = sized_model(224, 7), sized_model(448, 7)
    state = source.state_dict()
    resized = resize_windows(state, source.config, target.config)
    assert {name for name in state if resized[name] is not state[name]} == {"mltr.embeddings.position_embeddings"}
    same = resize_windows(state, source.config, source.config)
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(("old", "new"), [(3, 5), (5, 4)])
def test_what_is_resized_is_resized_bicubically(old, new):
    """Random tables and operators against the interpolation written out, entry by entry of what is not resized."""
    fields = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "use_absolute_embeddings": True}
    source, target = (
        MlTrConfig(image_size=size, window_size=window, num_labels=2, **fields)
        for size, window in ((4 * 8 * old, old), (4 * 8 * new, new))
    )
    torch.manual_seed(0)
    model = MlTrForImageClassification(source)
    state = {key: torch.randn_like(tensor) for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    resized = resize_windows(state, source, target)
    layer = "mltr.encoder.stages.2.layers.0.sublayers"
    positions = "mltr.embeddings.position_embeddings"
    grid = state[positions].view(8 * old, 8 * old, 8)
    assert_close_outputs(resized[positions], naive_bicubic(grid, 8 * new, 8 * new).view(1, -1, 8))
    name = f"{layer}.0.attn.relative_position_bias.relative_position_bias_table"
    table = naive_bicubic(state[name].view(2 * old - 1, 2 * old - 1, 2), 2 * new - 1, 2 * new - 1)
    assert_close_outputs(resized[name], table.view(-1, 2))

    def resize(operator, scale):  # rows are output pixels, columns input pixels, whose sum is over more of them
        rows = naive_bicubic(operator.view(old, old, -1), new, new).view(new**2, -1)
        if operator.ndim == 1:
            return scale * rows[:, 0]
        columns = naive_bicubic(rows.T.reshape(old, old, -1), new, new).view(new**2, -1).T
        return scale * columns * (old / new) ** 2

    for kind in ("weight", "bias"):
        expected = [
            resize(part, old / new if index == 0 else 1)
            for index, part in enumerate(state[f"{layer}.1.attn.qkv.{kind}"].chunk(3))
        ]
        assert_close_outputs(resized[f"{layer}.1.attn.qkv.{kind}"], torch.cat(expected))
        name = f"{layer}.1.attn.proj.{kind}"
        assert_close_outputs(resized[name], resize(state[name], 1))


def operator(window, weight_q, weight_k, weight_v, weight_o, bias):
    """A cross-window attention whose matrices are outer products of smooth maps over the window."""
    config = MlTrConfig(window_size=window)
    config._attn_implementation = "eager"
    attention = MlTrCrossWindowAttention(config, window).double()
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.cat([weight_q, weight_k, weight_v]))
        attention.qkv.bias.copy_(torch.cat([bias] * 3))
        attention.proj.weight.copy_(weight_o)
        attention.proj.bias.copy_(bias)
    return attention


def smooth(window, kind):
    """Value at the pixel centres of a window of side 1, (window^2,)."""
    x = (torch.arange(window).double() + 0.5) / window
    row, column = torch.meshgrid(x, x, indexing="ij")
    return {
        "ramp": row + 0.5,
        "hill": torch.sin(3 * row) * torch.cos(2 * column),
        "wave": torch.cos(4 * column - row),
        "flat": torch.full_like(row, 0.7),
    }[kind].flatten()


def test_cross_window_attention_keeps_its_effect_on_smooth_windows():
    """The same image in windows of 7 and of 12 pixels: the same attention, and the same output at the pixels."""

    def at(window):
        ramp, hill, wave, flat = (smooth(window, kind) for kind in ("ramp", "hill", "wave", "flat"))
        images = torch.stack([ramp, hill, wave, hill - ramp, wave + flat])  # five windows
        weights = [torch.outer(hill, wave), torch.outer(wave, ramp), torch.outer(ramp, hill), torch.outer(flat, ramp)]
        # As the layers of a trained model, at the scale of sums over a window's pixels.
        weights = [1.5 * weight / 49 for weight in weights]
        return images.T[None, :, :, None].transpose(1, 2), weights, hill

    windows, weights, bias = at(7)
    source = operator(7, *weights, bias)
    configs = [MlTrConfig(embed_dim=8, num_heads=[1] * 4, window_size=7, depths=[1] * 4)]
    configs.append(MlTrConfig(embed_dim=8, num_heads=[1] * 4, window_size=12, image_size=384, depths=[1] * 4))
    name = "mltr.encoder.stages.0.layers.0.sublayers.1.attn."
    resized = resize_windows({name + key: tensor for key, tensor in source.state_dict().items()}, *configs)
    finer = MlTrCrossWindowAttention(configs[1], 12).double()
    finer.load_state_dict({key.removeprefix(name): tensor for key, tensor in resized.items()})
    finer.config._attn_implementation = "eager"
    with torch.no_grad():
        output, attention = source(windows, True)
        finer_output, finer_attention = finer(at(12)[0], True)
        assert 0.4 < attention.max() < 0.9  # neither uniform nor saturated: the logits matter
        torch.testing.assert_close(finer_attention, attention, atol=0.02, rtol=0)
        expected = F.interpolate(output[0, :, :, 0].view(5, 1, 7, 7), (12, 12), mode="bicubic").flatten(1)
    torch.testing.assert_close(finer_output[0, :, :, 0], expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_position_bias_of_the_same_distance_in_parts_of_a_window_is_kept():
    source, target = sized_model(224, 7), sized_model(384, 12)
    name = "mltr.encoder.stages.2.layers.0.sublayers.0.attn.relative_position_bias"
    offsets = torch.arange(-6.0, 7) / 7  # of the window
    rows, columns = torch.meshgrid(offsets, offsets, indexing="ij")
    state = source.state_dict()
    state[f"{name}.relative_position_bias_table"] = torch.stack([rows, columns**2], -1).view(169, 2)
    target.load_state_dict(resize_windows(state, source.config, target.config))
    table = target.get_submodule(name.removesuffix(".")).relative_position_bias_table.view(23, 23, 2)
    torch.testing.assert_close(table[11, 11], torch.zeros(2), atol=1e-3, rtol=0)  # no offset
    finer = torch.arange(-11.0, 12) / 12
    torch.testing.assert_close(table[:, 11, 0][3:-3], finer[3:-3], atol=0.06, rtol=0)  # rows rise along rows
    torch.testing.assert_close(table[11, :, 1][3:-3], finer[3:-3] ** 2, atol=0.08, rtol=0)


# ---- the command


def test_command_converts_and_transfers(tmp_path, capsys):
    state = random_cat()
    save_file(state, tmp_path / "cat.safetensors")
    (tmp_path / "labels.txt").write_text("".join(f"name {i}\n" for i in range(NUM_LABELS)))
    folder = tmp_path / "converted"
    to = ["--to", "mltr"]
    assert main([str(tmp_path / "cat.safetensors"), str(folder), "--labels", str(tmp_path / "labels.txt"), *to]) == 0
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    assert model.config.id2label[4] == "name 4"
    pixel_values = processor(images=Image.new("RGB", (60, 40), (200, 10, 90)), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 32, 32)
    with torch.no_grad():
        expected = naive_cat(state, pixel_values[0])
        torch.testing.assert_close(model(pixel_values).logits[0], expected, atol=1e-4, rtol=1e-4)

    larger = tmp_path / "larger"
    assert main([str(folder), str(larger), "--image_size", "48", "--window_size", "3", *to]) == 0
    again, processor = AutoModel.from_pretrained(larger), AutoProcessor.from_pretrained(larger)
    assert again.config.window_sizes == [3, 3, 3, 3] and again.config.id2label[4] == "name 4"
    pixel_values = processor(images=Image.new("RGB", (60, 40)), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 48, 48)
    # and as HSVLT's backbone
    hsvlt = HSVLTForImageClassification.from_backbone(str(larger), num_labels=2, label_embedding_dim=12)
    ours = hsvlt.hsvlt.backbone.model.state_dict()
    for name, tensor in again.mltr.state_dict().items():
        assert name.startswith("layernorm") or torch.equal(ours[name], tensor), name

    capsys.readouterr()
    assert main([str(folder), str(larger), *to]) == 2
    assert "exists: choose another TARGET, or replace it with --overwrite" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.pth"), str(tmp_path / "new"), *to]) == 2
    assert "is not a file" in capsys.readouterr().err
    assert main([str(tmp_path / "labels.txt"), str(tmp_path / "new"), *to]) == 2
    assert not (tmp_path / "new").exists()


def test_training_goes_on_at_another_image_size(tmp_path):
    source = sized_model(32, 2, patch_size=2)
    source.save_pretrained(tmp_path / "source")
    names = [source.config.id2label[i] for i in range(NUM_LABELS)]
    for labels, fields in ((names, {}), ([*names[:2], "new"], {}), (names, {"window_size": 4})):
        options = TrainingConfig(init_from=str(tmp_path / "source"), image_size=64, model=fields)
        model = build_model(options, labels)
        model.save_pretrained(tmp_path / "next")
        again = MlTrForImageClassification.from_pretrained(tmp_path / "next")
        assert again.config.image_size == 64 and again.num_labels == len(labels)
        expected = resize_windows(source.state_dict(), source.config, again.config)
        for name, tensor in again.mltr.state_dict().items():
            assert torch.equal(tensor, expected[f"mltr.{name}"]), name
        assert torch.equal(again.classifier.weight[1], source.classifier.weight[1])
