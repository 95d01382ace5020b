"""Additions to HSVLT; none of this is published HSVLT, and all of it is off by default.

Class-specific residual attention helps small data on a pretrained backbone; candidates bound the cost of many labels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .losses_multilabel import NOT_EVALUATED
from .modeling_multilabel import as_dtype_of, widened


class HSVLTCandidateScorer(nn.Module):
    """Scores every label from the pooled last feature map, cheaply, to choose the labels worth a closer look."""

    def __init__(self, hidden_size: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, num_labels)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to scores (B, num_labels)."""
        pooled = self.norm(as_dtype_of(self.norm, feature_map.mean((-2, -1))))
        return self.linear(as_dtype_of(self.linear, pooled))

    @staticmethod
    def choose(scores: torch.Tensor, number: int) -> torch.Tensor:
        """The labels (B, number) of the highest scores (B, N), ascending."""
        return scores.topk(number, dim=-1).indices.sort(dim=-1).values


def spread_candidates(logits: torch.Tensor, class_ids: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Logits (B, m) of the labels `class_ids` (B, m) among all N labels, with `NOT_EVALUATED` for the others."""
    everywhere = logits.new_full((len(logits), num_labels), NOT_EVALUATED)
    return everywhere.scatter(1, class_ids, logits)


class HSVLTResidualAttention(nn.Module):
    """Class-specific residual attention (CSRA: Zhu & Wu, ICCV 2021) on the last map.

    One linear classifier scores every pixel for every label, `s = LN(X) (W + W_text)^T + beta`. A label's logit is half
    the mean of its scores over the pixels and half their mean weighted by their own softmax: what is small in the
    image counts, and no query has to be learned. That is CSRA with `T = 1` and `lambda = 1`, halved, and with two
    differences: pixels are normalised and labels have a bias, and scores are not divided by the norm of the
    classifier's rows. `W_text` is not trained, and zero until
    `HSVLTForImageClassification.set_text_classifier` sets it; weight decay then pulls towards it.
    """

    def __init__(self, hidden_size: int, num_labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_labels))
        self.register_buffer("text_weight", torch.zeros(num_labels, hidden_size))

    def forward(self, feature_map: torch.Tensor, class_ids: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            feature_map (`torch.Tensor` of shape `(B, C, H, W)`).
            class_ids (`torch.LongTensor` of shape `(N,)` or `(B, N)`, *optional*): labels to score; None: all.

        Returns:
            `torch.Tensor` of shape `(B, N)`: logits.
        """
        one_set = class_ids is None or class_ids.ndim == 1  # for all images
        scores = self.pixel_scores(feature_map, class_ids if one_set else None)
        logits = (scores.mean(1) + (scores.softmax(1) * scores).sum(1)) / 2
        return logits if one_set else logits.gather(1, class_ids)

    def pixel_scores(self, feature_map: torch.Tensor, class_ids: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) -> scores `(B, H * W, N)`, at least fp32, of all labels or of those of `class_ids` `(N,)`."""
        weight, bias = self.weight + self.text_weight, self.bias
        if class_ids is not None:
            weight, bias = weight[class_ids], bias[class_ids]
        pixels = feature_map.flatten(2).transpose(1, 2)
        pixels = self.norm(as_dtype_of(self.norm, pixels))
        return widened(F.linear(as_dtype_of(self, pixels), weight, bias))

    @staticmethod
    def join(stream_logits: torch.Tensor, pixel_logits: torch.Tensor, pixel_share: float) -> torch.Tensor:
        """The sum of the label stream's logits (B, N) and those of the pixel scores, by the share of the latter."""
        stream_logits = widened(stream_logits)
        return torch.lerp(stream_logits, pixel_logits.to(stream_logits), pixel_share)


__all__ = ["HSVLTCandidateScorer", "HSVLTResidualAttention", "spread_candidates"]
