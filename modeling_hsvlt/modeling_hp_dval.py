"""PyTorch HP-DVAL: a CLIP for long-tailed and few-shot multi-label images.

Hierarchical Prompt tuning and Dual-View Alignment Learning (IEEE TIP 2025, arXiv 2509.17747). Phase 1 aligns an image
tower with the hand-written prompts in two views, the class token and the patches; phase 2 freezes it and learns one
context for each view. Inference needs the image tower and two cached text embeddings a label.

The paper's equations are followed, by their numbers there; where the released code differs, the configuration offers
its variant: https://github.com/jiexuanyan/hp_dval/tree/7ace2c545ab9b442378885dffe72ba28816d6b9a

Shapes: B images, P patches, N labels, M context tokens, L tokens of a prompt, E width of the shared space.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipModel,
    SiglipVisionModel,
    ViTModel,
)
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple, maybe_autocast

from .configuration_hp_dval import PHASES, HPDVALConfig
from .hp_dval_prompts import (
    HPDVALContexts,
    HPDVALPrompts,
    HPDVALTexts,
    adapter_parameters,
    build_prompts,
    build_text_tower,
    encode_prompts_of,
    fold_token_adapter,
    placeholder_prompts,
)
from .kept_embeddings import KeptEmbeddings
from .label_contract import UNKNOWN_LABEL
from .label_prompts import _label_texts
from .losses_multilabel import items_in_step
from .modeling_multilabel import (
    MultiLabelPreTrainedModel,
    require_images,
)
from .naflex_patches import naflex_inputs

# Not used here: a checkpoint carries the files that its modeling file imports, and the pipeline must be among them.
from .pipeline_multilabel import MultiLabelImageClassificationPipeline  # noqa: F401

logger = logging.get_logger(__name__)

IMAGE_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "siglip2_vision_model": Siglip2VisionModel,
}


@dataclass
class HPDVALModelOutput(ModelOutput):
    """Output of [`HPDVALModel`].

    Args:
        image_embeds (`torch.FloatTensor` of shape `(B, E)`): the image, not normalised.
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
        loss (`torch.FloatTensor` of shape `()`, fp32): with `labels`; in training with the phase's other losses.
        logits (`torch.FloatTensor` of shape `(B, N)`, fp32): fused scores; their sigmoid is the label's probability.
        distillation_loss (`torch.FloatTensor` of shape `()`): L1 distance to the teacher; training phase 1 and joint.
        semantic_consistency_loss (`torch.FloatTensor` of shape `()`): L1 distance of the learned global text
            embeddings to the hand-written ones; training phase 2 and joint.
        image_embeds, patch_embeds, hidden_states, attentions: see [`HPDVALModelOutput`]. All but losses have one row a
            image, as pipelines unroll it.
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
    """The student: an image tower whose class token and patches are both mapped into the shared space.

    SigLIP has no class token: its pooling head reads all patches, and for the local view each patch alone.
    """

    def __init__(self, config: HPDVALConfig):
        super().__init__()
        vision = config.vision_config
        if vision.model_type == "vit":
            self.backbone: PreTrainedModel = ViTModel._from_config(vision, add_pooling_layer=False)
        else:
            self.backbone = IMAGE_TOWERS[vision.model_type]._from_config(vision)
        if config.embedding_head == "siglip":
            self.projection = nn.Identity()
        elif config.embedding_head == "clip":
            self.projection = nn.Linear(vision.hidden_size, config.projection_dim, bias=False)
        else:
            self.projection = nn.Sequential(
                nn.Linear(vision.hidden_size, config.projection_dim),
                nn.Tanh(),
                nn.Linear(config.projection_dim, config.projection_dim),
            )

    def forward(
        self, pixel_values: torch.Tensor, patches: bool = True, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple | None, tuple | None]:
        """Image `(B, E)`, patches `(B, P, E)` where asked for, hidden states and attentions."""
        output = run_tower(self.backbone, pixel_values, **kwargs)
        if isinstance(self.projection, nn.Identity):
            local = None
            if patches:
                states = output.last_hidden_state  # (B, P, E)
                local = self.backbone.head(states.flatten(0, 1)[:, None]).view_as(states)
            return output.pooler_output, local, output.hidden_states, output.attentions
        states = output.last_hidden_state if patches else output.last_hidden_state[:, :1]
        if self.backbone.config.model_type == "clip_vision_model":
            states = self.backbone.post_layernorm(states)  # transformers applies it to the class token alone
        states = self.projection(states)  # (B, 1 + P, E)
        return states[:, 0], states[:, 1:] if patches else None, output.hidden_states, output.attentions


