"""Training-time augmentation of whole batches, on the device the batch is on, with kornia.

Every random number comes from torch's CPU generator, so that a seed gives the same images on a CPU and on a GPU.
"""

import difflib
import inspect

import kornia.augmentation as K
import kornia.enhance as enhance
import kornia.geometry.transform as geometry
import torch
from torch import nn

UNKNOWN_LABEL = -100
GREY = 128 / 255  # what `randaugment` fills emptied pixels with


def _affine(transform, images: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (transform(images - GREY, values) + GREY).clamp(0, 1)  # kornia fills with 0


def _along(values: torch.Tensor, axis: int) -> torch.Tensor:
    """(B,) -> (B, 2) with `values` in column `axis` (0: x, 1: y)."""
    return nn.functional.one_hot(torch.tensor(axis), 2).to(values) * values[:, None]


def _sign(values: torch.Tensor) -> torch.Tensor:
    return values * (torch.randint(0, 2, values.shape) * 2 - 1).to(values)


def _translate(images: torch.Tensor, level: torch.Tensor, axis: int) -> torch.Tensor:
    side = images.shape[-1 - axis]
    return _affine(geometry.translate, images, _along(_sign(level) * side * 150 / 331, axis))


def _cutout(images: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[-2:]
    centre = (torch.rand(len(images), 2).to(images) * images.new_tensor([height, width]))[:, :, None]  # (B, 2, 1)
    half = (level * 10)[:, None]  # (B, 1): a side of 0 to 20 px
    rows = (torch.arange(height, device=images.device) - centre[:, 0]).abs() <= half  # (B, H)
    columns = (torch.arange(width, device=images.device) - centre[:, 1]).abs() <= half  # (B, W)
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], GREY, images)


# name -> f(images (B, 3, H, W) in [0, 1], level (B,) in [0, 1]) -> images. Ranges: those of the official HSVLT run.
RAND_AUGMENT_OPERATIONS = {
    "invert": lambda x, level: enhance.invert(x),
    "cutout": _cutout,
    "sharpness": lambda x, level: enhance.sharpness(x, 1 + _sign(0.9 * level)),
    "auto_contrast": lambda x, level: enhance.normalize_min_max(x),
    "posterize": lambda x, level: enhance.posterize(x, (8 - 4 * level).round().int()),
    "shear_x": lambda x, level: _affine(geometry.shear, x, _along(_sign(0.3 * level), 0)),
    "translate_x": lambda x, level: _translate(x, level, 0),
    "translate_y": lambda x, level: _translate(x, level, 1),
    "shear_y": lambda x, level: _affine(geometry.shear, x, _along(_sign(0.3 * level), 1)),
    "rotate": lambda x, level: _affine(geometry.rotate, x, 30 * level),
    "equalize": lambda x, level: enhance.equalize(x),
    "contrast": lambda x, level: enhance.adjust_contrast_with_mean_subtraction(x, 1 + _sign(0.9 * level)),
    "color": lambda x, level: enhance.adjust_saturation_with_gray_subtraction(x, 1 + _sign(0.9 * level)),
    "solarize": lambda x, level: enhance.solarize(x, 1 - level),
    "brightness": lambda x, level: enhance.adjust_brightness_accumulative(x, 1 + _sign(0.9 * level)),
}


class RandAugment(nn.Module):
    """RandAugment as in the `randaugment` 1.0.2 package, which the official HSVLT run used.

    Each image draws an ordered pair of operations, each with a magnitude index 1 to 9 (of 9), and applies each with
    probability 0.5. kornia's own `RandAugment` draws one pair for the whole batch and a fixed magnitude, so only its
    operations are used here. Differences from the package: bilinear instead of nearest sampling, and shear and
    translation go either way (rotation turns one way only, as published).
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] -> the same shape and range."""
        operations = list(RAND_AUGMENT_OPERATIONS.values())
        for _ in range(2):
            choice = torch.randint(len(operations), (len(images),))
            level = torch.randint(1, 10, (len(images),)) / 9
            applied = torch.rand(len(images)) < 0.5
            changed = images.clone()
            for number in choice[applied].unique().tolist():
                rows = torch.nonzero(applied & (choice == number)).squeeze(1)
                changed[rows.to(images.device)] = operations[number](
                    images[rows.to(images.device)], level[rows].to(images)
                ).clamp(0, 1)
            images = changed
        return images


