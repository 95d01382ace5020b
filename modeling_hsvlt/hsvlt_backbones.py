"""The visual side of HSVLT: backbones of transformers, read map by map, and how they start from pretrained weights."""

import re
from collections.abc import Iterable, Iterator
from inspect import signature
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoBackbone, AutoModel
from transformers.backbone_utils import BackboneConfigMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.convnext.modeling_convnext import ConvNextEmbeddings, ConvNextEncoder
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Embeddings, ConvNextV2Encoder

from .configuration_hsvlt import BLOCK_BACKBONES, HSVLTConfig
from .convnext_in_rows import convnext_layer_in_rows, runs_in_rows
from .hsvlt_probe import NormsAfter, retire, without_data
from .hsvlt_timm import backbone_config_of, build_timm, gives_channels_last, load_timm
from .load_pretrained import load_pretrained, options_of_part
from .modeling_efficientnet_lite import EfficientNetLiteBackbone
from .modeling_mltr import MlTrBackbone
from .modeling_multilabel import MultiLabelPreTrainedModel, is_plain
from .naflex_patches import naflex_inputs

# AutoBackbone does not know a class that was downloaded with a checkpoint.
OWN_BACKBONES: dict[str, Any] = {"mltr": MlTrBackbone, "efficientnet_lite": EfficientNetLiteBackbone}


def build_backbone(config: HSVLTConfig) -> "HSVLTBlockBackbone | HSVLTStageBackbone":
    """The backbone that `config.backbone_config` describes, with new weights."""
    if config.backbone_config.model_type in BLOCK_BACKBONES:
        return HSVLTBlockBackbone(config)
    # HieraBackbone (5.23) leaves out the step that puts a window's tokens side by side, so its maps mix places.
    has_stages = (
        isinstance(config.backbone_config, BackboneConfigMixin) and config.backbone_config.model_type != "hiera"
    )
    return HSVLTStageBackbone(config) if has_stages else HSVLTTowerBackbone(config)


class HSVLTOnBackbone(MultiLabelPreTrainedModel):
    """What a model does with its backbone, whatever that is."""

    @classmethod
    def from_backbone(
        cls, source: str, *, revision: str | None = None, config: HSVLTConfig | None = None, **config_kwargs
    ):
        """A new model on a pretrained backbone.

        Args:
            source (`str`): folder or Hub id of a backbone or vision tower in transformers' format, or in timm's where
                timm is installed ("timm/NAME"); safetensors alone.
            revision (`str`, *optional*): commit or tag on the Hub.
            config ([`HSVLTConfig`], *optional*): configuration whose `backbone_config` is replaced by the source's.
            config_kwargs: fields of a new [`HSVLTConfig`], where `config` is None.

        Raises:
            ValueError: where the backbone's weights do not fit those of the source.
        """
        backbone_config = backbone_config_of(source, revision)
        if config is None:
            config = HSVLTConfig(backbone_config=backbone_config, **config_kwargs)
        else:
            config = HSVLTConfig.from_dict({**config.to_dict(), "backbone_config": backbone_config.to_dict()})
        model = cls(config)
        model._backbone().load_pretrained(source, revision=revision)
        return model

    def _backbone(self) -> "HSVLTBlockBackbone | HSVLTStageBackbone":
        return getattr(self, self.base_model_prefix, self).backbone

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """As in transformers, except that a backbone without that attention (a ConvNeXt has none) keeps its own."""
        if attn_implementation == "sdpa" and not self._backbone().body._supports_sdpa:
            attn_implementation = {"": "sdpa", "backbone_config": "eager"}
        super().set_attn_implementation(attn_implementation, **kwargs)

    def get_input_embeddings(self) -> nn.Module | None:
        """The backbone's patch embeddings, None where it has no module of that name; accelerate asks for FSDP2."""
        return getattr(self._backbone().embeddings, "patch_embeddings", None)

    def set_input_embeddings(self, value: nn.Module):
        if self.get_input_embeddings() is None:
            raise ValueError("this backbone has no module patch_embeddings to set.")
        self._backbone().embeddings.patch_embeddings = value