def run_tower(tower: PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> ModelOutput:
    """The output of an image tower of transformers for images `(B, 3, H, W)`, of other sizes than its own too."""
    if tower.config.model_type == "siglip2_vision_model":
        patch = tower.config.patch_size
        inputs = naflex_inputs(pixel_values, (patch, patch))
    else:
        inputs = {"pixel_values": pixel_values, "interpolate_pos_encoding": True}
    return tower(**inputs, return_dict=True, **kwargs)


class HPDVALLogitScale(nn.Module):
    """Logarithm of the scores' scale, and their bias; a module of its own as [`HPDVALPrompts`] is."""

    def __init__(self, config: HPDVALConfig):
        super().__init__()
        scale, bias = torch.tensor(math.log(config.logit_scale)), torch.tensor(float(config.logit_bias))
        if config.learn_logit_scale:
            self.logit_scale, self.logit_bias = nn.Parameter(scale), nn.Parameter(bias)
        else:  # no parameters: FSDP2 refuses those without a dimension
            self.register_buffer("logit_scale", scale)
            self.register_buffer("logit_bias", bias)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.logit_scale.float().exp(), self.logit_bias.float()


class HPDVALPreTrainedModel(MultiLabelPreTrainedModel):
    """Initialisation, loading and saving: plain checkpoints, with text embeddings that fit the weights."""

    config: HPDVALConfig
    base_model_prefix = "hp_dval"
    renamed_weights = {
        r"hp_dval\.(prompt_ids|text_embeddings)$": r"hp_dval.prompts.\1",
        r"^(logit_scale|logit_bias)$": r"scale.\1",
    }
    _supports_flash_attn = True
    _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # By the layer itself: transformers asks no class from outside its library about a module without weights.
        if module is getattr(self, self.base_model_prefix, self).student.projection and isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)  # as in CLIP
        elif isinstance(module, HPDVALPrompts):
            init.copy_(module.prompt_ids, placeholder_prompts(self.config).to(module.prompt_ids.device))
            init.zeros_(module.text_embeddings)
        elif isinstance(module, HPDVALLogitScale):
            init.constant_(module.logit_scale, math.log(self.config.logit_scale))
            init.constant_(module.logit_bias, self.config.logit_bias)

    @torch.no_grad()
    def initialize_weights(self):
        # CLIP draws the weights of its layers from the modules around them, which transformers passes over when the
        # outermost class is not its own: each tower first, by itself.
        for module in self.modules():
            if module is not self and isinstance(module, PreTrainedModel):
                module.initialize_weights()
        super().initialize_weights()
        table = getattr(self, self.base_model_prefix, self).get_input_embeddings()
        if table is not None and not getattr(table.weight, "_is_hf_initialized", False):
            # Contexts of zeros are contexts that phase 2 has not started yet.
            table.weight[self.config.context_token_ids[0] :] = 0

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Module | None:
        """Refused: the last rows of the text tower's table are contexts, whose ids and prompts hang on its size."""
        tokens = self.config.text_config.vocab_size
        if new_num_tokens not in (None, tokens):
            raise ValueError(
                f"the last {self.config.num_reserved_tokens} of the text tower's {tokens} tokens are contexts, which "
                f"would lie elsewhere among {new_num_tokens}: resize the CLIP in place of this model, and build one "
                "from it with HPDVALForImageClassification.from_clip."
            )
        return self.get_input_embeddings()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not model._hf_peft_config_loaded:
            model._freeze()  # loading makes new parameters
        return loaded

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *args,
        **kwargs,
    ):
        """As in transformers, with text embeddings that fit the weights, and with the context tokens that
        [`~HPDVALForImageClassification.set_phase`] put into an adapter written back into the embedding table: a plain
        checkpoint. (An adapter that was loaded with `load_adapter` is saved by itself, as in transformers.)

        With a `state_dict` of other weights than the model's own, an average for example, the embeddings are theirs;
        the model is only read then, and may train on in another thread."""
        base = getattr(self, self.base_model_prefix, self)
        own = state_dict is None
        if own:
            base.store_text_embeds()
        if not getattr(self, "_hf_peft_config_loaded", False):
            layers = [(name, module) for name, module in self.named_modules() if hasattr(module, "token_indices")]
            if layers or not own:
                state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            for layer in layers:
                fold_token_adapter(state_dict, *layer)  # type: ignore[arg-type]  # a dict by now
            if not own and base.text is not None:
                encode_prompts_of(state_dict, self.config)
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)


