"""What only a CUDA device shows; and, on the meta device, that no forward pass reads a value, which would make the host
wait for the device and end a CUDA graph."""

import pytest
import torch
import torch.nn.functional as F

from modeling_hsvlt import (
    HPDVALForImageClassification,
    HSVLTConfig,
    HSVLTForImageClassification,
    MlTrConfig,
    MlTrForImageClassification,
)
from training.data.augment import build_augmentation
from training.data.batches import SparseBatch
from training.loop.optim import build_optimizer, orthogonalise

from .tiny_clip import tiny_clip, tiny_clip_tokenizer

LABELS, SIDE = 6, 64


def hsvlt(**options):
    return HSVLTForImageClassification(HSVLTConfig.preset("nano", num_labels=LABELS, **options))


def hp_dval():
    tokenizer = tiny_clip_tokenizer()
    names = ["cat", "dog", "bird", "potted plant", "plant", "potted"]
    model = HPDVALForImageClassification.from_clip(tiny_clip(tokenizer, image_size=SIDE), tokenizer, names)
    model.drop_text_model()  # else it is compared, value by value, with what it was
    return model


MODELS = {
    "hsvlt": hsvlt,
    "hsvlt, candidates in chunks": lambda: hsvlt(candidate_labels=4, label_chunk_size=3),
    "hsvlt, residual attention": lambda: hsvlt(residual_attention=True),
    "hsvlt, top-down": lambda: hsvlt(aggregation="topdown", absorb_projections=False),
    "mltr": lambda: MlTrForImageClassification(MlTrConfig.preset("nano", num_labels=LABELS)),
    "hp_dval": hp_dval,
}


def build(name: str, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(device)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def labels(count: int = 2) -> torch.Tensor:
    return (torch.rand(count, LABELS, generator=torch.Generator().manual_seed(1)) < 0.3).float()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("train", [False, True])
def test_no_forward_pass_reads_a_value(name, train):
    model = build(name, "meta").train(train)
    logits = model(images().to("meta")).logits
    assert logits.shape == (2, LABELS) and logits.device.type == "meta"
    if train:
        F.binary_cross_entropy_with_logits(logits.float(), labels().to("meta")).backward()
        assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(MODELS))
def test_the_host_does_not_wait_and_a_cuda_graph_gives_the_same(name):
    model, pixels = build(name, "cuda").eval(), images().cuda()
    with torch.inference_mode():
        for _ in range(3):
            expected = model(pixels).logits.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(pixels).logits
        graph.replay()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    on_cpu = build(name, "cpu").eval()
    with torch.inference_mode():  # TF32 in convolutions
        torch.testing.assert_close(logits.cpu(), on_cpu(images()).logits, atol=2e-2, rtol=2e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_under_autocast(name, dtype, optimizer):
    model = build(name, "cuda").train()
    step = build_optimizer(model, learning_rate=1e-3, weight_decay=0.1, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    before = {key: value.clone() for key, value in model.named_parameters() if value.requires_grad}
    with torch.autocast("cuda", dtype=dtype):
        loss = model(images().cuda(), labels=labels().cuda()).loss
    scaler.scale(loss).backward()
    scaler.step(step)
    scaler.update()
    assert loss.isfinite()
    changed = [not torch.equal(value, before[key]) for key, value in model.named_parameters() if key in before]
    assert sum(changed) > len(changed) / 2 and all(value.isfinite().all() for value in model.parameters())


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_compiled_with_cuda_graphs(name):
    model, pixels = build(name, "cuda").eval(), images().cuda()
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    with torch.inference_mode():
        for _ in range(3):
            logits = compiled(pixels).logits.clone()
        torch.testing.assert_close(logits, model(pixels).logits, atol=2e-3, rtol=2e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 256)])
def test_newton_schulz_in_bf16(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    ours, expected = orthogonalise(matrices.cuda()).float().cpu(), orthogonalise(matrices)
    assert (F.cosine_similarity(ours.flatten(1), expected.flatten(1)) > 0.99).all()
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.cuda
def test_sparse_labels_reach_the_device_pinned():
    batch = SparseBatch(torch.tensor([1, 6, 11]), torch.tensor([1.0, 0.5, -100.0]), (2, LABELS))
    there = batch.pin_memory().to("cuda", non_blocking=True).to_dense()
    assert there.is_cuda and torch.equal(there.cpu(), batch.to_dense())


@pytest.mark.cuda
def test_augmentation_is_the_same_on_both():
    augment = build_augmentation(SIDE, color_jitter=0.2, rand_augment=True, random_erasing=0.2, mixup=0.4)
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        pixels, rows = augment(images(8).sigmoid().to(device), labels(8).to(device))
        assert pixels.device.type == rows.device.type == device
        results.append((pixels.cpu(), rows.cpu()))
    torch.testing.assert_close(results[1][1], results[0][1])
    assert (results[1][0] - results[0][0]).abs().mean() < 0.01
