"""PyTorch HP-DVAL: a CLIP for long-tailed and few-shot multi-label pictures.

Hierarchical Prompt tuning and Dual-View Alignment Learning (IEEE TIP 2025, arXiv 2509.17747). Stage 1 aligns an image
tower with the hand-written prompts in two views, the class token and the patches; stage 2 freezes it and learns one
context for each view. Inference needs the image tower and two cached text embeddings a label.

The paper's equations are followed; where the released code differs, the configuration offers its variant.

Shapes: B pictures, P patches, N labels, M context tokens, L tokens of a prompt, E width of the shared space.
"""

import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    ViTModel,
)
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .configuration_hp_dval import STAGES, HPDVALConfig
from .losses_multilabel import multilabel_loss, validate_labels

# Not used here: a checkpoint carries the files that its modeling file imports, and the pipeline must be among them.
from .pipeline_multilabel import MultiLabelImageClassificationPipeline  # noqa: F401

logger = logging.get_logger(__name__)

# Rows of `prompt_ids` and `text_embeddings`.
HANDWRITTEN, GLOBAL, LOCAL = range(3)
PROMPT_BATCH = 512  # prompts that go through the text tower at a time where no gradient is kept


@dataclass
class HPDVALModelOutput(ModelOutput):
    """Output of [`HPDVALModel`].

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, E)`): the picture, not normalised.
        patch_embeds (`torch.FloatTensor` of shape `(B, P, E)`): its patches, likewise; None with `alpha=1`.
        text_embeds (`torch.FloatTensor` of shape `(2, N, E)`): the labels as the global and the local view read them.
        hidden_states, attentions (`tuple` of `torch.FloatTensor`): of the student, as its transformers class gives
            them; with `output_hidden_states=True` and `output_attentions=True`.
    """

    image_embeds: torch.FloatTensor | None = None
    patch_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class HPDVALImageClassifierOutput(ModelOutput):
    """Output of [`HPDVALForImageClassification`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, fp32): with `labels`; in training with the stage's other losses.
        logits (`torch.FloatTensor` of shape `(B, N)`, fp32): fused scores; their sigmoid is the label's probability.
        distillation_loss (`torch.FloatTensor` of shape `()`): L1 distance to the teacher; training stage 1 and joint.
        semantic_consistency_loss (`torch.FloatTensor` of shape `()`): L1 distance of the learned global text
            embeddings to the hand-written ones; training stage 2 and joint.
        image_embeds, patch_embeds, hidden_states, attentions: see [`HPDVALModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    distillation_loss: torch.FloatTensor | None = None
    semantic_consistency_loss: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    patch_embeds: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class HPDVALImageEncoder(nn.Module):
    """The student: an image tower whose class token and patches are both mapped into the shared space."""

    def __init__(self, config: HPDVALConfig):
        super().__init__()
        vision = config.vision_config
        if vision.model_type == "clip_vision_model":
            self.backbone = CLIPVisionModel._from_config(vision)
        else:
            self.backbone = ViTModel._from_config(vision, add_pooling_layer=False)
        if config.embedding_head == "clip":
            self.projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        else:
            self.projection = nn.Sequential(
                nn.Linear(vision.hidden_size, config.projection_dim),
                nn.Tanh(),
                nn.Linear(config.projection_dim, config.projection_dim),
            )

    def forward(self, pixel_values: torch.Tensor, patches: bool = True, **kwargs) -> HPDVALModelOutput:
        output = self.backbone(pixel_values, interpolate_pos_encoding=True, **kwargs)
        states = output.last_hidden_state if patches else output.last_hidden_state[:, :1]
        if self.backbone.config.model_type == "clip_vision_model":
            states = self.backbone.post_layernorm(states)  # transformers applies it to the class token alone
        states = self.projection(states)  # (B, 1 + P, E)
        return HPDVALModelOutput(
            image_embeds=states[:, 0],
            patch_embeds=states[:, 1:] if patches else None,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class HPDVALPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving: text embeddings that fit the weights, and plain checkpoints."""

    config: HPDVALConfig
    base_model_prefix = "hp_dval"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["CLIPEncoderLayer", "CLIPVisionEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # By the layer itself: transformers asks no class from outside its library about a module without weights.
        if module is getattr(self, self.base_model_prefix, self).student.projection and isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)  # as in CLIP
        elif isinstance(module, HPDVALModel):
            init.copy_(module.prompt_ids, _placeholder_prompts(self.config).to(module.prompt_ids.device))
            init.zeros_(module.text_embeddings)
            if module.text is not None:
                # Contexts of zeros are contexts that stage 2 has not started yet.
                weight = module.text.text_model.embeddings.token_embedding.weight
                if not getattr(weight, "_is_hf_initialized", False):
                    weight[self.config.context_token_ids[0] :] = 0
        elif isinstance(module, HPDVALForImageClassification):
            init.constant_(module.logit_scale, math.log(self.config.logit_scale))
            init.constant_(module.logit_bias, self.config.logit_bias)

    def initialize_weights(self):
        # CLIP draws the weights of its layers from the modules around them, which transformers passes over when the
        # outermost class is not its own: each tower first, by itself.
        for module in self.modules():
            if module is not self and isinstance(module, PreTrainedModel):
                module.initialize_weights()
        super().initialize_weights()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers. The cached text embeddings of a whole checkpoint are taken as they are."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        base = getattr(model, model.base_model_prefix, model)
        read_anew = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind, ())]
        if not model._hf_peft_config_loaded:
            model._freeze()  # loading makes new parameters
        parts = ("text.", "prompt_ids", "text_embeddings")
        if not any(part in key for key in read_anew for part in parts) and not base.has_text_adapter():
            base.trust_text_embeddings()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory, *, state_dict: Mapping[str, torch.Tensor] | None = None, **kwargs):
        """As in transformers, with text embeddings that fit the weights, and with the context tokens that
        [`~HPDVALForImageClassification.set_stage`] put into an adapter written back into the embedding table: a plain
        checkpoint. (An adapter that was loaded with `load_adapter` is saved by itself, as in transformers.)

        With a `state_dict` of other weights than the model's own, an average for example, the embeddings are theirs;
        the model is only read then, and may train on in another thread."""
        base = getattr(self, self.base_model_prefix, self)
        own = state_dict is None
        if own:
            base.refresh_text_embeddings()
        if not getattr(self, "_hf_peft_config_loaded", False):
            state_dict = dict(self.state_dict() if own else state_dict)
            folded = False
            for name, module in self.named_modules():
                if hasattr(module, "token_indices"):
                    _fold_token_adapter(state_dict, name, module)
                    folded = True
            if folded and not own:
                _encode_prompts_of(state_dict, self.config)
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)


