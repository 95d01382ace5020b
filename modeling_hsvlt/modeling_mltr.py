"""PyTorch MlTr: a four-stage transformer that attends within windows of pixels and across windows.

MlTr: Multi-label Classification with Transformer (ICME 2022, arXiv 2106.06195). MlTr, reconstructed; layout inferred
from the published parameter counts: no code was released. The two attentions are those of CAT (arXiv 2106.05786), to
which the author points; the blocks and their number are this reconstruction's. CAT's code, where CAT is named below:
https://github.com/linhezheng19/CAT/blob/be2fa1ced642c61d7b6de10b3ab4ebe5164bd803/src/cat.py

Shapes: B images, H x W pixels of a stage's map, C channels, windows of M x M pixels, P = M * M, n windows an image,
h heads, d = C / h. The residual stream of a stage is kept in windows, (B, n, P, C): no window is shifted, so one
partition serves all blocks of the stage; norms and MLPs act on each pixel alone and do not care.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_mltr import MlTrConfig
from .modeling_multilabel import (
    MultiLabelPreTrainedModel,
    as_dtype_of,
    chosen_states,
    eager_attention_forward,
    init_linear,
    is_plain,
    require_images,
    warn_of_unknown_arguments,
)

# Not used here: a checkpoint carries the files that its modeling file imports, and the pipeline must be among them.
from .pipeline_multilabel import MultiLabelImageClassificationPipeline  # noqa: F401

# CUDA attention kernels take at most this many in the batch slot (pytorch issue 142228).
MAX_ATTENTION_BATCH = 65535
# Up to this many windows (all sizes at the published resolutions) plain products are faster than the fused kernel, see
# benchmarks/cost/cross_window.py; beyond, the (B, C, n, n) weights of a large image would not fit into memory.
MAX_PLAIN_WINDOWS = 64


@dataclass
class MlTrModelOutput(ModelOutput):
    """Output of [`MlTrModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, H_4 * W_4, C_4)`): normalised pixels of the last stage.
        pooler_output (`torch.FloatTensor` of shape `(B, C_4)`): their mean.
        hidden_states (`tuple` of five tensors of shape `(B, H_i * W_i, C_i)`): the embeddings and the output of each
            stage; with `output_hidden_states=True`.
        reshaped_hidden_states (`tuple` of five tensors of shape `(B, C_i, H_i, W_i)`): the same as maps.
        attentions (`tuple` of tensors of shape `(B * n, h, P, P)`): pixel attention of each block; with
            `output_attentions=True`.
        cross_attentions (`tuple` of tensors of shape `(B, C, n, n)`): cross-window attention of each block; likewise.
    """

    last_hidden_state: torch.FloatTensor | None = None
    pooler_output: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MlTrImageClassifierOutput(ModelOutput):
    """Output of [`MlTrForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, fp32): with `labels`.
        logits (`torch.FloatTensor` of shape `(B, num_labels)`): one score a label; its sigmoid is the probability.
        hidden_states, reshaped_hidden_states, attentions, cross_attentions: see [`MlTrModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    reshaped_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    cross_attentions: tuple[torch.FloatTensor, ...] | None = None


def window_partition(hidden_states: torch.Tensor, window_size: int) -> torch.Tensor:
    """A map (B, H, W, C), H and W multiples of M, as its windows (B, n, P, C); both row by row."""
    batch, height, width, channels = hidden_states.shape
    windows = hidden_states.view(
        batch, height // window_size, window_size, width // window_size, window_size, channels
    ).transpose(2, 3)
    return windows.reshape(batch, -1, window_size * window_size, channels)


def window_unpartition(windows: torch.Tensor, window_size: int, height: int, width: int) -> torch.Tensor:
    """Inverse of [`window_partition`]: (B, n, P, C) as the map (B, H, W, C)."""
    batch, _, _, channels = windows.shape
    hidden_states = windows.view(
        batch, height // window_size, width // window_size, window_size, window_size, channels
    ).transpose(2, 3)
    return hidden_states.reshape(batch, height, width, channels)


class MlTrPatchEmbeddings(nn.Module):
    """Patches of the image, each one linear map to a pixel of the first stage's map; they overlap where the kernel is
    wider than a patch.
    """

    def __init__(self, config: MlTrConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_channels = config.num_channels
        kernel_size = config.stem_kernel_size or config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels,
            config.embed_dim,
            kernel_size,
            stride=config.patch_size,
            padding=(kernel_size - config.patch_size + 1) // 2,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width), padded with zeros to whole patches, to (B, H, W, C)."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch, {self.num_channels}, height, width), but their shape is "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[-2:]
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if bottom or right:
            pixel_values = F.pad(pixel_values, (0, right, 0, bottom))
        # In this layout the permute below is a view.
        pixel_values = as_dtype_of(self.projection, pixel_values).contiguous(memory_format=torch.channels_last)
        return self.projection(pixel_values).permute(0, 2, 3, 1)


class MlTrEmbeddings(nn.Module):
    """Patches, their norm and, where configured, a learned absolute position embedding."""

    def __init__(self, config: MlTrConfig):
        super().__init__()
        self.patch_embeddings = MlTrPatchEmbeddings(config)
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.grid_size = config.grid_sizes[0]
        self.position_embeddings = None
        if config.use_absolute_embeddings:
            self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid_size**2, config.embed_dim))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, channels, height, width) to (B, H, W, C)."""
        hidden_states = self.norm(self.patch_embeddings(pixel_values))
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.interpolate_pos_encoding(*hidden_states.shape[1:3])
        return self.dropout(hidden_states)

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings (1, H, W, C), bicubically resized for a map other than that of `image_size`."""
        positions = self.position_embeddings.unflatten(1, (self.grid_size, self.grid_size))
        if (height, width) == (self.grid_size, self.grid_size):
            return positions
        positions = positions.permute(0, 3, 1, 2).float()
        positions = F.interpolate(positions, size=(height, width), mode="bicubic", align_corners=False)
        return positions.permute(0, 2, 3, 1).to(self.position_embeddings.dtype)


