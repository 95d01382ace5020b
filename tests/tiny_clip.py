"""A CLIP of a few thousand random weights and its tokenizer, made in memory."""

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer


def tiny_clip_tokenizer(words=("a", "photo", "of", "cat", "dog", "bird", "potted", "plant")) -> CLIPTokenizer:
    """CLIP's tokenizer with byte pairs that join each of `words` into one token; other words are spelled."""
    pieces = [chr(code) for code in range(33, 127)]
    vocabulary = [*pieces, *(f"{piece}</w>" for piece in pieces)]
    merges = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merge, joined = (symbols[0], symbols[1]), symbols[0] + symbols[1]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(joined)
            symbols = [joined, *symbols[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = list(dict.fromkeys(vocabulary))
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


def tiny_clip(tokenizer: CLIPTokenizer, seed: int = 0, image_size: int = 32, **vision) -> CLIPModel:
    """Random weights, larger than CLIP's initial ones, so that outputs differ visibly between inputs."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": 12,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": 8, "projection_dim": 12, **vision},
        projection_dim=12,
        initializer_factor=5.0,
    )
    return CLIPModel(config).eval()
