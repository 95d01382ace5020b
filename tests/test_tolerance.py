import numpy as np
import pytest
import torch

from .tolerance import assert_close_metrics, assert_close_outputs, close_outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rounding_passes_and_a_thousandth_does_not(dtype, scale):
    """Sums of the same numbers in another order, as another CPU takes them."""
    terms = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    terms = (scale * terms).to(dtype)
    forwards, backwards = sum(terms), sum(terms.flip(0))
    assert not torch.equal(forwards, backwards)
    assert_close_outputs(forwards, backwards)
    if dtype != torch.bfloat16:
        assert not close_outputs(forwards + 1e-3 * forwards.abs().max(), backwards)
    assert not close_outputs(2 * forwards, backwards)


def test_what_it_compares():
    logits = torch.tensor([[1.0, float("nan")], [-3.0, 0.0]])
    assert_close_outputs({"logits": logits, "loss": 0.5}, {"logits": logits + 1e-7, "loss": np.float32(0.5)})
    assert_close_outputs(logits.numpy(), logits)
    assert_close_outputs((0.1, [0.2, 0.3]), (0.1, [0.2, 0.3]))
    assert_close_outputs(torch.empty(0), torch.empty(0))
    assert not close_outputs(logits.nan_to_num(), logits) and not close_outputs(logits, logits.nan_to_num())
    assert not close_outputs(logits[:1], logits)
    assert not close_outputs({"logits": logits}, {"scores": logits})
    assert not close_outputs(torch.tensor([1e-9]), torch.zeros(1))  # what is zero exactly, stays so
    with pytest.raises(AssertionError, match=r"\['loss'\]"):
        assert_close_outputs({"loss": 0.5}, {"loss": 0.6})


def test_reports():
    report = {"mAP": 0.75, "num_samples": 23, "threshold": None}
    assert_close_metrics({**report, "mAP": 0.751}, report)
    for other in ({"mAP": 0.8}, {"num_samples": 24}, {"threshold": 0.5}):
        with pytest.raises(AssertionError):
            assert_close_metrics({**report, **other}, report)
