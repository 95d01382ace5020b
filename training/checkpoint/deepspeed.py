"""DeepSpeed's ZeRO, stages 1 and 2, through accelerate: AdamW's state divided over the processes, gathered whole for a
checkpoint of ours and divided again on resume. DeepSpeed's own checkpoints, which are pickles, are never used.
"""

import torch
from accelerate import Accelerator

MOMENTS = ("exp_avg", "exp_avg_sq")


def configure_zero(accelerator: Accelerator, max_grad_norm: float | None, optimizer: str = "adamw") -> None:
    """Bring DeepSpeed's configuration into line with the run's; before `accelerator.prepare`.

    Raises:
        ValueError: what could not be saved or would train otherwise than elsewhere.
    """
    if optimizer == "muon":
        raise ValueError(
            "DeepSpeed makes one long row of all weights, and Muon needs their matrices: set optimizer to adamw, or "
            "launch with training/configs/accelerate/fsdp2.yaml."
        )
    config = accelerator.deepspeed_plugin.deepspeed_config
    zero = config["zero_optimization"]
    offloaded = [
        part for part in ("optimizer", "param") if (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
    ]
    if zero["stage"] not in (1, 2) or offloaded:
        raise ValueError(
            "DeepSpeed trains here with zero_stage 1 or 2 and nothing offloaded: launch with "
            "training/configs/accelerate/fsdp2.yaml to divide the weights as well."
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"DeepSpeed trains here in bf16 or fp32: set mixed_precision, now {accelerator.mixed_precision}."
        )
    if accelerator.mixed_precision == "bf16":  # as everywhere here: weights in fp32, only the work in bf16
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    config["gradient_clipping"] = max_grad_norm or 0.0
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps


class ZeroOptimizer:
    """The divided state of an AdamW as `torch.optim.Optimizer` would show and take it, for `training_state`.

    Every process has to call each method.
    """

    def __init__(self, engine, groups: list[list[torch.nn.Parameter]]):
        """`groups`: the parameters of each group, of which DeepSpeed makes one flat tensor."""
        self.engine, self.groups = engine, groups
        self.parameters = [parameter for group in groups for parameter in group]

    @property
    def partitions(self) -> torch.optim.Optimizer:
        """torch's optimizer, of this process's part of each group; schedules act on it."""
        return self.engine.optimizer.optimizer

    @property
    def param_groups(self) -> list[dict]:
        pairs = zip(self.partitions.param_groups, self.groups, strict=True)
        return [{**group, "params": parameters} for group, parameters in pairs]

    def state_dict(self) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for step in [state["step"] for state in self.partitions.state.values()][:1]:  # the same everywhere
            self._link_moments()
            for index, parameter in enumerate(self.parameters):
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
                state[index] = {"step": step, **moments}
        place = {parameter: index for index, parameter in enumerate(self.parameters)}
        groups = [{**group, "params": [place[each] for each in group["params"]]} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """The weights have to be in the model already: they become those that are trained on."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for group, saved in zip(self.partitions.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for parameter in self.parameters:
            safe_set_full_fp32_param(parameter, parameter.detach())
        if not state_dict["state"]:
            return
        for group in self.partitions.param_groups:
            for flat in group["params"]:
                moments = {name: torch.zeros_like(flat) for name in MOMENTS}
                self.partitions.state[flat] = {"step": state_dict["state"][0]["step"].clone(), **moments}
        self._link_moments()
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                moment = state_dict["state"][index][name].to(parameter.device)
                safe_set_full_optimizer_state(parameter, moment, name)

    def _link_moments(self) -> None:
        """Tell each parameter where its moments are; DeepSpeed 0.19 does so after a step, for the first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for group, parameters in zip(self.partitions.param_groups, self.groups, strict=True):
            for flat in group["params"]:
                lazy_init_hp_params_optimizer_state(parameters, flat, self.partitions.state)
