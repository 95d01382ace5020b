"""MlTr configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_multilabel import MultiLabelConfig, auto_map_of, preset_of

SUBLAYERS = ("pixel", "cross", "mlp")
CAT_BLOCK = ("pixel", "mlp", "cross", "mlp", "pixel", "mlp")

# s, m, l: the simplest layout whose parameter counts at 80 labels are the published 33M, 62M and 108M. xl: a guess,
# nothing but its resolution was published. cat_*: CAT (arXiv 2106.05786), the same group's code, exact. nano: this
# package's own, for tests and small data, with the 64 / 16 / 4 / 1 windows a stage of the reconstructed sizes, a step
# that takes as long as HSVLT's nano, and what narrow layers need to learn from random weights: torch's default init,
# overlapping patches and convolutions for positions.
_AT_384 = {"image_size": 384, "window_size": 12, "depths": (2, 2, 24, 2)}
_CAT = {"block_pattern": CAT_BLOCK, "use_absolute_embeddings": True}
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 24,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window_size": 4,
        "drop_path_rate": 0.0,
        "initializer_range": None,
        "stem_kernel_size": 7,
        "position_kernel_size": 5,
    },
    "s": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "depths": (2, 2, 9, 2)},
    "m": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "drop_path_rate": 0.2, **_AT_384},
    "l": {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.3, **_AT_384},
    "xl": {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.3, **_AT_384},
    "cat_t": {"embed_dim": 64, "num_heads": (2, 4, 8, 16), "depths": (1, 1, 3, 1), **_CAT},
    "cat_s": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "depths": (1, 1, 3, 1), "drop_path_rate": 0.2, **_CAT},
    "cat_b": {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "depths": (1, 1, 6, 1), "drop_path_rate": 0.3, **_CAT},
}


@strict
class MlTrConfig(BackboneConfigMixin, MultiLabelConfig):
    r"""
    Configuration of [`MlTrModel`], [`MlTrBackbone`] and [`MlTrForImageClassification`]: a four-stage transformer whose
    blocks attend within windows of pixels and across windows (MlTr, arXiv 2106.06195).

    **MlTr, reconstructed; layout inferred from the published parameter counts.** The authors released no code. The two
    attentions are those of CAT (arXiv 2106.05786), to which the author points; how a block is put together and how many
    blocks there are was chosen to give the published parameter counts. See [`MlTrConfig.preset`] for the sizes.

    Args:
        > Published

        image_size (`int`, defaults to 224):
            Side of the square image that the checkpoint was trained on, in pixels. With `window_size` it fixes the
            window of each stage; the model takes any image size.

        > Generalisations: the reconstruction and CAT are two settings

        patch_size (`int`, defaults to 4):
            Side of a patch of the stem, in pixels; the four stages have strides of 1, 2, 4 and 8 patches.
        num_channels (`int`, defaults to 3):
            Channels of the image.
        embed_dim (`int`, defaults to 96):
            Channels of the first stage; each further stage has twice as many.
        depths (`list[int]`, defaults to `(2, 2, 9, 2)`):
            Blocks in each of the four stages.
        num_heads (`list[int]`, defaults to `(3, 6, 12, 24)`):
            Heads of the in-window pixel attention in each stage.
        window_size (`int`, defaults to 7):
            Side of a window, in pixels of the stage's map; smaller where the map at `image_size` is smaller.
        block_pattern (`list[str]`, defaults to `("pixel", "cross", "mlp")`):
            Sublayers of a block in order, each with its own norm and residual: `"pixel"` in-window pixel attention,
            `"cross"` cross-window attention, `"mlp"`. CAT is `("pixel", "mlp", "cross", "mlp", "pixel", "mlp")`.
        use_absolute_embeddings (`bool`, defaults to `False`):
            Whether a learned position embedding is added to the patches (CAT does; the reconstruction fits without).
        use_relative_position_bias (`bool`, defaults to `True`):
            Whether the pixel attention has a learned bias for each offset within the window.
        mlp_ratio (`float`, defaults to 4.0):
            Width of the MLP's hidden layer over its input.
        qkv_bias (`bool`, defaults to `True`):
            Whether query, key and value projections of both attentions have a bias.
        hidden_act (`str`, defaults to `"gelu"`):
            Activation of the MLP.
        hidden_dropout_prob (`float`, defaults to 0.0):
            Dropout after the embeddings, each attention and each MLP.
        attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on the pixel attention's probabilities.
        cross_attention_probs_dropout_prob (`float`, defaults to 0.0):
            Dropout on the cross-window attention's probabilities.
        drop_path_rate (`float`, defaults to 0.1):
            Stochastic depth of the last block, rising linearly from 0 at the first; the sublayers of a block share it.
        layer_norm_eps (`float`, defaults to 1e-5):
            Epsilon of the layer norms.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that starts linear layers, position bias and position embedding.
            None keeps torch's default for linear layers (and 0.02 for the two tables).

        > Not published

        stem_kernel_size (`int`, *optional*):
            Side of the stem's convolution, where patches overlap; default: `patch_size`, as in the reconstruction and
            in CAT.
        position_kernel_size (`int`, defaults to 0):
            Side of a depthwise convolution whose output is added to the map each stage starts from (conditional
            position encoding, arXiv 2102.10882); 0: none, as in the reconstruction and CAT. Without one and from random
            weights, a model stays at the labels' base rates for thousands of steps.
        last_stage_block_pattern (`list[str]`, *optional*):
            Sublayers of the last stage's blocks, where they differ.
        skip_single_window_cross (`bool`, defaults to `False`):
            Whether to leave out cross-window attention in stages that are a single window at `image_size`, where it is
            a linear map of the window's pixels. CAT keeps it.

        > Bookkeeping

        out_features (`list[str]`, *optional*):
            Stages that [`MlTrBackbone`] returns, of `"stem"`, `"stage1"`, ... `"stage4"`; default: the last.
        out_indices (`list[int]`, *optional*):
            The same as indices.

        Further fields are those of [`MultiLabelConfig`].
    """

    model_type = "mltr"
    auto_classes = auto_map_of("mltr", "MlTr")
    keys_to_ignore_at_inference = ["hidden_states", "reshaped_hidden_states", "attentions", "cross_attentions"]
    attribute_map = {"num_attention_heads": "num_heads"}

    # Published
    image_size: int = 224
    # Generalisations: the reconstruction and CAT are two settings
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 9, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    block_pattern: list[str] | tuple[str, ...] = ("pixel", "cross", "mlp")
    use_absolute_embeddings: bool = False
    use_relative_position_bias: bool = True
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    cross_attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float | None = 0.02
    # Not published
    stem_kernel_size: int | None = None
    position_kernel_size: int = 0
    last_stage_block_pattern: list[str] | tuple[str, ...] | None = None
    skip_single_window_cross: bool = False
    # Bookkeeping
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def preset(cls, name: str, **overrides) -> "MlTrConfig":
        """A size of the reconstruction (`"s"`, `"m"`, `"l"`, `"xl"`), of CAT (`"cat_t"`, `"cat_s"`, `"cat_b"`), or
        `"nano"` for tests and small data.

        Args:
            name (`str`): the size.
            overrides: any field of the configuration.

        Raises:
            ValueError: an unknown size.
        """
        return cls(**{**preset_of(PRESETS, name), **overrides})

    def __post_init__(self, **kwargs):
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, 5))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of each stage."""
        return [self.embed_dim * 2**stage for stage in range(4)]

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, the width of what the classifier reads."""
        return self.hidden_sizes[-1]

    @property
    def grid_sizes(self) -> list[int]:
        """Side of each stage's map for an image of `image_size`, in pixels of the map."""
        grid = -(-self.image_size // self.patch_size)
        return [-(-grid // 2**stage) for stage in range(4)]

    @property
    def window_sizes(self) -> list[int]:
        """Side of the window of each stage; it fixes the shapes of the stage's weights."""
        return [min(self.window_size, grid) for grid in self.grid_sizes]

    @property
    def stage_patterns(self) -> list[tuple[str, ...]]:
        """Sublayers of a block of each stage."""
        patterns = [tuple(self.block_pattern)] * 4
        if self.last_stage_block_pattern is not None:
            patterns[-1] = tuple(self.last_stage_block_pattern)
        if self.skip_single_window_cross:
            single = [grid <= window for grid, window in zip(self.grid_sizes, self.window_sizes, strict=True)]
            patterns = [
                tuple(kind for kind in pattern if kind != "cross") if is_single else pattern
                for pattern, is_single in zip(patterns, single, strict=True)
            ]
        return patterns

    def validate_architecture(self):
        """As transformers calls it, when made and before saving; a ValueError names the field and what it may be."""
        for field in ("image_size", "patch_size", "num_channels", "embed_dim", "window_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be a positive number, but it is {getattr(self, field)}.")
        if self.stem_kernel_size is not None and self.stem_kernel_size < self.patch_size:
            raise ValueError(
                f"stem_kernel_size ({self.stem_kernel_size}) is smaller than patch_size ({self.patch_size}): the stem "
                "would pass over pixels."
            )
        if self.position_kernel_size < 0 or (self.position_kernel_size and self.position_kernel_size % 2 == 0):
            raise ValueError(f"position_kernel_size must be 0 or odd, but it is {self.position_kernel_size}.")
        for field in ("depths", "num_heads"):
            value = getattr(self, field)
            if len(value) != 4 or any(number < 1 for number in value):
                raise ValueError(f"{field} must be four positive numbers, one a stage, but it is {list(value)}.")
        for stage, (channels, heads) in enumerate(zip(self.hidden_sizes, self.num_heads, strict=True), start=1):
            if channels % heads:
                raise ValueError(
                    f"num_heads of stage {stage} is {heads}, which does not divide its {channels} channels."
                )
        for field in ("block_pattern", "last_stage_block_pattern"):
            value = getattr(self, field)
            if value is not None and (not value or any(kind not in SUBLAYERS for kind in value)):
                raise ValueError(f"{field} must name sublayers out of {SUBLAYERS} in order, but it is {value}.")
        if not all(self.stage_patterns):
            raise ValueError("skip_single_window_cross leaves blocks of the last stage empty; set it to False.")
