"""Label names to label embeddings, with any text encoder of transformers.

`encode_labels` is run once for a label set; its result goes into a checkpoint (`model.set_label_embeddings`), so that
inference needs no text encoder. `load_text_encoder` reads one from a folder or, pinned, from the Hub.

Shapes: N labels, T tokens of a text, D width of the text encoder.
"""

import os
from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .load_pretrained import load_pretrained

DEFAULT_TEMPLATE = "a photo of a {}"

# The three names of PASCAL VOC that are two words written as one, as the released HSVLT writes them for its text
# encoder. `encode_labels(names, ..., label_text=VOC_LABEL_TEXT)`; "aeroplane" and "motorbike" stay as they are.
VOC_LABEL_TEXT = {"diningtable": "dining table", "pottedplant": "potted plant", "tvmonitor": "tv monitor"}


@torch.no_grad()
def encode_labels(
    names: Iterable[str],
    text_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: str = "mean",
    template: str = DEFAULT_TEMPLATE,
    batch_size: int = 64,
    label_text: Mapping[str, str] | None = None,
) -> torch.Tensor:
    """Embeds each label name with a text encoder.

    Args:
        names (iterable of `str`): label names in the order of `id2label`. Underscores are read as spaces.
        text_encoder (`PreTrainedModel`): a text encoder (BERT-like, `CLIPTextModel`, T5, ...), on any device and in
            any dtype. Of an encoder-decoder, the encoder is used. Its training mode is left as it was.
        tokenizer (`PreTrainedTokenizerBase`): the encoder's tokenizer.
        pooling (`str`, defaults to `"mean"`):
            `"mean"`: the name in `template`, and the mean of the last hidden states of the name's own tokens; the
            template's tokens and special tokens give context but are left out of the mean. Better for a new label set.
            `"official"`: as the released HSVLT, for its checkpoints and for parity (it takes `bert-base-uncased`):
            `[CLS]` and the name's word pieces, no `[SEP]`, every token type 0, last hidden layer; a name of one piece
            is read at that piece, any other at `[CLS]`. The template is not used.
        template (`str`, defaults to `"a photo of a {}"`): text with one `{}` for the name.
        batch_size (`int`, defaults to 64): texts that go through the encoder at a time.
        label_text (`Mapping[str, str]`, *optional*): what to write in place of a name, for example `VOC_LABEL_TEXT`.

    Returns:
        `torch.Tensor` of shape `(N, D)`: embeddings, fp32 on the CPU. A name's embedding does not depend on the others.

    Raises:
        ValueError: no names, an empty or repeated name, a name that the tokenizer has no token for or that is too long
            for it, a template without exactly one `{}`, an unknown pooling, or the official pooling with a tokenizer
            that has no `[CLS]` token.
    """
    texts = _label_texts(names, label_text or {})
    if pooling == "mean":
        if template.count("{}") != 1:
            raise ValueError(f'template must hold {{}} once, where the name goes, but it is "{template}".')
        tokens = [_template_tokens(text, template, tokenizer) for text in texts]
    elif pooling == "official":
        if tokenizer.cls_token_id is None:
            raise ValueError(
                f"pooling='official' reads names of several pieces at a [CLS] token, as BERT has one, but the "
                f"{type(tokenizer).__name__} of this {type(text_encoder).__name__} has none; use pooling='mean'."
            )
        # The released script gives its vector of ones as the attention mask, so token types are 0, BERT's own default.
        tokens = [_official_tokens(text, tokenizer) for text in texts]
    else:
        raise ValueError(f"pooling must be 'mean' or 'official', but it is {pooling!r}.")

    if text_encoder.config.is_encoder_decoder:
        text_encoder = text_encoder.get_encoder()
    was_training = text_encoder.training
    text_encoder.eval()
    try:
        return _mean_states(text_encoder, tokens, batch_size).cpu()
    finally:
        text_encoder.train(was_training)


