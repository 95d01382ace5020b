"""Additions to HSVLT, all off by default. The paper has none of them; the released code holds the top-down aggregation
in another form.

The tied label stream (`hsvlt_tied.py`) and class-specific residual attention help small data on a pretrained backbone;
candidates and samples (`hsvlt_candidates.py`) and chunks bound the cost of many labels; a label context is learned in
front of their names (`label_context.py`).

Not published either, and coded elsewhere: layer norms in the label stream and its `label_width`, and the shared
classifier (`modeling_hsvlt.py`); backbones other than ConvNeXt (`hsvlt_backbones.py`, `hsvlt_timm.py`); the pyramid on
a ViT (`hsvlt_pyramid.py`). `configuration_hsvlt.py` has their options under "Generalisations" and "Not published".
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_hsvlt import HSVLTConfig
from .hsvlt_candidates import HSVLTCandidateScorer, draw_labels, kept
from .hsvlt_tied import HSVLTTiedClassifier
from .label_contract import NOT_EVALUATED, UNKNOWN_LABEL
from .label_prompts import transfer_classifier
from .losses_multilabel import items_in_step, multilabel_loss
from .modeling_multilabel import MultiLabelPreTrainedModel, as_dtype_of, no_fp16_autocast, widened


class HSVLTResidualAttention(nn.Module):
    """Class-specific residual attention (CSRA: Zhu & Wu, ICCV 2021) on the last map.

    One linear classifier scores every pixel for every label, `s = LN(X) (W + W_text)^T + beta`. A label's logit is half
    the mean of its scores over the pixels and half their mean weighted by their own softmax: what is small in the
    image counts, and no query has to be learned. That is CSRA with `T = 1` and `lambda = 1`, halved, and with two
    differences: pixels are normalised and labels have a bias, and scores are not divided by the norm of the
    classifier's rows. `W_text` is not trained, and zero until
    `HSVLTForImageClassification.set_text_classifier` sets it; weight decay then pulls towards it.

    With `text_classes` it also keeps K classes of the backbone's own classifier with the text embeddings of their
    names, from which [`exchange`] makes the rows of new labels.
    """

    text_weight: torch.Tensor

    def __init__(self, config: HSVLTConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(hidden_size)
        self.weight = nn.Parameter(torch.empty(config.num_labels, hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_labels))
        self.register_buffer("text_weight", torch.zeros(config.num_labels, hidden_size))
        self.keep_classes(None, None)
        if config.text_classes is not None:
            sizes = (hidden_size, config.label_embedding_dim)
            self.keep_classes(*(torch.zeros(config.text_classes, size) for size in sizes))

    def keep_classes(self, weight: torch.Tensor | None, embeddings: torch.Tensor | None) -> None:
        """Keeps classifier rows (K, C) of other classes, and the text embeddings (K, D) of their names."""
        self.register_buffer("class_weight", weight)
        self.register_buffer("class_embeddings", embeddings)

    @torch.no_grad()
    def exchange(self, before: torch.Tensor, after: torch.Tensor, known: Sequence[int | None]) -> None:
        """Rows for other labels. A known label keeps its row and bias. A new one gets the rows of the kept classes and
        of the labels so far, averaged by similarity of their texts as `transfer_classifier` does it, and the mean bias.

        Args:
            before, after (`torch.Tensor` of shapes `(N, D)` and `(M, D)`): text embeddings of the labels.
            known (sequence of `int` or None): for each new label, which of the labels so far it is.
        """
        weights, texts = self.weight + self.text_weight, before
        if self.class_weight is not None:
            weights = torch.cat((self.class_weight.to(weights), weights))
            texts = torch.cat((self.class_embeddings.to(texts), texts))
        text_weight = transfer_classifier(weights, texts.float(), after.to(texts).float()).to(self.text_weight)
        weight, bias = torch.zeros_like(text_weight), self.bias.mean().repeat(len(after))
        new, old = ([pair[side] for pair in enumerate(known) if pair[1] is not None] for side in (0, 1))
        for rows, source in ((weight, self.weight), (bias, self.bias), (text_weight, self.text_weight)):
            rows[new] = source[old]
        self.weight, self.bias = (
            nn.Parameter(value.to(each), requires_grad=each.requires_grad)
            for value, each in ((weight, self.weight), (bias, self.bias))
        )
        self.text_weight = text_weight

    def forward(self, feature_map: torch.Tensor, class_ids: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            feature_map (`torch.Tensor` of shape `(B, C, H, W)`).
            class_ids (`torch.LongTensor` of shape `(N,)` or `(B, N)`, *optional*): labels to score; None: all.

        Returns:
            `torch.Tensor` of shape `(B, N)`: logits.
        """
        one_set = class_ids is None or class_ids.ndim == 1  # for all images
        with no_fp16_autocast(feature_map):
            scores = self.pixel_scores(feature_map, class_ids if one_set else None)
            logits = (scores.mean(1) + (scores.softmax(1) * scores).sum(1)) / 2
        return logits if one_set else logits.gather(1, class_ids)

    def pixel_scores(self, feature_map: torch.Tensor, class_ids: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) -> scores `(B, H * W, N)`, at least fp32, of all labels or of those of `class_ids` `(N,)`."""
        weight, bias = self.weight + self.text_weight, self.bias
        if class_ids is not None:
            weight, bias = weight[class_ids], bias[class_ids]
        pixels = feature_map.flatten(2).transpose(1, 2)
        pixels = self.norm(as_dtype_of(self.norm, pixels))
        return widened(F.linear(as_dtype_of(self, pixels), weight, bias))

    def join(self, stream_logits: torch.Tensor, pixel_logits: torch.Tensor) -> torch.Tensor:
        """The sum of the label stream's logits (B, N) and those of the pixel scores, by the share of the latter."""
        stream_logits = widened(stream_logits)
        return torch.lerp(stream_logits, pixel_logits.to(stream_logits), self.config.residual_attention_weight)


