import os
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoImageProcessor, AutoProcessor, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_hsvlt import (
    HSVLTConfig,
    HSVLTForImageClassification,
    MultiLabelImageClassificationPipeline,
    MultiLabelImageProcessor,
    MultiLabelProcessor,
)
from modeling_hsvlt.processing_multilabel import load_image

TASK = "multi-label-image-classification"
NAMES = {0: "cat", 1: "dog", 2: "bird", 3: "boat", 4: "tree"}


def encoded(image, format="PNG", **kwargs):
    stream = BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def picture(seed, height=40, width=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_model(**kwargs):
    torch.manual_seed(0)
    trunk = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "patch_size": 2}
    config = HSVLTConfig.preset(
        "nano", backbone_config=trunk, label_embedding_dim=16, num_labels=5, id2label=NAMES, image_size=32, **kwargs
    )
    model = HSVLTForImageClassification(config).eval()
    with torch.no_grad():  # A fresh head gives scores that hardly differ.
        model.get_parameter("classifier.bias").copy_(torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0]))
    return model


@pytest.fixture(scope="module")
def model():
    return tiny_model(thresholds=[0.99, 0.01, 0.5, 0.01, 0.99])


@pytest.fixture(scope="module")
def image_processor():
    return MultiLabelImageProcessor(size=32)


@pytest.fixture
def tagger(model, image_processor):
    return pipeline(TASK, model=model, image_processor=image_processor, device="cpu")


def by_hand(model, image_processor, source, keep=lambda index, score: True):
    with torch.no_grad():
        logits = model(**image_processor(images=source, return_tensors="pt")).logits[0].double()
    scores = (1 / (1 + torch.exp(-logits))).tolist()
    order = sorted(NAMES, key=lambda index: -scores[index])
    return [{"label": NAMES[index], "score": scores[index]} for index in order if keep(index, scores[index])]


def assert_same(result, expected, atol=1e-5):
    assert [label["label"] for label in result] == [label["label"] for label in expected]
    for ours, theirs in zip(result, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=atol)


def test_the_task_is_registered_and_gives_every_label(tagger, model, image_processor):
    assert type(tagger) is MultiLabelImageClassificationPipeline and tagger.task == TASK
    result = tagger(picture(0))
    assert len(result) == 5
    assert_same(result, by_hand(model, image_processor, picture(0)))


def test_thresholds_and_top_k_at_the_call_and_at_the_start(model, image_processor):
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu", threshold="auto", top_k=1)
    expected = by_hand(model, image_processor, picture(0), lambda index, score: score >= model.config.thresholds[index])
    assert 1 < len(expected) < 5
    assert_same(tagger(picture(0)), expected[:1])
    assert_same(tagger(picture(0), top_k=None), expected)
    assert_same(tagger(picture(0), top_k=None, threshold=None), by_hand(model, image_processor, picture(0)))
    half = by_hand(model, image_processor, picture(0), lambda index, score: score >= 0.5)
    assert_same(tagger(picture(0), top_k=9, threshold=0.5), half)
    assert tagger(picture(0), threshold=1.0) == []
    assert_same(tagger(picture(0)), expected[:1])


class Pictures(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return picture(index)


def test_batches_lists_generators_and_datasets(tagger, model, image_processor, tmp_path):
    expected = [by_hand(model, image_processor, picture(seed)) for seed in range(5)]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(picture(seed)), "path": None} for seed in range(5)], "photo": ["x"] * 5},
        features=datasets.Features({"image": datasets.Image(), "photo": datasets.Value("string")}),
    )
    paths = []
    for seed in range(5):
        paths.append(str(tmp_path / f"{seed}.png"))
        picture(seed).save(paths[-1])
    renamed = rows.remove_columns("photo").rename_column("image", "photo")
    sources = {
        "list": lambda: [picture(seed) for seed in range(5)],
        "tuple": lambda: tuple(paths),
        "arrays": lambda: [np.asarray(picture(seed)) for seed in range(5)],
        "bytes": lambda: [encoded(picture(seed)) for seed in range(5)],
        "generator": lambda: (picture(seed) for seed in range(5)),
        "torch": Pictures,
        "datasets": lambda: rows,
        "key": lambda: KeyDataset(rows, "image"),
        "streaming": rows.to_iterable_dataset,
    }
    for batch_size in (1, 2, 8):
        for kind, source in sources.items():
            results = tagger(source(), batch_size=batch_size)
            assert isinstance(results, list) == (kind in ("list", "tuple", "arrays", "bytes")), kind
            for result, right in zip(results, expected, strict=True):
                assert_same(result, right)
        for result, right in zip(tagger(renamed, image_column="photo", batch_size=batch_size), expected, strict=True):
            assert_same(result, right)
    assert tagger([]) == [] and tagger((), batch_size=2) == []
    with pytest.raises(ValueError, match="no column 'picture', only image, photo; name the picture column"):
        tagger(rows, image_column="picture")


