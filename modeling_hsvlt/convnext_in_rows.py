"""A ConvNeXt block of transformers at inference on a CPU, some thousand pixels at a time."""

from functools import cache

import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from .modeling_multilabel import is_plain

# Numbers in the widest intermediate of a piece, 4 C a pixel: 6 MB in fp32, which stays in the cache of common CPUs.
PIECE_NUMEL = 1536 * 1024
# From so many pieces on, to lay out the weights for oneDNN once takes less than what each piece saves by it.
PACKS_FROM = 5
# oneDNN's linear layer with the activation in the same pass, which `torch.compile` writes into its graphs. torch
# promises nothing about it, so it is called only where it is what is known here.
_FUSED_LINEAR = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y",
    "mkldnn::_reorder_linear_weight(Tensor self, int? batch_size=None) -> Tensor Y",
)


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
    output = torch.empty_like(residual)
    rows = max(PIECE_NUMEL // (4 * channels), 1)
    pointwise = _fused_pointwise(layer, min(rows, len(tokens)), -(-len(tokens) // rows)) or _pointwise(layer)
    for piece, residual_piece, output_piece in zip(*(t.split(rows) for t in (tokens, residual, output)), strict=True):
        update = pointwise(layer.layernorm(piece))
        torch.addcmul(residual_piece, layer.layer_scale_parameter, update, out=output_piece)
    return output.view(shape).permute(0, 3, 1, 2)


def _pointwise(layer: ConvNextLayer):
    """The two pointwise layers and what is between them, on `(pixels, C)`."""
    return lambda tokens: layer.pwconv2(layer.act(layer.pwconv1(tokens)))


def _fused_pointwise(layer: ConvNextLayer, rows: int, pieces: int):
    """[`_pointwise`] by oneDNN, for `pieces` of at most so many rows; None where it does not have this."""
    expand, contract = layer.pwconv1, layer.pwconv2
    weights = [expand.weight, contract.weight]
    dtypes = {tensor.dtype for tensor in (layer.dwconv.weight, *weights, expand.bias, contract.bias)}
    if type(layer.act) is not GELUActivation or len(dtypes) > 1 or not has_fused_linear(*dtypes):
        return None
    if pieces >= PACKS_FROM:
        weights = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
    linear = torch.ops.mkldnn._linear_pointwise.default

    def pointwise(tokens: torch.Tensor) -> torch.Tensor:
        hidden = linear(tokens, weights[0], expand.bias, "gelu", [], "none")  # by erf, as GELUActivation
        return linear(hidden, weights[1], contract.bias, "none", [], "")

    return pointwise


def has_fused_linear(dtype: torch.dtype) -> bool:
    """Whether torch can compute a linear layer and its activation in one pass on this CPU, in this data type."""
    return torch.backends.mkldnn.enabled and dtype in _fused_dtypes()


@cache
def _fused_dtypes() -> tuple[torch.dtype, ...]:
    """The data types of [`has_fused_linear`]; the same for as long as a process runs."""
    if not torch.backends.mkldnn.is_available():
        return ()
    operations = (getattr(torch.ops.mkldnn, name, None) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    if tuple(str(getattr(each, "default", each)._schema) if each else "" for each in operations) != _FUSED_LINEAR:
        return ()
    if torch.ops.mkldnn._is_mkldnn_acl_supported():  # Arm's own library, where `torch.compile` leaves it out
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
