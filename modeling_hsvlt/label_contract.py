"""The label contract: `labels` are multi-hot, (batch, num_labels), 1 present, 0 absent, in between a soft label, -100
(`UNKNOWN_LABEL`) unknown."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch

UNKNOWN_LABEL = -100
# Logit of a label that was not scored: the lowest finite number of fp16, whose sigmoid is 0. (NaN would rank first.)
NOT_EVALUATED = -65504.0


def validate_labels(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """Checks `labels` against the label contract; reads values, so it synchronises the device.

    Args:
        labels (`torch.Tensor` of shape `(batch, num_labels)`): any dtype; an array or nested lists as well.
        num_labels (`int`): labels of the model.

    Returns:
        `torch.Tensor`: the labels, fp32.

    Raises:
        ValueError: a shape other than `(batch, num_labels)`, or a value that is neither in [0, 1] nor -100; the
            message names the first such row and label index.
    """
    labels = _as_tensor(labels)
    if labels.ndim != 2 or labels.shape[1] != num_labels:
        raise ValueError(
            f"labels must be multi-hot with shape (batch, {num_labels}), but their shape is {tuple(labels.shape)}; "
            "give one column per label of the model, 1 present, 0 absent, -100 unknown."
        )
    # Written so that NaN fails as well: it is not within [0, 1].
    valid = ((labels >= 0) & (labels <= 1)) | (labels == UNKNOWN_LABEL)
    if not bool(valid.all()):
        row, column = (~valid).nonzero()[0].tolist()
        raise ValueError(
            f"labels[{row}, {column}] is {labels[row, column].item()}, which is neither in [0, 1] nor -100; "
            "use 1 for present, 0 for absent and -100 for unknown."
        )
    return labels


def _as_tensor(labels) -> torch.Tensor:
    """Labels as fp32, in which -100 is -100 whatever they were: as uint8 it would equal 156."""
    if isinstance(labels, torch.Tensor):
        return labels.float()
    with suppress(TypeError, ValueError):  # lists of different lengths
        array = np.asarray(labels)
        if array.dtype.kind in "buif":
            return torch.from_numpy(array.astype(np.float32))
    raise ValueError(
        f"labels must be multi-hot with shape (batch, num_labels), tensor, array or lists of as many numbers each, "
        f"but they are none of these ({type(labels).__name__}); lists of names or of label numbers have to be encoded."
    )


def labels_like(logits: torch.Tensor, labels) -> torch.Tensor:
    """Labels as fp32 beside their logits.

    Raises:
        ValueError: another shape, which would be broadcast.
    """
    labels = _as_tensor(labels).to(logits.device)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, but logits {tuple(logits.shape)}: give one for each logit."
        )
    return labels
