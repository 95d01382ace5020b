import pytest
import torch

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
    picture = torch.randn(1, 16, 3, 3)
    order = torch.tensor([2, 0, 3, 1])
    before = head(picture)
    with torch.no_grad():
        for parameter in (head.queries, head.classifier.weight, head.classifier.bias):
            parameter.copy_(parameter[order])
    torch.testing.assert_close(head(picture), before[:, order], atol=1e-5, rtol=1e-5)


def test_positions_differ_and_are_bounded():
    embedding = sine_position_embedding(3, 4, 16, torch.zeros(1))
    assert embedding.shape == (12, 16) and embedding.abs().max() <= 1
    assert torch.cdist(embedding, embedding).fill_diagonal_(1).min() > 1e-3
