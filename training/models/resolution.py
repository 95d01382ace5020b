"""MlTr weights to another resolution.

Another resolution with the same window is exact but for the position embedding: every tensor stays, and there are more
windows. Another window is an approximation to start from, nothing that was published for MlTr: tables and operators
over a window's pixels are resized bicubically, see `resize_windows`.
"""

import re

import torch
import torch.nn.functional as F

from modeling_hsvlt import MlTrConfig, MlTrForImageClassification

from .state_dicts import StateDict


def resize_windows(state_dict: StateDict, source: MlTrConfig, target: MlTrConfig) -> StateDict:
    """Weights of an MlTr for the `image_size` and `window_size` of `target`, where all else is as in `source`.

    With windows of M pixels a side become M': a relative position table is resized from (2M - 1)^2 to (2M' - 1)^2
    offsets; each matrix of the cross-window attention, an operator from a window's pixels to a window's pixels, from
    (M, M, M, M) to (M', M', M', M') and times M^2 / M'^2, since it now sums over that many more pixels; queries also
    times M / M', which keeps their products with the keys, summed over more pixels and divided by M' in place of M.
    What varies little between neighbouring pixels thus keeps its effect. All bicubic.

    Args:
        state_dict: of `MlTrForImageClassification`, `MlTrModel` or `MlTrBackbone` with the configuration `source`.

    Returns:
        A new state dict with the shapes of `target`; tensors that need no change are those given.
    """
    resized = dict(state_dict)
    for name, tensor in state_dict.items():
        if name.endswith("position_embeddings"):
            size = target.grid_sizes[0]
            grid = tensor.unflatten(1, (source.grid_sizes[0],) * 2).permute(0, 3, 1, 2)
            resized[name] = _resize(grid, size).permute(0, 2, 3, 1).flatten(1, 2)
        match = re.search(r"stages\.(\d)\.layers\.\d+\.sublayers\.(\d+)\.attn\.(.+)", name)
        if match is None:
            continue
        stage, sublayer, part = int(match[1]), int(match[2]), match[3]
        old, new = source.window_sizes[stage], target.window_sizes[stage]
        if old == new:
            continue
        if part.endswith("relative_position_bias_table"):
            table = tensor.t().unflatten(1, (2 * old - 1,) * 2).unsqueeze(0)
            resized[name] = _resize(table, 2 * new - 1)[0].flatten(1).t().contiguous()
        elif source.stage_patterns[stage][sublayer] == "cross":
            layers = [_resize_operator(layer, old, new) for layer in tensor.chunk(3 if part.startswith("qkv") else 1)]
            if part.startswith("qkv"):
                layers[0] = layers[0] * (old / new)
            resized[name] = torch.cat(layers)
    return resized


def resize_model(
    model: MlTrForImageClassification, image_size: int | None = None, window_size: int | None = None
) -> MlTrForImageClassification:
    """The model for another image size or window, by [`resize_windows`]; None keeps what it has."""
    sizes = {
        "image_size": image_size or model.config.image_size,
        "window_size": window_size or model.config.window_size,
    }
    target = MlTrForImageClassification(MlTrConfig.from_dict({**model.config.to_dict(), **sizes}))
    target.load_state_dict(resize_windows(model.state_dict(), model.config, target.config))
    return target


def _resize(maps: torch.Tensor, size: int) -> torch.Tensor:
    """(batch, channels, M, M) to (batch, channels, size, size)."""
    if maps.shape[-1] == size:
        return maps
    return F.interpolate(maps.float(), size=(size, size), mode="bicubic", align_corners=False).to(maps.dtype)


def _resize_operator(layer: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Weight (M^2, M^2) or bias (M^2,) of a linear layer over a window's pixels, to M'^2 of them."""
    if layer.ndim == 2:  # the input's pixels first
        layer = _resize(layer.unflatten(1, (old, old)).unsqueeze(0), new)[0].flatten(1) * (old / new) ** 2
    outputs = layer.reshape(old, old, -1).permute(2, 0, 1).unsqueeze(0)  # (1, M'^2 or 1, M, M)
    return _resize(outputs, new)[0].flatten(1).t().reshape(new**2, *layer.shape[1:]).contiguous()
