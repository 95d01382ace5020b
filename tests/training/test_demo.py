"""`hsvlt demo`: the Space's app on a checkpoint of one's own."""

import ast
import os

import pytest

from training import demo
from training.places import shipped


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A folder with a run; what was started in it, with the environment that it had."""
    monkeypatch.chdir(tmp_path)
    for name in ("MODELS", "OPEN_BROWSER"):
        monkeypatch.setenv(name, "")
    (tmp_path / "runs" / "my cats" / "best").mkdir(parents=True)
    (tmp_path / "runs" / "my cats" / "best" / "config.json").touch()
    (tmp_path / "runs" / "my cats" / "config.yaml").touch()
    calls = []
    run = monkeypatch.setattr
    run(demo.runpy, "run_path", lambda path, run_name: calls.append((path, run_name, models(os.environ["MODELS"]))))
    run(demo, "find_spec", lambda name: object())
    return calls


def models(text):
    """The checkpoints that the app reads out of MODELS; it cannot be imported without gradio."""
    tree = ast.parse((shipped("space") / "app.py").read_text())
    lines = [node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "MODELS"]
    space = {"os": type("os", (), {"environ": {"MODELS": text}})}
    exec(compile(ast.Module(lines, []), "app.py", "exec"), space)
    return space["MODELS"]


@pytest.mark.parametrize(
    ("text", "names"),
    [("", []), ("org/one, org/two@v1", ["org/one", "org/two@v1"]), ("runs/my cats/best\n", ["runs/my cats/best"])],
)
def test_names_with_blanks_end_with_their_line(text, names):
    assert models(text) == names


@pytest.mark.parametrize("argv", [[], ["runs/my cats"], ["runs/my cats/best"]])
def test_the_app_gets_the_checkpoint(argv, started):
    assert demo.main(argv) == 0
    assert started == [(str(shipped("space") / "app.py"), "__main__", ["runs/my cats/best"])]
    assert os.environ["OPEN_BROWSER"] == "1"


def test_without_gradio_it_says_what_to_install(started, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.main([]) == 2 and not started
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "requirements.txt" in error and "MODELS='runs/my cats/best'" in error
