"""Heads that people put on a backbone for multi-label images, written from their papers, for comparison only."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class LinearHead(nn.Module):
    """Global average pooling and a linear layer.

    Args:
        text_classifier: add the buffer `text_weight`, fixed weights beside the learned ones, as HSVLT's residual
            attention has them.
    """

    def __init__(self, channels: int, num_labels: int, *, text_classifier: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, num_labels)
        self.register_buffer("text_weight", torch.zeros(num_labels, channels) if text_classifier else None)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> logits (B, num_labels)."""
        pooled = self.norm(feature_map.mean((-2, -1)))
        logits = self.linear(pooled)
        return logits if self.text_weight is None else logits + F.linear(pooled, self.text_weight)


class GroupWiseLinear(nn.Module):
    """A weight vector and bias a label (Query2Label): (B, N, D) -> (B, N)."""

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        bound = hidden_size**-0.5
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_labels).uniform_(-bound, bound))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (states * self.weight).sum(-1) + self.bias


def sine_position_embedding(height: int, width: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Two-dimensional sine embedding of DETR, (H * W, size)."""
    frequencies = 10000 ** (-torch.arange(0, size // 2, 2, device=like.device, dtype=torch.float32) / (size // 2))

    def axis(length):
        angles = (torch.arange(length, device=like.device) + 1) / length * 2 * math.pi
        angles = angles[:, None] * frequencies
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)  # (length, size / 2)

    rows, columns = axis(height)[:, None].expand(-1, width, -1), axis(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), -1).flatten(0, 1).to(like.dtype)


class Query2LabelHead(nn.Module):
    """Query2Label (Liu et al., 2021): learned label queries, one encoder and two decoder layers, group-wise linear.

    The paper's setting: as wide as the last feature map, feed-forward of four times that, 4 heads, sine positions.
    """

    def __init__(
        self,
        channels: int,
        num_labels: int,
        *,
        hidden_size: int | None = None,
        num_heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        hidden_size = hidden_size or channels
        self.projection = nn.Conv2d(channels, hidden_size, 1)
        self.queries = nn.Parameter(torch.randn(num_labels, hidden_size))
        layer = {"d_model": hidden_size, "nhead": num_heads, "dim_feedforward": 4 * hidden_size, "dropout": dropout}
        self.encoder = nn.TransformerEncoderLayer(**layer, batch_first=True)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer, batch_first=True), num_layers=2)
        self.classifier = GroupWiseLinear(num_labels, hidden_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        feature_map = self.projection(feature_map)
        position = sine_position_embedding(*feature_map.shape[-2:], feature_map.shape[1], feature_map)
        memory = self.encoder(feature_map.flatten(2).transpose(1, 2) + position)
        queries = self.queries.expand(len(feature_map), -1, -1)
        return self.classifier(self.decoder(queries, memory))


class MLDecoderLayer(nn.Module):
    """Decoder layer of ML-Decoder: no self-attention among the queries."""

    def __init__(self, hidden_size: int, num_heads: int, feed_forward: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(hidden_size, feed_forward), nn.Linear(feed_forward, hidden_size)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        queries = self.norm1(queries + self.dropout(queries))
        attended, _ = self.attention(queries, memory, memory, need_weights=False)
        queries = self.norm2(queries + self.dropout(attended))
        return self.norm3(queries + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(queries))))))


class MLDecoderHead(nn.Module):
    """ML-Decoder (Ridnik et al., 2021): fixed group queries, one decoder layer, group fully-connected pooling.

    The paper's setting: width 768, feed-forward 2,048, 8 heads, at most 100 groups.
    """

    def __init__(
        self,
        channels: int,
        num_labels: int,
        *,
        hidden_size: int = 768,
        num_heads: int = 8,
        feed_forward: int = 2048,
        num_groups: int = 100,
        dropout: float = 0.1,
    ):
        super().__init__()
        num_groups = min(num_groups, num_labels)
        self.num_labels = num_labels
        self.projection = nn.Linear(channels, hidden_size)
        self.register_buffer("queries", torch.randn(num_groups, hidden_size))  # not trained, as in the paper
        self.layer = MLDecoderLayer(hidden_size, num_heads, feed_forward, dropout)
        factor = -(-num_labels // num_groups)
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_groups, hidden_size, factor)))
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        memory = F.relu(self.projection(feature_map.flatten(2).transpose(1, 2)))
        states = self.layer(self.queries.expand(len(feature_map), -1, -1), memory)  # (B, groups, D)
        logits = torch.einsum("bgd,gdf->bgf", states, self.weight).flatten(1)
        return logits[:, : self.num_labels] + self.bias


HEADS = {"linear": LinearHead, "query2label": Query2LabelHead, "ml_decoder": MLDecoderHead}
