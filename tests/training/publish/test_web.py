"""The folders for a browser and for transformers.js; `make web-test` drives them in Chromium and in Node."""

import csv
import io
import json
import re
import shutil
import subprocess
import zipfile

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper
from PIL import Image

from modeling_hsvlt import MultiLabelImageProcessor, load_image
from training.export import main
from training.publish.onnxruntime_web import FILES
from training.publish.to_onnx import metadata, write_metadata
from training.publish.web import (
    BROWSER,
    JS_INT8,
    JS_MODEL,
    RESAMPLES,
    TRANSFORMERS_JS_FILES,
    WEB_FILES,
    pixel_settings,
    write_transformers_js,
    write_web,
)
from training.tagging.xmp import EMPTY_XMP, with_keywords

from ..tiny_checkpoint import save_checkpoint, tiny_model

HOSTILE = "</script><img src=x onerror=alert(1)>: 'a' # \"b\""
NAMES = ["dog", HOSTILE, "=1+1"]
node = pytest.mark.skipif(shutil.which("node") is None, reason="There is no Node.js")


def facts(**settings) -> dict[str, str]:
    processor = MultiLabelImageProcessor(**{"size": {"height": 24, "width": 40}, **settings})
    return metadata(tiny_model(NAMES, thresholds=[0.2, 0.3, 0.4]), processor)


def save_model(path, **changes) -> None:
    """An ONNX file of no use but for its metadata."""
    value = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["pixel_values"], ["logits"])], "graph", [value], [logits])
    proto = helper.make_model(graph)
    write_metadata(proto, {**facts(), **changes})
    onnx.save(proto, path)


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def test_a_page_whose_words_are_data(tmp_path):
    save_model(tmp_path / "model_int8.onnx", quantization="dynamic int8", thresholds="[0.1, 0.2, 0.9]")
    runtime = {name: name.encode() for name in FILES}
    write_web(tmp_path, tmp_path / "model_int8.onnx", HOSTILE, heat_map=True, runtime=runtime)
    assert files_of(tmp_path) == {*WEB_FILES, "model_int8.onnx"}
    settings = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert (settings["file"], settings["int8"], settings["heat_map"]) == ("model_int8.onnx", True, True)
    assert settings["labels"] == NAMES and settings["thresholds"] == [0.1, 0.2, 0.9]
    assert front_matter(tmp_path)["title"] == HOSTILE and front_matter(tmp_path)["sdk"] == "static"
    # What a user gives is in no file that is code, and no code writes HTML.
    for name in WEB_FILES:
        if name.endswith((".html", ".mjs", ".css")) and "/" not in name:
            text = (tmp_path / name).read_text(encoding="utf-8")
            assert "onerror=" not in text and not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", text)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "http" not in policy
    named = set(re.findall(r'(?:src|href)="([^"#:]+)"', page)) | {
        name for file in tmp_path.glob("*.mjs") for name in re.findall(r'from "\./([^"]+)"', file.read_text())
    }
    assert named and all((tmp_path / name).is_file() for name in named)


def test_a_folder_for_transformers_js(tmp_path):
    save_model(tmp_path / "model.onnx")
    save_model(tmp_path / "model_int8.onnx", thresholds="[0.5, 0.6, 0.7]")
    write_transformers_js(tmp_path, tmp_path / "model.onnx", tmp_path / "model_int8.onnx")
    assert files_of(tmp_path) == set(TRANSFORMERS_JS_FILES) and {JS_MODEL, JS_INT8} < set(TRANSFORMERS_JS_FILES)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {str(index): name for index, name in enumerate(NAMES)}
    assert (config["thresholds"], config["thresholds_q8"]) == ([0.2, 0.3, 0.4], [0.5, 0.6, 0.7])
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert processor["size"] == {"height": 24, "width": 40} and processor["image_mean"]


