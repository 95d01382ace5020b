import copy
import itertools
import json
from functools import partial
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, Trainer, TrainingArguments
from transformers.image_processing_backends import PilBackend
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_hsvlt import HSVLTConfig, MlTrConfig, MlTrForImageClassification
from modeling_hsvlt.label_contract import NOT_EVALUATED
from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.processing_multilabel import MultiLabelImageProcessor, MultiLabelProcessor

from .test_load_image import encoded, noise


def reference(**attributes):
    """transformers' own Pillow processor."""
    return type(
        "Reference", (PilBackend,), {"do_rescale": True, "do_normalize": True, "do_convert_rgb": True} | attributes
    )()


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    "attributes",
    [
        {"size": {"height": 24, "width": 40}},
        {"size": {"shortest_edge": 30}, "do_center_crop": True, "crop_size": {"height": 24, "width": 24}},
        {"size": {"shortest_edge": 21}, "do_center_crop": True, "crop_size": {"height": 24, "width": 31}},
        {"size": {"shortest_edge": 30, "longest_edge": 35}},
        {"do_resize": False},
    ],
    ids=["squash", "crop", "crop_beyond_the_edge", "longest_edge", "as_is"],
)  # fmt: skip
def test_pixels_equal_the_stock_pillow_processor(attributes, resample):
    attributes = (
        {"do_resize": True}
        | attributes
        | {"resample": resample, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}
    )
    ours, theirs = MultiLabelImageProcessor(**attributes), reference(**attributes)
    for height, width in ((50, 70), (70, 50), (24, 40), (10, 13)):
        image = Image.fromarray(noise(height, width))
        expected = theirs(images=image, return_tensors="pt")["pixel_values"]
        result = ours(images=image, return_tensors="pt")["pixel_values"]
        assert result.dtype == torch.float32 and result.is_contiguous()
        torch.testing.assert_close(result, expected.float(), rtol=0, atol=2e-6)


def test_defaults_are_imagenet_statistics_and_bicubic():
    processor = MultiLabelImageProcessor()
    assert processor.size == {"height": 448, "width": 448} and processor.resize_mode == "squash"
    assert processor.image_mean == (0.485, 0.456, 0.406) and processor.image_std == (0.229, 0.224, 0.225)
    assert processor.resample == Image.Resampling.BICUBIC


@pytest.mark.parametrize(("height", "width"), [(20, 60), (60, 20), (33, 33), (7, 200), (1, 500)])
def test_padding_keeps_the_aspect_ratio_and_is_zero_once_normalised(height, width):
    image = Image.fromarray(noise(height, width))
    processor = MultiLabelImageProcessor(size=32, resize_mode="pad")
    values = processor(images=image, return_tensors="pt")["pixel_values"][0]
    scale = 32 / max(height, width)
    inner_height, inner_width = max(round(height * scale), 1), max(round(width * scale), 1)
    top, left = (32 - inner_height) // 2, (32 - inner_width) // 2
    inner = MultiLabelImageProcessor(size={"height": inner_height, "width": inner_width})
    expected = inner(images=image, return_tensors="pt")["pixel_values"][0]
    box = (slice(None), slice(top, top + inner_height), slice(left, left + inner_width))
    torch.testing.assert_close(values[box], expected)
    values[box] = 0
    assert values.abs().max() < 0.5 / 255 / 0.224 + 1e-6
    # The call's own mode goes first; uint8 pixels, as training keeps them, are padded alike.
    squashed = processor(images=image, resize_mode="squash", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        squashed, MultiLabelImageProcessor(size=32)(images=image, return_tensors="pt")["pixel_values"]
    )
    raw = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"][0]
    assert raw.dtype == torch.uint8 and (raw[:, :top] == torch.tensor([124, 116, 104]).view(3, 1, 1)).all()


