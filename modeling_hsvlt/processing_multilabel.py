"""Images to `pixel_values`, and logits to labels.

A checkpoint carries this file and those that it imports: transformers, torch, NumPy and Pillow are enough for them.
"""

import base64
import binascii
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from numbers import Real

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, ProcessorMixin

from .image_urls import fetch_image
from .losses_multilabel import NOT_EVALUATED

# Where Pillow itself begins to warn of a decompression bomb: a quarter of a gibibyte of RGB. Pillow refuses only twice
# as much, which a 20 KB file can reach in every worker of a data loader at once.
MAX_PIXELS = 89_478_485
MAX_BYTES = 2**28  # of an encoded image: as many as the largest one that is decoded has in RGB
RESIZE_MODES = ("squash", "pad")


def load_image(
    source,
    *,
    max_pixels: int | None = MAX_PIXELS,
    max_bytes: int | None = MAX_BYTES,
    size_hint: int | None = None,
    timeout: float | None = 10.0,
    allow_private_addresses: bool = False,
) -> Image.Image:
    """Decodes an image to RGB as people see it.

    The EXIF orientation is applied (and ignored where the EXIF data are broken), transparency is laid on white, CMYK is
    converted without its colour profile, and an animation gives its first frame. Grey and colour of more than 8 bits
    are scaled by the range they use: the bits that a TIFF declares if fewer than 16, else the fewest of 8, 10, 12, 14
    and 16 bits that hold the brightest pixel (16-bit files mostly carry 10 to 14 bits of a sensor); floats up to 1 by
    1; and what is negative or beyond 16 bits by the image's own minimum and maximum.

    Args:
        source: A path, a URL (`http://`, `https://`, `data:image/`), a base64 string, the bytes of a file, an open
            binary file, an undecoded `datasets.Image` (`{"bytes": ..., "path": ...}`), a `PIL.Image.Image`, or a NumPy
            array or tensor of shape (height, width), (height, width, channels) or (channels, height, width) with 1, 3
            or 4 channels.
        max_pixels: The largest width * height to decode; None leaves Pillow's own limit alone.
        max_bytes: The longest file or download to read; None for no limit. Of an animation one frame is read, however
            many there are.
        size_hint: Side in px that the image is going to be resized to. A JPEG whose two sides stay at least twice
            that long is then decoded at 1/2, 1/4 or 1/8 of its size: several times faster for a photograph of 12
            megapixels, at the price of slightly different pixels.
        timeout: Seconds that a URL may take, to the last byte.
        allow_private_addresses: Whether a URL may lead into a network or to this computer, which a stranger's URL must
            not; proxies of the environment are not used.

    Returns:
        An RGB image; `source` itself if it is one that needs no change.

    Raises:
        ValueError: the image cannot be had, is too large, truncated or in no known format; the message names it.
    """
    name = _describe(source)
    if isinstance(source, np.ndarray) or torch.is_tensor(source):
        return _from_array(source, name)
    if isinstance(source, Image.Image):
        return _to_rgb(source, name, max_pixels, size_hint)
    stream = _open_source(source, name, max_bytes, timeout, allow_private_addresses)
    with _naming_failures(name):
        image = Image.open(stream)
    with image:
        return _to_rgb(image, name, max_pixels, size_hint)


def _describe(source) -> str:
    """How messages call an image."""
    if isinstance(source, Mapping):
        return _describe(source.get("path") or source.get("bytes") or f"a dict of {', '.join(map(str, source))}")
    if isinstance(source, Image.Image) or hasattr(source, "read"):
        source = getattr(source, "filename", None) or getattr(source, "name", None) or f"a {type(source).__name__}"
    if isinstance(source, (bytes, bytearray)):
        return f"an image of {len(source)} bytes"
    if isinstance(source, np.ndarray) or torch.is_tensor(source):
        return f"an array of shape {tuple(source.shape)}"
    # Escaped: a name must not steer the terminal that shows it.
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(source)[:5000])
    return text if len(text) <= 200 else f"{text[:60]}... ({len(str(source))} characters)"


