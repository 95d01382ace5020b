"""What a backbone gives and which of its weights that takes, seen in one pass without data: on the meta device, where a
tensor has a shape and a history but no numbers. Tens of milliseconds for a large model; draws no random number.
"""

import torch
from torch import nn
from torch.func import functional_call


def without_data(module: nn.Module, image_size: tuple[int, int], inputs=lambda images: {"pixel_values": images}):
    """The output of `module` for two images of this size (height, width), without numbers in it.

    Args:
        inputs: gives the arguments of `module` for images (2, 3, height, width).

    Returns:
        The output and, where it is a list, the names of the trainable parameters that no gradient of it reaches.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        empty = {
            id(tensor): torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
            for tensor in weights.values()
        }
        weights = {name: empty[id(tensor)] for name, tensor in weights.items()}  # what was tied stays tied
        output = functional_call(module, weights, kwargs=inputs(torch.empty(2, 3, *image_size)))
        reached = _reached(output) if isinstance(output, list) else set()
    return output, {
        name for name, tensor in parameters.items() if tensor.requires_grad and id(weights[name]) not in reached
    }


def _reached(tensors: list[torch.Tensor]) -> set[int]:
    """The ids of the leaves that a backward pass from these tensors comes to."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, leaves = set(pending), set()
    while pending:
        node = pending.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        before = {earlier for earlier, _ in node.next_functions if earlier is not None} - seen
        seen |= before
        pending += before
    return leaves


def retire(module: nn.Module, names: set[str]) -> None:
    """Makes these parameters buffers that no checkpoint holds: whatever is computed with them for nothing still runs,
    but nothing trains or counts them, or waits for their gradient, whoever says `requires_grad_`."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        # What norms start with, since nothing else may ever fill what no checkpoint holds.
        start = torch.ones_like if leaf == "weight" and "Norm" in type(owner).__name__ else torch.zeros_like
        owner.register_buffer(leaf, start(owner._parameters.pop(leaf)), persistent=False)


class NormsAfter:
    """While entered, notes which norms a model calls after one of its layers: `names`, in order."""

    def __init__(self, model: nn.Module, layer: nn.Module | None):
        self.layer = layer
        self.names: list[str] = []
        self.modules = {name: part for name, part in model.named_modules() if "Norm" in type(part).__name__}
        self.handles: list = []

    def __enter__(self) -> "NormsAfter":
        if self.layer is not None:
            self.handles = [self.layer.register_forward_hook(lambda *args: self.names.clear())]
            for name, part in self.modules.items():
                self.handles.append(part.register_forward_hook(lambda *args, name=name: self.names.append(name)))
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()
