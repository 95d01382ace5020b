"""The report: numbers by hand, one page that needs nothing beside it, and text that stays text."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from training.evaluate import main
from training.report.page import calibration_stages, compare_thresholds
from training.scoring.calibration import Calibration
from training.scoring.held_out import halves
from training.scoring.thresholds import fit_thresholds, store_thresholds, threshold_info

from ..tiny_checkpoint import IMAGE_LABELS, save_checkpoint, save_images, tiny_model


def make(seed=0, n=400, num_labels=4, unknown=0.1):
    """Scores that rank well, but of which few reach 0.5."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, num_labels)) < 0.3).astype(np.int64)
    scores = np.clip(rng.normal(0.2, 0.08, labels.shape) + 0.15 * labels, 0, 1).astype(np.float32)
    labels[rng.random(labels.shape) < unknown] = -100
    return scores, labels


def test_held_out_thresholds_are_compared_with_a_half():
    scores, labels = make(unknown=0)
    config = tiny_model(list("abcd")).config
    rows = compare_thresholds(scores, labels, config, 0.3)
    assert list(rows) == ["0.5 for every label", "0.3 for every label", "fitted, held out"]
    decided = np.empty(scores.shape, dtype=bool)
    for fitted, applied in halves(len(scores)):
        decided[applied] = scores[applied] >= fit_thresholds(scores[fitted], labels[fitted])
    assert rows["fitted, held out"]["f1_macro"] == pytest.approx(f1_score(labels, decided, average="macro"))
    assert rows["0.5 for every label"]["f1_macro"] == pytest.approx(f1_score(labels, scores >= 0.5, average="macro"))
    assert rows["fitted, held out"]["f1_macro"] > rows["0.5 for every label"]["f1_macro"] + 0.2


def test_thresholds_that_were_fitted_to_these_images_are_called_so():
    scores, labels = make()
    model = tiny_model(list("abcd"))
    same, other = "the checkpoint's, fitted to these very images", "the checkpoint's"
    for rows, words in ((labels, same), (labels[::-1], other)):
        info = threshold_info(rows, "recall", 0.9, dataset="me/photos", split="validation")
        store_thresholds(model, fit_thresholds(scores, labels, "recall", 0.9), info)
        compared = compare_thresholds(scores, labels, model.config, "auto")
        assert list(compared) == ["0.5 for every label", "fitted, held out", words]
        assert compared["fitted, held out"]["CR"] == pytest.approx(0.9, abs=0.06)  # fitted as the checkpoint's were


def test_reliability_before_is_that_of_the_raw_scores():
    scores, labels = make()
    config = tiny_model(list("abcd")).config
    assert list(calibration_stages(scores, labels, config)) == ["scores"]
    calibration = Calibration(np.array([2.0, 1.0, 0.5, 1.5]), np.array([1.0, 0.0, -1.0, 0.5]))
    config.calibration_info = {"scale": calibration.scale.tolist(), "bias": calibration.bias.tolist()}
    stages = calibration_stages(calibration.apply(scores), labels, config)
    raw = calibration_stages(scores, labels, tiny_model(list("abcd")).config)["scores"]
    assert stages["before calibration"].ece() == pytest.approx(raw.ece(), abs=1e-3)
    assert stages["calibrated"].ece() != pytest.approx(raw.ece(), abs=1e-3)


class Page(HTMLParser):
    """Tags, where they point, and text, as a browser reads them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


MARKUP = ["<script>alert(1)</script>", "<b>bold</b> & \"quoted\" 'label'", "$5 \\frac{bill$"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rename = dict(zip(["dog", "cat", "tv monitor"], MARKUP, strict=True))
    labels = [[rename[name] for name in row] for row in IMAGE_LABELS]
    save_checkpoint(folder / "checkpoint", MARKUP)
    save_images(folder / "photos", labels, MARKUP)
    save_images(folder / "train" / "photos", labels * 4, MARKUP, split="train")
    (folder / "train" / "photos" / "train").rename(folder / "photos" / "train")
    command = [str(folder / "checkpoint"), str(folder / "photos"), "--count_split", "train"]
    assert main([*command, "--output", str(folder / "out"), "--threshold", "0.3"]) == 0
    return folder / "out", (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_the_page_opens_alone(page):
    parsed = Page(page[1])
    assert len(parsed.links) > 10
    assert all(link.startswith(("data:", "#")) for link in parsed.links)
    assert not re.search(r"https?://", re.sub(r"base64,[\w+/=]+", "", page[1]))
    images = [link for link in parsed.links if link.startswith("data:image/jpeg;base64,")]
    assert images
    for link in images:
        image = Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))
        assert image.size == (30, 20)
    plots = [link for link in parsed.links if link.startswith("data:image/svg+xml;base64,")]
    assert len(plots) == 4
    assert all(b"</svg>" in base64.b64decode(link.partition(",")[2]) for link in plots)


def test_the_page_holds_on_a_phone_and_in_the_dark(page):
    """No width of its own is beyond 390 px but in what scrolls; dark colours; every image says what it shows."""
    html = page[1]
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert '<meta name="viewport" content="width=device-width' in html
    assert "@media (prefers-color-scheme: dark)" in style and "color-scheme: light dark" in style
    for table in re.finditer("<table", html):
        assert re.search(r'<div class="scroll( tall)?" tabindex="0">$', html[: table.start()])
    phone = re.sub(r"@media \(max-width: \d+px\)", "", style)
    for what, size, unit in re.findall(r"(?<![-\w])((?:min-)?width): (\d+(?:\.\d+)?)(px|em|in|pt)", phone):
        assert float(size) * {"px": 1, "em": 15, "in": 96, "pt": 96 / 72}[unit] <= 200, what
    # Letters are never stacked: what may break anywhere has a least width.
    anywhere = re.findall(r"([^{}]*)\{([^{}]*overflow-wrap: anywhere[^{}]*)\}", style)
    for selectors, rules in anywhere:
        assert "min-width" in rules or not re.search(r"\b(td|th)\b", selectors), selectors
    images = re.findall(r"<img [^>]*>", html)
    assert images and all(re.search(r'alt="[^"]+"', image) for image in images)
    for uri in re.findall(r'class="plot" src="data:image/svg\+xml;base64,([^"]+)"', html)[:3]:
        width = re.search(rb'width="([\d.]+)pt"', base64.b64decode(uri))
        assert float(width[1]) < 390, "drawn for a wide screen: its letters shrink on a phone"


def test_names_with_markup_are_shown_as_they_are(page):
    parsed = Page(page[1])
    assert parsed.tags.count("script") == 1  # the page's own
    for name in MARKUP:
        assert name in parsed.text
    assert "mathdefault" not in base64.b64decode(page[1].rpartition("svg+xml;base64,")[2].partition('"')[0]).decode()


def test_the_page_holds_what_the_files_hold(page):
    folder, html = page
    results = json.loads((folder / "results.json").read_text())
    text = Page(html).text
    assert f"{results['metrics']['mAP']:.4f}" in text and "non-interpolated" in text
    assert "mAP, medium" not in text and "mAP, tail" in text  # 12 positives of each at most
    compared = results["thresholds_compared"]
    assert list(compared)[:2] == ["0.5 for every label", "0.3 for every label"]
    for values in compared.values():
        assert f"{values['f1_macro']:.4f}" in text
    assert f"{results['calibration_error']['scores']['ECE_per_label']:.4f}" in text
    assert "12" in text and "positives in train" in text
