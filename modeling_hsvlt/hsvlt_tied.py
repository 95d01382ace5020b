"""A label stream tied to its classifier, for small data on a pretrained backbone; not published."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_multilabel import as_dtype_of, widened


class HSVLTTiedLabelStream(nn.Module):
    """A label stream without projections and gates: a label's token is its row of the classifier, `w`, and so is its
    query.

    The maps of the four stages are layer-normalised and, averaged to the grid of the last one, put side by side: a
    pixel x has K channels, the sum of the stages'. A label attends by the scores that its classifier gives the pixels,
    `A = softmax(x w)`, and reads the mean of the pixels and what it attends to, `M = (mean(x) + A x) / 2`; its logit is
    `w M + b`. With `w = 0`, as it starts, attention is uniform and this is a linear classifier of the mean pixel. On
    one map it would be class-specific residual attention; here one attention runs over all scales.
    """

    def __init__(self, channels: list[int], depths: list[int]):
        super().__init__()
        self.widths, self.depths, self.in_size = list(channels), list(depths), sum(channels)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels)

    def forward(
        self,
        label_states: torch.Tensor,
        feature_maps: Iterable[torch.Tensor],
        update_all: bool = False,
        output_attentions: bool = False,
    ) -> tuple[list[torch.Tensor], ...]:
        """As `HSVLTLabelStream`, of label tokens `(N, K)` or `(B, N, K)`; each stage is read after its last block. The
        attention `(B, 1, N, H, W)` is the same for all stages, on the grid of the last one."""
        feature_maps = iter(feature_maps)
        visual = [[next(feature_maps) for _ in range(depth)][-1] for depth in self.depths]
        grid, pixels = visual[-1].shape[-2:], []
        for norm, feature_map in zip(self.norms, visual, strict=True):
            normed = norm(as_dtype_of(norm, feature_map.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            pixels.append(F.adaptive_avg_pool2d(normed, grid).flatten(2).transpose(1, 2))
        columns = torch.cat(pixels, dim=-1)  # (B, P, K)
        queries = label_states.to(columns.dtype)
        attention = widened(columns @ queries.transpose(-1, -2)).softmax(1).transpose(1, 2)  # (B, N, P)
        shown = attention.unsqueeze(1).unflatten(-1, grid)
        attention = shown.flatten(3).squeeze(1)  # what is returned is what is used: a gradient can be read at it
        states = (columns.mean(1, keepdim=True) + attention.to(columns.dtype) @ columns) / 2  # (B, N, K)
        labels = label_states if label_states.ndim == 3 else label_states.unsqueeze(0)
        parts = [tensor.split(self.widths, dim=-1) for tensor in (labels, states)]
        return visual, *(list(part) for part in parts), [shown if output_attentions else None] * len(visual)


class HSVLTTiedClassifier(nn.Module):
    """A weight vector and a bias a label, `logit[b, c] = sum_k M[b, c, k] W[c, k] + beta[c]`, whose rows are the tokens
    of [`HSVLTTiedLabelStream`]. `text_weight` is added to the channels of the last stage: it is not trained, and zero
    until `HSVLTForImageClassification.set_text_classifier` sets it; weight decay then pulls towards it."""

    def __init__(self, num_labels: int, hidden_size: int, last: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.register_buffer("text_weight", torch.zeros(num_labels, last))

    def forward(self, features: torch.Tensor | None = None, label_ids: torch.Tensor | None = None) -> torch.Tensor:
        """As `HSVLTPerLabelClassifier`. Without features, the rows `(num_labels, K)`: whatever places modules on
        devices sees a call, not a reading."""
        rows = self.weight + F.pad(self.text_weight, (self.weight.shape[1] - self.text_weight.shape[1], 0))
        if features is None:
            return rows
        rows, bias = (rows, self.bias) if label_ids is None else (rows[label_ids], self.bias[label_ids])
        return (features * rows).sum(-1) + bias
