import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoBackbone, AutoModel

import modeling_hsvlt.modeling_mltr as modeling_mltr
from modeling_hsvlt import (
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrBackbone,
    MlTrConfig,
    MlTrForImageClassification,
)
from modeling_hsvlt.modeling_mltr import (
    MlTrCrossWindowAttention,
    MlTrDropPath,
    MlTrPatchMerging,
    MlTrRelativePositionBias,
    window_partition,
    window_unpartition,
)

from .tolerance import assert_close_outputs, close_outputs

N = 5
CAT_BLOCK = ("pixel", "mlp", "cross", "mlp", "pixel", "mlp")


def make_config(**overrides):
    # Maps of 16, 8, 4 and 2 pixels a side: 25 (padded), 9 (padded), 4 (padded) windows, and one that is smaller.
    fields = {
        "num_labels": N,
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 3,
        "drop_path_rate": 0.0,
        "initializer_range": None,
    }
    return MlTrConfig(**{**fields, **overrides})


def make_model(model_class=MlTrForImageClassification, attn_implementation=None, **overrides):
    torch.manual_seed(0)
    model = model_class._from_config(make_config(**overrides), attn_implementation=attn_implementation).eval()
    with torch.no_grad():  # biases and norms that are not 0 and 1
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.normal_(mean=1, std=0.3)
            elif "table" in name or "position" in name:
                parameter.normal_()
    return model


def random_images(batch=2, size=32, width=None, seed=1):
    return torch.randn(batch, 3, size, width or size, generator=torch.Generator().manual_seed(seed))


def targets(batch=2):
    return (torch.rand(batch, N, generator=torch.Generator().manual_seed(2)) > 0.5).float()


# ---- parameter counts


def closed_form(channels, heads, depths, window, pattern, num_labels, positions=0):
    """Parameters of a layout, term by term; heads and channels of the first stage."""
    total = 51 * channels + positions * channels
    for i in range(4):
        c, h = channels * 2**i, heads * 2**i
        sublayers = {
            "pixel": 4 * c**2 + 6 * c + (2 * window - 1) ** 2 * h,
            "cross": 2 * c + 4 * window**4 + 4 * window**2,
            "mlp": 8 * c**2 + 7 * c,
        }
        total += depths[i] * sum(sublayers[kind] for kind in pattern)
        if i < 3:
            total += 8 * c**2 + 8 * c
    return total + 16 * channels + 8 * channels * num_labels + num_labels


@pytest.mark.parametrize(
    ("preset", "num_labels", "expected", "form"),
    [
        ("s", 80, 33_068_486, (96, 3, (2, 2, 9, 2), 7, ("pixel", "cross", "mlp"), 80)),
        ("m", 80, 62_213_426, (96, 3, (2, 2, 24, 2), 12, ("pixel", "cross", "mlp"), 80)),
        ("l", 80, 108_461_480, (128, 4, (2, 2, 24, 2), 12, ("pixel", "cross", "mlp"), 80)),
        ("cat_t", 1000, 16_870_996, (64, 2, (1, 1, 3, 1), 7, CAT_BLOCK, 1000, 56**2)),
        ("cat_s", 1000, 37_294_258, (96, 3, (1, 1, 3, 1), 7, CAT_BLOCK, 1000, 56**2)),
        ("cat_b", 1000, 51_531_922, (96, 3, (1, 1, 6, 1), 7, CAT_BLOCK, 1000, 56**2)),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, num_labels, expected, form):
    with torch.device("meta"):
        model = MlTrForImageClassification(MlTrConfig.preset(preset, num_labels=num_labels))
    assert sum(p.numel() for p in model.parameters()) == expected == closed_form(*form)
    published = {"s": 33, "m": 62, "l": 108, "cat_t": 17, "cat_s": 37, "cat_b": 52}
    assert round(expected / 1e6) == published[preset]


# ---- the equations, written out


def naive_norm(x, state, name, eps=1e-5):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def naive_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))


