"""The push-and-load table over the loopback Hub: `python -m tests.hub_table`. Real sockets, huggingface_hub as it is.

For each model and for an adapter: `training.push`, then `AutoModel`, `AutoModelForImageClassification`,
`AutoProcessor`, `AutoImageProcessor`, `pipeline("image-classification")` and the multi-label pipeline in a process that
cannot import `modeling_hsvlt`, with equal logits. Then revisions, missing, private and gated repositories, and broken
connections. Prints a line a check, and one at the end; the exit status is 1 if a check failed.
"""

import json
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification
from training.scoring.measured_with import fingerprints

from .loopback_hub import TOKEN, Fault, LoopbackHub
from .test_remote_code import NAMES, PACKAGE, THRESHOLDS, check, checkpoint, run

ADAPTER, BASE = "adapter", "hp_dval"
HANDLER = PACKAGE.parent / "training" / "publish" / "handler.py"  # the code of an endpoint, not of a model
PUSH = """
import os, sys, time
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
time.sleep = lambda seconds: None  # waits between attempts: huggingface_hub's and ours
from training.push import main
outcomes = [main(arguments) for arguments in json.loads(sys.argv[2])]
print()
print(json.dumps(outcomes))
"""


def noisy_stage_backbone_model():
    """HSVLT on a backbone that is read at its stages, an MlTr."""
    torch.manual_seed(1)
    backbone = {
        "model_type": "mltr",
        "embed_dim": 16,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "image_size": 64,
    }
    config = HSVLTConfig.preset(
        "nano", backbone_config=backbone, num_labels=7, id2label=NAMES, thresholds=THRESHOLDS, label_embedding_dim=16
    )
    model = HSVLTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, checkpoint("hsvlt")[1]


def other_contexts(model):
    """The same HP-DVAL with contexts learned elsewhere."""
    model.save_pretrained(folder := Path(tempfile.mkdtemp()))
    model = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        table = model.hp_dval.get_input_embeddings().weight
        table[model.config.context_token_ids] += torch.randn(len(model.config.context_token_ids), table.shape[1])
    return model


def save_run(folder: Path, model, processor) -> None:
    """A run folder as training leaves it, with things in it that must not be published."""
    model.save_pretrained(folder / "best")
    processor.save_pretrained(folder / "best")
    state = folder / "best" / "training_state"
    state.mkdir()
    (state / "tensors.safetensors").write_bytes(b"optimizer state")
    (folder / "best" / "optimizer.bin").write_bytes(b"optimizer state")
    results = {"steps": 3, "measured_with": fingerprints(model.config.to_dict())}
    results["positives_in_train"] = list(range(len(NAMES)))
    (folder / "results.json").write_text(json.dumps(results))
    options = {"output_dir": str(folder), "dataset": "/home/someone/photos", "batch_size": 2, "epochs": 1, "seed": 0}
    options |= {"learning_rate": 1e-3, "weight_decay": 0.0, "loss_type": "bce", "gradient_accumulation_steps": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))


class Table:
    """Runs checks and keeps count."""

    def __init__(self):
        self.held = self.broken = 0

    def row(self, name: str, action) -> None:
        start = time.monotonic()
        try:
            detail = action() or ""
            self.held += 1
            print(f"held    {name:<58} {detail} ({time.monotonic() - start:.0f} s)", flush=True)
        except Exception:
            self.broken += 1
            print(f"BROKEN  {name}\n{traceback.format_exc(limit=4)}", flush=True)


