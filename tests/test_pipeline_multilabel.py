import copy
import json
import math
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
    MultiLabelImageClassificationPipeline,
    MultiLabelImageProcessor,
    MultiLabelProcessor,
)
from modeling_hsvlt.heat_maps_multilabel import (
    _activation_maps,
    _patch_maps,
    image_box,
    label_heat_maps,
    resize_to_image,
    scored_heat_maps,
)
from modeling_hsvlt.label_context import LabelContext
from modeling_hsvlt.label_prompts import encode_labels
from modeling_hsvlt.load_image import load_image
from modeling_hsvlt.pipeline_multilabel import LOAD_PARAMETERS

from .test_label_context import ENCODER as BERT
from .test_label_context import TOKENIZER as BERT_TOKENIZER
from .tiny_clip import tiny_clip, tiny_clip_tokenizer
from .tolerance import assert_close_outputs

TASK = "multi-label-image-classification"
NAMES = {0: "cat", 1: "dog", 2: "bird", 3: "boat", 4: "tree"}


def encoded(image, format="PNG", **kwargs):
    stream = BytesIO()
    image.save(stream, format, **kwargs)
    return stream.getvalue()


def image(seed, height=40, width=56):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_model(**kwargs):
    torch.manual_seed(0)
    backbone = {"model_type": "convnext", "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "patch_size": 2}
    config = HSVLTConfig.preset(
        "nano", backbone_config=backbone, label_embedding_dim=16, num_labels=5, id2label=NAMES, image_size=32, **kwargs
    )
    model = HSVLTForImageClassification(config).eval()
    with torch.no_grad():  # A fresh head gives scores that hardly differ.
        bias = model.get_parameter("classifier.bias")
        bias.copy_(torch.tensor([1.0, -1.0, 0.5, -2.0, 0.0])[: len(bias)])
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


def assert_same(result, expected):
    assert [label["label"] for label in result] == [label["label"] for label in expected]
    assert_close_outputs([label["score"] for label in result], [label["score"] for label in expected])


def test_the_task_is_registered_and_gives_every_label(tagger, model, image_processor):
    assert type(tagger) is MultiLabelImageClassificationPipeline and tagger.task == TASK
    result = tagger(image(0))
    assert len(result) == 5
    assert_same(result, by_hand(model, image_processor, image(0)))


def test_thresholds_and_top_k_at_the_call_and_at_the_start(model, image_processor):
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu", threshold="auto", top_k=1)
    expected = by_hand(model, image_processor, image(0), lambda index, score: score >= model.config.thresholds[index])
    assert 1 < len(expected) < 5
    assert_same(tagger(image(0)), expected[:1])
    assert_same(tagger(image(0), top_k=None), expected)
    assert_same(tagger(image(0), top_k=None, threshold=None), by_hand(model, image_processor, image(0)))
    half = by_hand(model, image_processor, image(0), lambda index, score: score >= 0.5)
    assert_same(tagger(image(0), top_k=9, threshold=0.5), half)
    assert tagger(image(0), threshold=1.0) == []
    assert_same(tagger(image(0)), expected[:1])


def test_thresholds_and_labels_of_every_kind(tagger, model, image_processor):
    everything = by_hand(model, image_processor, image(0))
    scores = {label["label"]: label["score"] for label in everything}
    cuts = dict(zip(scores, [0.0, 1.0, 0.0, 0.0, 1.0], strict=True))
    own = [cuts[name] for name in NAMES.values()]
    expected = [label for label in everything if cuts[label["label"]] == 0]
    for threshold in (own, tuple(own), np.array(own), torch.tensor(own), cuts):
        assert_same(tagger(image(0), threshold=threshold), expected)
        assert_same(tagger(image(0), threshold=threshold, top_k=np.int64(2)), expected[:2])
    assert_same(tagger(image(0), threshold=np.float32(0)), everything)
    # With some labels alone: a number for each of them, or by name, which may name more.
    names = [expected[1]["label"], everything[1]["label"], expected[0]["label"]]
    for labels in (names, tuple(names), np.array(names), iter(names), dict.fromkeys(names)):
        assert_same(tagger(image(0), labels=labels, threshold=[0, 1, 0]), expected[:2])
    assert_same(tagger(image(0), labels=names, threshold=cuts), expected[:2])
    assert_same(tagger(image(0), labels=names, threshold={name: cuts[name] for name in names}), expected[:2])
    some = pipeline(TASK, model=model, image_processor=image_processor, device="cpu", labels=names)
    assert_same(some(image(0), threshold=[0, 1, 0]), expected[:2])
    with pytest.raises(ValueError, match="5 numbers for 3 labels"):
        some(image(0), threshold=own)
    with pytest.raises(ValueError, match="no number for 'tree'"):
        tagger(image(0), threshold={"cat": 0.5, "dog": 0.5, "bird": 0.5, "boat": 0.5})


class Images(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return image(index)


def test_batches_lists_generators_and_datasets(tagger, model, image_processor, tmp_path):
    expected = [by_hand(model, image_processor, image(seed)) for seed in range(5)]
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(image(seed)), "path": None} for seed in range(5)], "photo": ["x"] * 5},
        features=datasets.Features({"image": datasets.Image(), "photo": datasets.Value("string")}),
    )
    paths = []
    for seed in range(5):
        paths.append(str(tmp_path / f"{seed}.png"))
        image(seed).save(paths[-1])
    renamed = rows.remove_columns("photo").rename_column("image", "photo")
    decoded = rows.with_transform(lambda batch: {"image": [image.copy() for image in batch["image"]]})
    sources = {
        "list": lambda: [image(seed) for seed in range(5)],
        "tuple": lambda: tuple(paths),
        "arrays": lambda: [np.asarray(image(seed)) for seed in range(5)],
        "bytes": lambda: [encoded(image(seed)) for seed in range(5)],
        "generator": lambda: (image(seed) for seed in range(5)),
        "torch": Images,
        "datasets": lambda: rows,
        "key": lambda: KeyDataset(rows, "image"),
        "streaming": rows.to_iterable_dataset,
        "column": lambda: rows["image"],
        "streamed column": lambda: rows.to_iterable_dataset()["image"],
        "column of a transformed dataset": lambda: decoded["image"],
        "transformed": lambda: decoded,
        "iterator": lambda: iter(paths),
        "map": lambda: map(image, range(5)),
        "list of Path": lambda: [tmp_path / f"{seed}.png" for seed in range(5)],
        "list of rows": lambda: [{"bytes": encoded(image(seed))} for seed in range(5)],
        "array of paths": lambda: np.array(paths),
        "batch": lambda: np.stack([np.asarray(image(seed)) for seed in range(5)]),
        "batch of tensors": lambda: torch.stack([torch.from_numpy(np.array(image(seed))) for seed in range(5)]),
    }
    lists = ("list", "list of Path", "list of rows", "tuple", "arrays", "array of paths", "bytes", "batch")
    for batch_size in (1, 2, 8):
        for kind, source in sources.items():
            results = tagger(source(), batch_size=batch_size)
            assert isinstance(results, list) == (kind in (*lists, "batch of tensors")), kind
            for result, right in zip(results, expected, strict=True):
                assert_same(result, right)
        for result, right in zip(tagger(renamed, image_column="photo", batch_size=batch_size), expected, strict=True):
            assert_same(result, right)
    none = rows.select([])
    for batch_size in (1, 2):
        for nothing in ([], (), iter([]), np.zeros((0, 4, 5, 3)), none, none["image"], KeyDataset(none, "image")):
            assert list(tagger(nothing, batch_size=batch_size)) == []
    for one in (tmp_path / "0.png", {"path": paths[0]}, rows["image"][0], np.asarray(image(0))):
        assert_same(tagger(one), expected[0])
    with open(paths[0], "rb") as file:
        assert_same(tagger(file), expected[0])
    with pytest.raises(ValueError, match="has the splits train, test; give one of them"):
        tagger(datasets.DatasetDict({"train": rows, "test": rows}))
    with pytest.raises(ValueError, match=r"\(list\) is no image; give a path"):
        tagger([paths[:2], paths[2:]])
    with pytest.raises(ValueError, match="no column 'drawing', only image, photo; name the image column"):
        tagger(rows, image_column="drawing")