def naive_pixel_attention(x, state, name, window, heads):
    """(H, W, C), sides multiples of the window: one window, one head, one offset at a time."""
    height, width, channels = x.shape
    head = channels // heads
    table = state.get(f"{name}.relative_position_bias.relative_position_bias_table")
    out = torch.zeros_like(x)
    for top in range(0, height, window):
        for left in range(0, width, window):
            pixels = x[top : top + window, left : left + window].reshape(-1, channels)
            qkv = naive_linear(pixels, state, f"{name}.qkv")
            results = []
            for j in range(heads):
                q, k, v = (qkv[:, i * channels + j * head :][:, :head] for i in range(3))
                scores = q @ k.T / math.sqrt(head)
                if table is not None:
                    for a in range(window**2):
                        for b in range(window**2):
                            row = a // window - b // window + window - 1
                            column = a % window - b % window + window - 1
                            scores[a, b] += table[row * (2 * window - 1) + column, j]
                results.append(scores.softmax(-1) @ v)
            result = naive_linear(torch.cat(results, -1), state, f"{name}.proj")
            out[top : top + window, left : left + window] = result.view(window, window, channels)
    return out


def naive_cross_attention(x, state, name, window):
    """(H, W, C), sides multiples of the window: CAT's route, partition -> view -> permute, one channel at a time."""
    height, width, channels = x.shape
    rows, columns = height // window, width // window
    windows = x.view(rows, window, columns, window, channels).permute(0, 2, 1, 3, 4).reshape(-1, window**2, channels)
    out = torch.zeros_like(windows)
    for c in range(channels):
        u = windows[:, :, c]  # (n, M^2)
        q, k, v = naive_linear(u, state, f"{name}.qkv").chunk(3, -1)
        weights = (q @ k.T / window).softmax(-1)
        out[:, :, c] = naive_linear(weights @ v, state, f"{name}.proj")
    return out.view(rows, columns, window, window, channels).permute(0, 2, 1, 3, 4).reshape(height, width, channels)


