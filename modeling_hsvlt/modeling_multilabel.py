"""What HSVLT, MlTr and HP-DVAL share: the guard of their fast paths, output flags, and what stays in fp32."""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as torch_module
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs

from .label_contract import validate_labels
from .losses_multilabel import multilabel_loss

logger = logging.get_logger(__name__)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Where the classes live that are just their weights. Adapters, quantised layers, shards and parametrisations are, or
# make, classes of other places.
_PLAIN = ("torch.nn.modules.", "transformers.models.", "transformers.activations")
_PLAIN_WEIGHTS = (nn.Parameter, torch.Tensor, type(None))
_EXPORTED_WEIGHTS = (*_PLAIN_WEIGHTS, FakeTensor)  # what stands for a weight while torch.export writes a graph


def is_plain(*modules: nn.Module) -> bool:
    """Whether these modules are their class and weights and nothing more, so that a fast path may compute with the
    weights in place of calling them.

    Hooks of any kind, parametrisations, offloading, adapters, quantised or distributed weights all make a module more
    than its weights: then it has to be called. The same goes under `torch.jit`, and so in the legacy ONNX exporter,
    which record what one input does, and within the transforms of `torch.func`.
    """
    if torch.jit.is_tracing() or torch.jit.is_scripting():
        return False
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if any(getattr(torch_module, f"_global{name}") for name in _HOOKS):
        return False
    return all(map(_is_plain, modules))


def _is_plain(module: nn.Module) -> bool:
    own = module.__dict__  # read without `nn.Module.__getattr__`: this runs for every layer of every image
    weights = own["_parameters"]
    types = _EXPORTED_WEIGHTS if torch.compiler.is_exporting() else _PLAIN_WEIGHTS
    return (
        type(module).__module__.startswith(_PLAIN)
        and not (own[_HOOKS[0]] or own[_HOOKS[1]] or own[_HOOKS[2]] or own[_HOOKS[3]])
        and "forward" not in own  # replaced on the instance, as offloading does
        and "_hf_hook" not in own
        and all(type(weight) in types for weight in weights.values())
        # Pruning and the old weight norm keep the weight as a plain attribute, computed by a hook.
        and all(name in weights or not hasattr(module, name) for name in ("weight", "bias"))
    )


def wants_states(output_hidden_states: bool | int | Sequence[int] | None) -> bool:
    """Whether any states were asked for; a number or a list of numbers chooses among them."""
    return output_hidden_states is not None and output_hidden_states is not False


def chosen_states(states: Sequence, output_hidden_states: bool | int | Sequence[int] | None) -> tuple | None:
    """The states that `output_hidden_states` asks for, with None in the place of the others, as transformers does it.

    Args:
        states (sequence): all of them.
        output_hidden_states: True for all, False for none (the result is None then), or which, from the end if below 0.
    """
    if isinstance(output_hidden_states, bool):
        return tuple(states) if output_hidden_states else None
    chosen = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    wanted = {index % len(states) for index in chosen if -len(states) <= index < len(states)}
    return tuple(state if index in wanted else None for index, state in enumerate(states))


