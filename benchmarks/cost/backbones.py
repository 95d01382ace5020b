"""What HSVLT stands on: every backbone that transformers lists and vision towers beside them, tried one by one.

    python -m benchmarks.cost.backbones                 all of them, minutes
    python -m benchmarks.cost.backbones dinov2 clip     these alone

Each is made tiny, with random weights: read at four places; shown an image that changes in one corner, where its finest
map has to change most; run at 64 x 64 and 96 x 128 pixels; trained a step, where a gradient has to reach every
parameter; saved, and loaded in a process without this package; exported to ONNX and compared; asked for heat maps. A
line each, with the reason where it is refused.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES
from transformers.utils import logging

from benchmarks.command import benchmark_parser, run_benchmark
from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, MultiLabelImageProcessor, label_heat_maps
from modeling_hsvlt.configuration_hsvlt import BLOCK_BACKBONES

SIZES = ((64, 64), (96, 128))
_VIT = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
VIT = {**_VIT, "intermediate_size": 64}
DINO = {**_VIT, "mlp_ratio": 2}
FOUR = {"depths": [1, 1, 1, 1]}
STAGES = {**FOUR, "hidden_sizes": [8, 16, 24, 32]}
RESNET = {**STAGES, "embedding_size": 8, "layer_type": "basic"}
SWIN = {**FOUR, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 64}
NAFLEX = {**{name: value for name, value in VIT.items() if name != "image_size"}, "num_patches": 16}
HGNET = {"stage_in_channels": [8, 16, 24, 32], "stage_mid_channels": [8] * 4, "stage_out_channels": [16, 24, 32, 40]}
HGNET |= {"stem_channels": [3, 8, 8], "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4}
PVT = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2] * 4, "image_size": 64}
SAPIENS = {"num_key_value_attention_heads": 1, "num_key_value_heads_per_layer": None, "num_register_tokens": 2}
SAPIENS |= {"num_first_full_attention_layers": 2, "num_last_full_attention_layers": 2}

# Configurations of the types that transformers maps to a backbone.
BACKBONES: dict[str, dict] = {
    "beit": VIT,
    "bit": {**RESNET, "layer_type": "preactivation", "hidden_sizes": [8, 16, 32, 64], "num_groups": 2},
    "convnext": STAGES,
    "convnextv2": STAGES,
    "dinat": {**FOUR, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "kernel_size": 3, "dilations": [[1]] * 4},
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_convnext": STAGES,
    "dinov3_vit": {**VIT, "num_register_tokens": 2},
    "focalnet": {**STAGES, "embed_dim": 8, "image_size": 64},
    "hgnet_v2": HGNET,
    "hiera": {**FOUR, "embed_dim": 8, "num_heads": [1, 1, 2, 2], "image_size": [64, 64]},
    "lw_detr_vit": {**DINO, "num_windows": 4, "num_windows_side": 2, "pretrain_image_size": 64},
    "maskformer-swin": SWIN,
    "pixio": DINO,
    "pp_lcnet": {"scale": 0.25},
    "pp_lcnet_v3": {"scale": 0.25},
    "pp_lcnet_v4": {},
    "pvt_v2": {**PVT, **FOUR},
    "resnet": RESNET,
    "rf_detr_dinov2": {**DINO, "num_windows": 2},
    "rt_detr_resnet": RESNET,
    "sapiens2": {**VIT, **SAPIENS},
    "swin": SWIN,
    "swinv2": SWIN,
    "textnet": {"hidden_sizes": [8, 8, 16, 24, 32], "stem_out_channels": 8, "image_size": [64, 64]},
    "timm_backbone": {"backbone": "resnet10t"},
    "tipsv2": {"vision_config": DINO, "text_config": {"hidden_size": 32, "num_attention_heads": 2}},
    "tipsv2_vision_model": DINO,
    "uvdoc_backbone": {},
    "vitdet": DINO,
    "vitpose_backbone": DINO,
}
# Vision towers that are none.
TOWERS: dict[str, dict] = {
    "vit": VIT,
    "deit": VIT,
    "vit_msn": VIT,
    "vit_mae": VIT,
    "ijepa": VIT,
    "data2vec-vision": VIT,
    "clip": {"vision_config": VIT},
    "clip_vision_model": VIT,
    "chinese_clip_vision_model": VIT,
    "mlcd_vision_model": VIT,
    "siglip": {"vision_config": VIT},
    "siglip_vision_model": VIT,
    "siglip2_vision_model": NAFLEX,
    "aimv2_vision_model": VIT,
    "internvl_vision": VIT,
    "pixtral": VIT,
    "regnet": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "segformer": {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 1, 2, 2], **FOUR},
    "dpt": VIT,
    "radio": VIT,
    "yolos": {**VIT, "image_size": [64, 64], "num_detection_tokens": 3},
    "sam_vision_model": {**VIT, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1]},
    "sam3_vit_model": {**VIT, "pretrain_image_size": 64, "window_size": 2, "global_attn_indexes": [1]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevitv2": {"width_multiplier": 0.25},
    # Those that AutoModel does not know; BLIP-2's is an EVA.
    "blip_vision_model": VIT,
    "blip_2_vision_model": VIT,
    "metaclip_2_vision_model": VIT,
    "owlv2_vision_model": VIT,
}
COLUMNS = ("read at", "in place", "96 x 128", "gradients", "load", "ONNX", "heat maps")
PACKAGE = Path(__file__).parents[2]

# In a process where nobody finds this package, each checkpoint by the code that it carries.
LOAD = """
import json, sys
import torch
sys.path.insert(0, "")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_hsvlt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoModel
found = {}
for name in sys.argv[1:]:
    saved = torch.load(f"{name}/seen.pt")
    try:
        with torch.no_grad():
            logits = AutoModel.from_pretrained(name, trust_remote_code=True).eval()(saved["images"]).logits
        found[name] = float((logits - saved["logits"]).abs().max() / saved["logits"].abs().max())
    except Exception as error:
        found[name] = str(error).strip().splitlines()[0]