class HSVLTBlockBackbone(nn.Module):
    """A ConvNeXt or ConvNeXtV2 of transformers, read after every block (or only at the end of each stage).

    The parts of `ConvNextModel` under their own names, without its final norm, which nothing here would use.
    """

    gradient_checkpointing = False

    def __init__(self, config: HSVLTConfig):
        super().__init__()
        backbone = config.backbone_config
        embeddings, encoder = {
            "convnext": (ConvNextEmbeddings, ConvNextEncoder),
            "convnextv2": (ConvNextV2Embeddings, ConvNextV2Encoder),
        }[backbone.model_type]
        self.embeddings = embeddings(backbone)
        self.encoder = encoder._from_config(backbone)
        self.channels = list(backbone.hidden_sizes)
        self.every_block = config.interaction_depths is None
        self.interaction_depths = list(config.interaction_depths or backbone.depths)

    @property
    def body(self) -> PreTrainedModel:
        """The part that is a model of transformers by itself."""
        return self.encoder

    def load_pretrained(self, source: str, **load) -> None:
        """Takes the weights of the model at `source`; see [`HSVLTForImageClassification.from_backbone`]."""
        state_dict = load_pretrained(AutoModel, source, **load).state_dict()
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("layernorm.")}
        result = self.load_state_dict(state_dict, strict=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(
                f"the weights of {source} do not fit the backbone: missing {result.missing_keys[:3]}, "
                f"unexpected {result.unexpected_keys[:3]}."
            )

    def forward(self, pixel_values: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields a (B, C_i, H_i, W_i) map, channels last in memory, for each interaction in order."""
        # In this layout the permutes inside a ConvNeXt block are views, and so are the label stream's pixel tokens.
        hidden_state = self.embeddings(pixel_values.contiguous(memory_format=torch.channels_last))
        blocks = self._blocks(hidden_state)
        for stage, depth in zip(self.encoder.stages, self.interaction_depths, strict=True):
            for _ in stage.layers:
                hidden_state = next(blocks)
                if self.every_block:
                    yield hidden_state
            if not self.every_block:
                yield from [hidden_state] * depth

    def _blocks(self, hidden_state: torch.Tensor) -> Iterator[torch.Tensor]:
        """The output of each block."""
        if not is_plain(self.encoder, *self.encoder.stages):
            yield from self._blocks_of_call(hidden_state)
            return
        for stage in self.encoder.stages:
            for layer in stage.downsampling_layer:
                hidden_state = layer(hidden_state)
            for layer in stage.layers:
                if self.gradient_checkpointing and self.training:
                    hidden_state = self._gradient_checkpointing_func(layer.__call__, hidden_state)
                elif runs_in_rows(layer, hidden_state):
                    hidden_state = convnext_layer_in_rows(layer, hidden_state)
                else:
                    hidden_state = layer(hidden_state)
                yield hidden_state

    def _blocks_of_call(self, hidden_state: torch.Tensor) -> list[torch.Tensor]:
        """The same, where something hangs on the encoder or a stage (a hook, a shard), so that it has to be called."""
        outputs = []
        handles = [
            layer.register_forward_hook(lambda layer, args, output: outputs.append(output))
            for stage in self.encoder.stages
            for layer in stage.layers
        ]
        try:
            self.encoder(hidden_state)
        finally:
            for handle in handles:
                handle.remove()
        return outputs


class HSVLTStageBackbone(nn.Module):
    """An `AutoBackbone` of transformers, read at the output of four stages.

    What its maps are, and which of its weights they need, is seen in one pass without data, since configurations err.
    Weights that the maps do not need are neither trained nor saved, see [`retire`].
    """

    # Patterns of the tensors that a checkpoint of the bare model has not.
    starts_fresh: ClassVar[tuple[str, ...]] = ("norm",)
    tokens_behind = 0  # tokens of no patch that stand behind those of the patches

    def __init__(self, config: HSVLTConfig):
        super().__init__()
        backbone = config.backbone_config
        backbone.return_dict = True  # maps are found by their names
        sides = getattr(backbone, "image_size", None) or config.image_size
        self.image_size = (sides, sides) if isinstance(sides, int) else tuple(sides)  # one that it surely reads
        patch = getattr(backbone, "patch_size", None) or 1
        self.patch_size = (patch, patch) if isinstance(patch, int) else tuple(patch)
        self.interaction_depths, self.last_alone = [1, 1, 1, 1], False
        self.model = self._build(backbone)
        try:
            self._prepare()
            maps, unreached = without_data(self, self.image_size)
            self.interaction_depths = list(config.interaction_depths or self.interaction_depths)
            if config.pyramid != "none":
                self.last_alone = True
                unreached = without_data(self, self.image_size)[1]
        except Exception as error:
            raise ValueError(
                f"a backbone of type {backbone.model_type!r} cannot be read at four places: {first_line(error)}"
            ) from error
        retire(self, unreached)
        self._keys_to_ignore_on_load_unexpected = {f"{re.escape(name)}$" for name in unreached}
        self.channels = [each.shape[1] for each in maps]
        self.strides = [self.image_size[0] / each.shape[2] for each in maps]

    def _build(self, backbone_config) -> PreTrainedModel:
        own = OWN_BACKBONES.get(backbone_config.model_type)
        if own is not None:
            return own._from_config(backbone_config)
        if backbone_config.model_type == "timm_backbone":
            return build_timm(backbone_config)
        return AutoBackbone.from_config(backbone_config, trust_remote_code=False)

    def _prepare(self) -> None:
        """What has to be seen before the maps can be."""

    @property
    def body(self) -> PreTrainedModel:
        """As of [`HSVLTBlockBackbone`]."""
        return self.model

    @property
    def embeddings(self) -> nn.Module | None:
        """The backbone's embeddings, where it has a module of that name."""
        return getattr(self.model.base_model, "embeddings", None)

    def load_pretrained(self, source: str, **load) -> None:
        """As of [`HSVLTBlockBackbone`]. A checkpoint of the bare model has no norms in front of the feature maps; those
        start fresh."""
        if self.model.config.model_type == "timm_backbone":
            model: PreTrainedModel = load_timm(self.model.config, source, **load)
        else:
            unused = (name.removeprefix("model\\.") for name in self._keys_to_ignore_on_load_unexpected)
            may_lack = "|".join((*self.starts_fresh, *unused))
            # Not AutoBackbone: it asks the Hub whether a local folder exists.
            options = self._source_options() | options_of_part(self.model.state_dict(), source, **load)
            model = load_pretrained(type(self.model), source, may_lack=may_lack, **options, **load)
        weights = model.state_dict()
        self.load_state_dict({name: weights[self._name_in_source(name)] for name in self.state_dict()})

    def _source_options(self) -> dict[str, Any]:
        return {"out_features": self.model.out_features}

    def _name_in_source(self, name: str) -> str:
        return name.removeprefix("model.")

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """A (B, C_i, H_i, W_i) map for each interaction in order; the last map alone where a pyramid is built on it.

        Raises:
            ValueError: images of a size that this backbone cannot read.
        """
        try:
            maps = self._maps(pixel_values)
        except Exception as error:
            if pixel_values.device.type == "meta" or self._reads(pixel_values.shape[-2:]):
                raise
            given, known = (" x ".join(map(str, size)) for size in (pixel_values.shape[-2:], self.image_size))
            raise ValueError(
                f"this backbone ({self.model.config.model_type}, made for {known} pixels) cannot read images of "
                f"{given} ({first_line(error)}): set image_size, and the size of the processor, to what it reads."
            ) from error
        if self.last_alone:
            return maps[-1:]
        return [each for each, depth in zip(maps, self.interaction_depths, strict=True) for _ in range(depth)]

    def _maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The (B, C_i, H_i, W_i) maps of the four places."""
        maps = self.model(pixel_values).feature_maps
        if gives_channels_last(self.model):
            maps = [each.movedim(-1, 1) for each in maps]
        return self._on_grid(maps, pixel_values)

    def _on_grid(self, states: Iterable[torch.Tensor], pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Maps (B, C, H, W) as they are; of tokens (B, N, C), with others around them, the map of the patches."""
        height, width = self._grid(pixel_values.shape[-2:])
        first = -height * width - self.tokens_behind
        return [
            state if state.ndim == 4 else state[:, first:][:, : height * width].mT.unflatten(2, (height, width))
            for state in states
        ]

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return image_size[0] // self.patch_size[0], image_size[1] // self.patch_size[1]

    def _reads(self, image_size: tuple[int, int]) -> bool:
        try:
            without_data(self, image_size)
        except Exception:
            return False
        return True


class HSVLTTowerBackbone(HSVLTStageBackbone):
    """A vision model of transformers that is no `AutoBackbone` (CLIP, SigLIP, ViT, DeiT, ...), by its hidden states.

    Of one scale: four evenly spaced layers; tokens without what stands around the patches (CLS, registers), through the
    norm that the model has after its last layer. Of several: the last of each resolution, the four coarsest of those.
    Position embeddings are interpolated where the model can; SigLIP 2's NaFlex gets the image as patches.
    """

    starts_fresh = ()

    def _build(self, backbone_config) -> PreTrainedModel:
        kind = MODEL_MAPPING.get(type(backbone_config), None) or _class_by_name(backbone_config)
        if getattr(kind, "main_input_name", None) != "pixel_values":
            raise ValueError(
                f"backbone_config of type {backbone_config.model_type!r} is no backbone and no vision model of "
                "transformers; choose one, such as convnext, swin, dinov2, vit or siglip_vision_model."
            )
        if backbone_config.model_type == "vit_mae":
            raise ValueError(
                "a backbone of type 'vit_mae' hides and shuffles patches, so that no map can be made of them; load its "
                "weights as model_type 'vit'."
            )
        if hasattr(backbone_config, "vision_use_head"):
            backbone_config.vision_use_head = False  # pools, for nobody
        return kind._from_config(backbone_config, **_without_pooling(kind))

    def _prepare(self) -> None:
        config, takes = self.model.config, signature(self.model.forward).parameters
        self.takes_patches = "spatial_shapes" in takes
        self.tokens_behind = getattr(config, "num_detection_tokens", 0)  # a YOLOS has some
        self.options: dict[str, Any] = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}
        lists = (part for part in self.model.modules() if isinstance(part, nn.ModuleList))
        layers = next((part for part in lists if len(part) == getattr(config, "num_hidden_layers", None)), [None])
        with NormsAfter(self.model, layers[-1]) as norms:
            states = _states_of(without_data(self.model, self.image_size, self._inputs)[0])
        self.places = self._places(states)
        self.norm_name, self.norm = None, nn.Identity()
        if states[-1].ndim == 3 and norms.names:
            # Taken out, so that each place goes through it once, whether the model gives its states before or after it.
            self.norm_name = norms.names[0]
            self.norm = self.model.get_submodule(self.norm_name)
            self.model.set_submodule(self.norm_name, nn.Identity())
        self.options["output_hidden_states"] = self.places

    def _inputs(self, images: torch.Tensor) -> dict[str, Any]:
        if not self.takes_patches:
            return {"pixel_values": images, "output_hidden_states": True, **self.options}
        return {"output_hidden_states": True, **naflex_inputs(images, self.patch_size), **self.options}

    def _places(self, states: tuple[torch.Tensor, ...]) -> list[int]:
        """Which of the hidden states are read."""
        shapes = [tuple(state.shape) for state in states]
        sides, (height, width) = self.image_size, self._grid(self.image_size)
        if any(shape[0] != 2 for shape in shapes):
            raise ValueError("it puts the patches of all images into one row")
        # Whether maps are (B, H, W, C), as a SAM's are: told by the aspect ratio of the images.
        self.channels_last = all(len(shape) == 4 and shape[1] * sides[1] == shape[2] * sides[0] for shape in shapes)
        self.channels_last &= not all(shape[2] * sides[1] == shape[-1] * sides[0] for shape in shapes)
        if self.channels_last:
            shapes = [(batch, channels, *size) for batch, *size, channels in shapes]
        one = shapes[0]
        if len(set(shapes)) == 1 and (one[2:] == (height, width) or (len(one) == 3 and one[1] >= height * width > 1)):
            layers = len(states) - 1
            if layers < 4:
                raise ValueError(f"it has {layers} layers, and four are read")
            return [-(-layers * quarter // 4) for quarter in (1, 2, 3, 4)]
        last = {shape[2:]: index for index, shape in enumerate(shapes) if len(shape) == 4}
        if len(last) < 4 or any(height > sides[0] or width > sides[1] for height, width in last):
            raise ValueError("its hidden states are neither tokens of patches nor maps of four resolutions")
        return sorted(last.values())[-4:]

    def _source_options(self) -> dict[str, Any]:
        return _without_pooling(type(self.model))

    def _name_in_source(self, name: str) -> str:
        return re.sub(r"^norm\b", str(self.norm_name), super()._name_in_source(name))

    def _maps(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        states = _states_of(self.model(**self._inputs(pixel_values)))
        read = [self.norm(states[place]) for place in self.places]
        return self._on_grid([state.movedim(-1, 1) for state in read] if self.channels_last else read, pixel_values)


def _states_of(output) -> tuple[torch.Tensor, ...]:
    """The hidden states, as maps where the model can give them so (a Hiera or a Swin)."""
    return getattr(output, "reshaped_hidden_states", None) or output.hidden_states


def _class_by_name(config) -> Any:
    """transformers' model of a configuration that AutoModel does not know: Blip2VisionModel of Blip2VisionConfig."""
    if not type(config).__module__.startswith("transformers."):
        return None
    return getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)


def _without_pooling(kind: Any) -> dict[str, Any]:
    return {"add_pooling_layer": False} if "add_pooling_layer" in signature(kind.__init__).parameters else {}


def first_line(error: Exception) -> str:
    """What an error of another library says, in a sentence of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