@pytest.mark.parametrize("layout", ["web", "transformers_js"])
def test_a_checkpoint_is_not_written_over(layout, tmp_path, capsys):
    save_checkpoint(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main([str(tmp_path), str(tmp_path), "--layout", layout, "--overwrite"]) == 2
    assert "holds a checkpoint" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_processor_that_the_page_cannot_stand_in_for():
    with pytest.raises(ValueError, match="this processor by mks2013"):
        pixel_settings(facts(resample=Image.Resampling.MKS2013))
    with pytest.raises(ValueError, match="does both"):
        pixel_settings(facts(resize_mode="pad", do_center_crop=True, crop_size={"height": 8, "width": 8}))


PROCESSORS = {
    **{name: {"resample": Image.Resampling[name.upper()]} for name in RESAMPLES},
    "pad": {"resize_mode": "pad", "image_mean": [0.3, 0.5, 0.7]},
    "crop": {
        "size": {"shortest_edge": 33},
        "do_center_crop": True,
        "crop_size": {"height": 24, "width": 30},
    },
    "crop beyond": {
        "size": {"shortest_edge": 21, "longest_edge": 50},
        "do_center_crop": True,
        "crop_size": {"height": 40, "width": 40},
    },
    "plain": {"do_normalize": False, "do_rescale": False},
    "crop alone": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 24, "width": 31}},
}
SIZES = [(64, 48), (48, 65), (1, 1), (40, 24), (3, 200), (200, 3), (33, 77), (151, 20)]
RUN = """
import fs from "node:fs";
import { normalise, onWhite, prepare } from "BROWSER/pixels.mjs";
const { cases, processors } = JSON.parse(fs.readFileSync("cases.json"));
const parts = [];
for (const settings of Object.values(processors)) for (const [file, width, height, channels] of cases) {
  const { rgb } = prepare(onWhite(fs.readFileSync(file), channels), width, height, settings);
  parts.push(Buffer.from(normalise(rgb, settings).buffer));
}
fs.writeFileSync("pixels.bin", Buffer.concat(parts));
"""


@node
def test_pixels_are_those_of_the_processor(tmp_path):
    rng = np.random.default_rng(0)
    images, cases = [], []
    for number, (width, height) in enumerate(SIZES):
        for channels in (1, 2, 3, 4):
            array = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
            (tmp_path / f"{number}-{channels}").write_bytes(array.tobytes())
            cases.append([f"{number}-{channels}", width, height, channels])
            images.append(load_image(Image.fromarray(array.squeeze(-1) if channels == 1 else array)))
    processors = {name: pixel_settings(facts(**settings)) for name, settings in PROCESSORS.items()}
    (tmp_path / "cases.json").write_text(json.dumps({"cases": cases, "processors": processors}))
    (tmp_path / "run.mjs").write_text(RUN.replace("BROWSER", BROWSER.as_posix()))
    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True)
    found, place = np.fromfile(tmp_path / "pixels.bin", np.float32), 0
    for name, settings in PROCESSORS.items():
        processor = MultiLabelImageProcessor(**{"size": {"height": 24, "width": 40}, **settings})
        for case, image in zip(cases, images, strict=True):
            wanted = processor(images=image, return_tensors="np")["pixel_values"]
            pixels = found[place : place + wanted.size].reshape(wanted.shape)
            # A level of 255 is 1.7e-2 here: the bytes are the same.
            np.testing.assert_allclose(pixels, wanted, rtol=1e-6, atol=1e-6, err_msg=f"{name} {case}")
            place += wanted.size
    assert place == len(found)


@node
def test_tables_and_sidecars(tmp_path):
    labels = ["dog", HOSTILE, "a\x07b", "été, & 漢", 'say "so"\nthere']
    paths = ["1.jpg", 'folder/a, "b".png']
    script = f"""
    import fs from "node:fs";
    import {{ csv, xmp, zip }} from "{BROWSER.as_posix()}/files.mjs";
    const [labels, paths] = {json.dumps([labels, paths])};
    const images = paths.map((path, i) => ({{ path, found: i ? [0, 3] : [], scores: labels.map((_, k) => k / 8) }}));
    fs.writeFileSync("labels.csv", csv(labels, images));
    const archive = zip(paths.map(path => [path + ".xmp", xmp(labels)]));
    fs.writeFileSync("sidecars.zip", Buffer.from(await archive.arrayBuffer()));
    """
    (tmp_path / "run.mjs").write_text(script, encoding="utf-8")
    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True)
    header, *rows = csv.reader(io.StringIO((tmp_path / "labels.csv").read_bytes().decode(), newline=""))
    assert header == ["file_name", "labels", *labels]
    assert [row[:2] for row in rows] == [["1.jpg", ""], [paths[1], "dog|été, & 漢"]]
    assert [float(score) for score in rows[0][2:]] == [0, 0.125, 0.25, 0.375, 0.5]
    with zipfile.ZipFile(tmp_path / "sidecars.zip") as archive:
        assert archive.testzip() is None and archive.namelist() == [f"{path}.xmp" for path in paths]
        for path in paths:
            assert archive.read(f"{path}.xmp") == with_keywords(EMPTY_XMP.encode(), labels, tmp_path / path)
