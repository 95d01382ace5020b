"""Python in a process of its own, in which nothing of this package and of Hugging Face is imported yet.

It has imported torch, which alone would take four seconds of each such process: it is forked from one that did nothing
else.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from functools import cache
from pathlib import Path

# Slow to import, and none reads a variable of Hugging Face.
IMPORTED = ("httpx2", "scipy.optimize", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp")
IMPORTED += ("torch.distributed.tensor", "torch.distributed.elastic.agent.server", "torch.nn.attention.flex_attention")


def python(*command, cwd, env: dict[str, str], timeout: int = 500) -> subprocess.CompletedProcess:
    """As `python *command` with captured output; the command begins with -c or with the path of a script."""
    server = _server()
    with tempfile.TemporaryDirectory() as output:
        order = {"command": [*map(str, command)], "folder": str(cwd), "environment": env}
        try:
            print(json.dumps({**order, "output": output, "timeout": timeout}), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
        except BaseException:  # a test's own limit: what comes after must not get this one's status
            server.kill()
            _server.cache_clear()
            raise
        stdout, stderr = (Path(output, name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(command, status, stdout, stderr)


@cache
def _server() -> subprocess.Popen:
    """It ends with this process, which holds its input open."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__], **pipes, env=environment, cwd="/", text=True)


def _serve() -> None:
    del sys.path[0]  # this folder
    gc.disable()  # nothing to collect, and a fifth of the time
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            gc.freeze()
            gc.enable()
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _become(command: list[str], folder: str, environment: dict[str, str], output: str, timeout: int) -> None:
    signal.alarm(timeout)
    for number, path in enumerate((os.devnull, f"{output}/out", f"{output}/err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command if command[0] != "-c" else ["-c", *command[2:]]
    first = "" if command[0] == "-c" else os.path.dirname(os.path.abspath(command[0]))
    sys.path[:0] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    if command[0] == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), vars(main))
    else:
        runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
