"""Learned context in front of label names: HSVLT's label embeddings by a frozen text encoder with some trained tokens.

What CoOp does for CLIP, and HP-DVAL's second phase, for HSVLT with any text encoder that `label_prompts` reads:
reserved tokens `<context_0> <context_1> ...` take the place of the template's words, and their rows of the embedding
table train as an ordinary `TrainableTokens` adapter of peft. Give an HSVLT a `LabelContext` as `model.label_context`;
training then encodes the labels in every step, and its checkpoints hold the embeddings of the time and the adapter of
kilobytes, so that loading one needs neither text encoder nor peft.

Shapes: N labels, M context tokens of a prompt, D width of the text encoder.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import maybe_autocast

from .kept_embeddings import KeptEmbeddings
from .label_prompts import _label_texts, _mean_states, _template_tokens
from .modeling_multilabel import load_peft


class LabelContext(nn.Module):
    """Label embeddings `(N, D)` as a function of trained context tokens; called without arguments.

    Example:

    ```python
    >>> from modeling_hsvlt.label_context import LabelContext
    >>> from modeling_hsvlt.label_prompts import load_text_encoder

    >>> encoder, tokenizer = load_text_encoder("path/to/all-MiniLM-L6-v2")
    >>> model.label_context = LabelContext(encoder, tokenizer, ["cat", "dog"])
    >>> # train: what of the model does not require gradients stays; the context's rows always train
    >>> model.save_pretrained("trained")  # with the learned embeddings, and trained/label_context/, the adapter
    >>> # The adapter serves other labels as well (not with class_specific).
    >>> context = LabelContext(encoder, tokenizer, ["cow"], adapter="trained/label_context")
    >>> other_model.set_label_embeddings(context())
    ```

    Args:
        text_encoder (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerBase`): as for `label_prompts.encode_labels`,
            with `pooling="mean"`; both are copied, and all of the encoder but the context rows is frozen.
        names (sequence of `str`): label names in the order of `id2label`. Underscores are read as spaces.
        num_context_tokens (`int`, defaults to 4): context tokens in front of a name, `M`.
        class_specific (`bool`, defaults to `False`): whether each label has a context of its own (CoOp's "CSC").
        template (`str`, defaults to `"a photo of a {}"`): hand-written text. What follows `{}` stays behind the name;
            the words in front of it are where the contexts start, if their tokens are `num_context_tokens` many, and
            with any other number the contexts start at random, N(0, 0.02) as in CoOp.
        label_text (`Mapping`, *optional*): what to write in place of a name.
        adapter (`str` or `os.PathLike`, *optional*): folder of an adapter to start from, which [`save_adapter`] wrote.

    Raises:
        ValueError: fewer than one token, an adapter for another number of them, or what `encode_labels` raises.
        ImportError: peft is missing.
    """

    def __init__(
        self,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        names: Sequence[str],
        *,
        num_context_tokens: int = 4,
        class_specific: bool = False,
        template: str = "a photo of a {}",
        label_text: Mapping[str, str] | None = None,
        adapter: str | os.PathLike | None = None,
    ):
        super().__init__()
        peft = load_peft()
        if num_context_tokens < 1:
            raise ValueError(f"num_context_tokens must be at least 1, but it is {num_context_tokens}.")
        if template.count("{}") != 1:
            raise ValueError(f'template must hold {{}} once, where the name goes, but it is "{template}".')
        texts = _label_texts(names, label_text or {})
        before, after = template.split("{}")
        words = tokenizer(before, add_special_tokens=False)["input_ids"]
        tokenizer = copy.deepcopy(tokenizer)
        contexts = [
            [f"<context_{label}{index}>" for index in range(num_context_tokens)]
            for label in ([f"{row}_" for row in range(len(texts))] if class_specific else [""])
        ]
        tokenizer.add_tokens([token for context in contexts for token in context], special_tokens=True)
        self.templates = [f"{''.join(context)} {{}}{after}" for context in contexts]
        templates = self.templates if class_specific else self.templates * len(texts)
        self._tokens = [_template_tokens(*pair, tokenizer) for pair in zip(texts, templates, strict=True)]
        ids = [id for context in contexts for id in tokenizer.convert_tokens_to_ids(context)]

        if text_encoder.config.is_encoder_decoder:
            text_encoder = text_encoder.get_encoder()
        text_encoder = copy.deepcopy(text_encoder)
        if text_encoder.get_input_embeddings().weight.shape[0] <= max(ids):
            text_encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = text_encoder.get_input_embeddings()
        with torch.no_grad():
            if len(words) == num_context_tokens:
                table.weight[ids] = table.weight[words].repeat(len(contexts), 1)
            else:
                table.weight[ids] = torch.randn(len(ids), table.weight.shape[1]).to(table.weight) * 0.02
        name = next(name for name, module in text_encoder.named_modules() if module is table)
        config = peft.TrainableTokensConfig(
            token_indices=ids,
            target_modules=[name],
            base_model_name_or_path=text_encoder.name_or_path or None,
        )
        self.encoder = peft.get_peft_model(text_encoder, config)
        self.register_buffer("context_ids", torch.tensor(ids), persistent=False)
        words = sorted({token for tokens, _ in self._tokens for token in tokens})
        self.register_buffer("_words", torch.tensor(words), persistent=False)
        self._kept = KeptEmbeddings()
        if adapter is not None:
            if not os.path.isfile(os.path.join(adapter, "adapter_model.safetensors")):
                raise ValueError(f"{adapter} holds no adapter_model.safetensors; nothing else is loaded.")
            saved = peft.PeftConfig.from_pretrained(os.fspath(adapter)).token_indices
            if saved != ids:
                raise ValueError(
                    f"{adapter} holds {len(saved)} context tokens, from {saved[0]} on, but this context has "
                    f"{len(ids)}, from {ids[0]} on: another num_context_tokens, class_specific or tokenizer."
                )
            self.encoder.load_adapter(os.fspath(adapter), "default", is_trainable=True)
        self.train(self.training)

    def train(self, mode: bool = True):
        """As in torch; the frozen encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def rows(self) -> torch.Tensor:
        """The context tokens' embeddings as the encoder sees them, `(context tokens, D)`."""
        return self.encoder.get_input_embeddings()(self.context_ids)

    @torch.compiler.disable
    def forward(self) -> torch.Tensor:
        """Label embeddings `(N, D)`, fp32. Where gradients are kept they are computed; else they are kept as long as
        [`KeptEmbeddings`] proves that the encoder would give them again."""

        def encode():
            return _mean_states(self.encoder, self._tokens, batch_size=256)

        if torch.is_grad_enabled():
            with maybe_autocast(self.context_ids.device.type, enabled=False):
                return encode()
        return self._kept(self.encoder, self.encoder.get_input_embeddings(), self._words, encode)

    def save_adapter(self, save_directory: str | os.PathLike) -> None:
        """Writes the contexts as peft's adapter of the text encoder, for `LabelContext(..., adapter=save_directory)`,
        or for `PeftModel.from_pretrained` on the encoder with as many more tokens."""
        self.encoder.save_pretrained(os.fspath(save_directory), save_embedding_layers=False)

    def with_weights(self, state_dict: Mapping[str, torch.Tensor]) -> "LabelContext":
        """A copy with these weights; this one is only read, and may train on in another thread."""
        twin = copy.deepcopy(self)
        twin.load_state_dict(state_dict, assign=True)
        return twin.to(next(iter(state_dict.values())).device)


def count_context_tokens(template: str) -> int:
    """Context tokens in one of `LabelContext.templates`, as a checkpoint's `config.label_template` keeps it; 0 in a
    template of words.

    Raises:
        ValueError: contexts of their own for each label, which other labels have none of.
    """
    if re.match(r"<context_\d+_\d+>", template):
        raise ValueError("This checkpoint learned a context for each of its labels: other labels need a new model.")
    return len(re.findall(r"<context_\d+>", template.partition("{}")[0]))