def test_datasets_images_are_read_with_the_same_care(tagger):
    deep = Image.fromarray(np.linspace(0, 65535, 40 * 56).astype(np.uint16).reshape(40, 56))
    column = [{"bytes": encoded(deep), "path": None}, {"bytes": b"no image", "path": "bad.jpg"}]
    rows = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": datasets.Image()}))
    results = iter(tagger(rows))
    assert_same(next(results), tagger(deep))
    with pytest.raises(ValueError, match=r"bad\.jpg is in no image format"):
        next(results)


def test_images_are_read_by_load_image(tagger, tmp_path):
    four = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    sources = {
        "deep.png": (Image.fromarray(np.linspace(0, 65535, 2240).astype(np.uint16).reshape(40, 56)), {}),
        "turned.jpg": (image(1), {"exif": exif}),
        "clear.png": (Image.fromarray(four), {}),
        "inked.tif": (
            Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56, 4), dtype=np.uint8), "CMYK"),
            {},
        ),
    }
    for name, (source, options) in sources.items():
        source.save(tmp_path / name, **options)
        assert_same(tagger(str(tmp_path / name)), tagger(np.asarray(load_image(tmp_path / name))))
    with pytest.raises(ValueError, match="more than the limit of 100; shrink it or raise max_pixels"):
        tagger(str(tmp_path / "deep.png"), max_pixels=100)
    big = encoded(image(0, 400, 640), "JPEG")
    assert_same(tagger(big, size_hint=32), tagger(load_image(big, size_hint=32)))
    with pytest.raises(ValueError, match=r"gone\.jpg does not exist"):
        tagger([image(0), "gone.jpg"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, image_processor):
    expected = by_hand(tiny_model(), image_processor, image(0))
    tagger = pipeline(TASK, model=tiny_model().to(dtype), image_processor=image_processor, device="cpu")
    assert tagger.dtype == dtype
    scores = {label["label"]: label["score"] for label in tagger([image(0), image(1)], batch_size=2)[0]}
    for label in expected:
        assert scores[label["label"]] == pytest.approx(label["score"], abs=0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, image_processor):
    expected = by_hand(tiny_model(), image_processor, image(0))
    tagger = pipeline(TASK, model=tiny_model().to(dtype), image_processor=image_processor, device=0)
    assert tagger.model.device.type == "cuda"
    for result in (tagger(image(0)), tagger([image(0)] * 3, batch_size=2)[2]):
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
        ({"topk": 3}, "Unknown parameter topk; there are threshold, top_k, labels, explain, batch_size"),
        ({"labels": ["cat", "cow"]}, "no label 'cow'; model.config.id2label lists"),
        ({"labels": "cat"}, "labels must be a list of label names, but it is 'cat'"),
        ({"labels": []}, "labels must be a list"),
        ({"labels": ["cat", "cat"]}, "names one label twice"),
        ({"labels": ()}, r"labels must be a list of label names, but it is \[\]"),
        ({"labels": 3}, "labels must be a list of label names, but it is 3"),
        ({"labels": np.array(["cow"])}, "no label 'cow'; model"),
        ({"labels": [0]}, "no label '0'; model"),
        ({"threshold": [0.5]}, "threshold has 1 numbers for 5 labels"),
        ({"threshold": [0.5], "labels": ["cat", "dog"]}, "threshold has 1 numbers for 2 labels"),
        ({"threshold": {"cow": 0.5}}, "threshold has no number for 'cat'"),
        ({"threshold": {"cow": 0.5, "cat": 0.5}, "labels": ["cat"]}, "a number for 'cow', which is no label"),
        ({"threshold": float("nan")}, "threshold must be"),
    ],
)
def test_parameters_that_cannot_work_are_refused_before_the_first_image(kwargs, message, image_processor):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        pipeline(TASK, model=model, image_processor=image_processor, device="cpu", **kwargs)
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    with pytest.raises(ValueError, match=message):
        tagger((image(seed) for seed in range(2)), **kwargs)


