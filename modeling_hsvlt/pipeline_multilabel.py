"""The `multi-label-image-classification` pipeline, which every checkpoint carries."""

import inspect
import os
from collections.abc import Mapping, Sequence

import torch
from transformers import AutoTokenizer, Pipeline, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pipelines.pt_utils import KeyDataset
from transformers.utils import logging

from .heat_maps_multilabel import label_heat_maps, picture_box, resize_to_picture
from .label_prompts import DEFAULT_TEMPLATE, encode_labels, load_text_encoder
from .processing_multilabel import (
    MultiLabelProcessor,
    load_image,
    post_process_multi_label_classification,
    resolve_threshold,
)

logger = logging.get_logger(__name__)

LOAD_PARAMETERS = ("max_pixels", "max_bytes", "size_hint", "timeout", "allow_private_addresses")  # of load_image


class MultiLabelImageClassificationPipeline(Pipeline):
    r"""
    Labels of pictures, by any multi-label classifier of transformers: `pipeline(model=..., trust_remote_code=True)`.

    Beside the stock `image-classification` pipeline it has thresholds, gives every label unless told otherwise, and
    reads pictures with [`load_image`]. Its parameters may be given to `pipeline(...)`, to a call, or to both.

    Args:
        threshold (`float` or `"auto"`, *optional*):
            None gives every label, a number those that score at least that, `"auto"` those that score at least their
            own threshold, fitted on validation and stored in the checkpoint.
        top_k (`int`, *optional*):
            At most so many labels a picture; None gives all of them.
        labels (`list[str]`, *optional*):
            Only these labels, by name. Where that is exact (HSVLT), no others are computed.
        explain (`bool`, *optional*):
            Whether each label gets a `"heat_map"` as well: which pixels spoke for it, see [`label_heat_maps`]. HSVLT,
            MlTr and HP-DVAL have such maps; other models are refused.
        max_pixels, max_bytes, size_hint, timeout, allow_private_addresses (*optional*):
            As in [`load_image`].

    Example:

    ```python
    >>> from transformers import pipeline

    >>> tagger = pipeline(model="path/or/repo", trust_remote_code=True, threshold="auto")
    >>> tagger("photo.jpg")  # [{"label": "dog", "score": 0.98}, ...]
    >>> tagger(["a.jpg", "b.jpg"], batch_size=2)  # a list of such lists
    >>> tagger("photo.jpg", labels=["dog", "cat"], explain=True)[0]["heat_map"]  # float32 array (height, width)
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
        """Labels pictures.

        Args:
            inputs: Whatever [`load_image`] reads, a list of it, a generator or torch `Dataset` of it, or a
                `datasets.Dataset`, whose pictures are decoded here and not by datasets.
            image_column: The picture column of a `datasets.Dataset`.
            kwargs: The pipeline's parameters, `batch_size`, and `num_workers` for a dataset.

        Returns:
            For one picture, `{"label": ..., "score": ...}` from the highest score to the lowest; with `explain=True`
            also `"heat_map"`, a float32 array of the decoded picture's height and width from 0 to 1, where 1 is the
            place that spoke most for this label. For a list a list of these; for a generator or dataset an iterator
            over them, which runs as it is asked.

        Raises:
            ValueError: a picture cannot be read (the message names it), or a parameter is wrong.
        """
        if isinstance(inputs, (list, tuple)):
            return super().__call__(list(inputs), **kwargs) if len(inputs) else []
        if hasattr(inputs, "cast_column"):  # A datasets.Dataset or IterableDataset
            if image_column not in (inputs.column_names or [image_column]):
                raise ValueError(
                    f"The dataset has no column {image_column!r}, only {', '.join(inputs.column_names)}; name the "
                    "picture column with image_column."
                )
            feature = (inputs.features or {}).get(image_column)
            if hasattr(feature, "decode"):
                inputs = inputs.cast_column(image_column, type(feature)(decode=False))
            inputs = KeyDataset(inputs, image_column) if hasattr(inputs, "__len__") else _column(inputs, image_column)
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **parameters):
        # Only what was given: a call's None must override a number given before.
        preprocess = {key: parameters.pop(key) for key in LOAD_PARAMETERS if key in parameters}
        postprocess = {key: parameters.pop(key) for key in ("threshold", "top_k") if key in parameters}
        forward = {}
        if "labels" in parameters:
            forward["label_ids"] = postprocess["label_ids"] = self._label_ids(parameters.pop("labels"))
        if "explain" in parameters:
            preprocess["explain"] = forward["explain"] = bool(parameters.pop("explain"))
        if parameters:
            raise ValueError(
                f"Unknown parameter {', '.join(parameters)}; there are threshold, top_k, labels, explain, "
                f"batch_size, num_workers, image_column, {', '.join(LOAD_PARAMETERS[:-1])} and {LOAD_PARAMETERS[-1]}."
            )
        # Told before the first picture and not after the last.
        config = self.model.config
        resolve_threshold(postprocess.get("threshold"), getattr(config, "thresholds", None), config.num_labels)
        top_k = postprocess.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be None or a whole number from 1, but it is {top_k!r}.")
        return preprocess, forward, postprocess

    def _label_ids(self, names: Sequence[str] | None) -> list[int] | None:
        if names is None:
            return None
        if isinstance(names, str) or not len(names):
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

    def preprocess(self, image, explain: bool = False, **load_kwargs):
        image = load_image(image, **load_kwargs)
        inputs = self.image_processor(images=image, return_tensors="pt")
        inputs = inputs.to(self.dtype)  # fp16 and bf16 models take no fp32 pixels.
        if explain:
            box = picture_box(self.image_processor, *image.size)
            inputs["picture"] = torch.tensor([[*image.size, *box]], dtype=torch.float32)
        return inputs

    def _forward(self, inputs, label_ids: list[int] | None = None, explain: bool = False):
        chosen = None if label_ids is None else torch.tensor(label_ids, device=self.device)
        if explain:
            logits, maps = label_heat_maps(self.model, inputs["pixel_values"], chosen)
            return {"logits": logits, "maps": maps, "picture": inputs["picture"]}
        # The logits alone: feature maps would be copied to the CPU for nothing.
        if chosen is not None and "class_ids" in inspect.signature(self.model.forward).parameters:
            return {"logits": self.model(**inputs, class_ids=chosen).logits}
        logits = self.model(**inputs).logits
        return {"logits": logits if chosen is None else logits[:, chosen]}

    def postprocess(self, outputs, threshold=None, top_k=None, label_ids: list[int] | None = None):
        config = self.model.config
        label_ids = list(range(config.num_labels)) if label_ids is None else label_ids
        thresholds = getattr(config, "thresholds", None)
        thresholds = None if thresholds is None else [thresholds[label] for label in label_ids]
        names = {place: config.id2label[label] for place, label in enumerate(label_ids)}
        results = post_process_multi_label_classification(outputs["logits"], names, thresholds, threshold, top_k)[0]
        if "maps" in outputs:
            place = {name: index for index, name in names.items()}
            maps = outputs["maps"][0, [place[result["label"]] for result in results]]
            width, height, *box = outputs["picture"][0].tolist()
            maps = resize_to_picture(maps, int(width), int(height), box).numpy() if len(results) else []
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
    ) -> None:
        """Exchanges the label set by names, without training.

        What to expect: the model scores a name it was not trained on by how its text embedding lies among those it was
        trained on. That helps near them (another word for a known thing) and is a guess far from them; scores of new
        labels are not calibrated, and the fitted thresholds are dropped, for they belong to the old labels. Measure on
        labelled pictures before relying on it.

        Args:
            label_names: The new labels, in the order of the model's outputs.
            text_encoder: The one that the checkpoint was trained with (`config.label_text_encoder`): a folder, a Hub
                id, or model and tokenizer. It is not taken from the configuration: a downloaded file must not choose
                what is downloaded next. For HP-DVAL, which carries its text tower, the CLIP whose tokenizer it uses.
            revision: Commit of a Hub id, which it must be pinned to.
            label_text: What to write in place of a name, for example `{"tvmonitor": "tv monitor"}`.

        Raises:
            ValueError: a model whose classifier has weights for each label, one without label text, another text
                encoder's width, or names that cannot be encoded.
        """
        model, config, names = self.model, self.model.config, list(label_names)
        if config.model_type == "hp_dval":
            tokenizer = text_encoder[1] if isinstance(text_encoder, tuple) else None
            if tokenizer is None:
                if revision is None and not os.path.isdir(text_encoder):
                    raise ValueError(f"{text_encoder!r} is no folder, and as a Hub id it needs revision, a commit.")
                tokenizer = AutoTokenizer.from_pretrained(text_encoder, revision=revision)
            model.set_labels(names, tokenizer, label_text=label_text)
            config.thresholds = config.threshold_info = config.calibration_info = None
        else:
            self._set_label_embeddings(names, text_encoder, revision, label_text)
        logger.warning(
            "The label set was exchanged by name: labels that the model was not trained on get uncalibrated scores, "
            "and the thresholds were dropped. Measure on labelled pictures before relying on them."
        )

    def _set_label_embeddings(self, names, text_encoder, revision, label_text) -> None:
        model, config = self.model, self.model.config
        if getattr(config, "classifier", None) != "shared":
            raise ValueError(
                f"This {type(model).__name__} has classifier weights for each of its {config.num_labels} labels, so it "
                "cannot score others; choose among its own with labels=[...], or train HSVLT with classifier='shared'."
            )
        if config.candidate_labels is not None:
            raise ValueError("candidate_labels proposes only labels that the model was trained on; set it to None.")
        if config.label_text_encoder is None:
            raise ValueError(
                "The label embeddings of this checkpoint come from no known text encoder, so names say nothing to it; "
                "train with label_encoder."
            )
        encoder, tokenizer = (
            text_encoder if isinstance(text_encoder, tuple) else load_text_encoder(text_encoder, revision)
        )
        provenance = {
            "encoder": config.label_text_encoder,
            "reading": config.label_reading,
            "template": config.label_template,
        }
        embeddings = encode_labels(
            names,
            encoder,
            tokenizer,
            reading=config.label_reading or "mean",
            template=config.label_template or DEFAULT_TEMPLATE,
            label_text=label_text,
        )
        if embeddings.shape[1] != config.label_embedding_dim:
            raise ValueError(
                f"The text encoder gives {embeddings.shape[1]} numbers a label, but the model reads "
                f"{config.label_embedding_dim}; use the one it was trained with, {config.label_text_encoder}."
            )
        config.set_label_names(names)
        model.set_label_embeddings(embeddings, **provenance)

    def save_pretrained(self, save_directory, **kwargs):
        """Saves the model, its code and a [`MultiLabelProcessor`], so that every `Auto` class loads from the folder."""
        super().save_pretrained(save_directory, **kwargs)
        config = self.model.config
        processor = MultiLabelProcessor(self.image_processor, config.id2label, getattr(config, "thresholds", None))
        processor.save_pretrained(save_directory)


def _column(rows, name: str):
    for row in rows:
        yield row[name]


__all__ = ["MultiLabelImageClassificationPipeline"]