def as_dtype_of(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype that `module` computes in: autocast's if it is on, else that of its weight, if that is one
    of floating point (a quantised layer takes what comes).

    Casting once here also spares autocast from casting the pixels twice, as key and as value.
    """
    device_type = tensor.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return tensor.to(torch.get_autocast_dtype(device_type))
    weight = getattr(module, "weight", None)
    return tensor.to(weight.dtype) if isinstance(weight, torch.Tensor) and weight.is_floating_point() else tensor


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in at least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def autocasts_to_fp16(tensor: torch.Tensor) -> bool:
    device_type = tensor.device.type
    return (
        device_type != "meta"
        and torch.is_autocast_enabled(device_type)
        and torch.get_autocast_dtype(device_type) == torch.float16
    )


def no_fp16_autocast(tensor: torch.Tensor):
    """Context in which what overflows fp16 is computed in fp32; bf16 autocast has the range and stays."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts_to_fp16(tensor) else nullcontext()


def require_images(pixel_values: torch.Tensor | None) -> torch.Tensor:
    if pixel_values is None:
        raise ValueError("pixel_values is missing: give a batch of images of shape (batch, 3, height, width).")
    if pixel_values.shape[0] == 0:
        raise ValueError("pixel_values holds no image, and attention cannot run on none: leave the batch out.")
    return pixel_values


def warn_of_unknown_arguments(model: nn.Module, arguments: Mapping) -> None:
    """Models of transformers take any argument; here one that none of them knows is not passed over in silence."""
    unknown = sorted(arguments.keys() - TransformersKwargs.__annotations__.keys()) if arguments else []
    if unknown:
        logger.warning_once(f"{type(model).__name__} makes no use of {', '.join(unknown)}.")


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    attention_shape: tuple[int, ...] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by plain products, as transformers calls it; the weights have `attention_shape` where it is given."""
    weights = torch.matmul(query, key.transpose(2, 3))
    if scaling != 1:
        weights = weights * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1)  # adds up in fp32 whatever it is given: a copy in fp32 gives the same bits
    weights = F.dropout(weights, p=dropout, training=module.training)
    shape = weights.shape
    if attention_shape is not None:
        weights = weights.view(attention_shape)  # what is returned is what is used: a gradient can be read at it
    return torch.matmul(weights.view(shape), value).transpose(1, 2), weights


def init_linear(layer: nn.Module, std: float | None) -> None:
    """Starts a layer by a truncated normal, its bias at 0; or where `std` is None as torch does, uniform up to
    1 / sqrt(fan in)."""
    bound = layer.weight[0].numel() ** -0.5
    if std is None:
        init.uniform_(layer.weight, -bound, bound)
    else:
        init.trunc_normal_(layer.weight, std=std)
    if layer.bias is not None and std is None:
        init.uniform_(layer.bias, -bound, bound)
    elif layer.bias is not None:
        init.zeros_(layer.bias)


def load_peft():
    """peft, which only training needs: if a file imported it, transformers would demand it for loading."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError("contexts are trained by peft, which is not installed: pip install peft.") from error


class MultiLabelPreTrainedModel(PreTrainedModel):
    """Base of the three models' own bases.

    Arguments of every `forward`:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): images.
        labels (`torch.Tensor` of shape `(B, N)`, *optional*): of a classifier; multi-hot: 1 present, 0 absent, in
            between soft, -100 unknown (no loss, no gradient). Others raise a ValueError, outside `torch.compile`.
        output_hidden_states, output_attentions, return_dict (`bool`, *optional*): as everywhere in transformers; see
            the model's output.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): of a classifier; see [`multilabel_loss`].
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # Trainer gives `num_items_in_batch`, the known labels of a whole optimizer step, and the loss is divided by that.
    accepts_loss_kwargs = True

    # What weights were called in checkpoints from before 0.1, as patterns, and are called now. For one release.
    renamed_weights: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_pretrained(cls, *args, key_mapping: dict[str, str] | None = None, **kwargs):
        """As in transformers; older names of weights are read as well."""
        renamed = {**cls.renamed_weights, **(key_mapping or {})}
        loaded = super().from_pretrained(*args, key_mapping=renamed or None, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if not key_mapping:
            model._weight_conversions = None  # saving would give the older names back
        return loaded

    def _asked(self, arguments: Mapping, output_hidden_states, output_attentions) -> tuple[bool | list[int], bool]:
        """The states and attentions that a forward pass was asked for, by argument or else by the configuration; of
        `arguments`, the rest of what it was given, those that no model knows are told."""
        warn_of_unknown_arguments(self, arguments)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return output_hidden_states if wants_states(output_hidden_states) else False, output_attentions

    def _check_labels(self, labels: torch.Tensor | None, num_labels: int) -> torch.Tensor | None:
        """`labels` as [`validate_labels`] gives them; in a graph, which cannot look at values, as they are."""
        if labels is None or torch.compiler.is_compiling():
            return labels
        return validate_labels(labels, num_labels)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """The configuration's loss, see [`multilabel_loss`]."""
        return multilabel_loss(logits, labels, self.config.loss_type, self.config.loss_kwargs, num_items_in_batch)

    def post_init(self):
        super().post_init()
        # Of the parts that stay in fp32, those that this model has.
        parts = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules = set(self._keep_in_fp32_modules) & parts

    def _apply(self, fn, recurse=True):
        # `half()`, `to(torch.float16)`, `type(...)`: what `from_pretrained` keeps in fp32 stays in fp32 here as well.
        kept = [
            tensor
            for name, module in self.named_modules()
            if name.rpartition(".")[2] in self._keep_in_fp32_modules
            for tensor in (*module.parameters(), *module.buffers())
        ]
        kept += [tensor.grad for tensor in kept if tensor.grad is not None]
        kept = {id(tensor) for tensor in kept}

        def apply(tensor):
            result = fn(tensor)
            stays = id(tensor) in kept and result.dtype == torch.float16 and tensor.dtype != torch.float16
            # `type(...)` casts whole numbers as well, and an index would be none any more.
            stays |= result.is_floating_point() and not tensor.is_floating_point()
            return tensor.to(device=result.device) if stays else result

        return super()._apply(apply, recurse)
