"""State dicts of other code bases: read without running code, renamed, and nothing lost or left over."""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

StateDict = dict[str, torch.Tensor]
# Linear layers that other code keeps as 1x1 convolutions: (out, in, 1) or (out, in, 1, 1).
POINTWISE = re.compile(r"\.(pwconv1|pwconv2|gate|multimodal)\.weight$")


def rename_tensors(state_dict: StateDict, names: dict[str, str], left_out: re.Pattern, what: str) -> StateDict:
    """Tensors under the names that `names` maps theirs to; 1x1 convolutions as the linear layers that they are.

    Raises:
        ValueError: a tensor of `names` is missing, or there is one that is neither among them nor `left_out`.
    """
    missing = [key for key in names if key not in state_dict]
    unknown = [key for key in state_dict if key not in names and not left_out.match(key)]
    if missing or unknown:
        raise ValueError(
            f"this is not {what}: "
            + " and ".join(
                f"{len(keys)} tensors are {fault} (the first is {keys[0]})"
                for keys, fault in ((missing, "missing"), (unknown, "unknown"))
                if keys
            )
            + "."
        )
    renamed = {ours: state_dict[key] for key, ours in names.items()}
    return {key: tensor.flatten(1) if POINTWISE.search(key) else tensor for key, tensor in renamed.items()}


def bare_state_dict(state_dict: dict) -> StateDict:
    """The tensors alone: out of a wrapper such as `{"model": ...}`, without the `module.` of data-parallel training."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    return {str(key).removeprefix("module."): tensor for key, tensor in state_dict.items()}


def read_state_dict(source: Path) -> dict:
    """Tensors of a `.safetensors` file, or of a pickle as far as it holds tensors alone; on the CPU.

    Raises:
        ValueError: neither, or a pickle with anything that would have to be executed.
        FileNotFoundError: no such file.
    """
    if not source.is_file():
        raise FileNotFoundError(f"'{source}' is not a file: give the .safetensors or .pth file of the state dict.")
    try:
        if source.suffix == ".safetensors":
            return load_file(source)
        state_dict = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"'{source}' is not a file of tensors alone, and more is not loaded, for it could run code: save the bare "
            f"state dict where the file is trusted ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(state_dict, dict):
        raise ValueError(f"'{source}' holds a {type(state_dict).__name__} and no state dict.")
    return state_dict
