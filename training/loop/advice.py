"""What is allowed and yet mostly a mistake, or too little, said before the first step."""

import numpy as np

from ..data.dataset import MultiLabelDataset
from ..say import counted

FEW_TO_TRAIN, FEW_TO_VALIDATE = 100, 50


def advice(data: dict[str, MultiLabelDataset], label_names: list[str], *, pretrained: bool) -> list[str]:
    """Sentences about the labels and the number of images; nothing about what `load` has warned of.

    Args:
        data: By split; `train` and `validation` among them.
        pretrained: Whether the run starts from weights that have seen images.
    """
    said = []
    if len(label_names) == 1:
        said.append(
            f"There is one label, {label_names[0]!r}: scores say whether an image shows it, and need images without it."
        )
    train, validation = data["train"].sparse_labels, data["validation"].sparse_labels
    if train is not None:
        everywhere = [label_names[label] for label in np.flatnonzero(train.positives() == len(train))]
        said += _about("that every image of train shows, so that nothing can be learned of them", everywhere)
        if len(train) < FEW_TO_TRAIN:
            hint = "" if pretrained else ", all the more from random weights (the recipe photos starts from real ones)"
            said.append(f"{counted(len(train), 'image')} to train on: that is few{hint}.")
    unmeasured = [label_names[label] for label in np.flatnonzero(validation.positives() == 0)]
    words = "without a positive in validation, so that they count in no score and get a shared threshold"
    said += _about(words, unmeasured)
    if len(validation) < FEW_TO_VALIDATE:
        said.append(
            f"{counted(len(validation), 'image')} to validate: the score, and with it the choice of the epoch and the "
            "thresholds, is rough."
        )
    return said


def _about(words: str, names: list[str]) -> list[str]:
    listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
    return [f"{counted(len(names), 'label')} {words}: {listed}."] if names else []
