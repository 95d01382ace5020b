"""What each figure is called and what it is: the one copy that reports, model cards and terminals show."""

from typing import NamedTuple


class Figure(NamedTuple):
    name: str
    meaning: str


AP_DEFINITION = "non-interpolated"

# By the keys of `functional.multilabel_report`.
FIGURES = {
    "mAP": Figure(
        "mAP",
        f"mean over labels of the average precision ({AP_DEFINITION}: the mean over a label's positives of the "
        "precision at their score)",
    ),
    "mAP_voc07": Figure("mAP, VOC07", "the same with PASCAL VOC's 11-point AP (until 2009)"),
    "mAP_voc10": Figure(
        "mAP, VOC10", "the same with the area under the monotone precision envelope (VOC from 2010 on)"
    ),
    "mAP_micro": Figure("mAP, micro", "AP of all image-label pairs in one ranking"),
    "mAP_weighted": Figure("mAP, weighted", "mean AP weighted by each label's positives"),
    "LRAP": Figure(
        "LRAP",
        "label ranking average precision: how well an image's own labels are ranked above the others",
    ),
    "ranking_loss": Figure("ranking loss", "share of an image's (present, absent) label pairs in the wrong order"),
    "coverage_error": Figure(
        "coverage error", "how many labels of an image's ranking must be read to meet all that are present"
    ),
    "CP": Figure("CP", "mean over labels of precision (0 where nothing was predicted)"),
    "CR": Figure("CR", "mean over labels of recall"),
    "CF1": Figure("CF1", "harmonic mean of CP and CR, the papers' definition"),
    "OP": Figure("OP", "precision over all image-label pairs"),
    "OR": Figure("OR", "recall over all pairs"),
    "OF1": Figure("OF1", "harmonic mean of OP and OR"),
    "f1_macro": Figure("macro F1", "mean over labels of F1"),
    "f1_micro": Figure("micro F1", "F1 over all pairs, the same as OF1"),
}

# What a model's heat maps are, by model type; modeling_hsvlt/heat_maps_multilabel.py has the details.
HEAT_MAPS = {
    "hsvlt": "where the label looked: its attention over the image, which an absent label has as well; it proves no "
    "cause",
    "mltr": "each place's share of the label's score (a class activation map), on the coarse grid of the last stage",
    "hp_dval": "how near each patch is to the label's text: what the local view averages, not the whole decision",
}


def shown(report: dict, *keys: str) -> str:
    """These figures of a report, by name, in one line."""
    return "; ".join(f"{FIGURES[key].name} {report[key]:.4f}" for key in keys)