def test_a_model_of_one_label_a_image_is_refused(image_processor):
    model = tiny_model()
    model.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match="single_label_classification, whose scores are no sigmoids"):
        pipeline(TASK, model=model, image_processor=image_processor, device="cpu")


def test_equals_the_stock_pipeline(model, image_processor, tagger):
    stock = pipeline("image-classification", model=model, image_processor=image_processor, device="cpu")
    assert_same(stock(image(0), top_k=3), tagger(image(0), top_k=3))


def test_a_saved_pipeline_loads_with_every_auto_class(tagger, tmp_path, model):
    tagger.save_pretrained(tmp_path)
    files = set(os.listdir(tmp_path))
    assert {"modeling_hsvlt.py", "pipeline_multilabel.py", "processing_multilabel.py", "processor_config.json"} <= files
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is MultiLabelProcessor and processor.thresholds == model.config.thresholds
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is MultiLabelImageProcessor
    # Who has the package needs to trust no code, and need not name the task.
    for task, trust in ((TASK, None), (None, None), (TASK, False), (None, True)):
        again = pipeline(task, model=str(tmp_path), device="cpu", trust_remote_code=trust)
        assert type(again) is MultiLabelImageClassificationPipeline
        assert_same(again(image(0), threshold="auto"), tagger(image(0), threshold="auto"))
    again.save_pretrained(tmp_path / "again")
    saved = [
        json.loads((tmp_path / folder / "config.json").read_text())["custom_pipelines"] for folder in (".", "again")
    ]
    assert list(saved[0]) == [TASK] and saved[0] == saved[1], "those without the package find it"


def test_a_processor_alone_is_enough(model, image_processor, tagger):
    processor = MultiLabelProcessor(image_processor, NAMES)
    alone = MultiLabelImageClassificationPipeline(model=model, processor=processor, device="cpu")
    images = [image(seed) for seed in range(3)]
    for one, other in zip(alone(images, batch_size=2), tagger(images, batch_size=2), strict=True):
        assert_same(one, other)


