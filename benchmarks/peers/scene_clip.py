"""A CLIP small enough to train on a CPU: image-text contrastive on the built-in scenes with composed captions.

    python -m benchmarks.peers.scene_clip FOLDER [--steps N] [--device cuda]

FOLDER then holds the model, its tokenizer and its image processor, as transformers reads them. Captions name one to all
of a scene's digits in random order ("a photo of a seven and a two."), as captions of real images name some of what is
there. The first third of the steps shows single digits, large and plain: an image transformer that starts with
composed scenes learns nothing for a long time.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from modeling_hsvlt import MultiLabelImageProcessor
from training.data.scene_labels import SCENE_LABELS
from training.data.scenes import SceneDataset

SIDE = 36
# Images with captions show one or two things, plainly. What is to be tagged shows more, smaller, fainter, in clutter.
CAPTIONED = {"image_size": SIDE, "max_objects": 2, "min_size": 14, "max_size": 20, "clutter": 0, "contrast": (0.5, 0.9)}
SINGLE = {**CAPTIONED, "max_objects": 1, "min_size": 16, "max_size": 24}
TAGGED = {"image_size": SIDE, "max_objects": 3, "min_size": 12, "max_size": 18, "clutter": 2, "contrast": (0.3, 0.9)}
TEMPLATES = ("a photo of {}.", "an image of {}.", "a scene with {}.")
WORDS = ("a", "and", "of", "with", "photo", "image", "scene", *SCENE_LABELS)


def word_tokenizer(words=WORDS) -> CLIPTokenizer:
    """CLIP's tokenizer, in memory, with byte pairs that join each of `words` into one token; others are spelled."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(f"{character}</w>" for character in characters)]
    merges = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            merge, joined = (symbols[0], symbols[1]), symbols[0] + symbols[1]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(joined)
            symbols = [joined, *symbols[2:]]
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def image_processor() -> MultiLabelImageProcessor:
    """What `normalize` does, for images of any size."""
    size = {"height": SIDE, "width": SIDE}
    return MultiLabelImageProcessor(size=size, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])


def draw_scenes(num_scenes: int, *, split: str, seed: int, epoch: int = 0, **knobs) -> tuple[torch.Tensor, list]:
    """Pixels `(N, 3, H, W)` uint8, and the label names of each."""
    scenes = SceneDataset(num_scenes, split=split, seed=seed, **knobs)
    scenes.set_epoch(epoch)
    rows = [scenes[index] for index in range(num_scenes)]
    pixels = torch.stack([torch.frombuffer(bytearray(row["image"].tobytes()), dtype=torch.uint8) for row in rows])
    pixels = pixels.view(num_scenes, scenes.image_size, scenes.image_size, 3).permute(0, 3, 1, 2).contiguous()
    return pixels, [row["labels"] for row in rows]


def compose_caption(labels: list[str], draw: random.Random) -> str:
    """A sentence that names one to all of `labels`."""
    named = draw.sample(labels, draw.randint(1, len(labels)))
    return draw.choice(TEMPLATES).format(" and ".join(f"a {name}" for name in named))


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Random weights: three layers on 36 patches, one on the words."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "num_hidden_layers": 1}
    vision = {**tower, "image_size": SIDE, "patch_size": 6, "num_hidden_layers": 3}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def train_clip(
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CLIPModel:
    """A new CLIP after `steps` of contrastive training on scenes that are never seen twice (split "train")."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = new_clip(tokenizer).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in tqdm(range(steps), desc="Training CLIP", unit="step"):
        knobs = SINGLE if 3 * step < steps else CAPTIONED
        pixels, labels = draw_scenes(batch_size, split="train", seed=seed + 1000, epoch=step, **knobs)
        captions = [compose_caption(names, draw) for names in labels]
        text = tokenizer(captions, padding=True, return_tensors="pt").to(device)
        logits = model(pixel_values=normalize(pixels.to(device)), **text).logits_per_text
        # Of so few words some captions of a batch are the same: each of them is right.
        same = torch.tensor([[a == b for b in captions] for a in captions], dtype=torch.float32, device=device)
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        model.logit_scale.data.clamp_(max=4.6052)  # CLIP's bound, a factor of 100
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.scene_clip", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000, help="default: 3000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    tokenizer, start = word_tokenizer(), time.perf_counter()
    model = train_clip(tokenizer, steps=args.steps, seed=args.seed, device=args.device)
    model.cpu().save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    image_processor().save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
