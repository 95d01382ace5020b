import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers.heads import HEADS, MLDecoderHead, Query2LabelHead, sine_position_embedding


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize("num_labels", [3, 130])
def test_every_head_scores_every_label_and_trains(name, num_labels):
    head = HEADS[name](16, num_labels)
    logits = head(torch.randn(2, 16, 4, 5))
    assert logits.shape == (2, num_labels)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_group_pooling_by_hand():
    head = MLDecoderHead(8, 5, hidden_size=16, num_heads=2, feed_forward=32, num_groups=2).eval()
    states = torch.randn(1, 2, 16)
    head.layer.forward = lambda queries, memory: states
    expected = []
    for label in range(5):  # three labels a group: 0-2 in the first, 3-4 in the second
        group, place = divmod(label, 3)
        expected.append(states[0, group] @ head.weight[group, :, place] + head.bias[label])
    torch.testing.assert_close(head(torch.randn(1, 8, 2, 2))[0], torch.stack(expected))


def test_ml_decoder_has_the_paper_s_size():
    """Width 768, one layer: attention 4 x 768^2, feed-forward 2 x 768 x 2048, norms, embedding, group pooling."""
    head = MLDecoderHead(2048, 80)
    attention = 4 * 768 * 768 + 4 * 768
    feed_forward = 2 * 768 * 2048 + 768 + 2048
    expected = 2048 * 768 + 768 + attention + feed_forward + 3 * 2 * 768 + 80 * 768 + 80
    assert sum(p.numel() for p in head.parameters()) == expected
    assert not any(name == "queries" for name, _ in head.named_parameters())


def test_query2label_queries_are_label_embeddings():
    head = Query2LabelHead(16, 4, dropout=0.0)
    image = torch.randn(1, 16, 3, 3)
    order = torch.tensor([2, 0, 3, 1])
    before = head(image)
    with torch.no_grad():
        for parameter in (head.queries, head.classifier.weight, head.classifier.bias):
            parameter.copy_(parameter[order])
    torch.testing.assert_close(head(image), before[:, order], atol=1e-5, rtol=1e-5)


def query2label_by_hand(weights, feature_map, num_heads):
    """The released decoder's default wiring, one image, head by head, from the state dict alone."""
    channels, (height, width) = weights["projection.weight"].shape[0], feature_map.shape[-2:]

    def affine(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(name, query, key, value):
        maps, biases = (weights[f"{name}.in_proj_{kind}"].chunk(3) for kind in ("weight", "bias"))
        q, k, v = (x @ w.T + b for x, w, b in zip((query, key, value), maps, biases, strict=True))
        size, heads = channels // num_heads, []
        for part in (slice(i * size, (i + 1) * size) for i in range(num_heads)):
            heads.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1) @ v[:, part])
        return affine(f"{name}.out_proj", torch.cat(heads, -1))

    def feed_forward(name, x):
        x = norm(f"{name}.norm1", x)
        return norm(f"{name}.norm2", x + affine(f"{name}.linear2", F.relu(affine(f"{name}.linear1", x))))

    position = torch.zeros(height, width, channels)  # DETR's: rows in the first half, columns in the second
    for y in range(height):
        for x in range(width):
            for i in range(channels // 2):
                frequency = 10000 ** (2 * (i // 2) / (channels // 2))
                wave = math.cos if i % 2 else math.sin
                position[y, x, i] = wave((y + 1) / (height + 1e-6) * 2 * math.pi / frequency)
                position[y, x, channels // 2 + i] = wave((x + 1) / (width + 1e-6) * 2 * math.pi / frequency)
    position = position.flatten(0, 1)
    memory = torch.einsum("chw,dc->hwd", feature_map, weights["projection.weight"][:, :, 0, 0]).flatten(0, 1)
    memory = memory + weights["projection.bias"]
    attended = attend("encoder.attention", memory + position, memory + position, memory)
    memory = feed_forward("encoder", memory + attended)
    states = torch.zeros_like(weights["queries"])
    for layer in ("decoder.0", "decoder.1"):
        attended = attend(f"{layer}.attention", states + weights["queries"], memory + position, memory)
        states = feed_forward(layer, states + attended)
    states = norm("norm", states)
    return (states * weights["classifier.weight"]).sum(-1) + weights["classifier.bias"]


def test_query2label_by_hand():
    head = Query2LabelHead(12, 5, hidden_size=16, num_heads=4).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # no norm or bias that does nothing
    feature_map = torch.randn(2, 12, 3, 5)
    with torch.no_grad():
        expected = torch.stack([query2label_by_hand(head.state_dict(), each, 4) for each in feature_map])
        torch.testing.assert_close(head(feature_map), expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())


def test_query2label_starts_xavier_uniform():
    head = Query2LabelHead(64, 3)
    for layer in (head.encoder, *head.decoder):
        for weight in (layer.attention.in_proj_weight, layer.linear1.weight, layer.linear2.weight):
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.98 * bound < weight.abs().max() <= bound


def test_positions_differ_and_are_bounded():
    embedding = sine_position_embedding(3, 4, 16, torch.zeros(1))
    assert embedding.shape == (12, 16) and embedding.abs().max() <= 1
    assert torch.cdist(embedding, embedding).fill_diagonal_(1).min() > 1e-3
