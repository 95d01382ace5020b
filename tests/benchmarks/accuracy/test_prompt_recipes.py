import torch

from benchmarks.accuracy.long_tail import build_parser
from benchmarks.accuracy.prompt_recipes import BEFORE, METHODS, RECIPES, StoredFeatures, chosen_recipe


def test_options_of_prompts_reach_prompts_alone():
    options = "--prompt_rate 0.5 --prompt_epochs 7 --prompt_optimizer sgd --context_init random --consistency 0.2"
    args = build_parser().parse_args(options.split())
    for name, recipe in RECIPES.items():
        chosen = chosen_recipe(name, args)
        if recipe.phase == "phase1":
            assert chosen == recipe
        else:
            assert (chosen.learning_rate, chosen.epochs, chosen.optimizer) == (0.5, 7, "sgd")
            weight = {"semantic_consistency_weight": 0.2} if name == "phase2" else {}
            assert chosen.config == {**recipe.config, "context_init": "random", **weight}
        assert chosen_recipe(name, build_parser().parse_args([])) == recipe


def test_what_prompts_start_from_is_their_recipes_without_the_last():
    assert {METHODS[before] for before in BEFORE.values()} == {(), ("phase1",)}
    for method, before in BEFORE.items():
        assert METHODS[method][:-1] == METHODS[before]


def test_stored_features_are_given_by_row():
    image, patches = torch.arange(6.0).view(3, 2), torch.arange(24.0).view(3, 4, 2)
    rows = torch.tensor([2, 0])
    found, local, states, attentions = StoredFeatures(image, patches)(rows, output_hidden_states=False)
    assert torch.equal(found, image[[2, 0]]) and torch.equal(local, patches[[2, 0]])
    assert states is None and attentions is None
    assert StoredFeatures(image, None)(rows, patches=False)[1] is None
