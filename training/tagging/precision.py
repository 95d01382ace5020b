"""Whether 16 bits are enough for a run of `hsvlt tag --dtype auto`: tried on its first images, beside 32."""

from __future__ import annotations

import copy
import itertools

import torch
from transformers import BaseImageProcessor, PreTrainedModel

from modeling_hsvlt.processing_multilabel import resolve_threshold

from ..checkpoint.loading import computing
from ..data.batches import normalize_pixels
from ..places import native_precision
from .loop import Images, collate
from .sources import StreamSource

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IMAGES = 100
MOST_LABELS, MOST_SCORE = 0.01, 0.05  # that may differ: of the labels found, and of any score


def precision_of(model: PreTrainedModel) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == model.dtype)


def choose_precision(args, model: PreTrainedModel, processor: BaseImageProcessor, source) -> str:
    """A key of `DTYPES`; prints why.

    Args:
        args: Options of `training.tag`.
        model: As it was loaded, on its device.
        source: Of images, see `sources.py`.

    Raises:
        ValueError: images of different sizes.
    """
    own, fast = precision_of(model), native_precision()
    if own != "fp32" or fast == "no":
        print(f"--dtype auto: {own}, " + ("as the checkpoint." if own != "fp32" else "no faster instructions here."))
        return own
    if isinstance(source, StreamSource):
        images, places = Images(None, [], processor), list(itertools.islice(source.images(), IMAGES))
    else:
        keys = itertools.islice((key for key in source.keys if key not in source.videos), IMAGES)
        images = Images(source, list(keys), processor)
        places = range(len(images))
    pixels = collate([images[place] for place in places]).pixels if places else None
    if pixels is None:
        print("--dtype auto: fp32, none of the first images can be read.")
        return own
    wanted = _scores(model, processor, pixels, args.batch_size)
    found = _scores(copy.deepcopy(model).to(DTYPES[fast]), processor, pixels, args.batch_size)
    thresholds = getattr(model.config, "thresholds", None)
    cuts = torch.tensor(resolve_threshold(args.threshold, thresholds, model.config.num_labels))
    labels, differ = int((wanted >= cuts).sum()), int(((wanted >= cuts) != (found >= cuts)).sum())
    score = (wanted - found).abs().max().item()
    chosen = fast if differ <= MOST_LABELS * labels and score <= MOST_SCORE else own
    print(
        f"--dtype auto: {chosen}. On the first {len(pixels)} images {fast} changes {differ} of {labels:,} labels found "
        f"in fp32 (at most {MOST_LABELS:.0%} may) and scores by up to {score:.3f} (at most {MOST_SCORE})."
    )
    return chosen


@torch.inference_mode()
def _scores(model, processor, pixels: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(images, num_labels) fp32, on the CPU."""
    batches = (normalize_pixels(batch.to(model.device), processor) for batch in pixels.split(batch_size))
    with computing(model):
        return torch.cat(
            [model(pixel_values=batch.to(model.dtype)).logits.float().sigmoid().cpu() for batch in batches]
        )
