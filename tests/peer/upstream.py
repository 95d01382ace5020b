"""transformers' own test suite, from the source distribution of the version that is installed.

The wheel has no tests, and the source distribution only the common ones, without three modules that these import; what
stands for those is written here. All of it goes to `build/`, nothing into the project.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

VERSION = transformers.__version__
FOLDER = Path(__file__).parents[2] / "build" / "peer" / f"transformers-{VERSION}"
# Not `tests`, which is a package of this project.
PACKAGE = "transformers_tests"

# File below FOLDER -> its text. Two of the common tests import transformers anew, from the folder that they lie in and
# from a `src` beside it: finding an empty module there, they go on with the one that is installed.
STUBS = {
    f"{PACKAGE}/__init__.py": "",
    "src/transformers/__init__.py": "",
    f"{PACKAGE}/exporters/__init__.py": "",
    f"{PACKAGE}/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    f"{PACKAGE}/generation/__init__.py": "",
    f"{PACKAGE}/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    f"{PACKAGE}/utils/__init__.py": "",
    # A value other than the default for each field that every configuration has.
    f"{PACKAGE}/utils/test_configuration_utils.py": (
        "config_common_kwargs = {\n"
        "    'return_dict': False,\n"
        "    'output_hidden_states': True,\n"
        "    'output_attentions': True,\n"
        "    'dtype': 'float16',\n"
        "    'chunk_size_feed_forward': 5,\n"
        "    'architectures': ['SomeModel'],\n"
        "    'id2label': {0: 'label'},\n"
        "    'label2id': {'label': 0},\n"
        "    'problem_type': 'regression',\n"
        "}\n"
    ),
    "utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
    # Which checkpoint a pipeline is tested with: `checks.PeerTest` makes it.
    "tests/utils/tiny_model_summary.json": "{}",
}


def unpack() -> Path:
    """Downloads the source distribution, once, and lays its tests and the stubs out in `FOLDER`.

    Raises:
        RuntimeError: the download failed.
    """
    if not (FOLDER / "complete").exists():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", f"transformers=={VERSION}", "--no-deps"]
            # pip asks a source distribution for its metadata; that builds nothing.
            command += ["--no-binary", "transformers", "--dest", temporary]
            done = subprocess.run(command, capture_output=True, text=True)
            archives = list(Path(temporary).glob("*.tar.gz"))
            if done.returncode or not archives:
                raise RuntimeError(f"pip could not download transformers {VERSION}'s source:\n{done.stderr[-2000:]}")
            with tarfile.open(archives[0]) as archive:
                for member in archive.getmembers():
                    _, _, path = member.name.partition("/")  # transformers-5.x/tests/test_modeling_common.py
                    if member.isfile() and path.startswith("tests/"):
                        _write(f"{PACKAGE}/{path.removeprefix('tests/')}", archive.extractfile(member).read())
    for path, text in STUBS.items():
        if not (FOLDER / path).exists():
            _write(path, text.encode())
    (FOLDER / "complete").touch()
    return FOLDER


def _write(path: str, content: bytes) -> None:
    (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
    (FOLDER / path).write_bytes(content)
