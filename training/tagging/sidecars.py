"""Tags beside the images: text files as fine-tuning tools of image generators read, and XMP as photo tools do."""

from __future__ import annotations

import argparse
import logging
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from io import StringIO
from pathlib import Path

import torch
from accelerate import Accelerator

from ..checkpoint.atomic import write_file
from .results import Results
from .sources import DatasetSource, FileSource

logger = logging.getLogger(__name__)

RDF, DC, META = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://purl.org/dc/elements/1.1/", "adobe:ns:meta/"
EMPTY_XMP = (
    f'<x:xmpmeta xmlns:x="{META}"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""/></rdf:RDF></x:xmpmeta>'
)


def text_path(image: Path) -> Path:
    """`1.jpg` -> `1.txt`."""
    return image.with_suffix(".txt")


def xmp_path(image: Path) -> Path:
    """`1.jpg` -> `1.jpg.xmp`, as darktable and digiKam name it."""
    return image.with_name(f"{image.name}.xmp")


def write_text(image: Path, labels: Sequence[str], overwrite: bool = False) -> bool:
    """Writes `dog, sofa` (a comma within a label becomes a blank); False where there is a file already."""
    path = text_path(image)
    if path.exists() and not overwrite:
        return False
    write_file(path, ", ".join(" ".join(label.replace(",", " ").split()) for label in labels).encode() + b"\n")
    return True


def write_xmp(image: Path, labels: Sequence[str], overwrite: bool = False) -> bool:
    """Writes the labels as keywords (`dc:subject`); False where there is a file already.

    Overwriting replaces the keywords of an existing file and keeps all else in it, which may be a day's work. A file
    that is no XMP is left as it is, with a warning.
    """
    path = xmp_path(image)
    text = EMPTY_XMP
    if path.exists():
        if not (overwrite and path.is_file()):
            return False
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        # So that prefixes stay as they were.
        for _, (prefix, uri) in ET.iterparse(StringIO(text), events=["start-ns"]):
            with suppress(ValueError):  # ns0, ns1, ... are given anew anyway
                ET.register_namespace(prefix, uri)
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        logger.warning("%s is no XMP (%s); it was left as it was.", path, error)
        return False
    descriptions = list(root.iter(f"{{{RDF}}}Description"))
    if not descriptions:
        logger.warning("%s holds no rdf:Description; it was left as it was.", path)
        return False
    ET.register_namespace("dc", DC)
    for description in descriptions:
        for subject in description.findall(f"{{{DC}}}subject"):
            description.remove(subject)
    bag = ET.SubElement(ET.SubElement(descriptions[0], f"{{{DC}}}subject"), f"{{{RDF}}}Bag")
    for label in labels:
        ET.SubElement(bag, f"{{{RDF}}}li").text = label
    ET.indent(root)
    write_file(path, ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n")
    return True


WRITERS = {"txt": write_text, "xmp": write_xmp}
PATHS = {"txt": text_path, "xmp": xmp_path}


def write_sidecars(source: FileSource, results: Results, args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Writes this process's share of the sidecars, and says how many there were."""
    counts = Counter()
    for part in results.parts()[accelerator.process_index :: accelerator.num_processes]:
        for record in results.read(part):
            if not record["labels"]:
                continue
            image = source.path(record["file_name"])
            for kind in args.sidecars:
                try:
                    done = WRITERS[kind](image, record["labels"], args.overwrite_sidecars)
                except OSError as error:  # a folder that cannot be written to, or was moved away
                    print(f"No sidecar of {image}: {error}", file=sys.stderr)
                    done = False
                counts["written" if done else "kept"] += 1
    totals = torch.tensor([counts["written"], counts["kept"]], device=accelerator.device)
    written, kept = accelerator.reduce(totals, "sum").tolist()
    accelerator.print(f"Sidecars written: {written:,}; left as they were or not to be written: {kept:,}.")


def check_sidecars(source: FileSource | DatasetSource, kinds: list[str]) -> None:
    """
    Raises:
        ValueError: the images are no files, or two would share a sidecar.
    """
    if isinstance(source, DatasetSource):
        raise ValueError("The images of a data set have no folder for sidecars; leave --sidecars out.")
    for kind in kinds:
        owners: dict[Path, str] = {}
        for name in source.keys:
            path = PATHS[kind](source.path(name))
            if path in owners:
                raise ValueError(f"{owners[path]} and {name} would share the sidecar {path.name}; rename one of them.")
            owners[path] = name