@torch.no_grad()
def transfer_classifier(
    weight: torch.Tensor, class_embeddings: torch.Tensor, label_embeddings: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """Classifier weights for labels, from a backbone's pretrained classifier of other classes with similar names.

    With both sets of text embeddings centred on the classes' mean and normalised, a label's weights are the classes'
    (less what all share) averaged by `softmax(cosine / temperature)`. So "boat" starts as schooner, lifeboat, canoe.
    For `HSVLTForImageClassification.start_from_classes`, and for labels that it was not trained on.

    Args:
        weight (`torch.Tensor` of shape `(K, C)`): the linear classifier that the backbone was pretrained with.
        class_embeddings (`torch.Tensor` of shape `(K, D)`): text embeddings of its class names, see `encode_labels`.
        label_embeddings (`torch.Tensor` of shape `(N, D)`): text embeddings of the labels, by the same encoder.
        temperature (`float`, defaults to 0.1): lower trusts the closest name more.

    Returns:
        `torch.Tensor` of shape `(N, C)`, fp32: rows of length `12 / sqrt(C)`, so that a layer-normed pixel scores 12
        times its cosine with the row.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if weight.shape[:1] != class_embeddings.shape[:1] or class_embeddings.shape[1:] != label_embeddings.shape[1:]:
        raise ValueError(
            f"weight {tuple(weight.shape)}, class_embeddings {tuple(class_embeddings.shape)} and label_embeddings "
            f"{tuple(label_embeddings.shape)} must be (classes, channels), (classes, width) and (labels, width)."
        )
    shares = class_shares(class_embeddings, label_embeddings, temperature)
    transferred = shares @ (weight.float() - weight.float().mean(0))
    transferred = transferred - transferred.mean(1, keepdim=True)  # the norm in front of it has no mean either
    return F.normalize(transferred, dim=-1) * 12 / weight.shape[1] ** 0.5


@torch.no_grad()
def class_shares(
    class_embeddings: torch.Tensor, label_embeddings: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """What each class gives to each label in [`transfer_classifier`], `(N, K)`, summing to 1 over the classes."""
    center = class_embeddings.mean(0)
    cosine = F.normalize(label_embeddings - center, dim=-1) @ F.normalize(class_embeddings - center, dim=-1).T
    return (cosine / temperature).softmax(-1)


def load_text_encoder(
    source: str | os.PathLike, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text encoder in fp32 on the CPU and its tokenizer, from safetensors alone; no code of the source is run.

    Args:
        source (`str` or `os.PathLike`): folder, or Hub id. Of a model of images and text (CLIP, SigLIP), its text
            tower is taken.
        revision (`str`, *optional*): commit (or tag) on the Hub; required for a Hub id.

    Returns:
        `(text_encoder, tokenizer)`, ready for [`encode_labels`].

    Raises:
        ValueError: a Hub id without a revision, or weights that do not hold the whole encoder.
        OSError: from transformers, where the source holds no safetensors file or cannot be found.
    """
    source = os.fspath(source)
    if revision is None and not os.path.isdir(source):
        raise ValueError(
            f"'{source}' is not a folder, and as a Hub id it must be pinned, so that the embeddings can be made again: "
            'give revision=\'<commit hash>\', which the repository\'s page shows under "Files and versions", "History".'
        )
    # Only token states are read: a pooler that a checkpoint lacks (masked-language models) changes nothing.
    model = load_pretrained(AutoModel, source, revision=revision, may_lack="pooler", dtype=torch.float32)
    tokenizer = load_pretrained(AutoTokenizer, source, revision=revision)
    return getattr(model, "text_model", model).eval(), tokenizer


def _label_texts(names: Iterable[str], label_text: Mapping[str, str]) -> list[str]:
    names = list(names)
    if not names:
        raise ValueError("names is empty: give at least one label name.")
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        text = " ".join(label_text.get(name, name).replace("_", " ").split())
        if not text:
            raise ValueError(f"label {row} has an empty name: {name!r}.")
        if text in rows:
            raise ValueError(
                f"labels {rows[text]} ({names[rows[text]]!r}) and {row} ({name!r}) have the same name: they would get "
                "the same embedding; merge them or rename one."
            )
        rows[text] = row
    return list(rows)


def _official_tokens(text: str, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of `text` and the positions to read, `pooling="official"`."""
    pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
    _check_tokens(text, pieces, len(pieces) + 1, tokenizer)
    return [tokenizer.cls_token_id, *pieces], [1] if len(pieces) == 1 else [0]


def _template_tokens(text: str, template: str, tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the filled template and the positions of the name's own tokens, `pooling="mean"`."""
    prefix, suffix = template.split("{}")
    head = prefix + text
    full = tokenizer(head + suffix, return_offsets_mapping=tokenizer.is_fast)
    ids = full["input_ids"]
    if tokenizer.is_fast:
        # A token that reaches into the name belongs to it; special tokens span no characters.
        positions = [
            i for i, (start, stop) in enumerate(full["offset_mapping"]) if start < len(head) and stop > len(prefix)
        ]
    else:
        # Without offsets: the text up to the name, and up to its end, share that many tokens with the whole.
        plain = tokenizer(head + suffix, add_special_tokens=False)["input_ids"]
        first = next(i for i in range(len(ids)) if ids[i : i + len(plain)] == plain)
        start = _shared_head(plain, tokenizer(prefix.rstrip(), add_special_tokens=False)["input_ids"])
        stop = _shared_head(plain, tokenizer(head, add_special_tokens=False)["input_ids"])
        positions = list(range(first + start, first + max(stop, start + 1)))
    _check_tokens(text, [ids[i] for i in positions], len(ids), tokenizer)
    return ids, positions


def _shared_head(first: list[int], second: list[int]) -> int:
    return len(os.path.commonprefix([first, second]))  # of any two sequences, not only of paths


def _check_tokens(text: str, name_ids: list[int], length: int, tokenizer) -> None:
    if all(token == tokenizer.unk_token_id for token in name_ids):  # also where there is none
        raise ValueError(f"the tokenizer has no token for the label {text!r}: rename it, or use another text encoder.")
    if length > tokenizer.model_max_length:
        raise ValueError(
            f"the label {text!r} takes {length} tokens, but the text encoder reads at most "
            f"{tokenizer.model_max_length}: shorten the name or the template."
        )


def _mean_states(
    text_encoder: PreTrainedModel, tokens: list[tuple[list[int], list[int]]], batch_size: int
) -> torch.Tensor:
    """Mean of the last hidden states at each text's positions, (N, D)."""
    embeddings: list[torch.Tensor | None] = [None] * len(tokens)
    # Batches of equal length need no padding: nothing then depends on how an encoder treats it (CLIP pools, T5 biases,
    # decoders have no padding token), and a name's embedding is the same in any company.
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row][0]))
    for _, group in groupby(order, key=lambda row: len(tokens[row][0])):
        rows = list(group)
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            input_ids = torch.tensor([tokens[row][0] for row in batch], device=text_encoder.device)  # (b, T)
            output = text_encoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
            states = output.last_hidden_state.float()  # (b, T, D)
            for row, state in zip(batch, states, strict=True):
                embeddings[row] = state[tokens[row][1]].mean(dim=0)
    return torch.stack(embeddings)
