"""`handler.py` of a pushed folder, loaded the way the Hub's inference toolkit does."""

import base64
import importlib.util
import io
import sys

import numpy as np
import pytest
from PIL import Image

from modeling_hsvlt import MultiLabelImageClassificationPipeline, load_image
from training.publish.build import build_folder

from ..tiny_checkpoint import NAMES, save_checkpoint


def load_as_the_toolkit_does(folder):
    """`check_and_register_custom_pipeline_from_directory` of its toolkit, which PyPI does not have."""
    spec = importlib.util.spec_from_file_location("handler.EndpointHandler", folder / "handler.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler.EndpointHandler"] = module
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def photo(seed=0, size=(20, 30)):
    """The bytes of a PNG."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run, target = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("pushed")
    save_checkpoint(run / "best")
    build_folder(run, target)
    return target


@pytest.fixture(scope="module")
def handler(folder):
    return load_as_the_toolkit_does(folder)


@pytest.fixture(scope="module")
def tagger(folder):
    from transformers import pipeline

    tagger = pipeline(model=str(folder))
    assert isinstance(tagger, MultiLabelImageClassificationPipeline)
    return tagger


def as_text(image):
    return base64.b64encode(image).decode()


@pytest.mark.parametrize(
    "way",
    [
        lambda image: image,
        lambda image: Image.open(io.BytesIO(image)),
        as_text,
        lambda image: base64.encodebytes(image).decode(),
        lambda image: f"data:image/png;base64,{as_text(image)}",
    ],
    ids=["bytes", "PIL", "base64", "base64 in lines", "data URL"],
)
def test_every_way_of_giving_an_image_gives_the_pipelines_labels(handler, tagger, way):
    assert handler({"inputs": way(photo())}) == tagger(photo())
    answers = handler({"inputs": [way(photo(seed)) for seed in range(10)]})
    assert [[label["label"] for label in one] for one in answers] == [
        [label["label"] for label in one] for one in tagger([photo(seed) for seed in range(10)])
    ]
    assert handler({"inputs": [way(photo())]}) == [tagger(photo())]


def test_an_address_is_read_by_the_rules_of_the_pipeline(handler, tagger, monkeypatch):
    module = sys.modules[load_image.__module__]
    monkeypatch.setattr(module, "fetch_image", lambda url, **limits: photo())
    assert handler({"inputs": "https://example.org/a.png"}) == tagger(photo())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not on the public internet"):
        handler({"inputs": "http://127.0.0.1/a.png"})


@pytest.mark.parametrize(
    "parameters",
    [{"threshold": 0.5}, {"top_k": 1}, {"labels": ["cat"]}, {"threshold": {"dog": 0.1, "cat": 0.9, "tv monitor": 0}}],
)
def test_parameters_are_the_pipelines(handler, tagger, parameters):
    assert handler({"inputs": photo(), "parameters": parameters}) == tagger(photo(), **parameters)
    assert handler({"inputs": photo(), "parameters": {"threshold": "0.5"}}) == tagger(photo(), threshold=0.5)


def test_a_heat_map_is_a_png(handler, tagger):
    (answer,) = handler({"inputs": photo(), "parameters": {"explain": True, "labels": ["cat"]}})
    expected = tagger(photo(), explain=True, labels=["cat"])[0]["heat_map"]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["heat_map"]))))
    assert drawn.shape == (20, 30) and abs(drawn / 255 - expected).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, 'needs "inputs"'),
        (b"bytes", 'needs "inputs"'),
        ({"inputs": None}, 'needs "inputs"'),
        ({"inputs": photo(), "options": {}}, "this one has options"),
        ({"inputs": photo(), "parameters": [1]}, "must be an object"),
        ({"inputs": photo(), "parameters": {"limit": 1}}, "Unknown parameter limit"),
        ({"inputs": photo(), "parameters": {"allow_private_addresses": True}}, "Unknown parameter allow_private"),
        ({"inputs": photo(), "parameters": {"max_pixels": None}}, "Unknown parameter max_pixels"),
        ({"inputs": photo(), "parameters": {"explain": "no"}}, "explain must be true or false"),
        ({"inputs": photo(), "parameters": {"threshold": "high"}}, "threshold must be a number or auto"),
        ({"inputs": photo(), "parameters": {"threshold": 7}}, "threshold must be None, a number in"),
        ({"inputs": photo(), "parameters": {"threshold": "auto"}}, "has none"),
        ({"inputs": photo(), "parameters": {"top_k": 0}}, "top_k must be"),
        ({"inputs": photo(), "parameters": {"labels": 5}}, "labels must be a list"),
        ({"inputs": photo(), "parameters": {"labels": ["cow"]}}, "no label 'cow'"),
        ({"inputs": b"no image"}, "in no image format"),
        ({"inputs": [photo(), photo()[:50]]}, "Image 2 of 2: "),
        ({"inputs": "no base64!"}, "neither base64 nor an address"),
        ({"inputs": "file:///etc/passwd"}, "neither base64 nor an address"),
        ({"inputs": 5}, "of type int"),
        ({"inputs": [[photo()]]}, "of type list"),
        ({"inputs": {"path": "/etc/passwd"}}, "of type dict"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(handler, data, words):
    with pytest.raises(ValueError, match=words) as refused:
        handler(data)
    assert "\n" not in str(refused.value)


def test_no_file_of_the_machine_is_read(handler, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "photo").write_bytes(photo())  # its name is base64 as well
    for path in ("photo", str(folder / "photo")):
        with pytest.raises(ValueError, match=r"in no image format|neither base64"):
            handler({"inputs": path})


def test_heat_maps_that_fill_the_memory_are_refused(handler):
    wide = photo(size=(9000, 9000 // 3))
    with pytest.raises(ValueError, match=f"of {len(NAMES)} labels"):
        handler({"inputs": wide, "parameters": {"explain": True}})