print(json.dumps(found))
"""


def reason(error: Exception) -> str:
    """The sentence of an error that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("ValueError", "TypeError"))] or lines[:1]
    line = said[-1] if said else ""
    return re.sub(r"^\w+Error: ", "", line).partition(". ")[0] or type(error).__name__


def attempt(step: Callable[[], str]) -> str:
    try:
        return step()
    except Exception as error:
        return f"no: {reason(error)}"


def images_of(size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def try_backbone(model_type: str, fields: dict, folder: Path, onnx: bool = True) -> dict[str, str]:
    """The row of a type; where it can be read, its checkpoint stands in `folder`."""
    torch.manual_seed(0)
    try:
        config = HSVLTConfig(
            backbone_config={"model_type": model_type, **fields},
            num_labels=5,
            label_embedding_dim=12,
            image_size=SIZES[0][0],
            initializer_range=None,
        )
        model = HSVLTForImageClassification(config)
    except Exception as error:
        return {"read at": f"refused: {reason(error)}"}
    backbone, row = model.hsvlt.backbone, {}
    walked = config.backbone_config.model_type in BLOCK_BACKBONES
    places = getattr(backbone, "places", None) or (["every block"] if walked else config.backbone_config.out_features)
    row["read at"] = ", ".join(str(place).removeprefix("stage") for place in places)

    def gradients() -> str:
        model(images_of(SIZES[0]), labels=torch.ones(2, 5)).loss.backward()
        dead = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        model.zero_grad()
        return f"no: none for {', '.join(dead)}" if dead else "all"

    def in_place() -> str:
        images = images_of(SIZES[0])[:1].repeat(5, 1, 1, 1)
        top, bottom = slice(16), slice(-16, None)
        for corner, (rows, columns) in enumerate(((top, top), (top, bottom), (bottom, top), (bottom, bottom)), 1):
            images[corner, :, rows, columns] += 1
        with torch.no_grad():
            first = next(iter(backbone(images)))
        changes = (first[1:] - first[0]).abs().sum(1)
        found = F.adaptive_max_pool2d(changes, 2).flatten(1).argmax(1).tolist()
        return "yes" if found == [0, 1, 2, 3] else "no: a change in one corner shows in another"

    def another_size() -> str:
        try:
            with torch.no_grad():
                return "yes" if model(images_of(SIZES[1])).logits.isfinite().all() else "no: not finite"
        except ValueError as error:
            known = " x ".join(map(str, SIZES[0]))
            if f"made for {known} pixels) cannot read" not in str(error):
                raise
            return f"no, {known} alone, and says so"

    def save() -> str:
        model.save_pretrained(folder)
        with torch.no_grad():
            seen = {"images": images_of(SIZES[0]), "logits": model(images_of(SIZES[0])).logits}
        torch.save(seen, folder / "seen.pt")
        return "saved"

    def export() -> str:
        from training.publish.to_onnx import export_onnx

        size = {"height": SIZES[0][0], "width": SIZES[0][1]}
        return f"{export_onnx(model, MultiLabelImageProcessor(size=size), folder / 'model.onnx'):.0e}"

    def heat_maps() -> str:
        with torch.no_grad():
            maps = label_heat_maps(model, images_of(SIZES[0]))[1]
        return " x ".join(map(str, maps.shape[2:]))

    model.eval()
    row["in place"] = attempt(in_place)
    model.train()
    row["gradients"] = attempt(gradients)
    model.eval()
    row["96 x 128"] = attempt(another_size)
    row["load"] = attempt(save)
    row["heat maps"] = attempt(heat_maps)
    row["ONNX"] = attempt(export) if onnx else "-"
    return row


def load_all(names: list[str], folder: Path) -> dict[str, str]:
    """What a process without the package says of the checkpoints in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, *names]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {name: f"no: {(done.stderr.strip().splitlines() or ['it ended'])[-1]}" for name in names}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        name: ("yes" if value < 1e-5 else f"no: off by {value:.0e}") if isinstance(value, float) else f"no: {value}"
        for name, value in found.items()
    }


def print_table(rows: dict[str, dict[str, str]]) -> None:
    print(f"| type | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(row.get(column, '') for column in COLUMNS)} |")


def run(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = BACKBONES | TOWERS
    unknown = [name for name in args.types if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}.")
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in args.types or known:
            rows[name] = try_backbone(name, known[name], folder / name, onnx=not args.skip_onnx)
            print(f"{name}: {rows[name]}", file=sys.stderr)
        saved = [name for name, row in rows.items() if row.get("load") == "saved"]
        for name, said in load_all(saved, folder).items() if saved else ():
            rows[name]["load"] = said
    for name in MODEL_FOR_BACKBONE_MAPPING_NAMES.keys() - known.keys():
        rows[name] = {"read at": "not tried: transformers has it, this table has no configuration for it"}
    print_table(rows)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = benchmark_parser("cost.backbones", __doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="these alone")
    parser.add_argument("--skip_onnx", action="store_true", help="leave the export out, which takes most of the time")
    return run_benchmark(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
