"""All multi-label metrics as one `evaluate` module; the definitions are in training/metrics/functional.py."""

import importlib

import datasets
import evaluate

_DESCRIPTION = """\
mAP (non-interpolated, VOC2007 11-point, VOC2010 envelope; macro, micro, weighted), CP/CR/CF1 and OP/OR/OF1 at a
threshold and among the top k, ranking loss, coverage error and LRAP of a multi-label classifier. Unknown labels (-100
or NaN) count in no metric; labels without a known positive are left out of the means and counted.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: one list of scores (float32) per image, one score per label.
    references: one list per image: 1 present, 0 absent, -100 or NaN unknown.
    threshold: a number, or one per label; `score >= threshold` predicts the label. Defaults to 0.5.
    top_k: limit of the top-k metrics, None for none. Defaults to 3.
    groups: named lists of label indices, for example {"head": [0, 3], "tail": [1, 2]}.
    label_names: names for error messages.
Returns:
    A dictionary of numbers in the units of training.metrics.functional.multilabel_report.
Examples:
    >>> metric = evaluate.load("training/metrics/multilabel_classification")
    >>> metric.compute(predictions=[[0.9, 0.2], [0.4, 0.8]], references=[[1, 0], [0, 1]])["mAP"]
    1.0
"""


class MultilabelClassification(evaluate.Metric):
    """Collects predictions and hands them to `multilabel_report`."""

    def _info(self):
        info = evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float32")),
                    "references": datasets.List(datasets.Value("float32")),
                }
            ),
        )
        # Arrays, a tenth of the memory of Python lists. Set afterwards, for MetricInfo refuses a format for lists.
        info.format = "numpy"
        return info

    def _download_and_prepare(self, dl_manager):
        # Not an import statement, which evaluate takes for a package to `pip install`.
        for package in ("hsvlt_training", "training"):  # installed, or in a checkout
            try:
                self._report = importlib.import_module(f"{package}.metrics.functional").multilabel_report
                return
            except ModuleNotFoundError:
                pass
        raise ModuleNotFoundError(
            "This metric needs training/metrics/functional.py; run from the root of the checkout, or install the "
            "package."
        )

    def _compute(self, predictions, references, **options):
        for name, rows in (("predictions", predictions), ("references", references)):
            if rows.dtype == object:
                lengths = [len(row) for row in rows]
                odd = next(row for row, length in enumerate(lengths) if length != lengths[0])
                raise ValueError(
                    f"Row {odd} of {name} has {lengths[odd]} entries and row 0 has {lengths[0]}; give one per label."
                )
        return self._report(predictions, references, **options)