def _fold_token_adapter(state_dict: dict[str, torch.Tensor], name: str, layer: nn.Module) -> None:
    """Replaces the entries of peft's token layer `name` by those of the embedding that it amounts to."""
    weight = state_dict[f"{name}.base_layer.weight"].clone()
    for adapter in layer.active_adapters if not (layer.disable_adapters or layer.merged) else ():
        weight[layer.token_indices[adapter]] = state_dict[f"{name}.trainable_tokens_delta.{adapter}"].to(weight)
    for key in [key for key in state_dict if key.startswith(f"{name}.")]:
        del state_dict[key]
    state_dict[f"{name}.weight"] = weight


@torch.no_grad()
def _encode_prompts_of(state_dict: dict[str, torch.Tensor], config: HPDVALConfig) -> None:
    """Replaces the contexts' text embeddings in `state_dict` by those of the text tower in it."""
    prefix = next(key for key in state_dict if key.endswith("text_embeddings")).removesuffix("text_embeddings")
    weights = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}text.")}
    weights = {key.removeprefix(f"{prefix}text."): value for key, value in weights.items()}
    with torch.device("meta"):  # draws no random numbers
        tower = CLIPTextModelWithProjection._from_config(config.text_config)
    tower.load_state_dict(weights, assign=True)
    places = torch.arange(config.text_config.max_position_embeddings, device=tower.text_projection.weight.device)
    tower.text_model.embeddings.position_ids = places[None]
    prompts = state_dict[f"{prefix}prompt_ids"][GLOBAL:].flatten(0, 1)
    embeddings = torch.cat([tower.eval()(part).text_embeds for part in prompts.split(PROMPT_BATCH)])
    whole = state_dict[f"{prefix}text_embeddings"].clone()
    whole[GLOBAL:] = embeddings.unflatten(0, (2, -1)).to(whole)
    state_dict[f"{prefix}text_embeddings"] = whole