def test_labels_restrict_and_only_they_are_computed(image_processor):
    model = tiny_model()
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    everything = {label["label"]: label["score"] for label in tagger(image(0))}
    asked = []
    model.hsvlt.register_forward_pre_hook(lambda *args: asked.append(args[2]["text_embeddings"]), with_kwargs=True)
    names = ["tree", "cat", "boat"]
    for result in tagger([image(0), image(0)], labels=names, batch_size=2):
        assert {label["label"] for label in result} == set(names)
        assert [label["score"] for label in result] == sorted((label["score"] for label in result), reverse=True)
        for label in result:
            assert label["score"] == pytest.approx(everything[label["label"]], abs=1e-6)
    assert torch.equal(asked[0], model.hsvlt.label_embeddings.weight[[4, 0, 3]]) and len(asked) == 1


def test_thresholds_belong_to_their_labels_when_restricted(tagger, model):
    found = {label["label"] for label in tagger(image(0), threshold="auto")}
    names = ["boat", "dog", "cat"]
    assert {label["label"] for label in tagger(image(0), threshold="auto", labels=names)} == found & set(names)
    assert found & set(names) not in (set(), set(names))
    assert len(tagger(image(0), labels=names, top_k=2)) == 2


@pytest.mark.parametrize("residual_attention", [False, True])
def test_candidates_alone_are_given_and_explained_unless_others_are_asked_for(residual_attention, image_processor):
    model = tiny_model(candidate_labels=2, residual_attention=residual_attention, thresholds=[0.0] * 5)
    images = [image(seed) for seed in range(8)]
    with torch.no_grad():  # Images whose candidates differ, and attention that differs between labels.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if residual_attention:
            model.residual_attention.weight.normal_()
        scorer, pixels = model.candidate_scorer, image_processor(images=images, return_tensors="pt")["pixel_values"]
        scorer.weight.normal_()
        scorer.bias.sub_(scorer(list(model.hsvlt.backbone(pixels)), model.hsvlt.label_embeddings()).mean(0))
    whole = HSVLTForImageClassification(copy.deepcopy(model.config)).eval()
    whole.config.candidate_labels = whole.candidate_scorer = None
    whole.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("candidate_scorer")})
    tagger, full = (pipeline(TASK, model=m, image_processor=image_processor, device="cpu") for m in (model, whole))
    every = [{label["label"]: label for label in result} for result in full(images, explain=True, batch_size=4)]
    chosen = set()
    for threshold in (None, 0.0, "auto", [0.0] * 5):
        for explain in (False, True):
            for result, right in zip(
                tagger(images, threshold=threshold, explain=explain, batch_size=4), every, strict=True
            ):
                assert len(result) == 2, "what was not scored is no result, whatever the threshold"
                chosen.add(frozenset(label["label"] for label in result))
                assert result[0]["score"] >= result[1]["score"]
                for label in result:
                    assert label["score"] == pytest.approx(right[label["label"]]["score"], abs=1e-5)
                    if explain:
                        np.testing.assert_allclose(label["heat_map"], right[label["label"]]["heat_map"], atol=1e-4)
    assert len(chosen) > 1
    names = ["tree", "cat", "boat"]
    for explain in (False, True):
        for result, right in zip(tagger(images, labels=names, explain=explain), every, strict=True):
            assert {label["label"] for label in result} == set(names)
            for label in result:
                assert label["score"] == pytest.approx(right[label["label"]]["score"], abs=1e-5)
                if explain:
                    np.testing.assert_allclose(label["heat_map"], right[label["label"]]["heat_map"], atol=1e-4)
    pixels = image_processor(images=images[:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        for ours, theirs in zip(label_heat_maps(model, pixels), label_heat_maps(whole, pixels), strict=True):
            assert ours.shape[:2] == (2, 5), "all labels, also those that are no candidates"
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_labels_of_a_model_without_class_ids(image_processor):
    torch.manual_seed(0)
    model = MlTrForImageClassification(MlTrConfig.preset("nano", num_labels=5, id2label=NAMES, image_size=32)).eval()
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    everything = {label["label"]: label["score"] for label in tagger(image(0))}
    for label in tagger([image(0)] * 2, labels=["tree", "dog"], batch_size=2)[1]:
        assert label["score"] == pytest.approx(everything[label["label"]], abs=1e-6)


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        data = encoded(image(3))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_images_by_url(tagger):
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/image.png"
        # This very computer is refused unless allowed: a stranger's URL must not lead into a network.
        local = {"allow_private_addresses": True} if "allow_private_addresses" in LOAD_PARAMETERS else {}
        assert_same(tagger([url, image(3)], batch_size=2, **local)[0], tagger(image(3)))
        server.shutdown()


# Heat maps


def test_hsvlt_s_maps_are_its_attention(model, image_processor):
    pixels = image_processor(images=[image(0), image(1)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits, maps = label_heat_maps(model, pixels)
        output = model(pixel_values=pixels, output_attentions=True)
        for stage, attention in enumerate(output.attentions):
            alone = label_heat_maps(model, pixels, torch.tensor([3, 0]), stages=[stage])[1]
            expected = attention.mean(1)[:, [3, 0]].flatten(2)
            low, high = expected.amin(-1, keepdim=True), expected.amax(-1, keepdim=True)
            torch.testing.assert_close(alone.flatten(2), (expected - low) / (high - low))
    torch.testing.assert_close(logits, output.logits)
    assert maps.shape == (2, 5, *output.attentions[0].shape[-2:])
    assert maps.amin((-2, -1)).unique().tolist() == [0.0] and maps.amax((-2, -1)).unique().tolist() == [1.0]


def test_a_map_shares_residual_attention_as_the_logit_does():
    model = tiny_model(residual_attention=True, residual_attention_weight=0.75)
    torch.nn.init.normal_(model.residual_attention.weight)
    pixels, ids = torch.rand(2, 3, 64, 64), torch.tensor([4, 1])
    with torch.no_grad():
        _, maps = label_heat_maps(model, pixels, ids)
        output = model(pixel_values=pixels, output_attentions=True, output_hidden_states=True)
        last = output.hidden_states[-1]
        weight = model.residual_attention.weight[ids]
        scores = torch.einsum("nc,bcp->bnp", weight, model.residual_attention.norm(last.flatten(2).mT).mT).softmax(-1)
        size = output.attentions[0].shape[-2:]
        attention, residual = 0, scores.unflatten(-1, last.shape[-2:])
        for each in output.attentions:
            each = each.mean(1)[:, ids]
            certainty = 1 - torch.special.entr(each).sum((-2, -1)) / math.log(each[0, 0].numel())
            each = torch.nn.functional.interpolate(each, size, mode="bilinear", align_corners=False).flatten(2)
            attention = attention + certainty[..., None] * each / each.amax(-1, keepdim=True)
        residual = torch.nn.functional.interpolate(residual, size, mode="bilinear", align_corners=False).flatten(2)
        expected = sum(
            share * each / each.sum(-1, keepdim=True)
            for share, each in zip([0.25, 0.75], [attention, residual], strict=True)
        )
    low, high = expected.amin(-1, keepdim=True), expected.amax(-1, keepdim=True)
    torch.testing.assert_close(maps.flatten(2), (expected - low) / (high - low))


@pytest.mark.parametrize("sharp", range(4))
def test_a_map_is_that_of_the_stage_that_looks_somewhere(model, monkeypatch, sharp):
    """Three stages that attend uniformly add nothing to the fourth, be its cells few or many."""
    attentions = [torch.full((1, 2, 5, side, side), 1 / side**2) for side in (16, 8, 4, 2)]
    attentions[sharp] = torch.rand_like(attentions[sharp]).flatten(-2).softmax(-1).unflatten(-1, (16 >> sharp,) * 2)
    output = model(pixel_values=torch.rand(1, 3, 64, 64), output_attentions=True)
    output.attentions = tuple(attentions)
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: output)
    _, together = label_heat_maps(model, torch.rand(1, 3, 64, 64))
    expected = attentions[sharp].mean(1)
    expected = torch.nn.functional.interpolate(expected, (16, 16), mode="bilinear", align_corners=False)
    low, high = expected.amin((-2, -1), keepdim=True), expected.amax((-2, -1), keepdim=True)
    torch.testing.assert_close(together, (expected - low) / (high - low), atol=1e-3, rtol=0)


def test_uniform_attention_makes_a_flat_map(model, monkeypatch):
    output = model(pixel_values=torch.rand(1, 3, 64, 64), output_attentions=True)
    output.attentions = tuple(torch.full((1, 1, 5, side, side), 1 / side**2) for side in (8, 4, 2, 1))
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: output)
    assert label_heat_maps(model, torch.rand(1, 3, 64, 64))[1].isfinite().all()


def test_mltr_s_maps_average_to_the_logit():
    torch.manual_seed(0)
    model = MlTrForImageClassification(MlTrConfig.preset("nano", num_labels=5, id2label=NAMES, image_size=64)).eval()
    with torch.no_grad():
        raw = _activation_maps(model, torch.rand(2, 3, 64, 64), None, None)
        chosen = label_heat_maps(model, torch.rand(2, 3, 64, 64), torch.tensor([4, 1]))
    torch.testing.assert_close(raw[1].mean((-2, -1)), raw[0])
    assert chosen[0].shape == (2, 2) and chosen[1].shape[:2] == (2, 2)


def hp_dval(**kwargs):
    tokenizer = tiny_clip_tokenizer()
    names = ["cat", "dog", "bird"]
    clip = tiny_clip(tokenizer)
    return HPDVALForImageClassification.from_clip(
        clip, tokenizer, names, **{"local_top_k": 4} | kwargs
    ).eval(), tokenizer


def test_hp_dval_s_maps_are_the_scores_that_its_local_view_averages():
    model = hp_dval(alpha=0.0)[0]
    with torch.no_grad():
        logits, raw, _ = _patch_maps(model, torch.rand(2, 3, 32, 32), None, None)
    assert raw.shape == (2, 3, 4, 4)
    local = raw.flatten(2).topk(4).values.mean(-1)
    torch.testing.assert_close(local * model.scale.logit_scale.exp() + model.scale.logit_bias, logits)
    with pytest.raises(ValueError, match="alpha=1"):
        label_heat_maps(hp_dval(alpha=1.0)[0], torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("family", ["hsvlt", "mltr", "hp_dval"])
def test_maps_of_some_labels_with_the_logits_of_all(family):
    torch.manual_seed(0)
    families = {
        "hsvlt": lambda: tiny_model(residual_attention=True),
        "mltr": lambda: MlTrForImageClassification(MlTrConfig.preset("nano", num_labels=5, image_size=64)).eval(),
        "hp_dval": lambda: hp_dval(alpha=0.0)[0],
    }
    model, side = families[family](), 32 if family == "hp_dval" else 64
    pixels, some = torch.rand(2, 3, side, side), torch.tensor([2, 0])
    with torch.no_grad():
        logits, maps = label_heat_maps(model, pixels)
        found, chosen, labels = scored_heat_maps(model, pixels, maps_of=some)
    assert_close_outputs(found, logits)
    assert_close_outputs(chosen, maps[:, some])
    assert labels.tolist() == [[2, 0]] * 2


def test_a_model_without_maps_says_so(tagger):
    tagger.model.config.__class__.model_type, before = "resnet", tagger.model.config.model_type
    try:
        with pytest.raises(ValueError, match="type 'resnet' has no heat maps; HSVLT, MlTr and HP-DVAL have"):
            tagger(image(0), explain=True)
    finally:
        tagger.model.config.__class__.model_type = before


@pytest.mark.parametrize(
    ("options", "box"),
    [
        ({"size": 32}, (0, 0, 1, 1)),
        ({"size": {"height": 32, "width": 48}, "resize_mode": "pad"}, None),
        ({"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": 32}, None),
        ({"do_resize": False}, (0, 0, 1, 1)),
    ],
)
def test_a_place_in_the_image_is_found_again(options, box):
    """A bright square goes through the real processor; what it leaves in the input is brought back onto the image."""
    canvas = np.zeros((60, 120, 3), np.uint8)
    canvas[24:36, 66:84] = 255
    processor = MultiLabelImageProcessor(**options, do_normalize=False, resample=0)
    seen = processor(images=canvas, return_tensors="pt")["pixel_values"][0, :1]
    found = image_box(processor, 120, 60)
    assert box is None or found == box
    back = resize_to_image(seen, 120, 60, found)[0]
    assert back.shape == (60, 120)
    rows, columns = (back > 0.5).nonzero(as_tuple=True)
    assert (rows.min(), rows.max()) == (pytest.approx(24, abs=2), pytest.approx(35, abs=2))
    assert (columns.min(), columns.max()) == (pytest.approx(66, abs=2), pytest.approx(83, abs=2))


def test_what_a_centre_crop_cut_off_is_not_marked():
    processor = MultiLabelImageProcessor(size={"shortest_edge": 32}, do_center_crop=True, crop_size=32)
    map_ = resize_to_image(torch.ones(1, 4, 4), 120, 60, image_box(processor, 120, 60))[0]
    assert (map_[:, :29] == 0).all() and (map_[:, 91:] == 0).all() and (map_[:, 32:88] > 0.99).all()


def test_explain_through_the_pipeline(tagger, model, image_processor):
    sizes = [(40, 56), (64, 30), (20, 20)]
    images = [image(seed, *size) for seed, size in enumerate(sizes)]
    alone = [tagger(each, explain=True) for each in images]
    batched = tagger(images, explain=True, batch_size=3)
    for each, size, one, many in zip(images, sizes, alone, batched, strict=True):
        assert_same(one, tagger(each))
        with torch.no_grad():
            maps = label_heat_maps(model, **image_processor(images=each, return_tensors="pt"))[1][0]
        expected = torch.nn.functional.interpolate(maps[None], size, mode="bilinear")[0]
        for label, same in zip(one, many, strict=True):
            assert label["heat_map"].shape == size and label["heat_map"].dtype == np.float32
            index = list(NAMES.values()).index(label["label"])
            np.testing.assert_allclose(label["heat_map"], expected[index], atol=1e-5)
            np.testing.assert_allclose(label["heat_map"], same["heat_map"], atol=1e-5)
    (only,) = tagger(images[0], explain=True, labels=["boat"])
    np.testing.assert_allclose(
        only["heat_map"], next(label for label in alone[0] if label["label"] == "boat")["heat_map"], atol=1e-5
    )
    assert tagger(images[0], explain=True, threshold=1.0) == []


# Other label sets


def with_shared_head(template=None, **kwargs):
    tokenizer = tiny_clip_tokenizer()
    encoder = tiny_clip(tokenizer).text_model
    model = tiny_model(classifier="shared", thresholds=[0.5] * 5, **kwargs)
    embeddings = encode_labels(NAMES.values(), encoder, tokenizer, template=template or "a photo of a {}")
    model.set_label_embeddings(embeddings, encoder="tiny", pooling="mean", template=template)
    return model, encoder, tokenizer


def states(encoder, tokenizer, words, **kwargs):
    """The last hidden states of a sentence, one at a time and by hand."""
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(words)])
    with torch.no_grad():
        return encoder(input_ids=ids, **kwargs).last_hidden_state[0]


@pytest.mark.parametrize("residual_attention", [False, True])
def test_a_shared_head_scores_new_names(image_processor, tmp_path, residual_attention):
    model, encoder, tokenizer = with_shared_head(residual_attention=residual_attention)
    if residual_attention:
        model.start_from_classes(torch.randn(6, model.hsvlt.backbone.channels[-1]), torch.randn(6, 16))
        torch.nn.init.normal_(model.residual_attention.weight)
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    before = {label["label"]: label["score"] for label in tagger(image(0))}
    tagger.set_labels(["plant", "dog", "potted plant"], (encoder, tokenizer))
    after = {label["label"]: label["score"] for label in tagger(image(0))}
    assert set(after) == {"plant", "dog", "potted plant"}
    assert after["dog"] == pytest.approx(before["dog"], abs=1e-6), "a label's score does not depend on the others"
    assert len({round(score, 6) for score in after.values()}) == 3
    assert model.config.thresholds is None and model.config.num_labels == model.num_labels == 3
    tagger.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert_same(again(image(0)), tagger(image(0)))


def test_new_names_are_encoded_as_the_checkpoint_s_were(image_processor):
    for template, before, after in (
        (None, "a photo of a", ""),
        ("photo of {} a cat", "photo of", "a cat"),
        ("{}", "", ""),
    ):
        model, encoder, tokenizer = with_shared_head(template)
        tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
        tagger.set_labels(["dog", "potted_plant", "x"], (encoder, tokenizer), label_text={"x": "bird"})
        start, end = tokenizer.bos_token, tokenizer.eos_token
        for row, name in enumerate(("dog", "potted plant", "bird")):
            texts = [before.split(), name.split(), after.split()]
            words = [start, *(f"{word}</w>" for text in texts for word in text), end]
            first = 1 + len(texts[0])
            expected = states(encoder, tokenizer, words)[first : first + len(texts[1])].mean(0)
            assert_close_outputs(model.hsvlt.label_embeddings.weight[row], expected)
        config = model.config
        assert (config.label_text_encoder, config.label_pooling, config.label_template) == ("tiny", "mean", template)
    # Read as the released HSVLT reads BERT: [CLS] and the name, at the name if it is one piece.
    model = tiny_model(classifier="shared")
    model.set_label_embeddings(torch.randn(5, 16), encoder="tiny", pooling="official")
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    tagger.set_labels(["dog", "red bird"], (BERT, BERT_TOKENIZER))
    one, two = (states(BERT, BERT_TOKENIZER, ["[CLS]", *words]) for words in (["dog"], ["red", "bird"]))
    assert_close_outputs(model.hsvlt.label_embeddings.weight, torch.stack((one[1], two[0])))


def test_names_with_a_learned_context(image_processor, tmp_path):
    model = tiny_model(classifier="shared", thresholds=[0.5] * 5)
    known = ["cat", "dog", "bird", "fish", "photo"]
    model.config.set_label_names(known)
    model.label_context = LabelContext(BERT, BERT_TOKENIZER, known, num_context_tokens=2, template="a {} .")
    with torch.no_grad():
        next(p for p in model.label_context.parameters() if p.requires_grad).normal_()
    rows = model.label_context.rows().detach()
    model.config.label_text_encoder, model.config.label_pooling = "tiny", "mean"
    (model.config.label_template,) = model.label_context.templates
    text = (BERT, BERT_TOKENIZER)
    learning = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    with pytest.raises(ValueError, match="is learning its label context; save it"):
        learning.set_labels(["fish"], text)
    learning.save_pretrained(tmp_path)
    tagger = pipeline(TASK, model=str(tmp_path), device="cpu")
    embeddings = tagger.model.hsvlt.label_embeddings
    cat = embeddings.weight[0].clone()
    assert_close_outputs(cat, model.label_context()[0].detach())
    scores = {label["label"]: label["score"] for label in tagger(image(0))}

    with pytest.raises(ValueError, match=r"learned a context for its label names, .*; give label_context, the folder"):
        tagger.set_labels(["red bird", "cat"], text)
    with pytest.raises(ValueError, match="gone' is no folder; check the path"):
        tagger.set_labels(["red bird", "cat"], text, label_context=tmp_path / "gone")
    assert tagger.model.config.num_labels == 5 and torch.equal(embeddings.weight[0], cat), "nothing changed"
    tagger.set_labels(["red bird", "cat"], text, label_context=tmp_path / "label_context")
    # The learned rows in the sentence, put together by hand.
    table = BERT.get_input_embeddings().weight.detach()
    start, red, bird, dot, end = (
        table[[BERT_TOKENIZER.convert_tokens_to_ids(w)]] for w in ["[CLS]", "red", "bird", ".", "[SEP]"]
    )
    with torch.no_grad():
        sentence = torch.cat((start, rows, red, bird, dot, end))[None]
        expected = BERT(inputs_embeds=sentence).last_hidden_state[0, 3:5].mean(0)
    assert_close_outputs(embeddings.weight, torch.stack((expected, cat)))
    after = {label["label"]: label["score"] for label in tagger(image(0))}
    assert set(after) == {"red bird", "cat"} and after["cat"] == pytest.approx(scores["cat"], abs=1e-5)

    tagger.model.config.label_template = "<context_0_0><context_0_1> {}, and so on for each label"
    with pytest.raises(ValueError, match="a context for each of its labels: other labels need a new model"):
        tagger.set_labels(["fish"], text, label_context=tmp_path / "label_context")
    tagger.model.config.label_template = "a {}"
    with pytest.raises(ValueError, match="learned no context for its label names; leave out"):
        tagger.set_labels(["fish"], text, label_context=tmp_path / "label_context")


@pytest.mark.parametrize("names", [list(NAMES.values()), ["plant", "dog", "bird", "a", "of"], ["plant", "dog"]])
def test_what_belongs_to_names_goes_with_them(names, image_processor, tmp_path):
    model, encoder, tokenizer = with_shared_head()
    model.config.calibration_info = {"method": "platt"}
    tagger = pipeline(TASK, model=model, image_processor=image_processor, device="cpu")
    tagger.set_labels(np.array(names), (encoder, tokenizer))
    assert list(model.config.id2label.values()) == names and model.config.label2id[names[1]] == 1
    if names == list(NAMES.values()):
        assert model.config.thresholds == [0.5] * 5 and model.config.calibration_info is not None
    else:
        assert model.config.thresholds is None and model.config.calibration_info is None
        with pytest.raises(ValueError, match="this checkpoint has none"):
            tagger(image(0), threshold="auto")
    tagger.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).id2label == dict(enumerate(names))


