"""Runs that the tests of a file share; none may change what is in them."""

import pytest

from training.train import main

from .tiny_run import write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([recipe, "--output_dir", str(folder), "--evaluate_test"]) == 0
    return folder