class BatchAugmentation(nn.Module):
    """Images first, one by one; then mixup between the images of the batch. See `build_augmentation`."""

    def __init__(self, steps: list[nn.Module], mixup: float):
        super().__init__()
        self.steps = nn.Sequential(*steps)
        self.mixup = mixup

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment one batch.

        Arguments:
            pixel_values: (B, 3, H, W) float in [0, 1], not yet normalised.
            labels: (B, num_labels) float, label contract (-100 unknown).

        Returns:
            Both, with the same shapes and ranges. Only mixup changes labels.
        """
        pixel_values = self.steps(pixel_values)
        if self.mixup:
            # mixup (Zhang et al., 2018): x = l * x_i + (1 - l) * x_j and the same for y, l ~ Beta(alpha, alpha).
            share = torch.distributions.Beta(self.mixup, self.mixup).sample().item()
            partner = torch.randperm(len(labels)).to(labels.device)
            unknown = (labels == UNKNOWN_LABEL) | (labels[partner] == UNKNOWN_LABEL)  # half known is not known
            pixel_values = torch.lerp(pixel_values[partner], pixel_values, share)
            labels = torch.lerp(labels[partner], labels, share).masked_fill(unknown, UNKNOWN_LABEL)
        return pixel_values, labels


def build_augmentation(
    image_size: int,
    *,
    horizontal_flip: float = 0.5,
    crop_scale: tuple[float, float] | None = (0.7, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    color_jitter: float = 0.0,
    rand_augment: bool = False,
    random_erasing: float = 0.0,
    mixup: float = 0.0,
) -> BatchAugmentation:
    """Build the augmentation of a training batch.

    Arguments:
        image_size: side of the square images, px.
        horizontal_flip: probability of mirroring. Right for photographs; 0 for what has a reading direction, such as
            digits, letters or road signs.
        crop_scale: share of the area that a random crop keeps, enlarged back to `image_size`; None for no crop. The
            default is HSVLT's: a harder crop may cut a labelled object out of the image.
        crop_ratio: width by height of the crop, before it is squashed to a square.
        color_jitter: brightness, contrast and saturation change by a factor of up to 1 +/- this, hue by a tenth of it.
        rand_augment: two random operations on each image, see `RandAugment`.
        random_erasing: probability that a grey box over 2 to 20 % of the area hides part of the image.
        mixup: alpha of the Beta distribution; 0 for none. Labels become soft.

    Returns:
        A module that maps (pixel_values, labels) to (pixel_values, labels).
    """
    steps: list[nn.Module] = []
    if horizontal_flip:
        steps.append(K.RandomHorizontalFlip(p=horizontal_flip))
    if crop_scale:
        steps.append(
            K.RandomResizedCrop((image_size, image_size), scale=tuple(crop_scale), ratio=tuple(crop_ratio), p=1.0)
        )
    if color_jitter:
        steps.append(K.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 10, p=0.8))
    if rand_augment:
        steps.append(RandAugment())
    if random_erasing:
        steps.append(K.RandomErasing(p=random_erasing, scale=(0.02, 0.2), value=GREY))
    return BatchAugmentation(steps, mixup)


def changes_images(options: dict) -> list[str]:
    """The options of `build_augmentation` that change anything, defaults included."""
    defaults = {name: entry.default for name, entry in inspect.signature(build_augmentation).parameters.items()}
    del defaults["image_size"], defaults["crop_ratio"]  # of a crop
    return [name for name, default in defaults.items() if options.get(name, default)]


def check_augmentation_names(names: list[str]) -> None:
    """Raise a ValueError that suggests the nearest name when `build_augmentation` takes no such option."""
    known = [name for name in inspect.signature(build_augmentation).parameters if name != "image_size"]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise ValueError(f"augmentation has no option {name!r}: {hint}")
