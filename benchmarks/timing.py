"""What the benchmarks measure with: a step timed, multiply-adds counted, the device named."""

import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula


def _fused_linear_flop(pixels_shape: list[int], *args, out_shape: list[int], **kwargs) -> int:
    """Of a linear layer with its activation, the layer's: a packed weight does not tell its shape."""
    return mm_flop(pixels_shape, [pixels_shape[-1], out_shape[-1]])


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in every build of torch
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_fused_linear_flop)


class CountMultiplyAdds(TorchDispatchMode):
    """Adds up multiply-adds in `total`; under `no_grad`, not `inference_mode`, which hides those of whole layers.

    torch's `FlopCounterMode` follows modules with hooks, and a module with a hook takes no fast path here: it would
    count what is not computed.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result) // 2
        return result


def multiply_adds(build_model: Callable[[], nn.Module], image_size: int) -> int:
    """Multiply-adds of one image in matrix products and convolutions, counted on the meta device."""
    with torch.device("meta"):
        model = build_model().eval().requires_grad_(False)
        image = torch.empty(1, 3, image_size, image_size)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, which a counter cannot look into
    with torch.no_grad(), CountMultiplyAdds() as counter:
        model(image)
    torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.total


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    step: Callable[[], None],
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
    repeats: int = 1,
) -> float:
    """Seconds of a step, from an idle device to an idle device; of `repeats` steps in a row, their mean."""
    synchronise(device)
    start = clock()
    for _ in range(repeats):
        step()
    synchronise(device)
    return (clock() - start) / repeats


def repeats_of(step: Callable[[], None], device: torch.device, seconds: float = 0.05) -> int:
    """How many steps in a row are timed at once: on a GPU so many that waiting for it is none of their time."""
    return 1 if device.type == "cpu" else math.ceil(seconds / timed(step, device))


def warm_up(step: Callable[[], None], device: torch.device, compiled: bool) -> None:
    """Runs the step until it takes as long as it will: compilers and CUDA graphs need three."""
    for _ in range(3 if compiled or device.type == "cuda" else 1):
        step()


def arithmetic(device: torch.device) -> str:
    """How fp32 products are computed: TF32 has fp32's range and ten bits of its precision."""
    if device.type != "cuda":
        return "fp32 as such"
    words = {True: "TF32", False: "fp32"}
    products = words[torch.get_float32_matmul_precision() != "highest"]
    return f"fp32 products in {products}, convolutions in {words[torch.backends.cudnn.allow_tf32]}"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads"
