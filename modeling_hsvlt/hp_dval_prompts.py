"""HP-DVAL's prompts: token ids, text embeddings as a checkpoint holds them, and contexts as peft's token layers.

Shapes: N labels, M context tokens, L tokens of a prompt, E width of the shared space.
"""

import os
from collections.abc import Iterator

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModelWithProjection, Siglip2TextModel, SiglipTextModel

from .configuration_hp_dval import HPDVALConfig
from .kept_embeddings import KeptEmbeddings
from .modeling_multilabel import MultiLabelPreTrainedModel, load_peft

# Rows of `prompt_ids` and `text_embeddings`.
HANDWRITTEN, GLOBAL, LOCAL = range(3)
PROMPT_BATCH = 512  # prompts that go through the text tower at a time


class HPDVALPrompts(nn.Module):
    """Prompts `(3, N, L)` and their text embeddings `(3, N, E)`, which a checkpoint without text tower reads.

    A module of its own, to be called and not read: tools that spread a model over devices give every leaf a device and
    move what a leaf holds when it is called.
    """

    def __init__(self, config: HPDVALConfig):
        super().__init__()
        self.register_buffer("prompt_ids", placeholder_prompts(config).to(torch.get_default_device()))
        self.register_buffer("text_embeddings", torch.zeros(3, config.num_labels, config.projection_dim))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.prompt_ids, self.text_embeddings


def build_prompts(
    config: HPDVALConfig, template: list[int], names: list[list[int]], padding_side: str = "right"
) -> torch.Tensor:
    """Token ids (3, N, L) of `[start] template name [end]`, and of the same with each view's context for the template;
    start and end where the tokenizer writes them.

    Contexts take the place of words, so positions are those of a normal sentence (CoOp). Ends fill what is left: the
    text tower reads a prompt at its first end. A SigLIP's reads it at its last place, padded on the tokenizer's side.
    """
    text = config.text_config
    start, end = ([] if token is None else [token] for token in (text.bos_token_id, text.eos_token_id))
    contexts = torch.tensor(config.context_token_ids, device="cpu").view(2, -1, config.num_context_tokens)
    contexts = contexts.expand(-1, len(names), -1).tolist()  # (2, N, M)
    shape = (3, len(names), config.prompt_length)
    prompts = torch.full(shape, text.pad_token_id if config.is_siglip else text.eos_token_id, device="cpu")
    for label, name in enumerate(names):
        for view, words in enumerate((template, contexts[0][label], contexts[1][label])):
            tokens = [*start, *words, *name, *end]
            place = slice(len(tokens)) if padding_side == "right" else slice(-len(tokens), None)
            prompts[view, label, place] = torch.tensor(tokens, device="cpu")
    return prompts


def placeholder_prompts(config: HPDVALConfig) -> torch.Tensor:
    """Prompts (3, N, L) of random words that a model holds until [`set_labels`]."""
    generator = torch.Generator().manual_seed(0)
    words = min(2, config.prompt_length - config.num_context_tokens - 2)
    size = (config.num_labels + 1, max(words, config.num_context_tokens))
    tokens = torch.randint(config.context_token_ids[0], size, generator=generator, device="cpu")
    if not config.is_siglip:  # a CLIP would read the prompt there
        tokens[tokens == config.text_config.eos_token_id] = config.text_config.bos_token_id
    template, *names = tokens.tolist()
    return build_prompts(config, template[: config.num_context_tokens], [name[:words] for name in names])


def choose_prompts(prompt_ids: torch.Tensor, context_rows: torch.Tensor) -> torch.Tensor:
    """Prompts (2, N, L) of the global and the local view: with their contexts, or as long as these are zeros, which
    phase 2 has not started, the hand-written ones. Without a look at values in Python: a graph holds the choice."""
    learned = (context_rows != 0).any().to(prompt_ids.device)
    return torch.where(learned, prompt_ids[GLOBAL:], prompt_ids[HANDWRITTEN])


def encode_in_parts(text: nn.Module, prompt_ids: torch.Tensor) -> torch.Tensor:
    """Text embeddings `(..., E)` of prompts `(..., L)`, not normalised."""
    parts = prompt_ids.flatten(0, -2).split(PROMPT_BATCH)
    outputs = (text(part) for part in parts)
    embeddings = [output.text_embeds if "text_embeds" in output else output.pooler_output for output in outputs]
    return torch.cat(embeddings).unflatten(0, prompt_ids.shape[:-1])


