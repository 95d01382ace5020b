"""PyTorch HSVLT: label tokens query the pixels of a four-stage visual backbone in every block.

HSVLT: Hierarchical Scale-Aware Vision-Language Transformer for Multi-Label Image Classification (ACM MM 2023,
arXiv 2407.16244). Equations are those of the released code, whose class is named where each is coded:
https://github.com/NaturalKnight/HSVLT/blob/cd7c5cab16cf94ab7e2f311dd413072f6d53e2e7/models/hsvlt.py
Where paper and code disagree we follow the code: the abstract has image, label and multi-modal features updated
jointly; in the code (`InteractionBlock`) image features never attend to labels.

Shapes: B images, N labels, D width of a label embedding, C channels, H x W pixels of a stage's feature
map ("pixels" below), P = H * W, h attention heads, d = C / h.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .configuration_hsvlt import HSVLTConfig
from .hsvlt_additions import (
    HSVLTAdditions,
    HSVLTResidualAttention,
    HSVLTTopDownAggregation,
    in_chunks,
)
from .hsvlt_backbones import HSVLTOnBackbone, build_backbone
from .hsvlt_candidates import HSVLTCandidateScorer
from .hsvlt_pyramid import build_pyramid
from .hsvlt_tied import HSVLTTiedClassifier, HSVLTTiedLabelStream
from .modeling_multilabel import (
    as_dtype_of,
    autocasts_to_fp16,
    chosen_states,
    eager_attention_forward,
    init_linear,
    is_plain,
    no_fp16_autocast,
    require_images,
    wants_states,
    warn_of_unknown_arguments,
    widened,
)

# Not used here: a checkpoint carries the files that its modeling file imports, and the pipeline must be among them.
from .pipeline_multilabel import MultiLabelImageClassificationPipeline  # noqa: F401

# Widest head of the flash kernels behind scaled_dot_product_attention.
MAX_FUSED_HEAD_DIM = 256


@dataclass
class HSVLTModelOutput(ModelOutput):
    """Output of [`HSVLTModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, N, aggregated width)`): the features of each label after
            cross-scale aggregation.
        hidden_states (`tuple` of four tensors of shape `(B, C_i, H_i, W_i)`): visual map of each stage; with
            `output_hidden_states=True`, or a list of stages, which leaves None in the place of the others.
        label_hidden_states (`tuple` of four tensors of shape `(B, N, C_i)`, at most `label_width` wide): label tokens
            after each stage; likewise.
        multimodal_states (`tuple` of four tensors of the same shapes): multi-modal states of each stage's last
            interaction, what is aggregated; likewise.
        attentions (`tuple` of four tensors of shape `(B, h, N, H_i, W_i)`): each label's attention over the pixels in
            each stage's last interaction, summing to 1 over the pixels; with `output_attentions=True`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    label_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    multimodal_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HSVLTImageClassifierOutput(ModelOutput):
    """Output of [`HSVLTForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, fp32): with `labels`.
        logits (`torch.FloatTensor` of shape `(B, N)`): one score a label; its sigmoid is the label's probability.
            `NOT_EVALUATED`, whose sigmoid is 0, for labels that `candidate_labels` or, in training, `sampled_labels`
            left out.
        class_ids (`torch.LongTensor` of shape `(B, m)`): the labels that were scored, ascending, where these chose
            them; states and attentions are of these labels, in this order.
        hidden_states, label_hidden_states, multimodal_states, attentions: see [`HSVLTModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    class_ids: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    label_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    multimodal_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def label_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """[`eager_attention_forward`] that scales the few labels, not the scores of all pixels."""
    return eager_attention_forward(module, query * scaling, key, value, attention_mask, scaling=1.0, **kwargs)


class HSVLTAttention(nn.Module):
    """Attention of label tokens to pixels, without position encoding (IVLA, interactive visual-linguistic attention;
    code: `CrossAttention`):
    `softmax(L Wq (X Wk)^T / sqrt(d)) X Wv Wo + bo`, no bias elsewhere.

    L are the label tokens, X the pixels, A the attention. Keys and values are one linear map of the pixels each, so
    the maps can be moved to the label side, which has far fewer tokens: `(L Wq Wk^T) X^T` and `(A X) Wv Wo`. This is
    used where it costs less (for labels as wide as the pixels `(h - 1) N P + N C < P C`), and the layers are plain
    (`is_plain`). Results and gradients are the same, and the keys and values of the pixels are never stored.
    """

    is_causal = False

    def __init__(self, config: HSVLTConfig, hidden_size: int, channels: int):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        if hidden_size % self.num_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) must divide the {hidden_size} channels of its label tokens."
            )
        self.head_dim = hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(channels, hidden_size, bias=False)
        self.value = nn.Linear(channels, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, label_states: torch.Tensor, pixels: torch.Tensor, map_size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            label_states (`torch.Tensor` of shape `(B or 1, N, L)`): label tokens, L = C unless `label_width` is less.
            pixels (`torch.Tensor` of shape `(B, P, C)`): pixel tokens.
            map_size (`tuple` of two `int`, *optional*): height and width of the map, where its attention is asked for.

        Returns:
            `(B, N, L)` and, where asked for, the attention `(B, h, N, H, W)`.
        """
        absorb = self._absorbs(*label_states.shape[1:], *pixels.shape[1:])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, label_attention_forward)
        # Fused kernels return no weights. They end at a width of 256 on GPUs, and with the few scores of labels they
        # are no faster on CPUs: there, two matrix products and a softmax it is.
        unfused = pixels.device.type == "cpu" or pixels.shape[-1] > MAX_FUSED_HEAD_DIM
        if map_size is not None or (absorb and unfused):
            attend = label_attention_forward
        options = {"scaling": self.scaling}
        if map_size is not None:
            options["attention_shape"] = (pixels.shape[0], self.num_heads, label_states.shape[1], *map_size)
        query = self.query(label_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        context, weights = (self._absorbed if absorb else self._projected)(attend, query, pixels, options)
        return self.out_proj(context), None if map_size is None else weights

    def _absorbs(self, num_labels: int, width: int, num_pixels: int, channels: int) -> bool:
        absorbed = num_labels * channels * (self.num_heads * num_pixels + width)
        pays = absorbed < num_pixels * width * (num_labels + channels)
        linears = (self.query, self.key, self.value, self.out_proj)
        return self.config.absorb_projections and pays and is_plain(*linears)

    def _projected(self, attend, query, pixels, options):
        heads = (self.num_heads, self.head_dim)
        query = query.expand(pixels.shape[0], -1, -1, -1)  # (B, h, N, d)
        key = self.key(pixels).unflatten(-1, heads).transpose(1, 2)  # (B, h, P, d)
        value = self.value(pixels).unflatten(-1, heads).transpose(1, 2)
        context, weights = attend(self, query, key, value, None, **options)  # (B, N, h, d)
        return context.flatten(2), weights

    def _absorbed(self, attend, query, pixels, options):
        batch, channels, num_labels = pixels.shape[0], pixels.shape[2], query.shape[2]
        heads = (self.num_heads, self.head_dim)
        query = _times_head_weights(query, self.key.weight.to(query.dtype).view(*heads, channels))  # (B or 1, h, N, C)
        # All heads read the same pixels, so they are more rows of one attention: (B, 1, h * N, C).
        query = query.flatten(1, 2).unsqueeze(1).expand(batch, -1, -1, -1)
        pixels = pixels.unsqueeze(1)
        context, weights = attend(self, query, pixels, pixels, None, **options)  # (B, h * N, 1, C)
        context = context.reshape(batch, self.num_heads, num_labels, channels)
        value_weight = self.value.weight.to(context.dtype).view(*heads, channels)
        context = _times_head_weights(context, value_weight.transpose(1, 2))  # (B, h, N, d)
        return context.transpose(1, 2).flatten(2), weights


def _times_head_weights(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`(B, h, N, x)` times the weight `(h, x, y)` of each head: one product a head over all images.

    Broadcasting would copy the weights, and their gradient, for every image.
    """
    batch, heads, num_labels, _ = states.shape
    if heads == 1:  # a linear layer, also to whatever quantises an exported graph
        return (states.squeeze(1) @ weights.squeeze(0)).unsqueeze(1)
    product = torch.bmm(states.transpose(0, 1).reshape(heads, batch * num_labels, -1), weights)
    return product.view(heads, batch, num_labels, -1).transpose(0, 1)


class HSVLTLabelGate(nn.Module):
    """Gated update of a label token (code: `InteractionBlock.res_gate`): `L + tanh(U2 ReLU(U1 L)) * L`, no bias."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, label_states: torch.Tensor) -> torch.Tensor:
        gate = torch.tanh(self.out_proj(F.relu(self.in_proj(as_dtype_of(self.in_proj, label_states)))))
        return label_states + gate * label_states


class HSVLTInteractionLayer(GradientCheckpointingLayer):
    """One interactive visual-linguistic attention and the update of the label tokens (code: `InteractionBlock`).

    `M = GELU((GELU(L Wg + bg) * Attention(L, X)) Wm + bm)`, `L1 = L + M`, `L' = L1 + tanh(U2 ReLU(U1 L1)) * L1`.
    """

    def __init__(self, config: HSVLTConfig, hidden_size: int, channels: int, is_last: bool):
        super().__init__()
        self.attention = HSVLTAttention(config, hidden_size, channels)
        self.gate = nn.Linear(hidden_size, hidden_size)
        self.multimodal = nn.Linear(hidden_size, hidden_size)
        # 1 x 1 convolutions in the released code, which its initialisation passes over.
        self.gate.starts_as_in_torch = self.multimodal.starts_as_in_torch = True
        self.visual_norm = nn.LayerNorm(channels) if config.normalize_visual_tokens else nn.Identity()
        self.label_norm = nn.LayerNorm(hidden_size) if config.normalize_label_tokens else nn.Identity()
        # Nothing reads the label tokens after the last interaction: a gate there would never see a gradient.
        self.label_gate = HSVLTLabelGate(hidden_size) if config.label_update == "gate" and not is_last else None

    def forward(
        self,
        label_states: torch.Tensor,
        feature_map: torch.Tensor,
        update_labels: bool = True,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            label_states (`torch.Tensor` of shape `(B or 1, N, C)`): label tokens, fp32 (fp64 in a model of fp64).
            feature_map (`torch.Tensor` of shape `(B, C, H, W)`): visual map of the block.
            update_labels (`bool`, defaults to `True`): False leaves the label tokens, where nothing reads them after.

        Returns:
            Label tokens and multi-modal state, `(B, N, C)` each, and the attention `(B, h, N, H, W)` or None.
        """
        pixels = feature_map.flatten(2).transpose(1, 2)  # (B, P, C), a view of a channels-last map
        pixels = as_dtype_of(self.gate, self.visual_norm(as_dtype_of(self.visual_norm, pixels)))
        queries = as_dtype_of(self.gate, self.label_norm(as_dtype_of(self.label_norm, label_states)))
        attended, attention = self.attention(queries, pixels, feature_map.shape[-2:] if output_attentions else None)
        gated = F.gelu(self.gate(queries)) * attended
        multimodal = F.gelu(self.multimodal(as_dtype_of(self.multimodal, gated)))
        if update_labels:
            label_states = label_states + multimodal
            if self.label_gate is not None:
                label_states = self.label_gate(label_states)
        return label_states, multimodal, attention


class HSVLTLabelStage(nn.Module):
    """Channel unification of the label tokens, `L <- Linear_i(L)` (code: `langs`), and one stage's interactions."""

    def __init__(self, config: HSVLTConfig, in_size: int, hidden_size: int, channels: int, depth: int, is_last: bool):
        super().__init__()
        self.projection = nn.Linear(in_size, hidden_size)
        self.layers = nn.ModuleList(
            HSVLTInteractionLayer(config, hidden_size, channels, is_last=is_last and index == depth - 1)
            for index in range(depth)
        )


class HSVLTLabelStream(nn.Module):
    """The label tokens' way through the four stages (HSVLT, Fig. 2).

    Labels never see one another, so a label's result does not depend on which others are there. The running label
    tokens stay in fp32: they are not normalised and are multiplied by up to 2 in every interaction.
    """

    def __init__(self, config: HSVLTConfig, channels: list[int], depths: list[int]):
        super().__init__()
        self.widths = [min(each, config.label_width or each) for each in channels]
        self.in_size = config.label_embedding_dim
        sizes = [self.in_size, *self.widths]
        self.stages = nn.ModuleList(
            HSVLTLabelStage(config, sizes[i], sizes[i + 1], channels[i], depths[i], is_last=i == len(depths) - 1)
            for i in range(len(depths))
        )

    def forward(
        self,
        label_embeddings: torch.Tensor,
        feature_maps: Iterable[torch.Tensor],
        update_all: bool = False,
        output_attentions: bool = False,
    ) -> tuple[tuple[torch.Tensor, ...], ...]:
        """
        Args:
            label_embeddings (`torch.Tensor` of shape `(N, D)`, or `(B, N, D)` for labels of each image's own).
            feature_maps: an iterable of `(B, C_i, H_i, W_i)` maps, one an interaction, in order.
            update_all (`bool`, defaults to `False`): whether the label tokens are wanted after the last interaction.
            output_attentions (`bool`, defaults to `False`): whether attentions are kept.

        Returns:
            After each stage: visual maps, label tokens, multi-modal states and attentions (or None), see
            [`HSVLTModelOutput`].
        """
        feature_maps = iter(feature_maps)
        # (1, N, D) until the labels meet the image: no copy an image before that.
        label_states = label_embeddings if label_embeddings.ndim == 3 else label_embeddings.unsqueeze(0)
        after = []
        for stage in self.stages:
            label_states = widened(stage.projection(as_dtype_of(stage.projection, label_states)))
            for index, layer in enumerate(stage.layers):
                ends_stage = index == len(stage.layers) - 1
                feature_map = next(feature_maps)
                label_states, state, attention = layer(
                    label_states,
                    feature_map,
                    update_labels=update_all or not (ends_stage and stage is self.stages[-1]),
                    output_attentions=output_attentions and ends_stage,
                )
            after.append((feature_map, label_states, state, attention))
        return tuple(zip(*after, strict=True))


class HSVLTConcatAggregation(nn.Module):
    """Cross-scale aggregation of the published run: the last multi-modal states of the stages side by side,
    `Z = [M_1, M_2, M_3, M_4]`."""

    def __init__(self, channels: list[int]):
        super().__init__()
        self.hidden_size = sum(channels)

    def forward(self, multimodal_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat(multimodal_states, dim=-1)  # (B, N, C_1 + C_2 + C_3 + C_4)


class HSVLTPerLabelClassifier(nn.Module):
    """A weight vector and a bias a label (code: `TextHead`): `logit[b, c] = sum_k Z[b, c, k] W[c, k] + beta[c]`."""

    def __init__(self, num_labels: int, hidden_size: int):
        super().__init__()
        self.starts_as_in_torch = True
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_labels))

    def forward(self, features: torch.Tensor, label_ids: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, N, K)`): aggregated label features.
            label_ids (`torch.LongTensor` of shape `(N,)` or `(B, N)`, *optional*): which labels they are of.

        Returns:
            `torch.Tensor` of shape `(B, N)`: logits.
        """
        weight, bias = (self.weight, self.bias) if label_ids is None else (self.weight[label_ids], self.bias[label_ids])
        return (features.unsqueeze(-2) @ weight.unsqueeze(-1)).flatten(-3) + bias


class HSVLTLabelEmbeddings(nn.Module):
    """The text embedding of each label, `(N, D)`: random by seed until [`set_label_embeddings`]. A module of its own,
    called and not read, so that whatever places modules on devices places it too."""

    def __init__(self, config: HSVLTConfig):
        super().__init__()
        self.config = config
        self.register_buffer("weight", self.create().to(torch.empty(())))  # on the meta device while loading

    def create(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.config.label_seed)
        size = (self.config.num_labels, self.config.label_embedding_dim)
        return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32)

    def forward(self) -> torch.Tensor:
        return self.weight


class HSVLTPreTrainedModel(HSVLTOnBackbone):
    """What HSVLT's models share: initialisation, attention choice, what stays in fp32."""

    config: HSVLTConfig
    base_model_prefix = "hsvlt"
    renamed_weights = {
        r"label_embeddings$": "label_embeddings.weight",
        r"^(hsvlt\.)?trunk\.backbone\.": r"hsvlt.backbone.model.",
        r"^(hsvlt\.)?trunk\.": r"hsvlt.backbone.",
    }
    _no_split_modules = ["HSVLTInteractionLayer"]
    # The label stream overflows fp16, see HSVLTLabelStream.
    _keep_in_fp32_modules = ["label_stream", "multimodal_norms", "aggregation", "classifier", "residual_attention"]

    @torch.no_grad()
    def _init_weights(self, module):
        # transformers calls this only for modules with weights, so the flag sits on the layer, not on its parent.
        as_in_torch, others = getattr(module, "starts_as_in_torch", False), (nn.Conv2d, nn.ConvTranspose2d)
        if isinstance(module, (nn.Linear, HSVLTPerLabelClassifier)) or (as_in_torch and isinstance(module, others)):
            init_linear(module, None if as_in_torch else self.config.initializer_range)
        else:
            super()._init_weights(module)
        if isinstance(module, HSVLTLabelEmbeddings):
            init.copy_(module.weight, module.create().to(module.weight))


class HSVLTModel(HSVLTPreTrainedModel):
    """Backbone, label stream and cross-scale aggregation, without a classifier."""

    def __init__(self, config: HSVLTConfig):
        super().__init__(config)
        if config.backbone_config._attn_implementation == "sdpa":
            config.backbone_config._attn_implementation = None  # where it can; many backbones refuse it by name
        self.backbone = build_backbone(config)
        self.pyramid = build_pyramid(config, self.backbone)
        channels = (self.pyramid or self.backbone).channels
        depths = self.backbone.interaction_depths
        if config.label_stream == "tied":
            self.label_stream = HSVLTTiedLabelStream(channels, depths)
        else:
            self.label_stream = HSVLTLabelStream(config, channels, depths)
        aggregation: Any = {"concat": HSVLTConcatAggregation, "topdown": HSVLTTopDownAggregation}[config.aggregation]
        self.aggregation = aggregation(self.label_stream.widths)
        norms = (nn.LayerNorm(width) for width in self.label_stream.widths)
        self.multimodal_norms = nn.ModuleList(norms) if config.normalize_multimodal_states else None
        self.label_embeddings = HSVLTLabelEmbeddings(config)
        self.post_init()
        # What FSDP wraps and device_map keeps whole. transformers collects this of direct children only; and of a
        # ConvNeXt the blocks are called one by one here, never a stage.
        self._no_split_modules |= set(self.backbone.body._no_split_modules or ()) - {"ConvNextStage"}  # type: ignore[operator]  # a set here

    def scales(self, feature_maps: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        """The maps that the labels meet: those of the backbone, or of the pyramid on its last one."""
        return feature_maps if self.pyramid is None else self.pyramid(feature_maps)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        text_embeddings: torch.Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        feature_maps: Iterable[torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HSVLTModelOutput:
        """
        Args, beside those of [`MultiLabelPreTrainedModel`]:
            text_embeddings (`torch.Tensor` of shape `(N, D)` or `(B, N, D)`, *optional*): label embeddings in place
                of the checkpoint's.
            feature_maps (*optional*): the backbone's maps, in place of `pixel_values`, so that several label sets can
                share one visual pass: `list(model.backbone(pixel_values))`.
        """
        output_hidden_states, output_attentions = self._asked(kwargs, output_hidden_states, output_attentions)
        if feature_maps is None:
            feature_maps = self.backbone(require_images(pixel_values))
        if text_embeddings is None:
            text_embeddings = self.label_embeddings()
        if text_embeddings.shape[-1] != self.label_stream.in_size:
            takes = f"rows of a classifier, {self.label_stream.in_size} wide"
            if self.config.label_stream != "tied":
                encoder = f"the text encoder it was trained with ({self.config.label_text_encoder or 'not named'})"
                takes = f"label_embedding_dim={self.config.label_embedding_dim}: use {encoder}"
            raise ValueError(f"text_embeddings are {text_embeddings.shape[-1]} wide, but this model takes {takes}.")
        feature_maps = self.scales(feature_maps)
        if autocasts_to_fp16(text_embeddings):
            feature_maps = list(feature_maps)  # runs the backbone, still under autocast
        with no_fp16_autocast(text_embeddings):
            visual, label, multimodal, attentions = self.label_stream(
                text_embeddings, feature_maps, wants_states(output_hidden_states), output_attentions
            )
            if self.multimodal_norms is not None:
                states = zip(self.multimodal_norms, multimodal, strict=True)
                multimodal = tuple(norm(as_dtype_of(norm, state)) for norm, state in states)
            last_hidden_state = self.aggregation(multimodal)
        return HSVLTModelOutput(
            last_hidden_state=last_hidden_state,
            hidden_states=chosen_states(visual, output_hidden_states),
            label_hidden_states=chosen_states(label, output_hidden_states),
            multimodal_states=chosen_states(multimodal, output_hidden_states),
            attentions=attentions if output_attentions else None,
        )


class HSVLTForImageClassification(HSVLTAdditions, HSVLTPreTrainedModel):
    """HSVLT with its per-label (published) or shared linear classifier: multi-label scores of an image.

    Example:

    ```python
    >>> from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
    >>> import torch

    >>> model = HSVLTForImageClassification(HSVLTConfig.preset("nano", num_labels=10)).eval()
    >>> with torch.inference_mode():
    ...     scores = model(torch.rand(2, 3, 64, 64)).logits.sigmoid()  # (2, 10)
    ```
    """

    def __init__(self, config: HSVLTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.hsvlt = HSVLTModel(config)
        hidden_size = self.hsvlt.aggregation.hidden_size
        last = self.hsvlt.backbone.channels[-1]
        if config.label_stream == "tied":
            self.classifier = HSVLTTiedClassifier(config.num_labels, hidden_size, self.hsvlt.label_stream.widths[-1])
        elif config.classifier == "per_label":
            self.classifier = HSVLTPerLabelClassifier(config.num_labels, hidden_size)
        else:
            self.classifier = nn.Linear(hidden_size, 1)  # one for all labels, which can then be exchanged
            self.classifier.starts_as_in_torch = True
        self.label_context = None  # a `label_context.LabelContext` while one is learned
        self.candidate_scorer = None
        if config.candidate_labels is not None:
            self.candidate_scorer = HSVLTCandidateScorer(config, self.hsvlt.backbone)
        else:  # also where it was set to null in the config.json of a checkpoint that has a scorer
            self._keys_to_ignore_on_load_unexpected = {r"^candidate_scorer\."}
        self.residual_attention = HSVLTResidualAttention(config, last) if config.residual_attention else None
        self.post_init()

    def set_label_embeddings(
        self,
        label_embeddings: torch.Tensor,
        *,
        encoder: str | None = None,
        pooling: str | None = None,
        template: str | None = None,
    ) -> None:
        """Sets the text embedding of each label, and notes in the configuration where it came from.

        For another label set on a shared classifier see [`exchange_labels`].

        Args:
            label_embeddings (`torch.Tensor` of shape `(num_labels, label_embedding_dim)`): in the order of `id2label`;
                see `label_prompts.encode_labels`.
            encoder, pooling, template (`str`, *optional*): text encoder, its pooling and the template.

        Raises:
            ValueError: another shape, values that are not finite, or a learned label context that gives the embeddings.
        """
        if self.label_context is not None:
            raise ValueError(
                "a learned label context gives this model its label embeddings, so others would have no effect; detach "
                "it first: model.label_context = None."
            )
        table = self.hsvlt.label_embeddings
        num_labels = self.config.num_labels if self._own_rows is None else self._own_rows
        shape = (num_labels, self.config.label_embedding_dim)
        if label_embeddings.shape != shape:
            raise ValueError(
                f"label_embeddings have shape {tuple(label_embeddings.shape)}, but this model needs {shape}: one row a "
                f"label, label_embedding_dim={self.config.label_embedding_dim} wide."
            )
        if not bool(torch.isfinite(label_embeddings).all()):
            raise ValueError("label_embeddings hold values that are not finite; encode the label names again.")
        if label_embeddings.shape == table.weight.shape:
            table.weight.copy_(label_embeddings)
        else:
            table.weight = label_embeddings.to(table.weight)
        self.num_labels = num_labels
        self.config.label_text_encoder = encoder
        self.config.label_pooling = pooling
        self.config.label_template = template

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text_embeddings: torch.Tensor | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        class_ids: torch.Tensor | None = None,
        feature_maps: Iterable[torch.Tensor] | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HSVLTImageClassifierOutput:
        """
        Args, beside those of [`MultiLabelPreTrainedModel`]:
            text_embeddings (`torch.Tensor` of shape `(N, D)`, *optional*): embeddings in place of the checkpoint's;
                any number of labels where `classifier="shared"`.
            class_ids (`torch.LongTensor` of shape `(N,)`, *optional*): score only these labels, in this order; `logits`
                and `labels` then have their columns. A label's logit is the same whichever others are asked for.
            feature_maps (*optional*): the backbone's maps, `list(model.hsvlt.backbone(pixels))`, for `pixel_values`.

        Raises:
            ValueError: embeddings of another number of labels than a per-label classifier has.
        """
        warn_of_unknown_arguments(self, kwargs)
        text_embeddings = self._text_embeddings(text_embeddings)
        num_labels = len(text_embeddings if class_ids is None else class_ids)
        labels = self._check_labels(labels, num_labels)
        if feature_maps is None:
            feature_maps = self.hsvlt.backbone(require_images(pixel_values))

        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        additions = (self.candidate_scorer, self.residual_attention, self.config.sampled_labels)
        if any(each is not None for each in additions):
            of_labels = (text_embeddings, class_ids, labels)
            return self._read_with_additions(feature_maps, *of_labels, num_items_in_batch, **asked)
        scales = self.hsvlt.scales(feature_maps)  # once for all chunks
        output = in_chunks(self._read, scales, text_embeddings, class_ids, self.config.label_chunk_size, **asked)
        loss = None if labels is None else self._loss(output.logits, labels, num_items_in_batch)
        return HSVLTImageClassifierOutput(**{**output, "loss": loss})

    def _read(self, feature_maps, text_embeddings, class_ids, **asked) -> HSVLTImageClassifierOutput:
        """Logits (and, where asked for, states) of all labels or of those of `class_ids`."""
        text_embeddings = text_embeddings if class_ids is None else text_embeddings[class_ids]
        output = self.hsvlt(text_embeddings=text_embeddings, feature_maps=feature_maps, return_dict=True, **asked)
        features = output.last_hidden_state
        with no_fp16_autocast(features):
            if self.config.classifier == "per_label":
                logits = self.classifier(features, class_ids)
            else:
                logits = self.classifier(as_dtype_of(self.classifier, features)).squeeze(-1)
        states = {name: value for name, value in output.items() if name != "last_hidden_state"}
        return HSVLTImageClassifierOutput(logits=logits, **states)