class MlTrPositionConvolution(nn.Conv2d):
    """Adds to each pixel a depthwise convolution around it (conditional position encoding, arXiv 2102.10882)."""

    def __init__(self, hidden_size: int, kernel_size: int):
        super().__init__(hidden_size, hidden_size, kernel_size, padding=kernel_size // 2, groups=hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) to the same shape; zeros around the map."""
        return hidden_states + super().forward(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MlTrPatchMerging(nn.Module):
    """Halves the map: each 2 x 2 pixels side by side, normalised, to one of twice the channels."""

    def __init__(self, config: MlTrConfig, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * hidden_size, eps=config.layer_norm_eps)
        self.reduction = nn.Linear(4 * hidden_size, 2 * hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C), padded with zeros to even sides, to (B, H/2, W/2, 2C)."""
        height, width = hidden_states.shape[1:3]
        if height % 2 or width % 2:
            hidden_states = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))
        neighbours = [hidden_states[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, dim=-1)))


class MlTrDropPath(nn.Module):
    """Stochastic depth: in training, drops a branch for whole images and scales it up for the others."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep_prob).div_(keep_prob)


class MlTrRelativePositionBias(nn.Module):
    """A learned bias a head for each offset between two pixels of a window.

    `bias[h, a, b] = table[(row_a - row_b + M - 1) (2M - 1) + column_a - column_b + M - 1, h]`.
    """

    def __init__(self, num_heads: int, window_size: int):
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        index = self.create_index().to(torch.empty(()).device)  # the meta device's, while loading
        self.register_buffer("relative_position_index", index, persistent=False)

    def create_index(self) -> torch.Tensor:
        """Row of the table for each pair of pixels, (P * P,)."""
        side = torch.arange(self.window_size, device="cpu")
        rows, columns = (grid.flatten() for grid in torch.meshgrid(side, side, indexing="ij"))
        rows, columns = (axis[:, None] - axis[None, :] + self.window_size - 1 for axis in (rows, columns))
        return (rows * (2 * self.window_size - 1) + columns).flatten()

    def forward(self) -> torch.Tensor:
        """(1, h, P, P)."""
        # Transposing the small table first leaves nothing to transpose after the gather.
        bias = self.relative_position_bias_table.t().index_select(1, self.relative_position_index)
        return bias.view(1, -1, self.window_size**2, self.window_size**2)


class MlTrPixelAttention(nn.Module):
    """Multi-head self-attention of the pixels within each window (CAT, IPSA): `softmax(Q K^T / sqrt(d) + bias) V`."""

    is_causal = False

    def __init__(self, config: MlTrConfig, hidden_size: int, num_heads: int, window_size: int):
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.relative_position_bias = None
        if config.use_relative_position_bias:
            self.relative_position_bias = MlTrRelativePositionBias(num_heads, window_size)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, n, P, C)`): normalised pixels in windows.

        Returns:
            `(B, n, P, C)` and, where asked for, the attention `(B * n, h, P, P)`.
        """
        batch, num_windows, num_pixels, channels = hidden_states.shape
        qkv = self.qkv(hidden_states).view(-1, num_pixels, 3, self.num_heads, self.head_dim)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B * n, h, P, d)
        bias = None if self.relative_position_bias is None else self.relative_position_bias().to(qkv.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        # Other kernels do not return their weights, and an exporter may not know them (torch's ONNX one, sdpa's views).
        if output_attentions or torch.compiler.is_exporting():
            attend = eager_attention_forward
        dropout = self.attention_dropout if self.training else 0.0
        # An exported graph would be tied to one number of chunks, so to few images.
        chunks = [qkv] if torch.compiler.is_exporting() else qkv.split(MAX_ATTENTION_BATCH, dim=1)
        outputs = [attend(self, *chunk.unbind(0), bias, scaling=self.scaling, dropout=dropout) for chunk in chunks]
        context = outputs[0][0] if len(outputs) == 1 else torch.cat([output for output, _ in outputs])
        weights = None
        if output_attentions:
            weights = outputs[0][1] if len(outputs) == 1 else torch.cat([weights for _, weights in outputs])
        return self.proj(context.reshape(batch, num_windows, num_pixels, channels)), weights


class MlTrCrossWindowAttention(nn.Module):
    """Self-attention of the windows of each channel, with weights shared by all channels (CAT, CPSA).

    A token is one window of one channel, its P features are the window's pixel values: with `U` (B, C, n, P),
    `softmax(U Wq (U Wk)^T / M) U Wv Wo` with one head of width P and no position bias.

    Computed with the weights folded, exactly and with the same gradients: `softmax((U A + a) U^T) U Wvo + c`, where
    `A = Wq Wk^T / M`, `a = bq Wk^T / M`, `Wvo = Wv Wo`, `c = bv Wo + bo`. What the key's bias adds is the same for all
    windows and drops out of the softmax. That is two products with a P x P matrix in place of four, for which the small
    matrices are formed anew each time: that costs P^3, what is saved is B n C P^2, and nothing can go stale. A single
    window attends to itself alone, which leaves `U Wvo + c`; the queries' and keys' part of the fused projection then
    has a gradient of zero, not none, so distributed training needs no special care.
    """

    is_causal = False

    def __init__(self, config: MlTrConfig, window_size: int):
        super().__init__()
        self.config = config
        num_pixels = window_size**2
        self.scaling = num_pixels**-0.5
        self.attention_dropout = config.cross_attention_probs_dropout_prob
        self.qkv = nn.Linear(num_pixels, 3 * num_pixels, bias=config.qkv_bias)
        self.proj = nn.Linear(num_pixels, num_pixels)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, n, P, C)`): normalised pixels in windows.

        Returns:
            `(B, n, P, C)` and, where asked for, the attention `(B, C, n, n)`.
        """
        if not self._folds():
            return self._projected(hidden_states, output_attentions)
        weight_q, weight_k, weight_v = self.qkv.weight.chunk(3)  # of linear layers: (out, in)
        value_weight, value_bias = self.proj.weight @ weight_v, self.proj.bias
        if self.qkv.bias is not None:
            value_bias = torch.mv(self.proj.weight, self.qkv.bias.chunk(3)[2]) + value_bias
        if hidden_states.shape[1] == 1 and not output_attentions:
            return value_weight @ hidden_states + value_bias.unsqueeze(-1), None

        query_weight = weight_k.t() @ weight_q * self.scaling
        # Under autocast the norm gives fp32 and the line above does not: cast once, in the copy that is made anyway.
        windows = hidden_states.permute(0, 3, 1, 2)  # (B, C, n, P)
        windows = windows.to(query_weight.dtype, memory_format=torch.contiguous_format)
        query_bias = None
        if self.qkv.bias is not None:
            query_bias = torch.mv(weight_k.t(), self.qkv.bias.chunk(3)[0]) * self.scaling
        query = F.linear(windows, query_weight, query_bias)
        context, weights = self._attend(query, windows, windows, 1.0, output_attentions)
        return F.linear(context, value_weight, value_bias).permute(0, 2, 3, 1), weights

    def _folds(self) -> bool:
        # Dropped probabilities do not sum to 1, so the value's bias could not be moved past them.
        return is_plain(self.qkv, self.proj) and not (self.training and self.attention_dropout > 0)

    def _projected(self, hidden_states, output_attentions):
        query, key, value = self.qkv(hidden_states.permute(0, 3, 1, 2)).chunk(3, dim=-1)  # (B, C, n, P) each
        context, weights = self._attend(query, key, value, self.scaling, output_attentions)
        return self.proj(context).permute(0, 2, 3, 1), weights

    def _attend(self, query, key, value, scaling, output_attentions):
        """(B, C, n, P): channels are in the slot of the heads, for B * C is too many for the batch slot of CUDA
        kernels."""
        attend = eager_attention_forward
        if query.shape[2] > MAX_PLAIN_WINDOWS and not output_attentions:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(self, query, key, value, None, scaling=scaling, dropout=dropout)
        return context.transpose(1, 2), weights if output_attentions else None


class MlTrMLP(nn.Module):
    def __init__(self, config: MlTrConfig, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(config.mlp_ratio * hidden_size))
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(int(config.mlp_ratio * hidden_size), hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class MlTrSublayer(nn.Module):
    """One residual branch of a block: `x + DropPath(f(LN(x)))`, `f` an attention or the MLP."""

    def __init__(self, config: MlTrConfig, kind: str, stage: int, drop_path_rate: float):
        super().__init__()
        self.kind = kind
        hidden_size, window_size = config.hidden_sizes[stage], config.window_sizes[stage]
        self.norm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        if kind == "pixel":
            self.attn = MlTrPixelAttention(config, hidden_size, config.num_heads[stage], window_size)
        elif kind == "cross":
            self.attn = MlTrCrossWindowAttention(config, window_size)
        else:
            self.mlp = MlTrMLP(config, hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = MlTrDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, padding: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        branch = self.norm(hidden_states)
        weights = None
        if self.kind == "mlp":
            branch = self.mlp(branch)
        else:
            if padding is not None:
                # CAT's detection code pads normalised pixels, in front of each attention; here the padded pixels stay
                # in the stream and gather values, so they are zeroed where they would be seen.
                branch = branch.masked_fill(padding, 0)
            branch, weights = self.attn(branch, output_attentions)
        return hidden_states + self.drop_path(self.dropout(branch)), weights


class MlTrLayer(GradientCheckpointingLayer):
    """One block: the sublayers of `block_pattern`, by default pixel attention, cross-window attention and an MLP."""

    def __init__(self, config: MlTrConfig, stage: int, drop_path_rate: float):
        super().__init__()
        self.sublayers = nn.ModuleList(
            MlTrSublayer(config, kind, stage, drop_path_rate) for kind in config.stage_patterns[stage]
        )

    def forward(
        self, hidden_states: torch.Tensor, padding: torch.Tensor | None = None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(B, n, P, C)`): residual stream in windows.
            padding (`torch.BoolTensor` of shape `(n, P, 1)`, *optional*): True for pixels outside the map.

        Returns:
            `(B, n, P, C)` and, where asked for, the weights of each pixel and each cross-window attention.
        """
        attentions: dict[str, tuple] = {"pixel": (), "cross": ()}
        for sublayer in self.sublayers:
            hidden_states, weights = sublayer(hidden_states, padding, output_attentions)
            if weights is not None:
                attentions[sublayer.kind] += (weights,)
        return hidden_states, attentions["pixel"], attentions["cross"]


