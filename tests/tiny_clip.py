"""A CLIP of a few thousand random weights and its tokenizer, made in memory."""

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks.peers.scene_clip import word_tokenizer


def tiny_clip_tokenizer(words=("a", "photo", "of", "cat", "dog", "bird", "potted", "plant")) -> CLIPTokenizer:
    """CLIP's tokenizer, small; see `word_tokenizer`."""
    return word_tokenizer(words)


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