class HPDVALModel(HPDVALTexts, HPDVALPreTrainedModel):
    """Student, teacher and text tower, and the text embeddings of the labels."""

    def __init__(self, config: HPDVALConfig):
        super().__init__(config)
        self.student = HPDVALImageEncoder(config)
        self.teacher: PreTrainedModel | None = None
        if config.has_teacher:
            teacher = config.teacher_config
            kind = IMAGE_TOWERS[teacher.model_type] if config.is_siglip else CLIPVisionModelWithProjection
            self.teacher = kind._from_config(teacher)
        self.text = build_text_tower(config) if config.has_text_model else None
        self.prompts = HPDVALPrompts(config)
        self._views, self._handwritten = KeptEmbeddings(), KeptEmbeddings()
        self.post_init()
        # Those that are there: accelerate refuses others. Contexts are read from the token table outside CLIP's module
        # around it, so FSDP2 must not wrap that module: accelerate wraps the table, which `get_input_embeddings` names.
        families = ("CLIP", "Siglip", "Siglip2")
        whole = {f"{family}{part}" for family in families for part in ("EncoderLayer", "VisionEmbeddings")}
        whole |= set(getattr(self, "_no_split_modules", None) or ())
        whole -= {f"{family}TextEmbeddings" for family in families}
        there = {type(module).__name__ for module in self.modules()}
        setattr(self, "_no_split_modules", whole & there)  # noqa: B010  (a list in the class)
        self._freeze()

    def _freeze(self) -> None:
        for tower in (self.teacher, self.text):  # in no phase they train
            if tower is not None:
                tower.requires_grad_(False)

    def train(self, mode: bool = True):
        """As in torch; what the phase keeps frozen stays in evaluation mode."""
        super().train(mode)
        frozen = [self.teacher, self.text, self.student if self.config.phase == "phase2" else None]
        for tower in frozen:
            if tower is not None:
                tower.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HPDVALModelOutput:
        """See [`MultiLabelPreTrainedModel`]; H and W are multiples of the patch size, and `kwargs` what the student's
        attention takes."""
        pixel_values = require_images(pixel_values)
        states, attentions = self._asked(kwargs, output_hidden_states, output_attentions)
        kwargs = {name: value for name, value in kwargs.items() if name in TransformersKwargs.__annotations__}
        image_embeds, patch_embeds, hidden_states, attentions = self.student(
            pixel_values,
            patches=self.config.alpha < 1,
            output_hidden_states=states,
            output_attentions=attentions,
            **kwargs,
        )
        return HPDVALModelOutput(
            image_embeds=image_embeds,
            patch_embeds=patch_embeds,
            text_embeds=self.text_embeds().to(image_embeds.device),
            hidden_states=hidden_states,
            attentions=attentions,
        )


