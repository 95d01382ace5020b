import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from training.loop.agreement import clip_gradients
from training.train import main

from ..tiny_run import NANO, TINY


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_with_a_candidate_scorer_learns_as_one_without(tmp_path, optimizer):
    """Weight by weight, where gradients are clipped at every step and both have matrices of the same shape."""
    backbone = {"hidden_sizes": [8, 8, 16, 64], "depths": [1, 1, 1, 1]}
    weights, norms = {}, {}
    for name, fields in {"without": {}, "with": {"candidate_labels": 3}}.items():
        model = {**NANO, "backbone_config": backbone, **fields}
        options = {**TINY, "model": model, "epochs": 1, "optimizer": optimizer, "max_grad_norm": 0.01}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(options))
        assert main([str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / name)]) == 0
        weights[name] = load_file(tmp_path / name / "best" / "model.safetensors")
        log = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        norms[name] = [line["train/grad_norm"] for line in log if "train/grad_norm" in line]
    assert norms["with"] == norms["without"] and min(norms["with"]) > 0.01
    for key, tensor in weights["without"].items():
        assert torch.equal(tensor, weights["with"][key]), key
    own = {key: tensor for key, tensor in weights["with"].items() if key not in weights["without"]}
    assert all(key.startswith("candidate_scorer.") for key in own) and own["candidate_scorer.weight"].abs().max() > 0


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rest, self.candidate_scorer = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)


def clipped(of_scorer, kind=DistributedType.NO):
    model = Two()
    model.rest.weight.grad, model.candidate_scorer.weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([of_scorer])
    accelerator = Accelerator()
    clip = accelerator.clip_grad_norm_
    run = SimpleNamespace(
        accelerator=SimpleNamespace(clip_grad_norm_=clip, distributed_type=kind),
        model=model,
        plain_model=model,
        config=SimpleNamespace(max_grad_norm=1.0),
    )
    norm = clip_gradients(run)
    return norm, model.rest.weight.grad, model.candidate_scorer.weight.grad


def test_a_scorer_is_clipped_by_itself():
    norm, rest, scorer = clipped([0.0, 20.0])
    assert norm == 5
    torch.testing.assert_close(rest, torch.tensor([[0.6, 0.8]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(scorer, torch.tensor([[0.0, 1.0]]), atol=1e-5, rtol=0)
    assert not clipped([float("inf"), 0.0])[0].isfinite()
    norm, rest, _ = clipped([0.0, 12.0], DistributedType.DEEPSPEED)  # which clips by itself, and gives one norm
    assert norm == 13