class Scene:
    """The runs to publish, a Hub, and processes that push and load."""

    def __init__(self, folder: Path, families=("hsvlt", "hsvlt_stages", "mltr", BASE, ADAPTER)):
        self.folder, self.families = folder, families
        self.hub = LoopbackHub(lfs_bytes=100_000)  # so that not only weights are large
        self.models = {}
        for family in families:
            if family == "hsvlt_stages":
                self.models[family] = noisy_stage_backbone_model()
            elif family != ADAPTER:
                self.models[family] = checkpoint(family)
        if ADAPTER in families:
            model, processor = self.models[BASE]
            self.models[ADAPTER] = other_contexts(model), processor
        for family, (model, processor) in self.models.items():
            save_run(folder / family, model, processor)
        self.image = folder / "image.png"
        pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.image)
        self.counter = 0

    def push(self, *calls: list[str], token: str | None = TOKEN) -> list[int]:
        environment = self.hub.environment(self.folder / "sender", token)
        return run(PUSH, self.folder, PACKAGE.parent, json.dumps(calls), package=True, **environment)

    def load(self, script: str, *arguments, token: str | None = TOKEN, home: str | None = None):
        self.counter += 1
        environment = self.hub.environment(self.folder / (home or f"reader{self.counter}"), token)
        return run(script, self.folder, *arguments, **environment)

    # The checks; each returns a few words, or raises.

    def publish(self):
        base = ["--adapter_of", f"me/{BASE}"]
        calls = [
            [str(self.folder / family), f"me/{family}", *(base if family == ADAPTER else [])]
            for family in self.families
        ]
        assert self.push(*calls) == [0] * len(calls)
        for family in self.families:
            repository = self.hub.repositories["model", f"me/{family}"]
            assert repository.private and list(repository.tags) == ["v1"]
            assert repository.tags["v1"] == repository.branches["main"] and len(repository.commits) == 2, "one commit"
            files = self.hub.files(f"me/{family}")
            assert not [path for path in files if "training_state" in path or path.endswith(".bin")]
            assert b"someone" not in b"".join(data for path, data in files.items() if not path.endswith("safetensors"))
            code = {path: data for path, data in files.items() if path.endswith(".py")}
            sources = {path: (HANDLER if path == HANDLER.name else PACKAGE / path).read_bytes() for path in code}
            assert code and code == sources
            weights = "adapter_model.safetensors" if family == ADAPTER else "model.safetensors"
            needed = {"README.md", weights, "processor_config.json", "results.json", "selected_tags.csv"}
            assert needed <= set(files), needed - set(files)
            assert files["selected_tags.csv"].decode().splitlines()[2] == "1,label 1,0,1"
        large = [path for method, path in self.hub.requests if method == "PUT" and path.startswith("/lfs/")]
        assert large and not self.hub.unknown, self.hub.unknown
        return f"{len(calls)} repositories, {len(large)} files by LFS"

    def load_everything(self):
        script = "print(json.dumps({name: use(f'me/{name}') for name in sys.argv[1:]}))"
        results = self.load(script, *self.families, home="everything")
        for family in self.families:
            check(results[family], *self.models[family], self.image)
        if ADAPTER in self.families:
            assert results[ADAPTER]["logits"] != results[BASE]["logits"]
        return f"{len(results)} x AutoModel, ...ForImageClassification, AutoProcessor, 2 pipelines"

    def offline(self):
        environment = self.hub.environment(self.folder / "everything") | {"HF_HUB_OFFLINE": "1"}
        family = self.families[0]
        used = run(f"print(json.dumps(use('me/{family}')))", self.folder, **environment)
        check(used, *self.models[family], self.image)

    def revisions(self):
        family, (model, processor) = self.families[0], self.models[self.families[0]]
        first = self.hub.repositories["model", f"me/{family}"].branches["main"]
        path = self.folder / family / "best" / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"thresholds": [0.5] * 7}))
        try:
            assert self.push([str(self.folder / family), f"me/{family}"]) == [0]
        finally:
            path.write_text(before)
        repository = self.hub.repositories["model", f"me/{family}"]
        assert set(repository.tags) == {"v1", "v2"} and repository.branches["main"] != first
        script = """
name, first = sys.argv[1:]
now = AutoConfig.from_pretrained(name, **TRUST).thresholds
print(json.dumps({"tag": use(name, revision="v1"), "commit": use(name, revision=first), "now": now}))
"""
        used = self.load(script, f"me/{family}", first)
        assert used["now"] == [0.5] * 7
        for key in ("tag", "commit"):
            check(used[key], model, processor, self.image)

    def refusals(self):
        family = self.families[0]
        self.hub.repositories["model", "me/gated"] = replace(
            self.hub.repositories["model", f"me/{family}"], name="me/gated"
        )
        self.hub.gated.add("me/gated")
        script = """
said = {}
for repo, revision in (("me/nothing", None), (sys.argv[1], "v9"), ("me/gated", None)):
    try:
        AutoModel.from_pretrained(repo, revision=revision, **TRUST)
    except OSError as error:
        said[f"{repo}@{revision}"] = str(error)
print(json.dumps(said))
"""
        said = self.load(script, f"me/{family}")
        assert "not a valid model identifier" in said["me/nothing@None"]
        assert "v9 is not a valid git identifier" in said[f"me/{family}@v9"]
        assert "gated" in said["me/gated@None"]
        stranger = self.load(script, f"me/{family}", token=None)
        assert "not a valid model identifier" in stranger[f"me/{family}@v9"], "a private repository shows itself"
        before = self.hub.state(f"me/{family}")
        run_folder = str(self.folder / family)
        assert self.push([run_folder, "me/new"], [run_folder, f"me/{family}"], token="hf_wrong") == [2, 2]
        assert self.hub.state("me/new") is None and self.hub.state(f"me/{family}") == before
        assert self.push([run_folder, f"me/{family}", "--tag", "v1"]) == [2], "a tag that is taken"
        assert self.hub.state(f"me/{family}") == before
        return "missing, gated, private, wrong token, tag taken"

    def broken_connections(self):
        """Which fault, how often, and whether the push arrives. Whatever does not arrive leaves no trace."""
        family, always = self.families[0], 10_000
        run_folder = str(self.folder / family)
        cases = {
            "commit refused once": (Fault("POST", "/commit/", "refuse"), True),
            "commit done, answer lost": (Fault("POST", "/commit/", "lose"), True),
            "busy twice": (Fault("POST", "/preupload/", "busy", 2), True),
            "tag set, answer lost": (Fault("POST", "/tag/", "lose"), True),
            "upload never": (Fault("PUT", "/lfs/", "refuse", always), False),
            "commit never": (Fault("POST", "/commit/", "refuse", 40), False),
            "tag never": (Fault("POST", "/tag/", "refuse", always), False),
        }
        for number, (name, (fault, arrives)) in enumerate(cases.items()):
            for repo in (f"me/fresh{number}", f"me/{family}"):
                self.hub.large_files.clear()  # else an upload would find its file there
                for repository in self.hub.repositories.values():
                    for tree in repository.commits.values():
                        self.hub.large_files |= {blob.sha256: blob.data for blob in tree.values() if blob.lfs}
                before, count = self.hub.state(repo), fault.times
                if not arrives and fault.method == "PUT":
                    self.change_weights(run_folder)
                self.hub.faults = [Fault(fault.method, fault.pattern, fault.kind, fault.times)]
                outcome = self.push([run_folder, repo])
                self.hub.faults = []
                if not arrives:
                    assert outcome == [2] and self.hub.state(repo) == before, (name, repo, outcome)
                    continue
                repository = self.hub.repositories["model", repo]
                assert outcome == [0] and repository.branches["main"] in repository.tags.values(), (name, repo, count)
        return f"{len(cases)} faults, each on a new repository and on one that exists"

    def change_weights(self, run_folder: str):
        """Others than any that the Hub has seen, so that they must be uploaded."""
        model = self.models[self.families[0]][0]
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        model.save_pretrained(Path(run_folder) / "best")

    def broken_download(self):
        family = self.families[-2]
        self.hub.faults = [Fault("GET", "/lfs/objects/", "cut"), Fault("GET", r"/resolve/.*config\.json", "refuse")]
        used = self.load(f"print(json.dumps(use('me/{family}')))")
        assert [fault.times for fault in self.hub.faults] == [0, 0]
        self.hub.faults = []
        check(used, *self.models[family], self.image)
        return "weights cut in half, a request refused: loaded all the same"


def main() -> int:
    table, start = Table(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder))
        with scene.hub:
            table.row("push: one private commit, tagged, verified", scene.publish)
            table.row("load without the package, equal logits", scene.load_everything)
            table.row("load again without the Hub, from the cache", scene.offline)
            table.row("revisions: a tag, a commit, a second push", scene.revisions)
            table.row("refused in words, nothing changed", scene.refusals)
            table.row("connections that break while pushing", scene.broken_connections)
            table.row("connections that break while loading", scene.broken_download)
    checks = table.held + table.broken
    print(f"hub-test: {table.held} of {checks} rows held in {time.monotonic() - start:.0f} s.")
    return 1 if table.broken else 0


if __name__ == "__main__":
    sys.exit(main())