def build_text_tower(config: HPDVALConfig) -> nn.Module:
    towers = {"siglip_text_model": SiglipTextModel, "siglip2_text_model": Siglip2TextModel}
    return towers.get(config.text_config.model_type, CLIPTextModelWithProjection)._from_config(config.text_config)


def text_embeddings_of(text: nn.Module) -> nn.Module:
    """The module with the tables of tokens and positions, in CLIP's text tower or SigLIP's."""
    return getattr(text, "text_model", text).embeddings


@torch.no_grad()
def encode_prompts_of(state_dict: dict[str, torch.Tensor], config: HPDVALConfig) -> None:
    """Replaces the text embeddings in `state_dict` by those of the text tower in it.

    Raises:
        ValueError: it holds a text tower that is no plain CLIP's.
    """
    prefix = next(key for key in state_dict if key.endswith("prompts.text_embeddings"))
    prefix = prefix.removesuffix("prompts.text_embeddings")
    weights = {key: value for key, value in state_dict.items() if key.startswith(f"{prefix}text.")}
    weights = {key.removeprefix(f"{prefix}text."): value for key, value in weights.items()}
    with torch.device("meta"):  # draws no random numbers
        tower = build_text_tower(config)
    if weights.keys() != tower.state_dict().keys():
        other = min(weights.keys() ^ tower.state_dict().keys())
        raise ValueError(
            f"the text embeddings of these weights cannot be made: their text tower is no plain CLIP's ({other}); "
            "merge its adapters first, or save without state_dict."
        )
    tower.load_state_dict(weights, assign=True)
    embeddings = text_embeddings_of(tower)
    places = torch.arange(config.text_config.max_position_embeddings, device=embeddings.token_embedding.weight.device)
    embeddings.position_ids = places[None]
    prompts = state_dict[f"{prefix}prompts.prompt_ids"]
    contexts = embeddings.token_embedding.weight[config.context_token_ids]
    prompts = torch.cat((prompts[:1], choose_prompts(prompts, contexts)))
    key = f"{prefix}prompts.text_embeddings"
    state_dict[key] = encode_in_parts(tower.eval(), prompts).to(state_dict[key])


def fold_token_adapter(state_dict: dict[str, torch.Tensor], name: str, layer: nn.Module) -> None:
    """Replaces the entries of peft's token layer `name` by those of the embedding that it amounts to."""
    weight = state_dict[f"{name}.base_layer.weight"].clone()
    for adapter in layer.active_adapters if not (layer.disable_adapters or layer.merged) else ():
        weight[layer.token_indices[adapter]] = state_dict[f"{name}.trainable_tokens_delta.{adapter}"].to(weight)
    for key in [key for key in state_dict if key.startswith(f"{name}.")]:
        del state_dict[key]
    state_dict[f"{name}.weight"] = weight


def adapter_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of peft's active adapters within `module`."""
    for layer in module.modules():
        for name in getattr(layer, "adapter_layer_names", ()):
            entries = getattr(layer, name) if "." not in name else {}  # a dotted one is of a layer within this layer
            for adapter in layer.active_adapters:
                if adapter in entries:
                    entry = entries[adapter]
                    yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()


