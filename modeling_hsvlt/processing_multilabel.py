"""Images to `pixel_values`, and logits to labels.

A checkpoint carries this file and those that it imports: transformers, torch, NumPy and Pillow are enough for them.
"""

import operator
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs, ProcessorMixin

from .label_contract import NOT_EVALUATED
from .load_image import channels_last, describe, flat_images, float_planes, image_of_array, load_image

RESIZE_MODES = ("squash", "pad")
MAX_SIDE = 8192  # px that a processor may be set to; an image of that is 805 MB as the model reads it
IMAGE_SETTINGS = ("image_mean", "image_std", "rescale_factor", "size", "crop_size")


def check_image_settings(settings: Mapping, source: str = "The image processor") -> None:
    """
    Args:
        settings: Of an image processor; what is None or not there is not looked at.
        source: Where they come from, for the message.

    Raises:
        ValueError: pixels would become numbers that are not finite, or more of them than any model reads.
    """
    for name in ("image_mean", "image_std", "rescale_factor"):
        value, above = settings.get(name), "" if name == "image_mean" else " above 0"
        if value is None:
            continue
        try:
            numbers = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            numbers = np.full(1, np.nan)
        # Within what float32 pixels can be divided by: a deviation of 1e-300 gives infinite ones as well.
        tame = (np.abs(numbers) <= 1e6) & (numbers >= (1e-9 if above else -1e6))
        if numbers.ndim > (name != "rescale_factor") or numbers.size not in (1, 3) or not tame.all():
            raise ValueError(f"{source} has {name} {value!r:.100}: give one finite number or three{above}.")
    for name in ("size", "crop_size"):
        size = dict(settings.get(name) or {})
        sides = [side for side in size.values() if side is not None]
        if any(type(side) is not int or not 0 < side <= MAX_SIDE for side in sides):
            raise ValueError(f"{source} has {name} {size}: sides are whole numbers from 1 to {MAX_SIDE:,} px.")


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
            for image in flat_images(images)
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
            return float_planes(channels_last(image, describe(image), input_data_format), describe(image))
        return image_of_array(image, describe(image), input_data_format)

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
        if shape[0] * shape[1] > MAX_SIDE**2:
            raise ValueError(f"An image of {image.width} x {image.height} px is too long for this size: leave it out.")
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
        check_image_settings(kwargs)
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
        if self.thresholds is not None and not np.isfinite(self.thresholds).all():
            raise ValueError(f"thresholds {self.thresholds[:10]} hold one that is not finite; fit them again.")
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
    return best_labels(logits.sigmoid(), logits > NOT_EVALUATED, id2label, cuts, resolve_top_k(top_k))  # and no NaN


def best_labels(scores, chosen, id2label: Mapping[int, str], cuts, top_k: int | None) -> list[list[dict]]:
    """Of scores of shape (batch, labels) those chosen and not below their cut, by name, from the highest on."""
    if cuts is not None:
        chosen = chosen & (scores >= torch.tensor(cuts, device=scores.device))
    order = scores.argsort(dim=1, descending=True, stable=True)
    results = []
    for row_scores, row_chosen, row_order in zip(scores.cpu(), chosen.cpu(), order.cpu(), strict=True):
        labels = row_order[row_chosen[row_order]][:top_k]
        results.append(
            [
                {"label": id2label[index], "score": score}
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