class HPDVALForImageClassification(HPDVALContexts, HPDVALPreTrainedModel):
    """HP-DVAL's fused scores of an image's labels, and the two phases of its training.

    Example:

    ```python
    >>> from modeling_hsvlt import HPDVALForImageClassification
    >>> from transformers import AutoTokenizer, CLIPModel

    >>> clip = CLIPModel.from_pretrained("path/to/clip-vit-base-patch16")
    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/clip-vit-base-patch16")
    >>> model = HPDVALForImageClassification.from_clip(clip, tokenizer, ["cat", "dog"])
    >>> model.set_phase("phase1")  # train, then model.set_phase("phase2") and train on
    ```
    """

    def __init__(self, config: HPDVALConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.hp_dval = HPDVALModel(config)
        self.scale = HPDVALLogitScale(config)
        self.post_init()
        self._freeze()

    @classmethod
    def from_clip(
        cls,
        clip_model: CLIPModel | SiglipModel | Siglip2Model,
        tokenizer,
        label_names: Sequence[str],
        *,
        student: ViTModel | None = None,
        label_text: Mapping[str, str] | None = None,
        **config_kwargs,
    ) -> "HPDVALForImageClassification":
        """A model that starts as `clip_model` zero-shot: its towers are copied, the teacher included.

        Args:
            clip_model (`CLIPModel`, `SiglipModel` or `Siglip2Model`): any size; left untouched, nothing is shared with
                it. A SigLIP brings scale and bias of its scores. (SigLIP 2 of fixed size is a `SiglipModel`, NaFlex a
                `Siglip2Model`.)
            tokenizer: its tokenizer, left untouched. `tokenizer.add_tokens(model.config.context_tokens,
                special_tokens=True)` would give it the context tokens, under the ids that the model has for them.
            label_names (sequence of `str`), label_text (`Mapping`, *optional*): see [`set_labels`].
            student (`ViTModel`, *optional*): image tower to train in place of CLIP's, as in the paper, which starts
                from ImageNet. It must read images normalised like CLIP's.
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
        siglip = clip_config.model_type in ("siglip", "siglip2")
        width = clip_config.text_config.projection_size if siglip else clip_config.projection_dim
        text_config = {**clip_config.text_config.to_dict(), "projection_dim": width}
        if siglip:
            written = tokenizer("")["input_ids"]  # SigLIP has no start, and SigLIP 2 either
            special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
            text_config |= {name: token if token in written else None for name, token in special.items()}
            text_config["pad_token_id"] = tokenizer.pad_token_id
            config_kwargs.setdefault("logit_scale", clip_model.logit_scale.exp().item())
            config_kwargs.setdefault("logit_bias", clip_model.logit_bias.item())
        else:
            text_config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        contexts = 2 * (len(label_names) if config_kwargs.get("class_specific") else 1)
        contexts *= config_kwargs.get("num_context_tokens", HPDVALConfig.num_context_tokens)
        teacher_config = {**clip_config.vision_config.to_dict(), "projection_dim": width}
        config = HPDVALConfig(
            text_config={**text_config, "vocab_size": num_tokens + contexts},
            vision_config=teacher_config if student is None else student.config.to_dict(),
            teacher_config=teacher_config,
            projection_dim=width,
            id2label=dict(enumerate(label_names)),
            label2id={name: index for index, name in enumerate(label_names)},
            **config_kwargs,
        )
        model = cls(config)

        weights = clip_model.state_dict()

        def part(*prefixes: str, bare: bool) -> dict[str, torch.Tensor]:
            found = {key: value for key, value in weights.items() if key.startswith(prefixes)}
            return {key.removeprefix(prefixes[0]): value for key, value in found.items()} if bare else found

        base = model.hp_dval
        if base.teacher is not None:
            base.teacher.load_state_dict(part("vision_model.", "visual_projection.", bare=siglip))
        if student is None:
            base.student.backbone.load_state_dict(part("vision_model.", bare=True))
            if config.embedding_head == "clip":
                base.student.projection.load_state_dict(part("visual_projection.", bare=True))
        else:
            backbone = {key: value for key, value in student.state_dict().items() if not key.startswith("pooler.")}
            base.student.backbone.load_state_dict(backbone)
        if base.text is not None:
            text = part("text_model.", "text_projection.", bare=siglip)
            name = next(name for name in text if name.endswith("token_embedding.weight"))
            table = text[name][:num_tokens]
            text[name] = torch.cat((table, table.new_zeros(contexts, table.shape[1])))
            base.text.load_state_dict(text)
            model.set_labels(label_names, tokenizer, label_text=label_text)
        return model

    def set_labels(self, label_names: Sequence[str], tokenizer, *, label_text: Mapping[str, str] | None = None) -> None:
        """Sets the labels, in the order of the model's outputs; learned class-shared contexts serve any label.

        Args:
            label_names (sequence of `str`): names; underscores are read as spaces.
            tokenizer: the tokenizer of the CLIP or SigLIP.
            label_text (`Mapping`, *optional*): what to write in place of a name, for example
                `label_prompts.VOC_LABEL_TEXT`.

        Raises:
            ValueError: a checkpoint without text tower, a name that is empty or too long, a template whose words are
                not `num_context_tokens` with `context_init="template"`, other labels for class-specific contexts, or
                names that read the same: one of them, and its rows in data, would stand for nothing.
        """
        base, config = self.hp_dval, self.config
        if base.text is None:
            raise ValueError(
                "labels are set by the text tower, and this checkpoint holds none; set them before dropping it."
            )
        names = list(label_names)
        if config.class_specific and names != [config.id2label[index] for index in range(config.num_labels)]:
            raise ValueError("this model has a context for each of its labels: other labels need a new model.")
        texts = _label_texts(names, label_text or {})
        before, after = config.label_template.split("{}")
        template = tokenizer(before.rstrip(), add_special_tokens=False)["input_ids"]
        if config.context_init == "template" and len(template) != config.num_context_tokens:
            raise ValueError(
                f"context_init='template' needs as many words in front of {{}} as num_context_tokens "
                f"({config.num_context_tokens}), but {before!r} has {len(template)} tokens."
            )
        longest = config.text_config.max_position_embeddings - 2 - max(len(template), config.num_context_tokens)
        tokens = []
        for name, text in zip(names, texts, strict=True):
            # As it stands in the sentence, where SentencePiece writes a word otherwise than alone.
            whole = tokenizer(f"{before}{text}{after}", add_special_tokens=False)["input_ids"]
            if whole[: len(template)] != template:
                whole = template + tokenizer(f"{text}{after}", add_special_tokens=False)["input_ids"]
            tokens.append(whole[len(template) :])
            if len(tokens[-1]) > longest:
                raise ValueError(f"label {name!r} has {len(tokens[-1])} tokens, but a prompt has room for {longest}.")

        config.set_label_names(names)
        self.num_labels = len(names)
        if not config.is_siglip:
            config.prompt_length = 2 + max(len(template), config.num_context_tokens) + max(map(len, tokens))
        side = tokenizer.padding_side if config.is_siglip else "right"
        base.prompts.prompt_ids = build_prompts(config, template, tokens, side).to(base.prompts.prompt_ids.device)
        base.store_text_embeds()

    # --- phases

    def set_phase(self, phase: str) -> None:
        """Chooses what trains and which losses join the classification loss; what does not train is frozen.

        | phase | trains | loss |
        |---|---|---|
        | `"phase1"` | student | classification + distillation (HP-DVAL eq. 16) |
        | `"phase2"` | the context tokens | classification + semantic consistency (eq. 17) |
        | `"joint"` | both | classification + both |

        Contexts are rows of the text tower's embedding table, trained by peft's `TrainableTokensConfig`. A model that
        is not in a `PeftModel` with such an adapter (`get_peft_model(model, model.prompt_adapter_config())`) gets one
        put in place, and `save_pretrained` then writes a plain checkpoint. Adapters of peft on the student (LoRA) train
        in its place. Call this before the optimizer is made; training in another state is refused.

        Raises:
            ValueError: an unknown phase, or a tower that it needs and that was dropped.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {PHASES}, but it is {phase!r}.")
        if phase != "phase1" and self.hp_dval.text is None:
            raise ValueError(f"{phase} trains contexts of the text tower, and this checkpoint holds none.")
        if phase != "phase2" and self.hp_dval.teacher is None and self.config.distillation_weight:
            raise ValueError(f"{phase} needs the teacher, which this checkpoint lacks: or set distillation_weight=0.")
        self.config.phase = phase
        if phase != "phase1":
            self._start_contexts()
        self._freeze()
        self.train(self.training)

    def drop_teacher(self) -> None:
        """Leaves the teacher out of this model and its checkpoints; only phase 1 needs it."""
        self.hp_dval.teacher = None
        self.config.has_teacher, self.config.teacher_config = False, None

    def drop_text_model(self) -> None:
        """Leaves the text tower out of this model and its checkpoints: labels and prompts are then fixed."""
        self.hp_dval.store_text_embeds()
        self.hp_dval.text = None
        self.config.has_text_model = False

    def _phase_parameters(self) -> list[nn.Parameter]:
        """Parameters that the phase trains."""
        parameters = []
        if self.config.phase != "phase2":
            student = self.hp_dval.student
            parameters += list(adapter_parameters(student)) or list(student.parameters())
        if self.config.phase != "phase1" and self.hp_dval.text is not None:
            parameters += list(adapter_parameters(self.hp_dval.get_input_embeddings()))
        parameters += self.scale.parameters()  # with `learn_logit_scale`
        return parameters

    def _freeze(self) -> None:
        trained = {id(parameter) for parameter in self._phase_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def _check_phase(self) -> None:
        trained = {id(parameter) for parameter in self._phase_parameters()}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and id(parameter) not in trained:
                raise ValueError(
                    f"{name} requires gradients, but {self.config.phase} keeps it frozen: call set_phase first."
                )
        if self.config.phase != "phase1" and not self.hp_dval.has_text_adapter():
            raise ValueError(f"the contexts that {self.config.phase} trains have no adapter yet: call set_phase first.")

    # --- scores

    def scores(
        self, image_embeds: torch.Tensor, patch_embeds: torch.Tensor | None, text_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Fused scores (eq. 4, 5, 8 and 9), scaled and shifted as the configuration says: of label `i`
        `s_i = alpha <G_i, f_cls> + (1 - alpha) mean of the k largest <L_i, f_j> over patches j`, `<.,.>` the cosine.

        The code has `alpha` at the local score, and in place of cosines dot products whose vector over the labels is
        divided by its norm (`score_normalization="class_l2"`).

        Args:
            image_embeds (`torch.Tensor` of shape `(B, E)`), patch_embeds (`(B, P, E)`; unused with `alpha=1`),
            text_embeds (`(2, N, E)`): see [`HPDVALModelOutput`].

        Returns:
            `torch.Tensor` of shape `(B, N)`, fp32: bf16 would leave cosines three digits, and their ranks with them.

        Raises:
            ValueError: fewer patches than `local_top_k`.
        """
        alpha, normalize = self.config.alpha, self.config.score_normalization
        with maybe_autocast(image_embeds.device.type, enabled=False):
            image, text = image_embeds.float(), text_embeds.float()
            scale, bias = (value.to(image.device) for value in self.scale())
            if normalize == "cosine":
                image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
            views = [(alpha, image @ text[0].T)]  # (B, N)
            if alpha < 1:
                patches = patch_embeds.float()
                if patches.shape[1] < self.config.local_top_k:
                    raise ValueError(
                        f"an image has {patches.shape[1]} patches, fewer than local_top_k={self.config.local_top_k}."
                    )
                if normalize == "cosine":
                    patches = F.normalize(patches, dim=-1)
                similarity = text[1] @ patches.transpose(1, 2)  # (B, N, P)
                top = similarity.topk(self.config.local_top_k, dim=-1, sorted=False).values
                views.append((1 - alpha, top.mean(-1)))
            scores = [(weight, scale * score) for weight, score in views]
            if normalize == "class_l2":
                scores = [(weight, F.normalize(score, dim=-1)) for weight, score in scores]
            return sum(weight * score for weight, score in scores) + bias

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HPDVALImageClassifierOutput:
        """See [`HPDVALModel`]. Of several batches that make a step, by `num_items_in_batch`, each loss is this batch's
        part of the step's, and the parts add up.

        Raises:
            ValueError: in training, parameters that the phase keeps frozen and that require gradients.
        """
        config = self.config
        if self.training and labels is not None and not torch.compiler.is_compiling():
            self._check_phase()
        output = self.hp_dval(pixel_values, output_hidden_states, output_attentions, return_dict=True, **kwargs)
        logits = self.scores(output.image_embeds, output.patch_embeds, output.text_embeds)

        loss = distillation_loss = semantic_consistency_loss = None
        if labels is not None:
            labels = self._check_labels(labels, self.num_labels).to(logits.device)
            loss = self._loss(logits, labels, num_items_in_batch)
            # What each image counts in a mean over images; by its known labels where several batches make a step.
            if num_items_in_batch is None:
                share = logits.new_full((len(logits),), 1 / max(len(logits), 1))
            else:
                share = (labels != UNKNOWN_LABEL).sum(1) / items_in_step(num_items_in_batch, logits)
            if self.training and config.phase != "phase2" and config.distillation_weight:
                with torch.no_grad():
                    teacher = run_tower(self.hp_dval.teacher, pixel_values)
                # Eq. 2: |teacher(x) - f_cls| in the shared space; a mean over its entries, as in the code.
                seen = teacher.pooler_output if config.is_siglip else teacher.image_embeds
                distance = (output.image_embeds.float() - seen.to(logits.device).float()).abs()
                distillation_loss = share @ distance.mean(-1)
                loss = loss + config.distillation_weight * distillation_loss
            if self.training and config.phase != "phase1" and config.semantic_consistency_weight:
                # Eq. 10: |H - G| of hand-written and global prompts; the code has the local ones in their place.
                handwritten = self.hp_dval.handwritten_embeds().to(logits.device)
                distance = F.l1_loss(output.text_embeds[0].float(), handwritten.float())
                semantic_consistency_loss = share.sum() * distance
                loss = loss + config.semantic_consistency_weight * semantic_consistency_loss
        found = {name: value for name, value in output.items() if name != "text_embeds"}
        losses = {"distillation_loss": distillation_loss, "semantic_consistency_loss": semantic_consistency_loss}
        return HPDVALImageClassifierOutput(loss=loss, logits=logits, **losses, **found)
