"""Text embeddings that are kept as long as everything they depend on is the same, value by value.

Versions, addresses and flags do not tell: fused optimizers, writes through `.data` and copies in inference mode change
weights and leave no trace. So the weights themselves are read again, which takes a few per cent of one image's pass
through a tower of the same size, and what is more than its weights (hooks, adapters, quantised or offloaded layers) is
not read but run.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from .modeling_multilabel import is_plain

# Columns of 64-bit words that a weight is folded to. A prime, so that also rows that change places change the sums.
_COLUMNS = 8191
# Classes of peft around an encoder that do nothing but call it, where its adapter sits in the table alone.
_WRAPPERS = ("peft.peft_model", "peft.tuners.trainable_tokens.model")
_SETTINGS = (bool, int, float, str)  # of a module: a norm's epsilon, a number of heads


class KeptEmbeddings:
    """The last result of a text encoder on certain tokens, and what the encoder then was."""

    def __init__(self):
        self._kept = None

    def __call__(
        self, encoder: nn.Module, table: nn.Module, token_ids: torch.Tensor, encode: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """`encode()` without gradients and in the weights' own precision, or what it gave before if it would again.

        Args:
            encoder (`nn.Module`): all modules whose weights and hooks `encode` depends on.
            table (`nn.Module`): its token embeddings, which are called in any case, so that adapters may sit there.
            token_ids (`torch.Tensor`): all that `encode` reads of the table, in its order.
            encode (function): gives the embeddings; called outside inference mode, so that training can use them.
        """
        with torch.inference_mode(False), torch.no_grad(), maybe_autocast(token_ids.device.type, enabled=False):
            state = _state(encoder, table, token_ids)
            if state is None:
                return encode()
            kept = self._kept  # read once: another thread may replace it
            if kept is None or not _same(state, kept[0]):
                kept = self._kept = state, encode()
            return kept[1].clone()  # the caller may write into it


def _state(encoder: nn.Module, table: nn.Module, token_ids: torch.Tensor) -> tuple[list, list, torch.Tensor] | None:
    """What the embeddings depend on: modules, tensors' kinds, and tensors' values; None where that cannot be read."""
    inside = set(table.modules())
    modules = [module for module in encoder.modules() if module not in inside]
    wrappers = [module for module in modules if type(module).__module__ in _WRAPPERS]
    if any(module._forward_hooks or module._forward_pre_hooks for module in wrappers):
        return None
    if not is_plain(*(module for module in modules if module not in wrappers)):
        return None
    # Within vmap, grad and the like, and in a graph, there are no values to read.
    if torch._C._functorch.peek_interpreter_stack() is not None or torch.compiler.is_compiling():
        return None
    tensors = [tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())]
    tensors = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.device.type == "meta" for tensor in tensors):
        return None
    structure = [
        (type(module), [(key, value) for key, value in vars(module).items() if isinstance(value, _SETTINGS)])
        for module in modules
    ]
    tensors += [token_ids, table(token_ids.unique())]
    kinds = [(tensor.device, tensor.dtype, tensor.shape) for tensor in tensors]
    return structure, kinds, torch.cat([_fold(tensor).to(token_ids.device) for tensor in tensors])


def _same(one: tuple[list, list, torch.Tensor], other: tuple[list, list, torch.Tensor]) -> bool:
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


def _fold(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as 64-bit integers; those of a large one summed over rows, which wraps around and so is
    exact: no change is too small for it."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    bits = F.pad(bits, (0, -len(bits) % 8)) if len(bits) % 8 else bits
    words = bits.view(torch.int64) if bits.storage_offset() % 8 == 0 else bits.clone().view(torch.int64)
    rows = len(words) // _COLUMNS
    if rows < 3:
        return words
    return torch.cat((words[: rows * _COLUMNS].view(rows, _COLUMNS).sum(0), words[rows * _COLUMNS :]))
