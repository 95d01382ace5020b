"""HP-DVAL configuration."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .configuration_multilabel import MultiLabelConfig, auto_map_of, preset_of

PHASES = ("phase1", "phase2", "joint")
# Image towers that give one token a patch, and for the whole image a class token in front or a pooling head.
HEADS = {"clip_vision_model": "clip", "siglip_vision_model": "siglip", "siglip2_vision_model": "siglip"}
STUDENT_TYPES = (*HEADS, "vit")
TEXT_TYPES = {tower.replace("vision", "text"): tower for tower in HEADS}  # and their teachers

# "vit-b-16": the published CLIP. "nano": this package's own, for tests and small data. Vocabularies are those of the
# text tower without context tokens, whose rows are added behind.
PRESETS: dict[str, dict[str, Any]] = {
    "vit-b-16": {"text_config": {"vocab_size": 49408}, "vision_config": {"patch_size": 16}},
    "nano": {
        "text_config": {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "bos_token_id": 510,
            "eos_token_id": 511,
            "pad_token_id": 511,
        },
        "vision_config": {
            "image_size": 64,
            "patch_size": 8,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "projection_dim": 64,
        "local_top_k": 10,
    },
}


@strict
class HPDVALConfig(MultiLabelConfig):
    r"""
    Configuration of [`HPDVALModel`] and [`HPDVALForImageClassification`]: dual-view alignment and hierarchical prompt
    tuning of a CLIP (HP-DVAL, IEEE TIP 2025, arXiv 2509.17747). Where the paper and its released code part ways, the
    defaults follow the paper and the code's variant is a choice, named below. The paper's loss is `loss_type`
    `"distribution_balanced"` with `positive_weight="class"`, which needs the training set's counts.

    Args:
        > Published

        text_config (`dict`, `CLIPTextConfig` or `SiglipTextConfig`, *optional*):
            Text tower. Its `vocab_size` counts the reserved context tokens.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Image tower that is trained, the student: `clip_vision_model` (the released code) or `vit` (the paper starts
            from an ImageNet ViT), or `siglip_vision_model`: SigLIP, and SigLIP 2 of fixed size, or
            `siglip2_vision_model`: SigLIP 2's NaFlex. Default: CLIP's ViT-B/16.
        teacher_config (`dict`, `CLIPVisionConfig` or `SiglipVisionConfig`, *optional*):
            The CLIP's own image tower, the frozen teacher of phase 1. None: like the student.
        projection_dim (`int`, defaults to 512):
            Width of the space that images and texts share.
        image_size (`int`, *optional*):
            Side of the square image that the checkpoint was trained on, in pixels. None: that of `vision_config`;
            another one is reached by interpolating the position embeddings.
        alpha (`float`, defaults to 0.4):
            Weight of the global score; the local one has `1 - alpha` (paper eq. 5; the code has it the other way
            round). 1 is CLIP's own score.
        local_top_k (`int`, defaults to 32):
            Patches whose mean score is a label's local score.
        num_context_tokens (`int`, defaults to 4):
            Learned context tokens of a prompt, `M`, for each of the two views.
        context_init (`str`, defaults to `"random"`):
            Start of phase 2: `"random"`, N(0, 0.02) (paper), or `"template"`, the embeddings of the template's words in
            front of the name (code), of which there must be `num_context_tokens`: phase 2 then starts at the
            hand-written prompts. With few steps or a small learning rate take `"template"`.
        label_template (`str`, defaults to `"a photo of a {}."`):
            Hand-written prompt. What follows `{}` also follows the name in the learned prompts.
        embedding_head (`str`, *optional*):
            From student tokens to the shared space: `"clip"`, CLIP's visual projection (the code), or `"mlp"`, two
            linear layers with a tanh between (the paper's two layers; the tanh is the code's), or `"siglip"` (not
            published): its attention pooling head, for the local view over each patch alone. None: that of the
            student's kind, for a ViT `"mlp"`.
        score_normalization (`str`, defaults to `"cosine"`):
            `"cosine"` (paper), or `"class_l2"` (code): dot products, each view's scores divided by their norm over the
            labels; then a label's logit depends on the other labels, and any logit scale cancels.
        distillation_weight (`float`, defaults to 1.0):
            Weight of the L1 distance to the teacher in phase 1; 0 runs no teacher.
        semantic_consistency_weight (`float`, defaults to 1.0):
            Weight of the L1 distance of the global learned text embeddings to the hand-written ones in phase 2.
        phase (`str`, defaults to `"phase1"`):
            What is trained: `"phase1"` the student, `"phase2"` the context tokens, `"joint"` both (an ablation).

        > Not published

        logit_scale (`float`, defaults to 1.0), logit_bias (`float`, defaults to 0.0):
            `logit = scale * score + bias`. The paper has neither, so its logits lie within [-1, 1]. A larger scale
            gives the loss more range; then choose a bias that puts the mean logit near what label frequency asks for,
            or the first steps go into moving all scores down. Prompts of a frozen tower want the scale of the least
            loss: with a larger one they learn to make all cosines smaller, whatever that does to their order. A SigLIP
            brings both.
        learn_logit_scale (`bool`, defaults to `False`):
            Whether factor and bias are trained, in every phase. Read when a model is built, which then has two
            parameters more, without a dimension: FSDP2 does not take those.
        class_specific (`bool`, defaults to `False`):
            Whether each label has contexts of its own. Not HP-DVAL; what LMPT and CoOp's "CSC" do.

        > Bookkeeping

        prompt_length (`int`, defaults to 16):
            Tokens of the longest prompt, start and end included; set with the labels.
        has_teacher, has_text_model (`bool`, defaults to `True`):
            Whether the checkpoint holds the teacher and the text tower; inference needs neither.

        Further fields are those of [`MultiLabelConfig`].
    """

    model_type = "hp_dval"
    renamed_fields = {"class_specific_context": "class_specific", "prompt_template": "label_template"}
    auto_classes = auto_map_of("hp_dval", "HPDVAL")
    keys_to_ignore_at_inference = [
        "distillation_loss",
        "semantic_consistency_loss",
        "image_embeds",
        "patch_embeds",
        "hidden_states",
        "attentions",
    ]
    sub_configs_defaults = {
        "text_config": SubConfigSpec(
            AutoConfig, model_type="clip_text_model", init_kwargs={"vocab_size": 49408 + 2 * 4}
        ),
        "vision_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model", init_kwargs={"patch_size": 16}),
        "teacher_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model", optional=True),
    }

    # Published
    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    teacher_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    image_size: int | None = None
    alpha: float | int = 0.4
    local_top_k: int = 32
    num_context_tokens: int = 4
    context_init: str = "random"
    label_template: str = "a photo of a {}."
    embedding_head: str | None = None
    score_normalization: str = "cosine"
    distillation_weight: float | int = 1.0
    semantic_consistency_weight: float | int = 1.0
    phase: str = "phase1"
    # Not published
    logit_scale: float | int = 1.0
    logit_bias: float | int = 0.0
    learn_logit_scale: bool = False
    class_specific: bool = False
    # Bookkeeping
    prompt_length: int = 16
    has_teacher: bool = True
    has_text_model: bool = True

    @classmethod
    def preset(cls, name: str, **overrides) -> "HPDVALConfig":
        """The published size (`"vit-b-16"`), or `"nano"` for tests and small data.

        Args:
            name (`str`): the size.
            overrides: any field of the configuration. Fields of `text_config` and `vision_config` are changed one by
                one; `text_config.vocab_size` is here without the context tokens, which are added.

        Raises:
            ValueError: an unknown size.
        """
        preset = preset_of(PRESETS, name)
        fields = {**preset, **overrides}
        for part in ("text_config", "vision_config"):
            fields[part] = {**preset[part], **overrides.get(part, {})}
            fields[part].setdefault("projection_dim", fields.get("projection_dim", cls.projection_dim))
        num_labels = len(fields["id2label"]) if fields.get("id2label") else fields.get("num_labels", 2)
        contexts = 2 * (num_labels if fields.get("class_specific") else 1)
        fields["text_config"]["vocab_size"] += contexts * fields.get("num_context_tokens", cls.num_context_tokens)
        return cls(**fields)

    def __post_init__(self, **kwargs):
        if "stage" in kwargs:  # its name before 0.1; for one release
            self.phase = kwargs.pop("stage").replace("stage", "phase")
        super().__post_init__(**kwargs)
        if self.has_teacher and self.teacher_config is None and self.vision_config.model_type in HEADS:
            self.teacher_config = type(self.vision_config)(**self.vision_config.to_dict())
        if not self.has_teacher:
            self.teacher_config = None
        if self.is_siglip:
            self.prompt_length = self.text_config.max_position_embeddings
        if self.image_size is None:
            self.image_size = side_of(self.vision_config)
        if self.embedding_head is None:
            self.embedding_head = HEADS.get(self.vision_config.model_type, "mlp")

    @property
    def is_siglip(self) -> bool:
        """Whether the text tower is a SigLIP's, which reads every prompt at its last place, padded to that."""
        return self.text_config.model_type in ("siglip_text_model", "siglip2_text_model")

    @property
    def num_reserved_tokens(self) -> int:
        """Context tokens of both views and, with `class_specific`, of all labels."""
        return 2 * self.num_context_tokens * (self.num_labels if self.class_specific else 1)

    @property
    def context_token_ids(self) -> list[int]:
        """Ids of the context tokens, the last rows of the vocabulary: the global view's, then the local view's."""
        return list(range(self.text_config.vocab_size - self.num_reserved_tokens, self.text_config.vocab_size))

    @property
    def context_tokens(self) -> list[str]:
        """Names of the context tokens, in the order of `context_token_ids`: `<global_0>`, ..., `<local_0>`, ...; with
        `class_specific`, `<global_{label}_{i}>` and so on."""
        labels = [f"{label}_" for label in range(self.num_labels)] if self.class_specific else [""]
        indices = range(self.num_context_tokens)
        return [f"<{view}_{label}{i}>" for view in ("global", "local") for label in labels for i in indices]

    def validate_architecture(self):
        """As transformers calls it, when made and before saving; a ValueError names the field and what it may be."""
        self._check_choices(
            embedding_head=("clip", "mlp", "siglip"),
            score_normalization=("cosine", "class_l2"),
            context_init=("random", "template"),
            phase=PHASES,
        )
        if self.vision_config.model_type not in STUDENT_TYPES:
            raise ValueError(
                f"vision_config is of type {self.vision_config.model_type!r}, but the student must give one token for "
                f"the image and one a patch: choose one of {STUDENT_TYPES}."
            )
        if (self.embedding_head == "siglip") != (HEADS.get(self.vision_config.model_type) == "siglip"):
            raise ValueError(
                f"embedding_head={self.embedding_head!r} does not go with a {self.vision_config.model_type}: leave it "
                "out."
            )
        if self.text_config.model_type not in TEXT_TYPES:
            raise ValueError(
                f"text_config is of type {self.text_config.model_type!r}; choose one of {tuple(TEXT_TYPES)}."
            )
        if self.has_teacher and self.teacher_config is None:
            raise ValueError("teacher_config is missing: a student that is no CLIP needs its teacher described.")
        towers = {"text_config": self.text_config}
        if self.teacher_config is not None:
            if self.teacher_config.model_type != TEXT_TYPES[self.text_config.model_type]:
                raise ValueError("teacher_config and text_config must be the two towers of one CLIP or SigLIP.")
            towers["teacher_config"] = self.teacher_config
        if self.embedding_head == "siglip":
            towers["vision_config"] = self.vision_config
            if not self.vision_config.vision_use_head:
                raise ValueError("vision_config.vision_use_head is false, but both views are read by that head.")
        for name, tower in towers.items():
            field = width_field(tower)
            if getattr(tower, field) != self.projection_dim:
                raise ValueError(
                    f"{name}.{field} is {getattr(tower, field)}, but must be projection_dim={self.projection_dim}."
                )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be within [0, 1], but it is {self.alpha}.")
        num_patches = (self.image_size // self.vision_config.patch_size) ** 2
        if not 1 <= self.local_top_k <= num_patches:
            raise ValueError(
                f"local_top_k must be from 1 to the {num_patches} patches of an image of {self.image_size} px, but it "
                f"is {self.local_top_k}."
            )
        if self.logit_scale <= 0:
            raise ValueError(f"logit_scale must be above 0, but it is {self.logit_scale}.")
        if self.num_context_tokens < 1:
            raise ValueError(f"num_context_tokens must be at least 1, but it is {self.num_context_tokens}.")
        if self.label_template.count("{}") != 1:
            raise ValueError(f"label_template must hold {{}} once, but it is {self.label_template!r}.")
        shortest, longest = self.num_context_tokens + 3, self.text_config.max_position_embeddings
        if self.is_siglip and self.prompt_length != longest:
            raise ValueError(
                f"prompt_length must be {longest}, all positions of a SigLIP's text tower, but it is "
                f"{self.prompt_length}."
            )
        if not shortest <= self.prompt_length <= longest:
            raise ValueError(
                f"prompt_length must be from {shortest} (start, context, one token of a name, end) to {longest} (the "
                f"positions of the text tower), but it is {self.prompt_length}."
            )
        if self.text_config.eos_token_id == 2 and not self.is_siglip:
            raise ValueError(
                "text_config.eos_token_id is 2, the mark of early CLIP configurations: texts would be read at their "
                "highest token id, which is a context token; set the tokenizer's own end token (49407 in CLIP)."
            )
        special = (self.text_config.bos_token_id, self.text_config.eos_token_id, self.text_config.pad_token_id)
        if self.context_token_ids[0] <= max(
            token for token in special[: 3 if self.is_siglip else 2] if token is not None
        ):
            raise ValueError(
                f"text_config.vocab_size ({self.text_config.vocab_size}) leaves no room for {self.num_reserved_tokens} "
                "context tokens behind the tokenizer's own; HPDVALForImageClassification.from_clip adds them."
            )


def width_field(tower: PreTrainedConfig) -> str:
    """Which field of a tower of CLIP or SigLIP says how many numbers it gives a text or an image."""
    if not tower.model_type.startswith("siglip"):
        return "projection_dim"
    return "projection_size" if tower.model_type in TEXT_TYPES else "hidden_size"


def side_of(tower: PreTrainedConfig) -> int:
    """Side in pixels of the square image that a tower has positions for; NaFlex's says how many patches."""
    num_patches = getattr(tower, "num_patches", None)
    return tower.image_size if num_patches is None else math.isqrt(num_patches) * tower.patch_size
