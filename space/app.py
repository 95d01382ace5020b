"""A demo of multi-label checkpoints: drop an image, see its labels, click one to see where it was found.

    MODELS="org/name org/other@revision" python app.py

MODELS names checkpoints of the Hub or folders, with blanks or line ends between; each brings its own code, which is run
here, so list only those whose code you trust, and pin the revision. Images in `examples/` are offered as examples.
"""

import base64
import html
import io
import os
import sys
from functools import lru_cache
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image
from transformers import pipeline

MODELS = os.environ.get("MODELS", "")
MODELS = MODELS.split("\n") if "\n" in MODELS else MODELS.replace(",", " ").split()
MODELS = [name for name in MODELS if name]
EXAMPLES = sorted(str(path) for path in (Path(__file__).parent / "examples").glob("*.*"))
SHOWN = 12  # labels, unless all are asked for
MAX_SIDE = 1024  # px of a heat map
WELCOME = "Drop an image, paste one, or choose an example."

CSS = """
.bars { display: flex; flex-direction: column; gap: 4px; }
.bars button { display: grid; grid-template-columns: minmax(6rem, 30%) 1fr 3.2rem; gap: .75rem; align-items: center;
  min-height: 44px; padding: 4px 10px; border: 1px solid transparent; border-radius: 8px; background: transparent;
  color: var(--body-text-color); font: inherit; text-align: left; cursor: pointer; width: 100%; }
.bars button:hover { background: var(--background-fill-secondary); }
.bars button:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.bars button[aria-pressed=true] { border-color: var(--color-accent); background: var(--background-fill-secondary); }
.bars .name { overflow-wrap: anywhere; font-weight: 600; }
.bars .below .name { font-weight: 400; opacity: .75; }
.bars .track { position: relative; height: 16px; border-radius: 4px; background: var(--border-color-primary); }
.bars .fill { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: #0d9488; }
.bars .below .fill { background: #94a3b8; }
.bars .mark { position: absolute; top: -4px; bottom: -4px; width: 3px; margin-left: -1px; border-radius: 2px;
  background: var(--body-text-color); }
.bars .score { text-align: right; font-variant-numeric: tabular-nums; }
.bars .map { margin: 2px 10px 10px; } .bars .map img { display: block; max-width: 100%; max-height: 60vh; width: auto;
  height: auto; border-radius: 8px; }
.hint { margin: 4px 0 8px; font-size: .9rem; opacity: .8; }
.message { padding: 14px 16px; border-radius: 8px; background: var(--background-fill-secondary); }
.message.problem { border-left: 4px solid #dc2626; }
footer { display: none !important; }
"""

# Buttons, so that keyboards and screen readers have them; the click is handed to Python with the label's name.
ON_LOAD = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-label]');
  if (!button) return;
  element.querySelectorAll('button[data-label]').forEach(b => b.setAttribute('aria-pressed', b === button));
  trigger('select', {index: 0, value: button.dataset.label});
});
// The answer draws the labels anew, with the map below the chosen one: keep the focus, and show the map.
new MutationObserver(() => {
  element.querySelector('button[aria-pressed=true]')?.focus({preventScroll: true});
  element.querySelector('.map')?.scrollIntoView({block: 'nearest', behavior: 'smooth'});
}).observe(element, {childList: true, subtree: true});
"""


class UploadedImage(gr.Image):
    """An image that hands over the uploaded file as it is: the checkpoint decodes it, or says what is wrong with it."""

    is_template = True

    def preprocess(self, payload):
        return None if payload is None else payload.path


@lru_cache(maxsize=2)
def load(name: str):
    """The checkpoint's own pipeline."""
    repo, _, revision = name.partition("@") if not Path(name).is_dir() else (name, "", "")
    tagger = pipeline(model=repo, revision=revision or None, trust_remote_code=True)
    if tagger.task != "multi-label-image-classification":
        raise ValueError(f"{name} is a checkpoint for {tagger.task}; this demo shows multi-label ones of hsvlt.")
    return tagger


def decode(path: str, tagger) -> Image.Image:
    """The image as the checkpoint sees it: turned upright, on white, RGB."""
    try:
        return sys.modules[type(tagger).__module__].load_image(path)
    except ValueError as error:
        raise ValueError(str(error).replace(path, Path(path).name)) from error


def message(text: str, problem: bool = False) -> str:
    kind = "message problem" if problem else "message"
    return f'<p class="{kind}" role="{"alert" if problem else "status"}">{html.escape(text)}</p>'


def bars(
    results: list[dict], thresholds: dict[str, float], show_all: bool, chosen: str | None = None, below: str = ""
) -> str:
    """The labels as bars, those above their thresholds first; the mark is the threshold. `below` the `chosen` one."""
    found = [result for result in results if result["score"] >= thresholds[result["label"]]]
    rest = [result for result in results if result["score"] < thresholds[result["label"]]]
    shown = found + (rest if show_all else rest[: max(0, SHOWN - len(found))])
    rows = []
    for result in shown:
        label, score, threshold = result["label"], result["score"], thresholds[result["label"]]
        above = score >= threshold
        words = f"{label}, score {score:.2f}, threshold {threshold:.2f}, {'found' if above else 'not found'}"
        rows.append(
            f'<button type="button" class="{"above" if above else "below"}" data-label="{html.escape(label)}" '
            f'aria-label="{html.escape(words)}" title="{html.escape(words)}" '
            f'aria-pressed="{str(label == chosen).lower()}">'
            f'<span class="name">{html.escape(label)}</span><span class="track">'
            f'<span class="fill" style="width:{100 * score:.1f}%"></span>'
            f'<span class="mark" style="left:{100 * threshold:.1f}%"></span></span>'
            f'<span class="score">{score:.2f}</span></button>{below if label == chosen else ""}'
        )
    count = f"{len(found)} label{'s' if len(found) != 1 else ''} found" if found else "No label reaches its threshold"
    hidden = f" {len(results) - len(shown)} more are not shown." if len(results) > len(shown) else ""
    hint = f"{count} among {len(results)}.{hidden} The mark on a bar is its threshold. Choose a label to see where."
    return f'<p class="hint" role="status">{hint}</p><div class="bars">{"".join(rows)}</div>'


