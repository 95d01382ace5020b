"""A SigLIP, or a NaFlex SigLIP 2, of a few thousand random weights, and SigLIP 2's tokenizer, made in memory."""

import torch
from transformers import Siglip2Config, Siglip2Model, Siglip2Tokenizer, SiglipConfig, SiglipModel


def tiny_tokenizer(padding_side="right"):
    """SigLIP 2's own, spelling all but some words; no start, and blanks at the beginning of words."""
    merges = [("▁", "a"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"abcdefghijklmnopqrstuvwxyz.▁", *map("".join, merges)]
    return Siglip2Tokenizer({word: index for index, word in enumerate(words)}, merges, padding_side=padding_side)


def tiny_siglip(tokenizer, naflex=False):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "pad_token_id": 0}
    text |= {"bos_token_id": 2, "eos_token_id": 1}
    if naflex:
        model = Siglip2Model(
            Siglip2Config(text_config=text, vision_config={**tower, "num_patches": 16, "patch_size": 8})
        )
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else None
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    return model.eval()
