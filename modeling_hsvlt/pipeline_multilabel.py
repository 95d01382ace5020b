"""The `multi-label-image-classification` pipeline, which every checkpoint carries."""

import inspect
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from types import GeneratorType

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Pipeline, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

from .heat_maps_multilabel import image_box, resize_to_image, scored_heat_maps
from .label_context import LabelContext, count_context_tokens
from .label_prompts import DEFAULT_TEMPLATE, encode_labels, load_text_encoder
from .load_image import describe, is_many, load_image, undecoded
from .load_pretrained import load_pretrained
from .load_video import MAX_FRAMES, check_sampling, is_video, sample_video
from .processing_multilabel import (
    MultiLabelProcessor,
    post_process_multi_label_classification,
    resolve_threshold,
    resolve_top_k,
)
from .video_labels import check_pooling, label_video

logger = logging.get_logger(__name__)

LOAD_PARAMETERS = ("max_pixels", "max_bytes", "size_hint", "timeout", "allow_private_addresses")  # of load_image
SAMPLING = {"frames_per_second": 1.0, "max_frames": MAX_FRAMES}  # of a video, and their defaults
POOLING = {"pooling": "max", "pooling_k": 5}
FRAMES_AT_ONCE = 8  # of a video, where no batch_size is given


class MultiLabelImageClassificationPipeline(Pipeline):
    r"""
    Labels of images, by any multi-label classifier of transformers: `pipeline(model=..., trust_remote_code=True)`.

    Beside the stock `image-classification` pipeline it has thresholds, gives every label unless told otherwise, and
    reads images with [`load_image`]. Its parameters may be given to `pipeline(...)`, to a call, or to both.

    Args:
        threshold (`float`, `"auto"`, `list[float]` or `dict[str, float]`, *optional*):
            None gives every label, a number those that score at least that, `"auto"` those that score at least their
            own threshold, fitted on validation and stored in the checkpoint. A list has a number for each label (of
            `labels`, where that is given), a dict one by name.
        top_k (`int`, *optional*):
            At most so many labels an image; None gives all of them.
        labels (`list[str]`, *optional*):
            Only these labels, by name. Where that is exact (HSVLT), no others are computed.
        explain (`bool`, *optional*):
            Whether each label gets a `"heat_map"` as well: which pixels spoke for it, see [`label_heat_maps`]. HSVLT,
            MlTr and HP-DVAL have such maps; other models are refused.
        max_pixels, max_bytes, size_hint, timeout, allow_private_addresses (*optional*):
            As in [`load_image`]; of them videos know `max_pixels`, of a frame.
        frames_per_second (`float`, *optional*, defaults to 1.0):
            How many frames of a video are looked at; needs PyAV, `pip install av`. See [`sample_video`].
        max_frames (`int`, *optional*, defaults to 600):
            At most so many of a video, evenly spaced beyond.
        pooling (`str`, *optional*, defaults to `"max"`):
            Of a label's scores in the frames the `"max"`, the `"mean"`, or the mean of the `pooling_k` highest,
            `"top_k_mean"`. Thresholds are compared with that.
        pooling_k (`int`, *optional*, defaults to 5):
            See there.
        intervals (`bool`, *optional*):
            Whether each label of a video gets `"intervals"` as well: a list of (start, end) in seconds within which its
            frames reach the threshold; without one, the checkpoint's own or 0.5.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> tagger = pipeline(model="path/or/repo", trust_remote_code=True, threshold="auto")
    >>> tagger("photo.jpg")  # [{"label": "dog", "score": 0.98}, ...]
    >>> tagger(["a.jpg", "b.jpg"], batch_size=2)  # a list of such lists
    >>> tagger("photo.jpg", labels=["dog", "cat"], explain=True)[0]["heat_map"]  # float32 array (height, width)
    >>> tagger("clip.mp4", intervals=True)  # [{"label": "dog", "score": 0.98, "intervals": [(3.0, 7.0)]}, ...]
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokenizer = None  # given a processor alone, transformers takes its stand-in for one
        if self.model.config.problem_type not in (None, "multi_label_classification"):
            raise ValueError(
                f"This model is for {self.model.config.problem_type}, whose scores are no sigmoids; use "
                'pipeline("image-classification", ...) for it.'
            )

    def __call__(self, inputs, image_column: str = "image", **kwargs):
        """Labels images and videos.

        Args:
            inputs: Whatever [`load_image`] reads, or a video (a path, bytes or an open file), a list or batch of it, a
                generator or torch `Dataset` of it, or a `datasets.Dataset` or a column of one, whose images are decoded
                here and not by datasets.
            image_column: The image column of a `datasets.Dataset`.
            kwargs: The pipeline's parameters, `batch_size`, and `num_workers` for a dataset. Of a video, `batch_size`
                is how many frames are computed at once.

        Returns:
            For one image or video, `{"label": ..., "score": ...}` from the highest score to the lowest; with
            `explain=True` also `"heat_map"`, a float32 array of the decoded image's height and width from 0 to 1, where
            1 is the place that spoke most for this label. For a list a list of these; for a generator, dataset or
            column an iterator over them, which runs as it is asked.

        Raises:
            ValueError: an image or video cannot be read (the message names it), or a parameter is wrong.
        """
        batch_size = kwargs.get("batch_size") or self._batch_size
        inputs = _stream(inputs, image_column)
        if is_many(inputs) and not isinstance(inputs, (Dataset, GeneratorType)):
            inputs = list(inputs)
        if isinstance(inputs, (Dataset, list)) and hasattr(inputs, "__len__") and not len(inputs):
            return [] if isinstance(inputs, list) else iter(())  # transformers would look at the first
        batched = (batch_size or 1) > 1
        if isinstance(inputs, list) and batched:  # a video makes no batch with others
            videos = {place for place, source in enumerate(inputs) if is_video(source)}
            images = [source for place, source in enumerate(inputs) if place not in videos]
            if videos:
                found = iter(self(images, image_column, **kwargs))
                return [
                    self(source, image_column, **kwargs) if place in videos else next(found)
                    for place, source in enumerate(inputs)
                ]
        batched = batched and isinstance(inputs, (Dataset, GeneratorType))
        return super().__call__(inputs, batched=batched, frames_at_once=batch_size or FRAMES_AT_ONCE, **kwargs)

    def _sanitize_parameters(self, **parameters):
        # Only what was given: a call's None must override a number given before.
        preprocess = {key: parameters.pop(key) for key in (*LOAD_PARAMETERS, *SAMPLING, "batched") if key in parameters}
        names = ("threshold", "top_k", *POOLING, "intervals")
        postprocess = {key: parameters.pop(key) for key in names if key in parameters}
        forward = {key: parameters.pop(key) for key in ("frames_at_once",) if key in parameters}
        if "labels" in parameters:
            forward["class_ids"] = postprocess["class_ids"] = self._class_ids(parameters.pop("labels"))
        if "explain" in parameters:
            preprocess["explain"] = forward["explain"] = bool(parameters.pop("explain"))
        if parameters:
            raise ValueError(
                f"Unknown parameter {', '.join(parameters)}; there are threshold, top_k, labels, explain, "
                f"batch_size, num_workers, image_column, {', '.join((*SAMPLING, *POOLING))}, intervals, "
                f"{', '.join(LOAD_PARAMETERS[:-1])} and {LOAD_PARAMETERS[-1]}."
            )
        # Told before the first image and not after the last.
        given = {**getattr(self, "_postprocess_params", {}), **postprocess}
        self._cuts(given.get("threshold"), given.get("class_ids"))
        resolve_top_k(given.get("top_k"))
        check_pooling(**{name: given.get(name, usual) for name, usual in POOLING.items()})
        loading = {**getattr(self, "_preprocess_params", {}), **preprocess}
        check_sampling(**{name: loading.get(name, usual) for name, usual in SAMPLING.items()})
        return preprocess, forward, postprocess

    def _class_ids(self, names: Sequence[str] | None) -> list[int] | None:
        if names is None:
            return None
        if isinstance(names, str) or not isinstance(names, Iterable) or not (names := list(map(str, names))):
            raise ValueError(f"labels must be a list of label names, but it is {names!r}.")
        index = {name: label for label, name in self.model.config.id2label.items()}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise ValueError(
                f"The model has no label {', '.join(map(repr, unknown[:5]))}; model.config.id2label lists those it has."
            )
        if len(set(names)) < len(names):
            raise ValueError("labels names one label twice; leave one out.")
        return [index[name] for name in names]

    def _cuts(self, threshold, class_ids: list[int] | None):
        """The thresholds of these labels, in their order."""
        config = self.model.config
        class_ids = list(range(config.num_labels)) if class_ids is None else class_ids
        if isinstance(threshold, str):
            cuts = resolve_threshold(threshold, getattr(config, "thresholds", None), config.num_labels)
            return [cuts[label] for label in class_ids]
        names = [config.id2label[label] for label in class_ids]
        if isinstance(threshold, Mapping):  # It may name labels that are not asked for.
            others = set(config.id2label.values()).difference(names)
            threshold = {name: number for name, number in threshold.items() if name not in others}
        return resolve_threshold(threshold, None, len(names), names)

    def preprocess(self, image, explain: bool = False, batched: bool = False, **load_kwargs):
        if is_video(image):
            if batched:
                raise ValueError(f"{describe(image)} is a video in a stream; give batch_size=1, or a list.")
            if explain:
                raise ValueError(f"{describe(image)} is a video, and heat maps are of images; leave out explain.")
            given = (*SAMPLING, "max_pixels")
            return {"video": image, "options": {key: load_kwargs[key] for key in given if key in load_kwargs}}
        image = load_image(image, **{key: value for key, value in load_kwargs.items() if key not in SAMPLING})
        inputs = self.image_processor(images=image, return_tensors="pt")
        inputs = inputs.to(self.dtype)  # fp16 and bf16 models take no fp32 pixels.
        if explain:
            box = image_box(self.image_processor, *image.size)
            inputs["image"] = torch.tensor([[*image.size, *box]], dtype=torch.float32)
        return inputs

    def _forward(self, inputs, class_ids=None, explain: bool = False, frames_at_once: int = FRAMES_AT_ONCE):
        chosen = None if class_ids is None else torch.tensor(class_ids, device=self.device)
        if "video" in inputs:
            return self._forward_frames(sample_video(inputs["video"], **inputs["options"]), chosen, frames_at_once)
        if explain:
            logits, maps, scored = scored_heat_maps(self.model, inputs["pixel_values"], chosen)
            return {"logits": logits, "maps": maps, "maps_of": scored, "image": inputs["image"]}
        return {"logits": self._logits(inputs, chosen)}

    def _forward_frames(self, frames, chosen, frames_at_once: int):
        """A batch of frames after the other: of the video itself nothing stays but logits and times."""
        logits, times = [], []
        while batch := list(itertools.islice(frames, frames_at_once)):
            times += [(frame.start, frame.end) for frame in batch]
            inputs = self.image_processor(images=[frame.image for frame in batch], return_tensors="pt").to(self.dtype)
            logits.append(self._logits(self._ensure_tensor_on_device(inputs, device=self.device), chosen).cpu())
        return {"logits": torch.cat(logits), "times": times}

    def _logits(self, inputs, chosen: torch.Tensor | None) -> torch.Tensor:
        # The logits alone: feature maps would be copied to the CPU for nothing.
        if chosen is not None and "class_ids" in inspect.signature(self.model.forward).parameters:
            logits = self.model(**inputs, class_ids=chosen).logits
        else:
            logits = self.model(**inputs).logits
            logits = logits if chosen is None else logits[:, chosen]
        if logits.isnan().any():
            raise ValueError("The scores are no numbers: the model's weights are damaged, or too large for its dtype.")
        return logits

    def postprocess(self, outputs, threshold=None, top_k=None, class_ids=None, intervals: bool = False, **pooling):
        config = self.model.config
        cuts = self._cuts(threshold, class_ids)
        labels = list(range(config.num_labels)) if class_ids is None else class_ids
        names = {place: config.id2label[label] for place, label in enumerate(labels)}
        if "times" in outputs:
            seen_from = cuts
            if cuts is None:
                seen_from = 0.5 if getattr(config, "thresholds", None) is None else self._cuts("auto", class_ids)
            seen_from = seen_from if intervals else None
            times, top_k = outputs["times"], resolve_top_k(top_k)
            return label_video(outputs["logits"], times, names, cuts, top_k, seen_from=seen_from, **pooling)
        results = post_process_multi_label_classification(outputs["logits"], names, None, cuts, top_k)[0]
        if "maps" in outputs:
            place = {config.id2label[label]: index for index, label in enumerate(outputs["maps_of"][0].tolist())}
            maps = outputs["maps"][0, [place[result["label"]] for result in results]]
            width, height, *box = outputs["image"][0].tolist()
            maps = resize_to_image(maps, int(width), int(height), box).numpy() if len(results) else []
            for result, heat_map in zip(results, maps, strict=True):
                result["heat_map"] = heat_map
        return results

    def set_labels(
        self,
        label_names: Sequence[str],
        text_encoder: str | os.PathLike | tuple[PreTrainedModel, PreTrainedTokenizerBase],
        *,
        revision: str | None = None,
        label_text: Mapping[str, str] | None = None,
        label_context: str | os.PathLike | None = None,
    ) -> None:
        """Exchanges the label set by names, without training.

        What to expect: a name that the model was trained on keeps its score. An HSVLT with `residual_attention`
        and `classifier="shared"` gives another name the weights of its backbone's classes and of trained labels
        with similar names. Six labels of PASCAL VOC that were never trained on had 0.538 mAP so (three draws:
        0.632, 0.641, 0.340), where chance has 0.079 and training on them 0.763; all twenty under other names
        had 0.692 and 0.626 in place of 0.756. The label stream alone had 0.108 for the six, nearly chance
        (`benchmarks/accuracy/unseen_labels.py`, 2026-11-30). A name far from all classes ("person") is a guess.
        Scores of new labels are not calibrated, and the fitted thresholds are dropped, for they belong to the
        old names. Measure on labelled images before relying on it.

        Args:
            label_names: The new labels, in the order of the model's outputs.
            text_encoder: The one that the checkpoint was trained with (`config.label_text_encoder`): a folder, a Hub
                id, or model and tokenizer. It is not taken from the configuration: a downloaded file must not choose
                what is downloaded next. For HP-DVAL, which carries its text tower, the CLIP whose tokenizer it uses.
            revision: Commit of a Hub id, which it must be pinned to.
            label_text: What to write in place of a name, for example `{"tvmonitor": "tv monitor"}`.
            label_context: For a checkpoint that learned a context for its names, the folder of that adapter,
                `label_context` in the checkpoint's own folder. It needs peft.

        Raises:
            ValueError: a model whose classifier has weights for each label, one without label text, another text
                encoder's width, names that cannot be encoded, or a learned context without its adapter.
        """
        model, config, names = self.model, self.model.config, list(label_names)
        if config.model_type == "hp_dval":
            if label_context is not None:
                raise ValueError("HP-DVAL has its contexts in its own text tower; leave out label_context.")
            if isinstance(text_encoder, tuple):
                tokenizer = text_encoder[1]
            else:
                if revision is None and not os.path.isdir(text_encoder):
                    raise ValueError(f"{text_encoder!r} is no folder, and as a Hub id it needs revision, a commit.")
                tokenizer = load_pretrained(AutoTokenizer, text_encoder, revision=revision)
            model.set_labels(names, tokenizer, label_text=label_text)
        else:
            self._set_label_embeddings(names, text_encoder, revision, label_text, label_context)
        logger.warning(
            "The label set was exchanged by name: labels that the model was not trained on get uncalibrated scores. "
            "Measure on labelled images before relying on them."
        )

    def _set_label_embeddings(self, names, text_encoder, revision, label_text, label_context) -> None:
        model, config = self.model, self.model.config
        if getattr(config, "classifier", None) != "shared":
            raise ValueError(
                f"This {type(model).__name__} has classifier weights for each of its {config.num_labels} labels, so it "
                "cannot score others; choose among its own with labels=[...], or train HSVLT with classifier='shared'."
            )
        if config.label_text_encoder is None:
            raise ValueError(
                "The label embeddings of this checkpoint come from no known text encoder, so names say nothing to it; "
                "train with label_encoder."
            )
        if model.label_context is not None:
            raise ValueError(
                "This model is learning its label context; save it, and exchange the labels of what is saved."
            )
        provenance = {
            "encoder": config.label_text_encoder,
            "pooling": config.label_pooling,
            "template": config.label_template,
        }
        template = config.label_template or DEFAULT_TEMPLATE
        learned = count_context_tokens(template)
        if learned and label_context is None:
            raise ValueError(
                "This checkpoint learned a context for its label names, of which its text encoder knows nothing; give "
                "label_context, the folder of that name in the checkpoint's own."
            )
        if label_context is not None and not learned:
            raise ValueError("This checkpoint learned no context for its label names; leave out label_context.")
        if learned and not os.path.isdir(label_context):
            raise ValueError(f"label_context {str(label_context)!r} is no folder; check the path.")
        encoder, tokenizer = (
            text_encoder if isinstance(text_encoder, tuple) else load_text_encoder(text_encoder, revision)
        )
        if learned:
            after = template.partition("{}")[2]
            with torch.no_grad():
                embeddings = LabelContext(
                    encoder,
                    tokenizer,
                    names,
                    num_context_tokens=learned,
                    template="{}" + after,
                    label_text=label_text,
                    adapter=label_context,
                )()
        else:
            embeddings = encode_labels(
                names,
                encoder,
                tokenizer,
                pooling=config.label_pooling or "mean",
                template=template,
                label_text=label_text,
            )
        if embeddings.shape[1] != config.label_embedding_dim:
            raise ValueError(
                f"The text encoder gives {embeddings.shape[1]} numbers a label, but the model reads "
                f"{config.label_embedding_dim}; use the one it was trained with, {config.label_text_encoder}."
            )
        model.exchange_labels(names, embeddings, **provenance)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the model, its code and a [`MultiLabelProcessor`], so that every `Auto` class loads from the folder."""
        super().save_pretrained(save_directory, **kwargs)
        config = self.model.config
        processor = MultiLabelProcessor(self.image_processor, config.id2label, getattr(config, "thresholds", None))
        processor.save_pretrained(save_directory)


def _stream(inputs, column: str):
    """Iterators and the datasets of `datasets` as what `Pipeline` takes for a stream; other inputs as they are."""
    if hasattr(inputs, "column_name") and hasattr(inputs, "source"):  # a Column of such a dataset
        inputs, column = inputs.source, inputs.column_name
    elif hasattr(inputs, "cast_column"):
        if isinstance(inputs, Mapping):
            raise ValueError(f"This dataset has the splits {', '.join(inputs)}; give one of them.")
        if column not in (inputs.column_names or [column]):
            raise ValueError(
                f"The dataset has no column {column!r}, only {', '.join(inputs.column_names)}; name the image column "
                "with image_column."
            )
    elif hasattr(inputs, "__next__") and not hasattr(inputs, "read"):
        return (image for image in inputs)
    else:
        return inputs
    rows = undecoded(inputs, column)
    return KeyDataset(rows, column) if hasattr(rows, "__len__") else (row[column] for row in rows)