def _open_source(source, name: str, max_bytes: int | None, timeout: float | None, allow_private: bool):
    """A path or binary stream that Pillow can open."""

    def within_limit(size: int) -> None:
        if max_bytes is not None and size > max_bytes:
            raise ValueError(f"{name} has {size} bytes, more than the limit of {max_bytes}; raise max_bytes.")

    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path") or source
    if isinstance(source, (bytes, bytearray)):
        within_limit(len(source))
        return BytesIO(source)
    if hasattr(source, "read"):
        if hasattr(source, "seek"):
            start = source.tell()
            within_limit(source.seek(0, os.SEEK_END) - start)
            source.seek(start)
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"{name} ({type(source).__name__}) is no image; give a path, URL, bytes, file, image, array or tensor."
        )
    text = os.fspath(source)
    if text.startswith(("http://", "https://")):
        try:
            data = fetch_image(text, timeout=timeout, max_bytes=max_bytes, allow_private=allow_private)
        except TimeoutError as error:
            raise ValueError(f"{name} cannot be downloaded: {error}; raise timeout.") from error
        except Exception as error:  # http.client and ssl have their own, and an odd name gives a UnicodeError
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{name} cannot be downloaded: {reason}. Check the address.") from error
        return BytesIO(data)
    if os.path.isfile(text):
        within_limit(os.path.getsize(text))
        return text
    if os.path.exists(text):
        raise ValueError(f"{name} is a folder; give the image files in it.")
    within_limit(len(text) * 3 // 4)
    try:
        encoded = text.split(",", 1)[1] if text.startswith("data:image/") else text
        return BytesIO(base64.b64decode(encoded, validate=True))
    except (binascii.Error, IndexError, ValueError) as error:
        raise ValueError(f"{name} does not exist; check the path.") from error


@contextmanager
def _naming_failures(name: str):
    """Turns whatever Pillow's plugins raise, which is nearly every exception, into a ValueError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is in no image format that Pillow reads; convert it or leave it out.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error} Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS and max_pixels.") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be decoded ({error}); replace the file or leave it out.") from error


def _to_rgb(image: Image.Image, name: str, max_pixels: int | None, size_hint: int | None) -> Image.Image:
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{name} has no pixels ({width} x {height}); leave it out.")
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(
            f"{name} has {width} x {height} pixels, more than the limit of {max_pixels}; shrink it or raise max_pixels."
        )
    if image.format == "EPS":
        # Pillow would hand the file, which is a program, to Ghostscript.
        raise ValueError(f"{name} is an EPS drawing; convert it to PNG or leave it out.")
    with _naming_failures(name):
        if size_hint is not None:
            image.draft(None, (2 * size_hint, 2 * size_hint))
        image.load()
        if _orientation(image) in range(2, 9):
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            # TIFF's BitsPerSample (tag 258); Pillow fills the lower bits and drops the number.
            bits = image.tag_v2.get(258, (None,))[0] if hasattr(image, "tag_v2") else None
            image = Image.fromarray(_to_uint8(np.asarray(image), bits))
        if image.has_transparency_data:
            canvas = Image.new("RGBA", image.size, "white")
            canvas.alpha_composite(image.convert("RGBA"))
            image = canvas
        return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # An image with broken EXIF data is still an image.
        return 1


def _from_array(array, name: str, data_format: str | ChannelDimension | None = None) -> Image.Image:
    array = _channels_last(array, name, data_format)
    if array.dtype != bool and array.min() < 0:
        raise ValueError(f"{name} has negative pixels, so it seems normalised; give pixels in [0, 255] or [0, 1].")
    with _naming_failures(name):
        return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(array))), name, None, None)


def _channels_last(array, name: str, data_format: str | ChannelDimension | None) -> np.ndarray:
    """(height, width) or (height, width, 3 or 4) of what `load_image` takes for an image."""
    if torch.is_tensor(array):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    if array.ndim not in (2, 3) or not array.size or array.dtype.kind not in "buif":
        raise ValueError(f"{name} is no image; it needs numbers of shape (height, width) or 1, 3 or 4 channels.")
    if array.ndim == 3:
        with suppress(ValueError):  # no such number of channels
            data_format = data_format or infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        array = np.moveaxis(array, 0, -1) if data_format == ChannelDimension.FIRST else array
        if array.shape[-1] not in (1, 3, 4):
            raise ValueError(f"{name} is no image; it needs 1, 3 or 4 channels, first or last.")
        array = array[..., 0] if array.shape[-1] == 1 else array
    return array


def _float_planes(array: np.ndarray, name: str) -> list[Image.Image]:
    """Red, green and blue of floats that stay as they are: 8 bits would round them and bring them to [0, 255]."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has pixels that are NaN or infinite; leave it out.")
    if array.ndim == 3 and array.shape[-1] == 4:
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has an alpha channel, so without rescaling its values must lie in [0, 1].")
        array = array[..., :3] * array[..., 3:] + (1 - array[..., 3:])
    planes = [array] * 3 if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes]


