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


class Query2LabelLayer(nn.Module):
    """Attention and feed-forward, each followed by a norm. Positions join queries and keys, never values.

    An encoder layer where states read themselves. A decoder layer where label queries read the pixels: the released
    code drops the decoder's self-attention unless told to keep it, so no label sees another.
    """

    def __init__(self, hidden_size: int, num_heads: int, dropout: float):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, states: torch.Tensor, position: torch.Tensor, memory: torch.Tensor, memory_position: torch.Tensor
    ) -> torch.Tensor:
        attended, _ = self.attention(states + position, memory + memory_position, memory, need_weights=False)
        states = self.norm1(states + self.dropout(attended))
        return self.norm2(states + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(states))))))


class Query2LabelHead(nn.Module):
    """Query2Label (Liu et al., 2021): learned label queries, one encoder and two decoder layers, group-wise linear.

    The paper's setting: as wide as the last feature map, feed-forward of four times that, 4 heads, sine positions;
    wired and started as the released code's defaults. The targets start at zero, and each decoder layer adds the label
    queries to them as their position. The mAP that its paper and code print is the interpolated one, `mAP_voc10` here.
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
        self.encoder = Query2LabelLayer(hidden_size, num_heads, dropout)
        self.decoder = nn.ModuleList(Query2LabelLayer(hidden_size, num_heads, dropout) for _ in range(2))
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = GroupWiseLinear(num_labels, hidden_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> logits (B, num_labels)."""
        feature_map = self.projection(feature_map)
        position = sine_position_embedding(*feature_map.shape[-2:], feature_map.shape[1], feature_map)  # (H * W, D)
        pixels = feature_map.flatten(2).transpose(1, 2)  # (B, H * W, D)
        memory = self.encoder(pixels, position, pixels, position)
        states = self.queries.new_zeros(len(memory), *self.queries.shape)  # (B, N, D)
        for layer in self.decoder:
            states = layer(states, self.queries, memory, position)
        return self.classifier(self.norm(states))


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