class MlTrStage(nn.Module):
    """Patch merging (but for the first stage), where configured the position convolution, and the stage's blocks."""

    def __init__(self, config: MlTrConfig, stage: int, drop_path_rates: list[float]):
        super().__init__()
        self.window_size = config.window_sizes[stage]
        self.merging = MlTrPatchMerging(config, config.hidden_sizes[stage - 1]) if stage > 0 else None
        self.position_convolution = None
        if config.position_kernel_size:
            self.position_convolution = MlTrPositionConvolution(config.hidden_sizes[stage], config.position_kernel_size)
        self.layers = nn.ModuleList(MlTrLayer(config, stage, rate) for rate in drop_path_rates)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(B, H, W, C) to the stage's map of the same form, and the attention weights of all its blocks."""
        if self.merging is not None:
            hidden_states = self.merging(hidden_states)
        if self.position_convolution is not None:
            hidden_states = self.position_convolution(hidden_states)
        height, width = hidden_states.shape[1:3]
        bottom, right = -height % self.window_size, -width % self.window_size
        padding = None
        if bottom or right:
            hidden_states = F.pad(hidden_states, (0, 0, 0, right, 0, bottom))
            padding = torch.zeros(1, height, width, 1, dtype=torch.bool, device=hidden_states.device)
            padding = F.pad(padding, (0, 0, 0, right, 0, bottom), value=True)
            padding = window_partition(padding, self.window_size).squeeze(0)
        hidden_states = window_partition(hidden_states, self.window_size)
        attentions, cross_attentions = (), ()
        for layer in self.layers:
            hidden_states, pixel, cross = layer(hidden_states, padding, output_attentions)
            attentions, cross_attentions = attentions + pixel, cross_attentions + cross
        hidden_states = window_unpartition(hidden_states, self.window_size, height + bottom, width + right)
        return hidden_states[:, :height, :width], attentions, cross_attentions