def tag(path: str | None, name: str, names: list[str], show_all: bool):
    """The bars of an image, and what they are drawn from."""
    if path is None:
        return message(WELCOME), None
    try:
        tagger = load(name)
        config = tagger.model.config
        results = tagger(decode(path, tagger), **({"labels": names} if names else {}))
    except (ValueError, OSError) as error:
        return message(str(error), problem=True), None
    fitted = config.thresholds or [0.5] * config.num_labels
    thresholds = {config.id2label[index]: threshold for index, threshold in enumerate(fitted)}
    drawn = results, thresholds, show_all
    return bars(*drawn), drawn


def show_heat_map(path: str | None, name: str, drawn: tuple | None, event: gr.SelectData):
    """The bars again, and below the chosen label where it was found."""
    if path is None or drawn is None:
        return message(WELCOME)
    try:
        tagger = load(name)
        image = decode(path, tagger)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        heat = tagger(image, labels=[event.value], explain=True)[0]["heat_map"]  # (height, width), 0 to 1
    except (ValueError, OSError) as error:
        return bars(*drawn, event.value, message(f"No heat map: {error}", problem=True))
    words = html.escape(f"What spoke for “{event.value}”: the brighter, the more.")
    data = io.BytesIO()
    overlay(image, heat).save(data, "JPEG", quality=88)
    source = base64.b64encode(data.getvalue()).decode("ascii")
    figure = (
        f'<figure class="map"><img src="data:image/jpeg;base64,{source}" width="{image.width}" height="{image.height}" '
        f'alt="{words}"><figcaption class="hint" role="status">{words}</figcaption></figure>'
    )
    return bars(*drawn, event.value, figure)


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """The image, darkened where the map is low and glowing where it is high."""
    pixels = np.asarray(image, np.float32)
    grey = pixels @ np.float32([0.299, 0.587, 0.114])
    cold = 0.35 * grey[..., None] + np.float32([10, 10, 40])
    stops = np.float32([0, 0.35, 0.7, 1])
    colour = np.stack(
        [np.interp(heat, stops, values) for values in ([60, 200, 255, 255], [0, 40, 150, 245], [110, 90, 20, 140])], -1
    )
    weight = np.clip(heat, 0, 1)[..., None] ** 0.8
    mixed = (1 - weight) * cold + weight * (0.55 * pixels + 0.45 * colour)
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def choose(path: str | None, name: str, show_all: bool):
    """Another checkpoint: its labels, and what it finds."""
    try:
        names = list(load(name).model.config.id2label.values())
    except (ValueError, OSError) as error:
        return gr.Dropdown(choices=[], value=[]), message(str(error), problem=True), None
    return gr.Dropdown(choices=names, value=[]), *tag(path, name, [], show_all)


def build() -> gr.Blocks:
    if not MODELS:
        raise SystemExit('Name at least one checkpoint: MODELS="org/name" python app.py')
    labels = list(load(MODELS[0]).model.config.id2label.values())
    titles = [(name.rstrip("/").rpartition("/")[2], name) for name in MODELS]
    with gr.Blocks(title="Many labels per image", analytics_enabled=False) as demo:
        gr.Markdown(
            "# Many labels per image\nEach label has its own score and its own threshold, fitted on validation data."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                image = UploadedImage(
                    label="Image", sources=["upload", "webcam", "clipboard"], height=340, elem_id="image"
                )
                if EXAMPLES:
                    gr.Examples([[path] for path in EXAMPLES], [image], label="Examples", elem_id="examples")
                model = gr.Radio(titles, value=MODELS[0], label="Checkpoint", visible=len(MODELS) > 1, elem_id="model")
                only = gr.Dropdown(
                    labels, value=[], multiselect=True, label="Only these labels", info="Empty: all", elem_id="only"
                )
                show_all = gr.Checkbox(False, label="Show every label", visible=len(labels) > SHOWN or len(MODELS) > 1)
            with gr.Column(scale=1, min_width=320):
                found = gr.HTML(message(WELCOME), js_on_load=ON_LOAD, elem_id="labels")
        drawn = gr.State()
        outputs = [found, drawn]
        gr.on(
            [image.change, only.change, show_all.change],
            tag,
            [image, model, only, show_all],
            outputs,
            show_progress="minimal",
        )
        model.change(choose, [image, model, show_all], [only, *outputs], show_progress="minimal")
        found.select(show_heat_map, [image, model, drawn], [found], show_progress="minimal")
    return demo


if __name__ == "__main__":
    theme = gr.themes.Soft(primary_hue="teal", font=["system-ui", "sans-serif"])  # no font from elsewhere
    build().launch(css=CSS, theme=theme, max_file_size="40mb", footer_links=[], inbrowser="OPEN_BROWSER" in os.environ)
