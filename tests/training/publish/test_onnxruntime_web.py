"""What goes beside a page that runs it is known byte by byte, wherever it comes from."""

import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from training.export import main
from training.publish import onnxruntime_web
from training.publish.onnxruntime_web import FILES, VERSION, runtime_files


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The package of npm, unpacked, with files of a few bytes in it and their hashes known."""
    for name in FILES:
        (tmp_path / "package" / "dist").mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / "dist" / name).write_text(f"this is {name}")
    known = {name: hashlib.sha256(f"this is {name}".encode()).hexdigest() for name in FILES}
    monkeypatch.setattr(onnxruntime_web, "FILES", known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "package"


def packed(package: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(package, "package")
    return path


def test_a_folder_or_an_archive_without_a_network(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    wanted = {name: f"this is {name}".encode() for name in FILES}
    assert runtime_files(package) == runtime_files(package / "dist") == wanted
    assert runtime_files(packed(package, tmp_path / "web.tgz")) == wanted
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        runtime_files(tmp_path / "nowhere")


def test_another_file_is_refused(package, tmp_path):
    changed = package / "dist" / "ort.wasm.min.mjs"
    changed.write_text("this is ort.wasm.min.mjs; and more")
    for source in (package, packed(package, tmp_path / "web.tgz")):
        with pytest.raises(ValueError, match=f"ort.wasm.min.mjs of .* is not the file .* onnxruntime-web {VERSION}"):
            runtime_files(source)
    changed.unlink()
    with pytest.raises(ValueError, match=r"ort.wasm.min.mjs of .* is missing"):
        runtime_files(package)
    for content in (b"no archive", (tmp_path / "web.tgz").read_bytes()[:200]):
        (tmp_path / "broken.tgz").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.tgz"):
            runtime_files(tmp_path / "broken.tgz")


def test_npm_is_asked_once_and_its_absence_is_told(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ValueError, match=r"there is no npm: install Node\.js, or give --onnxruntime_web"):
        runtime_files()
    packed(package, tmp_path / "web.tgz")
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    copy = f"from shutil import copy; copy({str(tmp_path / 'web.tgz')!r}, argv[-1] + '/onnxruntime-web.tgz')"
    npm.write_text(
        f"#!{os.sys.executable}\nfrom sys import argv\nassert argv[2] == 'onnxruntime-web@{VERSION}'\n{copy}\n"
    )
    npm.chmod(0o755)
    wanted = runtime_files(package)
    assert runtime_files() == wanted
    npm.write_text("#!/bin/sh\necho 'npm error offline' >&2; exit 1\n")
    assert runtime_files() == wanted
    for path in (tmp_path / "cache" / "hsvlt").iterdir():
        path.unlink()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    with pytest.raises(OSError, match=r"npm could not download .*: npm error offline"):
        runtime_files()


def test_refused_before_anything_is_computed(package, tmp_path, capsys):
    (package / "dist" / "ort.wasm.min.mjs").unlink()
    arguments = [str(tmp_path / "no checkpoint"), str(tmp_path / "target"), "--onnxruntime_web", str(package)]
    assert main([*arguments, "--layout", "web"]) == 2
    assert "ort.wasm.min.mjs" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "--onnxruntime_web is for --layout web" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()
