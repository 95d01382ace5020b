"""One copy of what each figure is called and means: the report, the card and the terminal show it."""

import inspect

import numpy as np

from training import evaluate
from training.metrics.functional import multilabel_report
from training.metrics.glossary import FIGURES
from training.publish import card
from training.report import page

SCORES = np.array([[0.9, 0.2], [0.4, 0.8], [0.6, 0.1]], dtype=np.float32)
LABELS = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)


def test_every_figure_is_one_of_the_report():
    assert set(FIGURES) <= set(multilabel_report(SCORES, LABELS))
    assert set(page.HEADLINES) | set(page.DECISIONS) | set(card.HEADLINES) | set(card.DECISIONS) == set(FIGURES)


def test_no_other_place_says_what_a_figure_means():
    for module in (page, card, evaluate):
        source = inspect.getsource(module)
        assert not [key for key, figure in FIGURES.items() if figure.meaning in source], module


def test_the_terminal_uses_the_names():
    printed = evaluate.format_report(multilabel_report(SCORES, LABELS), "score >= 0.5", [])
    for key in ("mAP", "mAP_voc07", "mAP_micro", "mAP_weighted", "LRAP", "ranking_loss", "coverage_error", "CF1"):
        assert FIGURES[key].name in printed