class HPDVALTexts(MultiLabelPreTrainedModel):
    """Text embeddings that fit the text tower of a model, `text` (None: those that its `prompts` hold)."""

    def get_input_embeddings(self) -> nn.Module | None:
        return None if self.text is None else text_embeddings_of(self.text).token_embedding

    def set_input_embeddings(self, value: nn.Module):
        text_embeddings_of(self.text).token_embedding = value

    def has_text_adapter(self) -> bool:
        """Whether an adapter of peft is attached to the text tower."""
        return self.text is not None and any(hasattr(m, "adapter_layer_names") for m in self.text.modules())

    def text_embeds(self) -> torch.Tensor:
        """Text embeddings `(2, N, E)` of the global and the local view, not normalised; gradients reach whatever of the
        text tower requires them.

        A checkpoint without text tower holds them. Else the text tower runs, unless [`KeptEmbeddings`] proves that it
        would give what it gave before. In a graph (`torch.compile`, exports) it always runs:
        [`~HPDVALForImageClassification.drop_text_model`] makes the embeddings constants.
        """
        prompt_ids, stored = self.prompts()
        if self.text is None:
            return stored[1:]
        return self._encode(choose_prompts(prompt_ids, self.context_rows()), self._views)

    @torch.no_grad()
    def handwritten_embeds(self) -> torch.Tensor:
        """Text embeddings `(N, E)` of the hand-written prompts, likewise; without gradients."""
        prompt_ids, stored = self.prompts()
        if self.text is None:
            return stored[HANDWRITTEN]
        return self._encode(prompt_ids[HANDWRITTEN], self._handwritten)

    def _encode(self, prompt_ids: torch.Tensor, keep: KeptEmbeddings) -> torch.Tensor:
        def encode():
            return encode_in_parts(self.text, prompt_ids)

        with_gradients = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.text.parameters())
        if with_gradients or torch.compiler.is_compiling():
            return encode()
        return keep(self.text, self.get_input_embeddings(), prompt_ids, encode)

    @torch.no_grad()
    def store_text_embeds(self) -> None:
        """Writes the text embeddings of now where a checkpoint without text tower reads them."""
        stored = self.prompts.text_embeddings
        if self.text is not None and stored.device.type != "meta":  # there where they are offloaded
            embeddings = torch.cat((self.handwritten_embeds()[None], self.text_embeds()))
            self.prompts.text_embeddings = embeddings.to(stored)

    def context_rows(self) -> torch.Tensor:
        """The context tokens' embeddings as the text tower sees them, `(context tokens, width)`: global, then local."""
        ids = torch.tensor(self.config.context_token_ids, device=self.prompts()[0].device)
        rows = self.get_input_embeddings()(ids)
        if rows.device.type == "meta" != ids.device.type:
            raise ValueError(
                "the text tower's table is offloaded, which peft's adapter of the contexts cannot read there: save the "
                "model, which writes them into the table, and offload what from_pretrained gives."
            )
        return rows

    @torch.no_grad()
    def has_learned_context(self) -> bool:
        """Whether phase 2 has started: the reserved rows are zeros before."""
        return bool((self.context_rows() != 0).any())


class HPDVALContexts(MultiLabelPreTrainedModel):
    """The contexts of a classifier: rows of the text tower's table, which peft trains."""

    def prompt_adapter_config(self):
        """peft's `TrainableTokensConfig` of the context tokens, for `get_peft_model`."""
        return load_peft().TrainableTokensConfig(
            token_indices=self.config.context_token_ids,
            target_modules=["token_embedding"],
            base_model_name_or_path=self.name_or_path or None,
        )

    @torch.no_grad()
    def save_prompt_adapter(self, save_directory: str | os.PathLike, is_main_process: bool = True) -> None:
        """Writes the contexts as an adapter of kilobytes, for `PeftModel.from_pretrained` on any checkpoint with this
        text tower and number of contexts: what `PeftModel.save_pretrained` writes, from a model that is in no
        `PeftModel`."""
        rows = self.hp_dval.context_rows().contiguous().cpu()  # where weights are divided, on every process
        if not is_main_process:
            return
        adapter = self.prompt_adapter_config()
        adapter.inference_mode = True
        adapter.save_pretrained(save_directory)
        names = {module: name for name, module in self.named_modules()}
        table = f"base_model.model.{names[self.hp_dval.get_input_embeddings()]}"
        rows = {f"{table}.trainable_tokens_delta": rows}
        save_file(rows, os.path.join(save_directory, "adapter_model.safetensors"), metadata={"format": "pt"})

    @torch.no_grad()
    def _start_contexts(self) -> None:
        """Gives contexts that are still zeros their first value, and an adapter to train them."""
        base, config = self.hp_dval, self.config
        layer = next((m for m in base.get_input_embeddings().modules() if hasattr(m, "token_indices")), None)
        table = (base.get_input_embeddings() if layer is None else layer.base_layer).weight
        if not base.has_learned_context():
            ids = config.context_token_ids
            if config.context_init == "template":
                words = table[base.prompts.prompt_ids[HANDWRITTEN, 0, 1 : 1 + config.num_context_tokens]]
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
            load_peft().inject_adapter_in_model(self.prompt_adapter_config(), self, adapter_name="prompts")
