"""onnxruntime-web, which runs a model in a browser: a few files of its npm package, taken only as they are known."""

from __future__ import annotations

import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ..places import user_cache

VERSION = "1.30.0"
# SHA-256 of each: WebAssembly alone (14 MB), and with WebGPU (27 MB).
FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}


def runtime_files(source: Path | None = None) -> dict[str, bytes]:
    """The files by name.

    Args:
        source: The package, unpacked (`node_modules/onnxruntime-web`) or as the .tgz that `npm pack` makes; None: npm
            downloads it, once.

    Raises:
        ValueError: there is no npm, or a file is not the known one.
        OSError: it cannot be downloaded or read.
    """
    source = _downloaded() if source is None else source
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give --onnxruntime_web the package's folder or .tgz.")
    if source.is_dir():
        folder = source / "dist" if (source / "dist").is_dir() else source
        found = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    else:
        found = _in_archive(source)
    for name, known in FILES.items():
        if name not in found or hashlib.sha256(found[name]).hexdigest() != known:
            what = "is not the file that is known" if name in found else "is missing"
            raise ValueError(f"{name} of {source} {what}: it must be onnxruntime-web {VERSION} as npm has it.")
    return found


def _in_archive(path: Path) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.removeprefix("package/dist/")
                if name in FILES and member.isfile() and member.size < 2**26:
                    found[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is no .tgz of npm ({error}); delete it, or give another.") from error
    return found


def _downloaded() -> Path:
    package = user_cache() / f"onnxruntime-web-{VERSION}.tgz"
    if package.is_file():
        return package
    package.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=package.parent) as folder:
        command = ["npm", "pack", f"onnxruntime-web@{VERSION}", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ValueError(
                f"The layout web needs onnxruntime-web {VERSION}, which npm downloads, and there is no npm: install "
                "Node.js, or give --onnxruntime_web the package's folder or .tgz."
            ) from error
        except subprocess.CalledProcessError as error:
            reason = next(iter(error.stderr.strip().splitlines()), "no reason given")
            raise OSError(f"npm could not download onnxruntime-web {VERSION}: {reason}") from error
        next(Path(folder).glob("*.tgz")).rename(package)
    return package
