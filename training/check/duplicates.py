"""Images that show the same: equal files, and copies that were resized or encoded again.

An image is reduced to a perceptual hash of 64 bits, which an index compares without looking at all pairs, and a
thumbnail of 8 x 8 pixels, which confirms what the hash suggests: flat images share hashes, not colours.
"""

from __future__ import annotations

import hashlib
from itertools import combinations, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from modeling_hsvlt.load_image import load_image

# Chosen on the photographs of VOC and COCO and on copies made of them, see tests/training/check/test_duplicates.py.
MAX_DISTANCE = 6  # bits of 64
MAX_DIFFERENCE = 12.0  # mean absolute difference of thumbnails, of 255
LARGEST_BUCKET = 256  # images of one key that each is compared with, the nearest in brightness
_BITS_SET = np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


class Fingerprint(NamedTuple):
    """What is kept of an image: 216 bytes."""

    digest: bytes  # BLAKE2b of the file, 16 bytes
    phash: int  # perceptual hash, 64 bits
    thumbnail: bytes  # 8 x 8 RGB pixels, 192 bytes


class Fingerprints(NamedTuple):
    """Fingerprints of `n` images as arrays."""

    digests: list[bytes]
    phashes: np.ndarray  # (n,) uint64
    thumbnails: np.ndarray  # (n, 192) uint8

    @classmethod
    def of(cls, fingerprints: list[Fingerprint]) -> Fingerprints:
        thumbnails = np.frombuffer(b"".join(each.thumbnail for each in fingerprints), dtype=np.uint8).reshape(-1, 192)
        phashes = np.array([each.phash for each in fingerprints], dtype=np.uint64)
        return cls([each.digest for each in fingerprints], phashes, thumbnails)


def fingerprint(image: dict, max_pixels: int) -> Fingerprint:
    """Decodes an image in full, JPEGs at reduced size, and reduces it.

    Args:
        image: An undecoded `datasets.Image`: `path`, `bytes`.
        max_pixels: As in `load_image`.

    Raises:
        ValueError: as `load_image`; it cannot be read or is too large.
        OSError: the file cannot be opened.
    """
    data = image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()
    image = load_image({"bytes": data, "path": image.get("path")}, max_pixels=max_pixels, size_hint=64)
    small = image.resize((32, 32), Image.Resampling.BOX, reducing_gap=None)
    thumbnail = small.resize((8, 8), Image.Resampling.BOX).tobytes()
    return Fingerprint(hashlib.blake2b(data, digest_size=16).digest(), perceptual_hash(small), thumbnail)


def perceptual_hash(image: Image.Image) -> int:
    """The DCT hash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010 (pHash): which
    of the 8 x 8 lowest frequencies of the 32 x 32 grey image lie above their median, as 64 bits."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    low = dctn(grey)[:8, :8]
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def near_pairs(phashes: np.ndarray, thumbnails: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """Pairs of images whose hashes differ in at most `max_distance` bits and whose thumbnails look alike: their mean
    absolute difference is at most `MAX_DIFFERENCE`.

    The 64 bits are cut into `max_distance` + 2 bands. At most `max_distance` bands hold a difference, so that two are
    equal: images are sorted by the bits of each two bands in turn and compared within equal keys (Manku, Jain and Das
    Sarma, "Detecting Near-Duplicates for Web Crawling", WWW 2007). Of more than `LARGEST_BUCKET` images with one key
    each is compared with those nearest in brightness only, which keeps the cost in bounds whatever the images are.

    Args:
        phashes: (n,) uint64.
        thumbnails: (n, pixels) uint8.
        max_distance: Between 0 and 8.

    Returns:
        (pairs, 2) int64 indices; the first of a pair is the lower one.

    Raises:
        ValueError: a distance out of range.
    """
    if not 0 <= max_distance <= 8:
        raise ValueError(f"max_distance={max_distance} must be between 0 and 8 bits; more differ by chance.")
    brightness = thumbnails.mean(axis=1)
    edges = np.linspace(0, 64, max_distance + 3).round().astype(int).tolist()
    bands = [((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    found = [np.empty((0, 2), dtype=np.int64)]
    for first, second in combinations(bands, 2):
        keys = phashes & np.uint64(first | second)
        order = np.lexsort((brightness, keys))
        keys = keys[order]
        left = np.arange(len(keys))
        for offset in range(1, LARGEST_BUCKET + 1):
            left = left[left + offset < len(keys)]
            left = left[keys[left] == keys[left + offset]]
            if not len(left):
                break
            a, b = order[left], order[left + offset]
            near = _distance(phashes[a], phashes[b]) <= max_distance
            a, b = a[near], b[near]
            alike = _difference(thumbnails[a], thumbnails[b]) <= MAX_DIFFERENCE
            found.append(np.sort(np.stack([a[alike], b[alike]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def group_duplicates(prints: Fingerprints, max_distance: int = MAX_DISTANCE) -> list[np.ndarray]:
    """Groups of images that are equal or near, also by way of others; each the rising indices of at least two."""
    # Equal images, perhaps many thousand white ones, enter the index once.
    seen: dict[bytes, int] = {}
    records = zip(prints.phashes.tolist(), map(bytes, prints.thumbnails), strict=True)
    item = np.array([seen.setdefault(record, len(seen)) for record in records], dtype=np.int64)
    first = np.unique(item, return_index=True)[1]
    pairs = near_pairs(prints.phashes[first], prints.thumbnails[first], max_distance)
    links = csr_array((np.ones(len(pairs), dtype=bool), pairs.T), shape=(len(first), len(first)))
    group = connected_components(links, directed=False)[1][item]
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return [members for members in groups if len(members) > 1]


def likeness(prints: Fingerprints, one: int, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits by which the hashes of `others` differ from that of `one`, and the mean differences of their thumbnails."""
    thumbnails = prints.thumbnails[others]
    reference = np.broadcast_to(prints.thumbnails[one], thumbnails.shape)
    return _distance(prints.phashes[others], prints.phashes[one]), _difference(thumbnails, reference)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _BITS_SET[np.ascontiguousarray(a ^ b).view(np.uint16)].reshape(-1, 4).sum(axis=1)


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(np.int16) - b).mean(axis=1)
