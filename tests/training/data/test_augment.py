import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from training.data.augment import RAND_AUGMENT_OPERATIONS, RandAugment, build_augmentation, check_augmentation_names

from ...tolerance import assert_close_outputs, close_outputs


def batch(seed=0, size=24, count=12):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return images, torch.randint(0, 2, (count, 5), generator=generator).float()


EVERYTHING = {
    "horizontal_flip": 0.5,
    "crop_scale": (0.5, 1.0),
    "color_jitter": 0.4,
    "rand_augment": True,
    "random_erasing": 0.5,
    "mixup": 0.4,
}


@pytest.mark.parametrize("options", [{}, *({name: value} for name, value in EVERYTHING.items()), EVERYTHING])
def test_keeps_shape_and_range_and_repeats_by_seed(options):
    images, labels = batch()
    original = images.clone()
    augmentation = build_augmentation(24, **options)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(augmentation(images, labels))
    for new_images, new_labels in results:
        assert new_images.shape == images.shape and new_labels.shape == labels.shape
        assert new_images.isfinite().all() and new_images.min() >= 0 and new_images.max() <= 1
        assert new_labels.min() >= 0 and new_labels.max() <= 1
    assert torch.equal(images, original), "the batch that came in must stay as it was"
    assert_close_outputs(results[1], results[0])
    assert not close_outputs(results[2][0], results[0][0]), "another seed must give other images"


def test_flips_whole_images_about_as_often_as_asked():
    images, labels = batch(count=400, size=8)
    torch.manual_seed(0)
    flipped, _ = build_augmentation(8, horizontal_flip=0.25, crop_scale=None)(images, labels)
    mirrored = [torch.equal(new, old.flip(-1)) for new, old in zip(flipped, images, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 70 < sum(mirrored) < 130  # 100 +/- 3.5 standard deviations


def test_nothing_asked_changes_nothing():
    images, labels = batch()
    same, same_labels = build_augmentation(24, horizontal_flip=0.0, crop_scale=None)(images, labels)
    assert torch.equal(same, images) and torch.equal(same_labels, labels)


def test_mixup_mixes_labels_with_the_images_share_and_keeps_unknown_unknown():
    count = 6
    images = torch.eye(count)[:, None, :, None].expand(count, 3, count, 4).clone()  # image i is 1 in row i alone
    labels = torch.eye(count)
    labels[2, 4] = -100
    torch.manual_seed(1)
    mixed, mixed_labels = build_augmentation(4, horizontal_flip=0.0, crop_scale=None, mixup=1.0)(images, labels)
    shares = mixed[:, 0, :, 0]  # (count, count): how much of image j is in image i
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    known_labels = torch.eye(count)
    expected = shares @ known_labels
    from_two = shares[:, 2] > 0
    assert (mixed_labels[from_two, 4] == -100).all() and (mixed_labels == -100).sum() == from_two.sum()
    known = mixed_labels != -100
    torch.testing.assert_close(mixed_labels[known], expected[known])


def pil(name, image, level):
    """The operation as Pillow does it, at one magnitude, where it has no random sign."""
    if name == "invert":
        return ImageOps.invert(image)
    if name == "auto_contrast":
        return ImageOps.autocontrast(image)
    if name == "posterize":
        return ImageOps.posterize(image, round(8 - 4 * level))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - 256 * level)
    if name == "equalize":
        return ImageOps.equalize(image)
    return image.rotate(30 * level, Image.BILINEAR, fillcolor=(128, 128, 128))


@pytest.mark.parametrize("name", ["invert", "auto_contrast", "posterize", "solarize", "equalize", "rotate"])
@pytest.mark.parametrize("index", [3, 9])
def test_rand_augment_operations_agree_with_pillow(name, index):
    images = (batch(count=2, size=32)[0] * 255).round().byte()
    level = index / 9
    ours = RAND_AUGMENT_OPERATIONS[name](images / 255, torch.full((2,), level))
    for image, result in zip(images, ours, strict=True):
        reference = np.asarray(pil(name, Image.fromarray(image.permute(1, 2, 0).numpy()), level)) / 255
        difference = np.abs(result.permute(1, 2, 0).numpy() - reference)
        # Borders of a rotation are sampled a little differently; everything else agrees to one or two of 255 levels.
        assert np.quantile(difference, 0.9) <= 2.01 / 255


@pytest.mark.parametrize(
    ("name", "enhancer"),
    [
        ("contrast", ImageEnhance.Contrast),
        ("color", ImageEnhance.Color),
        ("brightness", ImageEnhance.Brightness),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
def test_rand_augment_enhancements_agree_with_pillow_with_either_sign(name, enhancer):
    image = (batch(count=1, size=32)[0] * 255).round().byte()
    torch.manual_seed(0)
    results = RAND_AUGMENT_OPERATIONS[name](image.expand(16, -1, -1, -1) / 255, torch.full((16,), 0.5)).clamp(0, 1)
    image = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    references = [np.asarray(enhancer(image).enhance(1 + sign * 0.45)) / 255 for sign in (-1, 1)]
    seen = set()
    for result in results:
        errors = [np.abs(result.permute(1, 2, 0).numpy() - reference).max() for reference in references]
        assert min(errors) <= 3 / 255
        seen.add(int(np.argmin(errors)))
    assert seen == {0, 1}


def test_rand_augment_draws_for_each_image():
    same = batch(count=1)[0].expand(64, -1, -1, -1)
    torch.manual_seed(0)
    results = RandAugment()(same)
    unchanged = sum(torch.equal(result, same[0]) for result in results)
    assert 4 <= unchanged <= 34, "about a quarter of the images skip both operations"
    assert len({tuple(result.flatten()[::37].tolist()) for result in results}) > 25


def test_unknown_option_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean 'horizontal_flip'"):
        check_augmentation_names(["horizontal_flips"])
    with pytest.raises(ValueError, match="known are"):
        check_augmentation_names(["xyz"])
    check_augmentation_names(list(EVERYTHING))
