"""A small part of `make hub-test`: an adapter and its base, pushed, and loaded by a process without the package."""

import pytest

from .hub_table import ADAPTER, BASE, Scene

pytestmark = pytest.mark.slow


def test_an_adapter_and_its_base_are_pushed_and_load(tmp_path):
    scene = Scene(tmp_path, families=(BASE, ADAPTER))
    with scene.hub:
        scene.publish()
        scene.load_everything()