def test_datasets_pictures_are_read_with_the_same_care(tagger):
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 56).astype(np.uint16).reshape(40, 56))
    column = [{"bytes": encoded(deep), "path": None}, {"bytes": b"no picture", "path": "bad.jpg"}]
    rows = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": datasets.Image()}))
    results = iter(tagger(rows))
    assert_same(next(results), tagger(deep))
    with pytest.raises(ValueError, match=r"bad\.jpg is in no picture format"):
        next(results)


def test_pictures_are_read_by_load_image(tagger, tmp_path):
    four = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    sources = {
        "deep.png": (Image.fromarray(np.linspace(0, 65535, 2240).astype(np.uint16).reshape(40, 56)), {}),
        "turned.jpg": (picture(1), {"exif": exif}),
        "clear.png": (Image.fromarray(four), {}),
        "inked.tif": (
            Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56, 4), dtype=np.uint8), "CMYK"),
            {},
        ),
    }
    for name, (image, options) in sources.items():
        image.save(tmp_path / name, **options)
        assert tagger(str(tmp_path / name)) == tagger(np.asarray(load_image(tmp_path / name))), name
    with pytest.raises(ValueError, match="more than the limit of 100; shrink it or raise max_pixels"):
        tagger(str(tmp_path / "deep.png"), max_pixels=100)
    big = encoded(picture(0, 400, 640), "JPEG")
    assert_same(tagger(big, size_hint=32), tagger(load_image(big, size_hint=32)), atol=0)
    with pytest.raises(ValueError, match=r"gone\.jpg does not exist"):
        tagger([picture(0), "gone.jpg"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, image_processor):
    expected = by_hand(tiny_model(), image_processor, picture(0))
    tagger = pipeline(TASK, model=tiny_model().to(dtype), image_processor=image_processor, device="cpu")
    assert tagger.dtype == dtype
    scores = {label["label"]: label["score"] for label in tagger([picture(0), picture(1)], batch_size=2)[0]}
    for label in expected:
        assert scores[label["label"]] == pytest.approx(label["score"], abs=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, image_processor):
    expected = by_hand(tiny_model(), image_processor, picture(0))
    tagger = pipeline(TASK, model=tiny_model().to(dtype), image_processor=image_processor, device=0)
    assert tagger.model.device.type == "cuda"
    for result in (tagger(picture(0)), tagger([picture(0)] * 3, batch_size=2)[2]):
        scores = {label["label"]: label["score"] for label in result}
        for label in expected:
            assert scores[label["label"]] == pytest.approx(label["score"], abs=0.03)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"threshold": 2}, "threshold must be None, a number"),
        ({"threshold": "auto"}, "this checkpoint has none"),
        ({"top_k": 0}, "top_k must be None or a whole number from 1, but it is 0"),
        ({"top_k": 1.5}, "top_k must be"),
        ({"topk": 3}, "Unknown parameter topk; there are threshold, top_k, batch_size"),
    ],
)
def test_parameters_that_cannot_work_are_refused_before_the_first_picture(kwargs, message, image_processor):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=model, image_processor=image_processor, device="cpu", **kwargs)
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    with pytest.raises(ValueError, match=message):
        tagger((picture(seed) for seed in range(2)), **kwargs)


def test_a_model_of_one_label_a_picture_is_refused(image_processor):
    model = tiny_model()
    model.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match="single_label_classification, whose scores are no sigmoids"):
        pipeline(TASK, model=model, image_processor=image_processor, device="cpu")


def test_equals_the_stock_pipeline(model, image_processor, tagger):
    stock = pipeline("image-classification", model=model, image_processor=image_processor, device="cpu")
    assert_same(stock(picture(0), top_k=3), tagger(picture(0), top_k=3))


def test_a_saved_pipeline_loads_with_every_auto_class(tagger, tmp_path, model):
    tagger.save_pretrained(tmp_path)
    files = set(os.listdir(tmp_path))
    assert {"modeling_hsvlt.py", "pipeline_multilabel.py", "processing_multilabel.py", "processor_config.json"} <= files
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is MultiLabelProcessor and processor.thresholds == model.config.thresholds
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is MultiLabelImageProcessor
    # Who has the package needs to trust no code: the class is named.
    kwargs = {"model": str(tmp_path), "pipeline_class": MultiLabelImageClassificationPipeline, "device": "cpu"}
    again = pipeline(TASK, **kwargs)
    assert again(picture(0), threshold="auto") == tagger(picture(0), threshold="auto")
