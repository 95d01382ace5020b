"""Copies are found, different images are not, and the index finds what comparing all pairs finds."""

import io

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageFilter

from training.check.duplicates import (
    MAX_DIFFERENCE,
    MAX_DISTANCE,
    Fingerprints,
    fingerprint,
    group_duplicates,
    likeness,
    near_pairs,
    perceptual_hash,
)


def photo(seed, size=(200, 150)):
    """Smooth colours with edges, whose frequencies fall off as a photograph's do."""
    rng = np.random.default_rng(seed)
    image = PILImage.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
        size, PILImage.Resampling.BICUBIC
    )
    return image.filter(ImageFilter.GaussianBlur(1))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def prints_of(*images):
    return Fingerprints.of([fingerprint(each if isinstance(each, dict) else encoded(each), 10**7) for each in images])


def test_the_hash_is_the_cosine_transform_against_its_median():
    grey = np.asarray(photo(3).resize((32, 32)).convert("L"), dtype=float)
    positions = np.arange(32)
    basis = np.cos(np.pi / 32 * (positions + 0.5)[None] * np.arange(8)[:, None])  # (8, 32)
    low = basis @ grey @ basis.T
    bits = (low > np.median(low)).ravel()
    assert perceptual_hash(photo(3).resize((32, 32))) == sum(1 << (63 - i) for i in np.flatnonzero(bits).tolist())
    assert bits.sum() == 32


def test_copies_are_near_and_other_images_far():
    original = photo(0)
    copies = [
        encoded(original, "JPEG", quality=30),
        original.resize((100, 75)),
        original.resize((900, 675)),
        original.point(lambda value: min(255, int(value * 1.05))),
        original.convert("RGBA"),
    ]
    others = [photo(seed) for seed in range(1, 60)]
    prints = prints_of(original, *copies, *others)
    distance, difference = likeness(prints, 0, np.arange(1, 6))
    assert (distance <= MAX_DISTANCE).all() and (difference <= MAX_DIFFERENCE).all()
    assert [group.tolist() for group in group_duplicates(prints)] == [[0, 1, 2, 3, 4, 5]]


def test_flat_images_share_a_hash_but_are_copies_only_in_one_colour():
    flat = [PILImage.new("RGB", (40, 30), color) for color in ("white", "navy", "white", "darkred")]
    prints = prints_of(*flat, encoded(flat[1], "BMP"))
    assert [group.tolist() for group in group_duplicates(prints)] == [[0, 2], [1, 4]]
    assert prints.digests[0] == prints.digests[2] and prints.digests[1] != prints.digests[4]


def test_orientation_and_oversized_images_are_read_as_training_reads_them():
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned = encoded(photo(5), "JPEG", exif=exif, quality=95)
    upright = photo(5).transpose(PILImage.Transpose.ROTATE_270)
    assert len(group_duplicates(prints_of(turned, upright))) == 1
    assert len(group_duplicates(prints_of(turned, photo(5)))) == 0
    with pytest.raises(ValueError, match="limit of 100"):
        fingerprint(encoded(photo(5)), 100)


@pytest.mark.parametrize("max_distance", [0, 1, 3, 6, 8])
def test_the_index_finds_all_pairs(max_distance):
    rng = np.random.default_rng(max_distance)
    phashes = rng.integers(0, 1 << 64, 400, dtype=np.uint64)
    for i in range(0, 400, 2):  # near each other, by 0 to 11 bits
        flipped = rng.choice(64, rng.integers(0, 12), replace=False)
        phashes[i + 1] = phashes[i] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    thumbnails = np.repeat(rng.integers(0, 256, (200, 192), dtype=np.uint8), 2, axis=0)
    thumbnails[:20] = rng.integers(0, 256, (20, 192), dtype=np.uint8)  # near by hash alone
    expected = []
    for i in range(400):
        for j in range(i + 1, 400):
            alike = np.abs(thumbnails[i].astype(int) - thumbnails[j]).mean() <= 12
            if (int(phashes[i]) ^ int(phashes[j])).bit_count() <= max_distance and alike:
                expected.append([i, j])
    assert near_pairs(phashes, thumbnails, max_distance).tolist() == expected and expected


def test_distances_beyond_chance_are_refused():
    with pytest.raises(ValueError, match="max_distance=9"):
        near_pairs(np.zeros(2, dtype=np.uint64), np.zeros((2, 192), dtype=np.uint8), 9)


def test_nothing_and_one_image_have_no_duplicates():
    assert group_duplicates(prints_of(photo(1))) == []
    assert group_duplicates(Fingerprints.of([])) == []
