"""Every product of matrices is off by one in its last digit, at random: what another CPU does, on this one.

`python -m pytest -p tests.other_rounding FILE`. CPUs add up in another order, so outputs differ in their last digits.
A test that fails here and not without it compares outputs bit for bit. `tests.cpus` runs this as one of its lines.
"""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    nn.functional.linear,
    nn.functional.conv2d,
    nn.functional.scaled_dot_product_attention,
    torch.conv2d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.mm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
    torch.Tensor.bmm,
    torch.Tensor.mm,
}


class OtherRounding(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)  # its own: the seeds of the tests stay what they are

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function not in PRODUCTS or "out" in kwargs or not isinstance(result, torch.Tensor):
            return result
        if result.device.type != "cpu" or not result.is_floating_point() or torch.compiler.is_compiling():
            return result
        detached = result.detach()
        largest = detached.abs().amax(-1, keepdim=True) if result.ndim else detached.abs()
        steps = torch.randint(-1, 2, result.shape, generator=self.generator) * (detached != 0)
        if result.element_size() == 2:  # added up in fp32, then rounded: seldom to the other neighbour
            steps *= torch.rand(result.shape, generator=self.generator) < 0.01
        return result + largest * steps * torch.finfo(result.dtype).eps


@pytest.fixture(autouse=True)
def other_rounding(request):
    if "compile" in request.node.name or "export" in request.node.name:  # torch's tracers refuse such a mode
        yield
        return
    if request.node.get_closest_marker("one_machine"):
        pytest.skip("bit for bit on one machine, by purpose")
    with OtherRounding():
        yield
