"""What `long_tail.py` trains of HP-DVAL, and how."""

import argparse
from dataclasses import dataclass, field, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """How a method is trained. `config` are fields of `HPDVALConfig`."""

    phase: str
    epochs: int
    learning_rate: float
    config: dict = field(default_factory=dict)
    optimizer: str = "adamw"


PROMPTS_ALONE = {"alpha": 1.0, "semantic_consistency_weight": 0.0, "context_init": "template"}
# Chosen on the validation split of seed 0, for prompts as for the student, at a logit scale of 10. There a higher rate,
# or contexts that start at random as CoOp's do, fall below zero-shot; calibrated, both gain from few images a label.
RECIPES = {
    "coop": Recipe("phase2", 20, 2e-4, PROMPTS_ALONE),
    "class_contexts": Recipe("phase2", 20, 2e-4, {**PROMPTS_ALONE, "class_specific": True}),
    "phase1": Recipe("phase1", 20, 1e-3, {"alpha": 0.7}),
    "phase2": Recipe("phase2", 20, 2e-4, {"context_init": "template"}),
}
# The recipes of each method, one after the other.
METHODS = {
    "zero_shot": (),
    "linear_probe": (),
    "coop": ("coop",),
    "class_contexts": ("class_contexts",),
    "phase1": ("phase1",),
    "phase1_phase2": ("phase1", "phase2"),
}
# What prompts start from, for the gain of each.
BEFORE = {"coop": "zero_shot", "class_contexts": "zero_shot", "phase1_phase2": "phase1"}


def chosen_recipe(name: str, args: argparse.Namespace) -> Recipe:
    """A recipe with what the command line says of prompts."""
    recipe = RECIPES[name]
    if recipe.phase != "phase2":
        return recipe
    config = {**recipe.config, "context_init": args.context_init or recipe.config["context_init"]}
    if args.consistency is not None and name == "phase2":  # the prompts of others know no such loss
        config["semantic_consistency_weight"] = args.consistency
    return replace(
        recipe,
        epochs=args.prompt_epochs or recipe.epochs,
        learning_rate=args.prompt_rate or recipe.learning_rate,
        optimizer=args.prompt_optimizer or recipe.optimizer,
        config=config,
    )


class StoredFeatures(nn.Module):
    """In the place of a frozen student: what it gave, to be asked for by row.

    Args:
        image_embeds (`torch.Tensor` of shape `(rows, E)`), patch_embeds (`(rows, P, E)`, or None).
    """

    def __init__(self, image_embeds: torch.Tensor, patch_embeds: torch.Tensor | None):
        super().__init__()
        self.image_embeds, self.patch_embeds = image_embeds, patch_embeds

    def forward(self, rows: torch.Tensor, patches: bool = True, **kwargs):
        return self.image_embeds[rows], self.patch_embeds[rows] if patches else None, None, None
