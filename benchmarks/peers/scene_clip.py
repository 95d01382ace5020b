"""A CLIP small enough to train on a CPU: image-text contrastive on the built-in scenes with composed captions.

    python -m benchmarks.peers.scene_clip FOLDER [--steps N] [--device cuda]
    python -m benchmarks.peers.scene_clip RICH --captions rich --start FOLDER

FOLDER then holds the model, its tokenizer and its image processor, as transformers reads them. Captions name one to all
of a scene's digits in random order ("a photo of a seven and a two."), as captions of real images name some of what is
there. The first third of the steps shows single digits, large and plain: an image transformer that starts with composed
scenes learns nothing for a long time.

Rich captions say more of one or two digits, by chance: how many, how large, what colour, and where ("a photo of a
double two and a small red seven at the top left."); the scenes then have up to three digits, every second batch in
`COLOURS`, and the text tower has a second layer. `--start` trains the image tower of a CLIP on, without that first
third.
"""

import argparse
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from modeling_hsvlt import MultiLabelImageProcessor
from modeling_hsvlt.load_pretrained import load_pretrained
from training.data.scene_labels import COLOURS, COLUMNS, ROWS, SCENE_LABELS
from training.data.scenes import SceneDataset

SIDE = 36
# Images with captions show one or two things, plainly. What is to be tagged shows more, smaller, fainter, in clutter.
CAPTIONED = {"image_size": SIDE, "max_objects": 2, "min_size": 14, "max_size": 20, "clutter": 0, "contrast": (0.5, 0.9)}
SINGLE = {**CAPTIONED, "max_objects": 1, "min_size": 16, "max_size": 24}
TAGGED = {"image_size": SIDE, "max_objects": 3, "min_size": 12, "max_size": 18, "clutter": 2, "contrast": (0.3, 0.9)}
TEMPLATES = ("a photo of {}.", "an image of {}.", "a scene with {}.")
WORDS = ("a", "and", "of", "with", "photo", "image", "scene", *SCENE_LABELS)
# Rich captions: scenes with this many rows and columns of places; adjectives of 1, 2 and 3 of a digit.
PLACES = 3
COUNTS = ("single", "double", "triple")
WORDS_OF = {
    "names": WORDS,
    "rich": (*WORDS, "at", "the", "small", "large", *COUNTS, *COLOURS, *ROWS[PLACES], *COLUMNS[PLACES]),
}


def word_tokenizer(words=WORDS) -> CLIPTokenizer:
    """CLIP's tokenizer, in memory, with byte pairs that join each of `words` into one token; others are spelled."""
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(f"{character}</w>" for character in characters)]
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        while len(symbols) > 1:
            # What the tokenizer would do: the merges of the words before this one come first.
            pairs = list(pairwise(symbols))
            merge = min((pair for pair in pairs if pair in merges), key=merges.index, default=pairs[0])
            if merge not in merges:
                merges.append(merge)
                vocabulary.append("".join(merge))
            place = pairs.index(merge)
            symbols[place : place + 2] = ["".join(merge)]
    vocabulary = list(dict.fromkeys([*vocabulary, "<|startoftext|>", "<|endoftext|>"]))
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=merges)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def image_processor() -> MultiLabelImageProcessor:
    """What `normalize` does, for images of any size."""
    size = {"height": SIDE, "width": SIDE}
    return MultiLabelImageProcessor(size=size, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5])


def draw_scenes(num_scenes: int, *, split: str, seed: int, epoch: int = 0, **knobs) -> tuple[torch.Tensor, list[dict]]:
    """Pixels `(N, 3, H, W)` uint8, and the rows that `SceneDataset` gives, with their labels and boxes."""
    scenes = SceneDataset(num_scenes, split=split, seed=seed, **knobs)
    scenes.set_epoch(epoch)
    rows = [scenes[index] for index in range(num_scenes)]
    pixels = torch.stack([torch.frombuffer(bytearray(row["image"].tobytes()), dtype=torch.uint8) for row in rows])
    pixels = pixels.view(num_scenes, scenes.image_size, scenes.image_size, 3).permute(0, 3, 1, 2).contiguous()
    return pixels, rows