class MlTrPreTrainedModel(MultiLabelPreTrainedModel):
    """What MlTr's models share: initialisation and what transformers asks of a model."""

    config: MlTrConfig
    base_model_prefix = "mltr"
    _no_split_modules = ["MlTrLayer"]
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            # The patch projection keeps torch's default, as in CAT.
            init_linear(module, std if isinstance(module, nn.Linear) else None)
        elif isinstance(module, MlTrEmbeddings):
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std or 0.02)
        elif isinstance(module, MlTrRelativePositionBias):
            init.trunc_normal_(module.relative_position_bias_table, std=std or 0.02)
            init.copy_(module.relative_position_index, module.create_index())
        else:
            super()._init_weights(module)


class MlTrEncoder(nn.Module):
    """The four stages."""

    def __init__(self, config: MlTrConfig):
        super().__init__()
        total = sum(config.depths)
        rates = [config.drop_path_rate * index / max(total - 1, 1) for index in range(total)]
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.stages.append(MlTrStage(config, stage, rates[:depth]))
            rates = rates[depth:]

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """The embeddings (B, H, W, C) to five maps as pixels (B, H_i * W_i, C_i), themselves first, and as maps
        (B, H_i, W_i, C_i), and all attention weights.

        What a stage gives goes on as pixels: what is returned is what is used, so that a gradient can be read at it.
        """
        maps: list[torch.Tensor] = []
        states, attentions, cross_attentions = [], (), ()
        for stage in (None, *self.stages):
            if stage is not None:
                hidden_states, pixel, cross = stage(maps[-1], output_attentions)
                attentions, cross_attentions = attentions + pixel, cross_attentions + cross
            size = hidden_states.shape[1:3]
            states.append(hidden_states.flatten(1, 2))
            maps.append(states[-1].unflatten(1, size))
        return states, maps, attentions, cross_attentions


