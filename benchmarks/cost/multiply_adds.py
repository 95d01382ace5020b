"""Counts multiply-adds as they are computed, in matrix products and convolutions."""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountMultiplyAdds(TorchDispatchMode):
    """Adds up multiply-adds in `total`.

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