def _build_prompts(config: HPDVALConfig, template: list[int], names: list[list[int]]) -> torch.Tensor:
    """Token ids (3, N, L) of `[start] template name [end]`, and of the same with each view's context for the template.

    Contexts take the place of words, so positions are those of a normal sentence (CoOp). Ends fill what is left: the
    text tower reads a prompt at its first end.
    """
    contexts = torch.tensor(config.context_token_ids).view(2, -1, config.num_context_tokens)
    contexts = contexts.expand(-1, len(names), -1).tolist()  # (2, N, M)
    shape = (3, len(names), config.prompt_length)
    prompts = torch.full(shape, config.text_config.eos_token_id)
    for label, name in enumerate(names):
        for view, words in enumerate((template, contexts[0][label], contexts[1][label])):
            tokens = [config.text_config.bos_token_id, *words, *name]
            prompts[view, label, : len(tokens)] = torch.tensor(tokens)
    return prompts


def _placeholder_prompts(config: HPDVALConfig) -> torch.Tensor:
    """Prompts (3, N, L) of random words that a model holds until [`set_labels`]."""
    generator = torch.Generator().manual_seed(0)
    words = min(2, config.prompt_length - config.num_context_tokens - 2)
    size = (config.num_labels + 1, max(words, config.num_context_tokens))
    tokens = torch.randint(config.context_token_ids[0], size, generator=generator)
    tokens[tokens == config.text_config.eos_token_id] = config.text_config.bos_token_id
    template, *names = tokens.tolist()
    return _build_prompts(config, template[: config.num_context_tokens], [name[:words] for name in names])


def _adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of peft's active adapters within `module`."""
    for layer in module.modules():
        for name in getattr(layer, "adapter_layer_names", ()):
            entries = getattr(layer, name) if "." not in name else {}  # a dotted one is of a layer within this layer
            for adapter in layer.active_adapters:
                if adapter in entries:
                    entry = entries[adapter]
                    yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()


