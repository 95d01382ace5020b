"""Fewer labels for HSVLT's label stream, not published: candidates that a scorer chooses at inference, and labels that
are drawn at random in training."""

from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_hsvlt import HSVLTConfig
from .modeling_multilabel import as_dtype_of, no_fp16_autocast, widened

CANDIDATE_WIDTH = 64  # of what a place and a label are compared by
CANDIDATE_PLACES = 256  # that are compared with every label, at most


def on_grid(kind: str, maps: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Maps (B, C, H, W) on another grid: on a finer one by their nearest values, on a coarser one by adaptive pooling
    of a `kind` ("avg" or "max"), in its plain form, which every exporter knows, where the sides divide."""
    sides = [(int(side), int(new)) for side, new in zip(maps.shape[2:], size, strict=True)]
    if any(side < new for side, new in sides):
        return F.interpolate(maps, size)
    if all(side % new == 0 for side, new in sides):
        return getattr(F, f"{kind}_pool2d")(maps, [side // new for side, new in sides])
    return getattr(F, f"adaptive_{kind}_pool2d")(maps, size)


class HSVLTCandidateBlock(nn.Module):
    """A narrow ConvNeXt block: `X + U GELU(V LN(depthwise 3 x 3 convolution of X))`, with X of shape (B, C, H, W)."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        update = self.norm(self.depthwise(places).permute(0, 2, 3, 1))
        return places + self.narrow(F.gelu(self.wide(update))).permute(0, 3, 1, 2)


class HSVLTCandidateScorer(nn.Module):
    """Scores every label cheaply, to choose those that the label stream reads.

    Each pixel of the last map of each stage becomes `GELU(A_i LN(X_i))`, averaged onto the grid of the third map. There
    they go, side by side, through a linear layer, two convolutional blocks and a norm. Where that are more than 256
    places, the largest values of each cell of the last map's grid stand for those in it. A label has a vector of its
    own or, where the classifier is shared, a linear map of its text embedding; its score is the largest product of that
    with a place's, and a bias, which starts as if one label were there.

    It learns by itself: no gradient goes from it into the maps or the embeddings, so that all else learns as it would
    without it.
    """

    def __init__(self, config: HSVLTConfig, backbone: nn.Module):
        super().__init__()
        self.config, self.shared = config, config.classifier == "shared"
        # Of the maps that the backbone gives, one an interaction, the last of each stage.
        self.ends = [0] if config.pyramid != "none" else [end - 1 for end in accumulate(backbone.interaction_depths)]
        channels, width = backbone.channels[-len(self.ends) :], CANDIDATE_WIDTH
        # Random numbers drawn for these weights would be missing elsewhere, and all else start otherwise.
        with torch.random.fork_rng(devices=[]):
            self.pixels = nn.ModuleList(nn.Sequential(nn.LayerNorm(each), nn.Linear(each, width)) for each in channels)
            self.join = nn.Linear(len(channels) * width, width)
            self.blocks = nn.Sequential(HSVLTCandidateBlock(width), HSVLTCandidateBlock(width))
            self.norm = nn.LayerNorm(width)
            self.text = nn.Linear(config.label_embedding_dim, width, bias=False) if self.shared else None
        for layer in self.modules():
            layer.starts_as_in_torch = True
        self.weight = None if self.shared else nn.Parameter(torch.empty(config.num_labels, width))
        self.bias = nn.Parameter(torch.empty(1 if self.shared else config.num_labels))

    def forward(self, feature_maps: list[torch.Tensor], text_embeddings: torch.Tensor) -> torch.Tensor:
        """
        Args:
            feature_maps (`list` of tensors `(B, C_i, H_i, W_i)`): what the backbone gives.
            text_embeddings (`torch.Tensor` of shape `(N, D)`): of the labels.

        Returns:
            `torch.Tensor` of shape `(B, N)`: scores, at least fp32.
        """
        maps = [feature_maps[end].detach().permute(0, 2, 3, 1) for end in self.ends]
        with no_fp16_autocast(text_embeddings):
            pixels = [F.gelu(layer(as_dtype_of(layer[0], each))) for layer, each in zip(self.pixels, maps, strict=True)]
            grid, coarse = (each.shape[1:3] for each in (maps[-2:][0], maps[-1]))
            places = [on_grid("avg", each.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1) for each in pixels]
            places = self.blocks(self.join(torch.cat(places, dim=-1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            places = self.norm(places).permute(0, 3, 1, 2)
            if grid.numel() > CANDIDATE_PLACES:
                places = on_grid("max", places, coarse)
            places = places.flatten(2).transpose(1, 2)
            labels = self.weight
            if self.text is not None:
                labels = self.text(as_dtype_of(self.text, text_embeddings.detach()))
            return widened((places @ labels.to(places).T).amax(1)) + self.bias

    def choose(self, scores: torch.Tensor) -> torch.Tensor | None:
        """The labels (B, m) of the highest scores (B, N), ascending; None for all."""
        number = self.config.candidate_labels
        if number is None or number >= scores.shape[-1]:
            return None
        return scores.topk(number, dim=-1).indices.sort(dim=-1).values


def draw_labels(labels: torch.Tensor, number: int) -> torch.Tensor:
    """Of the labels (B, N) of a batch, those that a training step reads: all that are in one of its images, and
    `number` of the others at random.

    Returns:
        `torch.Tensor` of shape `(N,)`, fp32: by what the loss of each label is multiplied, so that its expectation is
        that of all: 1 for a label that is there, 0 for one that was not drawn.
    """
    present = (labels > 0).any(0)
    others = (~present).nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others), device=labels.device)[:number]]
    return present.float().index_fill(0, drawn, len(others) / max(len(drawn), 1))


def kept(feature_maps: Iterable[torch.Tensor], into: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The same maps, one by one, each put into a list: taken ahead of their readers, their gradients would be summed in
    another order."""
    for feature_map in feature_maps:
        into.append(feature_map)
        yield feature_map