def test_batches_lists_arrays_and_types():
    images = [noise(9, 12, seed=seed) for seed in range(3)]
    processor = MultiLabelImageProcessor(size=8)
    expected = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    assert expected.shape == (3, 3, 8, 8)
    stacked = np.stack(images)
    channels_first = torch.from_numpy(stacked).permute(0, 3, 1, 2)
    for batch in (images, stacked, torch.from_numpy(stacked), channels_first, channels_first.float() / 255):
        assert torch.equal(processor(images=batch, return_tensors="pt")["pixel_values"], expected)
    first = processor(images=stacked.transpose(0, 3, 1, 2), return_tensors="np")["pixel_values"]
    assert isinstance(first, np.ndarray) and np.array_equal(first, expected)
    strip = noise(4, 6, 3)  # Four rows, or the four channels of an image of 6 x 3
    for data_format, rgb in (("channels_last", strip), ("channels_first", load_image(strip.transpose(1, 2, 0)))):
        values = processor(images=[strip], input_data_format=data_format, return_tensors="pt")["pixel_values"]
        same = processor(images=Image.fromarray(np.asarray(rgb)), return_tensors="pt")["pixel_values"]
        assert torch.equal(values, same)
    listed = processor(images=encoded(Image.fromarray(images[0])))["pixel_values"]
    assert isinstance(listed, list) and np.array_equal(listed[0], expected[0])
    half = processor(images=images, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert half.min() >= 0 and half.max() <= 1
    raw = processor(images=images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    assert raw.dtype == torch.uint8
    torch.testing.assert_close(raw / 255, half)


STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}


@pytest.mark.parametrize("do_normalize", [False, True])
@pytest.mark.parametrize("do_center_crop", [False, True])
@pytest.mark.parametrize("do_resize", [False, True])
@pytest.mark.parametrize("kind", ["unit", "bytes", "normalised", "uint8"])
def test_without_rescaling_values_stay_as_in_the_stock_processor(kind, do_resize, do_center_crop, do_normalize):
    options = {
        **STATISTICS,
        "do_resize": do_resize,
        "do_center_crop": do_center_crop,
        "do_normalize": do_normalize,
        "do_rescale": False,
        "size": {"height": 16, "width": 24},
        "crop_size": {"height": 12, "width": 33},
        "resample": 2,
    }
    ours, theirs = MultiLabelImageProcessor(**options), reference(**options)
    # Stock Pillow processors resize 8 bits, down to which they cut what is not; ours resizes floats.
    steps = {"unit": 2 / 255, "bytes": 2.0}.get(kind, 0) if do_resize else 0
    for channels in (3, 1, 4):
        image = noise(20, 30, channels)
        floats = {"unit": image / 255, "bytes": image.astype(float), "normalised": image / 127.5 - 1}
        array = floats.get(kind, image)
        if (channels == 4 and kind in ("bytes", "normalised")) or (kind == "normalised" and do_resize):
            continue  # which the stock processor refuses
        for dtype in (array.dtype, np.float32, np.float16) if array.dtype.kind == "f" else (np.uint8,):
            for image in (array.astype(dtype), array.astype(dtype).transpose(2, 0, 1)):
                image = np.ascontiguousarray(image)
                expected = theirs(images=image.astype(array.dtype), return_tensors="pt")["pixel_values"].float()
                for source in (image, torch.from_numpy(image)):
                    result = ours(images=source, return_tensors="pt")["pixel_values"]
                    atol = steps / (0.2 if do_normalize else 1) + 1e-5
                    torch.testing.assert_close(result.float(), expected, rtol=1e-5, atol=atol)


def test_floats_are_resized_and_padded_as_floats():
    torch.manual_seed(0)
    values = 3 * torch.randn(2, 3, 21, 34)  # normalised by someone else
    options = {"do_rescale": False, "do_normalize": False, "resample": 2}
    size = {"height": 10, "width": 17}
    resized = MultiLabelImageProcessor(size=size, **options)(images=values, return_tensors="pt")["pixel_values"]
    expected = torch.nn.functional.interpolate(values, (10, 17), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-5)
    options = {"do_rescale": False, "size": 34, "resize_mode": "pad", **STATISTICS}
    padded = MultiLabelImageProcessor(**options)(images=values, return_tensors="pt")["pixel_values"]
    assert (padded[..., :6, :] == 0).all() and (padded[..., 27:, :] == 0).all(), "the mean, normalised"
    mean, std = (torch.tensor(STATISTICS[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    torch.testing.assert_close(padded[..., 6:27, :] * std + mean, values, rtol=0, atol=1e-5)
    as_is = MultiLabelImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    grey = as_is(images=values[0, 0], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(grey, values[:1, 0].expand(3, -1, -1))
    half = values.bfloat16()
    assert torch.equal(as_is(images=half, return_tensors="pt")["pixel_values"], half.float())


class Names:
    """Iterable, and nothing else."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def column(images, **features):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(one), "path": None} for one in images]},
        features=datasets.Features({"image": datasets.Image(**features)}),
    )
    return rows["image"]


def test_images_come_in_any_container(tmp_path):
    images = [Image.fromarray(noise(9, 12, seed=seed)) for seed in range(4)]
    arrays = [np.asarray(image) for image in images]
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    processor = processor_of()
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    containers = {
        "tuple": tuple(images),
        "generator": (image for image in images),
        "map": map(str, paths),
        "iterable": Names(paths),
        "nested": [images[:1], images[1:3], [], (images[3],)],
        "mixed": [arrays[0], paths[1], str(paths[2]), encoded(images[3])],
        "array of paths": np.array([str(path) for path in paths]),
        "array of objects": np.array([*paths, None], dtype=object)[:4],
        "batches": [np.stack(arrays[:2]), torch.from_numpy(np.stack(arrays[2:])).permute(0, 3, 1, 2)],
        "column": column(images),
        "undecoded column": column(images, decode=False),
        "streamed column": column(images).source.to_iterable_dataset()["image"],
        "transformed column": column(images).source.with_transform(
            lambda rows: {"image": [np.asarray(image.copy()) for image in rows["image"]]}
        )["image"],
    }
    for kind, container in containers.items():
        assert torch.equal(processor(images=container, return_tensors="pt")["pixel_values"], expected), kind
    for one in (paths[0], arrays[0], column(images)[0]):
        assert torch.equal(processor(images=one, return_tensors="pt")["pixel_values"], expected[:1])
    grey = arrays[0][..., 0]
    same = processor(images=[grey[..., None]], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=[grey], return_tensors="pt")["pixel_values"], same)
    with pytest.raises(ValueError, match=r"a dict of image \(dict\) is no image"):
        processor(images=column(images).source)


def test_the_images_of_a_column_are_read_with_care():
    deep = Image.fromarray(np.linspace(0, 65535, 80).astype(np.uint16).reshape(8, 10))
    processor = MultiLabelImageProcessor(do_resize=False, do_normalize=False)
    pixels = processor(images=column([deep]))["pixel_values"][0]
    assert np.array_equal(pixels, processor(images=deep)["pixel_values"][0])


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"size": {"height": 6, "width": 8}}, (6, 8)),
        ({"size": {"shortest_edge": 9}, "do_center_crop": True, "crop_size": {"height": 6, "width": 7}}, (6, 7)),
        ({"do_resize": False}, (1, 1)),
    ],
)
def test_no_images_make_an_empty_batch(options, shape):
    processor = MultiLabelProcessor(MultiLabelImageProcessor(**options), NAMES)
    for nothing in ([], (), iter([]), np.zeros((0, 5, 6, 3), np.uint8), torch.zeros(0, 3, 5, 6), column([])):
        batch = processor(images=nothing, return_tensors="pt")["pixel_values"]
        assert batch.shape == (0, 3, *shape) and batch.dtype == torch.float
        assert processor(images=[], return_tensors="np")["pixel_values"].shape == (0, 3, *shape)
        assert processor(images=[])["pixel_values"] == []
    for logits in (torch.zeros(0, 4), np.zeros((0, 4))):
        assert processor.post_process_multi_label_classification(logits, 0.5, top_k=2) == []


def test_the_image_care_holds_in_the_processor():
    processor = MultiLabelImageProcessor(do_resize=False, do_normalize=False)
    rgba = Image.fromarray(noise(6, 7, 4))
    exif = Image.Exif()
    exif[274] = 6
    turned = Image.open(BytesIO(encoded(Image.fromarray(noise(6, 7)), exif=exif)))
    deep = Image.fromarray(np.full((6, 7), 40000, dtype=np.uint16))
    for image in (rgba, turned, deep):
        expected = np.asarray(load_image(image)).transpose(2, 0, 1)
        np.testing.assert_allclose(processor(images=image)["pixel_values"][0] * 255, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"resize_mode": "fit"}, "resize_mode must be one of squash, pad, but it is 'fit'"),
        ({"resize_mode": "pad", "size": {"shortest_edge": 8}}, "needs a size with height and width"),
        ({"do_pad": True, "pad_size": {"height": 8, "width": 8}}, "do_pad is not supported"),
        ({"size": {"longest_edge": 8}}, "size must have height and width, or shortest_edge"),
        ({"size": {"shortest_edge": 8}}, "different sizes make no batch"),
        ({"do_convert_rgb": False}, "do_convert_rgb=False is not supported: every image becomes RGB"),
    ],
)
def test_options_that_cannot_work_are_refused(kwargs, message):
    images = [Image.fromarray(noise(10, 20)), Image.fromarray(noise(20, 30))]
    for return_tensors in ("pt", "np"):
        with pytest.raises(ValueError, match=message):
            MultiLabelImageProcessor(size=8)(images=images, return_tensors=return_tensors, **kwargs)
    if {"resize_mode", "do_pad", "do_convert_rgb"} & set(kwargs):
        with pytest.raises(ValueError, match=message):
            MultiLabelImageProcessor(**kwargs)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), np.nan), "NaN or infinite; leave it out"),
        (np.full((4, 4, 3), 1e300), "NaN or infinite; leave it out"),
        (np.full((4, 4, 4), 255.0), r"alpha channel, so without rescaling its values must lie in \[0, 1\]"),
        (np.zeros((5, 6, 2)), "needs 1, 3 or 4 channels"),
    ],
)
def test_floats_that_cannot_stay_are_told(array, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelImageProcessor()(images=array, do_rescale=False)


@pytest.mark.parametrize("do_rescale", [False, True])
def test_channels_where_they_are_said_to_be_and_are_not_are_told(do_rescale):
    with pytest.raises(ValueError, match=r"shape \(5, 6, 3\) is no image; it needs 1, 3 or 4 channels, first or last"):
        MultiLabelImageProcessor()(
            images=np.zeros((5, 6, 3)), do_rescale=do_rescale, input_data_format="channels_first"
        )


# The processor

NAMES = {0: "cat", 1: "dog", 2: "bird", 3: "boat"}
LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [-3.0, 4.0, 0.0, 0.0]])


def processor_of(**kwargs):
    return MultiLabelProcessor(MultiLabelImageProcessor(size=8), **({"id2label": NAMES} | kwargs))


def expected_labels(logits, keep):
    scores = 1 / (1 + np.exp(-logits.double().numpy()))
    rows = []
    for row in scores:
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        rows.append([(NAMES[index], row[index]) for index in order if keep(index, row[index])])
    return rows


def as_pairs(results):
    return [[(label["label"], pytest.approx(label["score"], abs=1e-6)) for label in row] for row in results]


def test_labels_by_no_threshold_a_number_and_their_own():
    processor = processor_of(thresholds=[0.9, 0.2, 0.5, 0.6])
    process = processor.post_process_multi_label_classification
    assert as_pairs(process(LOGITS)) == expected_labels(LOGITS, lambda index, score: True)
    assert as_pairs(process(LOGITS, threshold=0.6)) == expected_labels(LOGITS, lambda index, score: score >= 0.6)
    own = as_pairs(process(LOGITS, threshold="auto"))
    assert own == expected_labels(LOGITS, lambda index, score: score >= processor.thresholds[index])
    assert [[name for name, _ in row] for row in own] == [["bird", "dog"], ["dog", "bird"]]
    assert process(LOGITS, threshold=1.0) == [[], []]
    assert [len(row) for row in process(LOGITS, top_k=3)] == [3, 3]
    assert [[label["label"] for label in row] for row in process(LOGITS, threshold=0.4, top_k=1)] == [["cat"], ["dog"]]


def test_thresholds_by_list_and_by_name():
    own = [0.9, 0.2, 0.5, 0.6]
    process = processor_of().post_process_multi_label_classification
    expected = expected_labels(LOGITS, lambda index, score: score >= own[index])
    assert 0 < sum(map(len, expected)) < 8
    by_name = {"boat": 0.6, "bird": np.float32(0.5), "dog": torch.tensor(0.2), "cat": 0.9}
    mixed = [np.float64(0.9), torch.tensor(0.2), 0.5, np.float32(0.6)]
    for each in (own, tuple(own), np.array(own), torch.tensor(own), np.float32(own), by_name, mixed):
        assert as_pairs(process(LOGITS, each)) == expected, each
    for whole in ([0, 1, 0, 0], {"dog": 1, "cat": 0, "bird": 0, "boat": 0}):
        assert as_pairs(process(LOGITS, whole)) == expected_labels(LOGITS, lambda index, score: index != 1)
    half = process(LOGITS, 0.5)
    for number in (np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).bfloat16()):
        assert process(LOGITS, number) == half
    for number in (np.int64(2), torch.tensor(2), np.uint8(2)):
        assert process(LOGITS, top_k=number) == process(LOGITS, top_k=2)


def test_outputs_of_every_kind_and_precision():
    process = processor_of().post_process_multi_label_classification
    expected = process(LOGITS)
    for outputs in (ImageClassifierOutput(logits=LOGITS), {"logits": LOGITS}, LOGITS.numpy(), LOGITS.double(),
                    LOGITS.clone().requires_grad_(), LOGITS.bfloat16(), LOGITS.half()):  # fmt: skip
        assert process(outputs) == expected  # These logits are exact in bfloat16.
    assert {type(label["score"]) for row in expected for label in row} == {float}


def test_a_score_at_the_threshold_is_present():
    process = processor_of().post_process_multi_label_classification
    for row in torch.linspace(-6, 6, 400).view(100, 1, 4):
        scores = {label["label"]: label["score"] for label in process(row)[0]}
        for index, name in NAMES.items():
            # The logits ascend: itself and those after it.
            assert {label["label"] for label in process(row, scores[name])[0]} == set(list(NAMES.values())[index:])
        fitted = [scores[name] for name in NAMES.values()]
        own = processor_of(thresholds=fitted).post_process_multi_label_classification
        assert len(own(row, "auto")[0]) == 4
        above = np.nextafter(np.float32(fitted), np.float32(1)).tolist()
        assert processor_of(thresholds=above).post_process_multi_label_classification(row, "auto") == [[]]


def test_equal_scores_keep_the_order_of_the_labels():
    names = {index: str(index) for index in range(1000)}
    process = processor_of(id2label=names).post_process_multi_label_classification
    logits = torch.arange(1000).div(100, rounding_mode="floor")[None].float()
    expected = [str(index) for block in range(9, -1, -1) for index in range(100 * block, 100 * block + 100)]
    assert [label["label"] for label in process(logits)[0]] == expected


def test_labels_that_were_not_evaluated_are_left_out():
    logits = LOGITS.clone()
    process = processor_of(thresholds=[0.0] * 4).post_process_multi_label_classification
    left_out = (float("nan"), float("-inf"), NOT_EVALUATED)
    for threshold, value in itertools.product((None, 0.0, "auto", [0.0] * 4), left_out):
        logits[0, 0] = logits[1, 3] = value
        for dtype in (torch.float, torch.half, torch.bfloat16):
            assert process(logits.to(dtype), threshold) == process(logits, threshold)
        assert [[label["label"] for label in row] for row in process(logits, threshold)] == [
            ["bird", "boat", "dog"],
            ["dog", "bird", "cat"],
        ]


@pytest.mark.parametrize(
    ("logits", "threshold", "kwargs", "message"),
    [
        (LOGITS, "auto", {}, "this checkpoint has none; fit them on a validation split"),
        (LOGITS, "auto", {"thresholds": [0.5]}, "1 thresholds for 4 labels"),
        (
            LOGITS,
            1.5,
            {},
            r'threshold must be None, a number in \[0, 1\], "auto", or a list or dict .* but 1.5 is none of these',
        ),
        (LOGITS, -0.1, {}, "threshold must be"),
        (LOGITS, float("nan"), {}, "threshold must be"),
        (LOGITS, True, {}, "threshold must be"),
        (LOGITS, np.bool_(True), {}, "threshold must be"),
        (LOGITS, torch.tensor(float("nan")), {}, "threshold must be"),
        (LOGITS, [0.5] * 3, {}, "threshold has 3 numbers for 4 labels; as a list it has one for each, in order"),
        (LOGITS, [], {}, "threshold has 0 numbers for 4 labels"),
        (LOGITS, np.full((2, 4), 0.5), {}, "threshold has 2 numbers for 4 labels"),
        (LOGITS, [0.5, 0.5, 0.5, 1.5], {}, "for each label, but 1.5 is none of these"),
        (LOGITS, [0.5, 0.5, 0.5, [0.5]], {}, r"for each label, but \[0.5\] is none of these"),
        (LOGITS, [0.5, 0.5, 0.5, None], {}, "for each label, but None is none of these"),
        (LOGITS, {"cat": 0.5, "dog": 0.5, "bird": 0.5}, {}, "threshold has no number for 'boat'"),
        (LOGITS, dict.fromkeys([*"ab", *NAMES.values()], 0.5), {}, "threshold has a number for 'a', which is no label"),
        (LOGITS, dict.fromkeys(NAMES.values(), "auto"), {}, "for each label, but 'auto' is none of these"),
        (LOGITS, {}, {}, "threshold has no number for 'cat'"),
        (LOGITS, (score for score in [0.5] * 4), {}, "threshold must be"),
        (LOGITS, object(), {}, "threshold must be"),
        (LOGITS, "best", {}, "threshold must be"),
        (LOGITS[:, :3], None, {}, r"logits must be of shape \(batch, 4\), but they are \(2, 3\)"),
        (LOGITS[0], None, {}, r"logits must be of shape \(batch, 4\), but they are \(4,\)"),
        (LOGITS, None, {"id2label": None}, "has no label names: give id2label"),
    ],
)
def test_thresholds_and_logits_that_cannot_be_used_are_refused(logits, threshold, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor_of(**kwargs).post_process_multi_label_classification(logits, threshold)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "2", np.int64(0), np.float64(2), [2]])
def test_a_top_k_that_is_no_number_of_labels_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k must be None or a whole number from 1, but it is"):
        processor_of().post_process_multi_label_classification(LOGITS, top_k=top_k)


def test_a_processor_reads_images_like_its_image_processor():
    processor = processor_of()
    data = encoded(Image.fromarray(noise(12, 9, 4)))
    for options in ({}, {"resize_mode": "pad"}, {"size": {"height": 6, "width": 5}}, {"do_normalize": False}):
        expected = processor.image_processor(images=[data], return_tensors="pt", **options)["pixel_values"]
        assert torch.equal(processor(images=[data], return_tensors="pt", **options)["pixel_values"], expected)


def test_saving_and_loading_keeps_everything(tmp_path):
    image_processor = MultiLabelImageProcessor(
        size={"height": 20, "width": 30},
        resize_mode="pad",
        resample=2,
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
    )
    MultiLabelProcessor(image_processor, id2label=NAMES, thresholds=[0.1, 0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "image_urls.py",
        "label_contract.py",
        "load_image.py",
        "png_chunks.py",
        "processing_multilabel.py",
        "processor_config.json",
    ]
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"]["AutoProcessor"] == "processing_multilabel.MultiLabelProcessor"
    assert (
        saved["image_processor"]["auto_map"]["AutoImageProcessor"] == "processing_multilabel.MultiLabelImageProcessor"
    )
    loaded = MultiLabelProcessor.from_pretrained(tmp_path)
    assert loaded.id2label == NAMES and loaded.thresholds == [0.1, 0.2, 0.3, 0.4]
    image = Image.fromarray(noise(17, 23))
    expected = image_processor(images=image, return_tensors="pt")["pixel_values"]
    for processor in (loaded, loaded.image_processor, MultiLabelImageProcessor.from_pretrained(tmp_path)):
        assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"], expected)
    first = (tmp_path / "processor_config.json").read_text()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/processor_config.json").read_text() == first


def test_config_json_has_the_last_word_on_labels_and_thresholds(tmp_path, monkeypatch):
    stale = {0: "old"}
    MultiLabelProcessor(MultiLabelImageProcessor(size=8), id2label=stale, thresholds=[0.3]).save_pretrained(tmp_path)
    config = HSVLTConfig.preset("nano", num_labels=4, id2label=NAMES, thresholds=[0.1, 0.2, 0.3, 0.4])
    config.save_pretrained(tmp_path)
    loaded = MultiLabelProcessor.from_pretrained(tmp_path)
    assert loaded.id2label == NAMES and loaded.thresholds == config.thresholds
    # The package's own classes, so nothing of the folder is run.
    for auto in (AutoProcessor, AutoImageProcessor):
        assert type(auto.from_pretrained(tmp_path)) in (MultiLabelProcessor, MultiLabelImageProcessor)
    given = MultiLabelProcessor.from_pretrained(tmp_path, thresholds=[0.9] * 4)
    assert given.id2label == NAMES and given.thresholds == [0.9] * 4
    # Trained anew, so no longer fitted: the processor's old thresholds are for other labels.
    unfitted = copy.deepcopy(config)
    unfitted.thresholds = None
    unfitted.save_pretrained(tmp_path)
    assert MultiLabelProcessor.from_pretrained(tmp_path).thresholds is None
    # Another model's config.json, without label names
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hsvlt"}))
    assert MultiLabelProcessor.from_pretrained(tmp_path).id2label == stale
    warnings = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", warnings.append)
    MultiLabelProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert not warnings


class Rows(torch.utils.data.Dataset):
    def __init__(self, processor):
        self.pixels = processor(images=[noise(40, 40, seed=seed) for seed in range(8)], return_tensors="pt")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        labels = torch.tensor([index % 2, 1, 0, -100], dtype=torch.float)
        return {"pixel_values": self.pixels["pixel_values"][index], "labels": labels}


def test_trainer_takes_it_as_its_processing_class(tmp_path):
    config = MlTrConfig.preset("nano", num_labels=4, id2label=NAMES, image_size=32)
    model = MlTrForImageClassification(config)
    model.save_pretrained(tmp_path / "start")
    MultiLabelProcessor(MultiLabelImageProcessor(size=32, resize_mode="pad")).save_pretrained(tmp_path / "start")
    processor = AutoProcessor.from_pretrained(tmp_path / "start")
    before = config.to_dict()
    rows = Rows(processor)
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    assert trainer.state.global_step == 2 and np.isfinite(trainer.evaluate()["eval_loss"])
    assert {key: value for key, value in model.config.to_dict().items() if key in before} == before, "no token ids"
    again = AutoProcessor.from_pretrained(tmp_path / "run/checkpoint-2")
    assert type(again) is MultiLabelProcessor and again.id2label == NAMES
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    assert "tokenizer" not in json.loads((tmp_path / "run/checkpoint-2/processor_config.json").read_text())


def test_it_has_no_text_side():
    processor = processor_of()
    for use in (partial(processor, text="cat"), partial(processor.decode, [1]), partial(processor.batch_decode, [[1]])):
        with pytest.raises(ValueError, match="reads images and no text: give images alone"):
            use()
    assert processor.model_input_names == ["pixel_values"]