class MlTrModel(MlTrPreTrainedModel):
    """Embeddings, the four stages, final norm and mean over pixels, without a classifier."""

    def __init__(self, config: MlTrConfig):
        super().__init__(config)
        self.embeddings = MlTrEmbeddings(config)
        self.encoder = MlTrEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MlTrModelOutput:
        """See [`MultiLabelPreTrainedModel`]; images may have any size: those that do not fill whole patches and windows
        are padded with zeros at the right and the bottom."""
        output_hidden_states, output_attentions = self._asked(kwargs, output_hidden_states, output_attentions)
        embeddings = self.embeddings(require_images(pixel_values))
        states, maps, attentions, cross_attentions = self.encoder(embeddings, output_attentions)
        last_hidden_state = self.layernorm(states[-1])
        maps = [each.permute(0, 3, 1, 2) for each in maps]
        return MlTrModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=last_hidden_state.mean(1),
            hidden_states=chosen_states(states, output_hidden_states),
            reshaped_hidden_states=chosen_states(maps, output_hidden_states),
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions if output_attentions else None,
        )


class MlTrForImageClassification(MlTrPreTrainedModel):
    """MlTr with a linear classifier on the mean of the last stage: multi-label scores of an image.

    Example:

    ```python
    >>> from modeling_hsvlt import MlTrConfig, MlTrForImageClassification
    >>> import torch

    >>> model = MlTrForImageClassification(MlTrConfig.preset("nano", num_labels=10)).eval()
    >>> with torch.inference_mode():
    ...     scores = model(torch.rand(2, 3, 64, 64)).logits.sigmoid()  # (2, 10)
    ```
    """

    def __init__(self, config: MlTrConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mltr = MlTrModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MlTrImageClassifierOutput:
        """See [`MultiLabelPreTrainedModel`]; images may have any size."""
        warn_of_unknown_arguments(self, kwargs)
        labels = self._check_labels(labels, self.num_labels)
        output = self.mltr(pixel_values, output_hidden_states, output_attentions, return_dict=True)
        logits = self.classifier(output.pooler_output)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        states = {name: value for name, value in output.items() if name not in ("last_hidden_state", "pooler_output")}
        return MlTrImageClassifierOutput(loss=loss, logits=logits, **states)


class MlTrBackbone(BackboneMixin, MlTrPreTrainedModel):
    """The stages' maps, each normalised, for models that stand on a backbone: `out_features` of the configuration."""

    _keys_to_ignore_on_load_unexpected = [r"layernorm\.", r"classifier\."]

    def __init__(self, config: MlTrConfig):
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.hidden_sizes]
        self.embeddings = MlTrEmbeddings(config)
        self.encoder = MlTrEncoder(config)
        self.hidden_states_norms = nn.ModuleDict(
            {
                stage: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for stage, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """See [`MultiLabelPreTrainedModel`]; images may have any size.

        Returns:
            `BackboneOutput`: `feature_maps`, a tuple of `(B, C_i, H_i, W_i)` for each of `out_features`;
            `hidden_states`, the embeddings and the output of each stage as maps, not normalised; `attentions` of the
            pixel attention as in [`MlTrModelOutput`].
        """
        output_hidden_states, output_attentions = self._asked(kwargs, output_hidden_states, output_attentions)
        embeddings = self.embeddings(require_images(pixel_values))
        _, maps, attentions, _ = self.encoder(embeddings, output_attentions)
        feature_maps = tuple(
            self.hidden_states_norms[stage](each).permute(0, 3, 1, 2)
            for stage, each in zip(self.stage_names, maps, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps,
            hidden_states=chosen_states([each.permute(0, 3, 1, 2) for each in maps], output_hidden_states),
            attentions=attentions if output_attentions else None,
        )