def _peft():
    """peft, which only training needs: if this file imported it, transformers would demand it for loading."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("contexts are trained by peft, which is not installed: pip install peft.") from error


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors keep no version


# torch 2.6 does not tell an export from a compilation; there, both take the embeddings as they are.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


class HPDVALModel(HPDVALPreTrainedModel):
    """Student, teacher and text tower, and the text embeddings of the labels."""

    def __init__(self, config: HPDVALConfig):
        super().__init__(config)
        self.student = HPDVALImageEncoder(config)
        self.teacher = CLIPVisionModelWithProjection._from_config(config.teacher_config) if config.has_teacher else None
        self.text = CLIPTextModelWithProjection._from_config(config.text_config) if config.has_text_model else None
        shape = (3, config.num_labels)  # HANDWRITTEN, GLOBAL, LOCAL
        self.register_buffer("prompt_ids", torch.empty(*shape, config.prompt_length, dtype=torch.long))
        self.register_buffer("text_embeddings", torch.empty(*shape, config.projection_dim))
        self._text_state_of_embeddings = None
        self.post_init()
        # Contexts are read from the token table outside CLIP's module around it, so FSDP2 must not wrap that module:
        # accelerate then wraps the table, which `get_input_embeddings` names.
        self._no_split_modules = set(self._no_split_modules) - {"CLIPTextEmbeddings"}
        self._freeze()

    def _freeze(self) -> None:
        for tower in (self.teacher, self.text):  # in no stage they train
            if tower is not None:
                tower.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module | None:
        return None if self.text is None else self.text.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module):
        self.text.text_model.embeddings.token_embedding = value

    def train(self, mode: bool = True):
        """As in torch; what the stage keeps frozen stays in evaluation mode."""
        super().train(mode)
        frozen = [self.teacher, self.text, self.student if self.config.stage == "stage2" else None]
        for tower in frozen:
            if tower is not None:
                tower.eval()
        return self

    def _apply(self, fn, recurse=True):
        fits = self._text_embeddings_fit()
        super()._apply(fn, recurse)
        if fits:  # moved or cast together with the weights
            self.trust_text_embeddings()
        return self

    # --- text embeddings that fit the text tower

    def has_text_adapter(self) -> bool:
        """Whether an adapter of peft is attached to the text tower."""
        return self.text is not None and any(hasattr(m, "adapter_layer_names") for m in self.text.modules())

    def _text_state(self) -> tuple[tuple, list[torch.Tensor]]:
        """What the embeddings depend on: which tensors, each at which version, and what the adapters do; and those
        tensors that may be trained, to be compared by value: fused optimizers of torch and writes through `.data`
        raise no version."""
        tensors = [(t.data_ptr(), t.device, t.dtype, _version(t)) for t in (self.prompt_ids, *self.text.parameters())]
        adapters = [
            (tuple(m.active_adapters), tuple(m.merged_adapters), m.disable_adapters, str(getattr(m, "scaling", None)))
            for m in self.text.modules()
            if hasattr(m, "adapter_layer_names")
        ]
        trainable = {id(t): t.detach() for t in self.text.parameters() if t.requires_grad}
        trainable |= {id(t): t.detach() for t in _adapter_parameters(self.text)}
        return (tensors, adapters, list(trainable)), list(trainable.values())

    def _text_embeddings_fit(self) -> bool:
        """Whether the text tower is as it was when `text_embeddings` were made."""
        if self.text is None or self._text_state_of_embeddings is None:
            return False
        (before, copies), (now, trainable) = self._text_state_of_embeddings, self._text_state()
        return before == now and all(map(torch.equal, copies, trainable))

    def trust_text_embeddings(self) -> None:
        """Takes `text_embeddings` as those of the text tower as it now is."""
        if self.text is not None:
            state, trainable = self._text_state()
            self._text_state_of_embeddings = state, [tensor.clone() for tensor in trainable]

    @torch.compiler.disable
    @torch.no_grad()
    def refresh_text_embeddings(self, force: bool = False) -> None:
        """Encodes the prompts again if the text tower, its adapters or the prompts have changed since the last time.

        Called in every forward pass outside training and before saving, so that an adapter can be attached, switched,
        disabled, merged or trained by any optimizer without a further thought. Only a write through `.data` to a
        frozen weight goes unnoticed; call this with `force=True` after one. Without contexts (stage 1) both views read
        the hand-written prompts.
        """
        if self.text is None or (self._text_embeddings_fit() and not force):
            return
        views = [GLOBAL, LOCAL] if self.has_learned_context() else [HANDWRITTEN]
        prompts = self.prompt_ids[views].flatten(0, 1)  # (views * N, L)
        embeddings = torch.cat([self.encode_prompts(part) for part in prompts.split(PROMPT_BATCH)])
        embeddings = embeddings.unflatten(0, (len(views), -1))
        if views == [HANDWRITTEN]:
            embeddings = embeddings.expand(3, -1, -1)
        self.text_embeddings[-len(embeddings) :] = embeddings.to(self.text_embeddings)
        self.trust_text_embeddings()

    def encode_prompts(self, prompt_ids: torch.Tensor) -> torch.Tensor:
        """Text embeddings `(R, E)` of prompts `(R, L)`, not normalised; gradients reach what requires them."""
        return self.text(prompt_ids).text_embeds

    def context_rows(self) -> torch.Tensor:
        """The context tokens' embeddings as the text tower sees them, `(context tokens, width)`: global, then local."""
        return self.get_input_embeddings()(torch.tensor(self.config.context_token_ids, device=self.prompt_ids.device))

    @torch.no_grad()
    def has_learned_context(self) -> bool:
        """Whether stage 2 has started: the reserved rows are zeros before."""
        return bool((self.context_rows() != 0).any())

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> HPDVALModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): pictures; H and W multiples of the patch size.
            output_hidden_states, output_attentions (`bool`, *optional*): see [`HPDVALModelOutput`].
        """
        if pixel_values is None:
            raise ValueError("pixel_values is missing: give a batch of pictures of shape (batch, 3, height, width).")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        output = self.student(
            pixel_values,
            patches=self.config.alpha < 1,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        if self.training and self.config.stage != "stage1":
            # Both views in one call (HP-DVAL eq. 7).
            output.text_embeds = self.encode_prompts(self.prompt_ids[GLOBAL:].flatten(0, 1)).unflatten(0, (2, -1))
        else:
            if self.text is not None and not _is_exporting():
                self.refresh_text_embeddings()
            output.text_embeds = self.text_embeddings[GLOBAL:]
        return output


class HPDVALForImageClassification(HPDVALPreTrainedModel):
    """HP-DVAL's fused scores of a picture's labels, and the two stages of its training.

    Example:

    ```python
    >>> from modeling_hsvlt import HPDVALForImageClassification
    >>> from transformers import AutoTokenizer, CLIPModel

    >>> clip = CLIPModel.from_pretrained("path/to/clip-vit-base-patch16")
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/clip-vit-base-patch16")
    >>> model = HPDVALForImageClassification.from_clip(clip, tokenizer, ["cat", "dog"])
    >>> model.set_stage("stage1")  # train, then model.set_stage("stage2") and train on
    ```
    """

    def __init__(self, config: HPDVALConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        if config.thresholds is not None and len(config.thresholds) != config.num_labels:
            logger.warning(
                f"The checkpoint's {len(config.thresholds)} thresholds were dropped: the model now has "
                f"{config.num_labels} labels. Fit them again on validation data."
            )
            config.thresholds = config.threshold_info = config.calibration_info = None
        self.hp_dval = HPDVALModel(config)
        scale, bias = torch.tensor(math.log(config.logit_scale)), torch.tensor(float(config.logit_bias))
        if config.learn_logit_scale:
            self.logit_scale, self.logit_bias = nn.Parameter(scale), nn.Parameter(bias)
        else:  # no parameters: FSDP2 refuses those without a dimension
            self.register_buffer("logit_scale", scale)
            self.register_buffer("logit_bias", bias)
        self.post_init()
        self._freeze()

    @classmethod
    def from_clip(
        cls,
        clip_model: CLIPModel,
        tokenizer,
        label_names: Sequence[str],
        *,
        student: ViTModel | None = None,
        label_text: Mapping[str, str] | None = None,
        **config_kwargs,
    ) -> "HPDVALForImageClassification":
        """A model that starts as `clip_model` zero-shot: its towers are copied, the teacher included.

        Args:
            clip_model (`CLIPModel`): any size; left untouched, nothing is shared with it.
            tokenizer: its tokenizer, left untouched. `tokenizer.add_tokens(model.config.context_tokens,
                special_tokens=True)` would give it the context tokens, under the ids that the model has for them.
            label_names (sequence of `str`), label_text (`Mapping`, *optional*): see [`set_labels`].
            student (`ViTModel`, *optional*): image tower to train in place of CLIP's, as in the paper, which starts
                from ImageNet. It must read pictures normalised like CLIP's.
            config_kwargs: fields of [`HPDVALConfig`].

        Raises:
            ValueError: a tokenizer with more tokens than the text tower, or what [`set_labels`] raises.
        """
        clip_config = clip_model.config
        num_tokens = len(tokenizer)
        if num_tokens > clip_config.text_config.vocab_size:
            raise ValueError(
                f"the tokenizer has {num_tokens} tokens, but the text tower knows "
                f"{clip_config.text_config.vocab_size}: they are not of one model."
            )
        text_config = {
            **clip_config.text_config.to_dict(),
            "projection_dim": clip_config.projection_dim,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        contexts = 2 * (len(label_names) if config_kwargs.get("class_specific_context") else 1)
        contexts *= config_kwargs.get("num_context_tokens", HPDVALConfig.num_context_tokens)
        teacher_config = {**clip_config.vision_config.to_dict(), "projection_dim": clip_config.projection_dim}
        config = HPDVALConfig(
            text_config={**text_config, "vocab_size": num_tokens + contexts},
            vision_config=teacher_config if student is None else student.config.to_dict(),
            teacher_config=teacher_config,
            projection_dim=clip_config.projection_dim,
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
            **config_kwargs,
        )
        model = cls(config)

        weights = clip_model.state_dict()
        projection = {"visual_projection.weight": weights["visual_projection.weight"]}
        vision = {key: value for key, value in weights.items() if key.startswith("vision_model.")}
        if model.hp_dval.teacher is not None:
            model.hp_dval.teacher.load_state_dict({**vision, **projection})
        if student is None:
            vision = {key.removeprefix("vision_model."): value for key, value in vision.items()}
            model.hp_dval.student.backbone.load_state_dict(vision)
            if config.embedding_head == "clip":
                model.hp_dval.student.projection.load_state_dict({"weight": projection["visual_projection.weight"]})
        else:
            backbone = {key: value for key, value in student.state_dict().items() if not key.startswith("pooler.")}
            model.hp_dval.student.backbone.load_state_dict(backbone)
        if model.hp_dval.text is not None:
            text = {key: value for key, value in weights.items() if key.startswith(("text_model.", "text_projection."))}
            table = text["text_model.embeddings.token_embedding.weight"][:num_tokens]
            reserved = table.new_zeros(contexts, table.shape[1])
            text["text_model.embeddings.token_embedding.weight"] = torch.cat((table, reserved))
            model.hp_dval.text.load_state_dict(text)
            model.set_labels(label_names, tokenizer, label_text=label_text)
        return model

    def set_labels(self, label_names: Sequence[str], tokenizer, *, label_text: Mapping[str, str] | None = None) -> None:
        """Sets the labels, in the order of the model's outputs; learned class-shared contexts serve any label.

        Args:
            label_names (sequence of `str`): names; underscores are read as spaces.
            tokenizer: CLIP's tokenizer.
            label_text (`Mapping`, *optional*): what to write in place of a name, for example
                `label_prompts.VOC_LABEL_TEXT`.

        Raises:
            ValueError: a checkpoint without text tower, a name that is empty or too long, a template whose words are
                not `num_context_tokens` with `context_init="template"`, or other labels for class-specific contexts.
        """
        base, config = self.hp_dval, self.config
        if base.text is None:
            raise ValueError(
                "labels are set by the text tower, and this checkpoint holds none; set them before dropping it."
            )
        names = list(label_names)
        if config.class_specific_context and names != [config.id2label[index] for index in range(config.num_labels)]:
            raise ValueError("this model has a context for each of its labels: other labels need a new model.")
        before, after = config.prompt_template.split("{}")
        template = tokenizer(before, add_special_tokens=False)["input_ids"]
        if config.context_init == "template" and len(template) != config.num_context_tokens:
            raise ValueError(
                f"context_init='template' needs as many words in front of {{}} as num_context_tokens "
                f"({config.num_context_tokens}), but {before!r} has {len(template)} tokens."
            )
        longest = config.text_config.max_position_embeddings - 2 - max(len(template), config.num_context_tokens)
        tokens = []
        for name in names:
            text = (label_text or {}).get(name, name).replace("_", " ").strip()
            if not text:
                raise ValueError(f"label {len(tokens)} has an empty name.")
            tokens.append(tokenizer(f"{text}{after}", add_special_tokens=False)["input_ids"])
            if len(tokens[-1]) > longest:
                raise ValueError(f"label {name!r} has {len(tokens[-1])} tokens, but a prompt has room for {longest}.")

        if len(names) != config.num_labels:
            config.thresholds = config.threshold_info = config.calibration_info = None
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        self.num_labels = len(names)
        config.prompt_length = 2 + max(len(template), config.num_context_tokens) + max(map(len, tokens))
        base.prompt_ids = _build_prompts(config, template, tokens).to(base.prompt_ids.device)
        with torch.no_grad():
            handwritten = base.encode_prompts(base.prompt_ids[HANDWRITTEN])
        base.text_embeddings = handwritten.expand(3, -1, -1).clone()
        base.refresh_text_embeddings(force=True)

    # --- stages

    def set_stage(self, stage: str) -> None:
        """Chooses what trains and which losses join the classification loss; what does not train is frozen.

        | stage | trains | loss |
        |---|---|---|
        | `"stage1"` | student | classification + distillation (HP-DVAL eq. 16) |
        | `"stage2"` | the context tokens | classification + semantic consistency (eq. 17) |
        | `"joint"` | both | classification + both |

        Contexts are rows of the text tower's embedding table, trained by peft's `TrainableTokensConfig`. A model that
        is not in a `PeftModel` with such an adapter (`get_peft_model(model, model.prompt_adapter_config())`) gets one
        put in place, and `save_pretrained` then writes a plain checkpoint. Adapters of peft on the student (LoRA) train
        in its place. Call this before the optimizer is made; training in another state is refused.

        Raises:
            ValueError: an unknown stage, or a tower that it needs and that was dropped.
        """
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, but it is {stage!r}.")
        if stage != "stage1" and self.hp_dval.text is None:
            raise ValueError(f"{stage} trains contexts of the text tower, and this checkpoint holds none.")
        if stage != "stage2" and self.hp_dval.teacher is None and self.config.distillation_weight:
            raise ValueError(f"{stage} needs the teacher, which this checkpoint lacks: or set distillation_weight=0.")
        self.config.stage = stage
        if stage != "stage1":
            self._start_contexts()
        self._freeze()
        self.train(self.training)

    def prompt_adapter_config(self):
        """peft's `TrainableTokensConfig` of the context tokens, for `get_peft_model`."""
        return _peft().TrainableTokensConfig(
            token_indices=self.config.context_token_ids,
            target_modules=["token_embedding"],
            base_model_name_or_path=self.name_or_path or None,
        )

    @torch.no_grad()
    def save_prompt_adapter(self, save_directory: str | os.PathLike) -> None:
        """Writes the contexts as an adapter of kilobytes, for `PeftModel.from_pretrained` on any checkpoint with this
        text tower and number of contexts: what `PeftModel.save_pretrained` writes, from a model that is in no
        `PeftModel`."""
        adapter = self.prompt_adapter_config()
        adapter.inference_mode = True
        adapter.save_pretrained(save_directory)
        table = "base_model.model.hp_dval.text.text_model.embeddings.token_embedding"
        rows = {f"{table}.trainable_tokens_delta": self.hp_dval.context_rows().contiguous().cpu()}
        save_file(rows, os.path.join(save_directory, "adapter_model.safetensors"), metadata={"format": "pt"})

    def drop_teacher(self) -> None:
        """Leaves the teacher out of this model and its checkpoints; only stage 1 needs it."""
        self.hp_dval.teacher = None
        self.config.has_teacher, self.config.teacher_config = False, None

    def drop_text_model(self) -> None:
        """Leaves the text tower out of this model and its checkpoints: labels and prompts are then fixed."""
        self.hp_dval.refresh_text_embeddings()
        self.hp_dval.text = None
        self.config.has_text_model = False

    @torch.no_grad()
    def _start_contexts(self) -> None:
        """Gives contexts that are still zeros their first value, and an adapter to train them."""
        base, config = self.hp_dval, self.config
        base.refresh_text_embeddings()  # the hand-written ones, if no label was ever set
        layer = next((m for m in base.get_input_embeddings().modules() if hasattr(m, "token_indices")), None)
        table = (base.get_input_embeddings() if layer is None else layer.base_layer).weight
        if not base.has_learned_context():
            ids = config.context_token_ids
            if config.context_init == "template":
                words = table[base.prompt_ids[HANDWRITTEN, 0, 1 : 1 + config.num_context_tokens]]
                rows = words.repeat(len(ids) // len(words), 1)
            else:
                rows = torch.empty(len(ids), table.shape[1], dtype=table.dtype, device=table.device).normal_(std=0.02)
            if layer is None:
                table[ids] = rows
            else:
                for adapter in layer.active_adapters:
                    place = torch.tensor([ids.index(token) for token in layer.token_indices[adapter]])
                    layer.trainable_tokens_delta[adapter].copy_(rows[place])
        if layer is None:
            _peft().inject_adapter_in_model(self.prompt_adapter_config(), self, adapter_name="prompts")

    def _stage_parameters(self) -> list[nn.Parameter]:
        """Parameters that the stage trains."""
        parameters = []
        if self.config.stage != "stage2":
            student = self.hp_dval.student
            parameters += list(_adapter_parameters(student)) or list(student.parameters())
        if self.config.stage != "stage1" and self.hp_dval.text is not None:
            parameters += list(_adapter_parameters(self.hp_dval.get_input_embeddings()))
        parameters += self.parameters(recurse=False)  # the scores' scale and bias, with `learn_logit_scale`
        return parameters

    def _freeze(self) -> None:
        trained = {id(parameter) for parameter in self._stage_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _check_stage(self) -> None:
        trained = {id(parameter) for parameter in self._stage_parameters()}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                raise ValueError(
                    f"{name} requires gradients, but {self.config.stage} keeps it frozen: call set_stage first."
                )
        if self.config.stage != "stage1" and not self.hp_dval.has_text_adapter():
            raise ValueError(f"the contexts that {self.config.stage} trains have no adapter yet: call set_stage first.")

    # --- scores

    def scores(
        self, image_embeds: torch.Tensor, patch_embeds: torch.Tensor | None, text_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Fused scores (HP-DVAL eq. 4, 5, 8 and 9): `alpha * global + (1 - alpha) * mean of the top-k patches`, scaled
        and shifted as the configuration says.

        Args:
            image_embeds (`torch.Tensor` of shape `(B, E)`), patch_embeds (`(B, P, E)`; unused with `alpha=1`),
            text_embeds (`(2, N, E)`): see [`HPDVALModelOutput`].

        Returns:
            `torch.Tensor` of shape `(B, N)`, fp32: bf16 would leave cosines three digits, and their ranks with them.

        Raises:
            ValueError: fewer patches than `local_top_k`.
        """
        alpha, normalize = self.config.alpha, self.config.score_normalization
        with torch.autocast(image_embeds.device.type, enabled=False):
            image, text, scale = image_embeds.float(), text_embeds.float(), self.logit_scale.float().exp()
            if normalize == "cosine":
                image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            views = [(alpha, image @ text[0].T)]  # (B, N)
            if alpha < 1:
                patches = patch_embeds.float()
                if patches.shape[1] < self.config.local_top_k:
                    raise ValueError(
                        f"a picture has {patches.shape[1]} patches, fewer than local_top_k={self.config.local_top_k}."
                    )
                if normalize == "cosine":
                    patches = F.normalize(patches, dim=-1)
                similarity = text[1] @ patches.transpose(1, 2)  # (B, N, P)
                top = similarity.topk(self.config.local_top_k, dim=-1, sorted=False).values
                views.append((1 - alpha, top.mean(-1)))
            scores = [(weight, scale * score) for weight, score in views]
            if normalize == "class_l2":
                scores = [(weight, F.normalize(score, dim=-1)) for weight, score in scores]
            return sum(weight * score for weight, score in scores) + self.logit_bias.float()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> HPDVALImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): pictures; H and W multiples of the patch size.
            labels (`torch.Tensor` of shape `(B, N)`, *optional*): multi-hot; 1 present, 0 absent, in between soft,
                -100 unknown (no loss, no gradient).
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*): as everywhere in transformers.

        Raises:
            ValueError: labels outside the contract (values are checked only outside `torch.compile`), or, in training,
                parameters that the stage keeps frozen and that require gradients.
        """
        config = self.config
        compiling = torch.compiler.is_compiling()
        if self.training and labels is not None and not compiling:
            self._check_stage()
        output = self.hp_dval(pixel_values, output_hidden_states, output_attentions, return_dict=True)
        logits = self.scores(output.image_embeds, output.patch_embeds, output.text_embeds)

        loss = distillation_loss = semantic_consistency_loss = None
        if labels is not None:
            if not compiling:
                validate_labels(labels, self.num_labels)
            loss = multilabel_loss(logits, labels, config.loss_type, config.loss_kwargs)
            if self.training and config.stage != "stage2" and config.distillation_weight:
                with torch.no_grad():
                    teacher = self.hp_dval.teacher(pixel_values, interpolate_pos_encoding=True).image_embeds
                # HP-DVAL eq. 2, of the class token in the shared space; a mean over its entries, as in the code.
                distillation_loss = F.l1_loss(output.image_embeds.float(), teacher.float())
                loss = loss + config.distillation_weight * distillation_loss
            if self.training and config.stage != "stage1" and config.semantic_consistency_weight:
                # HP-DVAL eq. 10: of the global prompts alone, which the code has as the local ones.
                handwritten = self.hp_dval.text_embeddings[HANDWRITTEN]
                semantic_consistency_loss = F.l1_loss(output.text_embeds[0].float(), handwritten.float())
                loss = loss + config.semantic_consistency_weight * semantic_consistency_loss
        return HPDVALImageClassifierOutput(
            loss=loss,
            logits=logits,
            distillation_loss=distillation_loss,
            semantic_consistency_loss=semantic_consistency_loss,
            image_embeds=output.image_embeds,
            patch_embeds=output.patch_embeds,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


__all__ = ["HPDVALForImageClassification", "HPDVALModel", "HPDVALPreTrainedModel"]
