"""The folder that was built, loaded in a clean process and compared with the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from .build import ADAPTER_FILES, noise_image


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A temporary folder, which goes as well where Ctrl-C comes while it is removed."""
    folder = tempfile.TemporaryDirectory()
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except KeyboardInterrupt:
            shutil.rmtree(folder.name, ignore_errors=True)
            raise


def check_folder(folder: Path, pixels: torch.Tensor, logits: torch.Tensor) -> float:
    """Loads `folder` in a clean process and compares.

    Returns:
        The largest difference of a logit.

    Raises:
        ValueError: it does not load there, or pixels or logits are others.
    """
    with scratch_folder() as scratch:
        image, output = Path(scratch) / "image.png", Path(scratch) / "output.safetensors"
        noise_image().save(image)
        script = Path(__file__).with_name("clean_reload.py")
        environment = {**os.environ, "HF_MODULES_CACHE": scratch}
        if not (folder / ADAPTER_FILES[0]).exists():  # an adapter's base comes from the Hub
            environment["HF_HUB_OFFLINE"] = "1"
        result = subprocess.run(
            [sys.executable, "-I", script, folder, image, output], env=environment, capture_output=True, text=True
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"The folder does not load where this package is not installed: {reason}")
        found = load_file(output)
    if not torch.equal(found["pixel_values"], pixels):
        raise ValueError("The processor in the folder makes other pixels than the run's; nothing was pushed.")
    difference = (found["logits"] - logits).abs().max().item()
    if not torch.allclose(found["logits"], logits, rtol=1e-4, atol=1e-4):
        raise ValueError(f"The folder gives other logits than the run, by up to {difference:.2e}; nothing was pushed.")
    return difference
