"""Load a folder as a stranger would and write what the model says.

    python -I training/publish/clean_reload.py FOLDER IMAGE OUT

Run by `reload.py` in a process of its own, in which `modeling_hsvlt` cannot be imported even where it is installed.
OUT gets `pixel_values` (1, 3, H, W) and `logits` (1, num_labels) of IMAGE, as safetensors. A `handler.py` in the
folder is asked for the labels, as an endpoint would.
"""

import runpy
import sys
from pathlib import Path


class PackageBlocker:
    """Makes importing the package fail, as on a machine that never installed it."""

    def find_spec(self, name: str, path=None, target=None):
        if name.partition(".")[0] in ("modeling_hsvlt", "hsvlt_training", "training"):
            raise ModuleNotFoundError(f"{name} is blocked here on purpose: the folder must bring its own code.")


def main(folder: str, image: str, output: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForImageClassification, AutoProcessor

    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    pixels = AutoProcessor.from_pretrained(folder, trust_remote_code=True)(images=image, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=pixels["pixel_values"].to(model.dtype)).logits
    handler = Path(folder) / "handler.py"
    if handler.exists():  # an adapter has none
        labels = runpy.run_path(str(handler))["EndpointHandler"](folder)({"inputs": Path(image).read_bytes()})
        expected = dict(zip(model.config.id2label.values(), logits.float().sigmoid()[0].tolist(), strict=True))
        # Roughly: a pipeline takes the GPU where there is one.
        if not labels or any(abs(expected[label["label"]] - label["score"]) > 0.02 for label in labels):
            raise ValueError("handler.py gives other scores than the model beside it.")
    save_file({"pixel_values": pixels["pixel_values"], "logits": logits.float()}, output)


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    main(*sys.argv[1:])
