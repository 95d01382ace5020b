"""The Space in a browser: `make space-test`. Needs Chromium and an environment of its own, where gradio is."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="gradio wants Pillow below 13, so it is not in this environment: make space-test")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not in this environment: make space-test")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("There is no Chromium (Debian's package chromium, or its path in CHROMIUM)", allow_module_level=True)

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "space" / "examples").glob("*.jpg"))
SHOTS = os.environ.get("SPACE_SCREENSHOTS")  # a folder to look at
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
# Two checkpoints of random weights, in a process that has this project; the app's process does not.
MAKE_CHECKPOINTS = """
import sys
import torch
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor, MultiLabelProcessor

for name, labels in (("digits", "zero one two three four five six seven eight nine"), ("animals", "cat dog")):
    torch.manual_seed(0)
    id2label = dict(enumerate(labels.split()))
    config = HSVLTConfig.preset("nano", id2label=id2label, thresholds=[0.5] * len(id2label))
    model = HSVLTForImageClassification(config)
    processor = MultiLabelProcessor(MultiLabelImageProcessor(size={"height": 64, "width": 64}), id2label)
    for each in (model, processor):
        each.save_pretrained(f"{sys.argv[1]}/{name}")
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app's, running on checkpoints from `SPACE_MODELS` or on random ones."""
    folder = tmp_path_factory.mktemp("space")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    models = os.environ.get("SPACE_MODELS")
    if models is None:
        subprocess.run([sys.executable, "-c", MAKE_CHECKPOINTS, folder], cwd=ROOT, check=True)
        models = f"{folder}/digits {folder}/animals"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {
        "MODELS": models,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    app = shutil.copytree(ROOT / "space", folder / "app") / "app.py"  # as on the Hub: without this project around it
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, app], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, address, browser):
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height}, has_touch=request.param == "phone")
    page.set_default_timeout(90_000)
    page.shot = lambda name: SHOTS and page.screenshot(path=f"{SHOTS}/{request.param}-{name}.png", full_page=True)
    page.goto(address)
    page.get_by_text("Drop an image, paste one").wait_for()
    yield page
    page.close()


def upload(page, path):
    page.locator("#image input[type=file]").first.set_input_files(path)


def test_from_upload_to_heat_map(page):
    page.shot("start")
    upload(page, EXAMPLES[0])
    bars = page.locator("#labels button[data-label]")
    bars.first.wait_for()
    assert bars.count() >= 10
    scores = [float(text) for text in page.locator("#labels .score").all_inner_texts()]
    assert all(0 <= score <= 1 for score in scores)
    page.shot("labels")

    # By keyboard alone: the first bar has the focus, Enter asks for its heat map.
    assert page.locator("#labels .map img").count() == 0
    label = bars.first.get_attribute("data-label")
    bars.first.focus()
    page.keyboard.press("Enter")
    heat_map = page.locator("#labels .map img").first
    heat_map.wait_for()
    assert bars.first.get_attribute("aria-pressed") == "true"
    assert label in heat_map.get_attribute("alt")
    first = heat_map.get_attribute("src")
    page.wait_for_timeout(700)
    page.shot("heat-map")
    # Another label, another map, by a click or a tap.
    bars.nth(1).click()
    page.wait_for_function(
        "src => ![src, undefined].includes(document.querySelector('#labels .map img')?.src)", arg=first
    )
    # Each map is right below its label, both are on the screen, and the label has the focus.
    page.wait_for_timeout(1000)
    chosen = page.locator("#labels button[aria-pressed=true]")
    assert chosen.count() == 1 and chosen.get_attribute("data-label") == bars.nth(1).get_attribute("data-label")
    assert chosen.evaluate("b => b.nextElementSibling.matches('.map') && document.activeElement === b")
    assert chosen.evaluate("b => b.nextElementSibling.getBoundingClientRect().bottom <= innerHeight + 1")
    page.shot("second-heat-map")

    # Nothing is wider than the screen.
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0
    heights = page.evaluate("[...document.querySelectorAll('#labels button')].map(b => b.offsetHeight)")
    assert min(heights) >= 44  # a finger


def test_only_some_labels(page):
    upload(page, EXAMPLES[1])
    page.locator("#labels button[data-label]").first.wait_for()
    page.locator("#only input").click()
    page.get_by_role("option", name="two").click()
    page.wait_for_function("document.querySelectorAll('#labels button').length === 1")
    assert page.locator("#labels button").get_attribute("data-label") == "two"


@pytest.mark.skipif("SPACE_MODELS" in os.environ, reason="SPACE_MODELS names the checkpoints")
def test_another_checkpoint(page):
    upload(page, EXAMPLES[1])
    page.locator("#labels button[data-label]").first.wait_for()
    page.locator("#model").get_by_text("animals").click()
    page.wait_for_function("document.querySelectorAll('#labels button').length === 2")
    page.shot("checkpoint")


def test_examples(page):
    page.locator("#examples button, .gallery button, button.gallery-item").first.click()
    page.locator("#labels button[data-label]").first.wait_for()


def test_what_is_no_image_gets_a_friendly_message(page, tmp_path):
    # A text file under its own name is refused by the page, one that calls itself an image by the checkpoint.
    honest, dishonest = tmp_path / "notes.txt", tmp_path / "notes.png"
    for path in (honest, dishonest):
        path.write_text("This is no image.")
    upload(page, honest)
    page.get_by_text("Invalid file type").first.wait_for()
    page.shot("text-file")
    upload(page, dishonest)
    page.get_by_role("alert").get_by_text("notes.png is in no image format").wait_for()
    page.shot("text-file-named-png")
    assert page.locator("#labels button").count() == 0
    # And nothing is broken by it.
    page.get_by_label("Remove image").first.click() if page.get_by_label("Remove image").count() else page.reload()
    upload(page, EXAMPLES[2])
    page.locator("#labels button[data-label]").first.wait_for()