def test_labels_are_only_exchanged_where_names_mean_something(model, image_processor):
    shared, encoder, tokenizer = with_shared_head()
    text = (encoder, tokenizer)
    cases = [
        (model, text, "classifier weights for each of its 5 labels"),
        (tiny_model(classifier="shared"), text, "come from no known text encoder"),
    ]
    for each, how, message in cases:
        tagger = pipeline(TASK, model=each, image_processor=image_processor, device="cpu")
        with pytest.raises(ValueError, match=message):
            tagger.set_labels(["plant"], how)
    tagger = pipeline(TASK, model=shared, image_processor=image_processor, device="cpu")
    with pytest.raises(ValueError, match="must be pinned"):
        tagger.set_labels(["plant"], "org/encoder")
    shared.config.label_embedding_dim = 15
    with pytest.raises(ValueError, match="gives 16 numbers a label, but the model reads 15; use the one"):
        tagger.set_labels(["plant"], text)
    assert shared.config.num_labels == 5


def test_hp_dval_s_labels_are_exchanged_by_its_own_text_tower(tmp_path):
    model, tokenizer = hp_dval()
    processor = MultiLabelImageProcessor(size=32)
    tagger = pipeline(TASK, model=model, image_processor=processor, device="cpu")
    before = {label["label"]: label["score"] for label in tagger(image(0))}
    tokenizer.save_pretrained(tmp_path)
    tagger.set_labels(["potted plant", "dog"], str(tmp_path))
    after = {label["label"]: label["score"] for label in tagger(image(0), explain=True)}
    assert set(after) == {"potted plant", "dog"} and after["dog"] == pytest.approx(before["dog"], abs=1e-5)
    with pytest.raises(ValueError, match="needs revision"):
        tagger.set_labels(["dog"], "org/clip")
    with pytest.raises(ValueError, match="contexts in its own text tower; leave out label_context"):
        tagger.set_labels(["dog"], str(tmp_path), label_context=tmp_path)