class HSVLTTopDownAggregation(nn.Module):
    """Cross-scale aggregation from coarse to fine: `Z <- (ReLU LN Linear)^2 [Z, M_i]` for `i` = 3, 2, 1 from `Z = M_4`.

    The released code builds it (`SimpleDecoding`) without running it, with a convolution over the label index, which
    mixes alphabetical neighbours, and with the dimensions of another variant; here it acts on each label alone (kernel
    1) with this model's dimensions.
    """

    def __init__(self, channels: list[int]):
        super().__init__()
        self.hidden_size = channels[-1] // 2
        self.scales = nn.ModuleList()
        in_size = channels[-1]
        for width in reversed(channels[:-1]):
            layers = []
            for size in (in_size + width, self.hidden_size):
                linear = nn.Linear(size, self.hidden_size, bias=False)
                layers += [linear, nn.LayerNorm(self.hidden_size), nn.ReLU()]
            self.scales.append(nn.Sequential(*layers))
            in_size = self.hidden_size

    def forward(self, multimodal_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
        state = multimodal_states[-1]
        for scale, finer in zip(self.scales, reversed(multimodal_states[:-1]), strict=True):
            state = scale(torch.cat((state, finer), dim=-1))
        return state  # (B, N, C_4 / 2)


def in_chunks(read, feature_maps, text_embeddings, class_ids, chunk: int | None, **asked) -> ModelOutput:
    """`read(feature_maps, text_embeddings, class_ids, **asked)`, the output of a classifier, by `chunk` labels at a
    time: the same, as labels never see one another, in bounded memory.

    Args:
        class_ids (`torch.LongTensor` of shape `(N,)` or `(B, N)`, *optional*): the labels; None: all.
        chunk (`int`, *optional*): None for all at once.
    """
    num_labels = len(text_embeddings) if class_ids is None else class_ids.shape[-1]
    # With gradients, chunks would spare no memory, and states put together would be none that the logits come from.
    if chunk is None or torch.is_grad_enabled() or num_labels <= chunk:
        return read(feature_maps, text_embeddings, class_ids, **asked)
    if class_ids is None:
        class_ids = torch.arange(num_labels, device=text_embeddings.device)
    feature_maps = list(feature_maps)
    outputs = [read(feature_maps, text_embeddings, ids, **asked) for ids in class_ids.split(chunk, dim=-1)]
    whole = outputs[0]
    whole["logits"] = torch.cat([output.logits for output in outputs], dim=1)
    for field, dim in {"label_hidden_states": 1, "multimodal_states": 1, "attentions": 2}.items():
        if field in whole:
            stages = zip(*(output[field] for output in outputs), strict=True)
            whole[field] = tuple(None if stage[0] is None else torch.cat(stage, dim=dim) for stage in stages)
    return whole


class HSVLTAdditions(MultiLabelPreTrainedModel):
    """What a classifier does with the additions that it has."""

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (HSVLTResidualAttention, HSVLTTiedClassifier)):
            for tensor in (module.weight, module.bias, *module.buffers(recurse=False)):
                init.zeros_(tensor)
        elif isinstance(module, HSVLTCandidateScorer):
            if module.weight is not None:
                init.trunc_normal_(module.weight, std=0.02)
            init.constant_(module.bias, -math.log(module.config.num_labels))  # one label is there
        else:
            super()._init_weights(module)

    @property
    def _own_rows(self) -> int | None:
        """How many labels there are weights for, where the classifier is not shared alone."""
        if self.residual_attention is not None:
            return len(self.residual_attention.text_weight)
        return len(self.hsvlt.label_embeddings.weight) if self.config.classifier == "per_label" else None

    def _text_embeddings(self, text_embeddings: torch.Tensor | None) -> torch.Tensor:
        """Those given, those of a learned context, or the checkpoint's; with a tied label stream the classifier's."""
        if self.config.label_stream == "tied":
            if text_embeddings is not None or self.label_context is not None:
                raise ValueError(
                    'label_stream="tied" reads no label texts: give neither text_embeddings nor a context.'
                )
            return self.classifier()
        if text_embeddings is None:
            return self.hsvlt.label_embeddings() if self.label_context is None else self.label_context()
        if self._own_rows is not None and text_embeddings.shape[0] != self.num_labels:
            raise ValueError(
                f"text_embeddings of {text_embeddings.shape[0]} labels do not fit a classifier with a weight for each "
                f"of {self.num_labels} labels; choose with class_ids, or exchange_labels where classifier='shared'."
            )
        return text_embeddings

    @property
    def text_classifier_holder(self) -> nn.Module | None:
        """The module whose `text_weight` `set_text_classifier` sets; None: this model has none."""
        return self.classifier if self.config.label_stream == "tied" else self.residual_attention

    def set_text_classifier(self, weight: torch.Tensor) -> None:
        """Sets what `residual_attention` or a tied label stream starts from and decays to; see
        `label_prompts.transfer_classifier`.

        Args:
            weight (`torch.Tensor` of shape `(num_labels, C)`): C channels of the backbone's last map.

        Raises:
            ValueError: a model with neither, another shape, or values that are not finite.
        """
        holder = self.text_classifier_holder
        if holder is None:
            raise ValueError(
                "a text classifier belongs to residual_attention or a tied label stream, and this model's config has "
                "neither."
            )
        text_weight = holder.text_weight
        if weight.shape != text_weight.shape or not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"the text classifier must be finite numbers of shape {tuple(text_weight.shape)} (labels, channels of "
                f"the last map), but it is {tuple(weight.shape)}"
                + ("." if weight.shape != text_weight.shape else " with values that are not finite.")
            )
        text_weight.copy_(weight)

    def start_from_classes(self, weight: torch.Tensor, class_embeddings: torch.Tensor) -> None:
        """Starts `residual_attention` from a pretrained classifier of other classes, see
        `label_prompts.transfer_classifier`. With `classifier="shared"` the classes are kept for [`exchange_labels`].

        Args:
            weight (`torch.Tensor` of shape `(K, C)`): K classes, C channels of the backbone's last map.
            class_embeddings (`torch.Tensor` of shape `(K, D)`): text embeddings of their names, by the encoder and
                template of the labels'.

        Raises:
            ValueError: as [`set_text_classifier`], or shapes that do not belong together.
        """
        labels = self.hsvlt.label_embeddings.weight
        self.set_text_classifier(transfer_classifier(weight, class_embeddings, labels.float().cpu()))
        if self.config.classifier == "shared":
            weight = weight.float() - weight.float().mean(0)
            # As long as the labels' own rows are at the start, with which they are averaged.
            weight = weight * (12 / weight.shape[1] ** 0.5 / weight.norm(dim=1).mean())
            rows = self.residual_attention.text_weight
            self.residual_attention.keep_classes(weight.to(rows), class_embeddings.to(rows))
            self.config.text_classes = len(weight)

    def exchange_labels(self, label_names: Sequence[str], label_embeddings: torch.Tensor, **provenance) -> None:
        """Other labels for a model with a shared classifier, by their texts alone; what is known by name stays.

        What `residual_attention` learned for labels that are left out is gone; load the checkpoint again to have it.

        Args:
            label_names (sequence of `str`): the new labels.
            label_embeddings (`torch.Tensor` of shape `(M, D)`), provenance: see [`set_label_embeddings`].

        Raises:
            ValueError: a classifier with weights for each label, a name that cannot be one, or other shapes.
        """
        if self.config.classifier != "shared":
            raise ValueError("this model has classifier weights for each label: other labels need training.")
        rows = {name: int(row) for row, name in self.config.id2label.items()}
        label_names, before = [str(name) for name in label_names], self.hsvlt.label_embeddings.weight
        if label_embeddings.shape != (len(label_names), before.shape[1]) or not label_embeddings.isfinite().all():
            raise ValueError(
                f"label_embeddings have shape {tuple(label_embeddings.shape)} or values that are not finite, but "
                f"{len(label_names)} names of this model need finite numbers, {(len(label_names), before.shape[1])}."
            )
        self.config.set_label_names(label_names)
        if self.residual_attention is not None:
            self.residual_attention.exchange(before, label_embeddings, [rows.get(name) for name in label_names])
        self.set_label_embeddings(label_embeddings, **provenance)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers.

        Raises:
            ValueError: `candidate_labels` is set, and the checkpoint holds the scorer of before 0.1.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if any(name.startswith("candidate_scorer.") for name in info["unexpected_keys"]):
            raise ValueError(
                "the candidate scorer of this checkpoint is one of before 0.1, which is not read any more: set "
                "candidate_labels to null in its config.json to score all labels, or train it again."
            )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        """As in transformers. A learned label context leaves a plain checkpoint, with the label embeddings that its
        weights (or those of `state_dict`) give, and its adapter in the folder `label_context`."""
        context = self.label_context
        if context is not None:
            prefix, weights = "label_context.", self.state_dict() if state_dict is None else state_dict
            learned = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            context = context.with_weights(learned)
            state_dict = {key: value for key, value in weights.items() if not key.startswith(prefix)}
            state_dict["hsvlt.label_embeddings.weight"] = context()
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        if context is not None and is_main_process:
            context.save_adapter(f"{save_directory}/label_context")

    def _read_with_additions(
        self, feature_maps, text_embeddings, class_ids, labels, num_items_in_batch, **asked
    ) -> ModelOutput:
        """The forward pass, from the feature maps on, with candidates, sampled labels or residual attention."""
        num_labels = len(text_embeddings if class_ids is None else class_ids)
        scorer = self.candidate_scorer if class_ids is None else None
        weights = read = None  # the labels that the stream reads, where these are not all
        maps: list[torch.Tensor] = []  # as the label stream takes them; what is read once more
        if scorer is not None and not self.training:
            feature_maps = list(feature_maps)
            class_ids = read = scorer.choose(scorer(feature_maps, text_embeddings))
        if class_ids is None and labels is not None and self.training and self.config.sampled_labels is not None:
            weights = draw_labels(labels.to(text_embeddings.device), self.config.sampled_labels)
            class_ids = weights.nonzero().squeeze(1)
            read = class_ids.expand(len(labels), -1)
        scales = self.hsvlt.scales(kept(feature_maps, maps))
        output = in_chunks(self._read, scales, text_embeddings, class_ids, self.config.label_chunk_size, **asked)
        logits, paths = output.logits, [output.logits]
        if self.residual_attention is not None:
            paths.append(self.residual_attention(maps[-1], class_ids))
            logits = self.residual_attention.join(*paths)

        loss = None
        if labels is not None and self.training:
            # Each path by a loss of its own: learning the sum, the label stream of a small data set fits what it has
            # seen so fast that the pixel scores learn little.
            loss = sum(self._loss_of_drawn(path, labels, weights, num_items_in_batch) for path in paths) / len(paths)
            if scorer is not None:
                scores = scorer(maps, text_embeddings)
                loss = loss + self.config.candidate_loss_weight * self._loss(scores, labels, num_items_in_batch)
        elif labels is not None and read is not None:  # of the candidates alone: a mean of their own
            loss = self._loss(logits, labels.to(read.device).gather(1, read))
        elif labels is not None:
            loss = self._loss(logits, labels, num_items_in_batch)
        if read is not None:
            logits = logits.new_full((len(logits), num_labels), NOT_EVALUATED).scatter(1, read, logits)
        return type(output)(**{**output, "loss": loss, "logits": logits, "class_ids": read})

    def _loss_of_drawn(self, logits, labels, weights, num_items_in_batch) -> torch.Tensor:
        """The loss of the logits (B, m) of the labels that [`draw_labels`] gave `weights`; None: of all labels."""
        if weights is None:
            return self._loss(logits, labels, num_items_in_batch)
        options = self.config.loss_kwargs or {}
        labels = labels.to(weights.device)
        everywhere = logits.new_zeros(labels.shape).index_copy(1, weights.nonzero().squeeze(1), logits)
        drawn = labels.where(weights > 0, UNKNOWN_LABEL)
        losses = multilabel_loss(everywhere, drawn, self.config.loss_type, {**options, "reduction": "none"})
        loss = (losses * weights).sum()
        if options.get("reduction") == "sum":
            return loss
        known = (labels != UNKNOWN_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / items_in_step(known, loss)
