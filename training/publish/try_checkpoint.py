"""Load a checkpoint as a stranger would.

    python training/publish/try_checkpoint.py CHECKPOINT IMAGES [--output FILE.png]

Runs in a process that cannot import `modeling_hsvlt`, even where it is installed: whatever works here works for whoever
downloads the checkpoint with nothing but transformers, torch and Pillow. The scores of `AutoModel` and of `pipeline`
must agree. IMAGES is a folder of images; where it has a metadata.jsonl, the true labels are shown beside.
"""

import argparse
import json
import sys
from pathlib import Path

NAME_LENGTH = 17  # letters that fit below half an image, score included


class PackageBlocker:
    """Makes `import modeling_hsvlt` fail, as on a machine that never installed it."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] in ("modeling_hsvlt", "hsvlt_training", "training"):
            raise ImportError(f"{name} is blocked here on purpose: the checkpoint must bring its own code.")


def predict(checkpoint: str, files: list[Path]) -> list[list[dict]]:
    """Labels of each image with their scores, at the checkpoint's thresholds.

    Raises:
        RuntimeError: where `AutoModel` and the pipeline disagree.
    """
    import torch
    from PIL import Image
    from transformers import AutoModel, AutoProcessor, pipeline

    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    if type(model).__module__.partition(".")[0] != "transformers_modules":
        raise RuntimeError(f"{type(model).__module__} did not come with the checkpoint.")
    images = [Image.open(file) for file in files]
    with torch.inference_mode():
        scores = model(**processor(images=images, return_tensors="pt")).logits.sigmoid()

    tagger = pipeline("multi-label-image-classification", model=checkpoint, trust_remote_code=True)
    everything = tagger([str(file) for file in files], threshold=None, top_k=None, batch_size=8)
    id2label = model.config.id2label
    for row, labels in zip(scores, everything, strict=True):
        by_name = {label["label"]: label["score"] for label in labels}
        difference = max(abs(by_name[id2label[i]] - score) for i, score in enumerate(row.tolist()))
        if difference > 1e-5:
            raise RuntimeError(f"AutoModel and the pipeline differ by {difference:.2e}.")
    threshold = "auto" if model.config.thresholds is not None else 0.5
    return tagger([str(file) for file in files], threshold=threshold, batch_size=8)


def read_labels(folder: Path) -> dict[str, list[str]]:
    metadata = folder / "metadata.jsonl"
    if not metadata.exists():
        return {}
    rows = [json.loads(line) for line in metadata.read_text().splitlines() if line.strip()]
    return {row["file_name"]: row["labels"] for row in rows}


def draw(images: list, predictions: list[list[dict]], truth: list[list[str] | None], output) -> None:
    """Writes a grid of images with their labels: found in green, wrong in red, missed in grey.

    Arguments:
        images: As PIL has them.
        predictions: Of each image, `label` and `score`, a score of None is not written; `truth`: None is unknown.
        output: PNG file, or a buffer.
    """
    from matplotlib.figure import Figure

    columns = min(4, len(images))
    rows = -(-len(images) // columns)

    def colour(label: str, actual: list[str] | None) -> str:
        return "#1a7f37" if actual is None or label in actual else "#cf222e"

    def fitting(name: str, words: str) -> str:
        room = NAME_LENGTH - len(words)
        return (name if len(name) <= room else f"{name[: room - 1]}…") + words

    captions = []
    for labels, actual in zip(predictions, truth, strict=True):
        lines = []
        for label in labels:
            score = "" if label["score"] is None else f" {label['score']:.2f}"
            lines.append((fitting(label["label"], score), colour(label["label"], actual)))
        found = {label["label"] for label in labels}
        lines += [(fitting(name, " missed"), "#6e7781") for name in actual or [] if name not in found]
        captions.append(lines or [("no label", "#6e7781")])
    depth = -(-max(map(len, captions)) // 2)  # lines of text under an image, two labels each
    figure = Figure(figsize=(2.6 * columns, (2.6 + 0.3 * depth) * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, wspace=0.06, hspace=0.06 + 0.115 * depth)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, lines in zip(axes.flat, images, captions, strict=False):
        axis.imshow(image.convert("RGB"), interpolation="bilinear")
        for i, (text, shade) in enumerate(lines):
            x, y = 0.02 + 0.5 * (i % 2), -0.07 - 0.11 * (i // 2)
            axis.text(x, y, text, color=shade, fontsize=8, transform=axis.transAxes, va="center")
    figure.savefig(output, format="png", dpi=100, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or Hub id")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--output", type=Path, help="PNG file for the images with their labels")
    args = parser.parse_args(argv)

    sys.meta_path.insert(0, PackageBlocker())
    suffixes = {".png", ".jpg", ".jpeg", ".webp"}
    files = sorted(file for file in args.images.rglob("*") if file.suffix.lower() in suffixes)
    if not files:
        parser.error(f"{args.images} holds no image ({', '.join(sorted(suffixes))}).")
    predictions = predict(args.checkpoint, files)
    truth = read_labels(files[0].parent)
    for file, labels in zip(files, predictions, strict=True):
        found = ", ".join(f"{label['label']} {label['score']:.2f}" for label in labels) or "no label"
        actual = f"   (true: {', '.join(truth[file.name]) or 'none'})" if file.name in truth else ""
        print(f"{file.name}: {found}{actual}")
    if args.output is not None:
        from PIL import Image

        args.output.parent.mkdir(parents=True, exist_ok=True)
        draw([Image.open(file) for file in files], predictions, [truth.get(file.name) for file in files], args.output)
        print(f"image: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
