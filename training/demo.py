"""Open a demo of a checkpoint in the browser: drop an image, see its labels, choose one to see where it was found.

    hsvlt demo                    the newest run below runs/
    hsvlt demo runs/photos        or any run, checkpoint or Hub id

The checkpoint's own code is run; of a Hub id, pin the commit (`org/name@commit`).
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from .options import option, run_command
from .places import checkpoint_folder, last_run, shipped


@dataclass(kw_only=True)
class DemoOptions:
    checkpoint: str | None = option(
        None,
        "folder or Hub id; left out: the newest run",
        positional=True,
        read=checkpoint_folder,
        metavar="CHECKPOINT",
    )


def run(args: DemoOptions) -> None:
    """Runs the Space's app.

    Raises:
        ValueError, OSError: there is no run, or no gradio.
    """
    checkpoint, app = args.checkpoint or last_run(), shipped("space") / "app.py"
    if find_spec("gradio") is None:
        requirements, start = shlex.quote(str(app.with_name("requirements.txt"))), shlex.quote(str(app))
        raise ValueError(
            "hsvlt demo needs gradio, which wants an older Pillow than this package and so an environment of its own: "
            f"python -m venv demo && demo/bin/pip install -r {requirements} && "
            f"MODELS={shlex.quote(checkpoint)} demo/bin/python {start}"
        )
    print(f"{checkpoint}, until Ctrl-C.")
    os.environ |= {"MODELS": f"{checkpoint}\n", "OPEN_BROWSER": "1"}
    runpy.run_path(str(app), run_name="__main__")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 when it was closed, 2 when something was refused."""
    return run_command(run, DemoOptions, "demo", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