def compose_caption(labels: list[str], draw: random.Random) -> str:
    """A sentence that names one to all of `labels`."""
    named = draw.sample(labels, draw.randint(1, len(labels)))
    return draw.choice(TEMPLATES).format(" and ".join(f"a {name}" for name in named))


def compose_rich_caption(boxes: list[dict], draw: random.Random) -> str:
    """A sentence that names one or two of the digits in `boxes`, labelled by digit and place and perhaps by colour, and
    says by chance of each how many there are, and of one alone its size, colour and place."""
    things: dict[str, list[dict]] = {}
    for box in boxes:
        things.setdefault(next(word for word in box["label"].split() if word in SCENE_LABELS), []).append(box)
    phrases = []
    for name in draw.sample(sorted(things), draw.randint(1, min(2, len(things)))):
        words, place, of_name = [name], "", things[name]
        if len(of_name) == 1:
            size = "small" if of_name[0]["h"] < 15 else "large"
            before, after = of_name[0]["label"].split(name)
            words = [word for word in (size, before.strip()) if word and draw.random() < 0.5] + words
            place = f" at the{after}" if draw.random() < 0.5 else ""
        if len(of_name) <= len(COUNTS) and draw.random() < 0.5:
            words.insert(0, COUNTS[len(of_name) - 1])
        phrases.append(f"a {' '.join(words)}{place}")
    return draw.choice(TEMPLATES).format(" and ".join(phrases))


def new_clip(tokenizer: CLIPTokenizer, captions: str = "names") -> CLIPModel:
    """Random weights: three layers on 36 patches, one on the words of names, two on those of rich captions."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    length, layers = {"names": (20, 1), "rich": (32, 2)}[captions]
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": length}
    text["num_hidden_layers"] = layers
    vision = {**tower, "image_size": SIDE, "patch_size": 6, "num_hidden_layers": 3}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def train_clip(
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    captions: str = "names",
    start: CLIPModel | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> CLIPModel:
    """A new CLIP after `steps` of contrastive training on scenes that are never seen twice (split "train").

    Args:
        tokenizer: Of `WORDS_OF[captions]`.
        captions: "names" or "rich".
        start: Whose image tower and its projection are trained on.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = new_clip(tokenizer, captions)
    if start is not None:
        model.vision_model.load_state_dict(start.vision_model.state_dict())
        model.visual_projection.load_state_dict(start.visual_projection.state_dict())
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for step in tqdm(range(steps), desc="Training CLIP", unit="step"):
        knobs = SINGLE if start is None and 3 * step < steps else CAPTIONED
        if captions == "rich":
            objects = 1 if knobs is SINGLE else 3
            knobs = {**knobs, "places": PLACES, "colours": len(COLOURS) * (step % 2), "max_objects": objects}
        pixels, rows = draw_scenes(batch_size, split="train", seed=seed + 1000, epoch=step, **knobs)
        if captions == "rich":
            texts = [compose_rich_caption(row["boxes"], draw) for row in rows]
        else:
            texts = [compose_caption(row["labels"], draw) for row in rows]
        text = tokenizer(texts, padding=True, return_tensors="pt").to(device)
        logits = model(pixel_values=normalize(pixels.to(device)), **text).logits_per_text
        # Of so few words some captions of a batch are the same: each of them is right.
        same = torch.tensor([[a == b for b in texts] for a in texts], dtype=torch.float32, device=device)
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
    parser.add_argument("--captions", choices=tuple(WORDS_OF), default="names", help="default: names")
    parser.add_argument("--start", type=Path, help="folder of a CLIP whose image tower is trained on")
    parser.add_argument("--steps", type=int, default=3000, help="default: 3000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    tokenizer, start = word_tokenizer(WORDS_OF[args.captions]), time.perf_counter()
    begun = None if args.start is None else load_pretrained(CLIPModel, args.start)
    options = {"captions": args.captions, "start": begun, "seed": args.seed, "device": args.device}
    model = train_clip(tokenizer, steps=args.steps, **options)
    model.cpu().save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    image_processor().save_pretrained(args.folder)
    print(f"{args.folder}: {model.num_parameters():,} parameters, {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
