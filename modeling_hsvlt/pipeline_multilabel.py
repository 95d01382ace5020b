"""The `multi-label-image-classification` pipeline, which every checkpoint carries."""

from transformers import Pipeline
from transformers.pipelines.pt_utils import KeyDataset

from .processing_multilabel import (
    MultiLabelProcessor,
    load_image,
    post_process_multi_label_classification,
    resolve_threshold,
)


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
        max_pixels, size_hint, timeout (*optional*):
            As in [`load_image`].

    Example:

    ```python
    >>> from transformers import pipeline

    >>> tagger = pipeline(model="path/or/repo", trust_remote_code=True, threshold="auto")
    >>> tagger("photo.jpg")  # [{"label": "dog", "score": 0.98}, ...]
    >>> tagger(["a.jpg", "b.jpg"], batch_size=2)  # a list of such lists
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
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
            For one picture, `{"label": ..., "score": ...}` from the highest score to the lowest. For a list a list of
            these; for a generator or dataset an iterator over them, which runs as it is asked.

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
        preprocess = {key: parameters.pop(key) for key in ("max_pixels", "size_hint", "timeout") if key in parameters}
        postprocess = {key: parameters.pop(key) for key in ("threshold", "top_k") if key in parameters}
        if parameters:
            raise ValueError(
                f"Unknown parameter {', '.join(parameters)}; there are threshold, top_k, batch_size, num_workers, "
                "image_column, max_pixels, size_hint and timeout."
            )
        # Told before the first picture and not after the last.
        config = self.model.config
        resolve_threshold(postprocess.get("threshold"), getattr(config, "thresholds", None), config.num_labels)
        top_k = postprocess.get("top_k")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k must be None or a whole number from 1, but it is {top_k!r}.")
        return preprocess, {}, postprocess

    def preprocess(self, image, **load_kwargs):
        inputs = self.image_processor(images=load_image(image, **load_kwargs), return_tensors="pt")
        return inputs.to(self.dtype)  # fp16 and bf16 models take no fp32 pixels.

    def _forward(self, inputs):
        # The logits alone: feature maps would be copied to the CPU for nothing.
        return {"logits": self.model(**inputs).logits}

    def postprocess(self, outputs, threshold=None, top_k=None):
        config = self.model.config
        thresholds = getattr(config, "thresholds", None)
        return post_process_multi_label_classification(
            outputs["logits"], config.id2label, thresholds, threshold, top_k
        )[0]

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
