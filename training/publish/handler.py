"""What a Hub Inference Endpoint runs: `push` copies this file beside the checkpoint, where it needs no package of ours.

    {"inputs": IMAGE, "parameters": {"threshold": "auto", "top_k": 5, "labels": ["dog", "sofa"], "explain": true}}

IMAGE is bytes, a `PIL.Image.Image`, base64, a `data:image/` URL or an address (http, https), or a list of those; read
by the rules of the checkpoint's pipeline, but never from the disk of the machine. The answer is the pipeline's; a heat
map is a grey PNG in base64. The checkpoint's own code is run, as for every file of the folder.
"""

import base64
import io
import sys
from collections.abc import Mapping

from PIL import Image
from transformers import pipeline

PARAMETERS = ("threshold", "top_k", "labels", "explain")  # the others are limits, which a stranger must not lift
BATCH_SIZE = 8
MAX_MAP_PIXELS = 2**26  # of the heat maps of one image: a quarter of a gibibyte as floats


class EndpointHandler:
    """Loaded and called by the Hub's inference toolkit."""

    def __init__(self, path: str = ""):
        self.tagger = pipeline(model=str(path), trust_remote_code=True)
        self.load_image = sys.modules[type(self.tagger).__module__].load_image

    def __call__(self, data: Mapping) -> list:
        """The labels of the image, or of each image of a list.

        Raises:
            ValueError: in one sentence, what is wrong with the request.
        """
        inputs, parameters = read_request(data)
        self.tagger._sanitize_parameters(**parameters)  # told before an image is read
        items, results = inputs if isinstance(inputs, (list, tuple)) else [inputs], []
        for start in range(0, len(items), BATCH_SIZE):
            images = []
            for place, item in enumerate(items[start : start + BATCH_SIZE], start + 1):
                with_place = f"Image {place} of {len(items)}: " if len(items) > 1 else ""
                try:
                    images.append(self.load_image(image_source(item)))
                    check_maps(self.tagger, images[-1].size, parameters)
                except ValueError as error:
                    raise ValueError(f"{with_place}{error}") from None
            results += self.tagger(images, batch_size=len(images), **parameters)
        return [as_json(labels) for labels in results] if items is inputs else as_json(results[0])


def read_request(data) -> tuple:
    """Inputs and parameters of a request.

    Raises:
        ValueError: it has no inputs, or something that there is not.
    """
    if not isinstance(data, Mapping) or data.get("inputs") is None:
        raise ValueError('A request needs "inputs": an image, or a list of images.')
    unknown = [str(name) for name in data if name not in ("inputs", "parameters")]
    if unknown:
        raise ValueError(f'A request has "inputs" and "parameters", but this one has {", ".join(unknown)[:200]}.')
    parameters = data.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError('"parameters" must be an object, such as {"threshold": "auto"}.')
    unknown = [str(name) for name in parameters if name not in PARAMETERS]
    if unknown:
        raise ValueError(f"Unknown parameter {', '.join(unknown)[:200]}; a request may have {', '.join(PARAMETERS)}.")
    parameters = dict(parameters)
    if not isinstance(parameters.get("explain", False), bool):
        raise ValueError(f"explain must be true or false, but it is {parameters['explain']!r:.200}.")
    if isinstance(parameters.get("threshold"), str) and parameters["threshold"] != "auto":
        try:
            parameters["threshold"] = float(parameters["threshold"])  # the toolkit leaves `?threshold=0.5` a text
        except ValueError:
            raise ValueError(
                f"threshold must be a number or auto, but it is {parameters['threshold']!r:.200}."
            ) from None
    return data["inputs"], parameters


def image_source(item, urls: bool = True):
    """What `load_image` may be given of what a stranger sent: it would read a path.

    Raises:
        ValueError: it is no image.
    """
    if isinstance(item, (bytes, bytearray, Image.Image)):
        return item
    if not isinstance(item, str):
        raise ValueError(
            f"An image is base64, a data:image/ URL or an address, but this is of type {type(item).__name__}."
        )
    if item.startswith(("http://", "https://")):
        if not urls:
            raise ValueError("Addresses are not read here; send the image itself, as a file or in base64.")
        return item
    try:
        encoded = item.partition(",")[2] if item.startswith("data:image/") else item
        return base64.b64decode("".join(encoded.split()), validate=True)  # many programs write it in lines
    except ValueError:
        raise ValueError(f"This is neither base64 nor an address: {item[:60]!r}; no path is read.") from None


def check_maps(tagger, size: tuple[int, int], parameters: Mapping) -> None:
    """
    Raises:
        ValueError: heat maps were asked for that would not fit into memory.
    """
    if parameters.get("explain"):
        count = len(parameters.get("labels") or tagger.model.config.id2label)
        count = min(count, parameters.get("top_k") or count)
        if count * size[0] * size[1] > MAX_MAP_PIXELS:
            raise ValueError(
                f"explain makes a map of {size[0]} x {size[1]} pixels for each of {count} labels, {MAX_MAP_PIXELS} "
                "pixels at most; ask for fewer with labels or top_k, or send a smaller image."
            )


def as_json(labels: list[dict]) -> list[dict]:
    """Labels of an image as the pipeline gives them, with heat maps as grey PNGs in base64."""
    for label in labels:
        if "heat_map" in label:
            file = io.BytesIO()
            Image.fromarray((label["heat_map"] * 255).round().astype("uint8")).save(file, "PNG")
            label["heat_map"] = base64.b64encode(file.getvalue()).decode()
    return labels