def _to_uint8(pixels: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Pixels of any number type to uint8, by the rule that `load_image` states."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    low, high = 0.0, float(pixels.max())
    if not np.isfinite(pixels).all():
        raise ValueError("it has pixels that are NaN or infinite")
    if pixels.min() < 0 or high > 65535:
        low = float(pixels.min())
    elif np.issubdtype(pixels.dtype, np.floating) and high <= 1:
        high = 1.0
    elif bits is not None and bits < 16:  # 16 is the container's size, whatever the sensor gave.
        high = 2.0**bits - 1
    else:
        high = next(2.0**depth - 1 for depth in (8, 10, 12, 14, 16) if high < 2**depth)
    return np.rint((pixels.astype(np.float64) - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _flat(images) -> Iterator:
    """Each image of what may be one or many."""
    if hasattr(images, "column_name") and hasattr(images, "source"):
        images = undecoded(images.source, images.column_name)[images.column_name]
    if not is_many(images):
        yield images
        return
    for image in images:
        yield from _flat(image)


def is_many(images) -> bool:
    """Whether these are several images: a batch, or anything to iterate over that is not itself an image."""
    if isinstance(images, np.ndarray) or torch.is_tensor(images):
        # (batch, height, width, channels), or an array of paths or images
        return images.ndim == 4 or (images.ndim == 1 and isinstance(images, np.ndarray) and images.dtype.kind in "OUS")
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping, Image.Image)) or hasattr(images, "read"):
        return False
    return isinstance(images, Iterable)


def undecoded(dataset, column: str):
    """A `datasets` dataset in which the images of a column are left for [`load_image`] to decode, with its care."""
    feature = (getattr(dataset, "features", None) or {}).get(column)
    transformed = (getattr(dataset, "format", None) or {}).get("type") == "custom"  # a user's own, of decoded images
    if hasattr(feature, "decode") and hasattr(dataset, "cast_column") and not transformed:
        dataset = dataset.cast_column(column, type(feature)(decode=False))  # type: ignore[misc]
    return dataset


class MultiLabelImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    r"""
    resize_mode (`str`, *optional*, defaults to `self.resize_mode`):
        `"squash"` stretches the image to `size`; `"pad"` keeps its aspect ratio and fills the rest evenly on both
        sides with the mean colour (letterbox).
    """

    resize_mode: str | None


class MultiLabelImageProcessor(PilBackend):
    r"""
    Images to `pixel_values`, without torchvision: resized by Pillow (the very pixels of the stock Pillow processors,
    in about half the time: nothing is copied between Pillow and NumPy on the way), then scaled and normalised.

    Whatever [`load_image`] reads is accepted, one or a list. Defaults: squashed to 448 x 448 bicubically, ImageNet's
    mean and standard deviation.

    Args:
        size (`dict`, defaults to `{"height": 448, "width": 448}`):
            The size after resizing; `{"shortest_edge": s}`, with `do_center_crop` and `crop_size`, for the usual
            resize-and-crop of ImageNet models.
        resize_mode (`str`, defaults to `"squash"`):
            `"squash"` or `"pad"`, see [`MultiLabelImageProcessorKwargs`].
        resample (`int`, defaults to `PILImageResampling.BICUBIC`):
            Pillow's filter.
        kwargs:
            The rest of `ImagesKwargs`: `do_resize`, `do_center_crop`, `crop_size`, `do_rescale`, `rescale_factor`,
            `do_normalize`, `image_mean`, `image_std`. Without rescaling and normalising the pixels stay uint8. With
            `do_rescale=False` arrays and tensors of floats keep their values, whatever their range.
    """

    valid_kwargs = MultiLabelImageProcessorKwargs
    size = {"height": 448, "width": 448}
    resize_mode = "squash"
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    do_convert_rgb = do_resize = do_rescale = do_normalize = True

    def fetch_images(self, images):
        """A flat list of images, from one or from any nesting of lists, iterators, batches and `datasets` columns;
        what is not an array yet is decoded with [`load_image`]."""
        return [
            image if isinstance(image, np.ndarray) or torch.is_tensor(image) else load_image(image)
            for image in _flat(images)
        ]

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        return self.fetch_images(images)

    def process_image(
        self, image, input_data_format: str | ChannelDimension | None = None, do_rescale: bool = True, **kwargs
    ) -> Image.Image | list[Image.Image]:
        """One image as RGB, or as three planes of floats that are not to be rescaled; `input_data_format` says where
        an array has its channels."""
        if isinstance(image, Image.Image):
            return image
        if not do_rescale and (image.is_floating_point() if torch.is_tensor(image) else image.dtype.kind == "f"):
            return _float_planes(_channels_last(image, _describe(image), input_data_format), _describe(image))
        return _from_array(image, _describe(image), input_data_format)

    def resize(
        self, image: Image.Image, size, resample=None, resize_mode: str = "squash", fill: tuple[int, ...] | float = 0
    ) -> Image.Image:
        """Resizes to `size`, by `resize_mode` where that gives both sides; `fill` is the padding's colour."""
        if size.height and size.width:
            if resize_mode == "squash":
                return image.resize((size.width, size.height), resample)
            # Not ImageOps.pad, which loses an image so long that it becomes less than half a pixel wide.
            scale = min(size.height / image.height, size.width / image.width)
            inner = image.resize([max(round(side * scale), 1) for side in image.size], resample)
            canvas = Image.new(image.mode, (size.width, size.height), fill)
            canvas.paste(inner, ((size.width - inner.width) // 2, (size.height - inner.height) // 2))
            return canvas
        if not size.shortest_edge:
            raise ValueError(f"size must have height and width, or shortest_edge, but it is {dict(size)}.")
        shape = get_size_with_aspect_ratio((image.height, image.width), size.shortest_edge, size.longest_edge)
        return image.resize(shape[::-1], resample)

    def _standardize_kwargs(self, resize_mode: str | None = None, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        if resize_mode not in (None, *RESIZE_MODES):
            raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, but it is {resize_mode!r}.")
        if resize_mode == "pad" and kwargs["size"] is not None and not kwargs["size"].height:
            raise ValueError('resize_mode="pad" needs a size with height and width.')
        if kwargs.get("do_pad"):
            raise ValueError('do_pad is not supported; resize_mode="pad" pads to size.')
        if kwargs.get("do_convert_rgb") is False:
            raise ValueError("do_convert_rgb=False is not supported: every image becomes RGB, which the models read.")
        return kwargs | {"resize_mode": resize_mode}

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size,
        resample,
        resize_mode: str,
        do_center_crop: bool,
        crop_size,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        mean, std = (np.broadcast_to(np.float32(statistic), 3) for statistic in (image_mean, image_std))
        # The mean colour, so that padding is 0 once normalised.
        fills = {"RGB": [tuple(np.rint(mean / rescale_factor).clip(0, 255).astype(int).tolist())], "F": mean.tolist()}
        mean, std = (torch.tensor(statistic).view(3, 1, 1) for statistic in (mean, std))
        pixel_values = []
        for image in images or [Image.new("RGB", (1, 1))]:  # a batch of none has the shape of one
            planes = image if isinstance(image, list) else [image]
            if do_resize:
                pairs = zip(planes, fills[planes[0].mode], strict=True)
                planes = [self.resize(plane, size, resample, resize_mode, fill) for plane, fill in pairs]
            if do_center_crop:
                width, height = planes[0].size
                left, top = (width - crop_size.width) // 2, (height - crop_size.height) // 2
                box = (left, top, left + crop_size.width, top + crop_size.height)
                planes = [plane.crop(box) for plane in planes]
            # (3, height, width), uint8 or float32
            pixels = torch.from_numpy(np.dstack([np.asarray(plane) for plane in planes])).permute(2, 0, 1).contiguous()
            if do_rescale or do_normalize:
                pixels = pixels.float()
            if do_rescale:
                pixels *= rescale_factor
            if do_normalize:
                pixels.sub_(mean).div_(std)
            pixel_values.append(pixels)
        if return_tensors is None:
            return BatchFeature({"pixel_values": [pixels.numpy() for pixels in pixel_values[: len(images)]]})
        if len({pixels.shape for pixels in pixel_values}) > 1:
            raise ValueError("Images of different sizes make no batch: give size a height and width, or crop.")
        batch = torch.stack(pixel_values)[: len(images)]
        return BatchFeature({"pixel_values": batch if return_tensors == "pt" else batch.numpy()}, return_tensors)


class _NoTokenizer:
    """transformers' Trainer reads the special tokens of every processor's tokenizer; here it finds none."""

    init_kwargs: Mapping = {}  # what `ProcessorMixin` reads
    eos_token_id = bos_token_id = pad_token_id = None

    def __call__(self, *args, **kwargs):
        raise ValueError("MultiLabelProcessor reads images and no text: give images alone.")

    decode = batch_decode = __call__


class MultiLabelProcessor(ProcessorMixin):
    r"""
    A checkpoint's image and label side: `processor(images=..., return_tensors="pt")` before the model,
    [`~MultiLabelProcessor.post_process_multi_label_classification`] after it.

    Args:
        image_processor ([`MultiLabelImageProcessor`] or another image processor of transformers):
            Makes `pixel_values`.
        id2label (`dict[int, str]`, *optional*):
            Label names.
        thresholds (`list[float]`, *optional*):
            The score at and above which each label counts as present, one per label.

    `from_pretrained` takes the label names and thresholds from the folder's `config.json` if that has label names, so
    that the two files cannot disagree.
    """

    tokenizer = _NoTokenizer()

    def __init__(
        self,
        image_processor=None,
        id2label: Mapping[int, str] | None = None,
        thresholds: Sequence[float] | None = None,
    ):
        self.id2label = None if id2label is None else {int(index): str(name) for index, name in id2label.items()}
        self.thresholds = None if thresholds is None else [float(threshold) for threshold in thresholds]
        super().__init__(image_processor)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        hub_kwargs = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}  # It would warn.
        try:
            config, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        except OSError:  # the folder of an adapter has none
            config = {}
        processor_dict, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "id2label" in config:
            processor_dict |= {"id2label": config["id2label"], "thresholds": config.get("thresholds")}
        return processor_dict, kwargs

    def post_process_multi_label_classification(
        self,
        outputs,
        threshold: float | str | Sequence[float] | Mapping[str, float] | None = None,
        top_k: int | None = None,
    ) -> list[list[dict]]:
        """The labels of each image.

        Args:
            outputs: The model's output, or its logits of shape (batch, num_labels).
            threshold: None gives every label, a number those that score at least that, `"auto"` those that score at
                least their own fitted threshold; a list (or array) with a number for each label, or a dict with one for
                each name, those that score at least theirs.
            top_k: At most so many labels an image; None gives all of them.

        Returns:
            For each image, `{"label": name, "score": sigmoid of the logit}` from the highest score to the lowest.
            Labels that were not evaluated are left out: those whose logit is NaN, -inf or `NOT_EVALUATED`.

        Raises:
            ValueError: no label names, or a number of labels other than the logits'; `"auto"` without fitted
                thresholds; a threshold outside [0, 1]; a list or dict of thresholds that are not one for each label;
                `top_k` below 1.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        return post_process_multi_label_classification(logits, self.id2label, self.thresholds, threshold, top_k)


def post_process_multi_label_classification(
    logits, id2label: Mapping[int, str] | None, thresholds=None, threshold=None, top_k: int | None = None
) -> list[list[dict]]:
    """[`MultiLabelProcessor.post_process_multi_label_classification`] for label names and thresholds kept elsewhere."""
    logits = torch.as_tensor(logits).float()  # (batch, num_labels)
    if not id2label:
        raise ValueError("The processor has no label names: give id2label, or load it from a folder with config.json.")
    if logits.ndim != 2 or logits.shape[1] != len(id2label):
        raise ValueError(f"logits must be of shape (batch, {len(id2label)}), but they are {tuple(logits.shape)}.")
    names = [id2label[index] for index in range(len(id2label))]
    cuts = resolve_threshold(threshold, thresholds, len(names), names)
    top_k = resolve_top_k(top_k)
    scores = logits.sigmoid()
    chosen = logits > NOT_EVALUATED  # and no NaN
    if cuts is not None:
        chosen &= scores >= torch.tensor(cuts, device=scores.device)
    order = scores.argsort(dim=1, descending=True, stable=True)
    results = []
    for row_scores, row_chosen, row_order in zip(scores.cpu(), chosen.cpu(), order.cpu(), strict=True):
        labels = row_order[row_chosen[row_order]][:top_k]
        results.append(
            [
                {"label": names[index], "score": score}
                for index, score in zip(labels.tolist(), row_scores[labels].tolist(), strict=True)
            ]
        )
    return results


def resolve_threshold(threshold, thresholds, num_labels: int, names: Sequence[str] | None = None):
    """What scores are compared with: None (nothing), one number, or one number per label.

    Args:
        threshold: As in `post_process_multi_label_classification`.
        thresholds: The fitted ones, for `"auto"`.
        num_labels: Labels that are asked for.
        names: Their names, for a dict.

    Raises:
        ValueError: as `post_process_multi_label_classification`.
    """
    if threshold is None:
        return None
    if isinstance(threshold, str) and threshold == "auto":
        if thresholds is None:
            raise ValueError(
                'threshold="auto" needs fitted thresholds and this checkpoint has none; fit them on a validation '
                "split, or give threshold a number."
            )
        if len(thresholds) != num_labels:
            raise ValueError(f"There are {len(thresholds)} thresholds for {num_labels} labels; fit them again.")
        return list(thresholds)
    if isinstance(threshold, Mapping):
        names = list(names or ())
        missing = [name for name in names if name not in threshold]
        unknown = [name for name in threshold if name not in names]
        if missing or unknown:
            which = f"no number for {missing[0]!r}" if missing else f"a number for {unknown[0]!r}, which is no label"
            raise ValueError(f"threshold has {which}; as a dict it has a number for each label, by name.")
        threshold = [threshold[name] for name in names]
    if hasattr(threshold, "tolist"):  # NumPy's and torch's
        threshold = threshold.tolist()
    if not isinstance(threshold, (list, tuple)):
        return _threshold(threshold)
    if len(threshold) != num_labels:
        raise ValueError(
            f"threshold has {len(threshold)} numbers for {num_labels} labels; as a list it has one for each, in order."
        )
    return [_threshold(number) for number in threshold]


def _threshold(number) -> float:
    value = number.tolist() if hasattr(number, "tolist") else number
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ValueError(
            f'threshold must be None, a number in [0, 1], "auto", or a list or dict of a number for each label, but '
            f"{number!r} is none of these."
        )
    return float(value)


def resolve_top_k(top_k: int | None) -> int | None:
    """`top_k` as a plain number.

    Raises:
        ValueError: it is neither None nor a whole number from 1.
    """
    if top_k is None:
        return None
    try:
        number = 0 if isinstance(top_k, bool) else operator.index(top_k)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"top_k must be None or a whole number from 1, but it is {top_k!r}.")
    return number


# Registered here and not by the package, so that a class that only a checkpoint's code reached saves its code as well.
MultiLabelImageProcessor.register_for_auto_class("AutoImageProcessor")
MultiLabelProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MultiLabelImageProcessor", "MultiLabelProcessor", "load_image"]
