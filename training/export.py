"""Write a checkpoint as ONNX, for tools without PyTorch; the labels are folded in.

    hsvlt export CHECKPOINT TARGET
    hsvlt export CHECKPOINT TARGET --layout wd_tagger
    hsvlt export CHECKPOINT TARGET --quantize int8 --dataset DATASET --split validation
    hsvlt export CHECKPOINT TARGET --layout web
    hsvlt export CHECKPOINT TARGET --layout transformers_js

TARGET gets `model.onnx` and `selected_tags.csv`. The model is checked in onnxruntime against PyTorch before it is put
there. What a program needs to use it stands in its metadata: `labels` and `thresholds` (JSON lists in the order of the
outputs), `image_height`, `image_width`, `image_mean`, `image_std`, `rescale_factor`, `resize_mode`, `resample` (and its
`resample_number` in Pillow) and, for a processor that crops, `resize` and `do_center_crop`.

The layout "standard" takes `pixel_values` (batch, 3, height, width), RGB, rescaled and normalised, and gives `logits`
(batch, labels), whose sigmoid is the score. "wd_tagger" takes what programs for WD taggers feed, `input`
(batch, height, width, 3), BGR, 0 to 255, and gives `output`, the scores themselves: those of four ratings in front, as
such programs count them (0 but for labels that are called general, sensitive, questionable or explicit), then those of
the labels. The table has the same rows, ratings in category 9, and how many images of train show each label.

"web" is a page that labels images in the browser, a static Space of the Hub or a folder behind any web server: bars
against thresholds, heat maps, CSV and XMP; images stay on the machine. With `--quantize int8` it runs the int8 model.
onnxruntime-web goes into the folder: npm downloads it once, or `--onnxruntime_web` says where it is.

"transformers_js" is a folder that transformers.js loads, with fp32 and int8 models and `tag.mjs`, which applies sigmoid
and thresholds, where the library's own pipeline applies softmax. With `--dataset` the thresholds of int8 are fitted.

Tables are written as the labels are: a label that begins with =, +, - or @ is a formula to a spreadsheet, so open the
tables of strangers as text.

`--quantize int8` writes `model_int8.onnx` as well: weights of linear layers in 8 bits, activations quantised as they
come. Scores move a little with that, so its thresholds are fitted again on DATASET, and the loss in mAP is printed. The
layouts of browsers keep the weights of larger linear layers in 8 bits and compute in fp32: a smaller download, whose
scores are those of fp32 to about 1e-3.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .options import ScoringOptions, command, option, refuse_to_replace
from .places import run_of
from .say import say_next


@dataclass(kw_only=True)
class ExportOptions(ScoringOptions):
    target: Path = option(reason="folder to write into", positional=True, metavar="TARGET")
    dataset: str | None = option(None, "fits the thresholds of --quantize again: folder, Hub id, or scenes")
    layout: Literal["standard", "wd_tagger", "web", "transformers_js"] = option("standard", "see above")
    opset: int | None = option(None, "ONNX operator set; null: the exporter's")
    quantize: Literal["int8"] | None = option(None, "write model_int8.onnx as well; needs --dataset")
    onnxruntime_web: Path | None = option(
        None, "for the layout web, the npm package of that name, its folder or .tgz; null: npm downloads it"
    )
    overwrite: bool = option(False, "replace files in TARGET")


def run(args: ExportOptions) -> None:
    """Exports, checks, prints; puts the files into the target only when all went well."""
    import onnx

    from .checkpoint.atomic import whole_file
    from .checkpoint.loading import load_checkpoint
    from .publish.int8 import quantize_alone, quantize_and_refit
    from .publish.onnxruntime_web import runtime_files
    from .publish.selected_tags import FILE_NAME as TAGS_FILE
    from .publish.selected_tags import write_selected_tags
    from .publish.to_onnx import (
        CHECKED_BATCHES,
        INT8_FILE,
        MODEL_FILE,
        export_onnx,
        has_heat_maps,
        image_size,
        to_wd_tagger,
    )
    from .publish.web import TRANSFORMERS_JS_FILES, WEB_FILES, write_transformers_js, write_web

    names = [MODEL_FILE, TAGS_FILE] + ([INT8_FILE] if args.quantize else [])
    if args.layout == "web":
        names = [INT8_FILE if args.quantize else MODEL_FILE, *WEB_FILES]
    elif args.layout == "transformers_js":
        names = list(TRANSFORMERS_JS_FILES)
    if args.layout in ("web", "transformers_js") and any(args.target.glob("*.safetensors")):
        raise ValueError(f"{args.target} holds a checkpoint, of which this would replace files; choose another TARGET.")
    if not args.overwrite:
        refuse_to_replace(args.target, names, "TARGET")
    if args.quantize and args.dataset is None:
        raise ValueError("--quantize needs --dataset: the thresholds are fitted again to the scores of the int8 model.")
    if args.onnxruntime_web is not None and args.layout != "web":
        raise ValueError("--onnxruntime_web is for --layout web; leave it out.")
    runtime = runtime_files(args.onnxruntime_web) if args.layout == "web" else {}
    model, processor = load_checkpoint(args)
    args.target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.target, prefix=".export-") as folder:
        folder = Path(folder)
        path = folder / MODEL_FILE
        heat_map = args.layout == "web" and has_heat_maps(model)
        error = export_onnx(model, processor, path, opset=args.opset, heat_map=heat_map)
        print(
            f"{args.checkpoint}: onnxruntime and PyTorch differ by at most {error:.1e} of the largest logit at batch "
            f"{', '.join(map(str, CHECKED_BATCHES))}."
        )
        int8 = folder / INT8_FILE
        if args.quantize or (args.layout == "transformers_js" and args.dataset is not None):
            browser = args.layout in ("web", "transformers_js")
            quantize_and_refit(model, processor, path, int8, args, weights_alone=browser)
        elif args.layout == "transformers_js":
            quantize_alone(path, int8)
            print("The int8 model has the thresholds of the other; to fit its own, give --dataset.")
        if args.layout == "web":
            title = run_of(args.checkpoint).name
            write_web(folder, int8 if args.quantize else path, title, heat_map=heat_map, runtime=runtime)
        elif args.layout == "transformers_js":
            write_transformers_js(folder, path, int8)
        elif args.layout == "wd_tagger":
            for file in folder.glob("*.onnx"):
                onnx.save(to_wd_tagger(onnx.load(file)), file)
        labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
        ratings = args.layout == "wd_tagger"
        write_selected_tags(folder / TAGS_FILE, labels, _positives(args.checkpoint, len(labels)), ratings=ratings)
        if ratings and set(image_size(processor)) != {WD_SIZE}:
            print(
                f"Warning: programs for WD taggers resize to {WD_SIZE} px, and this model takes "
                f"{image_size(processor)}."
            )
        for name in names:
            (args.target / name).parent.mkdir(exist_ok=True)
            with whole_file(args.target / name) as written:
                (folder / name).rename(written)
    print(f"Written: {', '.join(str(args.target / name) for name in names)}")
    if args.layout == "web":
        print(f"To see it: python -m http.server --directory {shlex.quote(str(args.target))}")
    if getattr(model.config, "thresholds", None) is None and not args.quantize:
        print("The checkpoint has no thresholds, so the file has none; fit them with hsvlt thresholds.")
    say_next("push", run_of(args.checkpoint), "org/name", "--dry_run")


WD_SIZE = 448  # what kohya's script resizes to, whatever the model takes


def _positives(checkpoint: str, num_labels: int) -> list[int] | None:
    """How many images of train show each label, where the run or the published folder says it."""
    from .publish.measured import read_json

    for path in (Path(checkpoint) / "results.json", Path(checkpoint).parent / "results.json"):
        if path.is_file():
            counts = read_json(path).get("positives_in_train")
            if isinstance(counts, list) and len(counts) == num_labels:
                return counts
    return None


main = command(run, ExportOptions, "export", __doc__, (ValueError, OSError, RuntimeError))


if __name__ == "__main__":
    sys.exit(main())
