"""A ConvNeXt block of transformers at inference on a CPU, some thousand pixels at a time."""

import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from .modeling_multilabel import is_plain

# Numbers in the widest intermediate of a piece, 4 C a pixel: 3 MB in fp32, which stays in the cache of common CPUs.
PIECE_NUMEL = 768 * 1024


def runs_in_rows(layer: nn.Module, hidden_state: torch.Tensor) -> bool:
    """Whether [`convnext_layer_in_rows`] may stand in for `layer(hidden_state)`: on a CPU, at inference, and for
    transformers' own layer with nothing on it or on its parts, whose calls it leaves out or does piece by piece.
    """
    return (
        type(layer) is ConvNextLayer  # ConvNeXtV2's response normalisation needs all pixels of an image at once
        and hidden_state.device.type == "cpu"
        and layer.layer_scale_parameter is not None
        and not (layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        and not torch.is_autocast_enabled("cpu")
        and is_plain(*layer.modules())
    )


def convnext_layer_in_rows(layer: ConvNextLayer, hidden_state: torch.Tensor) -> torch.Tensor:
    """`layer(hidden_state)`, with everything after the depthwise convolution done piece by piece.

    The tokens between the two pointwise layers are four times as wide as the map. For whole maps they go out to memory
    and back between one operation and the next; those of some thousand pixels stay in the cache.

    Args:
        layer (`ConvNextLayer`): a block in eval mode.
        hidden_state (`torch.Tensor` of shape `(B, C, H, W)`): its input, best channels last in memory.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, channels last in memory, equal to the block's own up to rounding.
    """
    tokens = layer.dwconv(hidden_state).permute(0, 2, 3, 1)  # (B, H, W, C)
    shape, channels = tokens.shape, tokens.shape[-1]
    tokens = tokens.reshape(-1, channels)
    residual = hidden_state.permute(0, 2, 3, 1).reshape(-1, channels)
    rows = max(PIECE_NUMEL // (4 * channels), 1)
    expand, contract = layer.pwconv1, layer.pwconv2
    # Every piece is written where the one before it was, or to its place: fresh memory costs some 2 % of the model.
    wide = tokens.new_empty(min(rows, len(tokens)), expand.out_features)
    output = torch.empty_like(residual)
    for piece, residual_piece, output_piece in zip(*(t.split(rows) for t in (tokens, residual, output)), strict=True):
        hidden = torch.addmm(expand.bias, layer.layernorm(piece), expand.weight.T, out=wide[: len(piece)])
        hidden = torch.ops.aten.gelu_(hidden) if type(layer.act) is GELUActivation else layer.act(hidden)
        torch.addmm(contract.bias, hidden, contract.weight.T, out=output_piece)
        torch.addcmul(residual_piece, layer.layer_scale_parameter, output_piece, out=output_piece)
    return output.view(shape).permute(0, 3, 1, 2)
