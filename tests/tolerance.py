"""How exactly two results are compared, once for all tests.

Weights, files, ids and labels are compared bit for bit, and so are metrics of equal scores and a run that goes on
after an interruption on the same machine. What a model computes (logits, scores, losses, gradients, embeddings) is
compared by `assert_close_outputs`: its last digits depend on the CPU, on the number of threads, on the batch, on where
in memory equal weights lie (safetensors maps files, whose tensors are not aligned), and on whether gradients are
recorded, for a gradient pass and a no-grad pass are two computations.

Rounding errors grow with the numbers that were added up, not with their sum: the tolerance is `STEPS` units in the last
place of the largest number of the result. That is 3e-5 of it in fp32, where real differences are a thousand times that.
In 16 bits, where products are added up in fp32 and rounded at the end, it is 8 units: 6 % in bf16, 0.8 % in fp16.
"""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

STEPS, STEPS_OF_16_BITS = 256, 8

# Scores that were computed again may put two neighbours of a ranking in the other order; a metric of a few dozen
# images moves by less than this, and by far more where anything is wrong.
METRIC = 0.01


def assert_close_outputs(actual, expected, steps: float | None = None, name: str = "") -> None:
    """Raises AssertionError unless two outputs are equal up to rounding.

    Args:
        actual, expected: Tensors, arrays, numbers, or mappings and sequences of them. The coarser dtype of the two
            counts; NaN equals NaN.
        steps: Units in the last place of the largest expected number; None: as above.
        name: What is compared, for the message.
    """
    if isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and actual.keys() == expected.keys(), f"{name}: other keys"
        for key in expected:
            assert_close_outputs(actual[key], expected[key], steps, f"{name}[{key!r}]")
    elif isinstance(expected, (list, tuple)) and not all(isinstance(value, (int, float)) for value in expected):
        assert len(actual) == len(expected), f"{name}: {len(actual)} results, expected {len(expected)}"
        for index, values in enumerate(zip(actual, expected, strict=True)):
            assert_close_outputs(*values, steps, f"{name}[{index}]")
    else:
        actual, expected = _tensor(actual), _tensor(expected)
        coarser = max(torch.finfo(actual.dtype).eps, torch.finfo(expected.dtype).eps)
        finite = expected.detach()[expected.isfinite()].double().abs()
        if steps is None:
            steps = STEPS_OF_16_BITS if coarser > 1e-4 else STEPS
        atol = steps * coarser * (finite.max().item() if len(finite) else 0)
        torch.testing.assert_close(
            actual.double(),
            expected.double(),
            rtol=0,
            atol=atol,
            equal_nan=True,
            msg=lambda message: f"{name or 'output'}: {message}",
        )


def close_outputs(actual, expected, steps: float | None = None) -> bool:
    """Whether `assert_close_outputs` passes: for outputs that should differ, and by more than rounding."""
    try:
        assert_close_outputs(actual, expected, steps)
    except AssertionError:
        return False
    return True


def assert_close_metrics(actual: Mapping, expected: Mapping) -> None:
    """The same report from scores that were computed twice: counts are equal, figures within `METRIC`."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key] == (pytest.approx(value, abs=METRIC) if isinstance(value, float) else value), key


def _tensor(value) -> torch.Tensor:
    """On the CPU and of floats; Python's numbers stand for fp32."""
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    tensor = tensor.detach().cpu()
    return tensor if tensor.is_floating_point() else tensor.float()