def naive_maps(model, pixel_values):
    """The outputs of the four stages as lists of maps (H, W, C), an image at a time."""
    config, state = model.config, {key.removeprefix("mltr."): value for key, value in model.state_dict().items()}
    maps = [[] for _ in range(4)]
    for image in pixel_values:
        p = config.patch_size
        image = F.pad(image, (0, -image.shape[2] % p, 0, -image.shape[1] % p))
        stem = "embeddings.patch_embeddings.projection"
        height, width = image.shape[1] // p, image.shape[2] // p
        kernel = config.stem_kernel_size or p
        image = F.pad(image, ((kernel - p + 1) // 2, kernel) * 2)  # further right and below than any patch reaches
        x = image.new_zeros(height, width, config.embed_dim)
        for row, column in product(range(height), range(width)):
            patch = image[:, row * p : row * p + kernel, column * p : column * p + kernel].flatten()
            x[row, column] = state[f"{stem}.weight"].flatten(1) @ patch + state[f"{stem}.bias"]
        x = naive_norm(x, state, "embeddings.norm", config.layer_norm_eps)
        if config.use_absolute_embeddings:
            x = x + state["embeddings.position_embeddings"].view(*x.shape)
        for i, depth in enumerate(config.depths):
            if i > 0:
                x = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
                x = torch.cat([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], -1)
                x = naive_linear(
                    naive_norm(x, state, f"encoder.stages.{i}.merging.norm", config.layer_norm_eps),
                    state,
                    f"encoder.stages.{i}.merging.reduction",
                )
            if kernel := config.position_kernel_size:
                name = f"encoder.stages.{i}.position_convolution"
                height, width = x.shape[:2]
                around = F.pad(x, (0, 0) + (kernel // 2,) * 4)
                x = x + state[f"{name}.bias"]
                for row, column in product(range(kernel), range(kernel)):
                    weight = state[f"{name}.weight"][:, 0, row, column]
                    x = x + weight * around[row : row + height, column : column + width]
            window = min(config.window_size, -(-config.image_size // p // 2**i))
            height, width = x.shape[:2]
            for j in range(depth):
                pattern = config.block_pattern
                if i == 3 and config.last_stage_block_pattern is not None:
                    pattern = config.last_stage_block_pattern
                for k, kind in enumerate(pattern):
                    name = f"encoder.stages.{i}.layers.{j}.sublayers.{k}"
                    y = naive_norm(x, state, f"{name}.norm", config.layer_norm_eps)
                    if kind == "mlp":
                        act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[config.hidden_act]
                        y = naive_linear(act(naive_linear(y, state, f"{name}.mlp.fc1")), state, f"{name}.mlp.fc2")
                    else:
                        y = F.pad(y, (0, 0, 0, -width % window, 0, -height % window))
                        if kind == "pixel":
                            y = naive_pixel_attention(y, state, f"{name}.attn", window, config.num_heads[i])
                        else:
                            y = naive_cross_attention(y, state, f"{name}.attn", window)
                        y = y[:height, :width]
                    x = x + y
            maps[i].append(x)
    return maps


def naive_logits(model, pixel_values):
    state, eps = model.state_dict(), model.config.layer_norm_eps
    pooled = [naive_norm(x, state, "mltr.layernorm", eps).mean((0, 1)) for x in naive_maps(model, pixel_values)[3]]
    return naive_linear(torch.stack(pooled), state, "classifier")


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({"window_size": 4}, (32, 32)),  # windows fill every map, as at the published resolutions
        ({}, (32, 32)),  # padded windows, and a last stage smaller than the window
        ({}, (29, 50)),  # padded patches, windows and mergings
        ({"use_relative_position_bias": False, "qkv_bias": False}, (32, 32)),
        ({"block_pattern": CAT_BLOCK, "use_absolute_embeddings": True, "window_size": 4}, (32, 32)),
        ({"block_pattern": ("pixel", "mlp", "cross", "mlp"), "last_stage_block_pattern": ("pixel", "mlp")}, (32, 32)),
        ({"block_pattern": ("cross", "mlp")}, (32, 40)),
        ({"stem_kernel_size": 7, "position_kernel_size": 5}, (29, 50)),
        ({"stem_kernel_size": 4, "patch_size": 3, "position_kernel_size": 3}, (32, 32)),
        ({"mlp_ratio": 1.5, "hidden_act": "relu", "layer_norm_eps": 0.1}, (32, 32)),
        ({"hidden_act": "silu"}, (32, 32)),
    ],
)
def test_logits_equal_the_equations(overrides, size):
    model = make_model(**overrides).double()
    pixel_values = random_images(2, *size).double()
    with torch.no_grad():
        expected = naive_logits(model, pixel_values)
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-9, rtol=1e-9)


def test_the_mlp_is_as_wide_as_the_ratio_says():
    for ratio, widths in ((4.0, [32, 64, 128, 256]), (1.5, [12, 24, 48, 96]), (2, [16, 32, 64, 128])):
        stages = make_model(mlp_ratio=ratio).mltr.encoder.stages
        layers = [stage.layers[0].sublayers[2].mlp for stage in stages]
        assert [layer.fc1.out_features for layer in layers] == [layer.fc2.in_features for layer in layers] == widths


def test_every_norm_has_the_epsilon_of_the_configuration():
    for model_class in (MlTrForImageClassification, MlTrBackbone):
        model = make_model(model_class, layer_norm_eps=0.1, out_features=["stem", "stage1", "stage4"])
        norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
        assert len(norms) > 15 and {norm.eps for norm in norms} == {0.1}


def test_stage_outputs_equal_the_equations():
    model = make_model().double()
    pixel_values = random_images(2, 29, 50).double()
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
        for ours, expected in zip(output.reshaped_hidden_states[1:], naive_maps(model, pixel_values), strict=True):
            torch.testing.assert_close(ours.permute(0, 2, 3, 1), torch.stack(expected), atol=1e-9, rtol=1e-9)


# ---- windows and positions


def test_windows_and_back():
    x = torch.arange(2 * 6 * 9 * 4.0).view(2, 6, 9, 4)
    windows = window_partition(x, 3)
    assert windows.shape == (2, 6, 9, 4)
    assert torch.equal(windows[1, 4].view(3, 3, 4), x[1, 3:6, 3:6])  # second row, second column of windows
    assert torch.equal(window_unpartition(windows, 3, 6, 9), x)


def test_merging_takes_rows_first():
    merging = MlTrPatchMerging(make_config(), 2)
    x = torch.randn(1, 4, 6, 2)
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.eye(8)[:4])  # lets the first four of the eight features through
        merging.norm = torch.nn.Identity()
        merged = merging(x)
    assert_close_outputs(merged[0, 1, 2], torch.cat([x[0, 2, 4], x[0, 3, 4]]))


def test_relative_position_index():
    window = 4
    index = MlTrRelativePositionBias(2, window).relative_position_index.view(window**2, window**2)
    assert torch.equal(index + index.T, torch.full_like(index, (2 * window - 1) ** 2 - 1))  # opposite offsets
    assert index.unique().tolist() == list(range((2 * window - 1) ** 2))
    assert (index.diagonal() == (2 * window - 1) ** 2 // 2).all()


def test_position_embeddings_follow_the_image():
    embeddings = make_model(use_absolute_embeddings=True).mltr.embeddings
    own = embeddings.interpolate_pos_encoding(16, 16)
    assert torch.equal(own.flatten(1, 2), embeddings.position_embeddings)
    with torch.no_grad():
        embeddings.position_embeddings.copy_(torch.linspace(0, 1, 16).repeat_interleave(16).view(1, 256, 1))
        resized = embeddings.interpolate_pos_encoding(32, 20)
    assert resized.shape == (1, 32, 20, 8)
    assert (resized[0, :, 0, 0].diff() > -1e-6).all() and resized[0, 8].std() < 1e-5  # still rows, still rising


def test_position_embeddings_are_resized_bicubically():
    embeddings = make_model(use_absolute_embeddings=True).mltr.embeddings
    grid = embeddings.position_embeddings.detach().view(16, 16, 8)
    with torch.no_grad():
        resized = embeddings.interpolate_pos_encoding(20, 12)[0]
    assert_close_outputs(resized, naive_bicubic(grid, 20, 12))


def naive_bicubic(grid, rows, columns):
    """(H, W, C) to (rows, columns, C): Keys' cubic convolution with a = -0.75, pixel centres, the edge repeated."""
    for dim, size in enumerate((rows, columns)):
        length, out = grid.shape[dim], []
        for i in range(size):
            position = (i + 0.5) * length / size - 0.5
            first = math.floor(position)
            row = 0
            for j in range(first - 1, first + 3):
                t = abs(position - j)
                weight = 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
                row = row + weight * grid.select(dim, min(max(j, 0), length - 1))
            out.append(row)
        grid = torch.stack(out, dim)
    return grid


# ---- cross-window attention


def cross_attention(window=4, dropout=0.0):
    torch.manual_seed(3)
    config = make_config(cross_attention_probs_dropout_prob=dropout)
    config._attn_implementation = "sdpa"
    return MlTrCrossWindowAttention(config, window).double()


def test_cross_window_attention_follows_a_permutation_of_the_windows():
    attention, x = cross_attention(), torch.randn(2, 6, 16, 3).double()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    with torch.no_grad():
        torch.testing.assert_close(attention(x[:, order])[0], attention(x)[0][:, order])
        # and of the channels, for they share their weights and never meet
        torch.testing.assert_close(attention(x[..., [2, 0, 1]])[0], attention(x)[0][..., [2, 0, 1]])


@pytest.mark.parametrize("num_windows", [1, 6])
@pytest.mark.parametrize("training", [True, False])
def test_folding_changes_neither_result_nor_gradients(num_windows, training, monkeypatch):
    attention = cross_attention().train(training)
    x = torch.randn(2, num_windows, 16, 3).double()
    results = []
    for folds in (True, False):
        monkeypatch.setattr(MlTrCrossWindowAttention, "_folds", lambda self, folds=folds: folds)
        attention.zero_grad()
        leaf = x.clone().requires_grad_()
        output, weights = attention(leaf, True)
        output.square().sum().backward()
        results.append([output, weights, leaf.grad, *(p.grad.clone() for p in attention.parameters())])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
    # A key's bias shifts all scores of a query alike: its gradient is zero, and with folding exactly so.
    assert (attention.qkv.bias.grad[16:32].abs() < 1e-12).all()


def test_a_single_window_uses_no_queries_and_keys():
    attention, x = cross_attention(), torch.randn(2, 1, 16, 3).double()
    output, weights = attention(x, True)
    assert torch.equal(weights, torch.ones(2, 3, 1, 1))
    output.sum().backward()
    for p in (attention.qkv.weight, attention.qkv.bias):
        assert not p.grad[:32].any() and p.grad[32:].abs().min() > 0  # a zero gradient, not a missing one
    with torch.no_grad():
        attention.qkv.weight[:32].normal_()
        assert_close_outputs(attention(x)[0], output)


def test_folded_weights_are_never_stale():
    attention, x = cross_attention().eval(), torch.randn(1, 4, 16, 3).double()
    with torch.inference_mode():
        before = attention(x)[0]
        attention.qkv.weight.data.mul_(2)  # raises no version counter
        attention.proj.weight.data = attention.proj.weight.data * 3
        after = attention(x)[0]
        expected = attention._projected(x, False)[0]
    assert not close_outputs(before, after)
    torch.testing.assert_close(after, expected)


def test_dropped_probabilities_are_those_of_the_plain_form():
    attention, x = cross_attention(dropout=0.5).train(), torch.randn(2, 6, 16, 3).double()
    torch.manual_seed(0)
    output = attention(x)[0]
    torch.manual_seed(0)
    q, k, v = attention.qkv(x.permute(0, 3, 1, 2)).chunk(3, -1)
    weights = F.dropout((q @ k.transpose(2, 3) / 4).softmax(-1), 0.5)
    torch.testing.assert_close(output, attention.proj(weights @ v).permute(0, 2, 3, 1))
    assert_close_outputs(attention.eval()(x)[0], attention(x)[0])


def test_an_adapter_on_a_folded_projection_is_not_bypassed():
    peft = pytest.importorskip("peft")
    model = make_model()
    config = peft.LoraConfig(target_modules=r".*sublayers\.1\.attn\.(qkv|proj)", r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        adapted = tuned(random_images()).logits
        assert (adapted - model(random_images()).logits).abs().max() > 1e-4
        torch.testing.assert_close(tuned.merge_and_unload()(random_images()).logits, adapted, atol=1e-4, rtol=1e-4)


def test_weights_offloaded_by_accelerate_are_there_when_needed():
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    with torch.no_grad():
        expected = model(random_images()).logits
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.is_meta for p in model.parameters())
        torch.testing.assert_close(model(random_images()).logits, expected, atol=1e-5, rtol=1e-5)


# ---- kernels and sizes


def test_eager_equals_sdpa():
    eager, sdpa = (make_model(attn_implementation=kind) for kind in ("eager", "sdpa"))
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = eager(random_images()).logits
        torch.testing.assert_close(sdpa(random_images()).logits, expected, atol=1e-5, rtol=1e-5)
        sdpa.set_attn_implementation("eager")
        assert_close_outputs(sdpa(random_images()).logits, expected)


def test_many_windows_take_the_fused_kernel(monkeypatch):
    model = make_model(attn_implementation="sdpa").double()
    shapes = []
    fused = F.scaled_dot_product_attention

    def recording(query, *args, **kwargs):
        shapes.append(tuple(query.shape))
        return fused(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording)
    with torch.no_grad():
        expected = model(random_images().double()).logits
        assert not any(shape[1] == 8 for shape in shapes)  # channels in the slot of the heads: (B, C, n, P)
        monkeypatch.setattr(modeling_mltr, "MAX_PLAIN_WINDOWS", 9)
        torch.testing.assert_close(model(random_images().double()).logits, expected)
    assert (2, 8, 36, 9) in shapes and (2, 16, 9, 9) not in shapes


def test_batches_beyond_the_kernels_limit_are_split(monkeypatch):
    model = make_model(attn_implementation="sdpa").double()
    with torch.no_grad():
        expected = model(random_images(3).double(), output_attentions=True)
        monkeypatch.setattr(modeling_mltr, "MAX_ATTENTION_BATCH", 5)
        torch.testing.assert_close(model(random_images(3).double()).logits, expected.logits)
        split = model(random_images(3).double(), output_attentions=True)
    torch.testing.assert_close(split.attentions, expected.attentions)


@pytest.mark.parametrize("size", [(200, 260), (7, 90), (1, 1)])
def test_any_image_size(size):
    model = make_model().train()
    output = model(random_images(1, *size), labels=targets(1))
    assert output.logits.shape == (1, N)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_stands_in_the_padding_never_reaches_the_image():
    config = make_config()
    stage = make_model().mltr.encoder.stages[0]
    x = torch.randn(1, 16, 16, config.embed_dim)
    with torch.no_grad():
        expected = stage(x)[0]
        original = F.pad
        try:
            F.pad = lambda x, sides, mode="constant", value=0.0: original(
                x, sides, value=7.0 if x.is_floating_point() else value
            )
            assert_close_outputs(stage(x)[0], expected)
        finally:
            F.pad = original


# ---- outputs


def test_outputs_have_their_shapes_and_attention_sums_to_one():
    model = make_model(attn_implementation="sdpa")
    with torch.no_grad():
        output = model(random_images(), output_hidden_states=True, output_attentions=True)
        plain = model(random_images())
    sides, widths = [16, 16, 8, 4, 2], [8, 8, 16, 32, 64]
    for i in range(5):
        assert output.reshaped_hidden_states[i].shape == (2, widths[i], sides[i], sides[i])
        assert output.hidden_states[i].shape == (2, sides[i] ** 2, widths[i])
        tokens = output.reshaped_hidden_states[i].flatten(2).transpose(1, 2)
        assert torch.equal(tokens, output.hidden_states[i])
    blocks = [(36, 9, 1, 8), (9, 9, 2, 16), (4, 9, 2, 32), (4, 9, 2, 32), (1, 4, 4, 64)]
    for i, (windows, pixels, heads, channels) in enumerate(blocks):
        assert output.attentions[i].shape == (2 * windows, heads, pixels, pixels)
        assert output.cross_attentions[i].shape == (2, channels, windows, windows)
        for weights in (output.attentions[i], output.cross_attentions[i]):
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert len(output.attentions) == len(output.cross_attentions) == len(blocks)
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-5, rtol=1e-5)
    assert plain.hidden_states is None and plain.attentions is None and plain.cross_attentions is None
    as_tuple = model(random_images(), labels=targets(), return_dict=False)
    assert isinstance(as_tuple, tuple) and as_tuple[0].ndim == 0 and as_tuple[1].shape == (2, N)
    base = model.mltr(random_images())
    assert base.last_hidden_state.shape == (2, 4, 64)
    torch.testing.assert_close(base.pooler_output, base.last_hidden_state.mean(1))


def test_attention_weights_are_those_of_the_equations():
    model = make_model(window_size=4)
    with torch.no_grad():
        output = model(random_images(), output_hidden_states=True, output_attentions=True)
        pixel, cross = model.mltr.encoder.stages[0].layers[0].sublayers[:2]
        x = window_partition(output.reshaped_hidden_states[0].permute(0, 2, 3, 1), 4)
        q, k, _ = pixel.attn.qkv(pixel.norm(x)).flatten(0, 1).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 8**0.5 + pixel.attn.relative_position_bias()[0, 0]
        torch.testing.assert_close(output.attentions[0][:, 0], scores.softmax(-1), atol=1e-5, rtol=1e-5)
        x = cross.norm(pixel(x, None, False)[0]).permute(0, 3, 1, 2)
        q, k, _ = cross.attn.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(2, 3) / 4
        torch.testing.assert_close(output.cross_attentions[0], scores.softmax(-1), atol=1e-5, rtol=1e-5)


# ---- backbone


def test_backbone_gives_normalised_stage_maps():
    names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    backbone = make_model(MlTrBackbone, out_features=names[1:])
    assert backbone.channels == [8, 16, 32, 64] and backbone.out_features == names[1:]
    with torch.no_grad():
        output = backbone(random_images(2, 64, 48), output_hidden_states=True, output_attentions=True)
        for i in range(4):
            state = output.hidden_states[i + 1]
            assert state.shape == output.feature_maps[i].shape == (2, 8 * 2**i, 32 // 2**i, 24 // 2**i)
            norm = backbone.hidden_states_norms[names[i + 1]]
            torch.testing.assert_close(output.feature_maps[i].permute(0, 2, 3, 1), norm(state.permute(0, 2, 3, 1)))
        assert len(output.attentions) == 5 and backbone(random_images()).hidden_states is None
        some = make_model(MlTrBackbone, out_indices=[0, 2])
        assert some.out_features == ["stem", "stage2"]
        assert [tuple(x.shape) for x in some(random_images()).feature_maps] == [(2, 8, 16, 16), (2, 16, 8, 8)]
    assert make_model(MlTrBackbone).out_features == ["stage4"]


def test_backbone_trains_whole():
    backbone = make_model(MlTrBackbone, out_features=["stage1", "stage2", "stage3", "stage4"]).train()
    sum(x.square().sum() for x in backbone(random_images()).feature_maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_backbone_loads_from_the_classifier(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    names = ["stage1", "stage2", "stage3", "stage4"]
    backbone, info = MlTrBackbone.from_pretrained(tmp_path, out_features=names, output_loading_info=True)
    assert all(key.startswith("hidden_states_norms") for key in info["missing_keys"]) and not info["unexpected_keys"]
    with torch.no_grad():
        expected = model(random_images(), output_hidden_states=True).reshaped_hidden_states
        ours = backbone(random_images(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours, expected)
    assert type(AutoBackbone.from_config(make_config())) is MlTrBackbone


def hsvlt_on_mltr(**fields):
    backbone = make_config().to_dict()
    return HSVLTConfig(
        backbone_config=backbone, num_labels=N, label_embedding_dim=12, image_size=32, initializer_range=None, **fields
    )


def test_hsvlt_stands_on_mltr(tmp_path):
    torch.manual_seed(0)
    model = HSVLTForImageClassification(hsvlt_on_mltr()).train()
    output = model(random_images(), labels=targets(), output_hidden_states=True)
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 8 * 2**i, 16 // 2**i, 16 // 2**i) for i in range(4)]
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.backbone_config.model_type == "mltr"
    with torch.no_grad():
        assert_close_outputs(again(random_images()).logits, model(random_images()).logits)


def test_images_of_another_number_of_channels_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), but their shape is \(2, 1, 32, 32\)"):
        model(torch.randn(2, 1, 32, 32))


# ---- the common tests of transformers' models


@pytest.mark.parametrize("initializer_range", [0.02, None])
def test_missing_weights_are_initialised_not_garbage(initializer_range, tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_model(initializer_range=initializer_range, use_absolute_embeddings=True, embed_dim=32)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if key == "classifier.bias"}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = MlTrForImageClassification.from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        if name == "classifier.bias":
            assert torch.equal(parameter, model.classifier.bias)
        elif "norm" in name:
            assert (parameter == float(name.endswith("weight"))).all(), name
        elif "projection" in name or (initializer_range is None and "table" not in name and "position" not in name):
            layer = again.get_submodule(name.rpartition(".")[0])
            bound = layer.weight[0].numel() ** -0.5  # torch's default: uniform up to 1 / sqrt(fan in)
            assert 0.3 * bound < parameter.abs().max() <= bound, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert 0.01 < parameter.std() < 0.03 and parameter.abs().max() < 0.12, name
    for name, buffer in again.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_eight_images_are_learnt_by_heart_and_training_is_deterministic():
    torch.manual_seed(4)
    labels = (torch.rand(8, N) > 0.5).float()
    histories = []
    for steps in (60, 5):
        model = make_model(drop_path_rate=0.1, window_size=4).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        history = []
        for _ in range(steps):
            loss = model(random_images(8), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        histories.append(history)
        if steps == 60:
            with torch.no_grad():
                assert torch.equal(model.eval()(random_images(8)).logits > 0, labels > 0.5)
    assert_close_outputs(histories[0][:5], histories[1])


@pytest.mark.parametrize("window_size", [3, 4])
def test_a_gradient_is_there_for_every_parameter(window_size):
    # Distributed training waits for all of them; it needs no find_unused_parameters.
    model = make_model(window_size=window_size).train()
    model(random_images(), labels=targets()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    dead = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert dead == set()


def test_stochastic_depth():
    rates = [
        {sublayer.drop_path.drop_prob for sublayer in layer.sublayers}
        for stage in make_model(drop_path_rate=0.2).mltr.encoder.stages
        for layer in stage.layers
    ]
    for index, rate in enumerate(rates):  # linear over blocks, shared within one
        assert len(rate) == 1 and math.isclose(next(iter(rate)), 0.2 * index / 4)
    drop_path = MlTrDropPath(0.25).train()
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 3, 2))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))  # whole images
    assert abs(dropped.mean() - 1) < 0.03
    assert torch.equal(drop_path.eval()(dropped), dropped)


@pytest.mark.parametrize("kind", ["pixel", "cross", "mlp"])
def test_dropout_is_at_its_places_and_in_training_only(kind):
    x = torch.randn(1, 4, 9, 8)
    fields = [{"hidden_dropout_prob": 0.3}]
    if kind != "mlp":
        fields.append({f"{'cross_' * (kind == 'cross')}attention_probs_dropout_prob": 0.3})
    for field in fields:
        sublayer = make_model(block_pattern=[kind], **field).mltr.encoder.stages[0].layers[0].sublayers[0]
        with torch.no_grad():
            assert_close_outputs(sublayer(x, None, False)[0], sublayer(x, None, False)[0])
            sublayer.train()
            assert not close_outputs(sublayer(x, None, False)[0], sublayer(x, None, False)[0])
    embeddings = make_model(hidden_dropout_prob=0.3).train().mltr.embeddings
    assert (embeddings(random_images()) == 0).float().mean() > 0.2


@pytest.mark.slow  # minutes on a busy machine
def test_compiles_without_a_graph_break():
    model = make_model(depths=[1, 1, 1, 1])
    torch.compiler.reset()  # after some models it compiles no more
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(random_images()).logits, model(random_images()).logits, atol=1e-5, rtol=1e-5
        )
        model.mltr.encoder.stages[0].layers[0].sublayers[1].attn.qkv.weight.mul_(3)
        torch.testing.assert_close(
            compiled(random_images()).logits, model(random_images()).logits, atol=1e-5, rtol=1e-5
        )
    model.train()
    output, expected = (each(random_images(), labels=targets()) for each in (compiled, model))
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss)


def test_single_window_cross_can_be_left_out():
    model = make_model(skip_single_window_cross=True)
    kinds = [[sublayer.kind for sublayer in stage.layers[0].sublayers] for stage in model.mltr.encoder.stages]
    assert kinds == [["pixel", "cross", "mlp"]] * 3 + [["pixel", "mlp"]]
    with torch.no_grad():
        assert model(random_images()).logits.shape == (2, N)
